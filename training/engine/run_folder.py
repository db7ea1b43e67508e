"""A run's folder, which one run at a time holds.

runs/NAME/
  config.yaml                          what the run is
  data.json  tokenizer/                what the run keeps of its data
  checkpoints/                         see training.engine.checkpoint
  metrics.jsonl                        see training.engine.metrics
  sessions.json                        every session: when, where, from which step to which, why it ended
  status.json                          running, finished, resumable or failed, and why
  kept_steps.json                      see training.engine.checkpoint
  address.json                         see training.engine.address, of a run that lives at an address
  report.html  summary.json            see training.report
  lock                                 held by the running session
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import suppress
from io import FileIO
from itertools import chain, count
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any, Protocol

import yaml

from training.base.console import TryLaterError, UserError, say, warn
from training.base.files import copy_plain, copy_tree, lock, open_in_place, read_plain, write_atomically, writing_to
from training.base.options import differing_keys
from training.base.strict_yaml import read_yaml
from training.engine.checkpoint import (
    Checkpoint,
    RunState,
    checkpoints,
    copy_checkpoint,
    keep_for_good,
    kept_for_good,
    newest_valid,
)
from training.engine.fork import go_back, leave_record, remove_unfinished
from training.engine.metrics import is_damaged, read_metrics, write_lines
from training.engine.optim import EXTENDABLE, LENGTH, OptimOptions
from training.engine.status import (
    CONFIG,
    KEPT,
    METRICS,
    RECORDS,
    SESSIONS,
    WANDB_FILE,
    end_killed_saves,
    read_config,
    read_record,
    read_sessions,
    read_status,
)
from training.engine.surroundings import commit
from training.engine.weights import other_kind

if TYPE_CHECKING:
    from training.engine.address.home import Home
    from training.engine.task import RunOptions

# A session that was told to stop may still be writing its checkpoint when the next one starts.
_LOCK_PATIENCE_S = 10.0


class Data(Protocol):
    """What a run is trained on, as far as the engine cares."""

    @property
    def identity(self) -> dict[str, str]:
        """What defines its content. It goes into every checkpoint, and a run goes on with equal content only."""

    @property
    def kept(self) -> Mapping[str, Path]:
        """Files and folders that a run copies, by their names in the run folder, to be usable without its data."""


def keep_private(run_dir: Path) -> None:
    """From now on what this process writes is for its user alone, and so is what is in the run folder already.

    Raises UserError where something there is another user's.
    """
    os.umask(0o077)
    below = (Path(place, name) for place, folders, files in os.walk(run_dir) for name in (*folders, *files))
    for path in chain([run_dir], below):
        with suppress(FileNotFoundError):  # not there yet, or not any more
            if path.is_symlink():
                continue
            try:
                path.chmod(path.stat().st_mode & 0o700)
            except PermissionError:
                raise UserError(f"--private: {path} is another user's: choose another --run_dir") from None


class RunFolder:
    """The folder of a run that is about to train here. Used on one rank only."""

    def __init__(self, run_dir: Path, home: Home | None = None):
        self.run_dir, self.home = run_dir, home
        self._lock: FileIO | None = None

    def open(
        self,
        about: dict[str, Any],
        data: Data,
        *,
        config: str,
        source: Path | None,
        may_change: AbstractSet[str],
        shared_steps: Callable[[Checkpoint], int] = lambda checkpoint: checkpoint.step,
    ) -> Checkpoint | None:
        """Locks the folder and finds the newest valid checkpoint, here, at the run's address, or in `source`.

        Where the run there has come further it is copied here.

        about: the definition of the run: task, config (without the keys `may_change`), data, and what it is built on.
        shared_steps: up to which step the run that made a checkpoint is this one, which may have another length. Where
        that is before the checkpoint, the run goes back, see `training.engine.fork`.

        A new run has no checkpoint yet; its folder gets `config` (YAML) and what the run keeps of its data. Raises
        UserError when the folder is in use or is another run's.
        """
        refuse_foreign_folder(self.run_dir)
        with writing_to(self.run_dir, option="--run_dir"):
            Path(self.run_dir, "checkpoints").mkdir(parents=True, exist_ok=True)
            self._take_lock()
            with TemporaryFile(dir=self.run_dir / "checkpoints"):
                pass  # another user's: better known now than at the first save
            end_killed_saves(self.run_dir)
            remove_unfinished(self.run_dir)
            latest = newest_valid(self.run_dir)
            if latest is not None:
                _check_same_run(latest, about, may_change)
            if (home := self.home) is not None:
                latest = home.open(latest, lambda found: _check_same_run(found, about, may_change, home.url))
            if source is not None:
                if not (source / "checkpoints").is_dir():
                    raise UserError(f"--resume_from {source} is not a run folder: there is no folder checkpoints in it")
                other = newest_valid(source, set_aside=False)
                if other is not None and (latest is None or other.step > latest.step):
                    _check_same_run(other, about, may_change)
                    if latest is None or min(other.step, shared_steps(other)) > latest.step:
                        latest = _carry_over(source, self.run_dir, other, data)
            saved = {} if latest is None else latest.manifest["config"]
            _set_damaged_aside(self.run_dir, {key: saved[key] for key in saved.keys() - may_change})
            known = self.run_dir / CONFIG
            is_other_length = latest is not None and latest.manifest["config"]["optim"] != about["config"]["optim"]
            if latest is not None and (step := shared_steps(latest)) < latest.step:
                latest = go_back(self.run_dir, latest, step)
            elif latest is not None and is_other_length and _reached(self.run_dir) > latest.step:
                leave_record(self.run_dir, latest)  # it was killed, perhaps behind the fork
            if latest is None:
                _refuse_lost_checkpoints(self.run_dir)
                if known.exists() and not _same_but_for_wandb(read_plain(known).decode(), config):
                    # Another run was begun here and never came to a checkpoint: its name in wandb is not this one's.
                    (self.run_dir / WANDB_FILE).unlink(missing_ok=True)
            if latest is None or is_other_length or not known.exists():
                write_atomically(known, config)
            for name, path in data.kept.items():
                if latest is not None and (self.run_dir / name).exists():
                    continue
                copy_tree(path, self.run_dir / name)
        return latest

    def close(self) -> None:
        """Gives the folder free for another run, in this process or in another, and the run for another machine."""
        if self.home is not None:
            self.home.close()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _take_lock(self) -> None:
        """Takes the right to write here, kept until `close`."""
        self._lock = file = open_in_place(self.run_dir / "lock")
        _wait_for(file, self.run_dir)
        if os.fstat(file.fileno()).st_nlink == 1:  # else it is another file's name, too
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())


def check_free(run_dir: Path) -> None:
    """Raises TryLaterError where another process writes to the folder."""
    with suppress(OSError):  # whoever is to write there says what is wrong with it
        if (run_dir / "lock").exists():
            with open_in_place(run_dir / "lock") as file:
                _wait_for(file, run_dir)


def _wait_for(file: FileIO, run_dir: Path) -> None:
    """Locks the file, or says who has it. Raises TryLaterError."""
    end = time.monotonic() + _LOCK_PATIENCE_S
    while not lock(file):
        if time.monotonic() > end:
            file.seek(0)
            holders = file.readall().decode("utf-8", "replace").splitlines()
            raise TryLaterError(
                f"{run_dir} is in use by {holders[-1] if holders else 'another process'}: wait or stop it "
                f"(touch {run_dir}/STOP), or choose another --run_dir; nothing was changed"
            )
        time.sleep(0.2)


def has_another_length(run_dir: Path, asked: OptimOptions) -> bool:
    """Whether the run in a folder was to end elsewhere than these options say; false where its config does not tell.

    False for one with a budget, whose length was chosen for good.
    """
    config = read_config(run_dir) or {}
    try:
        kept = config["optim"]
        return config["budget"] is None and any(
            value != kept[key] for key, value in asked.model_dump(include={*LENGTH, "patience"}).items()
        )
    except (KeyError, TypeError):
        return False


def _reached(run_dir: Path) -> int:
    """The last step on record."""
    return max((line["step"] for line in read_metrics(run_dir)), default=0)


def _same_but_for_wandb(config: str, other: str) -> bool:
    """Whether two configs (YAML) say the same of a run; where wandb shows it may come from a variable and go again."""
    first, second = map(read_yaml, (config, other))
    return isinstance(first, dict) and {**first, "wandb": None} == {**second, "wandb": None}


def _set_damaged_aside(run_dir: Path, config: Mapping[str, Any]) -> None:
    """Gives damaged files beside the checkpoints another name, so that the run goes on without them.

    config: what config.yaml has to hold, at least.
    """
    if kept_for_good(run_dir) is None:
        warn(f"{run_dir / KEPT} is damaged: no checkpoint is removed before it says again which ones are to be kept")
    for name, problem in _damaged(run_dir, config):
        path = run_dir / name
        names = (run_dir / f"damaged-{number}-{name}" for number in count(1))
        aside = next(each for each in names if not os.path.lexists(each))
        if name == METRICS:
            copy_plain(path, aside)
            write_lines(run_dir, read_metrics(run_dir))
        else:
            path.rename(aside)
        warn(f"{path} is damaged ({problem}); what was found is in {aside.name}, and the run goes on")


def _damaged(run_dir: Path, config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The names of such files, and what is wrong with them."""
    for name in RECORDS.keys() - {KEPT}:  # where that is damaged, nothing is removed
        if (run_dir / name).exists() and read_record(run_dir, name) is None:
            yield name, "it cannot be read"
    if is_damaged(run_dir / METRICS):
        yield METRICS, "not all of its lines can be read"
    try:
        if _lacks(read_yaml(read_plain(run_dir / CONFIG).decode()), config):
            yield CONFIG, "a part is missing"
    except FileNotFoundError:
        pass
    except (OSError, ValueError, yaml.YAMLError):
        yield CONFIG, "it cannot be read"


def _lacks(found: object, expected: object) -> bool:
    """Whether a key of `expected` is missing, at any depth."""
    if not isinstance(expected, Mapping):
        return False
    return not isinstance(found, Mapping) or any(
        key not in found or _lacks(found[key], value) for key, value in expected.items()
    )


def refuse_foreign_folder(run_dir: Path) -> None:
    """Raises UserError for prepared data, a model or an export, which a run would be mixed up with."""
    if kind := other_kind(run_dir):
        raise UserError(
            f"--run_dir {run_dir} holds {kind}, and a run has a folder of its own: choose another one; nothing was "
            "changed"
        )


def _refuse_lost_checkpoints(run_dir: Path) -> None:
    """Raises UserError if the run has had checkpoints: it would train again over the record of what they held."""
    finished = (read_status(run_dir) or {}).get("status") == "finished"
    if finished or any(each["from_step"] > 0 or each.get("saves") for each in read_sessions(run_dir)):
        raise UserError(
            f"{run_dir} is the record of a run that has had checkpoints, and no valid one is left: put a copy of one "
            f"back into {run_dir}/checkpoints, or, to train anew, move the record aside: mv {run_dir} {run_dir}-1"
        )


def _check_same_run(
    latest: Checkpoint, about: dict[str, Any], may_change: AbstractSet[str], address: str | None = None
) -> None:
    """Raises UserError where the checkpoint is another run's. address: from where it comes, if not from its folder."""
    place, option = (address, "--run_at") if address is not None else (latest.folder.parents[1], "--run_dir")
    if (task := latest.manifest["task"]) != about["task"]:
        raise UserError(
            f"{place} holds a run of another training ({task}, not {about['task']}): choose another {option}; "
            "nothing was changed"
        )
    lacking = sorted(RunState.__required_keys__ - latest.state().keys())
    if lacking:
        raise UserError(
            f"{address or latest.folder} was saved by another version of Relay{_made_with(latest)}, without "
            f"{', '.join(lacking)}: go on with that one, or choose another {option}; nothing was changed"
        )
    schedule = about["config"]["optim"]["schedule"]
    length = {f"optim.{key}" for key in LENGTH}
    may_differ = {"optim.patience", *(length if schedule in EXTENDABLE else ())}
    was = latest.manifest["config"].get("optim", {}).get("schedule")

    def definition(about: dict[str, Any]) -> dict[str, Any]:
        config = {key: value for key, value in about["config"].items() if key not in may_change}
        return {**config, "data": about["data"], "built_on": about.get("built_on", {})}

    differences = differing_keys(definition(latest.manifest), definition(about))
    differences = [line for line in differences if line.partition(":")[0] not in may_differ]
    others = [line for line in differences if not line.startswith("data.")]
    if len(others) < len(differences):  # fingerprints tell a reader nothing
        before, now = latest.manifest["config"].get("data"), about["config"].get("data")
        others.append(f"it was trained on other data than --data {now}: {before}, as that was then")
        differences = others
    if differences:
        run_dir, longer = latest.folder.parents[1], ""
        asked = {line.partition(":")[0] for line in differences}
        if address is None and was not in EXTENDABLE and asked & {*length, "optim.schedule"}:
            longer = (
                f". With optim.schedule {was} every step depends on the length: train on from these weights "
                f"in a new run (--init_from {run_dir}), and with --optim.schedule wsd if that may become longer"
            )
        raise UserError(
            f"{place} holds a run with another definition ({'; '.join(differences)}): restore these keys to continue "
            f"it{_made_with(latest)}, or choose another {option}; nothing was changed{longer}"
        )


def refuse_other_options(config: RunOptions) -> None:
    """Raises UserError where the run in the config's folder has other options, as far as these tell without a model.

    `RunFolder.open` compares all that defines the run, and verifies what it reads.
    """
    for checkpoint in reversed(checkpoints(config.run_dir)):
        with suppress(OSError, ValueError):
            about = {**checkpoint.manifest, "config": config.model_dump(mode="json")}
            _check_same_run(checkpoint, about, config.may_change)
            return


def _made_with(checkpoint: Checkpoint) -> str:
    made, now = checkpoint.manifest.get("commit"), commit()
    return f" (it was saved by Relay's commit {made}, this is {now})" if made not in (None, now) else ""


def _carry_over(source: Path, run_dir: Path, newest: Checkpoint, data: Data) -> Checkpoint:
    """Copies what the run in `source` needs to go on in `run_dir`: metrics, sessions, checkpoints; source is only read.

    newest: its newest valid checkpoint. The copy of that is made last, and returned: a kill before leaves a folder that
    the same command fills again.
    """
    say(f"continuing the run in {source} at step {newest.step:,}: copying it to {run_dir}")
    with writing_to(run_dir, option="--run_dir"):
        for name in (CONFIG, METRICS, SESSIONS, WANDB_FILE, *data.kept, "wandb"):
            copy_tree(source / name, run_dir / name)
        for step in (kept_for_good(source) or set()) & {each.step for each in checkpoints(source)}:
            keep_for_good(run_dir, step)
        (run_dir / METRICS).touch()
        if record := read_record(run_dir, WANDB_FILE):  # other visits' files stay where they are
            write_atomically(run_dir / WANDB_FILE, json.dumps({**record, "folder": None}, indent=2) + "\n")
    for older in checkpoints(source):
        with suppress(FileNotFoundError):  # a run that still goes on removes older ones
            if older.step < newest.step and older.verify() is None:
                copy_checkpoint(older, run_dir)
    return copy_checkpoint(newest, run_dir)
