"""The model of a recipe: one model of open_clip or transformers, or a pair of towers."""

from typing import Any

import open_clip

from mcl_clip.config import TowerConfig
from mcl_clip.model.clip import ClipBundle, create_clip
from mcl_clip.model.pair import load_trunk, pair_model_cfg, split_image
from mcl_clip.model.positions import set_context_length, set_image_size


def create_tower(tower: TowerConfig, *, seed: int = 0, text_weights: bool = True) -> ClipBundle:
    """Create the float32 model of a recipe on the CPU; see `create_clip` for `seed` and `text_weights`.

    Raises:
        UserError: if a name is unknown, or weights are missing or do not fit.
    """
    size = tower.image_size[0] if len(tower.image_size) == 1 else list(tower.image_size)
    options: dict[str, Any] = {"seed": seed, "text_weights": text_weights}
    clip = _create(tower, tower.preprocess, **options)
    # Towers of timm take another size only when they are built.
    if size and not set_image_size(clip, size):
        clip = _create(tower, {**tower.preprocess, "size": size}, **options)
    if tower.context_length:
        set_context_length(clip, tower.context_length)
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
