"""Format what runs measured: names of metrics, models and controls, cells, durations, sizes, and tables.

Text from a recipe passes through `safe` before it reaches Markdown or HTML, and text that may be a path through
`public_name`.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mcl_clip.results.record import COMBINED, Result, load_results

NOT_MEASURED = "not measured"
NOT_STATED = "not stated"
MAX_NAMES = 6  # that a sentence lists; more are counted
MAX_COLUMNS = 10  # of a task that is not in COLUMNS
SIDE_NAMES = {"image": "images", "text": "texts"}
CONTROLS = {
    "single": "a single stage with the compute of all stages",
    "ensemble": "models from different seeds in place of stages, without groups",
    "no-groups": "the same stages without groups",
    "random-groups": "the same stages with random groups",
    "ifm": "a single stage of equal compute with implicit feature modification",
}
METHODS = {
    "single": "one stage with the compute of all stages",
    "plain-stages": "stages without groups",
    "ensemble": "an ensemble of models from the same start",
    "soup": "a soup: the mean of the weights of models from the same start",
    "greedy-soup": "a greedy soup: the mean of the weights of the models that help on the set of choices",
}
METRICS = {
    "mean_recall@1": "mean R@1",
    "text_retrieval_recall@1": "image-to-text R@1",
    "text_retrieval_recall@5": "image-to-text R@5",
    "image_retrieval_recall@1": "text-to-image R@1",
    "image_retrieval_recall@5": "text-to-image R@5",
    "acc1": "zero-shot accuracy",
    "acc5": "zero-shot top-5 accuracy",
    "mean_per_class_recall": "mean per-class recall",
    "mean_average_precision": "mean average precision",
    "linear_acc1": "linear probe",
    "knn_acc1": "k-NN probe",
    "accuracy": "accuracy",
    "image_score": "image score",
    "text_score": "text score",
    "group_score": "group score",
    "pair_accuracy": "pairs",
    "set_accuracy": "sets",
}
PROBE_AT_WIDTH = "linear_acc1_width_"
_DIRECTIONS = {"i2t": "text_retrieval", "t2i": "image_retrieval"}
_RANKING = {"R@1": "recall@1", "R@5": "recall@5", "R@10": "recall@10", "med.": "median_rank"}
COLUMNS = {  # of the table in the terminal, by task
    "zeroshot_retrieval": {
        "mean R@1": "mean_recall@1",
        **{f"{way} {title}": f"{_DIRECTIONS[way]}_{_RANKING[title]}" for way in _DIRECTIONS for title in _RANKING},
    },
    "zeroshot_classification": {
        "zero-shot": "acc1",
        "top 5": "acc5",
        "linear probe": "linear_acc1",
        "NMI of clusters": "cluster_nmi",
    },
    "image_probe": {"linear probe": "linear_acc1", "k-NN probe": "knn_acc1", "NMI of clusters": "cluster_nmi"},
    "image_text_pairs": {
        METRICS[name]: name
        for name in ("accuracy", "image_score", "text_score", "group_score", "pair_accuracy", "set_accuracy")
    },
}
_PLAIN = re.compile(r"[\w.-]+(/[\w.-]+)?")
_SPECIAL = re.compile(r"[&<>|`*\[\]\\~$]|(?<!\w)_|_(?!\w)")


def safe(text: object) -> str:
    """Escape text for Markdown and HTML: one line that both show literally, also in a table."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    return _SPECIAL.sub(lambda match: f"&#{ord(match[0])};", line)


def public_name(text: object) -> str:
    """Return a name such as ORG/NAME, or the last part of a path, escaped."""
    name = str(text)
    return safe(name if _PLAIN.fullmatch(name) else name.rstrip("/").rsplit("/", 1)[-1])


def label_title(label: str) -> str:
    """Return the name of a model in tables: `stage 0` or `all stages`."""
    return "all stages" if label == COMBINED else label.replace("-", " ")


def metric_title(metric: str) -> str:
    """Return the name of a metric in tables, escaped."""
    if metric.startswith(PROBE_AT_WIDTH):
        return f"linear probe, {safe(metric.removeprefix(PROBE_AT_WIDTH))} dimensions"
    return METRICS.get(metric, safe(metric))


def listed(names: Iterable[str], *, most: int = MAX_NAMES, none: str = "none") -> str:
    """Join names to `a, b and c`; only count them where there are more than `most`."""
    names = list(names)
    if len(names) > most:
        return f"{len(names)} sets"
    return ", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else (names or [none])[0]


def format_percent(value: float | None, interval: tuple[float, float] | None = None, *, signed: bool = False) -> str:
    """Format a share in percent with its interval: `62.5 [60.1, 64.8]`; `-` where it was not measured."""
    if value is None or not math.isfinite(value):
        return "-"
    number = "+.1f" if signed else ".1f"
    ends = f" [{', '.join(format(100 * end, number) for end in interval)}]" if interval else ""
    return format(100 * value, number) + ends


def cell(result: Result | None, metric: str, *, has_interval: bool = True) -> str:
    """Format a metric of a result: a share in percent with its 95 % interval, or a rank."""
    value = result.value(metric) if result else None
    if result is None or value is None:
        return "-"
    if metric.endswith("rank"):
        return f"{value:g}"
    return format_percent(value, result.interval(metric) if has_interval else None)


def format_parameters(number: float) -> str:
    """Format a number of parameters: `151.3 M`."""
    return _scaled(number, ("", " K", " M", " B"))


def format_bytes(number: int) -> str:
    """Format a number of bytes in powers of ten: `1.7 GB`."""
    return _scaled(number, (" bytes", " kB", " MB", " GB", " TB"))


def _scaled(number: float, units: Sequence[str]) -> str:
    power = next((power for power in range(len(units) - 1, 0, -1) if number >= 1000**power), 0)
    return f"{number / 1000**power:.1f}{units[power]}" if power else f"{number:g}{units[0]}"


def format_duration(seconds: float) -> str:
    """Format a duration: `2 h 3 min`, `1 min 10 s` or `0.3 s`."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
    return "{} h {} min".format(*divmod(round(seconds / 60), 60))


def markdown_table(rows: Sequence[Sequence[str]], *, text_columns: int = 1) -> str:
    """Format rows, with the titles first, as a Markdown table; columns after `text_columns` are right-aligned."""
    marks = ["---" if column < text_columns else "--:" for column in range(len(rows[0]))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (rows[0], marks, *rows[1:]))


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Format rows as indented lines for a terminal: the first column left-aligned, the others right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  " + "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]


def results_table(folder: Path) -> str:
    """Format the results of a run so far: a table for each set, a line for each model, shares in percent.

    Only the main metric comes with its 95 % interval.
    """
    return "\n".join(line for title, rows in result_rows(folder).items() for line in (title, *aligned(rows)))


def trade_rows(curve: Sequence[Mapping[str, float]], chosen: float) -> list[list[str]]:
    """Return the values of an interpolation with the base by share, titles first; the chosen share has a star."""
    terms = [name for name in curve[0] if name != "share"]
    rows = [["share of the fine-tuned weights", *terms]]
    for point in curve:
        mark = " *" if point["share"] == chosen else ""
        values = [f"{point[t]:g}" if t.endswith("rank") else format_percent(point[t]) for t in terms]
        rows.append([f"{point['share']:g}{mark}", *values])
    return rows


def trade_table(curve: Sequence[Mapping[str, float]], chosen: float) -> str:
    """Format `trade_rows` for a terminal."""
    return "\n".join(aligned(trade_rows(curve, chosen)))


def result_rows(folder: Path) -> dict[str, list[list[str]]]:
    """Return the rows of `results_table`, titles first, by the heading of each table."""
    sets: dict[str, list[Result]] = {}
    for result in load_results(folder):
        sets.setdefault(result.record["key"], []).append(result)
    tables = {}
    for key, results in sets.items():
        columns = _columns([result.record for result in results])
        rows = [["", *columns]]
        for result in results:
            main = result.record.get("main_metric")
            rows.append([result.label, *(cell(result, name, has_interval=name == main) for name in columns.values())])
        tables[f"{key}: {size_text(results[0].record)}"] = rows
    return tables


def size_text(record: Mapping[str, Any]) -> str:
    """Format the size of the set of a record."""
    texts = f", {record['n_texts']} texts" if record["n_texts"] else ""
    return f"{record['n_images']} images{texts}"


def _columns(records: Sequence[Mapping[str, Any]]) -> Mapping[str, str]:
    """Return metrics by title, the main one among them; tasks without `COLUMNS` show metrics under their own names."""
    main = next((record["main_metric"] for record in records if "main_metric" in record), None)
    if known := COLUMNS.get(records[0]["task"]):
        return known if main is None or main in known.values() else {main: main, **known}
    names = [main, *(name for record in records for name in record["metrics"])]
    titles = [name for name in dict.fromkeys(names) if name not in (None, "main_metric")]
    return {name: name for name in titles[:MAX_COLUMNS]}
