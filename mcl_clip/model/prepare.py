"""Prepare encoders for training: lock parameters, synchronize BatchNorm, apply options of speed, and check the result.

A stage relies on three things, which are checked on two images and texts before it trains:

1. The encoders take the images and tokens of the run.
2. Locking, synchronized BatchNorm and the fast paths leave the features in evaluation mode as they are.
3. Every parameter that is to train gets a gradient. Others would never train, and DistributedDataParallel would fail.
"""

import os
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from open_clip.hf_model import HFTextEncoder
from open_clip.timm_model import TimmModel
from open_clip.transformer import PatchDropout, VisionTransformer, lock_text_tower
from timm.layers import convert_sync_batchnorm, freeze_batch_norm_2d  # type: ignore[attr-defined]
from torch import Tensor, nn

from mcl_clip.core.errors import UserError
from mcl_clip.model.clip import TEXTS, ClipBundle, check_image_size, encode_texts, evaluating
from mcl_clip.model.fast_paths import slow_paths
from mcl_clip.model.grad_cache import FEATURES, TEMPERATURES
from mcl_clip.model.image_model import ImageModel, ImageTower
from mcl_clip.model.multistage import NOT_TEXT, normalized

RESNET_GROUPS = (
    ("conv1", "bn1", "conv2", "bn2", "conv3", "bn3"),
    *((f"layer{n}",) for n in (1, 2, 3, 4)),
    ("attnpool",),
)
MIN_CONVOLUTIONS = 8  # of a convolutional image tower; a vision transformer has one
MIN_COSINE = 0.99  # rounding in float32, or of TF32 convolutions, stays above it; a lost activation is below 0.6


def lock(
    model: nn.Module,
    *,
    text: bool = False,
    text_unlocked_groups: int | None = None,
    image_unlocked_groups: int | None = None,
    patterns: Sequence[str] = (),
) -> None:
    """Exclude parameters from training. The temperature still trains unless a pattern matches it.

    Args:
        model: an open_clip model. Batch norms in locked groups of its image tower are replaced by frozen ones.
        text: lock the whole text tower.
        text_unlocked_groups: lock the text tower except its last groups. A text transformer of open_clip with L blocks
            has L + 2 groups, as a ViT has. One of Hugging Face has L + 1, embeddings and layers, which run without
            dropout while they are locked; its projection always trains, as that of a timm image tower does.
        image_unlocked_groups: lock the image tower except its last groups (LiT, arXiv 2111.07991). A ViT with L
            blocks has L + 2 groups: embeddings, L blocks (the last one with the norm after it), projection. A ResNet
            has 6: stem, four layers, pooling. None locks nothing.
        patterns: regular expressions; parameters with a match in their name are locked.

    Raises:
        UserError: if a number or pattern does not fit the model, or no encoder parameter is left to train.
    """
    named = dict(model.named_parameters())
    locked = [name for name in named if text and not name.startswith(NOT_TEXT)]
    if text_unlocked_groups is not None:
        _lock_text_tower(model, text_unlocked_groups)
    if image_unlocked_groups is not None:
        _lock_image_tower(model, image_unlocked_groups)
    for pattern in patterns:
        try:
            expression = re.compile(pattern)
        except re.error as error:
            message = f"the pattern {pattern!r} of parameters to lock is not a regular expression: {error}"
            raise UserError(message) from error
        matching = [name for name in named if expression.search(name)]
        if not matching:
            first, *_, last = named
            raise UserError(f"no parameter matches the pattern {pattern!r}; names look like {first} and {last}")
        locked += matching
    for name in locked:
        named[name].requires_grad_(False)
    if {name for name, parameter in model.named_parameters() if parameter.requires_grad} <= set(TEMPERATURES):
        raise UserError(f"everything is locked ({trainable_summary(model)}); leave a tower or some groups unlocked")


def _lock_text_tower(model: nn.Module, unlocked_groups: int) -> None:
    tower: Any = getattr(model, "text", model)
    if isinstance(tower, HFTextEncoder):
        lists = [module for module in tower.transformer.modules() if isinstance(module, nn.ModuleList)]
        layers: Any = max(lists, key=len)
        limit = len(layers) + 1
    elif blocks := getattr(getattr(tower, "transformer", None), "resblocks", None):
        limit = len(blocks) + 2
    else:
        raise UserError(
            f"--stages.K.train.lock.text-unlocked-groups cannot be used with a {type(tower).__name__}; lock the whole "
            f"text tower with --stages.K.train.lock.text, or parameters with --stages.K.train.lock.patterns"
        )
    if not 0 <= unlocked_groups <= limit:
        raise UserError(
            f"--stages.K.train.lock.text-unlocked-groups {unlocked_groups} is not between 0 and {limit}; leave it out "
            f"to train the whole text tower"
        )
    if not isinstance(tower, HFTextEncoder):
        lock_text_tower(model, unlocked_groups)
    elif unlocked_groups < limit:
        first_unlocked = len(layers) - unlocked_groups
        tower.transformer.requires_grad_(False)
        layers[first_unlocked:].requires_grad_(True)
        unlocked = {part for layer in layers[first_unlocked:] for part in layer.modules()}
        for module in tower.transformer.modules():
            if unlocked.isdisjoint(module.modules()):
                keep_in_eval_mode(module)


def keep_in_eval_mode(module: nn.Module) -> None:
    """Put a module into evaluation mode for good, so that dropout and the like do not act in it."""
    module.train(mode=False)
    module.train = lambda mode=True: module  # type: ignore[method-assign]  # noqa: ARG005


def _lock_image_tower(model: nn.Module, unlocked_groups: int) -> None:
    visual: Any = model.visual
    is_resnet = hasattr(visual, "attnpool") and hasattr(visual, "layer4")
    blocks = getattr(getattr(visual, "transformer", None), "resblocks", None)
    limit = len(RESNET_GROUPS) if is_resnet else None if blocks is None else len(blocks) + 2
    if unlocked_groups < 0 or (limit is not None and unlocked_groups > limit):
        raise UserError(
            f"--stages.K.train.lock.image-unlocked-groups {unlocked_groups} is not between 0 and "
            f"{limit or 'the number of groups'}; leave it out to train the whole image tower"
        )
    if is_resnet:  # open_clip can lock a ResNet only as a whole
        for name in (name for group in RESNET_GROUPS[: len(RESNET_GROUPS) - unlocked_groups] for name in group):
            visual.get_submodule(name).requires_grad_(False)
    else:
        visual.lock(unlocked_groups=unlocked_groups, freeze_bn_stats=False)
    freeze_batch_norm(visual)


def freeze_batch_norm(visual: nn.Module) -> None:
    """Replace batch norms of an image tower that do not train, with the statistics that they have, in place."""
    # timm's function, for that of open_clip drops the activation that a BatchNormAct2d holds.
    for name, layer in list(visual.named_modules()):
        parent_name, _, attribute = name.rpartition(".")
        parent = visual.get_submodule(parent_name)
        owners = list(layer.parameters()) or list(parent.parameters())  # a layer without weights goes with its parent
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and not any(owner.requires_grad for owner in owners):
            with owners[0].device:  # the doctor locks models on the meta device
                setattr(parent, attribute, freeze_batch_norm_2d(layer))  # type: ignore[no-untyped-call]


def synchronize_batch_norm(model: nn.Module) -> nn.Module:
    """Make BatchNorm layers, with the activations that timm fuses into them, use statistics of all processes."""
    synchronized: nn.Module = convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    return synchronized


def trainable_summary(model: nn.Module) -> str:
    """Summarize in one line how many parameters train, in total and per encoder."""

    def shown(number: int) -> str:
        return str(number) if number < 1000 else f"{number / 1e3:.1f}K" if number < 1e6 else f"{number / 1e6:.1f}M"

    trained: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        part = name if name in TEMPERATURES else "visual" if name.startswith("visual.") else "text"
        trained[part] += parameter.numel() * parameter.requires_grad
        sizes[part] += parameter.numel()
    parts = [f"{part} {shown(trained[part])} of {shown(sizes[part])}" for part in ("visual", "text") if sizes[part]]
    parts += [name for name in TEMPERATURES if trained[name]]
    share = trained.total() / sizes.total()
    totals = f"trains {shown(trained.total())} of {shown(sizes.total())} parameters ({100 * share:.1f} %)"
    return f"{totals}: {', '.join(parts)}"


def prepare_training(model: nn.Module, *, compiled: bool, patch_dropout: float, grad_checkpointing: bool) -> None:
    """Apply the speed and memory options of a training stage in place.

    `compiled` runs each tower through `torch.compile`; `patch_dropout` is the fraction of image patches dropped (FLIP,
    arXiv 2212.00794); `grad_checkpointing` keeps only the input of each block, and recomputes it in the backward pass.

    Raises:
        UserError: if the image tower does not support patch dropout or gradient checkpointing.
    """
    visual: Any = model.visual
    if sum(isinstance(module, nn.Conv2d) for module in visual.modules()) >= MIN_CONVOLUTIONS:
        visual.to(memory_format=torch.channels_last)
    if patch_dropout:
        if not isinstance(visual, VisionTransformer):
            raise UserError(
                f"--stages.K.train.patch-dropout {patch_dropout} needs a vision transformer of open_clip, and this "
                f"image tower is a {type(visual).__name__}; use 0"
            )
        visual.patch_dropout = PatchDropout(patch_dropout)
    if grad_checkpointing:
        if not isinstance(visual, VisionTransformer | TimmModel | ImageTower):  # other classes silently ignore the call
            raise UserError(
                f"--stages.K.train.grad-checkpointing cannot be used with an image tower of the type "
                f"{type(visual).__name__}; leave it out"
            )
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    if compiled:
        visual.compile()
        if not isinstance(model, ImageModel):
            text: Any = model.text if hasattr(model, "text") else model.transformer
            text.compile()


def reference_features(clip: ClipBundle) -> list[Tensor]:
    """Encode two images and texts before a stage prepares its model: what `check_contract` compares with.

    Raises:
        UserError: if the encoders do not take images of the run's size.
    """
    model: Any = clip.model
    check_image_size(model, clip.model_cfg, clip.preprocess_cfg["size"])
    images, tokens = _sample(clip)
    with evaluating(model), torch.no_grad(), slow_paths(model):
        texts = [] if tokens is None else [normalized(model.encode_text(tokens))]
        return [normalized(model.encode_image(images)), *texts]


def check_contract(clip: ClipBundle, expected: Sequence[Tensor], *, name: str, stage: int) -> None:
    """Check a model that is prepared for training against its earlier features, see the top of this module.

    Raises:
        UserError: naming the tower, and the parameters without a gradient.
    """
    model: Any = clip.model
    images, tokens = _sample(clip)
    with evaluating(model):
        with torch.no_grad():
            found = [model.encode_image(images)]
            found += [] if tokens is None else [encode_texts(model, tokens.cpu(), tokens.device)]
        for side, before, after in zip(("image", "text"), expected, found, strict=False):
            cosine = float((before * normalized(after)).sum(1).min())
            if cosine < MIN_COSINE:
                raise UserError(
                    f"{name} cannot be trained by this toolkit: preparing stage {stage} changes what its {side} tower "
                    f"computes (cosine {cosine:.3f} to the features before); use another tower, and report this one"
                )
        check_gradients(model, images, tokens, name=name, stage=stage)
    for layers in model.modules():
        if getattr(layers, "layerdrop", 0) and any(parameter.requires_grad for parameter in layers.parameters()):
            raise UserError(
                f"{name} leaves out layers at random in training (layerdrop {layers.layerdrop}), so that their "
                f"parameters get no gradient in some steps; set layerdrop to 0 in the config.json of the tower"
            )


def check_gradients(model: nn.Module, images: Tensor, tokens: Tensor | None, *, name: str, stage: int) -> None:
    """Raise UserError if a parameter that is to train gets no gradient from the features and the temperature."""
    named = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
    results = model(images) if tokens is None else model(images, tokens)
    values = [results.get(key) for key in (*FEATURES, *TEMPERATURES)]
    outputs = [value for value in values if value is not None and value.requires_grad]
    ones = [torch.ones_like(output) for output in outputs]
    gradients = torch.autograd.grad(outputs, list(named.values()), ones, allow_unused=True)
    unused = [key for key, gradient in zip(named, gradients, strict=True) if gradient is None]
    if unused:
        shown = ", ".join(unused[:2]) + ", ..." * (len(unused) > 2)
        prefix = os.path.commonpath([key.replace(".", "/") for key in unused]).replace("/", ".") or unused[0]
        raise UserError(
            f"{name} cannot be trained as it is: {len(unused)} of the parameters that stage {stage} trains get no "
            f"gradient from image and text features ({shown}); lock them with --stages.{stage}.train.lock.patterns "
            f"'^{re.escape(prefix)}', or use another tower"
        )


def _sample(clip: ClipBundle) -> tuple[Tensor, Tensor | None]:
    """Return two images of noise and tokens of two texts, if it takes any, on the device of the model."""
    size, device = clip.preprocess_cfg["size"], next(clip.model.parameters()).device
    height, width = (size, size) if isinstance(size, int) else size
    images = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    return images.to(device), clip.tokenizer(list(TEXTS)).to(device) if clip.has_texts else None
