"""Hugging Face text towers: published weights, folders, and models that bring their own config."""

import json

import pytest
import torch
import transformers
from huggingface_hub.errors import HFValidationError
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn

from mcl_clip.core.errors import UserError
from mcl_clip.model import clip as clip_module
from mcl_clip.model.clip import create_clip, encode_texts, load_clip, save_clip
from mcl_clip.model.fast_paths import TEXT_BATCH_SIZE, padding_token
from mcl_clip.model.multistage import MultistageCLIP
from mcl_clip.model.open_clip_io import check_model_folder
from mcl_clip.model.prepare import check_contract, lock, reference_features
from mcl_clip.tools import doctor_data
from mcl_clip.tools.estimates import has_config

VIT = {"image_size": 32, "patch_size": 8, "layers": 1, "width": 32, "head_width": 16}


@pytest.fixture
def folder(tmp_path):
    """A published text model with its tokenizer, as `hf download --local-dir` leaves it."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.RobertaConfig(vocab_size=8, max_position_embeddings=20, **sizes)
    transformers.RobertaModel(config).save_pretrained(tmp_path / "words")
    tokenizer = Tokenizer(WordLevel({"[UNK]": 0, "[PAD]": 1, "a": 2, "photo": 3, "dogs": 4}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    fast.save_pretrained(tmp_path / "words")
    return tmp_path / "words"


def model_cfg(name, **changed):
    text = {"context_length": 12, "vocab_size": 8, "hf_model_name": str(name), "hf_tokenizer_name": str(name)}
    return {"embed_dim": 16, "vision_cfg": VIT, "text_cfg": {**text, **changed}}


def is_published(clip, folder):
    published = transformers.AutoModel.from_pretrained(folder, add_pooling_layer=False).state_dict()
    state = clip.model.text.transformer.state_dict()
    assert state.keys() == published.keys()
    return all(torch.equal(state[name], published[name]) for name in state)


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        ({"hf_model_pretrained": True}, {}, True),
        ({}, {}, True),  # the default of open_clip
        ({"hf_model_pretrained": False}, {}, False),
        ({"hf_model_pretrained": True}, {"text_weights": False}, False),  # version 0.6
    ],
)
def test_published_weights_are_loaded_if_the_config_asks_for_them(folder, text, options, expected):
    state = torch.random.get_rng_state()
    assert is_published(create_clip(model_cfg=model_cfg(folder, **text), **options), folder) == expected
    assert torch.equal(torch.random.get_rng_state(), state)


def test_texts_are_encoded_without_padding_where_nothing_is_dropped(folder, monkeypatch):
    model = create_clip(model_cfg=model_cfg(folder)).model.eval()
    tokens = torch.tensor([[2, 3, 4, 1, 1, 1], [4, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])  # 1 pads
    lengths = []
    monkeypatch.setitem(TEXT_BATCH_SIZE, "cpu", 1)
    model.text.transformer.register_forward_pre_hook(
        lambda _, __, given: lengths.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    with torch.no_grad():
        expected = model.encode_text(tokens[:2])
        torch.testing.assert_close(encode_texts(model, tokens[:2], torch.device("cpu")), expected)
        assert encode_texts(model, tokens[1:], torch.device("cpu")).shape == (2, 16)
        encode_texts(model.train(), tokens, torch.device("cpu"))
    assert lengths == [6, 1, 3, 1, 1, 6]


def test_a_tower_in_training_needs_padding_unless_it_is_locked(folder):
    model = create_clip(model_cfg=model_cfg(folder)).model
    assert [padding_token(model.train(mode)) for mode in (True, False)] == [None, 1]
    lock(model, text_unlocked_groups=0)
    assert padding_token(model.train()) == 1


@pytest.mark.parametrize(
    ("groups", "trained"),
    [
        (0, {"proj"}),
        (1, {"proj", "transformer.encoder.layer.1"}),
        (2, {"proj", "transformer.encoder.layer.0", "transformer.encoder.layer.1"}),
    ],
)
def test_locked_layers_run_without_dropout(folder, groups, trained):
    text = create_clip(model_cfg=model_cfg(folder)).model.text
    lock(nn.ModuleDict({"text": text}), text_unlocked_groups=groups)
    text.train()
    names = {name for name, parameter in text.named_parameters() if parameter.requires_grad}
    assert {next(part for part in trained if name.startswith(part)) for name in names} == trained
    dropouts = {name: part.training for name, part in text.named_modules() if isinstance(part, nn.Dropout)}
    assert dropouts == {name: name.startswith(tuple(trained)) for name in dropouts}
    assert len(dropouts) > 3
    text.eval()
    assert not any(part.training for part in text.modules())


def test_all_groups_of_a_text_tower_are_all_of_it(folder):
    model = create_clip(model_cfg=model_cfg(folder)).model
    lock(model, text_unlocked_groups=3)
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(UserError, match="text-unlocked-groups 4 is not between 0 and 3"):
        lock(model, text_unlocked_groups=4)


def test_weights_of_the_whole_model_come_first(folder, tmp_path):
    source = create_clip(model_cfg=model_cfg(folder, hf_model_pretrained=False), seed=3)
    torch.save(source.model.state_dict(), tmp_path / "all.pt")
    (folder / "model.safetensors").rename(tmp_path / "away")  # not needed
    loaded = create_clip(model_cfg=model_cfg(folder), pretrained=str(tmp_path / "all.pt"))
    (tmp_path / "away").rename(folder / "model.safetensors")
    assert not is_published(loaded, folder)
    torch.testing.assert_close(loaded.model.state_dict(), source.model.state_dict(), rtol=0, atol=0)


def test_a_tower_from_a_folder_trains_and_loads_without_it(folder, tmp_path):
    clip = create_clip(model_cfg=model_cfg(folder))
    expected = reference_features(clip)
    lock(clip.model, image_unlocked_groups=0)
    check_contract(clip, expected, name="words", stage=0)
    save_clip(clip, tmp_path / "model")
    MultistageCLIP([clip.model], logit_scale=1.0, preprocess_cfg=clip.preprocess_cfg, model_cfgs=[clip.model_cfg],
                   tokenizer=clip.tokenizer).save(tmp_path / "multistage")  # fmt: skip
    folder.rename(tmp_path / "gone")
    again = load_clip(tmp_path / "model")
    torch.testing.assert_close(reference_features(again), expected, rtol=0, atol=1e-6)
    save_clip(again, tmp_path / "copy")
    torch.testing.assert_close(reference_features(load_clip(tmp_path / "copy")), expected, rtol=0, atol=1e-6)
    multistage = MultistageCLIP.load(tmp_path / "multistage")
    tokens = multistage.tokenizer(["a photo", "dogs"])
    assert torch.equal(multistage.encode_text(tokens), again.model.eval().encode_text(tokens))


def test_a_config_that_brings_code_is_refused(folder, tmp_path):
    save_clip(create_clip(model_cfg=model_cfg(folder)), tmp_path / "model")
    path = tmp_path / "model/text_tower/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": {"AutoModel": "code.Model"}}))
    with pytest.raises(ValueError, match=r"text_tower/config\.json asks to run code"):
        check_model_folder(tmp_path / "model")


@pytest.mark.parametrize("error", [OSError("couldn't connect"), HFValidationError("Repo id must be in the form")])
def test_without_weights_and_network_a_folder_is_offered(folder, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(clip_module.open_clip, "create_model", fail)
    with pytest.raises(UserError, match=r"without a network, give a folder .* of roberta-base as hf_model_name and"):
        create_clip(model_cfg=model_cfg("roberta-base"))


def test_a_folder_without_weights_is_refused_and_not_random(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="hf_model_pretrained to false for random weights"):
        create_clip(model_cfg=model_cfg(folder))
    create_clip(model_cfg=model_cfg(folder, hf_model_pretrained=False))


def test_a_missing_tokenizer_is_explained(folder):
    cfg = model_cfg(folder, hf_tokenizer_name="/nowhere/words")
    with pytest.raises(UserError, match=r"the tokenizer /nowhere/words cannot be loaded: .* a folder .* would do"):
        create_clip(model_cfg=cfg)


def found(text_cfg, *, loads_weights=True):
    return [(f.level, f.text) for f in doctor_data.check_text_tower(text_cfg, loads_weights=loads_weights)]


def test_the_doctor_knows_folders(folder):
    text = model_cfg(folder)["text_cfg"]
    assert found(text) == [
        ("ok", f"the tokenizer {folder}: in this folder"),
        ("ok", f"the weights of the text tower {folder}: in this folder"),
    ]
    assert len(found(text, loads_weights=False)) == len(found({**text, "hf_model_pretrained": False})) == 1
    (folder / "model.safetensors").unlink()
    assert found(text)[1][0] == "FAIL"
    assert has_config(str(folder))
    missing = found(model_cfg("/nowhere/words")["text_cfg"])
    assert [level for level, _ in missing] == ["FAIL", "FAIL"]
    assert all("neither a folder nor a name on the Hub" in text for _, text in missing)
    with pytest.raises(UserError, match="/nowhere/words is neither a folder nor a model of the Hub"):
        has_config("/nowhere/words")
