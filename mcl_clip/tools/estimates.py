"""Estimates of the memory, disk space and group sizes of a run, made before it starts."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import open_clip
import torch
from torch import Tensor, nn

from mcl_clip.core.errors import UserError
from mcl_clip.model.clip import lock
from mcl_clip.model.open_clip_io import DEFAULT_CONTEXT_LENGTH

FLOAT_BYTES = 4
FEATURE_BYTES = 2
BYTES_PER_LOGIT = 30  # logits of both directions with gradients, and masks: the measured peak is 28 to 30
BYTES_PER_EMBEDDED_ROW = 2 * FLOAT_BYTES + 2 * 8 + 1  # norms, hashes and the validity flag, beside the features
BYTES_PER_INDEXED_ROW = 75  # the columns, with keys of about 20 characters
MAX_ROWS_OF_PLAN_IN_MEMORY = 50_000_000
MAX_LABELS = 2**63


@dataclass(frozen=True, kw_only=True)
class TowerSize:
    """Size of an image and a text encoder.

    Attributes:
        parameters: number of parameters of both encoders.
        trained: number of parameters that are not locked.
        saved_bytes: float32 bytes that autograd saves for the backward pass of one sample; 0 if unknown.
        pixels: values of an image, over all channels.
        dim: dimension of the features.
    """

    parameters: int
    trained: int
    saved_bytes: int
    pixels: int
    dim: int


@dataclass(frozen=True, kw_only=True)
class StageEstimate:
    """Properties of a stage that the estimates depend on.

    Attributes:
        steps, global_batch_size, warmup_steps, groups, min_group_size, min_negatives, precision, grad_cache_rows,
            loss_chunk_rows: training settings.
        has_average: whether a running average of the weights is kept.
        clusters: number of clusters of each modality that is clustered.
        has_projection: whether projected features are written before clustering.
        tower: None if the size of the encoders is unknown.
        has_cached_texts: whether features of a locked text encoder are cached.
    """

    steps: int
    global_batch_size: int
    warmup_steps: int
    groups: str
    min_group_size: int
    min_negatives: int
    precision: str
    grad_cache_rows: int
    loss_chunk_rows: int
    has_average: bool
    clusters: tuple[int, ...]
    has_projection: bool
    tower: TowerSize | None
    has_cached_texts: bool = False

    @property
    def labels(self) -> int:
        """Factor by which the clusters of this stage multiply the number of pseudo-labels."""
        return math.prod(self.clusters)


def measure(model_cfg: Mapping[str, Any], *, locked: Mapping[str, Any]) -> TowerSize:
    """Measure the encoders of a model config on the meta device, without allocating weights.

    Args:
        model_cfg: model config of open_clip.
        locked: arguments of `mcl_clip.model.clip.lock`.

    Raises:
        UserError: if open_clip cannot build the model, or its layers cannot be locked as asked.
    """
    cfg = json.loads(json.dumps(model_cfg))
    try:
        is_custom = cfg.pop("custom_text", False) or "hf_model_name" in cfg["text_cfg"]
        kind = open_clip.CoCa if "multimodal_cfg" in cfg else open_clip.CustomTextCLIP if is_custom else open_clip.CLIP
        cfg["vision_cfg"]["timm_model_pretrained"] = cfg["text_cfg"]["hf_model_pretrained"] = False
        with torch.device("meta"):
            model: nn.Module = kind(**cfg)
    except (RuntimeError, ValueError, TypeError, KeyError, AssertionError, OSError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"open_clip cannot build this model ({type(error).__name__}: {reason})") from error
    lock(model, **locked)
    visual: Any = model.visual
    sides = visual.image_size
    height, width = (sides, sides) if isinstance(sides, int) else sides
    length = model_cfg["text_cfg"].get("context_length", DEFAULT_CONTEXT_LENGTH)
    try:
        two, four = (_saved_bytes(model, samples, (height, width), length) for samples in (2, 4))
    except (RuntimeError, ValueError, TypeError, LookupError):  # the forward pass needs values, which meta tensors lack
        two = four = 0
    parameters = list(model.parameters())
    return TowerSize(
        parameters=sum(parameter.numel() for parameter in parameters),
        trained=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        saved_bytes=(four - two) // 2,  # the difference leaves out what does not depend on the batch
        pixels=3 * height * width,
        dim=model_cfg["embed_dim"],
    )


def _saved_bytes(model: nn.Module, samples: int, size_px: tuple[int, int], context_length: int) -> int:
    """Sum the bytes of all tensors that autograd saves for the backward pass, without the weights."""
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    saved: dict[int, int] = {}

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            saved[storage._cdata] = storage.nbytes()
        return tensor

    images = torch.empty(samples, 3, *size_px, device="meta")
    texts = torch.empty(samples, context_length, dtype=torch.int64, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        output = model(images, texts)  # its graph keeps the saved tensors alive, so that no address is used twice
    del output
    return sum(saved.values())


def estimate_memory(stage: StageEstimate, processes: int) -> dict[str, int]:
    """Estimate the device memory, in bytes, that training a stage takes in one process, by purpose.

    Left out: temporary buffers within a layer, fragmentation, and the context of the device. Activations in bfloat16
    count as half of those in float32, which is slightly too few.
    """
    if stage.tower is None or not stage.steps:
        return {}
    tower, batch = stage.tower, stage.global_batch_size // processes
    values = tower.parameters * (2 if stage.has_average else 1)  # weights
    values += tower.trained * (4 if processes > 1 else 3)  # gradients, both moments of Adam, buckets of DDP
    forward_rows = min(batch, stage.grad_cache_rows or batch)
    loss_rows = min(batch, stage.loss_chunk_rows or batch)
    return {
        "weights, gradients and Adam": FLOAT_BYTES * values,
        "activations": forward_rows * tower.saved_bytes // (2 if stage.precision == "bf16" else 1),
        "loss": loss_rows * stage.global_batch_size * BYTES_PER_LOGIT,
    }


def estimate_disk(stages: Sequence[StageEstimate], *, rows: int, keep_checkpoints: int) -> dict[str, int]:
    """Estimate the largest size, in bytes, of the folder of each phase.

    Left out: `eval`, with the features of evaluation sets, and everything that depends on an unknown `tower`.
    """
    sizes = {"index": rows * BYTES_PER_INDEXED_ROW}
    if rows > MAX_ROWS_OF_PLAN_IN_MEMORY:
        sizes["index"] += 2 * 4 * rows  # the plan of one epoch while that of the next is written
    for number, stage in enumerate(stages):
        projection = 0
        if stage.tower is not None:
            model = FLOAT_BYTES * stage.tower.parameters
            average = model if stage.has_average else 0
            checkpoint = model + average + 2 * FLOAT_BYTES * stage.tower.trained
            # A checkpoint is deleted only once the next one is complete.
            train = model + (checkpoint * (keep_checkpoints + 1) if stage.steps else 0)
            if stage.has_cached_texts and stage.steps * stage.global_batch_size >= 2 * rows:
                train += rows * (FLOAT_BYTES * stage.tower.dim + 16)  # assuming one caption per row
            sizes[f"stage-{number}/train"] = train
            features = 2 * FEATURE_BYTES * stage.tower.dim
            sizes[f"stage-{number}/embed"] = rows * (features + BYTES_PER_EMBEDDED_ROW)
            sizes["combined"] = sizes.get("combined", 0) + model
            projection = FEATURE_BYTES * stage.tower.dim if stage.has_projection else 0
        sizes[f"stage-{number}/cluster"] = rows * (4 * len(stage.clusters) + projection)
        sizes[f"stage-{number}/labels"] = 8 * rows
    return sizes


def rows_per_label(stages: Sequence[StageEstimate], rows: int) -> list[float]:
    """Compute the mean number of rows that share a pseudo-label at the start of each stage; all rows at stage 0."""
    factors = [1, *(stage.labels for stage in stages[:-1])]
    return [rows / math.prod(factors[: number + 1]) for number in range(len(stages))]
