"""What a run does with its address: go on from what is there, and send each checkpoint behind the training.

Promises:

- At the start the highest published step of run folder and address wins, with its own record. What is not in it is set
  aside as a run folder of its own, unless it had arrived at the address before.
- A checkpoint is published there as it lies in the run folder, whoever wrote it: its files first, then its manifest and
  the run's record, then a link of the claim's chain, which only the claim's holder can add. A checkpoint that is there
  is not sent again, and one that the run folder no longer keeps is removed once a newer one is published.
- One checkpoint at a time is sent, the newest first. It stands under names of its own meanwhile, so that it may be
  removed from the run folder.
- The training waits for none of it but at its end, and then for `LAST_S` at most. Where the address cannot be reached
  the run goes on, says so once, and sends later. Sizes are compared when a checkpoint has arrived, and the SHA-256 of
  every byte when it is fetched.
- Where another machine has taken the claim, `lost` says so, and the run is to stop.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from training.base.console import TryLaterError, UserError, say, warn
from training.base.durations import format_duration
from training.base.files import (
    NotPlainError,
    copy_plain,
    copy_tree,
    publish_folder,
    read_json,
    read_plain,
    remove,
    write_atomically,
)
from training.engine.address.claim import Claim, Link, LostClaim, newest_link, take_claim
from training.engine.address.store import AddressError, open_store
from training.engine.checkpoint import MANIFEST, Checkpoint, checkpoints
from training.engine.fork import link_or_copy, set_aside
from training.engine.status import (
    CONFIG,
    KEPT,
    METRICS,
    SESSIONS,
    STATUS,
    WANDB_FILE,
    checkpoint_folder,
    read_record,
    saved_steps,
)

# What of the run folder goes along, beside the checkpoints.
RECORD = (CONFIG, "data.json", METRICS, SESSIONS, STATUS, WANDB_FILE, KEPT, "report.html", "summary.json")

# In the run folder: the last claim of a process that had the folder's lock, and the newest checkpoint that arrived.
KNOWN = "address.json"

# The end of a session waits so long for what it has to send, in seconds.
LAST_S = 900.0

# How long an upload is taken to be before the first was measured, and pauses between tries, in seconds.
_ASSUMED_S = 5.0
_PAUSES_S = (2.0, 60.0)

# How long letting go of the claim may keep a process that ends.
_RELEASE_S = 10.0


def config_at(url: str) -> dict[str, Any] | None:
    """The config in the newest checkpoint at an address, which is only read; None where there is none.

    Raises TryLaterError where the address cannot be reached.
    """
    store = open_store(url)
    try:
        published = newest_link(store).checkpoints
        for step in sorted(published, reverse=True):
            with suppress(FileNotFoundError, ValueError, KeyError, TypeError):
                found: dict[str, Any] = json.loads(store.read(f"{published[step]}/{MANIFEST}"))["config"]
                return found
    except AddressError as error:
        raise TryLaterError(
            f"--run_at {url} cannot be reached ({error}): start again when it can be; nothing was changed"
        ) from None
    return None


class Home:
    """The address of a run, for the process that holds the run folder."""

    def __init__(self, url: str, run_dir: Path):
        self.url, self._run_dir = url, run_dir
        self._store, self._claims = open_store(url), open_store(url)  # one for each thread
        self._claim: Claim | None = None
        self._known = self._read_known()
        self._sent: dict[str, tuple[str, int, int]] = {}  # what of the record has arrived: where, and its time and size
        self._unfit: set[str] = set()  # digests of damaged checkpoints
        self._thread: threading.Thread | None = None
        self._wake, self._ending = threading.Event(), threading.Event()
        self._busy = self._failed = self._all_arrived = False
        self._refused: str | None = None
        self.uploads_s: list[float] = []  # how long each checkpoint took
        self._sending, self._fetching = (run_dir / "checkpoints" / name for name in (".sending", ".fetching"))

    @property
    def lost(self) -> str | None:
        """Why this process may not publish any more; None where it may, or where nobody knows."""
        if self._claim is not None and self._claim.lost is not None:
            return f"{self._claim.lost} has taken over the run at {self.url}"
        return self._refused

    @property
    def seconds(self) -> float:
        """How long the end of a session takes to send what it has, as far as is known."""
        usual = max(self.uploads_s[-3:], default=_ASSUMED_S)
        return min(LAST_S, usual * (1 + self._busy))  # another one may have to arrive first

    # The start.

    def open(self, latest: Checkpoint | None, check: Callable[[Checkpoint], object]) -> Checkpoint | None:
        """Takes the claim, and fetches the run where it has come further than `latest`, the run folder's newest.

        check: raises UserError for a checkpoint of another run. Returns the checkpoint to go on from. Raises
        TryLaterError where another machine holds the claim, or where nothing is here and the address cannot be reached,
        and UserError where nothing is here and what is there is damaged.
        """
        for leftover in (self._sending, self._fetching):
            remove(leftover)
        try:
            link = self._take().link
        except AddressError as error:
            if latest is None:
                raise TryLaterError(
                    f"--run_at {self.url} cannot be reached ({error}), and {self._run_dir} has no checkpoint to go on "
                    "from: start again when it can be; nothing was changed"
                ) from None
            self._fail(error)
            return latest
        try:
            return self._go_on(link, latest, check)
        except AddressError as error:  # to go on from an older step would be to give up what is there
            raise TryLaterError(
                f"{self.url} has come further than {self._run_dir}, and could not be read to its end ({error}): start "
                "again when it can be"
            ) from None

    def _take(self) -> Claim:
        self._claim = claim = take_claim(self._claims, self._known.get("token"))
        if not self._claims.guards:
            warn(f"there is no guard at {self.url}: see to it yourself that one machine at a time trains this run")
        self._note(token=claim.link.token)
        with suppress(AddressError):  # at the next start
            for number in range(max(1, claim.link.number - 3), claim.link.number):
                self._remove_unpublished(claim.link, number)
        return claim

    def _remove_unpublished(self, link: Link, number: int) -> None:
        """Removes what a claim has sent and not published, or what is published no more."""
        for name, size in self._store.names(str(number)).items():
            if size is None and f"{number}/{name}" not in link.checkpoints.values():
                self._store.remove(f"{number}/{name}")

    def _go_on(self, link: Link, latest: Checkpoint | None, check: Callable[[Checkpoint], object]) -> Checkpoint | None:
        here = -1 if latest is None else latest.step
        for step in sorted(link.checkpoints, reverse=True):
            if step <= here:
                break
            fetched = self._fetch(link.checkpoints[step], step, check)
            if fetched is not None:
                self._replace(link, latest, fetched)
                return Checkpoint(checkpoint_folder(self._run_dir, step))
        if latest is None and link.checkpoints:
            raise UserError(
                f"{self.url} has checkpoints, and none of them is whole: give the run another --run_at, or to begin "
                f"anew there, move {self.url}/claim away"
            )
        if (there := max(link.checkpoints, default=here)) < here:
            say(f"{self._run_dir} has come to step {here:,}, {self.url} to {there:,}: what is here goes on")
        return latest

    def _fetch(self, place: str, step: int, check: Callable[[Checkpoint], object] | None = None) -> Checkpoint | None:
        """A checkpoint, beside those of the run folder; None where it is not whole, which is said."""
        own, folder = checkpoint_folder(self._run_dir, step), self._fetching / checkpoint_folder("", step).name
        found, began = Checkpoint(folder), time.monotonic()
        remove(folder)
        folder.mkdir(parents=True)
        problem: str | None = f"{MANIFEST} is not the one that was sent"
        try:
            for name in (MANIFEST, "state.json"):
                self._store.get(f"{place}/{name}", folder / name)
            if place.endswith(_digest(folder)):
                if check is not None:
                    check(found)
                for name in found.manifest["files"].keys() - {"state.json"}:
                    if _digest(own) == _digest(folder):
                        link_or_copy(own / name, folder / name)
                    else:
                        self._store.get(f"{place}/{name}", folder / name)
                problem = found.verify()
        except (FileNotFoundError, ValueError) as error:
            problem = " ".join(str(error).split())
        if problem is not None:
            warn(f"step {step:,} at {self.url} is damaged: {problem}")
            return None
        say(f"step {step:,} is fetched from {self.url} in {format_duration(time.monotonic() - began)}, verified")
        return found

    def _replace(self, link: Link, latest: Checkpoint | None, fetched: Checkpoint) -> None:
        """Puts the run at the address into the run folder. A kill leaves a folder that the same command fills again."""
        older = [self._fetch(link.checkpoints[step], step) for step in sorted(link.checkpoints) if step < fetched.step]
        record = self._fetching / "record"
        record.mkdir()
        for name in RECORD:
            with suppress(FileNotFoundError):
                self._store.get(f"{link.record}/{name}", record / name)
        if (found := read_record(record, WANDB_FILE)) is not None:  # wandb's own files are where they were written
            write_atomically(record / WANDB_FILE, json.dumps({**found, "folder": None}, indent=2) + "\n")
        if latest is not None:
            self._leave_behind(latest, fetched.step)
        copy_tree(record, self._run_dir)
        for checkpoint in filter(None, [*older, fetched]):
            publish_folder(checkpoint.folder, checkpoint_folder(self._run_dir, checkpoint.step), replace=True)
        remove(self._fetching)
        self._note(arrived=_digest(checkpoint_folder(self._run_dir, fetched.step)))

    def _leave_behind(self, latest: Checkpoint, step: int) -> None:
        further = f"{self.url} has come to step {step:,}, further than {self._run_dir} ({latest.step:,})"
        if self._known.get("arrived") == _digest(latest.folder):
            say(f"{further}, whose checkpoint is a part of it: going on from there")
        else:
            say(f"{further}, and goes on without what is here: that is set aside in {set_aside(self._run_dir, latest)}")
        for checkpoint in checkpoints(self._run_dir):
            checkpoint.remove()

    # The session.

    def start(self) -> None:
        """Begins to send what is not there yet, and what will be saved from now on."""
        self._wake.set()
        self._thread = threading.Thread(target=self._work, name="sending", daemon=True)
        self._thread.start()

    def notice(self) -> None:
        """To be called when there is a new checkpoint."""
        self._busy = True
        self._wake.set()

    def finish(self, limit_s: float) -> None:
        """Waits until all has arrived, with the run's record as it is now, or for so many seconds."""
        if self.lost is not None:
            warn(f"{self.lost}: what this session has saved since then stays in {self._run_dir}")
        if self._thread is None or self.lost is not None:
            return
        self._ending.set()
        self._wake.set()
        self._thread.join(max(0.0, min(limit_s, LAST_S)))
        if not self._all_arrived:
            warn(f"not all of this session has arrived at {self.url}: the next one in {self._run_dir} sends it")

    def close(self) -> None:
        """Lets another machine have the run at once; where the address does not answer, it has to wait."""
        claim, self._claim = self._claim, None
        if claim is not None:

            def release() -> None:
                with suppress(AddressError, LostClaim):
                    claim.release()

            last = threading.Thread(target=release, name="release", daemon=True)
            last.start()
            last.join(_RELEASE_S)

    def _work(self) -> None:
        pause_s, tries = 0.0, 0
        while True:
            self._wake.wait(pause_s or None)
            self._wake.clear()
            ending = self._ending.is_set()
            try:
                self._send_all()
                if ending:
                    self._publish({})
                    self._all_arrived = True
                    return
                if self._failed:
                    say(f"{self.url} can be reached again, and has what it lacked")
                self._failed, pause_s = False, 0.0
            except LostClaim:
                return
            except UserError as error:  # another machine has the claim, or the address holds other things
                self._refused = str(error)
                return
            except (AddressError, OSError, ValueError) as error:
                self._fail(error)
                tries += ending
                if tries == 3:
                    return
                pause_s = _PAUSES_S[0] if ending else min(_PAUSES_S[1], max(_PAUSES_S[0], 2 * pause_s))
            self._busy = False

    def _fail(self, error: Exception) -> None:
        if not self._failed:
            warn(f"{self.url} does not take the run now ({error}); it goes on, and sends its checkpoints later")
        self._failed = True

    def _send_all(self) -> None:
        if self._claim is None:  # the session began without the address
            link, here = self._take().link, max(saved_steps(self._run_dir), default=-1)
            if (there := max(link.checkpoints, default=-1)) > here:
                self._refused = f"{self.url} has come to step {there:,}, further than {self._run_dir} ({here:,})"
                raise LostClaim(self._refused)
        while (checkpoint := self._newest_missing()) is not None:
            self._busy = True
            began = time.monotonic()
            with suppress(FileNotFoundError), self._pinned(checkpoint) as pinned:
                self._send(pinned)
                self.uploads_s.append(time.monotonic() - began)

    def _newest_missing(self) -> Checkpoint | None:
        for checkpoint in reversed(checkpoints(self._run_dir)):
            digest = _digest(checkpoint.folder)
            there = self._held.link.checkpoints.get(checkpoint.step, "")
            if digest and not there.endswith(digest) and digest not in self._unfit:
                return checkpoint
        return None

    @property
    def _held(self) -> Claim:
        if self._claim is None:  # let go at the end of the session
            raise LostClaim("this process itself")
        return self._claim

    @contextmanager
    def _pinned(self, checkpoint: Checkpoint) -> Iterator[Checkpoint]:
        """The checkpoint under a name of its own, where nobody removes it. Raises FileNotFoundError if it is gone."""
        remove(self._sending)
        self._sending.mkdir()
        copy_tree(checkpoint.folder, self._sending / checkpoint.folder.name, link_or_copy)
        if not checkpoint.folder.is_dir():  # it may have gone meanwhile
            raise FileNotFoundError(checkpoint.folder)
        yield Checkpoint(self._sending / checkpoint.folder.name)
        remove(self._sending)

    def _send(self, checkpoint: Checkpoint) -> None:
        folder, digest = checkpoint.folder, _digest(checkpoint.folder)
        if (problem := checkpoint.verify()) is not None:
            self._unfit.add(digest)
            warn(f"step {checkpoint.step:,} is not sent to {self.url}: {problem}")
            return
        place = f"{self._held.link.number}/{folder.name}-{digest}"
        there = self._store.names(place)
        sizes = {name: (folder / name).stat().st_size for name in (*checkpoint.manifest["files"], MANIFEST)}
        for name, size in sizes.items():
            if there.get(name) != size:
                self._held.check()
                self._store.put(folder / name, f"{place}/{name}")
        if self._store.names(place) != sizes:
            raise AddressError(f"{place} does not hold what was sent")
        self._publish({checkpoint.step: place})
        if checkpoint.step == max(self._held.link.checkpoints):
            self._note(arrived=digest)

    def _publish(self, new: dict[int, str]) -> None:
        """Adds a link that names the new checkpoints and those that the run folder still has, and the record."""
        number = self._held.link.number
        for name in RECORD:
            with suppress(FileNotFoundError, NotPlainError), TemporaryDirectory() as own:
                about = (self._run_dir / name).stat()
                version = (str(number), about.st_mtime_ns, about.st_size)
                if self._sent.get(name) != version:
                    copy_plain(self._run_dir / name, copy := Path(own, name))  # metrics.jsonl may grow meanwhile
                    self._held.check()
                    self._store.put(copy, f"{number}/{name}")
                    self._sent[name] = version
        before, here = self._held.link.checkpoints, saved_steps(self._run_dir)
        now = {step: place for step, place in before.items() if step in here} | new
        self._held.update(checkpoints=now, record=number)
        for place in set(before.values()) - set(now.values()):
            self._store.remove(place)
        self._remove_unpublished(self._held.link, number)

    # What the run folder knows of the address.

    def _read_known(self) -> dict[str, Any]:
        with suppress(OSError, ValueError):
            found = read_json(self._run_dir / KNOWN)
            if isinstance(found, dict) and found.get("url") == self.url:
                return found
        return {"url": self.url}

    def _note(self, **known: str) -> None:
        self._known |= known
        with suppress(OSError):  # without it, the next start waits for the claim, or sets aside what had arrived
            write_atomically(self._run_dir / KNOWN, json.dumps(self._known) + "\n")


def _digest(folder: Path) -> str:
    """What tells a checkpoint from any other of its step; empty where there is none."""
    try:
        return hashlib.sha256(read_plain(folder / MANIFEST)).hexdigest()[:16]
    except OSError:
        return ""
