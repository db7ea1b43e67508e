"""A prepared data set on disk: what is in the folder, and how it is read.

    prepared/NAME/
      train/ validation/ test/   Arrow, as `datasets.load_from_disk` reads them
      tokenizer/source/ tokenizer/target/
      meta.json                  where everything comes from, and the size and SHA-256 of every other file

Reading costs no memory to speak of: ids are views on the memory-mapped files. A folder that is there was whole once,
since one rename published it; its sizes and hashes show what happened to it since. It may come from a stranger, though,
and Arrow follows the offsets in a file wherever they lead: all of it is checked when it is first opened on a machine.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, overload

import numpy as np
import pyarrow as pa
from pydantic import StringConstraints, TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic wants this one before Python 3.12

from training.base.console import UserError
from training.base.files import PATH_WITHIN, read_json, sha256_of
from training.base.known_files import check_once, sha256_once
from training.data.tokenizers import Tokenizer, load_tokenizer

FORMAT = "relay-sentence-pairs-1"
META = "meta.json"
PARTS = ("train", "validation", "test")
# What is in a data set of each form, and what trains on it.
KINDS = {
    FORMAT: "sentence pairs (for training.gpt and training.seq2seq)",
    "relay-conversations-1": "conversations (for training.qlora)",
}
MAKE = "python -m data_prep.pairs --source sample|download|PATH --output {folder}"


class FileIdentity(TypedDict):
    """Of a file in meta.json."""

    bytes: int
    sha256: str


_FILES = TypeAdapter(dict[Annotated[str, StringConstraints(pattern=f"^{PATH_WITHIN}$")], FileIdentity])


@dataclass(frozen=True)
class Ragged:
    """Rows of different length in one array: row i is `values[offsets[i]:offsets[i + 1]]`."""

    values: np.ndarray  # int32 [total]; of an open data set a read-only view on the file, as is `offsets`
    offsets: np.ndarray  # int64 [rows + 1]

    @classmethod
    def of(cls, rows: Sequence[np.ndarray]) -> Ragged:
        """Rows of int32 ids, one after the other."""
        values = np.concatenate(rows) if rows else np.zeros(0, dtype=np.int32)
        return cls(values, np.cumsum([0, *map(len, rows)], dtype=np.int64))

    @cached_property
    def lengths(self) -> np.ndarray:
        """Ids in each row, int64 [rows]."""
        return np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        """Ids of one row, int32 [length]."""
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        row %= len(self)
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    def take(self, rows: np.ndarray) -> Ragged:
        """A copy of the rows at `rows`, in that order."""
        offsets = np.cumsum([0, *self.lengths[rows]], dtype=np.int64)
        moved_by = np.repeat(self.offsets[rows] - offsets[:-1], self.lengths[rows])
        return Ragged(self.values[np.arange(offsets[-1]) + moved_by], offsets)

    def padded(self, indices: Sequence[int] | np.ndarray, fill: int) -> np.ndarray:
        """The rows at `indices` side by side, int64 [len(indices), longest of them], `fill` behind each row's end."""
        chosen = np.asarray(indices, dtype=np.int64)
        starts, lengths = self.offsets[chosen], self.lengths[chosen]
        columns = np.arange(lengths.max(initial=0))
        inside = columns < lengths[:, None]
        batch = np.full(inside.shape, fill, dtype=np.int64)
        batch[inside] = self.values[(starts[:, None] + columns)[inside]]
        return batch


class Texts(Sequence[str]):
    """A column of texts, each decoded when it is asked for."""

    def __init__(self, column: pa.Array):
        self._column = column

    def __len__(self) -> int:
        return len(self._column)

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> list[str]: ...
    def __getitem__(self, row: int | slice) -> str | list[str]:
        found: str | list[str] = (
            self._column[row].to_pylist() if isinstance(row, slice) else self._column[int(row)].as_py()
        )
        return found

    def __iter__(self) -> Iterator[str]:
        return (value.as_py() for value in self._column)


@dataclass(frozen=True)
class Part:
    """One of train, validation and test: ids and texts of the same rows."""

    name: str
    source: Ragged
    target: Ragged
    source_texts: Texts
    target_texts: Texts
    rows: np.ndarray  # int64 [rows], which pair of the raw file this is, counted from 0

    def __len__(self) -> int:
        return len(self.source)


@dataclass(frozen=True)
class PreparedFolder(ABC):
    """What every open prepared data set has: the folder and its meta.json. The subclass knows what its parts hold."""

    folder: Path
    meta: dict[str, Any]

    make: ClassVar[str]  # the command that makes such a data set, for messages
    kinds: ClassVar[dict[str, pa.DataType]]  # of a part's columns

    @property
    def fingerprint(self) -> str:
        """Identity of the content: equal if and only if tokenizers, rows and ids of all parts are equal."""
        return str(self.meta["fingerprint"])

    @property
    def kept(self) -> dict[str, Path]:
        """What a run keeps of it: the description, and the tokenizers."""
        return {"data.json": self.folder / META, "tokenizer": self.folder / "tokenizer"}

    def verify(self) -> None:
        """Reads every file and compares its SHA-256 with meta.json. Raises UserError naming the first that differs."""
        self._check_files(sha256_of)

    @abstractmethod
    def vocabulary_sizes(self) -> dict[str, int]:
        """How many ids there are, for each column of ids."""

    def check_once(self) -> Self:
        """Itself, all of it checked, unless this machine has seen it before. Raises UserError."""
        self._check_files(sha256_once)
        check_once(f"prepared data {sha256_of(self.folder / META)}", self._check_parts)
        return self

    def _check_files(self, sha256: Callable[[Path], str]) -> None:
        for name, about in self.meta["files"].items():
            if sha256(self.folder / name) != about["sha256"]:
                again = _again(self.folder, self.make)
                raise UserError(f"{self.folder / name} was changed or damaged since it was prepared; {again}")

    def _check_parts(self) -> None:
        for part in PARTS:
            self._check_part(part)

    def _check_part(self, part: str) -> None:
        """Raises UserError unless columns and offsets are what they should be, and every id has its token."""
        try:
            table = self._table(part)
            table.validate(full=True)
            for column, kind in self.kinds.items():
                if table.column(column).type != kind or table.column(column).null_count:
                    raise ValueError(f"its column {column} is not of the kind {kind}")
            for column, size in self.vocabulary_sizes().items():
                ids = ragged(_one_chunk(table.column(column))).values
                if len(ids) and not 0 <= ids.min() <= ids.max() < size:
                    raise ValueError(f"its column {column} has ids that the vocabulary of {size:,} lacks")
        except (ValueError, KeyError, OSError) as error:  # pyarrow's own are among them
            raise UserError(
                f"the {part} part of {self.folder} is not as Relay writes it ({error}): do not use it, or "
                f"{_again(self.folder, self.make)}"
            ) from None

    def columns(self, part: str) -> dict[str, pa.Array]:
        """The columns of the part called train, validation or test, memory-mapped, each in one piece."""
        if part not in PARTS:
            raise UserError(f"there is no part {part!r}; the parts are {', '.join(PARTS)}")
        table = self._table(part)
        return {column: _one_chunk(table.column(column)) for column in table.column_names}

    def _table(self, part: str) -> pa.Table:
        # Not through `datasets`: every rank of a run opens this, and the import alone takes longer than all the rest.
        names = sorted(name for name in self.meta["files"] if fnmatch(name, f"{part}/data-*.arrow"))
        paths = [self.folder / name for name in names]
        return pa.concat_tables([pa.ipc.open_stream(pa.memory_map(str(path))).read_all() for path in paths])


@dataclass(frozen=True)
class Prepared(PreparedFolder):
    """An open prepared data set of sentence pairs."""

    source_tokenizer: Tokenizer
    target_tokenizer: Tokenizer

    make = MAKE
    kinds: ClassVar = {
        **dict.fromkeys(("source", "target"), pa.large_string()),
        **dict.fromkeys(("source_ids", "target_ids"), pa.large_list(pa.int32())),
        "row": pa.int64(),
    }

    def vocabulary_sizes(self) -> dict[str, int]:
        return {
            "source_ids": self.source_tokenizer.vocabulary_size,
            "target_ids": self.target_tokenizer.vocabulary_size,
        }

    @property
    def joint_vocabulary(self) -> bool:
        """Whether source and target share their ids."""
        return self.source_tokenizer.sha256 == self.target_tokenizer.sha256

    @property
    def identity(self) -> dict[str, str]:
        """What of the data defines a run: the content, and the vocabularies that its model speaks."""
        return {
            "fingerprint": self.fingerprint,
            "source_tokenizer": self.source_tokenizer.sha256,
            "target_tokenizer": self.target_tokenizer.sha256,
        }

    def part(self, name: str) -> Part:
        """The part called train, validation or test, memory-mapped."""
        columns = self.columns(name)
        return Part(
            name,
            ragged(columns["source_ids"]),
            ragged(columns["target_ids"]),
            Texts(columns["source"]),
            Texts(columns["target"]),
            columns["row"].to_numpy(),
        )


def _others(folder: Path) -> str:
    """The prepared data sets beside a missing one, in words."""
    found = sorted(str(path.parent) for path in folder.parent.glob(f"[!.]*/{META}"))
    return f" (there is {', '.join(found)})" if found else ""


def open_prepared(folder: str | Path) -> Prepared:
    """The prepared data set in `folder`. Raises UserError when it is missing, half there, changed or forged."""
    folder = Path(folder)
    meta = read_meta(folder, FORMAT, MAKE)
    return Prepared(
        folder, meta, load_tokenizer(folder / "tokenizer/source"), load_tokenizer(folder / "tokenizer/target")
    ).check_once()


def read_meta(folder: Path, format: str, make: str) -> dict[str, Any]:
    """meta.json of a prepared data set of the form `format`, which the command `make` makes.

    Raises UserError when the folder is missing, half there, of another form, or when its files' sizes have changed.
    """
    if folder.is_file():
        raise UserError(
            f"{folder} is a file, and --data takes the folder that a raw file is prepared in: make that with "
            f"`{make.format(folder='prepared/NAME')}`, and name it"
        )
    if not folder.is_dir():
        raise UserError(
            f"there is no prepared data set {folder}{_others(folder)}; make it with `{make.format(folder=folder)}` "
            "and the options that stand in the config above `data`"
        )
    again = _again(folder, make)
    try:
        meta = read_json(folder / META)
    except FileNotFoundError:
        others = sorted({path.name for path in folder.iterdir()} - {*PARTS, "tokenizer"})
        if others:
            what = "a run's folder" if "checkpoints" in others else "no prepared data set"
            raise UserError(
                f"{folder} is {what} (it holds {', '.join(others[:3])}): name the folder that `"
                f"{make.format(folder='FOLDER')}` made, by --data"
            ) from None
        raise UserError(f"{folder} has no {META}, so it is no complete prepared data set; {again}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / META} cannot be read ({error}); {again}") from None
    form = meta.get("format") if isinstance(meta, dict) else None
    if form != format and form in KINDS:
        raise UserError(f"{folder} holds {KINDS[form]}, and {KINDS[format]} are expected: name another --data")
    if not isinstance(meta, dict) or form != format:
        raise UserError(f"{folder / META} is not of the form {format} that this version reads; {again}")
    missing = [name for name in (*PARTS, "tokenizer") if not (folder / name).is_dir()]
    if missing:
        raise UserError(f"{folder} lacks {' and '.join(missing)}; {again}")
    try:
        files = _FILES.validate_python(meta.get("files"))
    except ValidationError:
        raise UserError(f"{folder / META} does not list the files of the data set; {again}") from None
    found = {name for part in (*PARTS, "tokenizer") for name in _files_below(folder / part, folder)}
    if strangers := sorted(found - files.keys()):
        raise UserError(
            f"{folder} has files that {META} does not list, such as {strangers[0]}: remove them, or {again}"
        )
    for name, about in files.items():
        path = folder / name
        size = path.stat().st_size if path.is_file() and not path.is_symlink() else None
        if size != about["bytes"]:
            state = "is missing" if size is None else f"has {size:,} bytes instead of {about['bytes']:,}"
            raise UserError(f"{path} {state}; {again}")
    return meta


def write_part(folder: Path, rows: np.ndarray, texts: Mapping[str, pa.Array], source: Ragged, target: Ragged) -> str:
    """Writes a part of sentence pairs to `folder`: the row numbers in the raw file, columns of large strings, the ids.

    Returns the SHA-256 of rows and ids, which depends on no file format and no library's version.
    """
    columns = {**texts, "row": pa.array(rows)}
    digest = hashlib.sha256(rows.tobytes())
    for name, ids in (("source_ids", source), ("target_ids", target)):
        columns[name] = id_column(ids)
        digest.update(ids.offsets.data)
        digest.update(ids.values.data)
    write_table(folder, columns, digest.hexdigest())
    return digest.hexdigest()


def id_column(ids: Ragged) -> pa.LargeListArray:
    """Ids as a column. Large lists, since their offsets are int64: one chunk holds any number of ids."""
    return pa.LargeListArray.from_arrays(pa.array(ids.offsets), pa.array(ids.values))


def write_table(folder: Path, columns: dict[str, pa.Array], fingerprint: str) -> None:
    """Writes `columns` to `folder` in one piece that `datasets.load_from_disk` reads, straight from where they lie."""
    import datasets  # slow to import, and only whoever prepares data needs it

    datasets.disable_progress_bars()
    table = pa.table(columns)
    # The library would cut the table into pieces of 1,000 rows, so it only describes one without rows. The fingerprint
    # is ours, since the library's differs between two equal preparations.
    empty = datasets.table.InMemoryTable(table.schema.empty_table())
    datasets.Dataset(empty, fingerprint=fingerprint[:16]).save_to_disk(folder, num_shards=1)
    (path,) = folder.glob("data-*.arrow")
    schema = pa.ipc.open_stream(path.read_bytes()).schema
    # Arrow's own file: through one of Python's, each column would be copied on its way.
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        writer.write_table(table.replace_schema_metadata(schema.metadata))


def list_files(folder: Path) -> dict[str, FileIdentity]:
    """Size and SHA-256 of every file below `folder`, by its path in the folder: the `files` of meta.json."""
    return {
        name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)}
        for name in sorted(_files_below(folder, folder))
    }


def _files_below(place: Path, folder: Path) -> Iterator[str]:
    """Everything below `place` that is no folder, by its path in `folder`."""
    return (path.relative_to(folder).as_posix() for path in place.rglob("*") if path.is_symlink() or not path.is_dir())


def _again(folder: Path, make: str) -> str:
    return f"prepare it again: `{make.format(folder=folder)} --overwrite true` with its other options"


def _one_chunk(column: pa.ChunkedArray) -> pa.Array:
    """`column` in one piece; copied only if someone has saved the data again in several."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def ragged(column: pa.LargeListArray) -> Ragged:
    """A column of lists as ids, without a copy."""
    return Ragged(column.values.to_numpy(), column.offsets.to_numpy())
