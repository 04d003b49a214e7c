"""LoRA: what trains, that nothing changes before and after, and that the merged model is a plain one."""

import contextlib
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mcl_clip.config import LockConfig, LoraConfig, RunConfig, StageConfig, TowerConfig, TrainConfig
from mcl_clip.core.errors import UserError
from mcl_clip.model.clip import create_clip, load_clip, save_clip
from mcl_clip.model.lora import add_lora, merge_lora
from mcl_clip.model.prepare import check_contract, reference_features
from mcl_clip.publish.hf_clip import write_clip_model
from mcl_clip.runs.pipeline import check_stages
from mcl_clip.runs.train_phase import lock_stage
from mcl_clip.train.optim import create_optimizer
from tests import training

pytest.importorskip("peft")  # an extra

TEXT = {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
VIT = {"image_size": 32, "patch_size": 16, "layers": 2, "width": 32, "head_width": 16}
RESNET = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 32}


def make(vision=VIT):
    return create_clip(model_cfg={"embed_dim": 24, "vision_cfg": vision, "text_cfg": TEXT}, seed=1)


def train_config(**lora):
    return TrainConfig(steps=3, global_batch_size=4, lr=0.1, lora=LoraConfig(**{"rank": 2, **lora}))


def trained(clip):
    return {name for name, parameter in clip.model.named_parameters() if parameter.requires_grad}


def fit(clip, config):
    """Three steps on noise; the features before, after, and after merging."""
    before = reference_features(clip)
    lock_stage(clip.model, config, seed=3)
    check_contract(clip, before, name="clip", stage=0)
    optimizer = create_optimizer(clip.model, config)
    generator = torch.Generator().manual_seed(0)
    size = clip.preprocess_cfg["size"]
    for _ in range(3):
        images, tokens = torch.randn(4, 3, size, size, generator=generator), clip.tokenizer(["a", "b c", "d", "e f g"])
        out = clip.model.train()(images, tokens)
        loss = (out["image_features"] @ out["text_features"].T * 10).log_softmax(1).diag().mean()
        optimizer.zero_grad()
        (-loss).backward()
        optimizer.step()
    after = reference_features(clip)
    merge_lora(clip.model)
    return before, after, reference_features(clip)


def test_a_merged_model_is_plain_and_computes_the_same(tmp_path):
    clip, plain = make(), make()
    base = {name: tensor.clone() for name, tensor in clip.model.state_dict().items()}
    before, after, merged = fit(clip, train_config())
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(after, before, strict=True))
    torch.testing.assert_close(merged, after, rtol=0, atol=1e-6)
    state = clip.model.state_dict()
    assert state.keys() == base.keys()
    changed = {name for name in base if not torch.equal(state[name], base[name])}
    blocks = ("visual.transformer.resblocks.0", "visual.transformer.resblocks.1", "transformer.resblocks.0")
    parts = ("attn.in_proj_weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    expected = {f"{block}.{part}" for block in blocks for part in parts}
    assert changed == expected
    assert [type(module) for module in clip.model.modules()] == [type(module) for module in plain.model.modules()]
    update = state["transformer.resblocks.0.mlp.c_fc.weight"] - base["transformer.resblocks.0.mlp.c_fc.weight"]
    assert torch.linalg.matrix_rank(update, rtol=1e-4) == 2
    save_clip(clip, tmp_path / "model")
    torch.testing.assert_close(reference_features(load_clip(tmp_path / "model")), merged, rtol=0, atol=1e-6)
    write_clip_model(tmp_path / "transformers", clip)


def test_a_stopped_stage_resumes_bit_for_bit(tmp_path):
    shards = training.write_shards(tmp_path / "shards")

    def weights(out, most_steps=math.inf):
        make_loader, tower = training.parts(shards)
        lock_stage(tower.model, train_config(), seed=1)
        with contextlib.suppress(training.StoppedError):
            training.fit(
                tower, make_loader(most_steps=most_steps), out=tmp_path / out, changes={"lora": LoraConfig(rank=2)}
            )
        merge_lora(tower.model)
        return tower.model.state_dict()

    whole, stopped, resumed = weights("whole"), weights("parts", most_steps=10), weights("parts")
    assert any(not torch.equal(whole[name], stopped[name]) for name in whole)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_updates_are_drawn_by_the_seed_alone():
    first, again, other = make(), make(), make()
    state = torch.random.get_rng_state()
    for clip, seed in ((first, 1), (again, 1), (other, 2)):
        add_lora(clip.model, LoraConfig(rank=2), seed=seed)
    assert torch.equal(torch.random.get_rng_state(), state)
    one, two, three = (clip.model.state_dict() for clip in (first, again, other))
    assert all(torch.equal(one[name], two[name]) for name in one)
    differ = {name for name in one if not torch.equal(one[name], three[name])}
    assert differ == {name for name in one if "lora_A" in name}


@pytest.mark.parametrize(
    ("options", "sides"),
    [({}, {"visual", "transformer"}), ({"towers": "text"}, {"transformer"}), ({"towers": "image"}, {"visual"})],
)
def test_a_tower_without_updates_trains_as_before(options, sides):
    clip = make()
    lock_stage(clip.model, train_config(**options))
    names = trained(clip)
    assert {name.split(".")[0] for name in names if "lora_" in name} == sides
    for side, prefix in (("visual", "visual."), ("transformer", "ln_final")):
        assert any(name.startswith(prefix) and "lora_" not in name for name in names) == (side not in sides)
    assert "logit_scale" in names


def test_patterns_choose_layers_and_parameters_that_train_in_full():
    clip = make()
    lock_stage(clip.model, train_config(patterns=(r"mlp\.c_fc",), full=("ln_final", "^visual.proj")))
    names = trained(clip)
    assert all("mlp.c_fc" in name for name in names if "lora_" in name)
    assert {name for name in names if "lora_" not in name} == {
        "ln_final.weight", "ln_final.bias", "visual.proj", "logit_scale",
    }  # fmt: skip


def test_batch_norms_of_a_frozen_tower_keep_their_statistics():
    clip = make(RESNET)
    statistics = clip.model.visual.bn1.running_mean.clone()
    lock_stage(clip.model, train_config())
    assert {name.split(".")[1] for name in trained(clip) if name.startswith("visual.")} == {"attnpool"}
    clip.model.train().encode_image(torch.randn(4, 3, 32, 32))
    assert torch.equal(clip.model.visual.bn1.running_mean, statistics)


def test_what_cannot_be_adapted_is_refused(monkeypatch):
    def refused(config, message, vision=VIT):
        with pytest.raises(UserError, match=message):
            lock_stage(make(vision).model, config)

    refused(train_config(patterns=("nothing",)), "layer or attention that matches 'nothing' in the image tower")
    refused(train_config(towers="text", patterns=("visual",)), "matches 'visual' in the text tower; name the other")
    refused(train_config(dropout=0.1), r"dropout 0.1 cannot be used with attention layers such as visual\.")
    timm_tower = {"image_size": 160, "timm_model_name": "test_vit", "timm_proj": "linear"}
    refused(
        train_config(towers="image", full=(".",)),
        "no unlocked linear layer or attention in the image tower",
        timm_tower,
    )
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    refused(train_config(), r"rank 2 needs peft; install it with: pip install 'mcl_clip\[lora\]'")
    config = RunConfig(
        run_dir=Path("run"), tower=TowerConfig(architecture="x"), stages=(StageConfig(train=train_config()),)
    )
    with pytest.raises(UserError, match="rank 2 needs peft"):
        check_stages(config)  # before anything is written


def test_locked_layers_get_no_update():
    clip = make()
    lock_stage(clip.model, replace(train_config(), lock=LockConfig(text_unlocked_groups=2, image_unlocked_groups=2)))
    names = {name.split(".lora_")[0] for name in trained(clip) if "lora_" in name}
    assert {name.split(".")[3] for name in names if name.startswith("visual.")} == {"1"}  # of two blocks
    for lock in (LockConfig(text=True), LockConfig(text_unlocked_groups=1)):
        with pytest.raises(UserError, match=r"no unlocked linear layer or attention in the text tower; name the other"):
            lock_stage(make().model, replace(train_config(), lock=lock))
        lock_stage(make().model, replace(train_config(towers="image"), lock=lock))


def test_compiled_towers_are_refused():
    with pytest.raises(UserError, match=r"compiled cannot be used with --stages.K.train.lora.rank 2"):
        replace(train_config(), compiled=True)
