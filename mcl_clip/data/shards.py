"""Shard lists: expansion of what a user writes into the locations of tar files, and redaction of secrets."""

import glob
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from itertools import islice
from pathlib import Path
from urllib.parse import unquote, urlsplit

from braceexpand import braceexpand

from mcl_clip.core.errors import UserError

MAX_SHARDS = 1_000_000
REMOTE_PROTOCOLS = ("http", "https", "s3", "gs", "hf")
_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)(?=\.\.|\})")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_URL = re.compile(r"\b([A-Za-z][A-Za-z0-9+.-]*://)(\S*)")
_USER = re.compile(r"^(?:[^/]*|[^/:@]*:(?!\d+/).*)@")  # a password may contain a slash, a port may not
_SETTING = re.compile(
    r"(?i)\b((?:x-amz-\w[\w-]*|sig|signature|(?:[\w-]*[_-])?(?:token|secret|password)|[\w-]*(?:access|api|secret)[_-]?key)=)[^\s&'\"]+"
)
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")


@dataclass(frozen=True)
class Shard:
    """A tar file: `size` in bytes, `stamp` its modification time or ETag, rows `first_row` to `first_row + rows`.

    `skipped` counts the samples that are not rows, by reason, and `examples` has the first of each. `joined_lines`
    counts .txt members of several lines that are one caption.
    """

    url: str
    size: int
    stamp: str
    first_row: int
    rows: int
    skipped: dict[str, int]
    examples: dict[str, str] = field(default_factory=dict)
    joined_lines: int = 0


def expand_shards(spec: str | Path | Sequence[str | Path]) -> list[str]:
    """Expand `spec` to a list of shards, in order: absolute local paths, and remote URLs as they are.

    It is a location or a list of them. Each may contain braces (`{000000..000007}`, `{train,extra}`); a local one may
    be a glob, a folder (its `*.tar` files sorted by name) or a `file:` URL.

    Raises:
        UserError: for a protocol other than http, https, s3, gs and hf, `pipe:`, a chained URL (`::`), a local file
            that does not exist, a shard listed twice, or an empty result.
    """
    items = [spec] if isinstance(spec, str | Path) else spec
    shards = [shard for item in items for shard in _expand_item(os.fspath(item))]
    if not shards:
        raise UserError(f"the shard list {spec!r} is empty; give at least one tar file, folder, glob or URL")
    shard, count = Counter(shards).most_common(1)[0]
    if count > 1:
        raise UserError(f"shard {redacted(shard)} is in the shard list {count} times; list each shard once")
    return shards


def check_location(location: str) -> None:
    """Raise UserError for a protocol other than http, https, s3, gs and hf, for `pipe:`, and for a chained URL."""
    if "::" in location:
        raise UserError(
            f"{redacted(location)} is a chained URL ('::'), which is not supported; give the tar file itself"
        )
    match = _SCHEME.match(location)
    if match is None:
        return
    if match[1].lower() not in REMOTE_PROTOCOLS or not location.startswith(f"{match[1].lower()}://"):
        raise UserError(
            f"{redacted(location)} starts with {match[0]!r}, which is not a supported protocol; use a local path or "
            f"one of {', '.join(f'{name}://' for name in REMOTE_PROTOCOLS)} (./ in front of a local name with a colon)"
        )
    if not location.partition("://")[2].strip("/"):
        raise UserError(f"{redacted(location)} has no path; give the full URL of a tar file")


def is_remote(location: str) -> bool:
    """Return whether a location that passed `check_location` is a URL rather than a local path."""
    return _SCHEME.match(location) is not None


def redacted(text: str) -> str:
    """Remove secrets from a text that is to be printed or logged.

    User names, passwords, queries and fragments are removed from all URLs; elsewhere, tokens of the Hugging Face Hub
    and the values of settings named token, key, password, secret or signature are replaced by `***`.
    """
    text = _URL.sub(lambda match: match[1] + re.split(r"[?#]", _USER.sub("", match[2]))[0], text)
    return _TOKEN.sub("***", _SETTING.sub(r"\1***", text))


def _expand_item(item: str) -> Iterator[str]:
    if item[:5].lower() == "file:":
        item = _file_url_to_path(item)
    elif os.path.exists(item):  # a name that itself contains braces or brackets
        yield from _expand_local(item, item)
        return
    check_location(item)
    is_huge = any(abs(Decimal(last) - Decimal(first)) > MAX_SHARDS for first, last in _RANGE.findall(item))
    try:
        names = [] if is_huge else list(islice(braceexpand(item, escape=False), MAX_SHARDS + 1))
    except ValueError as error:  # unbalanced braces
        raise UserError(
            f"the braces of {redacted(item)} do not match ({error}); write them like {{000..007}}"
        ) from error
    if is_huge or len(names) > MAX_SHARDS:
        raise UserError(f"{redacted(item)} expands to more than {MAX_SHARDS} shards; correct its braces")
    for name in names:
        check_location(name)
        if not is_remote(name):
            yield from _expand_local(name, item)
        elif "*" in urlsplit(name).path:
            raise UserError(f"{redacted(name)}: '*' works on local paths only; use braces, like {{000..007}}")
        else:
            yield name


def _expand_local(name: str, item: str) -> Iterator[str]:
    path = os.path.abspath(os.path.expanduser(name))
    if os.path.isdir(path):
        paths = sorted(glob.glob(os.path.join(glob.escape(path), "*.tar")))
    elif os.path.exists(path):
        paths = [path]
    elif glob.has_magic(path):
        paths = sorted(glob.glob(path, recursive=True))
    else:
        raise UserError(f"the shard {path} does not exist (from {item!r}); correct the name or download the shard")
    if not paths:
        raise UserError(f"no shard matches {name!r}; correct the name (a folder is searched for *.tar)")
    yield from paths


def _file_url_to_path(url: str) -> str:
    rest = url[5:]
    if not rest.startswith("//"):
        return unquote(rest)
    host, slash, path = rest[2:].partition("/")
    if host not in ("", "localhost") or not path:
        raise UserError(f"{redacted(url)} is not the URL of a file on this machine; write file:///folder/name.tar")
    return unquote(slash + path)
