"""The model of a recipe: one model of open_clip or transformers, or a pair of towers."""

from mcl_clip.config import TowerConfig
from mcl_clip.model.clip import ClipBundle, create_clip
from mcl_clip.model.pair import load_trunk, pair_model_cfg, split_image


def create_tower(tower: TowerConfig, *, seed: int = 0, text_weights: bool = True) -> ClipBundle:
    """Create the float32 model of a recipe on the CPU; see `create_clip` for `seed` and `text_weights`.

    Raises:
        UserError: if a name is unknown, or weights are missing or do not fit.
    """
    if not tower.image:
        return create_clip(
            architecture=tower.architecture,
            model_cfg=tower.model or None,
            pretrained=tower.pretrained,
            preprocess=tower.preprocess,
            seed=seed,
            text_weights=text_weights,
        )
    cfg, pixels = pair_model_cfg(tower.image, tower.text, embed_dim=tower.dim, heads=tower.heads)
    clip = create_clip(model_cfg=cfg, preprocess={**pixels, **tower.preprocess}, seed=seed)
    load_trunk(clip.model.visual, *split_image(tower.image))
    return clip
