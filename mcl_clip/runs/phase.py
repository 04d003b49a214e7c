"""Phases, their fingerprints, and the lock of a run directory."""

import hashlib
import json
import logging
import math
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from mcl_clip.core.files import DONE, STARTED, canonical_json, fingerprint, read_json, write_json
from mcl_clip.core.errors import UserError

logger = logging.getLogger(__name__)

PASSING = {"checkpoints", "texts"}  # folders of what a finished phase can do without
SECONDS_TO_WRITE_LOCK = 10.0
HEARTBEAT_S = 30.0
SILENT_S = 600.0  # without a heartbeat, a job on another host counts as dead


class StaleArtifactError(UserError):
    """A finished phase was made from other settings or inputs than the ones asked for now."""



@dataclass(frozen=True, kw_only=True)
class Phase:
    """One part of a run: reads finished phases, writes only its own folder.

    `settings` is everything that determines the result and is not a file of an earlier phase (no paths).
    `run` continues from whatever it finds in its folder. A phase that `grows` is made again, without a question, when
    all that it was made from is still there and something was added: another stage, another evaluation set. Hence an
    input that grows counts by its settings and its own inputs. A phase that `keeps_nothing` begins anew each time, so
    that it may have begun with other settings.
    """

    name: str
    folder: Path
    settings: Mapping[str, Any]
    run: Callable[[], None]
    inputs: tuple["Phase", ...] = ()
    grows: bool = False
    keeps_nothing: bool = False

    @cached_property
    def fingerprint(self) -> str:
        """Settings and, through the fingerprints of the inputs, everything that led to them."""
        return fingerprint(self._made_from)

    @cached_property
    def _made_from(self) -> dict[str, Any]:
        inputs: dict[str, Any] = {}
        for phase in self.inputs:
            if phase.grows:
                inputs |= {**phase._made_from["inputs"], phase.name: phase._made_from["settings"]}
            else:
                inputs[phase.name] = phase.fingerprint
        return {"settings": json.loads(canonical_json(self.settings)), "inputs": inputs}

    def state(self) -> str:
        """`done`, `stale`, `partial` or `missing`."""
        if not (self.folder / DONE).exists():
            has_leftovers = self.folder.exists() and any(self.folder.iterdir())
            return "partial" if has_leftovers else "missing"
        if self._has_grown():
            return "partial"
        return "stale" if self.difference() else "done"

    def difference(self, marker: str = DONE) -> str:
        """What differs between the finished, or begun, phase and the one asked for; empty if nothing."""
        record = self._record(marker)
        if record["fingerprint"] == self.fingerprint:
            changed = [name for name, size in record.get("outputs", {}).items() if self._size(name) != size]
            return f"its output {changed[0]} is missing or has another size" if changed else ""
        before, now = record["made_from"], self._made_from
        fields = _differences(before["settings"], now["settings"], "")
        names = sorted({*before["inputs"], *now["inputs"]})
        inputs = [name for name in names if before["inputs"].get(name) != now["inputs"].get(name)]
        if fields:
            return "; ".join(fields)
        return f"its input {inputs[0]} was made anew" if inputs else "its settings changed"

    def check(self) -> bool:
        """Whether the phase is done.

        Raises:
            StaleArtifactError: if it was done with other settings or inputs; names what changed.
        """
        if not (self.folder / DONE).exists() or self._has_grown():
            return False
        self._refuse_if_different(DONE)
        return True

    def begin(self) -> None:
        """Note what the phase is made from, before anything is written.

        Raises:
            StaleArtifactError: if it was begun with other settings or inputs, so that its leftovers cannot be used.
        """
        if (self.folder / STARTED).exists() and not self.keeps_nothing and not self._has_grown(STARTED):
            self._refuse_if_different(STARTED)
        write_json(self.folder / STARTED, {"fingerprint": self.fingerprint, "made_from": self._made_from})

    def _refuse_if_different(self, marker: str) -> None:
        if difference := self.difference(marker):
            raise StaleArtifactError(
                f"{self.folder} is {'finished' if marker == DONE else 'begun'} but does not match this recipe: "
                f"{difference}. Use the earlier setting, another --run-dir, or delete {self.folder} to make it anew"
            )

    def mark_done(self) -> None:
        """Write the marker that makes the phase count as finished. No other process may still write to its folder."""
        for leftover in self.folder.rglob(".*.tmp-*"):  # of processes that were killed while they wrote
            leftover.unlink()
        files = sorted(path for path in self.folder.rglob("*") if path.is_file() and path.name not in (DONE, STARTED))
        outputs = {
            str(path.relative_to(self.folder)): path.stat().st_size
            for path in files
            if not PASSING.intersection(path.relative_to(self.folder).parts)
        }
        record = {"fingerprint": self.fingerprint, "made_from": self._made_from, "outputs": outputs}
        write_json(self.folder / DONE, {**record, "finished_at": time.strftime("%Y-%m-%dT%H:%M:%S%z")})

    def _has_grown(self, marker: str = DONE) -> bool:
        return self.grows and _contains(self._made_from, self._record(marker)["made_from"])

    def _record(self, marker: str) -> dict[str, Any]:
        """What a marker file says."""
        record = read_json(self.folder / marker)
        try:
            parts = (record["made_from"], *(record["made_from"][name] for name in ("settings", "inputs")))
            is_whole = all(isinstance(part, dict) for part in (*parts, record.get("outputs", {})))
            is_whole &= isinstance(record["fingerprint"], str)
        except (LookupError, TypeError):
            is_whole = False
        if not is_whole:
            raise UserError(
                f"{self.folder / marker} does not say what this phase was made from; restore it, or delete "
                f"{self.folder} to make the phase anew"
            )
        found: dict[str, Any] = record
        return found

    def _size(self, name: str) -> int:
        path = self.folder / name
        return path.stat().st_size if path.is_file() else -1



def _contains(now: Any, before: Any) -> bool:
    """Whether `now` is `before` with, at most, further keys in its objects."""
    if isinstance(before, dict) and isinstance(now, dict):
        kept = (key in now and (now[key] == value or _contains(now[key], value)) for key, value in before.items())
        return now != before and all(kept)
    return False



def _differences(before: Any, now: Any, path: str) -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted(set(before) | set(now))
        return [
            text
            for key in keys
            for text in _differences(before.get(key), now.get(key), f"{path}.{key}" if path else key)
        ]
    return [] if before == now else [f"{path} was {before!r} and is now {now!r}"]



@contextmanager
def lock(run_dir: Path) -> Iterator[None]:
    """Hold the run directory for this job.

    The lock of a dead process on this host is taken over. What a process on another host does cannot be seen: its lock
    is touched every half minute, and taken over when that has not happened for ten.

    Raises:
        UserError: if a living job holds it.
    """
    path = run_dir / "lock"
    mine = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "process": _start_time(os.getpid())})
    _take(path, mine)
    released = threading.Event()
    threading.Thread(target=_touch, args=(path, mine, released), daemon=True).start()
    try:
        yield
    finally:
        released.set()
        if _holds(path, mine):
            path.unlink(missing_ok=True)



def _touch(path: Path, mine: str, released: threading.Event) -> None:
    while not released.wait(HEARTBEAT_S):
        if _holds(path, mine):
            with suppress(OSError):  # a file system that is away for a moment
                os.utime(path)



def _holds(path: Path, mine: str) -> bool:
    """Whether the lock is still ours: a job that slept for long may have lost it."""
    try:
        return path.read_text(errors="replace") == mine
    except OSError:
        return False



def _take(path: Path, mine: str) -> None:
    for _ in range(3):
        try:
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            _remove_if_dead(path)
            continue
        with os.fdopen(handle, "w") as file:
            file.write(mine)
        return
    raise UserError(f"{path} is taken again and again by other jobs; give each job its own --run-dir")



def _remove_if_dead(path: Path) -> None:
    try:
        age_s = time.time() - path.stat().st_mtime
        text = path.read_text(errors="replace")
    except FileNotFoundError:
        return
    owner = _owner(text)
    if owner is None and age_s < SECONDS_TO_WRITE_LOCK:  # else its owner died between making the file and writing to it
        raise UserError(f"{path.parent} is being taken by another job; give this one another --run-dir")
    if owner is None or (owner["host"] == socket.gethostname() and _start_time(owner["pid"]) != owner["process"]):
        path.unlink(missing_ok=True)
        return
    if owner["host"] != socket.gethostname() and age_s > SILENT_S:
        logger.warning(
            "%s was held by process %d on %s, which has given no sign of life for %d minutes; it is taken over",
            *(path.parent, owner["pid"], owner["host"], age_s // 60),
        )
        path.unlink(missing_ok=True)
        return
    raise UserError(
        f"{path.parent} is in use by process {owner['pid']} on {owner['host']}; wait for it, or give this job another "
        f"--run-dir (if that process is surely dead, delete {path})"
    )



def _owner(text: str) -> dict[str, Any] | None:
    """The process that a lock names, if it is written completely."""
    try:
        owner = json.loads(text)
    except (ValueError, RecursionError):
        return None
    kinds = {"host": str, "pid": int, "process": str}
    is_whole = isinstance(owner, dict) and all(type(owner.get(name)) is kind for name, kind in kinds.items())
    return owner if is_whole else None



def _start_time(pid: int) -> str:
    """What tells a process from a later one with the same number; empty if there is no such process."""
    if Path("/proc/self/stat").exists():
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        except (FileNotFoundError, ProcessLookupError):
            return ""
        is_zombie = fields[0] in "ZX"  # dead, and its parent has not asked how it went
        return "" if is_zombie else fields[19]
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return ""
    except PermissionError:
        pass
    return "alive"

