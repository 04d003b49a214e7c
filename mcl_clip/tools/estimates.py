"""Estimates of the memory, disk space and group sizes of a run, made before it starts."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from torch import Tensor, nn

from mcl_clip.config import StageConfig, TrainConfig
from mcl_clip.core.errors import UserError, shorten
from mcl_clip.model.clip import check_image_size
from mcl_clip.model.image_model import ImageModel
from mcl_clip.model.open_clip_io import DEFAULT_CONTEXT_LENGTH
from mcl_clip.model.prepare import check_gradients, prepare_training
from mcl_clip.runs.train_phase import lock_stage
from mcl_clip.train.optim import create_optimizer, find_undecayed

FLOAT_BYTES = 4
FEATURE_BYTES = 2
BYTES_PER_LOGIT = 30  # logits of both directions with gradients, and masks: the measured peak is 28 to 30
BYTES_PER_EMBEDDED_ROW = 2 * FLOAT_BYTES + 2 * 8 + 1  # norms, hashes and the validity flag, beside the features
BYTES_PER_INDEXED_ROW = 75  # the columns, with keys of about 20 characters
MAX_ROWS_OF_PLAN_IN_MEMORY = 50_000_000
MAX_LABELS = 2**63


@dataclass(frozen=True, kw_only=True)
class TowerSize:
    """Size of an image and a text encoder together."""

    parameters: int
    trained: int  # parameters that are not locked
    saved_bytes: int  # float32 bytes that autograd saves for the backward pass of one sample; 0 if unknown
    pixels: int  # values of an image, over all channels
    dim: int  # of the features
    tensors: int = 0  # that are trained
    decayed: int = 0  # of them, with weight decay
    undecayed: tuple[str, ...] = ()  # names of those without weight decay, other than one-dimensional ones


def clusters_per_modality(stage: StageConfig) -> tuple[int, ...]:
    """Return the number of clusters of each modality that a stage clusters; their product multiplies the labels."""
    cluster = stage.cluster
    texts = cluster.text_clusters or cluster.num_clusters
    return {"image": (cluster.num_clusters,), "text": (texts,), "product": (cluster.num_clusters, texts)}[cluster.on]


def rows_per_label(stages: Sequence[StageConfig], rows: int) -> list[float]:
    """Compute the mean number of rows that share a pseudo-label at the start of each stage; all rows at stage 0."""
    return [rows / num_labels(stages[:number]) for number in range(len(stages))]


def num_labels(stages: Sequence[StageConfig]) -> int:
    """Return the number of possible pseudo-labels after some stages."""
    labels = 1
    for stage in stages:
        labels = math.prod(clusters_per_modality(stage)) * (1 if stage.cluster.features == "base" else labels)
    return labels


def measure_stages(
    stages: Sequence[StageConfig],
    model_cfg: Mapping[str, Any] | None,
    *,
    name: str = "the model",
    decays_unlisted: bool = False,
) -> list[TowerSize | None]:
    """Measure the encoders as each stage trains them; None if a config is not on this machine.

    Raises:
        UserError: if the model called `name` cannot be built, locked as the recipe asks, or trained.
    """
    text_name = (model_cfg.get("text_cfg") or {}).get("hf_model_name") if model_cfg else None
    if not model_cfg or (text_name and not has_config(text_name)):
        return [None] * len(stages)
    sizes: list[TowerSize | None] = []
    for number, stage in enumerate(stages):
        if number and stage.train == stages[number - 1].train:
            sizes.append(sizes[-1])
        else:
            sizes.append(measure(model_cfg, stage.train, name=name, stage=number, decays_unlisted=decays_unlisted))
    return sizes


def has_config(text_name: str) -> bool:
    """Return whether the config of a Hugging Face text tower is on this machine: in a folder, or cached."""
    if Path(text_name).is_dir():
        return True
    try:
        return isinstance(try_to_load_from_cache(text_name, "config.json"), str)
    except HFValidationError as error:
        raise UserError(f"hf_model_name {text_name} is neither a folder nor a model of the Hub; correct it") from error


def build_on_meta(model_cfg: Mapping[str, Any]) -> nn.Module:
    """Build the encoders of a model config on the meta device, without allocating weights.

    Raises:
        UserError: if open_clip cannot build the model.
    """
    if "head_cfg" in model_cfg:
        with torch.device("meta"):
            return ImageModel(model_cfg)
    cfg = json.loads(json.dumps(model_cfg))
    try:
        is_custom = cfg.pop("custom_text", False) or "hf_model_name" in cfg["text_cfg"]
        kind = open_clip.CoCa if "multimodal_cfg" in cfg else open_clip.CustomTextCLIP if is_custom else open_clip.CLIP
        cfg["vision_cfg"]["timm_model_pretrained"] = cfg["text_cfg"]["hf_model_pretrained"] = False
        with torch.device("meta"):
            model: nn.Module = kind(**cfg, **({} if kind is open_clip.CoCa else {"output_dict": True}))
    except Exception as error:  # wrong configs raise errors of many types
        reason = shorten(error, 300) or type(error).__name__
        raise UserError(f"open_clip cannot build this model ({type(error).__name__}: {reason})") from error
    return model


def measure(
    model_cfg: Mapping[str, Any],
    train: TrainConfig,
    *,
    name: str = "the model",
    stage: int = 0,
    decays_unlisted: bool = False,
) -> TowerSize:
    """Measure the encoders of a model config as a stage trains them, on the meta device.

    Raises:
        UserError: if the model called `name` cannot be built or trained as `stage` asks, does not take images of its
            size, or a parameter that trains gets no gradient.
    """
    model: Any = build_on_meta(model_cfg)
    lock_stage(model, train)
    has_texts = "text_cfg" in model_cfg
    sides = model.visual.image_size if has_texts else model_cfg["vision_cfg"]["image_size"]
    height, width = (sides, sides) if isinstance(sides, int) else sides
    check_image_size(model, model_cfg, (height, width))
    length = model_cfg["text_cfg"].get("context_length", DEFAULT_CONTEXT_LENGTH) if has_texts else 0

    def batch(samples: int) -> tuple[Tensor, Tensor | None]:
        if not has_texts:
            return torch.empty(samples, train.num_views, 3, height, width, device="meta"), None
        images = torch.empty(samples, 3, height, width, device="meta")
        return images, torch.empty(samples, length, dtype=torch.int64, device="meta")

    try:
        if train.steps:
            check_gradients(model, *batch(2), name=name, stage=stage)
        two, four = (_saved_bytes(model, *batch(samples)) for samples in (2, 4))
    except UserError:
        raise
    except (RuntimeError, ValueError, TypeError, LookupError):  # the forward pass needs values, which meta tensors lack
        two = four = 0
    named = dict(model.named_parameters())
    parameters = list(named.values())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    undecayed = find_undecayed(model, decays_unlisted=decays_unlisted)
    if train.steps:  # what these refuse, a stage refuses when it starts
        prepare_training(
            model, compiled=False, patch_dropout=train.patch_dropout, grad_checkpointing=train.grad_checkpointing
        )
        create_optimizer(model, train)
    return TowerSize(
        parameters=sum(parameter.numel() for parameter in parameters),
        trained=sum(parameter.numel() for parameter in trained),
        saved_bytes=(four - two) // 2,  # the difference leaves out what does not depend on the batch
        pixels=3 * height * width,
        dim=model_cfg["embed_dim"],
        tensors=len(trained),
        decayed=len(trained) - len(undecayed),
        undecayed=tuple(name for name in undecayed if named[name].ndim > 1),
    )


def _saved_bytes(model: nn.Module, images: Tensor, texts: Tensor | None) -> int:
    """Sum the bytes of all tensors that autograd saves for the backward pass, without the weights."""
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    saved: dict[int, int] = {}

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            saved[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        output = (
            model(images) if texts is None else model(images, texts)
        )  # its graph keeps the saved tensors alive, so that no address is used twice
    del output
    return sum(saved.values())


def estimate_memory(train: TrainConfig, size: TowerSize | None, processes: int) -> dict[str, int]:
    """Estimate the device memory, in bytes, that training a stage takes in one process, by purpose.

    Left out: temporary buffers within a layer, fragmentation, and the context of the device. Activations in bfloat16
    count as half of those in float32, which is slightly too few.
    """
    if size is None or not train.steps:
        return {}
    rows = train.global_batch_size // processes
    values = size.parameters * (2 if train.average_decay else 1)  # weights
    values += size.trained * (4 if processes > 1 else 3)  # gradients, both moments of Adam, buckets of DDP
    # Two matrices of images and captions; one for each ordered pair of views of images alone.
    matrices = train.num_views**2 if train.loss == "simclr" else 2
    activations = min(rows, train.grad_cache_rows or rows) * size.saved_bytes
    return {
        "weights, gradients and Adam": FLOAT_BYTES * values,
        "activations": activations // (2 if train.precision == "bf16" else 1),
        "loss": min(rows, train.loss_chunk_rows or rows) * train.global_batch_size * BYTES_PER_LOGIT * matrices // 2,
    }


def estimate_disk(
    stages: Sequence[StageConfig], sizes: Sequence[TowerSize | None], *, rows: int, keep_checkpoints: int
) -> dict[str, int]:
    """Estimate the largest size, in bytes, of the folder of each phase.

    Left out: `eval`, with the features of evaluation sets, and everything that depends on an unknown model.
    """
    disk = {"index": rows * BYTES_PER_INDEXED_ROW}
    if rows > MAX_ROWS_OF_PLAN_IN_MEMORY:
        disk["index"] += 2 * 4 * rows  # the plan of one epoch while that of the next is written
    for number, (stage, size) in enumerate(zip(stages, sizes, strict=True)):
        train, projection = stage.train, 0
        if size is not None:
            model = FLOAT_BYTES * size.parameters
            checkpoint = model * (2 if train.average_decay else 1) + 2 * FLOAT_BYTES * size.trained
            # A checkpoint is deleted only once the next one is complete.
            written = model + (checkpoint * (keep_checkpoints + 1) if train.steps else 0)
            has_cached_texts = train.lock.text and train.lock.cached_texts
            if has_cached_texts and train.steps * train.global_batch_size >= 2 * rows:
                written += rows * (FLOAT_BYTES * size.dim + 16)  # assuming one caption per row
            disk[f"stage-{number}/train"] = written
            disk[f"stage-{number}/embed"] = rows * (2 * FEATURE_BYTES * size.dim + BYTES_PER_EMBEDDED_ROW)
            disk["combined"] = disk.get("combined", 0) + model
            projection = FEATURE_BYTES * size.dim if stage.cluster.metric == "shared" else 0
        disk[f"stage-{number}/cluster"] = rows * (4 * len(clusters_per_modality(stage)) + projection)
        disk[f"stage-{number}/labels"] = 8 * rows
    return disk
