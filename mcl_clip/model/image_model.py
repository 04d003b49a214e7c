"""An image tower without a text tower: a trunk of timm, the projection head of contrastive losses, and its folder.

The features of the model are those of the trunk; the loss sees what the head makes of them (SimCLR, arXiv 2002.05709,
section 4.2). In a folder, the trunk is stored as timm stores it, so that timm and transformers load it, too.

This file is shipped inside exported models: it needs torch, timm and safetensors only.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import group_parameters
from torch import Tensor, nn
from torch.nn import functional as F

CONFIG_NAME = "image_model.json"
TIMM_CONFIG_NAME, TRUNK_NAME, HEAD_NAME = "config.json", "model.safetensors", "head.safetensors"
START_TEMPERATURE = 0.1  # until a stage sets its own
MAX_DIMENSIONS = 1 << 17
# Arguments of `timm.create_model` that name files or addresses, and those that the config sets itself.
NOT_ARGUMENTS = (
    *("checkpoint_path", "cache_dir", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict"),
    *("model_name", "num_classes", "img_size", "scriptable", "exportable", "no_jit", "features_only"),
)


class ImageTower(nn.Module):
    """A trunk of timm and a projection head."""

    def __init__(self, model_cfg: Mapping[str, Any]):
        super().__init__()
        vision, head = model_cfg["vision_cfg"], model_cfg["head_cfg"]
        self.trunk: Any = _create_trunk(vision)
        width = model_cfg["embed_dim"]
        if head["type"] == "linear":
            self.head: nn.Module = nn.Linear(width, head["dim"])
        else:
            norm = [nn.BatchNorm1d(width)] if head["batch_norm"] else []
            first = nn.Linear(width, width, bias=not norm)  # a bias before a batch norm has no effect
            self.head = nn.Sequential(first, *norm, nn.ReLU(), nn.Linear(width, head["dim"]))

    def forward(self, image: Tensor) -> Tensor:
        """Compute the unnormalized features of the trunk, [images, width]."""
        features: Tensor = self.trunk(image)
        return features

    def lock(self, unlocked_groups: int = 0, freeze_bn_stats: bool = False) -> None:
        """Exclude the trunk, except for its last groups of layers, from training; the head trains."""
        if freeze_bn_stats:
            raise NotImplementedError("freeze batch norms with mcl_clip.model.prepare.freeze_batch_norm")
        groups = group_parameters(self.trunk, self.trunk.group_matcher())
        for number in range(max(groups) - unlocked_groups + 1):
            for name in groups.get(number, ()):
                self.trunk.get_parameter(name).requires_grad_(False)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations of the trunk in the backward pass, or keep them."""
        self.trunk.set_grad_checkpointing(enable)


class ImageModel(nn.Module):
    """An image encoder with the interface of open_clip's models, as far as images go.

    Args:
        model_cfg: `embed_dim`, the width of the trunk; `vision_cfg` with `timm_model_name`, `image_size`, `stem`
            (`standard` or `cifar`) and `model_args` of timm; `head_cfg` with `type` (`linear` or `mlp`), `dim` and
            `batch_norm`.
    """

    def __init__(self, model_cfg: Mapping[str, Any]):
        super().__init__()
        self.visual = ImageTower(model_cfg)
        self.logit_scale = nn.Parameter(torch.tensor(-math.log(START_TEMPERATURE)), requires_grad=False)

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        """Encode images to features of the trunk, [images, width], of unit length if `normalize`."""
        features: Tensor = self.visual(image)
        return F.normalize(features, dim=-1) if normalize else features

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Return unit features of the head, as the loss compares them, and the factor on the cosine.

        All views of images [images, views, 3, height, width] are one batch for batch norms; the features are [images,
        views, dim], or [images, dim] for images without views.
        """
        views = image.flatten(0, -4) if image.ndim == 5 else image
        features = F.normalize(self.visual.head(self.visual(views)).float(), dim=-1)
        if image.ndim == 5:
            features = features.view(*image.shape[:2], -1)
        return {"image_features": features, "logit_scale": self.logit_scale.exp()}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations of the trunk in the backward pass, or keep them."""
        self.visual.set_grad_checkpointing(enable)


def set_temperature(model: Any, temperature: float) -> None:
    """Set the temperature of the loss, which is fixed."""
    model.logit_scale.data.fill_(-math.log(temperature))


def trunk_width(vision_cfg: Mapping[str, Any]) -> int:
    """Return the width of the pooled features of a trunk."""
    size = vision_cfg["image_size"]
    height, width = (size, size) if isinstance(size, int) else size
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        trunk = _create_trunk(vision_cfg).eval()
        return int(trunk(torch.zeros(1, 3, height, width)).shape[-1])


def _create_trunk(vision_cfg: Mapping[str, Any]) -> Any:
    """Create a trunk of timm with random weights; raise ValueError for arguments or a stem that it does not take."""
    name, arguments = vision_cfg["timm_model_name"], dict(vision_cfg.get("model_args") or {})
    if refused := sorted(set(arguments) & set(NOT_ARGUMENTS)):
        raise ValueError(f"the arguments of {name} set {', '.join(refused)}, which they may not")
    if not timm.is_model(name):
        raise ValueError(f"{name!r} is not an architecture of timm")
    size = vision_cfg["image_size"]
    known = timm.get_pretrained_cfg(name)
    takes_size = known is None or known.fixed_input_size
    sizes: dict[str, Any] = {"img_size": size if isinstance(size, int) else tuple(size)} if takes_size else {}
    arguments = {key: tuple(value) if isinstance(value, list) else value for key, value in arguments.items()}
    trunk: Any = timm.create_model(name, num_classes=0, **{**sizes, **arguments})
    if vision_cfg.get("stem") == "cifar":  # SimCLR, appendix B.9
        if not isinstance(getattr(trunk, "conv1", None), nn.Conv2d) or not hasattr(trunk, "maxpool"):
            raise ValueError(f"{name} has no stem of one convolution and a max-pooling, as a ResNet has")
        trunk.conv1 = nn.Conv2d(3, trunk.conv1.out_channels, kernel_size=3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(trunk.conv1.weight, mode="fan_out", nonlinearity="relu")
        trunk.maxpool = nn.Identity()
    return trunk


def refuse_texts(*_: object) -> Tensor:
    """Raise ValueError, in place of a tokenizer."""
    raise ValueError("the model has learned from images alone and has no text tower")


def is_image_folder(folder: Path) -> bool:
    """Return whether a folder holds an image model."""
    return (folder / CONFIG_NAME).is_file()


def write_image_folder(
    folder: Path, model: nn.Module, *, model_cfg: Mapping[str, Any], preprocess_cfg: Mapping[str, Any]
) -> None:
    """Write an `ImageModel`: config, trunk and head, and the config of timm unless timm cannot express the stem."""
    folder.mkdir(parents=True, exist_ok=True)
    config_path = folder / CONFIG_NAME
    _write_json(config_path, {"model_cfg": dict(model_cfg), "preprocess_cfg": dict(preprocess_cfg)})
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    trunk = {name.removeprefix("visual.trunk."): t for name, t in state.items() if name.startswith("visual.trunk.")}
    rest = {name: tensor for name, tensor in state.items() if not name.startswith("visual.trunk.")}
    vision = model_cfg["vision_cfg"]
    if vision.get("stem") != "cifar":
        _write_json(folder / TIMM_CONFIG_NAME, _timm_config(model_cfg, preprocess_cfg))
    for name, tensors in ((TRUNK_NAME, trunk), (HEAD_NAME, rest)):
        save_file(tensors, folder / name, metadata={"format": "pt"})
        (folder / name).chmod(config_path.stat().st_mode)  # safetensors writes 0600 whatever the umask


def _timm_config(model_cfg: Mapping[str, Any], preprocess_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config.json by which timm and transformers load the trunk."""
    vision, size = model_cfg["vision_cfg"], preprocess_cfg["size"]
    height, width = (size, size) if isinstance(size, int) else size
    known = timm.get_pretrained_cfg(vision["timm_model_name"])
    return {
        "architecture": vision["timm_model_name"],
        "num_classes": 0,
        "num_features": model_cfg["embed_dim"],
        "model_args": dict(vision.get("model_args") or {}),
        "pretrained_cfg": {
            "input_size": [3, height, width],
            "fixed_input_size": bool(known and known.fixed_input_size),
            "interpolation": preprocess_cfg.get("interpolation") or "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "squash" if preprocess_cfg.get("resize_mode") == "squash" else "center",
            "mean": list(preprocess_cfg["mean"]),
            "std": list(preprocess_cfg["std"]),
            "num_classes": 0,
            **({"first_conv": known.first_conv, "classifier": known.classifier} if known else {}),
        },
    }


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_image_folder(folder: Path) -> tuple[ImageModel, dict[str, Any], dict[str, Any]]:
    """Load the float32 image model of a folder with its `model_cfg` and `preprocess_cfg`.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if the config is damaged, or describes a larger model than the weights are.
        RuntimeError: if the weights do not fit.
    """
    try:
        config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
        model_cfg, preprocess_cfg = config["model_cfg"], config["preprocess_cfg"]
        vision, head = model_cfg["vision_cfg"], model_cfg["head_cfg"]
        sizes = [
            model_cfg["embed_dim"],
            head["dim"],
            *_numbers(vision["image_size"]),
            *_numbers(preprocess_cfg["size"]),
        ]
        if not all(type(number) is int and 0 < number <= MAX_DIMENSIONS for number in sizes):
            raise ValueError(f"sizes are {sizes}")
        if not isinstance(vision["timm_model_name"], str) or head["type"] not in ("linear", "mlp"):
            raise ValueError("no trunk or head")
    except FileNotFoundError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{CONFIG_NAME} is not the config of an image model ({error})") from error
    files = [folder / TRUNK_NAME, folder / HEAD_NAME]
    with torch.device("meta"), torch.random.fork_rng(devices=[]):  # counts the parameters without allocating them
        parameters = sum(parameter.numel() for parameter in ImageModel(model_cfg).parameters())
    if parameters > (size := sum(path.stat().st_size for path in files)):  # a weight has at least one byte
        raise ValueError(f"its config describes {parameters} parameters, but its weights have {size} bytes")
    with torch.random.fork_rng(devices=[]):
        model = ImageModel(model_cfg)
    trunk, rest = map(load_file, files)
    model.load_state_dict({**{f"visual.trunk.{name}": tensor for name, tensor in trunk.items()}, **rest})
    return model, model_cfg, preprocess_cfg


def _numbers(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]
