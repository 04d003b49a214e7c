import json

from mcl_clip.eval.suite import results_table, run_results

RECALLS = {
    f"{side}_{name}": value
    for side in ("text_retrieval", "image_retrieval")
    for name, value in (("recall@1", 0.125), ("recall@5", 0.5), ("recall@10", 1.0), ("median_rank", 3.0))
}


def record(key, task, pretrained, **metrics):
    return {"key": key, "task": task, "pretrained": pretrained, "n_images": 8, "n_texts": 16, "metrics": metrics}


def write(folder, *records):
    folder.mkdir(parents=True)
    (folder / "results.jsonl").write_text("".join(json.dumps(item) + "\n" for item in records))


def test_nothing_was_measured(tmp_path):
    assert results_table(tmp_path) == ""
    assert run_results(tmp_path) == []


def test_the_table(tmp_path):
    retrieval = ("retrieval/photos", "zeroshot_retrieval")
    classes = ("classification/colours", "zeroshot_classification")
    write(
        tmp_path / "stage-0/eval",
        record(*retrieval, "run/stage-0", **RECALLS),
        record(*classes, "run/stage-0", acc1=0.25, acc5=1.0, linear_acc1=0.96875, cluster_nmi=0.5),
    )
    write(
        tmp_path / "combined",
        record(*retrieval, "run/combined", **RECALLS | {"text_retrieval_median_rank": 12.0}),
        record(*classes, "run/combined", acc1=0.5, linear_acc1=1.0),
    )
    assert results_table(tmp_path).splitlines() == [
        "retrieval/photos: 8 images, 16 texts",
        "            i2t R@1  i2t R@5  i2t R@10  i2t median  t2i R@1  t2i R@5  t2i R@10  t2i median",
        "  stage-0      12.5     50.0     100.0           3     12.5     50.0     100.0           3",
        "  combined     12.5     50.0     100.0          12     12.5     50.0     100.0           3",
        "classification/colours: 8 images, 16 texts",
        "            zero-shot  top 5  linear read-out  NMI of clusters",
        "  stage-0        25.0  100.0             96.9             50.0",
        "  combined       50.0      -            100.0                -",
    ]


def test_stages_come_in_the_order_of_their_numbers(tmp_path):
    for stage in (10, 2, 0):
        write(tmp_path / f"stage-{stage}/eval", record("k", "zeroshot_classification", f"r/stage-{stage}", acc1=0.5))
    write(tmp_path / "combined", record("k", "zeroshot_classification", "r/combined", acc1=0.5))
    names = [item["pretrained"] for item in run_results(tmp_path)]
    assert names == ["r/stage-0", "r/stage-2", "r/stage-10", "r/combined"]


def test_a_record_that_was_cut_off_is_left_out(tmp_path):
    write(tmp_path / "combined", record("k", "zeroshot_classification", "r/combined", acc1=0.5))
    with (tmp_path / "combined/results.jsonl").open("a") as file:
        file.write('{"key": "k", "task"')
    assert len(run_results(tmp_path)) == 1
