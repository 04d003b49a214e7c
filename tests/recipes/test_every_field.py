"""Every field of the configuration acts: for each, a short run on which its change is seen, and what is seen of it."""

import contextlib
import hashlib
import io
import os
import shutil
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import open_clip
import pytest
import timm
import torch
import webdataset as wds
from huggingface_hub import ModelCard
from PIL import Image, ImageDraw

from mcl_clip.cli import commands
from mcl_clip.cli import recipe as cli
from mcl_clip.config import ExperimentConfig, PublishConfig, RunConfig, TowerConfig
from mcl_clip.core import progress
from mcl_clip.core.files import read_json, read_jsonl
from mcl_clip.data import workers
from mcl_clip.data.loader import TrainingLoader
from mcl_clip.model import clip as clips
from mcl_clip.model import losses
from mcl_clip.runs import stage_phases, train_phase
from mcl_clip.tools.experiment import plan_experiment
from tests.hub import TOKEN, Hub, online
from tests.parts import write_text_model
from tests.recipes.runs import COLOURS, execute, load_recipe
from tests.unit.data.http_ranges import serve

ROWS = 64
COMMON = ("--stages.0.train.steps", "2", "--stages.0.train.warmup-steps", "0")
LORA = "--stages.0.train.lora.rank"
TWO_STAGES = "--num-stages 2 --stages.1.train.steps 2 --stages.1.train.warmup-steps 0"
GROUPED = f"{TWO_STAGES} --stages.1.train.min-group-size 8"
EVALUATED = "--eval.sets {path}/colours --eval.every-steps 1"
PRETRAINED = "--tower.pretrained {data}/folder/open_clip_model.safetensors"
WISE_FT = "--eval.sets {path}/colours --eval.select colours --eval.wise-ft 0.5"
SIGLIP_MODEL = {"init_logit_bias": -10.0, "init_logit_scale": 2.3}


@dataclass(frozen=True)
class Case:
    """A change of one field, what is seen to differ by it, and the settings of both runs beside it.

    SIGTERM and SLOW are what happens to the run: a signal in its first batch, a loader process that takes seconds.
    """

    change: str | Callable[[RunConfig], RunConfig]
    sees: str
    given: str | Callable[[RunConfig], RunConfig] = ""


def model(**changes: Any) -> Callable[[RunConfig], RunConfig]:
    return lambda recipe: replace(recipe, tower=replace(recipe.tower, model={**recipe.tower.model, **changes}))


def from_folder(recipe: RunConfig) -> RunConfig:
    folder = Path(recipe.data.train[0]).parent / "folder"
    return replace(recipe, tower=replace(recipe.tower, model={}, architecture=f"local-dir:{folder}"))


def pair(**changes: Any) -> Callable[[RunConfig], RunConfig]:
    """A pair of towers, whose files are beside the data."""

    def changed(recipe: RunConfig) -> RunConfig:
        folder = Path(recipe.data.train[0]).parent
        given = {"image": "timm:test_vit={}/vit.pth", "text": "hf:{}/words"} | changes
        given |= {name: given[name].format(folder) for name in ("image", "text")}
        return replace(recipe, tower=TowerConfig(**given))

    return changed


def images(**changes: Any) -> Callable[[RunConfig], RunConfig]:
    """An image tower alone, which learns from the images of the shards."""

    def changed(recipe: RunConfig) -> RunConfig:
        given = {"image": "timm:resnet18=random", "image_args": {"channels": (4, 4, 8, 8)}, "dim": 8} | changes
        stage = recipe.stages[0]
        stage = replace(
            stage, train=replace(stage.train, loss="simclr"), cluster=replace(stage.cluster, metric="cosine")
        )
        return replace(recipe, tower=TowerConfig(image_size=(32,), **given), stages=(stage,) * len(recipe.stages))

    return changed


def preprocess(**options: Any) -> Callable[[RunConfig], RunConfig]:
    return lambda recipe: replace(recipe, tower=replace(recipe.tower, preprocess=options))


CASES = {
    "run_dir": Case("--run-dir {tmp}/elsewhere", "run_dir"),
    "control": Case("--control ifm", "weights"),
    "method": Case("--method soup", "choice", given=f"{PRETRAINED} {TWO_STAGES}"),
    "combine": Case("--combine mean_cosine", "combination"),
    "seed": Case("--seed 1", "weights"),
    "behavior": Case("--behavior 0.6", "made_from"),
    "data.train": Case("--data.train {data}/json", "batches"),
    "data.weights": Case("--data.weights 1 3", "batches", given="--data.train {data}/shards {data}/json"),
    "data.caption_key": Case("--data.caption-key title", "batches", given="--data.train {data}/both"),
    "data.negatives_key": Case("--data.negatives-key wrong", "weights", given="--data.train {data}/json"),
    "data.image_member": Case(
        "--data.image-member img", "error", given="--data.train {data}/named --data.text-member cap"
    ),
    "data.text_member": Case(
        "--data.text-member cap", "error", given="--data.train {data}/named --data.image-member img"
    ),
    "data.skip_damaged": Case(
        "--data.skip-damaged", "error", given="--data.train {data}/cut --data.max-bad-fraction 0.9"
    ),
    "data.holdout_rows": Case("--data.holdout-rows 2", "batches"),
    "data.max_bad_fraction": Case("--data.max-bad-fraction 0.9", "error", given="--data.train {data}/broken"),
    "data.max_pixels": Case("--data.max-pixels 1000", "error"),
    "tower.architecture": Case(from_folder, "weights"),
    "tower.pretrained": Case("--tower.pretrained {data}/folder/open_clip_model.safetensors", "weights"),
    "tower.model": Case(model(embed_dim=24), "weights"),
    "tower.preprocess: size": Case(preprocess(size=48), "batches"),
    "tower.preprocess: mean": Case(preprocess(mean=(0.1, 0.2, 0.3)), "weights"),
    "tower.preprocess: std": Case(preprocess(std=(0.1, 0.2, 0.3)), "weights"),
    "tower.preprocess: interpolation": Case(preprocess(interpolation="bilinear"), "batches"),
    "tower.preprocess: resize_mode": Case(preprocess(resize_mode="squash"), "features"),
    "tower.preprocess: fill_color": Case(
        preprocess(resize_mode="longest", fill_color=200), "features", given=preprocess(resize_mode="longest")
    ),
    "tower.image": Case(pair(image="timm:test_vit={}/other.pth"), "weights", given=pair()),
    "tower.text": Case(pair(text="hf:{}/other_words"), "weights", given=pair()),
    "tower.dim": Case(pair(dim=24), "weights", given=pair()),
    "tower.heads": Case(pair(heads="linear"), "weights", given=pair()),
    "tower.head_batch_norm": Case(images(head_batch_norm=False), "weights", given=images()),
    "tower.stem": Case("--tower.stem cifar", "weights", given=images()),
    "tower.image_args": Case(images(image_args={"channels": (4, 4, 4, 4)}), "weights", given=images()),
    "tower.context_length": Case("--tower.context-length 20", "weights"),
    "tower.image_size": Case("--tower.image-size 48", "batches"),
    "stages.start": Case("--stages.1.start scratch", "weights", given=TWO_STAGES),
    "train.steps": Case("--stages.0.train.steps 3", "batches"),
    "train.global_batch_size": Case("--stages.0.train.global-batch-size 8", "batches"),
    "train.lr": Case("--stages.0.train.lr 0.1", "weights"),
    "train.warmup_steps": Case("--stages.0.train.warmup-steps 1", "weights"),
    "train.schedule": Case("--stages.0.train.schedule constant", "weights"),
    "train.weight_decay": Case("--stages.0.train.weight-decay 0.9", "weights"),
    "train.betas": Case("--stages.0.train.betas 0.1 0.2", "weights"),
    "train.eps": Case("--stages.0.train.eps 0.1", "weights"),
    "train.lr_multipliers": Case("--stages.0.train.lr-multipliers ^visual 0.1", "weights"),
    "train.weight_decays": Case("--stages.0.train.weight-decays ^visual 0.9", "weights"),
    "train.max_grad_norm": Case("--stages.0.train.max-grad-norm 0.0001", "weights"),
    "train.optimizer": Case("--stages.0.train.optimizer sgd", "weights"),
    "train.momentum": Case(
        "--stages.0.train.momentum 0", "weights", given="--stages.0.train.optimizer lars --stages.0.train.steps 3"
    ),
    "train.temperature": Case("--stages.0.train.temperature 0.5", "weights", given=images()),
    "train.num_views": Case("--stages.0.train.num-views 3", "batches", given=images()),
    "train.loss": Case("--stages.0.train.loss siglip", "weights", given=model(**SIGLIP_MODEL)),
    "train.ifm_epsilon": Case("--stages.0.train.ifm-epsilon 0.1", "weights"),
    "train.precision": Case("--stages.0.train.precision bf16", "weights"),
    "train.grad_cache_rows": Case("--stages.0.train.grad-cache-rows 4", "encoded"),
    "train.loss_chunk_rows": Case("--stages.0.train.loss-chunk-rows 4", "chunks"),
    "train.grad_checkpointing": Case("--stages.0.train.grad-checkpointing", "blocks"),
    "train.compiled": Case("--stages.0.train.compiled", "compiled"),
    "train.patch_dropout": Case("--stages.0.train.patch-dropout 0.5", "weights"),
    "train.average_decay": Case("--stages.0.train.average-decay 0.9", "weights"),
    "train.keep_best": Case("--stages.0.train.keep-best colours", "best", given=EVALUATED),
    "train.patience": Case(
        "--stages.0.train.patience 1",
        "best",
        given=f"{EVALUATED} --stages.0.train.keep-best colours --stages.0.train.lr 0",
    ),
    "train.groups": Case("--stages.1.train.groups none", "weights", given=TWO_STAGES),
    "train.own_group_share": Case("--stages.1.train.own-group-share 0.5", "weights", given=GROUPED),
    "train.groups_per_batch": Case("--stages.1.train.groups-per-batch 2", "batches", given=GROUPED),
    "train.negative_captions": Case(
        "--stages.0.train.negative-captions 2", "weights", given="--data.train {data}/json --data.negatives-key wrong"
    ),
    "train.min_group_size": Case("--stages.1.train.min-group-size 60", "weights", given=TWO_STAGES),
    "train.min_negatives": Case("--stages.0.train.min-negatives 15", "weights"),  # some rows have duplicates
    "train.mask_duplicates": Case("--stages.0.train.no-mask-duplicates", "weights"),
    "train.mask_similar": Case("--stages.1.train.mask-similar 0.1", "weights", given=TWO_STAGES),
    "train.similar_by": Case(
        "--stages.1.train.similar-by image", "weights", given=f"{TWO_STAGES} --stages.1.train.mask-similar 0.99"
    ),
    "train.window_shards": Case("--stages.0.train.window-shards 1", "batches"),
    "train.resharded": Case("--stages.1.train.resharded {data}/grouped", "batches", given=TWO_STAGES),
    "train.run_rows": Case("--stages.0.train.run-rows 4", "batches"),
    "augment.scale": Case("--stages.0.train.augment.scale 0.3 0.4", "batches"),
    "augment.ratio": Case("--stages.0.train.augment.ratio 0.5 0.6", "batches"),
    "augment.horizontal_flip": Case("--stages.0.train.augment.horizontal-flip 1", "batches"),
    "augment.jpeg": Case("--stages.0.train.augment.jpeg exact", "batches"),
    "augment.jitter": Case("--stages.0.train.augment.jitter 0.4 0 0 0", "batches"),
    "augment.jitter_probability": Case(
        "--stages.0.train.augment.jitter-probability 0", "batches", given="--stages.0.train.augment.jitter 0.4 0 0 0"
    ),
    "augment.grayscale": Case("--stages.0.train.augment.grayscale 0.5", "batches"),
    "augment.blur": Case("--stages.0.train.augment.blur 1", "batches"),
    "augment.solarize": Case("--stages.0.train.augment.solarize 1", "batches"),
    "augment.views": Case("--stages.0.train.augment.views 1", "batches"),
    "distill.weight": Case("--stages.0.train.distill.weight 1", "weights", given=PRETRAINED),
    "distill.temperature": Case(
        "--stages.0.train.distill.temperature 3",
        "weights",
        given=f"{PRETRAINED} --stages.0.train.steps 3 --stages.0.train.distill.weight 1",
    ),
    "decode.weight": Case("--stages.0.train.decode.weight 1", "weights", given=PRETRAINED),
    "decode.hidden_dim": Case(
        "--stages.0.train.decode.hidden-dim 8",
        "weights",
        given=f"{PRETRAINED} --stages.0.train.steps 3 --stages.0.train.decode.weight 1",
    ),
    "lock.text": Case("--stages.0.train.lock.text", "trained"),
    "lock.text_unlocked_groups": Case("--stages.0.train.lock.text-unlocked-groups 1", "trained"),
    "lock.image_unlocked_groups": Case("--stages.0.train.lock.image-unlocked-groups 1", "trained"),
    "lock.patterns": Case("--stages.0.train.lock.patterns ^visual", "trained"),
    "lora.rank": Case(f"{LORA} 4", "trained"),
    "lora.alpha": Case("--stages.0.train.lora.alpha 2", "weights", given=f"{LORA} 4"),
    "lora.dropout": Case(
        "--stages.0.train.lora.dropout 0.5", "weights", given=f"{LORA} 4 --stages.0.train.lora.patterns mlp"
    ),
    "lora.towers": Case("--stages.0.train.lora.towers text", "trained", given=f"{LORA} 4"),
    "lora.patterns": Case("--stages.0.train.lora.patterns mlp", "trained", given=f"{LORA} 4"),
    "lora.full": Case("--stages.0.train.lora.full ln_final", "trained", given=f"{LORA} 4"),
    "lock.cached_texts": Case(
        "--stages.0.train.lock.no-cached-texts",
        "batches",
        given="--stages.0.train.lock.text --stages.0.train.steps 9",
    ),
    "lock.cached_trunks": Case(
        "--stages.0.train.lock.no-cached-trunks",
        "batches",
        given="--stages.0.train.lock.image-unlocked-groups 1 --stages.0.train.augment.views 1 --stages.0.train.steps 9",
    ),
    "cluster.num_clusters": Case("--stages.0.cluster.num-clusters 4", "labels"),
    "cluster.on": Case("--stages.0.cluster.on text", "labels"),
    "cluster.text_clusters": Case(
        "--stages.0.cluster.text-clusters 2", "labels", given="--stages.0.cluster.on product"
    ),
    "cluster.features": Case("--stages.1.cluster.features base", "labels", given=TWO_STAGES),
    "cluster.metric": Case("--stages.0.cluster.metric cosine", "centroids"),
    "cluster.num_starts": Case("--stages.0.cluster.num-starts 1", "starts"),
    "cluster.max_passes": Case("--stages.0.cluster.max-passes 0", "passes"),
    "eval.retrieval": Case("--eval.retrieval {path}/retrieval", "evaluated"),
    "eval.classification": Case("--eval.classification {path}/colours", "evaluated"),
    "eval.sets": Case("--eval.sets {path}/colours", "evaluated"),
    "eval.select": Case("--eval.select colours:linear_acc1", "choice", given=f"{PRETRAINED} {WISE_FT}"),
    "eval.guard": Case("--eval.guard colours:linear_acc1", "choice", given=f"{PRETRAINED} {WISE_FT}"),
    "eval.wise_ft": Case("--eval.wise-ft 0.3", "choice", given=f"{PRETRAINED} {WISE_FT}"),
    "eval.every_steps": Case("--eval.every-steps 1", "records", given="--eval.sets {path}/colours"),
    "eval.batch_size": Case("--eval.batch-size 10", "encoded"),
    "machine.workers": Case("--machine.workers 1", "loaders"),
    "machine.prefetch_batches": Case("--machine.prefetch-batches 2", "loaders", given="--machine.workers 1"),
    "machine.loader_timeout_s": Case("--machine.loader-timeout-s 1", "error", given="--machine.workers 1 SLOW"),
    "machine.threads": Case("--machine.threads 2", "threads"),
    "machine.log_steps": Case("--machine.log-steps 2", "records"),
    "machine.save_steps": Case("--machine.save-steps 1", "checkpoints"),
    "machine.save_minutes": Case("--machine.save-minutes 1e-9", "checkpoints"),
    "machine.keep_checkpoints": Case("--machine.keep-checkpoints 1", "checkpoints", given="--machine.save-steps 1"),
    "machine.progress": Case("--machine.progress", "bars"),
    "machine.report": Case("--machine.report", "report"),
    "machine.report_images": Case("--machine.no-report-images", "report", given="--machine.report"),
    "machine.report_mb": Case("--machine.report-mb 0.05", "report", given="--machine.report"),
    "machine.trackers": Case("--machine.trackers tensorboard", "trackers"),
    "machine.tracker_project": Case("--machine.tracker-project mine", "trackers", given="--machine.trackers wandb"),
    "machine.remote": Case(
        "--machine.remote stage", "requests", given="--data.train {url} --machine.cache-dir {tmp}/other"
    ),
    "machine.cache_dir": Case(
        "--machine.cache-dir {tmp}/cache",
        "cached",
        given="--data.train {url} --machine.remote stage --machine.cache-dir {tmp}/other",
    ),
    "machine.cache_gb": Case(
        "--machine.cache-gb 1e-6",
        "error",
        given="--data.train {url} --machine.remote stage --machine.cache-dir {tmp}/other",
    ),
    "machine.preempt_exit_code": Case("--machine.preempt-exit-code 85", "code", given="SIGTERM"),
}
ELSEWHERE = {  # fields with a test of their own below
    *(f"publish.{name}" for name in ("repo", "private", "revision", "create_pr", "compact", "license", "datasets")),
    *("publish.description", "experiment.figures", "experiment.arms", "experiment.high"),
}
SECTIONS = {"RunConfig": "", "StageConfig": "stages."}


def leaves(config: type) -> Iterator[str]:
    """Fields of a section of the configuration, and of the sections below it, as SECTION.FIELD."""
    section = SECTIONS.get(config.__name__, config.__name__.removesuffix("Config").lower() + ".")
    hints = get_type_hints(config)
    for field in fields(config):
        kind = hints[field.name]
        below = [each for each in (kind, *getattr(kind, "__args__", ())) if is_dataclass(each)]
        yield from (name for each in below for name in leaves(each)) if below else [section + field.name]


def test_every_field_has_a_case():
    names = {*leaves(RunConfig), *leaves(ExperimentConfig)}
    assert names == {*(name.partition(":")[0] for name in CASES), *ELSEWHERE}
    assert {name.partition(": ")[2] for name in CASES if ":" in name} == {*clips.PREPROCESS_NAMES}


def write_pairs(
    folder: Path, *, first: int = 0, texts: tuple[str, ...] = ("txt",), image: str = "jpg", corrupt: int = 0
) -> None:
    """Four shards of JPEG pictures larger than the model takes; captions repeat."""
    folder.mkdir(parents=True)
    with wds.ShardWriter(str(folder / "%04d.tar"), maxcount=ROWS // 4, verbose=0) as writer:
        for number in range(first, first + ROWS):
            picture = Image.new("RGB", (160, 120), (3 * number % 256, 90, 100))
            x, colour = 7 * number % 100, list(COLOURS)[number % 4]
            ImageDraw.Draw(picture).rectangle((x, x // 2, x + 40, x // 2 + 50), fill=COLOURS[colour])
            buffer = io.BytesIO()
            picture.save(buffer, "JPEG")
            data = buffer.getvalue()[: 500 if number < first + corrupt else None]
            captions = {"caption": f"a {colour} bar", "title": f"bar {number}", "wrong": ["no bar", f"{colour} sky"]}
            members = {name: captions if name == "json" else captions["caption"].encode() for name in texts}
            writer.write({"__key__": f"s{number:05d}", image: data, **members})


@pytest.fixture(scope="module")
def data(path, tmp_path_factory) -> Path:
    """Shards, other shards with JSON, members of other names or damage, and an open_clip folder with other weights."""
    folder = tmp_path_factory.mktemp("data")
    write_pairs(folder / "shards")
    write_pairs(folder / "json", first=100, texts=("json",))
    write_pairs(folder / "both", texts=("json", "txt"))
    write_pairs(folder / "named", texts=("cap",), image="img")
    write_pairs(folder / "broken", corrupt=5)
    write_pairs(folder / "cut")
    os.truncate(folder / "cut" / "0003.tar", 20_000)
    other = clips.create_clip(model_cfg=load_recipe(path).tower.model, seed=5)
    clips.save_clip(other, folder / "folder")
    for seed, (image, text) in enumerate((("vit.pth", "words"), ("other.pth", "other_words"))):
        torch.manual_seed(seed)
        torch.save(timm.create_model("test_vit").state_dict(), folder / image)
        write_text_model(folder / text)
    return folder


def digest(*arrays: Any) -> str:
    return hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)).hexdigest()[:12]


class Watch:
    """What is seen of a run while it trains."""

    def __init__(self, patch: pytest.MonkeyPatch, *, stop: bool) -> None:
        self.seen: dict[str, Any] = defaultdict(list)
        self.stop = stop
        steps, add = TrainingLoader.steps, self.add

        def watched_steps(loader: TrainingLoader, *arguments: int) -> Iterator[Any]:
            for batch in steps(loader, *arguments):
                tensors = (batch.rows, batch.images, batch.tokens, batch.text_features)
                add("batches", digest(*(tensor for tensor in tensors if tensor is not None)))
                add("threads", torch.get_num_threads())
                if stop:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield batch

        patch.setattr(TrainingLoader, "steps", watched_steps)
        self.spy(patch, open_clip.CLIP, "encode_image", lambda _, images, **__: ("encoded", len(images)))
        self.spy(patch, open_clip.transformer.ResidualAttentionBlock, "forward", lambda *_, **__: ("blocks", 1))
        self.spy(patch, torch.nn.Module, "compile", lambda *_, **__: ("compiled", 1), instead=True)
        self.spy(patch, losses, "_chunks", lambda rows, size: ("chunks", (rows, size or rows)))
        self.spy(
            patch, torch.utils.data.DataLoader, "__init__",
            lambda *_, num_workers=0, prefetch_factor=None, **__: ("loaders", (num_workers, prefetch_factor)),
        )  # fmt: skip
        self.spy(patch, progress.Progress, "__init__", lambda *_, show=True, **__: ("bars", show))
        self.spy(patch, stage_phases, "spherical_kmeans", lambda *_, num_starts, **__: ("starts", num_starts))
        self.spy(
            patch, train_phase, "create_optimizer",
            lambda towers, _, **__: ("trained", sorted(n for n, p in towers.named_parameters() if p.requires_grad)),
        )  # fmt: skip

    def add(self, name: str, value: Any) -> None:
        self.seen[name].append(value)

    def spy(self, patch: Any, owner: Any, name: str, note: Callable[..., Any], *, instead: bool = False) -> None:
        original = getattr(owner, name)

        def noted(*arguments: Any, **options: Any) -> Any:
            self.add(*note(*arguments, **options))
            return None if instead else original(*arguments, **options)

        patch.setattr(owner, name, noted)


def look(run_recipe: Callable[[], int], run: Path, watch: Watch) -> dict[str, Any]:
    """Run a recipe; return what was seen of it and what it left."""
    seen = watch.seen
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        seen["code"] = run_recipe()
    seen["error"] = errors.getvalue().partition("error: ")[2]
    seen["folder"], seen["run_dir"] = run, run.exists()
    for stage in sorted(run.glob("stage-*")):
        weights = sorted(stage.glob("train/model/*.safetensors"))
        seen["weights"].append(digest(*(np.fromfile(path, np.uint8) for path in weights)) if weights else False)
        seen["checkpoints"].append(sorted(path.name for path in (stage / "train/checkpoints").glob("step-*")))
        if (stage / "cluster/DONE.json").exists():
            seen["features"].append(
                digest(*(np.fromfile(path, np.uint8) for path in sorted(stage.glob("embed/*.safetensors"))))
            )
            seen["labels"].append(digest(np.load(stage / "labels/labels.npy")))
            seen["centroids"].append(digest(np.fromfile(stage / "cluster/centroids.safetensors", np.uint8)))
            seen["passes"].append(len(read_json(stage / "cluster/trace.json").popitem()[1]))
            seen["evaluated"] += [record["dataset"] for record in read_jsonl(stage / "eval/results.jsonl")]
            seen["made_from"].append(read_json(stage / "train/DONE.json")["made_from"]["settings"]["data"])
            seen["records"].append([record["step"] for record in read_jsonl(stage / "train/metrics.jsonl")])
    if (path := run / "combined/combination.json").exists():
        record = read_json(path)
        seen["combination"] = record.get("combine")
        seen["choice"] = {name: record.get(name) for name in ("averaged", "wise_ft", "curve")}
    seen["best"] += [read_json(path) for path in sorted(run.glob("stage-*/train/best.json"))]
    report = run / "report.html"
    seen["report"] = (report.stat().st_size > 50_000, report.read_text().count("data:image")) if report.exists() else ()
    seen["trackers"] += sorted(path.name for path in (run / "trackers").glob("*"))
    return seen


class FakeTracker:
    """A tracker that remembers its project."""

    name, projects = "wandb", list[str]()

    def __init__(self, run_name: str, **_: Any) -> None:
        self.projects.append(run_name)

    def start(self) -> None:
        raise ConnectionError


@pytest.fixture(scope="module")
def grouped(data, observe):
    """The shards in the order of the groups of stage 1, as `mcl-clip reshard` writes them."""
    run = observe((TWO_STAGES,))["folder"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["mcl-clip", "reshard", str(run), str(data / "grouped"), "--stage", "1"])
        commands.command()


@pytest.fixture(scope="module")
def observe(path, data, tmp_path_factory):
    """What is seen of a short run with some settings, of which the same are run once."""

    @cache
    def run(settings: tuple[str | Callable[[RunConfig], RunConfig], ...]) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp("run")
        recipe = load_recipe(path)
        recipe = replace(
            recipe,
            run_dir=folder / "run",
            eval=type(recipe.eval)(),
            data=replace(recipe.data, train=(f"{data}/shards",)),
        )
        for change in settings:
            recipe = change(recipe) if callable(change) else recipe
        words = [word for change in settings if isinstance(change, str) for word in change.split()]
        places = {"data": data, "path": path.parent, "tmp": folder}
        with pytest.MonkeyPatch.context() as patch, serve(data / "shards") as server:
            places["url"] = server.url + "/{0000..0003}.tar"
            arguments = [word.format(**places) for word in words if not word.isupper()]
            patch.setattr(
                "sys.argv",
                ["recipe.py", *COMMON, *(() if "--num-stages" in words else ("--num-stages", "1")), *arguments],
            )
            patch.setattr("accelerate.Accelerator.free_memory", lambda self: ())  # half the time of a run
            patch.setattr(open_clip.factory, "SimpleTokenizer", cache(open_clip.factory.SimpleTokenizer))
            patch.setattr(os, "fsync", lambda file: None)
            patch.setattr("mcl_clip.train.trackers.find_spec", lambda name: True)
            patch.setattr("mcl_clip.train.trackers.WandBTracker", FakeTracker)
            patch.setenv("HOME", str(folder / "home"))

            if "SLOW" in words:
                start = workers._start_worker
                patch.setattr(workers, "POLL_S", 0.5)
                patch.setattr(workers, "_start_worker", lambda number: (start(number), time.sleep(3)))
            watch = Watch(patch, stop="SIGTERM" in words)
            seen = look(lambda: ended(recipe), folder / "run", watch)
            seen["requests"] = sum(bool(asked) for _, _, asked in server.requests)
            seen["cached"] = (folder / "cache").exists()
            seen["trackers"] += FakeTracker.projects
            FakeTracker.projects.clear()
        return seen

    return run


def ended(recipe: RunConfig) -> int:
    """The exit code of a recipe."""
    try:
        cli.main(recipe)
    except SystemExit as stop:
        return stop.code
    return 0


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_field_acts(name, observe, grouped):
    if name.startswith("lora."):
        pytest.importorskip("peft")  # an extra
    case = CASES[name]
    given = (case.given,) if case.given else ()
    before, after = observe(given), observe((*given, case.change))
    if case.sees not in ("error", "run_dir"):
        assert (before["error"], after["error"]) == ("", "")
    assert before[case.sees] != after[case.sees], before[case.sees]


def test_fields_of_publishing(finished, copy, path, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    recipe = replace(load_recipe(path), run_dir=copy)

    def published(repo="someone/tiny", **fields):
        """The Hub, and the files of the only branch that has a model."""
        with Hub(force_regular=True) as hub:
            online(monkeypatch, hub.endpoint)
            shutil.rmtree(copy / "publish", ignore_errors=True)
            execute(replace(recipe, publish=PublishConfig(repo=repo, **fields)))
            branches = {name: files for name, files in hub.repos[repo].items() if "mcl_clip_config.json" in files}
            ((name, files),) = branches.items()
            return hub, name, files

    hub, branch, plain = published()
    assert (branch, hub.private) == ("main", set())
    told = {"license": "mit", "datasets": ("someone/pairs",), "description": "Pairs of bars."}
    hub, branch, files = published("someone/other", private=True, revision="new", compact=True, **told)
    assert (branch, hub.private) == ("new", {"someone/other"})
    assert files.keys() != plain.keys()  # of the second stage, only what differs from the first
    card, plain_card = (ModelCard(each["README.md"].decode()) for each in (files, plain))
    assert (card.data.license, card.data.datasets) == ("mit", ["someone/pairs"])
    assert (plain_card.data.license, plain_card.data.datasets) == (None, None)
    assert "Pairs of bars." in card.text
    assert published(create_pr=True)[1] == "refs/pr/1"


def test_fields_of_an_experiment(path, tmp_path):
    recipe, seeds = load_recipe(path), {"out": tmp_path, "seeds": (1,)}
    plan = plan_experiment(path, recipe, ExperimentConfig(figures={"R": ("retrieval:mean_recall@1",)}), **seeds)
    assert (plan.figures, plan.high, "oracle" in plan.arms) == ({"R": ("retrieval:mean_recall@1",)}, None, False)
    settings = ExperimentConfig(figures={}, arms={"oracle": ("--seed", "3")}, high="oracle")
    plan = plan_experiment(path, recipe, settings, **seeds)
    assert (plan.figures, plan.high, plan.arms["oracle"]) == ({}, "oracle", ("--seed", "3"))
