"""Create, load, save and run a pair of CLIP encoders."""

import json
import pickle
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
from huggingface_hub.errors import HFValidationError
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from mcl_clip.core.distributed import seed_of
from mcl_clip.core.errors import UserError, suggest
from mcl_clip.core.files import atomic_dir
from mcl_clip.model.fast_paths import in_short_batches, use_fast_paths
from mcl_clip.model.from_transformers import is_transformers_folder, load_clip_weights, read_clip_config
from mcl_clip.model.image_model import (
    is_image_folder,
    read_image_folder,
    write_image_folder,
)
from mcl_clip.model.image_transform import make_image_transform
from mcl_clip.model.open_clip_io import (
    DEFAULT_CONTEXT_LENGTH,
    OPEN_CLIP_CONFIG_NAME,
    OPEN_CLIP_WEIGHTS_NAME,
    SAFE_OPTIONS,
    UNSAFE_WEIGHTS,
    WEIGHT_SUFFIXES,
    check_model_cfg,
    check_model_folder,
    make_tokenizer,
    one_line,
    text_tower_options,
    without_warnings,
    write_open_clip_folder,
)
from mcl_clip.model.weights import find_weights, load_weights

PREPROCESS_NAMES = ("size", "mean", "std", "interpolation", "resize_mode", "fill_color")
PREPROCESS_CHOICES = {"interpolation": ("bicubic", "bilinear"), "resize_mode": ("shortest", "longest", "squash")}
TEXTS = ("a photo", "a photo of two dogs on a beach")  # to try a text tower; one of them is padded
LOCAL, HUB = "local-dir:", "hf-hub:"


def to_floats(
    pixels: UInt8[Tensor, "batch *views 3 height width"] | Float[Tensor, "batch ..."], preprocess_cfg: Mapping[str, Any]
) -> Float[Tensor, "batch ..."]:
    """Normalize pixels like torchvision's ToTensor and Normalize: (pixel / 255 - mean) / std.

    Floats, which are stored outputs of a frozen part, are returned as they are.
    """
    if pixels.is_floating_point():
        return pixels
    mean, std = (_per_channel(tuple(preprocess_cfg[name]), pixels.device) for name in ("mean", "std"))
    # On the CPU one image at a time, which stays in its cache: half the time.
    parts = torch.split(pixels, 1 if pixels.device.type == "cpu" else len(pixels))
    floats = torch.empty(pixels.shape, dtype=torch.float32, device=pixels.device)
    for part, out in zip(parts, torch.split(floats, len(parts[0])), strict=True):
        torch.div(part, 255, out=out).sub_(mean).div_(std)
    return floats


@lru_cache(maxsize=16)
def _per_channel(values: tuple[float, ...], device: torch.device) -> Float[Tensor, "3 1 1"]:
    """Return values on a device, where they stay: the process would wait for the device to copy them in each step."""
    return torch.tensor(values, dtype=torch.float32, device=device).view(3, 1, 1)


def encode_texts(
    model: Any, tokens: Int[Tensor, "texts length"] | Float[Tensor, "texts width"], device: torch.device
) -> Float[Tensor, "texts dim"]:
    """Encode tokens, or stored outputs of a frozen part, to unnormalized features on `device`."""
    if tokens.is_floating_point():
        features: Tensor = model.encode_text(tokens.to(device))
        return features
    return in_short_batches(model.encode_text, model, tokens, device)


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """Return the context for running the encoders: bfloat16 autocast for `bf16`, a null context for `fp32`."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext()


@dataclass
class ClipBundle:
    """A CLIP model with its configs and tokenizer: all that is needed to feed it and to save it.

    An `ImageModel`, which has no text tower, has no `text_cfg`, and `refuse_texts` for a tokenizer.
    """

    model: nn.Module
    model_cfg: dict[str, Any]
    preprocess_cfg: dict[str, Any]
    tokenizer: Callable[..., Int[Tensor, "texts context"]]

    @property
    def has_texts(self) -> bool:
        """Whether there is a text tower."""
        return "text_cfg" in self.model_cfg

    @property
    def context_length(self) -> int:
        """Tokens per text including start and end tokens; longer texts are truncated."""
        length: int = self.model_cfg["text_cfg"].get("context_length", DEFAULT_CONTEXT_LENGTH)
        return length

    @property
    def image_transform(self) -> Callable[[Any], Float[Tensor, "3 height width"]]:
        """The evaluation transform, from a PIL image to a float tensor."""
        return make_image_transform(self.preprocess_cfg)


def create_clip(
    *,
    architecture: str = "",
    model_cfg: Mapping[str, Any] | None = None,
    pretrained: str = "",
    preprocess: Mapping[str, Any] | None = None,
    seed: int = 0,
    text_weights: bool = True,
) -> ClipBundle:
    """Create a float32 CLIP model on the CPU with random or pretrained weights.

    Args:
        architecture: an architecture name of open_clip, `local-dir:FOLDER` or `hf-hub:ORG/NAME`.
        model_cfg: an open_clip model config (`embed_dim`, `vision_cfg`, `text_cfg`) in place of `architecture`.
        pretrained: a pretrained tag of open_clip, or a weights file; empty for random weights.
        preprocess: overrides of the image transform, see `PREPROCESS_NAMES`; `size` also resizes the image tower.
        seed: seed of the random weights. Global random generators are not changed.
        text_weights: without `pretrained`, a Hugging Face text tower has the weights of its `hf_model_name`, a folder
            or a model of the Hub, unless its config sets `hf_model_pretrained` to false. False, as in version 0.6, is
            random weights in any case.

    Raises:
        UserError: if a name or option is unknown, or the weights are missing or do not fit the model.
    """
    if bool(architecture) == (model_cfg is not None):
        raise UserError("give either an architecture (a name known to open_clip) or a model config, not both or none")
    preprocess = dict(preprocess or {})
    check_preprocess(preprocess)
    if architecture.startswith((LOCAL, HUB)):
        return _load_published(architecture, pretrained, preprocess)
    name = architecture.replace("/", "-")
    cfg = _find_model_cfg(name, model_cfg or {})
    tag_cfg = open_clip.get_pretrained_cfg(name, pretrained) if pretrained else {}
    weights = None if tag_cfg or not pretrained else find_weights(name, pretrained, cfg)
    # Weights trained with the other activation load without an error, so the config records which one it was.
    cfg["quick_gelu"] = bool(cfg.get("quick_gelu") or tag_cfg.get("quick_gelu"))
    text_name = cfg["text_cfg"].get("hf_model_name")
    size = preprocess.get("size", None if name else cfg["vision_cfg"].get("image_size"))
    cfg, force_image_size = _resize(cfg, size)
    if tag_cfg:
        options = {"force_quick_gelu": cfg["quick_gelu"], "force_image_size": force_image_size}
        model = _create_model(name, preprocess, pretrained=pretrained, require_pretrained=True, **options)
    else:
        # open_clip takes a config from a folder, and warns that the folder has no weights.
        with tempfile.TemporaryDirectory() as folder, without_warnings():
            config = json.dumps({"model_cfg": cfg, "preprocess_cfg": {}})
            (Path(folder) / OPEN_CLIP_CONFIG_NAME).write_text(config, encoding="utf-8")
            loads_text = text_weights and not weights and cfg["text_cfg"].get("hf_model_pretrained", True)
            options = {"label": name or "the model in the recipe", "load_weights": False, "pretrained_text": loads_text}
            model = _create_model(f"{LOCAL}{folder}", preprocess, seed=seed, text_name=text_name, **options)
    if weights:
        load_weights(model, weights)
    if size:
        check_image_size(model, cfg, size)
    return _make_bundle(model, cfg, partial(make_tokenizer, cfg), cfg["text_cfg"].get("hf_tokenizer_name"))


def check_preprocess(preprocess: Mapping[str, Any]) -> None:
    """Raise UserError for overrides of the image transform that are unknown, or of which no transform can be made."""
    unknown = sorted(set(preprocess) - set(PREPROCESS_NAMES))
    if unknown:
        raise UserError(f"preprocess has no {', '.join(unknown)}; it may set {', '.join(PREPROCESS_NAMES)}")
    for option, value in preprocess.items():
        choices = PREPROCESS_CHOICES.get(option)
        if choices and value not in choices:
            raise UserError(f"preprocess sets {option} to {value!r}; it may be {', '.join(choices)}")
        is_list = isinstance(value, list | tuple)
        numbers = value if is_list else (value,)
        are_numbers = all(isinstance(n, int | float) and not isinstance(n, bool) for n in numbers)
        if option in ("mean", "std") and not (are_numbers and len(numbers) == (3 if is_list else 1)):
            raise UserError(
                f"preprocess sets {option} to {value!r}; it must be a number, or one each of red, green and blue"
            )
        if option == "std" and not all(numbers):
            raise UserError(f"preprocess sets std to {value!r}; pixels are divided by it, so it must not be 0")
        if option == "size" and not (are_numbers and len(numbers) in (1, 2) and min(numbers) >= 1):
            raise UserError(f"preprocess sets size to {value!r}; it must be pixels: a side, or height and width")


def with_image_size(model_cfg: Mapping[str, Any], size: int | Sequence[int]) -> dict[str, Any]:
    """Return a model config at another image size in pixels, a side or (height, width).

    timm names some towers after their size: such a tower becomes the one of that size, so that it can be loaded again.
    """
    vision_cfg = {**model_cfg["vision_cfg"], "image_size": size}
    name = str(vision_cfg.get("timm_model_name") or "")
    native, other = _timm_size(name), re.sub(r"_\d+$", f"_{size}", name)
    if name.endswith(f"_{native}") and _timm_size(other) == size:
        vision_cfg["timm_model_name"] = other
    return {**model_cfg, "vision_cfg": vision_cfg}


def _resize(
    model_cfg: dict[str, Any], size: int | Sequence[int] | None
) -> tuple[dict[str, Any], int | Sequence[int] | None]:
    """Return the config at another size, and the size that open_clip may resize the loaded weights to.

    A timm tower without a name of that size would be resized, too, but could not be loaded again.
    """
    if size is None:
        return model_cfg, None
    resized = with_image_size(model_cfg, size)
    names = [cfg["vision_cfg"].get("timm_model_name") for cfg in (model_cfg, resized)]
    return resized, size if names[0] != names[1] or not names[0] else None


def _timm_size(name: str) -> int | None:
    """Return the side in pixels of the images that a tower of timm is made for; None if there is no such tower."""
    cfg = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    return cfg.input_size[-1] if cfg and cfg.input_size else None


def check_image_size(model: nn.Module, model_cfg: Mapping[str, Any], size: int | Sequence[int]) -> None:
    """Raise UserError if the image tower does not take images of `size` pixels: (height, width), or a side."""
    height, width = (size, size) if isinstance(size, int) else size
    device = next(model.parameters()).device
    try:
        with evaluating(model), torch.no_grad():
            model.encode_image(torch.zeros(1, 3, height, width, device=device))  # type: ignore[operator]
    except (AssertionError, RuntimeError, ValueError, TypeError, LookupError) as error:
        tower = model_cfg["vision_cfg"].get("timm_model_name") or type(model.visual).__name__
        raise UserError(
            f"the image tower {tower} does not take images of {height} x {width} pixels "
            f"({one_line(error).rstrip('.')}); use {_timm_size(tower) or 'its own'} pixels, or a tower of that size"
        ) from error


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set evaluation mode for a while."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _find_model_cfg(name: str, model_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of open_clip's config called `name`, or of `model_cfg` if there is no name."""
    if not name:
        missing = [key for key in ("embed_dim", "vision_cfg", "text_cfg") if key not in model_cfg]
        if missing:
            raise UserError(
                f"the model in the recipe has no {', '.join(missing)}; it must have embed_dim, vision_cfg and text_cfg"
            )
        copy: dict[str, Any] = json.loads(json.dumps(model_cfg))
        return copy
    known = open_clip.list_models()
    if name not in known:
        raise UserError(
            f"open_clip has no architecture {name!r}{suggest(name, known)}; "
            f'python -c "import open_clip; print(open_clip.list_models())" lists all {len(known)}'
        )
    cfg: dict[str, Any] = open_clip.get_model_config(name)
    return cfg


def _load_published(architecture: str, pretrained: str, preprocess: Mapping[str, Any]) -> ClipBundle:
    """Load a model with its own config and weights from a folder or the Hub."""
    if pretrained:
        raise UserError(f"{architecture} brings its own weights; leave out --tower.pretrained {pretrained}")
    folder = Path(architecture.removeprefix(LOCAL)) if architecture.startswith(LOCAL) else None
    if folder and is_image_folder(folder):
        return _load_images(folder)
    if folder and is_transformers_folder(folder):
        cfg, own = read_clip_config(folder)
        clip = create_clip(model_cfg=cfg, preprocess={**own, **preprocess})
        load_clip_weights(clip.model, folder)
        return clip
    if folder:
        if not (folder / OPEN_CLIP_CONFIG_NAME).is_file():
            raise UserError(f"{folder} is not an open_clip folder: it has no {OPEN_CLIP_CONFIG_NAME}")
        if not any(path.suffix in WEIGHT_SUFFIXES for path in folder.iterdir()):
            raise UserError(f"{folder} has no weights: {OPEN_CLIP_WEIGHTS_NAME} is missing; save the model again")
    try:
        if folder:
            check_model_folder(folder)
        else:
            check_model_cfg(open_clip.get_model_config(architecture))
    except Exception as error:  # damaged configs raise errors of many types
        raise UserError(f"{architecture} is not loaded: {one_line(error)}; correct it, or use another model") from error
    size, cfg = preprocess.get("size"), open_clip.get_model_config(architecture)
    cfg, force_image_size = _resize({**cfg, "quick_gelu": bool(cfg.get("quick_gelu"))}, size)
    options = text_tower_options(folder, cfg) if folder else {}
    options |= {"require_pretrained": True, "force_image_size": force_image_size}
    model = _create_model(architecture, preprocess, **options)
    if size:
        check_image_size(model, cfg, size)
    return _make_bundle(model, cfg, partial(open_clip.get_tokenizer, architecture), f"of {architecture}")


def _load_images(folder: Path) -> ClipBundle:
    try:
        model, cfg, preprocess_cfg = read_image_folder(folder)
    except Exception as error:  # damaged configs and weights raise errors of many types
        raise UserError(f"{folder} is not loaded: {one_line(error)}; correct it, or use another model") from error
    return ClipBundle(model=model, model_cfg=cfg, preprocess_cfg=preprocess_cfg, tokenizer=refuse_texts)


def refuse_texts(*_: object, **__: object) -> Int[Tensor, "texts context"]:
    """Raise UserError, in place of a tokenizer of a model without a text tower."""
    raise UserError("the model has learned from images alone and has no text tower for captions; use one that has")


def _create_model(
    name: str,
    preprocess: Mapping[str, Any],
    *,
    seed: int = 0,
    label: str = "",
    text_name: str | None = None,
    **options: Any,
) -> nn.Module:
    """Call `open_clip.create_model` without touching the global generators; raise its errors as UserError."""
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_of("tower", seed))
            options |= {"force_preprocess_cfg": dict(preprocess)}
            model: nn.Module = open_clip.create_model(name, **{**SAFE_OPTIONS, **options})
    except Exception as error:  # wrong configs and damaged weights raise errors of many types
        requested = f"{label or name} {options.get('pretrained', '')}".strip()
        if isinstance(error, pickle.UnpicklingError):  # torch's own message suggests to load it anyway
            raise UserError(UNSAFE_WEIGHTS.format(requested)) from error
        offline = "; without a network, name a downloaded file as --tower.pretrained, or a folder as local-dir:FOLDER"
        if text_name and isinstance(error, OSError | HFValidationError):
            offline = (
                f"; without a network, give a folder with config, weights and tokenizer of {text_name} as "
                f"hf_model_name and hf_tokenizer_name, or set hf_model_pretrained to false for random weights"
            )
        elif label:
            offline = ""
        raise UserError(f"open_clip cannot create {requested}: {one_line(error)}{offline}") from error
    return model


def _make_bundle(
    model: nn.Module,
    cfg: dict[str, Any],
    load_tokenizer: Callable[[], Callable[..., Tensor]],
    tokenizer_name: str | None,
) -> ClipBundle:
    try:
        tokenizer = load_tokenizer()
    except Exception as error:  # damaged files raise errors of many types
        raise UserError(
            f"the tokenizer {tokenizer_name} cannot be loaded: {one_line(error)}; a folder with its files as "
            f"hf_tokenizer_name would do, too"
        ) from error
    preprocess_cfg = json.loads(json.dumps(open_clip.get_model_preprocess_cfg(model)))
    size = preprocess_cfg["size"]
    if isinstance(size, list) and size[0] == size[1]:  # open_clip gives a number or a pair, as the image tower does
        preprocess_cfg["size"] = size[0]
    for name in ("mean", "std"):  # open_clip takes one number for all channels, too
        if not isinstance(preprocess_cfg[name], list):
            preprocess_cfg[name] = [preprocess_cfg[name]] * 3
    use_fast_paths(model)
    return ClipBundle(model=model, model_cfg=cfg, preprocess_cfg=preprocess_cfg, tokenizer=tokenizer)


def check_vocabulary(model: nn.Module, tokenizer: Callable[..., Int[Tensor, "texts context"]]) -> None:
    """Raise UserError if the tokenizer makes tokens that the text tower has no embedding of."""
    largest, vocabulary = int(tokenizer(list(TEXTS)).max()), getattr(model, "vocab_size", 0)
    if vocabulary and largest >= vocabulary:
        raise UserError(
            f"the tokenizer makes token {largest}, and the text tower has vocab_size {vocabulary}; give it the "
            f"vocab_size of the tokenizer, or name the tokenizer that belongs to it as hf_tokenizer_name"
        )


def save_clip(clip: ClipBundle, folder: Path) -> None:
    """Write `clip` as an open_clip folder, or that of an image model, atomically replacing any previous one."""
    with atomic_dir(folder) as temporary:
        if not clip.has_texts:
            write_image_folder(temporary, clip.model, model_cfg=clip.model_cfg, preprocess_cfg=clip.preprocess_cfg)
            return
        write_open_clip_folder(
            temporary,
            clip.model,
            model_cfg=clip.model_cfg,
            preprocess_cfg=clip.preprocess_cfg,
            tokenizer=clip.tokenizer,
        )


def load_clip(folder: Path) -> ClipBundle:
    """Load the model that `save_clip` wrote; raise UserError as `create_clip` does."""
    return create_clip(architecture=f"{LOCAL}{folder}")
