"""What a stage is checked for before it trains."""

import json
import logging
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
from torch import nn

from mcl_clip.core.errors import UserError
from mcl_clip.data.index import ShardIndex
from mcl_clip.data.reader import Reader
from mcl_clip.model.clip import ClipBundle
from mcl_clip.runs.context import RunContext
from mcl_clip.runs.negatives import (
    check_negatives,
    read_similarity_features,
    similarity_path,
    write_similarity_features,
)
from tests.unit.data.tars import write_tar

ENCODERS = open_clip.CLIP.__new__(open_clip.CLIP)


def reader_of(tmp_path, texts) -> Reader:
    members = [
        member
        for row, text in enumerate(texts)
        for member in ((f"{row}.jpg", b"1"), (f"{row}.json", json.dumps({"caption": "one", **text}).encode()))
    ]
    return Reader(ShardIndex.build([str(write_tar(tmp_path / "a.tar", members))]))


def test_wrong_captions_are_looked_for_before_a_stage_trains(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    reader = reader_of(tmp_path, [{"wrong": "two"}, {"wrong": ["three", "four", ""]}, {}, {"wrong": 5}])
    check_negatives(ENCODERS, reader, "wrong")
    assert "wrong captions: 0.8 per sample, in 4 samples looked at" in caplog.text
    with pytest.raises(UserError, match=r"^--data\.negatives-key worng: none of 4 samples looked at has a text or"):
        check_negatives(ENCODERS, reader, "worng")


def test_models_that_take_a_caption_for_each_image_are_refused(tmp_path):
    with pytest.raises(
        UserError, match=r"^--data\.negatives-key wrong needs towers .*, which Identity does not; leave"
    ):
        check_negatives(nn.Identity(), reader_of(tmp_path, [{"wrong": "two"}]), "wrong")


NO_MODEL = ClipBundle.__new__(ClipBundle)  # stages after the first embed nothing
FEATURES = {name: np.random.default_rng(len(name)).random((30, 4)).astype(np.float16) for name in ("text", "image")}


class Table:
    """Features of 30 rows under the stage before."""

    def __len__(self) -> int:
        return 30

    def rows(self, start: int, stop: int, side: str) -> np.ndarray:
        return FEATURES[side][start:stop]


def run_with(tmp_path, **train) -> RunContext:
    """A run whose stage 2 has these settings, after a stage with the features of `Table`."""
    stage = SimpleNamespace(train=SimpleNamespace(**{"mask_similar": 0.5, "similar_by": "text", **train}))
    config = SimpleNamespace(run_dir=tmp_path, stages=[None, None, stage])
    (tmp_path / "index").mkdir(exist_ok=True)
    run = RunContext.__new__(RunContext)
    vars(run).update(config=config, embeddings={1: Table()}.__getitem__)
    return run


@pytest.mark.parametrize("side", ["text", "image"])
@pytest.mark.parametrize("row_map", [None, np.random.default_rng(0).permutation(30)], ids=["rows", "resharded"])
def test_similarity_is_that_of_the_stage_before_in_the_order_of_the_rows(tmp_path, monkeypatch, side, row_map):
    monkeypatch.setattr("mcl_clip.stages.kmeans.CHUNK_ROWS", 7)
    run = run_with(tmp_path, similar_by=side)
    write_similarity_features(run, 2, NO_MODEL, row_map)
    expected = FEATURES[side] if row_map is None else FEATURES[side][row_map]
    np.testing.assert_array_equal(read_similarity_features(run, 2, 30), expected)
    with pytest.raises(UserError, match=r"similarity-stage-2\.npy does not hold the features of 31 rows .*; delete it"):
        read_similarity_features(run, 2, 31)


def test_nothing_is_written_unless_it_is_asked_for(tmp_path):
    run = run_with(tmp_path, mask_similar=0)
    write_similarity_features(run, 2, NO_MODEL, None)
    assert not similarity_path(run, 2).exists()
    assert read_similarity_features(run, 2, 30) is None
