"""What the run of a config needs on each node: the config itself, disk, data, base model, wandb, address.

A run and its data are read and never changed: what the doctor writes lies beside them and is removed.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

from launch.doctor.findings import Finding, Level, MustMatch
from launch.scripts import read_options
from training.base.console import UserError
from training.base.environment import staged
from training.base.files import dangling, write_atomically, writing_to
from training.data.conversations import open_conversations
from training.data.prepared import open_prepared
from training.engine.precision import PrecisionName
from training.engine.wandb.options import mode_of

_FREE_BYTES: dict[Level, float] = {"error": 0.5e9, "warning": 5e9}
_SENT_BYTES = 8_000_000  # to an address and back
_FREE_FILES: dict[Level, float] = {"error": 100, "warning": 10_000}


def config(script: str | None, words: Sequence[str]) -> Iterator[Finding]:
    """Whether the options can be read at all."""
    if script is None:
        if words:
            raise UserError("options without a config: name it first, or the module by --script, as in training.gpt")
        yield Finding("ok", "config", "none was named: only the machine is looked at")
        return
    read_options(script, words)
    yield Finding("ok", "config", f"{script} reads {' '.join(words)}")


def precision_of(script: str | None, words: Sequence[str]) -> PrecisionName:
    """The config's precision; auto where there is none, or one that cannot be read."""
    try:
        return read_options(script, words).precision if script is not None else "auto"
    except UserError:
        return "auto"


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
    """Whether `run_dir` has room for a run, and files there can be written, brought to the disk, read and locked."""
    folder = existing_folder(run_dir)
    about = os.statvfs(folder)
    free = about.f_bavail * about.f_frsize
    level, amount = _level(free, _FREE_BYTES), f"{free / 1e9:,.0f} GB" if free >= 10e9 else f"{free / 1e6:,.1f} MB"
    advice = "" if level == "ok" else ": free some room, or choose another --run_dir"
    yield Finding(level, "disk", f"{amount} are free at {folder}{advice}")
    if about.f_files and _level(about.f_favail, _FREE_FILES) != "ok":  # some file systems do not count
        text = f"only {about.f_favail:,} more files (inodes) can be made at {folder}: remove some, or choose another"
        yield Finding(_level(about.f_favail, _FREE_FILES), "disk", f"{text} --run_dir")
    with (
        writing_to(folder, option="--run_dir"),
        tempfile.TemporaryDirectory(prefix=".doctor-", dir=folder) as own,
    ):
        path, content = Path(own, "file"), os.urandom(1 << 20)
        began = time.monotonic()
        write_atomically(path, content)
        seconds = time.monotonic() - began
        if path.read_bytes() != content:
            text = f"a file written to {folder} does not read back: the disk is damaged; choose another --run_dir"
            yield Finding("error", "disk", text)
        speed = "" if seconds < 1 else f", slowly: 1 MB took {seconds:.1f} s"
        yield Finding("ok", "disk", f"written, brought to the disk, renamed and read back{speed}")
        with path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                text = f"no file locks at {folder} ({error.strerror}): make sure that no two runs share a folder"
                yield Finding("warning", "disk", text)


def _level(found: float, least: dict[Level, float]) -> Level:
    return next((level for level, limit in least.items() if found < limit), "ok")


def data(folder: Path, *, chat: bool) -> Iterator[Finding | MustMatch]:
    """The prepared data set, as the training opens it. chat: conversations, not sentence pairs."""
    opened = open_conversations(staged(folder)) if chat else open_prepared(staged(folder))
    yield Finding("ok", "data", f"{folder} opens")
    for name, value in opened.identity.items():
        yield MustMatch("data", name, value[:12], "error", "bring the same prepared data to all nodes")


def base_model(name: str, revision: str | None) -> Iterator[Finding | MustMatch]:
    """Whether the base model's files are here; nothing is fetched."""
    from training.models.base_model import find_base_model, fingerprint_of

    if not Path(name).expanduser().is_dir() and name.count("/") == 1 and name[0] not in "./~":
        from huggingface_hub import try_to_load_from_cache

        if isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
            yield Finding("ok", "base model", f"{name} is in the hub's cache")
        else:
            text = f"{name} is no folder here and not in the hub's cache: the training will fetch it over the network"
            yield Finding("warning", "base model", f"{text}; `hf download {name}` does so beforehand")
        return
    folder = find_base_model(name, revision)
    yield Finding("ok", "base model", f"{folder} is complete")
    fingerprint = fingerprint_of(folder)[:12]
    yield MustMatch("base model", "fingerprint", fingerprint, "error", "bring the same model to all nodes")


def wandb(said: str | None) -> Iterator[Finding]:
    """Whether the run can be shown in wandb, found out as the training does. said: the option wandb.mode, if given."""
    mode = mode_of(said)
    if mode not in ("auto", "online"):
        yield Finding("ok", "wandb", mode)
        return
    if find_spec("wandb") is None:
        raise UserError("wandb is not installed: pip install wandb, or go without it by --wandb.mode disabled")
    from training.engine.wandb.visit import why_offline

    with tempfile.TemporaryDirectory() as own:  # for what wandb would leave in the home folder
        os.environ |= {"WANDB_CACHE_DIR": own, "WANDB_DATA_DIR": own, "WANDB_ERROR_REPORTING": "false"}
        import wandb

        wandb.setup(wandb.Settings(silent=True, mode="online"))
        try:
            found = why_offline()
        finally:
            wandb.teardown()
    if found is None:
        yield Finding("ok", "wandb", "there is a key, and the server answers")
    else:
        yield Finding("warning", "wandb", f"{found}: the run will go on offline, and can be uploaded later")


def address(url: str) -> Iterator[Finding]:
    """Whether a run can live at the URL: written and read back, no name given twice, and who has the run."""
    from training.engine.address.claim import newest_link
    from training.engine.address.store import AddressError, open_store

    store, own = open_store(url), f"doctor-{os.urandom(4).hex()}"
    try:
        with tempfile.TemporaryDirectory() as folder:
            sent, back = Path(folder, "sent"), Path(folder, "back")
            sent.write_bytes(os.urandom(_SENT_BYTES))
            moments = [time.monotonic()]
            for act in (lambda: store.put(sent, f"{own}/file"), lambda: store.get(f"{own}/file", back)):
                act()
                moments.append(time.monotonic())
            if back.read_bytes() != sent.read_bytes():
                yield Finding("error", "address", f"a file sent to {url} does not come back as it was: take another")
        created = [store.create(f"{own}/name", b"") for _ in range(2)]
        link = newest_link(store)
    except AddressError as error:
        raise UserError(f"{url} cannot be used: {error}") from None
    finally:
        with suppress(AddressError):
            store.remove(own)
    up, down = (_SENT_BYTES / 1e6 / (after - before) for before, after in pairwise(moments))
    yield Finding("ok", "address", f"written and read back: {up:,.1f} MB/s to {url}, {down:,.1f} MB/s from there")
    if not store.guards or created != [True, False]:
        text = "no guard there: see to it yourself that one machine at a time trains a run"
        yield Finding("warning", "address", text)
    newest = f"step {max(link.checkpoints):,} is published" if link.checkpoints else "nothing is published"
    if link.free:
        yield Finding("ok", "address", f"{newest}; no machine has the run")
    else:
        text = (
            f"{newest}; {link.holder} has the run, or died with it: a start here waits {link.dead_after_s:g} s to see"
        )
        yield Finding("warning", "address", text)
