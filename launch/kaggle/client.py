"""The `kaggle` command: what it prints becomes values, or an error that says what to do.

Promises: no token leaves this module, although the command may print one. Whatever fails before Kaggle answers (rate
limits, the network, Kaggle's own faults, a broken command) is tried again for a day, with growing pauses; where a
second try could start a second kernel run, `LostAnswer` says that nobody knows whether the first one arrived. Not
promised: to understand other versions of the command than the official CLI's 2.2.5.

The command ends with status 0 although a push was refused, and with 1 after an HTTP error, whose first line it prints.
So its words decide, and its status only where they say nothing.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from training.base.console import UserError, warn
from training.base.durations import format_duration
from training.base.files import read_json

State = Literal["queued", "running", "complete", "error", "cancelled"]
ACTIVE: tuple[State, ...] = ("queued", "running")

_STATES: dict[str, State] = {
    "QUEUED": "queued",
    "NEW_SCRIPT": "queued",
    "RUNNING": "running",
    "CANCEL_REQUESTED": "running",  # it still runs, and still uses GPU hours
    "COMPLETE": "complete",
    "ERROR": "error",
    "CANCEL_ACKNOWLEDGED": "cancelled",  # by the user, or by Kaggle at the time limit
}

# Asked for OWNER/KERNEL/VERSION, older ones answer about the newest version all the same, which would hide or invent a
# kernel run; and their `kaggle quota` fails.
_LEAST_VERSION = (2, 2, 5)

# 2.2.5 imports six without listing it as a requirement.
_INSTALL = "pip install --upgrade kaggle six (into any environment; its `kaggle` must be on PATH)"
_TOKEN = (
    "create one at https://www.kaggle.com/settings/api and save it as ~/.kaggle/access_token (or `kaggle auth login`, "
    "or the older kaggle.json as ~/.kaggle/kaggle.json)"
)

# After an HTTP error the command prints what the server says, be it "Not found" or "404 Client Error: ...", and then a
# hint of its own, which tells the errors apart. These are answers; whatever else goes wrong may pass.
_NOT_FOUND = re.compile(r"The resource was not found|404 Client Error")
_DENIED = re.compile(r"You don't have access to this resource|Cannot access kernel|403 Client Error")
_REJECTED = re.compile(r"400 Client Error|^ValueError", re.MULTILINE)
_NO_TOKEN = re.compile(r"Authentication required|401 Client Error")
# After these Kaggle cannot have done anything.
_NEVER_DONE = re.compile(
    r"You have been rate limited|429 Client Error|NameResolutionError|Failed to resolve|name resolution"
)
_PUSHED = re.compile(r"Kernel version (\d+) successfully pushed")

# How long one answer may take, in seconds; uploads of prepared data over a slow line take hours.
_ANSWER_S, _UPLOAD_S = 600.0, 6 * 3600.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S, _PATIENCE_S = 30.0, 900.0, 86400.0


class PassingError(Exception):
    """No answer: a rate limit, the network, a fault of Kaggle's, a broken command. Later there may be one."""

    def __init__(self, message: str, *, surely_not_done: bool = False):
        super().__init__(message)
        self.surely_not_done = surely_not_done  # Kaggle cannot have done what it was asked to do


class LostAnswer(Exception):
    """The command failed in a way that leaves open whether Kaggle did what it was asked to do."""


class QuotaUsedUp(Exception):
    """Kaggle refused a push: this week's GPU hours are used up. Nothing began."""


class AccountBusy(Exception):
    """Kaggle refused a push: the account runs as many kernels as it may. Nothing began."""


class Clock:
    """The time of day in seconds since the epoch, and waiting. Tests bring their own."""

    def now(self) -> float:
        return time.time()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


@dataclass(frozen=True)
class Quota:
    """The account's GPU hours of this week."""

    used_h: float
    total_h: float
    renewed: float | None  # when the next week's hours begin, in seconds since the epoch


@dataclass(frozen=True)
class Pushed:
    """A kernel run that Kaggle began."""

    version: int
    left_out: str = ""  # the inputs that Kaggle could not attach, in its own words


class Kaggle:
    """Asks Kaggle through the `kaggle` command.

    first_pause_s: before the second try; the pause doubles before each further one. inherited: open files that the
    command keeps open while it lives; the relay's lock is one.
    """

    def __init__(self, clock: Clock, *, first_pause_s: float = _FIRST_PAUSE_S, inherited: Sequence[int] = ()):
        self._clock, self._first_pause_s, self._inherited = clock, first_pause_s, tuple(inherited)
        command = shutil.which("kaggle")
        if command is None:
            raise UserError(f"there is no `kaggle` command on PATH: {_INSTALL}. It also wants a token: {_TOKEN}")
        self._command = command

    # Who asks.

    def account(self) -> str:
        """The account that the token belongs to. Raises UserError: no token, a rejected one, or too old a command."""
        said = self._ask(["--version"], patience_s=0.0)  # no network in it: what fails now fails always
        found = re.search(r"^Kaggle (?:CLI|API) (\d+)\.(\d+)\.(\d+)", said, re.MULTILINE)
        if found is None or tuple(map(int, found.groups())) < _LEAST_VERSION:
            least = ".".join(map(str, _LEAST_VERSION))
            raise UserError(
                f"`{self._command}` is {said.strip() or 'of an unknown version'}, and {least} or later is needed, "
                f"because older ones cannot ask for a kernel's version: {_INSTALL}"
            )
        name = re.search(r"^- username: (\S+)", self._ask(["config", "view"]), re.MULTILINE)
        if name is None or name[1] == "None":
            raise UserError(f"the `kaggle` command does not know whose token it has: {_TOKEN}")
        return name[1]

    def quota(self) -> Quota | None:
        """The account's GPU hours; None where Kaggle does not tell."""
        with suppress(ValueError, KeyError, TypeError, UserError):
            rows = _json_in(self._ask(["quota", "--format", "json"], patience_s=0.0))
            row = next(row for row in rows if row["resource"] == "GPU")
            renewed = datetime.fromisoformat(row["refreshAt"]) if row.get("refreshAt") else None
            if renewed is not None and renewed.tzinfo is None:
                renewed = renewed.replace(tzinfo=UTC)
            return Quota(
                used_h=float(row["used"].rstrip("h")),
                total_h=float(row["total"].rstrip("h")),
                renewed=renewed.timestamp() if renewed is not None else None,
            )
        return None

    # Kernels.

    def status(self, kernel: str, version: int) -> tuple[State, str] | None:
        """How a version of a kernel stands, and why it failed if it did; None where there is no such version."""
        try:
            said = self._ask(["kernels", "status", f"{kernel}/{version}"])
        except _Absent:
            return None
        found = re.search(r'has status "(?:KernelWorkerStatus\.)?(\w+)"', said)
        if found is None:
            raise UserError(f"cannot read what `kaggle kernels status` says of {kernel}: {_one_line(said)}")
        # A state that this module has never heard of may be that of a kernel that runs.
        state = _STATES.get(re.sub(r"(?<=[a-z])(?=[A-Z])", "_", found[1]).upper(), "running")
        why = re.search(r'Failure message: "(.*)"', said, re.DOTALL)
        return state, _one_line(why[1]) if why else ""

    def push(self, folder: Path) -> Pushed:
        """Starts a run of the kernel in `folder`. Raises QuotaUsedUp, AccountBusy, LostAnswer or UserError."""
        said = self._ask(["kernels", "push", "-p", str(folder)], changes=True)
        pushed = _PUSHED.search(said)
        if pushed is not None:
            left_out = [line for line in said.splitlines() if line.startswith("The following are not valid")]
            return Pushed(int(pushed[1]), " ".join(left_out))
        found = re.search(r"Kernel push error: (.*)", said)
        if found is None:
            raise LostAnswer(_one_line(said) or "no answer")
        refusal = found[1].strip()
        if re.search(r"quota", refusal, re.IGNORECASE):
            raise QuotaUsedUp(refusal)
        if re.search(r"session count", refusal, re.IGNORECASE):
            raise AccountBusy(refusal)
        if re.search(r"phone|verif", refusal, re.IGNORECASE):
            raise UserError(
                f"Kaggle refuses the kernel: {refusal} (GPUs and the internet need a verified phone number: "
                "https://www.kaggle.com/settings, Phone verification; then start the same command again)"
            )
        raise UserError(f"Kaggle refuses the kernel: {refusal}; nothing was started")

    def output(self, kernel: str, version: int, folder: Path, pattern: str) -> None:
        """Fetches to `folder` a version's log and those of its output files whose path the regular expression finds.

        A version without any output is no error.
        """
        words = ["kernels", "output", f"{kernel}/{version}", "-p", str(folder), "-o", "-q", "--file-pattern", pattern]
        try:
            self._ask([*words, "--page-size", "200"])
        except _Absent as error:
            if not _NOT_FOUND.search(error.said):
                raise  # an address that expired, say: taken for "no output", it would lose what the version did

    # Datasets.

    def dataset(self, dataset: str) -> tuple[str, int] | None:
        """A dataset's state ("ready", "failed", or of a step before) and newest version; None where there is none."""
        try:
            found = _json_in(self._ask(["datasets", "status", dataset, "--format", "json"]))
            return str(found["status"]), int(found["current_version_number"])
        except _Absent:
            return None
        except (ValueError, KeyError, TypeError):
            raise UserError(f"cannot read what `kaggle datasets status` says of {dataset}") from None

    def is_private(self, dataset: str) -> bool:
        """Whether a dataset, which is there, is only for its owner and whom the owner names."""
        with TemporaryDirectory() as folder:
            self._ask(["datasets", "metadata", dataset, "-p", folder])
            try:
                found = read_json(Path(folder, "dataset-metadata.json"))
                # The command leaves out what is false.
                return found.get("info", found).get("isPrivate", False) is True
            except (OSError, ValueError, AttributeError):
                raise UserError(f"cannot read what `kaggle datasets metadata` says of {dataset}") from None

    def upload(self, dataset: str, folder: Path, *, is_new: bool, notes: str) -> None:
        """Uploads `folder` as a new dataset, or as a new version; after a lost answer it is uploaded again.

        Raises UserError where the dataset is there and public. A new one is private: `create` has to be told otherwise.
        """
        if not is_new and not self.is_private(dataset):
            raise UserError(
                f"the dataset {dataset} is public, and your code and data would be, too: make it private at "
                f"https://www.kaggle.com/datasets/{dataset}/settings, or choose another --run_dir, since it is called "
                "after that; nothing was uploaded"
            )
        words = ["create"] if is_new else ["version", "-m", notes]
        said = self._ask(["datasets", *words, "-p", str(folder), "-q"], limit_s=_UPLOAD_S)
        refusal = re.search(r"creation error: (.*)", said)
        if is_new and refusal is not None and "already in use" in refusal[1]:
            # An earlier try whose answer was lost made it, or Kaggle denied that it exists. Its content is unknown.
            self.upload(dataset, folder, is_new=False, notes=notes)
        elif refusal is not None:
            raise UserError(f"Kaggle refuses the dataset: {refusal[1].strip()}")

    # Asking.

    def _ask(
        self,
        words: Sequence[str],
        *,
        changes: bool = False,
        limit_s: float = _ANSWER_S,
        patience_s: float = _PATIENCE_S,
    ) -> str:
        """What the command prints; tried again while its errors are such as may pass.

        changes: a second try could do a thing twice, so it is tried again only if Kaggle cannot have done it.
        limit_s: for one answer. patience_s: for all tries.
        """
        pause_s, began = self._first_pause_s, self._clock.now()
        while True:
            try:
                return self._run(words, limit_s)
            except PassingError as error:
                if changes and not error.surely_not_done:
                    raise LostAnswer(str(error)) from error
                if self._clock.now() - began >= patience_s:
                    raise UserError(
                        f"no answer from Kaggle for {format_duration(patience_s)}, the last error: {error}; nothing "
                        "is lost, start the same command again"
                    ) from error
                warn(f"no answer from Kaggle, next try in {format_duration(pause_s)}: {error}")
            self._clock.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _run(self, words: Sequence[str], limit_s: float) -> str:
        """What the command prints when it succeeds. Raises PassingError, _Absent or UserError."""
        try:
            done = subprocess.run(
                [self._command, *words],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                timeout=limit_s,
                pass_fds=self._inherited,
            )
        except subprocess.TimeoutExpired:
            raise PassingError(f"timed out after {format_duration(limit_s)}") from None
        said = _redacted(done.stdout + done.stderr)
        if done.returncode == 0:
            return said
        asked = f"kaggle {' '.join(words[:3])}"
        if _NO_TOKEN.search(said):
            raise UserError(f"Kaggle wants a token, or rejects the one it was given: {_TOKEN}")
        if _NOT_FOUND.search(said) or _DENIED.search(said):
            raise _Absent(f"Kaggle does not give access, {asked}: {_cause(said)}", said)
        if _REJECTED.search(said):
            raise UserError(f"Kaggle rejects `{asked}`: {_cause(said)}")
        text = f"`{asked}` ended with status {done.returncode}: {_cause(said)}"
        raise PassingError(text, surely_not_done=_NEVER_DONE.search(said) is not None)


class _Absent(UserError):
    """There is no such kernel, version or dataset, or not for this account: Kaggle does not always tell which."""

    def __init__(self, message: str, said: str):
        super().__init__(message)
        self.said = said


def _json_in(said: str) -> Any:
    """The JSON that the command prints, behind warnings that may come first. Raises ValueError where there is none."""
    start = re.search(r"^[\[{]", said, re.MULTILINE)
    if start is None:
        raise ValueError(f"no JSON in {_one_line(said)}")
    return json.JSONDecoder().raw_decode(said, start.start())[0]


def _cause(said: str) -> str:
    """The line of an error message that names the cause: the last of a traceback, else the first."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    if any(line.startswith("Traceback") for line in lines):
        return _one_line(lines[-1])
    return _one_line(next((line for line in lines if not line.lower().startswith("warning")), "it says nothing"))


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]


def _redacted(text: str) -> str:
    """`text` without tokens, and without the signatures of signed addresses."""
    for secret in _secrets():  # read anew: some tokens are renewed while a relay waits
        text = text.replace(secret, "[token]")
    text = re.sub(r"KGAT_\w+|(?<=Bearer )\S+|(?<=Basic )\S+", "[token]", text)
    return re.sub(r"(https?://[^\s?]+)\?[^\s)\"']+", r"\1?[...]", text)


def _secrets() -> list[str]:
    """Every token that the command could be using, wherever it looks for one; the longest first."""
    home = Path.home()
    folders = {home / ".kaggle", home / ".config/kaggle", Path(os.environ.get("KAGGLE_CONFIG_DIR") or home / ".kaggle")}
    found = {os.environ.get("KAGGLE_KEY", ""), os.environ.get("KAGGLE_API_TOKEN", "")}
    user = os.environ.get("KAGGLE_USERNAME", "")
    files = [folder / name for folder in folders for name in ("access_token", "access_token.txt")]
    with suppress(OSError, ValueError):
        files.append(Path(os.environ.get("KAGGLE_API_TOKEN") or "access_token"))  # a token, or a file that holds one
    for file in files:
        with suppress(OSError, ValueError):
            found.add(file.read_text(encoding="utf-8").strip())
    for file in [folder / name for folder in folders for name in ("kaggle.json", "credentials.json")]:
        with suppress(OSError, ValueError):
            content = json.loads(file.read_text(encoding="utf-8"))
            user = user or content.get("username", "")
            found |= {content.get(key) or "" for key in ("key", "access_token", "refresh_token")}
    found |= {base64.b64encode(f"{user}:{secret}".encode()).decode() for secret in found if secret}
    # Anything shorter is no token, and would tear holes into ordinary words.
    return sorted((secret for secret in found if len(secret) >= 8), key=len, reverse=True)
