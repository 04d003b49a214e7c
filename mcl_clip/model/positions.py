"""Interpolate the learned positions of pretrained towers, for longer texts and for images of another size."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from open_clip.hf_model import HFTextEncoder
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from mcl_clip.core.errors import UserError
from mcl_clip.model.clip import ClipBundle, check_image_size, with_image_size
from mcl_clip.model.pair import most_tokens

KEPT_POSITIONS = 20  # Long-CLIP: those that short captions have trained well
RESNET_STRIDE = 32  # pixels of an image per position of the pooling of open_clip's ResNets


def stretch_positions(
    positions: Float[Tensor, "length width"], length: int, *, kept: int = KEPT_POSITIONS
) -> Float[Tensor, "new_length width"]:
    """Stretch learned positions as Long-CLIP does (arXiv 2403.15378): keep the first, interpolate the rest.

    Position p of the new ones, from `kept` on, lies at kept + (p - kept) (old - kept) / (new - kept) of the old ones:
    linear between two of them, and continued as it ends after the last. Fewer positions are the first ones.
    """
    old = len(positions)
    if length <= old:
        return positions[:length].clone()
    kept = min(kept, old - 2)  # two are needed for a line
    places = kept + torch.arange(length - kept, dtype=torch.float64) * (old - kept) / (length - kept)
    low = places.long().clamp(max=old - 2)
    share = (places - low)[:, None]
    values = positions.double()
    stretched = (1 - share) * values[low] + share * values[low + 1]
    return torch.cat([positions[:kept], stretched.to(positions.dtype)])


def set_context_length(clip: ClipBundle, length: int) -> None:
    """Make the text tower and the tokenizer take `length` tokens, in place, with `stretch_positions`.

    Raises:
        UserError: if the text tower has no learned positions that can be stretched.
    """
    text: Any = getattr(clip.model, "text", clip.model)
    if isinstance(text, HFTextEncoder):
        limit = most_tokens(text.config)
        if length > limit:
            raise UserError(
                f"--tower.context-length {length} is more than the {limit} tokens that the text tower takes; use "
                f"at most {limit}"
            )
    elif getattr(text, "cls_emb", None) is not None or not hasattr(text, "positional_embedding"):
        raise UserError(
            f"--tower.context-length {length} cannot be used with a {type(clip.model).__name__}, whose positions "
            f"cannot be stretched; leave it out"
        )
    else:
        text.positional_embedding = nn.Parameter(stretch_positions(text.positional_embedding.detach(), length))
        text.context_length = length
        if text.attn_mask is not None:  # causal
            text.register_buffer("attn_mask", torch.full((length, length), -torch.inf).triu_(1), persistent=False)
    clip.model_cfg = {**clip.model_cfg, "text_cfg": {**clip.model_cfg["text_cfg"], "context_length": length}}
    clip.tokenizer.context_length = length  # type: ignore[attr-defined]


def set_image_size(clip: ClipBundle, size: int | Sequence[int]) -> bool:
    """Make the image tower take images of `size` pixels, a side or (height, width), in place.

    Returns False, and changes nothing, for towers other than open_clip's vision transformers and ResNets.

    Raises:
        UserError: if the tower cannot take images of this size.
    """
    visual: Any = clip.model.visual
    height, width = (size, size) if isinstance(size, int) else size
    if isinstance(visual, VisionTransformer):
        grid = height // visual.patch_size[0], width // visual.patch_size[1]
        owner, old_grid = visual, visual.grid_size
        visual.grid_size, visual.image_size = grid, (height, width)
    elif isinstance(visual, ModifiedResNet):
        if height != width:
            raise UserError(f"--tower.image-size {height} {width}: the ResNets of open_clip take square images only")
        grid = (height // RESNET_STRIDE,) * 2
        owner, old_grid = visual.attnpool, (visual.image_size // RESNET_STRIDE,) * 2
        visual.image_size = height
    else:
        return False
    positions = resize_grid(owner.positional_embedding.detach(), old_grid, grid)
    owner.positional_embedding = nn.Parameter(positions, requires_grad=owner.positional_embedding.requires_grad)
    clip.model_cfg = with_image_size(clip.model_cfg, height if height == width else [height, width])
    clip.preprocess_cfg = {**clip.preprocess_cfg, "size": clip.model_cfg["vision_cfg"]["image_size"]}
    visual.preprocess_cfg = {**visual.preprocess_cfg, "size": clip.preprocess_cfg["size"]}
    check_image_size(clip.model, clip.model_cfg, size)
    return True


def resize_grid(
    positions: Float[Tensor, "tokens width"], old: Sequence[int], new: Sequence[int]
) -> Float[Tensor, "new_tokens width"]:
    """Resize positions of a class token and a grid of (height, width) as open_clip does, bicubic and antialiased.

    Unlike open_clip's, the old grid need not be square.
    """
    token, grid = positions[:1], positions[1:]
    planes = grid.reshape(1, *old, -1).permute(0, 3, 1, 2)
    resized = nn.functional.interpolate(planes, size=tuple(new), mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([token, resized.permute(0, 2, 3, 1).reshape(new[0] * new[1], -1)])
