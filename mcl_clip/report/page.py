"""Write report.html: all that a run can show, in one self-contained file.

It is made from the files of the run alone, also while the run continues. It has no script, no font and no external
address, and a content security policy forbids them; everything that comes from the data is escaped.
"""

import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from mcl_clip.core.errors import UserError
from mcl_clip.core.files import atomic_path
from mcl_clip.report import clusters, evaluation, summary, training
from mcl_clip.report.thumbnails import TRAINING, Thumbnails, task_images, training_images
from mcl_clip.report.view import RunView, Section

REPORT = "report.html"
SECTIONS: tuple[Callable[[RunView, Thumbnails], Section | None], ...] = (
    summary.section,
    summary.attributes_section,
    clusters.section,
    clusters.neighbours_section,
    evaluation.changes_section,
    evaluation.trade_section,
    evaluation.controls_section,
    evaluation.section,
    training.section,
    training.data_section,
)


def write_report(
    run_dir: Path, *, images: bool = True, max_mb: float = 10.0, option: str = "--max-mb", out: Path | None = None
) -> Path:
    """Write the report of a run, finished or not, and return its path.

    Args:
        run_dir: the run directory.
        images: whether to include small images of the data.
        max_mb: largest size of the file, in 10^6 bytes; images are made smaller, then fewer.
        option: what the user sets it with.
        out: the file; by default report.html in the run directory.

    Raises:
        UserError: if it is not a run directory, a file of it is damaged, or the text alone is larger than `max_mb`.
    """
    view = RunView(run_dir)
    loaders = {}
    if images:
        loaders = {TRAINING: training_images(view.reader)} if view.reader is not None else {}
        loaders |= {name: task_images(task) for name, task in view.tasks.items()}
    thumbnails = Thumbnails(loaders)
    # Sections request their images here; rendering without them gives the size that is left for images.
    sections = [section for make in SECTIONS if (section := make(view, thumbnails)) is not None]
    render = page_renderer(
        sections,
        thumbnails,
        name=view.name,
        subject="what each stage learned",
        command="mcl-clip report",
        has_images=images,
        missing=view.missing,
        unit=view.run.unit,
    )
    left = int(max_mb * 1e6) - len(render().encode(errors="backslashreplace"))
    if left < 0:
        raise UserError(
            f"{option} {max_mb:g} is too little: the report of {run_dir} has {max_mb - left / 1e6:.1f} MB of text and "
            f"plots alone"
        )
    thumbnails.encode(left)
    out = out or run_dir / REPORT
    with atomic_path(out) as path:
        path.write_text(render(), encoding="utf-8", errors="backslashreplace")
    return out


def page_renderer(
    sections: Sequence[Section],
    thumbnails: Thumbnails,
    *,
    name: str,
    subject: str,
    command: str,
    has_images: bool,
    missing: Sequence[str] = (),
    unit: str = "pairs",
) -> Callable[[], str]:
    """Return a function that renders a page with the images that are encoded by then; `command` writes it again."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("page.html.jinja")
    context = {
        "name": name,
        "subject": subject,
        "command": command,
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "version": version("mcl_clip"),
        "sections": sections,
        "thumbnails": thumbnails,
        "has_images": has_images,
        "missing": missing,
        "unit": unit,
    }
    return lambda: template.render(context)
