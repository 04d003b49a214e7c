"""Final models that are one CLIP: soups of the stages, and interpolations with the base (WiSE-FT), chosen on a set."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from mcl_clip.config import RunConfig
from mcl_clip.core.distributed import on_main
from mcl_clip.core.errors import UserError
from mcl_clip.data.features import SIDES
from mcl_clip.model.clip import ClipBundle, load_clip
from mcl_clip.model.mix import mix_weights
from mcl_clip.model.multistage import combine_features
from mcl_clip.results.text import trade_table
from mcl_clip.runs.context import RESULTS, RunContext
from mcl_clip.runs.frozen import embed_set
from mcl_clip.runs.train_phase import base_clip
from mcl_clip.train.validation import is_rank

logger = logging.getLogger(__name__)

SOUPS = ("soup", "greedy-soup")


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How the weights of the final model were made, for combination.json."""

    stages: Sequence[int]  # whose weights are averaged
    values: Mapping[int, float] | None = None  # of each stage alone, where the stages were chosen by them
    wise_ft: float | None = None  # share of the stages in an interpolation with the base
    curve: Sequence[Mapping[str, float]] = ()  # the values at each share that was tried

    @property
    def text(self) -> str:
        """Describe the weights in a sentence of the model card."""
        numbers = ", ".join(map(str, self.stages))
        mean = f"the mean of those of stages {numbers}" if len(self.stages) > 1 else f"those of stage {numbers}"
        if self.wise_ft is None:
            return mean
        return f"{1 - self.wise_ft:g} of the base and {self.wise_ft:g} of {mean} (WiSE-FT)"

    def record(self) -> dict[str, Any]:
        """Return what combination.json holds of it."""
        return {"averaged": self.text, **asdict(self)}


def is_averaged(config: RunConfig) -> bool:
    """Return whether the final model of a run is one CLIP with averaged weights."""
    return config.method in SOUPS or bool(config.eval.wise_ft)


def check_choices(config: RunConfig, sets: Iterable[str]) -> None:
    """Raise UserError for choices on evaluation sets that are impossible with this recipe."""
    sets = list(sets)
    for option, term in (("select", config.eval.select), *(("guard", term) for term in config.eval.guard)):
        if term and (name := term.partition(":")[0]) not in sets:
            raise UserError(
                f"--eval.{option} {term} names no evaluation set; there are {', '.join(sets) or 'none'}, and "
                f"--eval.sets {name}=FOLDER adds one"
            ).on_every_process()
    if config.method in SOUPS and not config.tower.is_pretrained:
        raise UserError(
            f"--method {config.method} averages weights, which takes models that start from the same pretrained ones, "
            f"and the towers of this recipe, or their heads, are random; use --method ensemble, or a pretrained CLIP"
        ).on_every_process()
    option = (
        "--method greedy-soup" if config.method == "greedy-soup" else "--eval.wise-ft" if config.eval.wise_ft else ""
    )
    if option and not config.eval.select:
        raise UserError(
            f"{option} chooses on an evaluation set; add --eval.select SET:METRIC with one that is not reported"
        ).on_every_process()
    if not config.eval.wise_ft:
        return
    if len(config.stages) > 1 and config.method not in (*SOUPS, "single"):
        raise UserError(
            f"--eval.wise-ft interpolates one model with its base, and this run ends with {len(config.stages)} stages; "
            f"use --method single, soup or greedy-soup, or leave it out"
        ).on_every_process()
    if not config.tower.is_pretrained:
        raise UserError(
            "--eval.wise-ft interpolates with the pretrained weights that a run starts from, and the towers of this "
            "recipe, or their heads, are random; leave it out"
        ).on_every_process()


def make_single_model(run: RunContext) -> tuple[ClipBundle, Choice]:
    """Average the weights of the trained stages as the recipe says. A collective call."""
    config = run.config
    trained = [s for s, stage in enumerate(config.stages) if stage.train.steps] or [0]
    values = None
    if config.method == "greedy-soup":
        values = {s: measure(run, _mean(run, [s]), [config.eval.select])[config.eval.select] for s in trained}
        trained = _greedy_soup(run, values)
    clip, choice = _mean(run, trained), Choice(stages=trained, values=values)
    if config.eval.wise_ft:
        clip, choice = _interpolate(run, choice)
    return clip, choice


def measure(run: RunContext, clip: ClipBundle, terms: Sequence[str]) -> dict[str, float]:
    """Return the value of each SET:METRIC term under a model; SET alone is its main metric. A collective call.

    Raises:
        UserError: if a set does not have the metric.
    """
    clip.model.to(run.accelerator.device).eval()
    tasks = {name: run.tasks[name] for name in dict.fromkeys(term.partition(":")[0] for term in terms)}
    last = len(run.config.stages) - 1  # what it locks, the base and all stages have in common
    features = {name: embed_set(run, last, task, clip) for name, task in tasks.items()}

    def score() -> dict[str, float]:
        values = {}
        for term in terms:
            name, _, metric = term.partition(":")
            metrics, _ = tasks[name].score(*(combine_features([features[name][side]], "concat") for side in SIDES))
            if (metric or tasks[name].main_metric) not in metrics:
                raise UserError(f"{term} is not measured; the metrics of {name} are {', '.join(metrics)}")
            values[term] = float(metrics[metric or tasks[name].main_metric])
        return values

    return on_main(score)


def _mean(run: RunContext, stages: Sequence[int]) -> ClipBundle:
    """Load the mean of the weights of some stages."""
    clips = [load_clip(run.folder(s, "train") / "model") for s in stages]
    return mix_weights(clips, [1 / len(clips)] * len(clips))


def _greedy_soup(run: RunContext, values: Mapping[int, float]) -> list[int]:
    """Choose the stages of a greedy soup (Wortsman et al., arXiv 2203.05482, recipe 1).

    From the best to the worst stage by `values`, each is kept in the mean if that does not get worse by it.
    """
    term = run.config.eval.select
    sign = -1 if is_rank(term) else 1
    first, *others = sorted(values, key=lambda s: (-sign * values[s], s))
    chosen, best = [first], values[first]
    for stage in others:
        value = measure(run, _mean(run, [*chosen, stage]), [term])[term]
        logger.info("greedy soup: %s %.4g with stage %d, %.4g without", term, value, stage, best)
        if sign * value >= sign * best:
            chosen, best = [*chosen, stage], value
    return sorted(chosen)


def _interpolate(run: RunContext, choice: Choice) -> tuple[ClipBundle, Choice]:
    """Interpolate with the base by the share that is best on the set of choices and on guard sets (WiSE-FT).

    Shares 0 (the base) and 1 are always tried. The best one has the highest mean of the metric of choice and, with
    guards, the mean of their metrics; of equal ones, it is the largest.
    """
    config, terms = run.config.eval, dict.fromkeys((run.config.eval.select, *run.config.eval.guard))

    def mixed(share: float) -> ClipBundle:
        return mix_weights([base_clip(run.config), _mean(run, choice.stages)], [1 - share, share])

    shares = sorted({0.0, 1.0, *config.wise_ft})
    curve = [{"share": share, **measure(run, mixed(share), list(terms))} for share in shares]

    def merit(point: Mapping[str, float]) -> float:
        signed = {term: point[term] * (-1 if is_rank(term) else 1) for term in terms}
        kept = [signed[term] for term in config.guard]
        return signed[config.select] + sum(kept) / max(1, len(kept))

    best = max(curve, key=lambda point: (merit(point), point["share"]))["share"]
    on_main(partial(logging.getLogger(RESULTS).info, "WiSE-FT\n%s", trade_table(curve, best)))
    return mixed(best), Choice(stages=choice.stages, values=choice.values, wise_ft=best, curve=curve)
