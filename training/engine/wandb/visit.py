"""One visit to a wandb run: opened online or offline, some rows, ended. The tracker and the evaluation make them.

Promises: a visit without a key, a network or a living server is offline within seconds and says why; steps that wandb
has are not logged again. Everything here may wait, up to the limits below; a training calls it from a thread.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from typing import Any, Literal

from training.base.console import UserError, say, warn
from training.base.network import why_unreachable
from training.engine.optim import EXTENDABLE
from training.engine.status import WandbRecord
from training.engine.wandb.log_file import VisitLog, last_summary, visit_logs
from training.engine.wandb.options import WandbOptions, mode_of, same_run, wandb_folder, write_wandb_record

CONNECT_LIMIT_S = 2.0
INIT_LIMIT_S = 10.0
FINISH_LIMIT_S = 8.0  # for what is still to be uploaded when a visit ends
UPLOAD_LIMIT_S = 300.0  # for earlier offline visits, before an online one goes on
ABANDON_LIMIT_S = 1.0

RETRIES = 100_000  # of an upload, up to 60 s apart: if wandb gave up, after minutes, it would drop all later rows
FLUSH_EVERY_S = 2.0  # with wandb's own 15 s a kill would cost as much, until the run is resumed

# How wandb shows the end of a visit; a run that will go on is marked as preempted, which takes a status other than 0.
_EXIT_CODES = {"finished": 0, "resumable": 75}


class Visit:
    """One visit to the wandb run."""

    def __init__(self, options: WandbOptions, run_dir: Path, run_id: str | None, config: dict[str, Any] | None):
        """run_id: the checkpoint's, see `same_run`. config: the training's; None for an evaluation.

        Raises UserError if wandb is not installed, or the run folder cannot be written.
        """
        if find_spec("wandb") is None:
            raise UserError(
                "wandb is not installed: `pip install wandb==0.31.0`, or go without it by --wandb.mode disabled"
            )
        self._mode, self._run_dir, self._config = mode_of(options.mode), run_dir, config
        self._record = same_run(options, run_dir, run_id)
        if config is not None and config["optim"].get("schedule") in EXTENDABLE and not self._record["group"]:
            self._record["group"] = self._record["name"]  # made longer, it will be a second run there
        self._folder = wandb_folder(run_dir, self._record)

    @property
    def run_id(self) -> str:
        """wandb's id of the run."""
        return self._record["id"]

    def start(self) -> None:
        """Opens the run, online if asked and possible, and finds out which steps wandb has."""
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # offline means that nobody is contacted
        for name in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR"):  # the home folder may be small, or read-only
            os.environ.setdefault(name, str(self._folder.resolve() / "wandb/cache"))
        earlier = visit_logs(self._folder, self.run_id)
        if self._config is not None:
            for log in earlier:
                log.seal()
        offline = [log for log in earlier if log.is_offline and log.begun]
        # An evaluation may run beside the training, whose file is then not at its end.
        self._open([log for log in offline if not log.is_uploaded and (log.ended or self._config is not None)])
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        self._next = self._run.starting_step
        self._record["project"] = self._run.project  # what wandb really gave
        self._record["entity"] = self._run.entity or self._record["entity"]
        if self._online:
            # wandb's step of the last row is ahead of the row's own where it has renumbered, see `log`; the summary may
            # be one row ahead after a kill, since it is sent before its row.
            self._arrived = min(self._next - 1, int(self._run.summary.get("step", self._next - 1)))
            self._held: frozenset[int] = frozenset()
            self._record["arrived"] = self._arrived
        else:
            self._arrived = self._record.get("arrived", -1)
            self._held = frozenset().union(*(log.steps for log in offline))
            # `wandb sync` will replace the whole summary by that of the last visit.
            self._run.summary.update(last_summary(earlier))
        self._last = self._arrived
        write_wandb_record(self._run_dir, self._record)

    def _open(self, waiting: list[VisitLog]) -> None:
        """Starts wandb and says in one line where the run can be seen, or how it gets there later."""
        import wandb

        # Here, too, and not in wandb.init alone: whatever WANDB_MODE says, and since a sweep ignores the id there.
        wandb.setup(wandb.Settings(silent=True, mode="online", run_id=self.run_id))
        self._online, obstacle = False, None
        if self._mode != "offline":
            obstacle = why_offline()
            if obstacle is None:
                _upload(waiting)
                try:
                    self._run = self._init("online")
                    self._online = True
                except Exception as error:
                    obstacle = f"the server did not accept the run: {first_line(error)}"
                    wandb.teardown()  # else the id stays in use
        upload = f"wandb sync {self._folder}/wandb/offline-run-*-{self.run_id}*"
        if self._online:
            say(f"wandb: {self._run.url}")
            if self._config is not None:
                for log in waiting:  # rows that did not get through come from metrics.jsonl now, and not again
                    log.mark_uploaded()
            return
        self._run = self._init("offline")
        text = f"wandb: offline{f', because {obstacle}' if obstacle else ''}; to upload: {upload}"
        if self._mode == "online":
            warn(text)
        else:
            say(text)

    def _init(self, mode: Literal["online", "offline"]) -> Any:
        import wandb

        settings = wandb.Settings(
            silent=True,
            console="off",
            use_dot_wandb=False,  # where `visit_logs` looks
            save_code=False,
            init_timeout=INIT_LIMIT_S,
            finish_timeout=FINISH_LIMIT_S,
            finish_timeout_raises=True,
            x_file_stream_retry_max=RETRIES,
            x_transaction_log_flush_interval=FLUSH_EVERY_S,
            x_update_finish_state=self._config is not None,  # an evaluation does not end a run that is to go on
        )
        return wandb.init(
            mode=mode,
            project=self._record["project"],
            entity=self._record["entity"],
            name=self._record["name"],
            group=self._record["group"],
            id=self.run_id,
            resume="allow",
            dir=str(self._folder),
            config=self._config,
            settings=settings,
        )

    def log(self, row: dict[str, Any]) -> None:
        """A row of the history, unless wandb has this step already: steps that are trained again are the same."""
        step = row["step"]
        if step > self._arrived and step not in self._held:
            # wandb drops a row that is not behind the last; where it has renumbered some, only `step` itself is right.
            at = max(step, self._next)
            self._run.log(row, step=at, commit=True)
            self._last, self._next = step, at + 1

    def summarise(self, values: dict[str, Any]) -> None:
        """Values shown as the run's results; a wandb.Table too."""
        self._run.summary.update(values)

    def attach(self, file: Path) -> None:
        """Uploads a copy of `file` with the run's files."""
        copy = Path(shutil.copy(file, self._run.dir))
        self._run.save(str(copy), base_path=self._run.dir, policy="now")

    def finish(self, status: str) -> None:
        """Ends the visit. What the server does not take within FINISH_LIMIT_S follows in the next one."""
        if status == "resumable":
            self._run.mark_preempting()
        try:
            self._run.finish(exit_code=_EXIT_CODES.get(status, 1))
        except TimeoutError:
            warn("the wandb server did not take the last rows in time; the next start of the same command sends them")
            return
        if self._online:  # for a later visit that cannot ask
            self._record["arrived"] = self._last
            write_wandb_record(self._run_dir, self._record)


def holds(run_dir: Path, record: WandbRecord, step: int) -> bool:
    """Whether this step is known to have arrived at the server, or is kept here for `wandb sync`."""
    logs = visit_logs(wandb_folder(run_dir, record), record["id"])
    return record.get("arrived", -1) >= step or any(log.is_offline and step in log.steps for log in logs)


def why_offline() -> str | None:
    """What stands against going online, or None. Decided within CONNECT_LIMIT_S: wandb itself would wait for 100 s."""
    import wandb

    # Asked here, since wandb.init would ask the user for a key, from a thread.
    if not wandb.login(prompt=False, verify=False):
        return "there is no API key (`wandb login`, or WANDB_API_KEY)"
    url = wandb.setup().settings.base_url
    obstacle = why_unreachable(url, CONNECT_LIMIT_S)
    return f"{url} does not answer ({obstacle})" if obstacle is not None else None


def _upload(waiting: list[VisitLog]) -> None:
    """Sends what offline visits have kept, before anything newer: wandb renumbers steps that come too late.

    Stopped after UPLOAD_LIMIT_S; the rows that did not get through are then logged from metrics.jsonl.
    """
    for log in waiting:
        if log.odd:
            warn(f"{log.path.parent} is not sent to wandb: {log.odd}, which Relay has not written")
    waiting = [log for log in waiting if not log.odd]
    if not waiting:
        return
    command = [sys.executable, "-m", "wandb", "sync", "--yes", *(str(log.path.parent) for log in waiting)]
    environment = {key: value for key, value in os.environ.items() if key != "WANDB_SERVICE"}
    quiet = subprocess.DEVNULL
    with suppress(subprocess.TimeoutExpired):
        subprocess.run(command, env=environment, stdin=quiet, stdout=quiet, stderr=quiet, timeout=UPLOAD_LIMIT_S)


def abandon() -> None:
    """Keeps Python from waiting for wandb without any limit at its exit. wandb's own process ends with this one."""

    def clean_up() -> None:
        with suppress(Exception):  # not started yet, or not where it was in the version that this was written for
            from wandb.sdk import wandb_setup

            connection: Any = wandb_setup.singleton()._connection
            connection._cleanup()

    # While wandb is imported or starts, this waits for its locks.
    thread = Thread(target=clean_up, name="abandoning wandb", daemon=True)
    thread.start()
    thread.join(ABANDON_LIMIT_S)


def first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
