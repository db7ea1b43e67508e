"""What several tests need: prepared data, and commands started as people start them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from launch.processes import children, family_of, kill_all
from training.engine.tracking import read_metrics

if TYPE_CHECKING:
    from tests.slurm_cluster import SlurmCluster

ROOT = Path(__file__).resolve().parents[1]
REAL_TATOEBA = Path(os.environ.get("RELAY_DATA", ROOT.parent / "shared/data")) / "tatoeba/cmn.txt"

# Long enough for a machine that has ten times as much to do as cores. Nothing waits this long unless it hangs.
PATIENCE_S = 1800

# The tests run on the CPU everywhere, one thread per process, since several processes run at once.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What waits for SLURM comes first on one worker, and what takes minutes first on the others.

    That is what has a time limit of its own. Begun last, it would leave the other workers idle.
    """
    slurm = [item for item in items if "cluster" in getattr(item, "fixturenames", ())]
    long = [item for item in items if item not in slurm and item.get_closest_marker("timeout") is not None]
    rest = [item for item in items if item not in slurm and item not in long]
    # Each worker is dealt as many tests, those that stand together.
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    share, others = len(items) // workers, max(1, workers - 1)
    first = [slurm, *(long[len(long) * n // others : len(long) * (n + 1) // others] for n in range(others))]
    items.clear()
    for worker, begin in enumerate(first):
        filling = max(0, share - len(begin)) if worker < len(first) - 1 else len(rest)
        items += [*begin, *rest[:filling]]
        del rest[:filling]


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
    """A running command with all of its processes."""

    def __init__(self, words: list[str], folder: Path, environment: Mapping[str, str] | None = None):
        self._out, self._err = folder / "out", folder / "err"
        # Every process that comes of the command inherits this, and can be found by it when its parent is gone.
        self._mark = f"RELAY_TEST={folder}"
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                words,
                cwd=ROOT,
                env={**ENVIRONMENT, **(environment or {}), "RELAY_TEST": str(folder)},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

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
                    if self._mark.encode() in (entry / "environ").read_bytes().split(b"\0"):
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

    environment: variables beside the usual ones. torchrun: more of its own options. starter: what stands before
    the module's name instead. What still runs at the end of the block is killed.
    """
    started: list[Started] = []

    def launch(
        *words: object,
        module: str = "training.gpt",
        ranks: int | None = None,
        environment: Mapping[str, str] | None = None,
        torchrun: Sequence[str] = (),
        starter: Sequence[str] | None = None,
    ) -> Started:
        command = [sys.executable, "-m"]
        if ranks is not None:
            program = Path(sysconfig.get_path("scripts"), "torchrun")
            command = [str(program), "--standalone", f"--nproc-per-node={ranks}", *torchrun, "-m"]
        if starter is not None:
            command = list(starter)
        output = folder / f"output-{len(started)}"
        output.mkdir()
        started.append(Started([*command, module, *map(str, words)], output, environment))
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


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    """Starts commands for one test; see `launching`."""
    with launching(tmp_path) as start:
        yield start


def prepare(folder: Path, *words: object) -> Path:
    """A data set prepared by the real command."""
    with launching(folder) as launch:
        output = folder / "data"
        result = launch("--tokenizer", "word", "--output", output, *words, module="data_prep.tatoeba").wait()
        assert result.status == 0, result
        return output


@pytest.fixture(scope="session")
def sample_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample corpus, prepared with the word tokenizer and one vocabulary."""
    return prepare(tmp_path_factory.mktemp("sample"), "--source", "sample")


@pytest.fixture(scope="session")
def real_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real sentence pairs, prepared likewise; skips where the file is not at hand."""
    if not REAL_TATOEBA.is_file():
        pytest.skip(f"the real Tatoeba file is not at {REAL_TATOEBA} (RELAY_DATA names the folder above it)")
    return prepare(tmp_path_factory.mktemp("real"), "--source", REAL_TATOEBA)


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """This worker's own SLURM, started when it is first asked for."""
    from tests.slurm_cluster import slurm_cluster

    with slurm_cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture
def cluster(slurm: SlurmCluster) -> Iterator[SlurmCluster]:
    """A SLURM in which no job is left by another test."""
    yield slurm
    slurm.clear()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MB that can be filled, at no one else's cost; skips where mounting is not allowed."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if shutil.which("mount") is None:
        pytest.skip("there is no `mount` command to make a small disk with")
    words = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    mounted = subprocess.run(words, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small disk needs the right to mount: {mounted.stderr.strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)
