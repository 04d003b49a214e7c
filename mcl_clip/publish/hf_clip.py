"""Models for Hugging Face transformers: multistage models with their code, single towers as a `CLIPModel`."""

import copy
import gzip
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import open_clip
import torch
from jaxtyping import Float
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from open_clip.tokenizer import SimpleTokenizer, default_bpe
from open_clip.transformer import VisionTransformer
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Regex, normalizers
from torch import Tensor
from transformers import AutoModel, AutoProcessor, AutoTokenizer, CLIPConfig, CLIPTokenizerFast  # type: ignore[attr-defined]

from mcl_clip.core.errors import UserError
from mcl_clip.core.files import read_json, write_json
from mcl_clip.model.clip import ClipBundle
from mcl_clip.model.modeling_multistage_clip import fit_tokens, write_config_and_code
from mcl_clip.model.multistage import MultistageCLIP
from mcl_clip.model.processing_multistage_clip import PROCESSING_AUTO_MAP, MultistageCLIPProcessor

CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"
LAST_MERGE = 49152 - 256 - 2 + 1  # open_clip and CLIP leave the rest of the file out
RESAMPLE = {"bicubic": 3, "bilinear": 2}  # PIL's numbers
# What a tower may set freely to be a CLIPModel: sizes, and what has no effect on features.
FREE = {
    "vision_cfg": ("layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "patch_dropout",
                   "attn_pooler_queries", "attn_pooler_heads", "pos_embed_type", "timm_pool", "timm_proj",
                   "timm_proj_bias", "timm_drop", "timm_drop_path", "timm_model_pretrained"),
    "text_cfg": ("context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "pad_id", "eos_id",
                 "hf_model_pretrained", "hf_proj_type", "hf_pooler_type"),
}  # fmt: skip
MAY_BE_EMPTY = ("norm_kwargs", "act_kwargs", "tokenizer_kwargs")
PUNCTUATION = Regex(r"[!-/:-@\[-`{-~]")
# open_clip's cleaning of texts, as far as a tokenizer can do it by itself.
CLEANING: dict[str, tuple[Any, ...]] = {
    "whitespace": (),
    "lower": (normalizers.Lowercase(),),
    "canonicalize": (
        normalizers.Replace("_", " "),
        normalizers.Replace(PUNCTUATION, ""),
        normalizers.Lowercase(),
        normalizers.Replace(Regex(r"\s+"), " "),
        normalizers.Strip(),
    ),
}
PROBES = ("a photo of a dog", "A Photo of  two DOGS, a cat_and one (red) bird.", "x", "so many words " * 80)


def write_clip_tokenizer(folder: Path, context_length: int) -> None:
    """Write CLIP's tokenizer, made from the vocabulary that comes with open_clip; nothing is downloaded.

    Its ids are those of open_clip's `SimpleTokenizer`, but for what that one repairs first: HTML entities, typographic
    quotes, broken encodings. The special tokens in a text are read as text.
    """
    with gzip.open(default_bpe(), "rt", encoding="utf-8") as file:
        merges = file.read().split("\n")[1:LAST_MERGE]
    words = [word for word, _ in sorted(SimpleTokenizer().encoder.items(), key=lambda item: item[1])][:-2]
    vocabulary = {word: number for number, word in enumerate([*words, CLIP_START, CLIP_END])}
    with tempfile.TemporaryDirectory() as temporary:
        (Path(temporary) / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
        (Path(temporary) / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
        tokenizer = CLIPTokenizerFast.from_pretrained(temporary, split_special_tokens=True)
    _save_tokenizer(tokenizer, folder, context_length)


def _save_tokenizer(tokenizer: Any, folder: Path, context_length: int, **settings: Any) -> None:
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    left_out = ("is_local", "local_files_only", "name_or_path")  # of the place where it came from
    config = {name: value for name, value in read_json(path).items() if name not in left_out}
    inputs = ["input_ids", "attention_mask"]
    write_json(path, {**config, "model_max_length": context_length, "model_input_names": inputs, **settings})


def write_transformers_files(folder: Path, model: MultistageCLIP) -> None:
    """Make a folder that `model` was saved in one that transformers loads: config, code, processor and tokenizer.

    The weights are not written again. `AutoModel` and the others then load it with `trust_remote_code=True`.

    Raises:
        UserError: if the tokenizer of transformers would read texts in another way than the model's own.
    """
    write_config_and_code(folder, model)
    preprocess = model.preprocess_cfg
    height, width = _size(preprocess)
    settings: dict[str, Any] = {
        name: preprocess[name] for name in ("interpolation", "resize_mode", "fill_color") if name in preprocess
    }
    image_processor: dict[str, Any] = {
        "auto_map": {"AutoImageProcessor": PROCESSING_AUTO_MAP["AutoImageProcessor"]},
        "image_processor_type": "MultistageCLIPImageProcessor",
        "size": {"height": height, "width": width},
        "image_mean": list(preprocess.get("mean") or OPENAI_DATASET_MEAN),
        "image_std": list(preprocess.get("std") or OPENAI_DATASET_STD),
        **settings,
    }
    write_json(folder / "preprocessor_config.json", image_processor)
    options = model.model_cfgs[0]["text_cfg"].get("tokenizer_kwargs") or {}
    hugging_face: Any = getattr(model.tokenizer, "tokenizer", None)
    clean = options.get("clean", "lower" if hugging_face is None else "whitespace")
    processor = {
        "auto_map": {"AutoProcessor": PROCESSING_AUTO_MAP["AutoProcessor"]},
        "processor_class": MultistageCLIPProcessor.__name__,
        "clean": clean,
    }
    write_json(folder / "processor_config.json", processor)
    if hugging_face is None:
        write_clip_tokenizer(folder, model.context_length)
    else:
        _write_own_tokenizer(folder, hugging_face, model.context_length, clean)
    _check_tokenizer(folder, model)


def _write_own_tokenizer(folder: Path, tokenizer: Any, context_length: int, clean: str) -> None:
    """The Hugging Face tokenizer of a model, with the cleaning of texts that open_clip does before it."""
    steps = CLEANING[clean]
    settings = {}
    if steps and getattr(tokenizer, "is_fast", False):
        tokenizer = copy.deepcopy(tokenizer)
        before = tokenizer.backend_tokenizer.normalizer
        tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([*steps, *([before] if before else [])])
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # others make their steps anew when they are loaded
    _save_tokenizer(tokenizer, folder, context_length, **settings)


def _check_tokenizer(folder: Path, model: MultistageCLIP) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=True)  # the code was just written here
    inputs = tokenizer(list(PROBES), padding=True, return_tensors="pt", verbose=False)
    got = fit_tokens(inputs["input_ids"], inputs["attention_mask"], model.context_length, model.tokenizer)
    for text, tokens, expected in zip(PROBES, got, model.tokenizer(list(PROBES)), strict=True):
        if not torch.equal(tokens, expected):
            text_cfg = model.model_cfgs[0]["text_cfg"]
            raise UserError(
                f"transformers would read {text!r:.60} as other tokens than the model's tokenizer "
                f"({_tokenizer_name(text_cfg)}); export its stages one by one for open_clip, by --stage K"
            )


def _tokenizer_name(text_cfg: Mapping[str, Any]) -> str:
    names = ("hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs")
    return ", ".join(f"{name}={text_cfg[name]!r}" for name in names if text_cfg.get(name)) or "CLIP's"


def _size(preprocess: Mapping[str, Any]) -> tuple[int, int]:
    size = preprocess["size"]
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def write_clip_model(folder: Path, tower: ClipBundle) -> None:
    """Write one encoder pair as a `CLIPModel` of transformers with its processor; it needs no code of its own.

    Features of the same pixels and tokens are equal up to rounding. Pictures go through transformers' own
    `CLIPImageProcessor`: where they are resized, pixels differ from open_clip's by a few steps of 255, and the part
    that is cut out of the middle may lie one pixel aside.

    Raises:
        UserError: naming what a `CLIPModel` cannot express.
    """
    _check_clip_model(tower)
    folder.mkdir(parents=True, exist_ok=True)
    preprocessor = _clip_preprocessor(tower.preprocess_cfg)
    tensors = {name: tensor.detach().cpu().float().contiguous().clone() for name, tensor in _clip_tensors(tower.model)}
    _clip_config(tower).save_pretrained(folder)
    weights = folder / "model.safetensors"
    save_file(tensors, weights, metadata={"format": "pt"})
    weights.chmod((folder / "config.json").stat().st_mode)  # safetensors writes 0600 whatever the umask
    write_json(folder / "preprocessor_config.json", preprocessor)
    write_clip_tokenizer(folder, tower.context_length)


def _check_clip_model(tower: ClipBundle) -> None:
    model: Any = tower.model
    if not isinstance(model, open_clip.CLIP):
        raise _does_not_fit(f"a {type(model).__name__}")
    if type(model.visual) is not VisionTransformer:
        raise _does_not_fit(f"an image tower of type {type(model.visual).__name__}")
    if model.logit_bias is not None:
        raise _does_not_fit("a logit_bias")
    for part, known in (("vision_cfg", CLIPVisionCfg), ("text_cfg", CLIPTextCfg)):
        defaults = {field.name: field.default for field in fields(known)}
        for name, value in tower.model_cfg[part].items():
            is_empty = name in MAY_BE_EMPTY and not value
            is_default = value == defaults.get(name) or (name, value) == ("block_type", "default")
            if name not in FREE[part] and not is_default and not is_empty:
                raise _does_not_fit(f"{part} with {name}={value!r}")
    for name in ("image_size", "patch_size"):
        value = getattr(model.visual, name)
        if value[0] != value[1]:
            raise _does_not_fit(f"{name}={tuple(value)}")


def _does_not_fit(what: str) -> UserError:
    return UserError(
        f"the model has {what}, which the CLIPModel of transformers cannot express; publish it for open_clip, or as a "
        f"multistage model with its code"
    )


def _clip_preprocessor(preprocess: Mapping[str, Any]) -> dict[str, Any]:
    height, width = _size(preprocess)
    mode = preprocess.get("resize_mode") or "shortest"
    if mode == "longest":
        raise _does_not_fit("resize_mode='longest'")
    square = {"height": height, "width": width}
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": height} if mode == "shortest" else square,
        "resample": RESAMPLE.get(preprocess.get("interpolation") or "bicubic", RESAMPLE["bicubic"]),
        "do_center_crop": True,
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess.get("mean") or OPENAI_DATASET_MEAN),
        "image_std": list(preprocess.get("std") or OPENAI_DATASET_STD),
    }


def _clip_config(tower: ClipBundle) -> Any:
    model: Any = tower.model
    visual = model.visual
    activation = {"hidden_act": "quick_gelu" if tower.model_cfg.get("quick_gelu") else "gelu"}
    dimensions = {"projection_dim": tower.model_cfg["embed_dim"]}
    text = {
        **_transformer_config(model.transformer),
        "vocab_size": model.token_embedding.num_embeddings,
        "max_position_embeddings": model.context_length,
        "bos_token_id": SimpleTokenizer().sot_token_id,
        "eos_token_id": SimpleTokenizer().eot_token_id,
        "pad_token_id": SimpleTokenizer().eot_token_id,
    }
    vision = {
        **_transformer_config(visual.transformer),
        "image_size": visual.image_size[0],
        "patch_size": visual.patch_size[0],
    }
    return CLIPConfig(
        text_config={**text, **activation, **dimensions},
        vision_config={**vision, **activation, **dimensions},
        logit_scale_init_value=model.logit_scale.item(),
        architectures=["CLIPModel"],
        dtype="float32",
        **dimensions,
    )


def _transformer_config(transformer: Any) -> dict[str, int]:
    block = transformer.resblocks[0]
    return {
        "hidden_size": transformer.width,
        "intermediate_size": block.mlp.c_fc.out_features,
        "num_hidden_layers": transformer.layers,
        "num_attention_heads": block.attn.num_heads,
    }


def _clip_tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    """The weights under the names of `CLIPModel`."""
    visual = model.visual
    yield "logit_scale", model.logit_scale.reshape(())
    yield "visual_projection.weight", visual.proj.T
    yield "text_projection.weight", model.text_projection.T
    image, text = "vision_model.embeddings", "text_model.embeddings"
    yield f"{image}.class_embedding", visual.class_embedding
    yield f"{image}.patch_embedding.weight", visual.conv1.weight
    yield f"{image}.position_embedding.weight", visual.positional_embedding
    yield f"{text}.token_embedding.weight", model.token_embedding.weight
    yield f"{text}.position_embedding.weight", model.positional_embedding
    yield from _named(visual.ln_pre, "vision_model.pre_layrnorm")  # the name is spelled so
    yield from _named(visual.ln_post, "vision_model.post_layernorm")
    yield from _named(model.ln_final, "text_model.final_layer_norm")
    yield from _block_tensors(visual.transformer, "vision_model.encoder.layers")
    yield from _block_tensors(model.transformer, "text_model.encoder.layers")


def _named(module: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    yield f"{name}.weight", module.weight
    yield f"{name}.bias", module.bias


def _block_tensors(transformer: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    for number, block in enumerate(transformer.resblocks):
        layer = f"{name}.{number}"
        for kind in ("weight", "bias"):
            projections = getattr(block.attn, f"in_proj_{kind}").chunk(3)
            for letter, tensor in zip("qkv", projections, strict=True):
                yield f"{layer}.self_attn.{letter}_proj.{kind}", tensor
        yield from _named(block.attn.out_proj, f"{layer}.self_attn.out_proj")
        yield from _named(block.ln_1, f"{layer}.layer_norm1")
        yield from _named(block.ln_2, f"{layer}.layer_norm2")
        yield from _named(block.mlp.c_fc, f"{layer}.mlp.fc1")
        yield from _named(block.mlp.c_proj, f"{layer}.mlp.fc2")


def transformers_features(
    folder: Path, images: Sequence[Image.Image], texts: Sequence[str]
) -> tuple[Float[Tensor, "images dim"], Float[Tensor, "texts dim"]]:
    """Un-normalised features as `AutoModel` and `AutoProcessor` of transformers give them, from an exported folder.

    The code in the folder is run: this is for folders that were just written here.
    """
    model = AutoModel.from_pretrained(str(folder), trust_remote_code=True).eval()
    processor: Any = AutoProcessor.from_pretrained(str(folder), trust_remote_code=True)  # type: ignore[no-untyped-call]
    options = {"padding": True, "truncation": True, "return_tensors": "pt"}
    inputs = processor(images=list(images), text=list(texts), **options)
    with torch.no_grad():
        image = model.get_image_features(pixel_values=inputs["pixel_values"])
        text = model.get_text_features(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    return features_of(image), features_of(text)


def features_of(output: Any) -> Tensor:
    """The features in what `get_image_features` returns: a tensor before transformers 5, an object since then."""
    features: Tensor = getattr(output, "pooler_output", output)
    return features
