"""What was found out about large files, remembered on this machine so that the next start need not read them again.

A file is known again by where it lies, its size, its times and its inode. What is remembered stands in the user's own
cache folder, which nobody else may write to; where there is none, everything is found out anew.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

from training.base.files import is_own_folder, lock, open_in_place, sha256_of

# A file that was changed so shortly before may be changed again within one tick of the file system's clock.
_SETTLED_S = 2.0


def sha256_once(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal; read by one process of a machine, once. Raises OSError."""
    about = path.stat()
    key = f"{path.resolve()}\0{about.st_dev} {about.st_ino} {about.st_size} {about.st_mtime_ns} {about.st_ctime_ns}"
    with _held(key) as entry:
        known = _read(entry)
        if not known:
            known = sha256_of(path)
            if abs(time.time() - about.st_ctime) > _SETTLED_S:
                _write(entry, known)
        return known


def check_once(what: str, check: Callable[[], None]) -> None:
    """Calls `check`, which raises an error for what is not good, unless it was called for the same before.

    what: a text that names the content, by its SHA-256, and the check.
    """
    with _held(what) as entry:
        if not _read(entry):
            check()
            _write(entry, hashlib.sha256(what.encode()).hexdigest())


@contextmanager
def _held(key: str) -> Iterator[FileIO | None]:
    """The file for what is known of `key`, which other processes wait for; None where nothing can be remembered."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "relay" / "known-files"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not is_own_folder(folder):
            raise PermissionError
        entry = open_in_place(folder / hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest())
    except OSError:
        yield None
        return
    with entry:
        lock(entry, wait=True)
        yield entry


def _read(entry: FileIO | None) -> str | None:
    if entry is None:
        return None
    entry.seek(0)
    text = entry.read(65).decode("ascii", "replace")
    return text if re.fullmatch("[0-9a-f]{64}", text) else None


def _write(entry: FileIO | None, text: str) -> None:
    if entry is not None:
        with suppress(OSError):  # a full disk
            entry.truncate(0)
            entry.write(text.encode())
