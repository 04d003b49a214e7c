"""What locked towers, or their locked lower parts, compute of images and captions: once, and then read from disk."""

import fcntl
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from mcl_clip.config import LockConfig, RunConfig
from mcl_clip.core.distributed import on_main
from mcl_clip.core.files import atomic_path, fingerprint
from mcl_clip.data.decode import TrainTransform
from mcl_clip.data.features import ImageOutputs, TextFeatures, image_part_name, text_part_name
from mcl_clip.data.index import ShardIndex
from mcl_clip.data.loader import captioned_batches
from mcl_clip.data.storage import load_tensors
from mcl_clip.eval.task import ImageSource, Task
from mcl_clip.model.clip import TEXTS as TEXT_SAMPLES
from mcl_clip.model.clip import ClipBundle, autocast, encode_texts, to_floats
from mcl_clip.model.fast_paths import in_short_batches
from mcl_clip.model.frozen import FrozenPart, accept_outputs, find_frozen_part
from mcl_clip.model.prepare import lock
from mcl_clip.runs.context import RunContext
from mcl_clip.runs.embedding import embedding_pass
from mcl_clip.stages.embed import write_image_outputs, write_text_features

logger = logging.getLogger(__name__)

TEXTS = "texts"  # folder of features of a locked text tower, in that of the stage, removed at its end
TRUNKS = "trunks"  # folder of outputs of frozen parts, see `trunks_folder`
CAPTION_SAMPLE_ROWS = 64  # rows from which the number of captions per row is estimated
MIN_SIGHTS = 2  # of an input, on average, from which on computing its output once pays
FLOAT_BYTES = 4
DISK_SHARE = 0.9  # of the free space that outputs may take
MAX_SET_BYTES = 2e9  # of outputs of an evaluation set, which are in memory

Stored = tuple[ImageOutputs | None, TextFeatures | None]


def trunks_folder(config: RunConfig) -> Path:
    """Return the folder of outputs of frozen parts: in the cache of several runs, or in the run until its end."""
    return (config.machine.cache_dir or config.run_dir) / TRUNKS


def store_outputs(
    run: RunContext,
    stage: int,
    clip: ClipBundle,
    index: ShardIndex,
    transform: TrainTransform,
    *,
    teacher: ClipBundle | None = None,
) -> Stored:
    """Compute what a stage need not compute in each step, and return where images and texts are read from.

    None is for images or captions that are read and encoded in each step, as those are that a `teacher` makes something
    else of. A collective call.
    """
    settings, device = run.config.stages[stage].train, run.accelerator.device
    if teacher is not None and not share_frozen_parts(run, stage, clip, teacher):
        return None, None
    # Wrong captions are not stored, and the tower whose sentence features are decoded needs tokens.
    needs_tokens = bool(run.config.data.negatives_key and settings.negative_captions) or settings.decode.weight > 0
    texts = None
    if settings.lock.text and not needs_tokens and teacher is None:  # whose projection may be another
        texts = _store_text_features(run, stage, clip, index)
    if not settings.lock.cached_trunks:
        return None, texts
    if not settings.lock.text and not needs_tokens and (found := _open_texts(run, stage, clip, index)):
        part, store = found
        captions = int(len(index) * on_main(partial(_captions_per_row, run, clip, index)))
        missing = 0 if on_main(lambda: _is_whole(store.folder, text_part_name, index)) else captions
        if _is_worth_storing(run, stage, "text", part, missing, embedded=missing):
            if missing:
                encode = _encoder(run, stage, lambda tokens: in_short_batches(part.run, clip.model, tokens, device))
                with _writing(run, store.folder):
                    _write_texts(run, clip, index, encode, store)
            accept_outputs(clip.model.text, part)  # type: ignore[arg-type]
            texts = store
    images = None
    if transform.views and (opened := _open_images(run, stage, clip, index, views=transform.views)):
        part, outputs = opened
        folders = [outputs.folder / name for name in outputs.views]
        views = on_main(lambda: [v for v in range(len(folders)) if not _is_whole(folders[v], image_part_name, index)])
        embedded = len(index) if 0 in views else 0
        if _is_worth_storing(run, stage, "image", part, len(views) * len(index), embedded=embedded):
            for view in views:
                with _writing(run, folders[view]):
                    _write_view(run, stage, clip, index, transform, part, view=view, out=folders[view])
            accept_outputs(clip.model.visual, part)  # type: ignore[arg-type]
            images = outputs
    return images, texts


def share_frozen_parts(run: RunContext, stage: int, clip: ClipBundle, teacher: ClipBundle) -> bool:
    """Let a teacher take stored outputs, too; return whether the frozen parts of both towers are those of `clip`."""
    _lock(teacher, run.config.stages[stage].train.lock)
    for find, tower in ((_image_part, "visual"), (_text_part, "text")):
        own, other = find(run, clip), find(run, teacher)
        if own is None or other is None or own.digest != other.digest:
            return False
        accept_outputs(getattr(teacher.model, tower), other)
    return True


def stored_outputs(run: RunContext, stage: int, clip: ClipBundle) -> Stored:
    """Return what `store_outputs` has left for the embedding pass of a stage, whose model is locked as in training."""
    images, texts, index = None, None, run.index
    if not run.config.stages[stage].train.lock.cached_trunks:
        return None, None
    if opened := _open_images(run, stage, clip, index, views=1):
        part, outputs = opened
        if on_main(lambda: _is_whole(outputs.folder / outputs.views[0], image_part_name, index)):
            accept_outputs(clip.model.visual, part)  # type: ignore[arg-type]
            images = outputs
    if found := _open_texts(run, stage, clip, index):
        part, store = found
        if on_main(lambda: _is_whole(store.folder, text_part_name, index)):
            accept_outputs(clip.model.text, part)  # type: ignore[arg-type]
            texts = store
    return images, texts


def embed_set(
    run: RunContext, stage: int, task: Task, clip: ClipBundle, *, is_locked: bool = False
) -> dict[str, Tensor]:
    """Embed an evaluation set with a model that has the locked parameters of a stage.

    What the locked parts of its towers compute of the set is computed once, as for training rows. `is_locked` is for a
    model in training; another one is locked here. A collective call.
    """
    settings, encoder, data = run.config.stages[stage].train, run.encoder(clip.model, clip), task.data
    if not settings.steps or not settings.lock.cached_trunks or not clip.has_texts:
        return encoder.embed(data)
    if not is_locked:
        _lock(clip, settings.lock)
    model: Any = clip.model
    source, texts = data.source, data.texts
    if (part := _image_part(run, clip)) and (of_images := _set_outputs(run, task, clip, part, "image")) is not None:
        accept_outputs(model.visual, part)
        source = _Outputs(of_images)
        encoder = replace(encoder, image_transform=lambda output: output, num_workers=0)
    if (part := _text_part(run, clip)) and (of_texts := _set_outputs(run, task, clip, part, "text")) is not None:
        accept_outputs(model.text, part)
        texts = [str(number) for number in range(len(of_texts))]
        encoder = replace(encoder, tokenizer=lambda numbers: of_texts[[int(number) for number in numbers]])
    return encoder.embed(_Set(source, texts, data.sha256))


def _lock(clip: ClipBundle, settings: LockConfig) -> None:
    lock(
        clip.model, text=settings.text, text_unlocked_groups=settings.text_unlocked_groups,
        image_unlocked_groups=settings.image_unlocked_groups, patterns=settings.patterns,
    )  # fmt: skip


@dataclass(frozen=True)
class _Outputs:
    """Stored outputs in place of the images of an evaluation set."""

    outputs: Tensor

    def __len__(self) -> int:
        return len(self.outputs)

    def images(self, rows: np.ndarray) -> Iterator[Any]:
        return iter(self.outputs[rows.tolist()])


@dataclass(frozen=True)
class _Set:
    """An evaluation set with stored outputs in place of images or texts."""

    source: ImageSource
    texts: Sequence[str]
    sha256: str


def _set_outputs(run: RunContext, task: Task, clip: ClipBundle, part: FrozenPart, side: str) -> Tensor | None:
    """Return the outputs of a frozen part for an evaluation set, from disk if they are there; None for a large set."""
    data, device = task.data, run.accelerator.device
    inputs: Sequence[Any] = (data.source, data.texts)[side == "text"]  # type: ignore[assignment]
    size = len(inputs) * FLOAT_BYTES * prod(part.shape)
    if size > MAX_SET_BYTES or not on_main(partial(_has_room, run, size)):
        return None
    key = _text_key(clip) if side == "text" else [clip.preprocess_cfg]
    path = trunks_folder(run.config) / f"set-{side}-{fingerprint([part.digest, data.sha256, *key])}.safetensors"
    with _writing(run, path):
        if not on_main(path.exists):
            clip.model.eval()
            parts = SimpleNamespace(
                encode_image=lambda pixels: part.run(pixels).flatten(1),
                encode_text=lambda tokens: in_short_batches(part.run, clip.model, tokens.cpu(), device),
            )
            nothing = _Outputs(torch.zeros(0))
            half = _Set(data.source if side == "image" else nothing, data.texts if side == "text" else [], data.sha256)
            outputs = run.encoder(parts, clip).embed(half)[side]

            def write() -> None:
                with atomic_path(path) as temporary:
                    save_file({"outputs": outputs}, temporary)

            on_main(write)
    return load_tensors(path)["outputs"].view(-1, *part.shape)


def _open_images(
    run: RunContext, stage: int, clip: ClipBundle, index: ShardIndex, *, views: int
) -> tuple[FrozenPart, ImageOutputs] | None:
    """Return the frozen part of the image tower, and the store of its outputs; None without one.

    The evaluation's view is the same in all stages; augmented ones have a folder for each stage.
    """
    if (part := _image_part(run, clip)) is None:
        return None
    train = run.config.stages[stage].train
    shared = [part.digest, *_data_key(run, index), clip.preprocess_cfg, train.precision, run.config.behavior]
    augmented = [run.config.seed, stage, asdict(train.augment)]
    names = [f"images-{fingerprint([*shared, *([view, *augmented] if view else [])])}" for view in range(views)]
    return part, ImageOutputs(trunks_folder(run.config), index, part.shape, names)


def _open_texts(
    run: RunContext, stage: int, clip: ClipBundle, index: ShardIndex
) -> tuple[FrozenPart, TextFeatures] | None:
    """Return the frozen part of a text tower, and the store of its outputs for all captions; None without one."""
    if (part := _text_part(run, clip)) is None:
        return None
    precision = run.config.stages[stage].train.precision
    name = fingerprint([part.digest, *_data_key(run, index), *_text_key(clip), precision, run.config.behavior])
    folder = trunks_folder(run.config) / f"texts-{name}"
    return part, TextFeatures(folder, index, part.shape[0], of_trunk=True)


def _image_part(run: RunContext, clip: ClipBundle) -> FrozenPart | None:
    model: Any = clip.model
    height, width = (size, size) if isinstance(size := clip.preprocess_cfg["size"], int) else size
    return find_frozen_part(model.visual, torch.zeros(2, 3, height, width, device=run.accelerator.device))


def _text_part(run: RunContext, clip: ClipBundle) -> FrozenPart | None:
    tower = getattr(clip.model, "text", None)
    return find_frozen_part(tower, clip.tokenizer(["a"]).to(run.accelerator.device)) if tower is not None else None


def _data_key(run: RunContext, index: ShardIndex) -> list[Any]:
    """Return what tells the data of an index from others; the digest of an index covers no content."""
    data = run.config.data
    shards = [(shard.url, shard.size, shard.stamp) for shard in index.shards] if run.config.machine.cache_dir else []
    return [index.digest, *([shards, data.caption_key, data.max_pixels] if shards else [])]


def _text_key(clip: ClipBundle) -> list[Any]:
    """Return what tells the tokens of texts from those of other tokenizers."""
    return [clip.context_length, clip.tokenizer(list(TEXT_SAMPLES)).tolist()]


@contextmanager
def _writing(run: RunContext, path: Path) -> Iterator[None]:
    """Hold what outputs are written to; other runs that share the cache wait, and find them. A collective call."""
    with ExitStack() as stack:

        def acquire() -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            if run.config.machine.cache_dir is None:  # the run directory has a lock, and may lie where files have none
                return
            file = stack.enter_context((path.parent / f".{path.name}.lock").open("a"))
            fcntl.flock(file, fcntl.LOCK_EX)

        on_main(acquire)
        yield


def _is_whole(folder: Path, name_of: Callable[[int], str], index: ShardIndex) -> bool:
    return all((folder / name_of(number)).exists() for number, shard in enumerate(index.shards) if shard.rows)


def _is_worth_storing(run: RunContext, stage: int, side: str, part: FrozenPart, inputs: int, *, embedded: int) -> bool:
    """Return whether outputs of so many inputs pay, which 0 always do, and fit on the disk. A collective call.

    After its steps the stage sees so many of them once more, when all rows are `embedded`.
    """
    settings, folder = run.config.stages[stage].train, trunks_folder(run.config)
    if settings.steps * settings.global_batch_size + embedded < MIN_SIGHTS * inputs:
        return False
    size = inputs * FLOAT_BYTES * prod(part.shape)
    has_room = on_main(partial(_has_room, run, size))
    if has_room:
        text = f"are read from {folder} ({size / 1e6:.0f} MB to compute)"
    else:
        text = f"would take {size / 1e9:.1f} GB, more than {folder} has room for; they are computed in each step"
    logger.info("stage %d: outputs of the locked part of the %s tower %s", stage, side, text)
    return has_room


def _has_room(run: RunContext, size: int) -> bool:
    """Return whether the disk of the outputs has room for so many bytes."""
    folder = trunks_folder(run.config)
    existing = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    return size <= DISK_SHARE * shutil.disk_usage(existing).free


def _encoder(run: RunContext, stage: int, encode: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return a function that encodes inputs as a step does: on the device, in the precision of the stage."""
    device, precision = run.accelerator.device, run.config.stages[stage].train.precision

    def encoder(inputs: Tensor) -> Tensor:
        with autocast(precision, device):
            return encode(inputs.to(device))

    return encoder


def _write_view(
    run: RunContext, stage: int, clip: ClipBundle, index: ShardIndex, transform: TrainTransform, part: FrozenPart,
    *, view: int, out: Path,
) -> None:  # fmt: skip
    clip.model.eval()
    encode = _encoder(run, stage, lambda pixels: part.run(to_floats(pixels, clip.preprocess_cfg)))
    options = {"tokenizer": None, "transform": transform, "view": view, "name": (run.config.seed, stage)}
    write = partial(write_image_outputs, encode, shape=part.shape)
    embedding_pass(run, index, write, out=out, options=run.batch_options(clip) | options)


def _write_texts(
    run: RunContext, clip: ClipBundle, index: ShardIndex, encode: Callable[[Tensor], Tensor], store: TextFeatures
) -> None:
    """Write what `encode` makes of the tokens of all captions. A collective call."""
    clip.model.eval()
    # Tokens keep their padding and stay on the CPU: the features are stored with hashes of the whole token sequence.
    options = run.batch_options(clip) | {"transform": None, "short_texts": False, "device": torch.device("cpu")}
    write = partial(write_text_features, encode, dim=store.dim)
    embedding_pass(run, index, write, out=store.folder, options=options)


def _store_text_features(run: RunContext, stage: int, clip: ClipBundle, index: ShardIndex) -> TextFeatures | None:
    """Embed all captions once if the text tower is locked and that takes less work than embedding them in each step."""
    settings, out = run.config.stages[stage].train, run.folder(stage, "train") / TEXTS
    named_modules = clip.model.named_modules()
    has_dropout = any(isinstance(m, nn.Dropout) and m.p for name, m in named_modules if "visual" not in name)
    runs_without_texts = isinstance(clip.model, open_clip.CLIP | open_clip.CustomTextCLIP)  # CoCa needs tokens
    if not settings.lock.cached_texts or has_dropout or not runs_without_texts:
        return None
    # Each row of a batch embeds one caption. Caching pays when the stage sees each caption about twice.
    seen, captions_per_row = settings.steps * settings.global_batch_size, partial(_captions_per_row, run, clip, index)
    if seen < MIN_SIGHTS * len(index) * on_main(captions_per_row):
        return None
    device = run.accelerator.device
    store = TextFeatures(out, index, clip.model_cfg["embed_dim"])
    encode = _encoder(run, stage, lambda tokens: F.normalize(encode_texts(clip.model, tokens.cpu(), device), dim=1))
    _write_texts(run, clip, index, encode, store)
    logger.info("stage %d: the text tower is locked; caption features are read from %s", stage, out)
    return store


def _captions_per_row(run: RunContext, clip: ClipBundle, index: ShardIndex) -> float:
    """Estimate the number of captions per row, at least 1, from a sample."""
    rows = np.unique(np.linspace(0, len(index) - 1, CAPTION_SAMPLE_ROWS).astype(np.int64))
    options = run.batch_options(clip) | {"transform": None, "tokenizer": None, "short_texts": False, "num_workers": 0}
    (sample,) = captioned_batches(run.reader(index), [rows], **options | {"device": torch.device("cpu")})
    return max(1.0, len(sample.caption_of) / max(1, len(sample.rows)))
