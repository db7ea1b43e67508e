"""What was found out about large files, remembered on this machine so that the next start need not read them again.

A file is known again by where it lies, its size, its times and its inode. What is remembered stands in the user's own
cache folder, which nobody else may write to; where there is none, everything is found out anew.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from training.base.files import lock, open_in_place, read_plain, sha256_of, write_atomically

# A file that was changed so shortly before may be changed again within one tick of the file system's clock.
_SETTLED_S = 2.0


def sha256_once(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal; read once by one process of a machine. Raises OSError."""
    about = path.stat()
    key = f"{path.resolve()}\0{about.st_dev} {about.st_ino} {about.st_size} {about.st_mtime_ns} {about.st_ctime_ns}"
    with _remembered(key) as entry:
        if (known := _read(entry)) is not None:
            return known
        found = sha256_of(path)
        if abs(time.time() - about.st_ctime) > _SETTLED_S:
            _write(entry, found)
        return found


@contextmanager
def found_good(what: str) -> Iterator[bool]:
    """Whether a block with `what` was once left without an error; if not, it is remembered when this one is.

    what: a text that names both the content (by its SHA-256) and the checks. Other processes wait meanwhile.
    """
    with _remembered(what) as entry:
        known = _read(entry) is not None
        yield known
        if not known:
            _write(entry, "good")


@contextmanager
def _remembered(key: str) -> Iterator[Path | None]:
    """The file for what is known of `key`, held by this process; None where nothing can be remembered."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "relay" / "known-files"
    entry = folder / hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        about = folder.stat()
        if about.st_uid != os.geteuid() or about.st_mode & 0o022:
            raise PermissionError
        held = open_in_place(entry.with_suffix(".lock"))
    except OSError:
        yield None
        return
    with held:
        lock(held, wait=True)
        yield entry


def _read(entry: Path | None) -> str | None:
    if entry is not None:
        with suppress(OSError, UnicodeDecodeError):
            return read_plain(entry, most_bytes=64).decode("ascii")
    return None


def _write(entry: Path | None, text: str) -> None:
    if entry is not None:
        with suppress(OSError):  # a full disk
            write_atomically(entry, text)
