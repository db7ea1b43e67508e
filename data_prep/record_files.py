"""Files of records, whatever their form, as one stream of (file, line, record): lines of JSON.

JSON lines are read where they lie. All else is unpacked once into lines of JSON beside the output: compressed files,
lists, records on several lines, CSV, Parquet, what `datasets` reads. A record keeps the line that it had, so a message
names the place that its owner finds. What is no record is `malformed`, and the next one is read all the same.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import json
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from data_prep.layouts import Keys, is_turn, is_turns
from data_prep.packing import open_unpacked, packing_of, reading, refuse_archive
from data_prep.preparing import refuse_prepared
from data_prep.records import Lines, Malformed, SourceFile, decoded, kind_of
from data_prep.tables import csv_rows, is_saved
from training.base.console import UserError
from training.base.files import check_there, nearest_folder, sha256_of
from training.data.text import in_utf8

Form = Literal["lines", "values", "csv", "parquet", "text", "dataset"]

# What the files of other formats begin with, and what to do about them.
NO_RECORDS = {
    b"version https://git-lfs": "it is the pointer to a file that git-lfs keeps; `git lfs pull` fetches that",
    b"PK\x03\x04": "it is a zip file or a spreadsheet; unpack it, or export it as CSV",
    b"\xff\xfe": "it is UTF-16; `iconv -f UTF-16 -t UTF-8 {path} > {made}` converts it",
    b"\xfe\xff": "it is UTF-16; `iconv -f UTF-16 -t UTF-8 {path} > {made}` converts it",
}
ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
TEXT_ENDINGS = (".txt", ".md")  # documents, with --learn text
PACKED_ENDINGS = (".gz", ".bz2", ".xz", ".zst")
HEAD = 1 << 20  # bytes of a file by which its form is told
MOST_CELL = 1 << 27  # characters of a cell of CSV
_ESCAPED = re.compile("[\udc80-\udcff]")


@dataclass(frozen=True)
class RecordFile(SourceFile):
    """A file of one of the forms, or a split of a data set that `datasets` reads, which `rows` gives."""

    form: Form = "lines"
    packed: str = ""  # how it is compressed, if it is
    source: str = ""  # which of several sources it belongs to
    name: str = ""
    rows: Callable[[], Iterator[dict[str, Any]]] | None = None
    unpacked: Lines | None = None
    malformed: Sequence[tuple[int, str, str]] = ()

    @property
    def stem(self) -> str:
        """The name without its endings."""
        name = self.name
        for endings in (PACKED_ENDINGS, (*ENDINGS, *TEXT_ENDINGS)):
            name = next((name[: -len(end)] for end in endings if name.lower().endswith(end)), name)
        return name

    @property
    def lines(self) -> Lines:
        return self.unpacked or super().lines

    def about(self) -> dict[str, object]:
        return {"name": self.name, "bytes": self.bytes, "sha256": self.sha256}

    @property
    def is_lines(self) -> bool:
        """Whether it needs no unpacking."""
        return self.form == "lines" and not self.packed


def files_in(place: Path, word: str, keys: Keys, *, text: bool) -> list[RecordFile]:
    """The file at `place`, or those in the folder, by name. Raises UserError when there is nothing to read.

    word: what --source says. text: whether files of plain text are documents.
    """
    if not place.exists():
        raise UserError(
            f"--source {word} does not exist{nearest_folder(place)}: pass a file of records, a folder with such files, "
            "or hub:NAME for a data set of the Hugging Face hub"
        )
    endings = (*ENDINGS, *TEXT_ENDINGS) if text else ENDINGS
    paths = [place]
    if place.is_dir():
        refuse_prepared(place)
        found = sorted(path for path in place.iterdir() if not path.name.startswith("."))
        paths = [path for path in found if _plain_name(path).endswith(endings) and not path.is_dir()]
        check_there(paths)
    if not paths:
        raise UserError(f"--source {word} holds no {', '.join(endings)} file: pass the folder that they are in, or one")
    return [_file(path, keys, text=text) for path in paths]


def _plain_name(path: Path) -> str:
    """The name without the ending of a compressed file, in lower case."""
    name = path.name.lower()
    return next((name[: -len(end)] for end in PACKED_ENDINGS if name.endswith(end)), name)


def _file(path: Path, keys: Keys, *, text: bool) -> RecordFile:
    with reading(path), path.open("rb") as opened:
        begin = opened.read(max(map(len, NO_RECORDS)))
    packed = packing_of(begin)
    for magic, mend in NO_RECORDS.items():
        if begin.startswith(magic):
            mend = mend.format(path=shlex.quote(str(path)), made=in_utf8(path))
            raise UserError(f"{path} is no file of records: {mend}")
    with open_unpacked(path, packed) as opened:
        head = opened.read(HEAD)
    refuse_archive(path, head)
    form: Form = "parquet" if begin.startswith(b"PAR1") else "lines"
    if form == "lines" and _plain_name(path).endswith((".csv", ".tsv")):
        form = "csv"
    elif form == "lines" and text and _plain_name(path).endswith(TEXT_ENDINGS):
        form = "text"
    elif form == "lines":
        form = _form_of(head, keys)
    return RecordFile(path, path.stat().st_size, sha256_of(path), form, packed, name=path.name)


def _form_of(head: bytes, keys: Keys) -> Form:
    """Whether a file that begins so has a record a line; else its records are values of JSON somewhere in it."""
    text = head.decode("utf-8", "replace").removeprefix("\ufeff").lstrip("\ufeff \t\r\n")
    if not text.startswith(("{", "[")):
        return "lines"
    first, *others = re.split(r"\r\n|\n|\r", text, maxsplit=1)
    try:
        value = json.loads(first)
    except (ValueError, RecursionError):
        value = None
    if value is not None:
        alone = isinstance(value, dict) or is_turns(value, keys)
        # Without a line end within so many bytes, nobody knows how long a line is; with CR alone, they are rewritten.
        return "lines" if alone and (b"\n" in head or b"\r" not in head) else "values"
    if text.startswith("[") or not others:
        return "values" if text.startswith("[") or len(head) == HEAD else "lines"
    try:
        json.JSONDecoder().raw_decode(text)
    except json.JSONDecodeError as error:
        # A line that is no record, behind which another one begins, is a bad line of many.
        if error.pos <= len(first) or others[0].lstrip().startswith(("{", "[")):
            return "lines"
    except RecursionError:
        return "lines"
    return "values"


def split_of(dataset: Any, name: str, split: str, word: str) -> RecordFile:
    """A split of what `datasets` has opened, or all of it where it has none. Raises UserError where there is none."""
    if hasattr(dataset, "keys"):
        if split not in dataset:
            raise UserError(f"--source {word} has the splits {', '.join(dataset)}: choose one with --split")
        dataset = dataset[split]
    digest, size = hashlib.sha256(), 0
    for row in dataset:
        content = json.dumps(row, default=str).encode()
        digest.update(content)
        size += len(content)
    rows = partial(iter, dataset)
    return RecordFile(Path(word), size, digest.hexdigest(), "dataset", name=name, rows=rows)


def from_hub(name: str, config: str | None, split: str, revision: str, word: str) -> RecordFile:
    """A split of the data set `name` on the Hugging Face hub. Raises UserError where it cannot be had."""
    if not name:
        raise UserError(f"--source {word} names no data set: expected hub:OWNER/NAME")
    import datasets  # slow to import

    datasets.disable_progress_bars()
    try:
        dataset = datasets.load_dataset(name, config, split=split, revision=revision)
    except Exception as error:  # of the network, the hub, or the reader of any format
        raise UserError(
            f"--source {word} cannot be had ({str(error).splitlines()[0][:200]}): check --split, --subset and the "
            f"network, or fetch its files (`hf download --repo-type dataset {name}`), and pass their folder"
        ) from None
    return split_of(dataset, f"{name}/{split}", split, word)


def saved(place: Path, split: str, word: str) -> RecordFile | None:
    """A data set that `datasets` saved in the folder `place`; None if it is no such folder."""
    if not is_saved(place):
        return None
    import datasets

    datasets.disable_progress_bars()
    try:
        dataset = datasets.load_from_disk(str(place))
    except Exception as error:  # whatever the reader of a damaged file raises
        raise UserError(f"--source {word} cannot be read ({str(error).splitlines()[0][:200]})") from None
    return split_of(dataset, place.name, split, word)


# --- unpacking ---------------------------------------------------------------------------------------------------


def unpacked(file: RecordFile, folder: Path, number: int, keys: Keys) -> RecordFile:
    """The file with its records as lines of JSON in `folder`. Raises UserError where it cannot be read."""
    path = folder / f"{number:05d}.jsonl"
    if file.packed and file.form == "lines":
        with open_unpacked(file.path, file.packed) as opened, path.open("wb") as out:
            while block := opened.read(HEAD):
                out.write(block)
        return replace(file, unpacked=Lines(path, path.stat().st_size))
    numbers: list[int] = []
    malformed: list[tuple[int, str, str]] = []
    with path.open("w", encoding="ascii") as out:
        for line, value, begin in _values_of(file, keys):
            if isinstance(value, Malformed):
                malformed.append((line, str(value), begin.encode("utf-8", "replace").decode()))
            else:
                numbers.append(line)
                out.write(json.dumps(value, default=str) + "\n")
    lines = Lines(path, path.stat().st_size, np.array(numbers, dtype=np.int64))
    return replace(file, unpacked=lines, malformed=tuple(malformed))


def _values_of(file: RecordFile, keys: Keys) -> Iterator[tuple[int, Any, str]]:
    """Line, record or Malformed, and how that begins, of every record of a file that is no JSON lines."""
    if file.rows is not None:
        yield from ((number, row, "") for number, row in enumerate(file.rows(), 1))
        return
    if file.form == "parquet":
        yield from ((number, row, "") for number, row in enumerate(_parquet_rows(file.path), 1))
        return
    with open_unpacked(file.path, file.packed) as opened:
        if file.form == "csv":
            yield from _csv_rows(opened, file)
        elif file.form == "text":
            try:
                yield 1, {"text": decoded(opened.read().removeprefix(codecs.BOM_UTF8))}, ""
            except Malformed as error:
                yield 1, error, ""
        else:
            yield from _Values(opened, keys)


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as opened:
            for batch in opened.iter_batches(batch_size=1000):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is a damaged Parquet file ({error}): fetch it again") from None


def _csv_rows(opened: IO[bytes], file: RecordFile) -> Iterator[tuple[int, Any, str]]:
    """Rows by the names in the first one. All that is in them is text; an empty cell says nothing.

    Not by pyarrow, which ends at the first row of another length, and knows no lines.
    """
    text = io.TextIOWrapper(opened, "utf-8-sig", errors="surrogateescape", newline="")
    head, before = "", 0
    while not head.strip() and (first := text.readline()):
        head, before = first, before + 1
    delimiter = "\t" if ".tsv" in file.name.lower() else max(",;\t", key=head.count)
    heading = next(csv.reader([head], delimiter=delimiter), [])
    if twice := next((name for name in heading if name and heading.count(name) > 1), None):
        raise UserError(f"{file.path} has the column {twice!r} twice: name one of them otherwise")
    for line, row in csv_rows(text, delimiter, str(file.path), before=before, longest=MOST_CELL):
        if not any(row):
            continue
        begin = delimiter.join(row)[:80]
        if len(row) != len(heading):
            yield line, Malformed(f"{len(row)} columns, and the heading has {len(heading)}"), begin
        elif _has_escapes(begin := "".join(row)):
            yield line, Malformed("not UTF-8; of GBK, `iconv -f GB18030 -t UTF-8` makes it"), begin[:80]
        else:
            yield line, {key: cell for key, cell in zip(heading, row, strict=True) if cell}, begin


def _has_escapes(text: str) -> bool:
    """Whether bytes that are no UTF-8 stand in a text that was decoded with surrogateescape."""
    return _ESCAPED.search(text) is not None


class _Values:
    """The records among the values of JSON in a file: objects, the elements of lists, and lists that are turns."""

    def __init__(self, opened: IO[bytes], keys: Keys):
        self._opened, self._keys = opened, keys
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._json = json.JSONDecoder()
        self._text, self._place, self._line = "", 0, 1
        self._ended = False

    def __iter__(self) -> Iterator[tuple[int, Any, str]]:
        in_list = False
        while self._skip_blanks():
            begin = self._text[self._place : self._place + 80]
            line = self._line
            opens = begin[0] == "[" and not in_list and not self._is_conversation()
            if opens or (begin[0] == "]" and in_list):
                in_list = opens
                self._go_to(self._place + 1)
                continue
            found = self._decode()
            if isinstance(found, Malformed):
                yield line, found, begin
                self._go_to_next(begin[0])
                continue
            value, end = found
            escaped = _has_escapes(self._text[self._place : end])
            self._go_to(end)
            if escaped:
                yield line, Malformed("not UTF-8; of GBK, `iconv -f GB18030 -t UTF-8` makes it"), begin
            elif not isinstance(value, dict | list):
                yield line, Malformed(f"{kind_of(value)}, not an object"), begin
            else:
                yield line, value, ""

    def _fill(self) -> bool:
        """Reads on, as much again as is there; false at the end."""
        if self._ended:
            return False
        self._text, self._place = self._text[self._place :], 0
        block = self._opened.read(max(HEAD, len(self._text)))
        self._text += self._decoder.decode(block, final=not block)
        self._ended = not block
        return bool(block)

    def _skip_blanks(self) -> bool:
        """Goes to the next value, or to the end of a list; false at the end of the file."""
        while True:
            place = self._place
            while place < len(self._text) and self._text[place] in " \t\r\n\ufeff,":
                place += 1
            self._go_to(place)
            if place < len(self._text):
                return True
            if not self._fill():
                return False

    def _go_to(self, place: int) -> None:
        passed = self._text[self._place : place]
        self._line += passed.count("\n") or passed.count("\r")
        self._place = place

    def _decode(self, ahead: int = 0) -> tuple[Any, int] | Malformed:
        """The value that begins so many characters ahead, and where it ends."""
        while True:
            try:
                return self._json.raw_decode(self._text, self._place + ahead)
            except json.JSONDecodeError as error:
                cut_off = error.msg.startswith("Unterminated") or error.pos >= len(self._text) - 16
                if not cut_off or not self._fill():
                    return Malformed(f"not JSON: {error.msg}")
            except RecursionError as error:
                return Malformed(f"not JSON: {error}")

    def _is_conversation(self) -> bool:
        """Whether the list that begins here is one of turns: then it is one record."""
        ahead = 1
        while self._place + ahead < len(self._text) or self._fill():
            if self._text[self._place + ahead] not in " \t\r\n":
                first = self._decode(ahead)
                return not isinstance(first, Malformed) and is_turn(first[0], self._keys)
            ahead += 1
        return False

    def _go_to_next(self, bracket: str) -> None:
        """Behind a value that is none: to the next line that begins as this one did, as deep."""
        start = self._text.rfind("\n", 0, self._place) + 1
        indent = self._text[start : self._place]
        behind = re.compile(r"[\r\n]" + (re.escape(indent) if not indent.strip() else r"\s*") + re.escape(bracket))
        while True:
            found = behind.search(self._text, self._place)
            if found:
                self._go_to(found.end() - 1)
                return
            if not self._fill():
                self._go_to(len(self._text))
                return
