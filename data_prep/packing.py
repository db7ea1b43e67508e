"""Packed files: how they begin, and their content, as far as a text can go."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from training.base.console import UserError

_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
    b"PK\x05\x06": "zip",
}
_OPEN: dict[str, Any] = {"gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open}
_DAMAGE = (OSError, EOFError, ValueError, RuntimeError, zlib.error, lzma.LZMAError, zipfile.BadZipFile)

# Bytes that a packed file may unpack to, for each of its own. Text packs to a fourth or a tenth.
UNPACKED_AT_ANY_RATIO, MOST_RATIO = 64 << 20, 100
_BLOCK = 1 << 20


def packing_of(begin: bytes) -> str:
    """How a file that begins so is packed: gzip, bzip2, xz, zstd or zip; "" if in none of these ways."""
    return next((kind for magic, kind in _MAGIC.items() if begin.startswith(magic)), "")


def refuse_archive(path: Path, begin: bytes) -> None:
    """Raises UserError where the content of the file at `path` begins as an archive of tar does."""
    if begin[257:262] == b"ustar":
        raise UserError(f"{path} is an archive of tar: unpack it (`tar xf`), and pass what was in it")


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Raises UserError for a file that cannot be opened in this block."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


@contextmanager
def naming_damage(path: Path, kind: str) -> Iterator[None]:
    """Raises UserError for what the libraries raise in this block over a damaged file."""
    try:
        yield
    except _DAMAGE as error:
        raise UserError(f"{path} is a damaged {kind} file ({error}): delete it and fetch it again") from None


def open_unpacked(path: Path, kind: str, member: str = "") -> IO[bytes]:
    """The content of a file that is packed in this way, if in any; of a zip file that of one member.

    Reading raises UserError where the file is damaged, or unpacks to more than a text would.
    """
    if not kind:
        return path.open("rb")
    with naming_damage(path, kind):
        if kind == "zip":
            with zipfile.ZipFile(path) as opened:
                inner = opened.open(member)
        elif kind == "zstd":
            inner = pa.input_stream(str(path), compression="zstd")
        else:
            inner = _OPEN[kind](path, "rb")
    return io.BufferedReader(_Unpacked(path, kind, inner), _BLOCK)


class _Unpacked(io.RawIOBase):
    def __init__(self, path: Path, kind: str, inner: IO[bytes]):
        self._path, self._kind, self._inner = path, kind, inner
        self._packed, self._read = path.stat().st_size, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with naming_damage(self._path, self._kind):
            content = self._inner.read(len(buffer))
        self._read += len(content)
        most = max(UNPACKED_AT_ANY_RATIO, MOST_RATIO * self._packed)
        if self._read > most:
            raise UserError(
                f"{self._path} has {self._packed:,} bytes and unpacks to more than {most:,}, which no text does: do "
                "not use it; if it is what you want, unpack it yourself and pass what is in it"
            )
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        self._inner.close()
        super().close()
