"""Access to files: retries, sizes and byte ranges of local and remote ones, a cache of shards, checked array files."""

import errno
import fcntl
import functools
import hashlib
import logging
import os
import re
import stat as file_type
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import numpy as np
from jaxtyping import Integer
from numpy.typing import DTypeLike
from safetensors.torch import load_file
from torch import Tensor

from mcl_clip.core.errors import UserError
from mcl_clip.core.files import atomic_path
from mcl_clip.data.shards import Shard, is_remote, redacted

_CACHED_NAME = re.compile(r"[0-9a-f]{32}\.(shard|fetching)")
_LOCKS = 64
_CHUNK_BYTES = 8 << 20
_ABANDONED_S = 900.0
_POLL_S = 0.05
T = TypeVar("T")
logger = logging.getLogger(__name__)
# What object stores call the version of an object, best first.
_VERSION_FIELDS = (
    *("ETag", "etag", "blob_id", "md5Hash", "Content-MD5", "Digest"),
    *("LastModified", "Last-Modified", "updated"),
)
# Errors of these packages are network failures, whatever class they have.
_NETWORK_PACKAGES = (
    *("aiohttp", "botocore", "aiobotocore", "gcsfs", "google", "requests", "urllib3", "huggingface_hub"),
    *("httpx", "httpx2", "httpcore", "httpcore2"),  # used by huggingface_hub, depending on its version
)
_NPY_MAGIC = b"\x93NUMPY"
_TRANSIENT_STATUS = (408, 425, 429)


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """How often and how long to wait for a file."""

    retries: int = 3  # after the first attempt
    backoff_s: float = 0.5  # pause before the first retry; it doubles each time
    timeout_s: float = 60.0  # longest wait for the next byte of a remote file

    def __post_init__(self) -> None:
        if self.retries < 0 or self.backoff_s < 0 or self.timeout_s <= 0:
            raise UserError(f"{self} is invalid: retries and backoff_s must be at least 0 and timeout_s above 0")

    def run(self, action: Callable[[], T], location: str) -> T:
        """Return the result of `action`, repeated while it fails for reasons that may be transient.

        Raises:
            UserError: at once, if the file does not exist or access is denied; names the location.
            OSError: if it still fails after the last retry.
        """
        shown, attempt = redacted(location), 0
        while True:
            try:
                return action()
            except UserError:
                raise
            except Exception as error:
                cause = _root_cause(error)
                if permanent := _permanent_failure(cause, shown):
                    raise permanent from None
                if not (isinstance(cause, OSError) or type(cause).__module__.split(".")[0] in _NETWORK_PACKAGES):
                    raise
                reason = redacted(f"{type(cause).__name__}: {cause}")
                if attempt >= self.retries:  # without the cause, which may show secrets
                    raise OSError(f"reading {shown} failed {attempt + 1} times; the last error was {reason}") from None
                pause = self.backoff_s * 2**attempt
                logger.warning("reading %s failed (%s); retrying in %.1f s", shown, reason, pause)
                time.sleep(pause)
                attempt += 1


def _root_cause(error: Exception) -> Exception:
    """Return what really happened: fsspec reports every failure to get the size of an HTTP file as 'not found'."""
    cause = error.__cause__
    is_from_aiohttp = isinstance(cause, Exception) and type(cause).__module__.partition(".")[0] == "aiohttp"
    if isinstance(error, FileNotFoundError) and (is_from_aiohttp or isinstance(cause, TimeoutError | ConnectionError)):
        return cause  # type: ignore[return-value]
    return error


def _permanent_failure(error: Exception, shown: str) -> UserError | None:
    """Return the error to show to the user if a retry is of no use, else None."""
    attributes = (  # each client library keeps the HTTP status elsewhere; lazy, since aiohttp deprecates `code`
        getattr(holder, name, None)
        for holder in (error, getattr(error, "response", None))
        for name in ("status", "status_code", "code")
    )
    status = next((value for value in attributes if isinstance(value, int)), None)
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return UserError(f"{shown} does not exist; check the path or URL, or restore the file")
    if isinstance(error, PermissionError) or status in (401, 403):
        return UserError(f"access to {shown} is denied; check permissions, credentials or the expiry of a signed URL")
    if status is not None and 400 <= status < 500 and status not in _TRANSIENT_STATUS:
        return UserError(f"the server refused to send {shown} (HTTP status {status}); check the URL")
    return None


def stat(location: str, retry: RetryPolicy) -> tuple[int, str]:
    """Return size in bytes and version stamp of a file: its modification time, ETag or the like, or an empty string.

    Raises:
        UserError: if there is no such file, access is denied, or its server does not report its size.
        OSError: if reading still fails after all retries.
    """

    def read() -> tuple[int, str]:
        if not is_remote(location):
            local = os.stat(location)
            if not file_type.S_ISREG(local.st_mode):  # opening a pipe would block forever
                raise UserError(f"{location} is not a regular file; give a tar file, or a folder that holds tar files")
            return local.st_size, f"mtime:{local.st_mtime_ns}"
        files = filesystem(location, retry.timeout_s)
        files.invalidate_cache()
        info = files.info(location)
        if info.get("size") is None:
            raise UserError(
                f"the server of {redacted(location)} does not report the size of the file; copy it to a local folder"
            )
        return int(info["size"]), next((f"{name}:{info[name]}" for name in _VERSION_FIELDS if info.get(name)), "")

    return retry.run(read, location)


def read_range(location: str, start: int, end: int, retry: RetryPolicy) -> bytes:
    """Read bytes `start` to `end` of a remote file.

    Raises:
        UserError: if there is no such file, access is denied, or its server does not support range requests.
        OSError: if reading still fails after all retries.
    """

    def read() -> bytes:
        data: bytes = filesystem(location, retry.timeout_s).cat_file(location, start=start, end=end)
        if len(data) > end - start:
            raise UserError(
                f"the server of {redacted(location)} ignores range requests and sends whole files; cache whole shards "
                f"(--machine.remote stage), or copy the shards to a local folder"
            )
        if len(data) < end - start:
            raise OSError(f"received {len(data)} of {end - start} bytes")
        return data

    return retry.run(read, location)


def filesystem(location: str, timeout_s: float) -> Any:
    """Return the fsspec file system for a URL, one per process; raise UserError if its package is not installed."""
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
        raise UserError(f"reading {protocol}:// requires a package: pip install {package} ({error})") from error


class ShardCache:
    """A folder of at most `max_bytes` of whole shards, shared by the processes of a machine.

    The least recently used shards are dropped. A file is named by the hash of URL, size and version, so that neither
    shards with the same base name nor versions of a shard mix.
    """

    def __init__(self, folder: Path, max_bytes: int, retry: RetryPolicy):
        self.folder, self.max_bytes, self.retry = Path(folder).absolute(), max_bytes, retry

    def open(self, shard: Shard) -> int:
        """Return a descriptor of the whole shard, fetched if it is not in the cache; the caller closes it.

        The file stays readable through the descriptor even when another process drops it.

        Raises:
            UserError: if the shard is larger than the cache, missing, or of another size than in the index.
            OSError: if fetching still fails after all retries.
        """
        if shard.size > self.max_bytes:
            raise UserError(
                f"{redacted(shard.url)} has {shard.size / 1e9:.3g} GB, above the cache limit of "
                f"{self.max_bytes / 1e9:.3g} GB; raise --machine.cache-gb, or read ranges (--machine.remote range)"
            )
        name = hashlib.blake2b(repr((shard.url, shard.size, shard.stamp)).encode(), digest_size=16).hexdigest()
        path = self.folder / f"{name}.shard"
        if (descriptor := self._open_cached(shard, path)) is not None:
            return descriptor
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._lock(f"fetch-{int(name[:8], 16) % _LOCKS:02d}"):
            if (descriptor := self._open_cached(shard, path)) is not None:
                return descriptor  # another process was faster
            temporary = path.with_suffix(".fetching")
            self._reserve(temporary, shard.size)
            try:
                self.retry.run(lambda: self._download(shard, temporary), shard.url)
                descriptor = os.open(temporary, os.O_RDONLY)  # before others may drop the file
                with self._lock("room"):  # else a process that sums sizes may see the file under neither name
                    temporary.replace(path)
                return descriptor
            finally:
                temporary.unlink(missing_ok=True)

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

    def _download(self, shard: Shard, temporary: Path) -> None:
        files = filesystem(shard.url, self.retry.timeout_s)
        is_stream = shard.url.startswith("http")  # a plain GET: works without ranges too
        options = {"block_size": 0} if is_stream else {"block_size": _CHUNK_BYTES, "cache_type": "readahead"}
        size = 0
        try:
            with files.open(shard.url, "rb", **options) as source, temporary.open("r+b") as target:
                while chunk := source.read(_CHUNK_BYTES):
                    target.write(chunk)
                    size += len(chunk)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise UserError(
                    f"the disk of {self.folder} is full; lower --machine.cache-gb or choose another --machine.cache-dir"
                ) from error
            raise
        if size > shard.size:
            raise UserError(
                f"shard {redacted(shard.url)} changed since it was indexed: it had {shard.size} bytes, now {size}; "
                f"rebuild the index, or restore the shard"
            )
        if size < shard.size:
            raise OSError(f"received {size} of {shard.size} bytes")

    def _reserve(self, temporary: Path, size: int) -> None:
        """Wait for space, and claim it with a file that has its final size from the start."""
        while True:
            with self._lock("room"):
                if self._make_room(size):
                    with temporary.open("wb") as file:
                        file.truncate(size)
                    return
            time.sleep(_POLL_S)  # other processes are fetching; what they finish can be dropped

    def _make_room(self, size: int) -> bool:
        """Drop shards until `size` bytes fit; return whether they do."""
        used, droppable = 0, []
        for path in self.folder.iterdir():
            if not _CACHED_NAME.fullmatch(path.name):  # never touch foreign files
                continue
            with suppress(FileNotFoundError):
                status = path.stat()
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


def save_array(path: Path, dtype: DTypeLike, shape: tuple[int, ...], blocks: Iterable[np.ndarray]) -> None:
    """Write consecutive blocks of an array to a .npy file, atomically.

    Not through a memory map: on a full disk that ends in a bus error.
    """
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for block in blocks:
            file.write(np.ascontiguousarray(block, dtype).data)


def load_numbers(path: Path, rows: int) -> Integer[np.ndarray, "rows"]:
    """Map a .npy file with one integer for each of `rows` rows; raise UserError if it is anything else."""
    try:
        with path.open("rb") as file:
            if not file.read(len(_NPY_MAGIC)) == _NPY_MAGIC:  # a pickle or an archive
                raise ValueError("not a .npy file")
        mapped = np.load(path, mmap_mode="r", allow_pickle=False)  # allocates nothing for what a header promises
        if mapped.dtype.kind not in "iu" or mapped.shape != (rows,):
            raise ValueError(f"its dtype is {mapped.dtype} and its shape {mapped.shape}")
        numbers: np.ndarray = np.asarray(mapped)
    except Exception as error:  # damaged headers fail in many ways
        raise UserError(
            f"{path} does not hold one integer for each of {rows} rows ({error}); restore it, or delete its folder "
            f"and run the recipe again"
        ) from error
    return numbers


def load_tensors(path: Path, *names: str) -> dict[str, Tensor]:
    """Load the tensors of a safetensors file; raise UserError if it is damaged or lacks one of `names`."""
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except Exception as error:  # damaged files raise errors of several kinds
        raise UserError(
            f"{path} is not a complete safetensors file ({error}); restore it, or delete its folder and run the "
            f"recipe again"
        ) from error
    if missing := [name for name in names if name not in tensors]:
        raise UserError(f"{path} has no tensor {missing[0]!r}; delete its folder and run the recipe again")
    return tensors
