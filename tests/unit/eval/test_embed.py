import io
import pickle
import time

import numpy as np
import pytest
import torch
from PIL import Image

from mcl_clip.core.errors import UserError
from mcl_clip.data import workers
from mcl_clip.eval.embed import Encoder, FileImages
from tests.unit.eval.sets import set_of


class MeanColour:
    """A model of the mean color of an image."""

    def encode_image(self, pixels):
        return pixels.mean((2, 3))


def transform(image):
    """Resize to 4 x 4 pixels."""
    return torch.from_numpy(np.array(image.resize((4, 4), Image.Resampling.BOX))).permute(2, 0, 1).float()


def embed(source, num_workers=0, **options):
    encoder = Encoder(
        model=MeanColour(),
        image_transform=transform,
        tokenizer=list,
        device=torch.device("cpu"),
        batch_size=3,
        num_workers=num_workers,
        **options,
    )
    return encoder.embed(set_of(source))["image"]


@pytest.fixture
def files(tmp_path):
    """Eight images: the left half in one color, the right half in another."""
    paths = []
    for number in range(8):
        image = Image.new("RGB", (20, 10), (10 * number, 0, 100))
        image.paste((0, 20 * number, 200), (10, 0, 20, 10))
        paths.append(tmp_path / f"picture {number}.{('png', 'webp')[number % 2]}")
        image.save(paths[-1], lossless=True)
    return tuple(paths)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_files_are_cut_to_their_boxes(files, num_workers):
    boxes = tuple((None, (0, 0, 10, 10), (10, 2, 10, 5))[number % 3] for number in range(8))
    features = embed(FileImages(files, boxes), num_workers=num_workers)
    left = [[10 * number, 0, 100] for number in range(8)]
    right = [[0, 20 * number, 200] for number in range(8)]
    both = [[5 * number, 10 * number, 150] for number in range(8)]
    expected = [(both, left, right)[number % 3][number] for number in range(8)]
    torch.testing.assert_close(features, torch.tensor(expected).float())


def test_files_without_boxes_are_whole(files):
    whole = embed(FileImages(files))
    assert torch.equal(whole, embed(FileImages(files, (None,) * 8)))
    torch.testing.assert_close(whole[4], torch.tensor([20.0, 40, 150]))


def test_beyond_the_border_a_box_is_black(files):
    (image,) = FileImages(files[:1], ((-5, 0, 10, 10),)).images(np.array([0]))
    assert image.size == (10, 10)
    assert [image.getpixel((x, 5)) for x in (4, 5)] == [(0, 0, 0), (0, 0, 100)]


def test_rows_come_in_the_order_asked_for(files):
    found = [image.getpixel((0, 0))[0] for image in FileImages(files).images(np.array([5, 0, 5, 2]))]
    assert found == [50, 0, 50, 20]


def test_files_can_be_pickled(files):
    source = FileImages(files, ((1, 1, 2, 2),) * 8)
    assert pickle.loads(pickle.dumps(source)) == source
    assert len(source) == 8


@pytest.mark.parametrize("box", [(20, 0, 5, 5), (0, 10, 5, 5), (-5, 0, 5, 5), (0, -5, 5, 5), (3, 3, 0, 2), (3, 3, 2, 0),
                                 (0, 0, 10_000, 10_000)])  # fmt: skip
def test_boxes_that_do_not_fit_are_named(files, box):
    with pytest.raises(UserError, match=r"the box \[.*\] .* does not fit .*picture 0.png, which has 20 x 10 pixels"):
        embed(FileImages(files[:1], (box,)))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_files_that_cannot_be_decoded_are_named(files, num_workers):
    buffer = io.BytesIO()
    Image.new("RGB", (5, 5)).save(buffer, "TIFF")
    files[6].write_bytes(buffer.getvalue())  # an image of an unsupported format
    with pytest.raises(UserError, match=r"^.*picture 6.png cannot be decoded \(format_tiff: .*\); restore the file$"):
        embed(FileImages(files), num_workers=num_workers)
    files[6].unlink()
    with pytest.raises(UserError, match=r"picture 6.png: there is no such file or folder; correct the path$"):
        embed(FileImages(files), num_workers=num_workers)


def test_other_storage_errors_are_a_users_error(files):
    files[2].unlink()
    files[2].mkdir()
    with pytest.raises(UserError, match="the same command continues when the storage answers"):
        embed(FileImages(files))


def test_a_loader_process_that_blocks_is_named(files, monkeypatch):
    monkeypatch.setattr(workers, "POLL_S", 0.1)
    monkeypatch.setattr(FileImages, "images", lambda *_: time.sleep(60))
    with pytest.raises(
        UserError, match=r"not delivered a batch for 0\.5 s; it reads images 0 to 2 of an evaluation set"
    ):
        embed(FileImages(files), num_workers=1, timeout_s=0.5)


def test_each_file_needs_a_box_or_none(files):
    with pytest.raises(ValueError, match="8 paths and 1 boxes"):
        FileImages(files, (None,))
