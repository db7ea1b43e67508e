"""What one machine has: versions, GPUs, shared memory, limits, and what started this process here."""

from __future__ import annotations

import math
import os
import platform
import re
import resource
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from launch.doctor.findings import Finding, MustMatch
from training.base.durations import format_duration
from training.base.environment import Launcher, Ranks, gpus_of_node, job_id, time_left
from training.engine.precision import PrecisionName, choose_precision

REQUIREMENTS = Path(__file__).parents[2] / "requirements.txt"

# A context of CUDA and its libraries take some hundreds of MB of a GPU that is otherwise empty.
_GPU_IN_USE_BYTES = 1e9

_SHARED_MEMORY_BYTES = 1e9
_OPEN_FILES = 1024
_LITTLE_TIME_S = 180


def versions(requirements: Path = REQUIREMENTS) -> Iterator[Finding | MustMatch]:
    """What is installed, against what requirements.txt pins."""
    build: dict[str, str] = {"torch": torch.__version__}
    if torch.version.cuda is not None:
        build["CUDA"] = torch.version.cuda
        if torch.distributed.is_nccl_available():
            build["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    same = "give all nodes the same environment"
    yield MustMatch("versions", "Python", platform.python_version(), "warning", same)
    for name, found in build.items():
        yield MustMatch("versions", name, found, "error", f"the ranks must run the same libraries: {same}")
    pinned, others = 0, 0
    for line in requirements.read_text(encoding="utf-8").splitlines():
        name, _, wanted = line.partition("==")
        if not wanted or line.startswith("#"):
            continue
        pinned += 1
        try:
            installed = version(name)
        except PackageNotFoundError:
            others += 1
            yield Finding("error", "versions", f"{name} is not installed: pip install {name}=={wanted}")
            continue
        yield MustMatch("versions", name, installed, "warning", same)
        if installed.split("+")[0] != wanted:  # a plus is followed by the CUDA that it was built for
            others += 1
            text = f"{name} {installed} is installed, {wanted} was tested: pip install {name}=={wanted}"
            yield Finding("warning", "versions", text)
    words = ", ".join(f"{name} {found}" for name, found in {"Python": platform.python_version(), **build}.items())
    yield Finding("ok", "versions", f"{words}; {pinned - others} of {pinned} packages as in {requirements.name}")


def gpus(ranks: Ranks) -> Iterator[Finding]:
    """Whether torch sees the GPUs of this node, and the ranks use them all."""
    if not torch.cuda.is_available():
        if Path("/dev/nvidia0").exists():
            build = f"was built for CUDA {torch.version.cuda}" if torch.version.cuda else "was built for CPUs only"
            text = f"there are GPUs, but torch ({build}) sees none: look at nvidia-smi and CUDA_VISIBLE_DEVICES"
            yield Finding("warning", "GPUs", text)
        else:
            yield Finding("ok", "GPUs", "none: everything runs on the CPU")
        return
    present = max(torch.cuda.device_count(), gpus_of_node() or 0)
    used = f"{ranks.local_world_size} of {present} GPUs of the node in use"
    if ranks.local_world_size < present:
        yield Finding("warning", "GPUs", f"{used}: torchrun --nproc-per-node={present} (or as many tasks) uses all")
    else:
        yield Finding("ok", "GPUs", used)


def gpu(device: torch.device) -> Iterator[Finding | MustMatch]:
    """This rank's own GPU: what it is, whether torch can use it, and whether it is free."""
    if device.type != "cuda":
        return
    about = torch.cuda.get_device_properties(device)
    driver = _driver()
    text = f"{about.name}, sm_{about.major}{about.minor}, {about.total_memory / 1e9:.1f} GB, driver {driver}"
    yield Finding("ok", "GPU", text)
    advice = "the slowest sets the pace of all; ask for one type (SLURM: --gres=gpu:TYPE:N, or --constraint)"
    yield MustMatch("GPU", "type", about.name, "warning", advice)
    yield MustMatch("GPU", "driver", driver, "warning", "ask for nodes with the same one if NCCL fails")
    built_for = torch.cuda.get_arch_list()
    if not has_kernels((about.major, about.minor), built_for):
        text = (
            f"{about.name} is sm_{about.major}{about.minor}, and torch {torch.__version__} has kernels for "
            f"{', '.join(built_for)} only: choose another GPU, or a torch that was built for this one"
        )
        yield Finding("error", "GPU", text)
        return
    free, total = torch.cuda.mem_get_info(device)
    taken = total - free - torch.cuda.memory_reserved(device)
    if taken > _GPU_IN_USE_BYTES:
        text = f"{taken / 1e9:.1f} GB of it are in use by other processes: end them (nvidia-smi names them), or wait"
        yield Finding("warning", "GPU", text)


def has_kernels(capability: tuple[int, int], built_for: Sequence[str]) -> bool:
    """Whether a build for `built_for` (as `torch.cuda.get_arch_list` says: sm_75, compute_90) runs on this capability.

    sm_XY is machine code, which newer GPUs of the same major version run too; with a letter behind it only X.Y itself
    does. compute_XY is translated for every newer GPU.
    """
    for name in built_for:
        parts = re.fullmatch(r"(sm|compute)_(\d+)(\d)([a-z]?)", name)
        if parts is None:
            continue
        built = int(parts[2]), int(parts[3])
        of_this_kind = parts[1] == "compute" or built[0] == capability[0]
        if built == capability or (of_this_kind and built < capability and not parts[4]):
            return True
    return False


def _driver() -> str:
    try:
        about = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return "unknown"
    found = re.search(r"\s(\d+(?:\.\d+)+)\s", about)
    return found[1] if found else "unknown"


def precision(wanted: PrecisionName, device: torch.device) -> Iterator[Finding]:
    """The number format that a run will choose here."""
    chosen = choose_precision(wanted, device)
    yield Finding("ok", "precision", f"{chosen.name}: {chosen.reason}")


def limits(shared_memory: Path = Path("/dev/shm")) -> Iterator[Finding]:
    """Shared memory and open files."""
    if shared_memory.is_dir():
        disk = os.statvfs(shared_memory)
        size = disk.f_blocks * disk.f_frsize
        if size < _SHARED_MEMORY_BYTES:
            text = f"only {size / 1e6:,.0f} MB at {shared_memory}, which NCCL may need: docker run --shm-size=8g"
            yield Finding("warning", "shared memory", f"{text} (or --ipc=host)")
        else:
            yield Finding("ok", "shared memory", f"{size / 1e9:.1f} GB at {shared_memory}")
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= files < _OPEN_FILES:
        text = f"only {files} files may be open at a time: ulimit -n 4096 before the start"
        yield Finding("warning", "open files", text)
    else:
        yield Finding("ok", "open files", f"at most {files:,} at a time" if files >= 0 else "any number at a time")


def surroundings(ranks: Ranks, launcher: Launcher | None) -> Iterator[Finding]:
    """What started the ranks, and how much time they have."""
    if launcher is not None:
        starter = launcher.name
    elif ranks.world_size > 1:
        starter = "a launcher that sets RANK and WORLD_SIZE" if ranks.launched else "srun"
    else:
        starter = "no launcher, as a plain process"
    job = f", in SLURM's job {job_id()}" if job_id() is not None else ""
    yield Finding("ok", "launcher", f"started by {starter}{job}")
    left = time_left()
    if left is None or left[0] == math.inf:
        yield Finding("ok", "time limit", left[1] if left is not None else "none is known")
    elif left[0] < _LITTLE_TIME_S:
        text = f"only {format_duration(left[0])} are left ({left[1]}): a run will hardly begin; ask for more"
        yield Finding("warning", "time limit", text)
    else:
        yield Finding("ok", "time limit", f"{format_duration(left[0])} are left ({left[1]})")
