"""From a config file to the training that it is for: its script, its run, and its options as the script reads them.

Importing this costs no torch; `read_options` imports it.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.base.console import UserError
from training.base.files import open_plain
from training.base.options import meant_for, named_keys, parse, raw_values
from training.engine.status import read_config, read_status, saved_steps, write_status

if TYPE_CHECKING:
    from training.engine.task import RunOptions


_ROOT = Path(__file__).resolve().parents[1]


def peek(words: Sequence[str]) -> dict[str, str]:
    """Every text that the options `words` set, by its key, unchecked, without defaults, and without groups of keys.

    For what has to be known of a run before its script reads the options. Raises UserError where the config file cannot
    be read or a word has no place.
    """
    return {key: value for key, value in raw_values(words).items() if isinstance(value, str)}


def script_of(config: Path) -> str:
    """The module that trains by a config file, see `meant_for`.

    It is about to be run, and the config may be a stranger's: so it is one of Relay's, or one that somebody has put
    beside them. Raises UserError for any other, which has to be named by whoever starts it.
    """
    values: dict[str, Any] = {}
    with suppress(UserError):  # whoever reads all of it reports what is wrong with it
        values = raw_values([str(config)])
    script = meant_for(config, values)
    beside = any((folder / f"{script}.py").is_file() for folder in (_ROOT, Path.cwd()))
    if not re.fullmatch(r"training\.\w+", script) and not (re.fullmatch(r"\w+", script) and beside):
        raise UserError(
            f"{config} is for {script!r}, which is neither a training of Relay's nor a file in its folder: if you know "
            "what that is, name it by --script"
        )
    return script


def run_and_data(words: Sequence[str]) -> tuple[Path, Path]:
    """The run folder and the prepared data that the options `words` name. Raises UserError where one is missing."""
    said = peek(words)
    missing = [key for key in ("run_dir", "data") if key not in said]
    if missing:
        raise UserError(f"{words[0]} and the options do not say {' and '.join(missing)}")
    return Path(said["run_dir"]).expanduser(), Path(said["data"]).expanduser()


def micro_batches_of(options: RunOptions, words: Sequence[str], run_dir: Path | None = None) -> int:
    """Micro-batches of a step: as many as the run has chosen by its budget, else those of the options that `words` set.

    run_dir: where the run is, if not in the options' folder.
    """
    if options.budget is not None and "batch.micro_batches_per_step" not in named_keys(words):
        chosen = read_config(run_dir or options.run_dir) or {}
        with suppress(ValueError, KeyError, TypeError):
            if chosen["budget"] == options.model_dump(mode="json")["budget"]:
                return int(chosen["batch"]["micro_batches_per_step"])
    return options.batch.micro_batches_per_step


def last_step(run_dir: Path) -> int:
    """The step of a run's newest checkpoint, 0 without one."""
    return max(saved_steps(run_dir), default=0)


def is_held(run_dir: Path) -> bool:
    """Whether a session holds the run folder now; true where file locks cannot tell."""
    try:
        with open_plain(run_dir / "lock") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def note_killed(run_dir: Path, reason: str) -> None:
    """Writes into status.json why a session is over that could not do so itself: it would say `running` for good."""
    if (read_status(run_dir) or {}).get("status") == "running" and not is_held(run_dir):
        with suppress(OSError):
            write_status(run_dir, "resumable", reason, restart=True)


def digest_of(run_dir: Path) -> str:
    """Eight hexadecimal digits for a run folder's whole path: a name that lost some of the path is one run's with them.

    They are the same from whatever folder, and by whatever link, the run is named.
    """
    return hashlib.sha256(os.fsencode(run_dir.resolve())).hexdigest()[:8]


def job_name(run_dir: Path) -> str:
    """The name of a run's jobs, which no other run's have."""
    return f"{run_dir.resolve().name}-{digest_of(run_dir)}"


def read_options(script: str, words: Sequence[str]) -> RunOptions:
    """The options `words` as the module `script` reads them. Raises UserError with every mistake in them."""
    from training.engine.task import RunOptions

    try:
        found = vars(importlib.import_module(script)).values()
    except ModuleNotFoundError as error:
        if error.name is None or not script.startswith(error.name):
            raise  # the script is there, and something that it needs is not
        raise UserError(
            f"there is no training {script}, which is what the config's folder or its key `training` says: name one by "
            "--script, as in --script training.gpt"
        ) from None
    for each in found:
        if isinstance(each, type) and issubclass(each, RunOptions) and each.__module__ == script:
            return parse(each, words, prog=f"python -m {script}", about="")[0]
    raise UserError(f"{script} is no training: name one by --script, as in --script training.gpt")
