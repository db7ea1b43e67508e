"""A run made longer: it goes back to where the longer one is still the same, after what it was is set aside.

    runs/gpt          the run, back at the checkpoint of step 200, say, on its way to step 600
    runs/gpt-at-300   what it was: a run folder like any other, with its evaluations

A kill at any moment leaves a folder that the same command goes on with: what is set aside appears whole or not at all,
and the newest checkpoint is the last to go.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
from contextlib import suppress
from glob import escape
from itertools import chain, count
from pathlib import Path
from typing import cast

from training.base.console import UserError, say
from training.base.files import (
    copy_plain,
    copy_tree,
    is_own_folder,
    publish_folder,
    read_plain,
    remove,
    temporary_folder,
    write_atomically,
    writing_to,
)
from training.engine.checkpoint import MANIFEST, Checkpoint, checkpoints, kept_for_good
from training.engine.metrics import lines_up_to, read_metrics, write_lines
from training.engine.status import KEPT, STOP_FILE, WandbRecord, write_status
from training.engine.wandb.options import read_wandb_record, write_wandb_record

# What only a run that goes on has, or is set aside in a way of its own; and what tells of the run that it was.
_NOT_SET_ASIDE = {"lock", STOP_FILE, "slurm.jsonl", "hang", "checkpoints"}
_OF_THE_WHOLE = ("evaluation", "report.html", "summary.json", "wandb")


def go_back(run_dir: Path, latest: Checkpoint, step: int) -> Checkpoint:
    """Takes a run back from `latest` to its newest valid checkpoint of `step` or before, which is returned.

    What it was is in a folder of its own then. Raises UserError where there is no such checkpoint, or no room.
    """
    earlier = [each for each in reversed(checkpoints(run_dir)) if each.step <= step]
    target = next((each for each in earlier if each.verify() is None), None)
    if target is None:
        raise UserError(
            f"{run_dir} has no valid checkpoint of step {step:,} or before, from which a run of another length could "
            "go on: begin a new run from its weights (--init_from), or give its length back to it"
        )
    aside = set_aside(run_dir, latest)
    say(f"{run_dir} goes back to step {target.step:,} to become a run of another length; what it was is in {aside}")
    leave_record(run_dir, target)
    for name in _OF_THE_WHOLE:
        remove(run_dir / name)
    if kept := kept_for_good(run_dir):
        write_atomically(run_dir / KEPT, json.dumps(sorted(each for each in kept if each <= target.step)) + "\n")
    write_status(run_dir, "resumable", f"goes on from step {target.step:,}", restart=True, step=target.step)
    for later in checkpoints(run_dir):
        if later.step > target.step:
            later.remove()
    return target


def leave_record(run_dir: Path, target: Checkpoint) -> None:
    """Cuts the record back to a checkpoint, behind which the run becomes another one.

    In wandb it is a run of its own from here on, in the same group, since wandb takes no step twice; it gets the
    history up to here anew.
    """
    known, state = read_wandb_record(run_dir), target.state()
    if known or state["wandb_id"] is not None:
        known.pop("arrived", None)
        name = known.get("name", run_dir.resolve().name).removesuffix(f" from {target.step}")  # a kill came before
        group = known.get("group") or name
        known |= {"id": secrets.token_hex(4), "name": f"{name} from {target.step}", "group": group}
        write_wandb_record(run_dir, cast(WandbRecord, known))
    write_lines(run_dir, lines_up_to(read_metrics(run_dir), target.step, state["validated_step"]))


def remove_unfinished(run_dir: Path) -> None:
    """Removes what a kill in `go_back` has left. To be called by the process that holds the run folder."""
    place = run_dir.resolve()
    for path in place.parent.glob(f".{escape(place.name)}-at-*.partial"):
        if set_aside_from(path.with_name(path.name[1:].removesuffix(".partial"))) == place:
            remove(path)


def set_aside_from(folder: Path) -> Path | None:
    """The run folder of which this one is what it was before; None where its name does not say so."""
    found = re.fullmatch(r"(.+)-at-\d+(-\d+)?", folder.name)
    return folder.with_name(found[1]) if found else None


def set_aside(run_dir: Path, latest: Checkpoint) -> Path:
    """Copies the run, checkpoints as hard links where the file system has them, to a folder beside it."""
    place, manifest = run_dir.resolve(), read_plain(latest.folder / MANIFEST)
    first = f"{place.name}-at-{latest.step}"
    for name in chain([first], (f"{first}-{number}" for number in count(2))):
        aside = place.with_name(name)
        if not os.path.lexists(aside):
            break
        with suppress(OSError):  # not the same: another run's folder, or an earlier one's
            there = Checkpoint(aside / "checkpoints" / latest.folder.name)
            if is_own_folder(aside) and read_plain(there.folder / MANIFEST) == manifest and there.verify() is None:
                return aside
    with writing_to(aside, option="--run_dir"), temporary_folder(aside) as folder:
        for each in place.iterdir():
            if each.name not in _NOT_SET_ASIDE:
                copy_tree(each, folder / each.name, hidden=False)
        (folder / "checkpoints").mkdir()
        for each in (place / "checkpoints").iterdir():  # which may be a link itself, to a larger disk
            copy_tree(each, folder / "checkpoints" / each.name, link_or_copy, hidden=False)
        publish_folder(folder, aside)
    return aside


def link_or_copy(source: Path, target: Path) -> None:
    """A checkpoint's file: it never changes, so two names may stand for it."""
    try:
        target.hardlink_to(source)
    except OSError as error:  # no links on this file system, or none to another user's file
        if error.errno not in (errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.EXDEV, errno.EMLINK, errno.ENOSYS):
            raise
        copy_plain(source, target)
