"""Atomic writes, JSON files and digests. Only the standard library."""

import hashlib
import json
import math
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mcl_clip.core.errors import UserError, shorten

DONE = "DONE.json"
STARTED = "STARTED.json"


def canonical_json(value: Any) -> str:
    """Serialize `value` as JSON with sorted keys and no spaces, so that equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def fingerprint(value: Any) -> str:
    """Return the 16-byte BLAKE2b digest of the canonical JSON of `value`, in hexadecimal."""
    return hashlib.blake2b(canonical_json(value).encode(), digest_size=16).hexdigest()


def file_digest(path: Path) -> str:
    """Return the 16-byte BLAKE2b digest of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` and rename it to `path` if the block raises no error.

    Readers see the old file or the complete new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Containers and nodes that share a file system may have processes of the same number.
    temporary = path.with_name(f".{path.name}.tmp-{socket.gethostname()}-{os.getpid()}")
    try:
        yield temporary
        _finish_file(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_dir(path: Path) -> Iterator[Path]:
    """Yield a temporary folder and rename it to `path` if the block raises no error, replacing an older `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _finish_file(file)
        if path.exists():
            shutil.rmtree(path)
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _finish_file(path: Path) -> None:
    """Set the default permissions and flush the file to disk, so that a rename never reveals incomplete content."""
    mask = os.umask(0)  # the only way to read it is to set it
    os.umask(mask)
    path.chmod(0o666 & ~mask)  # some libraries create files for the owner alone
    with path.open("rb") as file:
        os.fsync(file.fileno())


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic_path(path) as temporary:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # lone surrogates become JSON escapes


def read_json(path: Path) -> Any:
    """Read a JSON file; raise UserError if the file is not JSON."""
    try:
        return _parse(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # ValueError: also bad UTF-8 and overlong integers
        raise UserError(
            f"{path} is not valid JSON ({shorten(error)}); restore it or delete it to recreate it"
        ) from error


def _parse(text: str) -> Any:
    """Parse JSON and reject NaN and infinities, which Python reads but `write_json` could not write back."""

    def finite(literal: str) -> float:
        number = float(literal)
        if not math.isfinite(number):
            raise ValueError(f"{literal} is not a number of JSON")
        return number

    return json.loads(text, parse_float=finite, parse_constant=finite)


def append_jsonl(path: Path, record: Mapping[str, Any]) -> None:
    """Append one record to a JSON Lines file."""
    with path.open("a", encoding="utf-8", errors="backslashreplace") as file:  # as in `write_json`
        file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read the records of a JSON Lines file, if there is one; raise UserError if a line is not a JSON object.

    A last line without a newline was being written when its process ended, and is ignored.
    """
    if not path.exists():
        return []
    records: list[dict[str, Any]] = []
    try:
        for line in path.read_text(encoding="utf-8").split("\n")[:-1]:  # splitlines() also cuts at U+2028 in a string
            record = _parse(line)
            if not isinstance(record, dict):
                raise ValueError(f"expected an object, not {type(record).__name__}")
            records.append(record)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"line {len(records) + 1} of {path} is not a JSON object ({shorten(error)}); restore the file or delete it "
            f"to recreate it"
        ) from error
    return records


def read_run_config(run_dir: Path) -> dict[str, Any]:
    """Read the resolved recipe of a run; raise UserError if the folder is not a run directory with a valid one."""
    path = run_dir / "config.json"
    if not path.exists():
        raise UserError(f"{run_dir} is not a run directory: it has no config.json")
    config: dict[str, Any] = read_json(path)
    try:
        steps = [stage.get("train", {}).get("steps", 0) for stage in config["stages"]]
        is_valid = bool(steps) and all(type(number) is int for number in (config.get("seed", 0), *steps))
        is_valid &= isinstance(config.get("tower", {}).get("architecture", ""), str)
    except (LookupError, TypeError, AttributeError):
        is_valid = False
    if not is_valid:
        raise UserError(f"{path} is not the configuration of a run; run the recipe again to rewrite it")
    return config
