"""The two passes over a corpus: read everything, then tokenise what was chosen; both in many processes.

The first pass keeps of each record where it stands and what the split must know (its task, and hashes of what it is
compared by), some hundred bytes; the second reads the chosen ones again, in the order of their part. So memory is
bounded, whatever the texts weigh.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_prep.records import Corpus, Malformed, Record, SourceFile, unique_id
from data_prep.shards import Column, Workers, read_shard, write_shard
from data_prep.splits import StratifiedSplit
from training.base.console import warn
from training.base.progress import Progress
from training.data.chat import ChatTokenizer, Message, assistant
from training.data.languages import language_of
from training.data.prepared import Ragged, id_column, write_table
from training.data.text import normalise

_CHINESE = language_of("zh")
BYTES_PER_PIECE = 4 << 20  # of a source file, read at a time
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Work:
    """What every process needs for the functions below."""

    tokenizer: ChatTokenizer
    corpus: Corpus
    max_length: int  # tokens of prompt and answer, at most


_work: Work
_descriptors: list[int]  # of the corpus's files


def set_work(work: Work) -> None:
    """Gives this process its work, and opens the corpus's files in it."""
    global _work, _descriptors
    _work = work
    _descriptors = [os.open(file.path, os.O_RDONLY) for file in work.corpus.files]


# --- first pass ------------------------------------------------------------------------------------------------------


@dataclass
class Piece:
    """What one piece of a source file holds; lines are counted from the piece's first, which is 0."""

    lines: int = 0
    blank: int = 0
    malformed: list[tuple[int, str, str]] = field(default_factory=list)  # line, reason, how it begins
    unread: Counter[str] = field(default_factory=Counter)  # records by key that is not read
    # Per record: id, line, offset, bytes, task, whether its answer is too short, hash of group, hash of all of it.
    rows: list[tuple[str | None, int, int, int, str, bool, int, int]] = field(default_factory=list)


@dataclass
class Records:
    """Where the usable records stand, and what else was found. Arrays have one entry per record."""

    places: np.ndarray  # int64 [records, 3]: file, offset, bytes
    task: np.ndarray  # index into tasks
    group: np.ndarray  # uint64, equal where the normalised `Record.group` are
    uid: list[str]
    tasks: list[str]  # all that there are, left out or not
    lines: int
    blank: int
    malformed: list[dict[str, object]]
    unread: Counter[str]  # records by key that is not read
    counts: Counter[tuple[str, str]]  # (what, task): records, duplicates, too_short, left_out


def read_records(workers: Workers, corpus: Corpus) -> Records:
    """All records of the corpus but duplicates, those with too short an answer, and those of the tasks to leave out."""
    files = corpus.files
    jobs = [(number, start, end) for number, file in enumerate(files) for start, end in _pieces(file)]
    blank = 0
    malformed: list[dict[str, object]] = []
    unread: Counter[str] = Counter()
    counts: Counter[tuple[str, str]] = Counter()
    kept: list[tuple[int, int, int, str, int]] = []  # file, offset, bytes, task, group
    uids: list[str] = []
    taken: set[str] = set()
    seen: set[int] = set()
    lines_before: Counter[int] = Counter()  # by file
    with Progress("reading", sum(file.bytes for file in files), "bytes") as progress:
        for (number, start, end), piece in zip(jobs, workers.map(_read_piece, jobs), strict=True):
            file = files[number]
            first = 1 + lines_before[number]
            for line, reason, text in piece.malformed:
                malformed.append({"file": file.path.name, "line": first + line, "reason": reason, "text": text})
            for name, line, offset, size, task, short, group, pair in piece.rows:
                uid = unique_id(file, name, first + line, taken)
                counts["records", task] += 1
                if task in corpus.left_out:
                    counts["left_out", task] += 1
                elif pair in seen:
                    counts["duplicates", task] += 1
                elif short:
                    counts["too_short", task] += 1
                else:
                    seen.add(pair)
                    kept.append((number, offset, size, task, group))
                    uids.append(uid)
            unread.update(piece.unread)
            lines_before[number] += piece.lines
            blank += piece.blank
            progress.advance(end - start)
    order = {task: place for place, task in enumerate(corpus.task_order)}
    tasks = sorted({task for _, task in counts}, key=lambda task: (order.get(task, len(order)), task))
    numbers = {task: number for number, task in enumerate(tasks)}
    return Records(
        places=np.array([row[:3] for row in kept], dtype=np.int64).reshape(-1, 3),
        task=np.array([numbers[row[3]] for row in kept], dtype=np.int64),
        group=np.array([row[4] for row in kept], dtype=np.uint64),
        uid=uids,
        tasks=tasks,
        lines=lines_before.total(),
        blank=blank,
        malformed=malformed,
        unread=unread,
        counts=counts,
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
    lines = os.pread(_descriptors[number], end - offset, offset).split(b"\n")
    if lines[-1] == b"":
        lines.pop()  # the end of the last line, not one more line
    piece = Piece(lines=len(lines))
    for line, raw in enumerate(lines):
        text = raw.removeprefix(BYTE_ORDER_MARK) if offset == 0 else raw
        if not text.strip():
            piece.blank += 1
        else:
            try:
                record = corpus.read(text, corpus.files[number])
                check_template_accepts(record)
            except Malformed as error:
                piece.malformed.append((line, str(error), text[:80].decode("utf-8", "replace")))
            else:
                group = _hash(normalise(record.group, _CHINESE))
                pair = _hash(*(turn["content"] for turn in record.turns), record.answer)
                short = corpus.is_short(record)
                for key in record.unread:
                    piece.unread[key] += 1
                piece.rows.append((record.id, line, offset, len(raw), record.task, short, group, pair))
        offset += len(raw) + 1
    return piece


def check_template_accepts(record: Record) -> None:
    """Raises Malformed if the template has no place for a turn, or a text would be read as a control token.

    One that ends a turn, for example, would teach the model to stop there.
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
        rows = test[(records.task[test] == number) & (split.strata[test] == number)].tolist()
        found = next((row for row in rows if _encode([_read(*records.places[row])])[0] is not None), None)
        if found is not None:
            chosen.append(found)
        elif rows:
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
    places: list[list[int]]  # of each its file, offset and bytes
    uids: list[str]


def tokenise(
    workers: Workers, folder: Path, records: Records, chosen: dict[str, np.ndarray], rows_per_shard: int
) -> dict[str, list[Path]]:
    """Makes the shards of each part in `folder`, those that are not there yet; returns all of them in order."""
    shards = {
        part: [
            Shard(
                folder / f"{part}-{start // rows_per_shard:05d}.arrow",
                records.places[rows[start : start + rows_per_shard]].tolist(),
                [records.uid[row] for row in rows[start : start + rows_per_shard]],
            )
            for start in range(0, len(rows), rows_per_shard)
        ]
        for part, rows in chosen.items()
    }
    todo = [shard for part in shards.values() for shard in part if not shard.path.exists()]
    total = sum(len(rows) for rows in chosen.values())
    done = total - sum(len(shard.uids) for shard in todo)
    with Progress("tokenising", total, "records", start=done) as progress:
        for count in workers.map(_make_shard, todo):
            progress.advance(count)
    return {part: [shard.path for shard in shards[part]] for part in shards}


def _read(file: int, offset: int, size: int) -> Record:
    raw = os.pread(_descriptors[file], size, offset)
    return _work.corpus.read(raw.removeprefix(BYTE_ORDER_MARK), _work.corpus.files[file])


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
        "ids": id_column(Ragged.of([encoded.ids for _, _, encoded in kept])),
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
    for record, turns, prompt, ids, answer in zip(records, asked, prompts, prompt_ids, answer_ids, strict=True):
        room = _work.max_length - len(answer) - 1
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
        result.append(Encoded(tokenizer.join(turns, ids, answer), len(ids), messages, truncated))
    return result


# --- the parts -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MadePart:
    """What meta.json says of a part that was written comes from here. Arrays have one entry per row."""

    sha256: dict[str, str]  # by column, of the content, whatever the file format
    task: np.ndarray  # index into the names of all tasks
    tokens: np.ndarray
    answer_tokens: np.ndarray
    counts: Counter[tuple[str, str]]  # (what, task): truncated, too_long


def assemble(folder: Path, shards: Sequence[Path], tasks: Sequence[str]) -> MadePart:
    """Writes the part of these shards to `folder`, column after column, from the disk to the disk."""
    counts: Counter[tuple[str, str]] = Counter()
    prompt_lengths = []
    columns: dict[str, Column] = {}
    for path in shards:
        table, about = read_shard(path)
        for what, of_tasks in about.items():
            counts.update({(what, task): count for task, count in of_tasks.items()})
        for name in ("uid", "task", "messages", "ids"):
            if name not in columns:
                columns[name] = Column(folder.with_name(f".{folder.name}.{name}"), table.schema.field(name).type)
            for chunk in table.column(name).chunks:
                columns[name].append(chunk)
        prompt_lengths.append(table.column("prompt_length").to_numpy().copy())  # a view would keep the shard mapped
    prompt_length = np.concatenate(prompt_lengths)
    arrays: dict[str, pa.Array] = {}
    sha256 = {}
    for name, column in columns.items():
        arrays[name], sha256[name] = column.finish()
    arrays["prompt_length"] = pa.array(prompt_length)
    sha256["prompt_length"] = hashlib.sha256(prompt_length.tobytes()).hexdigest()
    write_table(folder, arrays, sha256["ids"])
    for name in columns:
        folder.with_name(f".{folder.name}.{name}").unlink()
    task = pc.index_in(arrays["task"], pa.array(tasks, pa.large_string())).to_numpy()
    tokens = np.diff(arrays["ids"].offsets.to_numpy())
    return MadePart(sha256, task, tokens, tokens - prompt_length, counts)
