"""Text fit for Markdown: what comes from a recipe passes through `safe`, what may be a path through `public_name`."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mcl_clip.eval.task import label_of, read_results

NOT_MEASURED = "not measured"
NOT_STATED = "not stated"
NAMES_SHOWN = 6
_PLAIN = re.compile(r"[\w.-]+(/[\w.-]+)?")
_SPECIAL = re.compile(r"[&<>|`*\[\]\\~$]|(?<!\w)_|_(?!\w)")
MAX_COLUMNS = 10
COLUMNS = {
    "zeroshot_retrieval": {
        "mean R@1": "mean_recall@1",
        **{
            f"{way} {column}": f"{side}_{metric}"
            for way, side in (("i2t", "text_retrieval"), ("t2i", "image_retrieval"))
            for column, metric in (
                ("R@1", "recall@1"),
                ("R@5", "recall@5"),
                ("R@10", "recall@10"),
                ("med.", "median_rank"),
            )
        },
    },
    "zeroshot_classification": {
        "zero-shot": "acc1",
        "top 5": "acc5",
        "linear read-out": "linear_acc1",
        "NMI of clusters": "cluster_nmi",
    },
    "image_text_pairs": {
        "accuracy": "accuracy",
        "image score": "image_score",
        "text score": "text_score",
        "group score": "group_score",
        "pairs": "pair_accuracy",
        "sets": "set_accuracy",
    },
}


def safe(text: object) -> str:
    """One line that Markdown and HTML show as it is, in a table too."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    return _SPECIAL.sub(lambda match: f"&#{ord(match[0])};", line)


def public_name(text: object) -> str:
    """A name such as ORG/NAME, or the last part of a path; fit for a table."""
    name = str(text)
    return safe(name if _PLAIN.fullmatch(name) else name.rstrip("/").rsplit("/", 1)[-1])


def table(rows: Sequence[Sequence[str]], *, words: int = 1) -> str:
    """A table with its title row first; all but the first `words` columns are numbers, to the right."""
    marks = ["---" if column < words else "--:" for column in range(len(rows[0]))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (rows[0], marks, *rows[1:]))


def listed(names: Iterable[str], none: str = "none") -> str:
    """Names in a sentence; how many, where they are too many."""
    names = list(names)
    if len(names) > NAMES_SHOWN:
        return f"{len(names)} sets"
    return ", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else (names or [none])[0]


def amount(number: float) -> str:
    """Parameters."""
    for size, unit in ((1e9, " B"), (1e6, " M"), (1e3, " K")):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:g}"


def size(number: int) -> str:
    """Bytes."""
    for unit, letter in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= unit:
            return f"{number / unit:.1f} {letter}"
    return f"{number} bytes"


def duration(seconds: float) -> str:
    """Hours and minutes, or minutes and seconds."""
    minutes = round(seconds / 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{round(seconds) // 60} min {round(seconds) % 60} s" if seconds >= 60 else f"{seconds:.0f} s"


def run_results(run_dir: Path) -> list[dict[str, Any]]:
    """The records of all stages and of the combined model, in order; or those of any folder with a results.jsonl."""
    return [record for folder in result_folders(run_dir) for record in read_results(folder)]


def result_folders(folder: Path) -> list[Path]:
    """Where results of a run, of a stage of it, or of an evaluation may be."""
    stages = sorted(folder.glob("stage-*/eval"), key=lambda path: int(path.parent.name.removeprefix("stage-")))
    return [folder, folder / "eval", *stages, folder / "combined"]


def results_table(run_dir: Path) -> str:
    """What a run has measured so far: a table a set, a line a model, shares in percent.

    The main metric comes with its 95 % interval.
    """
    return "\n".join(line for title, rows in result_rows(run_dir).items() for line in (title, *aligned(rows)))


def result_rows(run_dir: Path) -> dict[str, list[list[str]]]:
    """The rows of `results_table`, the title row first, by what stands above them."""
    records, found = run_results(run_dir), {}
    for key in dict.fromkeys(record["key"] for record in records):
        of_set = [record for record in records if record["key"] == key]
        columns = _columns(of_set)
        rows = [["", *columns], *(_row(record, columns.values()) for record in of_set)]
        found[f"{key}: {size_text(of_set[0])}"] = rows
    return found


def size_text(record: Mapping[str, Any]) -> str:
    """How large the set of a record is."""
    return f"{record['n_images']} images, {record['n_texts']} texts"


def _columns(records: Sequence[Mapping[str, Any]]) -> Mapping[str, str]:
    """Metrics by title, with the main one; a task that is not in `COLUMNS` shows them under their own names."""
    main = next((record["main_metric"] for record in records if "main_metric" in record), None)
    if known := COLUMNS.get(records[0]["task"]):
        return known if main is None or main in known.values() else {main: main, **known}
    names = [main, *(name for record in records for name in record["metrics"])]
    titles = [name for name in dict.fromkeys(names) if name not in (None, "main_metric")]
    return {name: name for name in titles[:MAX_COLUMNS]}


def _row(record: Mapping[str, Any], columns: Iterable[str]) -> list[str]:
    return [label_of(record), *(_cell(record, name) for name in columns)]


def _cell(record: Mapping[str, Any], metric: str) -> str:
    value = record["metrics"].get(metric)
    if value is None:
        return "-"
    if metric.endswith("rank"):
        return f"{value:g}"
    interval = record.get("ci95", {}).get(metric) if metric == record.get("main_metric") else None
    return f"{100 * value:.1f}" + (f" [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]" if interval else "")


def aligned(rows: list[list[str]]) -> list[str]:
    """Lines of a table: the first column to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  " + "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
