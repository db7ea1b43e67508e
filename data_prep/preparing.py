"""The output of a preparing command: what may stand there already, and when it may be replaced.

An output that other options or another source made is never replaced unasked, and a folder that holds anything else is
never touched.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from training.base.console import UserError, say, warn
from training.base.files import recover
from training.base.options import Options
from training.data.prepared import META, PARTS, PreparedFolder

OUR_NAMES = {*PARTS, "tokenizer", META}

Opened = TypeVar("Opened", bound=PreparedFolder)


def output_folder(chosen: Path, *, example: str) -> Path:
    """The folder to make for `--output`. Raises UserError when no folder can have that name."""
    # Of a link to a folder, the folder is replaced, not the link.
    output = chosen.resolve() if chosen.is_symlink() else chosen
    if output.name in ("", "..") or output.is_file():
        raise UserError(f"--output {output} is not the name of a folder to make; choose one, for example {example}")
    return output


def bring_back(output: Path) -> None:
    """Ends a replacement of `output` that was killed halfway, and says so."""
    if recover(output):
        say(f"an earlier replacement of {output} was interrupted; the previous data set is back")


def existing_output(output: Path, overwrite: bool, opened: Callable[[Path], Opened], *, example: str) -> Opened | None:
    """The prepared data set that is at `output` already; None if there is nothing, or nothing that must be kept.

    Raises UserError if `output` is damaged and may not be overwritten, or is something else, which no option replaces.
    """
    if not output.exists():
        return None
    names = {path.name for path in output.iterdir()}
    if not names <= OUR_NAMES:
        raise UserError(
            f"--output {output} holds other things ({', '.join(sorted(names - OUR_NAMES)[:3])}); choose a new folder, "
            f"for example {output / example}"
        )
    if META not in names:  # it is written last: a copy that did not get to its end
        if names:
            warn(f"{output} is only part of a prepared data set and is prepared again")
        return None
    try:
        existing = opened(output)
        existing.verify()
    except UserError:
        if overwrite:
            return None
        raise
    return existing


def refuse_to_replace(output: Path, differences: list[str]) -> None:
    """Raises the UserError that names what `output` was made with and is not asked for now."""
    raise UserError(
        f"{output} was prepared differently ({'; '.join(differences)}); choose another --output, or replace it "
        "with --overwrite"
    )


def already(existing: PreparedFolder) -> int:
    """Says that there is nothing to do; the command's exit status."""
    say(f"{existing.folder} is already prepared with these options from this source; nothing to do")
    return 0


def resolved(options: Options) -> str:
    """The options in force, one a line."""
    return "\n".join(f"  {key}: {value}" for key, value in options.model_dump(mode="json").items())
