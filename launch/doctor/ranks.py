"""What the ranks can only find out together: clocks, threads, a shared run folder, and their collectives.

Every rank calls these in the same order. A rank that does not come to a collective is waited for `LIMIT_S`, not for
ever.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from launch.doctor.findings import Finding, first_words, names_of, say_once
from training.engine.cluster import Cluster

# How long the collectives of a device may take altogether. NCCL takes up to half a minute to begin on many nodes.
LIMIT_S = 60.0

# How long the ranks wait for each other elsewhere: longer, so that they can still report collectives that hang.
PATIENCE_S = 120.0

_CLOCK_ROUNDS = 10
_CLOCK_WARNING_S, _CLOCK_ERROR_S = 1.0, 60.0

# For a file to be seen by another node: NFS remembers for a while what was in a folder.
_SEEN_WITHIN_S = 30.0

_ALL_REDUCE_BYTES = {"cuda": 64 << 20, "cpu": 16 << 20}
_ALL_REDUCES = 5

WHAT_TO_TRY = (
    "choose the network by NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME (names as in `ip address`), let the firewall pass "
    "all ports between the nodes, try NCCL_P2P_DISABLE=1 (GPUs of one node) or NCCL_IB_DISABLE=1 (InfiniBand), and see "
    "what NCCL_DEBUG=INFO says"
)


def clocks(cluster: Cluster, hosts: Sequence[str]) -> list[Finding]:
    """How far the clocks are apart, and how long the control group's smallest reduction takes."""
    left_at, took_s = [], []
    for _ in range(_CLOCK_ROUNDS):
        began = time.perf_counter()
        cluster.maximum([0.0])  # no rank leaves it before the last one has come, so all leave it at about one moment
        left_at.append(time.time())
        took_s.append(time.perf_counter() - began)
    every = cluster.gather(left_at, list[float])
    reduction_ms = 1e3 * sorted(took_s)[_CLOCK_ROUNDS // 2]
    found = [Finding("ok", "control", f"gloo: a reduction takes {reduction_ms:.1f} ms over {len(hosts)} ranks")]
    # A rank that was held up in some rounds was not in the one that brings its clock nearest to the first rank's.
    ahead_s = {
        host: min((its - first for its, first in zip(own, every[0], strict=True)), key=abs)
        for host, own in zip(hosts, every, strict=True)
    }
    apart_s = max(map(abs, ahead_s.values()))
    if apart_s < _CLOCK_WARNING_S:
        words = "one clock" if len(ahead_s) == 1 else f"all within {apart_s:.3f} s of {hosts[0]}"
        return [*found, Finding("ok", "clocks", words)]
    wrong = [f"{host} {each:+.1f} s" for host, each in ahead_s.items() if abs(each) >= _CLOCK_WARNING_S]
    text = (
        f"they differ from that of {hosts[0]}: {names_of(wrong)}; set them by NTP (`chronyc tracking`, `timedatectl`): "
        "a run's time limit, the times that it writes down and wandb go by them"
    )
    return [*found, Finding("error" if apart_s >= _CLOCK_ERROR_S else "warning", "clocks", text)]


def threads(cluster: Cluster, hosts: Sequence[str]) -> list[Finding]:
    """On a CPU: the threads of a node's ranks against the cores that they may use."""
    if cluster.device.type != "cpu":
        return []
    every = cluster.gather((torch.get_num_threads(), os.sched_getaffinity(0)), tuple[int, set[int]])
    found: list[tuple[str, list[Finding]]] = []
    for host in dict.fromkeys(hosts):
        own = [each for name, each in zip(hosts, every, strict=True) if name == host]
        cores, wanted = len(set().union(*(cpus for _, cpus in own))), sum(count for count, _ in own)
        text = f"{len(own)} rank(s) of {own[0][0]} thread(s) on {cores} core(s)"
        if wanted > cores:
            text += f": they hinder each other; export OMP_NUM_THREADS={max(1, cores // len(own))}"
        found.append((host, [Finding("warning" if wanted > cores else "ok", "threads", text)]))
    return say_once(found)


def shared_folder(cluster: Cluster, names: Sequence[str], folder: Path | None) -> list[Finding]:
    """Whether every rank sees a file that the first one writes to `folder`, and feels its lock.

    folder: None where this rank has none. Where the first one cannot write, its check of the disk says so.
    """
    with contextlib.ExitStack() as stack:
        name = None
        if cluster.is_first and folder is not None:
            with contextlib.suppress(OSError):
                own = stack.enter_context(tempfile.TemporaryDirectory(prefix=".doctor-", dir=folder))
                file = stack.enter_context(Path(own, "held").open("w"))
                with contextlib.suppress(OSError):  # no locks here, as the check of the disk says
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                name = Path(own).name
        name = cluster.gather(name, str | None)[0]
        if name is None:
            return []
        seen_s, locked = (None, True) if folder is None else _see(folder / name / "held")
        every = cluster.gather((seen_s, locked), tuple[float | None, bool])  # the file stays until all have looked
    blind = [names[rank] for rank, (seen_s, _) in enumerate(every) if seen_s is None]
    free = [names[rank] for rank, (_, locked) in enumerate(every) if not locked]
    if blind:
        text = f"a file of the first rank is not seen by {names_of(blind)}: choose a --run_dir that all nodes share"
        found = [Finding("error", "run folder", f"{text}; each rank reads the run's checkpoints")]
    else:
        longest_s = max(seen_s or 0.0 for seen_s, _ in every)
        late = " (a network file system that remembers too long)" if longest_s > 1 else ""
        found = [Finding("ok", "run folder", f"all see within {longest_s:.1f} s what one rank writes{late}")]
    if free:
        text = f"a lock of the first rank is not felt by {names_of(free)}: make sure that no two runs share a folder"
        found.append(Finding("warning", "run folder", text))
    return found


def _see(path: Path) -> tuple[float | None, bool]:
    """Seconds until the file is there, None if it does not come; and whether its lock keeps others out."""
    began = time.monotonic()
    while not path.exists():
        if time.monotonic() - began > _SEEN_WITHIN_S:
            return None, True
        time.sleep(0.05)
    seen_s = time.monotonic() - began
    with contextlib.suppress(OSError), path.open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return seen_s, False
    return seen_s, True


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
    is_right: bool = True  # what the first one gave
    error: str | None = None


def collectives(cluster: Cluster, names: Sequence[str]) -> tuple[list[Finding], bool]:
    """All-reduces over the device's backend: whether they are right, and how fast.

    Also returns whether they failed: a thread of this process may then wait for ever, so that it can only exit at once.
    """
    if cluster.world_size == 1:
        return [Finding("ok", "collectives", "one rank has none: start as many as the run will have")], False
    trial = Trial()
    thread = threading.Thread(target=_try, args=(cluster, trial), daemon=True)  # left behind if it does not end in time
    thread.start()
    thread.join(LIMIT_S)
    every: list[Trial] = cluster.gather(trial, Trial)
    backend = "NCCL" if cluster.device.type == "cuda" else "gloo"
    times_s = [each.seconds for each in every if each.seconds is not None]
    if len(times_s) < len(every):
        return [_failure(every, names, backend)], True
    wrong = [name for each, name in zip(every, names, strict=True) if not each.is_right]
    if wrong:
        text = f"{backend} gave a wrong sum to {names_of(wrong)}: {WHAT_TO_TRY}"
        return [Finding("error", "collectives", text)], False
    size, seconds = _ALL_REDUCE_BYTES[cluster.device.type], max(times_s)
    text = (
        f"{backend} over {cluster.world_size} ranks gives the right sums; {size >> 20} MiB in {1e3 * seconds:.1f} ms: "
        f"{bus_bandwidth(size, seconds, cluster.world_size):.2f} GB/s bus bandwidth"
    )
    return [Finding("ok", "collectives", text)], False


def _failure(every: Sequence[Trial], names: Sequence[str], backend: str) -> Finding:
    places: dict[str, list[str]] = {}
    for each, name in zip(every, names, strict=True):
        if each.seconds is None:
            said = f"ended in {each.stage} with {each.error}" if each.error else f"still waits in {each.stage}"
            places.setdefault(said, []).append(name)
    words = "; ".join(f"{names_of(who)} {said}" for said, who in places.items())
    return Finding("error", "collectives", f"{backend} failed ({LIMIT_S:g} s at most): {words}. {WHAT_TO_TRY}")


def _try(cluster: Cluster, trial: Trial) -> None:
    try:
        if cluster.device.type == "cuda":
            torch.cuda.set_device(cluster.device)  # each thread begins at the first one
        _own_work(cluster.device)
        trial.stage = "an all-reduce"
        _all_reduce(cluster, trial)
    except Exception as error:
        trial.error = first_words(error)


def _own_work(device: torch.device) -> None:
    """A product of matrices without the others, which tells a device that hangs from a network that does."""
    matrix = torch.ones(512, 512, device=device)
    matrix @ matrix
    _wait_for(device)


def _all_reduce(cluster: Cluster, trial: Trial) -> None:
    """Whether the sum is right, and the mean seconds of an all-reduce."""
    # Whole numbers below 2^24, which fp32 holds exactly.
    count = _ALL_REDUCE_BYTES[cluster.device.type] // 4
    pattern = torch.arange(count, device=cluster.device, dtype=torch.float32) % 251
    ranks = cluster.world_size
    summed: Tensor = cluster.sum(pattern + cluster.rank)
    trial.is_right = torch.equal(summed, pattern * ranks + ranks * (ranks - 1) / 2)
    summed.zero_()
    _wait_for(cluster.device)
    began = time.perf_counter()
    for _ in range(_ALL_REDUCES):
        cluster.sum(summed)
    _wait_for(cluster.device)
    trial.seconds = (time.perf_counter() - began) / _ALL_REDUCES


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
