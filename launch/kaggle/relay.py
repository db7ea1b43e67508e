"""Drives a run on Kaggle from one's own machine, kernel run after kernel run, until the model is finished.

    python -m launch.kaggle relay configs/gpt/t4x2.yaml [--key value ...] [--owner NAME] [--every 5m]

Uploads code, config and prepared data as a private dataset where they changed, starts a kernel run, waits for its end,
looks at how it went, and starts the next one with its output as an input. When the week's GPU hours are used up, it
says when they are renewed, waits and goes on. Options that it does not know go to the training.

It can be interrupted at any moment, and the same command goes on: it writes what it is about to do into
`runs/NAME/kaggle.json` first, and asks Kaggle what came of it. So no kernel run is started while another one of the run
may be active, and none is lost. That holds for one machine; a second one should not drive the same run.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from launch.kaggle import dataset, notebook
from launch.kaggle.client import ACTIVE, AccountBusy, Clock, Kaggle, LostAnswer, Quota, QuotaUsedUp
from launch.kaggle.kernel_run import SUMMARY
from launch.kaggle.record import (
    RECORD,
    KernelRun,
    RelayRecord,
    end_of,
    hours_between,
    runs_without_progress,
    seconds,
    to_continue,
    utc,
)
from launch.scripts import run_and_data, script_of
from training.base.console import TryLaterError, UserError, say, warn
from training.base.durations import format_duration, parse_duration
from training.base.files import open_in_place, writing_to
from training.base.options import CommandLine
from training.engine.status import EXIT_RESUMABLE, read_status, saved_steps

try:
    import fcntl
except ImportError:  # not POSIX: two relays of one run are then not told apart
    fcntl = None  # type: ignore[assignment]

FAILURE_LIMIT = 3

# Kaggle's own figures, for when it does not tell: GPU hours of a week, which begins on Saturday at 0:00 UTC.
_WEEK_H, _WEEK_S = 30.0, 7 * 86400.0
_A_SATURDAY = datetime(2000, 1, 1, tzinfo=UTC).timestamp()

# A push whose answer was lost may be under way for some time: it is looked for so often, so long apart.
_LOST_TRIES, _LOST_PAUSE_S = 4, 30.0
# A version counts as gone when Kaggle has denied it so often, not after the first time.
_GONE_TRIES = 5

# Kaggle may take so long to make a version of what was uploaded.
_PROCESSING_S = 2 * 3600.0

# What is fetched of an output beside the log: how it went, and where the checkpoints are.
_SMALL = r"(^|/)(kernel_run|status|manifest)\.json$"


@dataclass(frozen=True)
class Run:
    """What is trained, and under which names on Kaggle."""

    words: tuple[str, ...]  # config and options of `launch.kaggle run`
    run_dir: Path
    data: Path
    script: str  # the module that trains
    owner: str
    name: str

    @property
    def kernels(self) -> tuple[str, str]:
        """Two that take turns, each with the other's output as input.

        It is not documented that a kernel's own output may be its input, and its newest version would be the one that
        is about to run.
        """
        return f"{self.owner}/{self.name}-a", f"{self.owner}/{self.name}-b"

    @property
    def dataset(self) -> str:
        return f"{self.owner}/{self.name}-files"


class Relay:
    """Brings one run to its end, as the module promises.

    every_s: seconds between two looks at a kernel run. check: raises UserError where the training's options have a
    mistake; called when they or the uploaded files are new.
    """

    def __init__(
        self,
        run: Run,
        record: RelayRecord,
        kaggle: Kaggle,
        clock: Clock,
        every_s: float,
        check: Callable[[], object],
    ):
        self.run, self._record, self._check = run, record, check
        self._kaggle, self._clock, self._every_s = kaggle, clock, every_s
        self._folder = run.run_dir / "kaggle"
        self._said_busy = False  # that the account is busy is said once, not at every try

    def drive(self) -> int:
        """Returns 0 when the model is finished, 75 where the user stopped the run. Raises UserError if it failed."""
        uploaded = False
        while True:
            self._ask_what_is_there()
            for kernel_run in self._record.kernel_runs:
                if kernel_run.ended is None:
                    self._watch(kernel_run)
            status = self._conclude()
            if status is not None:
                return status
            if not uploaded:
                self._upload()
                uploaded = True
            self._push()

    # What Kaggle knows.

    def _ask_what_is_there(self) -> None:
        """Adds the versions that Kaggle has but kaggle.json lacks.

        So a push whose answer was lost is found, and so are the kernel runs of a run whose kaggle.json was lost.
        """
        for kernel in self.run.kernels:
            pending = self._record.pending(kernel)
            tries = 1 if pending is None else _LOST_TRIES
            while tries:
                newest = self._record.newest(kernel)
                version = ((newest.version or 0) if newest is not None else 0) + 1
                found = self._kaggle.status(kernel, version)
                if found is None:
                    tries -= 1
                    if tries:
                        self._clock.sleep(min(_LOST_PAUSE_S, self._every_s))
                    continue
                if self._kaggle.status(kernel, version + 1_000_000) is not None:
                    raise UserError(
                        "`kaggle kernels status` tells of versions that cannot exist, so nothing that it says of a "
                        "kernel run can be relied on: use another version of the command, or push by hand"
                    )
                if pending is not None:
                    there, how = pending, "its push had arrived"
                    there.version = version
                else:
                    there, how = self._record.add(kernel, version, [], None), "found on Kaggle"
                    there.announced = found[0] not in ACTIVE  # its end was, at the time
                pending, tries, there.state = None, 1, found[0]
                self._record.write()
                say(f"{there.name}: {how}, {found[0]}")
            if pending is not None:
                say(f"kernel run {pending.number}: its push did not arrive")
                self._record.forget(pending)

    def _watch(self, kernel_run: KernelRun) -> None:
        """Waits until the kernel run is over, and takes in what came of it."""
        assert kernel_run.version is not None
        missed = 0
        while missed < _GONE_TRIES:
            found = self._kaggle.status(kernel_run.kernel, kernel_run.version)
            if found is None:
                missed += 1
            else:
                missed = 0
                state, why = found
                if state != kernel_run.state:
                    kernel_run.state = state
                    if state in ACTIVE:
                        say(f"{kernel_run.name}: {state}")
                if state not in ACTIVE:
                    self._end(kernel_run, why)
                    return
                kernel_run.seen = utc(self._clock.now())
                if state == "running" and kernel_run.began is None:
                    kernel_run.began = kernel_run.seen
                self._record.write()
            self._clock.sleep(self._every_s)
        kernel_run.state = "cancelled"
        self._end(kernel_run, "Kaggle no longer knows it; perhaps it was deleted")

    def _end(self, kernel_run: KernelRun, why: str) -> None:
        """Fetches how the kernel run went, notes it and says it. why: Kaggle's own reason, if any."""
        assert kernel_run.version is not None
        folder = self._empty(f"kernel-run-{kernel_run.number:03}")
        self._kaggle.output(kernel_run.kernel, kernel_run.version, folder, _SMALL)
        log = next(iter(folder.glob("*.log")), None)
        kernel_run.log = str(log) if log is not None else None
        # The run's folder, wherever in the output it is. The places of the manifests tell which checkpoints it has.
        inside = (path for path in folder.rglob("*") if path.is_dir() and path.name == self.run.run_dir.name)
        run_dir = next(inside, folder)
        kernel_run.step = max(saved_steps(run_dir), default=None)
        status = read_status(run_dir) or {}
        summary = _read_json(next(iter(folder.rglob(SUMMARY)), None)) or status
        kernel_run.status, kernel_run.restart = summary.get("status"), summary.get("restart")
        kernel_run.reason = why or summary.get("reason") or f"it ended ({kernel_run.state}) before it came to train"
        kernel_run.ended = end_of(kernel_run, status.get("time"), self._clock.now())
        if kernel_run.began is None and "seconds" in summary:
            kernel_run.began = utc(seconds(kernel_run.ended) - float(summary["seconds"]))
        kernel_run.began = kernel_run.began or kernel_run.pushed
        self._record.write()
        where = f"step {kernel_run.step:,}" if kernel_run.step is not None else "no checkpoint"
        if kernel_run.step is not None and status.get("steps"):
            where += f" of {status['steps']:,}"
        say(f"{kernel_run.name}: {kernel_run.state}, {where}: {kernel_run.reason}")
        self._say_hours()

    # What it means.

    def _conclude(self) -> int | None:
        """The exit status, where no further kernel run should begin; None: the next one."""
        kernel_runs = self._record.kernel_runs
        finished = next((each for each in kernel_runs if each.status == "finished"), None)
        if finished is not None:
            say(f"{self.run.run_dir}: finished, {finished.reason}. Everything that it wrote:")
            say(f"  kaggle kernels output {finished.kernel}/{finished.version} -p {self.run.run_dir}/output")
            if finished.pushed is None:  # not by this relay
                say("Kaggle had this run already. To train it anew, choose another --run_dir")
            return 0
        fresh = [each for each in kernel_runs if not each.announced]
        if not fresh:
            return None
        last, fruitless = fresh[-1], min(runs_without_progress(kernel_runs), len(fresh))
        over = last.restart is False
        if not over and fruitless < FAILURE_LIMIT:
            return None
        for each in fresh:
            each.announced = True  # the same command again means that the user wants another kernel run
        self._record.write()
        log = f"; its log: {last.log}" if last.log else ""
        if over and last.status == "resumable":
            say(f"{self.run.run_dir} was stopped: {last.reason}{log}; the same command continues it")
            return EXIT_RESUMABLE
        if over:
            raise UserError(f"{last.name} failed: {last.reason}{log}. Mend that; the same command then goes on")
        raise UserError(
            f"{fruitless} kernel runs in a row brought nothing that the next one could continue from; the last, "
            f"{last.name}: {last.reason}{log}. The same command tries again"
        )

    # The next kernel run.

    def _upload(self) -> None:
        """Uploads code, config and prepared data unless Kaggle has them already; returns when it does."""
        folder, name = self._empty("dataset"), self.run.dataset
        content = dataset.content_of(Path(self.run.words[0]), self.run.data, self.run.script)
        dataset.write_dataset(folder, content, owner=self.run.owner, slug=name.partition("/")[2])
        sha256 = dataset.content_hash(folder)
        known, words = self._record.dataset, list(self.run.words)
        if (known.get("sha256"), known.get("words")) != (sha256, words):
            self._check()  # on Kaggle, a mistake would cost a kernel run to find
        there = self._kaggle.dataset(name)
        if there is None or (known.get("name"), known.get("sha256")) != (name, sha256):
            say(f"dataset {name}: uploading {_size_mb(folder):,.1f} MB, which hold")
            for line in content.described():
                say(f"  {line}")
            self._kaggle.upload(name, folder, is_new=there is None, notes=f"sha256 {sha256}")
            before = there[1] if there is not None else 0
            there = self._kaggle.dataset(name)
            began = self._clock.now()
            while there is None or there[1] <= before or there[0] != "ready":
                late = self._clock.now() - began > _PROCESSING_S
                if late or (there is not None and there[0] == "failed"):
                    raise UserError(
                        f"Kaggle {'has not taken' if late else 'could not take'} the dataset in: see "
                        f"https://www.kaggle.com/datasets/{name}; the same command tries again"
                    )
                self._clock.sleep(min(30.0, self._every_s))
                there = self._kaggle.dataset(name)
            say(f"dataset {name}: version {there[1]} is ready")
        self._record.dataset = {"name": name, "sha256": sha256, "version": there[1], "words": words}
        self._record.write()
        shutil.rmtree(folder)

    def _best(self) -> KernelRun | None:
        """The kernel run to continue, if Kaggle still has it: a user may delete a kernel, and its outputs with it."""
        while (best := to_continue(self._record, self.run.kernels)) is not None:
            assert best.version is not None
            for _ in range(_GONE_TRIES):
                if self._kaggle.status(best.kernel, best.version) is not None:
                    return best
                self._clock.sleep(min(_LOST_PAUSE_S, self._every_s))
            warn(f"{best.name}: Kaggle no longer has it; what the kernel did is lost")
            self._record.forget_kernel(best.kernel)
        return None

    def _push(self) -> None:
        """Starts the next kernel run; returns when it began, may have begun, or may be tried again later."""
        best = self._best()
        first, second = self.run.kernels
        kernel = second if best is not None and best.kernel == first else first
        previous = [best.kernel] if best is not None else []
        folder = self._empty("kernel")
        slug = kernel.partition("/")[2]
        notebook.write_kernel(
            folder,
            owner=self.run.owner,
            slug=slug,
            title=slug,
            words=self.run.words,
            dataset=self.run.dataset,
            sha256=self._record.dataset["sha256"],
            previous=previous,
            expected_step=(best.step or 0) if best is not None else 0,
        )
        # Written down first: from here on it may have begun.
        next_one = self._record.add(kernel, None, previous, utc(self._clock.now()))
        try:
            pushed = self._kaggle.push(folder)
        except LostAnswer as error:
            warn(f"kernel run {next_one.number}: no answer to its push ({error}); asking whether it arrived")
            return
        except QuotaUsedUp as error:
            self._record.forget(next_one)
            self._wait_for_quota(str(error))
            return
        except AccountBusy as error:
            self._record.forget(next_one)
            if not self._said_busy:
                say(f"the account is busy, trying every {format_duration(self._every_s)}: {error}")
            self._said_busy = True
            self._clock.sleep(self._every_s)
            return
        except UserError:
            self._record.forget(next_one)
            raise
        self._said_busy = False
        self._number(next_one, pushed.version)
        origin = f"continues {best.name} at step {best.step:,}" if best is not None else "from the beginning"
        say(f"{next_one.name}: started, {origin}")
        if pushed.left_out:
            warn(f"{next_one.name}: {pushed.left_out}")

    def _number(self, kernel_run: KernelRun, version: int) -> None:
        """Notes the version of a kernel run that began. Where it is not the next one, somebody else acted too."""
        newest = self._record.newest(kernel_run.kernel)
        known = (newest.version or 0) if newest is not None else 0
        if version <= known:
            warn(f"{kernel_run.kernel} was deleted, and begins again at version {version}")
            self._record.forget_kernel(kernel_run.kernel, but=kernel_run)
        kernel_run.version = version
        self._record.write()
        for between in range(known + 1, version):
            late = self._record.add(kernel_run.kernel, between, [], None)
            warn(f"{late.name}: began without this relay's knowledge, perhaps by a push that arrived late")

    def _empty(self, name: str) -> Path:
        folder = self._folder / name
        if self._folder.is_symlink():
            self._folder.unlink()
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    # GPU hours.

    def _wait_for_quota(self, why: str) -> None:
        quota, now = self._kaggle.quota(), self._clock.now()
        renewed = _renewal(quota, now)
        say(
            f"{why.strip().rstrip('.')}: new GPU hours on {_in_words(renewed)}, in {format_duration(renewed - now)}. "
            "This goes on then if it is left running; the same command does so if it was stopped"
        )
        until = max(renewed, now + self._every_s)
        while (left_s := until - self._clock.now()) > 0:
            # In parts: while a machine sleeps, the clock goes on and a wait does not.
            self._clock.sleep(min(left_s, 600.0))

    def _say_hours(self) -> None:
        quota, now = self._kaggle.quota(), self._clock.now()
        renewed = _renewal(quota, now)
        own_h = hours_between(self._record.kernel_runs, renewed - _WEEK_S, now)
        if quota is not None:
            left = f"{max(0.0, quota.total_h - quota.used_h):.1f} of {quota.total_h:g} left"
        else:
            left = f"{max(0.0, _WEEK_H - own_h):.1f} of {_WEEK_H:g} left if nothing else ran"
        say(f"GPU hours this week: {own_h:.1f} by this run, {left}, new ones on {_in_words(renewed)}")


def _read_json(path: Path | None) -> dict[str, Any] | None:
    with suppress(OSError, ValueError):
        found = json.loads(path.read_text(encoding="utf-8")) if path is not None else None
        return found if isinstance(found, dict) else None
    return None


def _renewal(quota: Quota | None, now: float) -> float:
    """When the next week's GPU hours begin: when Kaggle says, else on Saturday."""
    if quota is not None and quota.renewed is not None:
        return quota.renewed
    return now + _WEEK_S - (now - _A_SATURDAY) % _WEEK_S


def _in_words(moment: float) -> str:
    return datetime.fromtimestamp(moment).astimezone().strftime("%a %Y-%m-%d %H:%M %Z")


def _size_mb(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


# The command.


@contextmanager
def _alone(run_dir: Path) -> Iterator[tuple[int, ...]]:
    """Lets only one relay drive the run; yields the open files that its commands inherit.

    A killed relay leaves a command behind that may be pushing. That command holds the second lock until it has its
    answer: only then can Kaggle be asked what happened.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield ()
        return
    with (
        open_in_place(run_dir / ".kaggle-relay.lock") as relay,
        open_in_place(run_dir / ".kaggle-command.lock") as command,
    ):
        try:
            fcntl.flock(relay, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TryLaterError(f"another relay is driving {run_dir}; one is enough") from None
        try:
            fcntl.flock(command, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for a `kaggle` command that an earlier relay left behind")
            fcntl.flock(command, fcntl.LOCK_EX)
        yield (command.fileno(),)


def main(argv: Sequence[str]) -> int:
    """Reads the command line and drives the run; returns its exit status. Raises UserError."""
    parser = CommandLine(
        "python -m launch.kaggle relay",
        __doc__,
        usage="%(prog)s CONFIG.yaml [--key value ...] [--owner NAME] [--every 5m]",
    )
    parser.add_argument("config", metavar="CONFIG.yaml")
    parser.add_argument("--owner", help="your name on Kaggle (default: the one that the token belongs to)")
    parser.add_argument("--every", default="5m", help="how often to look at a kernel run (default %(default)s)")
    parser.add_argument("--script", help="module that trains (default: what the config says)")
    arguments, words = parser.parse_known_args(argv)
    try:
        every_s = parse_duration(arguments.every)
    except ValueError as error:
        raise UserError(f"--every: {error}") from None
    if every_s <= 0:
        raise UserError("--every must be longer than nothing, for example 5m")
    script = arguments.script or script_of(Path(arguments.config))
    run_dir, data = run_and_data([arguments.config, *words])
    if not data.is_dir():
        raise UserError(f"there is no prepared data at {data}; README.md says how to prepare it")
    clock = Clock()
    with writing_to(run_dir, option="--run_dir"), _alone(run_dir) as inherited:
        kaggle = Kaggle(clock, first_pause_s=min(30.0, every_s), inherited=inherited)
        account = kaggle.account()
        if arguments.owner not in (None, account):
            raise UserError(f"--owner {arguments.owner}: the token belongs to {account}, who cannot push for others")
        run_words = (arguments.config, *(["--script", arguments.script] if arguments.script else []), *words)
        record = RelayRecord.read(run_dir / RECORD)
        run = Run(run_words, run_dir, data, script, account, record.name or notebook.slug_of(run_dir))

        def check() -> None:
            notebook.checked_options(script, [arguments.config, *words])

        return Relay(run, record, kaggle, clock, every_s, check).drive()
