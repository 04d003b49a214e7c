import json
import sys

import open_clip
import pytest
import torch
import transformers
from PIL import Image
from transformers import AutoTokenizer, CLIPModel, CLIPProcessor, pipeline

from mcl_clip.core.errors import UserError
from mcl_clip.model.clip import ClipBundle, create_clip
from mcl_clip.publish.hf_clip import features_of, transformers_features, write_clip_model, write_clip_tokenizer

BEFORE_5 = int(transformers.__version__.split(".")[0]) < 5
TEXTS = ["a dog", "two red cars in the rain", "many " * 40, "x"]
ODD = [
    "", " ", "A  photo\n of Dogs's!!", "I'LL don't", "😀 emoji", "日本語", "é É", "x<|endoftext|>y", "<|startoftext|>",
    "a_b-c 1234", "#1!$%&", "naïve Ελλάδα", "tab\tbed", "!!!!!", "( ͡° ͜ʖ ͡°)",
]  # fmt: skip
REPAIRED = ["it\u2019s", "&amp; ok &lt;", "broken Ã© text", "ﬁsh"]  # by open_clip, before it reads them


def make_cfg(*, vision=None, text=None, **more):
    return {
        "embed_dim": 24,
        "vision_cfg": {
            "image_size": 32,
            "layers": 2,
            "width": 32,
            "head_width": 16,
            "patch_size": 16,
            **(vision or {}),
        },
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2, **(text or {})},
        **more,
    }


def make_clip(cfg, **options):
    """Return a model with all weights random, also those initialized to zeros or ones."""
    clip = create_clip(model_cfg=cfg, **options)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in clip.model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    clip.model.eval()
    return clip


def make_images(size, count=3):
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (count, *size, 3), generator=generator, dtype=torch.uint8)
    return [Image.fromarray(image.numpy()) for image in pixels]


@torch.no_grad()
def own_features(clip, images):
    pixels = torch.stack([clip.image_transform(image) for image in images])
    return clip.model.encode_image(pixels), clip.model.encode_text(clip.tokenizer(TEXTS))


VARIANTS = {
    "gelu": make_cfg(),
    "quick_gelu": make_cfg(quick_gelu=True),
    "large patches": make_cfg(vision={"image_size": 48, "patch_size": 24, "layers": 1}),
    "size that patches do not fill": make_cfg(vision={"image_size": 40, "patch_size": 12}),
    "pairs of sizes": make_cfg(vision={"image_size": [32, 32], "patch_size": [8, 8]}),
    "one head": make_cfg(vision={"head_width": 32}),
    "narrow heads": make_cfg(vision={"head_width": 4}),
    "mlp": make_cfg(vision={"mlp_ratio": 2.5}, text={"mlp_ratio": 3.0}),
    "text": make_cfg(text={"context_length": 9, "vocab_size": 49500, "width": 40, "heads": 5, "layers": 3}),
    "sin_cos_2d": make_cfg(vision={"pos_embed_type": "sin_cos_2d", "patch_dropout": 0.5}),
    "one-dimensional scale": {**make_cfg(), "embed_dim": 40, "nonscalar_logit_scale": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_clip_model_computes_the_same(variant, tmp_path):
    clip = make_clip(VARIANTS[variant])
    write_clip_model(tmp_path, clip)
    size = clip.model.visual.image_size
    images = make_images(size)
    expected = own_features(clip, images)
    got = transformers_features(tmp_path, images, TEXTS)
    differences = [(a - b).abs().max().item() for a, b in zip(got, expected, strict=True)]
    sys.stdout.write(f"{variant}: image {differences[0]:.1e}, text {differences[1]:.1e}\n")
    assert max(differences) < 1e-5
    assert min(features.abs().max() for features in got) > 0.1
    model, loading = CLIPModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.logit_scale.item() == clip.model.logit_scale.item()
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


def test_clip_model_is_written_without_the_global_generator(tmp_path):
    clip = make_clip(make_cfg())
    state = torch.random.get_rng_state()
    write_clip_model(tmp_path, clip)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("mode", ["shortest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_clip_model_resizes_images_nearly_as_open_clip_does(mode, interpolation, tmp_path):
    preprocess = {"resize_mode": mode, "interpolation": interpolation, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}
    clip = make_clip(make_cfg(), preprocess=preprocess)
    write_clip_model(tmp_path, clip)
    images = [
        *make_images((60, 90)),
        *make_images((224, 300)),
        *make_images((32, 32)),
    ]  # where both cut at the same pixel
    expected = torch.stack([clip.image_transform(image) for image in images])
    got = CLIPProcessor.from_pretrained(tmp_path)(images=images, return_tensors="pt")["pixel_values"]
    steps = (got - expected).abs() * torch.tensor(preprocess["std"])[:, None, None] * 255
    sys.stdout.write(f"{mode}, {interpolation}: at most {steps.max().item():.2f} of 255\n")
    assert steps.max() < 1.5
    assert steps[-3:].max() < 1e-3


def test_clip_model_needs_no_code_for_a_pipeline(tmp_path):
    clip = make_clip(make_cfg())
    write_clip_model(tmp_path, clip)
    image = make_images((32, 32), 1)[0]
    labels = ["dog", "red car", "very long " * 3]
    classify = pipeline("zero-shot-image-classification", model=str(tmp_path), device="cpu")
    entries = classify(image, candidate_labels=labels, hypothesis_template="{}")
    got = {entry["label"]: entry["score"] for entry in entries}
    with torch.no_grad():
        output = clip.model(clip.image_transform(image)[None], clip.tokenizer(labels))
    logits = output["logit_scale"] * output["image_features"] @ output["text_features"].T
    assert [got[label] for label in labels] == pytest.approx(logits.softmax(1)[0].tolist(), abs=1e-5)


REFUSED = {
    "a CustomTextCLIP": make_cfg(custom_text=True),
    "a logit_bias": make_cfg(init_logit_bias=-10.0),
    "an image tower of type ModifiedResNet": make_cfg(vision={"layers": [1, 1, 1, 1], "width": 16, "head_width": 8}),
    "vision_cfg with pool_type='avg'": make_cfg(vision={"pool_type": "avg"}),
    "vision_cfg with no_ln_pre=True": make_cfg(vision={"no_ln_pre": True}),
    "vision_cfg with final_ln_after_pool=True": make_cfg(vision={"final_ln_after_pool": True}),
    "vision_cfg with ls_init_value=0.1": make_cfg(vision={"ls_init_value": 0.1}),
    "vision_cfg with attentional_pool=True": make_cfg(vision={"attentional_pool": True, "attn_pooler_heads": 2}),
    "vision_cfg with qk_norm=True": make_cfg(vision={"qk_norm": True}),
    "vision_cfg with norm_kwargs={'eps': 1e-06}": make_cfg(vision={"norm_kwargs": {"eps": 1e-6}}),
    "image_size=(32, 48)": make_cfg(vision={"image_size": [32, 48]}),
    "text_cfg with act_kwargs={'approximate': 'tanh'}": make_cfg(text={"act_kwargs": {"approximate": "tanh"}}),
    "text_cfg with pool_type='last'": make_cfg(text={"pool_type": "last"}),
    "text_cfg with no_causal_mask=True": make_cfg(text={"no_causal_mask": True}),
    "text_cfg with proj_bias=True": make_cfg(text={"proj_bias": True}),
    "text_cfg with tokenizer_kwargs={'clean': 'canonicalize'}": make_cfg(
        text={"tokenizer_kwargs": {"clean": "canonicalize"}}
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_clip_model_cannot_express_is_refused(what, tmp_path):
    clip = create_clip(model_cfg=REFUSED[what])
    with pytest.raises(UserError) as caught:
        write_clip_model(tmp_path, clip)
    assert f"the model has {what}, which the CLIPModel" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_more_that_a_clip_model_cannot_express_is_refused(tmp_path):
    with pytest.raises(UserError, match="resize_mode='longest'"):
        write_clip_model(tmp_path, create_clip(model_cfg=make_cfg(), preprocess={"resize_mode": "longest"}))
    coca = open_clip.CoCa(
        embed_dim=16, multimodal_cfg={"width": 16, "heads": 2, "layers": 1, "context_length": 8},
        text_cfg=make_cfg()["text_cfg"], vision_cfg={**make_cfg()["vision_cfg"], "attn_pooler_heads": 2},
    )  # fmt: skip
    clip = ClipBundle(model=coca, model_cfg=make_cfg(), preprocess_cfg={"size": 32}, tokenizer=len)
    with pytest.raises(UserError, match="the model has a CoCa"):
        write_clip_model(tmp_path, clip)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("context_length", [16, 77])
def test_clip_tokenizer_reads_texts_as_open_clip_does(context_length, tmp_path):
    write_clip_tokenizer(tmp_path, context_length)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    simple = open_clip.SimpleTokenizer(context_length=context_length)
    assert tokenizer.model_max_length == context_length
    for text in [*ODD, *TEXTS]:
        ids = tokenizer(text, truncation=True)["input_ids"]
        expected = simple(text)[0].tolist()
        assert ids == expected[: expected.index(simple.eot_token_id) + 1], text
        assert ids.count(simple.eot_token_id) == 1
    assert tokenizer.decode(tokenizer("Two dogs")["input_ids"], skip_special_tokens=True) == "two dogs"
    for text in REPAIRED:  # as the docstring says; the processor repairs them
        assert tokenizer(text)["input_ids"] != [simple.sot_token_id, *simple.encode(text), simple.eot_token_id]


def test_clip_tokenizer_knows_nothing_of_where_it_was_made(tmp_path):
    write_clip_tokenizer(tmp_path, 16)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["model_input_names"] == ["input_ids", "attention_mask"]
    assert not {"is_local", "local_files_only", "name_or_path"} & config.keys()
    assert "/tmp" not in (tmp_path / "tokenizer_config.json").read_text()


def test_features_are_taken_from_what_this_version_of_transformers_returns(tmp_path):
    write_clip_model(tmp_path, make_clip(make_cfg()))
    model = CLIPModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        output = model.get_text_features(torch.tensor([[49406, 320, 49407]]))
    assert isinstance(output, torch.Tensor) is BEFORE_5
    assert features_of(output).shape == (1, 24)
