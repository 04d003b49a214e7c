"""Compare two evaluated models on the sets that they share, query by query."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mcl_clip.core.errors import UserError
from mcl_clip.core.stats import holm
from mcl_clip.results.record import COMBINED, Result, load_results
from mcl_clip.results.scores import compare
from mcl_clip.results.text import aligned, size_text

TITLES = ("", "A", "B", "A - B", "95 %", "n", "units", "only A/B", "p", "Holm")


@dataclass(frozen=True)
class ModelResults:
    """The results of one model, by key of the set."""

    name: str
    results: Mapping[str, Result]


@dataclass(frozen=True, kw_only=True)
class MetricComparison:
    """One metric of two models on one set.

    A metric that is not a mean over queries, such as a median, has only the two values and their difference. `p_holm`
    is adjusted for the number of p-values of the set.
    """

    key: str
    metric: str
    a: float
    b: float
    difference: float
    ci95: tuple[float, float] | None = None
    n: int | None = None
    units: int | None = None
    only_a: int | None = None
    only_b: int | None = None
    p_value: float | None = None
    p_holm: float | None = None


@dataclass(frozen=True)
class ModelComparison:
    """Two models on all sets: the metrics of sets that can be compared, and why others are left out."""

    a: ModelResults
    b: ModelResults
    metrics: Sequence[MetricComparison]
    left_out: Mapping[str, str]


def find_results(name: str) -> ModelResults:
    """Load the results of a model that the user names.

    A name is a run directory (its combined model), `RUN/stage-K` (that stage alone), any folder with a results.jsonl of
    one model, or one of these with `:LABEL` for the model of that label, such as `RUN:stages-0-1-concat`.

    Raises:
        UserError: if there are no such results.
    """
    folder, label = Path(name), ""
    before, colon, after = name.rpartition(":")
    if not folder.is_dir() and colon and Path(before).is_dir():  # a folder may have a colon in its name
        folder, label = Path(before), after
    results = load_results(folder)
    if not results:
        raise UserError(
            f"there are no results in {folder}, as no results.jsonl there has a record; name a run that was evaluated, "
            f"RUN/stage-K, or the folder that `mcl-clip eval` wrote"
        )
    labels = list(dict.fromkeys(result.label for result in results))
    if not label:
        is_run = (folder / "config.json").is_file()
        label = labels[0] if len(labels) == 1 and not is_run else COMBINED if is_run else folder.resolve().name
    if label not in labels:
        raise UserError(
            f"{folder} has no results of {label!r} but of {', '.join(labels)}; say which, as in {folder}:{labels[0]}"
        )
    by_set: dict[str, Result] = {}
    for result in (result for result in results if result.label == label):
        key = result.record["key"]
        if key in by_set:
            raise UserError(f"{folder} has two results of {label} for {key}; compare folders that have one each")
        by_set[key] = result
    return ModelResults(name, by_set)


def compare_models(a: ModelResults, b: ModelResults, *, resamples: int = 10_000) -> ModelComparison:
    """Compare two models on each set that they share, with paired 95 % intervals and exact tests.

    Raises:
        UserError: if no set can be compared.
    """
    metrics: list[MetricComparison] = []
    left_out = {}
    for key in dict.fromkeys([*a.results, *b.results]):
        if reason := _why_left_out(a, b, key):
            left_out[key] = reason
        else:
            metrics += _compare_set(key, a.results[key], b.results[key], resamples)
    if not metrics:
        reasons = "; ".join(f"{key}: {reason}" for key, reason in left_out.items())
        raise UserError(f"{a.name} and {b.name} have no set in common ({reasons}); evaluate both on the same data")
    return ModelComparison(a, b, metrics, left_out)


def comparison_text(comparison: ModelComparison) -> str:
    """Format a table for each set, in percent and percentage points except for ranks, and the sets left out."""
    lines = [f"A = {comparison.a.name}", f"B = {comparison.b.name}"]
    for key in dict.fromkeys(metric.key for metric in comparison.metrics):
        rows = [list(TITLES), *(_row(metric) for metric in comparison.metrics if metric.key == key)]
        used = [column for column in zip(*rows, strict=True) if set(column[1:]) != {"-"}]
        size = size_text(comparison.a.results[key].record)
        lines += [f"{key}: {size}", *aligned([list(row) for row in zip(*used, strict=True)])]
    lines += [f"{key} is left out: {reason}" for key, reason in comparison.left_out.items()]
    return "\n".join(lines)


def comparison_records(comparison: ModelComparison) -> Iterator[dict[str, Any]]:
    """Yield a JSON object for each metric of a set, and one for each set that is left out."""
    models = {"model_a": comparison.a.name, "model_b": comparison.b.name}
    for metric in comparison.metrics:
        sha256 = comparison.a.results[metric.key].record.get("data_sha256")
        yield {**asdict(metric), **models, "data_sha256": sha256}
    for key, reason in comparison.left_out.items():
        yield {"key": key, "left_out": reason, **models}


def _why_left_out(a: ModelResults, b: ModelResults, key: str) -> str:
    """Return the reason why two models cannot be compared on a set; empty if they can."""
    for model, other in ((a, b), (b, a)):
        if key not in model.results:
            return f"only {other.name} has it"
    one, two = a.results[key], b.results[key]
    digests = [str(result.record.get("data_sha256")) for result in (one, two)]
    if digests[0] != digests[1]:
        return f"the data differ (sha256 {digests[0][:8]}... and {digests[1][:8]}...)"
    for model, result in ((a, one), (b, two)):
        if result.outcomes_path is None:
            return f"{model.name} has no outcomes of single queries for it; evaluate it again"
    try:
        of_a, of_b = one.outcomes, two.outcomes
    except UserError as error:  # the file is damaged
        return str(error)
    for metric in (name for name in one.record["metrics"] if name in two.record["metrics"]):
        if metric in of_a and metric in of_b and of_a[metric].shape != of_b[metric].shape:
            return f"{metric} has {len(of_a[metric])} outcomes in one and {len(of_b[metric])} in the other"
    return ""


def _compare_set(key: str, one: Result, two: Result, resamples: int) -> list[MetricComparison]:
    compared = []
    for metric in one.record["metrics"]:
        a, b = one.value(metric), two.value(metric)
        if metric == "main_metric" or a is None or b is None:  # not measured by both
            continue
        entry = MetricComparison(key=key, metric=metric, a=a, b=b, difference=a - b)
        if (paired := compare(one, two, metric, resamples=resamples)) is not None:
            counts = {name: getattr(paired, name) for name in ("n", "units", "only_a", "only_b", "p_value")}
            entry = replace(entry, ci95=(paired.low, paired.high), **counts)
        compared.append(entry)
    compared.sort(key=lambda entry: entry.ci95 is None)  # those without an interval last
    # Metrics with the same figures and counts are one test under several names.
    names = [(entry.a, entry.b, entry.n, entry.only_a, entry.only_b, entry.p_value) for entry in compared]
    p_values = {name: name[-1] for name in names if name[-1] is not None}
    if len(p_values) < 2:
        return compared
    adjusted = dict(zip(p_values, holm(list(p_values.values())), strict=True))
    return [replace(entry, p_holm=adjusted.get(name)) for entry, name in zip(compared, names, strict=True)]


def _row(metric: MetricComparison) -> list[str]:
    is_share = not metric.metric.endswith("median_rank")
    number, signed, scale = (".1f", "+.1f", 100) if is_share else ("g", "+g", 1)
    return [
        metric.metric,
        *(format(scale * value, number) for value in (metric.a, metric.b)),
        format(scale * metric.difference, signed),
        f"[{', '.join(format(scale * end, signed) for end in metric.ci95)}]" if metric.ci95 else "-",
        "-" if metric.n is None else str(metric.n),
        "-" if metric.units == metric.n else str(metric.units),
        "-" if metric.only_a is None else f"{metric.only_a}/{metric.only_b}",
        *("-" if p is None else f"{p:.2g}" for p in (metric.p_value, metric.p_holm)),
    ]
