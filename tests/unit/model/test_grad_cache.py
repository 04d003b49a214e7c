"""Compare gradients of a batch encoded in chunks with those of the same batch in one pass."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, normalize

from mcl_clip.core.distributed import seed_of, torch_generator
from mcl_clip.model.clip import create_clip
from mcl_clip.model.grad_cache import add_gradients
from mcl_clip.model.prepare import lock

ROWS = 10
VIT = {
    "embed_dim": 8,
    "init_logit_bias": -3.0,
    "vision_cfg": {"image_size": 16, "patch_size": 4, "layers": 1, "width": 16, "head_width": 8, "patch_dropout": 0.5},
    "text_cfg": {"context_length": 6, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1},
}


class Towers(nn.Module):
    """Two linear towers with dropout; records the rows of each forward pass, and whether it builds a graph."""

    def __init__(self, dropout=0.0):
        super().__init__()
        draws = [torch.randn(5, 7, generator=torch_generator("towers", n), dtype=torch.float64) for n in range(2)]
        self.image, self.text = (nn.Parameter(draw) for draw in draws)
        self.dropout = nn.Dropout(dropout)
        self.logit_scale, self.logit_bias = (nn.Parameter(torch.tensor(x, dtype=torch.float64)) for x in (1.5, -2.0))
        self.passes = []

    def forward(self, images, texts):
        self.passes.append((len(images), torch.is_grad_enabled()))
        return {
            "image_features": normalize(self.dropout(images) @ self.image),
            "text_features": normalize(self.dropout(texts) @ self.text),
            "logit_scale": self.logit_scale.exp(),
            "logit_bias": self.logit_bias,
            "something_else": None,
        }


class InChunks(nn.Module):
    """The same model, called for a few rows at a time, with the dropout of GradCache's chunks."""

    def __init__(self, model, chunk_rows):
        super().__init__()
        self.model, self.chunk_rows = model, chunk_rows

    def forward(self, images, texts):
        outputs = []
        for number, part in enumerate(zip(images.split(self.chunk_rows), texts.split(self.chunk_rows), strict=True)):
            seed(number)
            outputs.append(self.model(*part))
        features = ("image_features", "text_features")
        return outputs[0] | {name: torch.cat([output[name] for output in outputs]) for name in features}


def seed(chunk):
    torch.manual_seed(seed_of("chunk", chunk))


def gradients(model, inputs, chunk_rows=0, uses_bias=True, encode=None):
    """The gradients of a contrastive loss, and its value."""

    def loss_of(out):
        logits = out["logit_scale"] * out["image_features"] @ out["text_features"].T
        loss = (cross_entropy(logits, torch.arange(ROWS)) + cross_entropy(logits.T, torch.arange(ROWS))) / 2
        if uses_bias:
            loss = loss - nn.functional.logsigmoid(logits + out["logit_bias"]).mean()
        return loss, {"loss": loss.detach()}

    encode = encode or (lambda model, rows: model(*(each[rows] for each in inputs)))
    with torch.random.fork_rng():
        counts = add_gradients(model, encode, loss_of, rows=ROWS, chunk_rows=chunk_rows, seed_chunk=seed)
    return {name.removeprefix("model."): p.grad for name, p in model.named_parameters()}, float(counts["loss"])


def random_inputs():
    return [torch.randn(ROWS, 5, generator=torch_generator("inputs", n), dtype=torch.float64) for n in range(2)]


def assert_equal(found, expected, tolerance=1e-12):
    assert found[0].keys() == expected[0].keys()
    for name, gradient in expected[0].items():
        if gradient is None:
            assert found[0][name] is None, name
        else:
            assert torch.allclose(found[0][name], gradient, rtol=0, atol=tolerance), name
    assert found[1] == pytest.approx(expected[1], abs=tolerance)


@pytest.mark.parametrize("chunk_rows", [1, 3, 5, 9, 10, 11])
def test_gradients_are_those_of_the_whole_batch(chunk_rows):
    expected = gradients(Towers(), random_inputs())
    assert all(gradient.abs().max() > 1e-3 for gradient in expected[0].values())
    assert_equal(gradients(Towers(), random_inputs(), chunk_rows), expected)


def test_a_temperature_that_the_loss_does_not_use_has_no_gradient():
    expected = gradients(Towers(), random_inputs(), uses_bias=False)
    assert expected[0]["logit_bias"] is None
    assert_equal(gradients(Towers(), random_inputs(), 3, uses_bias=False), expected)


def test_gradients_are_added_to_what_is_there():
    model, inputs = Towers(), random_inputs()
    once = gradients(model, inputs, 3)[0]["image"].clone()
    assert torch.allclose(gradients(model, inputs, 3)[0]["image"], 2 * once)


@pytest.mark.parametrize("chunk_rows", [3, 10])
def test_dropout_is_the_same_in_both_passes_and_different_in_each_chunk(chunk_rows):
    inputs = [each[:1].expand(ROWS, -1) for each in random_inputs()]  # equal rows: features differ by dropout alone
    expected = gradients(InChunks(Towers(0.5), chunk_rows), inputs)
    assert_equal(gradients(Towers(0.5), inputs, chunk_rows), expected)
    chunks, encoded = 1 + (ROWS - 1) // chunk_rows, []

    def encode(model, rows):
        encoded.append(model(*(each[rows] for each in inputs)))
        return encoded[-1]

    gradients(Towers(0.5), inputs, chunk_rows, encode=encode)
    first, second = (
        [output["image_features"].detach() for output in part] for part in (encoded[:chunks], encoded[chunks:])
    )
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    assert len({part[0].numpy().tobytes() for part in first}) == chunks


def test_a_graph_is_built_for_one_chunk_at_a_time():
    model = Towers()
    gradients(model, random_inputs(), 4)
    assert model.passes == [(4, False), (4, False), (2, False), (4, True), (4, True), (2, True)]
    model.passes.clear()
    gradients(model, random_inputs())
    assert model.passes == [(ROWS, True)]


@pytest.mark.parametrize("locked", [{}, {"text": True}, {"image_unlocked_groups": 0}], ids=str)
def test_open_clips_towers_with_patch_dropout_and_locked_parts(locked):
    """And the features are unit vectors whose graph ends where parameters are locked."""

    def make():
        model = create_clip(model_cfg=VIT).model.double()
        lock(model, **locked)
        return model.train()

    pixels = torch.randn(ROWS, 3, 16, 16, generator=torch_generator("pixels"), dtype=torch.float64)
    inputs = (pixels, torch.arange(ROWS * 6).reshape(ROWS, 6) % 50)
    expected = gradients(InChunks(make(), 4), inputs)
    found = gradients(make(), inputs, 4)
    assert_equal(found, expected)
    assert (found[0]["token_embedding.weight"] is None) == ("text" in locked)
    assert (found[0]["visual.proj"] is None) == ("image_unlocked_groups" in locked)
    if not locked:
        model = make()
        model.visual.patch_dropout = nn.Identity()
        assert (gradients(model, inputs, 4)[0]["visual.proj"] - found[0]["visual.proj"]).abs().max() > 1e-4
