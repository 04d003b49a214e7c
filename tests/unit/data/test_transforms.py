import io

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from mcl_clip.data.decode import BadSampleError, Jpeg, TrainTransform, evaluation_transform, open_jpeg, train_transform
from mcl_clip.model import clip
from mcl_clip.model.clip import to_floats

MEAN, STD = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def ramp(width: int = 64, height: int = 48) -> Image.Image:
    """Red is the column, green the row: pixels tell where they come from."""
    column, row = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([column, row, 0 * row], axis=2).astype(np.uint8))


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(50, 37), (20, 20), (3, 90), (21, 64), (224, 224)])
def test_pixels_and_floats_are_those_of_open_clip(mode, interpolation, size):
    for target in (32, (24, 32)):
        if mode == "longest" and target != 32:
            continue
        cfg = {"size": target, "interpolation": interpolation, "resize_mode": mode, "mean": MEAN, "std": STD}
        options = {name: value for name, value in cfg.items() if name != "size"}
        expected = open_clip.image_transform(target, is_train=False, **options)(noise(*size))
        pixels = evaluation_transform(cfg)(noise(*size))
        assert pixels.dtype == torch.uint8
        assert torch.equal(to_floats(pixels[None], cfg)[0], expected)


def test_grey_and_transparent_pictures_are_as_in_open_clip():
    cfg = {"size": 16, "mean": MEAN, "std": STD}
    for mode in ("L", "RGBA", "P"):
        image = noise(40, 30).convert(mode)
        expected = open_clip.image_transform(16, is_train=False, mean=MEAN, std=STD)(image)
        assert torch.equal(to_floats(evaluation_transform(cfg)(image)[None], cfg)[0], expected)


@pytest.mark.parametrize("size", [(64, 48), (48, 64), (5, 200), (200, 5), (1, 1), (1, 50), (7, 9)])
@pytest.mark.parametrize(("scale", "ratio"), [((0.9, 1.0), (3 / 4, 4 / 3)), ((0.05, 1), (0.5, 2)), ((1, 1), (1, 1))])
def test_crops_stay_in_the_picture_and_obey_scale_and_ratio(size, scale, ratio):
    transform, (width, height) = TrainTransform(size_px=(8, 8), scale=scale, ratio=ratio), size
    chances = np.random.default_rng(0)
    for _ in range(200):
        left, upper, right, lower = transform._crop(width, height, chances.random(32))
        assert 0 <= left < right <= width
        assert 0 <= upper < lower <= height
        w, h = right - left, lower - upper
        if ratio[0] <= width / height <= ratio[1]:
            rounding = (w + 0.5) * (h + 0.5) / (w * h)
            assert scale[0] / rounding - (w + h + 1) / (2 * width * height) <= w * h / (width * height)
            assert w * h / (width * height) <= scale[1] * rounding
        if min(w, h) > 1 and ratio[0] < ratio[1]:
            assert ratio[0] * (1 - 1 / w - 1 / h) <= w / h <= ratio[1] * (1 + 1 / w + 1 / h)


def test_crops_use_the_whole_range():
    transform, draw = TrainTransform(size_px=(8, 8), scale=(0.2, 1.0)), np.random.default_rng(0)
    boxes = np.array([transform._crop(100, 100, draw.random(32)) for _ in range(1000)])
    share = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) / 10_000
    shape = (boxes[:, 2] - boxes[:, 0]) / (boxes[:, 3] - boxes[:, 1])
    assert share.min() < 0.22
    assert share.max() > 0.9
    assert shape.min() < 0.8
    assert shape.max() > 1.25
    assert boxes[:, :2].min() == 0
    assert boxes[:, 2:].max() == 100


def test_a_draw_depends_on_its_name_alone():
    transform = TrainTransform(size_px=(16, 12), scale=(0.3, 0.6), horizontal_flip=0.5)
    state = torch.get_rng_state()
    one = transform(ramp(), 7, 1, "augment")
    transform(ramp(), 8, 1, "augment")
    assert one.shape == (3, 16, 12)
    assert torch.equal(transform(ramp(), 7, 1, "augment"), one)
    assert not torch.equal(transform(ramp(), 8, 1, "augment"), one)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(("probability", "low", "high"), [(0.0, 0, 0), (0.5, 70, 130), (1.0, 200, 200)])
def test_flips_come_with_their_probability(probability, low, high):
    transform = TrainTransform(size_px=(12, 12), horizontal_flip=probability)
    flips = sum(bool(pixels[0, 5, 0] > pixels[0, 5, -1]) for pixels in (transform(ramp(), n) for n in range(200)))
    assert low <= flips <= high


def test_a_picture_that_is_kept_whole_is_resized_as_pillow_does():
    transform = TrainTransform(size_px=(20, 30), scale=(1, 1), ratio=(64 / 48, 64 / 48))
    expected = np.asarray(ramp().resize((30, 20), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    np.testing.assert_array_equal(transform(ramp(), 0).numpy(), expected)


def test_size_and_interpolation_are_the_towers():
    cfg = {"size": 32, "interpolation": "bilinear", "mean": MEAN, "std": STD}
    assert train_transform(cfg, scale=(0.4, 1.0)) == TrainTransform(
        size_px=(32, 32), scale=(0.4, 1.0), interpolation="bilinear"
    )
    assert train_transform({**cfg, "size": (24, 32)}).size_px == (24, 32)


def smooth(width: int, height: int) -> Image.Image:
    """Broad waves of colour: what a reduced picture keeps."""
    column, row = np.meshgrid(np.arange(width) / width, np.arange(height) / height)
    waves = np.stack([np.sin(9 * column + row), np.cos(7 * row), np.sin(5 * (row - column))], axis=2)
    return Image.fromarray((127 + 100 * waves).astype(np.uint8))


def jpeg(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **{"quality": 92, **options})
    return buffer.getvalue()


def both(data: bytes, *name, **options):
    """The pixels of a file, fast and exact, as whole numbers."""
    return [
        TrainTransform(size_px=(32, 32), jpeg=how, **options).decode(data, *name).int() for how in ("fast", "exact")
    ]


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("size", [(32, 32), (40, 50), (256, 192), (700, 500), (33, 900)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_fast_pixels_are_near_exact_ones_for_every_crop(mode, size, interpolation):
    data = jpeg(smooth(*size).convert(mode))
    for draw in range(10):
        options = {"scale": (0.3, 1.0), "horizontal_flip": 0.5, "interpolation": interpolation}
        fast, exact = both(data, "crop", draw, **options)
        assert (fast - exact).abs().float().mean() < 3  # a crop begins at a whole pixel of the reduced picture
        assert (fast - exact).abs().max() < 16  # an edge of a reduced picture


def test_a_picture_of_the_right_size_is_not_changed():
    data = jpeg(smooth(32, 32))
    fast, exact = both(data, scale=(1, 1), ratio=(1, 1))
    assert torch.equal(fast, exact)


@pytest.mark.parametrize(("size", "decoded"), [((64, 64), 32), ((63, 63), 63), ((256, 256), 32), ((200, 200), 50)])
def test_pictures_are_reduced_to_no_less_than_the_result(size, decoded):
    assert open_jpeg(jpeg(smooth(*size))).pixels(min_width=32, min_height=32).shape == (decoded, decoded, 3)


def test_a_small_crop_of_a_large_picture_keeps_its_detail(monkeypatch):
    sizes = []
    pixels = Jpeg.pixels

    def watched(self, **limits):
        sizes.append(pixels(self, **limits).shape[0])
        return pixels(self, **limits)

    monkeypatch.setattr(Jpeg, "pixels", watched)
    data = jpeg(smooth(512, 512))
    TrainTransform(size_px=(32, 32), scale=(0.01, 0.01), ratio=(1, 1)).decode(data)
    TrainTransform(size_px=(32, 32), scale=(1, 1), ratio=(1, 1)).decode(data)
    assert sizes == [512, 64]


def test_what_the_fast_decoder_does_not_take_goes_to_pillow():
    cmyk = jpeg(smooth(40, 40).convert("CMYK"))
    buffer = io.BytesIO()
    smooth(40, 40).save(buffer, "PNG")
    trailing = jpeg(smooth(40, 40)) + b"rubbish"
    for data in (cmyk, buffer.getvalue(), trailing):
        fast, exact = both(data, "one")
        assert (fast - exact).abs().max() <= 3
    assert open_jpeg(cmyk) is open_jpeg(buffer.getvalue()) is None


def test_damaged_pictures_are_refused_alike():
    data = jpeg(smooth(64, 64))
    cases = {
        "cut": (data[: len(data) // 2], {}, "broken_image"),
        "start": (data[:40], {}, "broken_image"),
        "pixels": (data, {"max_pixels": 1000}, "too_many_pixels"),
        "narrow": (jpeg(smooth(3, 900)), {}, "too_narrow"),
        "none": (b"", {}, "not_an_image"),
    }
    for data, limits, reason in cases.values():
        for how in ("fast", "exact"):
            with pytest.raises(BadSampleError) as error:
                TrainTransform(size_px=(8, 8), jpeg=how).decode(data, **limits)
            assert error.value.reason == reason, how


@pytest.mark.parametrize("ratio", [0.1, 10.0])
def test_a_narrow_crop_keeps_its_detail_too(ratio):
    data = jpeg(noise(512, 512), quality=95)
    options = {"scale": (0.1, 0.1), "ratio": (ratio, ratio)}  # 51 x 512 pixels, or the other way
    fast, exact = both(data, "narrow", **options)
    assert (fast - exact).abs().float().mean() < 3


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if (name := function.overloadpacket.__name__) in ("sub_", "div_"):
            self.found.append((name, arguments[1]))
        return function(*arguments, **(options or {}))


def test_floats_on_a_device_are_computed_in_the_order_of_those_on_the_cpu():
    """The device has no values here, but it sees by what it subtracts and divides."""
    cfg, device = {"mean": (0.5, 0.4, 0.3), "std": (0.3, 0.2, 0.25)}, torch.device("meta")
    mean, std = (clip._per_channel(cfg[name], device) for name in ("mean", "std"))
    with Operations() as operations:
        to_floats(torch.zeros(2, 3, 4, 4, dtype=torch.uint8, device=device), cfg)
    (first, subtracted), (second, divisor) = operations.found
    assert (first, second) == ("sub_", "div_")
    assert subtracted is mean
    assert divisor is std
    for name, values in (("mean", mean), ("std", std)):
        assert values.shape == (3, 1, 1)
        assert clip._per_channel(cfg[name], torch.device("cpu")).flatten().tolist() == pytest.approx(cfg[name])
