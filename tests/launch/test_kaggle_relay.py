"""The relay as a process, against a stand-in for the `kaggle` command, which tells what of it is published."""

from __future__ import annotations

import json
import os
import stat
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from launch.kaggle.client import Clock, Kaggle, LostAnswer
from launch.kaggle.dataset import name_mistakes
from launch.kaggle.notebook import slug_of
from launch.kaggle.record import KernelRun, RelayRecord, hours_between, runs_without_progress, to_continue, utc
from tests.support.commands import ROOT, Launch, Result, Started
from tests.support.kaggle_stand_in import OWNER, TOKEN
from training.base.console import UserError
from training.base.files import write_atomically

KERNEL = f"{OWNER}/relay-tiny-a"


@dataclass
class Account:
    """An account on the stand-in, and a run to bring to its end there."""

    folder: Path
    launch: Launch

    @property
    def run_dir(self) -> Path:
        return self.folder / "runs/tiny"

    def set(self, **settings: Any) -> None:
        path = self.folder / "site/settings.json"
        known = json.loads(path.read_text()) if path.exists() else {"run": "tiny"}
        write_atomically(path, json.dumps({**known, **settings}))

    @property
    def site(self) -> dict[str, Any]:
        return json.loads((self.folder / "site/site.json").read_text())

    @property
    def record(self) -> dict[str, Any]:
        path = self.run_dir / "kaggle.json"
        return json.loads(path.read_text()) if path.exists() else {"dataset": {}, "kernel_runs": []}

    def versions(self) -> list[dict[str, Any]]:
        """All kernel runs that began, in their order."""
        found = [version for versions in self.site["kernels"].values() for version in versions]
        return sorted(found, key=lambda version: version["pushed"])

    def calls(self, command: str) -> int:
        return (self.folder / "site/calls").read_text().count(command)

    @property
    def name(self) -> str:
        return slug_of(self.run_dir)

    @property
    def kernels(self) -> tuple[str, str]:
        return f"{OWNER}/{self.name}-a", f"{OWNER}/{self.name}-b"

    @property
    def environment(self) -> dict[str, str]:
        return {
            "PATH": f"{self.folder / 'bin'}:/usr/bin:/bin",
            "HOME": str(self.folder / "home"),
            "KAGGLE_STAND_IN": str(self.folder / "site"),
            "KAGGLE_API_TOKEN": TOKEN,
        }

    def start(self, *words: str, **environment: str) -> Started:
        options = ["--run_dir", str(self.run_dir), "--data", str(self.folder / "prepared/small")]
        command = ["relay", "configs/gpt/sample.yaml", *options, "--every", "0.1", *words]
        return self.launch(
            *command, module="launch.kaggle", environment={**self.environment, **environment}, real=False
        )

    def relay(self, *words: str, **environment: str) -> Result:
        return self.start(*words, **environment).wait()


@pytest.fixture
def account(tmp_path: Path, launch: Launch) -> Account:
    for name in ("site", "bin", "home", "prepared/small"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "prepared/small/meta.json").write_text('{"files": {}}')
    command = tmp_path / "bin/kaggle"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -IS {ROOT / "tests/support/kaggle_stand_in.py"} "$@"\n')
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    found = Account(tmp_path, launch)
    found.set()
    return found


def test_one_command_brings_a_run_through_its_kernel_runs_to_the_end(account: Account) -> None:
    result = account.relay()
    assert result.status == 0, result
    a, b = (account.site["kernels"][kernel] for kernel in account.kernels)
    assert [(each["from"], each["step"], each["sources"]) for each in (a[0], b[0], a[1])] == [
        (0, 300, []),
        (300, 600, [account.kernels[0]]),
        (600, 900, [account.kernels[1]]),
    ]
    kernel_runs = account.record["kernel_runs"]
    assert [(each["kernel"], each["version"], each["step"]) for each in kernel_runs] == [
        (account.kernels[0], 1, 300),
        (account.kernels[1], 1, 600),
        (account.kernels[0], 2, 900),
    ]
    assert all(each["pushed"] <= each["began"] <= each["ended"] for each in kernel_runs)
    told = [line.partition("): ")[2] for line in result.out.splitlines() if line.startswith("kernel run 2 ")]
    assert told == [
        f"started, continues kernel run 1 ({account.name}-a version 1) at step 300",
        "running",
        "complete, step 600 of 900: the time budget is used up",
    ]
    assert f"kaggle kernels output {account.kernels[0]}/2" in result.out
    assert account.calls("datasets create") == 1 and account.calls("datasets version") == 0
    said, name = result.out, f"{OWNER}/{account.name}-files"
    assert account.site["datasets"][name]["private"]
    assert said.index("code and config: LICENSE (1 file,") < said.index(f"dataset {name}: version 1 is ready"), "shown"
    assert "not tracked by git: " in said and "data: prepared (1 file, 0.0 MB)" in said
    assert not list(account.run_dir.rglob("*.safetensors"))  # only the small files were fetched
    again = account.relay()
    assert again.status == 0 and "finished" in again.out and len(account.versions()) == 3


def test_killed_at_any_moment_no_kernel_run_is_doubled_or_lost(account: Account) -> None:
    kills = [
        {"command": command, "when": when}
        for command, moments in {
            "kernels push": ("before", "after", "instead", "after"),
            "kernels output": ("before", "after"),
            "kernels status": ("after", "after", "after", "after"),
            "datasets create": ("instead", "after"),
            "datasets status": ("after",),
            "quota": ("after",),
            "config view": ("after",),
        }.items()
        for when in moments
    ]
    account.set(kills=kills, steps=1200)
    results = [account.relay()]
    while results[-1].status == -9:
        results.append(account.relay())
    assert results[-1].status == 0, results[-1]
    assert len(results) == len(kills) + 1
    assert account.site["overlaps"] == []
    assert [version["step"] for version in account.versions()] == [300, 600, 900, 1200]
    assert [each["step"] for each in account.record["kernel_runs"]] == [300, 600, 900, 1200]


@pytest.mark.parametrize("how", ["lost", "broken", "not_arrived"])
def test_push_whose_answer_was_lost_is_recognised(account: Account, how: str) -> None:
    account.set(steps=600, faults=[{"command": "kernels push", "how": how, "times": 1}])
    result = account.relay()
    assert result.status == 0, result
    assert [version["step"] for version in account.versions()] == [300, 600] and account.site["overlaps"] == []
    assert ("its push did not arrive" if how == "not_arrived" else "its push had arrived") in result.out


def test_push_that_arrives_late_is_watched_too(account: Account) -> None:
    account.set(steps=600, faults=[{"command": "kernels push", "how": "late", "times": 1}])
    result = account.relay()
    assert result.status == 0, result
    assert f"kernel run 2 ({account.name}-a version 1): began without this relay's knowledge" in result.err
    assert [(each["version"], each["state"]) for each in account.record["kernel_runs"][:2]] == [
        (2, "complete"),
        (1, "complete"),
    ]
    assert [version["step"] for version in account.versions()] == [300, 300, 600]


def test_kernel_that_the_user_deleted_is_forgotten(account: Account) -> None:
    account.set(outcomes=[{"restart": False, "status": "resumable"}], steps=600)
    assert account.relay().status == 75
    site = account.site
    del site["kernels"][account.kernels[0]]
    write_atomically(account.folder / "site/site.json", json.dumps(site))
    account.set(outcomes=[])
    result = account.relay()
    assert result.status == 0 and "Kaggle no longer has it" in result.err, result
    assert [(version["from"], version["step"]) for version in account.versions()] == [(0, 300), (300, 600)]


def test_command_that_tells_of_versions_that_cannot_exist_is_not_relied_on(account: Account) -> None:
    account.set(faults=[{"command": "kernels push", "how": "lost", "times": 1}], knows_versions=False)
    result = account.relay()
    assert result.status == 1 and "versions that cannot exist" in result.error_lines[0], result


def test_lost_record_is_asked_of_kaggle(account: Account) -> None:
    account.set(running_looks=5)
    relay = account.start()
    wait_until(lambda: f"kernel run 2 ({account.name}-b version 1): running" in relay.printed(), relay)
    relay.kill_all()
    (account.run_dir / "kaggle.json").write_text('{"dataset": {}, "kernel_runs": []}')
    result = account.relay()
    assert result.status == 0, result
    assert [version["step"] for version in account.versions()] == [300, 600, 900] and account.site["overlaps"] == []
    assert f"kernel run 1 ({account.name}-a version 1): found on Kaggle, complete" in result.out


def test_used_up_quota_says_when_to_come_back_and_goes_on_then(account: Account) -> None:
    account.set(hours_per_kernel_run=12.0, quota_h=24.0, renewed_in=3)
    result = account.relay()
    assert result.status == 0, result
    assert "Maximum weekly GPU quota of 24.00 hours reached: new GPU hours on " in result.out
    assert account.versions()[2]["pushed"] >= account.site["renewed"]
    assert "12.0 of 24 left, new ones on" in result.out


def test_quota_and_busy_account_do_not_end_the_wait(account: Account) -> None:
    account.set(busy=2)
    relay = account.start()
    wait_until(lambda: "the account is busy" in relay.printed(), relay)
    time.sleep(0.5)
    assert relay.printed().count("the account is busy") == 1  # not at every try
    account.set(busy=0)
    assert relay.wait().status == 0 and account.site["overlaps"] == []


def test_run_keeps_the_names_on_kaggle_that_it_began_with(account: Account) -> None:
    account.set(outcomes=[{"restart": False, "status": "resumable"}])
    assert account.relay().status == 75
    moved = account.folder / "moved/tiny"
    moved.parent.mkdir()
    account.run_dir.rename(moved)
    result = account.relay("--run_dir", str(moved))
    assert result.status == 0 and set(account.site["kernels"]) == set(account.kernels), result
    assert account.calls("datasets create") == 1 and account.site["overlaps"] == []


def test_token_is_nowhere(account: Account) -> None:
    home_token = "0123456789abcdef0123456789abcdef"
    (account.folder / "home/.kaggle").mkdir()
    (account.folder / "home/.kaggle/kaggle.json").write_text(json.dumps({"username": OWNER, "key": home_token}))
    commands = ("kernels status", "datasets status", "kernels push", "kernels output", "quota")
    account.set(
        steps=300,
        faults=[{"command": command, "how": "network", "times": 1} for command in commands],
    )
    result = account.relay()
    assert result.status == 0 and "[token]" in result.err, result
    (account.run_dir / "kaggle.json").write_text('{"dataset": {}, "kernel_runs": []}')
    (account.folder / "site/site.json").unlink()
    account.set(refusal=f"the token {TOKEN} or {home_token} may not do that", steps=600)
    refused = account.relay()
    assert refused.status == 1 and "the token [token] or [token] may" in refused.err, refused
    said = [result.out, result.err, refused.out, refused.err]
    said += [path.read_text("utf-8", "replace") for path in account.run_dir.rglob("*") if path.is_file()]
    assert not [text for text in said if TOKEN in text or home_token in text]


@pytest.mark.parametrize(
    ("settings", "words", "environment", "expected"),
    [
        ({}, [], {"PATH": "/usr/bin:/bin"}, "no `kaggle` command on PATH: pip install --upgrade kaggle"),
        ({}, [], {"KAGGLE_API_TOKEN": ""}, "wants a token, or rejects the one it was given: create one at https://"),
        ({"version": "2.2.2"}, [], {}, "is Kaggle CLI 2.2.2, and 2.2.5 or later is needed"),
        ({}, ["--owner", "somebody"], {}, "--owner somebody: the token belongs to tester"),
        ({"refusal": "Phone verification is required."}, [], {}, "https://www.kaggle.com/settings, Phone verification"),
        ({}, ["--every", "soon"], {}, "--every: 'soon' is no duration"),
        ({}, ["--data", "nowhere"], {}, "there is no prepared data at nowhere"),
    ],
)
def test_what_the_user_can_mend_is_one_clear_line(
    account: Account, settings: dict[str, Any], words: list[str], environment: dict[str, str], expected: str
) -> None:
    account.set(**settings)
    result = account.relay(*words, **environment)
    assert result.status == 1 and "Traceback" not in result.err, result
    assert len(result.error_lines) == 1 and expected in result.error_lines[0], result.err
    assert account.record["kernel_runs"] == []


def test_mistaken_option_is_found_before_a_kernel_run(account: Account) -> None:
    result = account.relay("--optim.lrr", "1")
    assert result.status == 1 and "optim.lr" in result.error_lines[0], result
    account.set(outcomes=[{"restart": False, "status": "resumable"}])
    assert account.relay().status == 75
    result = account.relay("--precision", "bf16")
    assert result.status == 1 and "a T4 (sm_75) only emulates it" in result.error_lines[0], result
    assert account.calls("kernels push") == 1


def test_failed_kernel_run_is_followed_by_one_from_the_last_usable_output(account: Account) -> None:
    failed = {
        "state": "ERROR",
        "restart": True,
        "reason": "Your notebook tried to allocate more memory than is available.",
    }
    account.set(steps=1200, outcomes=[{}, failed, {}, {"state": "CANCEL_ACKNOWLEDGED"}])
    result = account.relay()
    assert result.status == 0, result
    assert [version["from"] for version in account.versions()] == [0, 300, 300, 600, 600, 900]
    assert f"kernel run 2 ({account.name}-b version 1): error, step 600 of 1,200: Your notebook tried" in result.out
    assert "not valid kernel sources" not in result.err


def test_kernel_run_without_the_output_before_it_does_not_begin_anew(account: Account) -> None:
    account.set(outcomes=[{}, {"detached": True}])
    result = account.relay()
    assert result.status == 0, result
    assert [(version["from"], version["step"]) for version in account.versions()] == [
        (0, 300),
        (0, 0),
        (300, 600),
        (600, 900),
    ]
    assert f"kernel run 2 ({account.name}-b version 1): complete, no checkpoint: its input is missing" in result.out


def test_three_runs_without_progress_stop_with_reason_and_log(account: Account) -> None:
    nothing = {"steps": 0, "state": "ERROR", "reason": "no data set found"}
    account.set(outcomes=[{}, nothing, nothing, nothing])
    result = account.relay()
    assert result.status == 1 and len(account.versions()) == 4
    assert (
        "3 kernel runs in a row brought nothing" in result.error_lines[0]
        and "no data set found" in result.error_lines[0]
    )
    log = result.error_lines[0].split("its log: ")[1].split(". The same command")[0]
    assert Path(log).is_file()
    again = account.relay()  # the user looked at it, and wants it to go on
    assert again.status == 0 and [version["step"] for version in account.versions()][-2:] == [600, 900]


def test_run_that_must_not_go_on_by_itself_does_not(account: Account) -> None:
    account.set(
        outcomes=[
            {"restart": False, "status": "failed", "reason": "the loss is not a number"},
            {"restart": False, "status": "resumable", "reason": "the user asked for it"},
        ]
    )
    failed = account.relay()
    assert failed.status == 1 and "failed: the loss is not a number" in failed.error_lines[0], failed
    stopped = account.relay()
    assert stopped.status == 75 and "was stopped: the user asked for it" in stopped.out, stopped
    assert account.relay().status == 0 and [version["step"] for version in account.versions()] == [300, 600, 900]


def test_changed_config_is_uploaded_and_the_same_one_is_not(account: Account) -> None:
    config = account.folder / "configs/gpt/own.yaml"
    config.parent.mkdir(parents=True)
    config.write_text((ROOT / "configs/gpt/sample.yaml").read_text())
    account.set(outcomes=[{"restart": False, "status": "resumable"}] * 2, steps=600)
    for change in ("", "", "# changed\n"):
        config.write_text(config.read_text() + change)
        words = ["--run_dir", str(account.run_dir), "--data", str(account.folder / "prepared/small"), "--every", "0.1"]
        started = account.launch("relay", str(config), *words, module="launch.kaggle", environment=account.environment)
        assert started.wait().status in (0, 75)
        if not change:
            assert account.calls("datasets version") == 0
        account.set(outcomes=[{"restart": False, "status": "resumable"}] * 3, steps=1500)
    assert account.calls("datasets create") == 1 and account.calls("datasets version") == 1
    assert account.record["dataset"]["version"] == 2


@pytest.mark.parametrize("private", [False, True])
def test_dataset_that_is_public_is_not_written_to(account: Account, private: bool) -> None:
    name = f"{OWNER}/{account.name}-files"
    known = {"kernels": {}, "datasets": {name: {"version": 1, "at": 0, "private": private}}, "overlaps": [], "used": {}}
    write_atomically(account.folder / "site/site.json", json.dumps(known))
    result = account.relay()
    version, written = account.site["datasets"][name]["version"], account.calls("datasets version")
    if private:
        assert (result.status, version, written) == (0, 2, 1), result
    else:
        assert (result.status, version, written) == (1, 1, 0) and account.calls("kernels push") == 0, result
        assert f"the dataset {name} is public" in result.error_lines[0]
        assert f"make it private at https://www.kaggle.com/datasets/{name}/settings" in result.error_lines[0]


def test_two_relays_of_one_run_are_refused(account: Account) -> None:
    account.set(running_looks=1_000_000, steps=300)
    first = account.start()
    wait_until(lambda: "running" in first.printed(), first)
    second = account.relay()
    assert second.status == 1 and "another relay is driving" in second.error_lines[0]
    account.set(running_looks=1)
    assert first.wait().status == 0


def wait_until(condition: Callable[[], bool], started: Started) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert started.process.poll() is None and time.monotonic() < end, started.printed()
        time.sleep(0.02)


# Without a process.


class FakeClock(Clock):
    """Time passes by waiting only."""

    def __init__(self) -> None:
        self.time, self.waits = 1_000_000.0, []

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.time += seconds
        self.waits.append(seconds)


@pytest.fixture
def kaggle(account: Account, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Kaggle, FakeClock]]:
    for name, value in account.environment.items():
        monkeypatch.setenv(name, value)
    clock = FakeClock()
    yield Kaggle(clock), clock


@pytest.mark.parametrize("how", ["429", "500", "network"])
def test_passing_errors_are_tried_again_with_growing_pauses(
    account: Account, kaggle: tuple[Kaggle, FakeClock], how: str
) -> None:
    account.set(faults=[{"command": "kernels status", "how": how, "times": 7}])
    client, clock = kaggle
    assert client.status(KERNEL, 1) is None
    assert clock.waits == [30, 60, 120, 240, 480, 900, 900]


def test_errors_that_do_not_pass_end_after_a_day(account: Account, kaggle: tuple[Kaggle, FakeClock]) -> None:
    account.set(faults=[{"command": "kernels status", "how": "500", "times": 200}])
    client, clock = kaggle
    clock.sleep = lambda seconds: setattr(clock, "time", clock.time + 20 * seconds)  # type: ignore[method-assign]
    with pytest.raises(
        UserError, match=r"no answer from Kaggle for 1d00h, the last error: .*503 Server Error.*nothing is lost"
    ):
        client.status(KERNEL, 1)


def test_push_is_tried_again_only_if_it_cannot_have_arrived(
    account: Account, kaggle: tuple[Kaggle, FakeClock], tmp_path: Path
) -> None:
    client, clock = kaggle
    (tmp_path / "kernel").mkdir()
    about = {"id": KERNEL, "code_file": "code.json", "kernel_sources": [], "dataset_sources": []}
    (tmp_path / "kernel/kernel-metadata.json").write_text(json.dumps(about))
    (tmp_path / "kernel/code.json").write_text("{}")
    account.set(faults=[{"command": "kernels push", "how": "429", "times": 2}])
    assert client.push(tmp_path / "kernel").version == 1 and clock.waits == [30, 60]
    account.set(faults=[{"command": "-"}, {"command": "kernels push", "how": "500", "times": 1}])
    with pytest.raises(LostAnswer):
        client.push(tmp_path / "kernel")


def kernel_run(number: int, kernel: str = "a", **known: Any) -> KernelRun:
    known = {"version": number, "state": "complete", "step": 100 * number, **known}
    version = known.pop("version")
    return KernelRun(number, kernel, version, [], None, **known)


def test_gpu_hours_of_this_week_are_added_up() -> None:
    hour = 3600.0
    kernel_runs = [
        kernel_run(1, began=utc(-3 * hour), ended=utc(1 * hour)),  # begun last week
        kernel_run(2, began=utc(2 * hour), ended=utc(4.5 * hour)),
        kernel_run(3, began=utc(5 * hour)),  # running
        kernel_run(4),  # queued
    ]
    assert hours_between(kernel_runs, 0.0, 6 * hour) == pytest.approx(1 + 2.5 + 1)


def test_next_kernel_run_continues_what_can_be_attached(tmp_path: Path) -> None:
    record = RelayRecord(
        tmp_path, kernel_runs=[kernel_run(1, "a"), kernel_run(2, "b"), kernel_run(3, "a", state="error")]
    )
    assert to_continue(record, ["a", "b"]) is record.kernel_runs[1]  # an output of a failed kernel cannot be attached
    record.kernel_runs.append(kernel_run(4, "b", step=None))
    assert to_continue(record, ["a", "b"]) is None  # nor an older version than the newest


def test_progress_that_cannot_be_continued_does_not_count() -> None:
    done = [kernel_run(1), kernel_run(2, state="error"), kernel_run(3, state="cancelled"), kernel_run(4, state="error")]
    assert runs_without_progress(done) == 3
    assert runs_without_progress([*done, kernel_run(5)]) == 0


def test_every_run_has_a_name_of_its_own_on_kaggle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = 60 * "a"
    folders = ("runs/中文", "runs/试验", "gpt_base", "gpt-base", "old/gpt", "new/gpt", long, long + "b")
    names = [slug_of(tmp_path / each) for each in folders]
    assert len(set(names)) == len(names)
    assert not [mistake for name in names for mistake in name_mistakes(OWNER, f"{name}-files")]
    assert names[3].startswith("relay-gpt-base-")
    monkeypatch.chdir(tmp_path)
    Path("link").symlink_to("old/gpt")
    assert slug_of(Path("old/gpt")) == slug_of(Path("link")) == names[4]


@pytest.mark.parametrize(
    ("dataset", "kernel_runs"),
    [({"name": "me/relay-gpt-files"}, []), ({}, [kernel_run(1, "me/relay-gpt-b"), kernel_run(2, "me/relay-gpt-a")])],
)
def test_name_of_a_run_is_read_from_what_is_on_record(
    tmp_path: Path, dataset: dict[str, Any], kernel_runs: list[KernelRun]
) -> None:
    assert RelayRecord(tmp_path, dataset, kernel_runs).name == "relay-gpt"
    assert RelayRecord(tmp_path).name is None


def test_record_survives_being_written_and_read(tmp_path: Path) -> None:
    record = RelayRecord(tmp_path / "kaggle.json", {"name": "me/n-files"}, [kernel_run(1, "me/n-a")])
    record.write()
    assert RelayRecord.read(record.path) == record
    record.path.write_text("{")
    with pytest.raises(UserError, match="cannot be read; move it away"):
        RelayRecord.read(record.path)
    assert os.listdir(tmp_path) == ["kaggle.json"]  # noqa: PTH208
