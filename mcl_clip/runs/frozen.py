"""What locked towers, or their locked lower parts, compute of images and captions: once, and then read from disk."""

import logging
import shutil
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mcl_clip.core.distributed import on_main
from mcl_clip.core.files import fingerprint
from mcl_clip.data.decode import TrainTransform
from mcl_clip.data.features import ImageOutputs, TextFeatures, image_part_name, text_part_name
from mcl_clip.data.index import ShardIndex
from mcl_clip.data.loader import captioned_batches
from mcl_clip.model.clip import ClipBundle, autocast, encode_texts, to_floats
from mcl_clip.model.frozen import FrozenPart, accept_outputs, find_frozen_part
from mcl_clip.runs.context import RunContext
from mcl_clip.runs.embedding import embedding_pass
from mcl_clip.stages.embed import write_image_outputs, write_text_features

logger = logging.getLogger(__name__)

TEXTS = "texts"  # folder of features of a locked text tower, in that of the stage, removed at its end
TRUNKS = "trunks"  # folder of outputs of frozen parts in the run directory, removed at the end of the run
CAPTION_SAMPLE_ROWS = 64  # rows from which the number of captions per row is estimated
MIN_SIGHTS = 2  # how often a stage sees an input on average, from which on computing its output once pays
FLOAT_BYTES = 4
DISK_SHARE = 0.9  # of the free space that outputs may take

Stored = tuple[ImageOutputs | None, TextFeatures | None]


def store_outputs(
    run: RunContext, stage: int, clip: ClipBundle, index: ShardIndex, transform: TrainTransform
) -> Stored:
    """Compute what a stage need not compute in each step, and return where images and texts are read from.

    None is for images or captions that are read and encoded in each step. A collective call.
    """
    settings = run.config.stages[stage].train
    if settings.distill.weight:  # the teacher needs images and tokens
        return None, None
    needs_tokens = bool(run.config.data.negatives_key and settings.negative_captions)  # wrong captions are not stored
    texts = _store_text_features(run, stage, clip, index) if settings.lock.text and not needs_tokens else None
    if not settings.lock.cached_trunks:
        return None, texts
    if not settings.lock.text and not needs_tokens and (found := _open_texts(run, stage, clip, index)):
        part, store = found
        captions = int(len(index) * on_main(partial(_captions_per_row, run, clip, index)))
        missing = 0 if on_main(lambda: _is_whole(store.folder, text_part_name, index)) else captions
        if _is_worth_storing(run, stage, "text", part, missing):
            if missing:
                _write_texts(run, clip, index, _encoder(run, stage, part.run), store)
            accept_outputs(clip.model.text, part)  # type: ignore[arg-type]
            texts = store
    images = None
    if transform.views and (opened := _open_images(run, stage, clip, index, views=transform.views)):
        part, outputs = opened
        folders = [outputs.folder / name for name in outputs.views]
        views = on_main(lambda: [v for v in range(len(folders)) if not _is_whole(folders[v], image_part_name, index)])
        if _is_worth_storing(run, stage, "image", part, len(views) * len(index)):
            for view in views:
                _write_view(run, stage, clip, index, transform, part, view=view, out=folders[view])
            accept_outputs(clip.model.visual, part)  # type: ignore[arg-type]
            images = outputs
    return images, texts


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


def _open_images(
    run: RunContext, stage: int, clip: ClipBundle, index: ShardIndex, *, views: int
) -> tuple[FrozenPart, ImageOutputs] | None:
    """Return the frozen part of the image tower, and the store of its outputs; None without one.

    The evaluation's view is the same in all stages; augmented ones have a folder for each stage.
    """
    model: Any = clip.model
    height, width = (size, size) if isinstance(size := clip.preprocess_cfg["size"], int) else size
    part = find_frozen_part(model.visual, torch.zeros(2, 3, height, width, device=run.accelerator.device))
    if part is None:
        return None
    train = run.config.stages[stage].train
    shared = [part.digest, index.digest, clip.preprocess_cfg, train.precision, run.config.behavior]
    augmented = [run.config.seed, stage, asdict(train.augment)]
    names = [f"images-{fingerprint([*shared, *([view, *augmented] if view else [])])}" for view in range(views)]
    return part, ImageOutputs(run.config.run_dir / TRUNKS, index, part.shape, names)


def _open_texts(
    run: RunContext, stage: int, clip: ClipBundle, index: ShardIndex
) -> tuple[FrozenPart, TextFeatures] | None:
    """Return the frozen part of a text tower, and the store of its outputs for all captions; None without one."""
    tower = getattr(clip.model, "text", None)
    part = find_frozen_part(tower, clip.tokenizer(["a"]).to(run.accelerator.device)) if tower is not None else None
    if part is None:
        return None
    # The tokenizer is the same in all stages of a run.
    precision = run.config.stages[stage].train.precision
    name = fingerprint([part.digest, index.digest, clip.context_length, precision, run.config.behavior])
    folder = run.config.run_dir / TRUNKS / f"texts-{name}"
    return part, TextFeatures(folder, index, part.shape[0], of_trunk=True)


def _is_whole(folder: Path, name_of: Callable[[int], str], index: ShardIndex) -> bool:
    return all((folder / name_of(number)).exists() for number, shard in enumerate(index.shards) if shard.rows)


def _is_worth_storing(run: RunContext, stage: int, side: str, part: FrozenPart, inputs: int) -> bool:
    """Return whether outputs of so many inputs pay, which 0 always do, and fit on the disk. A collective call."""
    settings, run_dir = run.config.stages[stage].train, run.config.run_dir
    if settings.steps * settings.global_batch_size < MIN_SIGHTS * inputs:
        return False
    size = inputs * FLOAT_BYTES * prod(part.shape)
    free = on_main(lambda: shutil.disk_usage(run_dir).free)
    has_room = size <= DISK_SHARE * free
    if has_room:
        text = f"are read from {run_dir / TRUNKS} ({size / 1e6:.0f} MB to compute)"
    else:
        text = f"would take {size / 1e9:.1f} GB, more than {run_dir} has room for; they are computed in each step"
    logger.info("stage %d: outputs of the locked part of the %s tower %s", stage, side, text)
    return has_room


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
