import importlib.util
import io
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import webdataset as wds
from PIL import Image

DATA_PREP = Path(__file__).parents[3] / "data_prep"


@cache
def _load(name: str) -> ModuleType:
    if str(DATA_PREP) not in sys.path:
        sys.path.append(str(DATA_PREP))  # as Python does for a program, which may import the one beside it
    spec = importlib.util.spec_from_file_location(f"data_prep_{name}", DATA_PREP / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def load_program():
    """A program of data_prep as a module, loaded by its path as recipes do it."""
    return _load


@pytest.fixture(scope="session")
def picture():
    """An image file of one colour."""

    def make(level: int = 0, *, size: tuple[int, int] = (12, 8), kind: str = "JPEG", **options) -> bytes:
        file = io.BytesIO()
        Image.new("RGB", size, (level % 256, 40, 90)).save(file, kind, **options)
        return file.getvalue()

    return make


@pytest.fixture(scope="session")
def read_tars():
    """The samples of a folder as any WebDataset user sees them: dicts of bytes by extension."""

    def read(folder: Path) -> list[dict]:
        urls = [str(path) for path in sorted(folder.glob("*.tar"), key=lambda path: int(path.stem))]
        dataset = wds.WebDataset(urls, shardshuffle=False, empty_check=False)
        return [
            {name: value for name, value in one.items() if name not in ("__url__", "__local_path__")} for one in dataset
        ]

    return read
