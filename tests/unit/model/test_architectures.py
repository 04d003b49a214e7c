"""Towers of every family keep their features when they are locked, synchronized, saved and loaded."""

import copy

import open_clip
import pytest
import torch
from torch import nn

from mcl_clip.model.clip import create_clip, load_clip, save_clip
from mcl_clip.model.prepare import lock, synchronize_batch_norm
from mcl_clip.runs import train_phase

TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
OWN = {
    "modified_resnet": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "head_width": 32},
    "vit": {"image_size": 32, "patch_size": 8, "layers": 2, "width": 32, "head_width": 16},
}
SMALLEST_OF_TIMM = {  # of each family, with an image size that it takes
    "convnext_atto": 64,
    "efficientnet_b0": 64,
    "efficientnetv2_rw_t": 64,
    "eva02_tiny_patch14_224": 224,
    "fastvit_mci0": 64,
    "regnety_002": 64,
    "resnet18": 64,
    "swin_tiny_patch4_window7_224": 224,
    "tf_efficientnet_lite0": 64,
    "vit_base_mci_224": 224,
    "vit_pe_core_tiny_patch16_384": 384,
    "vit_relpos_small_patch16_224": 224,
    "vit_tiny_patch16_224": 224,
    "vitamin_small_224": 224,
}
LARGE = ("swin_tiny_patch4_window7_224", "vit_relpos_small_patch16_224", "vitamin_small_224")
FUSED = ("efficientnet_b0", "efficientnetv2_rw_t", "regnety_002", "tf_efficientnet_lite0", "vit_base_mci_224")


def create(name):
    """Create a model whose batch norms have statistics that matter, in evaluation mode, and images for it."""
    size = SMALLEST_OF_TIMM.get(name, 0)
    vision = OWN.get(name) or {"timm_model_name": name, "timm_pool": "", "timm_proj": "linear", "image_size": size}
    clip = create_clip(model_cfg={"embed_dim": 16, "vision_cfg": vision, "text_cfg": TEXT}, seed=1)
    generator = torch.Generator().manual_seed(0)
    for layer in clip.model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.running_mean.copy_(0.2 * torch.randn(layer.num_features, generator=generator))
            layer.running_var.copy_(0.5 + torch.rand(layer.num_features, generator=generator))
    clip.model.eval()
    size = vision["image_size"]
    return clip, torch.randn(2, 3, size, size, generator=generator)


@torch.inference_mode()
def features(model, images):
    """Unit features in float64: random deep towers amplify the rounding of float32."""
    return nn.functional.normalize(copy.deepcopy(model).double().eval().encode_image(images.double()))


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if name in LARGE else []) for name in (*OWN, *SMALLEST_OF_TIMM)],
)
def test_features_stay(name, tmp_path):
    clip, images = create(name)
    expected = features(clip.model, images)
    for groups in (0, 1):
        locked = copy.deepcopy(clip.model)
        lock(locked, image_unlocked_groups=groups)
        torch.testing.assert_close(features(locked, images), expected, atol=1e-5, rtol=0)
        locked.train()
        with torch.no_grad():
            locked.encode_image(images)  # would update statistics that are not frozen
        frozen = {name for name, p in locked.named_parameters() if not p.requires_grad}
        state = clip.model.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in locked.state_dict().items() if name in frozen)
    synchronized = synchronize_batch_norm(copy.deepcopy(clip.model))
    torch.testing.assert_close(features(synchronized, images), expected, atol=1e-5, rtol=0)
    clip.model = lock_all(clip.model)
    save_clip(clip, tmp_path / "model")
    torch.testing.assert_close(features(load_clip(tmp_path / "model").model, images), expected, atol=1e-5, rtol=0)
    plain = open_clip.create_model(f"local-dir:{tmp_path / 'model'}")
    torch.testing.assert_close(features(plain, images), expected, atol=1e-5, rtol=0)


def lock_all(model):
    lock(model, image_unlocked_groups=0)
    return model


@pytest.mark.parametrize("name", ["modified_resnet", "efficientnet_b0"])
def test_a_locked_tower_has_no_batch_statistics(name):
    clip, images = create(name)
    lock(clip.model, image_unlocked_groups=0)
    expected = features(clip.model, images)
    clip.model.train()
    with torch.no_grad():
        clip.model.encode_image(3 * images)
    assert not any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in clip.model.visual.modules())
    assert torch.equal(features(clip.model, images), expected)


@pytest.mark.parametrize("name", FUSED)
def test_training_on_several_gpus_synchronizes_layers_with_their_activation(name, monkeypatch):
    clip, images = create(name)
    expected = features(clip.model, images)
    monkeypatch.setattr(train_phase, "world_size", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    synchronized = train_phase._synchronize_batch_norm(clip.model, 0, 0)
    assert any(isinstance(layer, nn.SyncBatchNorm) for layer in synchronized.modules())
    torch.testing.assert_close(features(synchronized, images), expected, atol=1e-5, rtol=0)
