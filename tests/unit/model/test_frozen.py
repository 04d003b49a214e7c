"""Encoders split between what is locked and what trains."""

import pytest
import torch
import transformers
from open_clip.hf_model import HFTextEncoder
from torch import nn

from mcl_clip.model.clip import create_clip
from mcl_clip.model.frozen import accept_outputs, find_frozen_part
from mcl_clip.model.prepare import lock

TEXT = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
VIT = {"image_size": 32, "patch_size": 8, "layers": 3, "width": 32, "head_width": 16}
TIMM = {"timm_model_name": "resnet10t", "timm_pool": "avg", "timm_proj": "mlp", "image_size": 32}
EFFICIENT = {**TIMM, "timm_model_name": "test_efficientnet"}
IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def towers(**vision) -> nn.Module:
    return create_clip(model_cfg={"embed_dim": 16, "vision_cfg": vision, "text_cfg": TEXT}).model


@pytest.mark.parametrize(
    ("vision", "unlocked", "shape"),
    [
        (VIT, 1, (1, 32)),  # the fast path computes only the first token of the last block
        (VIT, 2, (17, 32)),
        (VIT, 4, (17, 32)),  # the embeddings alone, where no block is locked
        ({**VIT, "pool_type": "avg"}, 0, (17, 32)),
        (TIMM, 0, (512,)),
        (TIMM, 1, (256, 2, 2)),
        (EFFICIENT, 1, (48, 2, 2)),
        (EFFICIENT, 2, (32, 4, 4)),
    ],
)
def test_outputs_give_the_features_of_images(vision, unlocked, shape):
    model = towers(**vision)
    lock(model, image_unlocked_groups=unlocked)
    part = find_frozen_part(model.visual, IMAGES)
    assert not model.visual.training
    assert part.shape == shape
    with torch.no_grad():
        expected, outputs = model.encode_image(IMAGES), part.run(IMAGES)
        accept_outputs(model.visual, part)
        torch.testing.assert_close(model.encode_image(outputs), expected)
        torch.testing.assert_close(model.encode_image(IMAGES), expected)


@pytest.mark.parametrize("vision", [VIT, TIMM, EFFICIENT])
def test_what_trains_gets_the_same_gradients(vision):
    grads = []
    for stored in (False, True):
        model = towers(**vision)
        lock(model, image_unlocked_groups=2)
        part = find_frozen_part(model.visual, IMAGES)
        inputs = IMAGES
        if stored:
            accept_outputs(model.visual, part)
            inputs = part.run(IMAGES).detach()
            model.visual.set_grad_checkpointing(True)
        model.train().encode_image(inputs).square().sum().backward()
        grads.append({name: p.grad for name, p in model.visual.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert len(grads[0]) > 5
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad)


@pytest.mark.parametrize(
    ("vision", "locked"),
    [
        (VIT, {}),
        (VIT, {"patterns": ["resblocks"]}),  # the embeddings train
        ({**VIT, "patch_dropout": 0.5}, {"image_unlocked_groups": 1}),
        (TIMM, {}),
        (TIMM, {"patterns": [r"^visual\.trunk"]}),  # its BatchNorm layers see the batch
        ({**TIMM, "timm_drop_path": 0.5}, {"image_unlocked_groups": 0}),
        ({"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16}, {"image_unlocked_groups": 1}),
    ],
)
def test_towers_that_train_or_draw_below_have_no_frozen_part(vision, locked):
    model = towers(**vision)
    lock(model, **locked)
    assert find_frozen_part(model.visual, IMAGES) is None


def test_equal_parts_have_equal_digests_and_others_do_not():
    def digest(change: float = 0, unlocked: int = 2) -> str:
        model = towers(**VIT)
        lock(model, image_unlocked_groups=unlocked)
        with torch.no_grad():
            model.visual.class_embedding += change
            model.visual.proj += 1  # trains
        return find_frozen_part(model.visual, IMAGES).digest

    assert digest() == digest()
    assert len({digest(), digest(change=1e-3), digest(unlocked=3)}) == 3


@pytest.mark.parametrize(("unlocked", "is_frozen"), [(0, True), (1, False), (None, False)])
def test_outputs_give_the_features_of_texts(unlocked, is_frozen):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.RobertaConfig(vocab_size=8, max_position_embeddings=20, **sizes)
    model = nn.Module()
    model.text = HFTextEncoder("words", 16, config=config, pooler_type="mean_pooler", proj_type="mlp")
    lock(model, text_unlocked_groups=unlocked)
    tokens = torch.tensor([[2, 3, 4, 1], [5, 6, 1, 1]])  # 1 pads
    part = find_frozen_part(model.text, tokens)
    assert (part is not None) == is_frozen
    if part is not None:
        with torch.no_grad():
            expected, outputs = model.text(tokens), part.run(tokens)
            assert outputs.shape == (2, *part.shape) == (2, 32)
            accept_outputs(model.text, part)
            model.train()
            torch.testing.assert_close(model.text(outputs), expected)
            torch.testing.assert_close(model.text(tokens), expected)
