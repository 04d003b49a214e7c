"""What `mcl-clip eval` measures does not depend on the number of processes, and one of them writes."""

from pathlib import Path
from unittest.mock import Mock, patch

import numpy as np
import pytest
import torch

from mcl_clip.core.distributed import rank
from mcl_clip.core.files import read_jsonl
from mcl_clip.eval.evaluate import evaluate
from mcl_clip.model.clip import ClipBundle
from mcl_clip.runs import train_phase
from mcl_clip.runs.context import RunContext
from tests.unit.eval.sets import (
    make_multistage,
    name_classes,
    write_classification,
    write_image_folder,
    write_multilabel,
    write_pairs,
    write_retrieval,
)

VARYING = ("seconds", "peak_memory_mb")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Sets of each kind, and a model of two stages."""
    root = tmp_path_factory.mktemp("evaluation")
    name_classes(write_image_folder(root / "sets/animals", {"owl": 5, "bee": 6}))
    write_classification(root / "sets/birds", np.arange(35) % 7)
    write_retrieval(root / "sets/photos", 13)
    write_pairs(root / "sets/two")
    write_multilabel(root / "sets/voc", np.random.default_rng(0).integers(0, 2, (17, 7)))
    make_multistage().save(root / "model")
    return root


def measure(root: str, out: str) -> str:
    return str(
        evaluate(f"{root}/model", data=Path(root, "sets"), out=Path(out), device=torch.device("cpu"), batch_size=3)
    )


def results(out: Path) -> tuple[list, dict[str, dict[str, bytes]]]:
    """Records without times, and the bytes of all outcomes."""
    records = [
        {name: value for name, value in record.items() if name not in VARYING}
        for record in read_jsonl(out / "results.jsonl")
    ]
    outcomes = {}
    for record in records:
        with np.load(out / record["outcomes"], allow_pickle=False) as stored:
            outcomes[record["key"]] = {name: stored[name].tobytes() for name in stored}
    return records, outcomes


def test_figures_at_any_number_of_processes(pool, root, tmp_path):
    pool.run(measure, 1, str(root), str(tmp_path / "1"))
    expected = results(tmp_path / "1")
    assert [record["dataset"] for record in expected[0]] == ["animals", "birds", "photos", "two", "voc"]
    for size in (2, 4):
        assert pool.run(measure, size, str(root), str(tmp_path / str(size))) == [str(tmp_path / str(size))] * size
        assert results(tmp_path / str(size)) == expected


def measure_nonsense(root: str, broken: int) -> str:
    from mcl_clip.core.distributed import rank
    from mcl_clip.core.errors import UserError

    try:
        measure(root if rank() != broken else "/nowhere", f"{root}/never")
    except UserError as error:
        return f"{error.everywhere} {error}"
    return "no error"


@pytest.mark.parametrize("broken", [0, 1])
def test_a_mistake_on_one_process_stops_all(pool, root, broken):
    first, second = pool.run(measure_nonsense, 2, str(root), broken)
    assert first == second
    assert first.startswith("True there is no folder /nowhere/model")


class CountedTask:
    """An evaluation set that tells which process scored it."""

    def score(self, image: torch.Tensor, text: torch.Tensor) -> tuple[dict[str, float], dict]:
        return {"scored_by": float(rank()), "image": float(image.sum()), "text": float(text.sum())}, {}


def evaluate_within_a_stage() -> tuple[dict[str, float], int]:
    task, embedded = CountedTask(), []

    def embed_set(run, stage, task, clip, *, is_locked):
        embedded.append(task)  # what every process takes part in
        return {"image": torch.eye(2), "text": torch.eye(2)[:1]}

    run = Mock(spec=RunContext, tasks={"a": task, "b": task})
    with patch.object(train_phase, "embed_set", embed_set):
        return train_phase._evaluate(run, 0, Mock(spec=ClipBundle)), len(embedded)


def test_an_evaluation_within_a_stage_is_scored_once(pool):
    one = {"scored_by": 0.0, "image": 2.0, "text": 1.0}
    metrics = {f"{name}/{metric}": value for name in "ab" for metric, value in one.items()}
    assert pool.run(evaluate_within_a_stage, 2) == [(metrics, 2)] * 2
