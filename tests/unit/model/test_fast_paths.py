import copy

import open_clip
import pytest
import torch

from mcl_clip.core.errors import UserError
from mcl_clip.data.loader import trim_padding
from mcl_clip.model.clip import encode_texts
from mcl_clip.model.fast_paths import FirstTokenBlock, takes_short_texts, use_fast_paths
from mcl_clip.model.prepare import lock, prepare_training

TEXT = {"context_length": 32, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 3}
VISION = {"image_size": 32, "layers": 3, "width": 32, "head_width": 16, "patch_size": 8}
RESNET = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}
CAPTIONS = ["a dog!", "two cats on a red sofa, and a bird outside", "!"]
CHANGES = {
    "plain": {},
    "custom": {"custom_text": True},
    "layer scale": {"vision_cfg": {**VISION, "ls_init_value": 0.3}},
    "mean of patches": {"vision_cfg": {**VISION, "pool_type": "avg"}},
    "resnet": {"vision_cfg": RESNET},
    "end by its number": {"text_cfg": {**TEXT, "pool_type": "eos", "eos_id": 49407}},
    "no causal mask": {"text_cfg": {**TEXT, "no_causal_mask": True}, "custom_text": True},
    "last token": {"text_cfg": {**TEXT, "pool_type": "last"}, "custom_text": True},
}
FIRST_TOKEN = {name for name in CHANGES if name not in ("mean of patches", "resnet")}
SHORT_TEXTS = {name for name in CHANGES if name not in ("no causal mask", "last token")}


def make(name, dtype=torch.float64):
    """Return open_clip's model and a copy with fast paths."""
    cfg = {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT, **CHANGES[name]}
    custom = cfg.pop("custom_text", False)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        plain = (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**cfg, output_dict=True).to(dtype)
        for parameter in plain.parameters():  # biases start at 0, some scales small
            parameter.data += 0.05 * torch.randn(parameter.shape, dtype=dtype)
    fast = copy.deepcopy(plain)
    use_fast_paths(fast)
    return plain, fast


def batch():
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(3, 3, 32, 32, generator=generator, dtype=torch.float64)
    return images, open_clip.SimpleTokenizer(context_length=32)(CAPTIONS)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", CHANGES)
def test_features_and_gradients_are_those_of_open_clip(name, training):
    plain, fast = (model.train(training) for model in make(name))
    images, tokens = batch()
    is_short = takes_short_texts(fast)
    short = trim_padding(tokens) if is_short else tokens
    assert (name in SHORT_TEXTS) == is_short == (short.shape[1] < 32)
    assert (name in FIRST_TOKEN) == any(isinstance(module, FirstTokenBlock) for module in fast.modules())
    expected, got = plain(images, tokens), fast(images, short)
    for feature in ("image_features", "text_features"):
        torch.testing.assert_close(got[feature], expected[feature], rtol=0, atol=1e-12)
    for out in (expected, got):
        (out["image_features"] @ out["text_features"].T).diag().sum().backward()
    gradients = {name: parameter.grad for name, parameter in plain.named_parameters() if parameter.grad is not None}
    assert gradients
    for name, parameter in fast.named_parameters():
        if name in gradients:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=0, atol=1e-12, msg=name)


def test_weights_and_copies_stay_exchangeable():
    plain, fast = make("plain")
    assert plain.state_dict().keys() == fast.state_dict().keys()
    images, tokens = batch()
    again = copy.deepcopy(fast).eval()
    again.load_state_dict(plain.state_dict())
    use_fast_paths(again)  # a second time changes nothing
    assert torch.equal(again(images, tokens)["image_features"], fast.eval()(images, tokens)["image_features"])


def test_padding_is_left_out_up_to_a_multiple_of_8():
    for used, length in ((1, 8), (8, 8), (9, 16), (30, 32), (32, 32)):
        tokens = torch.zeros(2, 32, dtype=torch.int64)
        tokens[1, used - 1] = 7
        assert torch.equal(trim_padding(tokens), tokens[:, :length])
    assert trim_padding(torch.full((1, 12), 3)).shape == (1, 12)
    assert trim_padding(torch.zeros(2, 32, dtype=torch.int64)).shape == (2, 0)


def test_a_resnet_is_laid_out_for_convolutions():
    _, model = make("resnet", torch.float32)
    prepare_training(model, compiled=False, patch_dropout=0, grad_checkpointing=False)
    assert model.visual.layer1[0].conv2.weight.is_contiguous(memory_format=torch.channels_last)
    _, model = make("plain")
    prepare_training(model, compiled=False, patch_dropout=0, grad_checkpointing=False)
    assert model.visual.conv1.weight.is_contiguous()


def test_patches_are_left_out_in_training_alone():
    plain, model = make("plain")
    prepare_training(model, compiled=False, patch_dropout=0.5, grad_checkpointing=False)
    images, _ = batch()
    lengths = []
    model.visual.transformer.resblocks[0].register_forward_pre_hook(lambda _, given: lengths.append(given[0].shape[1]))
    with torch.no_grad():
        model.train().encode_image(images)
        torch.testing.assert_close(model.eval().encode_image(images), plain.eval().encode_image(images))
    assert lengths == [1 + 8, 1 + 16]
    with pytest.raises(UserError, match=r"patch-dropout 0.5 needs a vision transformer .* is a ModifiedResNet; use 0"):
        prepare_training(make("resnet")[1], compiled=False, patch_dropout=0.5, grad_checkpointing=False)


def kept_bytes(model) -> int:
    """Bytes that autograd keeps of a forward pass, without weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model(*batch())
    del out
    return sum(size for pointer, size in kept.items() if pointer not in weights)


@pytest.mark.parametrize("name", ["plain", "custom"])
def test_checkpointing_keeps_less_for_the_same_gradients(name):
    plain, model = make(name)
    prepare_training(model, compiled=False, patch_dropout=0, grad_checkpointing=True)
    assert kept_bytes(model) < 0.5 * kept_bytes(plain)
    for each in (plain, model):
        each(*batch())["image_features"].sum().backward()
    for (key, one), other in zip(plain.named_parameters(), model.parameters(), strict=True):
        if one.grad is not None:
            torch.testing.assert_close(other.grad, one.grad, rtol=0, atol=1e-12, msg=key)


def test_a_tower_that_cannot_be_checkpointed_is_named():
    with pytest.raises(UserError, match=r"grad-checkpointing cannot be used .* type ModifiedResNet; leave"):
        prepare_training(make("resnet")[1], compiled=False, patch_dropout=0, grad_checkpointing=True)


def test_locked_blocks_keep_nothing_for_the_backward_pass():
    _, model = make("plain")
    whole = kept_bytes(model)
    lock(model, text=True, image_unlocked_groups=2)  # the last block and the projection
    assert kept_bytes(model) < whole / 4


@torch.no_grad()
def test_texts_are_encoded_with_texts_of_similar_length():
    plain, fast = (model.eval() for model in make("plain"))
    captions = ["a dog " * (1 + number * 5 % 14) for number in range(70)]
    tokens = open_clip.SimpleTokenizer(context_length=32)(captions)
    lengths = []
    fast.transformer.register_forward_pre_hook(lambda _, given: lengths.append(given[0].shape[:2]))
    features = encode_texts(fast, tokens, torch.device("cpu"))
    torch.testing.assert_close(features, plain.encode_text(tokens), rtol=0, atol=1e-12)
    assert [rows for rows, _ in lengths] == [32, 32, 6]
    used = tokens.ne(0).sum(1).sort().values
    assert [length for _, length in lengths] == [used[31], used[63], used[69]]
    assert torch.equal(encode_texts(plain, tokens, torch.device("cpu")), plain.encode_text(tokens))
    assert encode_texts(fast, torch.zeros(2, 32, dtype=torch.int64), torch.device("cpu")).shape == (2, 24)


@pytest.mark.parametrize("name", ["plain", "custom"])
def test_both_towers_are_compiled(name):
    _, model = make(name)
    prepare_training(model, compiled=True, patch_dropout=0, grad_checkpointing=False)
    towers = model.visual, model.text if name == "custom" else model.transformer
    assert all(tower._compiled_call_impl is not None for tower in towers)
