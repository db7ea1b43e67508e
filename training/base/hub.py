"""Files of the Hugging Face hub: fetched once per node, found again without a network.

Promises: one process of a node fetches, the others wait; without a network the answer comes within seconds and says how
to get the files by hand; what is complete on this machine is used without asking anybody.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from training.base.console import UserError, say
from training.base.files import lock

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

    cache = Path(hub.constants.HF_HUB_CACHE)
    by_hand = f"hf download {name}" + (" --repo-type dataset" if kind == "dataset" else "")
    by_hand += f" --revision {revision}" if revision else ""

    which = {"repo_type": kind, "revision": revision, "allow_patterns": list(patterns)}

    def cached() -> Path | None:
        try:
            folder = Path(hub.snapshot_download(name, local_files_only=True, **which))
        except hub.errors.LocalEntryNotFoundError:
            return None
        return folder if is_complete(folder) else None

    found = cached()
    if found is not None:
        return found
    if hub.constants.HF_HUB_OFFLINE:
        raise UserError(
            f"{name} is no folder here and not in {cache}, and HF_HUB_OFFLINE forbids to fetch it: on a machine with a "
            f"network run `{by_hand} --local-dir FOLDER`, copy the folder here, and name it instead"
        )
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f".relay-{kind}-{name.replace('/', '--')}.lock").open("w") as file:
        lock(file, wait=True)  # the first one fetches, the others find it done
        found = cached()
        if found is not None:
            return found
        _check_network(name, by_hand, hub.constants.ENDPOINT)
        say(f"fetching {name} ({revision or 'newest revision'}) from {hub.constants.ENDPOINT}")
        try:
            folder = Path(hub.snapshot_download(name, **which))
        except Exception as error:  # a connection that breaks comes out as whatever the library at work raises
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise UserError(
                f"{name} could not be fetched ({reason}); what has arrived is kept, the same command goes on. By hand: "
                f"`{by_hand} --local-dir FOLDER`, and name the folder instead"
            ) from None
    if not is_complete(folder):
        raise UserError(f"{name} has not all the files that are needed ({', '.join(patterns)}); is the name right?")
    return folder


def _check_network(name: str, by_hand: str, endpoint: str) -> None:
    parts = urlsplit(os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy") or endpoint)
    address = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection(address, _CONNECT_LIMIT_S).close()
    except OSError as error:
        raise UserError(
            f"{name} is no folder here, and {address[0]} cannot be reached ({error}): on a machine with a network "
            f"run `{by_hand} --local-dir FOLDER`, copy the folder here, and name it instead"
        ) from None
