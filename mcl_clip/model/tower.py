"""The model of a recipe: one model of open_clip or transformers, a pair of towers, or an image tower alone."""

import json
from collections.abc import Mapping
from typing import Any

import open_clip
import timm
import torch

from mcl_clip.config import TowerConfig
from mcl_clip.core.distributed import seed_of
from mcl_clip.core.errors import UserError
from mcl_clip.model.clip import ClipBundle, check_preprocess, create_clip, refuse_texts
from mcl_clip.model.image_model import ImageModel, trunk_width
from mcl_clip.model.open_clip_io import one_line
from mcl_clip.model.pair import load_trunk, pair_model_cfg, split_image
from mcl_clip.model.positions import set_context_length, set_image_size

DEFAULT_IMAGE_SIZE = 224


def create_tower(tower: TowerConfig, *, seed: int = 0, text_weights: bool = True) -> ClipBundle:
    """Create the float32 model of a recipe on the CPU; see `create_clip` for `seed` and `text_weights`.

    Raises:
        UserError: if a name is unknown, or weights are missing or do not fit.
    """
    if tower.images_only:
        return _create_alone(tower, seed=seed)
    size = tower.image_size[0] if len(tower.image_size) == 1 else list(tower.image_size)
    options: dict[str, Any] = {"seed": seed, "text_weights": text_weights}
    clip = _create(tower, tower.preprocess, **options)
    # Towers of timm take another size only when they are built.
    if size and not set_image_size(clip, size):
        clip = _create(tower, {**tower.preprocess, "size": size}, **options)
    if tower.context_length:
        set_context_length(clip, tower.context_length)
    return clip


def image_model_cfg(tower: TowerConfig) -> dict[str, Any]:
    """Return the config of an image tower alone, see `ImageModel`.

    Raises:
        UserError: if timm has no such architecture, or cannot build it with these settings.
    """
    name, _ = split_image(tower.image)
    pixels, sides = timm.get_pretrained_cfg(name), list(tower.image_size)
    own = tower.preprocess.get("size") or (pixels.input_size[-1] if pixels else DEFAULT_IMAGE_SIZE)
    vision = {
        "timm_model_name": name,
        "image_size": (sides[0] if len(sides) == 1 else sides) or own,
        "stem": tower.stem,
        "model_args": json.loads(json.dumps(tower.image_args)),
    }
    head = {"type": tower.heads, "dim": tower.dim, "batch_norm": tower.head_batch_norm}
    try:
        return {"embed_dim": trunk_width(vision), "vision_cfg": vision, "head_cfg": head}
    except Exception as error:  # wrong arguments raise errors of many types
        raise UserError(
            f"timm cannot make the image tower {name} for images of {vision['image_size']} pixels: {one_line(error)}; "
            f"change --tower.image, --tower.image-size, --tower.stem or the arguments of timm in the recipe"
        ) from error


def _create_image_model(model_cfg: Mapping[str, Any], *, preprocess: Mapping[str, Any], seed: int = 0) -> ClipBundle:
    """Create a float32 image model without a text tower on the CPU, with random weights drawn by `seed`.

    `model_cfg` is that of `ImageModel`; `preprocess` overrides the image transform that timm states for the trunk.
    """
    check_preprocess(dict(preprocess))
    vision = model_cfg["vision_cfg"]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed_of("tower", seed))
        model = ImageModel(model_cfg)
    pixels = timm.get_pretrained_cfg(vision["timm_model_name"])
    own = {each: getattr(pixels, each) for each in ("mean", "std", "interpolation")} if pixels else {}
    merged = open_clip.transform.merge_preprocess_dict({}, {**own, **preprocess, "size": vision["image_size"]})
    preprocess_cfg = json.loads(json.dumps({**merged, "mode": "RGB"}))
    return ClipBundle(model=model, model_cfg=dict(model_cfg), preprocess_cfg=preprocess_cfg, tokenizer=refuse_texts)


def _create_alone(tower: TowerConfig, *, seed: int) -> ClipBundle:
    """Create an image tower without a text tower."""
    clip = _create_image_model(image_model_cfg(tower), preprocess=tower.preprocess, seed=seed)
    load_trunk(clip.model.visual, *split_image(tower.image))
    return clip


def _create(tower: TowerConfig, preprocess: Any, *, seed: int, text_weights: bool) -> ClipBundle:
    if tower.image:
        cfg, pixels = pair_model_cfg(tower.image, tower.text, embed_dim=tower.dim, heads=tower.heads)
        clip = create_clip(model_cfg=cfg, preprocess={**pixels, **preprocess}, seed=seed)
        load_trunk(clip.model.visual, *split_image(tower.image))
        return clip
    architecture, model_cfg = tower.architecture, dict(tower.model)
    if tower.context_length and not tower.is_pretrained:  # random positions are drawn, not stretched
        name = architecture.replace("/", "-")
        model_cfg = model_cfg or open_clip.get_model_config(name) or {}
        if model_cfg.get("text_cfg"):
            model_cfg["text_cfg"] = {**model_cfg["text_cfg"], "context_length": tower.context_length}
            architecture = ""
    return create_clip(
        architecture=architecture,
        model_cfg=model_cfg or None,
        pretrained=tower.pretrained,
        preprocess=preprocess,
        seed=seed,
        text_weights=text_weights,
    )
