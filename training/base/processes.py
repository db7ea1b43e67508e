"""The processes below a launcher: who they are, and how to end them all at once. Linux, by /proc."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path


def children(pid: int) -> list[int]:
    """Living child processes, in order of their ids. torchrun starts ranks in order, so this is the order of ranks."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                about = (entry / "stat").read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue
            state, parent = about.rpartition(")")[2].split()[:2]  # the name in brackets may hold blanks
            if int(parent) == pid and state != "Z":
                found.append(int(entry.name))
    return sorted(found)


def parent_of(pid: int) -> int:
    """The process id of its parent; 0 where it has none in sight, or is gone itself."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def command_line(pid: int) -> list[str]:
    """The words that the process was started with; none if it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text("utf-8", "replace").split("\0")[:-1]
    except OSError:
        return []


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that has ended and waits for its parent to notice does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def handles(pid: int, number: int) -> bool:
    """Whether the process has a handler of its own for a signal."""
    try:
        about = Path(f"/proc/{pid}/status").read_text("utf-8", "replace")
    except OSError:
        return False
    caught = next(line for line in about.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


def descendants(pid: int) -> list[int]:
    """Living processes below `pid`, in any generation."""
    return [below for child in children(pid) for below in (child, *descendants(child))]


def family_of(pid: int) -> list[int]:
    """A launcher and all below it. Its process group is too little: torchrun's ranks lead groups of their own."""
    return [pid, *descendants(pid)]


def signal_all(family: Iterable[int], number: int) -> None:
    """A signal to all of them that are still there."""
    for each in family:
        with suppress(ProcessLookupError):
            os.kill(each, number)


def kill_all(family: Iterable[int]) -> None:
    """SIGKILL to all of them at once, as when the machine's plug is pulled."""
    family = list(family)
    # All are stopped first: a rank that saw its peer die could still write something.
    signal_all(family, signal.SIGSTOP)
    signal_all(family, signal.SIGKILL)
