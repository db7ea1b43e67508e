"""What the bits of a run depend on besides its definition: threads, processor or card, versions, and the code.

A session may run on others, since a run has to be finished somewhere. Its numbers are then equal up to rounding only,
or not at all where the code computes something else, so it is said.
"""

from __future__ import annotations

import ast
import hashlib
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

from training.base.console import say
from training.engine.status import Session

_ROOT = Path(__file__).parents[2]

_COMPUTING = (
    *("training/*.py", "training/models/*.py", "training/data/*.py"),
    *(f"training/engine/{name}.py" for name in ("batch_plan", "loop", "optim", "parallel", "precision", "zero")),
)


def surroundings(device: torch.device, versions: Mapping[str, str]) -> dict[str, str]:
    """By name, what this session computes with. versions: of the libraries."""
    on_cpu = {"threads": str(torch.get_num_threads()), "processor": _processor()}
    on = on_cpu if device.type == "cpu" else {"card": torch.cuda.get_device_name(device)}
    return {**on, "Python": platform.python_version(), **versions, "code": _digest()}


def keep_threads(sessions: Sequence[Session]) -> None:
    """Gives a process that is alone as many threads as in the run's last session, unless somebody says how many.

    A new run has one for each core, and so has one that comes to a machine with fewer cores than that.
    """
    if sessions and sessions[-1]["world_size"] == 1 and not os.environ.get("OMP_NUM_THREADS"):
        threads = sessions[-1].get("surroundings", {}).get("threads", "")
        if threads.isdecimal() and 0 < int(threads) < torch.get_num_threads():
            torch.set_num_threads(int(threads))
            say(f"{threads} threads, as in the last session; set OMP_NUM_THREADS for others")


def changes(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What is not as it was, as `name: before -> now`."""
    names = [name for name in now if name in before and before[name] != now[name]]
    return [f"{name}: {before[name]} -> {now[name]}" for name in names]


def commit() -> str | None:
    """The commit that is checked out; None where git does not tell."""
    command = ["git", "-C", str(_ROOT), "rev-parse", "--short=12", "HEAD"]
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout.strip()
    return None


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _digest() -> str:
    script = getattr(sys.modules["__main__"], "__file__", None)
    paths = computing_files() | ({Path(script).resolve()} if script else set())
    return hashlib.sha256("".join(digest_of(path) for path in sorted(paths)).encode()).hexdigest()[:12]


def computing_files() -> set[Path]:
    """The files that numbers come from, beside the script."""
    return {path for pattern in _COMPUTING for path in _ROOT.glob(pattern)}


@cache
def digest_of(path: Path) -> str:
    """Of a file's syntax: comments, docstrings and layout do not count. Nothing for what is no Python, a cell, say."""
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return ""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [each for each in node.body if not _is_text(each)] or [ast.Pass()]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
