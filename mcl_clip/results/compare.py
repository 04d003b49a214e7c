"""Compare two evaluated models on the sets that they share, query by query."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mcl_clip.core.errors import UserError, shorten_list
from mcl_clip.core.stats import holm
from mcl_clip.results.record import COMBINED, Result, load_results
from mcl_clip.results.scores import MetricDifference, compare_metrics
from mcl_clip.results.text import aligned, size_text

TITLES = ("", "A", "B", "A - B", "95 %", "n", "units", "only A/B", "p", "Holm")


@dataclass(frozen=True)
class ModelComparison:
    """Two models by name: the metrics of each set that can be compared, and why other sets are left out."""

    a: str
    b: str
    sets: Mapping[str, list[MetricDifference]]
    left_out: Mapping[str, str]


def find_results(name: str) -> dict[str, Result]:
    """Load the results of a model that the user names, by key of the set.

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
            f"{folder} has no results of {label!r} but of {shorten_list(labels)}; say which, as in {folder}:{labels[0]}"
        )
    by_set: dict[str, Result] = {}
    for result in (result for result in results if result.label == label):
        key = result.record["key"]
        if key in by_set:
            raise UserError(f"{folder} has two results of {label} for {key}; compare folders that have one each")
        by_set[key] = result
    return by_set


def compare_models(a: str, b: str, *, resamples: int = 10_000) -> ModelComparison:
    """Compare two models, named as for `find_results`, on each set that they share.

    Raises:
        UserError: if no set can be compared.
    """
    of_a, of_b = find_results(a), find_results(b)
    sets, left_out = {}, {}
    for key in dict.fromkeys([*of_a, *of_b]):
        if key not in of_a or key not in of_b:
            left_out[key] = f"only {a if key in of_a else b} has it"
        elif reason := _why_left_out((a, of_a[key]), (b, of_b[key])):
            left_out[key] = reason
        elif compared := _compare_set(of_a[key], of_b[key], resamples):
            sets[key] = compared
    if not sets:
        reasons = "; ".join(f"{key}: {reason}" for key, reason in left_out.items())
        raise UserError(f"{a} and {b} have no set in common ({reasons}); evaluate both on the same data")
    return ModelComparison(a, b, sets, left_out)


def comparison_text(comparison: ModelComparison) -> str:
    """Format a table for each set, in percent and percentage points except for ranks, and the sets left out."""
    lines = [f"A = {comparison.a}", f"B = {comparison.b}"]
    for key, metrics in comparison.sets.items():
        columns = zip(TITLES, *map(_row, metrics), strict=True)
        used = [column for column in columns if set(column[1:]) != {"-"}]
        lines += [f"{key}: {size_text(metrics[0].result.record)}", *aligned(list(zip(*used, strict=True)))]
    lines += [f"{key} is left out: {reason}" for key, reason in comparison.left_out.items()]
    return "\n".join(lines)


def comparison_records(comparison: ModelComparison) -> Iterator[dict[str, Any]]:
    """Yield a JSON object for each metric of a set, and one for each set that is left out."""
    models = {"model_a": comparison.a, "model_b": comparison.b}
    for key, metric in ((key, metric) for key, metrics in comparison.sets.items() for metric in metrics):
        values = {"key": key, "metric": metric.metric, "a": metric.a, "b": metric.b, "difference": metric.a - metric.b}
        paired = metric.paired
        counts = {name: getattr(paired, name, None) for name in ("n", "units", "only_a", "only_b", "p_value")}
        tests = {"ci95": (paired.low, paired.high) if paired else None, **counts, "p_holm": metric.p_holm}
        yield {**values, **tests, **models, "data_sha256": metric.result.record.get("data_sha256")}
    for key, reason in comparison.left_out.items():
        yield {"key": key, "left_out": reason, **models}


def _why_left_out(*models: tuple[str, Result]) -> str:
    """Return the reason why two models cannot be compared on a set; empty if they can."""
    one, two = (result for _, result in models)
    digests = [str(result.record.get("data_sha256")) for result in (one, two)]
    if digests[0] != digests[1]:
        return f"the data differ (sha256 {digests[0][:8]}... and {digests[1][:8]}...)"
    for name, result in models:
        if result.outcomes_path is None:
            return f"{name} has no outcomes of single queries for it; evaluate it again"
    try:
        of_a, of_b = one.outcomes, two.outcomes
    except UserError as error:  # the file is damaged
        return str(error)
    for metric in (name for name in one.record["metrics"] if name in two.record["metrics"]):
        if metric in of_a and metric in of_b and of_a[metric].shape != of_b[metric].shape:
            return f"{metric} has {len(of_a[metric])} outcomes in one and {len(of_b[metric])} in the other"
    return ""


def _compare_set(one: Result, two: Result, resamples: int) -> list[MetricDifference]:
    metrics = [metric for metric in one.record["metrics"] if metric != "main_metric"]
    compared = list(compare_metrics(one, two, metrics, resamples=resamples))
    compared.sort(key=lambda entry: entry.paired is None)  # those without an interval last
    # Metrics with the same figures and counts are one test under several names.
    names = [(entry.a, entry.b, entry.paired) for entry in compared]
    p_values = {name: name[2].p_value for name in names if name[2] and name[2].p_value is not None}
    if len(p_values) < 2:
        return compared
    adjusted = dict(zip(p_values, holm(list(p_values.values())), strict=True))
    return [replace(entry, p_holm=adjusted.get(name)) for entry, name in zip(compared, names, strict=True)]


def _row(metric: MetricDifference) -> list[str]:
    is_share = not metric.metric.endswith("median_rank")
    number, signed, scale = (".1f", "+.1f", 100) if is_share else ("g", "+g", 1)
    values = [metric.metric, *(format(scale * value, number) for value in (metric.a, metric.b))]
    values.append(format(scale * (metric.a - metric.b), signed))
    if (paired := metric.paired) is None:
        return values + ["-"] * (len(TITLES) - len(values))
    return [
        *values,
        f"[{', '.join(format(scale * end, signed) for end in (paired.low, paired.high))}]",
        str(paired.n),
        "-" if paired.units == paired.n else str(paired.units),
        "-" if paired.only_a is None else f"{paired.only_a}/{paired.only_b}",
        *("-" if p is None else f"{p:.2g}" for p in (paired.p_value, metric.p_holm)),
    ]
