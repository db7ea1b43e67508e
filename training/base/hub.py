"""Files of the Hugging Face hub: fetched once per node, found again without a network.

Promises: one process of a node fetches while the others wait; without a network the answer comes within seconds and
says how to get the files by hand; what is complete on this machine is used without asking anybody.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from training.base.console import UserError, say
from training.base.files import dangling, lock, nearest_folder, open_in_place
from training.base.network import why_unreachable

_CONNECT_LIMIT_S = 5.0  # the library itself would try for most of a minute


def fetch_snapshot(
    name: str,
    *,
    revision: str | None,
    patterns: Sequence[str],
    is_complete: Callable[[Path], bool],
    kind: Literal["model", "dataset"] = "model",
) -> Path:
    """The folder with the files of the repository `name` that match `patterns`, in the hub's cache on this machine.

    is_complete(folder): whether a folder in the cache has all of it; one that a killed process left half filled must
    not pass. Raises UserError where the files cannot be had.
    """
    import huggingface_hub as hub
    import huggingface_hub.constants
    import huggingface_hub.errors  # neither module is there before someone has imported it

    cache, endpoint = Path(hub.constants.HF_HUB_CACHE), hub.constants.ENDPOINT
    by_hand = _by_hand(name, revision, kind)
    elsewhere = f"on a machine with a network run `{by_hand}`, copy the folder here, and name it instead"

    def snapshot(*, only_cached: bool) -> Path:
        folder = hub.snapshot_download(
            name, revision=revision, repo_type=kind, allow_patterns=list(patterns), local_files_only=only_cached
        )
        return Path(folder)

    def cached() -> Path | None:
        try:
            folder = snapshot(only_cached=True)
        except hub.errors.LocalEntryNotFoundError:
            return None
        return folder if is_complete(folder) else None

    if found := cached():
        return found
    near = nearest_folder(Path(name))
    if hub.constants.HF_HUB_OFFLINE:
        raise UserError(f"{name} is no folder here{near} and not in {cache}, and HF_HUB_OFFLINE is set: {elsewhere}")
    cache.mkdir(parents=True, exist_ok=True)
    with open_in_place(cache / f".relay-{kind}-{name.replace('/', '--')}.lock") as file:
        lock(file, wait=True)
        if found := cached():  # by the process that had the lock before
            return found
        obstacle = why_unreachable(endpoint, _CONNECT_LIMIT_S)
        if obstacle is not None:
            raise UserError(
                f"{name} is no folder here{near}, and {endpoint} cannot be reached ({obstacle}): {elsewhere}"
            )
        say(f"fetching {name} ({revision or 'newest revision'}) from {endpoint}")
        try:
            folder = snapshot(only_cached=False)
        except Exception as error:  # a connection that breaks comes out as whatever the library at work raises
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise UserError(
                f"{name} is no folder here{near} and could not be fetched ({reason}); what has arrived is kept, "
                f"and the same command goes on. By hand: `{by_hand}`, and name the folder instead"
            ) from None
    if not is_complete(folder):
        raise UserError(f"{name} has not all the files that are needed ({', '.join(patterns)}); is the name right?")
    return folder


def is_hub_name(name: str) -> bool:
    """Whether this could be the name of a repository, and is no folder that is missing here."""
    return re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) is not None and dangling(Path(name)) is None


def commit_of(folder: Path) -> str | None:
    """The commit that a folder of `fetch_snapshot` holds; None for another folder."""
    return folder.name if folder.parent.name == "snapshots" else None


def _by_hand(name: str, revision: str | None, kind: str) -> str:
    words = ["hf", "download", name, "--local-dir", "FOLDER"]
    words += ["--repo-type", kind] if kind != "model" else []
    words += ["--revision", revision] if revision else []
    return shlex.join(words)
