"""Fine-tune a model on a user's pictures: prepare the data, choose settings, train, compare with the base, export."""

import shlex
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mcl_clip.config import RunConfig, TowerConfig
from mcl_clip.core.distributed import seed_of
from mcl_clip.core.errors import UserError
from mcl_clip.core.files import atomic_path
from mcl_clip.eval.evaluate import evaluate_loaded
from mcl_clip.model.clip import LOCAL, ClipBundle
from mcl_clip.model.from_transformers import is_transformers_folder
from mcl_clip.model.resolve import Candidate, find_models
from mcl_clip.model.tower import create_tower
from mcl_clip.publish.export import EVERYTHING, Export, export_run
from mcl_clip.results.audit import FOLDER, PAGE, Verdict, read_audit
from mcl_clip.results.record import COMBINED, load_results, read_run
from mcl_clip.results.scores import compare_metrics, difference_text, set_name
from mcl_clip.results.text import COLUMNS, aligned, cell, metric_title
from mcl_clip.runs.context import open_tasks
from mcl_clip.runs.eval_phase import diagnosis
from mcl_clip.runs.phase import lock
from mcl_clip.runs.train_phase import lock_stage
from mcl_clip.stages.diagnose import Diagnosis
from mcl_clip.tools.audit import audit_model
from mcl_clip.tools.audit_data import AuditOptions, open_audit_data
from mcl_clip.tools.finetune_data import SPLITS, TEST, DataOptions, PreparedData, prepare_data
from mcl_clip.tools.finetune_recipe import Default, default_recipe, recipe_text

BASE = "base"  # folder of the results of the model that training starts from, and its name in them
RECIPE, EXPORTED, DATA = "recipe.py", "model", "data"
AUDITED_PICTURES = 256


@dataclass(frozen=True, kw_only=True)
class FineTuning:
    """What is fine-tuned on what, where; `override` applies the settings of the command line to a recipe."""

    tower: TowerConfig
    data: str
    run_dir: Path
    options: DataOptions
    seed: int
    override: Callable[[RunConfig], RunConfig]

    def check(self) -> RunConfig:
        """Check settings and evaluation sets before anything is read or written; return a recipe without its data."""
        unknown = PreparedData(self.run_dir / DATA, dict.fromkeys(SPLITS, 10_000), {}, ())
        config = self._recipe(unknown)[0]
        own = {f"{name}={unknown.folder / name}" for name in SPLITS}
        given = tuple(name for name in config.eval.retrieval if name not in own)
        open_tasks(replace(config, eval=replace(config.eval, retrieval=given)))
        return config

    def set_up(self, *, command: Sequence[str]) -> tuple[RunConfig, list[str]]:
        """Prepare the data, and write a recipe with the settings that fit it; return it and what there is to say.

        Raises:
            UserError: for a model, data or options that do not fit, or a run directory of something else.
        """
        model = create_base(self.tower, seed=self.seed).model
        try:
            with lock(self.run_dir):
                data = prepare_data(self.data, (self.run_dir / DATA).resolve(), self.options, seed=self.seed)
                given = self._recipe(data)[0].stages[0].train
                lock_stage(model, given)
                # Low-rank updates have names and rates of their own.
                trained = [] if given.lora.rank else [name for name, p in model.named_parameters() if p.requires_grad]
                config, defaults = self._recipe(data, given=given, trained=trained)
                text = recipe_text(config, command=shlex.join(command), defaults=defaults)
                with atomic_path(self.run_dir / RECIPE) as path:
                    path.write_text(text, encoding="utf-8")
        finally:
            with suppress(OSError):
                self.run_dir.rmdir()  # where nothing was written
        sizes = ", ".join(f"{data.pictures[name]:,} for {name}" for name in SPLITS)
        lines = [f"data: {note}" for note in (*data.notes, f"{sizes}, in {data.folder}")]
        lines += [f"setting: {default.setting}: {default.reason}" for default in defaults]
        return config, [*lines, f"recipe: {self.run_dir / RECIPE}, with these settings and those of the command line"]

    def _recipe(self, data: PreparedData, **options: Any) -> tuple[RunConfig, list[Default]]:
        config, defaults = default_recipe(self.run_dir, self.tower, data, **options)
        own = config.eval.retrieval
        config = self.override(replace(config, seed=self.seed))
        retrieval = tuple(dict.fromkeys((*own, *config.eval.retrieval)))  # those given on the command line replace them
        return replace(config, eval=replace(config.eval, retrieval=retrieval)), defaults


def create_base(tower: TowerConfig, *, seed: int, text_weights: bool = True) -> ClipBundle:
    """Create the model that the run starts from."""
    return create_tower(tower, seed=seed_of(seed, "tower", 0), text_weights=text_weights)


def evaluate_base(config: RunConfig, device: torch.device) -> None:
    """Evaluate what training starts from on all sets; write RUN/base/results.jsonl and the outcomes of queries."""
    tasks = open_tasks(config)
    out = config.run_dir / BASE
    done = {(result.dataset, result.record.get("data_sha256")) for result in load_results(out)}
    todo = {name: task for name, task in tasks.items() if (name, task.data.sha256) not in done}
    if not todo:
        return
    base = create_base(config.tower, seed=config.seed, text_weights=config.behavior != "0.6")
    candidate = Candidate(model=config.tower.name, pretrained=BASE, label=BASE, load=lambda: base)
    evaluate_loaded(
        base, candidate, todo, out=out, device=device, batch_size=config.eval.batch_size,
        num_workers=config.machine.workers,
    )  # fmt: skip


def export_result(run_dir: Path) -> tuple[Path, dict[str, float]]:
    """Export the result to RUN/model; return the folder and the differences of its features when loaded back.

    One stage is a model of open_clip, or a CLIPModel where training started from one; averaged weights are one of
    open_clip, and several stages a multistage model.
    """
    run = read_run(run_dir)
    start = Path(str(run.config["tower"].get("architecture", "")).removeprefix(LOCAL))
    what = EVERYTHING
    if len(run.stages) == 1 and not run.averaged:
        what = Export(stage=0, as_transformers=start.is_dir() and is_transformers_folder(start))
    return run_dir / EXPORTED, export_run(run_dir, run_dir / EXPORTED, what)


def comparison_lines(run_dir: Path) -> list[str]:
    """Return a table for each set: base, fine-tuned, and the difference with its 95 % interval, in percent."""
    after = {result.dataset: result for result in load_results(run_dir / COMBINED)}
    lines = []
    for before in load_results(run_dir / BASE):
        result = after.get(before.dataset)
        if result is None or result.record.get("data_sha256") != before.record.get("data_sha256"):
            continue
        main = {metric_title(before.main_metric): before.main_metric}
        columns = {**main, **COLUMNS.get(str(before.record["task"]), {})}
        titles = {metric: title for title, metric in columns.items() if not metric.endswith("rank")}
        rows = [["", "base", "fine-tuned", "difference"]]
        for found in compare_metrics(result, before, titles):
            difference = difference_text(found.paired) if found.paired else f"{100 * (found.a - found.b):+.1f}"
            values = [cell(one, found.metric, has_interval=False) for one in (before, result)]
            rows.append([titles[found.metric], *values, difference])
        lines += [f"{set_name(result)}, percent:", *aligned(rows)]
    return lines


def audit_result(config: RunConfig, device: torch.device) -> list[str]:
    """Audit the result on the test set and write RUN/audit, unless it is there or the set is too small.

    Return lines on what was written.
    """
    out, options = config.run_dir / FOLDER, AuditOptions(pictures=AUDITED_PICTURES, seed=config.seed)
    if read_audit(out) is not None:
        return [f"audit: {out / PAGE}"]
    try:
        data = open_audit_data([str(config.run_dir / DATA / TEST)], options)
    except UserError as error:
        return [f"no audit: {error}"]
    audit_model(
        find_models(str(config.run_dir))[0].load(), data, out, options, name=str(config.run_dir), device=device,
        batch_size=config.eval.batch_size, num_workers=config.machine.workers,
    )  # fmt: skip
    return [f"audit: {out / PAGE}"]


def advice(run_dir: Path) -> str:
    """Say in one sentence what is worth trying next: stages, an ensemble, or more steps.

    It rests on the audit of the run where there is one, else on the loss and the evaluation sets of its last stage.
    """
    run = read_run(run_dir)
    last = len(run.stages) - 1
    again = f"python {run_dir / RECIPE} --run-dir {run_dir}-2"
    found: Verdict | Diagnosis | None
    if record := read_audit(run_dir / FOLDER):
        found = Verdict(**record["verdict"])
    else:
        found = diagnosis(run_dir, last, settings=run.stages[last].train_settings, rows=len(run.index or ()))
    if found is None:
        return "the loss of this recipe does not tell whether features are suppressed"
    if found.kind == "suppressed":
        return f"next, stages: {found.text}: {again} --num-stages {last + 2}"
    if found.kind == "learning":
        steps = 2 * int(run.stages[last].train_settings["steps"])
        return f"next, more steps: the model is {found.text}: {again} --stages.{last}.train.steps {steps}"
    return f"next, an ensemble rather than stages: {found.text}: {again} --num-stages 3 --method ensemble"
