"""What is asked of wandb for a run, and which run there it is.

Relay's own options come first, then what the run has in wandb already, then wandb's variables, then Relay's defaults.
In a sweep, wandb itself insists on the agent's variables for id, project and entity. wandb.json keeps what came of it:
a run that was begun by a sweep, or under other variables, goes on as the same one.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import Field, model_validator

from training.base.console import UserError
from training.base.files import write_atomically, writing_to
from training.base.options import Options
from training.engine.status import WANDB_FILE, WANDB_ID, WandbRecord, read_record
from training.engine.wandb.log_file import visit_logs

Mode = Literal["disabled", "auto", "online", "offline"]

_VARIABLES = {
    "id": "WANDB_RUN_ID",
    "project": "WANDB_PROJECT",
    "entity": "WANDB_ENTITY",
    "name": "WANDB_NAME",
    "group": "WANDB_RUN_GROUP",
    "folder": "WANDB_DIR",
}
# wandb's words for its modes, with the old ones.
_MODES: dict[str, Mode] = {
    "online": "online",
    "run": "online",
    "offline": "offline",
    "dryrun": "offline",
    "disabled": "disabled",
}


class WandbOptions(Options):
    """Where to show the run, if anywhere."""

    mode: Mode | None = Field(
        None,
        description="auto: online where there is a key and the server answers, else offline; null: WANDB_MODE, else "
        "auto in a sweep and disabled elsewhere",
    )
    project: str | None = Field(
        None, min_length=1, description="wandb project that the run stands in; null: WANDB_PROJECT, else relay"
    )
    entity: str | None = Field(None, description="wandb user or team; null: WANDB_ENTITY, else the key's own")
    name: str | None = Field(None, description="name of the run; null: WANDB_NAME, else that of the run folder")
    group: str | None = Field(None, description="what shows runs together; null: WANDB_RUN_GROUP, else none")

    @model_validator(mode="after")
    def _mode_is_known(self) -> WandbOptions:
        mode_of(self.mode)
        return self


def is_disabled() -> bool:
    """Whether wandb's own switch is set."""
    return os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes", "on")


def mode_of(said: str | None) -> str:
    """The mode, by the option if it is given. Raises UserError if WANDB_MODE decides and is none that there is here."""
    if said is not None:
        return said
    if is_disabled():
        return "disabled"
    word = os.environ.get("WANDB_MODE")
    if not word:
        return "auto" if _in_sweep() else "disabled"
    if word not in _MODES:
        raise UserError(f"WANDB_MODE is {word}: set it to online, offline or disabled, or give --wandb.mode")
    return _MODES[word]


def same_run(options: WandbOptions, run_dir: Path, run_id: str | None) -> WandbRecord:
    """The run's place in wandb, which from now on is what wandb.json says.

    run_id: wandb's id of the run as the checkpoint has it. Raises UserError if that is none, or the run folder cannot
    be written.
    """
    if run_id is not None and not re.fullmatch(WANDB_ID, run_id):
        raise UserError(f"the checkpoints of {run_dir} name {run_id!r} as their run in wandb, which is no id of one")
    known = read_wandb_record(run_dir)
    variables = {key: value for key, name in _VARIABLES.items() if (value := os.environ.get(name))}
    asked = options.model_dump(include={"project", "entity", "name", "group"}, exclude_none=True)
    insisted = {key: variables[key] for key in ("id", "project", "entity") if key in variables} if _in_sweep() else {}
    found = insisted.get("id") or known.get("id") or run_id or variables.get("id") or secrets.token_hex(4)
    if known.get("id") == found:
        known = {"folder": None, **known}
    else:
        known = {}
        if "folder" in variables:
            folder = Path(variables["folder"]).absolute()
            variables["folder"] = str(folder)
            with suppress(OSError):  # `wandb_folder` knows another one
                folder.mkdir(parents=True, exist_ok=True)
    defaults = {"project": "relay", "entity": None, "name": run_dir.resolve().name, "group": None, "folder": None}
    record = cast(WandbRecord, {**defaults, **variables, **known, **asked, **insisted, "id": found})
    with writing_to(run_dir, option="--run_dir"):
        write_wandb_record(run_dir, record)
    return record


def read_wandb_record(run_dir: Path) -> dict[str, Any]:
    """What wandb.json holds; nothing if there is none."""
    return read_record(run_dir, WANDB_FILE) or {}


def write_wandb_record(run_dir: Path, record: WandbRecord) -> None:
    """Writes wandb.json, unless it says so already."""
    if read_wandb_record(run_dir) != record:
        write_atomically(run_dir / WANDB_FILE, json.dumps(record, indent=2) + "\n")


def wandb_folder(run_dir: Path, record: WandbRecord) -> Path:
    """Where wandb's own files of the run are: in the run folder, or where WANDB_DIR said when the run was begun.

    A run folder that has come to where that cannot be written, or where nothing of the run is, another machine perhaps,
    has its own from then on.
    """
    folder = record.get("folder")
    if folder is None or not os.access(folder, os.W_OK):
        return run_dir
    said_now = os.environ.get("WANDB_DIR")
    is_own = said_now and Path(said_now).absolute() == Path(folder)
    return Path(folder) if is_own or visit_logs(Path(folder), record["id"]) else run_dir


def _in_sweep() -> bool:
    return bool(os.environ.get("WANDB_SWEEP_ID"))
