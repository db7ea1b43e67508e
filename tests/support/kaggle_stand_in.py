"""A stand-in for the `kaggle` command and for Kaggle behind it, with its state in a folder and simulated kernel runs.

From the published command (2.2.5, its documentation and source, and what it printed against a small local server): the
sub-commands and options that the relay uses; what they print, and on which stream; that a refused push ends with status
0 and an HTTP error with 1, its message followed by a hint; the states of a kernel run; OWNER/KERNEL/VERSION, and that
no such version is a 404; `--file-pattern` as a regular expression searched in a file's path, the log always beside it;
the JSON of `quota` and of `datasets status`; the file of `datasets metadata`, which says `isPrivate` only where that is
true; that a new dataset is private without `--public`, and stays as it is in a new version; the help without a token.
Reported by users, not documented: "Maximum batch GPU session count of 2 reached.", "Maximum weekly GPU quota of 30.00
hours reached.", and that the output of a kernel that failed is "not valid kernel sources" while the next one starts all
the same.
Assumed: the words for an account without a verified phone number; that the newest version's output is what a kernel
source gives; that a kernel which runs when the quota ends may go on.

A kernel run gets on by being looked at, so that tests do not depend on how fast the machine is. `settings.json` says
for how many looks it is queued and runs, what becomes of each one, and which commands fail or kill their caller. It
imports nothing but the standard library: it is started often.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

OWNER = "tester"
TOKEN = "KGAT_0f1e2d3c4b5a69788796a5b4c3d2e1f0"
DEFAULTS: dict[str, Any] = {
    "version": "2.2.5",
    "queued_looks": 1,
    "running_looks": 1,
    "steps": 900,
    "steps_per_kernel_run": 300,
    # Of the first kernel runs, each {"state", "steps", "restart", "status", "reason", "detached"}, all optional;
    # detached: without the outputs that it was to have as inputs.
    "outcomes": [],
    "hours_per_kernel_run": 0.0,
    "quota_h": 30.0,
    "renewed_in": None,  # seconds after the first push that it refuses; from then on nothing of it is used
    "refusal": None,  # of every push, in Kaggle's words
    "busy": 0,  # other kernels that the account runs
    # {"command", "how": "429" | "500" | "network" | "lost" | "not_arrived" | "broken" | "late", "times"}. After lost,
    # broken and late it was done; late: nobody sees it before the next push.
    "faults": [],
    "knows_versions": True,  # false: answers about the newest one, whichever was asked for
    "kills": [],  # {"command", "when": "before" | "after" | "instead"}: the caller is killed
}

NETWORK = (
    "ConnectionError: HTTPSConnectionPool(host='api.kaggle.com', port=443): Max retries exceeded with url: "
    "/v1/{command} (headers: Authorization: Bearer {token}) (Caused by NewConnectionError('Connection {what}'))\n"
    "\nIf this is unexpected, you can re-run with `kaggle --debug [command]` to see the full\ntraceback."
)


class Site:
    """Kaggle, as the folder has it: {"kernels": {name: [version, ...]}, "datasets": ..., "overlaps": [...]}."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.path = folder / "site.json"
        self.settings: dict[str, Any] = {**DEFAULTS, **json.loads((folder / "settings.json").read_text())}
        empty: dict[str, Any] = {"kernels": {}, "datasets": {}, "overlaps": [], "used": {}}
        self.state: dict[str, Any] = json.loads(self.path.read_text()) if self.path.exists() else empty

    def write(self) -> None:
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.state, indent=1))
        partial.replace(self.path)

    def use(self, kind: str, entry: int, times: int) -> bool:
        """Whether an entry of `faults` or `kills` is not used up yet; uses it once."""
        used = self.state["used"].get(f"{kind}{entry}", 0)
        self.state["used"][f"{kind}{entry}"] = used + 1
        return used < times

    # Kernel runs.

    def state_of(self, version: dict[str, Any]) -> str:
        looks = version["looks"] - self.settings["queued_looks"]
        return "QUEUED" if looks < 0 else "RUNNING" if looks < self.settings["running_looks"] else version["state"]

    def active(self) -> list[str]:
        return [
            f"{name}/{version['number']}"
            for name, versions in self.state["kernels"].items()
            for version in versions
            if self.state_of(version) in ("QUEUED", "RUNNING")
        ]

    def used_h(self) -> float:
        renewed = self.state.get("renewed")
        since = renewed if renewed is not None and time.time() >= renewed else 0.0
        all_versions = [version for versions in self.state["kernels"].values() for version in versions]
        return self.settings["hours_per_kernel_run"] * sum(version["pushed"] >= since for version in all_versions)

    def push(self, folder: Path) -> str:
        meta = json.loads((folder / "kernel-metadata.json").read_text())
        code = json.dumps(json.loads((folder / meta["code_file"]).read_text()))
        active = self.active()
        if len(active) + self.settings["busy"] >= 2:
            return "Kernel push error: Maximum batch GPU session count of 2 reached.\n"
        if self.used_h() >= self.settings["quota_h"]:
            if self.settings["renewed_in"] is not None:
                self.state.setdefault("renewed", time.time() // 1 + self.settings["renewed_in"])
            return f"Kernel push error: Maximum weekly GPU quota of {self.settings['quota_h']:.2f} hours reached.\n"
        if self.settings["refusal"] is not None:
            return f"Kernel push error: {self.settings['refusal']}\n"
        said, start = "", 0
        for source in meta["kernel_sources"]:
            versions = self.state["kernels"].get(source, [])
            if versions and self.state_of(versions[-1]) == "COMPLETE":
                start = max(start, versions[-1]["step"])
            else:
                said += (
                    f"The following are not valid kernel sources and could not be added to the kernel: ['{source}']\n"
                )
        for source in meta["dataset_sources"]:
            if source not in self.state["datasets"]:
                said += (
                    f"The following are not valid dataset sources and could not be added to the kernel: ['{source}']\n"
                )
        versions = self.state["kernels"].setdefault(meta["id"], [])
        count = sum(len(each) for each in self.state["kernels"].values())
        outcome = dict(self.settings["outcomes"][count]) if count < len(self.settings["outcomes"]) else {}
        expected = re.search(r"--expect-step\W+(\d+)", code)
        if outcome.get("detached"):
            start = 0
        if expected is not None and start < int(expected[1]):
            outcome |= {"steps": 0, "status": "failed", "restart": True, "reason": "its input is missing"}
        step = min(self.settings["steps"], start + outcome.get("steps", self.settings["steps_per_kernel_run"]))
        done = step == self.settings["steps"]
        number = len(versions) + 1
        version = {
            "number": number,
            "pushed": time.time(),
            "looks": 0,
            "state": outcome.get("state", "COMPLETE"),
            "step": step,
            "from": start,
            "sources": meta["kernel_sources"],
            "status": outcome.get("status", "finished" if done else "resumable"),
            "restart": outcome.get("restart", not done),
            "reason": outcome.get("reason", "all steps done" if done else "the time budget is used up"),
            "run": outcome.get("run", self.settings["run"]),
            "hidden": False,
        }
        for before in versions:
            before["hidden"] = False
        if active:
            self.state["overlaps"].append([meta["id"], number, active])
        versions.append(version)
        return said + (
            f"Kernel version {number} successfully pushed.  Please check progress at "
            f"https://www.kaggle.com/code/{meta['id']}\n"
        )

    def find(self, reference: str) -> dict[str, Any]:
        owner, slug, *label = reference.split("/")
        versions = self.state["kernels"].get(f"{owner}/{slug}", [])
        versions = [version for version in versions if not version["hidden"]]
        index = int(label[0]) - 1 if label and self.settings["knows_versions"] else len(versions) - 1
        if not 0 <= index < len(versions):
            raise HttpError("Not found\n\nThe resource was not found. Check the spelling of the reference you passed.")
        return versions[index]

    def output(self, reference: str, folder: Path, pattern: str) -> None:
        version = self.find(reference)
        run = f"{version['run']}/checkpoints/step-{version['step']:08}"
        status = {
            **{key: version[key] for key in ("status", "reason", "restart", "step")},
            "steps": self.settings["steps"],
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        files = {
            "kernel_run.json": json.dumps({**status, "run": version["run"], "seconds": 1.0}),
            f"{version['run']}/status.json": json.dumps(status),
            f"{run}/manifest.json": "{}",
            f"{run}/model.safetensors": "large",
        }
        if version["state"] != "COMPLETE":
            del files["kernel_run.json"]
        if version["step"] == 0:
            files = {name: text for name, text in files.items() if name == "kernel_run.json"}
        for name, text in files.items():
            if re.search(pattern, name):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_text(text)
        log = [{"stream_name": "stdout", "time": 1.5, "data": f"step {version['step']}\n"}]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{reference.split('/')[1]}.log").write_text(json.dumps(log))


class HttpError(Exception):
    pass


def answer(site: Site, words: list[str]) -> str:
    """What the command prints on standard output."""
    option = dict(itertools.pairwise(words))
    match words[:2]:
        case ["config", "view"]:
            return f"Configuration values from ~/.kaggle\n- username: {OWNER}\n- auth_method: ACCESS_TOKEN\n"
        case ["quota", *_]:
            used, total = site.used_h(), site.settings["quota_h"]
            renewed = site.state.get("renewed")
            at = "" if renewed is None else time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(renewed))
            hours = {"used": used, "remaining": max(0.0, total - used), "total": total}
            row = {"resource": "GPU", **{key: f"{value:.2f}h" for key, value in hours.items()}, "refreshAt": at}
            return json.dumps([row], indent=2) + "\n"
        case ["kernels", "status"]:
            version = site.find(words[2])
            state = site.state_of(version)
            version["looks"] += 1
            said = f'{words[2]} has status "KernelWorkerStatus.{state}"\n'
            if state == "ERROR":
                said += f'Failure message: "{version["reason"]}"\n'
            return said
        case ["kernels", "push"]:
            return site.push(Path(option["-p"]))
        case ["kernels", "output"]:
            site.output(words[2], Path(option["-p"]), option["--file-pattern"])
            return ""
        case ["datasets", "status"]:
            if words[2] not in site.state["datasets"]:
                raise HttpError("Permission 'datasets.get' was denied\n\nYou don't have access to this resource.")
            known = site.state["datasets"][words[2]]
            ready = time.time() > known["at"] + 0.1
            return json.dumps(
                {"status": "ready" if ready else "blobs_received", "current_version_number": known["version"]}
            )
        case ["datasets", "metadata"]:
            if words[2] not in site.state["datasets"]:
                raise HttpError("Permission 'datasets.get' was denied\n\nYou don't have access to this resource.")
            owner, slug = words[2].split("/")
            private = {"isPrivate": True} if site.state["datasets"][words[2]]["private"] else {}
            about = {"info": {"datasetSlug": slug, "ownerUser": owner, "title": slug, **private}}
            path = Path(option["-p"], "dataset-metadata.json")
            path.write_text(json.dumps(about))
            return f"Downloaded metadata to {path}\n"
        case ["datasets", "create" | "version"]:
            name = json.loads(Path(option["-p"], "dataset-metadata.json").read_text())["id"]
            known = site.state["datasets"].get(name)
            if words[1] == "create" and known:
                return f'Dataset creation error: The requested slug "{name}" is already in use by a dataset.\n'
            public = {"-u", "--public"} & set(words)
            new = {"version": 0, "private": not public}
            made = site.state["datasets"][name] = {**new, **(known or {})}
            made |= {"version": made["version"] + 1, "at": time.time()}
            if words[1] == "version":
                return f"Dataset version is being created. Please check progress at https://www.kaggle.com/{name}\n"
            kind = "public" if public else "private"
            return f"Your {kind} Dataset is being created. Please check progress at https://www.kaggle.com/{name}\n"
    raise SystemExit(f"the stand-in knows no {words}")


@contextmanager
def opened(folder: Path) -> Iterator[Site]:
    """The site, changed by one command at a time."""
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        site = Site(folder)
        yield site
        site.write()


def main(words: list[str]) -> int:
    folder, command = Path(os.environ["KAGGLE_STAND_IN"]), " ".join(words[:2])
    kill = fault = None
    with opened(folder) as site:
        with (folder / "calls").open("a") as calls:
            calls.write(" ".join(words[:3]) + "\n")
        if words == ["--version"]:
            print(f"Kaggle CLI {site.settings['version']}")
            return 0
        if not os.environ.get("KAGGLE_API_TOKEN") and not Path.home().joinpath(".kaggle/access_token").exists():
            print("Authentication required to call the Kaggle API.\n\nFirst, you will need a Kaggle account.")
            return 1
        for index, entry in enumerate(site.settings["kills"]):
            if kill is None and command.startswith(entry["command"]) and site.use("kill", index, 1):
                kill = entry["when"]
        for index, entry in enumerate(site.settings["faults"]):
            if fault is None and kill is None and command.startswith(entry["command"]):
                fault = entry["how"] if site.use("fault", index, entry["times"]) else None
    if kill in ("before", "instead"):
        os.kill(os.getppid(), signal.SIGKILL)
        if kill == "instead":
            return 1
        time.sleep(3)  # in which its caller has long been started again
    if fault in ("429", "500", "network", "not_arrived"):
        return complain(fault, command)
    said, error = "", None
    with opened(folder) as site:
        try:
            said = answer(site, words)
            if fault == "late":
                site.find(json.loads(Path(words[3], "kernel-metadata.json").read_text())["id"])["hidden"] = True
        except HttpError as caught:
            error = caught
    if kill == "after":
        os.kill(os.getppid(), signal.SIGKILL)
    if error is not None:
        print(error, file=sys.stderr)
        return 1
    if fault in ("lost", "broken", "late"):
        return complain(fault, command)
    print("Warning: Your Kaggle API key is readable by other users on this system!")
    print(said, end="")
    return 0


def complain(fault: str, command: str) -> int:
    if fault == "429":
        print("Too many requests\n\nYou have been rate limited. Wait a little while before retrying.", file=sys.stderr)
    elif fault == "500":
        print("503 Server Error: Service Unavailable for url: https://api.kaggle.com/v1\n", file=sys.stderr)
        print("This is a problem on Kaggle's side, not with your command. Please try again later.", file=sys.stderr)
    elif fault == "broken":
        print('Traceback (most recent call last):\n  File "kaggle/cli.py", line 1, in main', file=sys.stderr)
        print("requests.exceptions.ChunkedEncodingError: InvalidChunkLength(got length b'', 0)", file=sys.stderr)
    else:
        what = "refused" if fault == "network" else "reset by peer"
        print(NETWORK.format(command=command, token=TOKEN, what=what), file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main([word for word in sys.argv[1:] if word != "-W"]))
