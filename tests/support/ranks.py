"""Ranks started one by one, as a scheduler does it; and forked ones that compute something together."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def on_ranks(ranks: int, folder: Path, work: Callable[[int, int], Any]) -> list[Any]:
    """What work(rank, ranks) gives on each of so many processes, each with one thread, that meet over gloo.

    They are forked from a server: torch's threads of a backward pass in this process would not survive that.
    """
    forks = multiprocessing.get_context("forkserver")
    processes = [forks.Process(target=_run_rank, args=(rank, ranks, folder, work)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    return [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]


def _run_rank(rank: int, ranks: int, folder: Path, work: Callable[[int, int], Any]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), ranks), rank=rank, world_size=ranks)
    torch.save(work(rank, ranks), folder / f"{rank}.pt")
    dist.destroy_process_group()


def task(rank: int, tasks: int = 2, **other: str) -> dict[str, str]:
    """What SLURM tells a task of a step on one node."""
    return {
        **{f"SLURM_{name}": str(rank) for name in ("PROCID", "LOCALID")},
        **{f"SLURM_STEP_{name}": str(tasks) for name in ("NUM_TASKS", "TASKS_PER_NODE")},
        **{"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0", "SLURM_NODEID": "0", "SLURM_STEP_NODELIST": "n1"},
        "SLURM_GTIDS": ",".join(map(str, range(tasks))),
        **other,
    }
