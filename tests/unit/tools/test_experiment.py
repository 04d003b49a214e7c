"""Arms are run by a stand-in that writes what a run leaves behind."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest

from mcl_clip.core.errors import UserError
from mcl_clip.tools.experiment import CONTROLS, ExperimentPlan, control_arms, is_done, run_arms, table

STAND_IN = """
import argparse, json, sys
from pathlib import Path
import numpy as np

parser = argparse.ArgumentParser()
parser.add_argument("--run-dir", type=Path)
parser.add_argument("--seed", type=int)
parser.add_argument("--control", default="none")
parser.add_argument("--fail", action="store_true")
parser.add_argument("--plain", action="store_true")
parser.add_argument("--sha256", default="one")
parser.add_argument("--units", action="store_true")
options = parser.parse_args()
run = options.run_dir
(run / "index").mkdir(parents=True, exist_ok=True)
with (run / "starts.txt").open("a") as file:
    file.write("copied\\n" if (run / "stage-0" / "eval").exists() else "fresh\\n")
if options.fail:
    sys.exit("error: the disk is full")

def write(folder, label, stage, share):
    folder.mkdir(parents=True, exist_ok=True)
    outcomes = {"acc1": np.arange(100) < share}
    outcomes["linear_acc1"] = np.arange(100) < share + 1
    if label == "combined" and options.control == "none" and not options.plain:
        outcomes["linear_acc1_width_8"] = np.arange(100) < share - 1
    if options.units:  # five captions an image, all right or all wrong
        outcomes["acc1"], outcomes["unit:acc1"] = np.arange(100) // 5 * 5 < share // 5 * 5, np.arange(100) // 5
    np.savez(folder / f"outcomes-{label}.npz", **outcomes)
    record = {"dataset": "hidden", "pretrained": f"run/{label}", "stage": stage, "outcomes": f"outcomes-{label}.npz"}
    record |= {"key": "k", "task": "t", "metrics": {}, "data_sha256": options.sha256, "n_images": 100, "n_texts": 10}
    code = {**record, "dataset": "code"}
    lines = [record] if options.plain else [record, code]
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))

level = 90 if options.plain else {"none": 70, "single": 50}.get(options.control, 60)
write(run / "stage-0" / "eval", "stage-0", 0, 40)
write(run / "combined", "combined", 0, level + options.seed)
(run / "combined" / "DONE.json").write_text("{}")
"""
FIGURES = {
    "read-out": ("hidden:linear_acc1",),
    "at 8": ("hidden:linear_acc1_width_8",),
    "both": ("hidden:acc1", "hidden:linear_acc1"),
    "code": ("code:acc1",),
}


@pytest.fixture
def plan(tmp_path):
    recipe = tmp_path / "recipe.py"
    recipe.write_text(STAND_IN)
    arms = control_arms((), {"oracle": ("--control", "single", "--plain")})
    return ExperimentPlan(
        recipe=recipe, out=tmp_path / "out", seeds=(1, 2), arms=arms, figures=FIGURES, low="single", high="oracle"
    )


def starts(plan, arm, seed=1):
    return (plan.folder(seed, arm) / "starts.txt").read_text().split()


def rows(text, title):
    """The rows of the table under a title: name -> cells."""
    lines = text.split(title)[1].split("\n\n")[1].splitlines()
    return {name: cells for name, *cells in ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:])}


def test_all_arms_are_run_once_and_later_ones_share_the_first_stage(plan):
    run_arms(plan, launcher=[sys.executable], jobs=2)
    assert all(is_done(plan.folder(seed, arm)) for seed in (1, 2) for arm in ("mcl", *CONTROLS, "oracle"))
    assert starts(plan, "mcl") == starts(plan, "single") == starts(plan, "oracle") == ["fresh"]
    for arm in ("ensemble", "no-groups", "random-groups"):
        assert starts(plan, arm, 2) == ["copied"]
    run_arms(plan, launcher=[sys.executable], jobs=1)
    assert starts(plan, "mcl") == ["fresh"]


def test_the_table_has_means_gaps_and_differences(plan):
    run_arms(plan, launcher=[sys.executable], jobs=2)
    text = table(plan, resamples=200)
    means = rows(text, "Percent, mean of 2 seeds")
    assert means["single"][0].startswith("52.5 [")  # linear_acc1: share + 1, of seeds 1 and 2
    assert means["mcl"][1].startswith("70.5 [")  # narrower than the features: the figure at that width
    assert means["single"][1].startswith("52.5 [")  # not wider than that: the read-out itself
    assert means["mcl"][2].startswith("72.0 [")
    assert means["oracle"][3] == "-"  # without the code there is no such set
    assert means["mcl, stage 0 alone"][0].startswith("41.0 [")
    recovered = rows(text, "Share of the gap")
    assert recovered["mcl"][0].startswith("50.0 [")
    assert recovered["ensemble"][0].startswith("25.0 [")
    assert "single" not in recovered
    behind = rows(text, "Difference of `mcl` to each arm")
    assert behind["single"][0].startswith("20.0 [")
    assert behind["oracle"][0].startswith("-20.0 [")
    assert (plan.out / "table.md").read_text().strip() == text
    records = [json.loads(line) for line in (plan.out / "results.jsonl").read_text().splitlines()]
    found = next(r for r in records if (r["row"], r["figure"], r["what"]) == ("mcl", "both", "mean"))
    assert (found["value"], found["seeds"], found["items"]) == (pytest.approx(0.72), [1, 2], 100)
    assert found["low"] < 0.72 < found["high"]


def test_a_run_that_fails_is_named_with_its_last_words_and_the_rest_is_kept(plan):
    broken = replace(plan, arms={"single": plan.arms["single"], "broken": ("--fail",)})
    with pytest.raises(
        UserError, match=r"2 of 4 runs failed.*error: the disk is full \(full output in .*broken\.log\)"
    ):
        run_arms(broken, launcher=[sys.executable], jobs=1)
    assert is_done(plan.folder(1, "single"))
    assert is_done(plan.folder(2, "single"))


def test_arms_and_figures_that_are_not_there(plan):
    with pytest.raises(UserError, match="there is no arm 'twin'; there are mcl, single, ensemble"):
        control_arms(("mcl", "twin"), {})
    assert tuple(control_arms(("ifm", "mcl"), {})) == ("ifm", "mcl")
    run_arms(plan, launcher=[sys.executable], jobs=2)
    with pytest.raises(UserError, match="has no metric 'acc5' for hidden; it has acc1, linear_acc1"):
        table(replace(plan, figures={"wrong": ("hidden:acc5",)}))
    with pytest.raises(UserError, match="has results for nothing:acc1"):
        table(replace(plan, figures={"wrong": ("nothing:acc1",)}))


def test_a_recipe_without_the_stages_has_no_differences(plan):
    alone = replace(plan, arms={"single": plan.arms["single"]}, high=None)
    run_arms(alone, launcher=[sys.executable], jobs=1)
    text = table(alone, resamples=100)
    assert "Difference" not in text
    assert "gap" not in text
    assert np.isclose(float(rows(text, "Percent")["single"][0].split()[0]), 52.5)


def test_a_changed_recipe_or_arm_is_refused(plan):
    alone = replace(plan, arms={"single": plan.arms["single"]}, high=None)
    run_arms(alone, launcher=[sys.executable], jobs=1)
    run_arms(replace(alone, arms={"mcl": ()}), launcher=[sys.executable], jobs=1)  # more arms are welcome
    with pytest.raises(UserError, match="the arguments of single differ; use another --out"):
        run_arms(replace(alone, arms={"single": ("--control", "ifm")}), launcher=[sys.executable], jobs=1)
    plan.recipe.write_text(STAND_IN + "# another one")
    with pytest.raises(UserError, match=r"recipe\.py has changed; use another --out"):
        run_arms(alone, launcher=[sys.executable], jobs=1)


def test_captions_of_one_image_are_one_item(plan):
    apart = replace(plan, figures={"right": ("hidden:acc1",)}, arms={"single": plan.arms["single"]}, high=None)
    together = replace(apart, out=plan.out.with_name("units"), arms={"single": (*plan.arms["single"], "--units")})
    widths = []
    for one in (apart, together):
        run_arms(one, launcher=[sys.executable], jobs=1)
        table(one, resamples=1000)
        (record,) = (json.loads(line) for line in (one.out / "results.jsonl").read_text().splitlines())
        assert record["items"] == (20 if one is together else 100)
        assert record["value"] == pytest.approx(0.5 if one is together else 0.515)
        widths.append(record["high"] - record["low"])
    assert widths[1] > 1.8 * widths[0]  # the square root of five, but for chance


def test_a_set_that_was_made_anew_between_seeds_is_refused(plan):
    alone = replace(plan, arms={"single": plan.arms["single"]}, high=None, seeds=(1,))
    run_arms(alone, launcher=[sys.executable], jobs=1)
    again = plan.folder(2, "single")
    run_arms(
        replace(alone, out=plan.out / "x", arms={"single": ("--sha256", "two")}), launcher=[sys.executable], jobs=1
    )
    (plan.out / "x/seed-1/single").rename(again.parent.mkdir(parents=True) or again)
    with pytest.raises(UserError, match="the runs of single were not all evaluated on the same hidden"):
        table(replace(alone, seeds=(1, 2)))


def test_the_figure_of_another_width_does_not_stand_in(plan):
    run_arms(plan, launcher=[sys.executable], jobs=2)
    with pytest.raises(UserError, match="has no metric 'linear_acc1_width_9' for hidden"):
        table(replace(plan, figures={"at 9": ("hidden:linear_acc1_width_9",)}))
