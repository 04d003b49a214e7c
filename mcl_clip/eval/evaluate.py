"""One task by one model."""

import hashlib
import logging
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from mcl_clip.core.distributed import check_same, gather_objects, on_main
from mcl_clip.core.errors import UserError
from mcl_clip.core.files import append_jsonl, atomic_path, canonical_json, read_jsonl
from mcl_clip.eval.classification import at_width_of_one_stage
from mcl_clip.eval.datasets import discover
from mcl_clip.eval.task import Task, result_record
from mcl_clip.model.clip import autocast
from mcl_clip.model.multistage import MultistageCLIP
from mcl_clip.model.resolve import Candidate, Loaded, find_models

logger = logging.getLogger(__name__)
RESULTS = "results.jsonl"
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """A model with all that is needed to embed a set by it.

    `batch_size` counts images, and texts, of a forward pass of one process; `num_workers` are its loader processes.
    """

    model: Any
    image_transform: Callable[[Any], Tensor]
    tokenizer: Callable[[list[str]], Tensor]
    device: torch.device
    batch_size: int = 64
    num_workers: int = 0
    precision: str = "fp32"

    def embed(self, task: Task) -> dict[str, Tensor]:
        """The raw features of a task's set, equal on all processes."""
        with autocast(self.precision, self.device):
            return task.embed(
                self.model,
                image_transform=self.image_transform,
                tokenizer=self.tokenizer,
                device=self.device,
                batch_size=self.batch_size,
                num_workers=self.num_workers,
            )


def run_task(
    task: Task, encoder: Encoder, *, outcomes: dict[str, np.ndarray] | None = None
) -> Iterator[tuple[str, float]]:
    """Metrics by name. All processes embed and get the metrics; the main process alone scores.

    Args:
        task: what to measure.
        encoder: the model.
        outcomes: filled on the main process with the outcome of each query.

    Raises:
        UserError: on all processes, if an image cannot be decoded or features are not finite.
    """
    features = encoder.embed(task)
    metrics, found = on_main(partial(task.score, features["image"], features["text"]))
    if outcomes is not None:
        outcomes.update(found)
    yield from metrics.items()


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
    """Measure a model on the sets below `data`, and return the folder with the results.

    `results.jsonl` there has a record a set (what CLIP_benchmark and DataComp write, and more), and `outcomes-*.npz`
    what each query came to. A set that was measured before, with the same data, model, precision and combination, is
    left out, so that what was interrupted continues. All processes embed; the main process scores and writes.

    Args:
        name: see `mcl_clip.model.resolve.find_models`.
        data: a set, or a folder with sets, see `mcl_clip.eval.datasets.find_sets`.
        tasks: names of sets; all if empty.
        out: the folder; by default `evaluations/` and the name of the model.
        each: all stages of a run, too; `combine` is for the combined model then.
        device: where to embed.
        batch_size: images, and texts, of a forward pass of one process.
        num_workers: loader processes of each process.
        precision: `fp32`, or `bf16` for bfloat16 autocast of the towers; scores are of higher precision always.
        combine: `concat` or `mean_cosine` in place of a multistage model's own.

    Raises:
        UserError: for everything that a user can mend.
    """
    models = _on_all(partial(find_models, name, each=each))
    sets = _on_all(partial(discover, data, tasks))
    check_same(",".join(task.sha256 for task in sets.values()), f"the data in {data}")
    out = out or Path("evaluations") / models[-1].label
    for candidate in models:
        loaded = _on_all(candidate.load)
        label = [candidate.label, *([] if precision == "fp32" else [precision])]
        if isinstance(loaded, MultistageCLIP) and combine:
            loaded.combine = combine
            label.insert(1, combine)
        elif combine and not each:
            raise UserError(f"--combine {combine} has no meaning for {name}, which is a single stage; leave it out")
        sha256, combined = _digest(loaded), loaded.combine if isinstance(loaded, MultistageCLIP) else None
        check_same(sha256, f"the model {name}")
        about = {"label": "-".join(label), "model_sha256": sha256, "dtype": precision, "combine": combined}
        encoder = Encoder(
            model=_model(loaded).to(device),
            image_transform=loaded.image_transform,
            tokenizer=loaded.tokenizer,
            device=device,
            batch_size=batch_size,
            num_workers=num_workers,
            precision=precision,
        )
        dims = loaded.embed_dims if isinstance(loaded, MultistageCLIP) else []
        for task in sets.values():
            _measure(at_width_of_one_stage(task, dims), encoder, out, candidate, about)
    return out


def _on_all(make: Callable[[], T]) -> T:
    """The result of `make()`, called by every process, if it works on all of them."""
    failure, result = "", []
    try:
        result.append(make())
    except UserError as error:
        failure = str(error)
    if failures := [other for other in gather_objects(failure) if other]:
        raise UserError(failures[0]).on_every_process()
    return result[0]


def _model(loaded: Loaded) -> nn.Module:
    return loaded if isinstance(loaded, MultistageCLIP) else loaded.model


def _digest(loaded: Loaded) -> str:
    """SHA-256 of the weights, and of the settings that decide what is computed with them."""
    settings = [loaded.preprocess_cfg, loaded.model_cfgs if isinstance(loaded, MultistageCLIP) else loaded.model_cfg]
    digest = hashlib.sha256(canonical_json(settings).encode())
    for key, value in sorted(_model(loaded).state_dict().items()):
        tensor = value.detach().cpu().contiguous()
        digest.update(f"\n{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _measure(task: Task, encoder: Encoder, out: Path, candidate: Candidate, about: dict[str, Any]) -> None:
    """Run a task and write its record and outcomes, unless that was done before."""
    outcomes_file = f"outcomes-{task.name.replace('/', '--')}-{about['label']}.npz"
    known = {"dataset": task.name, "data_sha256": task.sha256, "outcomes": outcomes_file, **about}
    if on_main(partial(_is_measured, out, known)):
        logger.info("%s, %s: measured before, in %s", about["label"], task.name, out)
        return
    started = time.perf_counter()
    outcomes: dict[str, np.ndarray] = {}
    metrics = dict(run_task(task, encoder, outcomes=outcomes))
    seconds = time.perf_counter() - started

    def write() -> None:
        record = result_record(
            task,
            metrics,
            model=candidate.model,
            pretrained=candidate.pretrained,
            stage=candidate.stage,
            combine=about["combine"],
            dtype=encoder.precision,
            seconds=seconds,
            outcomes=outcomes,
            outcomes_file=outcomes_file,
        )
        _write(out, {**record, **known, "peak_memory_mb": _peak_memory_mb()}, outcomes)

    on_main(write)
    value = metrics[task.main_metric]
    logger.info("%s, %s: %s %.4g in %.1f s", about["label"], task.name, task.main_metric, value, seconds)


def _is_measured(out: Path, known: dict[str, Any]) -> bool:
    """Whether the same was measured before.

    Raises:
        UserError: if there are results of another model under the same name.
    """
    before = [record for record in read_jsonl(out / RESULTS) if record.get("outcomes") == known["outcomes"]]
    if other := next((r for r in before if r.get("model_sha256") != known["model_sha256"]), None):
        raise UserError(
            f"{out} has results of another model called {known['label']} ({other['pretrained']}, other weights); give "
            f"--out another folder"
        )
    return (out / known["outcomes"]).is_file() and any(known.items() <= record.items() for record in before)


def _write(out: Path, record: dict[str, Any], outcomes: dict[str, np.ndarray]) -> None:
    """The outcomes, then the record, in place of an earlier one that had the same file of outcomes."""
    with atomic_path(out / record["outcomes"]) as path, path.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **outcomes)
    others = [other for other in read_jsonl(out / RESULTS) if other.get("outcomes") != record["outcomes"]]
    with atomic_path(out / RESULTS) as path:
        for line in (*others, record):
            append_jsonl(path, line)


def _peak_memory_mb() -> int:
    """The largest resident memory of the main process so far, in 10^6 bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit // 10**6
