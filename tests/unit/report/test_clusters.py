"""Which clusters are shown, their keywords, and their flow into the next stage."""

import numpy as np
import pytest

from mcl_clip.report.clusters import MAX_BANDS, _bands, _flow_figure, keywords, shown_clusters, terms


def test_clusters_are_shown_from_the_largest_to_the_smallest():
    sizes = np.array([5, 0, 100, 7, 60, 1, 30])
    assert shown_clusters(sizes, 3)[0] == 2
    assert shown_clusters(sizes, 3)[-1] == 5
    assert 1 not in shown_clusters(sizes, 100)
    assert len(shown_clusters(sizes, 100)) == 6


@pytest.mark.parametrize("clusters", [1, 3, MAX_BANDS, 500])
def test_every_row_has_a_band(clusters):
    assignments = np.arange(2000) % clusters
    largest, bands = _bands(assignments)
    assert len(largest) == min(MAX_BANDS, clusters)
    assert np.bincount(bands, minlength=len(largest) + 1).sum() == 2000
    assert all((assignments[bands == band] == cluster).all() for band, cluster in enumerate(largest))
    assert (bands == len(largest)).any() == (clusters > MAX_BANDS)


def test_names_in_the_flow_can_do_nothing():
    names = [["$x^2$ <b>", ""], ["</svg><script>", "雪", "3 other clusters"]]
    figure = str(_flow_figure(np.array([[3, 0, 2], [0, 0, 0]]), names, (0, 1)))
    assert "<script" not in figure
    assert "$x^2$ &lt;b&gt;" in figure
    assert figure.count("<svg") == figure.count("</svg>") == 1


def words_by_cluster(captions, clusters):
    by_cluster = keywords([(text,) for text in captions], np.array(clusters))
    return {cluster: [keyword.word for keyword in of_cluster] for cluster, of_cluster in by_cluster.items()}


def test_a_word_of_one_cluster_alone_is_its_keyword():
    captions = ["a red dog", "a red cat", "a red cow", "a blue dog", "a blue cat", "a blue cow"]
    assert words_by_cluster(captions, [0, 0, 0, 1, 1, 1]) == {0: ["a red"], 1: ["a blue"]}


def test_a_word_of_all_clusters_is_no_keyword():
    captions = ["the dog"] * 10 + ["the cat"] * 10
    assert words_by_cluster(captions, [0] * 10 + [1] * 10) == {0: ["dog"], 1: ["cat"]}
    assert words_by_cluster(["the dog"] * 20, [0] * 10 + [1] * 10) == {0: [], 1: []}


def test_shares_are_of_the_pairs_that_have_the_word():
    captions = ["snow and dogs"] * 3 + ["dogs at home"] + ["cats at home"] * 6
    (word, *_) = keywords([(text,) for text in captions], np.array([0] * 4 + [1] * 6))[0]
    assert str(word) == "dogs 100 % (all: 40 %)"


def test_a_word_of_one_pair_is_no_keyword():
    assert words_by_cluster(["a unicorn", "a dog"], [0, 1]) == {0: [], 1: []}


def test_several_captions_of_a_pair_count_a_word_once():
    captions = [("red red red", "red"), ("blue",), ("red",), ("blue",)]
    (word, *_) = keywords(captions, np.array([0, 1, 0, 1]))[0]
    assert (word.word, word.share, word.share_of_all) == ("red", 1.0, 0.5)


def test_words_of_any_script_are_found_and_markup_is_not():
    assert terms(["собака бежит"]) == {"собака", "бежит", "собака бежит"}
    assert terms(["<b>don't</b> $x^2$"]) >= {"b", "don't", "x", "2"}
    assert not terms(["", "!!! ---"])


def test_long_captions_and_words_are_bounded():
    assert len(terms([" ".join(f"w{n}" for n in range(100_000))])) < 500_000
    assert max(map(len, terms(["x" * 10_000]))) <= 81


def test_there_may_be_no_captions():
    assert keywords([(), ()], np.array([0, 1])) == {0: [], 1: []}
    assert keywords([], np.zeros(0, np.int64)) == {}
