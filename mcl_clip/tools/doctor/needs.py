"""What a run will take, before it runs: memory, disk, sizes of groups. Estimates; what they leave out is said."""

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
BYTES_OF_A_LOGIT = 30  # logits of both directions with their gradients, and the masks: a measured peak of 28 to 30
BYTES_OF_AN_EMBEDDED_ROW = 2 * FLOAT_BYTES + 2 * 8 + 1  # norms, hashes and whether it is good, beside the features
BYTES_OF_AN_INDEXED_ROW = 75  # its columns, and a key of about 20 letters
ROWS_OF_PLANS_IN_MEMORY = 50_000_000
MAX_LABELS = 2**63


@dataclass(frozen=True, kw_only=True)
class TowerSize:
    """How large an encoder pair is.

    Attributes:
        parameters: of both towers.
        trained: parameters that are not locked.
        saved_bytes: what the backward pass of one sample keeps, in float32; 0 if that is not known.
        pixels: numbers of a picture, of all three colours.
        dim: of a feature.
    """

    parameters: int
    trained: int
    saved_bytes: int
    pixels: int
    dim: int


@dataclass(frozen=True, kw_only=True)
class StageEstimate:
    """What the estimates need to know of a stage.

    Attributes:
        steps, global_batch_size, warmup_steps, groups, min_group_size, min_negatives, precision, grad_cache_rows,
            loss_chunk_rows: settings of training.
        has_average: whether a running average of the weights is kept.
        clusters: of each side that is clustered.
        has_projection: whether features are projected, into a file, before they are clustered.
        tower: none if its size is not known.
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
        """By how many the clusters of this stage multiply the labels."""
        return math.prod(self.clusters)


def outline(model_cfg: Mapping[str, Any]) -> nn.Module:
    """An encoder pair without memory for its weights, to be measured.

    Raises:
        UserError: if open_clip cannot make it.
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
        raise UserError(f"open_clip cannot make this tower ({type(error).__name__}: {reason})") from error
    return model


def measure(model_cfg: Mapping[str, Any], *, locked: Mapping[str, Any]) -> TowerSize:
    """The size of an encoder pair, with `locked` the arguments of `mcl_clip.model.clip.lock`.

    Raises:
        UserError: if open_clip cannot make it, or it cannot be locked so.
    """
    model = outline(model_cfg)
    lock(model, **locked)
    visual: Any = model.visual
    sides = visual.image_size
    height, width = (sides, sides) if isinstance(sides, int) else sides
    length = model_cfg["text_cfg"].get("context_length", DEFAULT_CONTEXT_LENGTH)
    try:
        two, four = (_saved_bytes(model, number, (height, width), length) for number in (2, 4))
    except (RuntimeError, ValueError, TypeError, LookupError):  # it needs values, which are not there
        two = four = 0
    parameters = list(model.parameters())
    return TowerSize(
        parameters=sum(parameter.numel() for parameter in parameters),
        trained=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        saved_bytes=(four - two) // 2,
        pixels=3 * height * width,
        dim=model_cfg["embed_dim"],
    )


def _saved_bytes(model: nn.Module, samples: int, size_px: tuple[int, int], context_length: int) -> int:
    """Bytes of all tensors that autograd keeps for the backward pass, weights left out."""
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    images = torch.empty(samples, 3, *size_px, device="meta")
    texts = torch.empty(samples, context_length, dtype=torch.int64, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model(images, texts)  # whose graph keeps the tensors, and so their addresses, meanwhile
    del out
    return sum(kept.values())


def memory_needs(stage: StageEstimate, processes: int) -> dict[str, int]:
    """Bytes that training a stage takes on the device of one process, by what takes them.

    Left out: what the operations of a single layer need for themselves, fragmentation, and the device's own context.
    Activations in bfloat16 count half of float32's, a little too few.
    """
    if stage.tower is None or not stage.steps:
        return {}
    tower, batch = stage.tower, stage.global_batch_size // processes
    numbers = tower.parameters * (2 if stage.has_average else 1)  # weights
    numbers += tower.trained * (4 if processes > 1 else 3)  # gradients, both moments of Adam, buckets of the exchange
    at_once = min(batch, stage.grad_cache_rows or batch)
    rows_of_the_loss = min(batch, stage.loss_chunk_rows or batch)
    return {
        "weights, gradients and Adam": FLOAT_BYTES * numbers,
        "activations": at_once * tower.saved_bytes // (2 if stage.precision == "bf16" else 1),
        "loss": rows_of_the_loss * stage.global_batch_size * BYTES_OF_A_LOGIT,
    }


def disk_needs(stages: Sequence[StageEstimate], *, rows: int, keep_checkpoints: int) -> dict[str, int]:
    """Bytes of each phase's folder in the run directory, at their largest. Left out: `eval`, with features of the sets.

    Stages whose tower has an unknown size count by what is left.
    """
    needs = {"index": rows * BYTES_OF_AN_INDEXED_ROW}
    if rows > ROWS_OF_PLANS_IN_MEMORY:
        needs["index"] += 2 * 4 * rows  # the plan of one epoch while that of the next is written
    for number, stage in enumerate(stages):
        model = 0
        if stage.tower is not None:
            model = FLOAT_BYTES * stage.tower.parameters
            averages = model if stage.has_average else 0
            checkpoint = model + averages + 2 * FLOAT_BYTES * stage.tower.trained
            needs[f"stage-{number}/train"] = model + (checkpoint * (keep_checkpoints + 1) if stage.steps else 0)
            if stage.has_cached_texts and stage.steps * stage.global_batch_size >= 2 * rows:
                needs[f"stage-{number}/train"] += rows * (FLOAT_BYTES * stage.tower.dim + 16)  # of a caption a row
            features = 2 * FEATURE_BYTES * stage.tower.dim
            needs[f"stage-{number}/embed"] = rows * (features + BYTES_OF_AN_EMBEDDED_ROW)
            needs["combined"] = needs.get("combined", 0) + model
        width = stage.tower.dim if stage.tower is not None and stage.has_projection else 0
        needs[f"stage-{number}/cluster"] = rows * (4 * len(stage.clusters) + FEATURE_BYTES * width)
        needs[f"stage-{number}/labels"] = 8 * rows
    return needs


def rows_of_a_label(stages: Sequence[StageEstimate], rows: int) -> list[float]:
    """How many rows have the same label on average when each stage begins; all of them at stage 0."""
    radix = [1, *(stage.labels for stage in stages[:-1])]
    return [rows / math.prod(radix[: number + 1]) for number in range(len(stages))]
