import pytest
import torch

from mcl_clip.core.errors import UserError
from mcl_clip.model.clip import create_clip
from mcl_clip.model.mix import mix_weights
from tests.unit.eval.sets import MODEL


def clips(count=3, **changes):
    return [create_clip(model_cfg={**MODEL, **changes}, seed=seed) for seed in range(count)]


def test_weights_are_the_weighted_mean_of_each_tensor():
    given = clips()
    states = [{name: value.clone() for name, value in clip.model.state_dict().items()} for clip in given]
    mixed = mix_weights(given, [0.5, 0.3, 0.2]).model.state_dict()
    for name, value in mixed.items():
        expected = 0.5 * states[0][name] + 0.3 * states[1][name] + 0.2 * states[2][name]
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7)
    assert not torch.equal(mixed["visual.proj"], states[0]["visual.proj"])


def test_what_is_equal_stays_equal_to_the_bit():
    given = clips()
    locked = {name: value for name, value in given[0].model.state_dict().items() if not name.startswith("visual.")}
    for clip in given[1:]:
        clip.model.load_state_dict(locked, strict=False)
    kept = {name: value.clone() for name, value in locked.items()}
    mixed = mix_weights(given, [1 / 3] * 3).model.state_dict()
    assert all(torch.equal(mixed[name], value) for name, value in kept.items())


def test_the_ends_of_an_interpolation_are_the_models_themselves():
    for share, end in ((0.0, 0), (1.0, 1)):
        base, tuned = clips(2)
        expected = {name: value.clone() for name, value in (base, tuned)[end].model.state_dict().items()}
        mixed = mix_weights([base, tuned], [1 - share, share]).model.state_dict()
        assert all(torch.equal(mixed[name], expected[name]) for name in expected)


def test_counters_of_batch_norm_are_not_averaged():
    resnet = {"vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 32}}
    given = clips(2, **resnet)
    given[1].model.visual.bn1.num_batches_tracked += 7
    assert mix_weights(given, [0.5, 0.5]).model.visual.bn1.num_batches_tracked == 7


def test_models_that_cannot_be_averaged_are_refused():
    one, other = clips(1)[0], clips(1, embed_dim=8)[0]
    with pytest.raises(UserError, match="different settings cannot be averaged"):
        mix_weights([one, other], [0.5, 0.5])
    with pytest.raises(ValueError, match="with the sum 1"):
        mix_weights([one, other], [0.5, 0.6])
