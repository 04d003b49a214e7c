"""Packages, devices, memory and disk."""

import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import NamedTuple

import torch
from packaging.requirements import Requirement
from packaging.version import Version

from mcl_clip.core.files import DONE
from mcl_clip.tools.doctor.findings import Finding, as_bytes
from mcl_clip.tools.doctor.needs import StageEstimate, memory_needs

SHOWN_PACKAGES = ("torch", "open_clip_torch", "accelerate", "webdataset", "huggingface_hub", "transformers", "numpy")
MANY_PARAMETERS = 50_000_000
NAMES_ON_DISK = {
    "train": "checkpoints and models",
    "embed": "embeddings",
    "cluster": "clusters",
    "combined": "combined model",
}


@dataclass(frozen=True, kw_only=True)
class BadCombination:
    """Packages that do not work together: each from a version on."""

    packages: Mapping[str, str]
    text: str


BAD_COMBINATIONS = (
    BadCombination(
        packages={"open_clip_torch": "3", "huggingface_hub": "2"},
        text="the run is not affected, but open_clip.push_to_hf_hub makes a repository and then fails, so it stays "
        "empty; use `hf upload` for a model's folder",
    ),
)


def installed_versions(requirements: Iterable[str]) -> dict[str, str]:
    """Versions of the packages in a list of requirements; empty for one that is not there."""
    found = {}
    for name in (Requirement(requirement).name for requirement in requirements):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = ""
    return found


def own_requirements() -> list[str]:
    """What mcl_clip needs, without what is optional."""
    return [requirement for requirement in requires("mcl_clip") or [] if "extra ==" not in requirement]


def check_versions(installed: Mapping[str, str], requirements: Iterable[str]) -> Iterator[Finding]:
    """Packages that are missing, too old or too new, and combinations that are known not to work."""
    shown = ", ".join(f"{name} {installed[name]}" for name in SHOWN_PACKAGES if installed.get(name))
    yield Finding("ok", "packages", shown)
    for requirement in requirements:
        wanted = Requirement(requirement)
        name = wanted.name
        if not installed.get(name):
            yield Finding("FAIL", "packages", f"{name} is not installed; pip install '{requirement}'")
        elif not wanted.specifier.contains(installed[name], prereleases=True):
            wrong = f"{name} {installed[name]} does not meet {requirement}; pip install '{requirement}'"
            yield Finding("FAIL", "packages", wrong)
    for bad in BAD_COMBINATIONS:
        if all(Version(installed.get(name) or "0") >= Version(least) for name, least in bad.packages.items()):
            named = " with ".join(f"{name} {installed[name]}" for name in bad.packages)
            yield Finding("warning", "packages", f"{named}: {bad.text}")


class Gpu(NamedTuple):
    """A GPU: its name, its memory in bytes, and whether it computes in bfloat16 itself."""

    name: str
    memory: int
    has_bf16: bool


def find_gpus() -> list[Gpu]:
    """The GPUs that torch sees."""
    found = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    is_rocm = torch.version.hip is not None
    return [Gpu(device.name, device.total_memory, is_rocm or device.major >= 8) for device in found]


def machines_for(processes: int, gpus: Sequence[Gpu]) -> int:
    """How many machines like this one take so many processes, one on each GPU."""
    return -(-processes // len(gpus)) if gpus else 1


def check_devices(
    gpus: Sequence[Gpu], *, cores: int, processes: int, workers: int, precisions: Iterable[str], trained: int
) -> Iterator[Finding]:
    """GPUs and cores against what a run asks of them; `trained` is the number of parameters that train."""
    named = ", ".join(f"{count} x {name}" for name, count in Counter(gpu.name for gpu in gpus).items())
    memory = f" ({as_bytes(min(gpu.memory for gpu in gpus))} each)" if gpus else ""
    cores_text = f"{cores} processor core{'s' * (cores != 1)}"
    machines = f" on {machines_for(processes, gpus)} machines like this" if machines_for(processes, gpus) > 1 else ""
    jobs = f"{processes} process{'es' * (processes != 1)}{machines}"
    yield Finding("ok", "devices", f"{cores_text}, {named or 'no GPU'}{memory}; {jobs}")
    wants_bf16 = "bf16" in precisions
    if wants_bf16 and any(not gpu.has_bf16 for gpu in gpus):
        slow = next(gpu.name for gpu in gpus if not gpu.has_bf16)
        yield Finding(
            "warning",
            "devices",
            f"{slow} has no bfloat16 of its own: bf16 is slow; use --stages.K.train.precision fp32",
        )
    if not gpus and trained > MANY_PARAMETERS:
        yield Finding("warning", "devices", f"no GPU for {trained / 1e6:.0f}M parameters: a step takes very long")
    here = processes // machines_for(processes, gpus)
    if workers * here > cores:
        yield Finding(
            "warning",
            "devices",
            f"{workers * here} loader workers share {cores} cores; use --machine.workers {cores // here}",
        )


def check_memory(
    stages: Sequence[StageEstimate], *, processes: int, memory: int, device: str, host_memory: int, loader_batches: int
) -> Iterator[Finding]:
    """Memory of the greediest stage against that of a device, and of the batches that loaders keep ready.

    Args:
        stages: what trains.
        processes: training processes.
        memory: bytes of the device for one process.
        device: what to call it.
        host_memory: bytes of this machine that are free.
        loader_batches: batches of this machine's processes that loaders keep ready.
    """
    needs = {number: memory_needs(stage, processes) for number, stage in enumerate(stages)}
    number = max(needs, key=lambda number: sum(needs[number].values()))
    parts = needs[number]
    if all(stage.tower is None for stage in stages):
        text = "the size of the tower is not known: neither memory nor checkpoints are counted"
        yield Finding("warning", "memory", text)
    if not parts:
        return
    total, fixed = sum(parts.values()), parts["weights, gradients and Adam"]
    text = (
        f"stage {number} takes about {as_bytes(total)} of {as_bytes(memory)} {device} for a process (rough): "
        f"{', '.join(f'{name} {as_bytes(size)}' if size else f'{name} not known' for name, size in parts.items())}"
    )
    if fixed > memory:
        yield Finding("FAIL", "memory", f"{text}; the tower alone does not fit, use a smaller one")
    elif total > 0.9 * memory:
        ways = "smaller batches, more processes, bf16, or --stages.K.train.grad-checkpointing"
        yield Finding("warning", "memory", f"{text}; it may not fit: use {ways}")
    else:
        yield Finding("ok", "memory", text)
    tower, stage = stages[number].tower, stages[number]
    queued = loader_batches * (stage.global_batch_size // processes) * (tower.pixels if tower else 0)
    if queued > host_memory / 2:
        end = "use fewer --machine.workers or --machine.prefetch-batches"
        text = f"batches that loaders keep ready take up to {as_bytes(queued)} of {as_bytes(host_memory)}"
        yield Finding("warning", "memory", f"{text}; {end}")


def free_memory() -> int:
    """Bytes of this machine's memory that are free, as far as its limits let this process have them."""
    text = Path("/proc/meminfo").read_text() if Path("/proc/meminfo").exists() else ""
    found = re.search(r"MemAvailable:\s+(\d+) kB", text)
    free = int(found[1]) << 10 if found else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    most = limit.read_text().strip() if limit.exists() else ""
    return min(free, int(most)) if most.isdigit() else free


def check_disk(run_dir: Path, needs: Mapping[str, int]) -> Iterator[Finding]:
    """Free space where the run writes, against what its phases need and do not have yet.

    Args:
        run_dir: the run directory, which need not exist.
        needs: bytes of each folder in it.
    """
    parent = next(path for path in (run_dir.absolute(), *run_dir.absolute().parents) if path.exists())
    if not parent.is_dir():
        yield Finding("FAIL", "disk", f"{parent} is a file; choose another --run-dir")
        return
    if not os.access(parent, os.W_OK | os.X_OK):
        yield Finding(
            "FAIL", "disk", f"{parent} may not be written; change its permissions, or choose another --run-dir"
        )
    kinds: Counter[str] = Counter()
    for name, need in needs.items():
        if not (run_dir / name / DONE).exists():
            kinds[name.rpartition("/")[2]] += max(0, need - _folder_bytes(run_dir / name))
    total, free = kinds.total(), shutil.disk_usage(parent).free
    parts = ", ".join(f"{NAMES_ON_DISK.get(kind, kind)} {as_bytes(size)}" for kind, size in kinds.most_common() if size)
    text = f"{run_dir} needs about {as_bytes(total)} more ({parts}), {as_bytes(free)} are free" if total else (
        f"{run_dir} needs no more, {as_bytes(free)} are free"
    )  # fmt: skip
    way_out = "free some space, keep fewer --machine.keep-checkpoints, or choose a --run-dir on another disk"
    if total > free:
        yield Finding("FAIL", "disk", f"{text}; {way_out}")
    elif total > 0.8 * free:
        yield Finding("warning", "disk", f"{text}: little is left; {way_out}")
    else:
        yield Finding("ok", "disk", text)


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0
