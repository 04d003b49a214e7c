"""Models of transformers in: `CLIPModel` folders with weights, preprocessing and tokenizer."""

import json

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from mcl_clip.config import TowerConfig
from mcl_clip.core.errors import UserError
from mcl_clip.model.clip import create_clip
from mcl_clip.model.resolve import load
from mcl_clip.publish.hf_clip import write_clip_model, write_clip_tokenizer
from mcl_clip.tools import doctor_data
from tests.parts import WORDS, write_words

SIZES = {"hidden_size": 32, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXTS = ["a photo of two dogs", "A red bar, and much more than fits into the few tokens of this model"]
PICTURE = Image.fromarray((np.arange(48 * 60 * 3) * 7 % 256).astype(np.uint8).reshape(48, 60, 3))


def save(folder, *, words=False, text=None, vision=None):
    """A `CLIPModel` with random weights, as transformers saves it."""
    torch.manual_seed(0)
    end = {"eos_token_id": 2, "bos_token_id": 1, "vocab_size": len(WORDS)} if words else {"eos_token_id": 49407}
    config = transformers.CLIPConfig(
        text_config={**SIZES, "max_position_embeddings": 12, **end, **(text or {})},
        vision_config={**SIZES, "image_size": 32, "patch_size": 8, **(vision or {})},
        projection_dim=24,
    )
    model = transformers.CLIPModel(config).eval()
    for parameter in model.parameters():  # biases and norms, too, which start at 0 and 1
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    pixels = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7]}
    transformers.CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size=32, image_mean=pixels["mean"], image_std=pixels["std"], resample=2
    ).save_pretrained(folder)
    if words:
        write_words(folder)
    else:
        write_clip_tokenizer(folder, 12)
    return model


def features(model, folder, pixels):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(TEXTS, padding="max_length", truncation=True, max_length=12, return_tensors="pt")
    with torch.no_grad():
        found = (model.get_image_features(pixel_values=pixels), model.get_text_features(**tokens))
    return [getattr(each, "pooler_output", each) for each in found]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"text": {"hidden_act": "gelu"}, "vision": {"hidden_act": "gelu"}},
        {"text": {"layer_norm_eps": 1e-2}, "vision": {"layer_norm_eps": 1e-2}},
        {"text": {"eos_token_id": 2}},
    ],
    ids=["quick_gelu", "gelu", "eps", "argmax"],
)
def test_features_are_those_of_transformers(tmp_path, changes):
    theirs = save(tmp_path, **changes)
    ours, transform, tokenizer = load(tmp_path)
    pixels = transform(PICTURE)[None]
    expected = features(theirs, tmp_path, pixels)
    with torch.no_grad():
        found = [ours.encode_image(pixels), ours.encode_text(tokenizer(TEXTS))]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert ours.logit_scale.item() == theirs.logit_scale.item()
    normalize = transform.transforms[-1]
    assert (list(normalize.mean), list(normalize.std)) == ([0.1, 0.2, 0.3], [0.5, 0.6, 0.7])


def test_a_tokenizer_of_its_own_is_used(tmp_path):
    theirs = save(tmp_path, words=True, text={"eos_token_id": 4, "pad_token_id": 0})
    ours, _, tokenizer = load(tmp_path)
    tokens = tokenizer(["a photo dogs", "dogs a photo red"])
    assert tokens[:, :4].tolist() == [[2, 3, 4, 0], [4, 2, 3, 5]]
    with torch.no_grad():
        expected = theirs.get_text_features(input_ids=tokens)
        torch.testing.assert_close(
            ours.encode_text(tokens), getattr(expected, "pooler_output", expected), rtol=1e-4, atol=1e-4
        )


def test_written_back_it_has_the_same_weights(tmp_path):
    save(tmp_path / "in")
    clip = create_clip(architecture=f"local-dir:{tmp_path / 'in'}")
    write_clip_model(tmp_path / "out", clip)
    before, after = (transformers.CLIPModel.from_pretrained(tmp_path / name).state_dict() for name in ("in", "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def changed(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_what_cannot_be_read_is_explained(tmp_path):
    def refused(message):
        with pytest.raises(UserError, match=message):
            load(tmp_path)

    save(tmp_path, vision={"hidden_act": "gelu"})
    refused("has hidden_act 'gelu' for images and 'quick_gelu' for texts")
    save(tmp_path)
    changed(tmp_path, model_type="siglip")
    refused("of the type 'siglip'; a CLIPModel, .* is read; .* hf-hub:timm/ViT-B-16-SigLIP")
    save(tmp_path)
    changed(tmp_path, projection_dim=25)
    refused(r"do not fit its config.json: 2 are missing or of another shape \(.*projection.*save it again")
    save(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    refused("the weights in .* cannot be read: .*; restore them")
    (tmp_path / "model.safetensors").unlink()
    refused("are missing or of another shape")
    save(tmp_path, words=True)
    (tmp_path / "tokenizer.json").unlink()
    refused("has no tokenizer.json, and its 9 tokens are not CLIP's; add the tokenizer")


def test_the_doctor_reads_it(tmp_path):
    save(tmp_path)
    tower = TowerConfig(architecture=f"local-dir:{tmp_path}")
    cfg = doctor_data.find_model_cfg(tower)
    assert (cfg["embed_dim"], cfg["vision_cfg"]["layers"]) == (24, 2)
    assert [found.level for found in doctor_data.check_weights(tower, cfg)] == ["ok"]
