"""Losses and gradients at any number of processes against a full-batch reference."""

from functools import cache
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, normalize
from torch.nn.parallel import DistributedDataParallel

from mcl_clip.config import TrainConfig
from mcl_clip.core.distributed import all_reduce_sum, rank, world_size
from mcl_clip.data.batch_plan import FILLER, BatchPlan
from mcl_clip.data.batches import PairBatch
from mcl_clip.train.loop import forward_backward
from mcl_clip.train.metrics import Meter

BATCH, CHECKED_GRADIENTS = 8, 20
CFG = {"mean": (0.5, 0.4, 0.3), "std": (0.3, 0.2, 0.25)}
CPU = torch.device("cpu")


class Case(NamedTuple):
    """Fields of `TrainConfig`, and the number of steps that are compared."""

    loss: str = "clip"
    mask_duplicates: bool = True
    min_negatives: int = 1
    ifm_epsilon: float = 0.0
    own_group_share: float = 1.0
    negative_captions: int = 0
    mask_similar: float = 0.0
    groups: str = "labels"
    steps: int = 20

    def __str__(self) -> str:
        changed = {name: value for name, value in self._asdict().items() if value != self._field_defaults[name]}
        return " ".join([self.loss, *(f"{name} {value}" for name, value in changed.items() if name != "loss")])


CASES = [
    Case("clip", steps=100),
    Case("siglip", mask_duplicates=False, steps=100),
    Case("clip", mask_duplicates=False, min_negatives=3),
    Case("siglip", min_negatives=3),
    Case("clip", ifm_epsilon=0.1),
    Case("siglip", ifm_epsilon=0.1),
    Case("clip", min_negatives=3, own_group_share=0.7),
    Case("siglip", ifm_epsilon=0.1, own_group_share=0.7),
    Case("clip", negative_captions=2),
    Case("siglip", ifm_epsilon=0.1, negative_captions=2),
    Case("clip", mask_similar=0.25, own_group_share=0.7),
    Case("siglip", mask_similar=0.25, mask_duplicates=False, min_negatives=3),
    Case("clip", groups="others", own_group_share=0.7, min_negatives=5),
    Case("siglip", groups="others", mask_duplicates=False),
]


class Towers(nn.Module):
    def __init__(self, loss: str) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.image, self.text = nn.Linear(12, 6), nn.Embedding(50, 6)
        self.logit_scale = nn.Parameter(torch.tensor(np.log(1 / 0.07)))
        self.logit_bias = nn.Parameter(torch.tensor(-5.0)) if loss == "siglip" else None

    def forward(self, images: Tensor, tokens: Tensor) -> dict[str, Tensor | None]:
        return {
            "image_features": normalize(self.image(images.flatten(1).to(self.image.weight.dtype)), dim=1),
            "text_features": normalize(self.text(tokens).sum(1), dim=1),
            "logit_scale": self.logit_scale.exp(),
            "logit_bias": self.logit_bias,
        }


class Data:
    """61 rows in groups of 24, 20, 10 and 7: batches of one group and packed ones, the last with three fillers."""

    def __init__(self, negative_captions: int = 0, *, mixes_groups: bool = False) -> None:
        draw = np.random.default_rng(0)
        self.groups = np.repeat([0, 1, 2, 3], [24, 20, 10, 7])[draw.permutation(61)]
        self.images = torch.from_numpy(draw.integers(0, 256, (61, 3, 2, 2), np.uint8))
        self.tokens = torch.from_numpy(draw.integers(0, 50, (61, 4)))
        self.text_ids, self.image_ids = torch.arange(61) // 5, (torch.arange(61) * 7) % 59  # some are equal
        self.bad = [int(np.flatnonzero(self.groups == 1)[3]), int(np.flatnonzero(self.groups == 3)[0])]
        planned = 0 * self.groups if mixes_groups else self.groups
        plan = BatchPlan(shard_of=np.zeros(61, np.int64), groups=planned, global_batch_size=BATCH, seed=0, stage=1)
        rows = torch.tensor(np.stack([plan.batch(step) for step in range(200)]))
        self.rows = rows.where(~torch.isin(rows, torch.tensor(self.bad)), FILLER)

        self.similar_by = normalize(torch.from_numpy(draw.standard_normal((61, 5))), dim=1).half().numpy()
        self.negative_captions = negative_captions
        self.wrong = torch.from_numpy(draw.integers(0, 50, (61, 2, 4)))
        self.is_wrong = torch.from_numpy(draw.random((61, 2)) < 0.7)  # some rows have one, some none

    def batch(self, step: int) -> PairBatch:
        local = BATCH // world_size()
        rows = self.rows[step, rank() * local : (rank() + 1) * local]
        places = (rows != FILLER).nonzero()[:, 0]
        is_empty = not len(places)
        kept = rows[places]
        return PairBatch(
            step=step,
            rows=rows,
            text_ids=self.text_ids[rows],
            image_ids=self.image_ids[rows],
            images=torch.zeros(1, 3, 2, 2, dtype=torch.uint8) if is_empty else self.images[kept],
            tokens=torch.zeros(1, 4, dtype=torch.int64) if is_empty else self.tokens[kept],
            places=torch.tensor([0]) if is_empty else places,
            **self.wrong_captions(kept) if self.negative_captions else {},
            bad=(),
        )

    def wrong_captions(self, rows: Tensor) -> dict[str, Tensor]:
        if not len(rows):
            return {"negative_tokens": self.wrong[:1], "is_negative": torch.zeros(1, 2, dtype=torch.bool)}
        return {"negative_tokens": self.wrong[rows], "is_negative": self.is_wrong[rows]}


def make(loss: str, dtype: torch.dtype) -> tuple[Towers, torch.optim.Optimizer]:
    model = Towers(loss).to(dtype)
    return model, torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-3)


def add_gradients(model: nn.Module, data: Data, step: int, seed: tuple = (), **options) -> dict[str, Tensor]:
    """A step of the loop up to the gradients, with these fields of `TrainConfig`."""
    config = TrainConfig(**{"steps": 200, "global_batch_size": BATCH, "lr": 0.01, **options})
    return forward_backward(
        model, data.batch(step), groups=data.groups, preprocess_cfg=CFG, config=config, device=CPU, seed=seed,
        similar_by=data.similar_by if config.mask_similar else None,
    )  # fmt: skip


def gradients(model: Towers) -> dict[str, np.ndarray]:
    return {name: p.grad.double().numpy().copy() for name, p in model.named_parameters()}


def train(case: Case, dtype: torch.dtype, chunks: tuple = (0, 0)) -> tuple[list, list, dict]:
    """Loss of each step, gradients of the first ones, the weights at the end; `chunks` of the towers and the loss."""
    data, (raw, optimizer) = Data(case.negative_captions, mixes_groups=case.groups == "others"), make(case.loss, dtype)
    model = DistributedDataParallel(raw) if world_size() > 1 else raw
    options = {**case._asdict(), "grad_cache_rows": chunks[0], "loss_chunk_rows": chunks[1]}
    losses, grads = [], []
    for step in range(case.steps):
        counts = add_gradients(model, data, step, **options)
        losses.append(float(all_reduce_sum(counts["loss"].detach().clone())) / world_size())
        weights, of_rows = counts["row_weights"].double(), counts["row_losses"].double()
        total, weight = all_reduce_sum(torch.stack([(of_rows * weights).sum(), weights.sum()])).tolist()
        # The mean over rows is the loss; in a mixture it is the part within groups.
        assert abs(total / max(1, weight) - losses[-1]) < 1e-5 or case.own_group_share < 1
        grads += [gradients(raw)] if step < CHECKED_GRADIENTS else []
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return losses, grads, {name: p.detach().numpy() for name, p in raw.named_parameters()}


def reference_loss(model: Towers, data: Data, rows: list[int], case: Case, *, across_groups: bool = False) -> Tensor:
    """The published losses, row by row, over the rows that are left when fillers are dropped."""
    if case.own_group_share < 1:
        alone, share = case._replace(own_group_share=1), case.own_group_share
        parts = [reference_loss(model, data, rows, alone, across_groups=across) for across in (False, True)]
        return share * parts[0] + (1 - share) * parts[1]
    if case.ifm_epsilon:  # implicit feature modification: half the loss, half the loss of moved cosines
        plain, moved = (
            reference_loss(_Moved(model, step), data, rows, case._replace(ifm_epsilon=0), across_groups=across_groups)
            for step in (0, case.ifm_epsilon)
        )
        return (plain + moved) / 2
    mean, std = torch.tensor(CFG["mean"]).view(3, 1, 1), torch.tensor(CFG["std"]).view(3, 1, 1)
    out = model((data.images[rows].float() / 255 - mean) / std, data.tokens[rows])
    cosines = out["image_features"] @ out["text_features"].T
    shift = out.get("shift", 0)
    wrong = []  # logits of the wrong captions of each row
    for i, row in enumerate(rows):
        tokens = data.wrong[row][data.is_wrong[row]][: 2 * case.negative_captions]
        features = model(data.images[rows].float(), tokens)["text_features"]
        wrong.append(out["logit_scale"] * (features @ out["image_features"][i] + shift))
    cosines = cosines + shift - 2 * shift * torch.eye(len(rows), dtype=cosines.dtype)
    logits, losses = out["logit_scale"] * cosines, []
    for i, row in enumerate(rows):
        among = data.groups * (not across_groups)
        is_of_others = case.groups == "others" and not across_groups
        others = [j for j, other in enumerate(rows) if j != i and (among[row] == among[other]) != is_of_others]
        alike = [j for j in others for ids in (data.text_ids, data.image_ids) if ids[row] == ids[rows[j]]]
        negatives = [j for j in others if not (case.mask_duplicates and j in alike)]
        close = data.similar_by[rows].astype(np.float64) @ data.similar_by[row].astype(np.float64)
        negatives = [j for j in negatives if not (case.mask_similar and close[j] > case.mask_similar)]
        if len(negatives) < case.min_negatives:
            continue
        if case.loss == "siglip":
            terms = [logsigmoid(-logit - out["logit_bias"]) for logit in (*logits[i, negatives], *wrong[i])]
            losses.append(-logsigmoid(logits[i, i] + out["logit_bias"]) - sum(terms))
        else:
            among = [i, *negatives]
            to_texts = torch.cat([logits[i, among], wrong[i]])
            losses.append((to_texts.logsumexp(0) + logits[among, i].logsumexp(0)) / 2 - logits[i, i])
    return torch.stack(losses).mean() if losses else sum((0 * p).sum() for p in model.parameters())


class _Moved(nn.Module):
    """A model whose cosines are lower by `shift` for pairs and higher for all others."""

    def __init__(self, model: Towers, shift: float) -> None:
        super().__init__()
        self.model, self.shift = model, shift

    def forward(self, *inputs: Tensor) -> dict[str, Tensor | float | None]:
        return {**self.model(*inputs), "shift": self.shift}


@cache
def reference(case: Case) -> tuple[list, list, dict]:
    data = Data(case.negative_captions, mixes_groups=case.groups == "others")
    model, optimizer = make(case.loss, torch.float64)
    losses, grads = [], []
    for step in range(case.steps):
        rows = [row for row in data.rows[step].tolist() if row >= 0]
        value = reference_loss(model, data, rows, case)
        value.backward()
        losses.append(float(value.detach()))
        grads += [gradients(model)] if step < CHECKED_GRADIENTS else []
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return losses, grads, {name: p.detach().numpy() for name, p in model.named_parameters()}


def assert_close(found: tuple, expected: tuple, tolerance: float, steps: int) -> None:
    np.testing.assert_allclose(found[0][:steps], expected[0][:steps], rtol=tolerance, atol=tolerance)
    for step, (mine, theirs) in enumerate(zip(found[1], expected[1], strict=True)):
        for name in theirs:
            np.testing.assert_allclose(
                mine[name], theirs[name], atol=tolerance, rtol=tolerance, err_msg=f"{step} {name}"
            )


@pytest.mark.parametrize(  # the shorter cases at 4 processes are compared in chunks, below
    ("size", "case"),
    [(size, case) for case in CASES for size in (1, 2, 4) if size < 4 or case in CASES[:2]],
    ids=str,
)
def test_training_equals_the_full_batch_reference(pool, size, case):
    expected = reference(case)
    doubles = pool.run(train, size, case, torch.float64)
    for found in doubles:
        assert_close(found, expected, 1e-9, case.steps)
        for name, weight in expected[2].items():
            np.testing.assert_allclose(found[2][name], weight, rtol=1e-9, atol=1e-9)


def spreads(chunk_rows: int) -> list[dict[str, float]]:
    """The loss by group at two records of ten steps."""
    data, (model, _) = Data(), make("clip", torch.float64)
    meter, found = Meter(("loss",), CPU, num_groups=4), []
    for step in range(20):
        counts = add_gradients(model, data, step, loss_chunk_rows=chunk_rows)
        meter.add(counts)
        found += [meter.take()[1]] if step % 10 == 9 else []
    return found


@pytest.mark.parametrize("chunk_rows", [0, 1])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_loss_by_group_is_the_same_at_any_number_of_processes(pool, size, chunk_rows):
    expected = spreads(0)
    assert expected[0]["p10"] < expected[0]["p50"] < expected[0]["p90"]
    for found in pool.run(spreads, size, chunk_rows):
        for mine, theirs in zip(found, expected, strict=True):
            assert mine == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize(("size", "chunks"), [(1, (1, 3)), (2, (3, 1)), (4, (1, 3))])  # rows of towers and of the loss
@pytest.mark.parametrize("case", CASES[2:], ids=str)
def test_in_chunks_it_equals_the_reference_too(pool, size, case, chunks):
    for found in pool.run(train, size, case, torch.float64, chunks):
        assert_close(found, reference(case), 1e-9, case.steps)


@pytest.mark.parametrize("loss", ["clip", "siglip"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_first_steps_in_float32_equal_the_reference(pool, size, loss):
    for found in pool.run(train, size, Case(loss), torch.float32):
        assert_close(found, reference(Case(loss)), 1e-5, 20)


def test_the_batches_are_of_every_kind():
    """What the comparisons above are worth: whole and packed batches, fillers, bad rows, duplicates, a lonely rank."""
    data = Data()
    kept = [[row for row in rows if row >= 0] for rows in data.rows[:8].tolist()]
    assert {len({data.groups[row] for row in rows}) for rows in kept} >= {1, 2}
    assert sorted(map(len, kept))[0] < BATCH - 2
    assert any((rows[-2:] == FILLER).all() for rows in data.rows[:8])  # a rank of 4 holds only fillers
    assert any(((rows[:-1] == FILLER) & (rows[1:] != FILLER)).any() for rows in data.rows)  # a bad row in the middle
    duplicates = [len(rows) - len({int(data.text_ids[row]) for row in rows}) for rows in kept]
    assert max(duplicates) >= 2
    changes = [
        {"min_negatives": 3},
        {"mask_duplicates": False},
        {"ifm_epsilon": 0.1},
        {"own_group_share": 0.7},
        {"negative_captions": 2},
        {"groups": "others"},
    ]
    losses = [reference(Case("siglip")._replace(**change))[0] for change in [{}, *changes]]
    assert len({tuple(of_one) for of_one in losses}) == len(losses)  # each of the settings matters here


@pytest.mark.parametrize("loss", ["clip", "siglip"])
@pytest.mark.parametrize("rows", [0, 1])
def test_a_batch_of_fillers_alone_has_a_loss_and_gradients_of_zero(loss, rows):
    data, (model, _) = Data(), make(loss, torch.float64)
    data.rows = torch.full((1, BATCH), FILLER)
    counts = add_gradients(model, data, 0, loss=loss, grad_cache_rows=rows, loss_chunk_rows=rows)
    assert float(counts["loss"].detach()) == 0
    assert not counts["rows"]
    assert not counts["weight"]
    assert all(not gradient.any() for gradient in gradients(model).values())
