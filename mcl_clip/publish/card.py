"""The model card, README.md of an exported model, from the artefacts of its run alone.

Nothing stands on it that was not measured: what is not known is called so. No paths, addresses or captions are shown.
"""

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from mcl_clip.core.errors import UserError
from mcl_clip.publish.hub import MARKER, check_repo_name
from mcl_clip.results.record import COMBINED, Result, RunRecord, Stage, read_run
from mcl_clip.results.scores import (
    agreement_table,
    difference_table,
    duels,
    losing_sentences,
    main_table,
    metric_title,
    metrics_of,
    set_name,
    set_table,
    sizes,
    verdicts,
)
from mcl_clip.results.text import NOT_STATED, amount, listed, public_name, safe
from mcl_clip.results.training import (
    data_table,
    held_out,
    input_text,
    machine_table,
    pretrained_text,
    stage_table,
    tower_text,
)

LIBRARIES = {"multistage": "mcl_clip", "open_clip": "open_clip", "transformers": "transformers"}
TAGS = ("clip", "mcl_clip", "multistage-contrastive-learning")
PIPELINE = "zero-shot-image-classification"
HUB_TASKS = {"zeroshot_retrieval": "zero-shot-retrieval", "zeroshot_classification": PIPELINE}
TASKS = {
    "zeroshot_retrieval": "zero-shot retrieval",
    "zeroshot_classification": "zero-shot classification",
    "image_text_pairs": "pairs of pictures and texts that differ in a detail",
}
CONTROLS = {
    "single": "a single stage with the compute of all stages",
    "ensemble": "models from other seeds in place of stages, without groups",
    "no-groups": "the same stages without groups",
    "random-groups": "the same stages with groups drawn at random",
    "ifm": "a single stage with implicit feature modification",
}
FOLDER = "FOLDER"
TEMPLATE = "card.md.jinja"


@dataclass(frozen=True, kw_only=True)
class About:
    """What only a person can know.

    Attributes:
        license: of the model, as the Hub calls it, such as mit or other.
        datasets: names of the training data on the Hub.
        description: one paragraph on the data or the purpose, in Markdown.
    """

    license: str = ""
    datasets: tuple[str, ...] = ()
    description: str = ""


@dataclass(frozen=True, kw_only=True)
class _Subject:
    """What the card is about: the model called `label` in the results; none for averaged `weights`."""

    form: str
    repo: str
    revision: str
    name: str
    label: str
    weights: str

    @property
    def stage(self) -> int | None:
        """Its number, for a stage alone."""
        return int(self.label.removeprefix("stage-")) if self.label.startswith("stage-") else None


def card(
    run: Path,
    *,
    form: str,
    repo: str = "",
    revision: str = "",
    stage: int | None = None,
    weights: str = "",
    about: About | None = None,
) -> str:
    """The README.md of a model of `run`, finished or not.

    Args:
        run: the run directory.
        form: what the folder holds: `multistage` (all stages), `open_clip` or `transformers` (a single model).
        repo: ORG/NAME on the Hub; without it the examples load from a folder.
        revision: branch there, if it is not the main one.
        stage: which one, for a stage alone; not needed if there is only one.
        weights: how they were made, for averaged or interpolated ones, such as "the mean of the weights of stages 0
            and 1"; there are no results for these.
        about: what the run does not know.

    Raises:
        UserError: if `run` is not a run directory, a file is damaged, or there is no such stage.
    """
    if repo:
        check_repo_name(repo)
    try:
        facts = read_run(run)
        name = repo.rpartition("/")[2] or run.resolve().name
        label = _label(facts, form, stage, weights)
        subject = _Subject(form=form, repo=repo, revision=revision, name=name, label=label, weights=weights)
        return _render(facts, subject, about or About())
    except UserError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(
            f"the files of {run} do not make a model card ({type(error).__name__}: {error}); restore what is damaged, "
            f"or run the recipe again"
        ) from error


def _label(run: RunRecord, form: str, stage: int | None, weights: str) -> str:
    last = len(run.stages) - 1
    if form not in LIBRARIES:
        raise ValueError(f"form={form!r} is not one of {', '.join(LIBRARIES)}")
    if form == "multistage":
        return COMBINED
    if weights:
        return ""
    if stage is None and last > 0:
        raise UserError(f"a card for {form} is of one stage; say which, from 0 to {last}")
    if not 0 <= (stage or 0) <= last:
        raise UserError(f"there is no stage {stage}; the run has stages 0 to {last}")
    return f"stage-{stage or 0}"


def _render(run: RunRecord, subject: _Subject, about: About) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # it is Markdown, made safe where it is made
    )
    text = environment.get_template(TEMPLATE).render(
        front=_front_matter(run, subject, about),
        marker=MARKER,
        title=safe(subject.name),
        opening=_opening(run, subject),
        description=about.description.strip(),
        brief=_brief(run, subject, about),
        usage=_usage(run, subject),
        has_results=_is_measured(run, subject),
        not_measured=_not_measured(subject),
        no_differences=_no_differences(run, subject),
        has_stages=len(run.stages) > 1,
        main_table=main_table(run, _labels(run, subject), subject.label) if run.results else "",
        sets=_sets(run, subject),
        differences=_differences(run, subject),
        agreement=agreement_table(run),
        data=data_table(run, datasets=about.datasets, license=about.license),
        stages=stage_table(run),
        machine=machine_table(run),
        limits=[*_limits(run, subject)],
    )
    return re.sub(r"\n{3,}", "\n\n", text).rstrip("\n") + "\n"


def _front_matter(run: RunRecord, subject: _Subject, about: About) -> str:
    kind, _, base = str(run.config["tower"].get("architecture", "")).partition(":")
    data = ModelCardData(
        model_name=subject.name,
        library_name=LIBRARIES[subject.form],
        pipeline_tag=PIPELINE,
        tags=list(TAGS),
        license=about.license or None,
        datasets=list(about.datasets) or None,
        base_model=base if kind == "hf-hub" else None,
        eval_results=[*_eval_results(run, subject)] or None,
    )
    return data.to_yaml()


def _eval_results(run: RunRecord, subject: _Subject) -> Iterator[EvalResult]:
    for of_set in run.results.values():
        result = of_set.get(subject.label)
        for metric in metrics_of([result]) if result else ():
            value = result.value(metric) if result else None
            if result is None or value is None:
                continue
            record = result.record
            yield EvalResult(
                task_type=HUB_TASKS.get(record["task"], record["task"].replace("_", "-")),
                dataset_type=re.sub(r"[^\w.-]+", "-", record["key"]),
                dataset_name=record["dataset"],
                metric_type=metric,
                metric_name=metric_title(metric),
                metric_value=value,
            )


def _labels(run: RunRecord, subject: _Subject) -> list[str]:
    """The models of the run that the tables show."""
    if len(run.stages) == 1:
        return [subject.label]
    return [*(f"stage-{number}" for number in range(len(run.stages))), COMBINED]


def _is_measured(run: RunRecord, subject: _Subject) -> bool:
    return any(subject.label in of_set for of_set in run.results.values())


def _not_measured(subject: _Subject) -> str:
    if subject.weights:
        return (
            "**Not measured.** These weights were put together after the run, which measured the stages that they "
            "were made from, not them."
        )
    return "**Not measured.** The run has no results of this model: how good it is, is not known."


def _opening(run: RunRecord, subject: _Subject) -> str:
    """What the model is."""
    count, use = len(run.stages), "it scores how well a text fits a picture"
    if subject.weights:
        start = f"A CLIP model: {use}. Its weights are {safe(subject.weights)}, of a training in {_stages(count)}."
    elif subject.stage is not None and count > 1:
        start = f"A CLIP model: {use}. It is stage {subject.stage} alone, of stages 0 to {count - 1} of a training."
    elif count == 1:
        start = f"A CLIP model, trained in a single stage: {use}."
    else:
        how = {
            "mean_cosine": ", and the score is the mean of the cosines of the stages",
            "concat": ", and the score is the cosine of the features of all stages side by side",
        }.get(run.combination.get("combine", ""), "")
        start = f"A CLIP model of {_stages(count)}: {use}. Each stage is a CLIP of its own{how}."
    return f"{start} {_method(run)}".strip()


def _stages(count: int) -> str:
    return f"{count} stages" if count > 1 else "a single stage"


def _method(run: RunRecord) -> str:
    if control := CONTROLS.get(run.config.get("control", "none")):
        return f"The run is a control of multistage contrastive learning, not an example of it: {control}."
    if len(run.stages) == 1:
        return ""
    return (
        "The training is [multistage contrastive learning](https://arxiv.org/abs/2402.11816): after each stage the "
        "pairs are clustered by what it has learned, and the next stage has to tell apart pairs of the same cluster, "
        "for which it needs something else."
    )


def _brief(run: RunRecord, subject: _Subject, about: About) -> list[tuple[str, str]]:
    """What one should know first, as a name and a text."""
    lines = [("Model", _model(run, subject)), ("Trained on", _trained_on(run, about))]
    if len(run.stages) > 1 and subject.label == COMBINED and (against := duels(run, COMBINED, "stage-0")):
        lines.append((f"All stages against stage 0 alone, {_first_stage(run)}", verdicts(against)))
        lines += _better_stages(run)
    if len(run.stages) > 1 and subject.stage is not None and (against := duels(run, subject.label, COMBINED)):
        lines.append(("This stage against all stages together", verdicts(against)))
    data = "that of the training data: see their data sets" if about.datasets else f"that of the data is {NOT_STATED}"
    lines.append(("Licence", f"{safe(about.license) or NOT_STATED}; {data}"))
    unknown = "bias and safety were not evaluated"
    if _is_measured(run, subject):
        unknown = f"these are figures of one training run, on the sets of the table alone; {unknown}"
    lines.append(("Caution", f"{unknown} ([limits](#limits))"))
    return lines


def _better_stages(run: RunRecord) -> list[tuple[str, str]]:
    """Later stages that are clearly better by themselves, by the main measure."""
    texts = []
    for number in range(1, len(run.stages)):
        names = [d.name for d in duels(run, COMBINED, f"stage-{number}") if d.is_main and d.verdict == "worse"]
        texts += [f"stage {number} on {listed(names)}"] if names else []
    return [("A later stage alone is better", "; ".join(texts))] if texts else []


def _first_stage(run: RunRecord) -> str:
    """What stage 0 is, and its part of the training."""
    seen = [stage.steps[-1]["samples_seen"] if stage.steps else 0 for stage in run.stages]
    if not run.stages[0].settings.get("train", {}).get("steps"):
        return "the pretrained model untouched"
    kind = "ordinary CLIP training" + (" from pretrained weights" if pretrained_text(run.config["tower"]) else "")
    return kind + (f" with {100 * seen[0] / sum(seen):.0f} % of the pairs seen" if seen[0] else "")


def _model(run: RunRecord, subject: _Subject) -> str:
    """Inputs, sizes and towers."""
    known = [stage for stage in run.stages if stage.model_cfg]
    stage = run.stages[subject.stage] if subject.stage is not None else known[0] if known else None
    if stage is None or not stage.model_cfg:
        return "not known, as its training is not finished"
    architecture = str(run.config["tower"].get("architecture", ""))
    named = [safe(architecture)] if architecture and ":" not in architecture else []
    takes = f"{input_text(stage.model_cfg)}, {_features(run, subject, stage)}"
    parts = [*named, takes, tower_text(stage.model_cfg), _parameters(run, subject, stage), _logit_scale(run, subject)]
    return "; ".join(filter(None, parts))


def _logit_scale(run: RunRecord, subject: _Subject) -> str:
    """The factor on the cosine."""
    weights = run.stages[subject.stage].weights if subject.stage is not None else None
    if weights:
        return f"logit scale {weights.logit_scale:.1f}"
    if subject.label == COMBINED and "logit_scale" in run.combination:
        rows = run.combination["held_out_rows"]
        return f"logit scale {math.exp(run.combination['logit_scale']):.1f}, fitted on {rows:,} pairs held out"
    return ""


def _features(run: RunRecord, subject: _Subject, stage: Stage) -> str:
    dims = int(stage.model_cfg["embed_dim"])
    if subject.label != COMBINED or len(run.stages) == 1:
        return f"{dims} dimensions"
    return f"{' + '.join(str(int(other.model_cfg.get('embed_dim', 0))) for other in run.stages)} dimensions"


def _parameters(run: RunRecord, subject: _Subject, stage: Stage) -> str:
    if subject.label != COMBINED or len(run.stages) == 1:
        found = stage.weights
        return f"{amount(found.image)} + {amount(found.text)} parameters" if found else ""
    weights = [other.weights for other in run.stages if other.weights]
    if len(weights) < len(run.stages):
        return ""
    image, text = sum(each.image for each in weights), sum(each.text for each in weights)
    if run.shares_text_tower:
        return f"{amount(image)} + {amount(weights[0].text)} parameters, with one text tower for all stages"
    return f"{amount(image)} + {amount(text)} parameters over all stages"


def _trained_on(run: RunRecord, about: About) -> str:
    if run.data is None:
        return "not known: the run has no index of its data"
    named = f" of {listed(map(public_name, about.datasets))}" if about.datasets else ""
    start = pretrained_text(run.config["tower"])
    return f"{run.data.rows - held_out(run):,} pairs of picture and text{named}" + (
        f", from the weights of {start}" if start else ", from random weights"
    )


def _usage(run: RunRecord, subject: _Subject) -> dict[str, Any]:
    """What the examples need; not every library can name a branch, so that from one they load a folder."""
    repo = "" if subject.revision else subject.repo
    return {
        "form": subject.form,
        "repo": repo,
        "download": f"{json.dumps(subject.repo)}, revision={json.dumps(subject.revision)}" if subject.revision else "",
        "mcl_clip": f"hf-hub:{repo}" if repo else FOLDER,
        "open_clip": f"hf-hub:{repo}" if repo else f"local-dir:{FOLDER}",
        "transformers": repo or FOLDER,
        "sigmoid": run.stages[0].settings.get("train", {}).get("loss") == "siglip",
    }


def _sets(run: RunRecord, subject: _Subject) -> list[tuple[str, str, str]]:
    """Name, description and table of each set."""
    found = []
    for of_set in run.results.values():
        first: Result = next(iter(of_set.values()))
        task = TASKS.get(first.record["task"], safe(first.record["task"]))
        digest, dtype = safe(first.record["data_sha256"])[:16], safe(first.record["dtype"])
        text = f"{task[0].upper()}{task[1:]}, {sizes(first)}, towers in {dtype}, data digest `{digest}`"
        found.append((set_name(first), text, set_table(of_set, _labels(run, subject), subject.label)))
    return found


def _differences(run: RunRecord, subject: _Subject) -> str:
    if len(run.stages) == 1 or subject.weights:
        return ""
    return difference_table(run, COMBINED, f"stage-{subject.stage or 0}")


def _no_differences(run: RunRecord, subject: _Subject) -> str:
    if len(run.stages) == 1:
        return "There is only one stage."
    return _not_measured(subject) if subject.weights else "Not measured: there are no outcomes of single queries."


def _limits(run: RunRecord, subject: _Subject) -> Iterator[str]:
    """What speaks against trusting the model, as far as it is known, and what is not."""
    is_measured, count = _is_measured(run, subject), len(run.stages)
    unfinished = [str(number) for number, stage in enumerate(run.stages) if not stage.is_trained]
    if unfinished:
        yield f"The training is not finished: stage {', '.join(unfinished)}."
    if not is_measured:
        yield _not_measured(subject).replace("**", "")
    else:
        yield from _losses(run, subject)
        yield from _reach(run, subject)
    if count > 1 and run.config.get("control", "none") == "none":
        yield "Whether a single stage of equal compute would do better was not measured in this run."
    if run.data is not None:
        yield (
            f"It has learned from {run.data.rows - held_out(run):,} pairs. Whether pictures of the evaluation sets "
            f"are among them was not checked."
        )
    if start := pretrained_text(run.config["tower"]):
        yield f"What {start} was trained on, and its faults, are not described here."
    yield (
        "Not evaluated: bias and fairness, harmful or private content, robustness, whether probabilities are "
        "calibrated, languages other than those of the sets."
    )


def _losses(run: RunRecord, subject: _Subject) -> Iterator[str]:
    """Where another model of the run is better."""
    others = [label for label in _labels(run, subject) if label != subject.label]
    if subject.stage is not None:
        others = [COMBINED] if others else []
    against = {label: duels(run, subject.label, label) for label in others}
    sentences = [text for label, found in against.items() for text in losing_sentences(found, subject.label, label)]
    yield from sentences
    if any(against.values()) and not sentences:
        better = "are all stages together" if subject.stage is not None else "is a single stage"
        yield f"On no set {better} better, by the main measure or the linear read-out."


def _reach(run: RunRecord, subject: _Subject) -> Iterator[str]:
    """What the results cover."""
    results = [of_set[subject.label] for of_set in run.results.values() if subject.label in of_set]
    missing = [set_name(next(iter(of_set.values()))) for of_set in run.results.values() if subject.label not in of_set]
    yield f"It was measured on {_sets_text(results)} only." + (
        f" Not on {', '.join(missing)}, on which other models of the run were." if missing else ""
    )
    widths = [(ends[1] - ends[0], result) for result in results if (ends := result.interval(result.main_metric))]
    if widths:
        width, result = max(widths, key=lambda pair: pair[0])
        yield (
            f"Intervals are over the queries of a set, for this one training run (seed {run.config.get('seed', 0)}): "
            f"how much training runs differ was not measured. The widest of a main measure is {100 * width:.1f} "
            f"points, on {set_name(result)}."
        )


def _sets_text(results: Sequence[Result]) -> str:
    names = [set_name(result) for result in results]
    return f"{len(names)} sets ({', '.join(names)})" if len(names) > 1 else names[0]
