"""The report of a run: whole and unfinished, with hostile captions, within its size, and nothing from elsewhere."""

import itertools
import logging
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import webdataset as wds

from mcl_clip.core.errors import UserError
from mcl_clip.report.page import write_report
from tests.recipes.runs import draw, execute, with_stages

HOSTILE = (
    """<script>alert(1)</script> & "two" $x^2$ </svg><img src=x onerror='alert(2)'> {{ 7 * 7 }} javascript:alert(3)"""
)
VOID = {"meta", "img", "br", "hr", "link", "input", "col"}


class Page(HTMLParser):
    """The elements of a page, and whether they are nested as they should be."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] not in ("style",):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def page_of(run, **options) -> Page:
    path = write_report(run, **options)
    return Page(path.read_text())


def check(page: Page) -> None:
    """What holds for every report."""
    names = [name for name, _ in page.elements]
    assert not {"script", "iframe", "object", "embed", "link", "form", "base"} & set(names)
    for name, attributes in page.elements:
        assert not [key for key in attributes if key.startswith("on")]
        address = attributes.get("src") or attributes.get("href") or attributes.get("xlink:href") or "#"
        assert address.startswith(("#", "data:image/")), address
        if name == "img":
            assert attributes["alt"].strip()
        if name == "svg":
            assert attributes["role"] == "img"
            assert attributes["aria-label"]
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = {attributes["href"][1:] for name, attributes in page.elements if name == "a"}
    assert links <= set(ids)
    policies = [attributes for name, attributes in page.elements if attributes.get("http-equiv")]
    assert [policy["content"] for policy in policies] == [
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    ]
    headings = [int(name[1]) for name in names if re.fullmatch(r"h\d", name)]
    assert headings[0] == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(headings))


def test_a_finished_run_shows_all_that_it_has(finished, tmp_path):
    page = page_of(finished, out=tmp_path / "report.html")
    check(page)
    pictures = [attributes for name, attributes in page.elements if name == "img"]
    assert len(pictures) > 50
    assert any(re.fullmatch(r"a \w+ (square|circle) on the \w+", picture["alt"]) for picture in pictures)
    titles = [attributes["id"] for name, attributes in page.elements if name == "section"]
    assert {"summary", "training", "clusters", "neighbours", "changes", "attributes", "evaluation", "data"} == set(
        titles
    )
    assert "2 stages on 200 pairs" in page.text
    assert ", finished." in page.text


def test_it_is_written_by_the_run_itself_after_each_stage(recipe, monkeypatch):
    written = []
    monkeypatch.setattr(
        "mcl_clip.runs.pipeline.write_report",
        lambda run_dir, **options: written.append(
            (sorted(p.name for p in run_dir.glob("stage-*/eval/DONE.json")), options)
        ),
    )
    recipe = replace(recipe, machine=replace(recipe.machine, report=True, report_images=False, report_mb=3.0))
    run = execute(with_stages(recipe, {"steps": 2}, {"steps": 2}))
    assert [len(done) for done, _ in written] == [1, 2]
    assert written[0][1] == {"images": False, "max_mb": 3.0, "option": "--machine.report-mb"}
    written.clear()
    execute(replace(with_stages(recipe, {"steps": 2}, {"steps": 2}), run_dir=run))
    assert not written  # nothing was new


def test_a_report_that_fails_does_not_end_the_run(recipe, monkeypatch, caplog):
    def fail(*_, **__):
        raise ZeroDivisionError("no luck")

    monkeypatch.setattr("mcl_clip.runs.pipeline.write_report", fail)
    caplog.set_level(logging.WARNING, logger="mcl_clip")
    recipe = replace(recipe, machine=replace(recipe.machine, report=True))
    run = execute(with_stages(recipe, {"steps": 2}))
    assert (run / "combined/DONE.json").exists()
    assert "no luck" in caplog.text


def test_every_state_of_a_run_has_a_report(copy):
    stages = [f"stage-{s}/{phase}" for s in (1, 0) for phase in ("eval", "labels", "cluster", "embed", "train")]
    for folder in ("combined", *stages, "index"):
        shutil.rmtree(copy / folder)
        page = page_of(copy)
        check(page)
        assert "not finished" in page.text


def test_without_images_captions_stand_in_their_place(finished, tmp_path):
    page = page_of(finished, images=False, out=tmp_path / "report.html")
    check(page)
    assert "img" not in [name for name, _ in page.elements]
    assert re.search(r"a \w+ (square|circle) on the \w+", page.text)


def test_shards_that_are_gone_cost_pictures_and_captions_alone(copy, monkeypatch):
    monkeypatch.setattr("mcl_clip.data.index.ShardIndex.check_unchanged", _gone)
    page = page_of(copy)
    check(page)
    assert "cannot be shown" in page.text


def _gone(index):
    raise UserError("the shards are away")


@pytest.mark.parametrize("max_mb", [0.5, 1.0])
def test_the_size_is_kept(finished, tmp_path, max_mb):
    out = write_report(finished, max_mb=max_mb, out=tmp_path / "report.html")
    assert 0.1e6 < out.stat().st_size <= max_mb * 1e6


def test_a_size_below_that_of_the_text_is_refused(finished, tmp_path):
    with pytest.raises(UserError, match=r"--max-mb 0.01 is too little: the report of .* has 0\.\d MB of text"):
        write_report(finished, max_mb=0.01, out=tmp_path / "report.html")
    with pytest.raises(UserError, match=r"^--machine.report-mb 0.01 is too little"):
        write_report(finished, max_mb=0.01, option="--machine.report-mb", out=tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_what_is_no_run_has_no_report(tmp_path):
    with pytest.raises(UserError, match="is not a run directory"):
        write_report(tmp_path)


def test_captions_can_do_nothing(recipe, tmp_path):
    (tmp_path / "shards").mkdir()
    with wds.ShardWriter(str(tmp_path / "shards" / "%04d.tar"), maxcount=50, verbose=0) as writer:
        for number in range(100):
            image, caption, _ = draw(number)
            writer.write({"__key__": f"s{number:05d}", "png": image, "txt": f"{HOSTILE} {caption}"})
    recipe = replace(recipe, data=replace(recipe.data, train=(str(tmp_path / "shards"),)))
    page = page_of(execute(with_stages(recipe, {"steps": 2}, {"steps": 2})))
    check(page)
    shown = [attributes.get("alt", "") for _, attributes in page.elements]
    assert sum(HOSTILE in alt for alt in shown) > 20


def test_a_report_is_whole_or_not_there(finished, tmp_path, monkeypatch):
    out = tmp_path / "report.html"
    out.write_text("the one before")
    monkeypatch.setattr("mcl_clip.report.page.page_renderer", lambda *_, **__: lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_report(finished, out=out)
    assert out.read_text() == "the one before"
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
