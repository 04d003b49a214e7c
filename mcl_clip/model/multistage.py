"""The stages of a multistage model as one model, with its file format.

This file is shipped inside exported models: it needs torch, open_clip and safetensors, nothing else.
"""

import json
import logging
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.tokenizer import HFTokenizer
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

CONFIG_NAME = "mcl_clip_config.json"
FORMAT_VERSION = 1
OPEN_CLIP_CONFIG_NAME = "open_clip_config.json"
OPEN_CLIP_WEIGHTS_NAME = "open_clip_model.safetensors"
WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
DEFAULT_CONTEXT_LENGTH = 77
NOT_TEXT = ("visual.", "logit_scale", "logit_bias")


# What a model may ask of its tokenizer; `trust_remote_code`, above all, is not among it.
TOKENIZER_OPTIONS = ("additional_special_tokens", "clean", "language", "reduction_mask", "strip_sep_token")
TOKENIZER_CONFIG_NAMES = ("tokenizer_config.json", "config.json")
UNSAFE_WEIGHTS = "{} holds more than tensors and plain values, and loading it could run code; save only its state_dict"
LARGEST = {"layers": 512, "context_length": 1 << 20, "image_size": 1 << 14, "vocab_size": 1 << 24}  # of a setting
LARGEST_WIDTH = 1 << 17  # of any other


def check_model_cfg(model_cfg: Any) -> None:
    """Nothing, for settings of a model that nobody could be harmed by: no code to fetch, no absurd sizes.

    Raises:
        ValueError: naming the setting.
    """
    parts = [model_cfg, *(model_cfg.get(name) for name in ("vision_cfg", "text_cfg"))] if _is_dict(model_cfg) else []
    if not parts or not all(map(_is_dict, parts)):
        raise ValueError("model_cfg is not an object with vision_cfg and text_cfg")
    if type(model_cfg.get("embed_dim")) is not int:
        raise ValueError(f"embed_dim is {model_cfg.get('embed_dim')!r}, not a number of dimensions")
    options = model_cfg["text_cfg"].get("tokenizer_kwargs") or {}
    if not _is_dict(options) or not set(options) <= set(TOKENIZER_OPTIONS):
        raise ValueError(f"tokenizer_kwargs is {options!r}; it may set {', '.join(TOKENIZER_OPTIONS)}")
    nested = [part for outer in parts for part in (outer, *filter(_is_dict, outer.values()))]
    for name, value in (pair for part in nested for pair in part.items()):
        _check_sizes(name, value)


def _is_dict(value: Any) -> bool:
    return isinstance(value, dict)


def _check_sizes(name: str, value: Any) -> None:
    limit = LARGEST.get(name, LARGEST_WIDTH)
    for number in value if isinstance(value, list) else [value]:
        if isinstance(number, int | float) and not abs(number) <= limit:
            raise ValueError(f"{name} is {number!r}; it may be at most {limit}")


def check_model_folder(folder: Path) -> None:
    """Nothing, for an open_clip folder whose files may be loaded.

    Raises:
        FileNotFoundError: if there is no such folder, or it has no config.
        ValueError: if its settings are refused, its tokenizer brings code, or its model is larger than its weights.
    """
    config = _read_object(folder / OPEN_CLIP_CONFIG_NAME)
    check_model_cfg(config.get("model_cfg"))
    if not _is_dict(config.get("preprocess_cfg", {})):
        raise ValueError("preprocess_cfg is not an object")
    for name in TOKENIZER_CONFIG_NAMES:
        if (folder / name).is_file() and "auto_map" in _read_object(folder / name):
            raise ValueError(f"{name} asks to run code that comes with the model (auto_map), which is not done")
    weights = [path for path in folder.iterdir() if path.suffix in WEIGHT_SUFFIXES]
    for path in weights:
        check_weights(path)
    sizes = [path.stat().st_size for path in weights]
    if sizes and (parameters := _count_parameters(folder)) > max(sizes):
        raise ValueError(f"its settings make a model of {parameters} parameters, its weights have {max(sizes)} bytes")


def check_weights(path: Path) -> None:
    """Nothing, for a file of weights that does not unpack to more than its size.

    Raises:
        ValueError: if it does; `torch.save` never compresses.
    """
    if path.suffix != ".safetensors" and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError(f"{path.name} is a compressed archive, which torch.save does not write")


def _count_parameters(folder: Path) -> int:
    """The size of a model, which is not held in memory for it."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)  # that it has no weights
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            model = open_clip.create_model(
                f"local-dir:{folder}", device="meta", load_weights=False, pretrained_text=False
            )
    finally:
        logging.disable(disabled)
    return sum(parameter.numel() for parameter in model.parameters())


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} is not a JSON object")
    return value


def read_config(folder: Path) -> dict[str, Any]:
    """The config of the multistage model in `folder`.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is damaged, or was written in a newer format.
    """
    config = _read_object(folder / CONFIG_NAME)
    if config.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{folder} has format version {config.get('format_version')!r}, this code reads {FORMAT_VERSION}; use the "
            f"code that came with the model"
        )
    names = config.get("stages")
    if not isinstance(names, list) or not names or not all(re.fullmatch(r"[\w-]+", str(name)) for name in names):
        raise ValueError(f"stages is {names!r}; it must be a list of folder names")
    scale, bias = config.get("logit_scale"), config.get("logit_bias")
    if not isinstance(scale, float) or not isinstance(bias, float | None) or config.get("combine") not in COMBINATIONS:
        raise ValueError(f"combine, logit_scale or logit_bias of {CONFIG_NAME} is missing or has another type")
    return config


def normalized(features: Tensor) -> Tensor:
    """Rows of unit length, in float32 if they came in half precision; rows of zeros stay zeros."""
    if features.dtype in (torch.float16, torch.bfloat16):  # the epsilon of F.normalize is 0 in float16
        features = features.float()
    return F.normalize(features, dim=-1)


def _concat(stage_features: Sequence[Tensor]) -> Tensor:
    """Long features count for more: the norms of the stages are part of the model."""
    return torch.cat(list(stage_features), dim=-1)


def _mean_cosine(stage_features: Sequence[Tensor]) -> Tensor:
    """Each stage counts the same: the cosine of the result is the mean of the cosines of the stages."""
    return torch.cat([normalized(features) for features in stage_features], dim=-1)


COMBINATIONS: dict[str, Callable[[Sequence[Tensor]], Tensor]] = {"concat": _concat, "mean_cosine": _mean_cosine}


def join_features(stage_features: Sequence[Tensor], combine: str) -> Tensor:
    """The features of all stages side by side, [..., sum of dims], before the last normalisation.

    Raises:
        ValueError: if there is no combination called `combine`.
    """
    if combine not in COMBINATIONS:
        raise ValueError(f"combine={combine!r} is not one of {', '.join(COMBINATIONS)}")
    return COMBINATIONS[combine](stage_features)


def combine_features(stage_features: Sequence[Tensor], combine: str) -> Tensor:
    """Unit features of the multistage model, [..., sum of dims], from the un-normalised features of its stages.

    Args:
        stage_features: what `encode_image` or `encode_text` of each stage gives, in the order of the stages.
        combine: `concat` (side by side, one L2 norm) or `mean_cosine` (each stage normalised first).
    """
    return normalized(join_features(stage_features, combine))


def make_tokenizer(model_cfg: Mapping[str, Any]) -> Callable[..., Tensor]:
    """The tokenizer that an open_clip `model_cfg` names; a Hugging Face one may be downloaded."""
    text_cfg = model_cfg["text_cfg"]
    context_length = text_cfg.get("context_length", DEFAULT_CONTEXT_LENGTH)
    options = text_cfg.get("tokenizer_kwargs") or {}
    if not text_cfg.get("hf_tokenizer_name"):
        return open_clip.SimpleTokenizer(context_length=context_length, **options)  # type: ignore[no-any-return]
    tokenizer: Callable[..., Tensor] = HFTokenizer(
        text_cfg["hf_tokenizer_name"],
        context_length=context_length,
        tokenizer_mode=text_cfg.get("tokenizer_mode"),
        **options,
    )
    return tokenizer


def make_image_transform(preprocess_cfg: Mapping[str, Any]) -> Callable[[Any], Tensor]:
    """open_clip's evaluation transform: from a PIL image to floats, [3, height, width]."""
    names = ("mean", "std", "interpolation", "resize_mode", "fill_color")
    options = {name: preprocess_cfg[name] for name in names if name in preprocess_cfg}
    transform: Callable[[Any], Tensor] = open_clip.image_transform(
        image_size=preprocess_cfg["size"], is_train=False, **options
    )
    return transform


def write_open_clip_folder(
    folder: Path,
    model: nn.Module,
    *,
    model_cfg: Mapping[str, Any],
    preprocess_cfg: Mapping[str, Any],
    tokenizer: Callable[..., Tensor],
) -> None:
    """Write a folder that `open_clip.create_model_and_transforms('local-dir:...')` loads without a network."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_cfg": dict(model_cfg), "preprocess_cfg": dict(preprocess_cfg)}
    config_path = folder / OPEN_CLIP_CONFIG_NAME
    config_path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    weights_path = folder / OPEN_CLIP_WEIGHTS_NAME
    save_file(_separate_tensors(model), weights_path)
    weights_path.chmod(config_path.stat().st_mode)  # safetensors writes 0600 whatever the umask
    if model_cfg["text_cfg"].get("hf_tokenizer_name"):
        tokenizer.save_pretrained(str(folder))  # type: ignore[attr-defined]


def _separate_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The weights by name, contiguous, no two in the same memory, as safetensors wants them."""
    tensors, seen = {}, set()
    for name, value in model.state_dict().items():
        tensor = value.detach().cpu().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return tensors


def read_open_clip_folder(folder: Path) -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    """The float32 model of an open_clip folder with its `model_cfg` and `preprocess_cfg`.

    Raises:
        FileNotFoundError: if the folder or its config is missing.
        ValueError: if its settings are refused, see `check_model_folder`.
        RuntimeError: if it has no weights or they do not fit.
    """
    check_model_folder(folder)
    config = _read_object(folder / OPEN_CLIP_CONFIG_NAME)
    try:
        with torch.random.fork_rng(devices=[]):  # the model is filled with random numbers before its weights
            model = open_clip.create_model(
                f"local-dir:{folder}", precision="fp32", output_dict=True, require_pretrained=True, weights_only=True
            )
    except pickle.UnpicklingError as error:  # torch's advice would be to load them all the same
        raise ValueError(UNSAFE_WEIGHTS.format(folder)) from error
    return model, config["model_cfg"], config["preprocess_cfg"]


def _text_state(stage: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in stage.state_dict().items() if not name.startswith(NOT_TEXT)}


def _text_settings(model_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """What decides, beside the weights, what the text tower computes."""
    text_cfg = {name: value for name, value in model_cfg["text_cfg"].items() if name != "hf_model_pretrained"}
    return {"text_cfg": text_cfg, **{name: bool(model_cfg.get(name)) for name in ("quick_gelu", "custom_text")}}


def _tokenizer_settings(model_cfg: Mapping[str, Any]) -> dict[str, Any]:
    names = ("context_length", "hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs")
    defaults = {"context_length": DEFAULT_CONTEXT_LENGTH}
    return {name: model_cfg["text_cfg"].get(name, defaults.get(name)) or None for name in names}


def have_same_text_tower(stages: Sequence[nn.Module], model_cfgs: Sequence[Mapping[str, Any]]) -> bool:
    """Whether all stages compute the same text features: equal settings and, tensor by tensor, equal weights."""
    settings, first = _text_settings(model_cfgs[0]), _text_state(stages[0])
    for stage, model_cfg in zip(stages[1:], model_cfgs[1:], strict=True):
        other = _text_state(stage)
        if _text_settings(model_cfg) != settings or other.keys() != first.keys():
            return False
        if not all(other[name].dtype == first[name].dtype and torch.equal(other[name], first[name]) for name in first):
            return False
    return True


def _share_text_tower(stages: Sequence[nn.Module]) -> None:
    """Let all stages hold the text modules of the first one, so that they are in memory once."""
    for stage in stages[1:]:
        for name, module in stages[0].named_children():
            if name != "visual":
                setattr(stage, name, module)
        for name, parameter in stages[0].named_parameters(recurse=False):
            if not name.startswith(NOT_TEXT):
                setattr(stage, name, parameter)


class MultistageCLIP(nn.Module):
    """The stages of a run as one CLIP model, used like a model of open_clip.

    It takes the stages over: where all text towers are equal, one is kept, shared by all, and run once.

    Args:
        stages: open_clip models in the order of the stages.
        combine: how the features of the stages become one feature, see `combine_features`.
        logit_scale: the logarithm of the factor on the cosine.
        logit_bias: what is added to the logits, or None.
        preprocess_cfg: open_clip's settings of the image transform, the same for all stages.
        model_cfgs: open_clip's settings of each stage.
        tokenizer: from a list of texts to tokens; by default the one that the settings name.

    Raises:
        ValueError: if the stages do not fit together.
    """

    def __init__(
        self,
        stages: Sequence[nn.Module],
        *,
        combine: str = "concat",
        logit_scale: float,
        logit_bias: float | None = None,
        preprocess_cfg: Mapping[str, Any],
        model_cfgs: Sequence[Mapping[str, Any]],
        tokenizer: Callable[..., Tensor] | None = None,
    ):
        super().__init__()
        if combine not in COMBINATIONS:
            raise ValueError(f"combine={combine!r} is not one of {', '.join(COMBINATIONS)}")
        if not stages or len(stages) != len(model_cfgs):
            raise ValueError(f"{len(stages)} stages with {len(model_cfgs)} model_cfgs; give one for each, at least one")
        if any(_tokenizer_settings(cfg) != _tokenizer_settings(model_cfgs[0]) for cfg in model_cfgs):
            raise ValueError("the stages use different tokenizers or context lengths; a multistage model has one")
        self.combine = combine
        self.model_cfgs = [dict(cfg) for cfg in model_cfgs]
        self.preprocess_cfg = dict(preprocess_cfg)
        self.tokenizer = tokenizer if tokenizer is not None else make_tokenizer(model_cfgs[0])
        self.image_transform = make_image_transform(preprocess_cfg)
        self.shared_text_tower = have_same_text_tower(stages, model_cfgs)
        if self.shared_text_tower:
            _share_text_tower(stages)
        self.stages = nn.ModuleList(stages)
        self.logit_scale = nn.Parameter(torch.tensor(float(logit_scale)))
        self.logit_bias = None if logit_bias is None else nn.Parameter(torch.tensor(float(logit_bias)))

    @property
    def context_length(self) -> int:
        """Tokens of a text, with start and end."""
        length: int = self.model_cfgs[0]["text_cfg"].get("context_length", DEFAULT_CONTEXT_LENGTH)
        return length

    @property
    def embed_dims(self) -> list[int]:
        """Dimensions of each stage's features."""
        return [cfg["embed_dim"] for cfg in self.model_cfgs]

    def encode_image_stages(self, image: Tensor) -> list[Tensor]:
        """The un-normalised features of each stage, each [batch, dim of the stage]."""
        stages: Any = self.stages
        return [stage.encode_image(image) for stage in stages]

    def encode_text_stages(self, text: Tensor) -> list[Tensor]:
        """The un-normalised features of each stage, each [batch, dim of the stage]."""
        stages: Any = self.stages
        if self.shared_text_tower:
            return [stages[0].encode_text(text)] * len(stages)
        return [stage.encode_text(text) for stage in stages]

    def encode_image(self, image: Tensor, normalize: bool = False, combine: str | None = None) -> Tensor:
        """Image features, [batch, sum of dims], of unit length if `normalize`; `combine` replaces the model's own."""
        features = join_features(self.encode_image_stages(image), combine or self.combine)
        return normalized(features) if normalize else features

    def encode_text(self, text: Tensor, normalize: bool = False, combine: str | None = None) -> Tensor:
        """Text features, [batch, sum of dims], of unit length if `normalize`; `combine` replaces the model's own."""
        features = join_features(self.encode_text_stages(text), combine or self.combine)
        return normalized(features) if normalize else features

    def forward(self, image: Tensor | None = None, text: Tensor | None = None) -> dict[str, Tensor | None]:
        """Unit features and the factor on the cosine, under the names of open_clip's `output_dict`."""
        output = {
            "image_features": None if image is None else self.encode_image(image, normalize=True),
            "text_features": None if text is None else self.encode_text(text, normalize=True),
            "logit_scale": self.logit_scale.exp(),
        }
        if self.logit_bias is not None:
            output["logit_bias"] = self.logit_bias
        return output

    def save(self, folder: Path | str) -> None:
        """Write the model into `folder`: a complete open_clip folder for each stage, then the config."""
        folder = Path(folder)
        names = [f"stage_{number}" for number in range(len(self.stages))]
        for name, stage, model_cfg in zip(names, self.stages, self.model_cfgs, strict=True):
            write_open_clip_folder(
                folder / name,
                stage,
                model_cfg=model_cfg,
                preprocess_cfg=self.preprocess_cfg,
                tokenizer=self.tokenizer,
            )
        config = {
            "format_version": FORMAT_VERSION,
            "stages": names,
            "combine": self.combine,
            "logit_scale": self.logit_scale.item(),
            "logit_bias": None if self.logit_bias is None else self.logit_bias.item(),
            "shared_text_tower": self.shared_text_tower,
            "embed_dims": self.embed_dims,
        }
        (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path | str, device: str | torch.device = "cpu") -> "MultistageCLIP":
        """The model in `folder`, in float32 and eval mode, on `device`.

        Raises:
            FileNotFoundError: if a file is missing.
            ValueError: if the folder is damaged, asks to run code, or was written in a newer format.
        """
        folder = Path(folder)
        config = read_config(folder)
        stages = [read_open_clip_folder(folder / name) for name in config["stages"]]
        model = cls(
            [model for model, _, _ in stages],
            combine=config["combine"],
            logit_scale=config["logit_scale"],
            logit_bias=config.get("logit_bias"),
            preprocess_cfg=stages[0][2],
            model_cfgs=[model_cfg for _, model_cfg, _ in stages],
            tokenizer=open_clip.get_tokenizer(f"local-dir:{folder / config['stages'][0]}"),
        )
        return model.to(device).eval()
