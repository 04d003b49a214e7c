import json

import numpy as np
import pytest

from mcl_clip import UserError
from mcl_clip.core.stats import compare_paired, holm, mcnemar_exact
from mcl_clip.results.compare import compare_models, comparison_records, comparison_text, find_results
from tests.commands import run_command

UNITS = np.repeat(np.arange(20, dtype=np.int32), 2)


def pattern(number, size, every):
    """Right or wrong, differently for each model."""
    return (np.arange(size) * (2 * number + 3)) % every == 0


def outcomes_of(number):
    images, captions = pattern(number, 20, 4), pattern(number, 40, 3)
    return {
        "text_retrieval_recall@1": images,
        "text_retrieval_recall@5": images | pattern(number + 1, 20, 5),
        "image_retrieval_recall@1": captions,
        "unit:image_retrieval_recall@1": UNITS,
        "mean_recall@1": ((images + captions.reshape(20, 2).mean(1)) / 2).astype(np.float32),
        "text_retrieval": np.arange(20, dtype=np.int32),
    }


def write(folder, label, number=0, *, key="retrieval/photos", sha256="a" * 64, outcomes=None, store=True):
    """Add the result of a model to a folder, as phases and `mcl-clip eval` write it."""
    folder.mkdir(parents=True, exist_ok=True)
    outcomes = outcomes_of(number) if outcomes is None else outcomes
    name = f"outcomes-{key.replace('/', '--')}-{label}.npz"
    metrics = {name: float(values.mean(dtype=np.float64)) for name, values in outcomes.items() if "@" in name}
    metrics = {name: value for name, value in metrics.items() if not name.startswith("unit:")}
    record = {
        "key": key, "task": "zeroshot_retrieval", "n_images": 20, "n_texts": 40, "pretrained": f"run/{label}",
        "data_sha256": sha256, "outcomes": name,
        "metrics": {"text_retrieval_median_rank": 3.0 + number, "main_metric": 0.5, **metrics},
    }  # fmt: skip
    if store:
        np.savez_compressed(folder / name, **outcomes)
    with (folder / "results.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")
    return folder


@pytest.fixture
def run(tmp_path):
    """A run of two stages."""
    folder = tmp_path / "run"
    write(folder / "stage-0/eval", "stage-0", 0)
    write(folder / "stage-1/eval", "stage-1", 1)
    write(folder / "stage-1/eval", "stages-0-1-concat", 2)
    write(folder / "combined", "combined", 3)
    (folder / "config.json").write_text("{}")
    return folder


def rank_of(results):
    """Which of the models of the fixture it is."""
    return results["retrieval/photos"].record["metrics"]["text_retrieval_median_rank"] - 3


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("run", 3),
        ("run/combined", 3),
        ("run/combined:combined", 3),
        ("run/stage-0", 0),
        ("run/stage-1", 1),
        ("run/stage-1:stages-0-1-concat", 2),
        ("run/stage-1/eval:stages-0-1-concat", 2),
        ("run:stages-0-1-concat", 2),
        ("run:stage-0", 0),
        ("run/stage-0/eval", 0),
        ("evaluations/some", 5),
        ("with:colon", 6),
        ("with:colon:single", 6),
        ("several/stage-1", 1),
    ],
)
def test_names_of_models(run, tmp_path, name, number):
    write(tmp_path / "evaluations/some", "run-combined", 5)
    write(tmp_path / "with:colon", "single", 6)
    write(tmp_path / "with", "colon", 7)
    for stage in (0, 1):
        write(tmp_path / "several/stage-1", f"stage-{stage}", stage)
    found = find_results(str(tmp_path / name))
    assert rank_of(found) == number
    assert found["retrieval/photos"].outcomes_path.is_file()


def test_models_that_are_not_there(run, tmp_path):
    with pytest.raises(UserError, match=r"there are no results in .*/nowhere, as no results\.jsonl there has a record"):
        find_results(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"there are no results in .*/empty,"):
        find_results(str(tmp_path / "empty:label"))
    with pytest.raises(
        UserError, match=r"has no results of 'x' but of stage-0, .*combined; say which, as in .*:stage-0"
    ):
        find_results(f"{run}:x")
    with pytest.raises(UserError, match="has no results of 'eval' but of stage-1, stages-0-1-concat"):
        find_results(str(run / "stage-1/eval"))


def test_a_run_without_its_combined_model_is_not_taken_for_a_stage(run):
    (run / "combined/results.jsonl").unlink()
    (run / "stage-1/eval/results.jsonl").unlink()
    with pytest.raises(
        UserError, match=r"has no results of 'combined' but of stage-0; say which, as in .*/run:stage-0"
    ):
        find_results(str(run))


def test_two_results_of_one_model_are_not_mixed(tmp_path):
    for sha256 in "ab":
        write(tmp_path, "model", sha256=sha256 * 64)
    with pytest.raises(UserError, match="has two results of model for retrieval/photos; compare folders that have one"):
        find_results(str(tmp_path))


def test_labels_come_from_the_record_where_it_has_one(tmp_path):
    write(tmp_path, "run-combined")
    records = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    (tmp_path / "results.jsonl").write_text(json.dumps({**records[0], "label": "run-combined-bf16"}) + "\n")
    assert find_results(f"{tmp_path}:run-combined-bf16")
    with pytest.raises(UserError, match="no results of 'run-combined' but of run-combined-bf16"):
        find_results(f"{tmp_path}:run-combined")


def compare(a, b, **options):
    return compare_models(str(a), str(b), **options)


def metrics_of(comparison):
    return [metric for metrics in comparison.sets.values() for metric in metrics]


def test_metrics_are_compared_query_by_query(run):
    comparison = compare(run / "stage-0", run / "stage-1", resamples=500)
    assert not comparison.left_out
    found = {metric.metric: metric for metric in metrics_of(comparison)}
    assert list(found) == [
        "text_retrieval_recall@1", "text_retrieval_recall@5", "image_retrieval_recall@1", "mean_recall@1",
        "text_retrieval_median_rank",
    ]  # fmt: skip
    one, two = outcomes_of(0), outcomes_of(1)
    for name in list(found)[:-1]:
        metric = found[name]
        expected = compare_paired(one[name], two[name], one.get(f"unit:{name}"), resamples=500)
        assert metric.a == pytest.approx(one[name].mean())
        assert metric.b == pytest.approx(two[name].mean())
        assert metric.paired == expected
    by_caption = found["image_retrieval_recall@1"].paired
    assert (by_caption.n, by_caption.units, by_caption.p_value) == (40, 20, None)
    assert by_caption.only_a is not None
    recall = found["text_retrieval_recall@1"]
    assert recall.paired.p_value == mcnemar_exact(int((one[recall.metric] & ~two[recall.metric]).sum()),
                                           int((~one[recall.metric] & two[recall.metric]).sum()))  # fmt: skip
    assert found["mean_recall@1"].paired.only_a is None
    rank = found["text_retrieval_median_rank"]
    assert (rank.a, rank.b, rank.paired) == (3, 4, None)


def test_p_values_of_a_set_are_adjusted_for_their_number(tmp_path):
    right = np.arange(40) < 20
    sizes = {"one@1": 12, "two@1": 3, "three@1": 9}
    write(tmp_path / "a", "a", outcomes={name: right | (np.arange(40) < 20 + size) for name, size in sizes.items()})
    write(tmp_path / "b", "b", outcomes=dict.fromkeys(sizes, right))
    write(tmp_path / "a", "a", key="retrieval/alone", outcomes={"one@1": ~right})
    write(tmp_path / "b", "b", key="retrieval/alone", outcomes={"one@1": right})
    found = [metric for metric in metrics_of(compare(tmp_path / "a", tmp_path / "b")) if metric.paired]
    p_values = [2 / 2**size for size in sizes.values()]
    assert [metric.paired.p_value for metric in found[:3]] == p_values
    assert [metric.p_holm for metric in found[:3]] == holm(p_values) == [3 * p_values[0], p_values[1], 2 * p_values[2]]
    assert (found[3].paired.p_value, found[3].p_holm) == (1.0, None)
    assert (found[3].paired.only_a, found[3].paired.only_b) == (20, 20)


def test_sets_that_cannot_be_compared_are_named(tmp_path):
    for side in "ab":
        folder = tmp_path / side
        write(folder, "m", key="retrieval/good")
        write(folder, "m", key="retrieval/other", sha256=side * 64)
        write(folder, "m", key=f"retrieval/only_{side}")
        write(folder, "m", key="retrieval/lost", store=side == "a")
        write(folder, "m", key="retrieval/broken")
        size = 20 if side == "a" else 21
        write(folder, "m", key="retrieval/sizes", outcomes={"x@1": np.zeros(size, bool)})
    (tmp_path / "a/outcomes-retrieval--broken-m.npz").write_bytes(b"PK\x03\x04 no more")
    comparison = compare(tmp_path / "a", tmp_path / "b", resamples=100)
    assert comparison.sets.keys() == {"retrieval/good"}
    left_out = {key.removeprefix("retrieval/"): reason for key, reason in comparison.left_out.items()}
    assert left_out.keys() == {"other", "only_a", "only_b", "lost", "broken", "sizes"}
    assert left_out["other"] == "the data differ (sha256 aaaaaaaa... and bbbbbbbb...)"
    assert left_out["only_a"] == f"only {tmp_path / 'a'} has it"
    assert left_out["only_b"] == f"only {tmp_path / 'b'} has it"
    assert left_out["lost"] == f"{tmp_path / 'b'} has no outcomes of single queries for it; evaluate it again"
    assert "outcomes-retrieval--broken-m.npz cannot be read" in left_out["broken"]
    assert left_out["sizes"] == "x@1 has 20 outcomes in one and 21 in the other"
    assert comparison_text(comparison).splitlines()[-6:] == [
        f"{key} is left out: {reason}" for key, reason in comparison.left_out.items()
    ]


def test_records_of_earlier_versions_have_no_outcomes(tmp_path):
    for side in "ab":
        write(tmp_path / side, "m")
        path = tmp_path / side / "results.jsonl"
        record = json.loads(path.read_text())
        del record["outcomes"]
        path.write_text(json.dumps(record) + "\n")
    with pytest.raises(UserError, match=r"no set in common \(retrieval/photos: .*/a has no outcomes of single queries"):
        compare(tmp_path / "a", tmp_path / "b")


def test_models_without_a_common_set(tmp_path):
    write(tmp_path / "a", "m", key="retrieval/x")
    write(tmp_path / "b", "m", key="retrieval/y")
    with pytest.raises(UserError, match=r"/a and .*/b have no set in common \(retrieval/x: only .*/a has it; "):
        compare(tmp_path / "a", tmp_path / "b")


def test_the_table(tmp_path):
    ones, zeros = np.ones(16, bool), np.zeros(16, bool)
    units = np.repeat(np.arange(8, dtype=np.int32), 2)
    write(tmp_path / "a", "a", outcomes={"easy@1": ones, "by_caption@1": ones, "unit:by_caption@1": units})
    write(tmp_path / "b", "b", 2, outcomes={"easy@1": zeros, "by_caption@1": zeros, "unit:by_caption@1": units})
    assert comparison_text(compare(tmp_path / "a", tmp_path / "b", resamples=100)).splitlines() == [
        f"A = {tmp_path / 'a'}",
        f"B = {tmp_path / 'b'}",
        "retrieval/photos: 20 images, 40 texts",
        "                                  A    B   A - B              95 %   n  units  only A/B        p",
        "  easy@1                      100.0  0.0  +100.0  [+100.0, +100.0]  16      -      16/0  3.1e-05",
        "  by_caption@1                100.0  0.0  +100.0  [+100.0, +100.0]  16      8      16/0        -",
        "  text_retrieval_median_rank      3    5      -2                 -   -      -         -        -",
    ]


def test_the_command(run, tmp_path, monkeypatch, capsys):
    write(run / "stage-0/eval", "stage-0", key="retrieval/more")
    out = tmp_path / "new/comparison.jsonl"
    arguments = (run / "stage-0", run, "--resamples", "200", "--out", out)
    code, printed, _ = run_command(monkeypatch, capsys, "compare", *arguments)
    comparison = compare(run / "stage-0", run, resamples=200)
    assert code == 0
    assert printed == comparison_text(comparison) + "\n"
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert records == json.loads(json.dumps(list(comparison_records(comparison))))
    assert records[0].keys() >= {"key", "metric", "a", "b", "difference", "ci95", "n", "units", "only_a", "only_b",
                                 "p_value", "p_holm", "model_a", "model_b", "data_sha256"}  # fmt: skip
    assert records[-1]["left_out"] == f"only {run / 'stage-0'} has it"
    assert run_command(monkeypatch, capsys, "compare", *arguments)[1] == printed


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["/nowhere/a", "/nowhere/b"], "error: there are no results in /nowhere/a"),
        (["/nowhere/a", "/nowhere/b", "--resamples", "10"], "error: --resamples must be at least 100, not 10"),
        (["/nowhere/a"], "required"),
    ],
)
def test_mistakes_end_with_exit_code_2(monkeypatch, capsys, arguments, sentence):
    code, _, err = run_command(monkeypatch, capsys, "compare", *arguments)
    assert code == 2
    assert sentence in err
    assert "Traceback" not in err


def test_metrics_that_were_not_measured_are_left_out(tmp_path):
    folders = [write(tmp_path / name, name, number) for number, name in enumerate("ab")]
    for folder, missing in zip(folders, (("text_retrieval_median_rank",), ()), strict=True):
        record = json.loads((folder / "results.jsonl").read_text())
        record["metrics"] |= dict.fromkeys(("cluster_nmi", *missing))
        (folder / "results.jsonl").write_text(json.dumps(record) + "\n")
    found = {metric.metric for metric in metrics_of(compare(*folders, resamples=10))}
    assert "mean_recall@1" in found
    assert not found & {"cluster_nmi", "text_retrieval_median_rank"}
