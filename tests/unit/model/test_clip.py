import json
import logging
import math
import os
import stat

import open_clip
import pytest
import safetensors.torch
import torch

from mcl_clip.core.errors import UserError
from mcl_clip.model.clip import ClipBundle, create_clip, load_clip, save_clip, to_floats
from mcl_clip.model.fast_paths import FirstTokenBlock, takes_short_texts
from mcl_clip.model.prepare import lock, trainable_summary
from mcl_clip.model.weights import load_weights

TEXT_CFG = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
VIT_CFG = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 3, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": TEXT_CFG,
}
RESNET_CFG = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "head_width": 64, "patch_size": None},
    "text_cfg": TEXT_CFG,
}
CUSTOM_CFG = {**VIT_CFG, "custom_text": True, "init_logit_bias": -10.0}


def inputs(clip, count=3):
    size = clip.model_cfg["vision_cfg"]["image_size"]
    images = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))
    return images, clip.tokenizer(["a red bicycle", "two dogs", "rain"][:count])


def outputs(model, images, tokens):
    with torch.no_grad():
        return {name: value for name, value in model.eval()(images, tokens).items() if value is not None}


def assert_equal_models(first, second):
    first, second = first.state_dict(), second.state_dict()
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("cfg", [VIT_CFG, RESNET_CFG, CUSTOM_CFG], ids=["vit", "resnet", "custom"])
def test_saved_clip_is_equal_here_and_in_plain_open_clip(cfg, tmp_path):
    clip = create_clip(model_cfg=cfg, preprocess={"mean": [0.1, 0.2, 0.3], "interpolation": "bilinear"}, seed=3)
    save_clip(clip, tmp_path / "model")
    again = load_clip(tmp_path / "model")
    plain, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'model'}", output_dict=True)
    batch = inputs(clip)
    expected = outputs(clip.model, *batch)
    for model, tolerance in ((again.model, 0), (plain, 1e-6)):  # the fast paths differ by rounding
        assert_equal_models(clip.model, model)
        got = outputs(model, *batch)
        assert got.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(got[name], expected[name], rtol=0, atol=tolerance)
    assert (again.model_cfg, again.preprocess_cfg) == (clip.model_cfg, clip.preprocess_cfg)
    assert str(transform.transforms) == str(clip.image_transform.transforms[1:])  # after conversion to RGB
    assert "bilinear" in str(transform)
    assert "0.1" in str(transform)


def test_saved_files_follow_the_umask_and_replace_the_old_folder(tmp_path):
    before = os.umask(0o022)
    try:
        (tmp_path / "model").mkdir()
        (tmp_path / "model/stale.safetensors").touch()
        save_clip(create_clip(model_cfg=VIT_CFG), tmp_path / "model")
    finally:
        os.umask(before)
    files = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "model").iterdir()}
    assert files == {"open_clip_config.json": 0o644, "open_clip_model.safetensors": 0o644}


def test_random_weights_give_no_warning(caplog):
    create_clip(model_cfg=VIT_CFG)
    assert not caplog.records
    logging.getLogger().warning("still heard")
    assert caplog.messages == ["still heard"]


def test_seed_decides_the_weights_and_the_global_generator_is_left_alone():
    state = torch.random.get_rng_state()
    first, same, other = (create_clip(model_cfg=VIT_CFG, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert_equal_models(first.model, same.model)
    assert not torch.equal(first.model.visual.proj, other.model.visual.proj)


def test_created_and_loaded_models_have_the_fast_paths(tmp_path):
    clip = create_clip(model_cfg=VIT_CFG)
    save_clip(clip, tmp_path)
    for model in (clip.model, load_clip(tmp_path).model):
        assert takes_short_texts(model)
        assert isinstance(model.visual.transformer.resblocks[-1], FirstTokenBlock)


def test_loading_leaves_the_global_generator_alone(tmp_path):
    save_clip(create_clip(model_cfg=VIT_CFG), tmp_path)
    state = torch.random.get_rng_state()
    load_clip(tmp_path)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("name", ["epoch_3.pt", "weights.safetensors"])
def test_pretrained_may_be_a_checkpoint_of_an_earlier_training(name, tmp_path):
    clip = create_clip(model_cfg=VIT_CFG, seed=5)
    state = {f"module.{key}": value.half() for key, value in clip.model.state_dict().items()}
    if name.endswith(".pt"):
        torch.save({"epoch": 3, "name": "run", "state_dict": state, "optimizer": {"lr": 1e-3}}, tmp_path / name)
    else:
        from safetensors.torch import save_file

        save_file(state, tmp_path / name)
    loaded = create_clip(model_cfg=VIT_CFG, pretrained=str(tmp_path / name), seed=6)
    assert all(parameter.dtype == torch.float32 for parameter in loaded.model.parameters())
    torch.testing.assert_close(loaded.model.visual.proj, clip.model.visual.proj.half().float(), rtol=0, atol=0)


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: f"_orig_mod.module.{name}",
        lambda name: name.replace("visual.", "visual._orig_mod.", 1),  # a single tower was compiled
    ],
)
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_prefixes_of_compiled_and_parallel_models_are_ignored(rename, suffix, tmp_path):
    clip, path = create_clip(model_cfg=VIT_CFG, seed=5), tmp_path / f"weights.{suffix}"
    state = {rename(name): value for name, value in clip.model.state_dict().items()}
    torch.save({"state_dict": state}, path) if suffix == "pt" else safetensors.torch.save_file(state, path)
    assert_equal_models(create_clip(model_cfg=VIT_CFG, pretrained=str(path), seed=6).model, clip.model)


def test_missing_and_unknown_weights_are_both_named(tmp_path):
    state = create_clip(model_cfg=VIT_CFG).model.state_dict()
    names = [name for name in state if "resblocks" in name]
    torch.save({name.replace("resblocks", "layers"): value for name, value in state.items()}, tmp_path / "other.pt")
    with pytest.raises(UserError) as caught:
        create_clip(model_cfg=VIT_CFG, pretrained=str(tmp_path / "other.pt"))
    message = str(caught.value)
    assert f"{len(names)} are missing (" in message
    assert f"and {len(names)} are unknown (" in message
    assert "transformer.layers.0" in message
    assert "transformer.resblocks.0" in message
    assert len(message) < 700
    # A model folder is loaded by open_clip, whose error lists all of them.
    save_clip(create_clip(model_cfg=VIT_CFG), tmp_path / "model")
    tensors = safetensors.torch.load_file(tmp_path / "model/open_clip_model.safetensors")
    tensors = {name.replace("resblocks", "layers"): value for name, value in tensors.items()}
    safetensors.torch.save_file(tensors, tmp_path / "model/open_clip_model.safetensors")
    with pytest.raises(UserError, match=r"Missing key.*resblocks.* \.\.\. .*layers") as caught:
        load_clip(tmp_path / "model")
    assert len(str(caught.value)) < 700


def test_weights_that_could_run_code_are_refused(tmp_path):
    torch.save({"state_dict": {}, "args": math.sqrt, "path": ClipBundle}, tmp_path / "epoch.pt")
    with pytest.raises(UserError, match=r"epoch\.pt holds more than tensors"):
        create_clip(model_cfg=VIT_CFG, pretrained=str(tmp_path / "epoch.pt"))


def test_weights_of_another_model_are_refused(tmp_path):
    save_clip(create_clip(model_cfg=RESNET_CFG), tmp_path)
    with pytest.raises(UserError, match="do not fit this model"):
        create_clip(model_cfg=VIT_CFG, pretrained=str(tmp_path / "open_clip_model.safetensors"))
    with pytest.raises(UserError, match="do not fit this model"):
        load_weights(create_clip(model_cfg=VIT_CFG).model, tmp_path / "open_clip_model.safetensors")


def test_broken_and_missing_weights_are_errors(tmp_path):
    model = create_clip(model_cfg=VIT_CFG).model
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match=r"torn\.safetensors do not fit"):
        load_weights(model, tmp_path / "torn.safetensors")
    with pytest.raises(UserError, match=r"absent\.pt' is neither a file nor a tag"):
        create_clip(model_cfg=VIT_CFG, pretrained=str(tmp_path / "absent.pt"))
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match=r"not one of \.safetensors"):
        load_weights(model, tmp_path / "notes.txt")


def test_folder_without_weights_is_an_error_not_a_random_model(tmp_path):
    save_clip(create_clip(model_cfg=VIT_CFG), tmp_path / "model")
    (tmp_path / "model/open_clip_model.safetensors").unlink()
    with pytest.raises(UserError, match="has no weights"):
        load_clip(tmp_path / "model")
    with pytest.raises(UserError, match=r"no open_clip_config\.json"):
        load_clip(tmp_path)


def test_weights_that_cannot_be_downloaded_are_an_error(monkeypatch):
    def fail(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(open_clip.factory, "download_pretrained", fail)
    with pytest.raises(UserError, match=r"cannot create RN50 openai: .*no route to host; without a network, name a"):
        create_clip(architecture="RN50", pretrained="openai")


def test_a_tag_without_a_file_is_an_error_not_a_random_model(monkeypatch):
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *_, **__: "")
    with pytest.raises(UserError, match="cannot create RN50 openai"):
        create_clip(architecture="RN50", pretrained="openai")


def test_unknown_names_list_close_ones():
    with pytest.raises(UserError, match=r"no architecture 'ViT-B-23' \(close: .*ViT-B-32.*list_models"):
        create_clip(architecture="ViT-B-23")
    with pytest.raises(UserError, match=r"tag of ViT-B-32 \(close: openai.*laion2b_s34b_b79k"):
        create_clip(architecture="ViT-B-32", pretrained="openia")
    with pytest.raises(UserError, match="there are no tags for it"):
        create_clip(model_cfg=VIT_CFG, pretrained="openai")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either an architecture .* or a model config"),
        ({"architecture": "RN50", "model_cfg": VIT_CFG}, "either an architecture .* or a model config"),
        ({"model_cfg": {"embed_dim": 8}}, "the model in the recipe has no vision_cfg, text_cfg"),
        ({"model_cfg": {**VIT_CFG, "vision_cfg": {"depth": 3}}}, "cannot create the model in the recipe: .*depth"),
        ({"model_cfg": VIT_CFG, "preprocess": {"crop": 3}}, "preprocess has no crop; it may set size"),
        ({"model_cfg": VIT_CFG, "preprocess": {"resize_mode": "crop"}}, "may be shortest, longest, squash"),
        ({"model_cfg": VIT_CFG, "preprocess": {"mean": [0.5, 0.5]}}, r"mean to \[0.5, 0.5\]; it must be a number"),
        (
            {"model_cfg": VIT_CFG, "preprocess": {"std": "half"}},
            "std to 'half'; it must be a number",
        ),
        ({"model_cfg": VIT_CFG, "preprocess": {"std": [1, 0.0, 1]}}, "divided by it, so it must not be 0"),
        ({"model_cfg": VIT_CFG, "preprocess": {"size": [32, 32, 3]}}, r"size to \[32, 32, 3\]; it must be pixels"),
        ({"model_cfg": VIT_CFG, "preprocess": {"size": 0}}, "size to 0; it must be pixels"),
        ({"architecture": "local-dir:x", "pretrained": "openai"}, "brings its own weights"),
        ({"model_cfg": VIT_CFG, "pretrained": "."}, "use --tower.architecture local-dir:."),
    ],
)
def test_mistakes_are_explained(options, message):
    with pytest.raises(UserError, match=message):
        create_clip(**options)


def test_size_resizes_the_image_tower_and_is_saved(tmp_path):
    clip = create_clip(model_cfg=VIT_CFG, preprocess={"size": 48})
    assert clip.model.visual.positional_embedding.shape[0] == 3 * 3 + 1
    save_clip(clip, tmp_path)
    assert load_clip(tmp_path).preprocess_cfg["size"] == clip.preprocess_cfg["size"]
    smaller = create_clip(architecture=f"local-dir:{tmp_path}", preprocess={"size": 32})
    assert smaller.model.visual.positional_embedding.shape[0] == 2 * 2 + 1
    assert smaller.image_transform.transforms[1].size == 32


def test_a_number_for_all_channels_is_three(tmp_path):
    clip = create_clip(model_cfg=VIT_CFG, preprocess={"mean": 0.25, "std": 1})
    assert (clip.preprocess_cfg["mean"], clip.preprocess_cfg["std"]) == ([0.25] * 3, [1] * 3)
    pixels = torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
    assert torch.equal(to_floats(pixels, clip.preprocess_cfg), torch.full((1, 3, 2, 2), 0.75))
    save_clip(clip, tmp_path)
    config = json.loads((tmp_path / "open_clip_config.json").read_text())
    config["preprocess_cfg"]["mean"] = 0.25  # as in a folder of open_clip
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    assert load_clip(tmp_path).preprocess_cfg == clip.preprocess_cfg


def test_activation_of_the_tag_is_stored(tmp_path, monkeypatch):
    source = create_clip(model_cfg={**VIT_CFG, "quick_gelu": True}, seed=8)
    save_clip(source, tmp_path / "hub")
    tag_cfg = {"file": str(tmp_path / "hub/open_clip_model.safetensors"), "quick_gelu": True, "mean": (0.5, 0.5, 0.5)}
    (tmp_path / "tiny.json").write_text(json.dumps(VIT_CFG))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", {"tiny": VIT_CFG})
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny", {"openai": tag_cfg})

    clip = create_clip(architecture="tiny", pretrained="openai")
    assert clip.model_cfg["quick_gelu"] is True
    assert clip.preprocess_cfg["mean"] == [0.5, 0.5, 0.5]
    save_clip(clip, tmp_path / "copy")
    batch = inputs(clip)
    for model in (clip.model, load_clip(tmp_path / "copy").model):
        assert torch.equal(outputs(model, *batch)["image_features"], outputs(source.model, *batch)["image_features"])


def test_activation_of_a_file_must_be_that_of_its_config(tmp_path):
    save_clip(create_clip(model_cfg={**VIT_CFG, "quick_gelu": True}), tmp_path)
    with pytest.raises(UserError, match="was trained with quick_gelu, unlike the model in the recipe"):
        create_clip(model_cfg=VIT_CFG, pretrained=str(tmp_path / "open_clip_model.safetensors"))


def trained_names(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("cfg", [VIT_CFG, CUSTOM_CFG], ids=["clip", "custom"])
def test_locked_text_tower_keeps_every_text_weight(cfg):
    model = create_clip(model_cfg=cfg).model
    lock(model, text=True)
    assert all(name.startswith(("visual.", "logit_")) for name in trained_names(model))
    assert "logit_scale" in trained_names(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tokens = open_clip.tokenize(["a", "b"])[:, :16]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    result = model(torch.randn(2, 3, 32, 32), tokens)
    (result["image_features"] @ result["text_features"].T * result["logit_scale"]).square().sum().backward()
    optimizer.step()
    for name, value in model.state_dict().items():
        if not name.startswith(("visual.", "logit_")):
            assert torch.equal(value, before[name]), name


def test_vit_is_locked_as_in_open_clip():
    for groups in range(6):
        ours, plain = (create_clip(model_cfg=VIT_CFG).model for _ in range(2))
        lock(ours, image_unlocked_groups=groups)
        plain.lock_image_tower(unlocked_groups=groups, freeze_bn_stats=True)
        assert trained_names(ours) == trained_names(plain)
    assert "visual.conv1.weight" in trained_names(ours)


@pytest.mark.parametrize("cfg", [VIT_CFG, CUSTOM_CFG], ids=["clip", "custom"])
def test_text_transformer_is_locked_by_groups_as_in_open_clip(cfg):
    for groups in range(cfg["text_cfg"]["layers"] + 3):
        ours, plain = (create_clip(model_cfg=cfg).model for _ in range(2))
        lock(ours, text_unlocked_groups=groups)
        plain.lock_text_tower(unlocked_layers=groups)
        assert trained_names(ours) == trained_names(plain)
    assert any("token_embedding" in name for name in trained_names(ours))


@pytest.mark.parametrize(("groups", "first"), [(0, None), (1, "attnpool"), (2, "layer4"), (5, "layer1"), (6, "conv1")])
def test_resnet_is_locked_from_the_stem_on(groups, first):
    model = create_clip(model_cfg=RESNET_CFG).model
    lock(model, image_unlocked_groups=groups)
    parts = ["conv1", "bn1", "conv2", "bn2", "conv3", "bn3", "layer1", "layer2", "layer3", "layer4", "attnpool"]
    expected = set(parts[parts.index(first) :]) if first else set()
    trained = {name.split(".")[1] for name in trained_names(model) if name.startswith("visual.")}
    assert trained == expected

    before = {name: value.clone() for name, value in model.visual.state_dict().items()}
    model.train().encode_image(torch.randn(4, 3, 64, 64))
    for name, value in model.visual.state_dict().items():
        if "running" in name:
            assert torch.equal(value, before[name]) == (name.split(".")[0] not in expected), name


def test_locked_resnet_still_loads_in_plain_open_clip(tmp_path):
    clip = create_clip(model_cfg=RESNET_CFG)
    lock(clip.model, image_unlocked_groups=2)
    save_clip(clip, tmp_path)
    plain, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}", output_dict=True)
    batch = inputs(clip)
    expected, got = outputs(clip.model, *batch), outputs(plain, *batch)
    torch.testing.assert_close(got["image_features"], expected["image_features"], rtol=1e-5, atol=1e-5)


def test_patterns_lock_by_name():
    model = create_clip(model_cfg=VIT_CFG).model
    lock(model, patterns=[r"^visual\..*mlp", r"^token_embedding"])
    names = {name for name, _ in model.named_parameters()}
    expected = {n for n in names if (n.startswith("visual.") and "mlp" in n) or n.startswith("token_embedding")}
    assert names - trained_names(model) == expected
    assert expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patterns": ["nothing_like_it"]}, "no parameter matches the pattern 'nothing_like_it'"),
        ({"patterns": ["("]}, "not a regular expression"),
        ({"image_unlocked_groups": 6}, "image-unlocked-groups 6 is not between 0 and 5"),
        ({"image_unlocked_groups": -1}, "image-unlocked-groups -1 is"),
        ({"text_unlocked_groups": 5}, "text-unlocked-groups 5 is not between 0 and 4"),
        ({"text_unlocked_groups": 0, "image_unlocked_groups": 0}, "everything is locked"),
        ({"text": True, "image_unlocked_groups": 0}, "everything is locked"),
        ({"patterns": ["."]}, "everything is locked"),
    ],
)
def test_impossible_locks_are_explained(options, message):
    with pytest.raises(UserError, match=message):
        lock(create_clip(model_cfg=VIT_CFG).model, **options)


def test_a_temperature_and_a_bias_alone_are_nothing_to_train():
    with pytest.raises(UserError, match="everything is locked"):
        lock(create_clip(model_cfg=CUSTOM_CFG).model, patterns=["^visual", "^text"])


def test_summary_counts_by_part():
    model = create_clip(model_cfg=VIT_CFG).model
    lock(model, text=True, image_unlocked_groups=1)
    total = sum(parameter.numel() for parameter in model.parameters())
    visual = sum(parameter.numel() for parameter in model.visual.parameters())
    assert trainable_summary(model) == (
        f"trains 769 of {total / 1e3:.1f}K parameters (0.1 %): visual 768 of {visual / 1e3:.1f}K, "
        f"text 0 of {(total - visual - 1) / 1e3:.1f}K, logit_scale"
    )


def test_texts_longer_than_the_context_are_truncated():
    clip = create_clip(model_cfg=VIT_CFG)
    assert clip.context_length == 16
    texts = ["dog " * count for count in (1, 14, 15, 40)]
    tokens = clip.tokenizer(texts)
    assert tokens.shape == (4, 16)
    assert tokens[3, -1] == tokens[1, -1] == clip.tokenizer.eot_token_id


@pytest.fixture
def hugging_face_name(tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(WordLevel({"[PAD]": 0, "[UNK]": 1, "dog": 2, "cat": 3}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    fast.save_pretrained(tmp_path / "words")
    return str(tmp_path / "words")


def test_hugging_face_tokenizer_travels_with_the_folder(hugging_face_name, tmp_path):
    cfg = {**CUSTOM_CFG, "text_cfg": {**TEXT_CFG, "vocab_size": 8, "hf_tokenizer_name": hugging_face_name}}
    clip = create_clip(model_cfg=cfg)
    tokens = clip.tokenizer(["dog cat", "dog " * 17, "cow"])
    save_clip(clip, tmp_path / "model")
    (tmp_path / "words").rename(tmp_path / "gone")
    again = load_clip(tmp_path / "model")
    assert torch.equal(again.tokenizer(["dog cat", "dog " * 17, "cow"]), tokens)
    with pytest.raises(UserError, match=r"the tokenizer .*words cannot be loaded"):
        create_clip(model_cfg=cfg)
