"""Stages whose groups are clusters of the features of stage 0, and stages whose negatives are of other groups."""

from dataclasses import replace

import numpy as np
import pytest

from mcl_clip.config import ClusterConfig
from mcl_clip.core.errors import UserError
from mcl_clip.core.files import read_json
from mcl_clip.data.features import EmbeddingTable
from mcl_clip.data.index import ShardIndex
from mcl_clip.data.storage import load_tensors
from mcl_clip.report.page import write_report
from tests.recipes.runs import execute, files, records, with_stages

SHORT = {"steps": 4, "warmup_steps": 0}


def test_groups_are_clusters_of_the_features_of_stage_0(recipe):
    clusters = ClusterConfig(num_clusters=3, num_starts=2)
    of_base = replace(clusters, num_clusters=4, on="text", metric="cosine", features="base")
    stages = ({"cluster": clusters}, {"start": "base", "cluster": of_base}, {"start": "base"})
    recipe = with_stages(recipe, *({**SHORT, **stage} for stage in stages))
    run = execute(recipe)
    assert [read_json(run / f"stage-{s}/labels/labels.json")["radix"] for s in range(3)] == [[3], [4], [4, 3]]
    table = EmbeddingTable(run / "stage-0/embed", ShardIndex.load(run / "index/index.arrow"))
    features = table.rows(0, len(table), "text").astype(np.float32)
    centroids = load_tensors(run / "stage-1/cluster/centroids.safetensors")["text"].float().numpy()
    similarities = np.sort(features @ centroids.T, axis=1)
    is_clear = similarities[:, -1] - similarities[:, -2] > 1e-3
    assigned = np.load(run / "stage-1/cluster/assignments-text.npy")
    assert is_clear.sum() > 100
    assert np.array_equal((features @ centroids.T).argmax(1)[is_clear], assigned[is_clear])
    assert np.array_equal(np.load(run / "stage-1/labels/labels.npy"), assigned)
    page = write_report(run).read_text()
    assert "4 of texts, cosine metric, of stage 0" in page
    before = files(run)
    execute(recipe)
    assert {name: of for name, of in files(run).items() if "report" not in name} == {
        name: of for name, of in before.items() if "report" not in name
    }


def test_negatives_of_other_groups_are_in_batches_of_all_groups(recipe):
    run = execute(with_stages(recipe, SHORT, {**SHORT, "groups": "others"}))
    sizes = [group["size"] for group in read_json(run / "stage-1/train/groups.json")["groups"]]
    assert len(sizes) > 1
    expected = 15 * (1 - sum(size**2 for size in sizes) / sum(sizes) ** 2)
    negatives = np.mean([record["negatives_per_row"] for record in records(run / "stage-1/train/metrics.jsonl")])
    assert 0.6 * expected < negatives < 1.1 * expected  # rows with equal captions are masked
    assert "all other clusters" in write_report(run).read_text()


def test_a_single_group_has_no_others(recipe):
    with pytest.raises(UserError, match=r"--stages.0.train.groups others leaves no negatives"):
        execute(with_stages(recipe, {**SHORT, "groups": "others"}))
    assert not recipe.run_dir.exists()
