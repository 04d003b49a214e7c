"""From pixels to features, on the device."""

import difflib
import json
import pickle
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from jaxtyping import Float, Int, UInt8
from open_clip.utils import freeze_batch_norm_2d
from torch import Tensor, nn

from mcl_clip.core.distributed import seed_of
from mcl_clip.core.errors import UserError
from mcl_clip.core.files import atomic_dir, read_json
from mcl_clip.model.fast_paths import takes_short_texts, use_fast_paths
from mcl_clip.model.multistage import NOT_TEXT
from mcl_clip.model.open_clip_io import (
    DEFAULT_CONTEXT_LENGTH,
    OPEN_CLIP_CONFIG_NAME,
    OPEN_CLIP_WEIGHTS_NAME,
    UNSAFE_WEIGHTS,
    WEIGHT_SUFFIXES,
    check_model_cfg,
    check_model_folder,
    check_weights,
    make_image_transform,
    make_tokenizer,
    without_warnings,
    write_open_clip_folder,
)

PRECISIONS = ("fp32", "bf16")
TEXTS_AT_A_TIME = {"cpu": 32}  # of about equal length; a GPU rather takes them all
PREPROCESS_NAMES = ("size", "mean", "std", "interpolation", "resize_mode", "fill_color")
PREPROCESS_CHOICES = {"interpolation": ("bicubic", "bilinear"), "resize_mode": ("shortest", "longest", "squash")}
PUBLISHED = ("local-dir:", "hf-hub:")
RESNET_GROUPS = (
    ("conv1", "bn1", "conv2", "bn2", "conv3", "bn3"),
    *((f"layer{n}",) for n in (1, 2, 3, 4)),
    ("attnpool",),
)
WEIGHT_NAMES = (OPEN_CLIP_WEIGHTS_NAME, "open_clip_pytorch_model.bin", "model.safetensors", "pytorch_model.bin")
TEMPERATURE_NAMES = ("logit_scale", "logit_bias")


def to_floats(
    pixels: UInt8[Tensor, "batch 3 height width"], preprocess_cfg: Mapping[str, Any]
) -> Float[Tensor, "batch 3 height width"]:
    """Pixels as torchvision's ToTensor and Normalize make them: (pixel / 255 - mean) / std."""
    mean = torch.tensor(preprocess_cfg["mean"], device=pixels.device).view(3, 1, 1)
    std = torch.tensor(preprocess_cfg["std"], device=pixels.device).view(3, 1, 1)
    if pixels.device.type != "cpu":
        return torch.div(pixels, 255).sub_(mean).div_(std)
    floats = torch.empty(pixels.shape, dtype=torch.float32)
    for picture, place in zip(pixels, floats, strict=True):  # one at a time stays in the cache: half the time
        torch.div(picture, 255, out=place).sub_(mean).div_(std)
    return floats


def encode_texts(model: Any, tokens: Int[Tensor, "texts length"], device: torch.device) -> Float[Tensor, "texts dim"]:
    """Un-normalised features of texts, on the device.

    Where nothing behind its end reaches the feature of a text, short texts go through the tower with short ones.
    """
    rows = TEXTS_AT_A_TIME.get(device.type, len(tokens))
    if not takes_short_texts(model) or not tokens.any():
        features: Tensor = model.encode_text(tokens.to(device))
        return features
    lengths = (tokens.ne(0) * torch.arange(1, tokens.shape[1] + 1)).amax(1)
    order = lengths.argsort(stable=True)
    parts = [model.encode_text(tokens[some, : lengths[some[-1]]].to(device)) for some in torch.split(order, rows)]
    return torch.cat(parts)[order.argsort().to(device)]


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """The context in which towers run: bfloat16 autocast, or nothing for `fp32`."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext()


def dtype_of(model: nn.Module) -> torch.dtype:
    """The type of a model's weights."""
    return next(model.parameters()).dtype


@dataclass
class ClipBundle:
    """An encoder pair with all that is needed to feed it and to save it as an open_clip folder."""

    model: nn.Module
    model_cfg: dict[str, Any]
    preprocess_cfg: dict[str, Any]
    tokenizer: Callable[..., Int[Tensor, "texts context"]]
    is_pretrained: bool

    @property
    def context_length(self) -> int:
        """Tokens of a text, with start and end; what is longer is cut."""
        length: int = self.model_cfg["text_cfg"].get("context_length", DEFAULT_CONTEXT_LENGTH)
        return length

    @property
    def image_transform(self) -> Callable[[Any], Float[Tensor, "3 height width"]]:
        """The evaluation transform: from a PIL image to floats."""
        return make_image_transform(self.preprocess_cfg)


def create_clip(
    *,
    architecture: str = "",
    model_cfg: Mapping[str, Any] | None = None,
    pretrained: str = "",
    preprocess: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> ClipBundle:
    """A float32 encoder pair on the CPU, random or with the weights asked for.

    Args:
        architecture: a name known to open_clip, `local-dir:FOLDER` or `hf-hub:ORG/NAME`.
        model_cfg: in place of `architecture`, open_clip's settings of a model: `embed_dim`, `vision_cfg`, `text_cfg`.
        pretrained: a tag known to open_clip, or a file of weights; empty for random weights.
        preprocess: replaces some of open_clip's settings of the image transform: `size` (pixels; changes the tower's
            too), `mean`, `std`, `interpolation`, `resize_mode`, `fill_color`.
        seed: decides the random weights; the global generators are left alone.

    Raises:
        UserError: if a name is unknown, or the weights asked for are missing or do not fit.
    """
    if bool(architecture) == (model_cfg is not None):
        raise UserError("give a tower either architecture= (a name known to open_clip) or model_cfg= (its settings)")
    preprocess = _checked_preprocess(preprocess or {})
    if architecture.startswith(PUBLISHED):
        return _published_clip(architecture, pretrained, preprocess)
    name = architecture.replace("/", "-")
    cfg = _known_model_cfg(name) if name else _checked_model_cfg(model_cfg or {})
    tag_cfg = open_clip.get_pretrained_cfg(name, pretrained) if pretrained else {}
    weights = None if tag_cfg or not pretrained else _weights_file(name, pretrained, cfg)
    # A wrong activation loads without an error, so what the weights were trained with is written down.
    cfg["quick_gelu"] = bool(cfg.get("quick_gelu") or tag_cfg.get("quick_gelu"))
    _set_image_size(cfg, preprocess)
    if tag_cfg:
        options = {"force_quick_gelu": cfg["quick_gelu"], "force_image_size": preprocess.get("size")}
        model = _create(name, pretrained=pretrained, require_pretrained=True, preprocess=preprocess, **options)
    else:
        model = _random_model(cfg, preprocess, seed, name or "this model_cfg")
    if weights:
        load_weights(model, str(weights))
    return _bundle(model, cfg, _tokenizer(cfg), is_pretrained=bool(pretrained))


def _checked_preprocess(preprocess: Mapping[str, Any]) -> dict[str, Any]:
    unknown = sorted(set(preprocess) - set(PREPROCESS_NAMES))
    if unknown:
        raise UserError(f"preprocess has no {', '.join(unknown)}; it may set {', '.join(PREPROCESS_NAMES)}")
    for name, choices in PREPROCESS_CHOICES.items():
        if name in preprocess and preprocess[name] not in choices:
            raise UserError(f"preprocess has {name}={preprocess[name]!r}; it may be {', '.join(choices)}")
    return dict(preprocess)


def _checked_model_cfg(model_cfg: Mapping[str, Any]) -> dict[str, Any]:
    missing = [name for name in ("embed_dim", "vision_cfg", "text_cfg") if name not in model_cfg]
    if missing:
        raise UserError(f"model_cfg has no {', '.join(missing)}; it must have embed_dim, vision_cfg and text_cfg")
    copy: dict[str, Any] = json.loads(json.dumps(model_cfg))
    return copy


def _known_model_cfg(name: str) -> dict[str, Any]:
    known = open_clip.list_models()
    if name not in known:
        raise UserError(
            f"open_clip has no architecture {name!r}{_close(name, known)}; "
            f'python -c "import open_clip; print(open_clip.list_models())" shows all {len(known)}'
        )
    cfg: dict[str, Any] = open_clip.get_model_config(name)
    return cfg


def _close(name: str, known: Iterable[str]) -> str:
    by_lower = {word.lower(): word for word in known}
    close = [by_lower[word] for word in difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.5)]
    return f" (close: {', '.join(close)})" if close else ""


def _weights_file(name: str, pretrained: str, model_cfg: Mapping[str, Any]) -> Path:
    path = Path(pretrained)
    if path.is_dir():
        raise UserError(f"pretrained={pretrained!r} is a folder; give it as architecture='local-dir:{pretrained}'")
    if not path.is_file():
        tags = open_clip.list_pretrained_tags_by_model(name)
        where = f"its tags are {', '.join(tags)}" if tags else "there are no tags for it"
        raise UserError(
            f"pretrained={pretrained!r} is neither a file nor a tag of {name or 'this model_cfg'}"
            f"{_close(pretrained, tags)}; {where}"
        )
    beside = path.with_name(OPEN_CLIP_CONFIG_NAME)
    if beside.is_file():
        trained_with = _trained_with_quick_gelu(beside)
        if trained_with != bool(model_cfg.get("quick_gelu")):
            raise UserError(
                f"{path} was trained with quick_gelu={trained_with}, {name or 'model_cfg'} has "
                f"quick_gelu={not trained_with}; load it as architecture='local-dir:{path.parent}'"
            )
    return path


def _trained_with_quick_gelu(config_path: Path) -> bool:
    config = read_json(config_path)
    try:
        return bool(config.get("model_cfg", {}).get("quick_gelu"))
    except AttributeError as error:
        raise UserError(f"{config_path} is not a config of open_clip; restore it, or move the weights away") from error


def _set_image_size(cfg: dict[str, Any], preprocess: Mapping[str, Any]) -> None:
    if "size" in preprocess:
        cfg["vision_cfg"]["image_size"] = preprocess["size"]


def _published_clip(architecture: str, pretrained: str, preprocess: Mapping[str, Any]) -> ClipBundle:
    """A model with its own settings and weights, in a folder or on the Hub."""
    if pretrained:
        raise UserError(f"{architecture} brings its own weights; leave out pretrained={pretrained!r}")
    folder = Path(architecture.removeprefix("local-dir:"))
    if architecture.startswith("local-dir:"):
        if not (folder / OPEN_CLIP_CONFIG_NAME).is_file():
            raise UserError(f"{folder} is not an open_clip folder: it has no {OPEN_CLIP_CONFIG_NAME}")
        if not any(path.suffix in WEIGHT_SUFFIXES for path in folder.iterdir()):
            raise UserError(f"{folder} has no weights: {OPEN_CLIP_WEIGHTS_NAME} is missing; save the model again")
    _check_published(architecture)
    model = _create(
        architecture, require_pretrained=True, preprocess=preprocess, force_image_size=preprocess.get("size")
    )
    cfg: dict[str, Any] = open_clip.get_model_config(architecture)
    cfg["quick_gelu"] = bool(cfg.get("quick_gelu"))
    _set_image_size(cfg, preprocess)
    try:
        tokenizer = open_clip.get_tokenizer(architecture)
    except Exception as error:  # damaged files raise errors of many kinds
        raise UserError(f"the tokenizer of {architecture} cannot be loaded: {_short(error)}") from error
    return _bundle(model, cfg, tokenizer, is_pretrained=True)


def _check_published(architecture: str) -> None:
    """Nothing, for a published model whose settings and files may be loaded."""
    try:
        if architecture.startswith("local-dir:"):
            check_model_folder(Path(architecture.removeprefix("local-dir:")))
        else:
            check_model_cfg(open_clip.get_model_config(architecture))
    except Exception as error:  # damaged settings raise errors of many kinds
        raise UserError(f"{architecture} is not loaded: {_short(error)}; correct it, or use another model") from error


def _random_model(cfg: Mapping[str, Any], preprocess: Mapping[str, Any], seed: int, what: str) -> nn.Module:
    with tempfile.TemporaryDirectory() as folder:
        config = {"model_cfg": cfg, "preprocess_cfg": {}}
        (Path(folder) / OPEN_CLIP_CONFIG_NAME).write_text(json.dumps(config), encoding="utf-8")
        with without_warnings():  # that there are no weights, which is what was asked for
            return _create(f"local-dir:{folder}", preprocess=preprocess, seed=seed, what=what, load_weights=False)


def _create(name: str, *, preprocess: Mapping[str, Any], seed: int = 0, what: str = "", **options: Any) -> nn.Module:
    """`open_clip.create_model` that leaves the global generators alone and explains its errors."""
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_of("tower", seed))
            model: nn.Module = open_clip.create_model(
                name,
                precision="fp32",
                device="cpu",
                output_dict=True,
                weights_only=True,
                pretrained_text=False,
                pretrained_image=False,
                force_preprocess_cfg=dict(preprocess),
                **options,
            )
    except Exception as error:  # wrong settings and damaged weights raise errors of many kinds
        wanted = f"{what or name} {options.get('pretrained', '')}".strip()
        if isinstance(error, pickle.UnpicklingError):  # torch's advice would be to load it all the same
            raise UserError(UNSAFE_WEIGHTS.format(wanted)) from error
        offline = "" if what else "; without a network, give a downloaded file as pretrained= or a folder as local-dir:"
        raise UserError(f"open_clip cannot make {wanted}: {_short(error)}{offline}") from error
    return model


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 400 else f"{text[:400]} ..."


def _tokenizer(cfg: Mapping[str, Any]) -> Callable[..., Tensor]:
    try:
        return make_tokenizer(cfg)
    except (OSError, ValueError, RuntimeError) as error:
        name = cfg["text_cfg"].get("hf_tokenizer_name")
        raise UserError(f"the tokenizer {name} cannot be loaded: {_short(error)}") from error


def _bundle(
    model: nn.Module, cfg: dict[str, Any], tokenizer: Callable[..., Tensor], *, is_pretrained: bool
) -> ClipBundle:
    preprocess_cfg = json.loads(json.dumps(open_clip.get_model_preprocess_cfg(model)))
    size = preprocess_cfg["size"]
    if isinstance(size, list) and size[0] == size[1]:  # open_clip gives a number or a pair, as the tower has it
        preprocess_cfg["size"] = size[0]
    use_fast_paths(model)
    return ClipBundle(
        model=model, model_cfg=cfg, preprocess_cfg=preprocess_cfg, tokenizer=tokenizer, is_pretrained=is_pretrained
    )


def save_clip(tower: ClipBundle, folder: Path) -> None:
    """Write `tower` as an open_clip folder, all at once, in place of what was there."""
    with atomic_dir(folder) as temporary:
        write_open_clip_folder(
            temporary,
            tower.model,
            model_cfg=tower.model_cfg,
            preprocess_cfg=tower.preprocess_cfg,
            tokenizer=tower.tokenizer,
        )


def load_clip(folder: Path) -> ClipBundle:
    """The tower in an open_clip folder, with all its weights.

    Raises:
        UserError: if it is not such a folder, or weights are missing or do not fit.
    """
    return create_clip(architecture=f"local-dir:{folder}")


def load_weights(model: nn.Module, source: str) -> None:
    """Fill all weights of `model` from a file, or from the weights in a folder; training checkpoints too.

    Files that hold anything but tensors and plain values are refused, not run.

    Raises:
        UserError: if there is no such file, it is not safe, or its weights do not fit.
    """
    path = Path(source)
    if path.is_dir():
        found = [path / name for name in WEIGHT_NAMES if (path / name).is_file()]
        if not found:
            raise UserError(f"{path} holds no weights under any of the names {', '.join(WEIGHT_NAMES)}")
        path = found[0]
    if not path.is_file():
        raise UserError(f"there is no file of weights {path}")
    if path.suffix not in WEIGHT_SUFFIXES:
        raise UserError(f"{path} is not one of {', '.join(WEIGHT_SUFFIXES)}; convert it with open_clip first")
    try:
        check_weights(path)
        open_clip.load_checkpoint(model, str(path), strict=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(UNSAFE_WEIGHTS.format(path)) from error
    except Exception as error:  # broken files raise errors of many kinds
        raise UserError(f"the weights in {path} do not fit this model: {_short(error)}") from error


def lock(
    model: nn.Module, *, text: bool = False, image_unlocked_groups: int | None = None, patterns: Sequence[str] = ()
) -> None:
    """Take parameters out of training; the temperature stays in unless a pattern names it.

    Args:
        model: an open_clip model; batch norms in locked groups of its image tower are replaced by frozen ones.
        text: lock the whole text tower.
        image_unlocked_groups: lock the image tower but for its last groups. A ViT of L blocks has L + 2: the
            embeddings, L blocks (the last with the norm after it), the projection. A ResNet has 6: stem, four
            layers, pooling. None leaves it alone.
        patterns: regular expressions; parameters in whose names one is found are locked.

    Raises:
        UserError: if a number or pattern does not fit the model, or nothing is left to train.
    """
    if text:
        for name, parameter in model.named_parameters():
            if not name.startswith(NOT_TEXT):
                parameter.requires_grad_(False)
    if image_unlocked_groups is not None:
        _lock_image_tower(model, image_unlocked_groups)
    for pattern in patterns:
        _lock_matching(model, pattern)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if set(trained) <= set(TEMPERATURE_NAMES):
        raise UserError(f"everything is locked ({trainable_summary(model)}); leave a tower or some groups unlocked")


def _lock_image_tower(model: nn.Module, unlocked_groups: int) -> None:
    visual: Any = model.visual
    is_resnet = hasattr(visual, "attnpool") and hasattr(visual, "layer4")
    limit = _count_groups(visual, is_resnet)
    if unlocked_groups < 0 or (limit is not None and unlocked_groups > limit):
        raise UserError(
            f"image_unlocked_groups={unlocked_groups} is not between 0 and {limit or 'the number of groups'}; "
            f"leave it out to train the whole image tower"
        )
    if not is_resnet:
        model.lock_image_tower(unlocked_groups=unlocked_groups, freeze_bn_stats=True)  # type: ignore[operator]
        return
    # open_clip locks its ResNets as a whole only.
    locked = [name for group in RESNET_GROUPS[: len(RESNET_GROUPS) - unlocked_groups] for name in group]
    for name in locked:
        visual.get_submodule(name).requires_grad_(False)
        setattr(visual, name, freeze_batch_norm_2d(visual.get_submodule(name)))


def _count_groups(visual: Any, is_resnet: bool) -> int | None:
    if is_resnet:
        return len(RESNET_GROUPS)
    blocks = getattr(getattr(visual, "transformer", None), "resblocks", None)
    return None if blocks is None else len(blocks) + 2


def _lock_matching(model: nn.Module, pattern: str) -> None:
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise UserError(
            f"the pattern {pattern!r} of parameters to lock is not a regular expression: {error}"
        ) from error
    matching = [parameter for name, parameter in model.named_parameters() if expression.search(name)]
    if not matching:
        names = [name for name, _ in model.named_parameters()]
        raise UserError(f"no parameter matches the pattern {pattern!r}; names look like {names[0]} and {names[-1]}")
    for parameter in matching:
        parameter.requires_grad_(False)


def trainable_summary(model: nn.Module) -> str:
    """One line: how many parameters are trained, of how many, by part."""
    counts = {"visual": [0, 0], "text": [0, 0]}
    temperatures = []
    for name, parameter in model.named_parameters():
        if name in TEMPERATURE_NAMES:
            temperatures += [name] if parameter.requires_grad else []
            part = None
        else:
            part = "visual" if name.startswith("visual.") else "text"
        if part:
            counts[part][0] += parameter.numel() * parameter.requires_grad
            counts[part][1] += parameter.numel()
    total = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    parts = [f"{part} {_amount(some)} of {_amount(all_)}" for part, (some, all_) in counts.items()]
    share = f"{100 * trained / total:.1f} %"
    return f"trains {_amount(trained)} of {_amount(total)} parameters ({share}): {', '.join(parts + temperatures)}"


def _amount(number: int) -> str:
    if number < 1000:
        return str(number)
    return f"{number / 1e3:.1f}K" if number < 1e6 else f"{number / 1e6:.1f}M"


def count_truncated(tokenizer: Callable[..., Tensor], texts: Sequence[str]) -> int:
    """How many of `texts` are longer than the tokenizer's context and lose their end.

    Raises:
        UserError: if it is not one of open_clip's tokenizers.
    """
    context_length: int = getattr(tokenizer, "context_length", 0)
    hugging_face: Any = getattr(tokenizer, "tokenizer", None)
    if hugging_face is not None and context_length:
        clean: Callable[[str], str] = getattr(tokenizer, "clean_fn", str)
        ids = hugging_face([clean(text) for text in texts], truncation=False, padding=False).input_ids
        return sum(len(tokens) > context_length for tokens in ids)
    if not hasattr(tokenizer, "encode") or not context_length:
        raise UserError(f"cannot count what a {type(tokenizer).__name__} cuts; use one of open_clip's tokenizers")
    return sum(len(tokenizer.encode(text)) + 2 > context_length for text in texts)  # with start and end
