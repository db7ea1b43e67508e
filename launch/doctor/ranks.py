"""What the ranks can only find out together: clocks, threads, a shared run folder, and their collectives.

Every rank calls these in the same order. Who does not come to a collective is waited for `LIMIT_S`, not for ever.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from launch.doctor.findings import Finding, first_words, names_of
from training.engine.cluster import Cluster

# How long the collectives of a device may take altogether. NCCL takes up to half a minute to begin on many nodes.
LIMIT_S = 60.0

# How long the ranks wait for each other elsewhere. Longer, since it must still be told that the collectives hang.
PATIENCE_S = 120.0

_CLOCK_ROUNDS = 10
_CLOCK_WARNING_S, _CLOCK_ERROR_S = 1.0, 60.0

# For a file to be seen by another node: NFS remembers for a while what was in a folder.
_SEEN_WITHIN_S = 30.0

# A rank that takes so many times as long as half of the others do is told apart from chance.
_SLOW = 1.5

_SMALL_BYTES, _LARGE_BYTES = 1024, {"cuda": 64 << 20, "cpu": 16 << 20}

WHAT_TO_TRY = (
    "choose the network by NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME (names as in `ip address`), let the firewall pass "
    "all ports between the nodes, try NCCL_P2P_DISABLE=1 (GPUs of one node) or NCCL_IB_DISABLE=1 (InfiniBand), and see "
    "what NCCL_DEBUG=INFO says"
)


def clocks(cluster: Cluster, hosts: Sequence[str]) -> list[Finding]:
    """How far the clocks are apart, and how long the control group's smallest reduction takes."""
    rounds: list[tuple[float, float]] = []
    for _ in range(_CLOCK_ROUNDS):
        cluster.maximum([0.0])  # all set out together, so that the next one is short
        before = time.time()
        cluster.maximum([0.0])
        rounds.append((before, time.time()))
    every = cluster.gather(rounds)
    latency_s = sorted(after - before for before, after in every[0])[_CLOCK_ROUNDS // 2]
    found = [Finding("ok", "control", f"gloo: a reduction takes {1e3 * latency_s:.1f} ms over {len(hosts)} ranks")]
    ahead = {host: offset_s(every[0], each) for host, each in zip(hosts, every, strict=True)}
    worst = max(ahead, key=lambda host: abs(ahead[host][0]))
    apart_s, error_s = ahead[worst]
    if abs(apart_s) - error_s < _CLOCK_WARNING_S:
        words = "one clock" if len(ahead) == 1 else f"all within {abs(apart_s) + error_s:.3f} s of {hosts[0]}"
        return [*found, Finding("ok", "clocks", words)]
    wrong = [f"{host} {each[0]:+.1f} s" for host, each in ahead.items() if abs(each[0]) >= _CLOCK_WARNING_S]
    text = (
        f"not the same on all nodes, against {hosts[0]}: {names_of(wrong)}; set them by NTP (`chronyc tracking`, "
        "`timedatectl`): a run's time limit, the times in its records and wandb go by them"
    )
    return [*found, Finding("error" if abs(apart_s) >= _CLOCK_ERROR_S else "warning", "clocks", text)]


def offset_s(ours: Sequence[tuple[float, float]], theirs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Seconds that their clock is ahead of ours, and by how much that may be wrong.

    Each round is one reduction that all made: the time before and after it on the own clock. It cannot end before the
    last rank has begun it, so this moment lies between both times of everybody: the distance of the midpoints is the
    clocks', up to half of both lengths. The shortest round counts.
    """
    best = min(zip(ours, theirs, strict=True), key=lambda both: sum(after - before for before, after in both))
    (our_begin, our_end), (their_begin, their_end) = best
    error_s = (our_end - our_begin + their_end - their_begin) / 2
    return (their_begin + their_end - our_begin - our_end) / 2, error_s


def threads(cluster: Cluster, hosts: Sequence[str]) -> list[Finding]:
    """On a CPU: threads of a node's ranks against the cores that they may use."""
    if cluster.device.type != "cpu":
        return []
    every = cluster.gather((torch.get_num_threads(), frozenset(os.sched_getaffinity(0))))
    found: dict[Finding, list[str]] = {}
    for host in dict.fromkeys(hosts):
        own = [each for name, each in zip(hosts, every, strict=True) if name == host]
        cores, wanted = len(frozenset().union(*(cpus for _, cpus in own))), sum(count for count, _ in own)
        text = f"{len(own)} rank(s) of {own[0][0]} thread(s) on {cores} core(s)"
        if wanted > cores:
            text += f": they hinder each other; export OMP_NUM_THREADS={max(1, cores // len(own))}"
        found.setdefault(Finding("warning" if wanted > cores else "ok", "threads", text), []).append(host)
    if len(found) == 1:
        return list(found)
    return [Finding(each.level, each.subject, f"{each.text} [{names_of(names)}]") for each, names in found.items()]


def shared_folder(cluster: Cluster, names: Sequence[str], folder: Path | None) -> list[Finding]:
    """Whether a file that the first rank writes to `folder` is seen, and its lock felt, by every rank.

    folder: None where the rank has none. Where the first one cannot write its check of the disk says so.
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
        name = cluster.gather(name)[0]
        if name is None:
            return []
        seen_s, locked = (None, True) if folder is None else _see(folder / name / "held")
        every = cluster.gather((seen_s, locked))  # and only then it is removed
    blind = [names[rank] for rank, (seen_s, _) in enumerate(every) if seen_s is None]
    free = [names[rank] for rank, (_, locked) in enumerate(every) if not locked]
    found: list[Finding] = []
    if blind:
        text = f"a file of the first rank is not seen by {names_of(blind)}: choose a --run_dir that all nodes share"
        found.append(Finding("error", "run folder", f"{text}; each rank reads the run's checkpoints"))
    else:
        longest_s = max(seen_s or 0.0 for seen_s, _ in every)
        late = " (a network file system that remembers too long)" if longest_s > 1 else ""
        found.append(Finding("ok", "run folder", f"what one rank writes, all see within {longest_s:.1f} s{late}"))
    if free:
        text = (
            f"a lock of the first rank is not felt by {names_of(free)}: take care that no two runs share a run folder"
        )
        found.append(Finding("warning", "run folder", text))
    return found


def _see(path: Path) -> tuple[float | None, bool]:
    """Seconds until the file is there, None if it does not come, and whether its lock keeps others out."""
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

    What each link must carry at best; from nccl-tests, doc/PERFORMANCE.md, so that the figures can be compared.
    """
    return 2 * (ranks - 1) / ranks * size / seconds / 1e9


@dataclass
class Trial:
    """How far a rank came with the collectives. own_s: of a fixed piece of work without the others."""

    stage: str = "its own work"
    own_s: float = 0.0
    small_s: float = 0.0
    large_s: float = 0.0
    wrong: list[str] = field(default_factory=list)
    error: str | None = None
    done: bool = False


def collectives(cluster: Cluster, names: Sequence[str]) -> tuple[list[Finding], bool]:
    """All-reduces over the device's backend: right, how fast, and which rank is slow.

    Also returns whether they failed: perhaps a thread of this process waits for ever, which can only leave at once.
    """
    if cluster.world_size == 1:
        return [Finding("ok", "collectives", "one rank has none: start as many as the run will have")], False
    trial = Trial()
    run_within(LIMIT_S, lambda: _try(cluster, trial))
    every: list[Trial] = cluster.gather(trial)
    backend = "NCCL" if cluster.device.type == "cuda" else "gloo"
    if not all(each.done for each in every):
        return [_failure(every, names, backend)], True
    found = [
        Finding(
            "error", "collectives", f"{backend} gave a wrong sum ({', '.join(each.wrong)}) to {name}: {WHAT_TO_TRY}"
        )
        for each, name in zip(every, names, strict=True)
        if each.wrong
    ]
    size, slowest = _LARGE_BYTES[cluster.device.type], max(every, key=lambda each: each.large_s)
    if not found:
        speed = bus_bandwidth(size, slowest.large_s, cluster.world_size)
        text = (
            f"{backend} over {cluster.world_size} ranks gives the right sums; {size >> 20} MiB in "
            f"{1e3 * slowest.large_s:.1f} ms: {speed:.2f} GB/s bus bandwidth; {_SMALL_BYTES} bytes in "
            f"{1e6 * slowest.small_s:.0f} us"
        )
        found.append(Finding("ok", "collectives", text))
    usual_s = sorted(each.own_s for each in every)[(len(every) - 1) // 2]
    slow = [f"{name} ({each.own_s / usual_s:.1f} times)" for each, name in zip(every, names, strict=True)
            if each.own_s > _SLOW * usual_s]  # fmt: skip
    if slow:
        text = f"takes longer than others for the same work, and all wait for it: {names_of(slow)}; look for other"
        found.append(Finding("warning", "pace", f"{text} programs there, heat and power limits (nvidia-smi -q)"))
    else:
        found.append(Finding("ok", "pace", "all ranks take about the same time for the same work"))
    return found, False


def _failure(every: Sequence[Trial], names: Sequence[str], backend: str) -> Finding:
    places: dict[str, list[str]] = {}
    for each, name in zip(every, names, strict=True):
        if not each.done:
            said = f"ended in {each.stage} with {each.error}" if each.error else f"still waits in {each.stage}"
            places.setdefault(said, []).append(name)
    words = "; ".join(f"{names_of(who)} {said}" for said, who in places.items())
    return Finding("error", "collectives", f"{backend} failed ({LIMIT_S:g} s at most): {words}. {WHAT_TO_TRY}")


def run_within(limit_s: float, work: Callable[[], None]) -> None:
    """Runs `work` in a thread of its own, which is left behind if it does not end in time."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(limit_s)


def _try(cluster: Cluster, trial: Trial) -> None:
    try:
        if cluster.device.type == "cuda":
            torch.cuda.set_device(cluster.device)  # each thread begins at the first one
        trial.own_s = _own_work_s(cluster.device)
        for size, times in ((_SMALL_BYTES, 20), (_LARGE_BYTES[cluster.device.type], 5)):
            trial.stage = f"an all-reduce of {size:,} bytes"
            seconds, right = _all_reduce_s(cluster, size, times)
            if not right:
                trial.wrong.append(f"{size:,} bytes")
            if size == _SMALL_BYTES:
                trial.small_s = seconds
            else:
                trial.large_s = seconds
        trial.done = True
    except Exception as error:
        trial.error = first_words(error)


def _own_work_s(device: torch.device) -> float:
    """Seconds of a product of matrices, the shortest of several: of this rank's processor alone."""
    width = 4096 if device.type == "cuda" else 512
    matrix = torch.ones(width, width, device=device)
    shortest_s = float("inf")
    for _ in range(8):
        _wait_for(device)
        began = time.perf_counter()
        matrix @ matrix
        _wait_for(device)
        shortest_s = min(shortest_s, time.perf_counter() - began)
    return shortest_s


def _all_reduce_s(cluster: Cluster, size: int, times: int) -> tuple[float, bool]:
    """Mean seconds of an all-reduce of `size` bytes, and whether the first one's sum was right."""
    # Whole numbers below 2^24, which fp32 holds exactly.
    pattern = torch.arange(size // 4, device=cluster.device, dtype=torch.float32) % 251
    ranks = cluster.world_size
    summed: Tensor = cluster.sum(pattern + cluster.rank)
    right = torch.equal(summed, pattern * ranks + ranks * (ranks - 1) / 2)
    summed.zero_()
    _wait_for(cluster.device)
    began = time.perf_counter()
    for _ in range(times):
        cluster.sum(summed)
    _wait_for(cluster.device)
    return (time.perf_counter() - began) / times, right


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
