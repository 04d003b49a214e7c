import json
import math

import open_clip
import pytest
import torch
from torch.nn import functional as F

from mcl_clip.model.clip import create_clip
from mcl_clip.model.multistage import MultistageCLIP, combine_features, have_same_text_tower, join_to_vector

SCALES = (1.0, 3.0, 0.5)


def make_cfg(embed_dim=24, *, custom=False, quick_gelu=False):
    return {
        "embed_dim": embed_dim,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
        "quick_gelu": quick_gelu,
        **({"custom_text": True} if custom else {}),
    }


def make_stages(*, shared, cfg=None):
    """Return three models whose image features have norms of about 1 : 3 : 0.5."""
    clips = [create_clip(model_cfg=cfg or make_cfg(), seed=seed) for seed in range(3)]
    text = {k: v for k, v in clips[0].model.state_dict().items() if not k.startswith(("visual.", "logit_"))}
    for clip, scale in zip(clips, SCALES, strict=True):
        clip.model.eval()
        with torch.no_grad():
            clip.model.visual.proj *= scale
        if shared:
            clip.model.load_state_dict(text, strict=False)
    return clips


def assert_close(got, expected):
    """Compare outputs up to the rounding of the fast paths, which plain open_clip does not have."""
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=0, atol=1e-6)


def combined(clips, **options):
    return MultistageCLIP(
        [clip.model for clip in clips],
        logit_scale=math.log(50),
        preprocess_cfg=clips[0].preprocess_cfg,
        model_cfgs=[clip.model_cfg for clip in clips],
        **options,
    ).eval()


def batch(images=6):
    generator = torch.Generator().manual_seed(1)
    tokens = open_clip.tokenize(["a dog", "two red cars", "rain at night", "a man sings"], context_length=16)
    return torch.randn(images, 3, 32, 32, generator=generator), tokens


def naive_scores(stage_images, stage_texts, combine):
    """Cosines, pair by pair, as the definition says."""
    scores = torch.zeros(len(stage_texts[0]), len(stage_images[0]), dtype=torch.float64)
    for t in range(scores.shape[0]):
        for i in range(scores.shape[1]):
            texts, images = [f[t] for f in stage_texts], [f[i] for f in stage_images]
            if combine == "concat":
                dot = sum((a * b).sum() for a, b in zip(texts, images, strict=True))
                norms = [math.sqrt(sum(f.square().sum() for f in side)) for side in (texts, images)]
                scores[t, i] = dot / (norms[0] * norms[1])
            else:
                cosines = [F.cosine_similarity(a, b, dim=0) for a, b in zip(texts, images, strict=True)]
                scores[t, i] = sum(cosines) / len(cosines)
    return scores


@pytest.mark.parametrize("combine", ["concat", "mean_cosine"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
@pytest.mark.parametrize("custom", [False, True], ids=["clip", "custom"])
@torch.no_grad()
def test_scores_are_those_of_the_definition(combine, shared, custom):
    clips = make_stages(shared=shared, cfg=make_cfg(custom=custom))
    images, tokens = batch()
    images = images.double()
    stages = [clip.model.double() for clip in clips]
    stage_images = [stage.encode_image(images) for stage in stages]
    stage_texts = [stage.encode_text(tokens) for stage in stages]
    expected = naive_scores(stage_images, stage_texts, combine)

    model = combined(clips, combine=combine)
    assert model.shared_text_tower == shared
    output = model(image=images, text=tokens)
    assert output["image_features"].dtype == torch.float64
    torch.testing.assert_close(output["text_features"] @ output["image_features"].T, expected, rtol=0, atol=1e-12)
    assert output["logit_scale"].item() == pytest.approx(50)
    by_parts = combine_features(stage_images, combine), combine_features(stage_texts, combine)
    torch.testing.assert_close(output["image_features"], by_parts[0], rtol=0, atol=1e-14)
    torch.testing.assert_close(output["text_features"], by_parts[1], rtol=0, atol=1e-14)


@torch.no_grad()
def test_norms_of_the_stages_matter_for_concat_only():
    clips = make_stages(shared=True)
    images, _ = batch(64)
    stage_images = [clip.model.encode_image(images) for clip in clips]
    norms = torch.stack([features.norm(dim=1).mean() for features in stage_images])
    assert norms[1] / norms[0] > 2
    assert norms[2] / norms[0] < 0.75
    rescaled = [features / norm for features, norm in zip(stage_images, norms, strict=True)]
    concat, changed = combine_features(stage_images, "concat"), combine_features(rescaled, "concat")
    assert not torch.allclose(concat @ concat.T, changed @ changed.T, atol=0.02)
    cosine, same = combine_features(stage_images, "mean_cosine"), combine_features(rescaled, "mean_cosine")
    torch.testing.assert_close(cosine, same)
    assert not torch.allclose(concat @ concat.T, cosine @ cosine.T, atol=0.02)


@torch.no_grad()
def test_shared_text_tower_is_kept_and_run_once():
    clips = make_stages(shared=True)
    tokens = batch()[1]
    own = sum(parameter.numel() for parameter in clips[0].model.visual.parameters()) + 1
    text = sum(parameter.numel() for parameter in clips[0].model.parameters()) - own
    model = combined(clips)
    assert sum(parameter.numel() for parameter in model.parameters()) == 3 * own + text + 1
    calls = []
    assert model.stages[2].ln_final is model.stages[0].ln_final
    model.stages[0].ln_final.register_forward_hook(lambda *_: calls.append(1))
    text_features = model.encode_text(tokens)
    assert len(calls) == 1
    first, second, third = text_features.split(24, dim=1)
    assert torch.equal(first, second)
    assert torch.equal(first, third)


@pytest.mark.parametrize("custom", [False, True], ids=["clip", "custom"])
def test_any_difference_of_a_text_tower_stops_the_sharing(custom):
    cfg = make_cfg(custom=custom)
    names = [
        n for n in make_stages(shared=True, cfg=cfg)[0].model.state_dict() if not n.startswith(("visual", "logit"))
    ]
    clips = make_stages(shared=True, cfg=cfg)
    stages, cfgs = [clip.model for clip in clips], [clip.model_cfg for clip in clips]
    assert have_same_text_tower(stages, cfgs)
    assert len(names) > 10
    for name in names:
        weight = stages[2].state_dict()[name].view(-1)
        kept = weight[-1].clone()
        weight[-1] += 1e-3
        assert not have_same_text_tower(stages, cfgs), name
        weight[-1] = kept
    assert have_same_text_tower(stages, cfgs)
    assert not have_same_text_tower(stages, [*cfgs[:2], {**cfgs[2], "quick_gelu": True}])
    heads = {**cfgs[2], "text_cfg": {**cfgs[2]["text_cfg"], "heads": 1}}  # the same weights in other heads
    assert not have_same_text_tower(stages, [*cfgs[:2], heads])
    source = {**cfgs[2], "text_cfg": {**cfgs[2]["text_cfg"], "hf_model_pretrained": False}}
    assert have_same_text_tower(stages, [*cfgs[:2], source])  # weights that were replaced since
    stages[2].register_parameter("adapter", torch.nn.Parameter(torch.zeros(1)))
    assert not have_same_text_tower(stages, cfgs)


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
@torch.no_grad()
def test_saved_model_is_equal_and_each_stage_loads_in_plain_open_clip(shared, tmp_path):
    clips = make_stages(shared=shared)
    images, tokens = batch()
    stage_outputs = [clip.model(images, tokens) for clip in clips]
    model = combined(clips, combine="mean_cosine", logit_bias=-3.3)
    expected = model(image=images, text=tokens)
    model.save(tmp_path)

    state = torch.random.get_rng_state()
    again = MultistageCLIP.load(tmp_path, device="cpu")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert (again.combine, again.shared_text_tower, again.training) == ("mean_cosine", shared, False)
    got = again(image=images, text=tokens)
    assert got.keys() == expected.keys() == {"image_features", "text_features", "logit_scale", "logit_bias"}
    assert_close(got, expected)

    for number, outputs in enumerate(stage_outputs):
        folder = tmp_path / f"stage_{number}"
        plain, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}", output_dict=True)
        got = plain.eval()(images, tokens)
        assert_close(got, outputs)
        assert str(transform.transforms) == str(again.image_transform.transforms[1:])  # after conversion to RGB
        assert len({path.stat().st_mode for path in folder.iterdir()}) == 1
    config = json.loads((tmp_path / "mcl_clip_config.json").read_text())
    assert config["stages"] == ["stage_0", "stage_1", "stage_2"]
    assert config["embed_dims"] == [24, 24, 24]
    assert config["shared_text_tower"] is shared


WEIGHTS = [0.5, 0.5, 0.0]


@pytest.mark.parametrize("weights", [WEIGHTS, [0.2, 0.1, 0.7]])
@torch.no_grad()
def test_weighted_cosines_are_kept_by_every_form(weights, tmp_path):
    clips = make_stages(shared=True)
    images, tokens = batch()
    cosines = [F.normalize(c.model.encode_text(tokens)) @ F.normalize(c.model.encode_image(images)).T for c in clips]
    expected = sum(weight * cosine for weight, cosine in zip(weights, cosines, strict=True))
    model = combined(clips, combine="weighted", weights=weights)
    model.save(tmp_path)
    for each in (model, MultistageCLIP.load(tmp_path)):
        output = each(image=images, text=tokens)
        torch.testing.assert_close(output["text_features"] @ output["image_features"].T, expected, rtol=0, atol=1e-6)
        vectors = each.encode_image(images, combine="vector"), each.encode_text(tokens, combine="vector")
        torch.testing.assert_close(vectors[1] @ vectors[0].T, expected, rtol=0, atol=1e-6)
    assert json.loads((tmp_path / "mcl_clip_config.json").read_text())["weights"] == weights


@pytest.mark.parametrize("weights", [None, [0.5, 0.5], [0.5, 0.5, 0.5], [0.5, 1.0, -0.5]])
def test_weights_that_do_not_fit_the_stages_are_refused(weights, tmp_path):
    clips = make_stages(shared=True)
    with pytest.raises(ValueError, match=r"must be a number for each of 3 stages, with the sum 1"):
        combined(clips, combine="weighted", weights=weights)
    combined(clips, combine="weighted", weights=WEIGHTS).save(tmp_path)
    path = tmp_path / "mcl_clip_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"weights": weights}))
    with pytest.raises(ValueError, match=r"must be a number for each of 3 stages, with the sum 1"):
        MultistageCLIP.load(tmp_path)


def test_a_model_without_weights_cannot_be_weighted():
    with pytest.raises(ValueError, match="combine='weighted' needs a model that was saved with weights of its stages"):
        combined(make_stages(shared=True)).encode_image(batch()[0], combine="weighted")


@torch.no_grad()
def test_halves_and_zero_shot_classifier_work_as_in_open_clip():
    model = combined(make_stages(shared=True))
    images, tokens = batch()
    both, image, text = model(images, tokens), model(image=images), model(text=tokens)
    assert torch.equal(image["image_features"], both["image_features"])
    assert torch.equal(text["text_features"], both["text_features"])
    assert image["text_features"] is None
    assert "logit_bias" not in both
    classifier = open_clip.build_zero_shot_classifier(
        model, model.tokenizer, ["dog", "cat"], ["a photo of a {}", "a drawing of a {}"]
    )
    assert classifier.shape == (72, 2)
    texts = model.tokenizer(["a photo of a cat", "a drawing of a cat"])
    mean = F.normalize(model.encode_text(texts, normalize=True).mean(dim=0), dim=0)
    torch.testing.assert_close(classifier[:, 1], mean)


@torch.no_grad()
def test_combination_can_be_replaced_for_one_call():
    clips = make_stages(shared=False)
    images, tokens = batch()
    concat, cosine = combined(clips, combine="concat"), combined(clips, combine="mean_cosine")
    for name, data in (("encode_image", images), ("encode_text", tokens)):
        expected = getattr(cosine, name)(data, normalize=True)
        assert torch.equal(getattr(concat, name)(data, normalize=True, combine="mean_cosine"), expected)
        assert not torch.equal(getattr(concat, name)(data, normalize=True), expected)
    with pytest.raises(ValueError, match="combine='sum' is not one of concat, mean_cosine"):
        concat.encode_image(images, combine="sum")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("combine", ["concat", "mean_cosine"])
def test_combined_features_are_finite_and_of_unit_length(dtype, combine):
    generator = torch.Generator().manual_seed(0)
    features = [300 * torch.randn(5, dim, generator=generator).to(dtype) for dim in (8, 4)]
    features[0][3] = 0
    features[0][4] = features[1][4] = 0
    result = combine_features(features, combine)
    assert result.shape == (5, 12)
    torch.testing.assert_close(result.norm(dim=1), torch.tensor([1, 1, 1, 1, 0], dtype=result.dtype))
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@torch.no_grad()
def test_stages_may_have_different_dimensions(tmp_path):
    clips = [create_clip(model_cfg=make_cfg(dim), seed=dim) for dim in (8, 24)]
    model = combined(clips)
    assert not model.shared_text_tower
    model.save(tmp_path)
    assert MultistageCLIP.load(tmp_path).encode_image(batch()[0]).shape == (6, 32)


def test_stages_that_do_not_fit_together_are_refused(tmp_path):
    clips = make_stages(shared=False)
    with pytest.raises(ValueError, match="'sum' is not one of"):
        combined(clips, combine="sum")
    with pytest.raises(ValueError, match="0 stages with 0 model_cfgs"):
        MultistageCLIP([], logit_scale=1.0, preprocess_cfg={}, model_cfgs=[])
    clips[1].model_cfg["text_cfg"]["context_length"] = 20
    with pytest.raises(ValueError, match="different tokenizers or context lengths"):
        combined(clips)
    clips[1].model_cfg["text_cfg"] = {**clips[0].model_cfg["text_cfg"], "tokenizer_kwargs": {"clean": "whitespace"}}
    with pytest.raises(ValueError, match="different tokenizers or context lengths"):
        combined(clips)
    combined(make_stages(shared=True)).save(tmp_path)
    config = json.loads((tmp_path / "mcl_clip_config.json").read_text())
    (tmp_path / "mcl_clip_config.json").write_text(json.dumps({**config, "format_version": 2}))
    with pytest.raises(ValueError, match="has format version 2, this code reads 1"):
        MultistageCLIP.load(tmp_path)


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
@torch.no_grad()
def test_compact_form_holds_what_stages_share_once(shared, tmp_path):
    model = combined(make_stages(shared=shared))
    images, tokens = batch()
    expected = model(image=images, text=tokens)
    model.save(tmp_path / "whole")
    model.save(tmp_path / "compact", compact=True)
    again = MultistageCLIP.load(tmp_path / "compact")
    got = again(image=images, text=tokens)
    assert_close(got, expected)
    whole, compact = (
        sum(path.stat().st_size for path in (tmp_path / form / "stage_1").glob("*.safetensors"))
        for form in ("whole", "compact")
    )
    text_bytes = 4 * model.stages[0].token_embedding.weight.numel()
    assert (whole - compact >= text_bytes) is shared
    open_clip.create_model(f"local-dir:{tmp_path / 'compact' / 'stage_0'}", require_pretrained=True)
    if shared:
        with pytest.raises(RuntimeError, match="Missing key"):  # an error rather than random weights
            open_clip.create_model(f"local-dir:{tmp_path / 'compact' / 'stage_1'}")


@pytest.mark.parametrize("combine", ["concat", "mean_cosine"])
@torch.no_grad()
def test_vectors_of_one_width_score_exactly_as_the_combination(combine):
    model = combined(make_stages(shared=True), combine=combine).double()
    images, tokens = batch(images=40)
    images = images.double()
    scores = model.encode_text(tokens, normalize=True) @ model.encode_image(images, normalize=True).T
    texts, vectors = (model.encode_text(tokens, combine="vector"), model.encode_image(images, combine="vector"))
    assert (texts.shape, vectors.shape) == ((4, 24), (40, 24))
    factor = math.sqrt(3) if combine == "concat" else 1
    torch.testing.assert_close(texts @ vectors.T / factor, scores, rtol=0, atol=1e-12)
    assert torch.equal((texts @ vectors.T).argsort(1), scores.argsort(1))
    cosine = texts @ F.normalize(vectors, dim=1).T
    assert not torch.equal(cosine.argsort(1), scores.argsort(1))


@pytest.mark.parametrize("combine", ["concat", "mean_cosine"])
def test_the_vector_of_an_image_without_features_is_zero(combine):
    assert torch.equal(join_to_vector([torch.zeros(2, 3)] * 2, combine), torch.zeros(2, 3))


@torch.no_grad()
def test_vectors_are_refused_where_they_would_rank_otherwise():
    images, tokens = batch()
    model = combined(make_stages(shared=True))
    with pytest.raises(ValueError, match="normalize=True would rank otherwise"):
        model.encode_image(images, normalize=True, combine="vector")
    own = combined(make_stages(shared=False))
    for encode, data in ((own.encode_image, images), (own.encode_text, tokens)):
        with pytest.raises(ValueError, match="needs stages that share a text tower"):
            encode(data, combine="vector")
