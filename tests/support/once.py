"""What is made once for all workers of one run of the tests: prepared data, reference runs, models, zygotes.

Nothing is kept from one run to the next, since a cache would hide a reference that has come to be wrong. Whoever gets a
folder only reads it; a test that changes something takes a copy.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

_VARIABLE = "RELAY_TESTS_FOLDER"


def make_shared_folder() -> None:
    """To be called before the workers start, which inherit where it is."""
    os.environ[_VARIABLE] = tempfile.mkdtemp(prefix="relay-tests-")
    os.environ["XDG_CACHE_HOME"] = f"{os.environ[_VARIABLE]}/cache"  # the user's own keeps nothing of the tests


def remove_shared_folder() -> None:
    shutil.rmtree(os.environ.pop(_VARIABLE), ignore_errors=True)


def shared_folder() -> Path:
    """This test run's own folder."""
    return Path(os.environ[_VARIABLE])


def once(name: str, make: Callable[[Path], object]) -> Path:
    """A folder that `make` has filled, by whichever worker asked first; the others wait for it."""
    folder = shared_folder() / name
    done = folder.with_suffix(".done")
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of one who failed
            folder.mkdir()
            make(folder)
            done.touch()
    return folder
