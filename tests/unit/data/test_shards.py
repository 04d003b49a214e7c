import os
from pathlib import Path

import pytest

from mcl_clip.core.errors import UserError
from mcl_clip.data.shards import check_location, expand_shards, is_remote, redacted


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(3):
        (tmp_path / f"{number:03d}.tar").touch()
    (tmp_path / "notes.txt").touch()
    return tmp_path


def names(shards: list[str]) -> list[str]:
    return [os.path.basename(shard) for shard in shards]


def test_every_spelling_gives_the_same_absolute_paths(folder, monkeypatch):
    monkeypatch.chdir(folder)
    expected = [str(folder / f"{number:03d}.tar") for number in range(3)]
    for spec in (
        f"{folder}/{{000..002}}.tar",
        "{000..002}.tar",
        str(folder),
        folder,
        f"{folder}/*.tar",
        f"{folder}/00[0-2].tar",
        expected,
        [folder / "000.tar", f"file://{folder}/001.tar", "file:002.tar"],
    ):
        assert expand_shards(spec) == expected


def test_the_order_of_braces_and_lists_is_kept_and_folders_are_sorted(folder):
    assert names(expand_shards(f"{folder}/{{002,000}}.tar")) == ["002.tar", "000.tar"]
    assert names(expand_shards([f"{folder}/002.tar", f"{folder}/{{000..001}}.tar"])) == [
        "002.tar",
        "000.tar",
        "001.tar",
    ]


def test_remote_urls_are_expanded_and_kept(tmp_path):
    spec = "https://host/a/{00..02}.tar?signature=a%2Fb"
    assert expand_shards(spec) == [f"https://host/a/{number:02d}.tar?signature=a%2Fb" for number in range(3)]
    urls = ["s3://bucket/x.tar", "gs://bucket/x.tar", "hf://datasets/o/n/x.tar", "http://host/x.tar"]
    assert expand_shards(urls) == urls
    assert all(map(is_remote, urls))
    assert not is_remote("/a/b.tar")


def test_a_name_with_braces_and_brackets_of_its_own_is_taken_as_it_is(tmp_path):
    odd = tmp_path / "odd{1,2}[x].tar"
    odd.touch()
    assert expand_shards(str(odd)) == [str(odd)]
    escaped = tmp_path / "a b%41.tar"
    escaped.touch()
    assert expand_shards(f"file://{tmp_path}/a%20b%2541.tar") == [str(escaped)]


@pytest.mark.parametrize(
    "location",
    [
        "pipe:cat x",
        "PIPE:cat x",
        "ftp://host/x.tar",
        "data:xx",
        "s3:bucket/x.tar",
        "memory://x",
        "abfs://x/y",
        "c:x.tar",
    ],
)
def test_other_protocols_are_refused(location):
    with pytest.raises(UserError, match="is not a supported protocol"):
        expand_shards(location)


@pytest.mark.parametrize(
    "location", ["zip://a.tar::http://host/x.zip", "reference::http://h/x", "simplecache::s3://b/x"]
)
def test_chained_urls_are_refused(location):
    with pytest.raises(UserError, match="chained URL"):
        expand_shards(location)


@pytest.mark.parametrize("text", ["{0..999999999}.tar", "{0..99999999999999999999}.tar", "{0..99999}{0..99999}.tar"])
def test_braces_without_end_are_refused(text):
    with pytest.raises(UserError, match="expands to more than 1000000 shards; correct its braces"):
        expand_shards(text)


def test_reference_files_are_refused():
    with pytest.raises(UserError, match="is not a supported protocol"):
        expand_shards("reference://x")


def test_braces_cannot_smuggle_a_protocol():
    with pytest.raises(UserError, match="is not a supported protocol"):
        expand_shards("{pipe:cat x,y}")


def test_what_is_missing_is_named(folder):
    with pytest.raises(UserError, match=r"003\.tar does not exist"):
        expand_shards(f"{folder}/{{000..003}}.tar")
    with pytest.raises(UserError, match="no shard matches"):
        expand_shards(f"{folder}/*.tgz")
    empty = folder / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="no shard matches"):
        expand_shards(str(empty))
    with pytest.raises(UserError, match="is empty"):
        expand_shards([])
    with pytest.raises(UserError, match="has no path"):
        check_location("s3://")


def test_mistakes_in_the_list(folder):
    with pytest.raises(UserError, match="in the shard list 2 times"):
        expand_shards([str(folder), f"{folder}/001.tar"])
    with pytest.raises(UserError, match="braces"):
        expand_shards(f"{folder}/{{000..002.tar")
    with pytest.raises(UserError, match="local paths only"):
        expand_shards("https://host/*.tar")
    with pytest.raises(UserError, match="not the URL of a file on this machine"):
        expand_shards("file://elsewhere/x.tar")


@pytest.mark.parametrize(
    "location",
    [
        "https://user:SECRET@host/x.tar",
        "https://host/x.tar?key=SECRET",
        "s3://b/x.tar#SECRET",
        "ftp://SECRET@h/x?SECRET",
        "https://user:SECRET/SECRET@host/x.tar",
        "https://user:it'sSECRET@host/x.tar",
        "https://host/x.tar?X-Amz-Signature=a'SECRET&X-Amz-Date=1",
        "https://host:8080/x.tar?sig=SECRET",
    ],
)
def test_secrets_are_taken_out_of_messages(location):
    assert "SECRET" not in redacted(location)
    assert "x" in redacted(location)
    shown = redacted(f"ClientError(url='{location}') at {location}, see /a/b?c")
    assert "SECRET" not in shown
    assert shown.endswith("see /a/b?c")
    with pytest.raises(UserError) as caught:
        expand_shards([location, location])
    assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("--token=SECRET --seed=1", "--token=*** --seed=1"),
        ("?sig=SECRET&x=1", "?sig=***&x=1"),
        ("AWS_SECRET_ACCESS_KEY=SECRET", "AWS_SECRET_ACCESS_KEY=***"),
        ("X-Amz-Signature=SECRET", "X-Amz-Signature=***"),
        ("hf_SECRETSECRETSECRETSECRET", "***"),
        ("--data.caption-key=alt", "--data.caption-key=alt"),
        ("https://host:8080/a@b/x.tar", "https://host:8080/a@b/x.tar"),
        ("shards/{000..007}.tar", "shards/{000..007}.tar"),
    ],
)
def test_secrets_outside_of_urls_and_what_is_none(text, shown):
    assert redacted(text) == shown
