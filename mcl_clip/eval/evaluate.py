"""Evaluate any model on any sets: `mcl-clip eval`, with one record per set in results.jsonl."""

import hashlib
import logging
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from mcl_clip.core.distributed import check_same, on_main
from mcl_clip.core.errors import UserError
from mcl_clip.core.files import append_jsonl, atomic_path, canonical_json, read_jsonl
from mcl_clip.eval.classification import probe_at_stage_width
from mcl_clip.eval.datasets import discover
from mcl_clip.eval.embed import raise_on_all_processes
from mcl_clip.eval.task import RESULTS, Task, result_record
from mcl_clip.model.clip import autocast
from mcl_clip.model.multistage import MultistageCLIP
from mcl_clip.model.resolve import Candidate, Loaded, find_models

logger = logging.getLogger(__name__)
T = TypeVar("T")


def evaluate(
    name: str,
    *,
    data: Path,
    tasks: Sequence[str] = (),
    out: Path | None = None,
    each: bool = False,
    device: torch.device,
    batch_size: int = 64,
    num_workers: int = 0,
    precision: str = "fp32",
    combine: str | None = None,
) -> Path:
    """Evaluate a model on the sets in `data`, and return the folder with the results.

    `results.jsonl` there has one record per set (CLIP_benchmark's and DataComp's fields, and more), and
    `outcomes-*.npz` the per-query outcomes. A set that already has a result for the same data, model, precision and
    combination is skipped, so an interrupted evaluation resumes. All processes embed; the main process scores and
    writes.

    Args:
        name: name of the model, see `mcl_clip.model.resolve.find_models`.
        data: a set, or a folder of sets, see `mcl_clip.eval.datasets.find_sets`.
        tasks: names of the sets to evaluate; all if empty.
        out: output folder; by default `evaluations/` and the name of the model.
        each: also evaluate every stage of a run; `combine` then applies to the combined model only.
        device: device to embed on.
        batch_size: images, and texts, per forward pass and process.
        num_workers: loader worker processes per process.
        precision: `fp32`, or `bf16` for bfloat16 autocast of the encoders; scoring is in higher precision always.
        combine: `concat` or `mean_cosine`, instead of the combination that a multistage model was saved with.

    Raises:
        UserError: for a wrong argument or broken data, on all processes.
    """
    models = _on_all_processes(partial(find_models, name, each=each))
    sets = _on_all_processes(partial(discover, data, tasks))
    check_same(",".join(task.sha256 for task in sets.values()), f"the data in {data}")
    out = out or Path("evaluations") / models[-1].label
    for candidate in models:
        loaded = _on_all_processes(candidate.load)
        label = [candidate.label, *([] if precision == "fp32" else [precision])]
        if isinstance(loaded, MultistageCLIP) and combine:
            loaded.combine = combine
            label.insert(1, combine)
        elif combine and not each:
            raise UserError(f"--combine {combine} has no effect on {name}, which is a single stage; leave it out")
        stage_dims = loaded.embed_dims if isinstance(loaded, MultistageCLIP) else []
        sha256 = _model_digest(loaded)
        check_same(sha256, f"the model {name}")
        identity = {
            "label": "-".join(label),
            "model_sha256": sha256,
            "dtype": precision,
            "combine": loaded.combine if isinstance(loaded, MultistageCLIP) else None,
        }
        encoder = Encoder(
            model=_module(loaded).to(device),
            image_transform=loaded.image_transform,
            tokenizer=loaded.tokenizer,
            device=device,
            batch_size=batch_size,
            num_workers=num_workers,
            precision=precision,
        )
        for task in sets.values():
            _evaluate_task(probe_at_stage_width(task, stage_dims), encoder, out, candidate, identity)
    return out


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """A model with all that is needed to embed a set with it.

    `batch_size` counts images, and texts, per forward pass and process; `num_workers` loader worker processes.
    """

    model: Any
    image_transform: Callable[[Any], Tensor]
    tokenizer: Callable[[list[str]], Tensor]
    device: torch.device
    batch_size: int = 64
    num_workers: int = 0
    precision: str = "fp32"

    def embed(self, task: Task) -> dict[str, Tensor]:
        """Compute the un-normalized features of a task's set, identical on all processes."""
        with autocast(self.precision, self.device):
            return task.embed(
                self.model,
                image_transform=self.image_transform,
                tokenizer=self.tokenizer,
                device=self.device,
                batch_size=self.batch_size,
                num_workers=self.num_workers,
            )


def run_task(task: Task, encoder: Encoder) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Return the metrics and per-query outcomes of a model on a task; all processes embed, the main process scores.

    Raises:
        UserError: on all processes, if an image cannot be decoded or features are not finite.
    """
    features = encoder.embed(task)
    return on_main(partial(task.score, features["image"], features["text"]))


def _on_all_processes(make: Callable[[], T]) -> T:
    """Return `make()`, called on every process; raise on all of them a UserError that any of them raises."""
    failure, result = "", []
    try:
        result.append(make())
    except UserError as error:
        failure = str(error)
    raise_on_all_processes(failure)
    return result[0]


def _module(loaded: Loaded) -> nn.Module:
    return loaded if isinstance(loaded, MultistageCLIP) else loaded.model


def _model_digest(loaded: Loaded) -> str:
    """Compute the SHA-256 of the weights, and of the settings that change what is computed with them."""
    settings = [loaded.preprocess_cfg, loaded.model_cfgs if isinstance(loaded, MultistageCLIP) else loaded.model_cfg]
    digest = hashlib.sha256(canonical_json(settings).encode())
    for key, value in sorted(_module(loaded).state_dict().items()):
        tensor = value.detach().cpu().contiguous()
        digest.update(f"\n{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _evaluate_task(task: Task, encoder: Encoder, out: Path, candidate: Candidate, identity: dict[str, Any]) -> None:
    """Run a task and write its outcomes and record, unless `out` has them already."""
    outcomes_file = f"outcomes-{task.name.replace('/', '--')}-{identity['label']}.npz"
    key = {"dataset": task.name, "data_sha256": task.sha256, "outcomes": outcomes_file, **identity}
    if on_main(partial(_has_result, out, key)):
        logger.info("%s, %s: already evaluated, see %s", identity["label"], task.name, out)
        return
    started = time.perf_counter()
    metrics, outcomes = run_task(task, encoder)
    seconds = time.perf_counter() - started

    def write() -> None:
        record = result_record(
            task,
            metrics,
            model=candidate.model,
            pretrained=candidate.pretrained,
            stage=candidate.stage,
            combine=identity["combine"],
            dtype=encoder.precision,
            seconds=seconds,
            outcomes=outcomes,
            outcomes_file=outcomes_file,
        )
        unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
        peak_memory_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit // 10**6
        with atomic_path(out / outcomes_file) as path, path.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **outcomes)
        # The record comes after its outcomes, and replaces an earlier one with the same outcomes file.
        others = [other for other in read_jsonl(out / RESULTS) if other.get("outcomes") != outcomes_file]
        with atomic_path(out / RESULTS) as path:
            for line in (*others, {**record, **key, "peak_memory_mb": peak_memory_mb}):
                append_jsonl(path, line)

    on_main(write)
    value = metrics[task.main_metric]
    logger.info("%s, %s: %s %.4g in %.1f s", identity["label"], task.name, task.main_metric, value, seconds)


def _has_result(out: Path, key: dict[str, Any]) -> bool:
    """Check whether `out` has a record with the items of `key`, and its outcomes.

    Raises:
        UserError: if `out` has results of another model under the same label.
    """
    records = [record for record in read_jsonl(out / RESULTS) if record.get("outcomes") == key["outcomes"]]
    if other := next((record for record in records if record.get("model_sha256") != key["model_sha256"]), None):
        raise UserError(
            f"{out} has results of another model called {key['label']} ({other['pretrained']}, other weights); give "
            f"--out another folder"
        )
    return (out / key["outcomes"]).is_file() and any(key.items() <= record.items() for record in records)
