"""A stage of training on a few drawn pairs, that can be stopped: the real loader, loop and Accelerator."""

import contextlib
import io
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from PIL import Image
from torch import nn

from mcl_clip.cli.recipe import create_accelerator
from mcl_clip.config import MachineConfig, TrainConfig
from mcl_clip.core.distributed import random_words, rank, world_size
from mcl_clip.data.batch_plan import BatchPlan
from mcl_clip.data.decode import train_transform
from mcl_clip.data.index import ShardIndex
from mcl_clip.data.loader import TrainingLoader
from mcl_clip.data.reader import Reader
from mcl_clip.data.shards import expand_shards
from mcl_clip.data.writing import Pair, write_pairs
from mcl_clip.model.clip import ClipBundle, create_clip
from mcl_clip.train.loop import BatchSource, train_stage
from mcl_clip.train.optim import create_optimizer

ROWS, BATCH, STEPS, SAVE = 52, 8, 30, 4  # 52 rows: the last batch of an epoch of 7 has fillers
COLOURS = ("red", "green", "blue", "yellow", "white", "black", "orange", "purple")
MODEL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "layers": 2, "width": 32, "head_width": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


class StoppedError(Exception):
    """The job was taken away."""


class StoppingLoader(TrainingLoader):
    """Notes the rows of each step and, asked for one more than it may give, stops."""

    def __init__(self, *args, most_steps=math.inf, **options):
        super().__init__(*args, **options)
        self.most_steps, self.rows = most_steps, []

    def steps(self, start_step, stop_step):
        for batch in super().steps(start_step, stop_step):
            if len(self.rows) >= self.most_steps:
                raise StoppedError
            self.rows.append(batch.rows.tolist())
            yield batch


def write_shards(out: Path) -> Path:
    """Pairs of noise and a caption of their own."""

    def pairs():
        for row in range(ROWS):
            file = io.BytesIO()
            pixels = random_words(32 * 32 * 3, "drawn pair", row).astype(np.uint8).reshape(32, 32, 3)
            Image.fromarray(pixels).save(file, "PNG")
            caption = f"number {row} on {COLOURS[row % len(COLOURS)]}"
            yield Pair(key=f"{row:04d}", image=file.getvalue(), captions=[caption])

    write_pairs(pairs(), out, samples_per_shard=20, total=ROWS)
    return out


def train(
    shards: Path,
    out: Path,
    *,
    most_steps: float = math.inf,
    patch_dropout: float = 0.0,
    crop: float = 0.5,
    dtype: torch.dtype = torch.float32,
):
    """Train up to the end or until stopped; the local rows of each step that was done, and the weights."""
    make_loader, tower = parts(shards, patch_dropout=patch_dropout, crop=crop, dtype=dtype)
    loader = make_loader(most_steps=most_steps)
    with contextlib.suppress(StoppedError):
        fit(tower, loader, out=out)
    return loader.rows, {name: tensor.numpy().tobytes() for name, tensor in tower.model.state_dict().items()}


def parts(
    shards: Path,
    *,
    patch_dropout: float = 0.0,
    crop: float = 0.5,
    dtype: torch.dtype = torch.float32,
    model: Mapping[str, Any] = {},
) -> tuple[Callable[..., StoppingLoader], ClipBundle]:
    """A factory of loaders, and small towers that are not trained yet."""
    vision = MODEL["vision_cfg"] | {"patch_dropout": patch_dropout}
    tower = create_clip(model_cfg=MODEL | {"vision_cfg": vision} | dict(model), seed=1)
    tower.model.to(dtype).visual.register_forward_pre_hook(_cast)
    index = ShardIndex.build(expand_shards(str(shards)))
    plan = BatchPlan(
        shard_of=index.shard_of, groups=np.arange(len(index)) % 3, global_batch_size=BATCH, seed=0, stage=1
    )
    transform = train_transform(tower.preprocess_cfg, scale=(crop, 1.0), ratio=(1.0, 1.0))
    return partial(StoppingLoader, plan, Reader(index), transform=transform, tokenizer=tower.tokenizer), tower


def fit(
    tower: ClipBundle,
    loader: BatchSource,
    *,
    out: Path,
    changes: Mapping[str, Any] = {},
    machine: MachineConfig | None = None,
    **options,
) -> None:
    """Train the towers in place."""
    config = TrainConfig(
        steps=STEPS, global_batch_size=BATCH, lr=1e-3, warmup_steps=3, weight_decay=0.1, max_grad_norm=1.0,
        average_decay=0.9,
    )  # fmt: skip
    config = replace(config, **changes)
    out.mkdir(exist_ok=True)
    train_stage(
        accelerator(),
        tower.model,
        loader=loader,
        groups=np.arange(ROWS) % 3,
        preprocess_cfg=tower.preprocess_cfg,
        config=config,
        machine=machine or MachineConfig(log_steps=1, save_steps=SAVE, progress=False),
        optimizer=create_optimizer(tower.model, config),
        out=out,
        seed=(0, 1),
        **options,
    )


def _cast(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Pixels in the type of the weights."""
    return tuple(given.to(next(module.parameters()).dtype) for given in inputs)


def accelerator() -> Accelerator:
    """Accelerate on the process group of the pool, which knows nothing of the jobs before."""
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()
    if world_size() == 1:
        return create_accelerator()
    numbers = {"RANK": rank(), "LOCAL_RANK": rank(), "WORLD_SIZE": world_size(), "LOCAL_WORLD_SIZE": world_size()}
    with patch.dict(os.environ, {name: str(number) for name, number in numbers.items()}, OMP_NUM_THREADS="1"):
        made = create_accelerator()
    assert made.num_processes == world_size()
    return made
