"""What a relay knows of its run on Kaggle: `runs/NAME/kaggle.json`, read by people too, and what follows from it.

A kernel run is written down before Kaggle is asked to start it. What came of it is filled in as Kaggle tells; a file
that is lost or behind costs questions, not kernel runs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, cast

from pydantic import ConfigDict, Field, TypeAdapter, with_config
from typing_extensions import TypedDict  # pydantic wants this one before Python 3.12

from launch.kaggle.client import State
from training.base.console import UserError
from training.base.files import read_plain, write_atomically

RECORD = "kaggle.json"
_KAGGLE_NAME = r"^[\w-]{1,100}/[\w-]{1,100}$"  # OWNER/SLUG


@dataclass
class KernelRun:
    """A version of a kernel, as Kaggle runs it. Times are UTC."""

    number: Annotated[int, Field(ge=1)]
    kernel: Annotated[str, Field(pattern=_KAGGLE_NAME)]
    version: int | None  # None from the intent until Kaggle's answer
    previous: list[Annotated[str, Field(pattern=_KAGGLE_NAME)]]  # the kernels whose output it was given
    pushed: str | None
    state: State = "queued"
    seen: str | None = None  # when it was last known to be active
    began: str | None = None
    ended: str | None = None
    step: int | None = None  # the newest checkpoint in its output, which the next one can continue; None without one
    status: str | None = None  # what it said of itself, as are reason and restart: see `training.engine.status`
    reason: str | None = None
    restart: bool | None = None
    log: str | None = None  # the file that its log was fetched to
    announced: bool = False  # whether the user was told what it means for the run

    @property
    def name(self) -> str:
        return f"kernel run {self.number} ({self.kernel.partition('/')[2]} version {self.version})"


@dataclass
class RelayRecord:
    """The content of kaggle.json."""

    path: Path
    dataset: dict[str, Any] = field(default_factory=dict)  # last uploaded: name, sha256, version; the words for it
    kernel_runs: list[KernelRun] = field(default_factory=list)

    @property
    def name(self) -> str | None:
        """What the run has been called on Kaggle since it began, by whatever rule; None before it began."""
        known = [*(each.kernel for each in self.kernel_runs), *([self.dataset["name"]] if self.dataset else [])]
        return re.sub(r"^.*/|-(a|b|files)$", "", known[0]) if known else None

    @classmethod
    def read(cls, path: Path) -> RelayRecord:
        """Raises UserError where the file is damaged."""
        try:
            found = _RECORD.validate_json(read_plain(path))
            return cls(path, cast(dict[str, Any], found["dataset"]), found["kernel_runs"])
        except FileNotFoundError:
            return cls(path)
        except (OSError, ValueError):
            raise UserError(f"{path} cannot be read; move it away, and Kaggle is asked what ran") from None

    def write(self) -> None:
        content = {"dataset": self.dataset, "kernel_runs": [asdict(each) for each in self.kernel_runs]}
        write_atomically(self.path, json.dumps(content, indent=2) + "\n")

    def add(self, kernel: str, version: int | None, previous: Sequence[str], pushed: str | None) -> KernelRun:
        """Adds a kernel run and writes it down at once."""
        number = max((each.number for each in self.kernel_runs), default=0) + 1
        added = KernelRun(number, kernel, version, list(previous), pushed)
        self.kernel_runs.append(added)
        self.write()
        return added

    def forget(self, kernel_run: KernelRun) -> None:
        """Removes a kernel run that never began."""
        self.kernel_runs.remove(kernel_run)
        self.write()

    def forget_kernel(self, kernel: str, but: KernelRun | None = None) -> None:
        """Removes all runs but one of a kernel that Kaggle no longer has."""
        self.kernel_runs = [each for each in self.kernel_runs if each.kernel != kernel or each is but]
        self.write()

    def pending(self, kernel: str) -> KernelRun | None:
        """The run of a kernel of which nobody knows yet whether it began."""
        return next((each for each in self.kernel_runs if each.kernel == kernel and each.version is None), None)

    def newest(self, kernel: str) -> KernelRun | None:
        """The run of a kernel's newest version: the one whose output another kernel gets."""
        known = [each for each in self.kernel_runs if each.kernel == kernel and each.version is not None]
        return max(known, key=lambda each: each.version or 0, default=None)


@with_config(ConfigDict(extra="allow"))
class _Dataset(TypedDict, total=False):
    name: Annotated[str, Field(pattern=_KAGGLE_NAME)]
    sha256: str
    version: int
    words: list[str]


class _Content(TypedDict):
    """What is read of a kaggle.json, which may be a stranger's."""

    dataset: _Dataset
    kernel_runs: list[KernelRun]


_RECORD = TypeAdapter(_Content)


def to_continue(record: RelayRecord, kernels: Sequence[str]) -> KernelRun | None:
    """The kernel run that the next one continues: the furthest whose output can be an input, None to begin anew.

    Only the newest version of a kernel counts, since that is the one that is attached; and only if it completed: Kaggle
    answers "not valid kernel sources" for one that failed or was cancelled, and starts the next one without it.
    """
    newest = [record.newest(kernel) for kernel in kernels]
    usable = [each for each in newest if each is not None and each.state == "complete" and each.step is not None]
    return max(usable, key=lambda each: (each.step or 0, each.number), default=None)


def runs_without_progress(kernel_runs: Sequence[KernelRun]) -> int:
    """How many kernel runs have ended in a row without a later step to continue from.

    The next one cannot continue what a failed kernel did beyond that, see `to_continue`. If that counted as progress, a
    run that is cut off every time would use up all GPU hours and come nowhere.
    """
    furthest, fruitless = 0, 0
    for each in kernel_runs:
        came = (each.step or 0) if each.state == "complete" else 0
        fruitless = 0 if came > furthest else fruitless + 1
        furthest = max(furthest, came)
    return fruitless


def hours_between(kernel_runs: Sequence[KernelRun], start: float, now: float) -> float:
    """GPU hours of the kernel runs between two moments (seconds since the epoch); the two GPUs of one count once."""
    total_s = 0.0
    for each in kernel_runs:
        if each.began is not None:
            ended = seconds(each.ended) if each.ended is not None else now
            total_s += max(0.0, min(ended, now) - max(seconds(each.began), start))
    return total_s / 3600


def utc(moment: float) -> str:
    """A moment in seconds since the epoch, as kaggle.json has it."""
    return datetime.fromtimestamp(moment, UTC).isoformat(timespec="seconds")


def seconds(time: str) -> float:
    """The reverse of `utc`."""
    return datetime.fromisoformat(time).timestamp()


def end_of(kernel_run: KernelRun, last_word: str | None, now: float) -> str:
    """When the kernel run ended, as near as can be told: at its last word, if that came after it was last seen.

    last_word: the time in its status.json. A relay that was not there at the end may come days later.
    """
    earliest = kernel_run.seen or kernel_run.pushed
    with suppress(ValueError, TypeError):
        moment = datetime.strptime(str(last_word), "%Y-%m-%dT%H:%M:%S%z").timestamp()
        if (seconds(earliest) if earliest is not None else 0.0) <= moment <= now:
            return utc(moment)
    return utc(now)
