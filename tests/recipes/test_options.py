"""Settings that change what a stage does, each for a few steps."""

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mcl_clip import MultistageCLIP, TowerConfig
from mcl_clip.config import AugmentConfig, ClusterConfig, EvalConfig
from mcl_clip.core.distributed import seed_of
from mcl_clip.core.errors import UserError
from mcl_clip.core.files import DONE, read_json
from mcl_clip.data import decode as decode_module
from mcl_clip.eval.datasets import open_set
from mcl_clip.model.clip import create_clip, save_clip
from mcl_clip.publish.export import Export, export_run
from mcl_clip.results.record import read_run
from mcl_clip.results.training import stage_rows
from mcl_clip.runs.phase import StaleArtifactError
from mcl_clip.train.optim import lr_at
from tests.recipes.runs import execute, records, steps, with_stages, write_shards

SHORT = {"steps": 4}


def trained(run, stage=0):
    return load_file(run / f"stage-{stage}/train/model/open_clip_model.safetensors")


def random_draw(model_cfg, number):
    """The weights of the recipe's draw `number`."""
    return create_clip(model_cfg=model_cfg, seed=seed_of(0, "tower", number)).model.state_dict()


def moved(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_evaluation_inside_a_stage(recipe):
    run = execute(with_stages(recipe, SHORT), "--eval.every-steps", "2")
    evaluated = [r for r in records(run / "stage-0/train/metrics.jsonl") if "colours/acc1" in r]
    assert [record["step"] for record in evaluated] == [2]
    assert {"retrieval/mean_recall@1", "colours/linear_acc1"} <= evaluated[0].keys()
    without = execute(replace(with_stages(recipe, SHORT), run_dir=run.with_name("without")))
    assert not moved(trained(run), trained(without))  # looking changes nothing


def test_a_running_average_is_what_is_evaluated_and_kept(recipe):
    run = execute(with_stages(recipe, {**SHORT, "average_decay": 0.9}), "--eval.every-steps", "2")
    newest = run / "stage-0/train/checkpoints/step-000000004"
    weights, average = load_file(newest / "model.safetensors"), load_file(newest / "average.safetensors")
    assert not moved(average, trained(run))
    assert "visual.proj" in moved(weights, trained(run))
    without = execute(replace(with_stages(recipe, SHORT), run_dir=run.with_name("without")))
    assert not moved(weights, trained(without))  # nor does averaging change the training


def test_similar_rows_are_masked_under_the_model_before(recipe, tmp_path):
    """In stage 0 that is the pretrained model, whose features are removed when they are no longer needed."""
    save_clip(create_clip(model_cfg=recipe.tower.model, seed=5), tmp_path / "base")
    pretrained = replace(recipe, tower=TowerConfig(architecture=f"local-dir:{tmp_path / 'base'}"))
    run = execute(with_stages(pretrained, *[{**SHORT, "mask_similar": 0.5}] * 2))
    for stage in (0, 1):
        assert sum(record["similar"] for record in records(run / f"stage-{stage}/train/metrics.jsonl")) > 0
    assert not (run / "stage-0/train/base").exists()
    assert not list((run / "index").glob("similarity*"))
    with pytest.raises(
        UserError, match=r"--stages\.0\.train\.mask-similar 0\.5 compares .* random weights here; use it in"
    ):
        execute(with_stages(recipe, {**SHORT, "mask_similar": 0.5}))


def test_the_sigmoid_loss(recipe):
    model = {**recipe.tower.model, "init_logit_bias": -10.0, "init_logit_scale": 2.3}
    run = execute(with_stages(replace(recipe, tower=TowerConfig(model=model)), {**SHORT, "loss": "siglip"}))
    assert "logit_bias" in moved(random_draw(model, 0), trained(run))
    bias = read_json(run / "combined/combination.json")["logit_bias"]
    assert MultistageCLIP.load(run / "combined/model").logit_bias.item() == pytest.approx(bias)


def test_learning_rates_by_layer_decay_by_name_and_a_clipped_gradient(recipe):
    change = {"lr_multipliers": {"^visual": 0.0}, "weight_decays": {"^token_": 0.5}, "max_grad_norm": 0.1}
    changed = with_stages(recipe, {**SHORT, **change})
    before, after = random_draw(recipe.tower.model, 0), trained(execute(changed))
    names = moved(before, after)
    assert "text_projection" in names
    assert not [name for name in names if name.startswith("visual.")]
    # A token that no caption has is decayed and has no gradient, and nearly all tokens are like that.
    shrunk = math.prod(1 - 0.5 * lr_at(step, changed.stages[0].train) for step in range(4))
    ratio = after["token_embedding.weight"].double() / before["token_embedding.weight"].double()
    assert shrunk < 0.999
    assert float(ratio.median()) == pytest.approx(shrunk, rel=1e-6)


def test_clusters_of_both_sides(recipe):
    both = ClusterConfig(num_clusters=3, on="product", text_clusters=2, num_starts=1)
    run = execute(with_stages(recipe, {**SHORT, "cluster": both}, SHORT))
    assert read_json(run / "stage-0/labels/labels.json")["radix"] == [3, 2]
    assert read_json(run / "stage-1/labels/labels.json")["radix"] == [3, 2, 3]
    image, text, labels = (
        np.load(run / "stage-0" / name)
        for name in ("cluster/assignments-image.npy", "cluster/assignments-text.npy", "labels/labels.npy")
    )
    assert np.array_equal(labels, 2 * image + text)


def test_clusters_of_texts(recipe):
    run = execute(with_stages(recipe, {**SHORT, "cluster": ClusterConfig(num_clusters=2, on="text")}))
    assert read_json(run / "stage-0/labels/labels.json")["radix"] == [2]
    metrics = [record["metrics"] for record in records(run / "stage-0/eval/results.jsonl")]
    assert not any("cluster_nmi" in metric for metric in metrics)  # pictures have no cluster


def test_where_stages_start(recipe):
    still = {**SHORT, "lr": 1e-9}
    run = execute(with_stages(recipe, SHORT, {**still, "start": "scratch"}, {**still, "start": "base"}, still))
    scratch, base, previous = (trained(run, stage) for stage in (1, 2, 3))
    for start, end in (
        (random_draw(recipe.tower.model, 1), scratch),
        (trained(run, 0), base),
        (trained(run, 2), previous),
    ):
        assert all(torch.allclose(start[name], end[name], atol=1e-6) for name in start)
    assert not torch.allclose(scratch["visual.proj"], base["visual.proj"], atol=1e-3)


@pytest.mark.parametrize(
    "change",
    [
        {"augment": AugmentConfig(scale=(0.3, 1.0), horizontal_flip=0.5)},
        {"precision": "bf16"},
        {"window_shards": 1, "run_rows": 2, "mask_duplicates": False, "schedule": "constant"},
    ],
    ids=["augmentation", "bfloat16", "windows and duplicates"],
)
def test_a_setting_changes_the_result(recipe, change, finished):
    run = execute(with_stages(recipe, {**SHORT, **change}))
    losses, usual = (
        [record["loss"] for record in records(of / "stage-0/train/metrics.jsonl")][:4] for of in (run, finished)
    )
    assert np.isfinite(losses).all()
    assert losses != usual
    assert (run / "combined" / DONE).exists()


def test_a_weighted_mixture(recipe, tmp_path, path):
    other = write_shards(tmp_path / "other", rows=60, per_shard=30)
    lists = ("--data.train", str(path.parent / "shards"), str(other), "--data.weights")
    run = execute(with_stages(recipe, SHORT), *lists, "0.5", "2")
    rows = read_json(run / "stage-0/train/groups.json")["epoch_0"]["rows"]
    assert abs(rows - (0.5 * 200 + 2 * 60)) <= 2 * recipe.data.holdout_rows
    with pytest.raises(StaleArtifactError, match=r"data.weights was \[0.5, 2.*\] and is now \[1.*, 1.*\]"):
        execute(with_stages(recipe, SHORT), *lists, "1", "1")


def test_best_takes_the_combination_with_the_lower_loss(recipe):
    run = execute(with_stages(recipe, SHORT, SHORT), "--combine", "best")
    chosen = read_json(run / "combined/combination.json")
    assert chosen["losses"].keys() == {"concat", "mean_cosine"}
    assert chosen["combine"] == min(chosen["losses"], key=chosen["losses"].get)
    assert MultistageCLIP.load(run / "combined/model").combine == chosen["combine"]


def test_weights_of_the_stages_are_stored_scored_and_exported(recipe, tmp_path):
    run = execute(with_stages(recipe, SHORT, {**SHORT, "start": "scratch"}), "--combine", "weighted")
    weights = read_json(run / "combined/combination.json")["weights"]
    assert (sum(weights), min(weights) > 0) == (pytest.approx(1), True)
    stored = [load_file(run / f"stage-{s}/eval/features-colours.safetensors") for s in range(2)]
    joined = [
        torch.cat([w**0.5 * torch.nn.functional.normalize(of[side]) for w, of in zip(weights, stored, strict=True)], 1)
        for side in ("image", "text")
    ]
    expected = open_set(Path(recipe.eval.classification[0]), "colours").score(*joined)[0]
    (record,) = [r for r in records(run / "combined/results.jsonl") if r["dataset"] == "colours"]
    assert record["combine"] == "weighted"
    assert record["metrics"]["acc1"] == pytest.approx(expected["acc1"])
    assert {"mcl_clip", "open_clip", "transformers"} == export_run(run, tmp_path / "exported", Export()).keys()
    assert MultistageCLIP.load(tmp_path / "exported").weights == weights
    card = (tmp_path / "exported/README.md").read_text()
    assert f"weighted mean of the cosine similarities of all stages ({weights[0]:.2f}, {weights[1]:.2f})" in card


def test_a_run_without_evaluation_sets(recipe):
    nothing = replace(recipe.eval, retrieval=(), classification=())
    run = execute(replace(with_stages(recipe, SHORT), eval=nothing))
    assert (run / "combined/results.jsonl").read_text() == ""
    assert (run / "combined" / DONE).exists()


def test_two_sets_of_one_name_are_refused(recipe, path):
    colours = str(path.parent / "colours")
    with pytest.raises(UserError, match="two evaluation sets are both called colours; write NAME=FOLDER"):
        execute(recipe, "--eval.classification", colours, colours)
    with pytest.raises(UserError, match="two evaluation sets are both called retrieval"):
        execute(recipe, "--eval.classification", f"retrieval={colours}")


def groups_of(run, stage):
    return read_json(run / f"stage-{stage}/train/groups.json")


def test_controls_differ_from_the_stages_in_one_thing(recipe, tmp_path):
    def control(name):
        return execute(replace(recipe, run_dir=tmp_path / name), "--control", name)

    runs = {name: control(name) for name in ("none", "no-groups", "random-groups", "ensemble", "single", "ifm")}
    for name in ("no-groups", "random-groups", "ensemble"):  # the same stage 0; other weights after it
        assert not moved(trained(runs["none"]), trained(runs[name]))
        assert moved(trained(runs["none"], 1), trained(runs[name], 1))
    real, none, drawn = (groups_of(runs[name], 1) for name in ("none", "no-groups", "random-groups"))
    assert real["num_groups"] > 1
    assert (none["num_groups"], none["assignment"]) == (1, "none")
    assert drawn["groups"] == real["groups"]
    assert drawn["assignment"] == "random"
    assert read_json(runs["ensemble"] / "config.json")["stages"][1]["start"] == "scratch"
    for name in ("single", "ifm"):
        assert not (runs[name] / "stage-1").exists()
        assert steps(runs[name], 0)[-1] == 24  # 2 x 8 steps, and 2 x 200 rows forward: 16 + 400 / 3 / 16
    assert moved(trained(runs["single"]), trained(runs["ifm"]))


def test_clusters_in_the_shared_metric_are_stored_with_what_is_needed_to_assign_more(recipe):
    shared = ClusterConfig(num_clusters=3, metric="shared", num_starts=1)
    run = execute(with_stages(recipe, {**SHORT, "cluster": shared}))
    stored = load_file(run / "stage-0/cluster/centroids.safetensors")
    assert {name: tuple(array.shape) for name, array in stored.items()} == {
        "image": (3, 16), "image.mean": (16,), "image.matrix": (16, 16)
    }  # fmt: skip
    features = load_file(run / "stage-0/embed/part-000000.safetensors")["image"]
    moved = (features.double() - stored["image.mean"].double()) @ stored["image.matrix"].double()
    nearest = (torch.nn.functional.normalize(moved) @ stored["image"].double().T).argmax(1)
    assigned = np.load(run / "stage-0/cluster/assignments-image.npy")[: len(features)]
    assert (nearest.numpy() == assigned).mean() > 0.97  # but for rounding to float16


def test_the_output_says_whether_anything_is_suppressed(recipe, caplog):
    with caplog.at_level("INFO", logger="mcl_clip"):
        execute(with_stages(recipe, SHORT))
    assert "stage 0: still learning (loss" in caplog.text


@pytest.mark.parametrize("behavior", ["0.6", "0.7"])
def test_images_are_read_as_the_run_was_begun(recipe, behavior, monkeypatch):
    read = []
    decode = decode_module.decode_image
    monkeypatch.setattr(
        decode_module, "decode_image", lambda data, **options: read.append(options["legacy"]) or decode(data, **options)
    )
    execute(replace(with_stages(recipe, {"steps": 1}), behavior=behavior, eval=EvalConfig()))
    assert len(read) > 200  # the rows that were trained on, and all that were embedded
    assert set(read) == {behavior == "0.6"}


def test_a_stage_keeps_its_best_weights_by_an_evaluation_set(recipe):
    """With a learning rate of 0 nothing improves, so the first weights are kept and patience ends the stage."""
    recipe = with_stages(recipe, {"keep_best": "colours", "patience": 2, "lr": 0.0})
    run = execute(replace(recipe, eval=replace(recipe.eval, every_steps=2)))
    best = read_json(run / "stage-0/train/best.json")
    assert best == {"metric": "colours/acc1", "step": 0, "value": best["value"], "last_step": 4}
    assert not moved(random_draw(recipe.tower.model, 0), trained(run))
    assert ["weights kept", f"step 0, colours/acc1 {best['value']:.4g}; stopped at 4"] in stage_rows(read_run(run))
    with pytest.raises(StaleArtifactError, match=r"chosen_on.every_steps was 2 and is now 4"):
        execute(replace(recipe, eval=replace(recipe.eval, every_steps=4)))


@pytest.mark.parametrize(
    ("changes", "every_steps", "message"),
    [
        ({"keep_best": "val:acc1"}, 2, "--stages.0.train.keep-best val:acc1 names no evaluation set; there are "
         "retrieval, colours, and --eval.sets val=FOLDER adds one"),
        ({"keep_best": "colours"}, 0, "--stages.0.train.keep-best colours needs evaluations inside the stage; add "
         "--eval.every-steps N"),
    ],
)  # fmt: skip
def test_what_cannot_be_kept_is_refused(recipe, changes, every_steps, message):
    recipe = with_stages(recipe, changes)
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        execute(replace(recipe, eval=replace(recipe.eval, every_steps=every_steps)))
    assert not recipe.run_dir.exists()


def test_patience_needs_a_metric(recipe):
    with pytest.raises(UserError, match=r"--stages.K.train.patience 3 needs a metric that should improve"):
        with_stages(recipe, {"patience": 3})
