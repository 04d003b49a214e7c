"""Figures that take their colors from the page."""

import re

from mcl_clip.report.figures import SERIES, new_figure, svg


def figure_with(title: str, alt: str = "a line") -> str:
    with new_figure() as (figure, axes):
        axes.plot([0, 1], [0, 1], color=SERIES[1], label=title)
        axes.set_title(title)
        axes.legend()
        return str(svg(figure, alt))


def test_colours_are_variables_and_words_stay_words():
    text = figure_with("loss")
    assert "var(--series-1)" in text
    assert "var(--text)" in text
    assert not re.search(r"#0[0-9]0[b2]0[c3]\b", text)
    assert ">loss</text>" in text


def test_what_looks_like_mathematics_or_markup_is_shown_as_it_is():
    text = figure_with("$x^2$ <script>alert(1)</script>")
    assert "$x^2$" in text
    assert "<script" not in text
    assert "<!--" not in text
    assert "&lt;script&gt;" in text


def test_it_has_a_text_alternative_that_cannot_break_out():
    text = figure_with("loss", alt='"><img src=x onerror=alert(1)>')
    assert text.startswith("<svg")
    assert 'role="img"' in text
    assert "<img" not in text


def test_two_plots_share_no_ids():
    ids = [set(re.findall(r' id="([^"]+)"', figure_with("loss", alt))) for alt in ("one", "two")]
    assert not ids[0] & ids[1]
    assert all(re.search(rf"#{name}\b", figure_with("loss", "one")) for name in ids[0])


def test_nothing_is_loaded_from_elsewhere():
    text = figure_with("loss")
    assert not re.search(r"""(href|src|url)\s*[=(]\s*["']?(?![#"'])""", text)
    assert "http" not in text
    assert "<style" not in text  # it would hold for the whole page
