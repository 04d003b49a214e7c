"""Pairs of pretrained towers: weights of timm and of transformers, joined by projection heads."""

import json
import logging

import pytest
import timm
import torch
import transformers

from mcl_clip.config import TowerConfig
from mcl_clip.core.errors import UserError
from mcl_clip.model import pair
from mcl_clip.model.clip import load_clip, save_clip
from mcl_clip.model.prepare import check_contract, lock, reference_features, trainable_summary
from mcl_clip.model.tower import create_tower
from mcl_clip.tools import doctor_data
from tests.parts import write_text_model

NAME = "test_vit"


@pytest.fixture(scope="module")
def trunk():
    torch.manual_seed(0)
    return timm.create_model(NAME).eval()


@pytest.fixture
def parts(tmp_path, trunk):
    """Weights of an image tower with its classifier, and the folder of a text model."""
    torch.save(trunk.state_dict(), tmp_path / "vit.pth")
    write_text_model(tmp_path / "words")
    return tmp_path


def tower(parts, *, name=NAME, file="vit.pth", **options):
    return TowerConfig(image=f"timm:{name}={parts / file}", text=f"hf:{parts / 'words'}", dim=16, **options)


@pytest.mark.parametrize("heads", ["linear", "mlp"])
def test_both_towers_have_their_weights_and_compute_what_they_did(parts, trunk, heads):
    state = torch.random.get_rng_state()
    clip = create_tower(tower(parts, heads=heads))
    assert torch.equal(torch.random.get_rng_state(), state)
    model = clip.model.eval()
    images = torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        pooled = trunk.forward_head(trunk.forward_features(images), pre_logits=True)
        torch.testing.assert_close(model.encode_image(images), model.visual.head(pooled))
        tokens = clip.tokenizer(["a photo", "dogs"])
        text = transformers.AutoModel.from_pretrained(parts / "words", add_pooling_layer=False).eval()
        mask = (tokens != 0).long()
        hidden = text(input_ids=tokens, attention_mask=mask).last_hidden_state
        mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        torch.testing.assert_close(model.encode_text(tokens), model.text.proj(mean))
    assert (
        clip.preprocess_cfg["mean"] == list(timm.get_pretrained_cfg(NAME).mean) != [0.48145466, 0.4578275, 0.40821073]
    )
    assert (clip.preprocess_cfg["size"], clip.context_length, model.visual.head is model.text.proj) == (160, 20, False)
    assert sum(isinstance(layer, torch.nn.Linear) for layer in model.visual.head.modules()) == 1 + (heads == "mlp")


def test_heads_differ_by_seed_and_towers_do_not(parts):
    first, again, other = (create_tower(tower(parts), seed=seed).model.state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    differ = {name for name in first if not torch.equal(first[name], other[name])}
    assert differ
    assert all(name.startswith(("visual.head.", "text.proj.")) for name in differ)


def test_a_saved_pair_needs_neither_file_nor_folder(parts):
    clip = create_tower(tower(parts))
    expected = reference_features(clip)
    lock(clip.model, image_unlocked_groups=0, patterns=["^text.transformer"])
    assert "visual" in trainable_summary(clip.model)
    check_contract(clip, expected, name="pair", stage=0)
    save_clip(clip, parts / "model")
    (parts / "vit.pth").unlink()
    (parts / "words").rename(parts / "gone")
    torch.testing.assert_close(reference_features(load_clip(parts / "model")), expected, rtol=0, atol=1e-6)


def test_weights_under_other_names_are_taken_in_their_order(parts, trunk, caplog):
    state = {f"{number}_{name}": tensor for number, (name, tensor) in enumerate(trunk.state_dict().items())}
    torch.save({"state_dict": state}, parts / "other.pth")
    with caplog.at_level(logging.WARNING, pair.__name__):
        found = create_tower(tower(parts, file="other.pth")).model.state_dict()
    assert "other names" in caplog.text
    expected = create_tower(tower(parts)).model.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_weights_of_another_architecture_are_named(parts, monkeypatch):
    monkeypatch.setattr(pair, "FAMILIES", ("test_resnet",))
    torch.save(timm.create_model("test_vit2").state_dict(), parts / "test_vit2.pth")
    with pytest.raises(
        UserError,
        match=r"of test_vit: 3 of 78 are missing \(cls_token, .* nearest architecture is test_vit2",
    ):
        create_tower(tower(parts, file="test_vit2.pth"))
    torch.save({"nothing.weight": torch.ones(3)}, parts / "none.pth")
    with pytest.raises(
        UserError, match=r"(\d+) of \1 are missing .*, and 1 are unexpected .* no architecture of the common"
    ):
        create_tower(tower(parts, file="none.pth"))
    wide = {**timm.create_model(NAME).state_dict(), "norm.weight": torch.ones(7)}
    torch.save(wide, parts / "wide.pth")
    with pytest.raises(UserError, match=r"have another shape, such as .* and not "):
        create_tower(tower(parts, file="wide.pth"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": "timm:test_vitt=x"}, r"names no architecture of timm \(close: test_vit.*timm:NAME=WEIGHTS"),
        ({"image": "test_vit"}, "names no architecture of timm"),
        ({"image": "timm:test_vit=/nowhere.pth"}, r"/nowhere\.pth, and there is no such file"),
        ({"image": "timm:test_vit={parts}/words/config.json"}, "are not one of"),
        ({"text": "words"}, "'words' is not hf:FOLDER or hf:ORG/NAME"),
        ({"text": "hf:{parts}"}, r"cannot be read: .* give a folder with config\.json"),
    ],
)
def test_wrong_names_are_explained(parts, changes, message):
    given = {"image": f"timm:{NAME}={parts / 'vit.pth'}", "text": f"hf:{parts / 'words'}"}
    given |= {key: value.format(parts=parts) for key, value in changes.items()}
    with pytest.raises(UserError, match=message):
        create_tower(TowerConfig(**given))


def test_a_text_model_that_open_clip_does_not_know_is_refused(parts):
    config = json.loads((parts / "words/config.json").read_text())
    (parts / "words/config.json").write_text(json.dumps({**config, "model_type": "distilbert"}))
    with pytest.raises(UserError, match=r"type 'distilbert', and open_clip takes roberta, .*bert"):
        create_tower(tower(parts))


def test_the_pooling_is_that_of_sentence_transformers(parts):
    (parts / "words/1_Pooling").mkdir()
    (parts / "words/1_Pooling/config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    clip = create_tower(tower(parts))
    assert type(clip.model.text.pooler).__name__ == "ClsLastHiddenStatePooler"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"text": "hf:y"}, "is one tower of a pair; give --tower.image timm:NAME=FILE and --tower.text"),
        ({"image": "timm:x", "text": "hf:y", "architecture": "ViT-B-32"}, "not several or none"),
        ({"image": "timm:x", "text": "hf:y", "pretrained": "z.pt"}, "for one file with both towers"),
        ({"image": "timm:x", "text": "hf:y", "dim": 0}, "dim must be at least 1"),
    ],
)
def test_a_pair_excludes_other_ways_to_name_towers(given, message):
    with pytest.raises(UserError, match=message):
        TowerConfig(**given)


def test_the_doctor_tries_the_weights_of_a_pair(parts):
    def found(config):
        cfg = doctor_data.find_model_cfg(config)
        return [(each.level, each.text) for each in doctor_data.check_weights(config, cfg)]

    ((level, text),) = found(tower(parts))
    assert (level, "vit.pth" in text) == ("ok", True)
    torch.save({"nothing.weight": torch.ones(3)}, parts / "none.pth")
    assert [level for level, _ in found(tower(parts, file="none.pth"))] == ["FAIL"]
