"""Compare the results of two models query by query, and format results as Markdown tables."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from mcl_clip.core.stats import PairedComparison, compare_paired, holm
from mcl_clip.results.record import Result, RunRecord
from mcl_clip.results.text import (
    METRICS,
    PROBE_AT_WIDTH,
    SIDE_NAMES,
    cell,
    format_percent,
    label_title,
    listed,
    markdown_table,
    metric_title,
    public_name,
)

RESAMPLES = 2000
UNRELATED, MOSTLY_SAME = 0.2, 0.6  # agreement of two clusterings, from random to equal
LINEAR_PROBE = "linear_acc1"
RIGHT_OR_WRONG = ("acc1", LINEAR_PROBE, "text_retrieval_recall@1", "image_retrieval_recall@1", "micro_accuracy")


@dataclass(frozen=True)
class MetricDifference:
    """A metric of one set under two models, a and b; `paired` is None where outcomes are not stored.

    `p_holm` is adjusted for the number of p-values of the set where metrics are tested together.
    """

    result: Result  # of a
    metric: str
    a: float
    b: float
    paired: PairedComparison | None
    p_holm: float | None = None

    @property
    def name(self) -> str:
        """The user's name of the set, escaped and without folders."""
        return set_name(self.result)

    @property
    def is_main(self) -> bool:
        """Whether it is the metric to quote of this set."""
        return self.metric == self.result.main_metric

    @property
    def verdict(self) -> str:
        """Whether a is `better` or `worse`; empty where that is not clear."""
        return verdict(self.paired)

    def __str__(self) -> str:
        """Format the difference in points, with its interval where there is one."""
        if self.paired is None:
            return f"{100 * (self.a - self.b):+.1f} points, interval not known"
        return difference_text(self.paired).replace(" [", " points [")


def compare(a: Result, b: Result, metric: str, *, resamples: int = RESAMPLES) -> PairedComparison | None:
    """Compare two models on the same queries; None where outcomes are not stored, or not of the same data."""
    of_a, of_b = a.outcomes.get(metric), b.outcomes.get(metric)
    has_same_data = a.record.get("data_sha256") == b.record.get("data_sha256")
    if of_a is None or of_b is None or of_a.shape != of_b.shape or not len(of_a) or not has_same_data:
        return None
    return compare_paired(of_a, of_b, a.outcomes.get(f"unit:{metric}"), resamples=resamples)


def verdict(paired: PairedComparison | None) -> str:
    """Return `better` or `worse` where the 95 % interval of the difference excludes 0, else an empty string."""
    if paired is None or paired.low <= 0 <= paired.high:
        return ""
    return "better" if paired.low > 0 else "worse"


def difference_text(paired: PairedComparison) -> str:
    """Format a difference in points with its interval."""
    return format_percent(paired.difference, (paired.low, paired.high), signed=True)


def headline_metrics(result: Result) -> list[str]:
    """Return the main metric and the linear probe, where they were measured."""
    metrics = dict.fromkeys((result.main_metric, LINEAR_PROBE))
    return [metric for metric in metrics if result.value(metric) is not None]


def shown_metrics(results: Iterable[Result]) -> list[str]:
    """Return the metrics of a set that tables show, the main one first."""
    results = list(results)
    measured = dict.fromkeys(
        metric for result in results for metric in result.record["metrics"] if result.value(metric) is not None
    )
    known = [metric for metric in METRICS if metric in measured]
    at_width = [metric for metric in measured if metric.startswith(PROBE_AT_WIDTH)]
    return list(dict.fromkeys([results[0].main_metric, *known, *at_width]))


def set_name(result: Result) -> str:
    """Return the user's name of a set, escaped and without folders."""
    return public_name(result.dataset)


def sizes(result: Result) -> str:
    """Format the size of a set: `1,000 images, 10 classes`."""
    units = {"n_images": "images", "n_texts": "texts", "n_classes": "classes", "n_pairs": "items"}
    if "n_classes" in result.record:
        units.pop("n_texts")  # they are prompts
    return ", ".join(f"{result.record[key]:,} {unit}" for key, unit in units.items() if key in result.record)


def compare_metrics(
    a: Result, b: Result, metrics: Iterable[str], *, resamples: int = RESAMPLES
) -> Iterator[MetricDifference]:
    """Compare two models on one set, by those of `metrics` that both measured."""
    for metric in metrics:
        values = a.value(metric), b.value(metric)
        if values[0] is not None and values[1] is not None:
            yield MetricDifference(a, metric, values[0], values[1], compare(a, b, metric, resamples=resamples))


def differences(run: RunRecord, ours: str, other: str) -> list[MetricDifference]:
    """Compare two models of a run by the headline metrics of each set that both were evaluated on."""
    both = [(of_set[ours], of_set[other]) for of_set in run.results.values() if {ours, other} <= of_set.keys()]
    return [difference for a, b in both for difference in compare_metrics(a, b, headline_metrics(a))]


def verdict_text(found: Iterable[MetricDifference]) -> str:
    """Say on which sets a is better, worse, or not clearly different, by the main metric."""
    names: dict[str, list[str]] = {"better": [], "": [], "worse": []}
    for difference in found:
        if difference.is_main:
            names[difference.verdict].append(difference.name)
    parts = [f"better on {listed(names['better'])}", f"worse on {listed(names['worse'])}"]
    return "; ".join(parts + ([f"no clear difference on {listed(names[''])}"] if names[""] else []))


def main_table(run: RunRecord, labels: Sequence[str], ours: str) -> str:
    """Format the main metric of each set, a column for each model; `ours` is in bold."""
    rows = [["set", "metric, %", "size", "chance", *(_heading(label, labels, ours) for label in labels)]]
    for of_set in run.results.values():
        first = next(iter(of_set.values()))
        metric, classes, images = first.main_metric, first.record.get("n_classes"), first.record.get("n_images")
        choices = classes if metric == "acc1" else images if metric == "mean_recall@1" else None
        chance = f"{100 / choices:.1f}" if choices else "-"
        cells = [cell(of_set.get(label), metric) for label in labels]
        rows.append([set_name(first), metric_title(metric), sizes(first), chance, *cells])
    return markdown_table(rows, text_columns=3)


def set_table(of_set: Mapping[str, Result], labels: Sequence[str], ours: str) -> str:
    """Format all metrics of a set, a line for each model; `ours` is in bold."""
    metrics = shown_metrics(of_set.values())
    rows = [
        [_heading(label, labels, ours), *(cell(of_set.get(label), metric) for metric in metrics)] for label in labels
    ]
    return markdown_table([["", *map(metric_title, metrics)], *rows])


def _heading(label: str, labels: Sequence[str], ours: str) -> str:
    name = label_title(label) if len(labels) > 1 else "this model"
    return f"**{name}**" if label == ours else name


def difference_table(run: RunRecord, ours: str, other: str) -> str:
    """Format paired differences of two models, a line for each set and metric; empty without stored outcomes."""
    tests = []
    for of_set in run.results.values():
        if {ours, other} <= of_set.keys():
            a, b = of_set[ours], of_set[other]
            counted = [metric for metric in RIGHT_OR_WRONG if metric in a.outcomes and metric in b.outcomes]
            found = [(metric, compare(a, b, metric)) for metric in counted or [a.main_metric]]
            tests += [(set_name(a), metric, paired) for metric, paired in found if paired]
    if not tests:
        return ""
    adjusted = iter(holm([paired.p_value for _, _, paired in tests if paired.p_value is not None]))
    titles = ["set", "metric", "queries", f"only {label_title(other)}", f"only {label_title(ours)}"]
    rows = [[*titles, "difference, points", "p", "p (Holm)"]]
    for name, metric, paired in tests:
        only = ["-"] * 2 if paired.only_a is None else [f"{paired.only_b:,}", f"{paired.only_a:,}"]
        p_values = [] if paired.p_value is None else [paired.p_value, next(adjusted)]
        p_cells = [f"{p:.2g}" if p >= 1e-6 else "< 1e-6" for p in p_values] or ["-"] * 2
        rows.append([name, metric_title(metric), f"{paired.n:,}", *only, difference_text(paired), *p_cells])
    return markdown_table(rows, text_columns=2)


def agreement_text(agreement: float, if_random: float) -> str:
    """Say how the clusters of a stage relate to those of the stage before."""
    share = (agreement - if_random) / max(1e-9, 1 - if_random)  # 0 is a random agreement, 1 an equal clustering
    if share < UNRELATED:
        return "are largely unrelated to"
    return "mostly agree with" if share > MOSTLY_SAME else "partly agree with"


def agreement_table(run: RunRecord) -> str:
    """Format the agreement of the clusterings of consecutive stages; empty where no two can be compared."""
    rows = [
        [f"{s} and {s + 1}", SIDE_NAMES[side], f"{agreement:.2f}", f"{if_random:.2f}"]
        for (s, side), (agreement, if_random) in run.agreement.items()
    ]
    titles = ["stages", "clusters of", "agreement", "if unrelated"]
    return markdown_table([titles, *rows], text_columns=2) if rows else ""
