"""The verdict of an audit, its record in audit.json, and its tables as text."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from mcl_clip.core.errors import UserError
from mcl_clip.core.files import read_json
from mcl_clip.eval.shortcuts import DIGITS, MIN_COVERAGE, Part, Shortcuts
from mcl_clip.results.text import aligned

AUDIT, PAGE = "audit.json", "audit.html"
FOLDER = "audit"  # of a run
FORMAT = 1
ALL_KINDS = "all"
SUPPRESSING_RATIO = 0.6  # of what is left without other parts: below it, a part explains what a content word never does
READS_TEXT = 0.25  # of the margin, given by a written word
LEARNING_SHARE = 0.5  # of the loss of guessing
GUESSING_SHARE = 0.97


class Verdict(NamedTuple):
    """What an audit found, in one sentence, and what to do."""

    kind: Literal["suppressed", "learning", "neither"]
    text: str
    advice: str


def give_verdict(
    found: Shortcuts,
    *,
    loss_share: float,
    swaps: Mapping[str, Mapping[str, Any]],
    clusters: int,
) -> Verdict:
    """Judge whether a shortcut suppresses other features, the model is still learning, or neither.

    Args:
        found: what was measured.
        loss_share: contrastive loss at its best temperature, as a share of that of guessing.
        swaps: figures of each kind of swap, and of all.
        clusters: groups of about a batch each that the data makes.
    """
    sight = swaps[ALL_KINDS]["sight"][0] if swaps else None
    swapped = (
        "" if sight is None else f"; {_percent(sight)} of swaps are right with the prior of the language taken out"
    )
    pairs = f"loss {_percent(loss_share)} of guessing"
    if found.interval[0] <= 0 or loss_share > GUESSING_SHARE:
        return Verdict(
            "learning",
            f"still learning: it guesses, pairs score no higher than other pictures and captions ({pairs}{swapped})",
            "train more steps, and check that the captions fit the pictures and the image transform fits the model",
        )
    if reasons := suppressing(found):
        return Verdict(
            "suppressed",
            f"suppressed by {' and '.join(reasons)} ({pairs}{swapped})",
            f"remove this cue from pictures and captions; or train further stages, with about {clusters} clusters "
            f"after the first (a batch of rows each), so that pairs of one batch share the cue; an ensemble does not "
            f"help",
        )
    weak = _weakest(swaps)
    weakest = f", worst {weak} ({_percent(swaps[weak]['sight'][0])})" if weak else ""
    if loss_share >= LEARNING_SHARE:
        return Verdict(
            "learning",
            f"still learning: its scores hardly tell pairs apart, and no shortcut explains them "
            f"({pairs}{swapped}{weakest})",
            "train more steps or, where the loss of training is low already, on more pairs; stages do not help yet",
        )
    return Verdict(
        "neither",
        f"neither suppressed nor still learning: no shortcut explains its scores ({pairs}{swapped}{weakest})",
        "an ensemble, or stages without groups, gains more than stages with groups; wrong captions as negatives train "
        "what swaps get wrong",
    )


def suppressing(found: Shortcuts) -> list[str]:
    """Name the parts by which the model tells pairs apart, with their figures; none for an ordinary model."""
    reasons = []
    for part in sorted(filter(is_suppressing, found.regions), key=lambda one: one.left)[:1]:
        reason = (
            f"what is in the {part.name} (covered, {_percent(part.left)} of the margin is left; {_otherwise(part)})"
        )
        if part.words:
            name, share, by_chance = part.words[0]
            reason += f", which goes with the {name} ({_percent(share)} of it; random words {_percent(by_chance)})"
        reasons.append(reason)
    digits = [part for part in found.words if part.name == DIGITS and is_suppressing(part)]
    reasons += [
        f"the digits in the captions (exchanged, {_percent(part.left)} of the margin is left; {_otherwise(part)})"
        for part in digits
    ]
    if found.reads_interval[0] > READS_TEXT:
        reasons.append(
            f"text in the picture (a word written on it gives its caption {_percent(found.reads)} of the margin)"
        )
    return reasons


def is_suppressing(part: Part) -> bool:
    """Return whether the model tells most pairs apart by a part, beyond what other parts of its size explain."""
    return part.coverage >= MIN_COVERAGE and part.ratio is not None and part.ratio[2] < SUPPRESSING_RATIO


def is_marked(part: Mapping[str, Any]) -> bool:
    """Return whether a part of the record is a shortcut: a region or digits that suppress other features."""
    return (part["kind"] != "words" or part["name"] == DIGITS) and is_suppressing(Part(**part))


def _otherwise(part: Part) -> str:
    what = "as many random words: {}" if part.kind == "words" else f"other {part.kind}s: {{}}"
    return what.format(_percent(part.left_otherwise or 0))


def _weakest(swaps: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the kind of swap with the lowest accuracy, of those of which a score says something; empty for none."""
    kinds = {kind: of_kind["sight"][0] for kind, of_kind in swaps.items() if kind != ALL_KINDS and of_kind["n"] >= 50}
    return min(kinds, key=kinds.__getitem__, default="")


def read_audit(folder: Path) -> dict[str, Any] | None:
    """Read audit.json in a folder; None if there is none.

    Raises:
        UserError: if it is damaged, or was written by a newer version.
    """
    path = folder / AUDIT
    if not path.is_file():
        return None
    record = read_json(path)
    is_audit = isinstance(record, dict) and record.get("format") == FORMAT
    verdict = record.get("verdict") if is_audit else None
    if not isinstance(verdict, dict) or not all(isinstance(verdict.get(name), str) for name in Verdict._fields):
        raise UserError(f"{path} is no audit that this version reads; delete its folder and audit again")
    return dict(record)


def audit_lines(record: Mapping[str, Any]) -> list[str]:
    """Format an audit for the terminal: the verdict, the swaps, and the parts that explain most."""
    verdict, lines = record["verdict"], []
    lines += [f"{record['model']} is {verdict['text']}", f"what to do: {verdict['advice']}"]
    if record["swaps"]:
        lines += ["swaps, percent right (50 is chance):", *aligned(swap_rows(record["swaps"]))]
    if not is_guessing(record["shortcuts"]):
        lines += ["parts of captions and pictures:", *aligned(part_rows(record["shortcuts"], most=5))]
    return lines


def is_guessing(shortcuts: Mapping[str, Any]) -> bool:
    """Return whether pairs score no higher than others, so that there is no margin to explain."""
    return bool(shortcuts["interval"][0] <= 0)


def swap_rows(swaps: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Return a table of swaps by kind."""
    rows = [["kind", "swaps", "right", "blind", "without the prior"]]
    for kind, figures in swaps.items():
        right, sight = (_with_interval(figures[name]) for name in ("accuracy", "sight"))
        rows.append([kind, f"{figures['n']:,}", right, f"{100 * figures['blind']:.1f}", sight])
    return rows


def part_rows(shortcuts: Mapping[str, Any], most: int = 100) -> list[list[str]]:
    """Return a table of parts, those first of which least is left compared with other parts; single words last."""
    parts = [*shortcuts["regions"], *shortcuts["words"]]
    compared = sorted((part for part in parts if part["ratio"]), key=lambda part: part["ratio"][0])
    single = sorted((part for part in parts if not part["ratio"]), key=lambda part: part["left"])
    rows = [["without", "in % of pairs", "margin left, %", "without others, %", "ratio"]]
    for part in [*compared[:most], *single[:most]]:
        ratio = part["ratio"]
        rows.append(
            [
                part["name"] if part["kind"] != "word" else f"'{part['name']}'",
                f"{100 * part['coverage']:.0f}",
                f"{100 * part['left']:.0f}",
                "" if part["left_otherwise"] is None else f"{100 * part['left_otherwise']:.0f}",
                f"{ratio[0]:.2f} [{ratio[1]:.2f}, {ratio[2]:.2f}]" if ratio and ratio[2] < math.inf else "",
            ]
        )
    return rows


def _with_interval(value: Sequence[float]) -> str:
    return "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * number for number in value))


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
