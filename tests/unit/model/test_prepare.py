"""What a stage relies on in its encoders is checked before it trains."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from mcl_clip.config import LockConfig, TrainConfig
from mcl_clip.core.errors import UserError
from mcl_clip.model import prepare
from mcl_clip.model.clip import check_vocabulary, create_clip, load_clip, save_clip
from mcl_clip.model.fast_paths import FirstTokenBlock
from mcl_clip.model.prepare import check_contract, lock, reference_features, synchronize_batch_norm
from mcl_clip.tools.estimates import measure

TRAIN = TrainConfig(steps=1, global_batch_size=2, lr=1.0)
TEXT = {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
VIT = {"image_size": 32, "patch_size": 8, "layers": 1, "width": 32, "head_width": 16}
CLIP = {"embed_dim": 16, "vision_cfg": VIT, "text_cfg": TEXT}
COCA = {
    **CLIP,
    "vision_cfg": {
        **VIT, "attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 8, "output_tokens": True
    },
    "text_cfg": {**TEXT, "embed_cls": True, "output_tokens": True},
    "multimodal_cfg": {**TEXT, "mlp_ratio": 4},
    "custom_text": True,
}  # fmt: skip


def timm_cfg(name, size, **changed):
    vision = {"timm_model_name": name, "timm_pool": "", "timm_proj": "linear", "image_size": size}
    return {**CLIP, "vision_cfg": {**vision, **changed}}


def check(clip, expected=None):
    check_contract(clip, expected or reference_features(clip), name="this tower", stage=1)


@pytest.mark.parametrize("cfg", [CLIP, {**CLIP, "custom_text": True, "init_logit_bias": -10.0}], ids=["clip", "siglip"])
def test_a_model_that_is_prepared_fulfils_the_contract(cfg):
    clip = create_clip(model_cfg=cfg)
    clip.model.train()
    expected = reference_features(clip)
    lock(clip.model, image_unlocked_groups=1)
    before = torch.get_rng_state()
    check(clip, expected)
    assert clip.model.training
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in clip.model.parameters())


def test_coca_is_refused_until_its_decoder_is_locked():
    """Its captioning loss is not trained here: 29 parameters would never move, and fail on several GPUs."""
    clip = create_clip(model_cfg=COCA)
    sentence = r"CoCa-tiny cannot be trained as it is: 29 of the parameters .*text_decoder\..*patterns '\^text_decoder'"
    with pytest.raises(UserError, match=sentence):
        check_contract(clip, reference_features(clip), name="CoCa-tiny", stage=1)
    with pytest.raises(UserError, match=sentence):  # from the doctor, too
        measure(COCA, TRAIN, name="CoCa-tiny", stage=1)
    lock(clip.model, patterns=["^text_decoder"])
    check(clip)
    assert measure(COCA, replace(TRAIN, lock=LockConfig(patterns=("^text_decoder",)))).saved_bytes > 0
    assert measure(COCA, replace(TRAIN, steps=0)).parameters > 0  # a stage that trains nothing


def test_a_parameter_that_nothing_uses_is_named():
    clip = create_clip(model_cfg=CLIP)
    clip.model.visual.register_parameter("spare", nn.Parameter(torch.ones(2)))
    with pytest.raises(UserError, match=r"1 of the parameters .* \(visual\.spare\); .* '\^visual\\\.spare'"):
        check(clip)


@pytest.mark.parametrize("convert", ["lock", "synchronize"])
def test_a_lost_activation_is_noticed(convert):
    """open_clip's and torch's conversions of BatchNorm drop the activation that timm fuses into the layer."""
    clip = create_clip(model_cfg=timm_cfg("efficientnet_b0", 64))
    expected = reference_features(clip)
    model = clip.model
    clip.model = synchronize_batch_norm(copy.deepcopy(model))
    check(clip, expected)
    if convert == "lock":
        model.visual.lock(freeze_bn_stats=True)
    clip.model = nn.SyncBatchNorm.convert_sync_batchnorm(model) if convert == "synchronize" else model
    with pytest.raises(
        UserError, match=r"this tower cannot be trained .* stage 1 changes what its image tower computes"
    ):
        check(clip, expected)


def test_a_wrong_fast_path_is_noticed(monkeypatch):
    clip = create_clip(model_cfg=CLIP)
    encode = prepare.encode_texts
    monkeypatch.setattr(prepare, "encode_texts", lambda model, tokens, device: encode(model, tokens.flip(0), device))
    with pytest.raises(UserError, match="changes what its text tower computes"):
        check(clip)


def test_images_of_another_size_than_the_tower_takes_are_explained():
    clip = create_clip(model_cfg=CLIP)
    clip.preprocess_cfg["size"] = 48
    with pytest.raises(UserError, match="does not take images of 48 x 48 pixels"):
        reference_features(clip)


def test_a_wrong_fast_path_of_images_is_noticed(monkeypatch):
    clip = create_clip(model_cfg=CLIP)
    monkeypatch.setattr(FirstTokenBlock, "forward", lambda self, tokens, **_: -tokens[:, :1])
    with pytest.raises(UserError, match="changes what its image tower computes"):
        check(clip)


def test_a_single_sample_that_changes_is_noticed():
    clip = create_clip(model_cfg=CLIP)
    image, text = reference_features(clip)
    other = torch.randn(1, image.shape[1], generator=torch.Generator().manual_seed(0))
    other -= (other @ image[1:].T) * image[1:]  # orthogonal to the feature, which it turns by a cosine of 0.9
    spoiled = torch.cat([image[:1], 0.9 * image[1:] + 0.19**0.5 * torch.nn.functional.normalize(other)])
    with pytest.raises(UserError, match=r"image tower computes \(cosine 0\.900 to"):
        check(clip, [spoiled, text])


def test_tokens_above_the_vocabulary_are_explained():
    def check_size(vocab_size):
        clip = create_clip(model_cfg={**CLIP, "text_cfg": {**TEXT, "vocab_size": vocab_size}})
        check_vocabulary(clip.model, clip.tokenizer)

    check_size(49408)
    with pytest.raises(UserError, match="the tokenizer makes token 49407, and the text tower has vocab_size 49407"):
        check_size(49407)


@pytest.mark.parametrize("asked", ["in the config", "by preprocess"])
def test_a_timm_tower_is_built_at_another_size_and_loads_again(asked, tmp_path):
    cfg, preprocess = timm_cfg("vit_tiny_patch16_224", 384), {}
    if asked == "by preprocess":
        cfg, preprocess = timm_cfg("vit_tiny_patch16_224", 224), {"size": 384}
    clip = create_clip(model_cfg=cfg, preprocess=preprocess)
    expected = reference_features(clip)
    save_clip(clip, tmp_path / "model")
    again = load_clip(tmp_path / "model")
    assert again.model_cfg["vision_cfg"]["timm_model_name"] == "vit_tiny_patch16_384"
    assert again.preprocess_cfg["size"] == 384
    torch.testing.assert_close(reference_features(again), expected, rtol=0, atol=0)
    # A saved model at yet another size has its positions resampled, and loads again as well.
    smaller = create_clip(architecture=f"local-dir:{tmp_path / 'model'}", preprocess={"size": 224})
    save_clip(smaller, tmp_path / "smaller")
    found = reference_features(load_clip(tmp_path / "smaller"))
    torch.testing.assert_close(found, reference_features(smaller), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_a_timm_tower_of_a_fixed_size_is_refused_in_one_sentence(name, tmp_path):
    sentence = rf"the image tower {name} does not take images of 32 x 32 pixels \(.*\); use 224 pixels, or a tower"
    with pytest.raises(UserError, match=sentence):
        create_clip(model_cfg=timm_cfg(name, 32))
    with pytest.raises(UserError, match=sentence):
        create_clip(model_cfg=timm_cfg(name, 224), preprocess={"size": 32})
    with pytest.raises(UserError, match=sentence):  # from the doctor, too
        measure(timm_cfg(name, 32), TRAIN)


def test_the_doctor_locks_batch_norm_without_values():
    cfg = {**CLIP, "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "head_width": 32}}
    size = measure(cfg, replace(TRAIN, lock=LockConfig(image_unlocked_groups=1)))
    assert 0 < size.trained < size.parameters


def test_a_name_with_another_number_is_not_a_size(tmp_path):
    clip = create_clip(model_cfg=timm_cfg("regnety_002", 320))
    assert clip.model_cfg["vision_cfg"] == timm_cfg("regnety_002", 320)["vision_cfg"]
    assert clip.model.visual.image_size == (320, 320)
