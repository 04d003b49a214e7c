import os
import shutil
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp()  # for the code of exported models, which transformers copies

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.distributed.pool import Pool

torch.set_num_threads(1)


def pytest_unconfigure() -> None:
    """Leave no code of models behind."""
    shutil.rmtree(os.environ["HF_MODULES_CACHE"], ignore_errors=True)


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep tests that share processes or a finished run in one worker of pytest-xdist: a folder, or a file."""
    for item in items:
        part, *rest = item.path.relative_to(Path(__file__).parent).parts
        item.add_marker(pytest.mark.xdist_group("/".join([part, *rest] if part == "unit" else [part])))


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    """Processes that run functions as ranks of a process group."""
    workers = Pool(tmp_path_factory.mktemp("pool"))
    yield workers
    workers.close()
