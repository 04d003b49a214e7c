"""Small tar files for tests, written with `tarfile`, and what they hold as `tarfile` reads it."""

import hashlib
import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def noise(name: str, size: int) -> bytes:
    """`size` bytes that depend on `name` only."""
    return hashlib.shake_128(name.encode()).digest(size)


def picture(color: tuple[int, int, int] = (200, 30, 60), size: tuple[int, int] = (16, 12), kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, kind)
    return buffer.getvalue()


def pairs(count: int, *, prefix: str = "k", image_bytes: int = 700) -> list[tuple[str, bytes]]:
    """Members of `count` samples with sizes of their own."""
    members = []
    for number in range(count):
        name = f"{prefix}{number:04d}"
        members.append((f"{name}.jpg", noise(f"{name}.jpg", image_bytes + number)))
        members.append((f"{name}.txt", f"caption of {name}".encode()))
    return members


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], *, kind: str = "ustar") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:", format=FORMATS[kind]) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            info.mtime = 1.5 if kind == "pax" else 1  # a broken second makes PAX headers, as webdataset does
            tar.addfile(info, io.BytesIO(data))
    return path


def read_tar(path: Path) -> dict[str, bytes]:
    with tarfile.open(path, "r:") as tar:
        return {member.name: tar.extractfile(member).read() for member in tar if member.isreg()}
