"""What several tests need: prepared data, and commands started as people start them."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.commands import REAL_TATOEBA, Launch, launching, prepare
from tests.support.disks import mounted
from tests.support.once import make_shared_folder, once, remove_shared_folder

if TYPE_CHECKING:
    from tests.support.slurm_cluster import SlurmCluster


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # the one that starts the workers, or the only one
        make_shared_folder()


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        remove_shared_folder()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What this machine lacks: a line each, with how to get it."""
    reasons = Counter(
        report.longrepr[2].removeprefix("Skipped: ") for report in terminalreporter.stats.get("skipped", [])
    )
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"skipped {count}: {reason}")


def takes_long(item: pytest.Item) -> bool:
    """What has a time limit of its own, the benches among it; and real launchers, notebooks and copies of the tree."""
    slow = ("test_launchers", "test_prove", "test_kaggle", "test_mutations")
    return item.get_closest_marker("timeout") is not None or item.path.stem in slow


@pytest.hookimpl(trylast=True)  # behind the choice of tests by marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What waits for SLURM comes first on half of the workers, and what takes long first on the others.

    Begun last, it would leave the other workers idle.
    """
    slurm = [item for item in items if "cluster" in getattr(item, "fixturenames", ())]
    long = [item for item in items if item not in slurm and takes_long(item)]
    rest = [item for item in items if item not in slurm and item not in long]
    # Each worker is dealt as many tests, those that stand together.
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    waiting = max(1, workers // 2)
    others = max(1, workers - waiting)
    first = [
        *(slurm[n::waiting] for n in range(waiting)),
        *(long[len(long) * n // others : len(long) * (n + 1) // others] for n in range(others)),
    ]
    share = len(items) // workers
    items.clear()
    for worker, begin in enumerate(first):
        filling = max(0, share - len(begin)) if worker < len(first) - 1 else len(rest)
        items += [*begin, *rest[:filling]]
        del rest[:filling]


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    """Starts commands for one test; see `launching`."""
    with launching(tmp_path) as start:
        yield start


@pytest.fixture
def handlers() -> Iterator[None]:
    """What a test starts in this process takes signals over; this gives them back."""
    names = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGTSTP")
    kept = {signal.Signals[name]: signal.getsignal(signal.Signals[name]) for name in names}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def sample_data() -> Path:
    """The sample corpus, prepared with the word tokenizer and one vocabulary."""
    return once("sample", lambda folder: prepare(folder, "--source", "sample")) / "data"


@pytest.fixture(scope="session")
def two_vocabularies() -> Path:
    """The sample corpus with a vocabulary for each side."""
    words = ("--source", "sample", "--vocabularies", "separate")
    return once("two-vocabularies", lambda folder: prepare(folder, *words)) / "data"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The real sentence pairs, prepared likewise; skips where the file is not at hand."""
    if not REAL_TATOEBA.is_file():
        pytest.skip(f"the real Tatoeba file is not at {REAL_TATOEBA} (RELAY_DATA names the folder above it)")
    return once("real", lambda folder: prepare(folder, "--source", REAL_TATOEBA)) / "data"


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """This worker's own SLURM, started when it is first asked for."""
    from tests.support.slurm_cluster import slurm_cluster

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
    with mounted(tmp_path / "disk", "size=2m") as disk:
        yield disk
