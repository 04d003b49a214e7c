"""What a stage is checked for before it trains."""

import json
import logging

import open_clip
import pytest
from torch import nn

from mcl_clip.core.errors import UserError
from mcl_clip.data.index import ShardIndex
from mcl_clip.data.reader import Reader
from mcl_clip.runs.negatives import check_negatives
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
