"""Write audit.html: the verdict, the swaps that fail, the parts that explain most, and the clusters of a model."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from mcl_clip.core.errors import UserError
from mcl_clip.eval.shortcuts import REGIONS
from mcl_clip.eval.swaps import Swap
from mcl_clip.eval.task import ImageSource
from mcl_clip.report.page import page_renderer
from mcl_clip.report.thumbnails import ImageLoader, Thumbnails, shortened
from mcl_clip.report.view import Section
from mcl_clip.results.audit import ALL_KINDS, is_guessing, is_marked, part_rows, swap_rows

MAX_MB = 10.0
PICTURES, COVERED = "pictures", "covered"  # sources of thumbnails
FAILING_PER_KIND = 6
SHOWN_PARTS = 8
SIDE_TITLES = {"image": "By their images", "text": "By their captions"}
INK = (214, 40, 40)
REGION_SIDE_PX = 224


def write_audit_page(
    out: Path,
    record: Mapping[str, Any],
    source: ImageSource,
    captions: Sequence[Sequence[str]],
    failing: Sequence[Swap],
    *,
    images: bool = True,
) -> None:
    """Write the page of an audit.

    Args:
        out: the file.
        record: the content of audit.json.
        source: the pictures of the audit.
        captions: their captions.
        failing: swaps that the model prefers to their captions, the clearest first.
        images: whether to include small images of the data.
    """
    loaders = {PICTURES: _pictures(source), COVERED: _covered(source)} if images else {}
    thumbnails = Thumbnails(loaders)
    sections = [
        _verdict(record),
        *([_swaps(record, failing, thumbnails)] if record["swaps"] else []),
        _shortcuts(record, thumbnails),
        *([_groups(record, captions, thumbnails)] if record["clusters"] else []),
    ]
    render = page_renderer(
        sections, thumbnails, name=str(record["model"]), subject="audit", command="mcl-clip audit", has_images=images
    )
    thumbnails.encode(int(MAX_MB * 1e6) - len(render().encode(errors="backslashreplace")))
    out.write_text(render(), encoding="utf-8", errors="backslashreplace")


def _pictures(source: ImageSource) -> ImageLoader:
    def load(numbers: Sequence[int]) -> Iterator[Image.Image | None]:
        for number in numbers:
            try:
                yield from source.images(np.array([number]))
            except UserError:
                yield None

    return load


def _covered(source: ImageSource) -> ImageLoader:
    """Return a loader of the first picture with region `number` drawn into it."""

    def load(numbers: Sequence[int]) -> Iterator[Image.Image | None]:
        for number in numbers:
            (picture,) = source.images(np.array([0]))
            # A square, as most image transforms see it; the audit covers what is left after the transform.
            side = min(picture.size)
            left, top = (picture.width - side) // 2, (picture.height - side) // 2
            square = picture.crop((left, top, left + side, top + side)).resize((REGION_SIDE_PX, REGION_SIDE_PX))
            rows, columns = REGIONS[number].pixels(REGION_SIDE_PX, REGION_SIDE_PX)
            overlay = Image.new("RGB", square.size, INK)
            mask = Image.new("L", square.size, 0)
            box = (columns.start, rows.start, columns.stop - 1, rows.stop - 1)
            ImageDraw.Draw(mask).rectangle(box, fill=150, outline=255, width=3)
            yield Image.composite(overlay, square.convert("RGB"), mask)

    return load


def _verdict(record: Mapping[str, Any]) -> Section:
    content = {name: record[name] for name in ("verdict", "data", "pictures", "captions", "edited_pairs", "seconds")}
    return Section(name="verdict", title="Verdict", content=content)


def _swaps(record: Mapping[str, Any], failing: Sequence[Swap], thumbnails: Thumbnails) -> Section:
    kinds = []
    for kind in (kind for kind in record["swaps"] if kind != ALL_KINDS):
        shown: dict[int, Swap] = {}  # one of each picture
        for swap in (swap for swap in failing if swap.kind == kind):
            if len(shown) < FAILING_PER_KIND:
                shown.setdefault(swap.picture, swap)
        cases = [
            {
                "image": thumbnails.request(PICTURES, swap.picture, swap.caption),
                "caption": shortened(swap.caption),
                "wrong": shortened(swap.wrong),
            }
            for swap in shown.values()
        ]
        if cases:
            kinds.append({"name": kind, "cases": cases})
    return Section(
        name="swaps", title="Which words it sees", content={"table": swap_rows(record["swaps"]), "kinds": kinds}
    )


def _shortcuts(record: Mapping[str, Any], thumbnails: Thumbnails) -> Section:
    """Return bars of the parts that explain most: how much of the margin goes without a part, and without others."""
    found = record["shortcuts"]
    numbers = {region.name: number for number, region in enumerate(REGIONS)}
    compared = [part for part in (*found["regions"], *found["words"]) if part["ratio"]]
    bars = []
    for part in sorted(compared, key=lambda one: one["ratio"][0])[:SHOWN_PARTS]:
        lost, otherwise = (max(0.0, min(1.0, 1 - part[name])) for name in ("left", "left_otherwise"))
        is_region = part["name"] in numbers
        thumbnail = thumbnails.request(COVERED, numbers[part["name"]], part["name"]) if is_region else None
        words = part["words"][0] if part["words"] and is_marked(part) else None
        bars.append(
            {
                "name": part["name"],
                "image": thumbnail,
                "lost": 100 * lost,
                "otherwise": 100 * otherwise,
                "what": f"other {part['kind']}s" if is_region else "as many random words",
                "is_marked": is_marked(part),
                "words": words,
            }
        )
    content = {
        "is_guessing": is_guessing(found),
        "bars": bars,
        "table": part_rows(found),
        "reads": 100 * found["reads"],
        "reads_interval": [100 * end for end in found["reads_interval"]],
        "edited_pairs": record["edited_pairs"],
    }
    return Section(name="shortcuts", title="How it tells pairs apart", content=content)


def _groups(record: Mapping[str, Any], captions: Sequence[Sequence[str]], thumbnails: Thumbnails) -> Section:
    sides = []
    for side, found in record["clusters"].items():
        clusters = [
            {
                "size": cluster["size"],
                "words": cluster["words"],
                "images": [thumbnails.request(PICTURES, row, captions[row][0]) for row in cluster["pictures"]],
            }
            for cluster in found["clusters"]
        ]
        sides.append({"title": SIDE_TITLES[side], "clusters": clusters, "nmi": sorted(found["nmi"].items())})
    return Section(name="groups", title="What its clusters follow", content={"sides": sides})
