"""Towers that do less for the same features, and the options that trade one thing for another.

What does not reach a feature is not computed: `do_less` gives some modules of open_clip's towers subclasses of their
own classes. Names and weights stay, so that they load and save as before. Features differ by rounding alone.
"""

from typing import Any

import open_clip
import torch
from jaxtyping import Float, Int
from open_clip.timm_model import TimmModel
from open_clip.transformer import (
    PatchDropout,
    ResidualAttentionBlock,
    TextTransformer,
    VisionTransformer,
    text_global_pool,
)
from torch import Tensor, nn

from mcl_clip.core.errors import UserError

END_POOLS = ("argmax", "eos")
CONVOLUTIONS = 8  # from which on an image tower is convolutional; a transformer has one


class FirstTokenBlock(ResidualAttentionBlock):  # type: ignore[misc]
    """The last block of a vision transformer whose feature is that of its first token: gives this token alone.

    The other tokens are keys and values of its attention; their queries and their share of the MLP, nine tenths of the
    block, reach no feature.
    """

    def forward(self, q_x: Tensor, k_x: Any = None, v_x: Any = None, attn_mask: Any = None) -> Tensor:  # noqa: ARG002
        """From tokens, [batch, tokens, width], to the first one, [batch, 1, width]."""
        normed = self.ln_1(q_x)
        first = q_x[:, :1] + self.ls_1(self.attention(normed[:, :1], normed, normed))
        moved: Tensor = first + self.ls_2(self.mlp(self.ln_2(first)))
        return moved


class ShortTextCLIP(open_clip.CLIP):  # type: ignore[misc]
    """open_clip's CLIP that takes texts without the padding behind the longest one."""

    def encode_text(self, text: Int[Tensor, "texts length"], normalize: bool = False) -> Float[Tensor, "texts dim"]:
        """Text features, of unit length if `normalize`."""
        length, dtype = text.shape[1], self.transformer.get_cast_dtype()
        tokens = self.token_embedding(text).to(dtype) + self.positional_embedding[:length].to(dtype)
        tokens = self.ln_final(self.transformer(tokens, attn_mask=self.attn_mask[:length, :length]))
        pooled = text_global_pool(tokens, text, self.text_pool_type, eos_token_id=self.text_eos_id)
        if isinstance(self.text_projection, nn.Linear):
            pooled = self.text_projection(pooled)
        elif self.text_projection is not None:
            pooled = pooled @ self.text_projection
        return nn.functional.normalize(pooled, dim=-1) if normalize else pooled


class ShortTextTransformer(TextTransformer):  # type: ignore[misc]
    """open_clip's text tower that takes texts without the padding behind the longest one."""

    def _embeds(self, text: Tensor) -> tuple[Tensor, Tensor]:
        tokens, mask = super()._embeds(text)
        return tokens, mask[: text.shape[1], : text.shape[1]]


def use_fast_paths(model: nn.Module) -> None:
    """Let the model skip what reaches no feature, in place; towers that open_clip has from elsewhere are left alone.

    What is meant is `encode_image` and `encode_text`: open_clip's ways to see the tokens of the last block
    (`forward_intermediates`, `output_tokens`) then give the first one alone.
    """
    parts: Any = model
    visual: Any = getattr(parts, "visual", None)
    if type(visual) is VisionTransformer and _gives_first_token(visual):
        visual.transformer.resblocks[-1].__class__ = FirstTokenBlock
    if type(model) is open_clip.CLIP and _ends_decide(parts.attn_mask, parts.text_pool_type):
        model.__class__ = ShortTextCLIP
    if type(model) is open_clip.CustomTextCLIP and type(parts.text) is TextTransformer:
        text: Any = parts.text
        is_plain = text.cls_emb is None and not text.use_pad_mask and not text.output_tokens
        if is_plain and _ends_decide(text.attn_mask, text.pool_type):
            text.__class__ = ShortTextTransformer


def _gives_first_token(visual: Any) -> bool:
    last = visual.transformer.resblocks[-1] if len(visual.transformer.resblocks) else None
    pools_first = visual.pool_type == "tok" and visual.attn_pool is None and not visual.output_tokens
    return bool(pools_first and visual.transformer.batch_first and type(last) is ResidualAttentionBlock)


def _ends_decide(mask: Tensor | None, pool: str) -> bool:
    """Whether nothing behind the end of a text can reach its feature: attention looks back, and the end is pooled."""
    return mask is not None and pool in END_POOLS


def takes_short_texts(model: Any) -> bool:
    """Whether the text towers, of all stages, take texts without padding."""
    models = getattr(model, "stages", None) or [model]
    return all(
        isinstance(m, ShortTextCLIP) or isinstance(getattr(m, "text", None), ShortTextTransformer) for m in models
    )


def prepare_training(model: nn.Module, *, compiled: bool, patch_dropout: float, grad_checkpointing: bool) -> None:
    """Set up the towers for a stage, in place.

    Args:
        model: open_clip towers.
        compiled: run each tower through `torch.compile`.
        patch_dropout: share of the patches of a picture that is left out in training (FLIP, arXiv 2212.00794).
        grad_checkpointing: keep the input of each block alone for the backward pass, and run the block again there.

    Raises:
        UserError: if the image tower has no patches to leave out, or cannot be checkpointed.
    """
    visual: Any = model.visual
    if sum(isinstance(module, nn.Conv2d) for module in visual.modules()) >= CONVOLUTIONS:
        visual.to(memory_format=torch.channels_last)
    if patch_dropout:
        if not isinstance(visual, VisionTransformer):
            raise UserError(
                f"--stages.K.train.patch-dropout {patch_dropout} needs a vision transformer of open_clip, and this "
                f"image tower is a {type(visual).__name__}; use 0"
            )
        visual.patch_dropout = PatchDropout(patch_dropout)
    if grad_checkpointing:
        if not isinstance(visual, VisionTransformer | TimmModel):  # others take the call and do nothing
            raise UserError(
                f"--stages.K.train.grad-checkpointing cannot be used with an image tower of the type "
                f"{type(visual).__name__}; leave it out"
            )
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    if compiled:
        text: Any = model.text if hasattr(model, "text") else model.transformer
        visual.compile()
        text.compile()
