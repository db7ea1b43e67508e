"""Reads back what wandb wrote into a run folder: the steps and the summary of each visit, whatever ended it.

wandb keeps a visit in `wandb/[offline-]run-DATE-ID/run-ID.wandb`: records in LevelDB's log framing, each a protobuf
message. Promises: only whole records with a right checksum count, so the whole part of a file that a kill has torn is
good; and once `seal` has been called, no process of an earlier visit changes the file any more.
"""

from __future__ import annotations

import json
import shutil
import struct
import zlib
from contextlib import suppress
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any

from training.base.files import NotPlainError, create, read_plain, write_atomically

_MOST_BYTES = 1 << 30
# What wandb writes of a training and of an evaluation.
_KINDS = {
    *("run", "history", "summary", "output", "output_raw", "config", "files", "stats", "artifact", "exit", "header"),
    *("footer", "metric", "telemetry", "preempting", "final", "noop_link_artifact", "environment"),
}
_FILE_HEADER = 7  # ":W&B", a magic number, a version
_BLOCK = 32 * 1024  # a chunk never crosses a block's border
_CHUNK = struct.Struct("<IHB")  # checksum of kind and payload, length of the payload, kind
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


@dataclass(frozen=True)
class VisitLog:
    """What the file of one visit holds."""

    path: Path
    steps: frozenset[int]
    summary: dict[str, str]  # JSON texts
    begun: bool
    ended: bool
    whole: int  # bytes up to the first damage
    odd: str | None  # what in it no visit of Relay's writes, and `wandb sync` might send from anywhere on this machine

    @property
    def is_offline(self) -> bool:
        return self.path.parent.name.startswith("offline-")

    @property
    def is_uploaded(self) -> bool:
        """True if `wandb sync` has sent it to a server, or need not."""
        return self.path.with_name(f"{self.path.name}.synced").exists()

    def mark_uploaded(self) -> None:
        """From now on `wandb sync` skips it."""
        create(self.path.with_name(f"{self.path.name}.synced")).close()

    def seal(self) -> None:
        """Cuts the file of a visit that did not end by itself back to what was read; removes it if it never began.

        wandb's own process outlives a killed training for a moment and may write once more. The file is replaced, not
        changed, so that it writes into the old one, which has no name any more. (`wandb sync` ends with an error at a
        torn record, and uploads nothing at all if one of its folders has no run in it.)
        """
        if not self.begun:
            shutil.rmtree(self.path.parent, ignore_errors=True)
        elif not self.ended:
            write_atomically(self.path, read_plain(self.path, _MOST_BYTES)[: self.whole])


def visit_logs(folder: Path, run_id: str) -> list[VisitLog]:
    """All visits to a run whose files wandb has put under this folder, oldest first."""
    name = escape(run_id)
    paths = sorted(
        folder.glob(f"wandb/*run-*-{name}*/run-{name}.wandb"),
        key=lambda path: path.parent.name.removeprefix("offline-"),
    )
    found = []
    for path in paths:
        with suppress(NotPlainError):
            found.append(_read(path))
    return found


def last_summary(logs: list[VisitLog]) -> dict[str, Any]:
    """The run's summary as these visits have left it, without wandb's own keys."""
    texts: dict[str, str] = {}
    for log in logs:
        texts |= log.summary
    return {key: json.loads(text) for key, text in texts.items() if not key.startswith("_")}


def read_records(path: Path) -> list[Any]:
    """The records (wandb_internal_pb2.Record) of a file, up to the first damage."""
    return _records(read_plain(path, _MOST_BYTES))[0]


def item_key(item: Any) -> str:
    """The key of a history or summary item, which wandb writes in one of two ways."""
    return item.key or ".".join(item.nested_key)


def _read(path: Path) -> VisitLog:
    steps: set[int] = set()
    summary: dict[str, str] = {}
    kinds: set[str] = set()
    odd = next((f"{each} is a link" for each in (path.parent / "files").rglob("*") if each.is_symlink()), None)
    records, whole = _records(read_plain(path, _MOST_BYTES))
    for record in records:
        kinds.add(kind := record.WhichOneof("record_type"))
        odd = odd or _odd(record, kind, path)
        if kind == "history":
            steps.add(record.history.step.num)
        elif kind == "summary":
            summary |= {item_key(item): item.value_json for item in record.summary.update}
    return VisitLog(path, frozenset(steps), summary, "run" in kinds, "exit" in kinds, whole, odd)


def _odd(record: Any, kind: str | None, path: Path) -> str | None:
    """What a record would have `wandb sync` do that is none of Relay's, or None."""
    if kind not in _KINDS:
        return f"a record of kind {kind}"
    own, cache = path.parent / "files", path.parents[1]
    if kind == "files":
        places = [own / each.path for each in record.files.files]
    elif kind == "artifact":
        places = [Path(each.local_path) for each in record.artifact.manifest.contents if each.local_path]
        places += [Path(each) for each in [record.artifact.manifest.manifest_file_path] if each]
        places += [Path("/", each.ref) for each in record.artifact.manifest.contents if each.ref]
        own = cache  # tables lie in wandb's own cache there
    else:
        places = []
    return next((f"{each} lies elsewhere" for each in places if not each.resolve().is_relative_to(own.resolve())), None)


def _records(content: bytes) -> tuple[list[Any], int]:
    """The whole records in `content`, and the number of bytes that hold them."""
    from wandb.proto.wandb_internal_pb2 import Record

    messages, whole = _split(content)
    return [Record.FromString(message) for message in messages], whole


def _split(content: bytes) -> tuple[list[bytes], int]:
    """LevelDB's framing: the whole records in `content`, and the number of bytes that hold them."""
    records: list[bytes] = []
    parts: list[bytes] = []
    position = end = min(_FILE_HEADER, len(content))
    while True:
        room = _BLOCK - position % _BLOCK
        if room < _CHUNK.size:  # too little for a chunk: zeros up to the next block
            position += room
        if position + _CHUNK.size > len(content):
            return records, end
        checksum, length, kind = _CHUNK.unpack_from(content, position)
        position += _CHUNK.size
        payload = content[position : position + length]
        expected = zlib.crc32(payload, zlib.crc32(bytes([kind])))
        begins = kind in (_FULL, _FIRST)
        if len(payload) < length or checksum != expected or not _FULL <= kind <= _LAST or begins == bool(parts):
            return records, end
        position += length
        parts.append(payload)
        if kind in (_FULL, _LAST):
            records.append(b"".join(parts))
            parts, end = [], position
