"""Evaluate any model on any sets: `mcl-clip eval`, with one record per set in results.jsonl."""

import hashlib
import logging
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mcl_clip.core.distributed import check_same, on_main, peak_memory
from mcl_clip.core.errors import UserError
from mcl_clip.core.files import append_jsonl, atomic_path, canonical_json, read_jsonl
from mcl_clip.eval.classification import as_probe, probe_at_stage_width
from mcl_clip.eval.datasets import discover
from mcl_clip.eval.embed import Encoder, on_all_processes
from mcl_clip.eval.task import RESULTS, Task, result_record
from mcl_clip.model.multistage import MultistageCLIP
from mcl_clip.model.resolve import Candidate, Loaded, find_models

logger = logging.getLogger(__name__)


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
        precision: `fp32`, or `bf16` for bfloat16 autocast of the encoders; scoring is in higher precision always.
        combine: `concat` or `mean_cosine`, instead of the combination that a multistage model was saved with.

    Raises:
        UserError: for a wrong argument or broken data, on all processes.
    """
    models = on_all_processes(partial(find_models, name, each=each))
    sets = on_all_processes(partial(discover, data, tasks))
    check_same(",".join(task.data.sha256 for task in sets.values()), f"the data in {data}")
    out = out or Path("evaluations") / models[-1].label
    for candidate in models:
        loaded = on_all_processes(candidate.load)
        if combine and not isinstance(loaded, MultistageCLIP) and not each:
            raise UserError(f"--combine {combine} has no effect on {name}, which is a single stage; leave it out")
        evaluate_loaded(
            loaded, candidate, sets, out=out, device=device, batch_size=batch_size, num_workers=num_workers,
            precision=precision, combine=combine,
        )  # fmt: skip
    return out


def evaluate_loaded(
    loaded: Loaded,
    candidate: Candidate,
    sets: Mapping[str, Task],
    *,
    out: Path,
    device: torch.device,
    batch_size: int = 64,
    num_workers: int = 0,
    precision: str = "fp32",
    combine: str | None = None,
) -> None:
    """Evaluate a loaded model on sets, with the names of `candidate` in its records; arguments as for `evaluate`."""
    multistage = loaded if isinstance(loaded, MultistageCLIP) else None
    label = [candidate.label, *([] if precision == "fp32" else [precision])]
    if multistage and combine:
        multistage.combine = combine
        label.insert(1, combine)
    sha256 = _model_digest(loaded)
    check_same(sha256, f"the model {candidate.label}")
    identity = {
        "label": "-".join(label),
        "model_sha256": sha256,
        "dtype": precision,
        "combine": multistage.combine if multistage else None,
    }
    encoder = Encoder(
        model=_module_of(loaded).to(device),
        image_transform=loaded.image_transform,
        tokenizer=loaded.tokenizer,
        device=device,
        batch_size=batch_size,
        num_workers=num_workers,
        precision=precision,
    )
    for task in sets.values() if loaded.has_texts else map(as_probe, sets.values()):
        wide = probe_at_stage_width(task, multistage.embed_dims if multistage else [])
        _evaluate_task(wide, encoder, out, candidate, identity)


def run_task(task: Task, encoder: Encoder) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Return the metrics and per-query outcomes of a model on a task; all processes embed, the main process scores.

    Raises:
        UserError: on all processes, if an image cannot be decoded or features are not finite.
    """
    features = encoder.embed(task.data)
    return on_main(partial(task.score, features["image"], features["text"]))


def _module_of(loaded: Loaded) -> nn.Module:
    return loaded if isinstance(loaded, MultistageCLIP) else loaded.model


def _model_digest(loaded: Loaded) -> str:
    """Compute the SHA-256 of the weights, and of the settings that change what is computed with them."""
    settings = [loaded.preprocess_cfg, loaded.model_cfgs if isinstance(loaded, MultistageCLIP) else loaded.model_cfg]
    digest = hashlib.sha256(canonical_json(settings).encode())
    for key, value in sorted(_module_of(loaded).state_dict().items()):
        tensor = value.detach().cpu().contiguous()
        digest.update(f"\n{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _evaluate_task(task: Task, encoder: Encoder, out: Path, candidate: Candidate, identity: dict[str, Any]) -> None:
    """Run a task and write its outcomes and record, unless `out` has them already."""
    outcomes_file = f"outcomes-{task.name.replace('/', '--')}-{identity['label']}.npz"
    key = {"dataset": task.name, "data_sha256": task.data.sha256, "outcomes": outcomes_file, **identity}
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
        with atomic_path(out / outcomes_file) as path, path.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **outcomes)
        # The record comes after its outcomes, and replaces an earlier one with the same outcomes file.
        others = [other for other in read_jsonl(out / RESULTS) if other.get("outcomes") != outcomes_file]
        with atomic_path(out / RESULTS) as path:
            for line in (*others, record | key | {"peak_memory_mb": peak_memory() // 10**6}):
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
