import os

os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Iterator

import pytest
import torch

from tests.distributed.pool import Pool

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    """Processes that run functions as ranks of a process group."""
    workers = Pool(tmp_path_factory.mktemp("pool"))
    yield workers
    workers.close()
