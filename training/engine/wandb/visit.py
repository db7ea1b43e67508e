"""One visit to a wandb run: opened online or offline, some rows, ended. The tracker and the evaluation make them.

Promises: a visit without a key, a network or a living server is offline within seconds and says why; steps that wandb
has are not logged again. Everything here may wait, up to the limits below; a training calls it from a thread.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from training.base.console import UserError, say, warn
from training.base.files import write_atomically, writing_to
from training.base.network import why_unreachable
from training.base.options import Options
from training.engine.status import WANDB_FILE, read_record
from training.engine.wandb.log_file import VisitLog, last_summary, visit_logs

CONNECT_LIMIT_S = 2.0
INIT_LIMIT_S = 10.0
FINISH_LIMIT_S = 8.0  # for what is still to be uploaded when a visit ends
UPLOAD_LIMIT_S = 300.0  # for earlier offline visits, before an online one goes on

RETRIES = 100_000  # of an upload, up to 60 s apart: if wandb gave up, after minutes, it would drop all later rows
FLUSH_EVERY_S = 2.0  # with wandb's own 15 s a kill would cost as much, until the run is resumed

# How wandb shows the end of a visit; a run that will go on is marked as preempted, which takes a status other than 0.
_EXIT_CODES = {"finished": 0, "resumable": 75}


class WandbOptions(Options):
    """Where to show the run, if anywhere."""

    mode: Literal["disabled", "auto", "online", "offline"] = Field(
        "disabled", description="auto: online where there is a key and the server answers, else offline"
    )
    project: str = Field("relay", min_length=1, description="wandb project that the run stands in")
    entity: str | None = Field(None, description="wandb user or team; null: the key's own")
    name: str | None = Field(None, description="name of the run; null: that of the run folder")


class Visit:
    """One visit to the wandb run. config: the training's; None for an evaluation."""

    def __init__(self, options: WandbOptions, run_dir: Path, run_id: str, config: dict[str, Any] | None):
        self._options, self._run_dir, self._run_id, self._config = options, run_dir, run_id, config

    def start(self) -> None:
        """Opens the run, online if asked and possible, and finds out which steps wandb has."""
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # offline means that nobody is contacted
        for name in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR"):  # the home folder may be small, or read-only
            os.environ.setdefault(name, str(self._run_dir.resolve() / "wandb/cache"))
        earlier = visit_logs(self._run_dir, self._run_id)
        if self._config is not None:
            for log in earlier:
                log.seal()
        offline = [log for log in earlier if log.is_offline and log.begun]
        # An evaluation may run beside the training, whose file is then not at its end.
        self._open([log for log in offline if not log.is_uploaded and (log.ended or self._config is not None)])
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        self._next = self._run.starting_step
        if self._online:
            # wandb's step of the last row is ahead of the row's own where it has renumbered, see `log`; the summary may
            # be one row ahead after a kill, since it is sent before its row.
            self._arrived = min(self._next - 1, int(self._run.summary.get("step", self._next - 1)))
            self._held: frozenset[int] = frozenset()
            self._remember()
        else:
            self._arrived = _read(self._run_dir).get("arrived", -1)
            self._held = frozenset().union(*(log.steps for log in offline))
            # `wandb sync` will replace the whole summary by that of the last visit.
            self._run.summary.update(last_summary(earlier))
        self._last = self._arrived

    def _open(self, waiting: list[VisitLog]) -> None:
        """Starts wandb and says in one line where the run can be seen, or how it gets there later."""
        import wandb

        wandb.setup(wandb.Settings(silent=True, mode="online"))  # whatever WANDB_MODE says: the options decide
        self._online, obstacle = False, None
        if self._options.mode != "offline":
            obstacle = why_offline()
            if obstacle is None:
                _upload(waiting)
                try:
                    self._run = self._init("online")
                    self._online = True
                except Exception as error:
                    obstacle = f"the server did not accept the run: {first_line(error)}"
                    wandb.teardown()  # else the id stays in use
        upload = f"wandb sync {self._run_dir}/wandb/offline-run-*"
        if self._online:
            say(f"wandb: {self._run.url}")
            if self._config is not None:
                for log in waiting:  # rows that did not get through come from metrics.jsonl now, and not again
                    log.mark_uploaded()
            return
        self._run = self._init("offline")
        text = f"wandb: offline{f', because {obstacle}' if obstacle else ''}; to upload: {upload}"
        if self._options.mode == "online":
            warn(text)
        else:
            say(text)

    def _init(self, mode: Literal["online", "offline"]) -> Any:
        import wandb

        settings = wandb.Settings(
            silent=True,
            console="off",
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
            project=self._options.project,
            entity=self._options.entity,
            name=self._options.name or self._run_dir.resolve().name,
            id=self._run_id,
            resume="allow",
            dir=str(self._run_dir),
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
        if self._online:
            self._arrived = self._last
            self._remember()

    def _remember(self) -> None:
        """Writes down which step is known to have arrived, for a later visit that cannot ask."""
        write_atomically(
            self._run_dir / WANDB_FILE, json.dumps({"id": self._run_id, "arrived": self._arrived}, indent=2) + "\n"
        )


def holds(run_dir: Path, step: int) -> bool:
    """Whether this step is known to have arrived at the server, or is kept here for `wandb sync`."""
    known = _read(run_dir)
    return known.get("arrived", -1) >= step or any(
        log.is_offline and step in log.steps for log in visit_logs(run_dir, known.get("id", ""))
    )


def same_run(run_dir: Path, run_id: str | None) -> str:
    """wandb's id of the run: the checkpoint's, the run folder's, or a new one that is then the run folder's."""
    if find_spec("wandb") is None:
        raise UserError(
            "wandb is not installed: `pip install wandb==0.31.0`, or go without it by --wandb.mode disabled"
        )
    known = _read(run_dir)
    run_id = run_id or known.get("id") or secrets.token_hex(4)
    if known.get("id") != run_id:
        with writing_to(run_dir, option="--run_dir"):
            write_atomically(run_dir / WANDB_FILE, json.dumps({"id": run_id}, indent=2) + "\n")
    return run_id


def _read(run_dir: Path) -> Mapping[str, Any]:
    return read_record(run_dir, WANDB_FILE) or {}


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
    if not waiting:
        return
    command = [sys.executable, "-m", "wandb", "sync", "--yes", *(str(log.path.parent) for log in waiting)]
    environment = {key: value for key, value in os.environ.items() if key != "WANDB_SERVICE"}
    quiet = subprocess.DEVNULL
    with suppress(subprocess.TimeoutExpired):
        subprocess.run(command, env=environment, stdin=quiet, stdout=quiet, stderr=quiet, timeout=UPLOAD_LIMIT_S)


def abandon() -> None:
    """Keeps Python from waiting for wandb without any limit at its exit. wandb's own process ends with this one."""
    try:
        from wandb.sdk import wandb_setup

        connection: Any = wandb_setup.singleton()._connection
        connection._cleanup()
    except Exception:  # not started yet, or not where it was in the version that this was written for
        pass


def first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
