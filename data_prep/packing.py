"""Packed files: how they begin, and their content."""

from __future__ import annotations

import bz2
import gzip
import lzma
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

_MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


def packing_of(begin: bytes) -> str | None:
    """How a file that begins so is packed: gzip, bzip2, xz or zstd; None if in none of these ways."""
    return next((kind for magic, kind in _MAGIC.items() if begin.startswith(magic)), None)


def open_packed(path: Path, kind: str) -> IO[bytes]:
    """The content of a file packed in one of these ways; what reading raises where it is damaged differs by library."""
    if kind == "zstd":
        return pa.input_stream(str(path), compression="zstd")
    opens: dict[str, Any] = {"gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open}
    content: IO[bytes] = opens[kind](path, "rb")
    return content
