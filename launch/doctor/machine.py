"""What one machine has: versions and GPUs."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from launch.doctor.findings import Finding
from training.base.environment import Ranks, gpus_of_node

REQUIREMENTS = Path(__file__).parents[2] / "requirements.txt"

# A context of CUDA and its libraries take some hundreds of MB of a GPU that is otherwise empty.
_GPU_IN_USE_BYTES = 1e9


def versions(requirements: Path = REQUIREMENTS) -> Iterator[Finding]:
    """What is installed, against what requirements.txt pins; where nodes differ, each has a line of its own."""
    build = {"Python": platform.python_version(), "torch": torch.__version__}
    if torch.version.cuda is not None:
        build["CUDA"] = torch.version.cuda
        if torch.distributed.is_nccl_available():
            build["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    lines = [line.partition("==") for line in requirements.read_text(encoding="utf-8").splitlines()]
    pinned = {name: wanted for name, _, wanted in lines if wanted and not name.startswith("#")}
    as_pinned = 0
    for name, wanted in pinned.items():
        try:
            installed = version(name)
        except PackageNotFoundError:
            yield Finding("error", "versions", f"{name} is not installed: pip install {name}=={wanted}")
            continue
        if installed.split("+")[0] == wanted:  # a plus is followed by the CUDA that it was built for
            as_pinned += 1
        else:
            text = f"{name} {installed} is installed, {wanted} was tested: pip install {name}=={wanted}"
            yield Finding("warning", "versions", text)
    words = ", ".join(f"{name} {found}" for name, found in build.items())
    yield Finding("ok", "versions", f"{words}; {as_pinned} of {len(pinned)} packages as in {requirements.name}")


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


def gpu(local_rank: int) -> Iterator[Finding]:
    """This rank's own GPU: what it is, and whether it is free. Whether torch can use it shows in the collectives."""
    if not torch.cuda.is_available():
        return
    device = local_rank % torch.cuda.device_count()  # srun may show each task its own only
    about = torch.cuda.get_device_properties(device)
    yield Finding("ok", "GPU", f"{about.name}, sm_{about.major}{about.minor}, {about.total_memory / 1e9:.1f} GB")
    free, total = torch.cuda.mem_get_info(device)
    taken = total - free - torch.cuda.memory_reserved(device)
    if taken > _GPU_IN_USE_BYTES:
        text = f"{taken / 1e9:.1f} GB of it are in use by other processes: end them (nvidia-smi names them), or wait"
        yield Finding("warning", "GPU", text)
