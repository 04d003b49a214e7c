import math

import pytest
import torch

from mcl_clip.core.distributed import seed_of
from mcl_clip.core.files import read_jsonl
from mcl_clip.train import loop
from mcl_clip.train.loop import TrainingDivergedError, clamp_logit_scale_
from tests import training


class Scaled(torch.nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.logit_scale = torch.nn.Parameter(torch.tensor(math.log(scale)))


@pytest.mark.parametrize(("scale", "kept"), [(117.3, 100), (0.5, 1), (14.3, 14.3)])
def test_the_temperature_is_clamped_where_it_trains(scale, kept):
    model = Scaled(scale)
    clamp_logit_scale_(model)
    assert float(model.logit_scale.detach().exp()) == pytest.approx(kept)
    locked = Scaled(scale)
    locked.logit_scale.requires_grad_(False)
    clamp_logit_scale_(locked)
    assert float(locked.logit_scale.exp()) == pytest.approx(scale)


@pytest.mark.parametrize(("loss", "low", "high"), [("clip", 99, 100.001), ("siglip", 116, 118)])
def test_only_the_loss_of_clip_limits_the_temperature(tmp_path, loss, low, high):
    shards = training.write_shards(tmp_path / "shards")
    changes = {"loss": loss, "lr": 1e-5, "average_decay": 0}
    make_loader, clip = training.parts(shards, model={"init_logit_bias": -10, "init_logit_scale": math.log(117.3)})
    if loss == "siglip":
        clip.model.register_forward_hook(lambda _, __, out: {**out, "logit_bias": out["logit_bias"] * 1})
    training.fit(clip, make_loader(most_steps=3), out=tmp_path / "out", changes=changes, max_steps=2)
    assert low < float(clip.model.logit_scale.detach().exp()) < high


def test_a_diverged_run_names_a_checkpoint_only_if_there_is_one(tmp_path):
    shards = training.write_shards(tmp_path / "shards")
    make_loader, clip = training.parts(shards)
    clip.model.visual.proj.data.fill_(torch.nan)
    with pytest.raises(TrainingDivergedError, match=r"the loss is nan .*; no checkpoint was saved yet. Use a lower"):
        training.fit(clip, make_loader(most_steps=3), out=tmp_path / "out", max_steps=2)
    (tmp_path / "out/checkpoints").mkdir()
    with pytest.raises(
        TrainingDivergedError, match=f"the last good checkpoint is in {tmp_path / 'out/checkpoints'}. Use"
    ):
        training.fit(clip, make_loader(most_steps=3), out=tmp_path / "out", max_steps=2)


@pytest.mark.parametrize("max_grad_norm", [None, 1e-3])
def test_the_optimizer_gets_the_clipped_gradient(tmp_path, monkeypatch, max_grad_norm):
    norms, step = [], torch.optim.AdamW.step

    def noted(optimizer, *arguments):
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms.append(float(torch.nn.utils.get_total_norm(gradients)))
        return step(optimizer, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    make_loader, clip = training.parts(training.write_shards(tmp_path / "shards"))
    changes = {"max_grad_norm": max_grad_norm}
    training.fit(clip, make_loader(most_steps=3), out=tmp_path / "out", changes=changes, max_steps=2)
    logged = [record["grad_norm"] for record in read_jsonl(tmp_path / "out/metrics.jsonl")]
    assert min(logged) > 1e-2  # the log has the norm before it is clipped
    assert norms == pytest.approx([max_grad_norm] * 2 if max_grad_norm else logged, rel=1e-3)


def seeds_of_dropout(shards, out) -> list[str]:
    names = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "seed_of", lambda *name: names.append(name) or seed_of(*name))
        training.train(shards, out, most_steps=2)
    return names


def test_the_seed_of_dropout_names_stage_step_process_and_chunk(pool, tmp_path):
    shards = training.write_shards(tmp_path / "shards")
    assert pool.run(seeds_of_dropout, 2, shards, tmp_path / "out") == [
        [(0, 1, "dropout", step, rank, 0) for step in range(2)] for rank in range(2)
    ]
