"""The two passes over a corpus: read everything, then tokenise what was chosen; both in many processes.

The first pass keeps of each record where it stands and what the split must know (its task, and hashes of what it is
compared by), some hundred bytes; the second reads the chosen ones again, in the order of their part. So memory is
bounded whatever the texts weigh.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_prep.records import Corpus, Malformed, Record, SourceFile, unique_id
from data_prep.shards import Column, Workers, lists, read_shard, write_dataset, write_shard
from data_prep.splits import StratifiedSplit
from training.base.console import warn
from training.base.progress import Progress
from training.data.chat import ChatTokenizer, Message, assistant
from training.data.text import normalise

BYTES_PER_PIECE = 4 << 20  # of a source file, read at a time


@dataclass(frozen=True)
class Work:
    """What every process needs. max_length: tokens of prompt and answer, at most."""

    tokenizer: ChatTokenizer
    corpus: Corpus
    max_length: int

    @cached_property
    def descriptors(self) -> list[int]:
        """The open source files; each process has its own."""
        return [os.open(file.path, os.O_RDONLY) for file in self.corpus.files]

    def __getstate__(self) -> dict[str, object]:
        return {"tokenizer": self.tokenizer, "corpus": self.corpus, "max_length": self.max_length}


_work: Work


def set_work(work: Work) -> None:
    """Gives this process what it needs for the functions below."""
    global _work
    _work = work


# --- first pass ------------------------------------------------------------------------------------------------------


@dataclass
class Piece:
    """What one piece of a source file holds; lines are counted from the piece's first, which is 0."""

    lines: int = 0
    blank: int = 0
    malformed: list[tuple[int, str, str]] = field(default_factory=list)
    ids: list[str | None] = field(default_factory=list)
    # Per record: line, offset, bytes, task, whether its answer is too short, hash of group, hash of all of it.
    rows: list[tuple[int, int, int, str, bool, int, int]] = field(default_factory=list)


@dataclass
class Records:
    """Where the records stand that may be used, and what else was found. All arrays have one entry per record."""

    file: np.ndarray
    offset: np.ndarray
    bytes: np.ndarray
    task: np.ndarray  # index into tasks
    group: np.ndarray  # uint64, equal where the normalised `Record.group` are
    uid: list[str]
    tasks: list[str]  # all that there are, left out or not
    lines: int
    blank: int
    malformed: list[dict[str, object]]
    counts: Counter[tuple[str, str]]  # (what, task): records, duplicates, too_short, left_out


def read_records(workers: Workers, corpus: Corpus) -> Records:
    """All records of the corpus but duplicates, answers that are too short, and the tasks to leave out."""
    files = corpus.files
    jobs = [(number, start, end) for number, file in enumerate(files) for start, end in _pieces(file)]
    lines = blank = 0
    malformed: list[dict[str, object]] = []
    counts: Counter[tuple[str, str]] = Counter()
    places: list[tuple[int, int, int]] = []
    tasks: list[str] = []
    groups: list[int] = []
    uids: list[str] = []
    taken: set[str] = set()
    seen: set[int] = set()
    first_line: Counter[int] = Counter()
    with Progress("reading", sum(file.bytes for file in files), "bytes") as progress:
        for (number, start, end), piece in zip(jobs, workers.map(_read_piece, jobs), strict=True):
            file = files[number]
            begin = 1 + first_line[number]
            for line, reason, text in piece.malformed:
                malformed.append({"file": file.path.name, "line": begin + line, "reason": reason, "text": text})
            for name, (line, offset, size, task, short, group, pair) in zip(piece.ids, piece.rows, strict=True):
                uid = unique_id(file, name, begin + line, taken)
                counts["records", task] += 1
                if task in corpus.left_out:
                    counts["left_out", task] += 1
                elif pair in seen:
                    counts["duplicates", task] += 1
                elif short:
                    counts["too_short", task] += 1
                else:
                    seen.add(pair)
                    places.append((number, offset, size))
                    tasks.append(task)
                    groups.append(group)
                    uids.append(uid)
            first_line[number] += piece.lines
            lines += piece.lines
            blank += piece.blank
            progress.advance(end - start)
    file_numbers, offsets, sizes = np.array(places, dtype=np.int64).reshape(-1, 3).T
    order = {task: place for place, task in enumerate(corpus.task_order)}
    names = sorted({task for _, task in counts}, key=lambda task: (order.get(task, len(order)), task))
    numbers = {task: number for number, task in enumerate(names)}
    task_numbers = np.array([numbers[task] for task in tasks], dtype=np.int64)
    group_hashes = np.array(groups, dtype=np.uint64)
    return Records(
        file_numbers, offsets, sizes, task_numbers, group_hashes, uids, names, lines, blank, malformed, counts
    )


def _pieces(file: SourceFile) -> Iterator[tuple[int, int]]:
    """Byte ranges of whole lines that together are the file."""
    with file.path.open("rb") as opened:
        start = 0
        while start < file.bytes:
            opened.seek(min(start + BYTES_PER_PIECE, file.bytes) - 1)
            opened.readline()
            yield start, opened.tell()
            start = opened.tell()


def _read_piece(job: tuple[int, int, int]) -> Piece:
    number, offset, end = job
    corpus = _work.corpus
    content = os.pread(_work.descriptors[number], end - offset, offset)
    lines = content.split(b"\n")
    if lines[-1] == b"":
        lines.pop()  # the end of the last line, not one more line
    piece = Piece(lines=len(lines))
    for line, raw in enumerate(lines):
        text = raw.removeprefix(b"\xef\xbb\xbf") if offset == 0 else raw  # a byte-order mark
        if not text.strip():
            piece.blank += 1
        else:
            try:
                record = corpus.read(text, corpus.files[number])
                check_template_accepts(record)
            except Malformed as error:
                piece.malformed.append((line, str(error), text[:80].decode("utf-8", "replace")))
            else:
                group = _hash(normalise(record.group))
                pair = _hash(*(turn["content"] for turn in record.turns), record.answer)
                piece.ids.append(record.id)
                piece.rows.append((line, offset, len(raw), record.task, corpus.is_short(record), group, pair))
        offset += len(raw) + 1
    return piece


def check_template_accepts(record: Record) -> None:
    """Raises Malformed if the template has no place for a turn, or a text would be read as a control token.

    As an end of turn, for one: training would learn to stop there.
    """
    refusal = _work.tokenizer.refusal(record.turns)
    if refusal is not None:
        raise Malformed(refusal)
    for name, text in record.texts():
        control = _work.tokenizer.control_text(text)
        if control is not None:
            raise Malformed(f"{name} holds {control}, which this tokenizer reads as a control token")


def _hash(*texts: str) -> int:
    """64 bits of the texts: among 300,000 records two are taken for the same once in 400 million such data sets."""
    digest = hashlib.blake2b(digest_size=8)
    for text in texts:
        content = text.encode()
        digest.update(len(content).to_bytes(8, "little") + content)
    return int.from_bytes(digest.digest(), "little")


# --- between the two -------------------------------------------------------------------------------------------------


def choose_questions(records: Records, split: StratifiedSplit) -> list[int]:
    """One test row of each task, the first in the seeded order that is not left out for its length."""
    chosen = []
    test = split.rows("test")
    for number, task in enumerate(records.tasks):
        rows = test[(records.task[test] == number) & (split.strata[test] == number)]
        found = next((row for row in rows.tolist() if _encode(_read_again(records, [row]))[0] is not None), None)
        if found is not None:
            chosen.append(found)
        elif len(rows):
            warn(f"no test record of {task} fits into --max_length, so it has no question in the table of answers")
    return chosen


# --- second pass -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Encoded:
    """A record as the model meets it."""

    ids: np.ndarray  # int32
    prompt_length: int
    messages: str
    truncated: bool


@dataclass(frozen=True)
class Shard:
    """A job: the records to tokenise, and the file to write."""

    path: Path
    places: list[tuple[int, int, int]]  # file, offset, bytes
    uids: list[str]


def tokenise(
    workers: Workers, folder: Path, records: Records, chosen: dict[str, np.ndarray], rows_per_shard: int
) -> dict[str, list[Path]]:
    """Makes the shards of each part in `folder`, those that are not there yet; returns all of them in order."""
    shards: dict[str, list[Shard]] = {}
    for part, rows in chosen.items():
        starts = range(0, len(rows), rows_per_shard)
        shards[part] = [
            _shard(folder / f"{part}-{number:05d}.arrow", records, rows[start : start + rows_per_shard].tolist())
            for number, start in enumerate(starts)
        ]
    todo = [shard for part in shards.values() for shard in part if not shard.path.exists()]
    total = sum(len(rows) for rows in chosen.values())
    done = total - sum(len(shard.uids) for shard in todo)
    with Progress("tokenising", total, "records", start=done) as progress:
        for count in workers.map(_make_shard, todo):
            progress.advance(count)
    return {part: [shard.path for shard in shards[part]] for part in shards}


def _shard(path: Path, records: Records, rows: list[int]) -> Shard:
    return Shard(path, [_place(records, row) for row in rows], [records.uid[row] for row in rows])


def _place(records: Records, row: int) -> tuple[int, int, int]:
    return int(records.file[row]), int(records.offset[row]), int(records.bytes[row])


def _read_again(records: Records, rows: Sequence[int]) -> list[Record]:
    return [_read(*_place(records, row)) for row in rows]


def _read(number: int, offset: int, size: int) -> Record:
    raw = os.pread(_work.descriptors[number], size, offset)
    return _work.corpus.read(raw.removeprefix(b"\xef\xbb\xbf"), _work.corpus.files[number])


def _make_shard(shard: Shard) -> int:
    records = [_read(*place) for place in shard.places]
    truncated: Counter[str] = Counter()
    too_long: Counter[str] = Counter()
    kept: list[tuple[str, str, Encoded]] = []
    for record, uid, encoded in zip(records, shard.uids, _encode(records), strict=True):
        if encoded is None:
            too_long[record.task] += 1
        else:
            truncated[record.task] += encoded.truncated
            kept.append((uid, record.task, encoded))
    text = pa.large_string()
    columns = {
        "uid": pa.array([uid for uid, _, _ in kept], text),
        "task": pa.array([task for _, task, _ in kept], text),
        "messages": pa.array([encoded.messages for _, _, encoded in kept], text),
        "ids": lists([encoded.ids for _, _, encoded in kept]),
        "prompt_length": pa.array([encoded.prompt_length for _, _, encoded in kept], pa.int64()),
    }
    write_shard(shard.path, columns, {"truncated": truncated, "too_long": too_long})
    return len(records)


def _encode(records: Sequence[Record]) -> list[Encoded | None]:
    """Each record as the model meets it; None where it is too long and may not be cut, or not so far."""
    tokenizer, corpus = _work.tokenizer, _work.corpus
    asked = [corpus.asked(record) for record in records]
    prompts = [tokenizer.prompt(turns) for turns in asked]
    prompt_ids, answer_ids = tokenizer.encode(prompts), tokenizer.encode([record.answer for record in records])

    def count(turns: list[Message]) -> int:
        return len(tokenizer.encode([tokenizer.prompt(turns)])[0])

    result: list[Encoded | None] = []
    for number, record in enumerate(records):
        turns, prompt, ids = asked[number], prompts[number], prompt_ids[number]
        room = _work.max_length - len(answer_ids[number]) - 1
        truncated = len(ids) > room
        if truncated:
            cut = corpus.shortened(record, count, room)
            if cut is None:
                result.append(None)
                continue
            turns, prompt = cut, tokenizer.prompt(cut)
            (ids,) = tokenizer.encode([prompt])
        tokenizer.check(prompt, turns, record.answer)
        messages = json.dumps([*turns, assistant(record.answer)], ensure_ascii=False)
        result.append(Encoded(tokenizer.join(turns, ids, answer_ids[number]), len(ids), messages, truncated))
    return result


# --- the parts -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MadePart:
    """What is to be known of a part that was written. Arrays have one entry per row."""

    sha256: dict[str, str]  # by column, of the content, whatever the file format
    task: np.ndarray  # index into the names of all tasks
    tokens: np.ndarray
    answer_tokens: np.ndarray
    counts: Counter[tuple[str, str]]  # (what, task): truncated, too_long


def assemble(folder: Path, shards: Sequence[Path], tasks: Sequence[str]) -> MadePart:
    """Writes the part of these shards to `folder`, column after column, from the disk to the disk."""
    counts: Counter[tuple[str, str]] = Counter()
    columns: dict[str, Column] = {}
    prompt_lengths, task_numbers = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
    numbers = {task: number for number, task in enumerate(tasks)}
    for path in shards:
        table, about = read_shard(path)
        for what, of_tasks in about.items():
            counts.update({(what, task): count for task, count in of_tasks.items()})
        for name in ("uid", "task", "messages", "ids"):
            if name not in columns:
                columns[name] = Column(folder.with_name(f".{folder.name}.{name}"), table.schema.field(name).type)
            for chunk in table.column(name).chunks:
                columns[name].append(chunk)
        # A copy: a view would keep the shard mapped.
        prompt_lengths.append(table.column("prompt_length").to_numpy().copy())
        own = [numbers[task] for task in table.column("task").to_pylist()]
        task_numbers.append(np.array(own, dtype=np.int64))
    prompt_length = np.concatenate(prompt_lengths)
    finished = {name: column.finish() for name, column in columns.items()}
    arrays = {name: array for name, (array, _) in finished.items()} | {"prompt_length": pa.array(prompt_length)}
    sha256 = {name: digest for name, (_, digest) in finished.items()}
    sha256["prompt_length"] = hashlib.sha256(prompt_length.tobytes()).hexdigest()
    write_dataset(folder, arrays, sha256["ids"])
    tokens = np.diff(arrays["ids"].offsets.to_numpy())
    for name in columns:
        folder.with_name(f".{folder.name}.{name}").unlink()
    return MadePart(sha256, np.concatenate(task_numbers), tokens, tokens - prompt_length, counts)
