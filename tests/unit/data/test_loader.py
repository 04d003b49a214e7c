import io
import json
import re
import time
from dataclasses import fields
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

import mcl_clip.data.loader as loader_module
import mcl_clip.data.workers as workers_module
from mcl_clip.core.errors import UserError
from mcl_clip.data.batch_plan import FILLER, BatchPlan
from mcl_clip.data.batches import PairBatch
from mcl_clip.data.decode import TrainTransform, evaluation_transform, train_transform
from mcl_clip.data.features import ImageOutputs, TextFeatures
from mcl_clip.data.index import ShardIndex
from mcl_clip.data.loader import TrainingLoader, captioned_batches
from mcl_clip.data.reader import Reader
from mcl_clip.stages.embed import write_image_outputs, write_text_features
from tests.unit.data.tars import write_tar

ROWS, BATCH = 22, 5
reader_of = partial(Reader, captions_by_line=True)
BAD = {3: "broken_image", 9: "not_utf8", 16: "not_an_image"}
SIZE = (6, 8)
WRONG = {  # captions of rows with JSON: those after 8 bytes have the tokens of the first
    11: ["11 a", "11 b", "11 a", "11 c", "11 1"], 12: ["12 0    cut"], 13: "13 a", 14: [3],
}  # fmt: skip


def tokenize(texts: list[str]) -> torch.Tensor:
    """Eight bytes of each text, and padding."""
    return torch.tensor([[*text.encode().ljust(8)[:8], *[0] * 8] for text in texts])


def picture(row: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(row).integers(0, 256, (20, 30, 3), np.uint8)
    Image.fromarray(pixels).save(file, "PNG" if row % 2 else "JPEG")
    return file.getvalue()


def captions(row: int) -> list[str]:
    return [f"{row} {number}" for number in range(1 + row % 4)]


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    """22 rows in two shards, one with captions in JSON; rows 3, 9, 16 cannot be decoded, rows 20 and 21 are equal."""
    members = []
    for row in range(ROWS):
        source = min(row, 20)
        image, text = picture(source), "\n".join(captions(source)).encode()
        if row == 3:
            image = image[: len(image) // 2]
        if row == 16:
            image = b"rubbish" + image
        if row == 9:
            text = b"\xff\xfe"
        if 11 <= row < 15:
            members.append(
                [
                    (f"{row:04}.jpg", image),
                    (f"{row:04}.json", json.dumps({"caption": captions(row), "wrong": WRONG[row]}).encode()),
                ]
            )
        else:
            members.append([(f"{row:04}.jpg", image), (f"{row:04}.txt", text)])
    folder = tmp_path_factory.mktemp("shards")
    paths = [
        write_tar(folder / "a.tar", [member for sample in members[:12] for member in sample]),
        write_tar(folder / "b.tar", [member for sample in members[12:] for member in sample]),
    ]
    return ShardIndex.build([str(path) for path in paths])


def make(index: ShardIndex, *, seed: int = 0, stage: int = 0, **options) -> TrainingLoader:
    plan = BatchPlan(
        shard_of=index.shard_of, groups=np.zeros(ROWS, np.int64), global_batch_size=BATCH, seed=seed, stage=stage
    )
    options.setdefault("transform", TrainTransform(size_px=SIZE, scale=(0.5, 1.0), horizontal_flip=0.5))
    return TrainingLoader(plan, reader_of(index), tokenizer=tokenize, **options)


class Sums(nn.Module):
    """A text tower that shows which tokens it was given."""

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.stack([tokens.sum(1), tokens.square().sum(1)], dim=1).float()


def assert_equal(one: PairBatch, other: PairBatch) -> None:
    for field in fields(PairBatch):
        mine, theirs = getattr(one, field.name), getattr(other, field.name)
        assert torch.equal(mine, theirs) if isinstance(mine, torch.Tensor) else mine == theirs, field.name


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker")
@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing(index, workers):
    alone, shared = make(index).steps(0, 12), make(index, num_workers=workers, prefetch_batches=2).steps(0, 12)
    for one, other in zip(alone, shared, strict=True):
        assert_equal(one, other)


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker")
@pytest.mark.parametrize("workers", [0, 3])
def test_parts_are_joined_to_the_same_batches(index, workers, monkeypatch):
    whole = list(make(index, short_texts=True).steps(0, 12))
    monkeypatch.setattr(loader_module, "PART_ROWS", 2)
    parts = list(make(index, short_texts=True, num_workers=workers, prefetch_batches=2).steps(0, 12))
    for one, other in zip(whole, parts, strict=True):
        assert_equal(one, other)
    tail = list(make(index, short_texts=True).steps(7, 12))
    for one, other in zip(whole[7:], tail, strict=True):
        assert_equal(one, other)


def test_short_texts_lose_padding_alone(index):
    for whole, short in zip(make(index).steps(0, 6), make(index, short_texts=True).steps(0, 6), strict=True):
        length = short.tokens.shape[1]
        assert length < whole.tokens.shape[1]
        assert torch.equal(short.tokens, whole.tokens[:, :length])
        assert not whole.tokens[:, length:].any()
        assert torch.equal(short.text_ids, whole.text_ids)


def test_features_of_the_same_captions_take_the_place_of_tokens(index, tmp_path):
    write_text_features(
        lambda tokens: F.normalize(Sums().encode_text(tokens), dim=1),
        index,
        batches=lambda grid: captioned_batches(reader_of(index), grid, transform=None, tokenizer=tokenize),
        dim=2,
        out=tmp_path,
        batch_size=4,
        show_progress=False,
    )
    texts = TextFeatures(tmp_path, index, 2)
    plain = make(index).steps(0, 12)
    cached = make(index, texts=texts, num_workers=1).steps(0, 12)
    for one, other in zip(plain, cached, strict=True):
        assert torch.equal(one.text_ids, other.text_ids)
        assert torch.equal(one.images, other.images)
        assert other.tokens.shape == (len(one.tokens), 0)
        torch.testing.assert_close(other.text_features, F.normalize(Sums().encode_text(one.tokens), dim=1))
        assert one.bad == other.bad


PREPROCESS = {"size": SIZE, "mean": (0, 0, 0), "std": (1, 1, 1)}


def colors(pixels: torch.Tensor) -> torch.Tensor:
    """Stand-in for the frozen part of an image tower."""
    return pixels.float().mean((2, 3))


@pytest.fixture
def stored(index, tmp_path):
    """Stored outputs of two views of each image and of all captions, and the transform that draws the views."""
    transform = train_transform(PREPROCESS, views=2, scale=(0.3, 0.6))
    read = partial(captioned_batches, reader_of(index), name=(0, 0))
    common = {"batch_size": 4, "show_progress": False}
    for view in range(2):
        batches = partial(read, transform=transform, tokenizer=None, view=view)
        write_image_outputs(colors, index, batches=batches, shape=(3,), out=tmp_path / f"v{view}", **common)
    batches = partial(read, transform=None, tokenizer=tokenize)
    write_text_features(Sums().encode_text, index, batches=batches, dim=2, out=tmp_path / "texts", **common)
    images = ImageOutputs(tmp_path, index, (3,), ["v0", "v1"])
    return transform, images, TextFeatures(tmp_path / "texts", index, 2, of_trunk=True)


@pytest.mark.parametrize("has_texts", [True, False])
@pytest.mark.parametrize("workers", [0, 1])
def test_stored_outputs_take_the_place_of_pixels_and_tokens(index, stored, has_texts, workers, monkeypatch):
    transform, images, texts = stored
    plain = list(make(index, transform=transform).steps(0, 12))
    if has_texts:  # then nothing is read from the shards
        monkeypatch.setattr(Reader, "_fetch", lambda *_: pytest.fail("a shard was read"))
    options = {"images": images, "texts": texts if has_texts else None, "num_workers": workers}
    for one, other in zip(plain, make(index, transform=transform, **options).steps(0, 12), strict=True):
        torch.testing.assert_close(other.images, colors(one.images))
        expected = Sums().encode_text(one.tokens) if has_texts else one.tokens
        assert torch.equal(other.tokens, expected)
        assert other.text_features is None
        for name in ("rows", "image_ids", "text_ids", "places", "bad"):
            mine, theirs = getattr(one, name), getattr(other, name)
            assert torch.equal(mine, theirs) if isinstance(mine, torch.Tensor) else mine == theirs, name


def test_stored_outputs_of_all_captions(index, stored):
    _, images, texts = stored
    grid = [np.arange(0, 7), np.array([3]), np.arange(7, ROWS)]
    read = partial(captioned_batches, reader_of(index), grid, tokenizer=tokenize)
    evaluation = evaluation_transform(PREPROCESS)
    for one, other in zip(read(transform=evaluation), read(transform=None, images=images, texts=texts), strict=True):
        for name in ("rows", "image_ids", "text_ids", "caption_of"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name
        assert one.bad == other.bad
        if len(one.rows):
            torch.testing.assert_close(other.images, colors(one.images))
            assert torch.equal(other.tokens, Sums().encode_text(one.tokens))


def test_outputs_of_zeros_are_no_padding(index, stored, monkeypatch):
    _, images, texts = stored
    take = texts.take_all
    monkeypatch.setattr(texts, "take_all", lambda rows: F.pad(take(rows), (0, 14)))
    options = {"transform": None, "images": images, "texts": texts, "short_texts": True}
    (batch,) = captioned_batches(reader_of(index), [np.arange(3)], tokenizer=tokenize, **options)
    assert batch.tokens.shape == (len(batch.caption_of), 16)


def test_a_batch_without_a_decoded_row_has_one_output_of_zeros(index, stored):
    transform, images, texts = stored
    groups = np.where(np.isin(np.arange(ROWS), list(BAD)), 0, -1)
    plan = BatchPlan(shard_of=index.shard_of, groups=groups, global_batch_size=BATCH, seed=0, stage=0)
    options = {"transform": transform, "tokenizer": tokenize, "images": images, "texts": texts}
    (batch,) = TrainingLoader(plan, reader_of(index), **options).steps(0, 1)
    assert {bad.row: bad.reason for bad in batch.bad} == BAD
    assert (batch.images.tolist(), batch.tokens.tolist()) == ([[0.0] * 3], [[0.0] * 2])


def test_fixed_views_are_seen_in_turn(index):
    transform = train_transform(PREPROCESS, views=3, scale=(0.3, 0.6))
    seen = [drawn(index, epoch, transform=transform) for epoch in range(6)]
    row = 1
    pixels = [one[row][1] for one in seen]
    assert pixels[:3] == pixels[3:]
    assert len(set(pixels)) == 3
    (batch,) = captioned_batches(
        reader_of(index), [np.array([row])], transform=evaluation_transform(PREPROCESS), tokenizer=tokenize
    )
    assert pixels[2] == batch.images[0].numpy().tobytes()  # row 1 has the view of the evaluation in epoch 2
    others = [one[2][1] for one in seen]
    assert others[1] != others[0] == others[3]
    alone = train_transform(PREPROCESS, views=1, scale=(0.3, 0.6))
    assert drawn(index, 0, transform=alone)[row][1] == drawn(index, 4, transform=alone)[row][1] == pixels[2]


def test_wrong_captions_are_drawn_anew_in_each_epoch_and_those_that_are_none_are_marked(index, monkeypatch):
    options = {"negatives_key": "wrong", "num_negatives": 2, "short_texts": True}

    def drawn(**more) -> dict[int, list[set[str]]]:
        found: dict[int, list[set[str]]] = {}
        for batch in make(index, **options, **more).steps(0, 40):
            assert batch.negative_tokens.shape == (len(batch.tokens), 2, batch.tokens.shape[1])
            for row, texts, is_negative in zip(
                batch.rows[batch.places].tolist(), batch.negative_tokens, batch.is_negative, strict=True
            ):
                kept = {bytes(text.tolist()).rstrip(b"\0 ").decode() for text in texts[is_negative]}
                assert len(kept) == is_negative.sum()
                found.setdefault(row, []).append(kept)
        return found

    found = drawn()
    assert 14 not in found  # what is no text makes the sample a bad one
    assert {row: set.union(*kept) for row, kept in found.items() if set.union(*kept)} == {
        11: {"11 a", "11 b", "11 c"},  # not 11 1, which is a caption of the row
        13: {"13 a"},
    }
    assert {len(kept) for kept in found[11]} == {2}
    assert len({tuple(sorted(kept)) for kept in found[11]}) == 3
    assert found == drawn(num_workers=1)
    assert {row: kept[:1] for row, kept in drawn(seed=1).items()} != {row: kept[:1] for row, kept in found.items()}
    plain = list(make(index).steps(0, 40))
    monkeypatch.setattr(loader_module, "PART_ROWS", 2)
    assert found == drawn()
    for one, other in zip(make(index, **options).steps(0, 40), plain, strict=True):
        assert torch.equal(one.text_ids, torch.where(one.rows == other.rows, other.text_ids, 0))


def test_a_batch_of_fillers_has_no_wrong_caption(index):
    plan = make(index).plan
    groups = np.where(np.isin(np.arange(ROWS), list(BAD)), 0, -1)
    plan = BatchPlan(shard_of=index.shard_of, groups=groups, global_batch_size=BATCH, seed=0, stage=0)
    (batch,) = TrainingLoader(
        plan, reader_of(index), transform=TrainTransform(size_px=SIZE), tokenizer=tokenize, num_negatives=3
    ).steps(0, 1)
    assert batch.negative_tokens.shape == (1, 3, 16)
    assert batch.is_negative.tolist() == [[False] * 3]


@pytest.mark.parametrize("start", [1, 5, 7])
def test_a_start_at_a_later_step_gives_the_tail(index, start):
    whole = list(make(index).steps(0, 11))
    tail = list(make(index, num_workers=1).steps(start, 11))
    assert [batch.step for batch in tail] == list(range(start, 11))
    for one, other in zip(whole[start:], tail, strict=True):
        assert_equal(one, other)


def test_bad_samples_become_fillers_and_are_named(index):
    loader = make(index)
    batches = list(loader.steps(0, 5))
    rows = torch.cat([batch.rows for batch in batches])
    assert sorted(rows[rows >= 0].tolist()) == [row for row in range(ROWS) if row not in BAD]
    found = {bad.row: (Path(bad.shard).name, bad.reason) for batch in batches for bad in batch.bad}
    assert found == {3: ("a.tar", BAD[3]), 9: ("a.tar", BAD[9]), 16: ("b.tar", BAD[16])}
    for batch in batches:
        planned = torch.from_numpy(loader.plan.batch(batch.step))
        expected = planned.where(~torch.isin(planned, torch.tensor(list(BAD))), FILLER)
        assert torch.equal(batch.rows, expected)
        assert batch.places.tolist() == (expected != FILLER).nonzero()[:, 0].tolist()
        assert batch.images.shape == (len(batch.places), 3, *SIZE)
        assert not batch.text_ids[expected == FILLER].any()


def test_each_place_holds_its_own_row(index):
    for batch in make(index).steps(0, 5):
        for place, tokens in zip(batch.places.tolist(), batch.tokens, strict=True):
            source = min(int(batch.rows[place]), 20)
            assert bytes(tokens.tolist()).decode().strip(" \0") in captions(source)


def test_equal_images_and_captions_have_equal_ids(index):
    batches = list(make(index).steps(0, 10))
    images = {int(row): int(i) for b in batches for row, i in zip(b.rows, b.image_ids, strict=True) if row >= 0}
    assert images[20] == images[21]
    assert len(set(images.values())) == len(images) - 1
    texts = {
        (bytes(tokens.tolist()), int(batch.text_ids[place]))
        for batch in batches
        for place, tokens in zip(batch.places.tolist(), batch.tokens, strict=True)
    }
    assert len(texts) == len({text for text, _ in texts}) == len({number for _, number in texts})


def drawn(index: ShardIndex, epoch: int, **options) -> dict[int, tuple[bytes, bytes]]:
    """Caption and pixels of each row in an epoch."""
    return {
        int(batch.rows[place]): (bytes(tokens.tolist()), image.numpy().tobytes())
        for batch in make(index, **options).steps(5 * epoch, 5 * epoch + 5)
        for place, tokens, image in zip(batch.places.tolist(), batch.tokens, batch.images, strict=True)
    }


def test_captions_and_crops_are_drawn_anew_in_each_epoch_and_stage(index):
    first = drawn(index, 0)
    assert drawn(index, 0) == first
    for other in (drawn(index, 1), drawn(index, 0, seed=1), drawn(index, 0, stage=1)):
        several = [row for row in first if len(captions(min(row, 20))) > 1]
        assert any(other[row][0] != first[row][0] for row in several)
        assert sum(other[row][1] != first[row][1] for row in first) > 15
    seen = {drawn(index, epoch)[7][0] for epoch in range(20)}
    assert len(seen) == 4  # row 7 has four captions


def test_a_batch_without_a_decoded_row_has_one_black_picture(index):
    plan = make(index).plan
    plan.groups = np.where(np.isin(np.arange(ROWS), list(BAD)), 0, -1)
    plan = BatchPlan(shard_of=index.shard_of, groups=plan.groups, global_batch_size=BATCH, seed=0, stage=0)
    loader = TrainingLoader(plan, reader_of(index), transform=TrainTransform(size_px=SIZE), tokenizer=tokenize)
    (batch,) = loader.steps(0, 1)
    assert (batch.rows == FILLER).all()
    assert batch.images.shape == (1, 3, *SIZE)
    assert not batch.images.any()
    assert (len(batch.tokens), batch.places.tolist(), len(batch.bad)) == (1, [0], 3)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_global_generators_are_left_alone(index, workers):
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    list(make(index, num_workers=workers).steps(0, 2))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == np.random.get_state()[1].tolist()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_changed_shard_stops_with_one_sentence(index, tmp_path, workers):
    path = write_tar(
        tmp_path / "c.tar", [("0.jpg", picture(0)), ("0.txt", b"a"), ("1.jpg", picture(1)), ("1.txt", b"b")]
    )
    found = ShardIndex.build([str(path)])
    write_tar(path, [("x.jpg", picture(0)), ("x.txt", b"a"), ("1.jpg", picture(1)), ("1.txt", b"b")])
    plan = BatchPlan(shard_of=found.shard_of, groups=np.zeros(2, int), global_batch_size=2, seed=0, stage=0)
    options = {"transform": TrainTransform(size_px=SIZE), "tokenizer": tokenize, "num_workers": workers}
    with pytest.raises(UserError, match=r"^shard .*c.tar changed since it was indexed: it had 10240 bytes"):
        list(TrainingLoader(plan, reader_of(found), **options).steps(0, 1))


def test_captioned_batches_hold_all_captions_in_order(index):
    transform = evaluation_transform({"size": 8, "mean": (0, 0, 0), "std": (1, 1, 1)})
    grid = [np.arange(0, 7), np.array([3]), np.arange(7, ROWS)]
    for workers in (0, 2):
        batches = list(
            captioned_batches(reader_of(index), grid, transform=transform, tokenizer=tokenize, num_workers=workers)
        )
        assert [len(batch.rows) for batch in batches] == [6, 0, 13]
        for rows, batch in zip(grid, batches, strict=True):
            assert batch.rows.tolist() == [row for row in rows if row not in BAD]
            assert {bad.row: bad.reason for bad in batch.bad} == {row: BAD[row] for row in rows if row in BAD}
            texts = [bytes(tokens.tolist()).decode().strip(" \0") for tokens in batch.tokens] if len(batch.rows) else []
            assert texts == [text for row in batch.rows.tolist() for text in captions(min(row, 20))]
            assert batch.caption_of.tolist() == [
                place for place, row in enumerate(batch.rows.tolist()) for _ in captions(min(row, 20))
            ]
        assert batches[2].image_ids[-1] == batches[2].image_ids[-2]
        assert batches[2].text_ids[-1] == batches[2].text_ids[-2]


def refused(plan: BatchPlan, index: ShardIndex) -> str:
    try:
        TrainingLoader(plan, reader_of(index), transform=TrainTransform(size_px=SIZE), tokenizer=tokenize)
    except UserError as error:
        return str(error)
    return ""


def test_a_batch_that_does_not_divide_is_refused(index, pool):
    message = "a global batch of 5 rows is not divisible by 2 processes; use a multiple of 2"
    assert pool.run(refused, 2, make(index).plan, index) == [message] * 2


def local_batches(index: ShardIndex) -> list[PairBatch]:
    plan = BatchPlan(shard_of=index.shard_of, groups=np.zeros(ROWS, int), global_batch_size=4, seed=0, stage=0)
    loader = TrainingLoader(plan, reader_of(index), transform=TrainTransform(size_px=SIZE), tokenizer=tokenize)
    return list(loader.steps(0, 9))


def test_processes_hold_the_parts_of_the_same_batches(index, pool):
    (whole,) = pool.run(local_batches, 1, index)
    for size in (2, 4):
        for batch, *parts in zip(whole, *pool.run(local_batches, size, index), strict=True):
            for name in ("rows", "text_ids", "image_ids"):
                assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))
            images = torch.cat([part.images for part in parts if (part.rows >= 0).any()])
            assert torch.equal(images, batch.images)
            assert sorted(bad for part in parts for bad in part.bad) == sorted(batch.bad)


def test_a_read_that_does_not_end_names_process_rows_and_shards(index, monkeypatch):
    monkeypatch.setattr(workers_module, "POLL_S", 0.1)
    monkeypatch.setattr(Reader, "read", lambda *_: time.sleep(60))
    batches = make(index, num_workers=1, timeout_s=0.3).steps(0, 1)
    rows = make(index).plan.batch(0)
    shards = ", ".join(index.shards[number].url for number in np.unique(index.shard_of[rows]))
    reads = f"it reads rows {rows.min()} to {rows.max()} of {shards}:"
    sentence = f"loader process 0 has not delivered a batch for 0.3 s; {reads}"
    with pytest.raises(UserError, match=f"^{re.escape(sentence)}"):
        next(batches)
