"""Ranks started one by one, as a scheduler does it."""

from __future__ import annotations

import os
import random
import socket


def free_port() -> int:
    while True:
        port = random.randrange(12000, 32000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port


def task(rank: int, tasks: int = 2, **other: str) -> dict[str, str]:
    """What SLURM tells a task of a step on one node."""
    return {
        **{f"SLURM_{name}": str(rank) for name in ("PROCID", "LOCALID")},
        **{f"SLURM_STEP_{name}": str(tasks) for name in ("NUM_TASKS", "TASKS_PER_NODE")},
        **{"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0", "SLURM_NODEID": "0", "SLURM_STEP_NODELIST": "n1"},
        "SLURM_GTIDS": ",".join(map(str, range(tasks))),
        **other,
    }
