import math

import pytest
import torch

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
