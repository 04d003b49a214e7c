"""The results of a run as tables and sentences, which say no more than was measured."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mcl_clip.core.stats import PairedComparison, holm
from mcl_clip.results.record import COMBINED, Result, RunRecord, compare
from mcl_clip.results.text import listed, public_name, safe, table

TITLES = {
    "mean_recall@1": "mean R@1",
    "text_retrieval_recall@1": "picture to text R@1",
    "text_retrieval_recall@5": "picture to text R@5",
    "image_retrieval_recall@1": "text to picture R@1",
    "image_retrieval_recall@5": "text to picture R@5",
    "acc1": "zero-shot accuracy",
    "acc5": "among the first 5",
    "mean_per_class_recall": "mean over classes",
    "mean_average_precision": "mean average precision",
    "linear_acc1": "linear read-out",
    "accuracy": "accuracy",
    "image_score": "image score",
    "text_score": "text score",
    "group_score": "group score",
    "pair_accuracy": "pairs",
    "set_accuracy": "sets",
}
AT_WIDTH = "linear_acc1_width_"
RIGHT_OR_WRONG = ("acc1", "linear_acc1", "text_retrieval_recall@1", "image_retrieval_recall@1", "micro_accuracy")


def title(label: str) -> str:
    """What a model of a run is called."""
    return "all stages" if label == COMBINED else f"stage {label.removeprefix('stage-')}"


def set_name(result: Result) -> str:
    """What the user calls a set."""
    return public_name(result.record["dataset"])


def metric_title(metric: str) -> str:
    """What a measure is called."""
    if metric.startswith(AT_WIDTH):
        return f"the same at {safe(metric.removeprefix(AT_WIDTH))} dimensions"
    return TITLES.get(metric, safe(metric))


def metrics_of(results: Iterable[Result]) -> list[str]:
    """The measures of a set that are shown, the main one first."""
    results = list(results)
    measured = dict.fromkeys(
        metric for result in results for metric in result.record["metrics"] if result.value(metric) is not None
    )
    known = [metric for metric in TITLES if metric in measured]
    widths = [metric for metric in measured if metric.startswith(AT_WIDTH)]
    return list(dict.fromkeys([results[0].main_metric, *known, *widths]))


def cell(result: Result | None, metric: str) -> str:
    """A measure in percent with its 95 % interval."""
    value = result.value(metric) if result else None
    if result is None or value is None:
        return "-"
    if metric.endswith("rank"):
        return f"{value:g}"
    interval = result.interval(metric)
    return f"{100 * value:.1f}" + (f" [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]" if interval else "")


def chance(result: Result) -> str:
    """The main measure of guessing, where it is known."""
    record, images = result.record, result.record.get("n_images")
    if result.main_metric == "acc1" and record.get("n_classes"):
        return f"{100 / record['n_classes']:.1f}"
    return f"{100 / images:.1f}" if result.main_metric == "mean_recall@1" and images else "-"


def sizes(result: Result) -> str:
    """How large a set is."""
    record = result.record
    names = {"n_images": "pictures", "n_texts": "texts", "n_classes": "classes", "n_pairs": "items"}
    if "n_classes" in record:
        names.pop("n_texts")
    return ", ".join(f"{record[key]:,} {name}" for key, name in names.items() if key in record)


@dataclass(frozen=True, kw_only=True)
class Duel:
    """A measure of a set under the model of the card and another one."""

    name: str
    metric: str
    is_main: bool
    ours: float
    other: float
    paired: PairedComparison | None

    @property
    def verdict(self) -> str:
        """`better` or `worse` where the interval of the difference leaves out 0; empty where nothing is clear."""
        if self.paired is None or self.paired.low <= 0 <= self.paired.high:
            return ""
        return "better" if self.paired.low > 0 else "worse"

    @property
    def difference(self) -> str:
        """In points, with its interval where there is one."""
        if self.paired is None:
            return f"{100 * (self.ours - self.other):+.1f} points, interval not known"
        return difference_text(self.paired).replace(" [", " points [")


def duels(run: RunRecord, ours: str, other: str) -> list[Duel]:
    """The model of the card against another of its run: the main measure, and the read-out, of each set of both."""
    found = []
    for of_set in run.results.values():
        if ours not in of_set or other not in of_set:
            continue
        one, two = of_set[ours], of_set[other]
        for metric in dict.fromkeys((one.main_metric, "linear_acc1")):
            values = one.value(metric), two.value(metric)
            if values[0] is not None and values[1] is not None:
                found.append(
                    Duel(
                        name=set_name(one),
                        metric=metric,
                        is_main=metric == one.main_metric,
                        ours=values[0],
                        other=values[1],
                        paired=compare(one, two, metric),
                    )
                )
    return found


def difference_text(paired: PairedComparison) -> str:
    """A difference in points with its interval."""
    return f"{100 * paired.difference:+.1f} [{100 * paired.low:+.1f}, {100 * paired.high:+.1f}]"


def verdicts(found: Iterable[Duel]) -> str:
    """On which sets the model is better, worse, or neither, by the main measure."""
    names: dict[str, list[str]] = {"better": [], "": [], "worse": []}
    for duel in found:
        if duel.is_main:
            names[duel.verdict].append(duel.name)
    parts = [f"better on {listed(names['better'])}", f"worse on {listed(names['worse'])}"]
    return "; ".join(parts + ([f"no clear difference on {listed(names[''])}"] if names[""] else []))


def losing_sentences(found: Sequence[Duel], ours: str, other: str) -> list[str]:
    """On which sets another model of the run is better, with the figures; what may be chance comes last, together."""
    better = "All stages together are" if other == COMBINED else f"{title(other).capitalize()} alone is"
    mine = f"{title(ours)} alone" if other == COMBINED else title(ours)
    lost = [duel for duel in found if duel.other > duel.ours]
    clear: dict[str, list[str]] = {}
    for duel in lost:
        if duel.verdict == "worse":
            values = f"{100 * duel.other:.1f} against {100 * duel.ours:.1f} % (difference {duel.difference})"
            clear.setdefault(duel.name, []).append(f"{metric_title(duel.metric)} {values}")
    sentences = [f"**{better} better than {mine} on {name}**: {'; '.join(values)}." for name, values in clear.items()]
    if unclear := [
        f"{duel.name}, {metric_title(duel.metric)} ({duel.difference})" for duel in lost if duel.verdict != "worse"
    ]:
        sentences.append(f"{better} ahead of {mine}, but not clearly, on {'; '.join(unclear)}.")
    return sentences


def main_table(run: RunRecord, labels: Sequence[str], ours: str) -> str:
    """The main measure of each set, a column a model."""
    rows = [["set", "measure, %", "measured on", "chance", *(_heading(label, labels, ours) for label in labels)]]
    for of_set in run.results.values():
        first = next(iter(of_set.values()))
        cells = [cell(of_set.get(label), first.main_metric) for label in labels]
        rows.append([set_name(first), metric_title(first.main_metric), sizes(first), chance(first), *cells])
    return table(rows, words=3)


def _heading(label: str, labels: Sequence[str], ours: str) -> str:
    name = title(label) if len(labels) > 1 else "this model"
    return f"**{name}**" if label == ours else name


def set_table(of_set: Mapping[str, Result], labels: Sequence[str], ours: str) -> str:
    """All measures of a set that are shown, a line a model."""
    metrics = metrics_of(of_set.values())
    rows = [
        [_heading(label, labels, ours), *(cell(of_set.get(label), metric) for metric in metrics)] for label in labels
    ]
    return table([["", *map(metric_title, metrics)], *rows])


def difference_table(run: RunRecord, ours: str, other: str) -> str:
    """What each of two models gets right alone, a line a set and measure; empty where outcomes are not stored."""
    found = [
        (set_name(of_set[ours]), metric, paired)
        for of_set in run.results.values()
        if ours in of_set and other in of_set
        for metric in _compared(of_set[ours], of_set[other])
        if (paired := compare(of_set[ours], of_set[other], metric)) is not None
    ]
    if not found:
        return ""
    tested = [paired.p_value for _, _, paired in found if paired.p_value is not None]
    adjusted = iter(holm(tested))
    titles = ["set", "measure", "queries", f"only {title(other)}", f"only {title(ours)}", "difference, points"]
    rows = [[*titles, "p", "p (Holm)"]]
    for name, metric, paired in found:
        alone = ["-"] * 2 if paired.only_a is None else [f"{paired.only_b:,}", f"{paired.only_a:,}"]
        p_values = ["-"] * 2 if paired.p_value is None else [_p(paired.p_value), _p(next(adjusted))]
        rows.append([name, metric_title(metric), f"{paired.n:,}", *alone, difference_text(paired), *p_values])
    return table(rows, words=2)


def _compared(one: Result, two: Result) -> list[str]:
    counted = [metric for metric in RIGHT_OR_WRONG if metric in one.outcomes and metric in two.outcomes]
    return counted or [one.main_metric]


def _p(value: float) -> str:
    return f"{value:.2g}" if value >= 1e-6 else "< 1e-6"


def agreement_table(run: RunRecord) -> str:
    """How alike the clusterings of consecutive stages are; empty where no two can be compared."""
    if not run.agreement:
        return ""
    rows = [
        [f"{s} and {s + 1}", {"image": "pictures", "text": "texts"}[side], f"{found:.2f}", f"{unrelated:.2f}"]
        for (s, side), (found, unrelated) in run.agreement.items()
    ]
    return table([["stages", "clusters of", "agreement", "if unrelated"], *rows], words=2)
