"""Positions of pretrained towers for longer texts and other images."""

import open_clip
import pytest
import torch

from mcl_clip.config import TowerConfig
from mcl_clip.core.errors import UserError
from mcl_clip.model.clip import create_clip, load_clip, save_clip
from mcl_clip.model.positions import resize_grid, stretch_positions
from mcl_clip.model.prepare import reference_features
from mcl_clip.model.tower import create_tower
from mcl_clip.tools import doctor_data
from tests.parts import write_text_model

VIT = {"image_size": 32, "patch_size": 8, "layers": 1, "width": 32, "head_width": 16}
RESNET = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 32}
TEXT = {"context_length": 30, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
SHORT, LONG = "two dogs on a beach", "a very " * 40 + "long caption"


@pytest.fixture
def folder(tmp_path):
    """A function that saves a small model, as the pretrained one of a recipe."""

    def save(**changes):
        cfg = {"embed_dim": 24, "vision_cfg": VIT, "text_cfg": TEXT, **changes}
        save_clip(create_clip(model_cfg=cfg, seed=1), tmp_path / "base")
        return TowerConfig(architecture=f"local-dir:{tmp_path / 'base'}")

    return save


def changed(tower, **fields):
    return TowerConfig(architecture=tower.architecture, **fields)


def test_positions_are_those_of_long_clip():
    old = torch.randn(77, 8, generator=torch.Generator().manual_seed(0))
    new = torch.zeros(4 * 77 - 3 * 20, 8)  # from here on as in beichenzbc/Long-CLIP, model/longclip.py
    new[:20] = old[:20]
    for i in range(77 - 1 - 20):
        for part in range(4):
            new[4 * i + part + 20] = (4 - part) * old[i + 20] / 4 + part * old[i + 21] / 4
    for part in range(4):
        new[248 - 4 + part] = old[76] + part * (old[76] - old[75]) / 4
    torch.testing.assert_close(stretch_positions(old, 248), new, rtol=0, atol=1e-5)
    assert torch.equal(stretch_positions(old, 77), old)
    assert torch.equal(stretch_positions(old, 12), old[:12])
    line = torch.arange(6.0)[:, None].repeat(1, 2)  # fewer than are kept
    torch.testing.assert_close(stretch_positions(line, 9)[:, 0], torch.tensor([0, 1, 2, 3, 4, 4.4, 4.8, 5.2, 5.6]))


@pytest.mark.parametrize("custom", [{}, {"custom_text": True}])
def test_short_captions_keep_their_features_and_long_ones_are_read(folder, custom, tmp_path):
    base = create_tower(folder(**custom))
    clip = create_tower(changed(folder(**custom), context_length=70))
    short, long = ([each.model.eval().encode_text(each.tokenizer([text])) for each in (base, clip)]
                   for text in (SHORT, LONG))  # fmt: skip
    torch.testing.assert_close(*short)
    assert (long[0] - long[1]).abs().max() > 1e-3
    assert (clip.context_length, clip.tokenizer([LONG]).shape[1]) == (70, 70)
    assert clip.tokenizer([LONG])[0, 64] != 0  # base: cut off
    expected = reference_features(clip)
    save_clip(clip, tmp_path / "long")
    again = load_clip(tmp_path / "long")
    torch.testing.assert_close(reference_features(again), expected, rtol=0, atol=1e-6)
    assert again.context_length == 70
    plain, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'long'}")
    with torch.no_grad():
        tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'long'}")([LONG])
        torch.testing.assert_close(plain.eval().encode_text(tokens), clip.model.encode_text(clip.tokenizer([LONG])))


def test_random_positions_are_drawn():
    cfg = {"embed_dim": 24, "vision_cfg": VIT, "text_cfg": TEXT}
    clip = create_tower(TowerConfig(model=cfg, context_length=50), seed=2)
    expected = create_clip(model_cfg={**cfg, "text_cfg": {**TEXT, "context_length": 50}}, seed=2)
    assert torch.equal(clip.model.positional_embedding, expected.model.positional_embedding)
    assert cfg["text_cfg"]["context_length"] == 30


def test_texts_of_a_hugging_face_tower_have_a_limit(tmp_path):
    write_text_model(tmp_path / "words")
    text = {
        "context_length": 12,
        "hf_model_name": str(tmp_path / "words"),
        "hf_tokenizer_name": str(tmp_path / "words"),
    }
    model = {"embed_dim": 24, "vision_cfg": VIT, "text_cfg": text}
    assert create_tower(TowerConfig(model=model, context_length=20)).tokenizer(["a"]).shape == (1, 20)
    with pytest.raises(UserError, match="context-length 21 is more than the 20 tokens that the text tower takes"):
        create_tower(TowerConfig(model=model, context_length=21))


@pytest.mark.parametrize("size", [(48,), (32, 64)])
def test_images_of_another_size_have_the_positions_of_open_clip(folder, size, tmp_path):
    tower = folder()
    clip = create_tower(changed(tower, image_size=size))
    forced = size[0] if len(size) == 1 else size
    plain = open_clip.create_model(tower.architecture, force_image_size=forced)
    torch.testing.assert_close(clip.model.visual.positional_embedding, plain.visual.positional_embedding)
    assert (
        clip.preprocess_cfg["size"]
        == clip.model_cfg["vision_cfg"]["image_size"]
        == (48 if len(size) == 1 else [32, 64])
    )
    save_clip(clip, tmp_path / "other")
    again = load_clip(tmp_path / "other")
    torch.testing.assert_close(reference_features(again), reference_features(clip), rtol=0, atol=1e-6)
    # From a grid that is not square, which open_clip cannot do.
    once_more = create_tower(TowerConfig(architecture=f"local-dir:{tmp_path / 'other'}", image_size=(64, 32)))
    assert once_more.model.visual.positional_embedding.shape == (1 + 8 * 4, 32)
    reference_features(once_more)


def test_a_grid_is_resized_in_both_directions():
    rows = torch.arange(4.0)[:, None, None].expand(4, 2, 3)
    positions = torch.cat([torch.full((1, 3), 9.0), rows.reshape(8, 3)])
    resized = resize_grid(positions, (4, 2), (4, 6))
    assert torch.equal(resized[0], positions[0])
    torch.testing.assert_close(resized[1:].reshape(4, 6, 3), torch.arange(4.0)[:, None, None].expand(4, 6, 3))


def test_a_resnet_takes_other_squares(folder, tmp_path):
    tower = folder(vision_cfg=RESNET)
    clip = create_tower(changed(tower, image_size=(96,)))
    save_clip(clip, tmp_path / "other")
    torch.testing.assert_close(
        reference_features(load_clip(tmp_path / "other")), reference_features(clip), rtol=0, atol=1e-6
    )
    with pytest.raises(UserError, match="image-size 64 96: the ResNets of open_clip take square images only"):
        create_tower(changed(tower, image_size=(64, 96)))


def test_towers_of_timm_are_built_at_another_size():
    vision = {"image_size": 160, "timm_model_name": "test_efficientnet"}
    tower = TowerConfig(model={"embed_dim": 24, "vision_cfg": vision, "text_cfg": TEXT}, image_size=(64, 96))
    clip = create_tower(tower)
    assert clip.preprocess_cfg["size"] == clip.model_cfg["vision_cfg"]["image_size"] == [64, 96]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_size": (1, 2, 3)}, "is not a side, or height and width"),
        ({"image_size": (32,), "preprocess": {"size": 32}}, "are the same; give one of them"),
        ({"context_length": -1}, "context-length must be at least 0"),
        ({"image_size": (0,)}, "image-size must be at least 1"),
    ],
)
def test_impossible_sizes_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        TowerConfig(architecture="ViT-B-32", **fields)


def test_the_doctor_knows_length_and_size(tmp_path):
    cfg = {"embed_dim": 24, "vision_cfg": VIT, "text_cfg": TEXT}
    torch.save(create_clip(model_cfg=cfg).model.state_dict(), tmp_path / "all.pt")
    tower = TowerConfig(model=cfg, pretrained=str(tmp_path / "all.pt"), context_length=60, image_size=(32, 64))
    found = doctor_data.find_model_cfg(tower)
    assert (found["text_cfg"]["context_length"], found["vision_cfg"]["image_size"]) == (60, [32, 64])
    assert [each.level for each in doctor_data.check_weights(tower, found)] == ["ok"]
