"""What a user reads when a model folder, labels, features, results or a checkpoint are broken or hostile."""

import io
import json
import math
import pickle
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mcl_clip.config import TrainConfig
from mcl_clip.core.errors import UserError
from mcl_clip.core.files import DONE, append_jsonl, read_json, read_jsonl, read_run_config, write_json
from mcl_clip.data.features import read_part
from mcl_clip.data.storage import load_numbers, load_tensors
from mcl_clip.model.clip import create_clip, load_clip, save_clip
from mcl_clip.model.multistage import MultistageCLIP
from mcl_clip.model.resolve import find_models
from mcl_clip.results.text import results_table
from mcl_clip.runs.phase import Phase
from mcl_clip.stages.pseudo_labels import read_labels
from mcl_clip.train.checkpoint import TrainState, load_newest, save_checkpoint
from mcl_clip.train.metrics import BadSamples, StepLog
from mcl_clip.train.optim import create_optimizer

MODEL = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1},
}
CONFIG = TrainConfig(steps=1, global_batch_size=2, lr=0.1, weight_decay=0.1, betas=(0.9, 0.99), eps=1e-6)


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.fixture
def canary(tmp_path):
    """A file that exists when a payload ran."""
    path = tmp_path / "executed"
    yield path
    assert not path.exists()


@pytest.fixture(scope="module")
def tower():
    return create_clip(model_cfg=MODEL)


@pytest.fixture
def folder(tmp_path, tower):
    save_clip(tower, tmp_path / "model")
    return tmp_path / "model"


def change_config(folder, change, name="open_clip_config.json"):
    config = json.loads((folder / name).read_text())
    change(config)
    (folder / name).write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("part", "values", "sentence"),
    [
        (
            "text_cfg",
            {"hf_tokenizer_name": "x", "tokenizer_kwargs": {"trust_remote_code": True}},
            "tokenizer_kwargs is",
        ),
        ("text_cfg", {"layers": 10**6}, "layers is 1000000; it may be at most 512"),
        ("text_cfg", {"width": 10**9}, "width is 1000000000; it may be at most 131072"),
        ("vision_cfg", {"layers": [3, 10**9, 1, 1]}, "layers is 1000000000"),
        ("vision_cfg", {"width": 8192, "head_width": 64}, "its config describes"),
    ],
)
def test_settings_of_a_model_that_harm(folder, part, values, sentence):
    change_config(folder, lambda config: config["model_cfg"][part].update(values))
    with pytest.raises(UserError, match=f"model is not loaded: {sentence}"):
        load_clip(folder)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "{}", '{"model_cfg": 3}', "[" * 100_000, '{"model_cfg": {"embed_dim": 8}}']
)
def test_a_config_of_another_shape(folder, text):
    (folder / "open_clip_config.json").write_text(text)
    with pytest.raises(UserError, match=r"model is not loaded: .*; correct it, or use another model"):
        load_clip(folder)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "config.json"])
def test_a_tokenizer_that_brings_code(folder, canary, name):
    code = f"open({str(canary)!r}, 'w')\n"
    (folder / "code.py").write_text(code)
    (folder / name).write_text(json.dumps({"auto_map": {"AutoTokenizer": ["code.T", None]}}))
    change_config(folder, lambda config: config["model_cfg"]["text_cfg"].update(hf_tokenizer_name="x"))
    with pytest.raises(UserError, match=rf"{name} asks to run code that comes with the model \(auto_map\)"):
        load_clip(folder)


def test_weights_as_a_pickle_or_a_compressed_archive(folder, canary, tower):
    (folder / "open_clip_model.safetensors").unlink()
    torch.save({"state_dict": Touch(str(canary)), "x": torch.zeros(10**6)}, folder / "open_clip_pytorch_model.bin")
    with pytest.raises(UserError, match=r"holds more than tensors and plain values, and loading it could run code"):
        load_clip(folder)
    buffer = io.BytesIO()
    torch.save(tower.model.state_dict(), buffer)
    with (
        zipfile.ZipFile(buffer) as plain,
        zipfile.ZipFile(folder / "open_clip_pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for entry in plain.infolist():
            packed.writestr(entry.filename, plain.read(entry))
    with pytest.raises(UserError, match=r"is a compressed archive, which torch\.save does not write"):
        load_clip(folder)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"stages": ["../other"]}, r"stages is \['\.\./other'\]; it must be a list of folder names"),
        ({"stages": []}, "must be a list of folder names"),
        ({"stages": "stage_0"}, "must be a list of folder names"),
        ({"format_version": 7}, "has format version 7, this code reads 1"),
        ({"combine": "sum"}, "combine, logit_scale or logit_bias"),
        ({"combine": ["concat"]}, "combine, logit_scale or logit_bias"),
        ({"logit_scale": math.nan}, "combine, logit_scale or logit_bias"),
        ({"stages": [0]}, "it must be a list of folder names"),
        ({"logit_scale": "x"}, "combine, logit_scale or logit_bias"),
    ],
)
def test_the_config_of_a_multistage_model(tmp_path, tower, values, sentence):
    MultistageCLIP(
        [tower.model], logit_scale=1.0, preprocess_cfg=tower.preprocess_cfg, model_cfgs=[tower.model_cfg]
    ).save(tmp_path / "m")
    change_config(tmp_path / "m", lambda config: config.update(values), "mcl_clip_config.json")
    with pytest.raises(ValueError, match=sentence):
        MultistageCLIP.load(tmp_path / "m")
    with pytest.raises(UserError, match=f"the multistage model in .* cannot be loaded: .*{sentence}"):
        find_models(str(tmp_path / "m"))


def header(descr: str, shape: str) -> bytes:
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


@pytest.mark.parametrize("kind", ["object", "archive", "pickle", "huge", "floats", "short", "cut", "empty"])
def test_labels_that_are_no_labels(tmp_path, canary, kind):
    path, buffer, good = tmp_path / "labels.npy", io.BytesIO(), np.arange(6)
    np.save(buffer, np.array([Touch(str(canary))] * 6, object), allow_pickle=True)
    archive = io.BytesIO()
    np.savez(archive, labels=good)
    contents = {
        "object": buffer.getvalue(), "archive": archive.getvalue(), "pickle": pickle.dumps(Touch(str(canary))),
        "huge": header("<i8", "(1000000000000000,)"), "floats": header("<f8", "(6,)") + bytes(48),
        "short": header("<i8", "(5,)") + bytes(40), "cut": header("<i8", "(6,)") + bytes(40), "empty": b"",
    }  # fmt: skip
    path.write_bytes(contents[kind])
    with pytest.raises(UserError, match=r"labels\.npy does not hold one integer for each of 6 rows \(.*restore it"):
        load_numbers(path, 6)
    np.save(path, good)
    assert load_numbers(path, 6).tolist() == good.tolist()


@pytest.mark.parametrize(
    ("radix", "labels", "sentence"),
    [
        ([3, 2], [0, 6], "holds labels from 0 to 6, with"),
        ([3, 2], [-1, 1], "holds labels from -1 to 1"),
        ([2**40, 2**40], [0, 1], "holds labels from 0 to 1"),
        ([-2, -3], [0, 1], r"has no list of clusters \('radix'\)"),
        ([3, "2"], [0, 1], r"has no list of clusters \('radix'\)"),
        (None, [0, 1], r"has no list of clusters"),
    ],
)
def test_labels_and_clusters_that_do_not_fit(tmp_path, radix, labels, sentence):
    np.save(tmp_path / "labels.npy", np.array(labels))
    write_json(tmp_path / "labels.json", {"radix": radix})
    with pytest.raises(UserError, match=sentence):
        read_labels(tmp_path, 2)
    write_json(tmp_path / "labels.json", {"radix": [3, 2]})
    np.save(tmp_path / "labels.npy", np.array([0, 5]))
    assert read_labels(tmp_path, 2).radix == (3, 2)


def part(**changes) -> dict[str, torch.Tensor]:
    columns = {name: torch.ones(3, 4).half() for name in ("image", "text")}
    columns |= {name: torch.ones(3) for name in ("image_norm", "text_norm")}
    columns |= {"image_id": torch.arange(3), "text_id": torch.arange(3, 6), "ok": torch.ones(3, dtype=torch.bool)}
    return {name: value for name, value in (columns | changes).items() if value is not None}


@pytest.mark.parametrize(
    "changes",
    [
        {"text": None},
        {"ok": torch.ones(3)},
        {"image": torch.ones(3, 4)},
        {"image": torch.ones(3, 5).half()},
        {"image_norm": torch.ones(2)},
        {"text": torch.full((3, 4), float("nan")).half()},
        {"image_norm": torch.full((3,), float("inf"))},
    ],
)
def test_features_of_another_shape(tmp_path, changes):
    path = tmp_path / "part-000000.safetensors"
    save_file(part(), path)
    assert read_part(path, 3).ok.all()
    save_file(part(**changes), path)
    with pytest.raises(UserError, match=r"part-000000\.safetensors is not a whole part \(.*\); delete it and run"):
        read_part(path, 3)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="is not a whole part"):
        read_part(path, 3)


def test_tensors_that_are_missing_or_cut(tmp_path):
    save_file({"image": torch.ones(2)}, tmp_path / "c.safetensors")
    with pytest.raises(UserError, match=r"c\.safetensors has no tensor 'text'; delete its folder"):
        load_tensors(tmp_path / "c.safetensors", "image", "text")
    (tmp_path / "c.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(UserError, match=r"c\.safetensors is not a complete safetensors file"):
        load_tensors(tmp_path / "c.safetensors")


@pytest.mark.parametrize("data", [b"{", b"\xff", b"1" * 9000, b"[" * 100_000, b""])
def test_json_that_is_none(tmp_path, data):
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(UserError, match=r"a\.json is not valid JSON"):
        read_json(tmp_path / "a.json")
    (tmp_path / "a.jsonl").write_bytes(b"{}\n" + data + b"\n")
    with pytest.raises(UserError, match=r"line [12] of .*a\.jsonl is not a JSON object"):
        read_jsonl(tmp_path / "a.jsonl")


def test_half_a_character_survives_in_json(tmp_path):
    append_jsonl(tmp_path / "a.jsonl", {"a": "\ud800é"})
    write_json(tmp_path / "a.json", {"a": "\ud800é"})
    assert read_jsonl(tmp_path / "a.jsonl") == [read_json(tmp_path / "a.json")] == [{"a": "\ud800é"}]


@pytest.mark.parametrize("value", [[], {}, {"stages": []}, {"stages": 3}, {"stages": [{"train": {"steps": "8"}}]}])
def test_the_configuration_of_a_run(tmp_path, value):
    write_json(tmp_path / "config.json", value)
    with pytest.raises(UserError, match=r"config\.json is not the configuration of a run; run the recipe again"):
        read_run_config(tmp_path)


@pytest.mark.parametrize("value", [[], {}, {"fingerprint": "0"}, {"fingerprint": "0", "made_from": {"settings": []}}])
def test_a_marker_of_another_shape(tmp_path, value):
    write_json(tmp_path / DONE, value)
    with pytest.raises(
        UserError, match=r"DONE\.json lacks the settings and inputs of this phase; restore the file, or"
    ):
        Phase(name="x", folder=tmp_path, settings={}, run=lambda: None).check()


@pytest.mark.parametrize("record", [{}, {"key": "a"}, {"key": 3}])
def test_results_that_are_none(tmp_path, record):
    append_jsonl(tmp_path / "results.jsonl", record)
    with pytest.raises(
        UserError, match=r"record 1 of .*results\.jsonl is not a result; restore the file, or delete it"
    ):
        results_table(tmp_path)


def test_records_without_their_fields(tmp_path):
    append_jsonl(tmp_path / "metrics.jsonl", {"loss": 1})
    with pytest.raises(UserError, match=r"metrics\.jsonl has a record without a step"):
        StepLog(tmp_path / "metrics.jsonl").rewind(3)
    for number, changed in enumerate(({"row": "3"}, {"shard": 0}, {"reason": None})):
        path = tmp_path / f"{number}.jsonl"
        append_jsonl(path, {"step": 1, "row": 3, "shard": "a", "reason": "b"} | changed)
        with pytest.raises(UserError, match=rf"{number}\.jsonl has a record without row, shard and reason"):
            BadSamples(path, max_fraction=0.1, rows=10, step=5)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("state.json", r"state\.json holds the step -1 and 5 samples"),
        ("optimizer.safetensors", "the state of the optimizer for bias has another shape or type"),
        ("pickle", "does not fit this model"),
    ],
)
def test_a_checkpoint_that_was_tampered_with(tmp_path, canary, name, sentence):
    model = torch.nn.Linear(3, 2)
    optimizer = create_optimizer(model, CONFIG)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = TrainState(step=5, samples_seen=5, seconds=1.0)
    options = {"model": model, "optimizer": optimizer, "average": None}
    path = save_checkpoint(tmp_path / "c", **options, state=state, keep=1)
    assert load_newest(tmp_path / "c", **options) == state
    if name == "state.json":
        write_json(path / name, {"step": -1, "samples_seen": 5, "seconds": 1.0})
    elif name == "pickle":
        (path / "optimizer.safetensors").write_bytes(pickle.dumps(Touch(str(canary))))
    else:
        tensors = load_tensors(path / name)
        save_file({key: value.flatten()[:1].clone() for key, value in tensors.items()}, path / name)
    with pytest.raises(UserError, match=sentence):
        load_newest(tmp_path / "c", **options)
