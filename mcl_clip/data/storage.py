"""Remote shards kept as local files: fetched once per machine, least recently used ones dropped."""

import errno
import fcntl
import functools
import hashlib
import logging
import os
import re
import stat as file_type
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import numpy as np
from jaxtyping import Integer
from safetensors.torch import load_file
from torch import Tensor

from mcl_clip.core.errors import UserError
from mcl_clip.data.shards import Shard, is_remote, redacted

_OURS = re.compile(r"[0-9a-f]{32}\.(shard|fetching)")
_LOCKS = 64
_PIECE_BYTES = 8 << 20
_ABANDONED_S = 900.0
_POLL_S = 0.05
T = TypeVar("T")
logger = logging.getLogger(__name__)
# What object stores call the version of an object, best first.
_STAMPS = ("ETag", "etag", "blob_id", "md5Hash", "Content-MD5", "Digest", "LastModified", "Last-Modified", "updated")
# Errors of these packages are failures of the network, whatever class they have.
_NETWORK_PACKAGES = (
    *("aiohttp", "botocore", "aiobotocore", "gcsfs", "google", "requests", "urllib3", "huggingface_hub"),
    *("httpx", "httpx2", "httpcore", "httpcore2"),  # what huggingface_hub uses, by version
)
_NPY_MAGIC = b"\x93NUMPY"
_PASSING_STATUS = (408, 425, 429)


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """How long to wait for a file: `retries` repeats, pauses of `backoff_s` doubling, `timeout_s` without a byte."""

    retries: int = 3
    backoff_s: float = 0.5
    timeout_s: float = 60.0

    def __post_init__(self) -> None:
        if self.retries < 0 or self.backoff_s < 0 or self.timeout_s <= 0:
            raise UserError(f"{self} cannot work; retries and backoff_s must be at least 0 and timeout_s above 0")

    def run(self, action: Callable[[], T], location: str) -> T:
        """The result of `action`, repeated while it fails for reasons that may pass.

        Raises:
            UserError: at once, if the file is gone or may not be read; names the location.
            OSError: if it still fails after the last repeat.
        """
        attempt = 0
        while True:
            try:
                return action()
            except UserError:
                raise
            except Exception as error:
                reason = redacted(f"{type(_root(error)).__name__}: {_root(error)}")
                if permanent := _permanent(error, redacted(location)):
                    raise permanent from None
                if not _is_passing(error):
                    raise
                if attempt >= self.retries:
                    message = f"reading {redacted(location)} failed {attempt + 1} times, at last with {reason}"
                    raise OSError(message) from None  # the cause may show secrets
                pause = self.backoff_s * 2**attempt
                logger.warning("reading %s failed (%s); trying again in %.1f s", redacted(location), reason, pause)
                time.sleep(pause)
                attempt += 1


def stat(location: str, patience: RetryPolicy) -> tuple[int, str]:
    """Size in bytes and version stamp (modification time, ETag or the like; empty if there is none) of a file.

    Raises:
        UserError: if there is no such file, it may not be read, or its server does not tell its size.
    """
    return patience.run(lambda: _stat(location, patience.timeout_s), location)


def read_range(location: str, start: int, end: int, patience: RetryPolicy) -> bytes:
    """Bytes `start` to `end` of a remote file.

    Raises:
        UserError: if it is gone, may not be read, or its server does not send ranges.
        OSError: if it cannot be read after all repeats.
    """

    def read() -> bytes:
        data: bytes = filesystem(location, patience.timeout_s).cat_file(location, start=start, end=end)
        if len(data) > end - start:
            raise UserError(
                f"the server of {redacted(location)} sends whole files where a range is asked for; fetch whole shards "
                f"into a local cache (remote='stage'), or copy the shards to a local folder"
            )
        if len(data) < end - start:
            raise OSError(f"{len(data)} of {end - start} bytes arrived")
        return data

    return patience.run(read, location)


def load_numbers(path: Path, rows: int) -> Integer[np.ndarray, "rows"]:
    """The whole numbers in a .npy file, one for each of `rows` rows; no pickles, and no archives.

    Raises:
        UserError: if it is not such a file.
    """
    try:
        with path.open("rb") as file:
            if not file.read(len(_NPY_MAGIC)) == _NPY_MAGIC:
                raise ValueError("no numpy file")
        mapped = np.load(path, mmap_mode="r", allow_pickle=False)  # reserves nothing for what a header promises
        if mapped.dtype.kind not in "iu" or mapped.shape != (rows,):
            raise ValueError(f"it holds {mapped.dtype} of the shape {mapped.shape}")
        numbers: np.ndarray = np.array(mapped)
    except Exception as error:  # damaged headers fail in many ways
        raise UserError(
            f"{path} does not hold a whole number for each of {rows} rows ({error}); restore it, or delete its folder "
            f"and run the recipe again"
        ) from error
    return numbers


def load_tensors(path: Path, *names: str) -> dict[str, Tensor]:
    """The tensors in a safetensors file, among them `names`.

    Raises:
        UserError: if it is not such a file, or a name is missing.
    """
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except Exception as error:  # damaged files raise errors of several kinds
        raise UserError(
            f"{path} is not a whole safetensors file ({error}); restore it, or delete its folder and run the "
            f"recipe again"
        ) from error
    if missing := [name for name in names if name not in tensors]:
        raise UserError(f"{path} has no {missing[0]}; delete its folder and run the recipe again")
    return tensors


def filesystem(location: str, timeout_s: float) -> Any:
    """The fsspec file system for a URL, one per process.

    Raises:
        UserError: if the package for the protocol is not installed.
    """
    return _filesystem(location.partition("://")[0], "%" in location, timeout_s, os.getpid())


@functools.lru_cache(maxsize=16)
def _filesystem(protocol: str, is_encoded: bool, timeout_s: float, process: int) -> Any:  # noqa: ARG001
    options: dict[str, Any] = {}
    if protocol in ("http", "https"):
        import aiohttp  # takes a quarter of a second

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=timeout_s, sock_read=timeout_s)
        options = {"client_kwargs": {"timeout": timeout, "trust_env": True}, "encoded": is_encoded}
    elif protocol == "s3":
        options = {"config_kwargs": {"connect_timeout": timeout_s, "read_timeout": timeout_s}}
    elif protocol == "gs":
        options = {"timeout": timeout_s}
    try:
        return fsspec.filesystem(protocol, **options)
    except ImportError as error:
        package = {"s3": "s3fs", "gs": "gcsfs"}.get(protocol, protocol)
        raise UserError(f"reading {protocol}:// needs a package: pip install {package} ({error})") from error


def _stat(location: str, timeout_s: float) -> tuple[int, str]:
    if not is_remote(location):
        local = os.stat(location)
        if not file_type.S_ISREG(local.st_mode):  # opening a pipe would wait for ever
            raise UserError(f"{location} is not a regular file; name a tar file, or a folder that holds tar files")
        return local.st_size, f"mtime:{local.st_mtime_ns}"
    files = filesystem(location, timeout_s)
    files.invalidate_cache()
    info = files.info(location)
    if info.get("size") is None:
        raise UserError(f"the server of {redacted(location)} does not tell the size of the file; copy it to a folder")
    return int(info["size"]), next((f"{name}:{info[name]}" for name in _STAMPS if info.get(name)), "")


def _permanent(error: Exception, shown: str) -> UserError | None:
    """What to tell the user, if trying again is of no use."""
    error = _root(error)
    status = _status(error)
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return UserError(f"{shown} does not exist (any more); correct the name, or restore the file")
    if isinstance(error, PermissionError) or status in (401, 403):
        return UserError(
            f"{shown} may not be read: access is refused; check permissions, credentials or the signed URL"
        )
    if status is not None and 400 <= status < 500 and status not in _PASSING_STATUS:
        return UserError(f"the server refuses to send {shown} (HTTP status {status}); check the URL")
    return None


def _is_passing(error: Exception) -> bool:
    error = _root(error)
    return isinstance(error, OSError) or type(error).__module__.split(".")[0] in _NETWORK_PACKAGES


def _root(error: Exception) -> Exception:
    """What really happened: fsspec calls every failure to get the size of an HTTP file 'not found'."""
    cause = error.__cause__
    is_of_aiohttp = isinstance(cause, Exception) and type(cause).__module__.partition(".")[0] == "aiohttp"
    if isinstance(error, FileNotFoundError) and (is_of_aiohttp or isinstance(cause, TimeoutError | ConnectionError)):
        return cause  # type: ignore[return-value]
    return error


def _status(error: Exception) -> int | None:
    """The HTTP status in the error of any of the client libraries."""
    for holder in (error, getattr(error, "response", None)):
        for name in ("status", "status_code", "code"):
            value = getattr(holder, name, None)
            if isinstance(value, int):
                return value
    return None


class ShardCache:
    """A folder of at most `max_bytes` of whole shards, shared by the processes of a machine.

    A file is named by the hash of URL, size and version, so that neither equal base names nor a changed shard mix.
    """

    def __init__(self, folder: Path, max_bytes: int, patience: RetryPolicy):
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
