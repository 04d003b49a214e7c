"""Ends of a run other than stages with groups: ensembles, soups, and interpolation with the base."""

import re
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file

from mcl_clip import MultistageCLIP, TowerConfig
from mcl_clip.config import EvalConfig
from mcl_clip.core.errors import UserError
from mcl_clip.core.files import read_json
from mcl_clip.model.clip import create_clip, save_clip
from mcl_clip.model.resolve import find_models
from mcl_clip.publish.export import Export, export_run
from mcl_clip.report.page import write_report
from mcl_clip.runs import final_model
from mcl_clip.runs.context import RunContext
from tests.recipes.runs import execute, records, with_stages

SHORT = {"steps": 4, "warmup_steps": 0}


@pytest.fixture
def pretrained(recipe, tmp_path):
    """The recipe with towers from a folder."""
    save_clip(create_clip(model_cfg=recipe.tower.model, seed=3), tmp_path / "base")
    return replace(recipe, tower=TowerConfig(architecture=f"local-dir:{tmp_path / 'base'}"))


def weights(path):
    return load_file(path / "open_clip_model.safetensors")


def choosing(recipe, **settings):
    return replace(recipe, eval=replace(recipe.eval, **settings))


def test_a_soup_is_one_model_with_the_mean_of_the_weights(pretrained, tmp_path):
    run = execute(with_stages(pretrained, SHORT, SHORT), "--method", "soup")
    first, second = (weights(run / f"stage-{s}/train/model") for s in range(2))
    soup = weights(run / "combined/model/stage_0")
    assert not torch.equal(first["visual.proj"], second["visual.proj"])  # they see other batches from the same start
    for name, tensor in soup.items():
        torch.testing.assert_close(tensor, (first[name].double() + second[name].double()).div(2).to(tensor.dtype))
    model = MultistageCLIP.load(run / "combined/model")
    assert (len(model.stages), model.logit_scale.item()) == (1, pytest.approx(soup["logit_scale"].item()))

    evaluated = {record["dataset"]: record for record in records(run / "combined/results.jsonl")}
    assert [record["label"] for record in evaluated.values()] == ["combined", "combined"]
    assert {record["combine"] for record in evaluated.values()} == {None}
    stages = [r["metrics"] for r in records(run / "stage-1/eval/results.jsonl") if r["dataset"] == "retrieval"]
    assert evaluated["retrieval"]["metrics"] not in stages

    page = write_report(run).read_text()
    assert "The method is a soup" in page
    assert "The weights of the final model are the mean of those of stages 0, 1." in page
    differences = export_run(run, tmp_path / "exported", Export())
    assert differences.keys() == {"mcl_clip", "open_clip"}
    assert all(torch.equal(weights(tmp_path / "exported")[name], tensor) for name, tensor in soup.items())
    card = (tmp_path / "exported/README.md").read_text()
    assert "Its weights are the mean of those of stages 0, 1, from a run with 2 stages." in card
    assert "16 dimensions" in card
    assert "The run has no results of this model" not in card
    export_run(run, tmp_path / "transformers", Export(as_transformers=True))
    found = find_models(str(run))[0].load()
    assert torch.equal(found.stages[0].state_dict()["visual.proj"], soup["visual.proj"])


def test_an_ensemble_is_combined_like_stages_from_the_same_start(pretrained):
    run = execute(with_stages(pretrained, SHORT, SHORT), "--method", "ensemble")
    assert [stage["start"] for stage in read_json(run / "config.json")["stages"]][1:] == ["base"]
    assert read_json(run / "stage-1/train/groups.json")["num_groups"] == 1
    assert len(MultistageCLIP.load(run / "combined/model").stages) == 2


def test_the_share_of_wise_ft_is_chosen_by_task_and_guard(pretrained):
    recipe = choosing(
        with_stages(pretrained, {**SHORT, "lr": 0.01}), select="retrieval:text_retrieval_recall@10",
        guard=("colours:linear_acc1",), wise_ft=(0.25, 0.5),
    )  # fmt: skip
    run = execute(recipe)
    record = read_json(run / "combined/combination.json")
    curve = record["curve"]
    assert [point["share"] for point in curve] == [0, 0.25, 0.5, 1]
    merits = [p["retrieval:text_retrieval_recall@10"] + p["colours:linear_acc1"] for p in curve]
    assert record["wise_ft"] == max(p["share"] for p, merit in zip(curve, merits, strict=True) if merit == max(merits))
    stage = {r["dataset"]: r["metrics"] for r in records(run / "stage-0/eval/results.jsonl")}
    assert curve[-1]["colours:linear_acc1"] == pytest.approx(stage["colours"]["linear_acc1"])
    final = {r["dataset"]: r["metrics"] for r in records(run / "combined/results.jsonl")}
    chosen = next(point for point in curve if point["share"] == record["wise_ft"])
    assert final["retrieval"]["text_retrieval_recall@10"] == pytest.approx(chosen["retrieval:text_retrieval_recall@10"])
    base, tuned = weights(pretrained_folder(pretrained)), weights(run / "stage-0/train/model")
    share = record["wise_ft"]
    for name, tensor in weights(run / "combined/model/stage_0").items():
        torch.testing.assert_close(tensor, (1 - share) * base[name] + share * tuned[name])
    page = write_report(run).read_text()
    assert "Fine-tuned against base weights" in page
    assert f"{share:g} *" in page


def pretrained_folder(recipe):
    return type(recipe.run_dir)(recipe.tower.architecture.removeprefix("local-dir:"))


@pytest.fixture
def measured(monkeypatch):
    """Replace models by the stages in them, and their value by a table."""
    monkeypatch.setattr(final_model, "_mean", lambda run, stages: tuple(stages))

    def use(values):
        monkeypatch.setattr(final_model, "measure", lambda run, stages, terms: {terms[0]: values[stages]})

    return use


def test_a_greedy_soup_keeps_what_does_not_harm(recipe, measured):
    run = Mock(spec=RunContext, config=choosing(recipe, select="val:acc1"))
    measured({(1, 2): 0.70, (1, 2, 0): 0.69, (1, 2, 3): 0.70})
    assert final_model._greedy_soup(run, {0: 0.5, 1: 0.7, 2: 0.6, 3: 0.4}) == [1, 2, 3]
    run.config = choosing(recipe, select="val:image_retrieval_median_rank")
    measured({(3, 0): 5.0, (3, 2): 3.0, (3, 2, 1): 4.0})
    assert final_model._greedy_soup(run, {0: 5.0, 1: 7.0, 2: 6.0, 3: 4.0}) == [2, 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--method soup", "--method soup averages weights, which takes models that start from the same pretrained"),
        ("--eval.select val:acc1", "--eval.select val:acc1 names no evaluation set; there are retrieval, colours, and "
         "--eval.sets val=FOLDER adds one"),
        ("--eval.guard cifar", "--eval.guard cifar names no evaluation set"),
        ("--eval.wise-ft 0.5", "--eval.wise-ft chooses on an evaluation set; add --eval.select SET:METRIC"),
        ("--eval.wise-ft 0.5 --eval.select colours", "--eval.wise-ft interpolates one model with its base, and this "
         "run ends with 2 stages; use --method single, soup or greedy-soup"),
        ("--eval.wise-ft 0.5 --eval.select colours --method single", "--eval.wise-ft interpolates with the pretrained"),
    ],
)  # fmt: skip
def test_impossible_ends_are_refused_before_anything_is_written(recipe, arguments, message):
    with pytest.raises(UserError, match=re.escape(message)):
        execute(with_stages(recipe, SHORT, SHORT), *arguments.split())
    assert not recipe.run_dir.exists()


def test_settings_that_contradict_each_other_are_refused(recipe):
    with pytest.raises(UserError, match=r"--control ifm is a baseline of stages with groups, and --method is single"):
        replace(recipe, method="single", control="ifm")
    with pytest.raises(UserError, match=r"--eval.wise-ft must be from 0 to 1, not 1.5"):
        choosing(recipe, wise_ft=(1.5,))


def test_a_metric_that_is_not_measured_is_refused(pretrained):
    recipe = choosing(with_stages(pretrained, SHORT), select="colours:map", wise_ft=(0.5,))
    with pytest.raises(UserError, match=r"^colours:map is not measured; the metrics of colours are acc1, "):
        execute(recipe)


def test_only_averaged_weights_depend_on_the_choices(pretrained):
    assert not final_model.is_averaged(pretrained)
    assert not final_model.is_averaged(replace(pretrained, method="ensemble", eval=EvalConfig(guard=("a",))))
    assert final_model.is_averaged(replace(pretrained, method="greedy-soup"))
