"""Broken and hostile input, drawn at random: what is bad is refused or counted, nothing is lost, nothing runs.

    python -m tests.faults.fuzz --cases 10000 --seed 0
    python -m tests.faults.fuzz --area shards --cases 500
    python -m tests.faults.fuzz --seed 0 --only shards:17

Each case takes sound files, changes some of them, and uses them as a run would. Good outcomes: `accepted` (nothing was
wrong, or the rest could be used), `bad` (samples were counted as bad, with a reason) and `refused` (a `UserError`, or
what the operating system says of a missing file: one sentence for the user in both cases). Findings:

    crash     any other exception, or a process that died
    unsound   one case in 25 changes nothing, and was not accepted
    hang      over 10 seconds at work, or waiting
    executed  a payload ran: pickles and shell commands are planted wherever a loader might open or run them
    lost      a sample that was written is neither delivered intact nor counted, or a changed file went unnoticed

Cases run in forked processes with a limit on memory, so that none can take the fuzzer down. Prints one JSON line for
each area; the files of a finding are kept. Exit code 1 if there is any.
"""

import argparse
import bz2
import gzip
import io
import json
import logging
import lzma
import os
import pickle
import random
import resource
import select
import shutil
import signal
import socket
import struct
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from safetensors.torch import load as parse_safetensors
from safetensors.torch import save as make_safetensors
from tqdm import tqdm

from mcl_clip.config import TrainConfig
from mcl_clip.core.errors import UserError
from mcl_clip.core.files import DONE, read_json, read_jsonl, read_run_config
from mcl_clip.data.decode import (
    FORMATS,
    BadSampleError,
    TrainTransform,
    decode_captions,
    decode_image,
    evaluation_transform,
)
from mcl_clip.data.features import EmbeddingTable
from mcl_clip.data.index import ShardIndex
from mcl_clip.data.reader import Reader
from mcl_clip.data.shards import expand_shards
from mcl_clip.data.storage import RetryPolicy, load_numbers, load_tensors
from mcl_clip.model.clip import create_clip, load_clip, save_clip
from mcl_clip.model.multistage import MultistageCLIP
from mcl_clip.model.resolve import find_models
from mcl_clip.results.compare import compare_models
from mcl_clip.results.text import results_table
from mcl_clip.runs.phase import Phase, lock
from mcl_clip.stages.embed import read_losses
from mcl_clip.stages.pseudo_labels import group_labels, read_labels
from mcl_clip.train.checkpoint import TrainState, load_newest, save_checkpoint
from mcl_clip.train.metrics import BadSamples, StepLog
from mcl_clip.train.optim import create_optimizer

HANG_S = 10.0
POLL_S = 0.2
MEMORY_BYTES = 4 << 30  # over what the process has at the start
CASES_A_PROCESS = 200
FINDINGS = ("crash", "hang", "executed", "lost", "unsound")
SOUND_CASES = 25  # one case in so many changes nothing
OUTCOMES = ("accepted", "bad", "refused")
SIZE_PX = 32
QUICK = RetryPolicy(retries=0, backoff_s=0.0, timeout_s=1.0)
MODEL = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": SIZE_PX, "layers": 1, "width": 16, "head_width": 8, "patch_size": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1},
}
ROWS = 6


class LostError(Exception):
    """Something that was written is neither there nor counted."""


@dataclass
class Case:
    """One case: its own random numbers, a folder of its own, and a file whose existence means that a payload ran."""

    number: int
    random: random.Random
    folder: Path
    canary: Path

    def write(self, name: str, data: bytes) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path

    def pickled(self) -> bytes:
        """A pickle that makes the canary file when it is loaded."""
        return pickle.dumps(_Payload(str(self.canary)), protocol=self.random.choice((0, 2, 4)))

    def hostile_file(self) -> bytes:
        """A file that some loader, though not the right one, would unpickle."""
        kind = self.random.randrange(4)
        if kind == 0:
            return self.pickled()
        if kind == 1:
            return object_array(self.canary)
        buffer = io.BytesIO()
        if kind == 2:
            torch.save({"state_dict": _Payload(str(self.canary))}, buffer)
        else:
            np.savez(buffer, a=np.array([_Payload(str(self.canary))], object))
        return buffer.getvalue()

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    @property
    def is_sound(self) -> bool:
        """Whether this case changes nothing and must be accepted."""
        return self.number % SOUND_CASES == 0


class _Payload:
    def __init__(self, canary: str) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.canary, "w")


def object_array(canary: Path) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([_Payload(str(canary))] * ROWS, object), allow_pickle=True)
    return buffer.getvalue()


# --- changes that fit any file ---------------------------------------------------------------------------------------


def changed_bytes(case: Case, data: bytes, *, start: int = 0) -> bytes:
    """`data` damaged in one to four ways, at `start` or after it."""
    for _ in range(case.random.choice((1, 1, 1, 2, 4))):
        data = case.random.choice(BYTE_CHANGES)(case, data, start)
    return data


def _place(case: Case, data: bytes, start: int) -> int:
    return case.random.randrange(min(start, len(data)), len(data) + 1)


def _cut(case: Case, data: bytes, start: int) -> bytes:
    return data[: _place(case, data, start)]


def _flip(case: Case, data: bytes, start: int) -> bytes:
    changed = bytearray(data)
    for _ in range(case.random.choice((1, 1, 3, 20))):
        if (place := _place(case, data, start)) < len(changed):
            changed[place] ^= 1 << case.random.randrange(8)
    return bytes(changed)


def _overwrite(case: Case, data: bytes, start: int) -> bytes:
    place, length = _place(case, data, start), case.random.choice((1, 2, 4, 8, 60))
    value = case.random.choice((b"\0", b"\xff", b"\x7f", b"\x80", case.random.randbytes(1))) * length
    return data[:place] + value[: max(0, len(data) - place)] + data[place + length :]


def _insert(case: Case, data: bytes, start: int) -> bytes:
    place = _place(case, data, start)
    return data[:place] + case.random.randbytes(case.random.choice((1, 4, 512))) + data[place:]


def _delete(case: Case, data: bytes, start: int) -> bytes:
    place = _place(case, data, start)
    return data[:place] + data[place + case.random.choice((1, 4, 100, 512)) :]


def _repeat(case: Case, data: bytes, start: int) -> bytes:
    place, length = _place(case, data, start), case.random.choice((4, 100, 512, 5000))
    return data[:place] + data[place : place + length] * case.random.choice((2, 3, 50)) + data[place + length :]


def _append(case: Case, data: bytes, start: int) -> bytes:
    return data + case.random.choice((b"\0", b"\n", bytes(70_000), case.random.randbytes(700), data))


BYTE_CHANGES: tuple[Callable[[Case, bytes, int], bytes], ...] = (
    _cut, _flip, _flip, _overwrite, _overwrite, _insert, _delete, _repeat, _append
)  # fmt: skip


def changed_json(case: Case, text: str) -> bytes:
    """A JSON text with another value, key or shape somewhere, or broken as a text."""
    if case.chance(0.2):
        return changed_bytes(case, text.encode())
    if case.chance(0.1):
        return case.random.choice(
            (b"[" * 100_000, b"", b"null", b"[]", b"1" * 9000, b'{"a":' * 50_000, b"\xff\xfe{\0}\0", b"\xef\xbb\xbf{}")
        )
    value = json.loads(text)
    for _ in range(case.random.choice((1, 1, 2, 4))):
        value = _changed_value(case, value)
    return json.dumps(value).encode()


def _changed_value(case: Case, value: Any) -> Any:
    if not isinstance(value, dict | list) or not value or case.chance(0.1):
        return hostile_value(case)
    key = case.random.choice(list(value) if isinstance(value, dict) else range(len(value)))
    kind = case.random.randrange(8)
    if kind == 0:
        del value[key]
    elif kind == 1 and isinstance(value, dict):
        value[str(hostile_value(case))[:99]] = value[key]
    elif kind == 2 and isinstance(value, list):
        value.append(value[key])
    else:
        value[key] = _changed_value(case, value[key])
    return value


def hostile_value(case: Case) -> Any:
    return case.random.choice(
        (
            *(None, True, False, 0, -1, 1, 2, 7, 1.5, -0.5, 2**31, 2**63, -(2**63), 10**30, 1e308, 10**9, 100_000),
            *(float("nan"), float("inf"), "", "x", "\0", "../../etc", "/etc/passwd", "\ud800", "é" * 300, [], {}),
            *([1], [[1]], {"a": 1}, {"trust_remote_code": True}, ["x"] * 99, f"pipe:touch {case.canary}"),
            *(f"$(touch {case.canary})", f"`touch {case.canary}`", "__import__('os').getcwd()"),
        )
    )


# --- shards ----------------------------------------------------------------------------------------------------------

IMAGE_NAMES = {"JPEG": ("jpg", "jpeg", "JPG"), "PNG": ("png",), "WEBP": ("webp",)}
TAR_KINDS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
PAYLOAD_NAMES = ("pkl", "pyd", "pth", "pt", "npy", "pickle", "meta.pyd", "pyd.gz", "ten", "mp", "bin", "py", "sh")


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def small_images() -> dict[str, bytes]:
    """A picture in each format."""
    pixels = random.Random(1).randbytes(3 * 20 * 14)
    return {kind: encoded(Image.frombytes("RGB", (20, 14), pixels), kind) for kind in IMAGE_NAMES}


@dataclass
class _Member:
    name: str
    data: bytes
    kind: bytes = tarfile.REGTYPE
    records: dict[str, str] = field(default_factory=dict)
    sample: str = ""  # which sample it belongs to


@dataclass
class _Shard:
    """What is written: members in order, and the samples whose members are as they should be."""

    members: list[_Member]
    written: dict[str, tuple[bytes, bytes]]  # by key


class Shards:
    """Shards with damaged bytes, odd members, and changes after indexing."""

    def __init__(self, folder: Path) -> None:
        self.images = small_images()

    def run(self, case: Case) -> str:
        if not case.is_sound and case.chance(0.04):
            return self._location(case)
        shard, kind, is_damaged = self._shard(case), case.random.choice(TAR_KINDS), False
        if not case.is_sound:
            if case.chance(0.15):
                return self._changed_later(case, tar_of(shard.members, kind))
            is_damaged = case.chance(0.5)
            for _ in range(case.random.choice((0, 1, 1, 2, 3) if is_damaged else (1, 1, 2, 3))):
                case.random.choice(MEMBER_CHANGES)(case, shard)
        data = tar_of(shard.members, kind)
        if is_damaged:
            data = changed_tar(case, data)
        path = case.write("0000.tar", data)
        other = case.write("0001.tar", tar_of(self._shard(case).members, kind)) if case.chance(0.2) else None
        try:
            index = ShardIndex.build([str(path), *([str(other)] if other else [])], workers=1, retry=QUICK)
        except UserError as error:
            if path.name not in str(error):
                raise LostError(f"the shard is not named: {error}") from error
            raise
        return self._check(index, shard, is_damaged)

    def _shard(self, case: Case) -> _Shard:
        members, written = [], {}
        stem = case.random.choice(("k", "d/k", "./k", "deep/" * 25 + "k", "ключ-é"))
        for number in range(case.random.randrange(2, ROWS)):
            key, kind = f"{stem}{number:04d}", case.random.choice(list(IMAGE_NAMES))
            caption = f"a caption of {key}"
            text = caption.encode() if case.chance(0.7) else json.dumps({"caption": caption}).encode()
            end = "txt" if text == caption.encode() else "json"
            pair = [
                _Member(f"{key}.{case.random.choice(IMAGE_NAMES[kind])}", self.images[kind], sample=key),
                _Member(f"{key}.{end}", text, sample=key),
            ]
            case.random.shuffle(pair)
            members += pair
            written[key] = (self.images[kind], text)
        return _Shard(members, written)

    def _check(self, index: ShardIndex, shard: _Shard, is_damaged: bool) -> str:
        """Every sample is delivered as it was written, or counted."""
        reader, good, bad = Reader(index, retry=QUICK), 0, sum(index.shards[0].skipped.values())
        for raw in reader.read(np.arange(index.shards[0].rows)):
            try:
                decode_image(raw.image)
                decode_captions(raw.text, raw.text_format)
            except BadSampleError as error:
                if not error.reason:
                    raise LostError("a bad sample without a reason") from error
                bad += 1
                continue
            good += 1
            expected = shard.written.get(index.key(raw.row))
            if not is_damaged and expected is not None and (raw.image, raw.text) != expected:
                raise LostError(f"{index.key(raw.row)!r} is not what was written")
        samples = _told_apart(shard.members)
        if good + bad < len(samples) and not (is_damaged and _ends_early(Path(index.shards[0].url), samples)):
            raise LostError(f"{len(samples)} samples were written, {good} delivered, {bad} counted as bad")
        reader.close()
        return "bad" if bad else "accepted"

    def _changed_later(self, case: Case, data: bytes) -> str:
        """A shard that changes between indexing and reading."""
        path = case.write("0000.tar", data)
        index = ShardIndex.build([str(path)], workers=1, retry=QUICK)
        reader, rows, before = Reader(index, retry=QUICK), np.arange(len(index)), path.stat()
        is_open = case.chance(0.5)
        if is_open:
            reader.read(rows[:1])
        changed = changed_tar(case, data)
        if case.chance(0.5):
            path.write_bytes(changed)
        else:  # a new file under the old name, as atomic writers leave it
            os.replace(case.write("new.tar", changed), path)
        is_hidden = len(changed) == len(data) and case.chance(0.3)
        if is_hidden:  # not even the time of the change is left: headers are all there is
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        elif path.stat().st_mtime_ns == before.st_mtime_ns:
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
        found = [(raw.image, raw.text) for raw in reader.read(rows)]
        if not is_hidden and not is_open:
            raise LostError("a changed shard was read")
        if is_open and path.stat().st_ino == before.st_ino and not is_hidden:
            raise LostError("a shard that changed under an open reader was read")
        reader.close()
        return "accepted" if found else "bad"

    def _location(self, case: Case) -> str:
        """Shard lists that would run something, or wait for ever."""
        fifo = case.folder / "pipe.tar"
        os.mkfifo(fifo)
        (case.folder / "folder.tar").mkdir()
        touch = f"touch {case.canary}"
        location = case.random.choice(
            (
                *(f"pipe:{touch}", f"PIPE:{touch}", f"{{pipe:{touch},x}}", f"pipe://{touch}", f"zip://x::pipe:{touch}"),
                *(f"reference://{case.folder}/x.json", f"file://host/{touch}", f"$({touch}).tar", f"`{touch}`.tar"),
                *(f"github://a:b@c/{touch}", "local://x", "s3:/", "hf://", "http://[::1/x.tar", "{0..999999999}.tar"),
                *(str(fifo), str(case.folder / "folder.tar"), f"{case.folder}/*", "/dev/zero", "\0", "~nobody/x.tar"),
                *("{a,b", "{" * 3000, "x" * 5000 + ".tar", f"{case.folder}/**/*.tar"),
            )
        )
        ShardIndex.build(expand_shards(location), workers=1, retry=QUICK)
        return "accepted"


def tar_of(members: Sequence[_Member], kind: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:", format=kind, errors="surrogateescape") as tar:
        for member in members:
            info = tarfile.TarInfo(member.name)
            info.type, info.size, info.mtime = member.kind, len(member.data), 1
            info.pax_headers, info.linkname = dict(member.records), "/etc/passwd" if member.kind in b"12" else ""
            if member.kind not in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE):
                info.size = 0
            try:
                tar.addfile(info, io.BytesIO(member.data) if info.size else None)
            except (ValueError, UnicodeError):  # a name that this format cannot hold
                info.name, info.pax_headers = f"{member.sample or 'extra'}.pdf", {}
                tar.addfile(info, io.BytesIO(member.data) if info.size else None)
    return buffer.getvalue()


def changed_tar(case: Case, data: bytes) -> bytes:
    """A tar file with other bytes in it."""
    changed = data
    while changed == data:
        kind = case.random.randrange(8)
        if kind < 3:
            changed = changed_bytes(case, data)
        elif kind < 6:
            changed = _changed_header(case, data)
        elif kind == 6:
            changed = _changed_blocks(case, data)
        else:
            pack = case.random.choice(
                (gzip.compress, bz2.compress, lzma.compress, lambda tar: b"\x28\xb5\x2f\xfd" + tar)
            )
            tail = (data, bytes(70_000) + data, bytes(17 << 20), case.random.randbytes(512), bytes(1024) + b"x")
            changed = pack(data) if case.chance(0.3) else data + case.random.choice(tail)
    return changed


def _told_apart(members: Sequence[_Member]) -> set[str]:
    """The samples; of neighbours that were given one name, and no ending twice, WebDataset makes a single one."""
    endings: dict[str, set[str]] = {}
    same: dict[str, str] = {}
    for member in members:
        endings.setdefault(member.sample, set()).add(_key_and_ending(member.name)[1])
    for one, other in pairwise(member for member in members if member.sample):
        is_one = _key_and_ending(one.name)[0] == _key_and_ending(other.name)[0]
        if is_one and endings[one.sample].isdisjoint(endings[other.sample]):
            same[other.sample] = same.get(one.sample, one.sample)
    return {same.get(member.sample, member.sample) for member in members if member.sample}


def _key_and_ending(name: str) -> tuple[str, str]:
    folder, slash, file = name.rpartition("/")
    key, _, ending = file.partition(".")
    return folder + slash + key, ending.lower()


def _ends_early(path: Path, samples: set[str]) -> bool:
    """Whether a cut at the end of a member left, with zeros after it, a sound archive of fewer samples."""
    try:
        with tarfile.open(path, "r:") as tar:
            names, end = tar.getnames(), tar.offset
    except (tarfile.TarError, ValueError, OverflowError):
        return False
    tail = path.read_bytes()[end:]
    missing = [sample for sample in samples if not any(name.startswith(f"{sample}.") for name in names)]
    return len(tail) >= 1024 and not tail.strip(b"\0") and bool(missing)


def _headers(data: bytes) -> list[int]:
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            return [place for member in tar for place in (member.offset, member.offset_data - 512)]
    except (tarfile.TarError, ValueError, OverflowError):  # a header was changed before
        return [0]


def _changed_header(case: Case, data: bytes) -> bytes:
    """One header says something else, and its checksum fits."""
    changed, start = bytearray(data), case.random.choice(_headers(data))
    place, length = case.random.choice(((0, 100), (124, 12), (156, 1), (257, 8), (345, 155), (100, 8), (0, 512)))
    values = {
        124: (b"77777777777\0", b"00000000000\0", b"99999999999\0", b"\x80" + b"\xff" * 11, b"\xff" * 12, b"-1", b"1"),
        156: tuple(bytes([flag]) for flag in b"\x0001234567xgLKSDMVNXA\xff"),
    }.get(place, (case.random.randbytes(length), b"", b"\0" * length, b"/" * length, b"." * length))
    value = case.random.choice(values)
    if place == 0 and case.chance(0.7):
        place = start + case.random.randrange(12)
        value = bytes([case.random.randrange(256)])
    else:
        place += start
    changed[place : place + len(value)] = value
    changed = changed[: len(data)]
    changed[start + 148 : start + 156] = b" " * 8
    changed[start + 148 : start + 156] = b"%06o\0 " % sum(changed[start : start + 512])
    return bytes(changed)


def _changed_blocks(case: Case, data: bytes) -> bytes:
    blocks = [data[start : start + 512] for start in range(0, len(data), 512)]
    place = case.random.randrange(len(blocks))
    kind = case.random.randrange(5)
    if kind == 0:
        del blocks[place]
    elif kind == 1:
        blocks.insert(place, case.random.choice((bytes(512), blocks[0], case.random.randbytes(512))))
    elif kind == 2:
        blocks[place] = bytes(512)
    elif kind == 3:
        del blocks[place:]
    else:
        other = case.random.randrange(len(blocks))
        blocks[place], blocks[other] = blocks[other], blocks[place]
    return b"".join(blocks)


def _pick(case: Case, shard: _Shard) -> int:
    return case.random.randrange(len(shard.members))


def _spoil(shard: _Shard, member: _Member) -> None:
    """This sample need not be delivered as it was; it must be counted all the same."""
    shard.written.pop(member.sample, None)


def _plant(case: Case, shard: _Shard) -> None:
    for _ in range(case.random.choice((1, 2, 17))):
        place = _pick(case, shard)
        neighbour = shard.members[place].name.split(".")[0]
        name = f"{neighbour}.{case.random.choice(PAYLOAD_NAMES)}"
        if all(name != member.name for member in shard.members):
            shard.members.insert(place, _Member(name, case.hostile_file()))


def _retype(case: Case, shard: _Shard) -> None:
    member = shard.members[_pick(case, shard)]
    member.kind = case.random.choice((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE,
                                      tarfile.FIFOTYPE, tarfile.CONTTYPE, b"V", b"D"))  # fmt: skip
    _spoil(shard, member)


def _rename(case: Case, shard: _Shard) -> None:
    """Both members of a sample under names that cannot be used."""
    chosen = shard.members[_pick(case, shard)]
    sample = chosen.sample
    touch = f"touch {case.canary}"
    stem = case.random.choice(
        (
            *("/etc/x", "../x", "d/../x", "a\nb", "\x1b[2J", "x" * 300, ".hidden", "v1.2", "nodot\0x", "é" * 200),
            *(
                "\udcff\udcfe",
                f"$({touch})",
                f"`{touch}`",
                f";{touch};",
                f"|{touch}",
                "C:\\x",
                "-rf",
                "CON",
                " ",
                "a" * 99,
            ),
        )
    ).replace("/touch", "touch")
    for number, member in enumerate(shard.members):
        if member.sample == sample and sample:
            end = member.name.rpartition(".")[2]
            shard.members[number] = _Member(f"{stem}.{end}", member.data, sample=sample)
    _spoil(shard, chosen)


def _resize(case: Case, shard: _Shard) -> None:
    member = shard.members[_pick(case, shard)]
    sizes = (0, 1, (64 << 10) + 1, (1 << 20) + 1) if case.chance(0.97) else ((32 << 20) + 1,)
    member.data = b"x" * case.random.choice(sizes)
    _spoil(shard, member)


def _double(case: Case, shard: _Shard) -> None:
    member = shard.members[_pick(case, shard)]
    shard.members.insert(_pick(case, shard), _Member(member.name, member.data))
    _spoil(shard, member)
    for sample in list(shard.written):  # the copy may stand inside any sample
        shard.written.pop(sample)


def _shuffle(case: Case, shard: _Shard) -> None:
    case.random.shuffle(shard.members)


def _drop(case: Case, shard: _Shard) -> None:
    place = _pick(case, shard)
    _spoil(shard, shard.members[place])
    if len(shard.members) > 1:
        del shard.members[place]


def _pax(case: Case, shard: _Shard) -> None:
    member = shard.members[_pick(case, shard)]
    member.records = case.random.choice(
        (
            {"comment": "y" * case.random.choice((10, 60_000, 70_000, 400_000))},
            *({"size": value} for value in ("1", "0", "-5", "9" * 30, "x")),
            *({"path": value} for value in ("", "../x.jpg", "/x.jpg", "other.jpg", "x" * 70_000)),
            {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"},
            {f"k{number}": "v" for number in range(4000)},
            {"hdrcharset": "BINARY"},
        )
    )
    _spoil(shard, member)


def _broken_content(case: Case, shard: _Shard) -> None:
    member = shard.members[_pick(case, shard)]
    member.data = changed_bytes(case, member.data) or b"x"
    _spoil(shard, member)


def _other_content(case: Case, shard: _Shard) -> None:
    member = shard.members[_pick(case, shard)]
    member.data = case.random.choice(
        (
            case.hostile_file(),
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(" + str(case.canary).encode() + b") (w) file\n",
            b"<svg xmlns='http://www.w3.org/2000/svg'/>",
            encoded(Image.new("RGB", (8, 8)), case.random.choice(("GIF", "BMP", "TIFF", "PPM"))),
            png(case.random.choice((60_000, 1, 0)), case.random.choice((60_000, 1_000_000, 0))),
            "ÄÖÜ".encode("latin-1"), "text".encode("utf-16"), b"\0\0\0", b" \n\n", b"{}", b"null", b"\x1b[2J",
        )
    )  # fmt: skip
    _spoil(shard, member)


MEMBER_CHANGES: tuple[Callable[[Case, _Shard], None], ...] = (
    _plant, _plant, _retype, _rename, _rename, _resize, _double, _shuffle, _drop, _pax, _broken_content, _other_content
)  # fmt: skip


# --- images ----------------------------------------------------------------------------------------------------------


def png(width: int, height: int, *extra: bytes, depth: int = 8, colour: int = 2, pixels: bytes = bytes(1000)) -> bytes:
    """A PNG whose header says `width` x `height`, whatever its pixels are."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = (chunk(b"IHDR", header), *extra, chunk(b"IDAT", zlib.compress(pixels)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def text_bomb() -> bytes:
    """A compressed text chunk of a few kilobytes that unpacks to 40 MB."""
    data = b"x\0\0" + zlib.compress(bytes(40 << 20), 9)
    return struct.pack(">I", len(data)) + b"zTXt" + data + struct.pack(">I", zlib.crc32(b"zTXt" + data))


class Images:
    """Pictures of all modes and formats, damaged; headers that promise much; other formats under their names."""

    def __init__(self, folder: Path) -> None:
        self.good = _images_of_all_modes()
        self.other = [
            *(encoded(Image.new("RGB", (16, 16)), kind) for kind in ("TIFF", "ICO", "PPM", "EPS", "PDF")),
            b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
            *(b"", b"\xff\xd8", b"\xff\xd8\xff", b"RIFF\xff\xff\xff\xffWEBP", b"\x89PNG\r\n\x1a\n", b"GIF89a"),
        ]
        self.bomb = png(8, 8, text_bomb(), pixels=bytes(8 * 25))
        preprocess = {"size": SIZE_PX, "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic"}
        self.evaluation = evaluation_transform({**preprocess, "resize_mode": "shortest"})
        self.training = TrainTransform(size_px=(SIZE_PX, SIZE_PX))

    def run(self, case: Case) -> str:
        data = case.random.choice(self.good) if case.is_sound else self._data(case)
        case.write("image", data)
        max_pixels = 50_000_000 if case.chance(0.1) else 1_000_000
        image = decode_image(data, max_pixels=max_pixels)
        if image.mode != "RGB" or not 0 < image.width * image.height <= max_pixels:
            raise LostError(f"{image.mode} picture of {image.size}")
        trained = self.training.decode(data, "fuzz", case.number, max_pixels=max_pixels)
        for pixels in (self.evaluation(image), self.training(image, "fuzz", case.number), trained):
            if pixels.shape != (3, SIZE_PX, SIZE_PX) or pixels.dtype != torch.uint8:
                raise LostError(f"pixels of {pixels.dtype} {pixels.shape}")
        return "accepted"

    def _data(self, case: Case) -> bytes:
        kind, data = case.random.randrange(20), case.random.choice(self.good)
        if kind == 0:
            return case.random.choice(self.other)
        if kind == 1:
            return case.hostile_file()
        if kind == 2:
            sides = (0, 1, 2, 99, 101, 5000, 60_000, 1_000_000, 2**31 - 1, 2**32 - 1)
            depth, colour = case.random.choice((1, 8, 16, 7)), case.random.choice((0, 2, 3, 4, 6, 9))
            return png(case.random.choice(sides), case.random.choice(sides), depth=depth, colour=colour)
        if kind == 3:
            width, height = case.random.choice(((1, 1_000_000), (1_000_000, 1), (1, 100), (1, 101), (3, 5000), (1, 1)))
            return encoded(Image.new("L", (width, height)), "PNG")
        if kind == 4:
            return self.bomb
        if kind == 5:
            return changed_bytes(case, case.random.choice(self.good) + data)
        if kind == 6:
            return _more_scans(case, data)
        if kind < 12:
            return changed_bytes(case, data, start=case.random.choice((0, 2, 12, 20)))
        return _changed_start(case, data)


def _changed_start(case: Case, data: bytes) -> bytes:
    """Other bytes in the headers, where sizes, depths and tables stand."""
    changed = bytearray(data)
    for _ in range(case.random.choice((1, 2, 5))):
        changed[case.random.randrange(min(len(changed), case.random.choice((40, 200, 700))))] = case.random.choice(
            (0, 1, 0x7F, 0x80, 0xFF, case.random.randrange(256))
        )
    if changed.startswith(b"\x89PNG") and case.chance(0.7):  # with a checksum that fits
        changed[29:33] = struct.pack(">I", zlib.crc32(changed[12:29]))
    return bytes(changed)


def _more_scans(case: Case, data: bytes) -> bytes:
    """A progressive JPEG whose last scan comes again and again."""
    data = encoded(Image.new("RGB", (900, 900)), "JPEG", progressive=True)
    last = data[data.rfind(b"\xff\xc4") : -2]
    return data[:-2] + last * case.random.choice((1, 40, 5000)) + data[-2:]


def _images_of_all_modes() -> list[bytes]:
    pixels = Image.frombytes("RGB", (24, 18), random.Random(2).randbytes(3 * 24 * 18))
    found, turned = [], b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    for kind in FORMATS:
        for mode in ("RGB", "L", "P", "RGBA", "LA", "1", "CMYK", "I;16"):
            try:
                image = Image.new("I;16", (24, 18), 40_000) if mode == "I;16" else pixels.convert(mode)
                found.append(encoded(image, kind))
            except (OSError, ValueError):
                continue  # this format does not hold this mode
    found.append(encoded(pixels, "JPEG", progressive=True, exif=b"Exif\0\0II*\0" + bytes(40)))
    found.append(encoded(pixels.convert("P"), "PNG", transparency=bytes(range(200))))
    frames = [pixels, pixels.rotate(90), pixels.rotate(180)]
    found += [encoded(pixels, kind, save_all=True, append_images=frames) for kind in ("PNG", "WEBP", "GIF")]
    found += [encoded(pixels, kind, exif=turned) for kind in ("JPEG", "PNG", "WEBP")]
    return found


# --- captions --------------------------------------------------------------------------------------------------------


class Captions:
    """Texts in wrong encodings, empty and enormous ones, control characters, and JSON of another shape."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = create_clip(model_cfg=MODEL).tokenizer

    def run(self, case: Case) -> str:
        text_format = case.random.choice(("txt", "json"))
        data = self._json(case) if text_format == "json" else self._txt(case)
        case.write(f"caption.{text_format}", data)
        captions = decode_captions(data, text_format)
        if not captions or not all(caption.strip() and caption.encode() for caption in captions):
            raise LostError(f"captions {captions!r:.200}")
        tokens = self.tokenizer(captions[:200])
        if tokens.shape != (len(captions[:200]), MODEL["text_cfg"]["context_length"]) or int(tokens.max()) >= 49408:
            raise LostError(f"tokens of the shape {tuple(tokens.shape)}")
        return "accepted"

    def _text(self, case: Case) -> str:
        if case.is_sound:
            return "two dogs, e\u0301 犬 😀"
        pieces = ("a dog", " ", "\n", "\r\n", "\0", "\x1b[31m", "\x85", "\u2028", "\u202e", "é", "犬", "😀",
                  "e\u0301" * 9, "&amp;" * 5, "<start_of_text>", "\ufffe", "\U000e0001", "\x7f", "'s", "1234567890",
                  "\ufeff")  # fmt: skip
        text = "".join(case.random.choice(pieces) for _ in range(case.random.choice((0, 1, 5, 30))))
        if case.chance(0.03):
            letters = "".join(case.random.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(1000))
            text += case.random.choice(("dog " * 9000, letters * 40, "x" * 70_000, "a\n" * 20_000))
        return text

    def _txt(self, case: Case) -> bytes:
        encoding = case.random.choice(("utf-8", "utf-8", "utf-8", "latin-1", "utf-16", "utf-16-le", "utf-32", "cp1252"))
        if case.is_sound:
            return self._text(case).encode()
        data = self._text(case).encode(encoding, errors="replace")
        return changed_bytes(case, data) if case.chance(0.4) else data

    def _json(self, case: Case) -> bytes:
        caption: Any = self._text(case) if case.chance(0.6) else [self._text(case) for _ in range(3)]
        text = json.dumps({"caption": caption, "width": 3, "nested": {"caption": ["x"]}})
        return changed_json(case, text) if not case.is_sound and case.chance(0.7) else text.encode()


# --- index -----------------------------------------------------------------------------------------------------------


class Indexes:
    """Index files: damaged, with other columns or descriptions of shards, or not Arrow files at all."""

    def __init__(self, folder: Path) -> None:
        shards = Shards(folder)
        template = Case(0, random.Random(0), folder, folder / "unused")
        self.shards = [
            template.write(f"{n}.tar", tar_of(shards._shard(template).members, TAR_KINDS[n])) for n in (0, 1)
        ]
        index = ShardIndex.build([str(path) for path in self.shards], workers=1)
        index.save(folder / "index.arrow")
        self.good = (folder / "index.arrow").read_bytes()
        self.read = {index.key(raw.row): (raw.image, raw.text) for raw in Reader(index).read(np.arange(len(index)))}

    def run(self, case: Case) -> str:
        path = case.write("index.arrow", self.good if case.is_sound else self._data(case))
        for shard in self.shards:
            shutil.copy2(shard, case.folder)
        if case.chance(0.3):  # as `build` finds it beside the shards
            index = ShardIndex.build([str(case.folder / shard.name) for shard in self.shards], workers=1)
        else:
            index = ShardIndex.load(path)
        keys = [index.key(row) for row in range(len(index))]
        if len(index.digest) != 32 or len(index.key_numbers()) != len(keys) or not isinstance(
            index.skipped_by_reason(), dict
        ):  # fmt: skip
            raise LostError("an index without a digest")
        index.check_unchanged(retry=QUICK)
        for raw in Reader(index, retry=QUICK).read(np.arange(len(index))):
            is_checked = len(keys[raw.row]) <= 90  # longer names do not stand in the header that the reader looks at
            if is_checked and self.read.get(keys[raw.row]) not in ((raw.image, raw.text), None):
                raise LostError(f"{keys[raw.row]!r} is not what was written")
        return "accepted"

    def _data(self, case: Case) -> bytes:
        kind = case.random.randrange(10)
        if kind < 4:
            return changed_bytes(case, self.good)
        if kind == 4:
            return case.random.choice((b"", b"ARROW1\0\0", case.hostile_file(), self.good[8:], self.good + self.good))
        table = pa.ipc.open_file(pa.BufferReader(self.good)).read_all()
        metadata = table.schema.metadata[b"mcl_clip"].decode()
        if kind < 8:
            metadata = changed_json(case, metadata)
        else:
            table = _changed_column(case, table)
        sink = pa.BufferOutputStream()
        options = pa.ipc.IpcWriteOptions(compression=case.random.choice((None, None, "zstd", "lz4")))
        name = b"mcl_clip" if case.chance(0.95) else b"other"
        with pa.ipc.new_file(sink, table.replace_schema_metadata({name: metadata}).schema, options=options) as writer:
            writer.write_table(table.replace_schema_metadata({name: metadata}), case.random.choice((None, 1, 2)))
        return sink.getvalue().to_pybytes()


def _changed_column(case: Case, table: pa.Table) -> pa.Table:
    number = case.random.randrange(table.num_columns)
    name, values = table.column_names[number], table.column(number).to_pylist()
    place, kind = case.random.randrange(len(values)), case.random.randrange(6)
    if kind == 0:
        return table.drop([name])
    if kind == 1:
        return table.rename_columns([f"{column}x" if column == name else column for column in table.column_names])
    if kind == 2:
        return table.slice(case.random.randrange(3), case.random.randrange(4))
    if kind == 3:
        return table.set_column(number, name, pa.array([str(value) for value in values]))
    if name == "key":
        values[place] = case.random.choice(("", "../x", "\0", "é" * 999, f"$(touch {case.canary})", values[0], None))
    else:
        limits = np.iinfo(table.column(number).type.to_pandas_dtype())
        values[place] = case.random.choice((limits.min, limits.max, 0, 1, 100, values[0], None))
    return table.set_column(number, table.schema.field(number), pa.array(values, table.schema.field(number).type))


# --- labels ----------------------------------------------------------------------------------------------------------


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


class Labels:
    """labels.npy and labels.json: damaged, pickles, archives, other types and shapes, labels out of range."""

    def __init__(self, folder: Path) -> None:
        self.good = np.array([0, 1, 2, 3, 4, 5] * 50, np.int64)
        self.summary = json.dumps({"radix": [3, 2], "labels": 6, "smallest": 50, "histogram": {"32-63": 6}})

    def run(self, case: Case) -> str:
        is_array = case.chance(0.75)
        is_summary = not is_array and not case.is_sound
        case.write("labels.npy", self._array(case) if is_array and not case.is_sound else npy(self.good))
        case.write("labels.json", changed_json(case, self.summary) if is_summary else self.summary.encode())
        labels = read_labels(case.folder, len(self.good))
        load_numbers(case.folder / "labels.npy", len(self.good))
        groups = group_labels(labels, min_group_size=case.random.choice((1, 40, 10_000)))
        if len(groups.group_of) != len(self.good) or sum(group.size for group in groups.groups) != len(self.good):
            raise LostError("rows without a group")
        return "accepted"

    def _array(self, case: Case) -> bytes:
        kind = case.random.randrange(8)
        if kind < 3:
            return changed_bytes(case, npy(self.good), start=case.random.choice((0, 0, 120)))
        if kind == 3:
            return case.hostile_file()
        if kind == 4:
            return object_array(case.canary)
        if kind == 5:
            header = "{{'descr': {!r}, 'fortran_order': False, 'shape': {}, }}".format(
                case.random.choice(("<i8", "|O", "<f8", "<U9", "|V8", "<M8[s]", "x", "<i8,<i8")),
                case.random.choice(
                    ("(300,)", "(10**12,)", f"({10**15},)", "(-1,)", "(300, 1)", "()", "(2, 150)", "None")
                ),
            )
            text = header.encode().ljust(117) + b"\n"
            return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + self.good.tobytes()
        if kind == 6:
            values = self.good.copy()
            values[case.random.randrange(len(values))] = case.random.choice((-1, 6, 2**62, -(2**63), 5))
            return npy(values)
        types = (np.float32, np.int32, np.uint8, np.complex64, "U3", np.bool_, np.uint64)
        return npy(self.good.astype(case.random.choice(types))[: case.random.choice((None, 299, 0))])


# --- run directory ---------------------------------------------------------------------------------------------------


def result(stage: int) -> dict[str, Any]:
    return {
        "schema": 1, "key": "retrieval/photos", "task": "zeroshot_retrieval", "dataset": "photos", "n_images": 20,
        "n_texts": 40, "model": "m", "pretrained": f"run/stage-{stage}", "label": f"stage-{stage}", "stage": stage,
        "combine": None, "main_metric": "image_retrieval_recall@1", "data_sha256": "0", "outcomes": "outcomes.npz",
        "metrics": {"image_retrieval_recall@1": 0.25 + stage / 2, "main_metric": 0.25 + stage / 2},
        "ci95": {"image_retrieval_recall@1": [0.1, 0.5]},
    }  # fmt: skip


class Runs:
    """The files of a run directory: JSON, records, checkpoints with their optimizer, features, outcomes, the lock."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "run"
        shards = Indexes(folder / "data")
        self.index = ShardIndex.load(shards.shards[0].parent / "index.arrow")
        self.files = self._write()

    def _write(self) -> dict[str, bytes]:
        config = {"seed": 0, "tower": {"architecture": "x"}, "stages": [{"train": {"steps": 8}}] * 2, "data": {}}
        made_from = {"settings": {"lr": 0.1, "sets": {"a": "0"}}, "inputs": {"stage-0/train": "0" * 32}}
        step = {"step": 2, "loss": 1.0, "bad_samples": 0}
        bad = {"step": 1, "row": 3, "shard": "0.tar", "reason": "not_utf8"}
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **{"image_retrieval_recall@1": np.array([True, False] * 20)})
        files = {
            "config.json": json.dumps(config).encode(),
            "stage-0/train/DONE.json": json.dumps(
                {"fingerprint": "0" * 32, "made_from": made_from, "outputs": {}}
            ).encode(),
            "stage-0/train/metrics.jsonl": (json.dumps(step) + "\n").encode() * 4,
            "stage-0/train/bad_samples.jsonl": (json.dumps(bad) + "\n").encode(),
            "lock": json.dumps({"host": socket.gethostname(), "pid": 2**30, "process": "1"}).encode(),
        }
        for stage in (0, 1):
            files[f"stage-{stage}/eval/results.jsonl"] = (json.dumps(result(stage)) + "\n").encode()
            files[f"stage-{stage}/eval/outcomes.npz"] = buffer.getvalue()
        for number, shard in enumerate(self.index.shards):
            files[f"stage-0/embed/part-{number:06d}.safetensors"] = make_safetensors(
                _part(shard.rows),
                {"counts": json.dumps({"bad_samples": [[0, "0.tar", "not_utf8"]], "full_captions": 1})},
            )
        centroids = {"image": torch.eye(4), "image.mean": torch.zeros(4)}
        files["stage-0/cluster/centroids.safetensors"] = make_safetensors(centroids)
        model, optimizer = self._model()
        model.weight.sum().backward()
        optimizer.step()
        state = TrainState(step=8, samples_seen=64, seconds=1.0)
        checkpoint = save_checkpoint(
            self.folder / "c", model=model, optimizer=optimizer, average=None, state=state, keep=1
        )
        files |= {f"stage-0/train/checkpoints/{checkpoint.name}/{p.name}": p.read_bytes() for p in checkpoint.iterdir()}
        return files

    @staticmethod
    def _model() -> tuple[torch.nn.Linear, torch.optim.Optimizer]:
        model = torch.nn.Linear(3, 2)
        return model, create_optimizer(
            model, TrainConfig(steps=1, global_batch_size=2, lr=0.1, weight_decay=0.1, betas=(0.9, 0.99), eps=1e-6)
        )

    def run(self, case: Case) -> str:
        name = case.random.choice(list(self.files))
        for other, data in self.files.items():
            case.write(f"run/{other}", data)
        path = case.folder / "run" / name
        if not case.is_sound:
            self._change(case, path)
        if case.chance(0.3):
            case.write(f"run/{name}.pkl", case.hostile_file())
            case.write(f"run/{Path(name).parent}/optimizer.bin", case.hostile_file())
        self._use(case.folder / "run")
        return "accepted"

    def _change(self, case: Case, path: Path) -> None:
        if case.chance(0.95):
            path.write_bytes(self._changed(case, path))
            return
        path.unlink()
        if case.chance(0.3):
            path.mkdir()

    def _changed(self, case: Case, path: Path) -> bytes:
        data = path.read_bytes()
        if case.chance(0.15):
            return case.hostile_file()
        if path.suffix == ".jsonl" and case.chance(0.8):
            lines = data.decode().splitlines()
            place = case.random.randrange(len(lines))
            changed = changed_json(case, lines[place]).replace(b"\n", b" ")
            return b"".join(
                (changed if number == place else line.encode()) + b"\n" for number, line in enumerate(lines)
            )
        if path.suffix in (".json", "") and case.chance(0.9):
            return changed_json(case, data.decode())
        if path.suffix == ".safetensors":
            return changed_safetensors(case, data)
        return changed_bytes(case, data)

    def _use(self, run: Path) -> None:
        """What the commands and phases read of a run."""
        config = read_run_config(run)
        for stage in range(min(len(config["stages"]), 2)):
            records = read_jsonl(run / f"stage-{stage}" / "train" / "metrics.jsonl")
            _ = [record.get("loss") for record in records]
        results_table(run)
        compare_models(f"{run}/stage-0", f"{run}/stage-1", resamples=100)
        phase = Phase(
            name="stage-0/train", folder=run / "stage-0/train", settings={"lr": 0.1}, run=lambda: None, grows=True
        )
        phase.difference()
        phase.state()
        StepLog(run / "stage-0/train/metrics.jsonl").rewind(10)
        BadSamples(run / "stage-0/train/bad_samples.jsonl", max_fraction=0.5, rows=10, step=5).flush(5, 10)
        model, optimizer = self._model()
        state = load_newest(run / "stage-0/train/checkpoints", model=model, optimizer=optimizer, average=None)
        model.weight.sum().backward()
        optimizer.step()
        _ = state.step + 1, state.seconds + 1.0
        table = EmbeddingTable(run / "stage-0/embed", self.index)
        table.rows(0, len(table), "image")
        table.take(np.arange(len(table)), "text")
        read_losses(run / "stage-0/embed", self.index)
        load_tensors(run / "stage-0/cluster/centroids.safetensors", "image")
        read_json(run / "stage-0/train" / DONE)
        with lock(run):
            pass


def _part(rows: int) -> dict[str, torch.Tensor]:
    features, norms, ids = torch.ones(rows, 4).half(), torch.ones(rows), torch.arange(rows)
    sides = {"image": features, "text": features.clone(), "image_norm": norms, "text_norm": norms.clone()}
    return {**sides, "image_id": ids, "text_id": ids.clone(), "ok": torch.ones(rows, dtype=torch.bool)}


def changed_safetensors(case: Case, data: bytes) -> bytes:
    """Weights or features with a damaged header, other shapes or types, missing or further tensors."""
    if case.chance(0.4):
        return changed_bytes(case, data)
    length = int.from_bytes(data[:8], "little")
    if case.chance(0.5):
        header = changed_json(case, data[8 : 8 + length].decode())
        size = len(header) if case.chance(0.9) else case.random.choice((0, 2**63, 2**32, len(header) + 1))
        return size.to_bytes(8, "little") + header + data[8 + length :]
    tensors = parse_safetensors(data)
    name, kind = case.random.choice(list(tensors)), case.random.randrange(6)
    if kind == 0:
        del tensors[name]
    elif kind == 1:
        tensors[str(hostile_value(case)).replace("\ud800", "")] = torch.zeros(2)
    elif kind == 2:
        tensors[name] = tensors[name].flatten()[: case.random.randrange(3)].clone()
    elif kind == 3:
        tensors[name] = tensors[name].to(case.random.choice((torch.float64, torch.int8, torch.bfloat16, torch.bool)))
    elif kind == 4:
        tensors[name] = tensors[name][None].repeat(2, *[1] * tensors[name].dim())
    elif tensors[name].is_floating_point():
        tensors[name] = torch.full_like(tensors[name], case.random.choice((float("nan"), float("inf"), 0.0)))
    return make_safetensors(tensors)


# --- model folders ---------------------------------------------------------------------------------------------------

REMOTE_CODE = "open({canary!r}, 'w')\nclass Tokenizer:\n    pass\n"


class Models:
    """Model folders: settings, weights, tokenizers that bring code, weights as pickles or compressed archives.

    The second stage of a multistage model holds only what differs from the first.
    """

    def __init__(self, folder: Path) -> None:
        tower, second = (create_clip(model_cfg=MODEL, seed=seed) for seed in range(2))
        self.folder = folder / "multistage"
        model = MultistageCLIP(
            [tower.model, second.model],
            logit_scale=1.0,
            preprocess_cfg=tower.preprocess_cfg,
            model_cfgs=[tower.model_cfg, second.model_cfg],
        )
        model.save(self.folder, compact=True)
        save_clip(tower, self.folder / "stage_0")
        torch.save(tower.model.state_dict(), self.folder / "weights.pt")
        self.weights = ("stage_0/open_clip_model.safetensors", "stage_1/difference.safetensors")
        self.settings = ("mcl_clip_config.json", "stage_0/open_clip_config.json", "stage_1/open_clip_config.json")

    def run(self, case: Case) -> str:
        for name in (*self.settings, *self.weights):
            target = case.folder / name
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(self.folder / name, target)
        if not case.is_sound:
            self._change(case)
        if case.chance(0.4):
            (chosen,) = find_models(str(case.folder))
            chosen.load()
        else:
            load_clip(case.folder / "stage_0")
        return "accepted"

    def _change(self, case: Case) -> None:
        kind, stage = case.random.randrange(10), case.folder / "stage_0"
        if kind < 4:
            path = case.folder / self.settings[case.random.choice((0, 1, 1, 2))]
            path.write_bytes(changed_json(case, path.read_text()))
        elif kind < 6:
            path = case.folder / case.random.choice(self.weights)
            path.write_bytes(changed_safetensors(case, path.read_bytes()))
        elif kind < 8:
            self._other_weights(case, stage)
        else:
            _bring_code(case, stage)
        for name in ("model.pkl", "weights.pt", "optimizer.bin", "setup.py", "vocab.pth"):
            if case.chance(0.2):
                case.write(f"stage_0/{name}", case.hostile_file())

    def _other_weights(self, case: Case, stage: Path) -> None:
        (stage / "open_clip_model.safetensors").unlink()
        name = case.random.choice(
            ("open_clip_pytorch_model.bin", "pytorch_model.bin", "model.pth", "x.pt", "x.npz", "y.ckpt")
        )
        data = (self.folder / "weights.pt").read_bytes()
        kind = case.random.randrange(4)
        if kind == 0:
            data = case.hostile_file()
        elif kind == 1:
            data = changed_bytes(case, data)
        elif kind == 2:
            packed = io.BytesIO()
            with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
                for entry in old.infolist():
                    new.writestr(entry.filename, old.read(entry))
            data = packed.getvalue()
        case.write(f"stage_0/{name}", data)


def _bring_code(case: Case, stage: Path) -> None:
    """A tokenizer or a text tower that comes with code, and settings that ask for it."""
    config = json.loads((stage / "open_clip_config.json").read_text())
    text = config["model_cfg"]["text_cfg"]
    code = REMOTE_CODE.format(canary=str(case.canary))
    auto_map = {
        "AutoTokenizer": ["code.Tokenizer", None],
        "AutoConfig": "code.Tokenizer",
        "AutoModel": "code.Tokenizer",
    }
    if case.chance(0.7):
        text["hf_tokenizer_name"] = case.random.choice((str(stage), "x/y", "."))
        text["tokenizer_kwargs"] = case.random.choice(
            ({"trust_remote_code": True}, {}, {"code_revision": "x"}, {"clean": 3})
        )
    if case.chance(0.4):
        text["hf_model_name"] = str(stage)
        config["model_cfg"]["custom_text"] = True
    if case.chance(0.3):
        config["model_cfg"]["vision_cfg"]["timm_model_name"] = case.random.choice(
            (f"local-dir:{stage}", "hf-hub:x/y", "vit_x")
        )
    for name in ("tokenizer_config.json", "config.json"):
        if case.chance(0.7):
            content = {
                "auto_map": auto_map,
                "model_type": case.random.choice(("bert", "unknown")),
                "tokenizer_class": "T",
            }
            case.write(f"stage_0/{name}", json.dumps(content).encode())
    case.write("stage_0/code.py", code.encode())
    case.write("stage_0/tokenizer.json", case.hostile_file())
    (stage / "open_clip_config.json").write_text(json.dumps(config))


# --- running ---------------------------------------------------------------------------------------------------------

AREAS: dict[str, tuple[type, float]] = {  # with their share of the cases: a model takes a hundred times a shard's time
    "shards": (Shards, 0.35),
    "images": (Images, 0.25),
    "captions": (Captions, 0.13),
    "index": (Indexes, 0.1),
    "labels": (Labels, 0.07),
    "run": (Runs, 0.07),
    "model": (Models, 0.03),
}


@dataclass
class Finding:
    """What went wrong in a case; `folder` keeps its files."""

    area: str
    number: int
    kind: str
    detail: str
    folder: Path


@dataclass
class Report:
    """The outcomes of the cases of an area."""

    area: str
    counts: Counter[str]
    findings: list[Finding]
    seconds: float

    def line(self) -> str:
        names = {"crash": "crashes", "hang": "hangs", "executed": "executed_payloads", "lost": "uncounted_losses"}
        names |= {"unsound": "sound_but_refused"}
        kinds = Counter(finding.kind for finding in self.findings)
        return json.dumps(
            {
                "area": self.area,
                "cases": sum(self.counts.values()) + len(self.findings),
                **{outcome: self.counts[outcome] for outcome in OUTCOMES},
                **{name: kinds[kind] for kind, name in names.items()},
                "seconds": round(self.seconds, 1),
            }
        )


def run_case(area: Any, case: Case) -> tuple[str, str]:
    """(outcome or kind of finding, what happened)."""
    try:
        outcome, detail = area.run(case), ""
    except BadSampleError as error:
        outcome, detail = "bad", str(error)
    except (UserError, OSError) as error:  # run_program makes one sentence of both
        outcome, detail = "refused", str(error)
    except LostError as error:
        outcome, detail = "lost", str(error)
    except BaseException:
        outcome, detail = "crash", traceback.format_exc()
    if case.canary.exists():
        case.canary.unlink()
        return "executed", detail
    if case.is_sound and outcome in ("bad", "refused"):
        return "unsound", detail
    return outcome, detail


def _child(area: Any, numbers: Sequence[int], seed: int, folder: Path, send: int) -> None:
    """Run cases and report each at its start and at its end."""
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + MEMORY_BYTES,) * 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # nobody is asked anything
    canary = folder / "EXECUTED"
    name = type(area).__name__
    for number in numbers:
        case = Case(number, random.Random(f"{seed}:{name}:{number}"), folder / "case", canary)
        shutil.rmtree(case.folder, ignore_errors=True)
        case.folder.mkdir()
        os.write(send, json.dumps([number, "started", ""]).encode() + b"\n")
        outcome, detail = run_case(area, case)
        os.write(send, json.dumps([number, outcome, detail[-2000:]]).encode() + b"\n")
        if outcome in FINDINGS:
            return  # the parent keeps the files, and goes on in another process


def fuzz_area(
    name: str, numbers: Sequence[int], *, seed: int, keep: Path, bar: Any = None, hang_s: float = HANG_S
) -> Report:
    """The outcomes of cases of one area; the files of findings are put into `keep`."""
    counts: Counter[str] = Counter()
    findings: list[Finding] = []
    started = time.perf_counter()
    root = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=root, prefix="fuzz-") as temporary:
        (Path(temporary) / "good").mkdir()
        area = AREAS[name][0](Path(temporary) / "good")
        todo = list(numbers)
        while todo:
            batch = todo[:CASES_A_PROCESS]
            done = 0
            for number, outcome, detail in _watch(area, batch, seed, Path(temporary), hang_s):
                done += 1
                if outcome in FINDINGS:
                    findings.append(_keep(name, number, outcome, detail, seed, Path(temporary) / "case", keep))
                else:
                    counts[outcome] += 1
                if bar is not None:
                    bar.update()
            todo = todo[done:]
    return Report(name, counts, findings, time.perf_counter() - started)


class _Watch:
    """Whether a silent process is at work, or waits, for too long. One that gets no processor time is neither."""

    def __init__(self, pid: int, hang_s: float) -> None:
        self.pid, self.hang_s, self.waiting_s, self.is_over = pid, hang_s, 0.0, False
        self.ticks = self._look()[1]

    def is_hanging(self) -> bool:
        """Ask every `POLL_S`."""
        is_running, ticks = self._look()
        self.waiting_s = 0.0 if is_running else self.waiting_s + POLL_S
        self.is_over = max(self.waiting_s, (ticks - self.ticks) / os.sysconf("SC_CLK_TCK")) > self.hang_s
        return self.is_over

    def _look(self) -> tuple[bool, int]:
        states, ticks = [], 0
        for path in Path(f"/proc/{self.pid}/task").glob("*/stat"):
            try:
                fields = path.read_text().rsplit(")", 1)[1].split()
            except OSError:  # a thread that has just ended
                continue
            states.append(fields[0])
            ticks += int(fields[11]) + int(fields[12])
        return "R" in states, ticks


def _watch(area: Any, numbers: Sequence[int], seed: int, folder: Path, hang_s: float) -> list[tuple[int, str, str]]:
    """What a forked process says of its cases; of one that hangs or dies, what became of it."""
    receive, send = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    if (pid := os.fork()) == 0:
        try:
            os.close(receive)
            _child(area, numbers, seed, folder, send)
        finally:
            os._exit(0)
    os.close(send)
    said: list[tuple[int, str, str]] = []
    current, buffer, watch = -1, b"", _Watch(pid, hang_s)
    while True:
        if not select.select([receive], [], [], POLL_S)[0]:
            if watch.is_hanging():
                os.kill(pid, signal.SIGKILL)
                break
            continue
        watch = _Watch(pid, hang_s)
        data = os.read(receive, 1 << 16)
        if not data:
            break
        *lines, buffer = (buffer + data).split(b"\n")
        for line in lines:
            number, outcome, detail = json.loads(line)
            current = number if outcome == "started" else -1
            if outcome != "started":
                said.append((number, outcome, detail))
    os.close(receive)
    status = os.waitpid(pid, 0)[1]
    if current >= 0:
        detail = f"over {hang_s} s" if watch.is_over else f"the process died with status {status}"
        said.append((current, "hang" if watch.is_over else "crash", detail))
    if not said:
        raise RuntimeError(f"no case ran: status {status}")
    return said


def _keep(area: str, number: int, kind: str, detail: str, seed: int, files: Path, keep: Path) -> Finding:
    folder = keep / f"{area}-{number}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if files.exists():
        shutil.copytree(
            files, folder / "files", symlinks=True, ignore=lambda _, names: [n for n in names if n == "pipe.tar"]
        )
    again = f"python -m tests.faults.fuzz --seed {seed} --only {area}:{number}"
    (folder / "finding.txt").write_text(f"{kind} in case {number} of {area}\n{again}\n\n{detail}\n")
    return Finding(area, number, kind, detail, folder)


def shares(cases: int, areas: Sequence[str]) -> dict[str, int]:
    """How many of the cases each area gets, at least one."""
    total = sum(AREAS[name][1] for name in areas)
    counts = {name: max(1, round(cases * AREAS[name][1] / total)) for name in areas}
    counts[areas[0]] = max(1, counts[areas[0]] + cases - sum(counts.values()))
    return counts


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--area", nargs="+", choices=list(AREAS), default=list(AREAS))
    parser.add_argument("--only", metavar="AREA:NUMBER", help="repeat one case")
    parser.add_argument("--keep", type=Path, default=Path(tempfile.gettempdir()) / "mcl_clip-fuzz", help="for findings")
    options = parser.parse_args(arguments)
    quiet()
    if options.only:
        name, _, number = options.only.partition(":")
        todo = {name: range(int(number), int(number) + 1)}
    else:
        todo = {name: range(count) for name, count in shares(options.cases, options.area).items()}
    reports = []
    with tqdm(total=sum(map(len, todo.values())), unit="case") as bar:
        for name, numbers in todo.items():
            bar.set_description(name)
            reports.append(fuzz_area(name, numbers, seed=options.seed, keep=options.keep, bar=bar))
    findings = [finding for report in reports for finding in report.findings]
    for finding in findings:
        sys.stderr.write(
            f"{finding.kind} in {finding.area}:{finding.number}, kept in {finding.folder}\n{finding.detail}\n"
        )
    for report in reports:
        sys.stdout.write(f"{report.line()}\n")
    return int(bool(findings))


def quiet() -> None:
    """What libraries say of broken files is not what is looked at here."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)


if __name__ == "__main__":
    sys.exit(main())
