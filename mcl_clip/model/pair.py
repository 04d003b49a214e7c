"""Join an image tower of timm and a text tower of transformers, each with its own weights, by projection heads."""

import difflib
import logging
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import open_clip
import timm
import torch
from open_clip.hf_configs import arch_dict
from torch import Tensor, nn
from transformers import AutoConfig

from mcl_clip.core.errors import UserError, shorten_list, suggest
from mcl_clip.core.files import read_json
from mcl_clip.model.open_clip_io import DEFAULT_CONTEXT_LENGTH, WEIGHT_SUFFIXES, check_weights, one_line

logger = logging.getLogger(__name__)

TIMM, TEXT = "timm:", "hf:"
PUBLISHED = "published"  # in place of a file: the weights that timm downloads
RANDOM = "random"  # in place of a file: random weights
POOLING = Path("1_Pooling") / "config.json"  # of sentence-transformers
POOLERS = {
    "pooling_mode_mean_tokens": "mean_pooler",
    "pooling_mode_cls_token": "cls_last_hidden_state_pooler",
    "pooling_mode_max_tokens": "max_pooler",
}
# An architecture of each family in which the owner of unknown weights is sought; to build all of timm takes minutes.
FAMILIES = (
    "beit_base_patch16_224", "convnext_tiny", "densenet121", "efficientnet_b0", "eva02_tiny_patch14_224",
    "mobilenetv3_large_100", "regnety_004", "resnet50", "swin_tiny_patch4_window7_224", "vgg16", "vit_base_patch16_224",
)  # fmt: skip
MOST_MEMBERS = 30  # of a family, tried in order of likeness of their names: each takes a tenth of a second


def split_image(image: str) -> tuple[str, str]:
    """Return the name and the weights in `timm:NAME=FILE`; without a file, those that timm publishes, or `random`.

    Raises:
        UserError: if it is no name of timm, or there is no such file.
    """
    name, _, weights = image.removeprefix(TIMM).partition("=")
    if not image.startswith(TIMM) or not timm.is_model(name):
        close = suggest(name.removeprefix(TIMM), timm.list_models())
        raise UserError(
            f"--tower.image {image} names no architecture of timm{close}; write timm:NAME=WEIGHTS, such as "
            f"timm:resnet50=resnet50.safetensors, or timm:NAME for the weights that timm publishes"
        )
    if weights == RANDOM:
        return name, RANDOM
    if weights and not Path(weights).is_file():
        raise UserError(f"--tower.image {image} names the weights {weights}, and there is no such file; correct it")
    if weights and Path(weights).suffix not in WEIGHT_SUFFIXES:
        raise UserError(f"--tower.image {image}: the weights are not one of {', '.join(WEIGHT_SUFFIXES)}; convert them")
    return name, weights or PUBLISHED


def pair_model_cfg(
    image: str, text: str, *, embed_dim: int, heads: Literal["linear", "mlp"]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the open_clip config of a pair of towers, and the pixels of the image tower (`mean`, `std`, ...).

    Args:
        image: `timm:NAME`, `timm:NAME=FILE` or `timm:NAME=random`.
        text: `hf:FOLDER` or `hf:ORG/NAME`, a text model of transformers with its tokenizer. The pooling is that of
            sentence-transformers where the folder has it, else the mean.
        embed_dim: dimension of the features of both towers.
        heads: projection of the pooled output of each tower, a matrix or a multilayer perceptron.

    Raises:
        UserError: if a name is unknown, or the text tower cannot be used.
    """
    name, _ = split_image(image)
    pixels = timm.get_pretrained_cfg(name)
    source = text.removeprefix(TEXT)
    if not text.startswith(TEXT) or not source:
        raise UserError(f"--tower.text {text!r} is not hf:FOLDER or hf:ORG/NAME, a text model of transformers")
    config = _text_config(source)
    return {
        "embed_dim": embed_dim,
        "custom_text": True,
        "vision_cfg": {
            "image_size": pixels.input_size[-1] if pixels else 224,
            "timm_model_name": name,
            "timm_pool": "",  # that of the network, with which its weights were trained
            "timm_proj": heads,
        },
        "text_cfg": {
            "context_length": min(DEFAULT_CONTEXT_LENGTH, most_tokens(config)),
            "vocab_size": config.vocab_size,
            "hf_model_name": source,
            "hf_tokenizer_name": source,
            "hf_proj_type": heads,
            "hf_pooler_type": _pooler(Path(source) / POOLING),
        },
    }, {key: getattr(pixels, key) for key in ("mean", "std", "interpolation")} if pixels else {}


def _text_config(source: str) -> Any:
    try:
        config = AutoConfig.from_pretrained(source)
    except Exception as error:  # damaged files and missing networks raise errors of many types
        raise UserError(
            f"the text tower {source} cannot be read: {one_line(error)}; give a folder with config.json, weights and "
            f"tokenizer as --tower.text hf:FOLDER"
        ) from error
    if config.model_type not in arch_dict:
        raise UserError(
            f"the text tower {source} is of the type {config.model_type!r}, and open_clip takes "
            f"{', '.join(arch_dict)}; use a text model of one of these types"
        )
    return config


def most_tokens(config: Any) -> int:
    """Return how many tokens a text tower takes; those of RoBERTa begin to count after the padding token."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None:  # relative positions
        return 1 << 20
    return int(positions) - (config.pad_token_id + 1 if "roberta" in config.model_type else 0)


def _pooler(path: Path) -> str:
    modes = read_json(path) if path.is_file() else {}
    return next((pooler for mode, pooler in POOLERS.items() if modes.get(mode)), "mean_pooler")


def load_trunk(visual: Any, name: str, weights: str) -> None:
    """Load weights of timm's architecture `name` into the trunk of an image tower, leaving out the classifier.

    Weights under other names are taken in their order if every tensor has the shape of its place (timm's `remap`).

    Raises:
        UserError: if the weights cannot be read, or are those of another architecture: how many are missing and
            unexpected, and which architecture they may belong to.
    """
    if weights == RANDOM:
        return
    if weights == PUBLISHED:
        visual.trunk.load_state_dict(_download(name))
        return
    state, expected, full = _read(Path(weights)), visual.trunk.state_dict(), _shapes(name)
    found = _convert(state, visual.trunk, name)
    if found.keys() != expected.keys() and list(full.values()) == [tensor.shape for tensor in state.values()]:
        logger.warning(
            "%s: other names (%s for %s) with the same shapes in the same order, in which the weights are taken",
            *(weights, next(iter(state)), next(iter(full))),
        )
        found = _convert(dict(zip(full, state.values(), strict=True)), visual.trunk, name)
    problem = ""
    if found.keys() != expected.keys():
        missing, unexpected = (
            sorted(keys) for keys in (expected.keys() - found.keys(), found.keys() - expected.keys())
        )
        problem = (
            f"{len(missing)} of {len(expected)} are missing ({shorten_list(missing, 3)}), and {len(unexpected)} are "
            f"unexpected ({shorten_list(unexpected, 3)})"
        )
    elif wrong := [key for key in expected if found[key].shape != expected[key].shape]:
        shapes = f"{tuple(found[wrong[0]].shape)} and not {tuple(expected[wrong[0]].shape)}"
        problem = f"{len(wrong)} of {len(expected)} have another shape, such as {wrong[0]} {shapes}"
    if problem:
        nearest = _describe_nearest(state, name, Path(weights))
        raise UserError(f"the weights in {weights} are not those of {name}: {problem}; {nearest}")
    visual.trunk.load_state_dict(found)


def _download(name: str) -> dict[str, Tensor]:
    try:
        return dict(timm.create_model(name, pretrained=True, num_classes=0).state_dict())
    except Exception as error:  # no network, no such weights, no weights at all
        raise UserError(
            f"timm cannot load weights of {name}: {one_line(error)}; without a network, give a file as "
            f"--tower.image timm:{name}=FILE"
        ) from error


def _read(path: Path) -> dict[str, Tensor]:
    try:
        check_weights(path)
        state = open_clip.factory.load_state_dict(str(path), weights_only=True)
    except Exception as error:  # damaged files raise errors of many types
        raise UserError(f"the weights {path} cannot be read: {one_line(error)}; give a file of tensors") from error
    state = state.get("model", state)  # as several trainers save it
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}


def _convert(state: Mapping[str, Tensor], trunk: nn.Module, name: str) -> dict[str, Tensor]:
    """Return weights in the form of timm, without the classifier: timm converts other forms, and resizes positions."""
    cfg, plain = timm.get_pretrained_cfg(name), dict(state)
    convert = getattr(sys.modules[type(trunk).__module__], "checkpoint_filter_fn", None)
    if convert is not None:
        try:
            plain = convert(dict(state), trunk)
        except Exception:  # made for other weights than these
            logger.debug("timm does not convert these weights", exc_info=True)
    layers = (cfg.classifier if cfg else None) or ()
    prefixes = tuple(f"{layer}." for layer in ([layers] if isinstance(layers, str) else layers))
    return {name: tensor for name, tensor in plain.items() if not name.startswith(prefixes)}


def _shapes(name: str) -> dict[str, torch.Size]:
    """Return the shapes of all weights of an architecture, without allocating them."""
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        return {key: tensor.shape for key, tensor in timm.create_model(name).state_dict().items()}


def _describe_nearest(state: Mapping[str, Tensor], name: str, path: Path) -> str:
    """Name the architecture of timm with the most weights of the same shapes, under any name, in a common family."""
    wanted = Counter(tensor.shape for tensor in state.values())

    def share(other: str) -> float:
        try:
            shapes = Counter(_shapes(other).values())
        except Exception:  # timm lists architectures that need another package
            return 0.0
        return (wanted & shapes).total() / max(wanted.total(), shapes.total())

    family = max((name, *FAMILIES), key=share)
    members = set(timm.list_models(module=timm.model_entrypoint(family).__module__.rpartition(".")[2])) - {name}
    # The name of a file often says what it holds.
    close = [difflib.get_close_matches(word, members, n=MOST_MEMBERS // 2, cutoff=0) for word in (path.stem, name)]
    shares: dict[str, float] = {}
    for other in (other for pair in zip(*close, strict=True) for other in pair):
        shares[other] = share(other)
        if shares[other] == 1:
            break
    nearest = max(shares, key=lambda other: shares[other], default="")
    if not nearest or shares[nearest] < 0.5:
        return "no architecture of the common families of timm has most of them; name the one they were made for"
    return f"the nearest architecture is {nearest}, with {shares[nearest]:.0%} of them in the same shapes"
