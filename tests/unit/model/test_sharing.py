import open_clip
import pytest
import torch

from mcl_clip.model.clip import create_clip
from mcl_clip.model.multistage import MultistageCLIP, count_shared_blocks
from tests.unit.model.test_multistage import combined

TEXT = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
VISION = {"image_size": 32, "layers": 4, "width": 32, "head_width": 16, "patch_size": 16}


def make_stages(*, unlocked=1, custom=False, vision=VISION, stages=3):
    """Copy one model and change the last `unlocked` blocks, and what follows them, of each copy."""
    cfg = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": TEXT, **({"custom_text": True} if custom else {})}
    clips = [create_clip(model_cfg=cfg, seed=0) for _ in range(stages)]
    for number, clip in enumerate(clips[1:], 1):
        generator = torch.Generator().manual_seed(number)
        visual = clip.model.visual
        upper = list(visual.transformer.resblocks)[len(visual.transformer.resblocks) - unlocked :]
        with torch.no_grad():
            for parameter in [
                *(p for block in upper for p in block.parameters()),
                visual.proj,
                *visual.ln_post.parameters(),
            ]:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return clips


def images(count=3):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("custom", [False, True], ids=["clip", "custom"])
@pytest.mark.parametrize("unlocked", [0, 1, 3, 4])
@torch.no_grad()
def test_features_over_a_shared_trunk_are_those_of_the_stages_apart(unlocked, custom):
    clips = make_stages(unlocked=unlocked, custom=custom)
    expected = [clip.model.eval().encode_image(images()) for clip in clips]
    model = combined(clips)
    assert model.shared_blocks == 4 - unlocked
    calls = []
    blocks = {block for stage in model.stages for block in stage.visual.transformer.resblocks}
    for block in blocks:
        block.register_forward_hook(lambda *_: calls.append(1))
    got = model.encode_image_stages(images())
    assert len(calls) == 4 + 2 * unlocked == len(blocks)
    for stage, wanted in zip(got, expected, strict=True):
        torch.testing.assert_close(stage, wanted, rtol=0, atol=1e-6)
    assert len({tuple(stage.flatten().tolist()) for stage in got}) == 3


@pytest.mark.parametrize("name", ["visual.conv1.weight", "visual.positional_embedding", "visual.ln_pre.bias"])
def test_a_difference_below_the_blocks_stops_the_sharing(name):
    clips = make_stages()
    with torch.no_grad():
        clips[2].model.get_parameter(name).view(-1)[0] += 1e-6
    assert combined(clips).shared_blocks == 0


@torch.no_grad()
def test_blocks_are_shared_below_pooling_that_differs():
    clips = make_stages(vision={**VISION, "attentional_pool": True, "attn_pooler_heads": 2})
    clips[1].model.visual.attn_pool.query += 0.1
    expected = [clip.model.eval().encode_image(images()) for clip in clips]
    model = combined(clips)
    assert model.shared_blocks == 3
    for stage, wanted in zip(model.encode_image_stages(images()), expected, strict=True):
        torch.testing.assert_close(stage, wanted, rtol=0, atol=1e-6)


def test_blocks_that_compute_otherwise_are_not_shared():
    clips = make_stages()
    models = [clip.model for clip in clips]
    cfgs = [clip.model_cfg for clip in clips]
    assert count_shared_blocks(models, cfgs) == 3
    assert count_shared_blocks(models, [*cfgs[:2], {**cfgs[2], "quick_gelu": True}]) == 0
    heads = {**cfgs[2], "vision_cfg": {**VISION, "head_width": 8}}
    assert count_shared_blocks(models, [*cfgs[:2], heads]) == 0


def test_other_image_towers_share_nothing():
    clips = [create_clip(model_cfg={"embed_dim": 24, "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1],
              "width": 8, "head_width": 32}, "text_cfg": TEXT}, seed=0) for _ in range(2)]  # fmt: skip
    expected = clips[0].model.eval().encode_image(images())
    model = combined(clips)
    assert model.shared_blocks == 0
    assert torch.equal(model.encode_image_stages(images())[1], expected)


def test_a_single_stage_shares_nothing():
    assert combined(make_stages(stages=1)).shared_blocks == 0


def test_in_training_each_stage_samples_its_own_patch_dropout():
    cfg = {"embed_dim": 24, "vision_cfg": {**VISION, "image_size": 64, "patch_dropout": 0.5}, "text_cfg": TEXT}
    model = combined([create_clip(model_cfg=cfg, seed=0) for _ in range(2)])
    pixels = torch.nn.functional.interpolate(images(), size=64)
    first, second = model.train().encode_image_stages(pixels)
    assert (first - second).abs().max() > 0.01
    first, second = model.eval().encode_image_stages(pixels)
    assert torch.equal(first, second)


@torch.no_grad()
def test_sharing_is_found_again_in_a_saved_model(tmp_path):
    model = combined(make_stages())
    expected = model.encode_image(images())
    model.save(tmp_path, compact=True)
    again = MultistageCLIP.load(tmp_path)
    assert again.shared_blocks == 3
    torch.testing.assert_close(again.encode_image(images()), expected, rtol=0, atol=1e-6)
    difference = open_clip.factory.load_state_dict(str(tmp_path / "stage_1" / "difference.safetensors"))
    assert not [name for name in difference if "resblocks.0" in name or "token_embedding" in name]
