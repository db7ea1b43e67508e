"""The two passes over sentence pairs: read and compare, then tokenise; both in several processes.

The first pass keeps of each pair its texts, on the disk, and digests of what it is compared by; the second takes the
texts in the order of their part. So memory grows by some hundred bytes a pair, whatever the texts weigh.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_prep.columns import HEADING, Columns, Languages, find_columns, has_script, names_tatoeba
from data_prep.preparing import LISTED_MALFORMED
from data_prep.shards import Column, Workers
from data_prep.tables import Row, Table, Unreadable, first_rows
from training.base.progress import Progress
from training.data.prepared import Ragged, id_column, ragged, write_part
from training.data.text import Conversions, clean, has_entity, has_full_width, normalise, simplify
from training.data.tokenizers import UNK, Tokenizer

HEAD_ROWS = 50_000  # in which columns are found; a smaller table is read by one process
ROWS_PER_JOB = 10_000

# Chinese is taken for traditional from this share of sentences with a traditional character on. Of Tatoeba's, 42 % have
# one, and 93 % once all of them are written in traditional characters; of simplified ones none has.
TRADITIONAL_SHARE = 0.75
LOOKED_AT = 2000  # sentences, for that
TEXTS = ("source", "target", "attribution")
SIDES = ("source", "target")


@dataclass
class Found:
    """What rows of a table hold. Arrays have an entry per pair."""

    columns: dict[str, pa.Array]  # TEXTS, large strings
    same: dict[str, np.ndarray]  # SIDES: uint64, equal where the texts as stored are
    alike: dict[str, np.ndarray]  # SIDES: equal where the normalised texts are
    pair: np.ndarray  # uint64, equal where both texts were, before any conversion
    first: tuple[str, str]  # the first pair; of empty texts where there is none
    malformed: list[dict[str, object]]
    counts: dict[str, int]  # see `COUNTS`


# Rows without any text; pairs with a text in its language's script; with letters as HTML writes them, or full-width
# ones; with an attribution that names Tatoeba; with their target in quotes.
COUNTS = ("blank", "malformed", "source_script", "target_script", "entities", "full_width", "tatoeba", "quoted")


@dataclass(frozen=True)
class Reading:
    """How the rows of a table are read."""

    columns: Columns
    conversions: Conversions
    file: str  # as its malformed rows are named

    @property
    def languages(self) -> Languages:
        return self.columns.languages


_reading: Reading
_encoding: Encoding


def _set_reading(reading: Reading) -> None:
    global _reading
    _reading = reading


# --- first pass ------------------------------------------------------------------------------------------------------


@dataclass
class Pairs:
    """Clean sentence pairs in the order of their tables, one entry per well-formed row."""

    columns: dict[str, pa.Array]  # TEXTS, on the disk
    same: dict[str, np.ndarray]
    alike: dict[str, np.ndarray]
    pair: np.ndarray
    row: np.ndarray  # int64: which pair of its own table it is, from 0
    of_table: dict[str, slice]  # by the name of the table
    lines: int = 0
    malformed: list[dict[str, object]] = field(default_factory=list)  # the first of them
    counts: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.pair)


class Reader:
    """Reads tables one after the other into columns in `folder`, which holds nothing else."""

    def __init__(self, folder: Path, languages: Languages, conversions: Conversions, asked: str | None, workers: int):
        folder.mkdir()
        self.folder, self.languages, self.conversions = folder, languages, conversions
        self.asked, self.workers = asked, workers
        self._columns = {name: Column(folder / name, pa.large_string()) for name in TEXTS}
        self._found: list[Found] = []
        self._of_table: dict[str, slice] = {}
        self._lines = 0

    def choose_simplify(self, table: Table) -> float:
        """Has Chinese simplified unless nearly all sentences of `table` have a traditional character.

        Returns their share, of `LOOKED_AT` sentences of the table's first rows. To be called before anything is read.
        """
        head, _ = first_rows(table.rows(), HEAD_ROWS)
        columns = find_columns(table, head, self.languages, self.asked)
        place = columns.source if self.languages[0].variants else columns.target
        rows = [cells for _, cells in head[columns.heading :] if not isinstance(cells, Unreadable)]
        sentences = [cells[place] for cells in rows if len(cells) > place and cells[place]]
        looked_at = sentences[:: max(1, len(sentences) // LOOKED_AT)]
        traditional = sum(simplify(text) != text for text in looked_at) / max(1, len(looked_at))
        self.conversions = replace(self.conversions, simplify=traditional < TRADITIONAL_SHARE)
        return traditional

    def read(self, name: str, table: Table) -> TableCounts:
        """Adds the pairs of a table. Raises UserError for what `find_columns` refuses."""
        head, rows = first_rows(table.rows(), HEAD_ROWS)
        columns = find_columns(table, head, self.languages, self.asked)
        reading = Reading(columns, self.conversions, Path(table.place).name)
        counts = TableCounts(columns, dict.fromkeys(COUNTS, 0))
        begin = sum(len(found.pair) for found in self._found)
        workers = self.workers if len(head) == HEAD_ROWS else 1
        jobs = _batched(iter(rows), columns.heading)
        with (
            Workers(workers, partial(_set_reading, reading)) as pool,
            Progress("reading", table.content_bytes, "bytes") as progress,
        ):
            for lines, size, found in pool.map(_read_rows, jobs):
                for text, column in self._columns.items():
                    column.append(found.columns.pop(text))
                counts.malformed += found.malformed[: LISTED_MALFORMED - len(counts.malformed)]
                counts.add(found, lines)
                self._found.append(found)
                progress.advance(size)
        self._lines += counts.lines
        self._of_table[name] = slice(begin, begin + counts.pairs)
        return counts

    def pairs(self) -> Pairs:
        """All that has been read."""
        found, self._found = self._found, []
        columns = {name: column.finish()[0] for name, column in self._columns.items()}

        def joined(arrays: Iterator[np.ndarray]) -> np.ndarray:
            return np.concatenate([np.zeros(0, dtype=np.uint64), *arrays])

        return Pairs(
            columns=columns,
            same={side: joined(each.same[side] for each in found) for side in SIDES},
            alike={side: joined(each.alike[side] for each in found) for side in SIDES},
            pair=joined(each.pair for each in found),
            row=np.concatenate([np.arange(part.stop - part.start) for part in self._of_table.values()]),
            of_table=self._of_table,
            lines=self._lines,
        )


@dataclass
class TableCounts:
    """What was found in a table."""

    columns: Columns
    counts: dict[str, int]
    lines: int = 0
    pairs: int = 0
    first: tuple[str, str] = ("", "")  # pair
    malformed: list[dict[str, object]] = field(default_factory=list)
    reasons: dict[str, int] = field(default_factory=dict)
    examples: dict[str, dict[str, object]] = field(default_factory=dict)  # the first row malformed for each reason

    def add(self, found: Found, lines: int) -> None:
        """Counts what more rows hold."""
        self.lines += lines
        self.first = self.first if self.pairs else found.first
        self.pairs += len(found.pair)
        for name, count in found.counts.items():
            self.counts[name] += count
        for row in found.malformed:
            reason = str(row["reason"])
            self.reasons[reason] = self.reasons.get(reason, 0) + 1
            self.examples.setdefault(reason, row)


def _batched(rows: Iterator[Row], heading: bool) -> Iterator[tuple[list[Row], bool]]:
    """Jobs for `_read_rows`, the first of which has the heading, if there is one."""
    batch: list[Row] = []
    for row in rows:
        batch.append(row)
        if len(batch) == ROWS_PER_JOB:
            yield batch, heading
            batch, heading = [], False
    if batch:
        yield batch, heading


def _read_rows(job: tuple[list[Row], bool]) -> tuple[int, int, Found]:
    """Lines, their size in bytes, and what they hold; the first row that is not blank may be a heading."""
    rows, heading = job
    columns, conversions = _reading.columns, _reading.conversions
    source, target = columns.languages
    texts: dict[str, list[str]] = {name: [] for name in TEXTS}
    digests: list[tuple[int, int, int, int, int]] = []
    malformed: list[dict[str, object]] = []
    counts = dict.fromkeys(COUNTS, 0)
    size = 0

    def refuse(line: int, reason: str, text: str) -> None:
        counts["malformed"] += 1
        malformed.append({"file": _reading.file, "line": line, "reason": reason, "text": text[:80]})

    for line, raw in rows:
        if isinstance(raw, Unreadable):
            refuse(line, raw.reason, raw.text)
            continue
        size += len("\t".join(raw).encode()) + 1
        cells = [clean(cell) for cell in raw]
        if not any(cells):
            counts["blank"] += 1
            continue
        if heading:
            heading = False
            refuse(line, HEADING, "\t".join(raw))
            continue
        reason = columns.malformed(cells)
        if reason:
            refuse(line, reason, "\t".join(raw))
            continue
        both = raw[columns.source], raw[columns.target]
        stored = conversions.apply(both[0], source), conversions.apply(both[1], target)
        if not all(stored):
            refuse(line, "nothing is left of a sentence once it is converted", "\t".join(raw))
            continue
        place = columns.attribution
        attribution = cells[place] if place is not None and place < len(cells) else ""
        for name, text in zip(TEXTS, (*stored, attribution), strict=True):
            texts[name].append(text)
        digests.append(
            (
                digest(stored[0]),
                digest(stored[1]),
                digest(normalise(stored[0], source)),
                digest(normalise(stored[1], target)),
                digest(cells[columns.source], cells[columns.target]),
            )
        )
        counts["source_script"] += has_script(stored[0], source)
        counts["target_script"] += has_script(stored[1], target)
        counts["entities"] += has_entity(both[0]) or has_entity(both[1])
        counts["full_width"] += has_full_width(both[0]) or has_full_width(both[1])
        counts["tatoeba"] += names_tatoeba(attribution)
        counts["quoted"] += _QUOTED.fullmatch(stored[1]) is not None
    numbers = np.array(digests, dtype=np.uint64).reshape(-1, 5)
    found = Found(
        columns={name: pa.array(column, pa.large_string()) for name, column in texts.items()},
        same={side: numbers[:, place].copy() for place, side in enumerate(SIDES)},
        alike={side: numbers[:, 2 + place].copy() for place, side in enumerate(SIDES)},
        pair=numbers[:, 4].copy(),
        first=(texts["source"][0], texts["target"][0]) if texts["source"] else ("", ""),
        malformed=malformed,
        counts=counts,
    )
    return len(rows), size, found


_QUOTED = re.compile('".*"', re.DOTALL)


def digest(*texts: str) -> int:
    """64 bits of the texts: among four million, two are taken for the same once in two million such data sets."""
    made = hashlib.blake2b("\t".join(texts).encode(), digest_size=8)
    return int.from_bytes(made.digest(), "little")


# --- second pass -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Encoding:
    """What every process needs to tokenise."""

    columns: Mapping[str, pa.Array]
    tokenizers: Mapping[str, Tokenizer]


def _set_encoding(encoding: Encoding) -> None:
    global _encoding
    _encoding = encoding


@dataclass(frozen=True)
class MadePart:
    """What meta.json says of a part comes from here."""

    sha256: str  # of rows and ids, which depends on no file format and no library's version
    lengths: dict[str, np.ndarray]  # SIDES: ids of each row
    unknown: dict[str, float]  # SIDES: the share of ids that are `<unk>`


def write_parts(
    folder: Path, pairs: Pairs, rows: Mapping[str, np.ndarray], tokenizers: Mapping[str, Tokenizer], workers: int
) -> dict[str, MadePart]:
    """Tokenises the pairs at `rows`, by part, in their order, and writes each part to a folder in `folder`."""
    total = sum(map(len, rows.values()))
    made = {}
    encoding = Encoding(pairs.columns, tokenizers)
    with (
        Workers(workers if total > HEAD_ROWS else 1, partial(_set_encoding, encoding)) as pool,
        Progress("tokenising", total, "pairs") as progress,
    ):
        for part, own in rows.items():
            made[part] = _write_part(folder / part, pairs, own, pool, progress)
    return made


def _write_part(folder: Path, pairs: Pairs, rows: np.ndarray, pool: Workers, progress: Progress) -> MadePart:
    kinds = {name: pa.large_string() for name in TEXTS} | {f"{side}_ids": pa.large_list(pa.int32()) for side in SIDES}
    temporary = {name: folder.with_name(f".{folder.name}.{name}") for name in kinds}
    columns = {name: Column(temporary[name], kind) for name, kind in kinds.items()}
    unknown = dict.fromkeys(SIDES, 0)
    jobs = [rows[start : start + ROWS_PER_JOB] for start in range(0, len(rows), ROWS_PER_JOB)]
    for job, encoded in zip(jobs, pool.map(_encode, jobs), strict=True):
        for name in TEXTS:
            columns[name].append(pairs.columns[name].take(pa.array(job)))
        for side, each in zip(SIDES, encoded, strict=True):
            columns[f"{side}_ids"].append(id_column(each))
            unknown[side] += int(np.sum(each.values == UNK))
        progress.advance(len(job))
    arrays = {name: column.finish()[0] for name, column in columns.items()}
    ids = {side: ragged(arrays.pop(f"{side}_ids")) for side in SIDES}
    sha256 = write_part(folder, pairs.row[rows], arrays, ids["source"], ids["target"])
    for path in temporary.values():
        path.unlink()
    shares = {side: unknown[side] / len(ids[side].values) for side in SIDES}
    return MadePart(sha256, {side: ids[side].lengths for side in SIDES}, shares)


def _encode(rows: np.ndarray) -> tuple[Ragged, ...]:
    """The ids of the pairs at `rows`: of their sources, and of their targets."""
    taken = pa.array(rows)
    return tuple(
        Ragged.of(
            [
                np.array(_encoding.tokenizers[side].encode(text), dtype=np.int32)
                for text in _encoding.columns[side].take(taken).to_pylist()
            ]
        )
        for side in SIDES
    )


def texts_of(pairs: Pairs, side: str, rows: Sequence[int] | np.ndarray) -> Iterator[str]:
    """The texts of one side at `rows`, a few of them in memory."""
    for start in range(0, len(rows), ROWS_PER_JOB):
        yield from pairs.columns[side].take(pa.array(rows[start : start + ROWS_PER_JOB])).to_pylist()
