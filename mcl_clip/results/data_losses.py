"""What a run lost on its way, from its files alone."""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mcl_clip.core.errors import UserError
from mcl_clip.core.files import DONE, read_json, read_jsonl, read_run_config
from mcl_clip.data.index import ShardIndex
from mcl_clip.data.shards import redacted
from mcl_clip.train.checkpoint import checkpoints

SHARDS_SHOWN = 5


def data_losses(run: Path) -> list[str]:
    """Lines on samples left out or not decoded, negatives masked, groups merged, rows without weight, and restarts.

    Counts of steps are of the steps that made the model: what a restart trained again counts once.

    Raises:
        UserError: if `run` is not a run directory, or one of its files is damaged.
    """
    config = read_run_config(run)
    lines = list(_left_out(run / "index" / "index.arrow"))
    for number, stage in enumerate(config["stages"]):
        folder = run / f"stage-{number}"
        try:
            lines += [f"stage {number}: {line}" for line in _of_stage(folder, stage.get("train", {}))]
        except UserError:
            raise
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise UserError(
                f"the counts in {folder} are damaged ({type(error).__name__}: {error}); restore its files, or delete "
                f"it and run the recipe again"
            ) from error
    if (starts := len(read_jsonl(run / "launches.jsonl"))) > 1:
        lines.append(f"the run was started {starts} times")
    return lines or ["nothing"]


def _left_out(path: Path) -> Iterator[str]:
    skipped = ShardIndex.load(path).skipped_by_reason() if path.exists() else {}
    if skipped:
        yield f"index: {sum(skipped.values()):,} samples of the shards are not pairs ({_counts(skipped)})"


def _of_stage(folder: Path, settings: Mapping[str, Any]) -> Iterator[str]:
    for phase, what in (("train", "training"), ("embed", "embedding")):
        yield from _bad_samples(read_jsonl(folder / phase / "bad_samples.jsonl"), what)
    steps = [record for record in read_jsonl(folder / "train" / "metrics.jsonl") if "loss" in record]
    if duplicates := _sum(steps, "duplicates"):
        done = "left out of" if settings.get("mask_duplicates", True) else "kept among"
        yield f"{duplicates:,} times another row with an equal caption or picture was {done} a row's negatives"
    if (path := folder / "train" / "groups.json").exists():
        groups = read_json(path)
        if relaxed := groups.get("rows_relaxed", 0):
            total = sum(group["size"] for group in groups["groups"])
            yield f"{relaxed:,} of {total:,} rows are in groups of several labels, merged to have enough rows"
    if weightless := _sum(steps, "rows_without_weight"):
        seen = steps[-1]["samples_seen"]
        yield f"{weightless:,} of {seen:,} times a row had too few negatives in its batch, and no weight"
    yield from _unsaved(folder / "train", steps)


def _bad_samples(records: list[dict[str, Any]], what: str) -> Iterator[str]:
    if not records:
        return
    shards = Counter(record["shard"] for record in records).most_common()
    yield f"{what} could not decode {len(records):,} samples"
    for shard, _ in shards[:SHARDS_SHOWN]:
        reasons = Counter(record["reason"] for record in records if record["shard"] == shard)
        yield f"{what}: {redacted(shard)}: {_counts(dict(reasons.most_common()))}"
    if more := shards[SHARDS_SHOWN:]:
        yield f"{what}: {len(more)} more shards: {sum(count for _, count in more):,} samples"


def _unsaved(folder: Path, steps: list[dict[str, Any]]) -> Iterator[str]:
    """Steps that the next start trains again; how many earlier starts did so is not written down anywhere."""
    if (folder / DONE).exists() or not steps:
        return
    saved = [int(path.name.removeprefix("step-")) for path in checkpoints(folder / "checkpoints")]
    newest, last = max(saved, default=0), steps[-1]["step"]
    if last > newest:
        yield f"steps {newest + 1} to {last} are not in a checkpoint; if training stops now, they are trained again"


def _sum(records: list[dict[str, Any]], name: str) -> int:
    return int(sum(record.get(name, 0) for record in records))


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())
