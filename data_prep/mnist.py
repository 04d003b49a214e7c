"""Handwritten digits of MNIST, as its authors publish them: four gzip files."""

import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mcl_clip.core.errors import UserError


@dataclass(frozen=True)
class Mnist:
    """Handwritten digits: uint8 images [n, 28, 28], and the indices of those that show each digit."""

    pictures: np.ndarray
    members: tuple[np.ndarray, ...]

    @classmethod
    def open(cls, folder: Path, split: str) -> "Mnist":
        """Open the `train` or `test` part.

        Raises:
            UserError: if the files are missing or are not those of MNIST.
        """
        prefix = {"train": "train", "test": "t10k"}[split]
        pixels = read_idx(folder / f"{prefix}-images-idx3-ubyte.gz", 16)
        labels = read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", 8)
        if len(pixels) != 28 * 28 * len(labels):
            raise UserError(
                f"{folder} has {len(pixels)} pixels for {len(labels)} labels, not 784 each; fetch the files again"
            )
        pictures = pixels.reshape(-1, 28, 28)
        return cls(pictures, tuple(np.flatnonzero(labels == digit) for digit in range(10)))


def read_idx(path: Path, header: int) -> np.ndarray:
    """Return the bytes after the header of a gzip file of MNIST."""
    if not path.is_file():
        raise UserError(f"{path} is missing; MNIST is four gzip files, as its authors publish them")
    try:
        with gzip.open(path) as file:
            return np.frombuffer(file.read(), np.uint8, offset=header)
    except (EOFError, OSError, ValueError, zlib.error) as error:
        raise UserError(f"{path} is not a whole gzip file of MNIST ({error}); fetch it again") from error
