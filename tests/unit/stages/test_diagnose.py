import pytest

from mcl_clip.stages.diagnose import diagnose

STAGE = {"negatives": 63.0, "rows": 16384, "global_batch_size": 64}


def test_a_batch_that_is_told_apart_by_something_else():
    said = diagnose(loss=0.018, scores={"shape": 0.27, "texture": 0.81}, **STAGE)
    assert said.kind == "suppressed"
    assert said.text == (
        "the batches are solved (loss 0.018, 0.4 % of guessing among 63 negatives) while evaluation sets are poor "
        "(shape 27 %): features are suppressed. Another stage can recover them, with about 256 clusters (a batch of "
        "rows each)"
    )


@pytest.mark.parametrize(("loss", "scores"), [(2.9, {"shape": 0.2}), (1.05, {})])
def test_a_stage_that_still_learns(loss, scores):
    said = diagnose(loss=loss, scores=scores, **STAGE)
    assert said.kind == "learning"
    assert said.text.startswith("still learning (loss")


@pytest.mark.parametrize(("loss", "scores"), [(0.018, {"shape": 0.95}), (0.018, {}), (0.5, {"shape": 0.2})])
def test_nothing_to_see(loss, scores):
    said = diagnose(loss=loss, scores=scores, **STAGE)
    assert said.kind == "neither"
    assert said.text.startswith("the evaluation sets show no suppressed features")


def test_the_loss_is_judged_against_the_negatives_of_a_row():
    few = diagnose(loss=0.3, scores={"shape": 0.1}, negatives=1.0, rows=100, global_batch_size=4)
    many = diagnose(loss=0.3, scores={"shape": 0.1}, negatives=8000.0, rows=100, global_batch_size=4)
    assert few.kind == "learning"
    assert many.kind == "suppressed"
    assert "about 25 clusters" in many.text
