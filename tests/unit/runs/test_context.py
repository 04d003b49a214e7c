import json
import logging
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mcl_clip import DataConfig, RunConfig, StageConfig, TowerConfig, TrainConfig, UserError
from mcl_clip.config import EvalConfig, MachineConfig
from mcl_clip.data.index import OLD_RULE, ShardIndex
from mcl_clip.eval.classification import ClassificationTask, MultilabelTask
from mcl_clip.eval.retrieval import RetrievalTask
from mcl_clip.runs import context
from mcl_clip.runs.context import RunContext, load_index, open_tasks
from mcl_clip.train.interrupt import Interrupt, PlannedStop
from tests.unit.data.tars import pairs, write_tar
from tests.unit.eval.sets import write_classification, write_image_folder, write_multilabel, write_retrieval

STAGE = StageConfig(train=TrainConfig(steps=1, global_batch_size=8, lr=1.0))


@pytest.fixture
def root(tmp_path):
    write_classification(tmp_path / "birds", [0, 1, 2])
    write_multilabel(tmp_path / "voc", [[1, 0], [0, 1]], ("a", "b"))
    write_retrieval(tmp_path / "photos", 4)
    write_image_folder(tmp_path / "animals", {"owl": 2, "bee": 1})
    return tmp_path


def opened(**sets):
    config = RunConfig(
        run_dir=Path("run"), tower=TowerConfig(architecture="ViT-B-32"), stages=(STAGE,), eval=EvalConfig(**sets)
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
    run = SimpleNamespace(config=SimpleNamespace(machine=machine, behavior="0.7"))
    for node, folder in ((0, tmp_path), (8, tmp_path / "node-8")):
        monkeypatch.setattr(context, "place_on_node", lambda node=node: (node, True))
        assert RunContext.reader(run, ShardIndex.__new__(ShardIndex)).cache.folder == folder


def load(tmp_path, behavior="0.7", interrupt=None, **data):
    """The index of the shard a.tar for a run with these settings."""
    config = RunConfig(
        run_dir=tmp_path / "run",
        data=DataConfig(**{"train": (str(tmp_path / "a.tar"),), **data}),
        tower=TowerConfig(architecture="ViT-B-32"),
        stages=(STAGE,),
        behavior=behavior,
    )
    return load_index(config, interrupt)[0]


def test_captions_come_from_the_member_of_the_key_and_are_printed(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    texts = {"txt": b"alt", "json": json.dumps({"caption": "alt", "re_caption": "better"}).encode()}
    write_tar(tmp_path / "a.tar", [("a.jpg", b"1"), *((f"a.{name}", text) for name, text in texts.items())])
    assert load(tmp_path).text_format.tolist() == [0]
    assert "index: 1 rows; captions: 1 .txt" in caplog.text
    assert load(tmp_path, caption_key="re_caption").text_format.tolist() == [1]  # the stored index is made anew
    assert "index: 1 rows; captions: 1 .json (key 're_caption')" in caplog.text
    assert load(tmp_path, behavior="0.6", caption_key="re_caption").text_format.tolist() == [0]
    with pytest.raises(UserError, match="no 'nowhere' among the keys 'caption', 're_caption'"):
        load(tmp_path, caption_key="nowhere")


def test_a_key_without_json_members(tmp_path):
    write_tar(tmp_path / "a.tar", pairs(3))
    with pytest.raises(UserError, match=r"--data\.caption-key x is a key of .* captions of all 3 samples are 3 \.txt"):
        load(tmp_path, caption_key="x")
    with pytest.raises(
        UserError, match=r"--data\.negatives-key x is a key of .* captions of all 3 samples are 3 \.txt"
    ):
        load(tmp_path, negatives_key="x")


def test_captions_come_from_the_json_with_their_wrong_ones(tmp_path):
    texts = {"txt": b"alt", "json": json.dumps({"caption": "alt", "wrong": ["tla"]}).encode()}
    write_tar(tmp_path / "a.tar", [("a.jpg", b"1"), *((f"a.{name}", text) for name, text in texts.items())])
    assert load(tmp_path, negatives_key="wrong").text_format.tolist() == [1]


def test_too_many_samples_without_image_or_caption_are_refused_before_training(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    bad = [("n.jpg", b"1"), ("n.txt", b" "), ("m.img", b"1"), ("m.txt", b"x")]
    write_tar(tmp_path / "a.tar", [*pairs(98), *bad])
    assert len(load(tmp_path, max_bad_fraction=0.02)) == 98
    assert "index: left out: 1 empty_caption (n.jpg, n.txt), 1 missing_image (m.img, m.txt)" in caplog.text
    sentence = (
        r"^2 of 100 samples of the shards are left out, more than --data\.max-bad-fraction 0\.01 allows: "
        r"1 empty_caption .*, 1 missing_image .*; mend the shards, say where images and captions are .*, or raise the"
    )
    with pytest.raises(UserError, match=sentence):
        load(tmp_path)
    assert len(load(tmp_path, behavior="0.6")) == 99


@pytest.mark.parametrize("behavior", ["0.6", "0.7"])
def test_only_runs_of_earlier_versions_split_every_txt_into_lines(tmp_path, behavior):
    write_tar(tmp_path / "a.tar", [("a.jpg", b"1"), ("a.txt", b"one\ntwo")])
    index = load(tmp_path, behavior=behavior)
    run = SimpleNamespace(config=SimpleNamespace(machine=MachineConfig(), behavior=behavior))
    ((_, form),) = RunContext.reader(run, index).read_texts(np.array([0]))
    assert form == ("lines" if behavior == "0.6" else "txt")


def test_a_run_of_an_earlier_version_keeps_its_index(tmp_path):
    write_tar(tmp_path / "a.tar", [*pairs(3), ("n.jpg", b"1"), ("n.txt", b" ")])
    before = load(tmp_path, behavior="0.6")
    assert before.rule == OLD_RULE
    stored = tmp_path / "run/index/index.arrow"
    changed = stored.stat().st_mtime_ns
    assert load(tmp_path, behavior="0.6").digest == before.digest
    assert stored.stat().st_mtime_ns == changed
    assert len(load(tmp_path, max_bad_fraction=1.0)) == 3


def test_members_of_other_names(tmp_path):
    write_tar(tmp_path / "a.tar", [("a.v1.img", b"1"), ("a.v1.cap", b"x"), ("b.v2.img", b"1"), ("b.v2.cap", b"x")])
    index = load(tmp_path, image_member=".IMG", text_member="cap")
    assert [index.key(row) for row in range(len(index))] == ["a.v1", "b.v2"]


def test_a_stop_while_shards_are_indexed_keeps_what_was_done(tmp_path, monkeypatch):
    for number in range(5):
        write_tar(tmp_path / f"shards/{number}.tar", pairs(3, prefix=f"s{number}"))
    interrupt = Interrupt()
    monkeypatch.setattr(interrupt, "noticed", lambda: setattr(interrupt, "_signal", signal.SIGTERM) or True)
    monkeypatch.setenv("WORLD_SIZE", "2")  # a single process stops at once
    with pytest.raises(PlannedStop, match="stopped by SIGTERM: what is finished is kept; the same command continues"):
        load(tmp_path, interrupt=interrupt, train=(str(tmp_path / "shards"),))
    (part,) = (tmp_path / "run/index/parts").glob("*.arrow")
    assert len(ShardIndex.load(part)) == 3
    assert len(load(tmp_path, train=(str(tmp_path / "shards"),))) == 15
    assert [path.name for path in (tmp_path / "run/index").iterdir()] == ["index.arrow"]
