"""Views of images alone: drawn by name, switchable, the same with any number of loader processes."""

import io
from dataclasses import asdict, replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from mcl_clip.config import AugmentConfig
from mcl_clip.core.errors import UserError
from mcl_clip.data.batch_plan import FILLER, BatchPlan
from mcl_clip.data.decode import train_transform
from mcl_clip.data.index import ShardIndex
from mcl_clip.data.loader import TrainingLoader, content_id
from mcl_clip.data.reader import Reader
from mcl_clip.data.samples import IMAGES_ALONE
from mcl_clip.data.writing import LoneImage, write_images
from tests.unit.data.tars import write_tar

ROWS, BATCH, VIEWS = 13, 4, 2
BROKEN = 5
CFG = {"size": 24, "mean": [0.5] * 3, "std": [0.2] * 3, "interpolation": "bicubic"}
PLAIN = AugmentConfig(scale=(1, 1), ratio=(1, 1))
ON = {"jitter": (0.4, 0.4, 0.4, 0.2), "grayscale": 0.5, "blur": 0.5, "solarize": 0.5, "horizontal_flip": 0.5}


def picture(number: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (30, 30, 3), np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> ShardIndex:
    out = tmp_path_factory.mktemp("images") / "shards"
    write_images(
        (LoneImage(key=f"{row:03}", image=picture(row)) for row in range(ROWS)), out, samples_per_shard=7, total=ROWS
    )
    return ShardIndex.build([str(path) for path in sorted(out.glob("*.tar"))], rule=IMAGES_ALONE)


def make_loader(index: ShardIndex, augment: AugmentConfig, **options) -> TrainingLoader:
    plan = BatchPlan(
        shard_of=index.shard_of, groups=np.zeros(len(index), int), global_batch_size=BATCH, seed=0, stage=1
    )
    transform = train_transform(CFG, **asdict(augment))
    return TrainingLoader(plan, Reader(index), transform=transform, tokenizer=None, **{"num_views": VIEWS, **options})


def views_by_row(loader: TrainingLoader, steps: int = 8) -> dict[tuple[int, int], torch.Tensor]:
    """The views of each row in each epoch."""
    found = {}
    for batch in loader.steps(0, steps):
        assert batch.images.shape[1:] == (loader_views(loader), 3, 24, 24)
        assert batch.tokens.shape == (len(batch.images), 0)
        for place, images in zip(batch.places.tolist(), batch.images, strict=True):
            found[loader.plan.epoch_of(batch.step), int(batch.rows[place])] = images
    return found


def loader_views(loader: TrainingLoader) -> int:
    return loader._load.args[0].__self__.num_views


def test_views_are_drawn_by_seed_epoch_row_and_number(index):
    """Neither loader processes nor the rows of a batch change them; epochs, rows and views have their own."""
    augment = replace(AugmentConfig(scale=(0.3, 1)), **ON)
    alone, many = (views_by_row(make_loader(index, augment, num_workers=workers)) for workers in (0, 2))
    assert alone.keys() == many.keys() == {(epoch, row) for epoch in range(2) for row in range(ROWS)}
    assert all(torch.equal(alone[key], many[key]) for key in alone)
    digests = {(*key, view): images[view].numpy().tobytes() for key, images in alone.items() for view in range(VIEWS)}
    assert len(set(digests.values())) == len(digests)
    transform = train_transform(CFG, **asdict(augment))
    expected = transform.decode(picture(3), 0, 1, 1 * VIEWS + 1, 3, "augment")  # seed, stage, draw of epoch 1, row
    assert torch.equal(alone[1, 3][1], expected)


def test_three_views_and_equal_images(index):
    loader = make_loader(index, AugmentConfig(scale=(0.3, 1)), num_views=3)
    batch = next(loader.steps(0, 1))
    assert batch.images.shape == (BATCH, 3, 3, 24, 24)
    assert batch.image_ids.tolist() == [content_id(picture(row)) for row in batch.rows.tolist()]
    assert torch.equal(batch.text_ids, batch.image_ids)  # no row passes for a duplicate of another one by its text


@pytest.mark.parametrize("name", ["scale", *ON])
def test_each_augmentation_has_its_switch(index, name):
    """With only this one on, the views differ from the plain image, in the way that it says."""
    value = (0.2, 0.3) if name == "scale" else ON[name]
    on = replace(PLAIN, **{name: value}, **({"jitter_probability": 1.0} if name == "jitter" else {}))
    transform, plain = (train_transform(CFG, **asdict(augment)) for augment in (on, PLAIN))
    image = Image.open(io.BytesIO(picture(1)))
    expected, views = plain(image, 0), [transform(image, number) for number in range(12)]
    changed = [view for view in views if not torch.equal(view, expected)]
    assert len(changed) == 12 if name in ("scale", "jitter") else 2 <= len(changed) <= 10
    for view in changed:
        if name == "grayscale":
            assert torch.equal(view[0], view[1])
            assert torch.equal(view[1], view[2])
        elif name == "horizontal_flip":
            assert torch.equal(view, expected.flip(-1))
        elif name == "solarize":
            assert torch.equal(view, torch.where(expected >= 128, 255 - expected, expected))
        elif name == "blur":
            assert view.float().std() <= expected.float().std()
        elif name == "jitter":
            assert (view.float() - expected).abs().mean() > 1


@pytest.mark.parametrize("position", range(4))
def test_each_strength_of_the_jitter_acts_alone(position):
    strengths = [0.0] * 4
    strengths[position] = 0.5
    transform = train_transform(CFG, **asdict(replace(PLAIN, jitter=tuple(strengths), jitter_probability=1.0)))
    gray = Image.fromarray(np.full((30, 30, 3), 100, np.uint8))
    color = Image.fromarray(np.full((30, 30, 3), (200, 100, 50), np.uint8))
    seen = {transform(color, number)[:, 0, 0].numpy().tobytes() for number in range(6)}
    assert len(seen) > 1
    moved = max(int((transform(gray, number).int() - 100).abs().max()) for number in range(6))
    assert (moved <= 1) == (position > 0)  # only brightness changes an image of one gray, but for rounding


def test_a_broken_image_becomes_a_filler(tmp_path):
    members = [[(f"{row}.png", picture(row)[: 40 if row == BROKEN else None])] for row in range(8)]
    index = ShardIndex.build(
        [str(write_tar(tmp_path / "a.tar", [m for each in members for m in each]))], rule=IMAGES_ALONE
    )
    batches = list(make_loader(index, AugmentConfig()).steps(0, 2))
    assert [bad.row for batch in batches for bad in batch.bad] == [BROKEN]
    assert sorted(row for batch in batches for row in batch.rows.tolist()) == [FILLER, 0, 1, 2, 3, 4, 6, 7]


def test_captions_in_the_shards_are_left_unread(tmp_path):
    """A row is an image; what else a sample holds counts for nothing, nor does a sample without an image."""
    members = [("a.png", picture(0)), ("a.txt", b"\xff"), ("b.png", picture(1)), ("c.txt", b"a caption")]
    path = write_tar(tmp_path / "a.tar", members)
    index = ShardIndex.build([str(path)], rule=IMAGES_ALONE)
    assert [index.key(row) for row in range(len(index))] == ["a", "b"]
    assert index.skipped_by_reason() == {"missing_image": 1}
    assert index.text_counts() == "none are read"
    index.save(tmp_path / "index.arrow")
    loaded = ShardIndex.load(tmp_path / "index.arrow")
    reader = Reader(loaded)
    assert [(raw.image, raw.text, raw.text_format) for raw in reader.read(np.arange(2))] == [
        (picture(0), b"", ""), (picture(1), b"", "")
    ]  # fmt: skip
    assert reader.read_texts(np.arange(2)) == [(b"", "")] * 2
    assert [len(whole) for whole in reader.read_whole(np.arange(2))] == loaded.sample_size.tolist()


def test_shards_without_images_and_without_captions_say_what_to_do(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("a.txt", b"a caption")])
    with pytest.raises(UserError, match=r"has no sample with an image .* name the extension of images by"):
        ShardIndex.build([str(path)], rule=IMAGES_ALONE)
    path = write_tar(tmp_path / "b.tar", [("a.png", picture(0))])
    with pytest.raises(UserError, match=r"has no captions: 1 samples .* give --tower.image timm:NAME without"):
        ShardIndex.build([str(path)])


def test_writing_leaves_out_what_is_no_image(tmp_path, capfd):
    samples = [LoneImage(key=str(row), image=picture(row) if row else b"text") for row in range(4)]
    written = partial(write_images, samples, total=4)
    with pytest.raises(UserError, match="1 of 4 images are bad"):
        written(tmp_path / "strict")
    assert len(written(tmp_path / "loose", max_bad_fraction=0.5)) == 3
    assert "3 of 4 samples written (1 unreadable images)" in "".join(capfd.readouterr())
