"""What the run of a config needs on each node: the config itself, disk, data, base model, address.

A run and its data are read and never changed: what the doctor writes lies beside them and is removed.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from launch.doctor.findings import Finding, Level, MustMatch
from launch.scripts import read_options
from training.base.console import UserError
from training.base.environment import staged
from training.base.files import dangling, write_atomically, writing_to
from training.data.conversations import open_conversations
from training.data.prepared import open_prepared

_FREE_BYTES: dict[Level, float] = {"error": 0.5e9, "warning": 5e9}
_SENT_BYTES = 8_000_000  # to an address and back


def config(script: str | None, words: Sequence[str]) -> Iterator[Finding]:
    """Whether the options can be read at all."""
    if script is None:
        if words:
            raise UserError("options without a config: name it first, or the module by --script, as in training.gpt")
        yield Finding("ok", "config", "none was named: only the machine is looked at")
        return
    read_options(script, words)
    yield Finding("ok", "config", f"{script} reads {' '.join(words)}")


def existing_folder(path: Path) -> Path:
    """`path`, or the nearest folder above it that is there. Raises UserError where a file is in the way."""
    if (link := dangling(path)) is not None:
        raise UserError(
            f"{link}, so that no run folder can be made there: mount or make that, or choose another --run_dir"
        )
    path = path.absolute()
    while not path.exists():
        path = path.parent
    if not path.is_dir():
        raise UserError(f"{path} is a file, so that no run folder can be there or below: choose another --run_dir")
    return path


def disk(run_dir: Path) -> Iterator[Finding]:
    """Whether `run_dir` has room for a run, and files there can be written and brought to the disk."""
    folder = existing_folder(run_dir)
    free = shutil.disk_usage(folder).free
    level: Level = next((level for level, least in _FREE_BYTES.items() if free < least), "ok")
    amount = f"{free / 1e9:,.0f} GB" if free >= 10e9 else f"{free / 1e6:,.1f} MB"
    advice = "" if level == "ok" else ": free some room, or choose another --run_dir"
    yield Finding(level, "disk", f"{amount} are free at {folder}{advice}")
    with writing_to(folder, option="--run_dir"), tempfile.TemporaryDirectory(prefix=".doctor-", dir=folder) as own:
        write_atomically(Path(own, "file"), os.urandom(1 << 20))
        yield Finding("ok", "disk", "written, brought to the disk and renamed")


def data(folder: Path, *, chat: bool) -> Iterator[Finding | MustMatch]:
    """The prepared data set, as the training opens it. chat: conversations, not sentence pairs."""
    opened = open_conversations(staged(folder)) if chat else open_prepared(staged(folder))
    yield Finding("ok", "data", f"{folder} opens")
    for name, value in opened.identity.items():
        yield MustMatch("data", name, value[:12], "bring the same prepared data to all nodes")


def base_model(name: str, revision: str | None) -> Iterator[Finding | MustMatch]:
    """Whether the base model's files are here; nothing is fetched."""
    from training.models.base_model import find_base_model, fingerprint_of, missing_file

    if not Path(name).expanduser().is_dir() and name.count("/") == 1 and name[0] not in "./~":
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(name, "config.json", revision=revision)
        if isinstance(cached, str) and missing_file(Path(cached).parent) is None:
            yield Finding("ok", "base model", f"{name} is in the hub's cache")
        else:
            text = f"{name} is no folder here and not whole in the hub's cache: the training will fetch it"
            yield Finding("warning", "base model", f"{text}; `hf download {name}` does so beforehand")
        return
    folder = find_base_model(name, revision)
    yield Finding("ok", "base model", f"{folder} is complete")
    fingerprint = fingerprint_of(folder)[:12]
    yield MustMatch("base model", "fingerprint", fingerprint, "bring the same model to all nodes")


def address(url: str) -> Iterator[Finding]:
    """Whether a run can live at the URL: written and read back, no name given twice, and who has the run."""
    from training.engine.address.claim import link_to_follow
    from training.engine.address.store import AddressError, open_store

    store, own = open_store(url), f"doctor-{os.urandom(4).hex()}"
    try:
        link = link_to_follow(store)
        with tempfile.TemporaryDirectory() as folder:
            sent, back = Path(folder, "sent"), Path(folder, "back")
            sent.write_bytes(os.urandom(_SENT_BYTES))
            began = time.monotonic()
            store.put(sent, f"{own}/file")
            arrived = time.monotonic()
            store.get(f"{own}/file", back)
            up, down = (_SENT_BYTES / 1e6 / took for took in (arrived - began, time.monotonic() - arrived))
            if back.read_bytes() != sent.read_bytes():
                yield Finding("error", "address", f"a file sent to {url} does not come back as it was: take another")
        created = [store.create(f"{own}/name", b"") for _ in range(2)]
    except AddressError as error:
        raise UserError(f"{url} cannot be used: {error}") from None
    finally:
        with suppress(AddressError):
            store.remove(own)
    yield Finding("ok", "address", f"written and read back: {up:,.1f} MB/s to {url}, {down:,.1f} MB/s from there")
    if not store.guards or created != [True, False]:
        text = "no guard there: see to it yourself that one machine at a time trains a run"
        yield Finding("warning", "address", text)
    newest = f"step {max(link.checkpoints):,} is published" if link.checkpoints else "nothing is published"
    waits = f"or died with it: a start here waits {link.dead_after_s:g} s to see"
    who = "no machine has the run" if link.free else f"{link.holder} has the run, {waits}"
    yield Finding("ok" if link.free else "warning", "address", f"{newest}; {who}")
