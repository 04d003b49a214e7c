"""Atomic files, JSON and digests. Only the standard library."""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mcl_clip.core.errors import UserError

DONE = "DONE.json"
STARTED = "STARTED.json"


def canonical_json(value: Any) -> str:
    """`value` as JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def fingerprint(value: Any) -> str:
    """16 bytes of BLAKE2b of the canonical JSON of `value`, in hexadecimal."""
    return hashlib.blake2b(canonical_json(value).encode(), digest_size=16).hexdigest()


def file_digest(path: Path) -> str:
    """16 bytes of BLAKE2b of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its name when the block ends without an error.

    Readers see the old file or the whole new one. The file gets the permissions that the umask asks for.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        yield temporary
        _sync(temporary)
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_dir(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes `path` when the block ends without an error, replacing what was there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        mode = 0o666 & ~_umask()
        for file in temporary.rglob("*"):
            if file.is_file():
                file.chmod(mode)
                _sync(file)
        if path.exists():
            shutil.rmtree(path)
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic_path(path) as temporary:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # half a character, as JSON spells it


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        UserError: if the file is not JSON.
    """
    try:
        return _parse(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # also bytes that are not UTF-8, and numbers without end
        raise UserError(f"{path} is not valid JSON ({error}); restore it or delete it to make it anew") from error


def _parse(text: str) -> Any:
    """The JSON in `text`; what Python reads beyond it, NaN and infinities, could not be written again."""
    return json.loads(text, parse_float=_finite, parse_constant=_finite)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not a number of JSON")
    return number


def append_jsonl(path: Path, record: Mapping[str, Any]) -> None:
    """Add one line to a JSON-lines file."""
    with path.open("a", encoding="utf-8", errors="backslashreplace") as file:  # half a character, as JSON spells it
        file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines file; none if there is no file. A last line without its end is left out.

    Raises:
        UserError: if a line is not a JSON object.
    """
    if not path.exists():
        return []
    records: list[dict[str, Any]] = []
    try:
        text = path.read_text(encoding="utf-8")
        for line in text.split("\n")[:-1]:  # splitlines() would also cut at U+2028 in a string
            record = _parse(line)
            if not isinstance(record, dict):
                raise ValueError(f"an object is needed, not {type(record).__name__}")
            records.append(record)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"line {len(records) + 1} of {path} is not a JSON object ({error}); restore the file or delete it to make "
            f"it anew"
        ) from error
    return records


def read_run_config(run_dir: Path) -> dict[str, Any]:
    """The resolved recipe of a run, as its config.json holds it.

    Raises:
        UserError: if the folder is not a run directory, or the file is not a recipe.
    """
    path = run_dir / "config.json"
    if not path.exists():
        raise UserError(f"{run_dir} is not a run directory: it has no config.json")
    config = read_json(path)
    try:
        steps = [stage.get("train", {}).get("steps", 0) for stage in config["stages"]]
        is_whole = bool(steps) and all(type(number) is int for number in (config.get("seed", 0), *steps))
        is_whole &= isinstance(config.get("tower", {}).get("architecture", ""), str)
    except (LookupError, TypeError, AttributeError):
        is_whole = False
    if not is_whole:
        raise UserError(f"{path} is not the configuration of a run; run the recipe again to write it anew")
    found: dict[str, Any] = config
    return found
