"""The one place that reads the launcher's environment variables and arranges the process before work starts.

`torchrun`, DeepSpeed's launcher and a plain process all end up in `Ranks`; SLURM's and Kaggle's limits in `time_left`.
Nothing here imports torch: some settings count only when they are made before its libraries are loaded.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from launch.console import UserError, parse_duration

# Idle OpenMP threads spin by default, and as soon as anything else runs on the machine spinning threads starve the
# working ones (measured: a fivefold slower step). Read once, when torch loads the OpenMP library.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


# About when this process was started, on the clock that no one can set.
PROCESS_BEGAN = time.monotonic()

# What a Kaggle session with a GPU may take; the platform tells it to nobody inside.
KAGGLE_LIMIT_S = 12 * 3600


@dataclass(frozen=True)
class Ranks:
    """This process among its peers. Without a launcher: rank 0 of 1."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1

    @property
    def launched(self) -> bool:
        """Whether a launcher started this process and watches its exit status."""
        return "LOCAL_RANK" in os.environ


def read_ranks() -> Ranks:
    """The process's place from RANK, LOCAL_RANK, WORLD_SIZE and LOCAL_WORLD_SIZE; raises UserError on nonsense."""
    if "WORLD_SIZE" not in os.environ:
        return Ranks()
    values = {}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        text = os.environ.get(name, os.environ["WORLD_SIZE"] if name == "LOCAL_WORLD_SIZE" else None)
        if text is None or not text.isdigit():
            raise UserError(
                f"WORLD_SIZE is set but {name} is {text!r}: start through torchrun (--nproc-per-node=N), "
                "or unset WORLD_SIZE for a single process"
            )
        values[name.lower()] = int(text)
    return Ranks(**values)


def watching_launcher() -> int | None:
    """The process id of the torchrun that started this process and should outlive it; None without one."""
    return os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None


def job_id() -> str | None:
    """SLURM's job, where there is one."""
    return os.environ.get("SLURM_JOB_ID")


def time_left() -> tuple[float, str] | None:
    """Seconds until the surroundings end this process, and who says so; None where no limit is known.

    A job of SLURM: the time that the scheduler has left for it, else its end time. Kaggle: twelve hours from the start
    of the container.
    """
    if job_id() is not None:
        return _slurm_time_left()
    if "KAGGLE_KERNEL_RUN_TYPE" in os.environ:
        return KAGGLE_LIMIT_S - _container_age_s(), "Kaggle's 12 hours"
    return None


def _slurm_time_left() -> tuple[float, str] | None:
    # The scheduler's own count of what is left does not depend on this machine's clock; the end time does.
    command = ["squeue", "--noheader", "--jobs", os.environ["SLURM_JOB_ID"], "--format", "%L"]
    with contextlib.suppress(OSError, subprocess.SubprocessError, ValueError):
        said = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.split()
        if said and said[0] == "UNLIMITED":
            return None
        return parse_duration(said[0] if said else ""), "SLURM's time limit"
    with contextlib.suppress(KeyError, ValueError):
        return float(os.environ["SLURM_JOB_END_TIME"]) - time.time(), "SLURM's time limit"
    return None


def _container_age_s() -> float:
    """How long process 1 runs, which is as old as its container; this process's own age where that cannot be read."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        uptime_s = float(Path("/proc/uptime").read_text().split()[0])
        ticks = Path("/proc/1/stat").read_text().rpartition(")")[2].split()[19]  # field 22: start, after boot
        return uptime_s - int(ticks) / os.sysconf("SC_CLK_TCK")
    return time.monotonic() - PROCESS_BEGAN


def keep_freed_memory() -> None:
    """Tells glibc to keep freed memory for the next tensor instead of returning it to the system.

    Large blocks are otherwise mapped and unmapped at every use, and each of their pages is faulted in anew (measured on
    a two-core machine: 16,000 page faults and 8 % of a CPU training step). Elsewhere than on glibc: no effect.
    """
    if sys.platform != "linux":
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return
    trim_threshold, mmap_max, arena_max = -1, -4, -8  # from glibc's malloc.h
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(arena_max, 1)  # backward runs in a thread of its own: let it reuse what forward freed
