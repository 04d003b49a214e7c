"""Checks of the installed packages, the devices, memory and disk space."""

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
from mcl_clip.tools.estimates import StageEstimate, estimate_memory
from mcl_clip.tools.findings import Finding, as_bytes

SHOWN_PACKAGES = ("torch", "open_clip_torch", "accelerate", "webdataset", "huggingface_hub", "transformers", "numpy")
MAX_PARAMETERS_ON_CPU = 50_000_000
FOLDER_CONTENTS = {
    "train": "checkpoints and models",
    "embed": "embeddings",
    "cluster": "clusters",
    "combined": "combined model",
}


@dataclass(frozen=True, kw_only=True)
class BadCombination:
    """Packages that do not work together, each from a version on."""

    packages: Mapping[str, str]
    text: str


BAD_COMBINATIONS = (
    BadCombination(
        packages={"open_clip_torch": "3", "huggingface_hub": "2"},
        text="the run is not affected, but open_clip.push_to_hf_hub creates a repository and then fails, which leaves "
        "it empty; use `hf upload` for the folder of a model",
    ),
)


def installed_versions(requirements: Iterable[str]) -> dict[str, str]:
    """Return the installed version of each required package; empty if it is missing."""
    versions = {}
    for name in (Requirement(requirement).name for requirement in requirements):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = ""
    return versions


def own_requirements() -> list[str]:
    """List the requirements of mcl_clip, without optional ones."""
    return [requirement for requirement in requires("mcl_clip") or [] if "extra ==" not in requirement]


def check_versions(installed: Mapping[str, str], requirements: Iterable[str]) -> Iterator[Finding]:
    """Report packages that are missing, too old or too new, and combinations that are known to fail."""
    shown = ", ".join(f"{name} {installed[name]}" for name in SHOWN_PACKAGES if installed.get(name))
    yield Finding("ok", "packages", shown)
    for text in requirements:
        requirement = Requirement(text)
        name = requirement.name
        if not installed.get(name):
            yield Finding("FAIL", "packages", f"{name} is not installed; pip install '{text}'")
        elif not requirement.specifier.contains(installed[name], prereleases=True):
            problem = f"{name} {installed[name]} does not meet {text}"
            yield Finding("FAIL", "packages", f"{problem}; pip install '{text}'")
    for bad in BAD_COMBINATIONS:
        if all(Version(installed.get(name) or "0") >= Version(least) for name, least in bad.packages.items()):
            names = " with ".join(f"{name} {installed[name]}" for name in bad.packages)
            yield Finding("warning", "packages", f"{names}: {bad.text}")


class Gpu(NamedTuple):
    """A GPU: its name, its memory in bytes, and whether it computes in bfloat16 natively."""

    name: str
    memory: int
    has_bf16: bool


def find_gpus() -> list[Gpu]:
    """List the GPUs that torch sees."""
    devices = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    is_rocm = torch.version.hip is not None
    return [Gpu(device.name, device.total_memory, is_rocm or device.major >= 8) for device in devices]


def machines_for(processes: int, gpus: Sequence[Gpu]) -> int:
    """Count the machines like this one that `processes` need, with one process per GPU."""
    return -(-processes // len(gpus)) if gpus else 1


def check_devices(
    gpus: Sequence[Gpu], *, cores: int, processes: int, workers: int, precisions: Iterable[str], trained: int
) -> Iterator[Finding]:
    """Compare the GPUs and processor cores with what a run needs; `trained` counts trainable parameters."""
    machines = machines_for(processes, gpus)
    names = ", ".join(f"{count} x {name}" for name, count in Counter(gpu.name for gpu in gpus).items())
    memory = f" ({as_bytes(min(gpu.memory for gpu in gpus))} each)" if gpus else ""
    cores_text = f"{cores} processor core{'s' * (cores != 1)}"
    jobs = f"{processes} process{'es' * (processes != 1)}"
    jobs += f" on {machines} machines like this" if machines > 1 else ""
    yield Finding("ok", "devices", f"{cores_text}, {names or 'no GPU'}{memory}; {jobs}")
    if "bf16" in precisions and (slow := [gpu.name for gpu in gpus if not gpu.has_bf16]):
        text = f"{slow[0]} has no native bfloat16: bf16 is slow; use --stages.K.train.precision fp32"
        yield Finding("warning", "devices", text)
    if not gpus and trained > MAX_PARAMETERS_ON_CPU:
        yield Finding("warning", "devices", f"no GPU for {trained / 1e6:.0f}M parameters: steps are very slow")
    local = processes // machines
    if workers * local > cores:
        text = f"{workers * local} loader workers share {cores} cores; use --machine.workers {cores // local}"
        yield Finding("warning", "devices", text)


def check_memory(
    stages: Sequence[StageEstimate], *, processes: int, memory: int, device: str, host_memory: int, loader_batches: int
) -> Iterator[Finding]:
    """Compare the memory of the largest stage with that of a device, and prefetched batches with that of the host.

    Args:
        stages: all stages.
        processes: training processes.
        memory: bytes of device memory per process.
        device: name of this memory in the text.
        host_memory: free bytes of this machine.
        loader_batches: batches that the loaders of this machine prefetch.
    """
    if all(stage.tower is None for stage in stages):
        text = "the size of the model is unknown: neither memory nor checkpoints are counted"
        yield Finding("warning", "memory", text)
    estimates = [estimate_memory(stage, processes) for stage in stages]
    number = max(range(len(stages)), key=lambda number: sum(estimates[number].values()))
    stage, parts = stages[number], estimates[number]
    if not parts:
        return
    total, fixed = sum(parts.values()), parts["weights, gradients and Adam"]
    text = (
        f"stage {number} takes about {as_bytes(total)} of {as_bytes(memory)} {device} per process (rough): "
        f"{', '.join(f'{name} {as_bytes(size)}' if size else f'{name} unknown' for name, size in parts.items())}"
    )
    if fixed > memory:
        yield Finding("FAIL", "memory", f"{text}; the model alone does not fit, use a smaller one")
    elif total > 0.9 * memory:
        ways = "smaller batches, more processes, bf16, or --stages.K.train.grad-checkpointing"
        yield Finding("warning", "memory", f"{text}; it may not fit: use {ways}")
    else:
        yield Finding("ok", "memory", text)
    queued = loader_batches * (stage.global_batch_size // processes) * (stage.tower.pixels if stage.tower else 0)
    if queued > host_memory / 2:
        text = f"prefetched batches take up to {as_bytes(queued)} of {as_bytes(host_memory)}"
        way_out = "use fewer --machine.workers or --machine.prefetch-batches"
        yield Finding("warning", "memory", f"{text}; {way_out}")


def free_memory() -> int:
    """Return the free memory of this machine in bytes, within the limit of the control group."""
    text = Path("/proc/meminfo").read_text() if Path("/proc/meminfo").exists() else ""
    match = re.search(r"MemAvailable:\s+(\d+) kB", text)
    free = int(match[1]) << 10 if match else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    path = Path("/sys/fs/cgroup/memory.max")
    limit = path.read_text().strip() if path.exists() else ""
    return min(free, int(limit)) if limit.isdigit() else free


def check_disk(run_dir: Path, sizes: Mapping[str, int]) -> Iterator[Finding]:
    """Compare the free disk space with what the phases of a run still have to write.

    Args:
        run_dir: the run directory, which need not exist.
        sizes: final bytes of each folder in it.
    """
    parent = next(path for path in (run_dir.absolute(), *run_dir.absolute().parents) if path.exists())
    if not parent.is_dir():
        yield Finding("FAIL", "disk", f"{parent} is a file; choose another --run-dir")
        return
    if not os.access(parent, os.W_OK | os.X_OK):
        text = f"{parent} is not writable; change its permissions, or choose another --run-dir"
        yield Finding("FAIL", "disk", text)
    missing: Counter[str] = Counter()
    for name, size in sizes.items():
        folder = run_dir / name
        if not (folder / DONE).exists():
            written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0
            kind = name.rpartition("/")[2]
            missing[FOLDER_CONTENTS.get(kind, kind)] += max(0, size - written)
    total, free = missing.total(), shutil.disk_usage(parent).free
    parts = ", ".join(f"{kind} {as_bytes(size)}" for kind, size in missing.most_common() if size)
    text = f"{run_dir} needs " + (f"about {as_bytes(total)} more ({parts})" if total else "no more")
    text += f", {as_bytes(free)} are free"
    way_out = "free some space, keep fewer --machine.keep-checkpoints, or choose a --run-dir on another disk"
    if total > free:
        yield Finding("FAIL", "disk", f"{text}; {way_out}")
    elif total > 0.8 * free:
        yield Finding("warning", "disk", f"{text}: little is left; {way_out}")
    else:
        yield Finding("ok", "disk", text)
