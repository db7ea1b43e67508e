"""Disks of their own, which can be filled or read-only at no one else's cost; and a folder that root does not own."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import pytest


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A new disk in memory at `folder`, with options of `mount`; skips where mounting is not allowed."""
    folder.mkdir()
    if shutil.which("mount") is None:
        pytest.skip("there is no `mount` command to make a small disk with (apt install mount)")
    words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a small disk needs the right to mount, which root has: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@contextmanager
def not_as_root() -> Iterator[Path]:
    """An empty folder of a user who, unlike root, may not write what its mode forbids; this process is that user."""
    import_module("torch._dynamo")  # which an optimizer imports late: others may not be able to read root's Python
    user, nobody = os.geteuid(), 65534
    with tempfile.TemporaryDirectory() as folder:  # root's own temporary folders are closed to others
        if user == 0:
            os.chown(folder, nobody, nobody)
            os.seteuid(nobody)
        try:
            yield Path(folder)
        finally:
            os.seteuid(user)
