"""Two models on the sets that both were evaluated on, query by query."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mcl_clip.core.errors import UserError
from mcl_clip.core.stats import compare_paired, holm
from mcl_clip.eval.task import label_of, read_results
from mcl_clip.results.text import aligned, result_folders, size_text

RESULTS = "results.jsonl"
TITLES = ("", "A", "B", "A - B", "95 %", "n", "units", "only A/B", "p", "Holm")


@dataclass(frozen=True)
class ModelResults:
    """What one model scored, by set.

    `records[key]` is the record of the set called `key`, and `folders[key]` holds its file of outcomes.
    """

    name: str
    records: Mapping[str, Mapping[str, Any]]
    folders: Mapping[str, Path]


@dataclass(frozen=True, kw_only=True)
class MetricComparison:
    """One metric of two models on one set.

    Where a metric is no mean over queries, as a median, only the two values and their difference are there. `p_holm`
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
    """Two models on all sets: the metrics of sets that can be compared, and why others cannot."""

    a: ModelResults
    b: ModelResults
    metrics: Sequence[MetricComparison]
    left_out: Mapping[str, str]


def find_results(name: str) -> ModelResults:
    """The results of the model that the user calls `name`.

    It is a run directory (its combined model), `RUN/stage-K` (that stage alone), any folder with a results.jsonl of
    one model, or one of these with `:LABEL` for the model of that label, such as `RUN:stages-0-1-concat`.

    Raises:
        UserError: if there are no such results.
    """
    folder, label = _split(name)
    found = [(record, path) for path in result_folders(folder) for record in read_results(path)]
    if not found:
        raise UserError(
            f"there are no results in {folder}, as no {RESULTS} there has a record; name a run that was evaluated, "
            f"RUN/stage-K, or the folder that `mcl-clip eval` wrote"
        )
    label = _pick(folder, label, list(dict.fromkeys(label_of(record) for record, _ in found)))
    records: dict[str, Mapping[str, Any]] = {}
    folders = {}
    for record, path in found:
        if label_of(record) == label:
            if record["key"] in records:
                raise UserError(
                    f"{folder} has two results of {label} for {record['key']}; compare folders that have one each"
                )
            records[record["key"]], folders[record["key"]] = record, path
    return ModelResults(name, records, folders)


def compare_models(a: ModelResults, b: ModelResults, *, resamples: int = 10_000) -> ModelComparison:
    """Both models on each set that they share, with paired 95 % intervals and exact tests.

    Raises:
        UserError: if there is no set that can be compared.
    """
    metrics: list[MetricComparison] = []
    left_out = {}
    for key in dict.fromkeys([*a.records, *b.records]):
        try:
            metrics += _compare_set(a, b, key, resamples)
        except _CannotCompareError as error:
            left_out[key] = str(error)
    if not metrics:
        reasons = "; ".join(f"{key}: {reason}" for key, reason in left_out.items())
        raise UserError(f"{a.name} and {b.name} have no set in common ({reasons}); evaluate both on the same data")
    return ModelComparison(a, b, metrics, left_out)


def comparison_text(comparison: ModelComparison) -> str:
    """A table a set, in percent and percentage points but for ranks, and a line for each set that is left out."""
    lines = [f"A = {comparison.a.name}", f"B = {comparison.b.name}"]
    for key in dict.fromkeys(metric.key for metric in comparison.metrics):
        record = comparison.a.records[key]
        rows = [list(TITLES), *(_row(metric) for metric in comparison.metrics if metric.key == key)]
        used = [column for column in zip(*rows, strict=True) if set(column[1:]) != {"-"}]
        lines += [f"{key}: {size_text(record)}", *aligned([list(row) for row in zip(*used, strict=True)])]
    lines += [f"{key} is left out: {reason}" for key, reason in comparison.left_out.items()]
    return "\n".join(lines)


def comparison_records(comparison: ModelComparison) -> Iterator[dict[str, Any]]:
    """The same as JSON: an object for each metric of a set, and one for each set that is left out."""
    models = {"model_a": comparison.a.name, "model_b": comparison.b.name}
    for metric in comparison.metrics:
        sha256 = comparison.a.records[metric.key].get("data_sha256")
        yield {**asdict(metric), **models, "data_sha256": sha256}
    for key, reason in comparison.left_out.items():
        yield {"key": key, "left_out": reason, **models}


class _CannotCompareError(Exception):
    """The reason why a set is left out."""


def _split(name: str) -> tuple[Path, str]:
    """Folder and label; a folder may have a colon in its name."""
    folder, colon, label = name.rpartition(":")
    if Path(name).is_dir() or not colon or not Path(folder).is_dir():
        return Path(name), ""
    return Path(folder), label


def _pick(folder: Path, label: str, labels: Sequence[str]) -> str:
    """The label that is meant: of a run the combined model, of a folder of its name that stage, else the only one."""
    if not label:
        is_run = (folder / "config.json").is_file()
        name = "combined" if is_run else folder.resolve().name
        label = labels[0] if len(labels) == 1 and not is_run else name
    if label not in labels:
        raise UserError(
            f"{folder} has no results of {label!r} but of {', '.join(labels)}; say which, as in {folder}:{labels[0]}"
        )
    return label


def _compare_set(a: ModelResults, b: ModelResults, key: str, resamples: int) -> list[MetricComparison]:
    for model, other in ((a, b), (b, a)):
        if key not in model.records:
            raise _CannotCompareError(f"only {other.name} has it")
    one, two = a.records[key], b.records[key]
    digests = [str(record.get("data_sha256")) for record in (one, two)]
    if digests[0] != digests[1]:
        raise _CannotCompareError(f"the data differ (sha256 {digests[0][:8]}... and {digests[1][:8]}...)")
    outcomes = [_outcomes(model, key) for model in (a, b)]
    found = [
        _compare_metric(key, name, value, two["metrics"][name], outcomes, resamples)
        for name, value in one["metrics"].items()
        if name in two["metrics"] and name != "main_metric"
    ]
    found.sort(key=lambda metric: metric.ci95 is None)  # those without an interval last
    return _with_holm(found)


def _outcomes(model: ModelResults, key: str) -> dict[str, np.ndarray]:
    name = model.records[key].get("outcomes")
    path = model.folders[key] / Path(name or "").name
    if not name or not path.is_file():
        raise _CannotCompareError(f"{model.name} has no outcomes of single queries for it; evaluate it again")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            return dict(stored)
    except Exception as error:  # damaged archives raise errors of many kinds
        raise _CannotCompareError(f"{path} cannot be read ({error}); evaluate it again") from error


def _compare_metric(
    key: str, metric: str, a: float, b: float, outcomes: Sequence[Mapping[str, np.ndarray]], resamples: int
) -> MetricComparison:
    plain = MetricComparison(key=key, metric=metric, a=a, b=b, difference=a - b)
    if not all(metric in of_model for of_model in outcomes):
        return plain
    of_a, of_b = (of_model[metric] for of_model in outcomes)
    if of_a.shape != of_b.shape:
        raise _CannotCompareError(f"{metric} has {len(of_a)} outcomes in one and {len(of_b)} in the other")
    paired = compare_paired(of_a, of_b, outcomes[0].get(f"unit:{metric}"), resamples=resamples)
    return replace(
        plain,
        ci95=(paired.low, paired.high),
        n=paired.n,
        units=paired.units,
        only_a=paired.only_a,
        only_b=paired.only_b,
        p_value=paired.p_value,
    )


def _with_holm(metrics: Sequence[MetricComparison]) -> list[MetricComparison]:
    """With adjusted p-values where the set has more than one."""
    tests = {_test_of(metric): metric.p_value for metric in metrics if metric.p_value is not None}
    if len(tests) < 2:
        return list(metrics)
    adjusted = dict(zip(tests, holm(list(tests.values())), strict=True))
    return [replace(metric, p_holm=adjusted.get(_test_of(metric))) for metric in metrics]


def _test_of(metric: MetricComparison) -> tuple[Any, ...]:
    """What tells two tests apart: metrics with the same figures and counts are one test under several names."""
    return (metric.a, metric.b, metric.n, metric.only_a, metric.only_b, metric.p_value)


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
