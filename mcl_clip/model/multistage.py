"""The multistage model: several CLIP models whose features are combined, and its file format.

This file is shipped inside exported models: it needs torch, open_clip and safetensors, and the files shipped beside it.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .image_model import is_image_folder, read_image_folder, refuse_texts, write_image_folder
from .image_transform import make_image_transform
from .open_clip_io import (
    DEFAULT_CONTEXT_LENGTH,
    is_equal,
    make_tokenizer,
    read_object,
    read_open_clip_folder,
    write_open_clip_folder,
)

try:  # see open_clip_io.py
    import open_clip
    from open_clip.transformer import VisionTransformer
except ModuleNotFoundError as missing:
    raise ImportError("the model needs open_clip: pip install open_clip_torch") from missing

CONFIG_NAME = "mcl_clip_config.json"
FORMAT_VERSION = 1
COMBINATIONS = ("concat", "mean_cosine")
WEIGHTED = "weighted"  # `mean_cosine` with a weight for each stage
FOLDER_NAME = re.compile(r"[\w-]+").fullmatch
VECTOR = "vector"
VECTOR_NEEDS_SHARED_TEXTS = "combine='vector' needs stages that share a text tower (lock it in later stages)"
NOT_TEXT = ("visual.", "logit_scale", "logit_bias")
BLOCKS = "transformer.resblocks."
ABOVE_BLOCKS = ("ln_post", "proj", "attn_pool")


def read_config(folder: Path) -> dict[str, Any]:
    """Read and validate the config of the multistage model in `folder`.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is damaged, or was written in a newer format.
    """
    config = read_object(folder / CONFIG_NAME)
    if config.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{folder} has format version {config.get('format_version')!r}, this code reads {FORMAT_VERSION}; use the "
            f"code that came with the model"
        )
    names = config.get("stages")
    if not isinstance(names, list) or not names or not all(isinstance(n, str) and FOLDER_NAME(n) for n in names):
        raise ValueError(f"stages is {names!r}; it must be a list of folder names")
    scale, bias = config.get("logit_scale"), config.get("logit_bias")
    are_numbers = isinstance(scale, float) and isinstance(bias, float | None) and math.isfinite(scale + (bias or 0))
    if not are_numbers or config.get("combine") not in (*COMBINATIONS, WEIGHTED):
        raise ValueError(f"combine, logit_scale or logit_bias of {CONFIG_NAME} is missing or has another type")
    if config["combine"] == WEIGHTED:
        _check_weights(config.get("weights"), len(names))
    return config


def _check_weights(weights: Any, stages: int) -> None:
    are_numbers = isinstance(weights, list) and all(isinstance(weight, float) and weight >= 0 for weight in weights)
    if not are_numbers or len(weights) != stages or not math.isclose(sum(weights), 1, abs_tol=1e-6):
        raise ValueError(f"weights is {weights!r}; it must be a number for each of {stages} stages, with the sum 1")


def normalized(features: Tensor) -> Tensor:
    """L2-normalize rows, in float32 if they are in half precision. Zero rows stay zero."""
    if features.dtype in (torch.float16, torch.bfloat16):  # the epsilon of F.normalize is 0 in float16
        features = features.float()
    return F.normalize(features, dim=-1)


def join_features(stage_features: Sequence[Tensor], combine: str, weights: Sequence[float] | None = None) -> Tensor:
    """Concatenate the features of all stages, [..., sum of dims], before the final normalization.

    With `concat`, stages with longer features weigh more: their norms are part of the model. With `mean_cosine`, each
    stage is normalized first, so that the cosine of the result is the mean of the cosines of the stages; with
    `weighted` it is their mean with `weights`, whose sum is 1: the features of stage k get the length sqrt(w_k).

    Raises:
        ValueError: if `combine` is unknown, or needs `weights`.
    """
    if combine == WEIGHTED:
        if weights is None:
            raise ValueError("combine='weighted' needs a model that was saved with weights of its stages")
        pairs = zip(stage_features, weights, strict=True)
        return torch.cat([math.sqrt(weight) * normalized(features) for features, weight in pairs], dim=-1)
    if combine not in COMBINATIONS:
        raise ValueError(f"combine={combine!r} is not one of {', '.join(COMBINATIONS)}")
    if combine == "mean_cosine":
        stage_features = [normalized(features) for features in stage_features]
    return torch.cat(list(stage_features), dim=-1)


def combine_features(stage_features: Sequence[Tensor], combine: str, weights: Sequence[float] | None = None) -> Tensor:
    """Combine unnormalized features of the stages to unit features of the model, [..., sum of dims]."""
    return normalized(join_features(stage_features, combine, weights))


def join_to_vector(stage_features: Sequence[Tensor], combine: str, weights: Sequence[float] | None = None) -> Tensor:
    """Reduce image features of S stages to vectors of the width of one stage, [..., dim], with exact scores.

    Scores are inner products with unit features t of the text tower that all stages share. For stage features i_k,
    `concat` returns v = sum_k i_k / |[i_0; ...; i_S-1]|, and <t, v> / sqrt(S) is the cosine of the concatenations;
    `mean_cosine` returns v = sum_k i_k / |i_k| / S, and <t, v> is the mean of the cosines; `weighted` has w_k in place
    of 1 / S. The norm of v is part of the score: normalizing v changes the ranking.
    """
    if combine == WEIGHTED:
        pairs = zip(stage_features, weights or (), strict=True)
        return torch.stack([weight * normalized(features) for features, weight in pairs]).sum(0)
    if combine == "mean_cosine":
        return torch.stack([normalized(features) for features in stage_features]).mean(0)
    length = join_features(stage_features, combine).norm(dim=-1, keepdim=True).clamp(min=1e-12)
    return torch.stack([features / length for features in stage_features]).sum(0)


class MultistageCLIP(nn.Module):
    """The stages of a run as one CLIP model with the interface of open_clip's models.

    Stages without a text tower (`ImageModel`) make a model without one, which encodes images only.

    The stages are modified in place: if all text towers are equal, one is kept, shared and run once; likewise the
    lowest blocks of the image towers, up to the first that differs.

    Args:
        stages: open_clip models, or image models, in the order of the stages.
        combine: how the features of the stages are combined, see `join_features`.
        weights: of the stages, for `weighted`.
        logit_scale: logarithm of the factor on the cosine.
        logit_bias: added to the logits; None for models without one.
        preprocess_cfg: open_clip's config of the image transform, the same for all stages.
        model_cfgs: open_clip's model config of each stage.
        tokenizer: by default the one named in the model config.

    Raises:
        ValueError: if the stages do not fit together.
    """

    def __init__(
        self,
        stages: Sequence[nn.Module],
        *,
        combine: str = "concat",
        weights: Sequence[float] | None = None,
        logit_scale: float,
        logit_bias: float | None = None,
        preprocess_cfg: Mapping[str, Any],
        model_cfgs: Sequence[Mapping[str, Any]],
        tokenizer: Callable[..., Tensor] | None = None,
    ):
        super().__init__()
        if combine not in (*COMBINATIONS, WEIGHTED):
            raise ValueError(f"combine={combine!r} is not one of {', '.join((*COMBINATIONS, WEIGHTED))}")
        if weights is not None or combine == WEIGHTED:
            _check_weights(weights := list(weights or ()), len(stages))
        if not stages or len(stages) != len(model_cfgs):
            raise ValueError(f"{len(stages)} stages with {len(model_cfgs)} model_cfgs; give one for each, at least one")
        if any(_tokenizer_cfg(cfg) != _tokenizer_cfg(model_cfgs[0]) for cfg in model_cfgs):
            raise ValueError("the stages use different tokenizers or context lengths; a multistage model has one")
        self.combine, self.weights = combine, weights
        self.model_cfgs = [dict(cfg) for cfg in model_cfgs]
        self.preprocess_cfg = dict(preprocess_cfg)
        self.has_texts = "text_cfg" in model_cfgs[0]
        self.tokenizer = tokenizer if tokenizer is not None else make_tokenizer(model_cfgs[0])
        self.image_transform = make_image_transform(preprocess_cfg)
        self.shared_text_tower = self.has_texts and have_same_text_tower(stages, model_cfgs)
        self.shared_blocks = count_shared_blocks(stages, model_cfgs) if len(stages) > 1 else 0
        models: list[Any] = list(stages)
        first, *others = models
        for stage in others:  # shared modules are in memory once
            text_parts = (*first.named_children(), *first.named_parameters(recurse=False))
            for name, part in text_parts if self.shared_text_tower else ():
                if not f"{name}.".startswith(NOT_TEXT):
                    setattr(stage, name, part)
            for number in range(self.shared_blocks):
                stage.visual.transformer.resblocks[number] = first.visual.transformer.resblocks[number]
        self.stages = nn.ModuleList(stages)
        self.logit_scale = nn.Parameter(torch.tensor(float(logit_scale)))
        self.logit_bias = None if logit_bias is None else nn.Parameter(torch.tensor(float(logit_bias)))

    @property
    def context_length(self) -> int:
        """Tokens per text, including start and end tokens."""
        length: int = self.model_cfgs[0]["text_cfg"].get("context_length", DEFAULT_CONTEXT_LENGTH)
        return length

    @property
    def embed_dims(self) -> list[int]:
        """Feature dimension of each stage."""
        return [cfg["embed_dim"] for cfg in self.model_cfgs]

    def encode_image_stages(self, image: Tensor) -> list[Tensor]:
        """Encode images with each stage to unnormalized features, each [batch, dim of the stage]."""
        stages: Any = self.stages
        if self.shared_blocks and not self.training:  # in training, each stage samples its own patch dropout
            return encode_images_over_trunk(list(stages), image, self.shared_blocks)
        return [stage.encode_image(image) for stage in stages]

    def encode_text_stages(self, text: Tensor) -> list[Tensor]:
        """Encode texts with each stage to unnormalized features, each [batch, dim of the stage]."""
        stages: Any = self.stages
        if not self.has_texts:
            refuse_texts()
        if self.shared_text_tower:
            return [stages[0].encode_text(text)] * len(stages)
        return [stage.encode_text(text) for stage in stages]

    def encode_image(self, image: Tensor, normalize: bool = False, combine: str | None = None) -> Tensor:
        """Encode images to features, [batch, sum of dims], of unit length if `normalize`.

        `combine` overrides the model's own combination. `vector` gives features of the width of one stage, [batch,
        dim], whose inner products with text features rank as the model's own combination does. Their norm is part of
        the score, see `join_to_vector`.

        Raises:
            ValueError: for `vector` if the stages do not share a text tower, or with `normalize`.
        """
        if combine == VECTOR:
            if not self.shared_text_tower:
                raise ValueError(VECTOR_NEEDS_SHARED_TEXTS)
            if normalize:
                raise ValueError("combine='vector' with normalize=True would rank otherwise; use the inner product")
            return join_to_vector(self.encode_image_stages(image), self.combine, self.weights)
        features = join_features(self.encode_image_stages(image), combine or self.combine, self.weights)
        return normalized(features) if normalize else features

    def encode_text(self, text: Tensor, normalize: bool = False, combine: str | None = None) -> Tensor:
        """Encode texts to features, [batch, sum of dims], of unit length if `normalize`.

        `combine` overrides the model's own combination; `vector` gives unit features of the shared text tower,
        [batch, dim].

        Raises:
            ValueError: for `vector` if the stages do not share a text tower.
        """
        if combine == VECTOR:
            if not self.shared_text_tower:
                raise ValueError(VECTOR_NEEDS_SHARED_TEXTS)
            return normalized(self.encode_text_stages(text)[0])
        features = join_features(self.encode_text_stages(text), combine or self.combine, self.weights)
        return normalized(features) if normalize else features

    def forward(self, image: Tensor | None = None, text: Tensor | None = None) -> dict[str, Tensor | None]:
        """Return unit features and the factor on the cosine, with the keys of open_clip's `output_dict`."""
        output = {
            "image_features": None if image is None else self.encode_image(image, normalize=True),
            "text_features": None if text is None else self.encode_text(text, normalize=True),
            "logit_scale": self.logit_scale.exp(),
        }
        if self.logit_bias is not None:
            output["logit_bias"] = self.logit_bias
        return output

    def save(self, folder: Path | str, *, compact: bool = False) -> None:
        """Write the model to `folder`: an open_clip folder for each stage, then the config.

        With `compact`, all stages but the first hold only the weights that differ from it, so that shared weights are
        on disk once; plain open_clip can then load only the first stage.
        """
        folder = Path(folder)
        names = [f"stage_{number}" for number in range(len(self.stages))]
        options: dict[str, Any] = {"preprocess_cfg": self.preprocess_cfg, "tokenizer": self.tokenizer}
        for name, stage, model_cfg in zip(names, self.stages, self.model_cfgs, strict=True):
            if not self.has_texts:
                write_image_folder(folder / name, stage, model_cfg=model_cfg, preprocess_cfg=self.preprocess_cfg)
                continue
            write_open_clip_folder(folder / name, stage, model_cfg=model_cfg, **options)
            options["base"] = self.stages[0] if compact else None
        config = {
            "format_version": FORMAT_VERSION,
            "stages": names,
            "compact": compact,
            "combine": self.combine,
            **({} if self.weights is None else {"weights": self.weights}),
            "logit_scale": self.logit_scale.item(),
            "logit_bias": None if self.logit_bias is None else self.logit_bias.item(),
            "shared_text_tower": self.shared_text_tower,
            "shared_blocks": self.shared_blocks,
            "embed_dims": self.embed_dims,
        }
        (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path | str, device: str | torch.device = "cpu") -> "MultistageCLIP":
        """Load the model in `folder` to `device`, in float32 and eval mode.

        Raises:
            FileNotFoundError: if a file is missing.
            ValueError: if the folder is damaged, asks to run code, or was written in a newer format.
        """
        folder = Path(folder)
        config = read_config(folder)
        first, *others = config["stages"]
        if is_image_folder(folder / first):
            read: list[tuple[nn.Module, dict[str, Any], dict[str, Any]]] = [
                read_image_folder(folder / name) for name in config["stages"]
            ]
            tokenizer = refuse_texts
        else:
            read = [read_open_clip_folder(folder / first)]
            base = read[0][0] if config.get("compact") else None
            read += [read_open_clip_folder(folder / name, base) for name in others]
            tokenizer = open_clip.get_tokenizer(f"local-dir:{folder / first}")
        stages, model_cfgs, preprocess_cfgs = zip(*read, strict=True)
        multistage = cls(
            stages,
            combine=config["combine"],
            weights=config.get("weights"),
            logit_scale=config["logit_scale"],
            logit_bias=config.get("logit_bias"),
            preprocess_cfg=preprocess_cfgs[0],
            model_cfgs=model_cfgs,
            tokenizer=tokenizer,
        )
        return multistage.to(device).eval()


def _tokenizer_cfg(model_cfg: Mapping[str, Any]) -> list[Any]:
    names = ("hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs")
    text_cfg = model_cfg.get("text_cfg", {})
    return [text_cfg.get("context_length", DEFAULT_CONTEXT_LENGTH), *(text_cfg.get(name) or None for name in names)]


def have_same_text_tower(stages: Sequence[nn.Module], model_cfgs: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether all stages compute the same text features: equal configs and equal weights."""
    texts = [{**cfg["text_cfg"], "hf_model_pretrained": None} for cfg in model_cfgs]
    flags = [(bool(cfg.get("quick_gelu")), bool(cfg.get("custom_text"))) for cfg in model_cfgs]
    if any(text != texts[0] for text in texts) or len(set(flags)) > 1:
        return False
    first, *others = [
        {name: value for name, value in stage.state_dict().items() if not name.startswith(NOT_TEXT)} for stage in stages
    ]
    names = {name for state in (first, *others) for name in state}
    return all(is_equal(other.get(name), first.get(name)) for other in others for name in names)


def count_shared_blocks(stages: Sequence[nn.Module], model_cfgs: Sequence[Mapping[str, Any]]) -> int:
    """Count the blocks, from the lowest up, that compute the same in the image towers of all stages.

    Returns 0 for image towers other than open_clip's `VisionTransformer`, and if the patch embeddings differ.
    """
    visuals: list[Any] = [stage.visual for stage in stages]
    known = all(isinstance(stage, (open_clip.CLIP, open_clip.CustomTextCLIP)) for stage in stages)
    if not known or not all(type(visual) is VisionTransformer for visual in visuals):
        return 0
    image_cfgs = [(cfg["vision_cfg"], bool(cfg.get("quick_gelu"))) for cfg in model_cfgs]
    if any(image_cfg != image_cfgs[0] for image_cfg in image_cfgs):
        return 0
    first, *others = [visual.state_dict() for visual in visuals]
    different = {name for name in first for other in others if not is_equal(first[name], other.get(name))}
    # What is neither a block nor above the blocks is below them, and feeds every block.
    if any(not name.startswith((BLOCKS, *ABOVE_BLOCKS)) for name in different):
        return 0
    numbers = [int(name.removeprefix(BLOCKS).partition(".")[0]) for name in different if name.startswith(BLOCKS)]
    return min(numbers, default=len(visuals[0].transformer.resblocks))


def encode_images_over_trunk(stages: Sequence[nn.Module], image: Tensor, shared_blocks: int) -> list[Tensor]:
    """Compute `encode_image` of each stage, running the shared blocks once.

    For S stages with L blocks, this runs L + (S - 1) (L - shared_blocks) blocks rather than S L.
    """

    def run_blocks(visual: Any, tokens: Tensor, blocks: slice) -> Tensor:
        for block in visual.transformer.resblocks[blocks]:
            tokens = block(tokens)
        return tokens

    visuals: list[Any] = [stage.visual for stage in stages]
    trunk = run_blocks(visuals[0], visuals[0]._embeds(image), slice(shared_blocks))
    features = []
    for visual in visuals:
        pooled, _ = visual._pool(run_blocks(visual, trunk, slice(shared_blocks, None)))
        features.append(pooled if visual.proj is None else pooled @ visual.proj)
    return features
