import os
from pathlib import Path

import pytest

from mcl_clip.core.errors import UserError
from mcl_clip.core.files import append_jsonl, atomic_dir, atomic_path, read_json, read_jsonl, write_json


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    with atomic_path(path) as temporary:
        temporary.write_text("old")
        assert not path.exists()
    with pytest.raises(ZeroDivisionError):  # noqa: PT012
        with atomic_path(path) as temporary:
            temporary.write_text("ne")
            raise ZeroDivisionError
    assert path.read_text() == "old"
    assert names(path.parent) == ["file.txt"]
    mask = os.umask(0o027)
    try:
        with atomic_path(path) as temporary:
            temporary.write_text("new")
            temporary.chmod(0o600)  # as safetensors does
    finally:
        os.umask(mask)
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o640


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "folder"
    with atomic_dir(path) as temporary:
        (temporary / "one").write_text("1")
    with pytest.raises(ZeroDivisionError):  # noqa: PT012
        with atomic_dir(path) as temporary:
            (temporary / "two").write_text("2")
            raise ZeroDivisionError
    assert names(tmp_path) == ["folder"]
    assert names(path) == ["one"]
    (tmp_path / ".folder.tmp").mkdir()
    (tmp_path / ".folder.tmp" / "half").write_text("")  # of a process that was killed
    with atomic_dir(path) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "three").write_text("3")
    assert (names(tmp_path), names(path)) == (["folder"], ["sub"])


def test_json_keeps_values_and_names_broken_files(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"é": [1, 2.5, None]})
    assert read_json(path) == {"é": [1, 2.5, None]}
    path.write_text('{"cut')
    with pytest.raises(UserError, match=r"a.json is not valid JSON .*; restore it or delete it"):
        read_json(path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, float("nan"))
    assert names(tmp_path) == ["a.json"]


def test_lines_of_records_with_any_text(tmp_path):
    path = tmp_path / "a.jsonl"
    assert read_jsonl(path) == []
    records = [{"text": text} for text in ("plain", "line\u2028separator", "next\x85line", "new\nline")]
    for record in records:
        append_jsonl(path, record)
    with path.open("a") as file:
        file.write('{"text": "cut')
    assert read_jsonl(path) == records


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_none_of_json_are_refused(number, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"loss": 1.5}}\n{{"loss": {number}}}\n')
    with pytest.raises(UserError, match=rf"line 2 of .*metrics.jsonl is not a JSON object \({number} is not a number"):
        read_jsonl(path)
    path.write_text(f"[{number}]")
    with pytest.raises(UserError, match="is not valid JSON"):
        read_json(path)


def test_processes_of_the_same_number_on_two_hosts_write_to_files_of_their_own(tmp_path, monkeypatch):
    with atomic_path(tmp_path / "a.json") as first:
        monkeypatch.setattr("socket.gethostname", lambda: "another")
        with atomic_path(tmp_path / "a.json") as second:
            assert first != second
            second.write_text("second")
        first.write_text("first")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.json", "first")]
