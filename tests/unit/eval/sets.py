"""Small evaluation sets of noise, and small random models."""

import io
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

from mcl_clip.data.writing import LabelledImage, Pair, write_classification_set, write_retrieval_set
from mcl_clip.eval.embed import Encoder, FileImages
from mcl_clip.eval.task import result_record
from mcl_clip.model.clip import ClipBundle, create_clip, save_clip
from mcl_clip.model.multistage import MultistageCLIP
from tests.unit.data.tars import write_tar

MODEL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "layers": 1, "width": 32, "head_width": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
CLASSES = ("cat", "dog", "owl", "fox", "hen", "bee", "ant")
TEMPLATES = ("a photo of a {c}.", "the {c}")


def noise_png(number: int, size: int = 32) -> bytes:
    """Return a PNG image of noise, different for each number."""
    pixels = np.random.default_rng(number).integers(0, 256, (size, size, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def npy(values, dtype=np.int64) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(values, dtype))
    return buffer.getvalue()


def write_classification(root: Path, labels, classnames=CLASSES, templates=TEMPLATES) -> Path:
    samples = (
        LabelledImage(key=f"k{number}", image=noise_png(number), label=int(label))
        for number, label in enumerate(labels)
    )
    write_classification_set(samples, root, classnames=classnames, templates=templates, samples_per_shard=25)
    return root


def write_multilabel(root: Path, labels, classnames=CLASSES, templates=TEMPLATES) -> Path:
    """Write a set in CLIP_benchmark's layout with `.npy` members, in two shards."""
    members = [
        [(f"s{number:07d}.png", noise_png(number)), (f"s{number:07d}.npy", npy(row))]
        for number, row in enumerate(labels)
    ]
    half = len(members) // 2
    for shard, part in enumerate((members[:half], members[half:])):
        write_tar(root / "test" / f"{shard}.tar", [member for sample in part for member in sample])
    (root / "test" / "nshards.txt").write_text("2\n")
    (root / "dataset_type.txt").write_text("multilabel\n")
    (root / "classnames.txt").write_text("".join(f"{name}\n" for name in classnames))
    (root / "zeroshot_classification_templates.txt").write_text("".join(f"{name}\n" for name in templates))
    return root


def write_retrieval(root: Path, images: int) -> Path:
    pairs = (
        Pair(key=f"k{n}", image=noise_png(n), captions=[f"text {n}", f"also {n}"][: 1 + n % 2]) for n in range(images)
    )
    write_retrieval_set(pairs, root, samples_per_shard=20)
    return root


def write_pairs(root: Path) -> Path:
    (root / "images").mkdir(parents=True)
    for name in ("a", "b"):
        (root / "images" / f"{name}.png").write_bytes(noise_png(ord(name)))
    (root / "pairs.json").write_text(
        json.dumps({"format": 1, "name": "two", "rule": "pair_t2i", "images": "images", "source": "test"})
    )
    item = {"id": "1", "group": "g", "images": ["a.png", "b.png"], "texts": ["an a", "a b"], "match": [[0, 0], [1, 1]]}
    (root / "pairs.jsonl").write_text(json.dumps(item) + "\n")
    return root


def write_image_folder(root: Path, classes: dict[str, int]) -> Path:
    """Write the given number of images of each class."""
    for index, (name, count) in enumerate(classes.items()):
        (root / name).mkdir(parents=True)
        for number in range(count):
            (root / name / f"{number}.png").write_bytes(noise_png(100 * index + number, size=8))
    return root


def name_classes(root: Path) -> Path:
    """Add classnames.txt to an image folder, so that a search for sets finds it."""
    (root / "classnames.txt").write_text("".join(f"{path.name}\n" for path in sorted(root.iterdir())))
    return root


def make_tower(seed: int = 0) -> ClipBundle:
    return create_clip(model_cfg=MODEL, seed=seed)


def write_tower(folder: Path, seed: int = 0) -> Path:
    save_clip(make_tower(seed), folder)
    return folder


def make_multistage(stages: int = 2, combine: str = "concat") -> MultistageCLIP:
    towers = [make_tower(seed) for seed in range(stages)]
    return MultistageCLIP(
        [tower.model for tower in towers],
        combine=combine,
        logit_scale=3.0,
        preprocess_cfg=towers[0].preprocess_cfg,
        model_cfgs=[tower.model_cfg for tower in towers],
    )


def set_of(source=None) -> SimpleNamespace:
    """Return what an encoder and a record need of an evaluation set."""
    return SimpleNamespace(source=source or FileImages(()), texts=(), sha256="0123456789abcdef" * 4)


def encoder_of(model, **options) -> Encoder:
    """Return an encoder for a model without a transform or tokenizer of its own."""
    return Encoder(
        model=model,
        image_transform=lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255,
        tokenizer=lambda texts: torch.zeros(len(texts), 1, dtype=torch.int64),
        device=torch.device("cpu"),
        **options,
    )


def record_of(task, metrics, *, model="ViT", pretrained="run/stage-0", stage=0, seconds=1.0) -> dict:
    """Return the record of the results of a task under some model."""
    return result_record(
        task, metrics, model=model, pretrained=pretrained, stage=stage, combine=None, dtype="fp32", seconds=seconds,
        outcomes={}, outcomes_file="outcomes.npz",
    )  # fmt: skip


class Constant:
    """A model with the same feature for every input."""

    def encode_image(self, pixels):
        return torch.ones(len(pixels), 8)

    def encode_text(self, tokens):
        return torch.ones(len(tokens), 8)


class Noise:
    """A model whose features hold no information."""

    def __init__(self, seed: int = 0):
        self.generator = torch.Generator().manual_seed(seed)

    def encode_image(self, pixels):
        return torch.randn(len(pixels), 8, generator=self.generator)

    encode_text = encode_image
