"""The head of latent target decoding, and the sentence features that it decodes."""

import pytest
import torch

from mcl_clip.model.clip import create_clip
from mcl_clip.model.decoder import add_decoder, remove_decoder, sentence_encoder
from tests.parts import write_text_model

VISION = {"image_size": 32, "patch_size": 16, "layers": 1, "width": 16, "head_width": 16}
WORDS = {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}


@pytest.fixture
def clip():
    return create_clip(model_cfg={"embed_dim": 12, "vision_cfg": VISION, "text_cfg": WORDS}, seed=0)


def outputs(clip):
    with torch.no_grad():
        return clip.model(torch.zeros(2, 3, 32, 32), clip.tokenizer(["a dog", "a cat on a mat"]))


def test_a_model_decodes_until_the_head_is_taken_out(clip):
    before, names = outputs(clip), list(clip.model.state_dict())
    add_decoder(clip, hidden_dim=5, seed=1)
    found = outputs(clip)
    assert found["decoded_features"].shape == (2, 12)
    assert {parameter.shape[0] for parameter in clip.model.target_decoder.parameters()} == {5, 12}
    assert torch.equal(found["text_features"], before["text_features"])
    remove_decoder(clip.model)
    assert outputs(clip).keys() == before.keys()
    assert list(clip.model.state_dict()) == names
    remove_decoder(clip.model)  # without a head it does nothing


def test_the_head_is_drawn_by_its_seed_alone(clip):
    decoded = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(decoded))
        state = torch.get_rng_state()
        add_decoder(clip, hidden_dim=5, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        decoded.append(outputs(clip)["decoded_features"])
        remove_decoder(clip.model)
    assert torch.equal(decoded[0], decoded[1])
    assert not torch.equal(decoded[0], decoded[2])


def test_sentence_features_are_those_below_the_projection(clip, tmp_path):
    tokens = clip.tokenizer(["a dog", "a cat"])
    with torch.no_grad():
        assert torch.equal(sentence_encoder(clip.model)(tokens), clip.model.encode_text(tokens))
    write_text_model(tmp_path / "words")
    text = {"hf_model_name": str(tmp_path / "words"), "hf_tokenizer_name": str(tmp_path / "words")}
    text |= {"context_length": 8, "hf_proj_type": "mlp", "hf_pooler_type": "mean_pooler"}
    cfg = {"embed_dim": 12, "custom_text": True, "vision_cfg": VISION, "text_cfg": text}
    pair = create_clip(model_cfg=cfg, seed=0)
    tower, tokens = pair.model.text.eval(), pair.tokenizer(["a dog", "a cat"])
    with torch.no_grad():
        found = sentence_encoder(pair.model)(tokens)
        assert found.shape[1] == tower.transformer.config.hidden_size != 12
        assert torch.equal(tower.proj(found), tower(tokens))
