"""All runs of a folder on one page, runs/index.html, each by a small summary.json of its own.

Only a folder called `runs` gets one by itself, and a file of that name that is somebody else's is left alone.
`python -m training.report.overview FOLDER` makes one for any folder.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

from pydantic import ConfigDict, Field, TypeAdapter, with_config
from typing_extensions import TypedDict  # pydantic wants this one before Python 3.12

from training.base.console import UserError, run_main, say
from training.base.files import read_plain, write_atomically, writing_to
from training.base.options import CommandLine
from training.engine.status import Moment, Seconds, Steps
from training.report.curves import Point, sparkline, thinned
from training.report.templates import page
from training.report.training_history import scores_in

SUMMARY, INDEX = "summary.json", "index.html"
_MARK, _HEAD = b"<!-- all runs of a folder -->", 200  # stands within the first bytes of the page
_EVERY_S = 60
_MOST_BYTES = 1 << 16  # of a summary
_POINTS = 60
_MOST_COLUMNS, _MOST_RUNS = 24, 2000


Text = Annotated[str, Field(max_length=2000)]
Loss = Annotated[float, Field(ge=-1e100, le=1e100)]
Place = Annotated[float, Field(ge=0, lt=1 << 53)]  # a step
Points = Annotated[list[tuple[Place, Loss]], Field(max_length=200)]


@with_config(ConfigDict(allow_inf_nan=False))
class Summary(TypedDict):
    """What the page shows of a run. at: its last sign of life, and silent_s: see `training.report.training_history`."""

    task: Text
    status: Text
    words: Text
    step: Steps
    steps: Steps
    best: Text
    scores: Annotated[dict[Annotated[str, Field(max_length=40)], float], Field(max_length=21)]  # of the last validation
    goodput: float | None
    at: Moment
    silent_s: Seconds
    train: Points  # losses
    validation: Points


_SUMMARY = TypeAdapter(Summary)


def write_summary(run_dir: Path, record: Mapping[str, Any]) -> None:
    """Writes summary.json, from a `run_record`. Raises OSError where it cannot be written."""
    status, metrics, standing = record["status"], record["metrics"], record["standing"]
    if "steps" not in status or record["config"].get("private"):
        return

    def losses(kind: str) -> list[Point]:
        points = [(line["step"], line["loss"]) for line in metrics if line["kind"] == kind and line["loss"] is not None]
        return thinned(points, _POINTS / 2 / max(1, status["steps"]), few=_POINTS)

    last: dict[str, Any] = next((line for line in reversed(metrics) if line["kind"] == "validation"), {})
    summary: Summary = {
        "task": record["checkpoint"].get("task", ""),
        **{key: standing[key] for key in ("words", "step", "best", "at", "silent_s")},  # type: ignore[typeddict-item]
        "status": status["status"],
        "steps": status["steps"],
        "scores": {name: last[name] for name in ("loss", *scores_in(metrics)) if last.get(name) is not None},
        "goodput": status.get("goodput"),
        "train": losses("train"),
        "validation": losses("validation"),
    }
    write_atomically(run_dir / SUMMARY, _SUMMARY.dump_json(summary).decode() + "\n")


def write_index(run_dir: Path, *, at_once: bool) -> None:
    """Makes the index of all runs beside one, if they are to have it and the last is not a minute old.

    at_once: even if it is. Raises OSError where it cannot be written.
    """
    place = run_dir.resolve()
    path = place.parent / INDEX
    if place.parent.name != "runs" or not (place / SUMMARY).is_file():
        return
    if os.path.lexists(path):
        is_new = abs(time.time() - os.lstat(path).st_mtime) < _EVERY_S
        if (is_new and not at_once) or is_anothers(path):
            return
    readers = os.lstat(place / SUMMARY).st_mode & 0o044  # who may read this page, too
    # Other runs may be writing it, too.
    write_atomically(path, render(place.parent.name, summaries(place.parent, readers)), within=place)


def is_anothers(path: Path) -> bool:
    """Whether a page that is there was not made here."""
    return _MARK not in read_plain(path)[:_HEAD]


def summaries(folder: Path, readers: int = 0) -> dict[str, Summary]:
    """The summaries of all runs in a folder, by name; what is not one is left out.

    readers: bits of a mode; what not all of these may read is left out, too, as a private run.
    """
    found: dict[str, Summary] = {}
    for each in sorted(folder.iterdir()):
        with suppress(OSError, ValueError):
            is_open = all(os.lstat(place).st_mode & readers == readers for place in (each, each / SUMMARY))
            if is_open and not each.is_symlink() and len(found) < _MOST_RUNS:
                found[each.name] = _SUMMARY.validate_json(read_plain(each / SUMMARY, _MOST_BYTES))
    return found


def render(title: str, runs: Mapping[str, Summary]) -> str:
    """The page of these runs, the one that was heard of last first. Curves of one task have the same axes."""
    order = sorted(runs, key=lambda name: (-runs[name]["at"], name))
    names = list(dict.fromkeys(name for each in runs.values() for name in each["scores"]))[:_MOST_COLUMNS]
    axes = {
        task: _axes([each for each in runs.values() if each["task"] == task])
        for task in {each["task"] for each in runs.values()}
    }
    rows = [
        {
            **runs[name],
            "name": name,
            "href": f"{quote(os.fsencode(name))}/report.html",
            "progress": runs[name]["step"] / max(1, runs[name]["steps"]),
            "curve": _curve(runs[name], axes[runs[name]["task"]]),
        }
        for name in order
    ]
    html = page("overview.html", {"title": title, "rows": rows, "names": names, "script": "overview.js"})
    return f"{_MARK.decode()}\n{html}"


def _axes(alike: Sequence[Summary]) -> tuple[int, float, float] | None:
    """The last step, the lowest and the highest loss that curves of these runs show; None where there is no loss."""
    # A loss begins high, and soon all runs are in the lower part: the highest validation is the top.
    values = [value for each in alike for _, value in (each["validation"] or each["train"])]
    return (max(each["steps"] for each in alike), min(values), max(values)) if values else None


def _curve(run: Summary, axes: tuple[int, float, float] | None) -> str:
    if axes is None:
        return ""
    return sparkline([run["train"], run["validation"]], *axes, about="losses over steps")


def main(argv: Sequence[str] | None = None) -> int:
    parser = CommandLine("python -m training.report.overview", "Makes index.html, a page of all runs in a folder.")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="for example runs")
    folder = parser.parse_args(argv).folder
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    path = folder / INDEX
    with writing_to(folder, option="FOLDER"):
        if os.path.lexists(path) and is_anothers(path):
            raise UserError(f"{path} is another page: move it away first")
        found = summaries(folder)
        write_atomically(path, render(folder.resolve().name, found))
    say(f"{len(found)} runs: {path}")
    return 0


if __name__ == "__main__":
    run_main(main)
