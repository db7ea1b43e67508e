"""The one place that writes files: a file or folder is published whole, or it does not exist.

Everything is written under a temporary name in the same folder, brought to the disk (fsync), and renamed. A kill at
any moment leaves the previous version in place, and at most one temporary that the next write to the same path
removes. One process writes a path at a time: for a folder `temporary_folder` checks that, for a file the caller does.

A folder may be one in which others write as well. So a name that we write to is never followed to where a link leads:
what stands there is removed, and the file is made anew. The few files that are written in place (`open_in_place`) are
plain ones.
"""

from __future__ import annotations

import difflib
import errno
import hashlib
import os
import re
import shutil
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from io import BufferedReader, FileIO
from pathlib import Path
from typing import IO, Any, BinaryIO

from pydantic_core import from_json
from safetensors import SafetensorError

from training.base.errors import UserError

_MENDABLE = {
    errno.ENOSPC: "no space left on the disk of {path}: free some room or choose another {option}",
    errno.EDQUOT: "the disk quota is used up at {path}: free some room or choose another {option}",
    errno.EROFS: "{refused} is on a read-only file system: choose another {option}",
    errno.EACCES: "no permission to write {refused}: choose another {option} or change the permissions there",
    errno.EPERM: "writing {refused} is not permitted: choose another {option} or change the permissions there",
    errno.EEXIST: "{path} cannot be made, a part of this path is a file: choose another {option}",
    errno.ENOTDIR: "{path} cannot be made, a part of this path is a file: choose another {option}",
    errno.ENOTEMPTY: "{path} was made meanwhile, by something else: choose another {option}",
    errno.ENAMETOOLONG: "the name {path} is too long for this file system: choose a shorter {option}",
}

# How whatever lies under a name is opened: a link is not followed, and a pipe does not keep us waiting.
_HARDENED = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)

# What the system says where a link or a socket lies.
_NO_FILE = (errno.ELOOP, errno.ENXIO)

# A path within a folder, of plain names: nothing hidden, no way out.
PATH_WITHIN = r"\w[\w.-]*(/\w[\w.-]*)*"

# How often something under our name is removed that others put there again.
_TRIES = 10


@contextmanager
def writing_to(path: Path, option: str = "--output") -> Iterator[None]:
    """Turns the disk errors that a user can mend into a UserError; `option` is the key that chose `path`.

    Put it around everything that writes `path`, outside of whatever removes the unfinished work.
    """
    try:
        with _with_the_systems_number():
            yield
    except OSError as error:
        reason = _MENDABLE.get(error.errno or 0)
        if reason is None:
            raise
        known = os.strerror(error.errno or 0)
        more = f" ({error.strerror})" if error.strerror and error.strerror != known else ""
        said = reason.format(path=path, option=option, refused=_refused(error, path))
        if error.errno == errno.EEXIST and (link := dangling(path)) is not None:
            said = f"{link}: mount or make that, or choose another {option}"
        raise UserError(f"{said}{more}; nothing unfinished was left behind") from error


@contextmanager
def _with_the_systems_number() -> Iterator[None]:
    """safetensors wraps what the system said in an error of its own, and the number stands in its text alone."""
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def _refused(error: OSError, path: Path) -> Path:
    """What of `path` may not be written: a file that is there, or the folder in which none may be made."""
    named = error.filename2 or error.filename
    place = Path(named) if isinstance(named, str) else path
    return place if os.access(place, os.F_OK) else place.parent


def dangling(path: Path) -> str | None:
    """In words, the link on the way to `path` that leads to nothing; None where there is none."""
    for each in (path, *path.parents):
        if each.is_symlink() and not os.access(each, os.F_OK):
            return f"{each} is a link to {os.path.realpath(each)}, which is not there"
    return None


def check_room(folder: Path, needed_bytes: int) -> None:
    """Raises the OSError of a full disk unless so much is free: better known before the first byte than after."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise OSError(errno.ENOSPC, f"{needed_bytes / 1e6:,.1f} MB needed, {free / 1e6:,.1f} MB free")


def fsync_folder(folder: Path) -> None:
    """Brings the names in `folder` (creations, renames) to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot fsync a folder, and need not
            raise
    finally:
        os.close(descriptor)


def _fsync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class NotPlainError(OSError):
    """Something else than a file lies where one is read."""


def create(path: Path) -> BinaryIO:
    """A new file to write; whatever had its name is removed, and a link not followed. Raises OSError."""
    for _ in range(_TRIES):
        with suppress(FileExistsError):
            return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _HARDENED, 0o666), "wb")
        remove(path)
    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))


def open_in_place(path: Path) -> FileIO:
    """A file to read and to append to, made if it is not there; what is no plain file is removed. Raises OSError."""
    for _ in range(_TRIES):
        try:
            file = FileIO(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | _HARDENED, 0o666), "ab+")
        except OSError as error:
            if error.errno not in _NO_FILE:
                raise
        else:
            if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return file
            file.close()
        remove(path)
    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))


def open_plain(path: Path) -> BufferedReader:
    """Opens a plain file to read, in whoever's folder. Raises NotPlainError for anything else, and OSError.

    A link might lead to what only we may read, a pipe would keep us waiting, and a device may never come to an end.
    """
    try:
        file = os.fdopen(os.open(path, os.O_RDONLY | _HARDENED), "rb")
    except OSError as error:
        if error.errno in _NO_FILE:
            raise NotPlainError(error.errno, "it is no plain file", str(path)) from None
        raise
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        return file
    file.close()
    raise NotPlainError(errno.EINVAL, "it is no plain file", str(path))


def read_plain(path: Path, most_bytes: int = 1 << 26) -> bytes:
    """What such a file holds. Raises OSError, also where it is larger than `most_bytes`."""
    with open_plain(path) as file:
        if os.fstat(file.fileno()).st_size > most_bytes:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), str(path))
        return file.read(most_bytes)


def read_json(path: Path) -> Any:
    """What such a file of JSON holds. Raises OSError and ValueError, also where it is nested without end."""
    return from_json(read_plain(path))


def copy_plain(source: Path, target: Path) -> None:
    """Publishes a copy of such a file."""
    with open_plain(source) as file, open_atomically(target) as copy:
        shutil.copyfileobj(file, copy)


def copy_tree(
    source: Path, target: Path, copy: Callable[[Path, Path], object] = copy_plain, *, hidden: bool = True
) -> None:
    """Copies a plain file, or those of a folder into what is there of it; it ends with the first error.

    Links are left out: they may lead to what nobody meant to copy. hidden: whether to take names with a leading dot.
    """
    if source.is_symlink() or (source.name.startswith(".") and not hidden):
        return
    if source.is_file():
        copy(source, target)
    elif source.is_dir():
        if target.is_symlink():
            target.unlink()
        target.mkdir(exist_ok=True)
        for each in source.iterdir():
            copy_tree(each, target / each.name, copy, hidden=hidden)


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _set_aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.replaced")


@contextmanager
def open_atomically(path: Path, within: Path | None = None) -> Iterator[BinaryIO]:
    """A binary file to write; it appears as `path` when the block ends, and not at all if the block fails.

    One process at a time may do so. within: a folder of its own on the same disk, where there may be others.
    """
    partial = _partial(within / path.name if within else path)
    try:
        with create(partial) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def write_atomically(path: Path, content: bytes | str, within: Path | None = None) -> None:
    """Writes `content` (text as UTF-8) to `path`, replacing what is there. Raises OSError; see `writing_to`.

    within: see `open_atomically`.
    """
    with open_atomically(path, within) as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)


@contextmanager
def temporary_folder(final: Path) -> Iterator[Path]:
    """An empty folder beside `final` to build in and then hand to `publish_folder`; removed if the block fails.

    What a killed earlier process left under that name is removed first. Raises UserError when a living process is
    building the same folder.
    """
    partial = _partial(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    folder = _own_folder(partial)
    if folder is None:
        raise UserError(f"another process is writing {final} right now; wait until it has finished")
    try:
        try:
            yield partial
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    finally:
        os.close(folder)  # also unlocks


def _own_folder(path: Path) -> int | None:
    """Makes an empty folder and returns it open and locked; None where a living process holds the one that is there."""
    for _ in range(_TRIES):
        with ExitStack() as stack:
            try:
                left = os.open(path, os.O_RDONLY | os.O_DIRECTORY | _HARDENED)
            except FileNotFoundError:
                pass
            except OSError:  # no folder
                remove(path)
            else:
                stack.callback(os.close, left)
                if not lock(left):
                    return None
                with suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(left), os.lstat(path)):  # else it is another process's by now
                        remove(path)
        with suppress(FileExistsError, FileNotFoundError):
            path.mkdir()
            folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | _HARDENED)
            if lock(folder) and os.path.samestat(os.fstat(folder), os.lstat(path)):
                return folder
            os.close(folder)  # another process has removed it before it was locked
    return None


def lock(file: int | IO[Any], *, wait: bool = False) -> bool:
    """Takes the lock on an open file or folder: held until that is closed, or until the process ends, however it ends.

    Returns whether this process has it; with `wait` it always will. Where there are no locks (on some network file
    systems, and on Windows) the answer is yes.
    """
    if sys.platform == "win32":
        return True
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Holds the lock of a folder that is there; who asks for it meanwhile waits. Raises OSError."""
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        lock(opened, wait=True)
        yield
    finally:
        os.close(opened)  # also unlocks


def check_folder_of(path: Path, option: str = "--output") -> None:
    """Raises UserError where `path` is a folder, or its own is not there; option: what names the file to be made."""
    if path.is_dir():
        raise UserError(f"{option} {path} is a folder: name a file in it")
    if not path.parent.is_dir():
        raise UserError(f"{option} {path}: there is no folder {path.parent}; make it first")


def nearest_folder(path: Path) -> str:
    """What to add to the message that there is no folder `path`: where a link leads, a name nearly the same, or ""."""
    if (link := dangling(path)) is not None:
        return f" ({link})"
    names: list[str] = []
    with suppress(OSError):
        names = [each.name for each in path.parent.iterdir() if each.is_dir()]
    near = difflib.get_close_matches(path.name, names, n=1)
    return f" (did you mean {path.parent / near[0]}?)" if near else ""


def is_own_folder(path: Path) -> bool:
    """Whether this is a folder of this user's, and no link, in which nobody else can have put anything."""
    try:
        about = path.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(about.st_mode) and about.st_uid == os.geteuid() and not about.st_mode & 0o022


def is_there(path: Path) -> bool:
    """Whether a file that was found in a folder is a file and lies there, too; a link may lead within the folder.

    In the hub's cache it may lead to the blobs of the same repository.
    """
    folder, real = path.parent.resolve(), path.resolve()
    homes = [folder, *([folder.parents[1] / "blobs"] if folder.parent.name == "snapshots" else [])]
    return real.is_file() and any(real.is_relative_to(home) for home in homes)


def check_there(paths: Iterable[Path]) -> None:
    """Raises UserError for what was found in a folder and `is_there` not."""
    for path in paths:
        if not is_there(path):
            raise UserError(f"{path} is no file in that folder, or a link out of it: copy the file there, or name it")


def remove(path: Path) -> None:
    """Removes a file, a link, or a folder with all that is in it, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def publish_folder(temporary: Path, final: Path, *, replace: bool = False) -> None:
    """Makes the finished folder `temporary` appear as `final`: all of it on the disk first, then one rename.

    With `replace` an existing `final` is set aside for the instant between two renames, and removed afterwards; if the
    process is killed in that instant, `recover` brings it back. Without, an existing `final` that is not empty is an
    OSError.
    """
    for folder, _, files in os.walk(temporary, topdown=False):
        for name in files:
            _fsync_file(Path(folder, name))
        fsync_folder(Path(folder))
    aside = _set_aside(final)
    if replace and os.path.lexists(final):
        recover(final)
        final.rename(aside)
    try:
        temporary.rename(final)
    except OSError:
        if os.path.lexists(aside):
            aside.rename(final)
        raise
    fsync_folder(final.parent)
    remove(aside)


def recover(final: Path) -> bool:
    """Ends a replacement of `final` that was killed halfway; true if the previous `final` had to be brought back."""
    aside = _set_aside(final)
    if not os.path.lexists(aside):
        return False
    if aside.is_symlink() or os.path.lexists(final):
        remove(aside)
        return False
    aside.rename(final)
    fsync_folder(final.parent)
    return True


def drop_from_cache(path: Path) -> None:
    """Asks the system to forget a file's content, so that the next read comes from the disk. Only Linux knows how."""
    if hasattr(os, "posix_fadvise"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
