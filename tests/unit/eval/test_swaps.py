import json
import re
from collections import Counter

import numpy as np
import pytest

from mcl_clip.core.errors import UserError
from mcl_clip.eval.pairs import PairSet
from mcl_clip.eval.swaps import SwapWords, make_swaps, write_swaps
from tests.photos import write_photos


@pytest.fixture(scope="module")
def words():
    return SwapWords.read()


def given(path, **content):
    path.write_text(json.dumps(content))
    return SwapWords.read(path)


def swaps_of(captions, words, **options):
    return make_swaps(captions, words, keys=[str(number) for number in range(len(captions))], **options)


def every_swap(captions, words, **options):
    return swaps_of(captions, words, is_balanced=False, **options)


def wrong_of(caption, words, *others):
    """All swaps of a caption beside pictures with the other captions, over some seeds."""
    captions = [[caption], *([other] for other in others)]
    return {s.wrong for seed in range(8) for s in every_swap(captions, words, seed=seed) if s.picture == 0}


@pytest.mark.parametrize(
    ("caption", "other", "expected"),
    [
        ("Two dogs on grass", "three cats", "Three dogs on grass"),
        ("TWO dogs", "three cats", "THREE dogs"),
        ("a blue car", "an orange car", "an orange car"),
        ("An orange car", "a blue car", "A blue car"),
        ("an old hat", "a young hat", "a young hat"),
        ("a man's hat", "the woman", "a woman's hat"),
        ("a cat to the left of it", "to the right", "a cat to the right of it"),
        ("a boy ,standing", "a girl", "a girl ,standing"),
    ],
)
def test_a_word_becomes_another_of_its_form_with_article_and_case(words, caption, other, expected):
    assert wrong_of(caption, words, other) == {expected}


@pytest.mark.parametrize(
    ("caption", "other"),
    [
        ("one dog runs", "two dogs"),  # dogs would have to become a dog
        ("a red-haired clown", "a blue clown"),
        ("a bored clown", "a blue clown"),
        ("they left the room", "to the right"),
        ("two dogs", "nothing else"),  # no picture has another number
    ],
)
def test_what_is_no_word_of_a_kind_or_has_no_replacement_stays(words, caption, other):
    with pytest.raises(UserError, match="no caption of 2 pictures has a word of the kinds color, number, person"):
        every_swap([[caption], [other]], words)


def test_a_replacement_holds_in_no_caption_of_the_picture(words):
    others = ["a woman", "a girl", "a man", "six dogs", "two dogs"]
    assert wrong_of("a man sits", words, *others) == {"a woman sits", "a girl sits"}
    captions = [["a man sits", "a lady sits"], *([other] for other in others)]  # the lady is a woman, not a girl
    assert {s.wrong for seed in range(8) for s in every_swap(captions, words, seed=seed) if s.picture == 0} <= {
        "a girl sits", "a man sits", "a boy sits"
    }  # fmt: skip
    pair = [["six dogs", "a couple of dogs"], ["two dogs"], ["five dogs"]]
    assert {s.wrong for seed in range(8) for s in every_swap(pair, words, seed=seed) if s.picture == 0} == {"five dogs"}


def test_swaps_of_random_captions_keep_the_rest_and_hold_nowhere(tmp_path):
    """A property over many captions: one word differs, and the new one is in no caption of the picture."""
    names = ["red", "blue", "green", "dark blue", "gold"]
    words = given(tmp_path / "words.json", color=[names], holds=[{"words": ["gold"], "with": ["golden"]}])
    draw = np.random.default_rng(0)
    captions = [
        [" ".join(draw.choice([*names, "golden", "dog", "redder"], 5).tolist()) for _ in range(3)] for _ in range(200)
    ]
    found = every_swap(captions, words)
    assert len(found) > 200
    for swap in found:
        assert swap.caption in captions[swap.picture]
        there = " ".join(captions[swap.picture])
        assert not re.search(rf"\b{swap.replacement}\b", there)
        assert swap.replacement != "gold" or "golden" not in there
        rest = re.escape(swap.caption).split(re.escape(swap.word))
        assert any(
            swap.wrong == swap.word.join(parts[:n]) + swap.replacement + swap.word.join(parts[n:])
            for parts in [[re.sub(r"\\(.)", r"\1", part) for part in rest]]
            for n in range(1, len(parts))
        )


def test_the_same_seed_makes_the_same_swaps_whatever_else_is_in_the_set(words):
    captions = [[f"a {color} ball", f"two {color} balls"] for color in ("red", "blue", "green", "pink") * 5]
    captions += [["three dogs"]] * 5
    keys = [f"key {number}" for number in range(len(captions))]
    found = make_swaps(captions, words, keys=keys, seed=3, is_balanced=False)
    assert found == make_swaps(captions, words, keys=keys, seed=3, is_balanced=False)
    assert swaps_of(captions, words, seed=3) == swaps_of(captions, words, seed=3)
    assert found != make_swaps(captions, words, keys=keys, seed=4, is_balanced=False)
    order = np.argsort(keys)
    shuffled = make_swaps([captions[n] for n in order], words, keys=[keys[n] for n in order], seed=3, is_balanced=False)
    assert {(keys[s.picture], s.wrong) for s in found} == {(keys[order[s.picture]], s.wrong) for s in shuffled}


def test_a_preference_for_frequent_words_is_right_in_half_of_the_swaps(words):
    counts = {"red": 400, "blue": 200, "green": 100, "pink": 50}
    captions = [[f"a {color} ball"] for color, count in counts.items() for _ in range(count)]
    assert len(swaps_of(captions, words, is_balanced=False)) == 750
    found = swaps_of(captions, words)
    assert 400 < len(found) < 750
    assert np.mean([counts[s.word] > counts[s.replacement] for s in found]) == 0.5
    replaced = Counter((s.word, s.replacement) for s in found)
    assert all(replaced[b, a] == count for (a, b), count in replaced.items())


@pytest.mark.parametrize(("is_balanced", "expected"), [(True, 8), (False, 7)])
def test_the_number_of_a_kind_is_limited(words, is_balanced, expected):
    captions = [["a red ball of a man"], ["a blue ball of a woman"]] * 20
    limited = swaps_of(captions, words, most_per_kind=7, is_balanced=is_balanced)
    assert Counter(s.kind for s in limited) == {"color": expected, "person": expected}
    assert set(limited) <= set(swaps_of(captions, words))


def test_equal_swaps_of_a_picture_count_once(words):
    found = swaps_of([["a red ball", "a red ball"], ["a blue ball"]], words)
    assert [s.wrong for s in found] == ["a blue ball", "a red ball"]


def test_a_written_set_is_read_as_a_set_of_pairs(words, tmp_path):
    names = write_photos(tmp_path / "set" / "images", range(3))
    captions = [["a red ball", "a man with a red ball"], ["a blue ball", "a woman"], ["nothing"]]
    found = every_swap(captions, words)
    write_swaps(tmp_path / "set", found, names, images="images", name="swaps")
    data = PairSet.open(tmp_path / "set")
    assert data.rule == "text_choice"
    assert data.group_sizes == {"color": 3, "person": 2}
    texts = [[data.texts[row] for row in item.texts] for item in data.items]
    assert texts == [[s.caption, s.wrong] for s in found]
    assert [data.source.paths[item.images[0]].name for item in data.items] == [names[s.picture] for s in found]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "has no kinds of words"),
        ("{}", "has no kinds of words"),
        ('{"holds": []}', "has no kinds of words"),
        ('{"color": ["red", "blue"]}', "for the kind 'color'; write groups of at least two words"),
        ('{"color": [["red"]]}', "groups of at least two words"),
        ('{"color": [["red", ""]]}', "groups of at least two words"),
        ('{"color": [["red", "blue"]], "holds": ["red"]}', "in 'holds'; write"),
        ("{", "is not valid JSON"),
    ],
)
def test_a_file_of_words_of_another_form(tmp_path, text, message):
    path = tmp_path / "words.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        SwapWords.read(path)


def test_the_words_of_the_package_have_all_kinds_and_one_form_for_each(words):
    assert list(words.others) == ["color", "number", "person", "action", "side", "place", "size"]
    for kind, of_kind in words.others.items():
        for word, others in of_kind.items():
            assert word == word.lower()
            for other in others:
                assert word in of_kind[other]
                assert word not in other.split(), f"{kind}: {other} has {word} in it"
                if kind == "action":
                    assert word.endswith("ing") == other.endswith("ing")
                if kind == "person":
                    assert word.endswith("s") == other.endswith("s") or {word, other} & {"men", "women", "children"}
