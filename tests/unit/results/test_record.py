import json
import re

import pytest

from mcl_clip.core.errors import UserError
from mcl_clip.core.files import DONE
from mcl_clip.data.index import ShardIndex
from mcl_clip.results.record import data_losses
from tests.unit.data.tars import pairs, write_tar


def write_lines(path, *values):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(value) + "\n" for value in values))


def step(number, **counts):
    return {"step": number, "loss": 1.0, "samples_seen": 16 * number, "duplicates": 0.0,
            "rows_without_weight": 0.0, **counts}  # fmt: skip


@pytest.fixture
def run(tmp_path):
    """A run of two stages that lost nothing, the second of which is being trained."""
    folder = tmp_path / "run"
    train = {"steps": 20, "mask_duplicates": True}
    config = {"seed": 0, "tower": {"architecture": ""}, "stages": [{"train": train}, {"train": train}]}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    write_lines(folder / "launches.jsonl", {"time": "t"})
    for stage in (0, 1):
        write_lines(folder / f"stage-{stage}/train/metrics.jsonl", step(5), step(10))
        (folder / f"stage-{stage}/train/checkpoints/step-000000010").mkdir(parents=True)
    (folder / "stage-0/train" / DONE).write_text("{}")
    return folder


def test_nothing_was_lost(run):
    assert data_losses(run) == ["nothing"]


def test_bad_samples_by_shard_and_reason(run):
    bad = [(1, "a/0.tar", "broken_image"), (2, "b/0.tar", "empty_caption"), (3, "a/0.tar", "empty_caption"),
           (4, "a/0.tar", "broken_image")]  # fmt: skip
    write_lines(
        run / "stage-1/train/bad_samples.jsonl",
        *({"step": 1, "row": row, "shard": shard, "reason": reason} for row, shard, reason in bad),
    )
    write_lines(
        run / "stage-0/embed/bad_samples.jsonl",
        *({"step": 0, "row": row, "shard": f"s3://me:secret@x/{row}.tar", "reason": "bad_json"} for row in range(7)),
    )
    assert data_losses(run) == [
        "stage 0: embedding could not decode 7 samples",
        *(f"stage 0: embedding: s3://x/{row}.tar: bad_json 1" for row in range(5)),
        "stage 0: embedding: 2 more shards: 2 samples",
        "stage 1: training could not decode 4 samples",
        "stage 1: training: a/0.tar: broken_image 2, empty_caption 1",
        "stage 1: training: b/0.tar: empty_caption 1",
    ]


def test_duplicates_and_rows_without_weight_are_sums_over_all_steps(run):
    write_lines(
        run / "stage-1/train/metrics.jsonl",
        step(5, duplicates=1000.0, rows_without_weight=2.0),
        {"step": 5, "set/acc1": 0.5},
        step(10, duplicates=234.0, rows_without_weight=1.0),
    )
    assert data_losses(run) == [
        "stage 1: 1,234 negatives with the same caption or image as their row were masked",
        "stage 1: 3 of 160 rows had too few negatives in their batch, and got weight 0",
    ]


def test_duplicates_that_were_not_masked(run):
    config = json.loads((run / "config.json").read_text())
    config["stages"][0]["train"]["mask_duplicates"] = False
    (run / "config.json").write_text(json.dumps(config))
    write_lines(run / "stage-0/train/metrics.jsonl", step(10, duplicates=2.0))
    assert data_losses(run) == ["stage 0: 2 negatives with the same caption or image as their row were kept"]


@pytest.mark.parametrize(
    ("side", "words"), [("text", "captions similar to those"), ("image", "an image similar to that")]
)
def test_similar_rows_that_were_masked(run, side, words):
    config = json.loads((run / "config.json").read_text())
    config["stages"][0]["train"] |= {"mask_similar": 0.9, "similar_by": side}
    (run / "config.json").write_text(json.dumps(config))
    write_lines(run / "stage-0/train/metrics.jsonl", step(5, similar=2000.0), step(10))
    assert data_losses(run) == [f"stage 0: 2,000 negatives with {words} of their row were masked"]


def test_merged_groups(run):
    groups = {"rows_relaxed": 30, "groups": [{"size": 30}, {"size": 70}]}
    (run / "stage-1/train/groups.json").write_text(json.dumps(groups))
    assert data_losses(run) == ["stage 1: 30 of 100 rows are in groups merged from several labels, to have enough rows"]


def test_starts(run):
    write_lines(run / "launches.jsonl", *[{"time": "t"}] * 3)
    assert data_losses(run) == ["the run was started 3 times"]


def test_steps_that_are_not_saved(run):
    for stage in (0, 1):
        write_lines(run / f"stage-{stage}/train/metrics.jsonl", step(10), step(14))
        (run / f"stage-{stage}/train/checkpoints/step-000000005").mkdir()
    assert data_losses(run) == [
        "stage 1: steps 11 to 14 are not in a checkpoint yet; if training stops now, they are repeated"
    ]


def test_samples_that_are_not_pairs(run, tmp_path):
    write_tar(tmp_path / "x.tar", [*pairs(5), ("alone.jpg", b"x"), ("b.txt", b"x"), ("c.txt", b"x")])
    ShardIndex.build([str(tmp_path / "x.tar")]).save(run / "index/index.arrow")
    assert data_losses(run) == ["index: 3 samples of the shards are not pairs (missing_image 2, missing_text 1)"]


def test_something_else_than_a_run(tmp_path):
    with pytest.raises(UserError, match=r"is not a run directory: it has no config\.json"):
        data_losses(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("train/metrics.jsonl", '{"loss": 1.0, "duplicates": "many"}\n', "the counts in {stage} are damaged"),
        ("train/bad_samples.jsonl", '{"row": 1}\n', "the counts in {stage} are damaged"),
        ("train/groups.json", '{"rows_relaxed": 3, "groups": [7]}', "the counts in {stage} are damaged"),
        ("train/groups.json", "[]", "{stage}/train/groups.json is not a JSON object"),
    ],
)
def test_damaged_files(run, name, text, message):
    (run / "stage-1" / name).write_text(text)
    with pytest.raises(UserError, match=re.escape(message.format(stage=run / "stage-1"))):
        data_losses(run)
