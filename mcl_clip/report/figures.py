"""Plot figures as SVG that takes its colors from the page, so that they follow its light and dark mode."""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

PX = 96
# Placeholder colors, which `svg` replaces by variables of the page's style sheet.
TEXT, LINE = "#010203", "#020304"
SERIES = tuple(f"#0{n}0b0c" for n in range(8))
_VARIABLES = {TEXT: "var(--text)", LINE: "var(--line)", **{c: f"var(--series-{n})" for n, c in enumerate(SERIES)}}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": LINE,
    "axes.labelcolor": TEXT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titlecolor": TEXT,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "text.color": TEXT,
    "text.parse_math": False,  # a caption with two dollar signs is not a formula
    "xtick.color": TEXT,
    "ytick.color": TEXT,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "figure.constrained_layout.use": True,
}


@contextmanager
def new_figure(width_px: int = 420, height_px: int = 250) -> Iterator[tuple[Figure, Axes]]:
    """Open a figure with one pair of axes, in the style of the report."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width_px / PX, height_px / PX), dpi=PX)
        yield figure, figure.subplots()


def svg(figure: Figure, alt: str) -> Markup:
    """Return a figure as an inline SVG element, described by `alt`."""
    file = io.StringIO()
    with mpl.rc_context({**_STYLE, "svg.hashsalt": alt}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # the browser has the glyphs that matplotlib's font lacks
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = re.sub(r"<(metadata|style).*?</\1>|<!--.*?-->", "", text[text.index("<svg") :], flags=re.DOTALL)
    head, body = text.split(">", 1)
    head = re.sub(r' (width|height|version|xmlns(:xlink)?)="[^"]*"', "", head)
    body = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1; font-family: inherit", body)
    # Ids that nothing refers to, such as `axes_1`, are the same in each figure, and ids of a page must be unique.
    used = set(re.findall(r'#([\w-]+)["\')]', body))
    body = re.sub(r' id="([^"]+)"', lambda match: match[0] if match[1] in used else "", body)
    for color, variable in _VARIABLES.items():
        body = body.replace(color, variable)
    label = Markup(' role="img" aria-label="{}">').format(alt)
    return Markup(head) + label + Markup(body)
