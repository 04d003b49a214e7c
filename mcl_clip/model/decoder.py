"""Latent target decoding (Bleeker et al., arXiv 2204.13382): a head that tells a sentence feature from a text feature.

While a model trains, its outputs have the decoded features beside the text features. What must be decoded cannot be
suppressed in the text feature, nor, as both are contrasted, be of no use for the image feature.
"""

from collections.abc import Callable
from typing import Any

import torch
from open_clip.hf_model import HFTextEncoder
from torch import Tensor, nn

from mcl_clip.model.clip import ClipBundle
from mcl_clip.model.frozen import pooled_texts
from mcl_clip.model.grad_cache import DECODED

HEAD = "target_decoder"  # name of the head in the model


def sentence_encoder(model: Any) -> Callable[[Tensor], Tensor]:
    """Return what maps tokens to sentence features: of a Hugging Face text tower, its pooled output below the head."""
    tower = getattr(model, "text", None)
    if isinstance(tower, HFTextEncoder):
        return pooled_texts(tower)
    encode: Callable[[Tensor], Tensor] = model.encode_text
    return encode


def add_decoder(clip: ClipBundle, *, hidden_dim: int, seed: int) -> None:
    """Put a decoder of two hidden layers into a model, in place, drawn by `seed`; its forward pass then decodes."""
    model: Any = clip.model
    device = next(model.parameters()).device
    with torch.no_grad():
        target_dim = sentence_encoder(model)(clip.tokenizer(["a"]).to(device)).shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        layers = [nn.Linear(clip.model_cfg["embed_dim"], hidden_dim), nn.ReLU()]
        layers += [nn.Linear(hidden_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, target_dim)]
    model.add_module(HEAD, nn.Sequential(*layers).to(device))
    hook = model.register_forward_hook(
        lambda module, _, out: {**out, DECODED: module.get_submodule(HEAD)(out["text_features"])}
    )
    model.get_submodule(HEAD).hook = hook


def remove_decoder(model: nn.Module) -> None:
    """Take the decoder out of a model, if it has one, so that it is a plain one again."""
    head: Any = model._modules.pop(HEAD, None)
    if head is not None:
        head.hook.remove()
