"""Towers of every family keep their features when they are locked, synchronized, saved and loaded."""

import copy

import open_clip
import pytest
import torch
from torch import nn

from benchmarks import towers
from mcl_clip.core.errors import UserError
from mcl_clip.model.clip import create_clip
from mcl_clip.model.prepare import check_contract, lock, reference_features
from mcl_clip.runs import train_phase

LARGE = ("swin_tiny_patch4_window7_224", "vit_relpos_small_patch16_224", "vitamin_small_224")
FUSED = ("efficientnet_b0", "efficientnetv2_rw_t", "regnety_002", "tf_efficientnet_lite0", "vit_base_mci_224")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in LARGE else []) for name in towers.MEMBERS]
)
def test_features_stay(name, tmp_path):
    clip = towers.create(name, tmp_path / "text")
    changes = towers.compare(clip, tmp_path / "model")
    assert max(changes.values()) < 1e-5, changes
    clip = create_clip(model_cfg=clip.model_cfg)  # invented statistics amplify the rounding of float32
    expected = reference_features(clip)
    lock(clip.model, image_unlocked_groups=1, patterns=["^text_decoder"] if name == "coca" else [])
    check_contract(clip, expected, name=name, stage=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", open_clip.list_models())
def test_every_architecture_trains_as_a_whole_or_is_refused(name, tmp_path):
    """All of them are built at full size, without values; CoCa is refused until its decoder is locked."""
    record = towers.check_architecture(name, tmp_path)
    assert record["verdict"] == ("refused" if name.startswith("coca_") else "covered"), record
    if record["verdict"] == "refused":
        assert record["reason"].startswith(f"{name} cannot be trained as it is: ")


def test_layers_left_out_at_random_are_refused(tmp_path, monkeypatch):
    options = {**towers.HUGGING_FACE["m2m_100"], "encoder_layerdrop": 0.05}
    monkeypatch.setitem(towers.HUGGING_FACE, "m2m_100", options)
    clip = towers.create("m2m_100", tmp_path)
    expected = reference_features(clip)
    with pytest.raises(UserError, match=r"nllb leaves out layers at random in training \(layerdrop 0\.05\)"):
        check_contract(clip, expected, name="nllb", stage=0)
    lock(clip.model, text=True)
    check_contract(clip, expected, name="nllb", stage=0)


@torch.inference_mode()
def features(clip, images):
    model = copy.deepcopy(clip.model).double().eval()  # random deep towers amplify the rounding of float32
    return nn.functional.normalize(model.encode_image(images.double()))


def create(name, folder):
    clip = towers.create(name, folder)
    size = clip.preprocess_cfg["size"]
    return clip, torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["modified_resnet", "efficientnet_b0"])
def test_a_locked_tower_has_no_batch_statistics(name, tmp_path):
    clip, images = create(name, tmp_path)
    lock(clip.model, image_unlocked_groups=0)
    expected = features(clip, images)
    clip.model.train()
    with torch.no_grad():
        clip.model.encode_image(3 * images)
    assert not any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in clip.model.visual.modules())
    assert torch.equal(features(clip, images), expected)


@pytest.mark.parametrize("name", FUSED)
def test_training_on_several_gpus_synchronizes_layers_with_their_activation(name, monkeypatch, tmp_path):
    clip, images = create(name, tmp_path)
    expected = features(clip, images)
    monkeypatch.setattr(train_phase, "world_size", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    clip.model = train_phase._synchronize_batch_norm(clip.model, 0, 0)
    assert any(isinstance(layer, nn.SyncBatchNorm) for layer in clip.model.modules())
    torch.testing.assert_close(features(clip, images), expected, atol=1e-5, rtol=0)
