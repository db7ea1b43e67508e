"""What a relay knows of its run's sessions: `runs/NAME/kaggle.json`, read by people too, and what follows from it.

A session stands in it before Kaggle is asked to start it. What came of it is filled in as Kaggle tells; a record that
is lost or behind costs questions, not sessions.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from launch.kaggle.client import State
from training.base.console import UserError
from training.base.files import write_atomically

RECORD = "kaggle.json"


@dataclass
class Session:
    """A session of the run on Kaggle: a version of a kernel. version: None from the intent until Kaggle's answer.

    previous: the kernels whose output it was given. seen: when it was last known to be active. step: the newest
    checkpoint in its output, which the next session can continue from; None where there is none. status, reason,
    restart: what it said of itself, see `training.engine.status`. log: the file that its log was fetched to. told:
    what it means for the run was said to the user. Times are UTC.
    """

    number: int
    kernel: str
    version: int | None
    previous: list[str]
    pushed: str | None
    state: State = "queued"
    seen: str | None = None
    began: str | None = None
    ended: str | None = None
    step: int | None = None
    status: str | None = None
    reason: str | None = None
    restart: bool | None = None
    log: str | None = None
    told: bool = False

    @property
    def name(self) -> str:
        return f"session {self.number} ({self.kernel.partition('/')[2]} version {self.version})"


@dataclass
class Record:
    """The content of kaggle.json. dataset: name, sha256 and version of what was uploaded last, and the words for it."""

    path: Path
    dataset: dict[str, Any] = field(default_factory=dict)
    sessions: list[Session] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> Record:
        """Raises UserError where the file is damaged."""
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            return cls(path, found["dataset"], [Session(**each) for each in found["sessions"]])
        except FileNotFoundError:
            return cls(path)
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path} cannot be read; move it away, and Kaggle is asked for the sessions") from None

    def write(self) -> None:
        content = {"dataset": self.dataset, "sessions": [asdict(session) for session in self.sessions]}
        write_atomically(self.path, json.dumps(content, indent=2) + "\n")

    def add(self, kernel: str, version: int | None, previous: Sequence[str], pushed: str | None) -> Session:
        """A session more, written down at once."""
        number = max((each.number for each in self.sessions), default=0) + 1
        session = Session(number, kernel, version, list(previous), pushed)
        self.sessions.append(session)
        self.write()
        return session

    def forget(self, session: Session) -> None:
        """A session that never began."""
        self.sessions.remove(session)
        self.write()

    def forget_kernel(self, kernel: str, but: Session | None = None) -> None:
        """The sessions of a kernel that Kaggle no longer has, all but one."""
        self.sessions = [each for each in self.sessions if each.kernel != kernel or each is but]
        self.write()

    def pending(self, kernel: str) -> Session | None:
        """The session of a kernel of which nobody knows yet whether it began."""
        return next((each for each in self.sessions if each.kernel == kernel and each.version is None), None)

    def newest(self, kernel: str) -> Session | None:
        """The session of a kernel's newest version: the one whose output another kernel gets."""
        known = [each for each in self.sessions if each.kernel == kernel and each.version is not None]
        return max(known, key=lambda each: each.version or 0, default=None)


def to_continue(record: Record, kernels: Sequence[str]) -> Session | None:
    """The session that the next one continues: the furthest whose output can be an input, None to begin anew.

    Only of a kernel that completed: Kaggle answers "not valid kernel sources" for one that failed or was cancelled,
    and starts the session without it. Only of a newest version: that is the one that is attached.
    """
    newest = [record.newest(kernel) for kernel in kernels]
    usable = [each for each in newest if each is not None and each.state == "complete" and each.step is not None]
    return max(usable, key=lambda each: (each.step or 0, each.number), default=None)


def sessions_without_progress(sessions: Sequence[Session]) -> int:
    """How many sessions have ended in a row without a later step to continue from.

    What a failed kernel did further than that is lost to the next one, see `to_continue`; counted as progress, a run
    whose every session is cut off would use up all GPU hours and come nowhere.
    """
    furthest, fruitless = 0, 0
    for session in sessions:
        came = (session.step or 0) if session.state == "complete" else 0
        fruitless = 0 if came > furthest else fruitless + 1
        furthest = max(furthest, came)
    return fruitless


def hours_between(sessions: Sequence[Session], start: float, now: float) -> float:
    """GPU hours of the sessions between two moments (seconds since the epoch); both cards of a T4 x2 count once."""
    total_s = 0.0
    for session in sessions:
        if session.began is not None:
            ended = seconds(session.ended) if session.ended is not None else now
            total_s += max(0.0, min(ended, now) - max(seconds(session.began), start))
    return total_s / 3600


def utc(moment: float) -> str:
    """A moment in seconds since the epoch, as the record has it."""
    return datetime.fromtimestamp(moment, UTC).isoformat(timespec="seconds")


def seconds(time: str) -> float:
    """The reverse of `utc`."""
    return datetime.fromisoformat(time).timestamp()


def end_of(session: Session, last_word: str | None, now: float) -> str:
    """When the session ended, as near as can be told: at its last word, if that came after it was last seen.

    last_word: the time in its status.json. A relay that was not there at the end may come days later.
    """
    earliest = session.seen or session.pushed
    with suppress(ValueError, TypeError):
        moment = datetime.strptime(str(last_word), "%Y-%m-%dT%H:%M:%S%z").timestamp()
        if (seconds(earliest) if earliest is not None else 0.0) <= moment <= now:
            return utc(moment)
    return utc(now)
