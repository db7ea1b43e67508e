"""A run's report.html, made of what lies in its folder: how it stands and went, and its newest evaluation.

The training makes it anew while it goes on, an evaluation at its end. Other people's runs are read with the same care
as everywhere: what cannot be shown of an evaluation is left out.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ConfigDict, TypeAdapter, with_config
from typing_extensions import TypedDict  # pydantic wants this one before Python 3.12

from training.base.files import one_at_a_time, read_plain, write_atomically, writing_to
from training.base.strict_yaml import read_yaml
from training.engine.checkpoint import checkpoints
from training.engine.metrics import read_metrics
from training.engine.status import read_sessions, read_status
from training.report.overview import write_index, write_summary
from training.report.sheets import Sheet
from training.report.templates import page
from training.report.training_history import history, standing

REPORT = "report.html"
_ENDING = ".page"  # of evaluation/LABEL.page
_OF_EVALUATION = {"checkpoint", "versions"}


@with_config(ConfigDict(ser_json_inf_nan="constants"))
class Evaluated(TypedDict):
    """What the report shows of an evaluation: the template for it, and what that asks for beside a `run_record`."""

    template: Literal["translations", "answers"]
    content: dict[str, Any]


_EVALUATED = TypeAdapter(Evaluated)
_SHEETS = TypeAdapter(list[tuple[str, Sheet]])


def show(run_dir: Path) -> None:
    """Makes report.html anew, and of all runs in a folder that is called `runs` its index.html.

    Raises OSError where the report cannot be written; of the index nobody has to care.
    """
    record = write_page(run_dir)
    with suppress(OSError, ValueError):
        write_summary(run_dir, record)
        write_index(run_dir, at_once=not record["standing"]["running"])


def run_record(run_dir: Path) -> dict[str, Any]:
    """What every page about a run is made of, as the run's folder has it now.

    name: the folder's. checkpoint: the manifest of the newest checkpoint; {} before there is one. config: the run's.
    save_every: see `checkpoint.every_steps`; None where it is not known. metrics: lines of metrics.jsonl. sessions,
    status: as their files have them. versions: with which it is trained. standing: how it stands.
    """
    manifest: dict[str, Any] = {}
    save_every = None
    for checkpoint in reversed(checkpoints(run_dir)):
        with suppress(OSError, ValueError):
            manifest, measured = checkpoint.manifest, checkpoint.state().get("measured_interval")
            every = manifest["config"]["checkpoint"]["every_steps"]
            save_every = every if every != "auto" else measured["steps"] if measured else None
            break
    record = {
        "name": run_dir.resolve().name,
        "checkpoint": manifest,
        "config": manifest.get("config") or _config(run_dir),
        "save_every": save_every,
        "metrics": read_metrics(run_dir),
        "sessions": read_sessions(run_dir),
        "status": read_status(run_dir) or {},
        "versions": {f"{name}, training": found for name, found in manifest.get("versions", {}).items()},
    }
    return {**record, "standing": standing(record)}


def _config(run_dir: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError, yaml.YAMLError):
        found = read_yaml(read_plain(run_dir / "config.yaml").decode())
        if isinstance(found, dict):
            return {**found, "session": None}  # with a command of the user's
    return {}


@contextmanager
def evaluation_folder(run_dir: Path) -> Iterator[Path]:
    """runs/NAME/evaluation, made if it is not there, to write to; an evaluation that ends meanwhile waits.

    Raises UserError where it cannot be written.
    """
    folder = run_dir / "evaluation"
    with writing_to(run_dir, option="RUN"):
        folder.mkdir(exist_ok=True)
        with one_at_a_time(folder):
            yield folder


def write_evaluated(folder: Path, label: str, evaluated: Evaluated) -> None:
    """Leaves in runs/NAME/evaluation/ what the report is to show of an evaluation."""
    write_atomically(folder / f"{label}{_ENDING}", _EVALUATED.dump_json(evaluated).decode() + "\n")


def write_page(run_dir: Path, within: Path | None = None) -> dict[str, Any]:
    """Makes report.html anew, whole or not at all; returns the `run_record`. Raises OSError if it cannot be written.

    within: see `write_atomically`; for whoever does not hold the run.
    """
    record = run_record(run_dir)
    evaluated = _newest_evaluated(run_dir)
    html = None
    if evaluated is not None:
        # It may be a stranger's, or another version's.
        with suppress(Exception):
            # It may be of an earlier checkpoint; how the run stands it does not know.
            own = {
                key: value for key, value in evaluated["content"].items() if key in _OF_EVALUATION or key not in record
            }
            html = render(evaluated["template"], {**record, **own})
    write_atomically(run_dir / REPORT, html or render("run", record), within)
    return record


def render(template: str, record: Mapping[str, Any]) -> str:
    """The page that `template` makes of a `run_record`, and of the content of an evaluation where it is one's."""
    attention = [(caption, sheet.svg()) for caption, sheet in _SHEETS.validate_python(record.get("attention", []))]
    return page(f"{template}.html", {**record, **history(record), "attention": attention})


def _newest_evaluated(run_dir: Path) -> Evaluated | None:
    with suppress(OSError):
        found = sorted((run_dir / "evaluation").glob(f"*{_ENDING}"), key=lambda path: (os.lstat(path).st_mtime, path))
        for path in reversed(found):
            with suppress(OSError, ValueError):
                return _EVALUATED.validate_json(read_plain(path))
    return None
