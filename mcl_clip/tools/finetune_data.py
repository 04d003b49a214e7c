"""The data of `mcl-clip finetune`: pictures with captions become training shards and two retrieval sets.

    RUN/data/train/       shards with an index        RUN/data/validation/  RUN/data/test/   retrieval sets
    RUN/data/DONE.json    what it was made from, and the sizes

Every picture is decoded once, to find those that are missing, damaged, equal or nearly identical; what was found is
kept while this runs, so that the same command continues it.
"""

import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Shaped

from mcl_clip.core.distributed import count_cores, permutation
from mcl_clip.core.errors import UserError, shorten, shorten_list
from mcl_clip.core.files import DONE, STARTED, atomic_path, file_digest, fingerprint, read_json, write_json
from mcl_clip.core.progress import Progress
from mcl_clip.data.decode import BadSampleError
from mcl_clip.data.near_duplicates import group_alike, look_of
from mcl_clip.data.pictures import Columns, Pictures, open_pictures
from mcl_clip.data.writing import Pair, clean_key, write_pairs, write_retrieval_set
from mcl_clip.results.text import format_bytes

TRAIN, VALIDATION, TEST = SPLITS = ("train", "validation", "test")
LEFT_OUT = -1  # in place of the number of a split
STATED = {  # what a column or a data set may call the splits
    **dict.fromkeys(("train", "training", "restval"), TRAIN),
    **dict.fromkeys(("validation", "valid", "val", "dev"), VALIDATION),
    **dict.fromkeys(("test", "testing"), TEST),
}
LARGEST_SET, SMALLEST_SET, SHARE_OF_SET = 1000, 5, 0.1  # pictures of a set for validation or testing
LEAST_TRAIN = 40  # pictures: a twentieth is held out to fit the logit scale, which takes two
LARGEST_ALIKE = 0.1  # share of the pictures: drawings on one background look alike, and are not the same picture
BLOCK = 1000  # pictures whose looks are kept together
FOUND = np.dtype(
    [("hash", "u8"), ("digest", "u8", 2), ("thumbnail", "u1", (8, 8, 3)), ("bytes", "i8"), ("problem", "U24")]
)


@dataclass(frozen=True, kw_only=True)
class DataOptions(Columns):
    """How the pictures are read and split."""

    validation: int = 0
    """Pictures for validation; by default a tenth, from 5 to 1,000, or those that the split column says."""
    test: int = 0
    """Pictures for the test at the end, in the same way."""
    max_missing: float = 0.01
    """Share of the pictures, from 0 to 1, that may be missing or damaged; they are left out."""


class PreparedData(NamedTuple):
    """The folder of the data, the numbers of pictures and captions of each split, and what there is to say."""

    folder: Path
    pictures: Mapping[str, int]
    captions: Mapping[str, int]
    notes: Sequence[str]


def prepare_data(data: str, folder: Path, options: DataOptions, *, seed: int) -> PreparedData:
    """Write the training shards and retrieval sets of `data` to `folder`, or return those that are there.

    Raises:
        UserError: if `folder` was made from other data or with other options, too many pictures are missing, too few
            are left, or the disk is too small.
    """
    settings = _settings(data, options, seed)
    if (folder / DONE).exists():
        done = read_json(folder / DONE)
        _check_unchanged(folder, done.get("settings", {}), settings)
        return PreparedData(folder, done["pictures"], done["captions"], done["notes"])
    source = open_pictures(data, options)
    started = {"settings": settings, "pictures": fingerprint([list(picture) for picture in source.pictures])}
    if (folder / STARTED).exists() and read_json(folder / STARTED) != started:
        shutil.rmtree(folder)  # what an interrupted preparation of something else left
    _check_problems(source, dict.fromkeys(source.missing, "missing"), options)  # before any is read
    found = _look_at_all(source, folder / "looks")
    usable = found["problem"] == ""
    bad = np.flatnonzero(~usable).tolist()
    _check_problems(source, {number: str(found["problem"][number]) for number in bad}, options)
    write_json(folder / STARTED, started)
    captions = [list(picture.captions) for picture in source.pictures]
    stated = _stated_splits(source)
    kept = usable & ~_merge_equal(found, stated, captions, usable)
    alike = _alike(found, kept)
    split_of, notes = assign_splits(stated, alike, kept, validation=options.validation, test=options.test, seed=seed)
    notes = [*_describe(source, usable, kept), *notes]
    _check_disk(folder, int(found["bytes"][split_of >= 0].sum()))
    sizes = {name: np.flatnonzero(split_of == number) for number, name in enumerate(SPLITS)}
    for name in (VALIDATION, TEST, TRAIN):
        if not (folder / name).exists():  # else it was finished before an interruption
            write = write_pairs if name == TRAIN else write_retrieval_set
            write(_pairs(source, captions, sizes[name]), folder / name, total=len(sizes[name]), max_bad_fraction=1)
    done = {
        "settings": settings,
        "pictures": {name: len(numbers) for name, numbers in sizes.items()},
        "captions": {name: sum(len(captions[number]) for number in numbers) for name, numbers in sizes.items()},
        "notes": notes,
    }
    write_json(folder / DONE, done)
    shutil.rmtree(folder / "looks", ignore_errors=True)
    return PreparedData(folder, done["pictures"], done["captions"], notes)


def _settings(data: str, options: DataOptions, seed: int) -> dict[str, Any]:
    path = Path(data)
    root = options.images_root and str(options.images_root.resolve())
    return {
        "DATA": str(path.resolve()) if path.exists() else data,
        **({"content of DATA": file_digest(path)} if path.is_file() else {}),
        **asdict(options),
        "images_root": root,
        "seed": seed,
    }


def _check_unchanged(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    if changed := [name for name in now if before.get(name) != now[name]]:
        name = changed[0]
        option = name if " " in name or name.isupper() else f"--{name.replace('_', '-')}"
        raise UserError(
            f"{folder} was prepared from something else: {option} was {shorten(repr(before.get(name)))} and is now "
            f"{shorten(repr(now[name]))}; use the earlier one, or another --run-dir"
        )


def _look_at_all(source: Pictures, folder: Path) -> Shaped[np.ndarray, "pictures"]:
    """Read and decode every picture, in blocks that are kept in `folder` for the next time; return an array `FOUND`."""

    def describe(number: int) -> tuple[Any, ...]:
        data = source.read(number)
        digest = np.frombuffer(hashlib.blake2b(data, digest_size=16).digest(), np.uint64)
        if not data:
            return 0, digest, 0, 0, "missing"
        try:
            look = look_of(data)
            return look.hash, digest, look.thumbnail, len(data), ""
        except BadSampleError as error:
            return 0, digest, 0, len(data), error.reason[:24]

    total, parts = len(source.pictures), []
    key = fingerprint([picture.name for picture in source.pictures])
    with ThreadPoolExecutor(count_cores()) as pool, Progress(total=total, desc="pictures", unit="picture") as bar:
        for start in range(0, total, BLOCK):
            path, numbers = folder / f"{key}-{start:09d}.npy", range(start, min(start + BLOCK, total))
            if not path.exists():
                block = np.array(list(pool.map(describe, numbers)), FOUND)
                with atomic_path(path) as temporary, temporary.open("wb") as file:
                    np.save(file, block, allow_pickle=False)
            parts.append(np.load(path, allow_pickle=False))
            bar.update(len(numbers))
    return np.concatenate(parts)


def _check_problems(source: Pictures, problems: Mapping[int, str], options: DataOptions) -> None:
    """Raise UserError if too many pictures are missing or damaged; `problems` are by number."""
    total = len(source.pictures)
    if len(problems) > options.max_missing * total:
        counts = _counts(Counter(problems.values()))
        first = [f"{source.pictures[number].name} ({problem})" for number, problem in [*problems.items()][:3]]
        where = f", looked for in {options.images_root}" if options.images_root else ""
        raise UserError(
            f"{len(problems):,} of {total:,} pictures cannot be used ({counts}), more than "
            f"--max-missing {options.max_missing:g} allows; the first are {shorten_list(first)}{where}; correct the "
            f"paths or --images-root, or raise --max-missing to go on without them"
        )


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{number:,} {name}" for name, number in counts.items())


def _stated_splits(source: Pictures) -> list[str]:
    """Return the split that the source states for each picture, empty if none.

    Raises:
        UserError: for a name that is not that of a split.
    """
    names = {picture.split for picture in source.pictures}
    if unknown := sorted(name for name in names if name and name.lower() not in STATED):
        raise UserError(
            f"{shorten_list(unknown)} is not the name of a split; the splits of the data may be called "
            f"{', '.join(STATED)}; rename them, or leave --split-column out to split at random"
        )
    return [STATED.get(picture.split.lower(), "") for picture in source.pictures]


def _merge_equal(
    found: np.ndarray, stated: Sequence[str], captions: list[list[str]], usable: Bool[np.ndarray, "pictures"]
) -> Bool[np.ndarray, "pictures"]:
    """Give the captions of a file that occurred before, in the same split, to the first one; return the others."""
    first_of: dict[tuple[str, bytes], int] = {}
    is_again = np.zeros(len(found), bool)
    for number in np.flatnonzero(usable).tolist():
        first = first_of.setdefault((stated[number], found["digest"][number].tobytes()), number)
        if first != number:
            captions[first] += [caption for caption in captions[number] if caption not in captions[first]]
            is_again[number] = True
    return is_again


def _alike(found: np.ndarray, kept: Bool[np.ndarray, "pictures"]) -> Int[np.ndarray, "pictures"]:
    """Return for each picture the number of the first one that is nearly identical.

    Equal files only, where most pictures look alike, as drawings on one background do.
    """
    numbers = np.flatnonzero(kept)
    alike = np.arange(len(found))
    groups = group_alike(found["hash"][numbers], found["thumbnail"][numbers])
    if np.bincount(groups, minlength=1).max() > max(LARGEST_ALIKE * len(numbers), SMALLEST_SET):
        digests = np.ascontiguousarray(found["digest"][numbers]).view("V16").reshape(-1)
        _, first, inverse = np.unique(digests, return_index=True, return_inverse=True)
        groups = first[inverse.reshape(-1)]
    alike[numbers] = numbers[groups]
    return alike


def assign_splits(
    stated: Sequence[str],
    alike: Int[np.ndarray, "pictures"],
    kept: Bool[np.ndarray, "pictures"],
    *,
    validation: int,
    test: int,
    seed: int,
) -> tuple[Int[np.ndarray, "pictures"], list[str]]:
    """Return the number in `SPLITS` of each picture, -1 for those left out, and what there is to say about it.

    Splits that are `stated` are kept, except that training loses pictures that look like one of the others. What is
    missing is drawn from training at random, pictures that look alike together.

    Raises:
        UserError: if too few pictures are left for training.
    """
    numbers = {"": 0, **{name: number for number, name in enumerate(SPLITS)}}
    split_of = np.where(kept, [numbers[name] for name in stated], LEFT_OUT)
    notes, total = [], int(kept.sum())
    usual = min(LARGEST_SET, max(SMALLEST_SET, int(SHARE_OF_SET * total)))
    sizes = {VALIDATION: validation, TEST: test}
    _, group_of, group_sizes = np.unique(alike, return_inverse=True, return_counts=True)
    for number, name in enumerate(SPLITS[1:], start=1):
        is_stated, wanted = (split_of == number).any(), sizes[name] or usual
        if is_stated and not sizes[name]:
            continue
        pool = split_of == (number if is_stated else 0)
        chosen = _draw(group_of, pool, wanted, seed, name)
        split_of[pool & ~chosen] = LEFT_OUT if is_stated else 0
        split_of[chosen] = number
        if any(stated) and not is_stated:
            notes.append(f"the data states no {name} split: {chosen.sum():,} pictures of training were taken for it")
    is_seen = np.isin(group_of, group_of[split_of > 0]) & (split_of == 0)
    split_of[is_seen] = LEFT_OUT
    if is_seen.any():
        notes.append(f"{is_seen.sum():,} pictures were left out of training as they look like one that is not in it")
    together = int((group_sizes[group_of] > 1)[kept].sum())
    if together:
        notes.append(f"{together:,} pictures are nearly identical to another and were kept on one side")
    counts = [int((split_of == number).sum()) for number in range(len(SPLITS))]
    if counts[0] < LEAST_TRAIN or not all(counts):
        raise UserError(
            f"{total:,} pictures give {counts[0]:,} for training, {counts[1]:,} for validation and {counts[2]:,} for "
            f"the test; {LEAST_TRAIN} are needed for training and one for each of the others: give more pictures, or "
            f"fewer with --validation and --test"
        )
    return split_of, notes


def _draw(
    group_of: Int[np.ndarray, "pictures"], pool: Bool[np.ndarray, "pictures"], wanted: int, *name: int | str
) -> Bool[np.ndarray, "pictures"]:
    """Draw `wanted` pictures of a pool by whole groups in a random order, passing over those that no longer fit."""
    in_pool = np.bincount(group_of[pool], minlength=group_of.max() + 1)
    in_all = np.bincount(group_of, minlength=group_of.max() + 1)
    order = permutation(len(in_pool), *name)
    chosen = np.zeros(len(in_pool), bool)
    left = wanted
    for group in order[(in_pool[order] > 0) & (in_pool[order] == in_all[order])].tolist():
        if in_pool[group] <= left:
            chosen[group] = True
            left -= in_pool[group]
        if not left:
            break
    return np.asarray(pool & chosen[group_of])


def _describe(
    source: Pictures, usable: Bool[np.ndarray, "pictures"], kept: Bool[np.ndarray, "pictures"]
) -> Iterator[str]:
    captions = sum(len(picture.captions) for picture in source.pictures)
    yield f"{len(source.pictures):,} pictures with {captions:,} captions ({source.kind})"
    if source.without_caption:
        yield f"{source.without_caption:,} pictures without a caption were left out"
    if bad := int((~usable).sum()):
        yield f"{bad:,} pictures that are missing or damaged were left out"
    if again := int((usable & ~kept).sum()):
        yield f"{again:,} files that occur again gave their captions to the first"


def _check_disk(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size:
        raise UserError(
            f"the pictures need {format_bytes(size)} in {folder}, and {format_bytes(free)} are free there; choose a "
            f"--run-dir on another disk"
        )


def _pairs(source: Pictures, captions: Sequence[list[str]], numbers: Int[np.ndarray, "some"]) -> Iterator[Pair]:
    used = set[str]()
    for number in numbers.tolist():
        name = source.pictures[number].name
        key = clean_key(os.path.splitext(name)[0])
        key = key if key not in used else clean_key(f"{name} {number}")
        used.add(key)
        yield Pair(key=key, image=source.read(number), captions=captions[number], source=name)
