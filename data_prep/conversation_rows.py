"""The two passes over a corpus: read everything, then tokenise what was chosen; both in many processes.

The first pass keeps of each record where it stands and what the split must know (its task, and hashes of what it is
compared by), some hundred bytes; the second reads the chosen ones again, in the order of their part. So memory is
bounded, whatever the texts weigh.
"""

from __future__ import annotations

import hashlib
import json
import os
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_prep.records import Corpus, Lines, Malformed, Record, as_text, unique_id
from data_prep.shards import Column, Workers, read_shard, write_shard
from data_prep.splits import StratifiedSplit
from training.base.console import UserError, warn
from training.base.progress import Progress
from training.data.chat import ChatTokenizer, Message, Refused, TextTokenizer, Tools, assistant
from training.data.conversations import learned_tokens
from training.data.languages import language_of
from training.data.prepared import Ragged, id_column, ragged, write_table
from training.data.text import normalise

_CHINESE = language_of("zh")
BYTES_PER_PIECE = 4 << 20  # of a source file, read at a time
SHOWN_OTHERWISE = "have an answer that the chat template writes otherwise, which is read and not learned"


@dataclass(frozen=True)
class Work:
    """What every process needs for the functions below."""

    tokenizer: TextTokenizer  # a ChatTokenizer, unless texts are learned
    corpus: Corpus
    max_length: int  # tokens of prompt and answer, at most


_work: Work
_descriptors: list[int]  # of the corpus's files


def set_work(work: Work) -> None:
    """Gives this process its work, and opens the corpus's files in it."""
    global _work, _descriptors
    _work = work
    _descriptors = [os.open(file.lines.path, os.O_RDONLY) for file in work.corpus.files]


# --- first pass ------------------------------------------------------------------------------------------------------


class Found(NamedTuple):
    """A record as the first pass sees it. Lines are counted from the piece's first, which is 0."""

    id: str | None
    line: int
    offset: int
    bytes: int
    task: str
    is_short: bool
    group: int  # a hash, as are the others
    pair: int
    learned: tuple[int, ...]  # places of the answers that may be learned
    prompts: tuple[int, ...]  # of each what is read before it
    has_tools: bool


@dataclass
class Piece:
    """What one piece of a source file holds; lines are counted from the piece's first, which is 0."""

    lines: int = 0
    blank: int = 0
    malformed: list[tuple[int, str, str]] = field(default_factory=list)  # line, reason, how it begins
    unread: Counter[str] = field(default_factory=Counter)  # records by key that is not read
    notes: list[tuple[int, str]] = field(default_factory=list)  # line, what was done to read the record there
    rows: list[Found] = field(default_factory=list)


@dataclass
class Records:
    """Where the usable records stand, and what else was found. Arrays have one entry per record."""

    places: np.ndarray  # int64 [records, 3]: file, offset, bytes
    task: np.ndarray  # index into tasks
    group: np.ndarray  # uint64, equal where the normalised `Record.group` are
    uid: list[str]
    learned: list[tuple[int, ...]]  # places of the answers that may be learned
    prompts: list[tuple[int, ...]]  # of each a hash of what is read before it
    tasks: list[str]  # all that there are, left out or not
    lines: int
    blank: int
    malformed: list[dict[str, object]]
    unread: Counter[str]  # records by key that is not read
    notes: dict[str, dict[str, object]]  # what was done to read records: how many, and where the first is
    counts: Counter[tuple[str, str]]  # (what, task): records, duplicates, too_short, left_out
    has_tools: bool


def read_records(workers: Workers, corpus: Corpus) -> Records:
    """All records of the corpus but duplicates, those with too short an answer, and those of the tasks to leave out."""
    files = corpus.files
    jobs = [(number, start, end) for number, file in enumerate(files) for start, end in _pieces(file.lines)]
    blank = 0
    malformed = [(number, *found) for number, file in enumerate(files) for found in file.malformed]
    unread: Counter[str] = Counter()
    notes: dict[str, dict[str, object]] = {}
    noted: Counter[str] = Counter()
    counts: Counter[tuple[str, str]] = Counter()
    kept: list[tuple[int, Found]] = []
    uids: list[str] = []
    taken: set[str] = set()
    seen: set[int] = set()
    lines_before: Counter[int] = Counter()  # by file
    with Progress("reading", sum(file.lines.bytes for file in files), "bytes") as progress:
        for (number, start, end), piece in zip(jobs, workers.map(_read_piece, jobs), strict=True):
            file = files[number]
            first = 1 + lines_before[number]
            for line, reason, text in piece.malformed:
                malformed.append((number, file.lines.number(first + line), reason, text))
            for line, note in piece.notes:
                place = {"file": file.about()["name"], "line": file.lines.number(first + line)}
                notes.setdefault(note, {"records": 0, "first": place})
                noted[note] += 1
            for found in piece.rows:
                uid = unique_id(file, found.id, file.lines.number(first + found.line), taken)
                task = found.task
                counts["records", task] += 1
                if task in corpus.left_out:
                    counts["left_out", task] += 1
                elif found.pair in seen:
                    counts["duplicates", task] += 1
                elif found.is_short:
                    counts["too_short", task] += 1
                else:
                    seen.add(found.pair)
                    kept.append((number, found))
                    uids.append(uid)
            unread.update(piece.unread)
            lines_before[number] += piece.lines
            blank += piece.blank
            progress.advance(end - start)
    order = {task: place for place, task in enumerate(corpus.task_order)}
    tasks = sorted({task for _, task in counts}, key=lambda task: (order.get(task, len(order)), task))
    numbers = {task: number for number, task in enumerate(tasks)}
    malformed.sort(key=lambda found: found[:2])
    return Records(
        places=np.array([(number, row.offset, row.bytes) for number, row in kept], dtype=np.int64).reshape(-1, 3),
        task=np.array([numbers[row.task] for _, row in kept], dtype=np.int64),
        group=np.array([row.group for _, row in kept], dtype=np.uint64),
        uid=uids,
        learned=[row.learned for _, row in kept],
        prompts=[row.prompts for _, row in kept],
        tasks=tasks,
        lines=lines_before.total() + sum(len(file.malformed) for file in files),
        blank=blank,
        malformed=[
            {"file": files[number].about()["name"], "line": line, "reason": reason, "text": text}
            for number, line, reason, text in malformed
        ],
        unread=unread,
        notes={note: {**about, "records": noted[note]} for note, about in notes.items()},
        counts=counts,
        has_tools=any(row.has_tools for _, row in kept),
    )


def _pieces(lines: Lines) -> Iterator[tuple[int, int]]:
    """Byte ranges of whole lines that together are the file."""
    with lines.path.open("rb") as opened:
        start = 0
        while start < lines.bytes:
            opened.seek(min(start + BYTES_PER_PIECE, lines.bytes) - 1)
            opened.readline()
            yield start, opened.tell()
            start = opened.tell()


def _lines_of(content: bytes) -> Iterator[tuple[int, bytes]]:
    """Where each line begins, and the line; they end at LF, CRLF or CR, none of which JSON has within a text."""
    offset = 0
    lines = content.split(b"\n")
    if lines[-1] == b"":
        lines.pop()  # the end of the last line, not one more line
    for line in lines:
        within = 0
        for part in line.removesuffix(b"\r").split(b"\r"):
            yield offset + within, part
            within += len(part) + 1
        offset += len(line) + 1


def _read_piece(job: tuple[int, int, int]) -> Piece:
    number, start, end = job
    corpus = _work.corpus
    piece = Piece()
    for offset, raw in _lines_of(os.pread(_descriptors[number], end - start, start)):
        line = piece.lines
        piece.lines += 1
        text = raw.removeprefix(BOM_UTF8)
        if not text.strip():
            piece.blank += 1
            continue
        try:
            record = corpus.read(text, corpus.files[number])
            learned = accepted(record)
        except Malformed as error:
            piece.malformed.append((line, str(error), text[:80].decode("utf-8", "replace")))
            continue
        for key in record.unread:
            piece.unread[key] += 1
        shown_otherwise = [SHOWN_OTHERWISE] if len(learned) <= len(record.earlier) else []
        piece.notes += ((line, note) for note in (*record.notes, *shown_otherwise))
        several = _learns_all()
        texts = (_hash(normalise(record.read_before(place), _CHINESE)) for place in learned)
        piece.rows.append(
            Found(
                record.id,
                line,
                start + offset,
                len(raw),
                record.task,
                corpus.is_short(record),
                _hash(normalise(record.group, _CHINESE)),
                _hash(record.tools, *map(as_text, record.messages)),
                learned if several else (),
                tuple(texts) if several else (),
                bool(record.tools),
            )
        )
    return piece


def _learns_all() -> bool:
    return _work.corpus.learn == "all"


def accepted(record: Record) -> tuple[int, ...]:
    """Places of the answers that the template writes as they are. Raises Malformed if there is none.

    Also if the template has no place for a turn, or a text would be read as a control token: one that ends a turn, for
    example, would teach the model to stop there.
    """
    for name, text in record.texts():
        control = _work.tokenizer.control_text(text)
        if control is not None:
            raise Malformed(f"{name} holds {control}, which this tokenizer reads as a control token")
    if _work.corpus.learn == "text":
        return (0,)
    tokenizer, asked, tools = _chat(), _work.corpus.asked(record), _tools(record)
    refusal = tokenizer.refusal(asked, tools)
    if refusal is not None:
        raise Malformed(refusal)
    learned, refused = [], ""
    for place in (*record.earlier, len(record.messages) - 1):
        try:
            tokenizer.written(asked[:place], record.messages[place], tools)
        except Refused as error:
            refused = refused or str(error)
        else:
            learned.append(place)
    if not learned:
        raise Malformed(refused)
    return tuple(learned)


def _chat() -> ChatTokenizer:
    assert isinstance(_work.tokenizer, ChatTokenizer)
    return _work.tokenizer


def _tools(record: Record) -> Tools | None:
    return json.loads(record.tools) if record.tools else None


def _hash(*texts: str) -> int:
    """64 bits of the texts: among 300,000 records two are taken for the same once in 400 million such data sets."""
    digest = hashlib.blake2b(digest_size=8)
    for text in texts:
        content = text.encode()
        digest.update(len(content).to_bytes(8, "little") + content)
    return int.from_bytes(digest.digest(), "little")


# --- between the two -------------------------------------------------------------------------------------------------


def leave_out_trained_prompts(records: Records, split: StratifiedSplit) -> None:
    """Of held-out records, only answers stay to be scored whose prompt is none of training's; the others are read."""
    trained = {prompt for row in split.rows("train").tolist() for prompt in records.prompts[row]}
    for row in [*split.rows("validation").tolist(), *split.rows("test").tolist()]:
        pairs = zip(records.learned[row], records.prompts[row], strict=True)
        scored = tuple(place for place, prompt in pairs if prompt not in trained)
        task = records.tasks[records.task[row]]
        records.counts["turns_in_training", task] += len(records.learned[row]) - len(scored)
        records.counts["in_training", task] += not scored
        records.learned[row] = scored


def choose_questions(records: Records, split: StratifiedSplit) -> list[int]:
    """One test row of each task, the first in the seeded order that is not left out for its length."""
    chosen = []
    test = split.rows("test")
    for number, task in enumerate(records.tasks):
        rows = test[(records.task[test] == number) & (split.strata[test] == number)].tolist()
        found = next((row for row in rows if _fits(records, row)), None)
        if found is not None:
            chosen.append(found)
        elif rows:
            warn(f"no test record of {task} fits into --max_length, so it has no question in the table of answers")
    return chosen


def _fits(records: Records, row: int) -> bool:
    """Whether anything of the record is left, within the length."""
    if _learns_all() and not records.learned[row]:
        return False
    (encoded,) = _encode([_read(*records.places[row])], [records.learned[row]])
    return bool(encoded.rows)


# --- second pass -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Encoded:
    """A sample as the model meets it."""

    ids: np.ndarray  # int32
    spans: tuple[tuple[int, int], ...]  # what is learned: from, to; the last one ends the sample
    messages: Sequence[Message]


@dataclass(frozen=True)
class EncodedRecord:
    """The samples of a record, and what became of it."""

    rows: Sequence[Encoded] = ()
    truncated: bool = False
    cut_turns: int = 0  # answers that may be learned and stand beyond the length

    @property
    def is_split(self) -> bool:
        """Whether its answers are not in one sample."""
        return len(self.rows) > 1


@dataclass(frozen=True)
class Shard:
    """A job: the records to tokenise, and the file to write."""

    path: Path
    places: list[list[int]]  # of each its file, offset and bytes
    uids: list[str]
    learned: list[tuple[int, ...]]  # of each the answers that are learned
    columns: tuple[str, ...]  # beside those that every set has


def tokenise(
    workers: Workers,
    folder: Path,
    records: Records,
    chosen: Mapping[str, np.ndarray],
    rows_per_shard: int,
    columns: tuple[str, ...],
) -> dict[str, list[Path]]:
    """Makes the shards of each part in `folder`, those that are not there yet; returns all of them in order."""
    shards = {
        part: [
            Shard(
                folder / f"{part}-{start // rows_per_shard:05d}.arrow",
                records.places[rows[start : start + rows_per_shard]].tolist(),
                [records.uid[row] for row in rows[start : start + rows_per_shard]],
                [records.learned[row] for row in rows[start : start + rows_per_shard]],
                columns,
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
    return _work.corpus.read(raw.removeprefix(BOM_UTF8), _work.corpus.files[file])


def _make_shard(shard: Shard) -> int:
    records = [_read(*place) for place in shard.places]
    counts: dict[str, Counter[str]] = {
        what: Counter() for what in ("truncated", "too_long", "split", "turns", "cut_turns")
    }
    kept: list[tuple[str, Record, Encoded]] = []
    sources: list[str] = []
    corpus = _work.corpus
    of_records = [corpus.source_of(corpus.files[file]) for file, _, _ in shard.places]
    encoded_records = _encode(records, shard.learned)
    for record, uid, source, encoded in zip(records, shard.uids, of_records, encoded_records, strict=True):
        task = record.task
        sources += [source] * len(encoded.rows)
        counts["truncated"][task] += encoded.truncated
        counts["too_long"][task] += not encoded.rows
        counts["split"][task] += encoded.is_split
        counts["turns"][task] += sum(len(row.spans) for row in encoded.rows)
        counts["cut_turns"][task] += encoded.cut_turns
        for number, row in enumerate(encoded.rows, 1):
            kept.append((uid if number == len(encoded.rows) else f"{uid}#{number}", record, row))
    text = pa.large_string()
    spans = [np.array(row.spans, dtype=np.int32).ravel() for _, _, row in kept]
    columns = {
        "uid": pa.array([uid for uid, _, _ in kept], text),
        "task": pa.array([record.task for _, record, _ in kept], text),
        "messages": pa.array([json.dumps(row.messages, ensure_ascii=False) for _, _, row in kept], text),
        "ids": id_column(Ragged.of([row.ids for _, _, row in kept])),
        "prompt_length": pa.array([row.spans[-1][0] for _, _, row in kept], pa.int64()),
        "learned": id_column(Ragged.of(spans)),
        "tools": pa.array([record.tools for _, record, _ in kept], text),
        "source": pa.array(sources, text),
    }
    usual = ("uid", "task", "messages", "ids", "prompt_length")
    wanted = {name: column for name, column in columns.items() if name in (*usual, *shard.columns)}
    write_shard(shard.path, wanted, counts)
    return len(records)


def _encode(records: Sequence[Record], learned: Sequence[tuple[int, ...]]) -> list[EncodedRecord]:
    """Each record as the model meets it; without a sample where it is too long and may not be cut, or not so far."""
    if _work.corpus.learn == "text":
        return _encode_texts(records)
    if _learns_all():
        return _encode_all(records, learned)
    tokenizer, corpus = _chat(), _work.corpus
    asked = [corpus.asked(record) for record in records]
    pairs = [
        tokenizer.to_write(turns, record.messages[-1], _tools(record))
        for turns, record in zip(asked, records, strict=True)
    ]
    prompt_ids, answer_ids = (tokenizer.encode(texts) for texts in zip(*pairs, strict=True))

    def count(turns: list[Message]) -> int:
        return len(tokenizer.encode([tokenizer.prompt(turns)])[0])

    result: list[EncodedRecord] = []
    for record, turns, (prompt, text), ids, answer in zip(records, asked, pairs, prompt_ids, answer_ids, strict=True):
        room = _work.max_length - len(answer) - 1
        truncated = len(ids) > room
        if truncated:
            cut = corpus.shortened(record, count, room)
            if cut is None:
                result.append(EncodedRecord())
                continue
            turns = cut
            try:
                prompt, _ = tokenizer.written(cut, record.messages[-1])
            except Refused as error:  # it was not, before it was cut
                raise UserError(f"{error}: pass the tokenizer of another model") from None
            (ids,) = tokenizer.encode([prompt])
        whole = tokenizer.join(prompt, text, ids, answer)
        row = Encoded(whole, ((len(ids), len(whole)),), [*turns, record.messages[-1]])
        result.append(EncodedRecord([row], truncated))
    return result


def _encode_all(records: Sequence[Record], learned: Sequence[tuple[int, ...]]) -> list[EncodedRecord]:
    """The same where all answers are learned: in one sample if each is read there as it is read on its own."""
    tokenizer = _chat()
    pairs = [
        tokenizer.to_write(record.messages[:place], record.messages[place], _tools(record))
        for record, places in zip(records, learned, strict=True)
        for place in places
    ]
    prompt_ids, answer_ids = (tokenizer.encode([pair[which] for pair in pairs]) for which in (0, 1))
    encoded = iter(zip(pairs, prompt_ids, answer_ids, strict=True))
    result = []
    for record, places in zip(records, learned, strict=True):
        wholes, spans = [], []
        for _ in places:
            (prompt, text), ids, answer = next(encoded)
            wholes.append(tokenizer.join(prompt, text, ids, answer))
            spans.append((len(ids), len(wholes[-1])))
        fitting = [number for number, whole in enumerate(wholes) if len(whole) <= _work.max_length]
        cut_turns = len(places) - len(fitting)
        rows = [Encoded(wholes[each], (spans[each],), record.messages[: places[each] + 1]) for each in fitting]
        fits = [wholes[each] for each in fitting]
        if rows and all(np.array_equal(later[: len(sooner)], sooner) for sooner, later in pairwise(fits)):
            rows = [Encoded(rows[-1].ids, tuple(spans[each] for each in fitting), rows[-1].messages)]
        result.append(EncodedRecord(rows, bool(rows) and cut_turns > 0, cut_turns))
    return result


def _encode_texts(records: Sequence[Record]) -> list[EncodedRecord]:
    """The same of texts, cut at the length: each piece begins with the last token of the one before, to go on from."""
    tokenizer, most = _work.tokenizer, _work.max_length
    result = []
    for ids in map(tokenizer.document, tokenizer.encode([record.answer for record in records])):
        pieces = [ids[start : start + most] for start in range(0, len(ids) - 1, most - 1)]
        rows = [
            Encoded(piece, ((1, len(piece)),), [assistant(tokenizer.decode(piece[1:].tolist()))]) for piece in pieces
        ]
        result.append(EncodedRecord(rows))
    return result


# --- the parts -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MadePart:
    """What meta.json says of a part that was written comes from here. Arrays have one entry per row."""

    sha256: dict[str, str]  # by column, of the content, whatever the file format
    task: np.ndarray  # index into the names of all tasks
    tokens: np.ndarray
    answer_tokens: np.ndarray
    counts: Counter[tuple[str, str]]  # (what, task): truncated, too_long, split, turns, cut_turns
    sources: Counter[str]  # rows of each source of a mixture


def assemble(folder: Path, shards: Sequence[Path], tasks: Sequence[str]) -> MadePart:
    """Writes the part of these shards to `folder`, column after column, from the disk to the disk."""
    counts: Counter[tuple[str, str]] = Counter()
    prompt_lengths = []
    columns: dict[str, Column] = {}
    for path in shards:
        table, about = read_shard(path)
        for what, of_tasks in about.items():
            counts.update({(what, task): count for task, count in of_tasks.items()})
        for name in (name for name in table.column_names if name != "prompt_length"):
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
    answer_tokens = tokens - prompt_length
    if "learned" in arrays:
        answer_tokens = learned_tokens(ragged(arrays["learned"]))
    sources = Counter(arrays["source"].to_pylist()) if "source" in arrays else Counter()
    return MadePart(sha256, task, tokens, answer_tokens, counts, sources)
