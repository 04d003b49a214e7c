import json
import logging
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn import functional as F
from transformers import AutoModel, AutoProcessor, AutoTokenizer, PreTrainedTokenizerFast, dynamic_module_utils

from mcl_clip.core.errors import UserError
from mcl_clip.model import modeling_multistage_clip
from mcl_clip.model.clip import create_clip
from mcl_clip.model.modeling_multistage_clip import MultistageCLIPConfig, MultistageCLIPModel, fit_tokens
from mcl_clip.model.multistage import MultistageCLIP
from mcl_clip.model.processing_multistage_clip import MultistageCLIPImageProcessor
from mcl_clip.publish.hf_clip import features_of, transformers_features, write_transformers_files

TEXTS = ["a dog", "it\u2019s two &amp; three RED cars", "many " * 40, "x <|endoftext|> y", ""]
CODE = sorted(modeling_multistage_clip.CODE_FILES)
REVISION = "0123456789abcdef0123456789abcdef01234567"

# Runs without the package: what is on disk must be enough.
CHILD = """
import importlib.abc, json, logging, sys
class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
HIDDEN = sys.argv[1].split(",")
sys.meta_path.insert(0, Hidden())
from pathlib import Path
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForZeroShotImageClassification
from transformers import AutoProcessor, AutoTokenizer, pipeline
folder, inputs, output = map(str, sys.argv[2:])
trust = {"trust_remote_code": True}
texts = json.loads(Path(inputs, "texts.json").read_text())
images = [Image.open(path) for path in sorted(Path(inputs).glob("*.png"))]
config = AutoConfig.from_pretrained(folder, **trust)
model = AutoModel.from_pretrained(folder, **trust)
processor = AutoProcessor.from_pretrained(folder, **trust)
ids = AutoTokenizer.from_pretrained(folder, **trust)(texts[:1], return_tensors="pt")["input_ids"]
pixels = AutoImageProcessor.from_pretrained(folder, **trust)(images, return_tensors="pt")["pixel_values"]
batch = processor(images=images, text=texts, return_tensors="pt", padding=True)
with torch.no_grad():
    image, text = (getattr(features, "pooler_output", features) for features in (
        model.get_image_features(batch["pixel_values"]),
        model.get_text_features(batch["input_ids"], attention_mask=batch["attention_mask"]),
    ))
    logits = AutoModelForZeroShotImageClassification.from_pretrained(folder, **trust)(**batch).logits_per_image
classify = pipeline("zero-shot-image-classification", model=folder, device="cpu", **trust)
scores = classify(images[0], candidate_labels=["dog", "two red cars"], hypothesis_template="a photo of a {}")
assert not [name for name in sys.modules if name.split(".")[0] == "mcl_clip"]
tensors = {"image": image, "text": text, "ids": ids, "pixels": pixels, "logits": logits}
save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, output)
print(json.dumps({"scores": scores, "model_type": config.model_type, "class": type(model).__module__}))
"""


def make_cfg(**more):
    return {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
        **more,
    }


def make_model(*, cfg=None, shared=True, preprocess=None, **options):
    clips = [create_clip(model_cfg=cfg or make_cfg(), seed=seed, preprocess=preprocess) for seed in range(3)]
    text = {k: v for k, v in clips[0].model.state_dict().items() if not k.startswith(("visual.", "logit_"))}
    for clip in clips[1:] if shared else ():
        clip.model.load_state_dict(text, strict=False)
    return MultistageCLIP(
        [clip.model for clip in clips],
        logit_scale=math.log(20),
        preprocess_cfg=clips[0].preprocess_cfg,
        model_cfgs=[clip.model_cfg for clip in clips],
        **options,
    ).eval()


def export(folder, model, *, compact=False):
    model.save(folder, compact=compact)
    write_transformers_files(folder, model)
    return folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model and the folder that it was exported to, for reading only."""
    model = make_model(logit_bias=-2.5)
    return model, export(tmp_path_factory.mktemp("exported") / "model", model, compact=True)


def make_images(*sizes):
    generator = torch.Generator().manual_seed(1)
    return [
        Image.fromarray(torch.randint(0, 256, (*size, 3), generator=generator, dtype=torch.uint8).numpy())
        for size in sizes
    ]


IMAGES = make_images((40, 61), (33, 32), (32, 32), (64, 20))


@torch.no_grad()
def own_features(model, images=IMAGES, texts=TEXTS):
    pixels = torch.stack([model.image_transform(image) for image in images])
    return model.encode_image(pixels), model.encode_text(model.tokenizer(list(texts)))


def differences(got, expected):
    return [(a - b).abs().max().item() for a, b in zip(got, expected, strict=True)]


def run_child(folder, tmp_path, hidden):
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    (inputs / "texts.json").write_text(json.dumps(TEXTS))
    for number, image in enumerate(IMAGES):
        image.save(inputs / f"{number}.png")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON", "TRANSFORMERS"))}
    environment = {**kept, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", "-c", CHILD, hidden, str(folder), str(inputs), str(tmp_path / "out.safetensors")]
    options = {"capture_output": True, "text": True, "timeout": 300}
    return subprocess.run(command, check=False, env=environment, cwd=tmp_path, **options)


def in_cache(cache, folder, commits, subfolder=""):
    """The layout of huggingface_hub's cache; `commits` by branch or tag."""
    for name, commit in commits.items():
        (cache / "models--some--model" / "refs").mkdir(parents=True, exist_ok=True)
        (cache / "models--some--model" / "refs" / name).write_text(commit)
        shutil.copytree(folder, cache / "models--some--model" / "snapshots" / commit / subfolder)
    return cache / "models--some--model" / "snapshots"


@pytest.mark.parametrize("source", ["folder", "hub"])
def test_a_process_without_the_package_gets_the_same_features(source, exported, tmp_path):
    model, folder = exported
    in_cache(tmp_path / "home" / "hub", folder, {"main": REVISION})
    child = run_child(folder if source == "folder" else "some/model", tmp_path, "mcl_clip")
    assert child.returncode == 0, child.stderr
    assert "is not supported for" not in child.stderr
    report, got = json.loads(child.stdout.splitlines()[-1]), load_file(tmp_path / "out.safetensors")
    image, text = own_features(model)
    found = differences((got["image"], got["text"]), (image, text))
    sys.stdout.write(f"largest difference: image {found[0]:.1e}, text {found[1]:.1e}\n")
    assert max(found) < 1e-6
    assert torch.equal(got["pixels"], torch.stack([model.image_transform(image) for image in IMAGES]))
    assert got["ids"].tolist()[0] == [49406, 320, 1929, 49407]
    cosines = F.normalize(image, dim=1) @ F.normalize(text, dim=1).T
    torch.testing.assert_close(got["logits"], 20 * cosines - 2.5, rtol=0, atol=1e-4)
    labels = ["dog", "two red cars"]
    image, text = own_features(model, IMAGES[:1], [f"a photo of a {label}" for label in labels])
    chances = (20 * F.normalize(image, dim=1) @ F.normalize(text, dim=1).T).softmax(1)[0]
    scores = {entry["label"]: entry["score"] for entry in report["scores"]}
    assert [scores[label] for label in labels] == pytest.approx(chances.tolist(), abs=1e-5)
    assert report["model_type"] == "multistage_clip"
    assert report["class"].startswith("transformers_modules.")


def test_without_open_clip_it_is_said_what_to_install(exported, tmp_path):
    child = run_child(exported[1], tmp_path, "mcl_clip,open_clip")
    assert child.returncode == 1
    assert child.stderr.splitlines()[-1].startswith("ImportError: a multistage CLIP model needs open_clip: ")
    assert child.stderr.splitlines()[-1].endswith("pip install open_clip_torch")


@pytest.mark.parametrize(
    ("shared", "compact", "options"),
    [
        (True, False, {}),
        (True, True, {"combine": "mean_cosine"}),
        (False, True, {"logit_bias": 1.5}),
        (False, False, {"combine": "mean_cosine", "logit_bias": -4.0}),
    ],
    ids=["concat", "mean_cosine compact", "bias compact", "mean_cosine bias"],
)
@torch.no_grad()
def test_features_and_scores_are_the_models_own(shared, compact, options, tmp_path):
    model = make_model(shared=shared, **options)
    folder = export(tmp_path / "model", model, compact=compact)
    found = differences(transformers_features(folder, IMAGES, TEXTS), own_features(model))
    sys.stdout.write(f"largest difference: image {found[0]:.1e}, text {found[1]:.1e}\n")
    assert max(found) < 1e-6
    loaded = MultistageCLIPModel.from_pretrained(folder)
    assert not loaded.training
    pixels, tokens = torch.stack([model.image_transform(image) for image in IMAGES]), model.tokenizer(TEXTS)
    got, expected = loaded(input_ids=tokens, pixel_values=pixels), model(image=pixels, text=tokens)
    torch.testing.assert_close(got.image_embeds, expected["image_features"], rtol=0, atol=1e-6)
    torch.testing.assert_close(got.text_embeds, expected["text_features"], rtol=0, atol=1e-6)
    logits = expected["logit_scale"] * expected["image_features"] @ expected["text_features"].T
    logits = logits + options.get("logit_bias", 0)
    torch.testing.assert_close(got.logits_per_image, logits, rtol=0, atol=1e-5)
    assert torch.equal(got.logits_per_text, got.logits_per_image.T)
    assert got.loss is None
    as_tuple = loaded(input_ids=tokens, pixel_values=pixels, return_dict=False)
    assert [value.shape for value in as_tuple] == [(4, 5), (5, 4), (5, 72), (4, 72)]
    features = loaded.get_image_features(pixels)
    assert isinstance(features, torch.Tensor) is (int(transformers.__version__.split(".")[0]) < 5)
    assert not torch.allclose(features_of(features).norm(dim=1), torch.ones(4))


def test_weights_are_written_once_and_the_code_is_that_of_the_package(exported):
    model, folder = exported
    weights = [path for path in folder.rglob("*") if path.suffix in (".safetensors", ".bin", ".pt")]
    assert {path.parent.name for path in weights} == {"stage_0", "stage_1", "stage_2"}
    assert sorted(path.name for path in folder.glob("*.py")) == CODE
    package = Path(modeling_multistage_clip.__file__).parent
    assert all((folder / name).read_bytes() == (package / name).read_bytes() for name in CODE)
    first = "modeling_multistage_clip.py"  # transformers 4.51 copies only what it imports itself
    imported = dynamic_module_utils.get_relative_imports(folder / first)
    assert sorted([first, *(f"{name}.py" for name in imported)]) == CODE
    config = MultistageCLIPConfig.from_pretrained(folder)
    assert (config.num_stages, config.embed_dims, config.projection_dim) == (3, [24, 24, 24], 72)
    assert (config.context_length, config.image_size, config.combine) == (16, [32, 32], "concat")
    assert json.loads((folder / "tokenizer_config.json").read_text())["model_max_length"] == model.context_length


def test_the_tokenizer_loads_without_code_and_without_a_warning(exported):
    warnings = []
    handler = logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())
    logger = transformers.utils.logging.get_logger("transformers")
    logger.addHandler(handler)
    try:
        tokenizer = AutoTokenizer.from_pretrained(exported[1], trust_remote_code=False)
        AutoModel.from_pretrained(exported[1], trust_remote_code=True)
    finally:
        logger.removeHandler(handler)
    assert tokenizer(["a photo"])["input_ids"][0][0] == tokenizer.bos_token_id
    assert not warnings


@pytest.mark.parametrize("compact", [False, True], ids=["whole", "compact"])
@torch.no_grad()
def test_what_is_saved_again_loads_again(compact, tmp_path):
    folder = export(tmp_path / "first", make_model(), compact=compact)
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    model.multistage.stages[2].visual.proj += 1
    model.multistage.logit_scale.fill_(1.5)
    model.save_pretrained(tmp_path / "second", max_shard_size="1GB")
    AutoProcessor.from_pretrained(folder, trust_remote_code=True).save_pretrained(tmp_path / "second")
    again = AutoModel.from_pretrained(tmp_path / "second", trust_remote_code=True)
    pixels = torch.stack([model.multistage.image_transform(image) for image in IMAGES])
    image, text = transformers_features(tmp_path / "second", IMAGES, TEXTS)
    assert torch.equal(image, features_of(model.get_image_features(pixels)))
    assert torch.equal(text, transformers_features(folder, IMAGES, TEXTS)[1])
    assert again.logit_scale == 1.5
    sizes = [
        sum(path.stat().st_size for path in (tmp_path / name).rglob("*.safetensors")) for name in ("first", "second")
    ]
    assert sizes[0] == sizes[1]
    assert not list((tmp_path / "second").glob("*.safetensors"))
    assert sorted(path.name for path in (tmp_path / "second").glob("*.py")) == CODE


def test_only_the_main_process_saves(exported, tmp_path):
    MultistageCLIPModel.from_pretrained(exported[1]).save_pretrained(tmp_path / "none", is_main_process=False)
    assert not (tmp_path / "none").exists()


def test_weights_are_never_initialised(exported):
    state = torch.random.get_rng_state()
    model = MultistageCLIPModel.from_pretrained(exported[1])
    assert torch.equal(torch.random.get_rng_state(), state)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.init_weights()
    model.apply(model._init_weights)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_combination_can_be_asked_for(exported):
    model, folder = exported
    loaded = AutoModel.from_pretrained(folder, trust_remote_code=True, combine="mean_cosine")
    pixels = torch.stack([model.image_transform(image) for image in IMAGES])
    with torch.no_grad():
        got, expected = (
            features_of(loaded.get_image_features(pixels)),
            model.encode_image(pixels, combine="mean_cosine"),
        )
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    assert not torch.allclose(got, own_features(model)[0])


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_other_types_and_one_device_can_be_asked_for(name, exported):
    model, folder = exported
    kept = MultistageCLIPModel.from_pretrained(folder, **{name: "auto"}, device_map="cpu")
    assert kept.dtype == torch.float32
    assert kept.hf_device_map == {"": torch.device("cpu")}
    half = AutoModel.from_pretrained(folder, trust_remote_code=True, **{name: torch.bfloat16})
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    pixels = torch.stack([model.image_transform(image) for image in IMAGES])
    with torch.no_grad():
        got = features_of(half.get_image_features(pixels)).float()
    cosines = F.cosine_similarity(got, own_features(model)[0])
    assert 0.99 < cosines.min() < 1 - 1e-7
    automatic = MultistageCLIPModel.from_pretrained(folder, device_map="auto")
    assert (automatic.device.type == "cpu") is not torch.accelerator.is_available()
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator().type
        assert MultistageCLIPModel.from_pretrained(folder, device_map={"": 0}).device == torch.device(kind, 0)


@pytest.mark.parametrize("bias", [None, -3.0])
def test_losses_are_those_of_clip_and_siglip(bias, tmp_path):
    model = make_model(logit_bias=bias)
    loaded = MultistageCLIPModel.from_pretrained(export(tmp_path / "model", model))
    pixels, tokens = torch.stack([model.image_transform(image) for image in IMAGES]), model.tokenizer(TEXTS[:4])
    output = loaded(input_ids=tokens, pixel_values=pixels, return_loss=True)
    logits, expected = output.logits_per_image.double(), 0.0
    for i in range(4):
        if bias is None:
            expected -= (logits[i].log_softmax(0)[i] + logits[:, i].log_softmax(0)[i]).item() / 8
        else:
            expected += sum(math.log1p(math.exp((-1 if i == j else 1) * logits[i, j].item())) for j in range(4)) / 4
    assert output.loss.item() == pytest.approx(expected, rel=1e-5)
    output.loss.backward()
    assert loaded.multistage.stages[1].visual.proj.grad.abs().max() > 0
    with pytest.raises(ValueError, match="as many images as texts"):
        loaded(input_ids=tokens[:3], pixel_values=pixels, return_loss=True)


def rows(tokenizer, texts, **options):
    inputs = tokenizer(texts, padding=True, return_tensors="pt", **options)
    return inputs["input_ids"], inputs["attention_mask"]


def test_tokens_are_cut_and_filled_up_as_open_clip_does(exported):
    model, folder = exported
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    texts = ["a dog", "many " * 40, "x", "one two three four five six seven eight nine ten eleven twelve thirteen 1"]
    expected = model.tokenizer(texts)

    def fitted(ids, mask=None):
        return fit_tokens(ids, mask, 16, model.tokenizer)

    assert torch.equal(fitted(*rows(tokenizer, texts)), expected)
    assert torch.equal(fitted(*rows(tokenizer, texts, padding_side="left")), expected)
    assert torch.equal(fitted(rows(tokenizer, texts)[0]), expected)
    assert torch.equal(fitted(*rows(tokenizer, texts, truncation=True)), expected)
    assert torch.equal(fitted(expected), expected)
    for number, text in enumerate(texts):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        assert torch.equal(fitted(ids), expected[number : number + 1])
        assert torch.equal(fitted(ids.int(), torch.ones_like(ids)).long(), expected[number : number + 1])
    starts_with_end = SimpleNamespace(eot_token_id=5)
    assert fit_tokens(torch.tensor([[5, 1, 2, 5, 5]]), None, 6, starts_with_end).tolist() == [[5, 1, 2, 5, 0, 0]]


def test_pixels_are_bit_equal_to_those_of_open_clip(tmp_path):
    colours = IMAGES[0]
    images = [*IMAGES, colours.convert("L"), colours.convert("RGBA"), colours.convert("P"), colours.convert("CMYK")]
    for mode in ("shortest", "longest", "squash"):
        for interpolation in ("bicubic", "bilinear"):
            preprocess = {"resize_mode": mode, "interpolation": interpolation, "mean": [0.1, 0.2, 0.3]}
            cfg = make_cfg()
            size = [32, 48] if mode == "squash" else 32
            cfg["vision_cfg"]["image_size"] = size
            model = make_model(cfg=cfg, preprocess={**preprocess, "fill_color": 77})
            folder = tmp_path / f"{mode}-{interpolation}"
            processor = MultistageCLIPImageProcessor.from_pretrained(export(folder, model))
            pixels = processor(images, return_tensors="pt")["pixel_values"]
            assert torch.equal(pixels, torch.stack([model.image_transform(image) for image in images]))


def test_images_come_in_many_forms(exported):
    processor = MultistageCLIPImageProcessor.from_pretrained(exported[1])
    image = IMAGES[0]
    expected = processor(image, return_tensors="pt")["pixel_values"]
    assert expected.shape == (1, 3, 32, 32)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(40, 61, 3)
    channels_first = pixels.permute(2, 0, 1)
    for form in (pixels, pixels.numpy(), channels_first, channels_first.numpy(), [[pixels]], pixels[None]):
        assert torch.equal(processor(form, return_tensors="pt")["pixel_values"], expected)
    both = processor(torch.stack([channels_first, channels_first]), return_tensors="np")["pixel_values"]
    assert torch.equal(torch.from_numpy(both), expected.expand(2, -1, -1, -1))
    assert torch.equal(processor(image)["pixel_values"][0], expected[0])
    grey = processor(image.convert("L"), return_tensors="pt")["pixel_values"]
    one_channel = torch.frombuffer(bytearray(image.convert("L").tobytes()), dtype=torch.uint8).view(40, 61)
    for form in (one_channel, one_channel[None], one_channel[:, :, None]):
        assert torch.equal(processor(form, return_tensors="pt")["pixel_values"], grey)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ("a/file.jpg", "'a/file.jpg' is not an image; open it with PIL first"),
        ([], "there are no images"),
        (torch.zeros(4, 4, 3), "values of type torch.float32; give uint8 values"),
        (torch.zeros(6, 6, 5, dtype=torch.uint8), r"the shape \(6, 6, 5\); give"),
        (torch.zeros(4, dtype=torch.uint8), r"the shape \(4,\)"),
        (
            torch.zeros(1, 9, 3, dtype=torch.uint8),
            r"the shape \(1, 9, 3\) may have its channels first or last; give a PIL",
        ),
        (torch.zeros(3, 9, 4, dtype=torch.uint8).numpy(), r"the shape \(3, 9, 4\) may have its channels first or last"),
    ],
)
def test_other_inputs_than_images_are_refused(images, message, exported):
    with pytest.raises(ValueError, match=message):
        MultistageCLIPImageProcessor.from_pretrained(exported[1])(images)


def test_processor_takes_texts_or_images_alone(exported):
    processor = AutoProcessor.from_pretrained(exported[1], trust_remote_code=True)
    assert set(processor(text="a dog")) == {"input_ids", "attention_mask"}
    assert processor(text=TEXTS, return_tensors="pt")["input_ids"].shape == (5, 16)
    assert set(processor(images=IMAGES)) == {"pixel_values"}
    with pytest.raises(ValueError, match="nothing to process; give images=, text= or both"):
        processor()
    with pytest.raises(ValueError, match="3 is not a text"):
        processor(text=["a", 3])
    with pytest.raises(ValueError, match="return_tensors='tf' is not one of"):
        processor(images=IMAGES, return_tensors="tf")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"output_loading_info": True}, TypeError, "from_pretrained of .* has no option output_loading_info; leave"),
        ({"device_map": {"a": "cpu", "b": "meta"}}, ValueError, "names several devices; .* takes one"),
        ({"dtype": "int8"}, ValueError, "dtype='int8' is not a floating-point dtype"),
        (
            {"config": MultistageCLIPConfig(num_stages=2)},
            ValueError,
            "the config has num_stages=2, the weights of .* have 3",
        ),
    ],
)
def test_impossible_options_are_refused(options, error, message, exported):
    with pytest.raises(error, match=message):
        MultistageCLIPModel.from_pretrained(exported[1], **options)


def test_mistakes_are_explained_in_one_sentence(exported, tmp_path):
    model = MultistageCLIPModel.from_pretrained(exported[1])
    with pytest.raises(ValueError, match="the images have 16 x 32 pixels; the model takes 32 x 32"):
        model.get_image_features(torch.zeros(1, 3, 16, 32))
    with pytest.raises(ValueError, match="nothing to encode; give pixel_values, input_ids or both"):
        model()
    with pytest.raises(ValueError, match="cannot be created from its config alone; use from_pretrained"):
        MultistageCLIPModel(MultistageCLIPConfig())
    with pytest.raises(TypeError, match=r"save_pretrained of .* has no option state_dict"):
        model.save_pretrained(tmp_path / "new", state_dict={})
    config = MultistageCLIPConfig.from_pretrained(exported[1], combine="sum")
    with pytest.raises(ValueError, match="combine='sum' is not one of concat, mean_cosine"):
        MultistageCLIPModel.from_pretrained(exported[1], config=config)
    with pytest.raises(OSError, match="no/such is not a folder, and cannot be loaded from the Hub: ") as missing:
        MultistageCLIPModel.from_pretrained("no/such", cache_dir=tmp_path)
    assert "\n" not in str(missing.value)


def test_damaged_folders_are_named(exported, tmp_path):
    folder = shutil.copytree(exported[1], tmp_path / "copy")
    weights = folder / "stage_0" / "open_clip_model.safetensors"
    whole = weights.read_bytes()
    (folder / "mcl_clip_config.json").rename(folder / "elsewhere")
    with pytest.raises(OSError, match=r"is not a complete multistage CLIP model: .*mcl_clip_config.json"):
        MultistageCLIPModel.from_pretrained(folder)
    (folder / "elsewhere").rename(folder / "mcl_clip_config.json")
    weights.unlink()
    with pytest.raises(ValueError, match="copy is damaged: ") as caught:
        MultistageCLIPModel.from_pretrained(folder)
    assert "\n" not in str(caught.value)
    weights.write_bytes(whole)
    (folder / "mcl_clip_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"copy is damaged: mcl_clip_config.json is not a JSON object"):
        MultistageCLIPModel.from_pretrained(folder)


@pytest.mark.parametrize("subfolder", ["", "combined"])
def test_models_of_the_hub_are_taken_from_the_cache(subfolder, exported, tmp_path):
    _, folder = exported
    older = REVISION.replace("0", "f")
    snapshots = in_cache(tmp_path, folder, {"main": REVISION, "v1": older}, subfolder)
    config = snapshots / older / subfolder / "mcl_clip_config.json"
    config.write_text(config.read_text().replace('"concat"', '"mean_cosine"'))
    options = {"cache_dir": tmp_path, "local_files_only": True, "subfolder": subfolder}
    download = modeling_multistage_clip.snapshot_download
    with patch.object(modeling_multistage_clip, "snapshot_download", wraps=download) as fetched:
        newest = MultistageCLIPModel.from_pretrained("some/model", **options)
    stages = [str(Path(subfolder, f"stage_{number}", "*")) for number in range(3)]
    assert fetched.call_args.kwargs["allow_patterns"] == stages
    tagged = MultistageCLIPModel.from_pretrained("some/model", revision="v1", **options)
    assert (newest.multistage.combine, tagged.multistage.combine) == ("concat", "mean_cosine")
    assert newest.name_or_path == "some/model"
    local = MultistageCLIPModel.from_pretrained(snapshots / REVISION, subfolder=subfolder)
    for got, expected in zip(local.parameters(), newest.parameters(), strict=True):
        assert torch.equal(got, expected)


def test_a_model_of_the_hub_is_saved_with_code_of_its_own(exported, tmp_path):
    in_cache(tmp_path, exported[1], {"main": REVISION})
    options = {"cache_dir": tmp_path, "local_files_only": True, "trust_remote_code": True}
    model = AutoModel.from_pretrained("some/model", **options)
    model.save_pretrained(tmp_path / "saved")
    assert "some/model" not in (tmp_path / "saved" / "config.json").read_text()
    again = AutoModel.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    tokens = exported[0].tokenizer(TEXTS)
    with torch.no_grad():
        got = features_of(again.get_text_features(tokens))
    assert torch.equal(got, own_features(exported[0])[1])


def make_word_tokenizer(folder):
    """A Hugging Face tokenizer that knows a few words, and capitals from small letters."""
    words = [
        "[PAD]", "[CLS]", "[SEP]", "[UNK]", "a", "A", "photo", "Photo", "of", "dog", "DOGS", "two", "cat_and",
        "cat", "and", "dogs", "one", "red", "bird", "so", "many", "words", "x", ".", ",", "(", ")", "_",
    ]  # fmt: skip
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    special = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("options", [{}, {"clean": "lower", "strip_sep_token": True}, {"clean": "canonicalize"}])
def test_models_bring_their_own_tokenizer(options, tmp_path):
    cfg = make_cfg(custom_text=True)
    cfg["text_cfg"] |= {
        "hf_tokenizer_name": make_word_tokenizer(tmp_path / "words"), "tokenizer_kwargs": options,
        "vocab_size": 28, "pool_type": "last", "no_causal_mask": True, "context_length": 8,
    }  # fmt: skip
    model = make_model(cfg=cfg)
    texts = ["a Photo of  two DOGS.", "A cat_and (one) dog &amp; bird", "so many words " * 9, "x"]
    before = model.tokenizer(texts)
    folder = export(tmp_path / "model", model)
    assert max(differences(transformers_features(folder, IMAGES, texts), own_features(model, texts=texts))) < 1e-6
    assert torch.equal(model.tokenizer(texts), before)
    assert model.tokenizer.tokenizer.backend_tokenizer.normalizer is None
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    inputs = tokenizer(texts[:1] + texts[2:], padding=True, return_tensors="pt")  # entities are the processor's
    assert set(inputs) == {"input_ids", "attention_mask"}
    got = fit_tokens(inputs["input_ids"], inputs["attention_mask"], 8, model.tokenizer)
    assert torch.equal(got, before[[0, 2, 3]])
    assert got[1].tolist()[-1] == (0 if options.get("strip_sep_token") else 2)


@pytest.mark.parametrize("compact", [False, True], ids=["whole", "compact"])
def test_text_towers_of_hugging_face_keep_their_weights(compact, tmp_path):
    bert = transformers.BertConfig(
        vocab_size=28, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, pad_token_id=0
    )
    bert.save_pretrained(tmp_path / "words")
    words = make_word_tokenizer(tmp_path / "words")
    cfg = make_cfg(custom_text=True)
    cfg["text_cfg"] = {"hf_model_name": words, "hf_tokenizer_name": words, "context_length": 8}
    cfg["text_cfg"]["hf_model_pretrained"] = False
    model = make_model(cfg=cfg)
    texts = ["a dog", "so many words " * 9]
    folder = export(tmp_path / "model", model, compact=compact)
    assert max(differences(transformers_features(folder, IMAGES, texts), own_features(model, texts=texts))) < 1e-6
    loaded = MultistageCLIPModel.from_pretrained(folder)
    for module in loaded.modules():
        module._is_hf_initialized = False
    loaded.init_weights()
    with torch.no_grad():
        got = features_of(loaded.get_text_features(model.tokenizer(texts)))
    assert torch.equal(got, own_features(model, texts=texts)[1])


@pytest.mark.parametrize("clean", ["whitespace", "canonicalize"])
def test_tokens_that_transformers_would_make_otherwise_are_refused(clean, tmp_path):
    cfg = make_cfg()
    cfg["text_cfg"]["tokenizer_kwargs"] = {"clean": clean}
    with pytest.raises(UserError, match=f"differently from the model's tokenizer .*'clean': '{clean}'"):
        export(tmp_path / "model", make_model(cfg=cfg))
