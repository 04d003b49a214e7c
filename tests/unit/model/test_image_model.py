"""Image models without a text tower: stems, heads, views, and folders that come from elsewhere."""

import json
import shutil

import pytest
import timm
import torch
from torch import nn

from mcl_clip.config import TowerConfig, TrainConfig
from mcl_clip.core.errors import UserError
from mcl_clip.model.clip import load_clip, save_clip
from mcl_clip.model.image_model import MAX_DIMENSIONS, read_image_folder, set_temperature
from mcl_clip.model.prepare import check_contract, lock, prepare_training, reference_features
from mcl_clip.model.tower import create_tower
from mcl_clip.tools.estimates import measure

SMALL = {"image": "timm:resnet18=random", "image_args": {"channels": [4, 4, 8, 8]}, "image_size": (32,), "dim": 6}


def create(**changes):
    return create_tower(TowerConfig(**SMALL | changes), seed=1)


def test_the_stem_for_small_images_keeps_their_size():
    image = torch.zeros(2, 3, 32, 32)
    sizes = {}
    for stem in ("standard", "cifar"):
        trunk = create(stem=stem).model.visual.trunk
        seen = []
        trunk.layer1.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0].shape[-1]))
        trunk(image)
        sizes[stem] = seen[0]
    assert sizes == {"standard": 8, "cifar": 32}


@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        ({}, [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]),
        ({"head_batch_norm": False}, [nn.Linear, nn.ReLU, nn.Linear]),
        ({"heads": "linear"}, [nn.Linear]),
    ],
)
def test_heads(changes, layers):
    model = create(**changes).model.eval()
    head = model.visual.head
    assert [type(layer) for layer in (head if isinstance(head, nn.Sequential) else [head])] == layers
    assert model(torch.zeros(2, 3, 32, 32))["image_features"].shape == (2, 6)


def test_all_views_are_one_batch_of_the_batch_norms():
    """Features of views are those of their images, and the statistics are of all of them."""
    model, other = create().model, create().model
    views = torch.randn(4, 3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found, flat = model(views)["image_features"], other(views.flatten(0, 1))["image_features"]
    assert found.shape == (4, 3, 6)
    assert torch.equal(found.flatten(0, 1), flat)
    assert torch.equal(model.visual.trunk.bn1.running_mean, other.visual.trunk.bn1.running_mean)
    torch.testing.assert_close(found.norm(dim=2), torch.ones(4, 3))


def test_weights_are_drawn_by_the_seed_and_the_temperature_is_fixed():
    first, second, other = (create_tower(TowerConfig(**SMALL), seed=seed).model for seed in (1, 1, 2))
    states = [model.state_dict() for model in (first, second, other)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["visual.head.0.weight"], states[2]["visual.head.0.weight"])
    set_temperature(first, 0.25)
    assert float(first(torch.zeros(2, 3, 32, 32))["logit_scale"]) == pytest.approx(4)
    assert not first.logit_scale.requires_grad


def test_pretrained_weights_of_the_trunk(tmp_path):
    torch.manual_seed(5)
    state = timm.create_model("resnet18").state_dict()
    torch.save(state, tmp_path / "resnet18.pth")
    model = create_tower(TowerConfig(image=f"timm:resnet18={tmp_path / 'resnet18.pth'}", image_size=(32,))).model
    assert torch.equal(model.visual.trunk.layer4[1].conv2.weight, state["layer4.1.conv2.weight"])
    assert TowerConfig(image="timm:resnet18").is_pretrained
    assert not TowerConfig(image="timm:resnet18=random").is_pretrained
    with pytest.raises(UserError, match=r"are not those of resnet18: .* have another shape, such as conv1.weight"):
        create_tower(TowerConfig(image=f"timm:resnet18={tmp_path / 'resnet18.pth'}", image_size=(32,), stem="cifar"))


@pytest.mark.parametrize("image", ["timm:resnet18=random", "timm:test_vit=random"])
def test_a_stage_prepares_and_locks_them(image):
    clip = create(image=image, image_args={}, heads="linear")
    expected = reference_features(clip)
    lock(clip.model, image_unlocked_groups=1)
    trained = [name for name, p in clip.model.named_parameters() if p.requires_grad]
    assert "visual.head.weight" in trained
    assert (
        0 < sum(name.startswith("visual.trunk.") for name in trained) < len(list(clip.model.visual.trunk.parameters()))
    )
    prepare_training(clip.model, compiled=False, patch_dropout=0, grad_checkpointing=True)
    check_contract(clip, expected, name=image, stage=0)


def test_the_doctor_measures_them():
    clip, train = create(), TrainConfig(steps=1, global_batch_size=4, lr=0.1, loss="simclr")
    two, three = (measure(clip.model_cfg, TrainConfig(**vars(train) | {"num_views": n})) for n in (2, 3))
    assert two.parameters == sum(p.numel() for p in clip.model.parameters())
    assert two.saved_bytes > 0
    assert three.saved_bytes == two.saved_bytes * 3 // 2


def test_a_folder_brings_the_model_back(tmp_path):
    clip = create(stem="cifar")
    save_clip(clip, tmp_path / "cifar")
    assert not (tmp_path / "cifar/config.json").exists()  # timm has no such stem
    loaded = load_clip(tmp_path / "cifar")
    assert (loaded.model_cfg, loaded.preprocess_cfg, loaded.has_texts) == (clip.model_cfg, clip.preprocess_cfg, False)
    state, expected = loaded.model.state_dict(), clip.model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


HOSTILE = {
    "embed_dim": lambda cfg: cfg["model_cfg"].update(embed_dim=MAX_DIMENSIONS + 1),
    "a bool": lambda cfg: cfg["model_cfg"].update(embed_dim=True),
    "head": lambda cfg: cfg["model_cfg"]["head_cfg"].update(dim="many"),
    "type": lambda cfg: cfg["model_cfg"]["head_cfg"].update(type="code"),
    "size": lambda cfg: cfg["preprocess_cfg"].update(size=[0, 32]),
    "checkpoint": lambda cfg: cfg["model_cfg"]["vision_cfg"].update(model_args={"checkpoint_path": "x.pth"}),
    "overlay": lambda cfg: cfg["model_cfg"]["vision_cfg"].update(model_args={"pretrained_cfg_overlay": {"file": "x"}}),
    "name": lambda cfg: cfg["model_cfg"]["vision_cfg"].update(timm_model_name="hf-hub:someone/else"),
    "large": lambda cfg: cfg["model_cfg"]["vision_cfg"].update(
        timm_model_name="vit_giant_patch14_dinov2", model_args={}
    ),
    "other": lambda cfg: cfg["model_cfg"]["vision_cfg"].update(timm_model_name="resnet34"),
    "no config": lambda cfg: cfg.clear(),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_folder_from_elsewhere_cannot_harm(tmp_path, name):
    folder = tmp_path / "model"
    save_clip(create(), folder)
    config = json.loads((folder / "image_model.json").read_text())
    HOSTILE[name](config)
    (folder / "image_model.json").write_text(json.dumps(config))
    with pytest.raises((ValueError, RuntimeError)):
        read_image_folder(folder)
    with pytest.raises(UserError, match="is not loaded: "):
        load_clip(folder)


def test_a_folder_without_weights_is_named(tmp_path):
    save_clip(create(), tmp_path / "model")
    for file in ("head.safetensors", "model.safetensors"):
        shutil.copytree(tmp_path / "model", tmp_path / file)
        (tmp_path / file / file).unlink()
        with pytest.raises(UserError, match=file):
            load_clip(tmp_path / file)
