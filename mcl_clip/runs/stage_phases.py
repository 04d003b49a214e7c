"""The phases between the training of two stages: embed all rows, cluster their features, refine the pseudo-labels."""

import logging
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from mcl_clip.core.distributed import barrier, is_main, on_main
from mcl_clip.core.files import atomic_path, read_json, write_json
from mcl_clip.data.features import SIDES, EmbeddingTable
from mcl_clip.data.storage import load_numbers, load_tensors, save_array
from mcl_clip.model.clip import ClipBundle, load_clip
from mcl_clip.model.multistage import have_same_text_tower
from mcl_clip.runs.context import RunContext
from mcl_clip.runs.embedding import embed_rows
from mcl_clip.runs.frozen import stored_outputs, trunks_folder
from mcl_clip.runs.train_phase import lock_stage
from mcl_clip.stages.embed import read_losses
from mcl_clip.stages.kmeans import ReadRows, all_chunks, spherical_kmeans
from mcl_clip.stages.pseudo_labels import PseudoLabels
from mcl_clip.stages.shared_metric import Projection, fit_shared_metric, project_rows
from mcl_clip.train.metrics import BadSamples

logger = logging.getLogger(__name__)


def embed(run: RunContext, stage: int) -> None:
    """Write the features of all rows under the model of a stage, and record the samples that cannot be decoded."""
    config, out = run.config, run.folder(stage, "embed")
    clip = run.clip(stage)
    texts = _reusable_texts(run, stage, clip)
    options = run.batch_options(clip)
    if clip.has_texts and on_main(trunks_folder(config).is_dir):
        lock_stage(clip.model, config.stages[stage].train)
        options["images"], options["texts"] = stored_outputs(run, stage, clip)
    if texts is not None:
        options |= {"tokenizer": None, "texts": None}
    embed_rows(run, clip, out, precision=config.stages[stage].train.precision, options=options, texts=texts)
    # step -1 discards earlier records: all of them are in the files of the shards
    max_bad = config.data.max_bad_fraction
    bad = BadSamples(out / "bad_samples.jsonl", max_fraction=max_bad, rows=len(run.index), step=-1)
    if is_main():
        samples, full = read_losses(out, run.index)
        bad.add(samples)
        if full and not clip.model_cfg["text_cfg"].get("hf_tokenizer_name"):  # those pad with 0, which is what counts
            length = clip.context_length
            logger.info("stage %d: %d captions fill all %d tokens; longer ones are truncated", stage, full, length)
    bad.flush(0, len(run.index))
    if bad.count:
        logger.info("stage %d: %d samples could not be decoded: %s", stage, bad.count, bad.by_reason())


def _reusable_texts(run: RunContext, stage: int, clip: ClipBundle) -> EmbeddingTable | None:
    """Return the features of the previous stage if its text tower is the same and ran in the same precision."""
    if stage == 0 or not clip.has_texts:
        return None
    previous, train = (config.train for config in run.config.stages[stage - 1 : stage + 1])
    if not train.lock.text or train.precision != previous.precision:
        return None
    before = load_clip(run.folder(stage - 1, "train") / "model")
    if not have_same_text_tower([before.model, clip.model], [before.model_cfg, clip.model_cfg]):
        return None
    logger.info("stage %d: the text features of the previous stage are reused", stage)
    return run.embeddings(stage - 1)


def cluster(run: RunContext, stage: int) -> None:
    """Cluster the image features of a stage (or of stage 0), the text features, or both, as the stage asks for it.

    A restart continues from the folder `work`.
    """
    work = run.folder(stage, "cluster") / "work"
    _cluster_sides(run, stage, work)
    barrier()  # a network file system does not delete files that any process has mapped
    if is_main():
        shutil.rmtree(work)


def _cluster_sides(run: RunContext, stage: int, work: Path) -> None:
    settings, out = run.config.stages[stage].cluster, run.folder(stage, "cluster")
    num_clusters = {"image": settings.num_clusters, "text": settings.text_clusters or settings.num_clusters}
    table, device = run.embeddings(run.clustered(stage)), run.accelerator.device
    stops: dict[str, Any] = {"is_stopping": run.interrupt.noticed, "check_stop": run.interrupt.check}
    features: dict[str, ReadRows] = {side: partial(table.rows, column=side) for side in SIDES}
    if is_main():
        _remove(out, "*.tmp")  # projected rows that versions before 0.7 left there when they were killed
    metric = _shared_metric(features, len(table), work, device, stops) if settings.metric == "shared" else {}
    sides = SIDES if settings.on == "product" else (settings.on,)
    for side in sides:
        if on_main((work / f"{side}.safetensors").exists):
            continue
        rows = features[side]
        if metric:
            projection = Projection(mean=metric[f"{side}.mean"].numpy(), matrix=metric[f"{side}.matrix"].numpy())
            rows = project_rows(rows, len(table), projection, work / side, device=device, **stops)
        found = spherical_kmeans(
            rows,
            num_rows=len(table),
            num_clusters=num_clusters[side],
            name=(run.config.seed, stage, "cluster", side),
            num_starts=settings.num_starts,
            max_passes=settings.max_passes,
            device=device,
            **stops,
        )
        if is_main():
            save_array(out / f"assignments-{side}.npy", np.int32, found.assignments.shape, [found.assignments])
            write_json(work / f"{side}.json", found.trace)
            _save(work / f"{side}.safetensors", {side: torch.from_numpy(found.centroids)})
            _remove(work, f"{side}-*.npy")
    if is_main():
        stored = {name: value for name, value in metric.items() if name.partition(".")[0] in sides}
        for side in sides:
            stored |= load_tensors(work / f"{side}.safetensors")
        _save(out / "centroids.safetensors", stored)
        write_json(out / "trace.json", {side: read_json(work / f"{side}.json") for side in sides})


def _shared_metric(
    features: dict[str, ReadRows], num_rows: int, work: Path, device: torch.device, stops: dict[str, Any]
) -> dict[str, Tensor]:
    """Return mean and matrix of each side, as `SIDE.mean` and `SIDE.matrix`."""
    path = work / "metric.safetensors"
    if not on_main(path.exists):
        fitted = fit_shared_metric(features["image"], features["text"], num_rows, folder=work, device=device, **stops)
        if is_main():
            sides = zip(SIDES, fitted, strict=True)
            _save(
                path, {f"{s}.{name}": torch.from_numpy(value) for s, one in sides for name, value in vars(one).items()}
            )
            _remove(work, "products-*.npy")
        barrier()
    return load_tensors(path)


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    with atomic_path(path) as temporary:
        save_file(tensors, temporary)


def _remove(folder: Path, pattern: str) -> None:
    for path in folder.glob(pattern):
        path.unlink()


def label(run: RunContext, stage: int) -> None:
    """Refine the pseudo-labels of the earlier stages by the clusters of this one. Runs on the main process only.

    Clusters of the features of stage 0 are labels on their own.
    """
    before = run.labels(stage if run.clustered(stage) == stage else 0)
    clusters, out = run.folder(stage, "cluster"), run.folder(stage, "labels")
    sides = []
    for path in sorted(clusters.glob("assignments-*.npy")):
        side = path.stem.removeprefix("assignments-")
        centroids = load_tensors(clusters / "centroids.safetensors", side)[side]
        sides.append((load_numbers(path, len(run.index)), len(centroids)))

    def refined(start: int, stop: int) -> PseudoLabels:
        labels = PseudoLabels(values=before.values[start:stop], radix=before.radix)
        for assignments, num_clusters in sides:
            labels = labels.refine(assignments[start:stop].astype(np.int64), num_clusters)
        return labels

    blocks = (refined(start, stop).values for start, stop in all_chunks(len(run.index)))
    save_array(out / "labels.npy", np.int64, (len(run.index),), blocks)
    labels = PseudoLabels(values=load_numbers(out / "labels.npy", len(run.index)), radix=refined(0, 0).radix)
    summary = labels.summary()
    write_json(out / "labels.json", summary)
    sizes = (summary[name] for name in ("labels", "smallest", "median", "largest"))
    logger.info("stage %d: %d labels; smallest %d, median %g, largest %d rows", stage, *sizes)
