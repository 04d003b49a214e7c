"""The words that tell a cluster from the others."""

import numpy as np

from mcl_clip.report.words import telling_words, words_of


def found(captions, clusters, most=5):
    telling = telling_words([(text,) for text in captions], np.array(clusters), most)
    return {cluster: [word.word for word in words] for cluster, words in telling.items()}


def test_a_word_of_one_cluster_alone_tells_most():
    captions = ["a red dog", "a red cat", "a red cow", "a blue dog", "a blue cat", "a blue cow"]
    assert found(captions, [0, 0, 0, 1, 1, 1]) == {0: ["a red"], 1: ["a blue"]}


def test_what_all_have_tells_nothing():
    captions = ["the dog"] * 10 + ["the cat"] * 10
    assert found(captions, [0] * 10 + [1] * 10) == {0: ["dog"], 1: ["cat"]}
    assert found(["the dog"] * 20, [0] * 10 + [1] * 10) == {0: [], 1: []}


def test_shares_are_of_the_pairs_that_have_the_word():
    captions = ["snow and dogs"] * 3 + ["dogs at home"] + ["cats at home"] * 6
    (word, *_) = telling_words([(text,) for text in captions], np.array([0] * 4 + [1] * 6))[0]
    assert str(word) == "dogs 100 % (all: 40 %)"


def test_a_word_that_one_pair_has_says_nothing_about_its_cluster():
    assert found(["a unicorn", "a dog"], [0, 1]) == {0: [], 1: []}


def test_several_captions_of_a_pair_count_a_word_once():
    captions = [("red red red", "red"), ("blue",), ("red",), ("blue",)]
    (word, *_) = telling_words(captions, np.array([0, 1, 0, 1]))[0]
    assert (word.word, word.share, word.share_of_all) == ("red", 1.0, 0.5)


def test_any_script_is_read_and_markup_is_no_word():
    assert words_of(["собака бежит"]) == {"собака", "бежит", "собака бежит"}
    assert words_of(["<b>don't</b> $x^2$"]) >= {"b", "don't", "x", "2"}
    assert not words_of(["", "!!! ---"])


def test_long_captions_and_words_are_bounded():
    assert len(words_of([" ".join(f"w{n}" for n in range(100_000))])) < 500_000
    assert max(map(len, words_of(["x" * 10_000]))) <= 81


def test_there_may_be_no_captions():
    assert telling_words([(), ()], np.array([0, 1])) == {0: [], 1: []}
    assert telling_words([], np.zeros(0, np.int64)) == {}
