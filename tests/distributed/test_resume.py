"""The training loop, interrupted and started again at 1, 2 and 4 processes, also at another number than before."""

import json
import math
from pathlib import Path

import pytest

from mcl_clip.core.distributed import rank
from mcl_clip.train import checkpoint, metrics
from tests.training import ROWS, SAVE, STEPS, train, write_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("resume") / "shards")


def call(shards, out, options):
    return train(shards, out, **options)


def losses(out: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))  # none twice, none missing
    return {record["step"]: record["loss"] for record in records}


def global_rows(found) -> list[list[int]]:
    """Rows of the global batch of each step, from what the ranks returned."""
    return [[row for part in parts for row in part] for parts in zip(*(rows for rows, _ in found), strict=True)]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_resumed_stage_ends_with_the_same_bits(pool, size, shards, tmp_path):
    """Stopped twice between checkpoints; with dropout of patches, fillers and an average of the weights."""
    options = {"patch_dropout": 0.5}
    whole = pool.run(call, size, shards, tmp_path / "whole", options)
    for most_steps in (6, 7):
        pool.run(call, size, shards, tmp_path / "stopped", {**options, "most_steps": most_steps})
    resumed = pool.run(call, size, shards, tmp_path / "stopped", options)
    assert len(resumed[0][0]) == STEPS - 2 * SAVE
    assert [weights for _, weights in resumed] == [weights for _, weights in whole]
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")


def test_dropout_is_a_function_of_the_step(pool, shards, tmp_path):
    """Else the test above would show nothing of it."""
    dropped, kept = (
        pool.run(call, 1, shards, tmp_path / str(share), {"patch_dropout": share, "most_steps": 4})
        for share in (0.5, 0.0)
    )
    assert dropped[0][0] == kept[0][0]
    assert losses(tmp_path / "0.5") != losses(tmp_path / "0.0")


def test_another_number_of_processes_goes_on_with_the_same_batches(pool, shards, tmp_path):
    """From 2 to 1 to 4 processes in the middle of epochs: the remaining batches, and losses within 1e-5."""
    whole = global_rows(pool.run(call, 2, shards, tmp_path / "whole", {}))
    step = 0
    for size, most_steps in ((2, 6), (1, 7), (4, math.inf)):
        done = global_rows(pool.run(call, size, shards, tmp_path / "changed", {"most_steps": most_steps}))
        assert done == whole[step : step + len(done)]
        step += len(done) // SAVE * SAVE
    assert {row for batch in whole[:7] for row in batch} == {-1, *range(ROWS)}
    expected, found = losses(tmp_path / "whole"), losses(tmp_path / "changed")
    assert found.keys() == expected.keys()
    assert max(abs(found[step] - expected[step]) for step in found) < 1e-5


def resume_with_another_view(shards, out):
    """Rank 1 does not see the newest checkpoint, nor the last records, as on a file system that shows files late."""
    if rank() == 1:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checkpoint, "checkpoints", lambda folder: sorted(folder.glob("step-*"))[:1])
            patch.setattr(metrics, "read_jsonl", lambda path: [])
            return train(shards, out)[0]
    return train(shards, out)[0]


def test_what_is_resumed_is_what_the_main_process_sees(pool, shards, tmp_path):
    pool.run(call, 2, shards, tmp_path, {"most_steps": 2 * SAVE + 1})
    parts = pool.run(resume_with_another_view, 2, shards, tmp_path)
    assert [len(rows) for rows in parts] == [STEPS - 2 * SAVE] * 2
