"""The right to publish at an address, which one machine has at a time.

It is a chain of small files, claim/0000000001.json and so on, each made by create-if-absent behind the newest one: so a
link is a compare-and-swap. A link says who holds the claim and which checkpoints are published. Whoever holds it adds
a link every few seconds, and one to publish: publishing is itself the swap, and a machine that was frozen at whatever
moment finds its next link taken. Promises, where the store guards (`Store.guards`):

- What is in the newest link, and only that, is published; no two machines add to the chain from the same link.
- A claim is dead once its chain has not moved for the claim's own time, measured by the observer's monotonic clock. No
  other machine's clock is read.
- A link that a kill tore is as if it had not been, and its number is used up.
- A chain begins only where nothing else lies, so that a run is not strewn among the files of others.
"""

from __future__ import annotations

import os
import secrets
import socket
import threading
import time
from contextlib import suppress
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from training.base.console import TryLaterError, UserError, say
from training.base.durations import format_duration
from training.engine.address.store import AddressError, Store

# A claim that has not moved for so long is dead; its holder moves it several times as often.
DEAD_AFTER_S = 60.0
_MOVES = 4

# Links that stay: whoever reads the newest may be a little late.
_LINKS_KEPT = 4
_TRIES = 10

Place = Annotated[str, StringConstraints(pattern=r"^\d{1,9}/step-\d{10}-[0-9a-f]{16}$")]


class Link(BaseModel):
    """What a link of the chain says."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    version: int = 0  # its number in the chain; 0: there is no chain yet
    number: int = Field(0, ge=0)  # of the claim: each holder's is one more than the last one's
    token: str = ""  # of the claim, told to nobody else
    holder: str = ""
    free: bool = True
    dead_after_s: float = Field(DEAD_AFTER_S, gt=0, le=3600)
    record: int = 0  # the claim under whose number the run's record lies
    checkpoints: dict[int, Place] = {}  # the folder of each published step


class LostClaim(Exception):
    """Another machine has taken the claim; the message says which."""


def newest_link(store: Store) -> Link:
    """Raises AddressError, also where none of the links can be read."""
    for _ in range(_TRIES):
        versions = _versions(store)
        with suppress(FileNotFoundError):  # the chain has moved on while we looked
            for version in reversed(versions):
                with suppress(ValidationError):  # torn by a kill
                    found = Link.model_validate_json(store.read(_name(version)))
                    return found.model_copy(update={"version": versions[-1]})
            if not versions or versions == [1]:
                return Link(version=len(versions))
            raise AddressError(f"no link of {store.url}/claim can be read: put a copy of one back")
    raise AddressError(f"{store.url}/claim changes while it is read")


def add_link(store: Store, link: Link) -> bool:
    """Makes the link of its version; false where another machine was there first."""
    if not store.create(_name(link.version), link.model_dump_json().encode()):
        return False
    versions = _versions(store)
    if versions[-1:] != [link.version]:
        return False  # we slept so long that the chain has gone on, and old links were removed
    for version in versions[:-_LINKS_KEPT]:
        store.remove(_name(version))
    return True


def _name(version: int) -> str:
    return f"claim/{version:010d}.json"


def _versions(store: Store) -> list[int]:
    names = (name.removesuffix(".json") for name in store.names("claim"))
    return sorted(int(name) for name in names if name.isdecimal())


def take_claim(store: Store, earlier: str | None = None) -> Claim:
    """Takes the claim, or waits until it is known to be dead. Raises TryLaterError where another machine moves it.

    earlier: the token of a claim whose holder is known to have ended, because this process has its run folder.
    Raises UserError as `link_to_follow` does.
    """
    seen = link_to_follow(store)
    if store.guards and not seen.free and seen.token != earlier:
        seen = _once_dead(store, seen)
    mine = seen.model_copy(
        update={
            "version": seen.version + 1,
            "number": seen.number + 1,
            "token": secrets.token_hex(8),
            "holder": f"process {os.getpid()} on {socket.gethostname()}",
            "free": False,
            "dead_after_s": DEAD_AFTER_S,
        }
    )
    if not add_link(store, mine) and newest_link(store).token != mine.token:  # the answer to our own may be lost
        raise _in_use(store, newest_link(store))
    if store.guards and store.create(_name(mine.version), mine.model_dump_json().encode()):
        store.guards = False  # a server that takes a second file of the same name
    return Claim(store, mine)


def link_to_follow(store: Store) -> Link:
    """The newest link, for whoever is to have the run.

    Raises UserError where there is no chain, and other things lie than hidden files, what a new disk has, and what a
    run leaves there whose chain was moved away.
    """
    found, usual = newest_link(store), (".", "claim", "lost+found")
    names = () if found.version else store.names("")
    if others := [name for name in names if not (name.isdecimal() or name.startswith(usual))]:
        raise UserError(
            f"--run_at {store.url} holds other things than a run, such as {min(others)}: give the run a folder of its "
            f"own, such as {store.url}/RUN"
        )
    return found


def _once_dead(store: Store, seen: Link) -> Link:
    limit_s = seen.dead_after_s
    say(f"{store.url} is held by {seen.holder}: waiting {format_duration(limit_s)} to see whether it is alive")
    began = time.monotonic()
    while time.monotonic() - began < limit_s:
        time.sleep(limit_s / 20)
        now = newest_link(store)
        if now.free:
            return now
        if now != seen:
            raise _in_use(store, now)
    say(f"{seen.holder} has not moved its claim for {format_duration(limit_s)}: it is dead, and this process goes on")
    return seen


def _in_use(store: Store, link: Link) -> TryLaterError:
    return TryLaterError(f"{store.url} is in use by {link.holder}: wait or stop it; nothing was changed")


class Claim:
    """The claim that this process holds until `release`. A thread keeps moving it."""

    def __init__(self, store: Store, link: Link):
        self._store, self.link = store, link
        self._lock = threading.Lock()
        self._over = threading.Event()
        self.lost: str | None = None  # who has it now
        if store.guards:
            threading.Thread(target=self._keep, name="claim", daemon=True).start()

    def update(self, **changes: Any) -> None:
        """Adds a link with these changes. Raises LostClaim, and AddressError where it is not known to have arrived."""
        with self._lock:
            for _ in range(_TRIES):
                self.check()
                link = self.link.model_copy(update={**changes, "version": self.link.version + 1})
                if add_link(self._store, link):
                    self.link = link
                    return
                found = newest_link(self._store)
                if found.token != self.link.token:
                    self.lost = found.holder
                else:
                    self.link = found  # our own, whose answer was lost
            raise AddressError("the claim does not move")

    def check(self) -> None:
        """Raises LostClaim where the claim is known to be lost."""
        if self.lost is not None:
            raise LostClaim(self.lost)

    def _keep(self) -> None:
        with suppress(LostClaim):
            while not self._over.wait(DEAD_AFTER_S / _MOVES):
                with suppress(AddressError):  # at the next time
                    self.update()

    def release(self) -> None:
        """Lets the next machine take the claim at once. Raises as `update` does."""
        self._over.set()
        self.update(free=True)
