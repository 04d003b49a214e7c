import os
import shutil
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp()  # for the code of exported models, which transformers copies

from collections.abc import Iterator

import pytest
import torch

from tests.distributed.pool import Pool

torch.set_num_threads(1)


def pytest_unconfigure() -> None:
    """Leave no code of models behind."""
    shutil.rmtree(os.environ["HF_MODULES_CACHE"], ignore_errors=True)


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    """Processes that run functions as ranks of a process group."""
    workers = Pool(tmp_path_factory.mktemp("pool"))
    yield workers
    workers.close()
