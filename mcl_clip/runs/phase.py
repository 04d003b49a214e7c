"""Phases with fingerprints that detect changed settings, and the lock of a run directory."""

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mcl_clip.core.errors import UserError, shorten
from mcl_clip.core.files import DONE, STARTED, canonical_json, fingerprint, read_json, write_json

logger = logging.getLogger(__name__)

NOT_OUTPUTS = {DONE, STARTED, "checkpoints", "texts"}  # a finished phase no longer needs the last two
LOCK_WRITE_S = 10.0  # an incomplete lock file older than this belongs to a process that died while writing it
HEARTBEAT_S = 30.0
SILENT_S = 600.0  # a job on another host without a heartbeat for this long is considered dead
SILENT_HERE_S = 75.0  # one on this host whose process cannot be seen; two heartbeats and some delay


class StaleArtifactError(UserError):
    """A phase was finished or begun with settings or inputs other than the requested ones."""


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One step of a run, which reads finished phases and writes to its own folder only.

    Attributes:
        name: for messages and for the records of the phases that depend on this one.
        folder: where it writes.
        settings: everything that determines the result, except files of earlier phases. No paths.
        run: do the work, continuing from what the folder already holds.
        inputs: the phases that it reads.
        grows: run again, without an error, when its settings and inputs are the earlier ones plus new ones, such as
            another stage or evaluation set. As an input of other phases, it is represented by its settings and inputs,
            so that those phases recognize the growth as well.
        keeps_nothing: an unfinished phase starts from scratch, so its settings may differ from those it began with.
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
        """Hash of the settings and of the fingerprints of the inputs, hence of all settings that led to them."""
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
        """Return `done`, `stale`, `partial` or `missing`."""
        if not (self.folder / DONE).exists():
            return "partial" if self.folder.exists() and any(self.folder.iterdir()) else "missing"
        if self._has_grown(DONE):
            return "partial"
        return "stale" if self.difference() else "done"

    def difference(self, marker: str = DONE) -> str:
        """Describe how the finished or begun phase differs from the requested one; empty if it does not."""
        record = self._read_marker(marker)
        if record["fingerprint"] == self.fingerprint:
            for name, size in record.get("outputs", {}).items():
                path = self.folder / name
                if not path.is_file() or path.stat().st_size != size:
                    return f"its output {name} is missing or has another size"
            return ""
        before, now = record["made_from"], self._made_from
        if fields := _differences(before["settings"], now["settings"]):
            return "; ".join(fields)
        for name in sorted({*before["inputs"], *now["inputs"]}):
            if before["inputs"].get(name) != now["inputs"].get(name):
                return f"its input {name} has changed"
        return "its settings changed"

    def check(self) -> bool:
        """Return whether the phase is done; raise StaleArtifactError if it was done with other settings or inputs."""
        if not (self.folder / DONE).exists() or self._has_grown(DONE):
            return False
        self._refuse_if_different(DONE)
        return True

    def begin(self) -> None:
        """Record settings and inputs before any work; raise StaleArtifactError if the phase was begun with others."""
        if (self.folder / STARTED).exists() and not self.keeps_nothing and not self._has_grown(STARTED):
            self._refuse_if_different(STARTED)
        write_json(self.folder / STARTED, {"fingerprint": self.fingerprint, "made_from": self._made_from})

    def mark_done(self) -> None:
        """Write the marker of a finished phase. No other process may still be writing to its folder."""
        for temporary in self.folder.rglob(".*.tmp-*"):  # of processes that were killed while writing
            temporary.unlink()
        outputs = {
            str(path.relative_to(self.folder)): path.stat().st_size
            for path in sorted(self.folder.rglob("*"))
            if path.is_file() and not NOT_OUTPUTS.intersection(path.relative_to(self.folder).parts)
        }
        record = {"fingerprint": self.fingerprint, "made_from": self._made_from, "outputs": outputs}
        write_json(self.folder / DONE, {**record, "finished_at": time.strftime("%Y-%m-%dT%H:%M:%S%z")})

    def _refuse_if_different(self, marker: str) -> None:
        if difference := self.difference(marker):
            raise StaleArtifactError(
                f"{self.folder} is {'finished' if marker == DONE else 'begun'} but does not match this recipe: "
                f"{difference}. Use the earlier setting, another --run-dir, or delete {self.folder} to run it again"
            )

    def _has_grown(self, marker: str) -> bool:
        return self.grows and _is_extended(self._read_marker(marker)["made_from"], self._made_from)

    def _read_marker(self, marker: str) -> dict[str, Any]:
        record = read_json(self.folder / marker)
        try:
            made_from = record["made_from"]
            parts = (made_from, made_from["settings"], made_from["inputs"], record.get("outputs", {}))
            is_valid = isinstance(record["fingerprint"], str) and all(isinstance(part, dict) for part in parts)
        except (LookupError, TypeError):
            is_valid = False
        if not is_valid:
            raise UserError(
                f"{self.folder / marker} lacks the settings and inputs of this phase; restore the file, or delete "
                f"{self.folder} to run the phase again"
            )
        valid: dict[str, Any] = record
        return valid


def _is_extended(before: Any, now: Any) -> bool:
    """Return whether `now` is `before` with additional keys in its objects, at any depth."""
    if isinstance(before, dict) and isinstance(now, dict):
        kept = (key in now and (now[key] == value or _is_extended(value, now[key])) for key, value in before.items())
        return now != before and all(kept)
    return False


def _differences(before: Any, now: Any, path: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        return [
            text
            for key in sorted({*before, *now})
            for text in _differences(before.get(key), now.get(key), f"{path}.{key}" if path else key)
        ]
    return [] if before == now else [f"{path} was {shorten(repr(before))} and is now {shorten(repr(now))}"]


@contextmanager
def lock(run_dir: Path) -> Iterator[None]:
    """Create the run directory and hold it for this job; raise UserError if a living job holds it.

    The lock of a dead process on this host is taken over. Processes on other hosts cannot be observed, so a job updates
    the modification time of its lock every 30 s, and a lock is taken over after 10 minutes without an update; that of
    another container on this host, which may have its name and its PIDs, after 75 s, which are waited for.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / "lock"
    owner = {"host": socket.gethostname(), "namespace": _pid_namespace(), "pid": os.getpid()}
    token = json.dumps({**owner, "process": _start_time(os.getpid())})
    released = threading.Event()

    def is_ours() -> bool:  # a job that was suspended for long may have lost the lock
        with suppress(OSError):  # the file system may be unavailable for a moment
            return path.read_text(errors="replace") == token
        return False

    def send_heartbeats() -> None:
        while not released.wait(HEARTBEAT_S):
            if is_ours():
                with suppress(OSError):
                    os.utime(path)

    for _ in range(3):
        try:
            with path.open("x") as file:
                file.write(token)
            break
        except FileExistsError:
            _remove_if_dead(path)
    else:
        raise UserError(f"other jobs keep taking {path}; give each job its own --run-dir")
    threading.Thread(target=send_heartbeats, daemon=True).start()
    try:
        yield
    finally:
        released.set()
        if is_ours():
            path.unlink(missing_ok=True)


def _remove_if_dead(path: Path) -> None:
    try:
        age_s = _age_s(path)
        text = path.read_text(errors="replace")
    except FileNotFoundError:
        return
    try:
        owner = json.loads(text)
        types = {"host": str, "pid": int, "process": str}
        is_complete = isinstance(owner, dict) and all(type(owner.get(name)) is kind for name, kind in types.items())
    except (ValueError, RecursionError):
        is_complete = False
    if not is_complete:
        if age_s < LOCK_WRITE_S:  # its owner may be between creating the file and writing to it
            raise UserError(f"another job is just starting in {path.parent}; give this job another --run-dir")
        path.unlink(missing_ok=True)
        return
    if owner["host"] == socket.gethostname() and owner.get("namespace", _pid_namespace()) == _pid_namespace():
        is_dead = _start_time(owner["pid"]) != owner["process"]
    elif owner["host"] == socket.gethostname():
        is_dead = _stays_silent(path, SILENT_HERE_S)
    elif is_dead := age_s > SILENT_S:
        logger.warning(
            "%s: taking over from process %d on %s, which has not updated its lock for %d minutes",
            *(path.parent, owner["pid"], owner["host"], round(age_s / 60)),
        )
    if not is_dead:
        raise UserError(
            f"{path.parent} is in use by process {owner['pid']} on {owner['host']}; wait for it, or give this job "
            f"another --run-dir (if you are sure that process is dead, delete {path})"
        )
    path.unlink(missing_ok=True)


def _age_s(path: Path) -> float:
    """Return the seconds since a file was updated, by the clock of its file system, which may not be that of a host."""
    probe = path.with_name(f".{path.name}-clock-{socket.gethostname()}-{os.getpid()}")
    try:
        probe.touch()
        return probe.stat().st_mtime - path.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _stays_silent(path: Path, limit_s: float) -> bool:
    """Wait until a lock has not been updated for `limit_s`; return False as soon as it is updated."""
    before, age_s = path.stat().st_mtime_ns, _age_s(path)
    deadline = time.monotonic() + limit_s - age_s
    if age_s < limit_s:
        logger.info("%s: waiting for %.0f s to see whether the job that holds it is alive", path, limit_s - age_s)
    while time.monotonic() < deadline:
        time.sleep(min(1.0, limit_s / 10))
        if not path.exists() or path.stat().st_mtime_ns != before:
            return False
    return True


def _pid_namespace() -> str:
    """Return what distinguishes processes of this container from those of others with the same PIDs; may be empty."""
    with suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""


def _start_time(pid: int) -> str:
    """Return what distinguishes a process from a later one with the same PID; empty if there is no such process."""
    if Path("/proc/self/stat").exists():
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        except (FileNotFoundError, ProcessLookupError):
            return ""
        is_zombie = fields[0] in "ZX"  # dead, but not yet reaped by its parent
        return "" if is_zombie else fields[19]
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return ""
    except PermissionError:
        pass
    return "alive"
