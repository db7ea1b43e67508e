"""Programs that tests need beside Python's packages: found, or installed by apt where that is allowed, or a skip."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest


def program(names: Sequence[str], *packages: str) -> str:
    """The path of the first of these programs that is here, or is once the packages were installed.

    Skips the test where it cannot be had.
    """
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])

    def find() -> str | None:
        return next(filter(None, (shutil.which(name, path=path) for name in names)), None)

    with Path(tempfile.gettempdir(), f"relay-tests-apt-{os.getuid()}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # apt works for one at a time, and several test runs may want the same
        found = find()
        if found is not None:
            return found
        if os.getuid() != 0 or shutil.which("apt-get") is None:
            pytest.skip(
                f"there is no {names[0]}, and only root can install one here (apt install {' '.join(packages)})"
            )
        for words in (("update",), ("install", "-y", "--no-install-recommends", *packages)):
            environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
            done = subprocess.run(["apt-get", "-q", *words], env=environment, capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"{names[0]} cannot be installed: apt-get {words[0]}: {done.stderr.strip()[-300:]}")
    found = find()
    if found is None:
        pytest.skip(f"apt has no {names[0]} for this system")
    return found
