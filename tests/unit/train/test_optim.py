import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import transformers
from torch import nn

from mcl_clip.config import TrainConfig
from mcl_clip.core.errors import UserError
from mcl_clip.train.optim import ExponentialAverage, create_optimizer, find_undecayed, lr_at, set_lr

CONFIG = TrainConfig(steps=1, global_batch_size=2, lr=0.1, weight_decay=0.2, betas=(0.9, 0.98), eps=1e-6)


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.visual = nn.Sequential(nn.Conv2d(3, 4, 2), nn.LayerNorm(4))
        self.text = nn.Linear(4, 4)
        self.positions = nn.Parameter(torch.zeros(5, 4))
        self.logit_scale = nn.Parameter(torch.zeros(()))
        self.locked = nn.Parameter(torch.zeros(3, 3), requires_grad=False)

    def no_weight_decay(self) -> set[str]:
        return {"positions"}


def options_by_name(model: nn.Module, **changed) -> dict[str, tuple[float, float]]:
    """Learning rate factor and weight decay of each parameter."""
    optimizer = create_optimizer(model, replace(CONFIG, **changed))
    of = {
        id(p): (group["lr_scale"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]
    }
    return {name: of[id(p)] for name, p in model.named_parameters() if id(p) in of}


@pytest.mark.parametrize("name", ["sgd", "lars"])
def test_sgd_and_lars_are_their_formulas(name):
    """Momentum 0.9 with decay in the gradient; LARS scales the rate of decayed parameters by their norms."""
    weight, bias = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(3))
    model = nn.Module()
    model.weight, model.bias = weight, bias
    optimizer = create_optimizer(model, replace(CONFIG, optimizer=name, momentum=0.9))
    set_lr(optimizer, 0.1)
    expected, buffers = {"weight": torch.ones(2, 3), "bias": torch.ones(3)}, {"weight": 0.0, "bias": 0.0}
    for step in range(3):
        for key, parameter in (("weight", weight), ("bias", bias)):
            parameter.grad = torch.full_like(parameter, step + 1.0)
            decay = 0.2 if key == "weight" else 0.0
            gradient = parameter.grad + decay * expected[key]
            if name == "lars" and decay:
                norms = expected[key].norm(), parameter.grad.norm()
                gradient = gradient * 0.001 * norms[0] / (norms[1] + decay * norms[0])
            buffers[key] = 0.9 * buffers[key] + gradient
            expected[key] = expected[key] - 0.1 * buffers[key]
        optimizer.step()
    torch.testing.assert_close({"weight": weight.data, "bias": bias.data}, expected)


TEXT = {"context_length": 8, "vocab_size": 32, "width": 32, "heads": 2, "layers": 1}
RESNET = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "head_width": 32}
VIT = {"image_size": 32, "patch_size": 8, "layers": 1, "width": 32, "head_width": 16}
QUERIES = {**VIT, "attentional_pool": True, "attn_pooler_queries": 4, "attn_pooler_heads": 2}


def build(vision: str | dict[str, object]) -> nn.Module:
    """Build a real model on the meta device; a name is that of a timm tower."""
    cfg = {"timm_model_name": vision, "timm_pool": "", "timm_proj": "linear"} if isinstance(vision, str) else vision
    with torch.device("meta"):
        return open_clip.CustomTextCLIP(embed_dim=16, vision_cfg=cfg, text_cfg=TEXT)


def build_hugging_face(config: transformers.PretrainedConfig, folder: Path) -> nn.Module:
    config.save_pretrained(folder)
    text = {"hf_model_name": str(folder), "hf_model_pretrained": False}
    with torch.device("meta"):
        return open_clip.CustomTextCLIP(embed_dim=16, vision_cfg=VIT, text_cfg=text)


def undecayed(model: nn.Module, **options) -> set[str]:
    """Last parts of the names of parameters that are not decayed though they are neither vectors nor gains."""
    optimizer = create_optimizer(model, CONFIG, **options)
    ids = {id(p) for group in optimizer.param_groups if not group["weight_decay"] for p in group["params"]}
    assert all(id(p) in ids for p in model.parameters() if p.ndim < 2)
    matrices = [name for name, p in model.named_parameters() if id(p) in ids and p.squeeze().ndim > 1]
    return {name.removesuffix(".weight").split(".")[-1] for name in matrices}


@pytest.mark.parametrize(
    ("vision", "expected"),
    [
        (VIT, {"positional_embedding"}),
        (QUERIES, {"positional_embedding", "query"}),
        (RESNET, {"positional_embedding"}),
        ("vit_tiny_patch16_224", {"pos_embed"}),
        ("vit_base_patch16_siglip_224", {"pos_embed"}),
        ("vit_pe_core_tiny_patch16_384", {"pos_embed"}),
        ("vitamin_small_224", {"pos_embed"}),
        ("swin_tiny_patch4_window7_224", {"relative_position_bias_table"}),
        ("levit_128s", {"attention_biases"}),
        ("fastvit_mci0", set()),
        ("convnext_atto", set()),
    ],
    ids=[
        "vit",
        "attentional pool",
        "resnet",
        "timm vit",
        "siglip",
        "pe",
        "vitamin",
        "swin",
        "levit",
        "fastvit",
        "convnext",
    ],
)
def test_positions_tokens_and_gains_of_real_towers_are_not_decayed(vision, expected):
    model = build(vision)
    assert undecayed(model) == expected | {"positional_embedding"}
    added = [name for name, p in model.named_parameters() if p.ndim > 1 and p.numel() == max(p.shape)]
    assert set(added) <= set(find_undecayed(model))  # class tokens, latents, layer scales
    # As in version 0.6: only what the whole model lists.
    listed = model.no_weight_decay()
    legacy = [name for name, p in model.named_parameters() if p.ndim < 2 or name in listed]
    assert find_undecayed(model, decays_unlisted=True) == legacy


def test_tokens_and_layer_scales_are_vectors():
    names = [name.split(".")[-1] for name in find_undecayed(build("vit_pe_core_tiny_patch16_384"))]
    assert {"cls_token", "latent", "pos_embed"} <= set(names)
    assert any(name.endswith("layer_scale.gamma") for name in find_undecayed(build("fastvit_mci0")))


def test_what_a_part_of_the_model_lists_is_not_decayed():
    model = nn.ModuleDict({"tower": Towers()})
    model.tower.text.bias.requires_grad_(False)
    listed = [
        "tower.positions",
        "tower.logit_scale",
        *(f"tower.visual.{name}" for name in ("0.bias", "1.weight", "1.bias")),
    ]
    assert find_undecayed(model) == listed  # of what trains
    assert find_undecayed(model, decays_unlisted=True) == listed[1:]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (transformers.RobertaConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2), "position_embeddings"),
        (transformers.MT5Config(d_model=32, num_layers=1, num_heads=2), "relative_attention_bias"),
    ],
    ids=["roberta", "mt5"],
)
def test_positions_of_hugging_face_towers_are_not_decayed(config, expected, tmp_path):
    model = build_hugging_face(config, tmp_path)
    assert undecayed(model) == {"positional_embedding", expected}
    assert undecayed(model, decays_unlisted=True) == {"positional_embedding"}


def test_patterns_override_and_the_last_match_counts():
    found = options_by_name(
        Towers(), lr_multipliers={"^visual": 0.5, r"visual\.1": 0.1}, weight_decays={"bias$": 0.3, "text": 0.4}
    )
    assert (found["visual.0.weight"], found["visual.1.weight"]) == ((0.5, 0.2), (0.1, 0.0))
    assert (found["visual.1.bias"], found["text.bias"], found["text.weight"]) == ((0.1, 0.3), (1.0, 0.4), (1.0, 0.4))


@pytest.mark.parametrize("option", ["lr_multipliers", "weight_decays"])
def test_patterns_that_cannot_be_meant_are_refused(option):
    name = option.replace("_", "-")
    with pytest.raises(UserError, match=f"{name} 'locked' matches none of the 8 parameters that train"):
        create_optimizer(Towers(), replace(CONFIG, **{option: {"locked": 0.1}}))
    with pytest.raises(UserError, match=f"{name} '\\(' is not a regular expression"):
        create_optimizer(Towers(), replace(CONFIG, **{option: {"(": 0.1}}))


def test_moments_are_those_of_the_configuration():
    optimizer = create_optimizer(Towers(), replace(CONFIG, betas=(0.8, 0.95), eps=1e-4))
    assert all((group["betas"], group["eps"]) == ((0.8, 0.95), 1e-4) for group in optimizer.param_groups)


def test_each_group_gets_its_learning_rate():
    optimizer = create_optimizer(Towers(), replace(CONFIG, lr_multipliers={"text": 0.25}))
    set_lr(optimizer, 0.08)
    assert {(group["lr_scale"], group["lr"]) for group in optimizer.param_groups} == {(1.0, 0.08), (0.25, 0.02)}


def test_the_schedule_warms_up_and_falls_to_zero():
    config = replace(CONFIG, lr=1.0, steps=100, warmup_steps=10)
    rates = [lr_at(step, config) for step in range(101)]
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10)
    np.testing.assert_allclose([rates[10], rates[55], rates[100]], [1, 0.5, 0], atol=1e-12)
    assert all(np.diff(rates[10:]) < 0)
    assert min(rates[:100]) > 0
    constant = replace(config, steps=9, warmup_steps=2, schedule="constant")
    assert [lr_at(step, constant) for step in (0, 1, 2, 8)] == [0.5, 1, 1, 1]
    assert lr_at(0, replace(config, steps=1, warmup_steps=0)) == 1
    assert math.isfinite(lr_at(5, replace(config, steps=5, warmup_steps=5)))
    assert [lr_at(step, replace(config, lr=0.5)) for step in range(101)] == [0.5 * rate for rate in rates]


def test_the_average_follows_the_weights():
    model, decay = nn.Linear(2, 2), 0.6
    average = ExponentialAverage(model, decay)
    expected = model.weight.detach().clone()
    for step in range(1, 30):
        with torch.no_grad():
            model.weight += step
        average.update(model, step)
        d = min(decay, (1 + step) / (10 + step))
        expected = d * expected + (1 - d) * model.weight.detach()
    torch.testing.assert_close(average.average["weight"], expected)


def test_swapping_twice_is_nothing():
    model = Towers()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    average = ExponentialAverage(model, 0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    average.swap(model)
    assert "locked" not in average.average
    assert all(torch.equal(p, (before if n == "locked" else start)[n]) for n, p in model.named_parameters())
    average.swap(model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
