"""What the stages of a multistage model have in common, and is kept and run once: text tower, lower image blocks.

Sharing is found by comparing weights, never assumed. This file is shipped inside exported models: it needs torch and
open_clip, and the files shipped beside it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .open_clip_folder import is_equal

try:  # see open_clip_folder.py
    import open_clip
    from open_clip.transformer import VisionTransformer
except ModuleNotFoundError as missing:
    raise ImportError("the model needs open_clip: pip install open_clip_torch") from missing

NOT_TEXT = ("visual.", "logit_scale", "logit_bias")
BLOCKS = "transformer.resblocks."
ABOVE_BLOCKS = ("ln_post", "proj", "attn_pool")


def _text_state(stage: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in stage.state_dict().items() if not name.startswith(NOT_TEXT)}


def _text_settings(model_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """What decides, beside the weights, what the text tower computes."""
    text_cfg = {name: value for name, value in model_cfg["text_cfg"].items() if name != "hf_model_pretrained"}
    return {"text_cfg": text_cfg, **{name: bool(model_cfg.get(name)) for name in ("quick_gelu", "custom_text")}}


def have_same_text_tower(stages: Sequence[nn.Module], model_cfgs: Sequence[Mapping[str, Any]]) -> bool:
    """Whether all stages compute the same text features: equal settings and, tensor by tensor, equal weights."""
    settings, first = _text_settings(model_cfgs[0]), _text_state(stages[0])
    for stage, model_cfg in zip(stages[1:], model_cfgs[1:], strict=True):
        other = _text_state(stage)
        if _text_settings(model_cfg) != settings or other.keys() != first.keys():
            return False
        if not all(is_equal(first[name], other[name]) for name in first):
            return False
    return True


def share_text_tower(stages: Sequence[nn.Module]) -> None:
    """Let all stages hold the text modules of the first one, so that they are in memory once."""
    for stage in stages[1:]:
        for name, module in stages[0].named_children():
            if name != "visual":
                setattr(stage, name, module)
        for name, parameter in stages[0].named_parameters(recurse=False):
            if not name.startswith(NOT_TEXT):
                setattr(stage, name, parameter)


def count_shared_blocks(stages: Sequence[nn.Module], model_cfgs: Sequence[Mapping[str, Any]]) -> int:
    """How many blocks, from the lowest on, compute the same in the image towers of all stages.

    None for other towers than open_clip's `VisionTransformer`, or where the embedding of patches differs.
    """
    visuals: list[Any] = [stage.visual for stage in stages]
    known = all(isinstance(stage, (open_clip.CLIP, open_clip.CustomTextCLIP)) for stage in stages)
    if not known or not all(type(visual) is VisionTransformer and not visual.output_tokens for visual in visuals):
        return 0
    if any(_image_settings(cfg) != _image_settings(model_cfgs[0]) for cfg in model_cfgs):
        return 0
    first, *others = [visual.state_dict() for visual in visuals]
    different = {name for name in first for other in others if not is_equal(first[name], other.get(name))}
    if any(not name.startswith((BLOCKS, *ABOVE_BLOCKS)) for name in different):
        return 0
    numbers = [int(name.removeprefix(BLOCKS).partition(".")[0]) for name in different if name.startswith(BLOCKS)]
    return min(numbers, default=len(visuals[0].transformer.resblocks))


def _image_settings(model_cfg: Mapping[str, Any]) -> tuple[Any, bool]:
    return model_cfg["vision_cfg"], bool(model_cfg.get("quick_gelu"))


def share_blocks(stages: Sequence[nn.Module], shared_blocks: int) -> None:
    """Let all image towers hold the lowest blocks of the first one, so that they are in memory once."""
    visuals: list[Any] = [stage.visual for stage in stages]
    for visual in visuals[1:]:
        for number in range(shared_blocks):
            visual.transformer.resblocks[number] = visuals[0].transformer.resblocks[number]


def encode_images_over_trunk(stages: Sequence[nn.Module], image: Tensor, shared_blocks: int) -> list[Tensor]:
    """What `encode_image` of each stage gives, with the shared blocks run once.

    Of L blocks in each of S stages it runs (L + (S - 1) (L - shared_blocks)), in place of S L.
    """
    visuals: list[Any] = [stage.visual for stage in stages]
    trunk = _run_blocks(visuals[0], visuals[0]._embeds(image), slice(shared_blocks))
    features = []
    for visual in visuals:
        pooled, _ = visual._pool(_run_blocks(visual, trunk, slice(shared_blocks, None)))
        features.append(pooled if visual.proj is None else pooled @ visual.proj)
    return features


def _run_blocks(visual: Any, tokens: Tensor, blocks: slice) -> Tensor:
    transformer = visual.transformer
    tokens = tokens if transformer.batch_first else tokens.transpose(0, 1)
    for block in list(transformer.resblocks)[blocks]:
        tokens = block(tokens)
    return tokens if transformer.batch_first else tokens.transpose(0, 1)
