"""What the ranks can only find out together: a shared run folder, and their collectives.

Every rank calls these in the same order. A rank that does not come to a collective is waited for `LIMIT_S`, not for
ever.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from launch.doctor.findings import Finding, first_words, names_of
from launch.doctor.run import existing_folder
from training.base.console import UserError
from training.base.files import lock
from training.engine.cluster import Cluster

# How long the collectives of a device may take altogether. NCCL takes up to half a minute to begin on many nodes.
LIMIT_S = 60.0

# How long the ranks wait for each other elsewhere: longer, so that they can still report collectives that hang.
PATIENCE_S = 120.0

# For a file to be seen by another node: NFS remembers for a while what was in a folder.
_SEEN_WITHIN_S = 30.0

_ALL_REDUCE_BYTES = {"cuda": 64 << 20, "cpu": 16 << 20}
_ALL_REDUCES = 5

WHAT_TO_TRY = (
    "choose the network by NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME (names as in `ip address`), let the firewall pass "
    "all ports between the nodes, try NCCL_P2P_DISABLE=1 (GPUs of one node) or NCCL_IB_DISABLE=1 (InfiniBand), and see "
    "what NCCL_DEBUG=INFO says"
)


def shared_folder(cluster: Cluster, names: Sequence[str], run_dir: Path) -> list[Finding]:
    """Whether every rank sees a file that the first one writes where `run_dir` is to be, and feels its lock.

    Where there are no locks the first one does not feel its own. Nothing where it cannot write: its check of the disk
    says so.
    """
    folder, name = None, None
    with ExitStack() as stack:
        with suppress(UserError, OSError):
            folder = existing_folder(run_dir)
            if cluster.is_first:
                own = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=".doctor-", dir=folder)))
                lock(stack.enter_context((own / "held").open("w")))
                name = own.name
        name = cluster.gather(name, str | None)[0]
        if name is None:
            return []
        seen = _see(folder / name / "held") if folder is not None else (False, False)
        every = cluster.gather(seen, tuple[bool, bool])  # the file stays until all have looked
    blind = [name for name, (is_there, _) in zip(names, every, strict=True) if not is_there]
    free = [name for name, (_, is_free) in zip(names, every, strict=True) if is_free]
    if blind:
        text = f"a file of the first rank is not seen by {names_of(blind)}: choose a --run_dir that all nodes share"
        found = [Finding("error", "run folder", f"{text}; each rank reads the run's checkpoints")]
    else:
        found = [Finding("ok", "run folder", "all see what one rank writes")]
    if free:
        text = f"a lock of the first rank is not felt by {names_of(free)}: make sure that no two runs share a folder"
        found.append(Finding("warning", "run folder", text))
    return found


def _see(path: Path) -> tuple[bool, bool]:
    """Whether the file comes to be seen, and whether its lock keeps nobody out."""
    began = time.monotonic()
    while not path.exists():
        if time.monotonic() - began > _SEEN_WITHIN_S:
            return False, False
        time.sleep(0.05)
    with suppress(OSError), path.open("r+") as file:
        return True, lock(file)
    return True, False


def bus_bandwidth(size: int, seconds: float, ranks: int) -> float:
    """GB/s of an all-reduce of `size` bytes: 2(n-1)/n x size / seconds, which does not depend on the number of ranks.

    The formula is that of nccl-tests (doc/PERFORMANCE.md), so that the figures can be compared.
    """
    return 2 * (ranks - 1) / ranks * size / seconds / 1e9


@dataclass
class Trial:
    """How far a rank came with the collectives."""

    stage: str = "its own work"
    seconds: float | None = None  # of an all-reduce; None until it has done them all
    error: str | None = None


def collectives(cluster: Cluster, names: Sequence[str]) -> tuple[Finding, bool]:
    """Some work on each device alone, then all-reduces over its backend: whether they are right, and how fast.

    Also returns whether they failed: a thread of this process may then wait for ever, so that it can only exit at once.
    """
    trial = Trial()
    thread = threading.Thread(target=_try, args=(cluster, trial), daemon=True)  # left behind if it does not end in time
    thread.start()
    thread.join(LIMIT_S)
    every: list[Trial] = cluster.gather(trial, Trial)
    ranks, kind = cluster.world_size, cluster.device.type
    backend = "NCCL" if kind == "cuda" else "gloo"
    stuck: dict[str, list[str]] = {}
    for each, name in zip(every, names, strict=True):
        if each.seconds is None:
            said = f"ended in {each.stage}: {each.error}" if each.error else f"still waits in {each.stage}"
            stuck.setdefault(said, []).append(name)
    if stuck:
        where = "; ".join(f"{names_of(who)} {said}" for said, who in stuck.items())
        failure = f"{backend} failed ({LIMIT_S:g} s at most): {where}. {WHAT_TO_TRY}"
        return Finding("error", "collectives", failure), True
    if ranks == 1:
        return Finding("ok", "collectives", "one rank has none: start as many as the run will have"), False
    size, seconds = _ALL_REDUCE_BYTES[kind], max(each.seconds or 0.0 for each in every)
    text = (
        f"{backend} over {ranks} ranks gives the right sums; {size >> 20} MiB in {1e3 * seconds:.1f} ms: "
        f"{bus_bandwidth(size, seconds, ranks):.2f} GB/s bus bandwidth"
    )
    return Finding("ok", "collectives", text), False


def _try(cluster: Cluster, trial: Trial) -> None:
    try:
        if cluster.device.type == "cuda":
            torch.cuda.set_device(cluster.device)  # each thread begins at the first one
        _own_work(cluster.device)
        trial.stage = "an all-reduce"
        trial.seconds = _all_reduce_s(cluster)
    except Exception as error:
        trial.error = first_words(error)


def _own_work(device: torch.device) -> None:
    """A product of matrices without the others, which tells a device that hangs or fails from a network that does."""
    try:
        matrix = torch.ones(512, 512, device=device)
        matrix @ matrix
        _wait_for(device)
    except RuntimeError as error:
        kernels = ", ".join(torch.cuda.get_arch_list())
        advice = f"try another GPU, or a torch that has kernels for it; this one has {kernels}"
        raise UserError(f"{advice} ({first_words(error)})") from None


def _all_reduce_s(cluster: Cluster) -> float:
    """The mean seconds of an all-reduce. Raises UserError where a sum is wrong."""
    # Whole numbers below 2^24, which fp32 holds exactly.
    count = _ALL_REDUCE_BYTES[cluster.device.type] // 4
    pattern = torch.arange(count, device=cluster.device, dtype=torch.float32) % 251
    ranks = cluster.world_size
    summed: Tensor = cluster.sum(pattern + cluster.rank)
    is_right = torch.equal(summed, pattern * ranks + ranks * (ranks - 1) / 2)
    summed.zero_()
    _wait_for(cluster.device)
    began = time.perf_counter()
    for _ in range(_ALL_REDUCES):
        cluster.sum(summed)
    _wait_for(cluster.device)
    seconds = (time.perf_counter() - began) / _ALL_REDUCES
    if not is_right:  # said only now, so that the others need not wait for this rank
        raise UserError("it gave a wrong sum")
    return seconds


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
