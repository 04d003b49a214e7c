"""Models that see a known part of pictures and captions: a code along the upper edge, the center, or written text."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from mcl_clip.eval.embed import Encoder
from mcl_clip.eval.shortcuts import (
    REGIONS,
    WRITTEN,
    ToEmbed,
    find_shortcuts,
    mean_pixels,
    telling_words,
    word_edits,
    write_word,
)
from mcl_clip.eval.swaps import SwapWords

SIDE = 48
NOUNS = ("owl", "tree", "boat", "lamp", "fork", "desk", "moon", "shoe")
PALETTE = torch.rand(8, 3, generator=torch.Generator().manual_seed(1))
MIX = torch.randn(SIDE // 8 * SIDE, 16, generator=torch.Generator().manual_seed(2))
WHITE_AND_BLACK = torch.tensor([[1.0] * 3, [0.0] * 3])


@dataclass(frozen=True)
class World:
    """Pictures of a noun's color in the center under a code's color along the upper edge, with captions of both."""

    codes: np.ndarray
    nouns: np.ndarray

    @classmethod
    def drawn(cls, count=96):
        draw = np.random.default_rng(0)
        return cls(draw.integers(0, 8, count), draw.integers(0, 8, count))

    def __len__(self):
        return len(self.codes)

    @property
    def captions(self):
        return [
            f"there is a {NOUNS[noun]} , and {code} {code}" for noun, code in zip(self.nouns, self.codes, strict=True)
        ]

    def images(self, rows):
        for row in rows.tolist():
            pixels = torch.full((SIDE, SIDE, 3), 0.5)
            pixels[SIDE // 4 : -SIDE // 4, SIDE // 4 : -SIDE // 4] = PALETTE[self.nouns[row]]
            pixels[: SIDE // 8] = PALETTE[self.codes[row]]
            yield Image.fromarray((255 * pixels).round().to(torch.uint8).numpy())


def to_tensor(image):
    return torch.from_numpy(np.array(image, np.float32)).permute(2, 0, 1) / 255


def nearest(colors):
    return (
        F.one_hot(torch.cdist(colors, PALETTE).argmin(1), 8).float()
        * (torch.cdist(colors, PALETTE).amin(1) < 0.02)[:, None]
    )


@dataclass(frozen=True)
class Model:
    """How much it sees of the code, of the noun, and of text along the lower edge."""

    code: float = 0.0
    noun: float = 0.0
    reads: float = 0.0

    def encode_image(self, pixels):
        code = nearest(pixels[:, :, : SIDE // 8, SIDE // 4 : -SIDE // 4].mean((2, 3)))
        noun = nearest(pixels[:, :, SIDE // 2 - 2 : SIDE // 2 + 2, SIDE // 2 - 2 : SIDE // 2 + 2].mean((2, 3)))
        ink = (1 - pixels[:, :, -SIDE // 8 :].mean(1)).flatten(1) @ MIX
        is_page = (pixels[:, :, -1, 0].mean(1) > 0.9).float()[:, None]
        return torch.cat([self.code * code, self.noun * noun, self.reads * F.normalize(ink) * is_page], dim=1)

    def encode_text(self, texts):
        parts = []
        for text in texts:
            words = text.split()
            code, noun = torch.zeros(8), torch.zeros(8)
            for word in words:
                if word.isdigit():
                    code[int(word)] += 0.5
                if word in NOUNS:
                    noun[NOUNS.index(word)] += 1
            ink = torch.ones(16)
            if self.reads:
                word = next((word for word in words if word in NOUNS), "?")
                ink = torch.from_numpy(write_word(word, SIDE // 8, SIDE)).flatten() @ MIX
            parts.append(torch.cat([self.code * code, self.noun * noun, self.reads * F.normalize(ink, dim=0)]))
        return torch.stack(parts)


class Texts(list):
    """Texts in place of tokens."""

    def to(self, device):
        return self


def found(model, world=None, words=None):
    world = world or World.drawn()
    encoder = Encoder(model=model, image_transform=to_tensor, tokenizer=Texts, device=torch.device("cpu"))
    embedded = encoder.embed(ToEmbed(source=world, texts=world.captions))
    features = {side: F.normalize(of_side) for side, of_side in embedded.items()}
    means = {side: of_side.mean(0) for side, of_side in features.items()}
    return find_shortcuts(
        encoder, world, world.captions, features, means, words or SwapWords.read(), white_and_black=WHITE_AND_BLACK
    )


def part(parts, name):
    return next(one for one in parts if one.name == name)


@pytest.fixture(autouse=True)
def tokens_are_texts(monkeypatch):
    monkeypatch.setattr("mcl_clip.eval.embed.encode_texts", lambda model, texts, device: model.encode_text(texts))


def test_a_model_of_the_code_goes_by_the_upper_edge_and_the_digits():
    shortcuts = found(Model(code=1))
    assert shortcuts.interval[0] > 0.5
    edge = part(shortcuts.regions, "upper edge")
    assert edge.left == pytest.approx(0, abs=0.02)
    assert edge.left_otherwise == pytest.approx(1)
    assert edge.ratio[2] < 0.05
    assert edge.words[0][0] in ("digits", "last 2 words")
    assert edge.words[0][1] > 0.8 > 0.6 > edge.words[0][2]
    digits = part(shortcuts.words, "digits")
    assert (digits.coverage, digits.size) == (1, 2)
    assert digits.left < 0.1
    assert digits.left < 0.3 * digits.left_otherwise
    assert part(shortcuts.regions, "center").left == pytest.approx(1)
    assert part(shortcuts.regions, "lower edge").left == pytest.approx(1)


def test_a_model_of_the_content_goes_by_no_edge_and_no_digits():
    shortcuts = found(Model(noun=1))
    for region in (one for one in shortcuts.regions if one.kind != "center"):
        assert region.left == pytest.approx(1)
        assert region.ratio[0] == pytest.approx(1)
    assert part(shortcuts.regions, "center").left == pytest.approx(0, abs=0.02)
    digits = part(shortcuts.words, "digits")
    assert digits.left == pytest.approx(1)
    assert digits.left > digits.left_otherwise
    owl = part(shortcuts.words, "owl")
    assert (owl.kind, owl.left_otherwise, owl.ratio) == ("word", None, None)
    assert owl.left < 0.01
    assert part(shortcuts.words, "there").left == pytest.approx(1)


def test_a_model_of_both_has_the_shares_of_its_weights():
    shortcuts = found(Model(code=1, noun=1))
    assert part(shortcuts.regions, "upper edge").left == pytest.approx(0.5**0.5, abs=0.02)  # features are unit again
    assert part(shortcuts.words, "digits").left == pytest.approx(0.5, abs=0.1)
    assert part(shortcuts.regions, "upper edge").words[0][0] in ("digits", "last 2 words")


@pytest.mark.parametrize(("reads", "low", "high"), [(0.0, -0.03, 0.03), (1.0, 0.15, 0.8), (2.0, 0.4, 2)])
def test_what_a_written_word_gives_to_its_caption(reads, low, high):
    shortcuts = found(Model(noun=1, reads=reads))
    assert low <= shortcuts.reads <= high
    assert shortcuts.reads_interval[0] <= shortcuts.reads <= shortcuts.reads_interval[1]


def test_a_model_of_nothing_has_no_margin():
    shortcuts = found(Model(code=0))
    assert shortcuts.margin == 0
    assert shortcuts.interval == (0, 0)
    assert shortcuts.reads == 0
    assert {region.left for region in shortcuts.regions} == {0}


def test_words_are_exchanged_in_place_and_so_are_as_many_random_ones():
    captions = ["two dogs on red sand 12 7", "a cat 3 4", "a cat", "five"]
    edits = {edit.name: edit for edit in word_edits(captions, SwapWords.read())}
    digits = edits["digits"]
    assert digits.rows == [0, 1]
    assert digits.edited == ["two dogs on red sand 3 4", "a cat 12 7"]
    for edit, before in zip(digits.otherwise, captions, strict=False):
        changed = [one != other for one, other in zip(edit.split(), before.split(), strict=True)]
        assert sum(changed) <= 2
    assert "five" not in {caption for edit in edits.values() for caption in (*edit.edited, *edit.otherwise)}
    assert edits["a"].edited == ["cat 3 4", "cat"]
    assert not edits["a"].otherwise
    assert not [
        name for name in edits if name.startswith("last ") and name != "last word"
    ]  # half of a mean caption: below 2 words


def test_the_words_that_are_written_are_those_of_few_captions():
    captions = ["a dog on grass", "a dog on sand", "a cat on grass", "a cat on snad", "! ?"]
    assert telling_words(captions) == ["grass", "dog", "grass", "cat", "?"]


def test_regions_fill_their_shares_of_a_picture():
    for region in (*REGIONS, WRITTEN):
        mask = np.zeros((64, 32))
        mask[region.pixels(64, 32)] = 1
        top, left, bottom, right = region.box
        assert mask.mean() == pytest.approx((bottom - top) * (right - left))
        assert np.zeros((4, 4))[region.pixels(4, 4)].size > 0


@pytest.mark.parametrize(("height", "width"), [(28, 224), (4, 32), (6, 20)])
def test_a_written_word_fits_and_differs_from_others(height, width):
    words = [write_word(word, height, width) for word in ("boat", "shoe", "incomprehensibilities", "?")]
    assert all(word.shape == (height, width) and 0 < word.mean() < 0.8 for word in words)
    assert not np.array_equal(words[0], words[1])


def test_the_mean_picture():
    world = World.drawn(3)
    expected = torch.stack([to_tensor(image) for image in world.images(np.arange(3))]).mean(0)
    assert torch.allclose(mean_pixels(to_tensor, world), expected)
