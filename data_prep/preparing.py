"""The output of a preparing command: what may stand there already, and when it may be replaced.

An output that was made with other options or from another source is never replaced unasked, and a folder that holds
anything else is never touched.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from training.base.console import UserError, say, warn
from training.base.files import recover, write_atomically
from training.data.prepared import META, PARTS, PreparedFolder

OUR_NAMES = {*PARTS, "tokenizer", META}
LISTED_MALFORMED = 100  # lines that meta.json lists, of those that cannot be read
NAMED_MALFORMED = 3  # of them, those that the report names

# How many of them are left out where nobody says: such a share, and in a small source so many, up to a tenth of it.
_MALFORMED_SHARE, _FEW_MALFORMED = 0.01, 10

MOST_MALFORMED = f"null: {_MALFORMED_SHARE}, or in a small source {_FEW_MALFORMED} lines, up to a tenth of it"

# By fewer rows than these no checkpoint is told from the next.
_FEW_TO_VALIDATE = 10

Opened = TypeVar("Opened", bound=PreparedFolder)


def claim_output(
    chosen: Path, dry_run: bool, overwrite: bool, opened: Callable[[Path], Opened], *, example: str
) -> tuple[Path, Opened | None]:
    """The folder to make for `--output`, and the prepared data set that must be kept there, if there is one.

    A replacement of it that was killed halfway is undone first, unless this is a dry run. Raises UserError if no folder
    can have that name, or if it holds something else, which no option replaces, or a damaged data set without
    `overwrite`.
    """
    # Of a link to a folder, the folder is replaced, not the link.
    output = chosen.resolve() if chosen.is_symlink() else chosen
    if output.name in ("", "..") or output.is_file():
        raise UserError(
            f"--output {output} is not the name of a folder to make; choose one, for example prepared/{example}"
        )
    if not dry_run and recover(output):
        say(f"an earlier replacement of {output} was interrupted; the previous data set is back")
    names = {path.name for path in output.iterdir()} if output.exists() else set()
    if not names <= OUR_NAMES:
        raise UserError(
            f"--output {output} holds other things ({', '.join(sorted(names - OUR_NAMES)[:3])}); choose a new folder, "
            f"for example {output / example}"
        )
    if META not in names:  # it is written last: a copy that did not get to its end
        if names:
            warn(f"{output} is only part of a prepared data set and is prepared again")
        return output, None
    try:
        existing = opened(output)
        existing.verify()
    except UserError:
        if overwrite:
            return output, None
        raise
    return output, existing


def refuse_prepared(source: Path) -> None:
    """Raises UserError where a source is a folder that such a command has made."""
    if (source / META).is_file() and all((source / part).is_dir() for part in PARTS):
        raise UserError(
            f"--source {source} is prepared already: a training takes it as it is, --data {source}; what it was made "
            f"from stands in its {META}"
        )


def is_done(existing: PreparedFolder, differences: list[str], overwrite: bool) -> bool:
    """Whether `existing` is what is asked for, which is then said.

    differences: what it was made with and is not asked for now. Raises UserError if it may not be replaced.
    """
    if not differences:
        say(f"{existing.folder} is already prepared with these options from this source; nothing to do")
    elif not overwrite:
        raise UserError(
            f"{existing.folder} was prepared differently ({'; '.join(differences)}); choose another --output, or "
            "replace it with --overwrite"
        )
    return not differences


def too_many_malformed(malformed: int, lines: int, most_share: float | None) -> str | None:
    """Why so many of so many lines cannot be left out, in words; None where they can. most_share: None: by `lines`."""
    most = max(_MALFORMED_SHARE * lines, min(_FEW_MALFORMED, lines / 10)) if most_share is None else most_share * lines
    if malformed <= most:
        return None
    if most_share is None:
        return f"more than the {int(most):,} that are left out without --max_malformed_share"
    return f"more than --max_malformed_share {most_share}"


def warn_of_few(rows: Mapping[str, int], option: str = "--validation_share") -> None:
    """Warns where the validation part, of so many rows, says little. rows: of each part; option: what gave it."""
    if rows["validation"] < _FEW_TO_VALIDATE:
        warn(
            f"validation has {rows['validation']:,} rows, by which the best checkpoint can hardly be told: pass more "
            f"data, or a larger {option}"
        )


def say_malformed(counts: dict[str, Any]) -> None:
    """How many lines could not be read, if there are any, and the first of them."""
    if counts["malformed"]:
        first = counts["malformed_listed"][:NAMED_MALFORMED]
        named = [f"{line['file']} line {line['line']}: {line['reason']}" for line in first]
        if counts["malformed"] > len(first):
            named.append("...")
        say(f"  malformed {counts['malformed']:,} lines were left out, and meta.json lists them: {'; '.join(named)}")


def sha256_of_json(value: object) -> str:
    """SHA-256 of what JSON makes of `value`, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def versions(*names: str) -> dict[str, str]:
    """The versions of these packages, and of Python."""
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def write_meta(folder: Path, meta: dict[str, Any]) -> None:
    """Writes meta.json, the last file of `folder`."""
    write_atomically(folder / META, json.dumps(meta, indent=2, ensure_ascii=False) + "\n")
