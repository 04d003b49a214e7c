"""The loss between views of images, and its gradients, at any number of processes against a full-batch reference."""

import contextlib
import json
import math
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

from mcl_clip.config import TowerConfig, TrainConfig
from mcl_clip.core.distributed import all_reduce_sum, rank, world_size
from mcl_clip.data.batch_plan import FILLER, BatchPlan
from mcl_clip.data.batches import PairBatch
from mcl_clip.data.decode import train_transform
from mcl_clip.data.index import ShardIndex
from mcl_clip.data.reader import Reader
from mcl_clip.data.samples import IMAGES_ALONE
from mcl_clip.data.shards import expand_shards
from mcl_clip.model.losses import find_negatives, simclr_loss
from mcl_clip.model.tower import create_tower
from mcl_clip.train.loop import forward_backward
from tests.training import BATCH as ROWS_OF_A_BATCH
from tests.training import SAVE, StoppedError, StoppingLoader, fit, write_shards

BATCH, STEPS, TEMPERATURE = 8, 16, 0.2
CFG = {"mean": (0.5, 0.4, 0.3), "std": (0.3, 0.2, 0.25)}


class Case(NamedTuple):
    """Fields of `TrainConfig`."""

    num_views: int = 2
    mask_duplicates: bool = True
    min_negatives: int = 1
    ifm_epsilon: float = 0.0
    own_group_share: float = 1.0

    def __str__(self) -> str:
        changed = {name: value for name, value in self._asdict().items() if value != self._field_defaults[name]}
        return " ".join(f"{name} {value}" for name, value in changed.items()) or "simclr"


CASES = [
    Case(),
    Case(num_views=3, mask_duplicates=False),
    Case(min_negatives=3, ifm_epsilon=0.1),
    Case(num_views=3, own_group_share=0.7),
]


class Head(nn.Module):
    """An encoder of views with a fixed temperature."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.image = nn.Linear(12, 6)
        self.logit_scale = nn.Parameter(torch.tensor(-np.log(TEMPERATURE)), requires_grad=False)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = normalize(self.image(images.flatten(2).to(self.image.weight.dtype)), dim=2)
        return {"image_features": features, "logit_scale": self.logit_scale.exp()}


class Data:
    """61 rows in groups of 24, 20, 10 and 7: batches of one group and packed ones, the last with three fillers."""

    def __init__(self, num_views: int) -> None:
        draw = np.random.default_rng(0)
        self.groups = np.repeat([0, 1, 2, 3], [24, 20, 10, 7])[draw.permutation(61)]
        self.images = torch.from_numpy(draw.integers(0, 256, (61, num_views, 3, 2, 2), np.uint8))
        self.image_ids = (torch.arange(61) * 7) % 43  # some are equal
        bad = torch.tensor([int(np.flatnonzero(self.groups == 1)[3]), int(np.flatnonzero(self.groups == 3)[0])])
        plan = BatchPlan(shard_of=np.zeros(61, np.int64), groups=self.groups, global_batch_size=BATCH, seed=0, stage=1)
        rows = torch.tensor(np.stack([plan.batch(step) for step in range(STEPS)]))
        self.rows = rows.where(~torch.isin(rows, bad), FILLER)

    def batch(self, step: int) -> PairBatch:
        local = BATCH // world_size()
        rows = self.rows[step, rank() * local : (rank() + 1) * local]
        places = (rows != FILLER).nonzero()[:, 0]
        images = self.images[rows[places]] if len(places) else torch.zeros_like(self.images[:1])
        return PairBatch(
            step=step, rows=rows, text_ids=self.image_ids[rows], image_ids=self.image_ids[rows], images=images,
            tokens=torch.zeros(len(images), 0, dtype=torch.int64), bad=(),
            places=places if len(places) else torch.tensor([0]),
        )  # fmt: skip


def train(case: Case, chunks: tuple[int, int] = (0, 0)) -> tuple[list[float], list[np.ndarray]]:
    """Losses and gradients of all steps of the loop; `chunks` of the towers and of the loss."""
    data, raw = Data(case.num_views), Head().double()
    model = DistributedDataParallel(raw) if world_size() > 1 else raw
    optimizer, losses, gradients = torch.optim.SGD(raw.parameters(), lr=0.3), [], []
    config = TrainConfig(
        steps=STEPS, global_batch_size=BATCH, lr=0.3, loss="simclr", grad_cache_rows=chunks[0],
        loss_chunk_rows=chunks[1], **case._asdict(),
    )  # fmt: skip
    for step in range(STEPS):
        counts = forward_backward(
            model, data.batch(step), groups=data.groups, preprocess_cfg=CFG, config=config,
            device=torch.device("cpu"), seed=(),
        )  # fmt: skip
        losses.append(float(all_reduce_sum(counts["loss"].detach().clone())) / world_size())
        gradients.append(raw.image.weight.grad.numpy().copy())
        optimizer.step()
        optimizer.zero_grad()
    return losses, gradients


def reference_loss(model: Head, data: Data, rows: list[int], case: Case, *, across_groups: bool = False) -> Tensor:
    """NT-Xent view by view (SimCLR, equation 1), over rows of the own group whose images differ."""
    mean, std = torch.tensor(CFG["mean"]).view(3, 1, 1), torch.tensor(CFG["std"]).view(3, 1, 1)
    views, losses = model((data.images[rows].float() / 255 - mean) / std)["image_features"], []
    for i, row in enumerate(rows):
        others = [
            j for j, other in enumerate(rows) if j != i and (across_groups or data.groups[row] == data.groups[other])
        ]
        kept = [j for j in others if not case.mask_duplicates or data.image_ids[row] != data.image_ids[rows[j]]]
        if len(kept) < case.min_negatives:
            continue
        for v in range(case.num_views):
            for w in set(range(case.num_views)) - {v}:
                for shift in {0.0, case.ifm_epsilon}:
                    positive = (views[i, v] @ views[i, w] - shift) / TEMPERATURE
                    negatives = (views[kept].flatten(0, 1) @ views[i, v] + shift) / TEMPERATURE
                    losses.append(torch.cat([positive[None], negatives]).logsumexp(0) - positive)
    return torch.stack(losses).mean() if losses else 0 * views.sum()


@cache
def reference(case: Case) -> tuple[list[float], list[np.ndarray]]:
    data, model, losses, gradients = Data(case.num_views), Head().double(), [], []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for step in range(STEPS):
        rows = [row for row in data.rows[step].tolist() if row >= 0]
        parts = [reference_loss(model, data, rows, case, across_groups=across) for across in (False, True)]
        loss = case.own_group_share * parts[0] + (1 - case.own_group_share) * parts[1]
        loss.backward()
        losses.append(float(loss.detach()))
        gradients.append(model.image.weight.grad.numpy().copy())
        optimizer.step()
        optimizer.zero_grad()
    return losses, gradients


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_loss_between_views_equals_the_full_batch_reference(pool, size, case):
    for chunks in ((0, 0), (3, 1)) if size == 2 else ((0, 0),):
        for found in pool.run(train, size, case, chunks):
            for mine, expected in zip(found, reference(case), strict=True):
                np.testing.assert_allclose(mine, expected, rtol=1e-9, atol=1e-9)


def test_each_of_the_settings_matters():
    changes = [Case(), *(Case(**{name: getattr(case, name)}) for case in CASES for name in case._fields)]
    losses = {change: tuple(reference(change)[0]) for change in changes}
    assert len(set(losses.values())) == len(set(changes)) == 6


def test_two_views_of_n_rows_have_2n_minus_2_negatives():
    """With all cosines equal, the loss is the logarithm of the number of columns: the positive and the negatives."""
    ids = torch.arange(5)
    negatives = find_negatives(rows=ids, groups=torch.zeros_like(ids), text_ids=ids, image_ids=ids)
    views = normalize(torch.ones(5, 2, 3), dim=2)
    assert float(simclr_loss(views, torch.tensor(7.0), negatives)) == pytest.approx(np.log(2 * 5 - 1), rel=1e-6)


def run_stage(shards: Path, out: Path, most_steps: float = math.inf) -> tuple[list, dict[str, bytes]]:
    """Train a tower without BatchNorm by the real loader and loop; the local rows of each step, and the weights."""
    clip = create_tower(TowerConfig(image="timm:test_vit=random", image_size=(32,), heads="linear", dim=8), seed=1)
    index = ShardIndex.build(expand_shards(str(shards)), rule=IMAGES_ALONE)
    groups = np.arange(len(index)) % 3
    plan = BatchPlan(shard_of=index.shard_of, groups=groups, global_batch_size=ROWS_OF_A_BATCH, seed=0, stage=1)
    transform = train_transform(clip.preprocess_cfg, scale=(0.5, 1.0), horizontal_flip=0.5, jitter=(0.4, 0.4, 0.4, 0.1))
    loader = StoppingLoader(
        plan, Reader(index), transform=transform, tokenizer=None, num_views=2, most_steps=most_steps
    )
    with contextlib.suppress(StoppedError):
        fit(clip, loader, out=out, changes={"loss": "simclr", "optimizer": "sgd", "lr": 0.05, "steps": 12})
    return loader.rows, {name: tensor.numpy().tobytes() for name, tensor in clip.model.state_dict().items()}


def losses_of(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_stage_goes_on_at_any_number_of_processes(pool, tmp_path):
    """Stopped and gone on at 2 processes, bit for bit; from 2 to 1 to 4: the same batches, views and losses."""
    shards = write_shards(tmp_path / "shards")
    whole = {size: pool.run(run_stage, size, shards, tmp_path / f"whole-{size}") for size in (1, 2)}
    expected = losses_of(tmp_path / "whole-1")
    pool.run(run_stage, 2, shards, tmp_path / "stopped", SAVE + 1)
    resumed = pool.run(run_stage, 2, shards, tmp_path / "stopped")
    assert [weights for _, weights in resumed] == [weights for _, weights in whole[2]]
    assert losses_of(tmp_path / "stopped") == losses_of(tmp_path / "whole-2")
    rows = [row for parts in zip(*(rows for rows, _ in whole[2]), strict=True) for part in parts for row in part]
    assert rows == [row for batch in whole[1][0][0] for row in batch]
    for size, most_steps in ((2, SAVE), (1, SAVE), (4, math.inf)):
        pool.run(run_stage, size, shards, tmp_path / "moved", most_steps)
    for name in ("whole-2", "moved"):
        np.testing.assert_allclose(losses_of(tmp_path / name), expected, rtol=1e-5)
