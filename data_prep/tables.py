"""Files that hold rows of texts, whatever their form and packing: each is a `Table`.

Text is TAB-separated (.tsv, .txt and all others), CSV with quotes (.csv) or JSON lines (.jsonl, .json), packed by gzip,
bzip2, xz, zstd or zip or not at all; beside it Parquet, two parallel texts, and data sets of `datasets`. Reading costs
no memory that grows with a table. What cannot be read is refused with what to do; a row that cannot is `Unreadable`.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import json
import re
import shlex
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import IO, Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.packing import naming_damage, open_unpacked, packing_of, reading, refuse_archive
from data_prep.preparing import sha256_of_json
from training.base.console import UserError
from training.base.files import sha256_of
from training.data.text import encoding_advice, split_lines

BYTES_PER_PART = 1 << 20  # of a text, read at a time
ROWS_PER_BATCH = 10_000  # of a table of columns, read at a time
ROWS_FOR_NAMES = 1000  # rows of JSON that are looked at for its keys
LONGEST_CELL = 1 << 24  # of CSV: an unmatched quote makes one cell of all that follows


@dataclass(frozen=True)
class Unreadable:
    """A row without cells: why, and how it begins."""

    reason: str
    text: str


Row = tuple[int, Sequence[str] | Unreadable]  # the line where it stands, from 1


@dataclass(frozen=True)
class Table(ABC):
    """Rows of texts. `names` are those of its columns, None where they may stand in the first row or nowhere."""

    place: str  # path, address or name
    bytes: int
    sha256: str  # of the content: the same text has the same, however it is packed
    names: tuple[str, ...] | None
    archive: dict[str, object] | None  # bytes and sha256 of the packed file

    @property
    def content_bytes(self) -> int:
        """About as many as `rows` gives."""
        return self.bytes

    @abstractmethod
    def rows(self) -> Iterator[Row]:
        """All rows from the first. Raises UserError where the table breaks off."""

    def about(self) -> dict[str, object]:
        """What meta.json says of it."""
        return {"place": self.place, "bytes": self.bytes, "sha256": self.sha256, "archive": self.archive}


# --- text ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Packed:
    """A file and how it is unpacked; `member` is the one that is read of a zip file, `name` that of its content."""

    path: Path
    kind: str  # "", gzip, bzip2, xz, zstd or zip
    name: str
    member: str = ""

    @classmethod
    def of(cls, path: Path) -> Packed:
        """By how the file begins. Raises UserError for a folder, a spreadsheet, or a zip file of several texts."""
        with reading(path), path.open("rb") as file:
            begin = file.read(8)
        kind = packing_of(begin)
        if kind != "zip":
            return cls(path, kind, path.stem if kind else path.name)
        with naming_damage(path, kind), zipfile.ZipFile(path) as opened:
            names = opened.namelist()
        if "[Content_Types].xml" in names:
            raise UserError(f"{path} is a spreadsheet: save it as CSV or as text separated by tabs, and pass that")
        texts = [name for name in names if Path(name).suffix in _TEXTS and "_about" not in name]
        if len(texts) != 1:
            raise UserError(
                f"{path} should hold one text file of sentence pairs, found {len(texts)}; unzip it, pass the file"
            )
        return cls(path, kind, Path(texts[0]).name, texts[0])

    def open(self) -> IO[bytes]:
        """The content. Reading it raises UserError where it is damaged."""
        return open_unpacked(self.path, self.kind, self.member)

    def parts(self) -> Iterator[bytes]:
        """The content in pieces of whole lines."""
        left = b""
        with self.open() as file:
            while block := file.read(BYTES_PER_PART):
                left += block
                # A CR at the very end may have its LF in the next block.
                end = max(left.rfind(b"\n"), left.rfind(b"\r", 0, len(left) - 1)) + 1
                if end:
                    yield left[:end]
                    left = left[end:]
            if left:
                yield left


_TEXTS = (".txt", ".tsv", ".csv", ".jsonl", ".json")


@dataclass(frozen=True)
class TextTable(Table):
    """A text, which has passed as UTF-8."""

    packed: Packed

    def lines(self) -> Iterator[str]:
        """Its lines without their ends; a BOM before one is left out."""
        return (line.decode("utf-8-sig") for line in split_lines(self.packed.parts()))

    def sentences(self) -> Iterator[str]:
        """Its lines, where line N belongs to line N of another text: a CR within one of many LFs ends none."""
        if not any(b"\n" in part for part in self.packed.parts()):
            yield from self.lines()
            return
        left = b""
        for part in self.packed.parts():
            *lines, left = (left + part).split(b"\n")
            yield from (line.removesuffix(b"\r").decode("utf-8-sig") for line in lines)
        if left:
            yield left.decode("utf-8-sig")


class TabTable(TextTable):
    """A row a line, its cells parted by tabs. A quote is a character like others."""

    def rows(self) -> Iterator[Row]:
        return ((number, line.split("\t")) for number, line in enumerate(self.lines(), 1))


class CSVTable(TextTable):
    """Cells parted by commas, semicolons or tabs, with quotes around those that hold one, or a line's end."""

    def rows(self) -> Iterator[Row]:
        texts = (part.decode("utf-8-sig") for part in self.packed.parts())
        # The reader wants lines with their ends; a part ends with a line.
        lines = (line for text in texts for line in io.StringIO(text, newline=""))
        first = next(lines, "")
        unquoted = re.sub('"[^"]*"', "", first)
        delimiter = max(",;\t", key=unquoted.count)
        yield from csv_rows(chain([first], lines), delimiter, self.place)


def csv_rows(
    lines: Iterable[str], delimiter: str, place: str, *, before: int = 0, longest: int = LONGEST_CELL
) -> Iterator[tuple[int, list[str]]]:
    """The rows of CSV, each with the line where it begins. Raises UserError where a quote swallows what follows.

    lines: with their ends. before: how many were read before. longest: characters of a cell.
    """
    csv.field_size_limit(longest)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        number = before + reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(
                f"{place} is no CSV from line {number} on ({error}): a cell with a quote in it stands in quotes, and "
                'its own quotes twice, as in "He said ""yes""."'
            ) from None
        yield number, cells


@dataclass(frozen=True)
class JSONTable(TextTable):
    """An object a line; a value of an object in it is a column of its own, named as in translation.zh."""

    def rows(self) -> Iterator[Row]:
        assert self.names is not None
        for number, line in enumerate(self.lines(), 1):
            if not line.strip():
                yield number, []
                continue
            values = _flat(line)
            if isinstance(values, str):
                yield number, Unreadable(values, line[:80])
            else:
                yield number, [values.get(name, "") for name in self.names]


def _flat(line: str) -> dict[str, str] | str:
    """The texts of an object that a line holds, by their names; or why it is none."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"not JSON: {getattr(error, 'msg', error)}"
    if not isinstance(values, dict):
        return "no JSON object"
    found: dict[str, str] = {}
    for key, value in values.items():
        inner = {f"{key}.{name}": each for name, each in value.items()} if isinstance(value, dict) else {key: value}
        for name, each in inner.items():
            if isinstance(each, str | int | float) and not isinstance(each, bool):
                # Half a surrogate pair is no character, and no file can hold it.
                found[name] = str(each).encode("utf-8", "replace").decode()
    return found


def _names_of(packed: Packed) -> tuple[str, ...]:
    """The columns that the first rows of JSON lines have, in the order in which they come."""
    lines = (line.decode("utf-8-sig") for line in split_lines(packed.parts()))
    names: dict[str, None] = {}
    for line in islice(filter(str.strip, lines), ROWS_FOR_NAMES):
        if line.lstrip().startswith("["):
            path, made = shlex.quote(str(packed.path)), shlex.quote(packed.path.stem + "-lines.jsonl")
            raise UserError(
                f"{packed.path} is one JSON list, not a JSON object a line: `jq -c '.[]' {path} > {made}` makes a "
                "file of lines of it"
            )
        if isinstance(values := _flat(line), dict):
            names |= dict.fromkeys(values)
    if not names:
        raise UserError(f"{packed.path} holds no JSON object a line, with a text under each key")
    return tuple(names)


def open_text(path: Path, place: str | None = None) -> TextTable:
    """The text at `path`, all of which has been read once. Raises UserError where it is empty or not UTF-8.

    place: what it is called, if not by its path.
    """
    packed = Packed.of(path)
    place = place or str(path)
    digest, size = hashlib.sha256(), 0
    decoder = codecs.getincrementaldecoder("utf-8")()
    lines = 0
    for part in packed.parts():
        if not size:
            refuse_archive(path, part)
        try:
            decoder.decode(part)
        except UnicodeDecodeError as error:
            lines += sum(1 for _ in split_lines([part[: error.start + 1]]))
            raise _not_utf8(packed, place, lines, part, error) from None
        lines += len(part.splitlines())
        digest.update(part)
        size += len(part)
    try:
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise _not_utf8(packed, place, lines, b"", error) from None
    if not size:
        raise UserError(f"{place} is empty; expected lines of sentence pairs")
    archive: dict[str, object] | None = None
    if packed.kind:
        archive = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    suffix = Path(packed.name).suffix.lower()
    if suffix in (".jsonl", ".json"):
        return JSONTable(place, size, digest.hexdigest(), _names_of(packed), archive, packed)
    form = CSVTable if suffix == ".csv" else TabTable
    return form(place, size, digest.hexdigest(), None, archive, packed)


def _not_utf8(packed: Packed, place: str, line: int, part: bytes, error: UnicodeDecodeError) -> UserError:
    # The decoder keeps what ends a part in the middle of a character, so only the text's end gives this reason.
    if error.reason == "unexpected end of data":
        advice = "it ends in the middle of a character: copy it again, whole"
    else:
        begin = next(packed.parts())
        content = begin if begin[:2] in (b"\xff\xfe", b"\xfe\xff") else part
        advice = encoding_advice(content, Path(packed.name) if packed.kind else packed.path)
        advice = f"unpack it; {advice}" if packed.kind else advice
    return UserError(f"{place} is not UTF-8 text (line {line}); {advice}")


# --- tables of columns -----------------------------------------------------------------------------------------------


def text_columns(schema: pa.Schema) -> tuple[str, ...]:
    """The names of a table's columns that hold texts or numbers; an object's values are columns, as translation.zh."""
    flat = pa.table({field.name: pa.array([], field.type) for field in schema}).flatten().schema
    return tuple(field.name for field in flat if not pa.types.is_nested(field.type) and field.name)


def cells_of(batch: pa.RecordBatch | pa.Table, names: Sequence[str]) -> Iterator[list[str]]:
    """The rows of a piece of a table, with the columns `names`; a cell that is null is empty."""
    table = batch if isinstance(batch, pa.Table) else pa.Table.from_batches([batch])
    table = table.flatten()
    columns = [["" if cell is None else str(cell) for cell in table.column(name).to_pylist()] for name in names]
    return map(list, zip(*columns, strict=True))


@dataclass(frozen=True)
class ParquetTable(Table):
    """A file of columns."""

    path: Path

    @property
    def content_bytes(self) -> int:
        about = pq.ParquetFile(self.path).metadata
        return sum(about.row_group(number).total_byte_size for number in range(about.num_row_groups))

    def rows(self) -> Iterator[Row]:
        assert self.names is not None
        with _columns_named(self.path):
            file = pq.ParquetFile(self.path)
            batches = file.iter_batches(ROWS_PER_BATCH, use_threads=False)
            rows = chain.from_iterable(cells_of(batch, self.names or ()) for batch in batches)
            yield from enumerate(rows, 1)


def open_parquet(path: Path) -> ParquetTable:
    """The Parquet file at `path`. Raises UserError where it is none."""
    with _columns_named(path):
        names = text_columns(pq.ParquetFile(path).schema_arrow)
    return ParquetTable(str(path), path.stat().st_size, sha256_of(path), names, None, path)


@contextmanager
def _columns_named(path: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{path} is a damaged Parquet file ({reason}); fetch it again") from None


@dataclass(frozen=True)
class DatasetTable(Table):
    """A split of a data set of `datasets`."""

    dataset: Any

    def rows(self) -> Iterator[Row]:
        names = cast(tuple[str, ...], self.names)
        batches = self.dataset.with_format("arrow").iter(ROWS_PER_BATCH)
        yield from enumerate(chain.from_iterable(cells_of(batch, names) for batch in batches), 1)


_PASS_FILE = "; if one of its files holds the sentence pairs, pass that"


def is_saved(place: Path) -> bool:
    """Whether this is a folder in which `datasets` has saved a data set."""
    return any((place / about).is_file() for about in ("dataset_dict.json", "state.json"))


def open_dataset(name: str, subset: str | None, revision: str | None, split: str) -> DatasetTable:
    """The split of a data set: of a folder, or, called hub:NAME, of the Hugging Face hub.

    Raises UserError where it cannot be had, or has no such split.
    """
    import datasets  # slow to import

    datasets.disable_progress_bars()
    commit = None
    hub = name.removeprefix("hub:")
    saved = is_saved(Path(name))
    endings = {each.suffix for each in Path(name).glob("*")} if name == hub and not saved else set()
    # Beside columns, a text is a licence or a description.
    if not endings & {".parquet", ".arrow", ".jsonl", ".json"} and (texts := sorted(endings & {".tsv", ".txt"})):
        raise UserError(
            f"{name} is a folder of texts, of which only the library knows what is a heading: join them (`cat "
            f"{shlex.quote(name)}/*{texts[0]} > joined{texts[0]}`), and pass that"
        )
    try:
        if saved:
            found = datasets.load_from_disk(name)
            splits = found if isinstance(found, dict) else {split: found}
        else:
            where = hub if name != hub else str(Path(name).resolve())
            builder = datasets.load_dataset_builder(where, subset, revision=revision)
            # Of the hub, where it comes from has the commit in it, and what is in the cache already has it as its hash.
            commit = next(iter(re.findall(r"\b[0-9a-f]{40}\b", f"{builder.base_path} {builder.hash}")), None)
            builder.download_and_prepare()
            splits = {each: builder.as_dataset(each) for each in builder.info.splits if each == split} or dict.fromkeys(
                builder.info.splits
            )
    except Exception as error:  # whatever the library at work raises: no network, no such name, no data in a folder
        reason = next(iter(str(error.__cause__ or error).strip().splitlines()), type(error).__name__)
        by_hand = f"; by hand: `hf download {shlex.quote(hub)} --repo-type dataset --local-dir FOLDER`, and pass FOLDER"
        raise UserError(
            f"{name} cannot be read as a data set ({reason}){by_hand if name != hub else _PASS_FILE}"
        ) from None
    if splits.get(split) is None:
        raise UserError(f"{name} has no split {split}; it has {', '.join(splits)}")
    dataset = splits[split]
    names = text_columns(dataset.with_format("arrow").features.arrow_schema)
    digest = hashlib.sha256(json.dumps(names).encode())
    table = DatasetTable(name, 0, "", names, None, dataset)
    size = 0
    for _, cells in table.rows():
        content = "\0".join(cast(list[str], cells)).encode("utf-8", "replace") + b"\n"
        digest.update(content)
        size += len(content)
    about: dict[str, object] = {"split": split, "subset": subset, "revision": commit or revision}
    return DatasetTable(name, size, digest.hexdigest(), names, about, dataset)


# --- two parallel texts ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ParallelTable(Table):
    """Two texts whose lines belong together."""

    sides: tuple[TextTable, TextTable]

    def rows(self) -> Iterator[Row]:
        first, second = self.sides
        for number, cells in enumerate(zip_longest(first.sentences(), second.sentences()), 1):
            if None in cells:
                counts = [sum(1 for _ in side.sentences()) for side in self.sides]
                raise UserError(
                    f"{first.place} has {counts[0]:,} lines and {second.place} {counts[1]:,}: line N of one belongs to "
                    "line N of the other, so both need as many"
                )
            yield number, cast(tuple[str, str], cells)

    def about(self) -> dict[str, object]:
        return {**super().about(), "files": [side.about() for side in self.sides]}


def open_parallel(paths: tuple[Path, Path], names: tuple[str, str]) -> ParallelTable:
    """Two texts, with the names of their columns. Raises UserError for what `open_text` refuses."""
    sides = (open_text(paths[0]), open_text(paths[1]))
    sha256 = sha256_of_json([side.sha256 for side in sides])
    place = ",".join(side.place for side in sides)
    return ParallelTable(place, sum(side.bytes for side in sides), sha256, names, None, sides)


def open_file(path: Path) -> Table:
    """The table in a file, by its content and its name."""
    with reading(path), path.open("rb") as file:
        is_parquet = file.read(4) == b"PAR1"
    return open_parquet(path) if is_parquet else open_text(path)


def first_rows(rows: Iterator[Row], count: int) -> tuple[list[Row], Iterable[Row]]:
    """The first rows, and all of them."""
    head = list(islice(rows, count))
    return head, chain(head, rows)
