"""Findings of the doctor, and its checks of the machine: packages, devices, memory and disk space."""

import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import torch
from packaging.requirements import Requirement
from packaging.version import Version

from mcl_clip.config import MachineConfig, StageConfig
from mcl_clip.core.errors import UserError, explain_os_error, shorten
from mcl_clip.core.files import DONE
from mcl_clip.data.workers import SHARED_MEMORY
from mcl_clip.results.text import format_bytes
from mcl_clip.tools.estimates import TowerSize, estimate_memory

SHOWN_PACKAGES = ("torch", "open_clip_torch", "accelerate", "webdataset", "huggingface_hub", "transformers", "numpy")
MAX_PARAMETERS_ON_CPU = 50_000_000
FOLDER_CONTENTS = {
    "train": "checkpoints and models",
    "embed": "embeddings",
    "cluster": "clusters",
    "combined": "combined model",
}
T = TypeVar("T")


class Finding(NamedTuple):
    """Result of one check of the doctor; `FAIL` means that the job will stop or produce unusable results."""

    level: Literal["ok", "warning", "FAIL"]
    topic: str
    text: str


Check = Generator[Finding, None, T | None]  # for `result = yield from check`; None if it failed


def attempt(topic: str, action: Callable[[], T]) -> Check[T]:
    """Return the result of `action`; yield a `FAIL` finding and return None if it raises an error."""
    try:
        return action()
    except UserError as error:
        yield Finding("FAIL", topic, str(error))
    except OSError as error:
        yield Finding("FAIL", topic, explain_os_error(error))
    except Exception as error:  # libraries raise errors of many types, which would end the job as well
        yield Finding("FAIL", topic, f"{type(error).__name__}: {shorten(error, 300)}")
    return None


def find_versions() -> dict[str, str]:
    """Return the installed version of each requirement of mcl_clip, by requirement; empty if it is missing."""
    versions = {}
    for requirement in requires("mcl_clip") or []:
        if "extra ==" not in requirement:
            try:
                versions[requirement] = version(Requirement(requirement).name)
            except PackageNotFoundError:
                versions[requirement] = ""
    return versions


def check_versions(versions: Mapping[str, str]) -> Iterator[Finding]:
    """Report packages that are missing, too old or too new, and a combination that fails; takes `find_versions()`."""
    installed = {Requirement(text).name: has for text, has in versions.items()}
    shown = ", ".join(f"{name} {installed[name]}" for name in SHOWN_PACKAGES if installed.get(name))
    yield Finding("ok", "packages", shown)
    for text, has in versions.items():
        requirement = Requirement(text)
        if not has or not requirement.specifier.contains(has, prereleases=True):
            problem = f"{requirement.name} {f'{has} does not meet {text}' if has else 'is not installed'}"
            yield Finding("FAIL", "packages", f"{problem}; pip install '{text}'")
    hub, open_clip = (installed.get(name) or "0" for name in ("huggingface_hub", "open_clip_torch"))
    if Version(hub) >= Version("2") and Version(open_clip) >= Version("3"):
        text = (
            f"open_clip_torch {open_clip} with huggingface_hub {hub}: the run is not affected, but "
            f"open_clip.push_to_hf_hub creates a repository and then fails, which leaves it empty; use `hf upload` for "
            f"the folder of a model"
        )
        yield Finding("warning", "packages", text)


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
    text = f"{cores} processor core{'s' * (cores != 1)}, {names or 'no GPU'}"
    text += f" ({format_bytes(min(gpu.memory for gpu in gpus))} each)" if gpus else ""
    text += f"; {processes} process{'es' * (processes != 1)}"
    yield Finding("ok", "devices", text + (f" on {machines} machines like this" if machines > 1 else ""))
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
    stages: Sequence[StageConfig],
    sizes: Sequence[TowerSize | None],
    machine: MachineConfig,
    gpus: Sequence[Gpu],
    *,
    processes: int,
    free: float,
    shared: float,
) -> Iterator[Finding]:
    """Compare the memory of the largest stage with that of a device, and prefetched batches with that of the host.

    `sizes` are those of the models that the stages train; `free` and `shared` count the free bytes of the memory of
    this machine, and of the part of it through which loader processes hand over their batches.
    """
    if all(size is None for size in sizes):
        text = "the size of the model is unknown: neither memory nor checkpoints are counted"
        yield Finding("warning", "memory", text)
    estimates = [estimate_memory(stage.train, size, processes) for stage, size in zip(stages, sizes, strict=True)]
    number = max(range(len(stages)), key=lambda number: sum(estimates[number].values()))
    parts, size = estimates[number], sizes[number]
    if not parts or size is None:
        return
    memory = min(gpu.memory for gpu in gpus) if gpus else int(free) // processes
    total = sum(parts.values())
    text = f"stage {number} takes about {format_bytes(total)} of {format_bytes(memory)} of "
    text += f"{'GPU' if gpus else 'free'} memory per process (rough): "
    text += ", ".join(f"{name} {format_bytes(part) if part else 'unknown'}" for name, part in parts.items())
    if parts["weights, gradients and Adam"] > memory:
        yield Finding("FAIL", "memory", f"{text}; the model alone does not fit, use a smaller one")
    elif total > 0.9 * memory:
        ways = "smaller batches, more processes, bf16, or --stages.K.train.grad-checkpointing"
        yield Finding("warning", "memory", f"{text}; it may not fit: use {ways}")
    else:
        yield Finding("ok", "memory", text)
    loader_batches = processes // machines_for(processes, gpus) * machine.workers * machine.prefetch_batches
    queued = loader_batches * (stages[number].train.global_batch_size // processes) * size.pixels
    text = f"prefetched batches take up to {format_bytes(queued)} of "
    if queued > shared:
        text += f"{format_bytes(int(shared))} of {SHARED_MEMORY}; enlarge it (docker run --shm-size, or --ipc host) or "
        yield Finding("FAIL", "memory", f"{text}use fewer --machine.workers or --machine.prefetch-batches")
    elif queued > free / 2:
        text += f"{format_bytes(int(free))}; use fewer --machine.workers or --machine.prefetch-batches"
        yield Finding("warning", "memory", text)


def free_memory() -> int:
    """Return the free memory of this machine in bytes, within the limit of the control group."""
    text = Path("/proc/meminfo").read_text() if Path("/proc/meminfo").exists() else ""
    match = re.search(r"MemAvailable:\s+(\d+) kB", text)
    free = int(match[1]) << 10 if match else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    path = Path("/sys/fs/cgroup/memory.max")
    limit = path.read_text().strip() if path.exists() else ""
    return min(free, int(limit)) if limit.isdigit() else free


def check_disk(run_dir: Path, sizes: Mapping[str, int]) -> Iterator[Finding]:
    """Compare the free disk space with what a run still has to write; `sizes` are the final bytes of its folders."""
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
            written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            kind = name.rpartition("/")[2]
            missing[FOLDER_CONTENTS.get(kind, kind)] += max(0, size - written)
    total, free = missing.total(), shutil.disk_usage(parent).free
    parts = ", ".join(f"{kind} {format_bytes(size)}" for kind, size in missing.most_common() if size)
    needs = f"about {format_bytes(total)} more ({parts})" if total else "no more"
    text = f"{run_dir} needs {needs}, {format_bytes(int(free))} are free"
    way_out = "free some space, keep fewer --machine.keep-checkpoints, or choose a --run-dir on another disk"
    if total > free:
        yield Finding("FAIL", "disk", f"{text}; {way_out}")
    elif total > 0.8 * free:
        yield Finding("warning", "disk", f"{text}: little is left; {way_out}")
    else:
        yield Finding("ok", "disk", text)
