"""report.html: everything that a run can show, in one file that needs nothing else.

It is made from the artefacts of the run alone, also while the run goes on. No script, no font, no address of another
host is in it, and a content security policy forbids them; what comes from the data is escaped.
"""

import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from mcl_clip.core.errors import UserError
from mcl_clip.core.files import atomic_path
from mcl_clip.report import attributes, clusters, controls, data, evaluation, neighbours
from mcl_clip.report import changes as mended
from mcl_clip.report import summary as glance
from mcl_clip.report import training as curves
from mcl_clip.report.section import Section
from mcl_clip.report.thumbnails import TRAINING, Thumbnails, pictures_of_pairs, pictures_of_set
from mcl_clip.report.view import RunView

REPORT = "report.html"
SECTIONS: tuple[Callable[[RunView, Thumbnails], Section | None], ...] = (
    glance.section,
    attributes.section,
    clusters.section,
    neighbours.section,
    mended.section,
    controls.section,
    evaluation.section,
    curves.section,
    data.section,
)


def write_report(run_dir: Path, *, images: bool = True, max_mb: float = 10.0, out: Path | None = None) -> Path:
    """Write the report of a run, finished or not, and return its path.

    Args:
        run_dir: the run directory.
        images: put small pictures of the data into it.
        max_mb: largest size of the file, in 10^6 bytes; pictures are made smaller, then fewer.
        out: the file; by default report.html in the run directory.

    Raises:
        UserError: if it is not a run directory, a file of it is damaged, or the text alone is larger than `max_mb`.
    """
    view = RunView(run_dir)
    album = Thumbnails(_sources(view) if images else {})
    sections = [section for make in SECTIONS if (section := make(view, album)) is not None]
    render = _renderer(view, album, sections, images=images)
    left = int(max_mb * 1e6) - len(render().encode(errors="backslashreplace"))
    if left < 0:
        raise UserError(
            f"--max-mb {max_mb:g} is too little: the report of {run_dir} has {max_mb - left / 1e6:.1f} MB of text and "
            f"plots alone"
        )
    album.develop(left)
    out = out or run_dir / REPORT
    with atomic_path(out) as path:
        path.write_text(render(), encoding="utf-8", errors="backslashreplace")
    return out


def _sources(view: RunView) -> dict[str, Any]:
    sources = {TRAINING: pictures_of_pairs(view.reader)} if view.reader is not None else {}
    sources |= {name: found for name, task in view.tasks.items() if (found := pictures_of_set(task)) is not None}
    return sources


def _renderer(view: RunView, album: Thumbnails, sections: list[Section], *, images: bool) -> Callable[[], str]:
    """Makes the page with the pictures that the album has by then."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("page.html.jinja")
    facts = {
        "name": view.name,
        "made": time.strftime("%Y-%m-%d %H:%M"),
        "version": version("mcl_clip"),
        "sections": sections,
        "album": album,
        "has_images": images,
        "missing": view.missing,
    }
    return lambda: template.render(facts)
