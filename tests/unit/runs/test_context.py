from pathlib import Path
from types import SimpleNamespace

import pytest

from mcl_clip import RunConfig, StageConfig, TowerConfig, TrainConfig, UserError
from mcl_clip.config import EvalConfig, MachineConfig
from mcl_clip.data.index import ShardIndex
from mcl_clip.eval.classification import ClassificationTask, MultilabelTask
from mcl_clip.eval.retrieval import RetrievalTask
from mcl_clip.runs import context
from mcl_clip.runs.context import RunContext, open_tasks
from tests.unit.eval.sets import write_classification, write_image_folder, write_multilabel, write_retrieval


@pytest.fixture
def root(tmp_path):
    write_classification(tmp_path / "birds", [0, 1, 2])
    write_multilabel(tmp_path / "voc", [[1, 0], [0, 1]], ("a", "b"))
    write_retrieval(tmp_path / "photos", 4)
    write_image_folder(tmp_path / "animals", {"owl": 2, "bee": 1})
    return tmp_path


def opened(**sets):
    stage = StageConfig(train=TrainConfig(steps=1, global_batch_size=8, lr=1.0))
    config = RunConfig(
        run_dir=Path("run"), tower=TowerConfig(architecture="ViT-B-32"), stages=(stage,), eval=EvalConfig(**sets)
    )
    return {name: type(task) for name, task in open_tasks(config).items()}


def test_sets_of_any_kind(root):
    assert opened(
        retrieval=(f"{root}/photos",),
        classification=(f"{root}/birds",),
        sets=(f"{root}/voc", f"{root}/animals", f"again={root}/photos"),
    ) == {
        "photos": RetrievalTask,
        "birds": ClassificationTask,
        "voc": MultilabelTask,
        "animals": ClassificationTask,
        "again": RetrievalTask,
    }


def test_mistakes(root):
    with pytest.raises(UserError, match="two evaluation sets are both called photos; write NAME=FOLDER"):
        opened(retrieval=(f"{root}/photos",), sets=(f"photos={root}/birds",))
    with pytest.raises(UserError, match="two evaluation sets are both called birds; write NAME=FOLDER"):
        opened(sets=(f"{root}/birds", f"birds={root}/voc"))
    with pytest.raises(UserError, match=r"is not an evaluation set: it has no pairs.json, dataset_type.txt"):
        opened(sets=(str(root),))


def test_each_node_has_its_part_of_a_shared_cache(tmp_path, monkeypatch):
    machine = MachineConfig(remote="stage", cache_dir=tmp_path)
    run = SimpleNamespace(config=SimpleNamespace(machine=machine))
    for node, folder in ((0, tmp_path), (8, tmp_path / "node-8")):
        monkeypatch.setattr(context, "place_on_node", lambda node=node: (node, True))
        assert RunContext.reader(run, ShardIndex.__new__(ShardIndex)).cache.folder == folder
