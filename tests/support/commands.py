"""Commands started as people start them, and what they printed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from tests.support.zygote import ROOT, Forked, can_fork, fork, usual_environment
from training.base.processes import children, family_of, kill_all
from training.engine.metrics import read_metrics

REAL_TATOEBA = Path(os.environ.get("RELAY_DATA", ROOT.parent / "shared/data")) / "tatoeba/cmn.txt"

# Long enough for a machine that has ten times as much to do as cores. Nothing waits this long unless it hangs.
PATIENCE_S = 1800


@dataclass(frozen=True)
class Result:
    """How a command ended and what it printed."""

    status: int
    out: str
    err: str

    @property
    def error_lines(self) -> list[str]:
        """What it said to the user about mistakes; torchrun's own report of a failed process is not among it."""
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


class Started:
    """A running command with all of its processes.

    process: a `Popen`, or what the zygote forked, which is used the same way.
    """

    def __init__(self, folder: Path, start: Callable[[BinaryIO, BinaryIO, str], subprocess.Popen[bytes] | Forked]):
        self._out, self._err = folder / "out", folder / "err"
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = start(out, err, str(folder))
        # Every process that comes of a command inherits this, and can be found by it when its parent is gone. What is
        # forked shows its zygote's variables instead, and is found by its session.
        self._mark = f"RELAY_TEST={folder}".encode()

    def printed(self) -> str:
        """Everything so far, for a failing test's message."""
        return self._out.read_text("utf-8", "replace") + self._err.read_text("utf-8", "replace")

    def wait(self) -> Result:
        """Waits for its end."""
        try:
            status = self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {PATIENCE_S} s:\n{self.printed()}")
        return Result(status, self._out.read_text("utf-8"), self._err.read_text("utf-8"))

    def wait_for_step(self, run_dir: Path, step: int) -> None:
        """Waits until metrics.jsonl in `run_dir` has come to `step`."""
        end = time.monotonic() + PATIENCE_S
        while not any(line["step"] >= step for line in read_metrics(run_dir)):
            if self.process.poll() is not None:
                pytest.fail(f"ended with {self.process.returncode} before step {step}:\n{self.printed()}")
            if time.monotonic() > end:
                pytest.fail(f"not at step {step} after {PATIENCE_S} s:\n{self.printed()}")
            time.sleep(0.02)

    def living(self) -> list[int]:
        """The process ids of all that came of the command and still runs, orphans too."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with suppress(OSError):  # gone meanwhile, or another user's
                    state, _, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
                    marked = self._mark in (entry / "environ").read_bytes().split(b"\0")
                    if state != "Z" and (marked or int(session) == self.process.pid):
                        found.append(int(entry.name))
        return found

    def rank(self, number: int) -> int:
        """The process id of a rank. torchrun starts ranks in order, so process ids tell them apart."""
        return children(self.process.pid)[number]

    def kill_all(self) -> None:
        """SIGKILL to the launcher and every rank, as when the machine's plug is pulled."""
        kill_all(family_of(self.process.pid))
        self.process.wait()


Launch = Callable[..., Started]


@contextmanager
def launching(folder: Path) -> Iterator[Launch]:
    """Gives `launch(*words, module="training.gpt", ranks=None)`: `python -m module words`, or torchrun with `ranks`.

    environment: variables beside the usual ones. torchrun: more of its own options. starter: what stands before the
    module's name instead. real: whether ranks and plain processes start from nothing, ranks below the real torchrun;
    without it, they are forked where that makes no difference. What still runs at the end of the block is killed.
    """
    started: list[Started] = []

    def launch(
        *words: object,
        module: str = "training.gpt",
        ranks: int | None = None,
        environment: Mapping[str, str] | None = None,
        torchrun: Sequence[str] = (),
        starter: Sequence[str] | None = None,
        real: bool | None = None,
    ) -> Started:
        texts = [str(word) for word in words]
        forks = starter is None and (real is False or can_fork(module, environment or {}))
        if ranks is not None and (real or torchrun or not forks):
            # The real launcher, whose ranks start from nothing. It may itself be forked: the ranks are what counts.
            texts = ["--standalone", f"--nproc-per-node={ranks}", *torchrun, "-m", module, *texts]
            module, ranks = "torch.distributed.run", None
        elif real:
            forks = False

        def start(out: BinaryIO, err: BinaryIO, mark: str) -> subprocess.Popen[bytes] | Forked:
            around = {**usual_environment(), **(environment or {}), "RELAY_TEST": mark}
            if forks:
                return fork(module, texts, around, out, err, ranks)
            return subprocess.Popen(
                [*(starter or [sys.executable, "-m"]), module, *texts],
                cwd=ROOT,
                env=around,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

        output = folder / f"output-{len(started)}"
        output.mkdir()
        started.append(Started(output, start))
        return started[-1]

    try:
        yield launch
    finally:
        for command in started:
            if command.process.poll() is None:
                command.kill_all()
            for pid in command.living():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def run(*words: object, **how: Any) -> Result:
    """A command from its start to its end; `how` as in `launching`."""
    with tempfile.TemporaryDirectory() as folder, launching(Path(folder)) as launch:
        return launch(*words, **how).wait()


def prepare(folder: Path, *words: object) -> Path:
    """A data set prepared by the real command: words and one vocabulary, unless `words` say otherwise."""
    usual = ("--tokenizer", "word", "--vocabularies", "joint", "--simplify", "false")
    with launching(folder) as launch:
        output = folder / "data"
        result = launch(*usual, "--output", output, *words, module="data_prep.pairs").wait()
        assert result.status == 0, result
        return output
