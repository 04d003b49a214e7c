import json
from dataclasses import asdict

import pytest

from mcl_clip.core.errors import UserError
from mcl_clip.eval.shortcuts import Part, Shortcuts
from mcl_clip.results.audit import audit_lines, give_verdict, is_marked, read_audit


def a_part(name, kind, left=1.0, otherwise=1.0, coverage=1.0, words=()):
    ratio = left / otherwise
    return Part(
        name=name, kind=kind, coverage=coverage, left=left, left_otherwise=otherwise,
        ratio=(ratio, max(0, ratio - 0.05), ratio + 0.05), size=0.1, words=words,
    )  # fmt: skip


ORDINARY = (
    a_part("digits", "words"),
    a_part("first 4 words", "words", 0.2, 0.6),
    a_part("color words", "words", 0.1, 0.5),
)
EDGES = (a_part("lower edge", "edge"), a_part("left edge", "edge", 0.9))
CODE = (("digits", 0.93, 0.31),)


def shortcuts(*parts, margin=0.3, reads=0.0):
    regions = [part for part in (*EDGES, *parts) if part.kind == "edge"]
    words = [part for part in parts if part.kind == "words"] or ORDINARY
    return Shortcuts(
        margin=margin, interval=(margin - 0.1, margin + 0.1), words=words, regions=regions, reads=reads,
        reads_interval=(reads - 0.05, reads + 0.05),
    )  # fmt: skip


def swap_figures(**sight):
    return {
        kind: {
            "n": 100,
            "pictures": 60,
            "accuracy": [0.7, 0.6, 0.8],
            "blind": 0.5,
            "sight": [value, value - 0.1, value],
        }
        for kind, value in {**sight, "all": 0.66}.items()
    }


def verdict(found, loss_share=0.2, swaps=None):
    return give_verdict(found, loss_share=loss_share, swaps=swaps or {}, clusters=24)


def test_an_edge_that_explains_what_no_other_edge_does_suppresses():
    given = verdict(shortcuts(a_part("upper edge", "edge", 0.12, 0.96, words=CODE)), swaps=swap_figures(color=0.55))
    assert given.kind == "suppressed"
    assert given.text == (
        "suppressed by what is in the upper edge (covered, 12 % of the margin is left; other edges: 96 %), which goes "
        "with the digits (93 % of it; random words 31 %) (loss 20 % of guessing; 66 % of swaps are right with the "
        "prior of the language taken out)"
    )
    assert "about 24 clusters after the first" in given.advice


def test_digits_that_explain_more_than_other_words_suppress():
    given = verdict(shortcuts(a_part("digits", "words", 0.1, 0.6)))
    assert given.kind == "suppressed"
    assert (
        "by the digits in the captions (exchanged, 10 % of the margin is left; as many random words: 60 %)"
        in given.text
    )


def test_both_are_named():
    found = shortcuts(a_part("upper edge", "edge", 0.2), a_part("digits", "words", 0.1, 0.6), reads=0.5)
    text = verdict(found).text
    assert text.index("upper edge") < text.index("the digits") < text.index("text in the picture (a word written on it")


@pytest.mark.parametrize(
    "part",
    [
        a_part("upper edge", "edge", 0.7),  # 0.6 of what others leave is the limit
        a_part("upper edge", "edge", 0.58),  # whose interval reaches above it
        a_part("digits", "words", 0.1, 0.6, coverage=0.3),  # too few captions have any
        a_part("first 4 words", "words", 0.01, 0.6),  # the subject of a caption is content
        a_part("lower edge", "edge", 0.01, 0.012),  # whatever is covered, little is left
    ],
)
def test_what_ordinary_models_show_is_no_shortcut(part):
    assert verdict(shortcuts(part)).kind == "neither"


@pytest.mark.parametrize(
    ("loss_share", "margin", "kind", "text"),
    [
        (0.3, 0.3, "neither", "neither suppressed nor still learning: no shortcut"),
        (0.6, 0.3, "learning", "still learning: its scores hardly tell pairs apart"),
        (0.99, 0.3, "learning", "still learning: it guesses"),
        (0.6, 0.05, "learning", "still learning: it guesses"),  # the interval of the margin has 0 in it
    ],
)
def test_without_a_shortcut_the_loss_decides(loss_share, margin, kind, text):
    given = verdict(shortcuts(margin=margin), loss_share=loss_share)
    assert given.kind == kind
    assert given.text.startswith(text)


def test_what_guesses_is_not_suppressed_whatever_its_parts_show():
    assert verdict(shortcuts(a_part("upper edge", "edge", 0.01), margin=0.01)).kind == "learning"


def test_the_weakest_kind_is_named():
    assert "worst number (51 %)" in verdict(shortcuts(), swaps=swap_figures(color=0.9, number=0.51)).text


def test_what_is_marked_on_the_page_is_what_suppresses():
    assert is_marked(asdict(a_part("upper edge", "edge", 0.12)))
    assert is_marked(asdict(a_part("digits", "words", 0.12)))
    assert not is_marked(asdict(a_part("first 2 words", "words", 0.12)))
    assert not is_marked(asdict(a_part("lower edge", "edge", 0.9)))


def record(**changes):
    found = asdict(shortcuts(a_part("upper edge", "edge", 0.12)))
    return {
        "format": 1, "model": "runs/x", "verdict": verdict(shortcuts())._asdict(), "swaps": swap_figures(color=0.9),
        "shortcuts": found, **changes,
    }  # fmt: skip


def test_lines_for_the_terminal():
    lines = audit_lines(record())
    assert lines[0].startswith("runs/x is neither suppressed nor still learning")
    assert "  color    100  70.0 [60.0, 80.0]   50.0  90.0 [80.0, 90.0]" in lines
    assert any(line.split()[:2] == ["upper", "edge"] and "0.12 [0.07, 0.17]" in line for line in lines)
    guessing = record(shortcuts=asdict(shortcuts(margin=0.0)))
    assert not any("margin left" in line for line in audit_lines(guessing))


def test_reading_an_audit(tmp_path):
    assert read_audit(tmp_path) is None
    path = tmp_path / "audit.json"
    path.write_text(json.dumps(record()))
    assert read_audit(tmp_path)["model"] == "runs/x"
    for damaged in (record(format=2), {"format": 1}, record(verdict={"kind": "neither"}), []):
        path.write_text(json.dumps(damaged))
        with pytest.raises(UserError, match="is no audit that this version reads"):
            read_audit(tmp_path)
