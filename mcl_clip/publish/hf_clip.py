"""Hugging Face transformers files: multistage models with their code, single models as a `CLIPModel`."""

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
from mcl_clip.model.from_transformers import clip_tensors
from mcl_clip.model.modeling_multistage_clip import fit_tokens, write_config_and_code
from mcl_clip.model.multistage import MultistageCLIP
from mcl_clip.model.processing_multistage_clip import PROCESSING_AUTO_MAP, MultistageCLIPProcessor

CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"
LAST_MERGE = 49152 - 256 - 2 + 1  # CLIP and open_clip ignore the rest of the file
RESAMPLE = {"bicubic": 3, "bilinear": 2}  # PIL's numbers
# Options of open_clip that a CLIPModel allows with any value: sizes, and options without effect on the features.
ALLOWED_OPTIONS = {
    "vision_cfg": ("layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "patch_dropout",
                   "attn_pooler_queries", "attn_pooler_heads", "pos_embed_type", "timm_pool", "timm_proj",
                   "timm_proj_bias", "timm_drop", "timm_drop_path", "timm_model_pretrained"),
    "text_cfg": ("context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "pad_id", "eos_id",
                 "hf_model_pretrained", "hf_proj_type", "hf_pooler_type"),
}  # fmt: skip
ALLOWED_IF_EMPTY = ("norm_kwargs", "act_kwargs", "tokenizer_kwargs")
PUNCTUATION = Regex(r"[!-/:-@\[-`{-~]")
# open_clip's cleaning of texts, as far as a tokenizer can express it.
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
CHECK_TEXTS = ("a photo of a dog", "A Photo of  two DOGS, a cat_and one (red) bird.", "x", "so many words " * 80)


def write_transformers_files(folder: Path, model: MultistageCLIP) -> None:
    """Add what `AutoModel` and other auto classes need, with `trust_remote_code=True`, to a folder with a saved model.

    Raises:
        UserError: if the tokenizer of transformers would tokenize texts differently from the model's own.
    """
    write_config_and_code(folder, model)
    resizing = ("interpolation", "resize_mode", "fill_color")
    image_processor = {
        "auto_map": {"AutoImageProcessor": PROCESSING_AUTO_MAP["AutoImageProcessor"]},
        "image_processor_type": "MultistageCLIPImageProcessor",
        **_size_mean_std(model.preprocess_cfg),
        **{name: model.preprocess_cfg[name] for name in resizing if name in model.preprocess_cfg},
    }
    write_json(folder / "preprocessor_config.json", image_processor)
    text_cfg = model.model_cfgs[0]["text_cfg"]
    hf_tokenizer: Any = getattr(model.tokenizer, "tokenizer", None)
    default = "lower" if hf_tokenizer is None else "whitespace"
    clean = (text_cfg.get("tokenizer_kwargs") or {}).get("clean", default)
    processor = {
        "auto_map": {"AutoProcessor": PROCESSING_AUTO_MAP["AutoProcessor"]},
        "processor_class": MultistageCLIPProcessor.__name__,
        "clean": clean,
    }
    write_json(folder / "processor_config.json", processor)
    if hf_tokenizer is None:
        write_clip_tokenizer(folder, model.context_length)
    else:
        settings = {}
        if CLEANING[clean] and getattr(hf_tokenizer, "is_fast", False):
            hf_tokenizer = copy.deepcopy(hf_tokenizer)
            backend = hf_tokenizer.backend_tokenizer
            own = [backend.normalizer] if backend.normalizer else []
            backend.normalizer = normalizers.Sequence([*CLEANING[clean], *own])
            settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # other classes rebuild their normalizer on loading
        _save_tokenizer(hf_tokenizer, folder, model.context_length, **settings)
    tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=True)  # the code was just written here
    inputs = tokenizer(list(CHECK_TEXTS), padding=True, return_tensors="pt", verbose=False)
    tokens = fit_tokens(inputs["input_ids"], inputs["attention_mask"], model.context_length, model.tokenizer)
    for text, actual, expected in zip(CHECK_TEXTS, tokens, model.tokenizer(list(CHECK_TEXTS)), strict=True):
        if not torch.equal(actual, expected):
            names = ("hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs")
            described = ", ".join(f"{name}={text_cfg[name]!r}" for name in names if text_cfg.get(name)) or "CLIP's"
            raise UserError(
                f"transformers would tokenize {text!r:.60} differently from the model's tokenizer ({described}); "
                f"export single stages for open_clip, with --stage K"
            )


def write_clip_tokenizer(folder: Path, context_length: int) -> None:
    """Write CLIP's tokenizer, built from open_clip's vocabulary without a download.

    Its token ids are those of open_clip's `SimpleTokenizer`, except for texts that the latter repairs first: HTML
    entities, typographic quotes, broken encodings. Special tokens within a text are read as text.
    """
    merges = gzip.decompress(Path(default_bpe()).read_bytes()).decode("utf-8").split("\n")[1:LAST_MERGE]
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
    local = ("is_local", "local_files_only", "name_or_path")  # where it was loaded from on this machine
    config = {name: value for name, value in read_json(path).items() if name not in local}
    inputs = ["input_ids", "attention_mask"]
    write_json(path, {**config, "model_max_length": context_length, "model_input_names": inputs, **settings})


def _size_mean_std(preprocess: Mapping[str, Any]) -> dict[str, Any]:
    size = preprocess["size"]
    height, width = (size, size) if isinstance(size, int) else size
    return {
        "size": {"height": height, "width": width},
        "image_mean": list(preprocess.get("mean") or OPENAI_DATASET_MEAN),
        "image_std": list(preprocess.get("std") or OPENAI_DATASET_STD),
    }


def write_clip_model(folder: Path, clip: ClipBundle) -> None:
    """Write a single model as a `CLIPModel` of transformers with its processor; it needs no code of its own.

    Features of the same pixels and tokens are equal up to rounding. Images are processed by transformers' own
    `CLIPImageProcessor`: resized pixels differ from open_clip's by a few steps of 255, and the center crop may be off
    by one pixel.

    Raises:
        UserError: for a model that a `CLIPModel` cannot represent, with the reason.
    """
    if problem := next(_unsupported_parts(clip), None):
        raise UserError(
            f"the model has {problem}, which the CLIPModel of transformers cannot represent; export it for open_clip, "
            f"or as a multistage model with its code"
        )
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().float().contiguous().clone() for name, tensor in clip_tensors(clip.model)}
    _clip_config(clip).save_pretrained(folder)
    weights = folder / "model.safetensors"
    save_file(tensors, weights, metadata={"format": "pt"})
    weights.chmod((folder / "config.json").stat().st_mode)  # safetensors writes 0600 whatever the umask
    mean_std = _size_mean_std(clip.preprocess_cfg)
    size = mean_std.pop("size")
    is_shortest = (clip.preprocess_cfg.get("resize_mode") or "shortest") == "shortest"
    preprocessor = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size["height"]} if is_shortest else size,
        "resample": RESAMPLE.get(clip.preprocess_cfg.get("interpolation") or "bicubic", RESAMPLE["bicubic"]),
        "do_center_crop": True,
        "crop_size": size,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        **mean_std,
    }
    write_json(folder / "preprocessor_config.json", preprocessor)
    write_clip_tokenizer(folder, clip.context_length)


def _unsupported_parts(clip: ClipBundle) -> Iterator[str]:
    model: Any = clip.model
    if not isinstance(model, open_clip.CLIP):
        yield f"a {type(model).__name__}"
    if type(model.visual) is not VisionTransformer:
        yield f"an image tower of type {type(model.visual).__name__}"
    if model.logit_bias is not None:
        yield "a logit_bias"
    for part, known in (("vision_cfg", CLIPVisionCfg), ("text_cfg", CLIPTextCfg)):
        defaults = {field.name: field.default for field in fields(known)}
        for name, value in clip.model_cfg[part].items():
            is_empty = name in ALLOWED_IF_EMPTY and not value
            is_default = value == defaults.get(name) or (name, value) == ("block_type", "default")
            if name not in ALLOWED_OPTIONS[part] and not is_default and not is_empty:
                yield f"{part} with {name}={value!r}"
    for name in ("image_size", "patch_size"):
        value = getattr(model.visual, name)
        if value[0] != value[1]:
            yield f"{name}={tuple(value)}"
    if clip.preprocess_cfg.get("resize_mode") == "longest":
        yield "resize_mode='longest'"


def _clip_config(clip: ClipBundle) -> Any:
    model: Any = clip.model

    def encoder_config(transformer: Any) -> dict[str, Any]:
        block = transformer.resblocks[0]
        return {
            "hidden_size": transformer.width,
            "intermediate_size": block.mlp.c_fc.out_features,
            "num_hidden_layers": transformer.layers,
            "num_attention_heads": block.attn.num_heads,
            "hidden_act": "quick_gelu" if clip.model_cfg.get("quick_gelu") else "gelu",
            "projection_dim": clip.model_cfg["embed_dim"],
        }

    tokenizer = SimpleTokenizer()
    text = {
        **encoder_config(model.transformer),
        "vocab_size": model.token_embedding.num_embeddings,
        "max_position_embeddings": model.context_length,
        "bos_token_id": tokenizer.sot_token_id,
        "eos_token_id": tokenizer.eot_token_id,
        "pad_token_id": tokenizer.eot_token_id,
    }
    vision = {
        **encoder_config(model.visual.transformer),
        "image_size": model.visual.image_size[0],
        "patch_size": model.visual.patch_size[0],
    }
    return CLIPConfig(
        text_config=text,
        vision_config=vision,
        logit_scale_init_value=model.logit_scale.item(),
        architectures=["CLIPModel"],
        dtype="float32",
        projection_dim=clip.model_cfg["embed_dim"],
    )


def transformers_features(
    folder: Path, images: Sequence[Image.Image], texts: Sequence[str]
) -> tuple[Float[Tensor, "images dim"], Float[Tensor, "texts dim"]]:
    """Compute un-normalized features with `AutoModel` and `AutoProcessor` from an exported folder.

    This executes the code in the folder: call it only for folders that this process has just written.
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
    """Return the features in the output of `get_image_features`: a tensor before transformers 5, an object since."""
    features: Tensor = getattr(output, "pooler_output", output)
    return features
