"""The doctor's checks of what a run reads: shards, samples, evaluation sets, pretrained weights and the tokenizer."""

import math
import os
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import open_clip
import timm
from huggingface_hub.errors import HFValidationError

from mcl_clip.config import EvalConfig, RunConfig, TowerConfig
from mcl_clip.core.errors import UserError, shorten
from mcl_clip.data.decode import train_transform
from mcl_clip.data.index import INDEX_NAME, RULE, ShardIndex
from mcl_clip.data.loader import captioned_batches
from mcl_clip.data.reader import Reader
from mcl_clip.data.samples import SampleRule
from mcl_clip.data.shards import Shard, expand_shards, is_remote, redacted
from mcl_clip.data.storage import RetryPolicy, stat
from mcl_clip.eval.task import Task
from mcl_clip.model.clip import (
    HUB,
    LOCAL,
    check_preprocess,
    check_vocabulary,
    create_clip,
    with_image_size,
)
from mcl_clip.model.from_transformers import is_transformers_folder, read_clip_config
from mcl_clip.model.open_clip_io import (
    OPEN_CLIP_CONFIG_NAME,
    WEIGHT_SUFFIXES,
    check_model_cfg,
    make_tokenizer,
    read_object,
)
from mcl_clip.model.pair import PUBLISHED, RANDOM, load_trunk, pair_model_cfg, split_image
from mcl_clip.model.tower import image_model_cfg
from mcl_clip.model.weights import load_weights
from mcl_clip.results.text import format_bytes, format_duration
from mcl_clip.runs.context import check_pairs, open_tasks, sample_rule
from mcl_clip.tools.doctor_machine import Check, Finding, attempt
from mcl_clip.tools.estimates import build_on_meta

SHARDS_WITHOUT_INDEX = 8
REMOTE_SHARDS_TRIED = 16
GIVE_WEIGHTS = "give the file as --tower.pretrained or the folder as --tower.architecture local-dir:FOLDER"
TEXT_WEIGHTS = (
    "model.safetensors",
    "pytorch_model.bin",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
)
REMOTE = RetryPolicy(retries=1, timeout_s=10.0)
SAMPLES_READ = 256
BATCH_SIZE = 32
MAX_READING_S = 20.0
HUB_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")  # the files that open_clip tries, in order


@dataclass(frozen=True, kw_only=True)
class RowCounts:
    """Row counts of the training shards."""

    index: ShardIndex  # of the shards that were inspected
    per_list: tuple[int, ...]  # extrapolated unless `is_whole`
    is_whole: bool  # whether `index` covers all shards

    @property
    def total(self) -> int:
        """Rows of all lists."""
        return sum(self.per_list)

    def per_epoch(self, weights: Sequence[float], held_out: int) -> int:
        """Count the rows of an epoch: each list times its weight, without held-out rows."""
        weighted = zip(self.per_list, weights or [1.0] * len(self.per_list), strict=True)
        return max(1, sum(round(rows * weight) for rows, weight in weighted) - min(held_out, self.total // 20))


def inspect_shards(config: RunConfig) -> Check[RowCounts]:
    """Count rows from stored indexes and, for shards without one, from the headers of the first few."""
    specs = config.data.train
    if not specs:
        yield Finding("FAIL", "shards", "--data.train names no shards; give paths, URLs or folders with .tar files")
        return None
    if (lists := (yield from attempt("shards", lambda: [expand_shards(spec) for spec in specs]))) is None:
        return None
    urls = [url for part in lists for url in part]
    if failures := _check_remote([url for url in urls if is_remote(url)]):
        yield from failures
        return None
    stored = config.run_dir / "index" / INDEX_NAME
    rule = sample_rule(config.data, config.behavior, images_only=config.tower.images_only)
    if (indexed := (yield from attempt("shards", lambda: _load_or_build_index(urls, stored, rule)))) is None:
        return None
    index, scanned = indexed
    known = {shard.url: shard.rows for shard in index.shards}
    mean = len(index) / max(1, len(known))
    per_list = tuple(round(sum(known.get(url, mean) for url in part)) for part in lists)
    rows = RowCounts(index=index, per_list=per_list, is_whole=len(known) == len(urls))
    if rows.is_whole:
        source = f"{scanned} of them indexed now, in memory" if scanned else "from a stored index"
        yield Finding(
            "ok", "shards", f"{len(urls):,} shards, {rows.total:,} rows ({source}); captions: {index.text_counts()}"
        )
    else:
        text = (
            f"{len(urls):,} shards, about {rows.total:,} rows: {len(index.shards):,} shards were inspected, the others "
            f"have no index; run `mcl-clip index` to check them before the run does"
        )
        yield Finding("warning", "shards", text)
    if failures := list(attempt("shards", partial(check_pairs, config, index))):
        yield from failures
    elif index.skipped_by_reason():
        yield Finding("warning", "shards", f"samples that are not pairs are left out: {index.describe_skipped()}")
    return rows


def _check_remote(urls: Sequence[str]) -> list[Finding]:
    """Request the headers of evenly spaced remote shards; return up to three failures."""
    if not urls:
        return []
    tried = [urls[i] for i in np.unique(np.linspace(0, len(urls) - 1, REMOTE_SHARDS_TRIED).astype(int))]
    with ThreadPoolExecutor(max_workers=len(tried)) as threads:
        answers = threads.map(lambda url: list(attempt("shards", lambda: stat(url, REMOTE))), tried)
        return [finding for answer in answers for finding in answer][:3]


def _load_or_build_index(urls: Sequence[str], run_index: Path, rule: SampleRule) -> tuple[ShardIndex, int]:
    """Return an index of all shards with a stored index and of the first others, and the number of the latter."""
    if run_index.exists():
        index = ShardIndex.load(run_index)
        is_same = [shard.url for shard in index.shards] == list(urls) and index.rule == rule
        if is_same and all(map(_is_unchanged, index.shards)):
            return index, 0
    folders = dict.fromkeys(os.path.dirname(url) for url in urls if not is_remote(url))
    paths = [path for folder in folders if (path := Path(folder, INDEX_NAME)).exists()]
    indexes = [index for index in map(ShardIndex.load, paths) if index.rule == rule]
    stored = {shard.url for index in indexes for shard in index.shards if _is_unchanged(shard)}
    scanned = [url for url in urls if url not in stored][:SHARDS_WITHOUT_INDEX]
    chosen = [url for url in urls if url in stored or url in scanned]
    return ShardIndex.build(chosen, rule=rule, retry=REMOTE), len(scanned)


def _is_unchanged(shard: Shard) -> bool:
    if is_remote(shard.url):
        return True  # a request for each takes too long, and _check_remote has tried some
    try:
        return stat(shard.url, RetryPolicy(retries=0)) == (shard.size, shard.stamp)
    except UserError:
        return False


def check_reading(
    config: RunConfig, index: ShardIndex, model_cfg: Mapping[str, Any], *, loaders: int
) -> Iterator[Finding]:
    """Read and decode evenly spaced samples as the first stage does; report bad ones and the loading throughput.

    `loaders` counts the loader processes of the run that have a processor core of their own.
    """
    if config.machine.remote == "stage" and any(is_remote(shard.url) for shard in index.shards):
        yield Finding("ok", "reading", "not tried: remote shards are downloaded whole when the run needs them")
        return
    if (read := (yield from attempt("reading", partial(_read_samples, config, index, model_cfg)))) is None:
        return
    count, seconds, bad = read
    rate = count / seconds
    text = f"{count} samples at {rate:.0f}/s by one process"
    if trained := [stage.train for stage in config.stages if stage.train.steps]:
        batch_s = max(train.global_batch_size for train in trained) / (rate * loaders)
        total_s = sum(train.steps * train.global_batch_size for train in trained) / (rate * loaders)
        text += f"; {loaders} loaders deliver a batch in {batch_s:.2g} s, so faster steps wait for data and training "
        text += f"takes at least {format_duration(total_s)}"
    yield Finding("ok", "reading", text)
    if bad:
        yield judge_bad_samples(bad, count, config.data.max_bad_fraction, is_all=count == len(index))


def _read_samples(
    config: RunConfig, index: ShardIndex, model_cfg: Mapping[str, Any]
) -> tuple[int, float, Counter[str]]:
    """Return the number of samples that were read, the seconds this took, and bad samples by reason."""
    preprocess = {"size": model_cfg["vision_cfg"].get("image_size", 224), **config.tower.preprocess}
    is_untried = "text_cfg" not in model_cfg or bool(model_cfg["text_cfg"].get("hf_tokenizer_name"))
    rows = np.unique(np.linspace(0, len(index) - 1, SAMPLES_READ).astype(np.int64))
    batches = [rows[start : start + BATCH_SIZE] for start in range(0, len(rows), BATCH_SIZE)]
    decoded = captioned_batches(
        Reader(index, captions_by_line=config.behavior == "0.6"),
        batches,
        transform=train_transform(
            preprocess, legacy=config.behavior == "0.6", **asdict(config.stages[0].train.augment)
        ),
        # A tokenizer on the Hub is not downloaded; decoding images takes most of the time.
        tokenizer=None if is_untried else make_tokenizer(dict(model_cfg)),
        max_pixels=config.data.max_pixels,
        json_key=config.data.caption_key or RULE.caption_key,
    )
    bad: Counter[str] = Counter()
    count, started = 0, time.perf_counter()
    for batch, requested in zip(decoded, batches, strict=True):
        count += len(requested)
        bad.update(sample.reason for sample in batch.bad)
        if time.perf_counter() - started > MAX_READING_S:
            break
    return count, max(time.perf_counter() - started, 1e-6), bad


def judge_bad_samples(bad: Counter[str], count: int, limit: float, *, is_all: bool) -> Finding:
    """Compare the share of bad samples with the limit above which a run stops.

    It is a `FAIL` where the share exceeds the limit by two standard errors, or at all if every sample was read.
    """
    share = bad.total() / count
    margin = 0.0 if is_all else 2 * math.sqrt(share * (1 - share) / count)
    reasons = ", ".join(f"{number} {reason}" for reason, number in bad.most_common())
    text = f"{bad.total()} of {count} samples cannot be decoded: {reasons}"
    if share - margin > limit:
        way_out = f"the run stops above --data.max-bad-fraction {limit:g}; fix the shards, or raise it"
        return Finding("FAIL", "reading", f"{text}; {way_out}")
    return Finding("warning", "reading", f"{text}; they are counted and skipped, up to a share of {limit:g}")


def open_sets(config: RunConfig) -> Check[dict[str, Task]]:
    """Open all evaluation sets, or name each that cannot be opened."""
    try:
        tasks = open_tasks(config)
    except (UserError, OSError):  # because of the first set that fails; the others may fail as well
        kinds = ("retrieval", "classification", "sets")
        options: list[dict[str, Any]] = [{kind: (value,)} for kind in kinds for value in getattr(config.eval, kind)]
        alone = [replace(config, eval=EvalConfig(**option)) for option in options]
        failures = [each for single in alone for each in attempt("sets", partial(open_tasks, single))]
        yield from failures or attempt("sets", partial(open_tasks, config))  # each can be opened, but not together
        return None
    if tasks:
        yield Finding("ok", "sets", f"can be opened: {', '.join(tasks)}")
    else:
        text = "no evaluation set: the quality of the stages is not measured; give --eval.sets"
        yield Finding("warning", "sets", text)
    return tasks


def find_model_cfg(tower: TowerConfig) -> dict[str, Any]:
    """Return the model config of open_clip; empty for a model on the Hub whose config is not cached.

    Raises:
        UserError: if there is no such model, or its config is refused.
    """
    cfg: Any = tower.model
    if tower.architecture.startswith((HUB, LOCAL)):
        cfg = _read_model_cfg(tower.architecture)
        if not cfg:
            return {}
    elif tower.architecture:
        name = tower.architecture.replace("/", "-")
        if name not in open_clip.list_models():
            create_clip(architecture=name)  # raises with similar names
        cfg = open_clip.get_model_config(name)
    elif tower.images_only:
        check_preprocess(tower.preprocess)
        return image_model_cfg(tower)
    elif tower.image:
        cfg, _ = pair_model_cfg(tower.image, tower.text, embed_dim=tower.dim, heads=tower.heads)
    check_preprocess(tower.preprocess)
    if tower.context_length and isinstance(cfg.get("text_cfg"), Mapping):
        cfg = {**cfg, "text_cfg": {**cfg["text_cfg"], "context_length": tower.context_length}}
    sides, vision_cfg = list(tower.image_size), cfg.get("vision_cfg")
    size = (sides[0] if len(sides) == 1 else sides) or tower.preprocess.get("size")
    if tower.model and isinstance(vision_cfg, dict):
        size = size or vision_cfg.get("image_size")
    return with_image_size(cfg, size) if size else dict(cfg)


def _read_model_cfg(architecture: str) -> Any:
    """Return the config of a model in a folder or on the Hub; empty if it is not on this machine."""
    name = architecture.split(":", 1)[1]
    path = Path(name, OPEN_CLIP_CONFIG_NAME)
    if architecture.startswith(HUB):
        cached = huggingface_hub.try_to_load_from_cache(name, OPEN_CLIP_CONFIG_NAME)
        if not isinstance(cached, str):
            return {}
        path = Path(cached)
    elif is_transformers_folder(Path(name)):
        return read_clip_config(Path(name))[0]
    elif not path.is_file():
        raise UserError(f"{name} is not an open_clip folder: it has no {OPEN_CLIP_CONFIG_NAME}")
    try:
        cfg = read_object(path).get("model_cfg")
        check_model_cfg(cfg)  # refuses anything that is not a dictionary, too
    except ValueError as error:
        raise UserError(f"{architecture} is not loaded: {error}; correct it, or use another model") from error
    return cfg


def check_weights(tower: TowerConfig, model_cfg: Mapping[str, Any]) -> Iterator[Finding]:
    """Check whether pretrained weights are on this machine and fit, or can be downloaded; nothing is downloaded."""
    architecture, pretrained = tower.architecture, tower.pretrained
    if tower.context_length or tower.image_size:  # the weights have the positions of their own length and size
        model_cfg = find_model_cfg(replace(tower, context_length=0, image_size=()))
    if architecture.startswith(HUB):
        yield _check_hub(architecture.removeprefix(HUB), HUB_WEIGHTS, f"the weights of {architecture}")
    elif architecture.startswith(LOCAL):
        folder = Path(architecture.removeprefix(LOCAL))
        if not folder.is_dir() or not any(path.suffix in WEIGHT_SUFFIXES for path in folder.iterdir()):
            yield Finding("FAIL", "weights", f"{folder} has no weights; save the model again")
        else:
            yield Finding("ok", "weights", f"in {folder}")
    elif tower.image:
        yield from _check_trunk(tower.image, model_cfg)
    elif Path(pretrained).is_file():
        yield from _try_weights(model_cfg, Path(pretrained), lambda model: load_weights(model, Path(pretrained)))
    elif pretrained:
        cfg = open_clip.get_pretrained_cfg(architecture.replace("/", "-"), pretrained)
        what = f"the weights {pretrained} of {architecture}"
        if not cfg:
            create = partial(create_clip, architecture=architecture, model_cfg=tower.model or None)
            yield from attempt("weights", partial(create, pretrained=pretrained))  # fails with the list of known tags
        elif cfg.get("hf_hub"):
            repository, name = os.path.split(cfg["hf_hub"])
            safe = HUB_WEIGHTS[0] if name in ("", HUB_WEIGHTS[1]) else f"{Path(name).stem}.safetensors"
            yield _check_hub(repository, (safe, name or HUB_WEIGHTS[1]), what)
        else:
            cached, url = Path("~/.cache/clip").expanduser() / os.path.basename(cfg["url"]), cfg["url"]
            has_it = cached.is_file()
            yield Finding("ok", "weights", str(cached)) if has_it else _check_download([url], what, redacted(url))


def _check_trunk(image: str, model_cfg: Mapping[str, Any]) -> Iterator[Finding]:
    name, weights = split_image(image)
    if weights == RANDOM:
        return
    if weights != PUBLISHED:
        yield from _try_weights(model_cfg, Path(weights), lambda model: load_trunk(model.visual, name, weights))
    elif (cfg := timm.get_pretrained_cfg(name)) and (repository := cfg.hf_hub_id):
        yield _check_hub(repository, HUB_WEIGHTS, f"the weights of {name}", f"give a file as timm:{name}=FILE")


def _try_weights(model_cfg: Mapping[str, Any], path: Path, load: Callable[[Any], None]) -> Iterator[Finding]:
    def load_on_meta() -> None:
        with warnings.catch_warnings(action="ignore"):  # that copies to the meta device do nothing
            load(build_on_meta(model_cfg))

    failures = list(attempt("weights", load_on_meta))
    yield from failures or [Finding("ok", "weights", f"{path}, {format_bytes(path.stat().st_size)}")]


def check_text_tower(text_cfg: Mapping[str, Any], *, loads_weights: bool) -> Iterator[Finding]:
    """Check whether tokenizer and weights of a Hugging Face text tower are in a folder, cached or to be downloaded.

    `loads_weights` is whether the run starts without other weights, so that those of `hf_model_name` are loaded.
    """
    if name := text_cfg.get("hf_tokenizer_name"):
        files, way_out = (
            ("tokenizer.json", "tokenizer_config.json"),
            "give a folder with its files as hf_tokenizer_name",
        )
        yield _check_hub(name, files, f"the tokenizer {name}", way_out)
    name = text_cfg.get("hf_model_name")
    if name and loads_weights and text_cfg.get("hf_model_pretrained", True):
        way_out = (
            "give a folder with its files as hf_model_name, or set hf_model_pretrained to false for random weights"
        )
        yield _check_hub(name, TEXT_WEIGHTS, f"the weights of the text tower {name}", way_out)


def check_tokenizer(model_cfg: Mapping[str, Any]) -> None:
    """Raise UserError if the text tower lacks tokens of its tokenizer; one that may be on the Hub is not tried."""
    if "text_cfg" not in model_cfg:
        return
    name = model_cfg["text_cfg"].get("hf_tokenizer_name")
    if not name or Path(name).is_dir():
        check_vocabulary(build_on_meta(model_cfg), make_tokenizer(model_cfg))


def _check_hub(repository: str, names: Sequence[str], what: str, way_out: str = GIVE_WEIGHTS) -> Finding:
    folder = Path(repository)
    if folder.is_dir():
        if any((folder / name).is_file() for name in names):
            return Finding("ok", "weights", f"{what}: in this folder")
        return Finding("FAIL", "weights", f"{what}: this folder has none of {', '.join(names)}; download it again")
    try:
        if any(isinstance(huggingface_hub.try_to_load_from_cache(repository, name), str) for name in names):
            return Finding("ok", "weights", f"{what}: in the cache of the Hub")
        urls = [huggingface_hub.hf_hub_url(repository, name) for name in names]
    except HFValidationError:
        return Finding("FAIL", "weights", f"{what}: this is neither a folder nor a name on the Hub; correct it")
    return _check_download(urls, what, "the Hub", way_out)


def _check_download(urls: Sequence[str], what: str, source: str, way_out: str = GIVE_WEIGHTS) -> Finding:
    """Request the headers of the first of some URLs that answers."""
    reason = ""
    for url in urls:
        try:
            token = None if source == "the Hub" else False  # nobody else gets it
            size = huggingface_hub.get_hf_file_metadata(url, token=token, timeout=REMOTE.timeout_s).size or 0
            return Finding("ok", "weights", f"{what}: to be downloaded from {source}, {format_bytes(size)}")
        except Exception as error:  # the type depends on the HTTP library of the installed version
            reason = f"{type(error).__name__}: {shorten(error, 160)}"
    text = (
        f"{what}: not on this machine, and cannot be downloaded from {source} ({reason}); download it where there is a "
        f"network, and {way_out}"
    )
    return Finding("FAIL", "weights", text)
