"""Remote shards kept as local files: fetched once per machine, least recently used ones dropped."""

import errno
import fcntl
import hashlib
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mcl_clip.data.files import Patience, filesystem
from mcl_clip.data.index import Shard
from mcl_clip.data.shards import redacted
from mcl_clip.errors import UserError

_OURS = re.compile(r"[0-9a-f]{32}\.(shard|fetching)")
_LOCKS = 64
_PIECE_BYTES = 8 << 20
_ABANDONED_S = 900.0
_POLL_S = 0.05


class ShardCache:
    """A folder of at most `max_bytes` of whole shards, shared by the processes of a machine.

    A file is named by the hash of URL, size and version, so that neither equal base names nor a changed shard mix.
    """

    def __init__(self, folder: Path, max_bytes: int, patience: Patience):
        self.folder, self.max_bytes, self.patience = Path(folder).absolute(), max_bytes, patience

    def open(self, shard: Shard) -> int:
        """A descriptor of the whole shard, to be closed by the caller; it is fetched if it is not there.

        The file stays readable through the descriptor even when another process drops it.

        Raises:
            UserError: if the shard is larger than the cache, gone, or has another size than in the index.
            OSError: if it cannot be fetched after all repeats.
        """
        if shard.size > self.max_bytes:
            raise UserError(
                f"{redacted(shard.url)} has {shard.size / 1e9:.3g} GB and the cache is limited to "
                f"{self.max_bytes / 1e9:.3g} GB; raise cache_gb, or read ranges (remote='range')"
            )
        path = self._path(shard)
        descriptor = self._open_cached(shard, path)
        return self._fetch(shard, path) if descriptor is None else descriptor

    def _path(self, shard: Shard) -> Path:
        name = hashlib.blake2b(repr((shard.url, shard.size, shard.stamp)).encode(), digest_size=16).hexdigest()
        return self.folder / f"{name}.shard"

    def _open_cached(self, shard: Shard, path: Path) -> int | None:
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        if os.fstat(descriptor).st_size != shard.size:
            os.close(descriptor)
            path.unlink(missing_ok=True)
            return None
        now = time.time_ns()
        os.utime(descriptor, ns=(now, now))  # the time of last use
        return descriptor

    def _fetch(self, shard: Shard, path: Path) -> int:
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._lock(f"fetch-{int(path.name[:8], 16) % _LOCKS:02d}"):
            if (descriptor := self._open_cached(shard, path)) is not None:
                return descriptor  # another process was faster
            temporary = path.with_suffix(".fetching")
            self._reserve(temporary, shard.size)
            try:
                self.patience.run(lambda: self._download(shard, temporary), shard.url)
                descriptor = os.open(temporary, os.O_RDONLY)  # before others may drop the file
                with self._lock("room"):  # else who counts may see the file under neither name
                    temporary.replace(path)
                return descriptor
            finally:
                temporary.unlink(missing_ok=True)

    def _download(self, shard: Shard, temporary: Path) -> None:
        files = filesystem(shard.url, self.patience.timeout_s)
        is_stream = shard.url.startswith("http")  # a plain GET: works without ranges too
        options = {"block_size": 0} if is_stream else {"block_size": _PIECE_BYTES, "cache_type": "readahead"}
        size = 0
        try:
            with files.open(shard.url, "rb", **options) as source, temporary.open("r+b") as target:
                while piece := source.read(_PIECE_BYTES):
                    target.write(piece)
                    size += len(piece)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise UserError(
                    f"the disk of {self.folder} is full; lower cache_gb or choose another cache_dir"
                ) from error
            raise
        if size > shard.size:
            raise UserError(
                f"{redacted(shard.url)} has {size} bytes and had {shard.size} when its index was made; "
                f"build the index again, or restore the shard"
            )
        if size < shard.size:
            raise OSError(f"{size} of {shard.size} bytes arrived")

    def _reserve(self, temporary: Path, size: int) -> None:
        """Make room, and take it with a file that has its final size from the start."""
        while True:
            with self._lock("room"):
                if self._make_room(size):
                    with temporary.open("wb") as file:
                        file.truncate(size)
                    return
            time.sleep(_POLL_S)  # other processes are fetching; what they finish can be dropped

    def _make_room(self, size: int) -> bool:
        used, droppable = 0, []
        for path in self.folder.iterdir():
            if not _OURS.fullmatch(path.name):  # never touch what others keep here
                continue
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            used += status.st_size
            if path.suffix == ".shard" or time.time() - status.st_mtime > _ABANDONED_S:
                droppable.append((status.st_mtime_ns, status.st_size, path))
        for _, freed, path in sorted(droppable):
            if used + size <= self.max_bytes:
                break
            path.unlink(missing_ok=True)
            used -= freed
        return used + size <= self.max_bytes

    @contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        with (self.folder / f".{name}.lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
