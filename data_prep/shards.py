"""Work in many processes that a kill does not undo, and its results put together without holding them in memory.

Promises: a finished shard is on the disk whole, and the next start with the same key does not make it again; a start
with another key uses nothing of it; a worker that dies, or whose parent dies, leaves no process and no half shard.

`datasets.map` (5.2) would break the first and the last: it keeps a file only once a process has done all of its share,
so that a kill shortly before the end loses everything, and its processes outlive a parent that was killed.
"""

from __future__ import annotations

import glob
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from training.base.console import UserError, say
from training.base.files import create, is_own_folder, lock, open_atomically, read_json, remove, write_atomically

Job = TypeVar("Job")
Done = TypeVar("Done")

_KEY = "key.json"

JOBS_WAITING = 4  # for each process, done or not


class Workers:
    """So many processes that apply a function to jobs; with one, this process does it itself.

    `prepare()` runs once in this process and in each of the others, before its first job. On Linux those are forks,
    which share with their parent what it has loaded already.
    """

    def __init__(self, count: int, prepare: Callable[[], None]):
        self._count, self._prepare = count, prepare
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers:
        self._prepare()
        if self._count > 1:
            context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
            self._pool = ProcessPoolExecutor(self._count, context, initializer=_begin, initargs=(self._prepare,))
            # Forks hold what their parent has open when they begin, which should be no lock that it takes later.
            self._pool.submit(int).result()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the processes. A job takes a second or two: those at work finish, the others are not begun."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def map(self, function: Callable[[Job], Done], jobs: Iterable[Job]) -> Iterator[Done]:
        """What `function` makes of each job, in the order of the jobs. Raises UserError when a process was killed.

        Jobs are taken as they can be done, so that few of them are in memory.
        """
        if self._pool is None:
            yield from map(function, jobs)
            return
        waiting: deque[Future[Done]] = deque()
        try:
            for job in jobs:
                waiting.append(self._pool.submit(function, job))
                if len(waiting) > JOBS_WAITING * self._count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise UserError(
                "a worker process was killed, probably because memory ran out: pass fewer --workers; what is finished "
                "and kept is not done again"
            ) from None


def in_own_process(function: Callable[[], Done]) -> Done:
    """What `function` returns, from a process of its own: its memory goes back to the system, which that of libraries
    does not always within a process. Raises UserError when it was killed.
    """
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    remember = partial(_remember, function)
    with ProcessPoolExecutor(1, context, initializer=_begin, initargs=(remember,)) as pool:
        try:
            done: Done = pool.submit(_call_remembered).result()
        except BrokenProcessPool:
            raise UserError("a process was killed, probably because memory ran out") from None
        return done


_remembered: Callable[[], Any]


def _remember(function: Callable[[], Any]) -> None:
    global _remembered
    _remembered = function


def _call_remembered() -> Any:
    return _remembered()


def _begin(prepare: Callable[[], None]) -> None:
    # A worker that outlives its parent for a moment must not keep the next start from what that had locked.
    for opened in _held:
        os.close(opened)
    # A signal to the whole group is meant for the parent, which ends its workers in good order.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # A parent killed outright ends nobody; without this its workers would wait for it for ever.
    Thread(target=_leave_with_parent, daemon=True).start()
    prepare()


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@contextmanager
def shard_folder(output: Path, key: dict[str, object]) -> Iterator[Path]:
    """The folder beside `output` that keeps finished shards from one start to the next with an equal `key`.

    What another key left there is removed first. Removed when the block ends well or the disk is full; kept otherwise.
    """
    folder = output.with_name(f".{output.name}.shards")
    keep = False
    try:
        if not is_own_folder(folder) or _key_of(folder) != key:
            remove(folder)
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir(mode=0o700)
            write_atomically(folder / _KEY, json.dumps(key))
        yield folder
    except OSError:
        raise  # a disk that is full is to be freed, not kept full
    except BaseException:
        finished = len(list(folder.glob("*.arrow")))
        keep = finished > 0
        if keep:
            say(f"{finished:,} finished shards are kept in {folder}; the same command goes on from there")
        raise
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def scratch_folder(output: Path) -> Iterator[Path]:
    """An empty folder beside `output`, removed at the end of the block; after a kill the next start removes it."""
    begin = f".{output.name}.unpacked-"
    output.parent.mkdir(parents=True, exist_ok=True)
    for left in output.parent.glob(f"{glob.escape(begin)}*"):
        with suppress(FileNotFoundError), _locked(left) as is_free:  # its owner may have come to its end
            if is_free:
                shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=begin, dir=output.parent))
    with _locked(folder):
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


_held: set[int] = set()  # the folders that `_locked` has open


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Holds the lock of a folder, unless another process does; false then."""
    opened = os.open(folder, os.O_RDONLY)
    _held.add(opened)
    try:
        yield lock(opened)
    finally:
        _held.remove(opened)
        os.close(opened)


def _key_of(folder: Path) -> object:
    try:
        return read_json(folder / _KEY)
    except (OSError, ValueError):
        return None


def write_shard(path: Path, columns: dict[str, pa.Array], about: dict[str, Any]) -> None:
    """Writes a table, and `about` it what JSON can hold, atomically."""
    table = pa.table(columns).replace_schema_metadata({"about": json.dumps(about)})
    with open_atomically(path) as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


def read_shard(path: Path) -> tuple[pa.Table, dict[str, Any]]:
    """A shard's table, memory-mapped, and what was written about it."""
    table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
    return table, json.loads(table.schema.metadata[b"about"])


class Column:
    """A column of large strings or of large lists of int32, grown from those of shards; its content is on the disk."""

    def __init__(self, path: Path, kind: pa.DataType):
        self._path, self._kind = path, kind
        self._file = create(path)
        self._ends = [np.zeros(1, dtype=np.int64)]
        self._digest = hashlib.sha256()

    def append(self, column: pa.Array) -> None:
        """Adds the rows of a shard's column, which is of the same kind."""
        offsets = np.frombuffer(column.buffers()[1], dtype=np.int64)[column.offset :][: len(column) + 1]
        width = 4 if pa.types.is_large_list(self._kind) else 1
        content = memoryview(column.buffers()[-1] or b"")[offsets[0] * width : offsets[-1] * width]
        self._file.write(content)
        self._digest.update(content)
        self._ends.append(self._ends[-1][-1] + offsets[1:] - offsets[0])

    def finish(self) -> tuple[pa.Array, str]:
        """The whole column in one piece, a view on the file, and the SHA-256 of its content, whatever its shards."""
        self._file.close()
        offsets = np.concatenate(self._ends)
        self._digest.update(offsets.tobytes())
        # An empty file cannot be mapped.
        data = pa.memory_map(str(self._path)).read_buffer() if self._path.stat().st_size else pa.py_buffer(b"")
        if pa.types.is_large_list(self._kind):
            values = pa.Array.from_buffers(pa.int32(), int(offsets[-1]), [None, data])
            column = pa.LargeListArray.from_arrays(pa.array(offsets), values)
        else:
            column = pa.LargeStringArray.from_buffers(len(offsets) - 1, pa.py_buffer(offsets), data)
        return column, self._digest.hexdigest()
