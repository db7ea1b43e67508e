"""Exported folders, and a hub that nobody may ask."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def nobody_asked() -> Iterator[dict[str, str]]:
    """Environment variables with which a look at the Hugging Face Hub comes here; fails if there was one."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        host, port = server.getsockname()
        yield {"HF_ENDPOINT": f"http://{host}:{port}"}
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
