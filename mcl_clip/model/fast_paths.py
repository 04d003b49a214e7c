"""Mathematically equivalent fast paths for open_clip encoders.

`use_fast_paths` skips computation that cannot reach a feature: it changes the class of some open_clip modules to a
subclass. Parameter names and weights stay the same, so models load and save as before. Features differ by rounding.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import open_clip
import torch
from jaxtyping import Float, Int
from open_clip.hf_model import HFTextEncoder
from open_clip.transformer import (
    ResidualAttentionBlock,
    TextTransformer,
    VisionTransformer,
    text_global_pool,
)
from torch import Tensor, nn

END_POOLS = ("argmax", "eos")
TEXT_BATCH_SIZE = {"cpu": 32}  # other devices encode all texts at once


class FirstTokenBlock(ResidualAttentionBlock):  # type: ignore[misc]
    """Last block of a vision transformer that pools the first token: computes the output of this token only.

    The other tokens serve as keys and values only: their queries and MLP outputs, about nine tenths of the block,
    reach no feature.
    """

    def forward(self, q_x: Tensor, k_x: Any = None, v_x: Any = None, attn_mask: Any = None) -> Tensor:  # noqa: ARG002
        """Map tokens, [batch, tokens, width], to the first one, [batch, 1, width]."""
        normed = self.ln_1(q_x)
        first = q_x[:, :1] + self.ls_1(self.attention(normed[:, :1], normed, normed))
        output: Tensor = first + self.ls_2(self.mlp(self.ln_2(first)))
        return output


class ShortTextCLIP(open_clip.CLIP):  # type: ignore[misc]
    """open_clip's CLIP for texts that are padded to the longest one only, not to the context length."""

    def encode_text(self, text: Int[Tensor, "texts length"], normalize: bool = False) -> Float[Tensor, "texts dim"]:
        """Encode texts to features, of unit length if `normalize`."""
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
    """open_clip's text tower for texts that are padded to the longest one only, not to the context length."""

    def _embeds(self, text: Tensor) -> tuple[Tensor, Tensor]:
        tokens, mask = super()._embeds(text)
        return tokens, mask[: text.shape[1], : text.shape[1]]


def use_fast_paths(model: nn.Module) -> None:
    """Enable the fast paths of `encode_image` and `encode_text` in place, where the architecture allows them.

    Encoders that open_clip takes from other libraries are unchanged. Methods that return the tokens of the last image
    block (`forward_intermediates`, `output_tokens`) then return the first token only.
    """
    parts: Any = model
    visual = parts.visual
    if type(visual) is VisionTransformer:
        pools_first_token = visual.pool_type == "tok" and visual.attn_pool is None and not visual.output_tokens
        for last in visual.transformer.resblocks[-1:]:
            if pools_first_token and visual.transformer.batch_first and type(last) is ResidualAttentionBlock:
                last.__class__ = FirstTokenBlock
    # Padding cannot reach a feature if attention is causal, and the end token is pooled.
    if type(model) is open_clip.CLIP and parts.attn_mask is not None and parts.text_pool_type in END_POOLS:
        model.__class__ = ShortTextCLIP
    if type(model) is open_clip.CustomTextCLIP and type(parts.text) is TextTransformer:
        text: Any = parts.text
        is_plain = text.cls_emb is None and not text.use_pad_mask and not text.output_tokens
        if is_plain and text.attn_mask is not None and text.pool_type in END_POOLS:
            text.__class__ = ShortTextTransformer


def takes_short_texts(model: Any) -> bool:
    """Return whether the text towers of `model`, or of all its stages, take texts without padding."""
    models = getattr(model, "stages", None) or [model]
    return all(
        isinstance(m, ShortTextCLIP) or isinstance(getattr(m, "text", None), ShortTextTransformer) for m in models
    )


def padding_token(model: Any) -> int | None:
    """Return the token at the end of texts that the text towers of `model`, or of all its stages, can do without.

    None where padding reaches a feature. Hugging Face towers mask it in attention and pooling; with dropout, though,
    each length has other draws.
    """
    if takes_short_texts(model):
        return 0
    towers = [getattr(m, "text", None) for m in getattr(model, "stages", None) or [model]]
    tokens = {
        tower.config.pad_token_id if isinstance(tower, HFTextEncoder) and not tower.transformer.training else None
        for tower in towers
    }
    return tokens.pop() if len(tokens) == 1 else None


def in_short_batches(
    encode: Callable[[Tensor], Tensor], model: Any, tokens: Int[Tensor, "texts length"], device: torch.device
) -> Float[Tensor, "texts dim"]:
    """Encode texts with `encode`, a part of `model`, on `device`.

    If the model accepts texts without padding, texts are sorted by length and each batch is cut to its longest text.
    """
    padding = padding_token(model)
    if padding is None or not tokens.ne(padding).any():
        return encode(tokens.to(device))
    lengths = (tokens.ne(padding) * torch.arange(1, tokens.shape[1] + 1)).amax(1).clamp(min=1)
    order = lengths.argsort(stable=True)
    batches = torch.split(order, TEXT_BATCH_SIZE.get(device.type, len(tokens)))
    parts = [encode(tokens[batch, : lengths[batch[-1]]].to(device)) for batch in batches]
    return torch.cat(parts)[order.argsort().to(device)]


@contextmanager
def slow_paths(model: nn.Module) -> Iterator[None]:
    """Disable the fast paths of a model for a while, for comparison."""
    for module in model.modules():
        if isinstance(module, FirstTokenBlock | ShortTextCLIP | ShortTextTransformer):
            module.__class__ = type(module).__mro__[1]
    try:
        yield
    finally:
        use_fast_paths(model)
