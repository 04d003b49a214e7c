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


@pytest.mark.parametrize(
    ("loss", "kind"), [(0.2, "suppressed"), (0.22, "neither"), (1.03, "neither"), (1.05, "learning")]
)
def test_solved_is_below_a_twentieth_of_guessing_and_learning_above_a_quarter(loss, kind):
    assert diagnose(loss=loss, scores={"shape": 0.2}, **STAGE).kind == kind  # guessing among 63 negatives: 4.16


def test_a_score_is_poor_below_a_half():
    said = diagnose(loss=0.01, scores={"shape": 0.49, "texture": 0.51}, **STAGE)
    assert "(shape 49 %)" in said.text


def test_few_rows_or_no_negatives():
    said = diagnose(loss=0.0, negatives=0.0, scores={"shape": 0.1}, rows=10, global_batch_size=64)
    assert said.kind == "suppressed"
    assert "about 2 clusters" in said.text
