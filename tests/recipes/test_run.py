"""A run from shards to the multistage model: what it leaves, run again, changed, and on two processes."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mcl_clip import AugmentConfig, MultistageCLIP
from mcl_clip.cli.commands import command
from mcl_clip.core.errors import UserError
from mcl_clip.core.files import DONE, read_json
from mcl_clip.data.batch_plan import BatchPlan
from mcl_clip.model.clip import load_clip
from mcl_clip.runs import pipeline, train_phase
from mcl_clip.runs.phase import StaleArtifactError
from tests.recipes.runs import (
    REPOSITORY,
    execute,
    files,
    records,
    steps,
    write_shards,
)

TRAIN_FILES = {
    "DONE.json",
    "groups.json",
    "metrics.jsonl",
    "model/open_clip_config.json",
    "model/open_clip_model.safetensors",
}


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads the maps of this process")
def test_nothing_is_mapped_when_it_is_deleted(recipe, monkeypatch):
    """A network file system would keep it, under another name, and its folder with it."""
    remove, removed, mapped = shutil.rmtree, [], []

    def look(path, **options):
        removed.append(Path(path).name)
        mapped.extend(line for line in Path("/proc/self/maps").read_text().splitlines() if f"{path}/" in line)
        remove(path, **options)

    monkeypatch.setattr(shutil, "rmtree", look)
    execute(recipe, "--num-stages", "1", "--machine.keep-checkpoints", "1")
    assert {"work", ".step-000000003.tmp"} <= {*removed}
    assert mapped == []


def test_all_artefacts_are_there(finished):
    assert {item.name for item in finished.iterdir()} == {
        "config.json", "launches.jsonl", "index", "stage-0", "stage-1", "combined"
    }  # fmt: skip
    for stage in (0, 1):
        folder = finished / f"stage-{stage}"
        assert {item.name for item in folder.iterdir()} == {"train", "embed", "cluster", "labels", "eval"}
        assert files(folder / "train").keys() >= TRAIN_FILES
        assert len(list((folder / "train/checkpoints").iterdir())) == 2
        assert len(list((folder / "embed").glob("part-*.safetensors"))) == 4
        assert files(folder / "cluster").keys() >= {"centroids.safetensors", "assignments-image.npy", "trace.json"}
        assert steps(finished, stage) == list(range(1, 9))
        made = [folder / name for name in ("train", "embed", "cluster", "labels", "eval")]
        assert all((phase / DONE).exists() for phase in made)
    assert not list(finished.rglob("*.tmp*"))
    assert not (finished / "lock").exists()


def test_a_stage_with_its_plan_on_disk_is_the_same_and_leaves_no_plan(finished, recipe, monkeypatch):
    plans = []
    monkeypatch.setattr(
        train_phase, "BatchPlan", lambda **options: plans.append(BatchPlan(**options, rows_in_memory=1)) or plans[-1]
    )
    run = execute(recipe, "--num-stages", "1")
    assert len(plans) == 1
    assert [path.name for path in (run / "index").iterdir()] == ["index.arrow"]
    weights = [of / "stage-0/train/model/open_clip_model.safetensors" for of in (run, finished)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_labels_refine_from_stage_to_stage(finished):
    first, second = (np.load(finished / f"stage-{s}/labels/labels.npy") for s in (0, 1))
    assert first.shape == (200,)
    assert np.array_equal(second // 3, first)
    assert read_json(finished / "stage-1/labels/labels.json")["radix"] == [3, 3]


def test_results_are_there_for_each_stage_and_combination(finished):
    names = [r["pretrained"] for folder in ("stage-0/eval", "stage-1/eval", "combined")
             for r in records(finished / folder / "results.jsonl") if r["dataset"] == "retrieval"]  # fmt: skip
    assert names == [f"run/{name}" for name in
                     ("stage-0", "stage-1", "stages-0-1-concat", "stages-0-1-mean_cosine", "combined")]  # fmt: skip


def test_every_figure_has_an_interval_and_the_outcomes_that_it_is_the_mean_of(finished):
    for folder in ("stage-0/eval", "stage-1/eval", "combined"):
        for record in records(finished / folder / "results.jsonl"):
            with np.load(finished / folder / record["outcomes"]) as outcomes:
                for metric, (low, high) in record["ci95"].items():
                    assert outcomes[metric].mean() == pytest.approx(record["metrics"][metric], abs=1e-6)
                    assert low <= record["metrics"][metric] <= high
            assert record["main_metric"] in record["ci95"]


def test_several_stages_are_also_read_out_at_the_width_of_one(finished):
    found = {r["pretrained"].split("/")[1]: r["metrics"] for folder in ("stage-1/eval", "combined")
             for r in records(finished / folder / "results.jsonl") if r["dataset"] == "colours"}  # fmt: skip
    assert "linear_acc1_width_16" not in found["stage-1"]
    assert 0 <= found["combined"]["linear_acc1_width_16"] <= 1


def test_the_model_loads_and_gives_the_stored_features(finished):
    model = MultistageCLIP.load(finished / "combined/model")
    assert model.combine == "concat"
    assert model.logit_scale.item() == pytest.approx(read_json(finished / "combined/combination.json")["logit_scale"])
    texts = model.tokenizer(["a red square on the left"])
    stages = [load_clip(finished / f"stage-{s}/train/model").model.eval() for s in (0, 1)]
    assert torch.equal(model.encode_text(texts), torch.cat([stage.encode_text(texts) for stage in stages], 1))


def test_the_launch_is_noted(finished):
    (launch,) = records(finished / "launches.jsonl")
    assert launch["processes"] == 1
    assert read_json(finished / "config.json")["stages"][1]["train"]["steps"] == 8


def test_status_prints_phases_and_results(finished, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mcl-clip", "status", str(finished)])
    command()
    printed = capsys.readouterr().out
    for stage in (0, 1):
        assert f"stage {stage}: train done, embed done, cluster done, labels done, eval done (step 8 of 8)" in printed
    assert "combined: done" in printed
    assert "stages-0-1-mean_cosine" in printed


def test_a_second_run_does_nothing(copy, recipe, caplog):
    before = files(copy)
    with caplog.at_level("INFO", "mcl_clip"):
        execute(recipe)
    assert files(copy) == before
    assert caplog.text.count("already done") == 11
    assert "done in" not in caplog.text
    assert len(records(copy / "launches.jsonl")) == 2


def test_another_stage_continues_and_redoes_only_the_combination(copy, recipe):
    before = files(copy)
    execute(recipe, "--num-stages", "3")
    after = files(copy)
    changed = {name for name, stamp in before.items() if after.get(name) != stamp}
    assert changed
    assert all(name.startswith("combined/") for name in changed)
    assert {name.split("/")[0] for name in after.keys() - before.keys()} == {"stage-2", "combined"}
    assert len(MultistageCLIP.load(copy / "combined/model").stages) == 3


def test_another_evaluation_set_continues(copy, recipe, path):
    before = files(copy)
    execute(recipe, "--eval.classification", str(path.parent / "colours"), f"again={path.parent / 'colours'}")
    after = files(copy)
    changed = {name.rsplit("/", 1)[0] for name, stamp in before.items() if after.get(name) != stamp}
    assert changed
    assert {name for name in changed if not name.startswith("combined")} == {"stage-0/eval", "stage-1/eval"}
    assert (copy / "stage-1/eval/features-again.safetensors").exists()
    for name in ("stage-0/eval/features-colours.safetensors", "stage-1/eval/features-retrieval.safetensors"):
        assert after[name] == before[name]  # embedded once
    assert "classification/again" in [record["key"] for record in records(copy / "combined/results.jsonl")]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--stages.1.train.lr", "0.5"], "stage-1/train is finished .* train.lr was 0.001 and is now 0.5"),
        (["--stages.0.cluster.num-clusters", "4"], "stage-0/cluster is finished .* num_clusters was 3 and is now 4"),
        (["--seed", "1"], "stage-0/train is finished .* seed was 0 and is now 1"),
        (["--combine", "mean_cosine"], "combined is finished .* combine was 'concat' and is now 'mean_cosine'"),
        (["--data.holdout-rows", "9"], "held_out_rows was 8 and is now 9"),
    ],
)  # fmt: skip
def test_a_changed_setting_is_refused_and_changes_nothing(copy, recipe, arguments, sentence):
    before, config = files(copy), (copy / "config.json").read_bytes()
    with pytest.raises(StaleArtifactError, match=sentence):
        execute(recipe, *arguments)
    assert files(copy) == before
    assert (copy / "config.json").read_bytes() == config
    assert len(records(copy / "launches.jsonl")) == 1


def test_other_shards_are_refused_and_change_nothing(copy, recipe, tmp_path):
    before = files(copy)
    other = write_shards(tmp_path / "other", rows=240)
    with pytest.raises(StaleArtifactError, match=r"begun with other data \(200 rows then, 240 now"):
        execute(recipe, "--data.train", str(other))
    assert files(copy) == before


def test_shards_that_moved_are_the_same_shards(copy, recipe, path, tmp_path):
    moved = shutil.copytree(path.parent / "shards", tmp_path / "moved")
    before = files(copy)
    execute(recipe, "--data.train", str(moved))
    after = files(copy)
    assert {name for name in before if before[name] != after[name]} == {"index/index.arrow"}


def test_other_lists_of_the_same_shards_are_refused(copy, recipe, path):
    shards = sorted(map(str, (path.parent / "shards").glob("*.tar")))
    with pytest.raises(StaleArtifactError, match=r"rows_of_lists was None and is now .50, 50, 50, 50."):
        execute(recipe, "--data.train", *shards)


def test_leftovers_of_other_settings_are_refused(copy, recipe):
    for folder in ("stage-1/embed", "stage-1/cluster", "stage-1/labels", "stage-1/eval", "combined"):
        shutil.rmtree(copy / folder)
    (copy / "stage-1/train" / DONE).unlink()  # as if it had been killed at the end
    before, config = files(copy), (copy / "config.json").read_bytes()
    with pytest.raises(StaleArtifactError, match=r"stage-1/train is begun .* train.lr was 0.001 and is now 0.5"):
        execute(recipe, "--stages.1.train.lr", "0.5")
    assert files(copy) == before
    assert (copy / "config.json").read_bytes() == config


def test_less_than_before_is_refused(copy, recipe):
    before = files(copy)
    with pytest.raises(StaleArtifactError, match="combined is finished but does not match this recipe"):
        execute(recipe, "--num-stages", "1")
    with pytest.raises(StaleArtifactError, match=r"stage-0/eval is finished .* sets.colours was '\w+' and is now None"):
        execute(replace(recipe, eval=replace(recipe.eval, classification=())))
    assert files(copy) == before


def test_machine_settings_may_change(copy, recipe):
    before = files(copy)
    execute(recipe, "--machine.workers", "1", "--machine.log-steps", "5", "--eval.every-steps", "2")
    assert files(copy) == before


def test_an_output_that_is_gone_is_refused(copy, recipe):
    (copy / "stage-0/labels/labels.npy").unlink()
    with pytest.raises(StaleArtifactError, match=r"its output labels.npy is missing"):
        execute(recipe)


def test_two_processes_train_on_the_same_batches(path, finished, tmp_path):
    launched = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--config_file",
         REPOSITORY / "recipes/accelerate/two_cpu_processes.yaml", "--main_process_port", "0",
         path, "--run-dir", tmp_path / "run"],
        capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )  # fmt: skip
    assert launched.returncode == 0, launched.stdout[-2000:] + launched.stderr[-4000:]
    run = tmp_path / "run"
    assert [launch["processes"] for launch in records(run / "launches.jsonl")] == [2]
    assert launched.stdout.count("combined: done in") == 1  # one process speaks
    one, two = (read_json(of / "stage-0/train/groups.json") for of in (finished, run))
    assert one == two
    losses = [[r["loss"] for r in records(of / "stage-0/train/metrics.jsonl")] for of in (finished, run)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert steps(run, 1) == list(range(1, 9))
    labels = [np.load(of / "stage-0/labels/labels.npy") for of in (finished, run)]
    if np.array_equal(*labels):
        assert read_json(run / "stage-1/train/groups.json") == read_json(finished / "stage-1/train/groups.json")


def test_a_batch_that_does_not_divide_is_refused(recipe, monkeypatch):
    monkeypatch.setattr(pipeline, "world_size", lambda: 3)
    with pytest.raises(UserError, match=r"--stages.0.train.global-batch-size 16 does not divide by 3 processes"):
        execute(recipe)
    assert not recipe.run_dir.exists()


def test_exact_jpegs_count_as_what_runs_had_before_there_was_a_choice(recipe):
    found = {}
    for how in ("exact", "fast"):
        train = replace(recipe.stages[0].train, augment=AugmentConfig(jpeg=how))
        run = execute(replace(recipe, run_dir=recipe.run_dir / how, stages=(replace(recipe.stages[0], train=train),)))
        found[how] = read_json(run / "stage-0/train" / DONE)["made_from"]["settings"]["train"]
    assert "jpeg" not in found["exact"]["augment"]
    assert found["fast"]["augment"].pop("jpeg") == "fast"
    assert found["fast"] == found["exact"]
