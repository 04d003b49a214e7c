"""Read a `CLIPModel` folder of transformers as a model of open_clip: config, preprocessing, and names of weights."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from open_clip.tokenizer import SimpleTokenizer
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPConfig

from mcl_clip.core.errors import UserError, shorten_list
from mcl_clip.core.files import read_json
from mcl_clip.model.open_clip_io import OPEN_CLIP_CONFIG_NAME, check_model_cfg, check_weights, one_line

CONFIG_NAME, PREPROCESSOR_NAME = "config.json", "preprocessor_config.json"
ACTIVATIONS = {"quick_gelu": True, "gelu": False}  # of the config, and quick_gelu of open_clip
INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}  # PIL's numbers
END_BY_ARGMAX = 2  # eos_token_id of configs whose model pools the largest token
DEFAULT_EPS = 1e-5


def is_transformers_folder(folder: Path) -> bool:
    """Return whether a folder has a model of transformers, and none of open_clip."""
    if (folder / OPEN_CLIP_CONFIG_NAME).is_file() or not (folder / CONFIG_NAME).is_file():
        return False
    config = read_json(folder / CONFIG_NAME)
    return isinstance(config, dict) and "model_type" in config


def read_clip_config(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the open_clip config of the `CLIPModel` in a folder, and its preprocessing.

    Raises:
        UserError: if it is another model, or has what open_clip cannot represent.
    """
    kind = read_json(folder / CONFIG_NAME).get("model_type")
    if kind != "clip":
        also = "; open_clip has SigLIP as hf-hub:timm/ViT-B-16-SigLIP and others" if "siglip" in str(kind) else ""
        raise UserError(
            f"{folder} holds a model of transformers of the type {kind!r}; a CLIPModel, of the type 'clip', is "
            f"read{also}"
        )
    try:
        config: Any = CLIPConfig.from_pretrained(str(folder))
    except Exception as error:  # damaged configs raise errors of many types
        raise UserError(f"{folder / CONFIG_NAME} cannot be read: {one_line(error)}; restore it") from error
    vision, text = config.vision_config, config.text_config
    for name in ("hidden_act", "layer_norm_eps"):
        if getattr(vision, name) != getattr(text, name) or (
            name == "hidden_act" and text.hidden_act not in ACTIVATIONS
        ):
            raise UserError(
                f"{folder} has {name} {getattr(vision, name)!r} for images and {getattr(text, name)!r} for texts, "
                f"which open_clip cannot represent; use a model with one of {', '.join(ACTIVATIONS)} for both"
            )
    norm = {} if text.layer_norm_eps == DEFAULT_EPS else {"norm_kwargs": {"eps": text.layer_norm_eps}}
    cfg: dict[str, Any] = {
        "embed_dim": config.projection_dim,
        "quick_gelu": ACTIVATIONS[text.hidden_act],
        "vision_cfg": {
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "layers": vision.num_hidden_layers,
            "width": vision.hidden_size,
            "head_width": vision.hidden_size // vision.num_attention_heads,
            "mlp_ratio": _ratio(vision),
            **norm,
        },
        "text_cfg": {
            "context_length": text.max_position_embeddings,
            "vocab_size": text.vocab_size,
            "layers": text.num_hidden_layers,
            "width": text.hidden_size,
            "heads": text.num_attention_heads,
            "mlp_ratio": _ratio(text),
            **norm,
        },
    }
    if text.eos_token_id not in (END_BY_ARGMAX, text.vocab_size - 1):
        cfg["text_cfg"] |= {"pool_type": "eos", "eos_id": text.eos_token_id}
    if not _has_clip_tokenizer(folder, text.vocab_size):
        cfg["text_cfg"]["hf_tokenizer_name"] = str(folder)
    try:
        check_model_cfg(cfg)
    except ValueError as error:
        raise UserError(f"{folder} is not loaded: {error}; correct it, or use another model") from error
    return cfg, _preprocessing(folder)


def _ratio(config: Any) -> float:
    """Return the ratio of the widths of the MLP and the tower, whose product open_clip rounds down."""
    ratio: float = config.intermediate_size / config.hidden_size
    return ratio if int(config.hidden_size * ratio) == config.intermediate_size else math.nextafter(ratio, math.inf)


def _has_clip_tokenizer(folder: Path, vocab_size: int) -> bool:
    """Return whether the tokens are those of open_clip's own tokenizer, whose special tokens have other names."""
    words = list(SimpleTokenizer().encoder.items())[:-2]
    for name in ("tokenizer.json", "vocab.json"):
        if (folder / name).is_file():
            values = read_json(folder / name)
            vocabulary = values["model"]["vocab"] if name == "tokenizer.json" else values
            return all(vocabulary.get(word) == number for word, number in words)
    if vocab_size != len(words) + 2:
        raise UserError(
            f"{folder} has no tokenizer.json, and its {vocab_size} tokens are not CLIP's; add the tokenizer"
        )
    return True


def _preprocessing(folder: Path) -> dict[str, Any]:
    path = folder / PREPROCESSOR_NAME
    given = read_json(path) if path.is_file() else {}
    found = {key: given.get(f"image_{key}") for key in ("mean", "std")}
    found["interpolation"] = INTERPOLATIONS.get(given.get("resample", 3), "bicubic")
    size = given.get("size")
    found["resize_mode"] = "squash" if isinstance(size, dict) and "shortest_edge" not in size else "shortest"
    return {key: value for key, value in found.items() if value}


@torch.no_grad()
def load_clip_weights(model: nn.Module, folder: Path) -> None:
    """Load the weights of a `CLIPModel` folder into the open_clip model of its config.

    Raises:
        UserError: if they are missing, damaged, or of another model.
    """
    paths = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    state: dict[str, Tensor] = {}
    try:
        for path in paths:
            check_weights(path)
            state |= load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    except Exception as error:  # damaged files raise errors of many types
        raise UserError(f"the weights in {folder} cannot be read: {one_line(error)}; restore them") from error
    views = dict(clip_tensors(model))
    wrong = [name for name, view in views.items() if name not in state or state[name].shape != view.shape]
    unknown = [name for name in state if name not in views and not name.endswith("position_ids")]
    if wrong or unknown:
        raise UserError(
            f"the weights in {folder} do not fit its {CONFIG_NAME}: {len(wrong)} are missing or of another shape "
            f"({shorten_list(wrong, 3)}), and {len(unknown)} are unknown ({shorten_list(unknown, 3)}); save it again"
        )
    for name, view in views.items():
        view.copy_(state[name])


def clip_tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of an open_clip model, as views, under their names in `CLIPModel`."""
    visual = model.visual
    yield "logit_scale", model.logit_scale.reshape(())
    yield "visual_projection.weight", visual.proj.T
    yield "text_projection.weight", model.text_projection.T
    yield "vision_model.embeddings.class_embedding", visual.class_embedding
    yield "vision_model.embeddings.patch_embedding.weight", visual.conv1.weight
    yield "vision_model.embeddings.position_embedding.weight", visual.positional_embedding
    yield "text_model.embeddings.token_embedding.weight", model.token_embedding.weight
    yield "text_model.embeddings.position_embedding.weight", model.positional_embedding
    modules = {
        "vision_model.pre_layrnorm": visual.ln_pre,  # spelled like this in transformers
        "vision_model.post_layernorm": visual.ln_post,
        "text_model.final_layer_norm": model.ln_final,
    }
    for encoder, transformer in (("vision_model", visual.transformer), ("text_model", model.transformer)):
        for number, block in enumerate(transformer.resblocks):
            layer = f"{encoder}.encoder.layers.{number}"
            for kind in ("weight", "bias"):
                for letter, tensor in zip("qkv", getattr(block.attn, f"in_proj_{kind}").chunk(3), strict=True):
                    yield f"{layer}.self_attn.{letter}_proj.{kind}", tensor
            modules[f"{layer}.self_attn.out_proj"] = block.attn.out_proj
            modules[f"{layer}.layer_norm1"], modules[f"{layer}.layer_norm2"] = block.ln_1, block.ln_2
            modules[f"{layer}.mlp.fc1"], modules[f"{layer}.mlp.fc2"] = block.mlp.c_fc, block.mlp.c_proj
    for name, module in modules.items():
        yield f"{name}.weight", module.weight
        yield f"{name}.bias", module.bias
