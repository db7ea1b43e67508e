"""A cloud's word that it is about to take its machine back: a reason to stop in time.

AWS (spot/instance-action), Google (instance/preempted) and Azure (scheduledevents) tell it to whoever asks a server
that only their machines can reach. It is asked once who it is, and where none answers, never again. Everything happens
in a thread, so that no step waits for it.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from contextlib import suppress
from http.client import HTTPConnection, HTTPException

from training.base.environment import job_id, kaggle_run_type

# The same address in each of the three clouds, and in no other network.
_ADDRESS = ("169.254.169.254", 80)

_PROBE_S = 0.3  # for the first answer
_ANSWER_S = 10.0  # for any other
_ASK_EVERY_S = 5.0  # Google and Azure leave 30 seconds, AWS two minutes

# What Azure announces of a machine that then is gone, or begins anew.
_AZURES = {"Preempt", "Terminate", "Reboot", "Redeploy"}

Ask = Callable[[], str | None]


class Notices:
    """Asks for as long as the process runs. Under SLURM and on Kaggle, which stop a session by themselves, never."""

    def __init__(self) -> None:
        self.found: str | None = None  # what has been announced
        if job_id() is None and kaggle_run_type() is None:
            threading.Thread(target=self._watch, name="notices", daemon=True).start()

    def _watch(self) -> None:
        asked = _cloud()
        pause = threading.Event()
        while asked is not None and self.found is None:
            with suppress(OSError, HTTPException, ValueError, KeyError, TypeError, AttributeError):  # at the next time
                self.found = asked()
            pause.wait(_ASK_EVERY_S)


def _cloud() -> Ask | None:
    """How to ask the cloud that this machine is in; None where no cloud answers."""
    for cloud in (_aws, _google, _azure):
        try:
            if (ask := cloud()) is not None:
                return ask
        except OSError:  # nobody is there, so nobody else is either
            return None
        except (HTTPException, ValueError, KeyError, TypeError):
            pass
    return None


def _aws() -> Ask | None:
    def token(limit_s: float) -> str | None:
        return _fetch("PUT", "/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"}, limit_s)

    def ask() -> str | None:
        known = token(_ANSWER_S)
        said = _fetch("GET", "/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": known or ""})
        return f"AWS ({json.loads(said)['action']})" if said else None  # 404 until there is one

    return ask if token(_PROBE_S) else None


def _google() -> Ask | None:
    def ask(limit_s: float = _ANSWER_S) -> str | None:
        path = "/computeMetadata/v1/instance/preempted"
        return _fetch("GET", path, {"Metadata-Flavor": "Google"}, limit_s)

    return (lambda: "Google (preempted)" if ask() == "TRUE" else None) if ask(_PROBE_S) in ("TRUE", "FALSE") else None


def _azure() -> Ask | None:
    path = "/metadata/instance/compute/name?api-version=2021-02-01&format=text"
    name = _fetch("GET", path, {"Metadata": "true"}, _PROBE_S)

    def ask() -> str | None:
        said = _fetch("GET", "/metadata/scheduledevents?api-version=2020-07-01", {"Metadata": "true"})
        for event in json.loads(said)["Events"] if said else ():
            if event["EventType"] in _AZURES and name in event["Resources"]:  # others of its group are told of, too
                return f"Azure ({event['EventType']})"
        return None

    return ask if name else None


def _fetch(method: str, path: str, headers: dict[str, str], limit_s: float = _ANSWER_S) -> str | None:
    """What the server answers; None where it knows of nothing. Never by a proxy."""
    connection = HTTPConnection(*_ADDRESS, timeout=limit_s)
    try:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        content = answer.read(1 << 20).decode("utf-8", "replace").strip()
        return content if answer.status == 200 else None
    finally:
        connection.close()
