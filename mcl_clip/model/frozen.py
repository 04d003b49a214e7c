"""The frozen lower part of an encoder: what it computes of an input does not change in a stage, so once is enough.

A `FrozenPart` splits an encoder at the border between locked and trained parameters. `accept_outputs` lets the encoder
take stored outputs of that part in place of images or tokens, and compute only what is above it.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from open_clip.hf_model import HFTextEncoder
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from timm.models.efficientnet import EfficientNet
from timm.models.resnet import ResNet
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

DROP_RATES = ("p", "drop_prob", "drop_rate", "prob")  # what modules of torch, timm and open_clip call them


@dataclass(frozen=True, kw_only=True)
class FrozenPart:
    """The lower part of an encoder, in which nothing trains and nothing is random.

    Attributes:
        run: maps inputs of the encoder to outputs, [batch, *shape].
        rest: maps outputs to the unnormalized features of the encoder, [batch, dim].
        shape: shape of the output of one input.
        digest: digest of the layers and their weights: equal parts have equal outputs.
    """

    run: Callable[[Tensor], Tensor]
    rest: Callable[[Tensor], Tensor]
    shape: tuple[int, ...]
    digest: str


def find_frozen_part(encoder: nn.Module, example: Tensor) -> FrozenPart | None:
    """Find the frozen part of an image or text tower; None if there is none, or a tower cannot be split.

    Towers of timm and Hugging Face are split between trunk and projection; vision transformers of open_clip, and
    EfficientNets and ResNets of timm, below the lowest block that trains. `example` is a batch of inputs.
    """
    tower: Any = encoder
    prefixes: tuple[str, ...]
    if isinstance(tower, TimmModel):
        prefixes, run, rest = _split_timm(tower)
    elif isinstance(tower, HFTextEncoder):
        prefixes, run, rest = ("transformer.",), pooled_texts(tower), tower.proj
    elif type(tower) is VisionTransformer and not tower.output_tokens and tower.transformer.batch_first:
        blocks = tower.transformer.resblocks
        trained = [any(parameter.requires_grad for parameter in block.parameters()) for block in blocks]
        num_frozen = [*trained, True].index(True)
        embeddings = ("conv1.", "class_embedding", "positional_embedding", "patch_dropout", "ln_pre.")
        prefixes = (*embeddings, *(f"transformer.resblocks.{number}." for number in range(num_frozen)))
        run, rest = _split_transformer(tower, num_frozen)
    else:
        return None
    if any(p.requires_grad for name, p in tower.named_parameters() if name.startswith(prefixes)):
        return None
    parts = [part for name, part in tower.named_modules() if f"{name}.".startswith(prefixes)]
    tower.train()
    is_random = any(_is_random(part) for part in parts)
    # Attention of transformers reads its dropout from the config, so the whole trunk must be in evaluation mode.
    is_random |= isinstance(tower, HFTextEncoder) and any(part.training for part in parts)
    tower.eval()
    if is_random:
        return None
    with torch.no_grad():
        shape = tuple(run(example).shape[1:])
    layers = [(type(part).__name__, part.extra_repr()) for part in parts]
    digest = hashlib.blake2b(repr([type(tower).__name__, prefixes, layers]).encode(), digest_size=16)
    for name, tensor in tower.state_dict().items():
        if name.startswith(prefixes):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return FrozenPart(run=run, rest=rest, shape=shape, digest=digest.hexdigest())


def accept_outputs(encoder: nn.Module, part: FrozenPart) -> None:
    """Let an encoder take outputs of its frozen part in place of inputs, told apart by their type and shape."""
    if getattr(encoder, "stored_shape", None) == part.shape:
        return
    encoder.stored_shape = part.shape  # type: ignore[assignment]
    from_inputs = encoder.forward

    def forward(inputs: Tensor) -> Tensor:
        is_output = inputs.is_floating_point() and tuple(inputs.shape[1:]) == part.shape
        features: Tensor = part.rest(inputs) if is_output else from_inputs(inputs)
        return features

    encoder.forward = forward


def pooled_texts(tower: Any) -> Callable[[Tensor], Tensor]:
    """Return the part of a Hugging Face text tower below its projection, from tokens to the pooled output."""

    def run(tokens: Tensor) -> Tensor:
        mask = (tokens != tower.config.pad_token_id).long()
        pooled: Tensor = tower.pooler(tower.transformer(input_ids=tokens, attention_mask=mask), mask)
        return pooled

    return run


def _split_timm(tower: Any) -> tuple[tuple[str, ...], Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Return the prefixes of the lower part, that part, and the rest: the head and, of some trunks, upper blocks."""
    trunk = tower.trunk
    layers: list[Any] = []  # that map images to the map of features, one after the other
    if isinstance(trunk, EfficientNet):
        stages: Any = trunk.blocks
        blocks = [block for stage in stages for block in stage]
        layers = [trunk.conv_stem, trunk.bn1, *blocks, trunk.conv_head, trunk.bn2]
    elif isinstance(trunk, ResNet):
        blocks = [block for n in (1, 2, 3, 4) for block in getattr(trunk, f"layer{n}")]
        layers = [trunk.conv1, trunk.bn1, trunk.act1, trunk.maxpool, *blocks]
    trained = [any(parameter.requires_grad for parameter in layer.parameters()) for layer in layers]
    if not any(trained) or trained[0]:
        return ("trunk.",), trunk, tower.head
    num_frozen = trained.index(True)
    names = {layer: name for name, layer in tower.named_modules()}

    def rest(outputs: Tensor) -> Tensor:
        for layer in layers[num_frozen:]:
            recomputes = trunk.grad_checkpointing and torch.is_grad_enabled()
            outputs = checkpoint(layer, outputs, use_reentrant=False) if recomputes else layer(outputs)
        features: Tensor = tower.head(trunk.forward_head(outputs))
        return features

    return tuple(f"{names[layer]}." for layer in layers[:num_frozen]), nn.Sequential(*layers[:num_frozen]), rest


def _split_transformer(visual: Any, num_frozen: int) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Return the embeddings with the first blocks, from images to tokens, and the rest, from tokens to features."""

    def run(images: Tensor) -> Tensor:
        tokens: Tensor = visual._embeds(images)
        for block in visual.transformer.resblocks[:num_frozen]:
            tokens = block(tokens)
        return tokens

    def rest(tokens: Tensor) -> Tensor:
        for block in visual.transformer.resblocks[num_frozen:]:
            recomputes = visual.transformer.grad_checkpointing and torch.is_grad_enabled()
            tokens = checkpoint(block, tokens, use_reentrant=False) if recomputes else block(tokens)
        pooled: Tensor = visual._pool(tokens)[0]
        return pooled if visual.proj is None else pooled @ visual.proj

    return run, rest


def _is_random(module: nn.Module) -> bool:
    """Return whether a module in training mode drops something, or depends on the other inputs of a batch."""
    drops = any(isinstance(rate, int | float) and rate > 0 for name in DROP_RATES if (rate := getattr(module, name, 0)))
    return module.training and (drops or isinstance(module, nn.modules.batchnorm._BatchNorm))
