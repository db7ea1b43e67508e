"""The one place that reads the launcher's environment variables and arranges the process before work starts.

`torchrun`, DeepSpeed's launcher and a plain process all end up in `Ranks`. Nothing here imports torch: some settings
count only when they are made before its libraries are loaded.
"""

from __future__ import annotations

import ctypes
import os
import sys
from dataclasses import dataclass

from launch.console import UserError

# Idle OpenMP threads spin by default, and as soon as anything else runs on the machine spinning threads starve the
# working ones (measured: a fivefold slower step). Read once, when torch loads the OpenMP library.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


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
