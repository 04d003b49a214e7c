"""Write the model card, README.md of an exported model, from the files of its run.

The card claims only what was measured, and says what was not. It shows no paths, addresses or captions. Its prose is in
card.md.jinja.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from mcl_clip.core.errors import UserError
from mcl_clip.publish.hub import MARKER, check_repo_name
from mcl_clip.results import scores
from mcl_clip.results.record import COMBINED, Result, RunRecord, read_run
from mcl_clip.results.text import (
    CONTROLS,
    NOT_STATED,
    format_parameters,
    label_title,
    listed,
    markdown_table,
    metric_title,
    public_name,
    safe,
)
from mcl_clip.results.training import clip_text, data_rows, machine_rows, pretrained_text, stage_rows

LIBRARIES = {"multistage": "mcl_clip", "open_clip": "open_clip", "transformers": "transformers"}
PIPELINE, IMAGE_PIPELINE = "zero-shot-image-classification", "image-feature-extraction"
HUB_TASKS = {"zeroshot_retrieval": "zero-shot-retrieval", "zeroshot_classification": PIPELINE}
TASKS = {
    "zeroshot_retrieval": "Zero-shot retrieval",
    "zeroshot_classification": "Zero-shot classification",
    "image_text_pairs": "Images and texts that differ in a detail",
    "image_probe": "Probes of frozen image features",
}
TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
    autoescape=False,  # Markdown: `safe` and `public_name` escape what comes from the run
)


@dataclass(frozen=True, kw_only=True)
class About:
    """What only a person can know about a model."""

    license: str = ""  # of the model, as the Hub calls it, such as mit or other
    datasets: tuple[str, ...] = ()  # names of the training data on the Hub
    description: str = ""  # one paragraph on the data or the purpose, in Markdown


@dataclass(frozen=True)
class _Subject:
    """The model of a card; its `label` in the results is empty for averaged `weights`, which were not evaluated."""

    run: RunRecord
    form: str
    label: str
    weights: str

    @property
    def stage(self) -> int | None:
        """The number of a single stage."""
        return int(self.label.removeprefix("stage-")) if self.label.startswith("stage-") else None

    @property
    def is_all_stages(self) -> bool:
        """Whether it is the combination of several stages."""
        return self.label == COMBINED and len(self.run.stages) > 1 and not self.run.averaged

    @property
    def labels(self) -> list[str]:
        """The models of the run that tables show."""
        return self.run.labels if len(self.run.stages) > 1 else [self.label]

    @property
    def results(self) -> list[Result]:
        """Its own results."""
        return [of_set[self.label] for of_set in self.run.results.values() if self.label in of_set]


def card(
    run: Path,
    *,
    form: str,
    repo: str = "",
    revision: str = "",
    stage: int | None = None,
    weights: str = "",
    is_final: bool = False,
    about: About | None = None,
) -> str:
    """Return the README.md of a model of `run`, finished or not.

    Args:
        form: what the folder holds: `multistage` (all stages), `open_clip` or `transformers` (a single model).
        repo: ORG/NAME on the Hub; without it the examples load from a folder.
        revision: branch there, if it is not the main one.
        weights: how averaged or interpolated weights, for which there are no results, were made.
        is_final: whether it is the final model of a run that averages weights, which has results.

    Raises:
        UserError: if `run` is not a run directory, a file is damaged, or there is no such stage.
    """
    if repo:
        check_repo_name(repo)
    try:
        record = read_run(run)
        last = len(record.stages) - 1
        if is_final:
            label, weights = COMBINED, record.averaged
        elif form == "multistage" or weights:
            label = COMBINED if form == "multistage" else ""
        elif stage is None and last > 0:
            raise UserError(f"a card for {form} is of one stage; say which, from 0 to {last}")
        elif not 0 <= (stage or 0) <= last:
            raise UserError(f"there is no stage {stage}; the run has stages 0 to {last}")
        else:
            label = f"stage-{stage or 0}"
        name = repo.rpartition("/")[2] or run.resolve().name
        return _render(_Subject(record, form, label, weights), name, repo, revision, about or About())
    except UserError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(
            f"the files of {run} do not make a model card ({type(error).__name__}: {error}); restore what is damaged, "
            f"or run the recipe again"
        ) from error


def _render(subject: _Subject, name: str, repo: str, revision: str, about: About) -> str:
    """Fill in the template. Not every library can load a branch, so the examples download a `revision` first."""
    run = subject.run
    # Of models without a text tower, only those of all stages are loaded from the Hub by their name.
    loaded = "" if revision or (run.images_only and subject.form != "multistage") else repo
    data = [[title, f"`{value}`" if title.startswith("digest") else value] for title, value in data_rows(run)]
    if draws := run.config.get("data", {}).get("weights"):
        data.append(["how often each list of shards is sampled", ", ".join(f"{number:g}" for number in draws)])
    data += [
        ["datasets on the Hub", ", ".join(map(public_name, about.datasets)) or NOT_STATED],
        ["license of the data", "see the datasets" if about.datasets else NOT_STATED],
        ["license of the model", safe(about.license) or NOT_STATED],
    ]
    widths = [  # of the intervals of main metrics
        (ends[1] - ends[0], f"{100 * (ends[1] - ends[0]):.1f} points, on {scores.set_name(result)}")
        for result in subject.results
        if (ends := result.interval(result.main_metric))
    ]
    other = f"stage-{subject.stage or 0}"
    text = TEMPLATES.get_template("card.md.jinja").render(
        front=_front_matter(subject, name, about),
        marker=MARKER,
        title=safe(name),
        description=about.description.strip(),
        license=safe(about.license) or NOT_STATED,
        datasets=listed(map(public_name, about.datasets)) if about.datasets else "",
        control=CONTROLS.get(run.config.get("control", "none"), ""),
        combine=run.combination.get("combine", ""),
        stage_weights=", ".join(f"{weight:.2f}" for weight in run.combination.get("weights") or ()),
        stage=subject.stage,
        count=len(run.stages),
        unit=run.unit,
        images_only=run.images_only,
        stem=str(run.config["tower"].get("stem", "")),
        weights=safe(subject.weights),
        is_measured=bool(subject.results),
        model=_model(subject),
        pairs=len(run.index) - run.held_out_rows if run.index else None,
        pretrained=pretrained_text(run.config["tower"]),
        first_stage=_first_stage(run),
        versus=_versus(subject),
        usage={
            "form": subject.form,
            "repo": loaded,
            "download": f"{json.dumps(repo)}, revision={json.dumps(revision)}" if revision else "",
            "mcl_clip": f"hf-hub:{loaded}" if loaded else "FOLDER",
            "open_clip": f"hf-hub:{loaded}" if loaded else "local-dir:FOLDER",
            "transformers": loaded or "FOLDER",
            "sigmoid": run.stages[0].train_settings.get("loss") == "siglip",
        },
        main_table=scores.main_table(run, subject.labels, subject.label) if run.results else "",
        sets=[
            {
                "name": scores.set_name(first),
                "task": TASKS.get(first.record["task"], safe(first.record["task"])),
                "size": scores.sizes(first),
                "dtype": safe(first.record["dtype"]),
                "digest": safe(first.record["data_sha256"])[:16],
                "table": scores.set_table(of_set, subject.labels, subject.label),
            }
            for of_set in run.results.values()
            for first in [next(iter(of_set.values()))]
        ],
        differences="" if len(run.stages) == 1 or subject.weights else scores.difference_table(run, COMBINED, other),
        agreement=scores.agreement_table(run),
        data_table=markdown_table(data, text_columns=2),
        stage_table=markdown_table(stage_rows(run)),
        machine_table=markdown_table(machine_rows(run), text_columns=2),
        unfinished=[s for s, stage in enumerate(run.stages) if stage.state("train") != "done"],
        rivals=_rivals(subject),
        evaluated_sets=[scores.set_name(result) for result in subject.results],
        other_sets=[
            scores.set_name(next(iter(of_set.values())))
            for of_set in run.results.values()
            if subject.label not in of_set
        ],
        seed=run.config.get("seed", 0),
        widest=max(widths, key=itemgetter(0))[1] if widths else "",
    )
    return re.sub(r"\n{3,}", "\n\n", text).rstrip("\n") + "\n"


def _front_matter(subject: _Subject, name: str, about: About) -> str:
    """Return the metadata of the card as YAML, with every metric that was measured."""
    kind, _, base = str(subject.run.config["tower"].get("architecture", "")).partition(":")
    results = [
        EvalResult(
            task_type=HUB_TASKS.get(result.record["task"], result.record["task"].replace("_", "-")),
            dataset_type=re.sub(r"[^\w.-]+", "-", result.record["key"]),
            dataset_name=result.dataset,
            metric_type=metric,
            metric_name=metric_title(metric),
            metric_value=value,
        )
        for result in subject.results
        for metric in scores.shown_metrics([result])
        if (value := result.value(metric)) is not None
    ]
    return ModelCardData(
        model_name=name,
        library_name=LIBRARIES["multistage" if subject.run.images_only else subject.form],
        pipeline_tag=IMAGE_PIPELINE if subject.run.images_only else PIPELINE,
        tags=["simclr" if subject.run.images_only else "clip", "mcl_clip", "multistage-contrastive-learning"],
        license=about.license or None,
        datasets=list(about.datasets) or None,
        base_model=base if kind == "hf-hub" else None,
        eval_results=results or None,
    ).to_yaml()


def _model(subject: _Subject) -> str:
    """Describe inputs, towers and sizes; empty before a stage is trained."""
    run, s = subject.run, subject.stage
    stage = run.stages[s] if s is not None else next((stage for stage in run.stages if stage.model_cfg), None)
    if stage is None or not stage.model_cfg:
        return ""
    of_all = run.stages if subject.is_all_stages else [stage]
    architecture = str(run.config["tower"].get("architecture", ""))
    pixels = stage.model_cfg.get("vision_cfg", {}).get("image_size", 224)
    tokens = stage.model_cfg.get("text_cfg", {}).get("context_length", 77)
    texts = "" if run.images_only else f" and texts of up to {safe(tokens)} tokens"
    dimensions = " + ".join(str(int(each.model_cfg.get("embed_dim", 0))) for each in of_all)
    parts = [
        "" if ":" in architecture else safe(architecture),
        f"images of {safe(pixels)} px{texts}, {dimensions} dimensions",
        clip_text(stage.model_cfg),
    ]
    weights = [each.weights for each in of_all if each.weights]
    if len(weights) == len(of_all):
        image, text = sum(each.image for each in weights), sum(each.text for each in weights)
        suffix = " over all stages" if subject.is_all_stages else ""
        if subject.is_all_stages and run.shares_text_tower:
            text, suffix = weights[0].text, ", with one text tower for all stages"
        of_text = "" if run.images_only else f" + {format_parameters(text)}"
        parts.append(f"{format_parameters(image)}{of_text} parameters{suffix}")
    if run.images_only:
        return "; ".join(filter(None, parts))
    if s is not None and stage.weights:
        parts.append(f"logit scale {stage.weights.logit_scale:.1f}")
    elif subject.label == COMBINED and run.averaged:
        parts.append(f"logit scale {math.exp(run.combination['logit_scale']):.1f}")
    elif subject.label == COMBINED and "logit_scale" in run.combination:
        scale, rows = math.exp(run.combination["logit_scale"]), run.combination["held_out_rows"]
        parts.append(f"logit scale {scale:.1f}, fitted on {rows:,} held-out pairs")
    return "; ".join(filter(None, parts))


def _first_stage(run: RunRecord) -> str:
    """Describe stage 0, and its share of the training."""
    seen = [stage.steps[-1]["samples_seen"] if stage.steps else 0 for stage in run.stages]
    if not run.stages[0].train_settings.get("steps"):
        return "the pretrained model, not trained"
    start = " from pretrained weights" if pretrained_text(run.config["tower"]) else ""
    share = f", {100 * seen[0] / sum(seen):.0f} % of the {run.unit} seen" if seen[0] else ""
    return f"ordinary {'SimCLR' if run.images_only else 'CLIP'} training{start}{share}"


def _versus(subject: _Subject) -> Mapping[str, str]:
    """Compare all stages with stage 0, or a single stage with all stages; name later stages that are better."""
    run, nothing = subject.run, {"verdict": "", "better_stages": ""}
    if len(run.stages) == 1 or not subject.label:
        return nothing
    found = scores.differences(run, subject.label, "stage-0" if subject.label == COMBINED else COMBINED)
    if not found:
        return nothing
    better = []
    for label in run.labels[1:-1] if subject.is_all_stages else ():
        against = scores.differences(run, COMBINED, label)
        names = [difference.name for difference in against if difference.is_main and difference.verdict == "worse"]
        better += [f"{label_title(label)} on {listed(names)}"] if names else []
    return {"verdict": scores.verdict_text(found), "better_stages": "; ".join(better)}


def _rivals(subject: _Subject) -> list[dict[str, Any]]:
    """Return the sets on which another model of the run is ahead, clearly or not, for each other model."""
    others = [label for label in subject.labels if label != subject.label] if subject.results else []
    if subject.stage is not None and others:
        others = [COMBINED]
    rivals = []
    for label in others:
        found = scores.differences(subject.run, subject.label, label)
        worse: dict[str, list[str]] = {}
        for lost in found:
            if lost.verdict == "worse":
                values = f"{100 * lost.b:.1f} vs. {100 * lost.a:.1f} % (difference {lost})"
                worse.setdefault(lost.name, []).append(f"{metric_title(lost.metric)} {values}")
        unclear = [
            f"{lost.name}, {metric_title(lost.metric)} ({lost})"
            for lost in found
            if lost.b > lost.a and lost.verdict != "worse"
        ]
        rivals.append({"label": label_title(label), "is_compared": bool(found), "worse": worse, "unclear": unclear})
    return rivals
