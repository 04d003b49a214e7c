"""The phases that measure and deliver: evaluate a stage, combine all stages into one model, publish it."""

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from mcl_clip.core.distributed import is_main, on_main
from mcl_clip.core.errors import UserError
from mcl_clip.core.files import append_jsonl, atomic_dir, atomic_path, read_jsonl, write_json
from mcl_clip.core.stats import normalized_mutual_information
from mcl_clip.data.features import SIDES
from mcl_clip.data.storage import load_tensors
from mcl_clip.eval.classification import ClassificationTask, ProbeTask, probe_at_stage_width
from mcl_clip.eval.task import label_of, result_record
from mcl_clip.model.clip import load_clip
from mcl_clip.model.multistage import COMBINATIONS, MultistageCLIP, combine_features
from mcl_clip.publish.card import About
from mcl_clip.publish.export import Export, export_run
from mcl_clip.publish.hub import upload
from mcl_clip.results.record import COMBINED
from mcl_clip.results.text import results_table
from mcl_clip.runs.context import RESULTS, RunContext
from mcl_clip.runs.final_model import is_averaged, make_single_model
from mcl_clip.runs.frozen import embed_set
from mcl_clip.stages.combine import Combination, fit_combination
from mcl_clip.stages.diagnose import Diagnosis, diagnose
from mcl_clip.stages.shared_metric import Projection

logger = logging.getLogger(__name__)


def evaluate(run: RunContext, stage: int) -> None:
    """Embed the evaluation sets with the model of a stage; score this stage alone and all stages so far combined."""
    clip, out = run.clip(stage), run.folder(stage, "eval")
    # Later stages combine these without embedding again.
    paths = {name: out / f"features-{name}.safetensors" for name in run.tasks}
    missing = on_main(lambda: [name for name, path in paths.items() if not path.exists()])
    for name in missing:
        run.interrupt.check()
        features = embed_set(run, stage, run.tasks[name], clip)
        if is_main():
            with atomic_path(paths[name]) as temporary:
                save_file(features, temporary)
    models: list[tuple[str, Sequence[int], str | None]] = [(f"stage-{stage}", [stage], None)]
    if stage:
        models += [(f"stages-0-{stage}-{combination}", range(stage + 1), combination) for combination in COMBINATIONS]
    on_main(partial(score_stages, run, out, models))
    if is_main():
        logging.getLogger(RESULTS).info("after stage %d\n%s", stage, results_table(run.config.run_dir))
        settings = asdict(run.config.stages[stage].train)
        if found := diagnosis(run.config.run_dir, stage, settings=settings, rows=len(run.index)):
            logger.info("stage %d: %s", stage, found.text)


def diagnosis(run_dir: Path, stage: int, *, settings: Mapping[str, Any], rows: int) -> Diagnosis | None:
    """Diagnose an evaluated stage; None for stages not trained by the plain loss.

    `settings` are those of its training, as in config.json; `rows` is the number of rows of the data.
    """
    if settings.get("loss") != "clip" or settings.get("ifm_epsilon"):
        return None
    folder = run_dir / f"stage-{stage}"
    records = [record for record in read_jsonl(folder / "train" / "metrics.jsonl") if "negatives_per_row" in record]
    if not records:
        return None
    last = records[-max(1, len(records) // 10) :]
    return diagnose(
        loss=float(np.mean([record["loss"] for record in last])),
        negatives=float(np.mean([record["negatives_per_row"] for record in last])),
        scores={
            record["dataset"]: record["metrics"]["main_metric"]
            for record in read_jsonl(folder / "eval" / "results.jsonl")
            if label_of(record) == f"stage-{stage}"
        },
        rows=rows,
        global_batch_size=settings["global_batch_size"],
    )


def combine(run: RunContext) -> None:
    """Make the final model of a run, all stages together or the average of their weights; save and score it."""
    if is_averaged(run.config):
        _finish_averaged(run)
    else:
        on_main(partial(_finish_combined, run))


def _finish_averaged(run: RunContext) -> None:
    """Save and score one model with averaged weights, which has the temperature of its stages. A collective call."""
    out = run.config.run_dir / COMBINED
    clip, choice = make_single_model(run)
    clip.model.to(run.accelerator.device)
    features = {name: embed_set(run, choice.stages[-1], task, clip) for name, task in run.tasks.items()}

    def finish() -> None:
        bias = getattr(clip.model, "logit_bias", None)
        model = MultistageCLIP(
            [clip.model.cpu()],
            combine="mean_cosine",
            logit_scale=clip.model.logit_scale.item(),  # type: ignore[operator]
            logit_bias=None if bias is None else bias.item(),
            preprocess_cfg=clip.preprocess_cfg,
            model_cfgs=[clip.model_cfg],
            tokenizer=clip.tokenizer,
        )
        with atomic_dir(out / "model") as folder:
            model.save(folder)
        for name, of_set in features.items():
            with atomic_path(out / f"features-{name}.safetensors") as path:
                save_file(of_set, path)
        write_json(out / "combination.json", {**choice.record(), "logit_scale": model.logit_scale.item()})
        score_stages(run, out, [("combined", [len(run.config.stages) - 1], None)], folders=[out])
        logging.getLogger(RESULTS).info("final model\n%s", results_table(run.config.run_dir))

    on_main(finish)


def _finish_combined(run: RunContext) -> None:
    """Fit the temperature of the multistage model on held-out rows, save and score it. Runs on the main process only.

    Images alone need no temperature. Raise UserError if fewer than two held-out rows could be decoded.
    """
    config, out = run.config, run.config.run_dir / COMBINED
    stages = range(len(config.stages))
    if config.tower.images_only:  # nothing to fit
        fitted, rows = Combination(combine=config.combine, logit_scale=0.0, logit_bias=None, losses={}), 0
    else:
        fitted, rows = _fit(run, stages)
    clips = [load_clip(run.folder(s, "train") / "model") for s in stages]
    model = MultistageCLIP(
        [clip.model for clip in clips],
        combine=fitted.combine,
        weights=fitted.weights,
        logit_scale=fitted.logit_scale,
        logit_bias=fitted.logit_bias,
        preprocess_cfg=clips[0].preprocess_cfg,
        model_cfgs=[clip.model_cfg for clip in clips],
        tokenizer=clips[0].tokenizer,
    )
    with atomic_dir(out / "model") as folder:
        model.save(folder)
    write_json(out / "combination.json", {**asdict(fitted), "held_out_rows": rows})
    score_stages(run, out, [("combined", stages, fitted.combine)], weights=fitted.weights)
    logging.getLogger(RESULTS).info("all stages\n%s", results_table(config.run_dir))


def _fit(run: RunContext, stages: Sequence[int]) -> tuple[Combination, int]:
    """Fit the combination on held-out rows, whose number is returned, too; raise UserError if there are too few."""
    config = run.config
    tables, rows = [run.embeddings(s) for s in stages], run.held_out
    if len(rows):
        is_decoded = np.all([table.take(rows, "image").any(1) for table in tables], axis=0)
        rows = rows[is_decoded]
    if len(rows) < 2:
        raise UserError(f"{len(rows)} held-out rows are too few to fit the logit scale; raise --data.holdout-rows")
    features = [[torch.from_numpy(table.take(rows, side)) for table in tables] for side in SIDES]
    return fit_combination(*features, combine=config.combine, loss=config.stages[0].train.loss), len(rows)


def publish(run: RunContext) -> None:
    """Export the multistage model, load it back, and upload it to the Hub. Runs on the main process only."""
    config, out = run.config.publish, run.config.run_dir / "publish"
    about = About(license=config.license, datasets=config.datasets, description=config.description)
    export = Export(compact=config.compact, about=about)
    export_run(run.config.run_dir, out / "model", export, repo=config.repo, revision=config.revision)
    published = upload(
        out / "model", config.repo, private=config.private, revision=config.revision, create_pr=config.create_pr
    )
    write_json(out / "published.json", asdict(published))
    logger.info("published at %s, commit %s", published.url, published.commit)


def score_stages(
    run: RunContext,
    out: Path,
    models: Iterable[tuple[str, Sequence[int], str | None]],
    *,
    weights: Sequence[float] | None = None,
    folders: Sequence[Path] = (),
) -> None:
    """Score stages and combinations of stages from their stored features; write results.jsonl and the outcomes.

    `models` are label, stages, and how these are combined (None for a single stage); `weights` are for `weighted`.
    The features are in `folders`, by default those of the evaluations of the stages.
    """
    records = []
    for label, stages, combination in models:
        for name, base_task in run.tasks.items():
            started = time.perf_counter()
            sources = folders or [run.folder(s, "eval") for s in stages]
            stored = [load_tensors(source / f"features-{name}.safetensors", *SIDES) for source in sources]
            image, text = (
                combine_features([features[side] for features in stored], combination or "concat", weights)
                for side in SIDES
            )
            task = probe_at_stage_width(base_task, [features["image"].shape[1] for features in stored])
            metrics, outcomes = task.score(image, text)
            if combination is None and not folders and isinstance(task, ClassificationTask | ProbeTask):
                metrics |= _cluster_agreement(run, stages[0], task)
            outcomes_file = f"outcomes-{name}-{label}.npz"
            with atomic_path(out / outcomes_file) as path, path.open("wb") as file:
                np.savez_compressed(file, allow_pickle=False, **outcomes)
            records.append(
                result_record(
                    task,
                    metrics,
                    model=run.config.tower.architecture or "model given in the recipe",
                    pretrained=f"{run.config.run_dir.name}/{label}",
                    stage=stages[-1],
                    combine=combination,
                    dtype="fp32",
                    seconds=time.perf_counter() - started,
                    outcomes=outcomes,
                    outcomes_file=outcomes_file,
                )
            )
    with atomic_path(out / "results.jsonl") as path:
        path.touch()
        for record in records:
            append_jsonl(path, record)


def _cluster_agreement(run: RunContext, stage: int, task: ClassificationTask | ProbeTask) -> dict[str, float]:
    """Return the mutual information of a stage's image clusters and a set's classes; empty without image clusters."""
    stored = load_tensors(run.folder(stage, "cluster") / "centroids.safetensors")
    if "image" not in stored:
        return {}
    path = run.folder(run.clustered(stage), "eval") / f"features-{task.name}.safetensors"
    features = F.normalize(combine_features([load_tensors(path, "image")["image"]], "concat"))
    if "image.matrix" in stored:
        projection = Projection(mean=stored["image.mean"].numpy(), matrix=stored["image.matrix"].numpy())
        features = torch.from_numpy(projection(features.numpy())).float()
    clusters = (features @ stored["image"].T).argmax(1).numpy()
    return {"cluster_nmi": normalized_mutual_information(clusters, task.data.labels)}
