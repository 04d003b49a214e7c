"""The pipeline from shards to the multistage model, run again, changed, killed, and fed with bad input."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mcl_clip import MultistageCLIP, TowerConfig, pipeline
from mcl_clip.artifacts import DONE, StaleArtifactError, lock, read_json
from mcl_clip.cli import command, main
from mcl_clip.config import AugmentConfig, ClusterConfig, LockConfig
from mcl_clip.errors import UserError
from mcl_clip.model.towers import create_tower, load_tower, save_tower
from tests.recipes.runs import (
    REPOSITORY,
    Killer,
    execute,
    files,
    load_recipe,
    records,
    steps,
    with_stages,
    write_project,
    write_shards,
)

TRAIN_FILES = {
    "DONE.json",
    "groups.json",
    "metrics.jsonl",
    "model/open_clip_config.json",
    "model/open_clip_model.safetensors",
}
WEIGHTS = ("stage-0/train/model", "stage-1/train/model", "combined/model/stage_0", "combined/model/stage_1")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """The recipe of the tiny project."""
    return write_project(tmp_path_factory.mktemp("project"))


@pytest.fixture
def recipe(path, tmp_path):
    return replace(load_recipe(path), run_dir=tmp_path / "run")


@pytest.fixture(scope="module")
def finished(path):
    """A run of two stages that nothing disturbed; tests change copies of it."""
    return execute(load_recipe(path))


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of the finished run, files' times included."""
    return shutil.copytree(finished, tmp_path / "run")


def weights(run):
    return {name: (run / name / "open_clip_model.safetensors").read_bytes() for name in WEIGHTS}


def fail(capsys, monkeypatch, recipe, *arguments):
    """The sentence that a recipe ends with; exit code 2, one line, no traceback."""
    monkeypatch.setattr(sys, "argv", ["recipe.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main(recipe)
    printed = capsys.readouterr().err
    assert caught.value.code == 2, printed
    lines = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, printed
    assert "Traceback" not in printed
    return lines[0]


class TestFinishedRun:
    def test_all_artefacts_are_there(self, finished):
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

    def test_labels_refine_from_stage_to_stage(self, finished):
        first, second = (np.load(finished / f"stage-{s}/labels/labels.npy") for s in (0, 1))
        assert first.shape == (200,)
        assert np.array_equal(second // 3, first)
        assert read_json(finished / "stage-1/labels/labels.json")["radix"] == [3, 3]

    def test_results_are_there_for_each_stage_and_combination(self, finished):
        names = [r["pretrained"] for folder in ("stage-0/eval", "stage-1/eval", "combined")
                 for r in records(finished / folder / "results.jsonl") if r["dataset"] == "retrieval"]  # fmt: skip
        assert names == [f"run/{name}" for name in
                         ("stage-0", "stage-1", "stages-0-1-concat", "stages-0-1-mean_cosine", "combined")]  # fmt: skip

    def test_the_model_loads_and_gives_the_stored_features(self, finished):
        model = MultistageCLIP.load(finished / "combined/model")
        assert model.combine == "concat"
        assert model.logit_scale.item() == pytest.approx(
            read_json(finished / "combined/combination.json")["logit_scale"]
        )
        texts = model.tokenizer(["a red square on the left"])
        stages = [load_tower(finished / f"stage-{s}/train/model").model.eval() for s in (0, 1)]
        assert torch.equal(model.encode_text(texts), torch.cat([stage.encode_text(texts) for stage in stages], 1))

    def test_the_launch_is_noted(self, finished):
        (launch,) = records(finished / "launches.jsonl")
        assert launch["processes"] == 1
        assert read_json(finished / "config.json")["stages"][1]["train"]["steps"] == 8

    def test_status_prints_phases_and_results(self, finished, monkeypatch, capsys):
        monkeypatch.setattr(sys, "argv", ["mcl-clip", "status", str(finished)])
        command()
        printed = capsys.readouterr().out
        for stage in (0, 1):
            assert (
                f"stage {stage}: train done, embed done, cluster done, labels done, eval done (step 8 of 8)" in printed
            )
        assert "combined: done" in printed
        assert "stages-0-1-mean_cosine" in printed


class TestContinuing:
    def test_a_second_run_does_nothing(self, copy, recipe, caplog):
        before = files(copy)
        with caplog.at_level("INFO", "mcl_clip"):
            execute(recipe)
        assert files(copy) == before
        assert caplog.text.count("done before") == 11
        assert "done in" not in caplog.text
        assert len(records(copy / "launches.jsonl")) == 2

    def test_another_stage_continues_and_redoes_only_the_combination(self, copy, recipe):
        before = files(copy)
        execute(recipe, "--num-stages", "3")
        after = files(copy)
        changed = {name for name, stamp in before.items() if after.get(name) != stamp}
        assert changed
        assert all(name.startswith("combined/") for name in changed)
        assert {name.split("/")[0] for name in after.keys() - before.keys()} == {"stage-2", "combined"}
        assert len(MultistageCLIP.load(copy / "combined/model").stages) == 3

    def test_another_evaluation_set_continues(self, copy, recipe, path):
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
    def test_a_changed_setting_is_refused_and_changes_nothing(self, copy, recipe, arguments, sentence):
        before, config = files(copy), (copy / "config.json").read_bytes()
        with pytest.raises(StaleArtifactError, match=sentence):
            execute(recipe, *arguments)
        assert files(copy) == before
        assert (copy / "config.json").read_bytes() == config
        assert len(records(copy / "launches.jsonl")) == 1

    def test_other_shards_are_refused_and_change_nothing(self, copy, recipe, tmp_path):
        before = files(copy)
        other = write_shards(tmp_path / "other", rows=240)
        with pytest.raises(StaleArtifactError, match="made from other shards: 200 rows then, 240 now"):
            execute(recipe, "--data.train", str(other))
        assert files(copy) == before

    def test_shards_that_moved_are_the_same_shards(self, copy, recipe, path, tmp_path):
        moved = shutil.copytree(path.parent / "shards", tmp_path / "moved")
        before = files(copy)
        execute(recipe, "--data.train", str(moved))
        after = files(copy)
        assert {name for name in before if before[name] != after[name]} == {"index/index.arrow"}

    def test_other_lists_of_the_same_shards_are_refused(self, copy, recipe, path):
        shards = sorted(map(str, (path.parent / "shards").glob("*.tar")))
        with pytest.raises(StaleArtifactError, match="rows_of_lists was None and is now .50, 50, 50, 50."):
            execute(recipe, "--data.train", *shards)

    def test_leftovers_of_other_settings_are_refused(self, copy, recipe):
        for folder in ("stage-1/embed", "stage-1/cluster", "stage-1/labels", "stage-1/eval", "combined"):
            shutil.rmtree(copy / folder)
        (copy / "stage-1/train" / DONE).unlink()  # as if it had been killed at the end
        before, config = files(copy), (copy / "config.json").read_bytes()
        with pytest.raises(StaleArtifactError, match="stage-1/train is begun .* train.lr was 0.001 and is now 0.5"):
            execute(recipe, "--stages.1.train.lr", "0.5")
        assert files(copy) == before
        assert (copy / "config.json").read_bytes() == config

    def test_machine_settings_may_change(self, copy, recipe):
        before = files(copy)
        execute(recipe, "--machine.workers", "1", "--machine.log-steps", "5", "--eval.every-steps", "2")
        assert files(copy) == before

    def test_an_output_that_is_gone_is_refused(self, copy, recipe):
        (copy / "stage-0/labels/labels.npy").unlink()
        with pytest.raises(StaleArtifactError, match="its output labels.npy is missing"):
            execute(recipe)


KILLS = {
    "train before a checkpoint": ("mcl_clip.train.loop:clamp_logit_scale_", 2, False),
    "train, stage 1, after a checkpoint": ("mcl_clip.train.loop:clamp_logit_scale_", 13, False),
    "while a checkpoint is written": ("mcl_clip.train.checkpoint:write_json", 2, False),
    "after the last checkpoint": ("mcl_clip.train.loop:save_checkpoint", 3, True),
    "between model and DONE": ("mcl_clip.phases:save_tower", 2, True),
    "embed between shards": ("mcl_clip.multistage.embed:_embed_batch", 3, False),
    "embed, stage 1": ("mcl_clip.multistage.embed:_embed_batch", 7, False),
    "cluster": ("mcl_clip.phases:spherical_kmeans", 1, True),
    "labels": ("mcl_clip.multistage.labels:PseudoLabels.summary", 1, False),
    "eval": ("mcl_clip.phases:score_stages", 2, False),
    "eval between sets": ("mcl_clip.eval.tasks.classification:ClassificationTask.embed", 1, False),
    "combined": ("mcl_clip.phases:score_stages", 3, False),
    "combined, model written": ("mcl_clip.phases:write_json", 7, True),
    **{f"before DONE {number}": ("mcl_clip.artifacts:Phase.mark_done", number, False) for number in range(1, 12)},
}
QUICK_KILLS = ("train, stage 1, after a checkpoint", "embed between shards", "combined", "before DONE 1")


class TestKilled:
    @pytest.fixture(scope="class")
    def killer(self):
        killer = Killer()
        yield killer
        killer.close()

    @pytest.mark.parametrize(
        "where", [pytest.param(where, marks=() if where in QUICK_KILLS else pytest.mark.slow) for where in KILLS]
    )
    def test_a_killed_run_ends_with_the_same_bits(self, where, killer, finished, path, tmp_path):
        target, call, after = KILLS[where]
        run = tmp_path / "run"
        assert killer.run(path, target, call, "--run-dir", str(run), after=after) == -signal.SIGKILL
        assert not (run / "combined" / DONE).exists()
        execute(replace(load_recipe(path), run_dir=run))
        assert weights(run) == weights(finished)
        for stage in (0, 1):
            assert steps(run, stage) == list(range(1, 9))
            losses = [[r["loss"] for r in records(of / f"stage-{stage}/train/metrics.jsonl")] for of in (run, finished)]
            assert losses[0] == losses[1]
        assert files(run).keys() == files(finished).keys()
        names = ("stage-1/embed/part-000003.safetensors", "stage-1/labels/labels.npy", "stage-1/cluster/trace.json")
        for name in names:
            assert (run / name).read_bytes() == (finished / name).read_bytes()

    @pytest.mark.slow
    def test_killed_twice(self, killer, finished, path, tmp_path):
        arguments = ("--run-dir", str(tmp_path / "run"))
        assert killer.run(path, "mcl_clip.train.loop:clamp_logit_scale_", 5, *arguments) == -signal.SIGKILL
        assert killer.run(path, "mcl_clip.train.loop:clamp_logit_scale_", 4, *arguments) == -signal.SIGKILL
        assert (tmp_path / "run/lock").exists()
        execute(replace(load_recipe(path), run_dir=tmp_path / "run"))
        assert weights(tmp_path / "run") == weights(finished)
        assert not (tmp_path / "run/lock").exists()


class TestProcesses:
    def test_two_processes_train_on_the_same_batches(self, path, finished, tmp_path):
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

    def test_a_batch_that_does_not_divide_is_refused(self, recipe, monkeypatch):
        monkeypatch.setattr(pipeline, "world_size", lambda: 3)
        with pytest.raises(UserError, match="--stages.0.train.global-batch-size 16 does not divide by 3 processes"):
            execute(recipe)
        assert not recipe.run_dir.exists()


class TestReshard:
    def reshard(self, run, out, monkeypatch, stage=1):
        monkeypatch.setattr(sys, "argv", ["mcl-clip", "reshard", str(run), str(out), "--stage", str(stage)])
        command()

    def test_a_stage_trains_from_resharded_shards(self, copy, recipe, tmp_path, monkeypatch, capsys):
        self.reshard(copy, tmp_path / "grouped", monkeypatch)
        assert "200 rows in 3 groups" in capsys.readouterr().out
        before = read_json(copy / "stage-1/train/groups.json")
        for folder in ("stage-1", "combined"):
            shutil.rmtree(copy / folder)
        resharded = ("--stages.1.train.resharded", str(tmp_path / "grouped"), "--stages.1.train.run-rows", "4")
        execute(recipe, *resharded)
        after = read_json(copy / "stage-1/train/groups.json")
        assert after["groups"] == before["groups"]
        assert after["epoch_0"]["rows"] == before["epoch_0"]["rows"] == 192  # without the held-out rows
        assert steps(copy, 1) == list(range(1, 9))
        with pytest.raises(StaleArtifactError, match="run_rows was 4 and is now 1"):
            execute(recipe)

    def test_shards_of_another_run_are_refused(self, copy, path, recipe, tmp_path, monkeypatch):
        other = write_shards(tmp_path / "other", captions=True, corrupt=range(1))
        arguments = ("--run-dir", str(tmp_path / "other_run"), "--data.train", str(other), "--num-stages", "1")
        execute(recipe, *arguments)
        self.reshard(tmp_path / "other_run", tmp_path / "grouped", monkeypatch)
        for folder in ("stage-1", "combined"):
            shutil.rmtree(copy / folder)
        with pytest.raises(UserError, match="holds other samples than this run; reshard from this run again"):
            execute(recipe, "--stages.1.train.resharded", str(tmp_path / "grouped"))

    def test_there_must_be_labels(self, copy, tmp_path, monkeypatch, capsys):
        for stage in (0, 4):
            with pytest.raises(SystemExit) as caught:
                self.reshard(copy, tmp_path / "grouped", monkeypatch, stage)
            assert caught.value.code == 2
            assert f"error: --stage {stage} needs the labels of stage {stage - 1}" in capsys.readouterr().err


class TestPretrained:
    def test_an_untouched_stage_0_and_a_locked_text_tower(self, recipe, tmp_path):
        folder = tmp_path / "published"
        save_tower(create_tower(model_cfg=recipe.tower.model, seed=5), folder)
        locked = {"start": "base", "lock": LockConfig(text=True, image_unlocked_groups=1)}
        recipe = replace(recipe, tower=TowerConfig(architecture=f"local-dir:{folder}"))
        run = execute(with_stages(recipe, {"steps": 0}, locked, locked))
        stages = [load_file(run / f"stage-{s}/train/model/open_clip_model.safetensors") for s in (0, 1, 2)]
        base = load_file(folder / "open_clip_model.safetensors")
        assert all(torch.equal(stages[0][name], base[name]) for name in base)
        trained = {name for name in base if not torch.equal(stages[1][name], base[name])}
        assert trained == {name for name in base if not torch.equal(stages[2][name], base[name])}
        assert trained == {"logit_scale", "visual.proj"}  # the last group of a ViT
        assert not torch.equal(stages[1]["visual.proj"], stages[2]["visual.proj"])
        model = MultistageCLIP.load(run / "combined/model")
        assert model.shared_text_tower
        assert read_json(run / "combined/model/mcl_clip_config.json")["shared_text_tower"] is True
        assert not (run / "stage-0/train/metrics.jsonl").exists()

    def test_the_weights_count_by_their_bytes(self, recipe, tmp_path):
        first, second = tmp_path / "published", tmp_path / "moved"
        save_tower(create_tower(model_cfg=recipe.tower.model, seed=5), first)
        at_first, at_second = (
            with_stages(replace(recipe, tower=TowerConfig(architecture=f"local-dir:{folder}")), {"steps": 0})
            for folder in (first, second)
        )
        execute(at_first)
        before = files(recipe.run_dir)
        first.rename(second)
        execute(at_second)
        assert files(recipe.run_dir) == before
        save_tower(create_tower(model_cfg=recipe.tower.model, seed=6), second)
        with pytest.raises(StaleArtifactError, match=r"tower.architecture.open_clip_model.safetensors was"):
            execute(at_second)

    def test_scratch_is_not_for_pretrained_towers(self, recipe, tmp_path):
        save_tower(create_tower(model_cfg=recipe.tower.model), tmp_path / "published")
        recipe = replace(recipe, tower=TowerConfig(architecture=f"local-dir:{tmp_path / 'published'}"))
        with pytest.raises(UserError, match="--stages.1.start scratch is a new random draw, and .* are pretrained"):
            execute(with_stages(recipe, {}, {"start": "scratch"}))


class TestBadInput:
    @pytest.mark.parametrize(
        ("tower", "sentence"),
        [
            ({"architecture": "ViT-B-33"}, "open_clip has no architecture 'ViT-B-33' (close: "),
            ({"architecture": "ViT-B-32", "pretrained": "openay"}, "'openay' is neither a file nor a tag of ViT-B-32"),
            ({"architecture": "local-dir:/nowhere"}, "/nowhere: there is no such file or folder"),
        ],
    )  # fmt: skip
    def test_unknown_towers(self, recipe, capsys, monkeypatch, tower, sentence):
        assert sentence in fail(capsys, monkeypatch, replace(recipe, tower=TowerConfig(**tower)))

    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            (["--stages.1.train.learning-rate", "1"], "--stages.1.train.learning-rate"),
            (["--stages.2.train.lr", "1"], "--stages.2.train.lr"),
            (["--seed", "many"], "many"),
            (["--data.max-bad-fraction", "2"], "--data.max-bad-fraction is a share from 0 to 1, not 2.0"),
            (["--data.weights", "1", "2"], "--data.weights has 2 values for 1 lists of shards"),
            (["--stages.0.train.steps", "0"], "--stages.0.train.steps is 0, which is meant for a pretrained stage 0"),
        ],
    )  # fmt: skip
    def test_options_that_do_not_parse(self, recipe, capsys, monkeypatch, arguments, sentence):
        monkeypatch.setattr(sys, "argv", ["recipe.py", *arguments])
        with pytest.raises(SystemExit) as caught:
            main(recipe)
        printed = capsys.readouterr().err
        assert caught.value.code == 2
        assert sentence in " ".join(printed.replace("│", " ").split())  # tyro breaks lines
        assert "Traceback" not in printed

    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            (["--num-stages", "0"], "--num-stages must be a number of at least 1, not '0'"),
            (["--data.train", "/nowhere/{0..3}.tar"], "the shard /nowhere/0.tar does not exist"),
            (["--data.train", "pipe:cat x.tar"], "starts with 'pipe:', which is not opened"),
            (["--eval.retrieval", "/nowhere"], "/nowhere is not an evaluation set"),
            (["--stages.0.train.loss", "siglip"], "siglip needs a tower with a bias: put init_logit_bias"),
            (["--stages.0.train.lr-multipliers", "visual.nothing", "0.1"], "'visual.nothing' matches none of the"),
            (["--stages.0.cluster.num-clusters", "500"], "500 clusters need at least as many distinct samples"),
            (["--data.holdout-rows", "1"], "--data.holdout-rows 1 of 200 rows are 1 held-out rows"),
        ],
    )  # fmt: skip
    def test_wrong_options(self, recipe, capsys, monkeypatch, arguments, sentence):
        assert sentence in fail(capsys, monkeypatch, recipe, *arguments)

    def test_no_shards(self, recipe, capsys, monkeypatch, tmp_path):
        (tmp_path / "empty").mkdir()
        sentence = fail(capsys, monkeypatch, recipe, "--data.train", tmp_path / "empty")
        assert "no shard matches" in sentence
        assert "--data.train names no shards" in fail(
            capsys, monkeypatch, replace(recipe, data=replace(recipe.data, train=()))
        )

    def test_shards_without_captions(self, recipe, capsys, monkeypatch, tmp_path):
        shards = write_shards(tmp_path / "shards", rows=60, captions=False)
        sentence = fail(capsys, monkeypatch, recipe, "--data.train", shards)
        assert str(tmp_path / "shards") in sentence
        assert "60" in sentence

    def test_a_truncated_tar(self, recipe, capsys, monkeypatch, tmp_path):
        shards = write_shards(tmp_path / "shards")
        broken = shards / "0002.tar"
        broken.write_bytes(broken.read_bytes()[:20_000])
        sentence = fail(capsys, monkeypatch, recipe, "--data.train", shards)
        assert str(broken) in sentence

    def test_too_few_rows(self, recipe, capsys, monkeypatch, tmp_path):
        shards = write_shards(tmp_path / "shards", rows=30)
        sentence = fail(capsys, monkeypatch, recipe, "--data.train", shards)
        assert "of 30 rows are 1 held-out rows" in sentence
        assert "at least 40 rows" in sentence

    def test_too_many_corrupt_pictures(self, recipe, capsys, monkeypatch, tmp_path):
        shards = write_shards(tmp_path / "shards", corrupt=range(0, 60, 2))
        sentence = fail(capsys, monkeypatch, recipe, "--data.train", shards)
        assert "samples could not be decoded" in sentence
        assert "more than max_bad_fraction = 0.01; most in" in sentence
        assert str(shards / "0000.tar") in sentence

    def test_a_few_corrupt_pictures_are_counted(self, recipe, tmp_path):
        shards = write_shards(tmp_path / "shards", corrupt=(17, 113))
        execute(recipe, "--data.train", str(shards), "--data.max-bad-fraction", "0.02", "--stages.0.train.steps", "12")
        for phase in ("train", "embed"):
            found = records(recipe.run_dir / f"stage-0/{phase}/bad_samples.jsonl")
            assert {record["row"] for record in found} == {17, 113}
            assert {Path(record["shard"]).name for record in found} == {"0000.tar", "0002.tar"}
        trained = records(recipe.run_dir / "stage-0/train/metrics.jsonl")
        assert trained[-1]["bad_samples"] == 2

    def test_fewer_rows_than_a_batch_are_a_warning(self, recipe, caplog):
        execute(with_stages(recipe, {"steps": 2, "global_batch_size": 256}))
        assert "the data has 192 rows, fewer than a global batch of 256; each batch has 192 valid rows" in caplog.text
        assert read_json(recipe.run_dir / "stage-0/train/groups.json")["epoch_0"]["fillers"] == 64

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
    def test_a_run_directory_that_cannot_be_written(self, recipe, capsys, monkeypatch, tmp_path):
        (tmp_path / "fixed").mkdir(mode=0o500)
        assert "permission denied" in fail(capsys, monkeypatch, recipe, "--run-dir", tmp_path / "fixed/run")

    def test_a_run_directory_that_is_a_file(self, recipe, capsys, monkeypatch, tmp_path):
        (tmp_path / "file").write_text("x")
        assert str(tmp_path / "file") in fail(capsys, monkeypatch, recipe, "--run-dir", tmp_path / "file")

    def test_a_second_job(self, recipe, capsys, monkeypatch):
        recipe.run_dir.mkdir()
        with lock(recipe.run_dir):
            sentence = fail(capsys, monkeypatch, recipe)
        assert f"is in use by process {os.getpid()} on " in sentence

    def test_a_program_ends_with_one_sentence(self, path, copy):
        before = files(copy)
        ended = subprocess.run(
            [sys.executable, path, "--run-dir", copy, "--stages.1.train.lr", "0.5"],
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert ended.returncode == 2
        (line,) = [line for line in ended.stderr.splitlines() if "rror" in line]
        assert line.startswith(
            f"error: {copy / 'stage-1/train'} is finished but does not match this recipe: train.lr was"
        )
        assert "Traceback" not in ended.stderr
        assert files(copy) == before


SIGLIP = {"init_logit_bias": -10.0, "init_logit_scale": 2.3}
OPTIONS = {
    "in-training evaluation": ([{}], {"every_steps": 2}),
    "running average": ([{"average_decay": 0.9}], {"every_steps": 2}),
    "sigmoid loss": ([{"loss": "siglip"}], {}),
    "rates by layer": ([{"lr_multipliers": {"^visual": 0.0}, "max_grad_norm": 0.1, "weight_decays": {"text": 0.5}}], {}),
    "product of clusters": ([{"cluster": ClusterConfig(num_clusters=3, on="product", text_clusters=2, num_starts=1)}, {}], {}),
    "clusters of texts": ([{"cluster": ClusterConfig(num_clusters=2, on="text")}, {}], {}),
    "other starts": ([{}, {"start": "scratch"}, {"start": "base"}], {}),
    "augmentation": ([{"augment": AugmentConfig(scale=(0.3, 1.0), horizontal_flip=0.5)}], {}),
    "bfloat16": ([{"precision": "bf16"}, {"precision": "bf16"}], {}),
    "windows and duplicates": ([{"window_shards": 1, "run_rows": 2, "mask_duplicates": False, "schedule": "constant"}], {}),
}  # fmt: skip


@pytest.mark.parametrize("option", OPTIONS)
def test_options_work(option, recipe):
    changes, evaluation = OPTIONS[option]
    recipe = with_stages(recipe, *({"steps": 4, **change} for change in changes))
    model = {**recipe.tower.model, **(SIGLIP if option == "sigmoid loss" else {})}
    recipe = replace(recipe, tower=TowerConfig(model=model), eval=replace(recipe.eval, **evaluation))
    run = execute(recipe)
    logged = records(run / "stage-0/train/metrics.jsonl")
    assert all(np.isfinite(record["loss"]) for record in logged if "loss" in record)
    assert (run / "combined" / DONE).exists()
    start = create_tower(model_cfg=model, seed=pipeline_seed(0)).model.state_dict()
    results = [load_file(run / f"stage-{s}/train/model/open_clip_model.safetensors") for s in range(len(changes))]
    moved = {name for name in start if not torch.equal(start[name], results[0][name])}
    if option in ("in-training evaluation", "running average"):
        evaluated = [record for record in logged if "colours/acc1" in record]
        assert [record["step"] for record in evaluated] == [2]
        assert {"retrieval/mean_recall@1", "colours/linear_acc1"} <= evaluated[0].keys()
    if option == "running average":
        newest = load_file(run / "stage-0/train/checkpoints/step-000000004/model.safetensors")
        average = load_file(run / "stage-0/train/checkpoints/step-000000004/average.safetensors")
        assert not torch.equal(newest["visual.proj"], results[0]["visual.proj"])
        assert torch.equal(average["visual.proj"], results[0]["visual.proj"])
    if option == "sigmoid loss":
        assert "logit_bias" in moved
        assert read_json(run / "combined/combination.json")["logit_bias"] is not None
    if option == "rates by layer":
        assert moved
        assert not [name for name in moved if name.startswith("visual.")]
    if option == "product of clusters":
        assert read_json(run / "stage-0/labels/labels.json")["radix"] == [3, 2]
        assert read_json(run / "stage-1/labels/labels.json")["radix"] == [3, 2, 3]
        assert len(list((run / "stage-0/cluster").glob("assignments-*.npy"))) == 2
    if option == "clusters of texts":
        assert read_json(run / "stage-0/labels/labels.json")["radix"] == [2]
        metrics = [record["metrics"] for record in records(run / "stage-0/eval/results.jsonl")]
        assert not any("cluster_nmi" in metric for metric in metrics)
    if option == "other starts":
        drawn = create_tower(model_cfg=model, seed=pipeline_seed(1)).model.state_dict()
        distance = {name: [float((results[s][name] - of[name]).norm()) for s, of in ((1, start), (1, drawn), (2, results[0]))]
                    for name in ("visual.proj", "text_projection")}  # fmt: skip
        for from_start, from_draw, from_base in distance.values():
            assert from_draw < 0.5 * from_start
            assert from_base < 0.5 * from_start


def pipeline_seed(draw):
    from mcl_clip.distributed import seed_of

    return seed_of(0, "tower", draw)


def test_a_weighted_mixture(recipe, tmp_path, path):
    other = write_shards(tmp_path / "other", rows=60, per_shard=30)
    lists = ("--data.train", str(path.parent / "shards"), str(other), "--data.weights", "0.5", "2")
    run = execute(with_stages(recipe, {"steps": 4}), *lists)
    held_out = 8  # a share of the rows, wherever they are
    epoch = read_json(run / "stage-0/train/groups.json")["epoch_0"]
    assert abs(epoch["rows"] - (100 + 120)) <= 2 * held_out
    assert read_json(run / "stage-0/train/DONE.json")["made_from"]["settings"]["data"]["weights"] == [0.5, 2]
    with pytest.raises(StaleArtifactError, match="weights was .0.5, 2.* and is now .1.0, 1.0."):
        execute(with_stages(recipe, {"steps": 4}), *lists[:-2], "1", "1")


def test_best_takes_the_combination_with_the_lower_loss(recipe):
    run = execute(with_stages(recipe, {"steps": 2}, {"steps": 2}), "--combine", "best")
    chosen = json.loads((run / "combined/combination.json").read_text())
    assert chosen["losses"].keys() == {"concat", "mean_cosine"}
    assert chosen["combine"] == min(chosen["losses"], key=chosen["losses"].get)
    assert MultistageCLIP.load(run / "combined/model").combine == chosen["combine"]


def test_a_run_without_evaluation_sets(recipe):
    run = execute(
        replace(with_stages(recipe, {"steps": 2}), eval=replace(recipe.eval, retrieval=(), classification=()))
    )
    assert (run / "combined/results.jsonl").read_text() == ""
    assert (run / "combined" / DONE).exists()


def test_two_sets_of_one_name_are_refused(recipe, path):
    colours = str(path.parent / "colours")
    with pytest.raises(UserError, match="two of .* have the same name; write NAME=FOLDER"):
        execute(recipe, "--eval.classification", colours, colours)
    with pytest.raises(UserError, match="a retrieval and a classification set are both called retrieval"):
        execute(recipe, "--eval.classification", f"retrieval={colours}")
