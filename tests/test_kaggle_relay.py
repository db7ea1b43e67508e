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

from data_prep.files import write_atomically
from launch.console import UserError
from launch.kaggle.client import Clock, Kaggle, LostAnswer
from launch.kaggle.record import Record, Session, hours_between, to_continue, utc, vain_sessions
from tests.conftest import ROOT, Launch, Result, Started
from tests.kaggle_stand_in import OWNER, TOKEN

KERNELS = f"{OWNER}/relay-tiny-a", f"{OWNER}/relay-tiny-b"


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
        return json.loads((self.run_dir / "kaggle.json").read_text())

    def versions(self) -> list[dict[str, Any]]:
        """All sessions that began, in their order."""
        found = [version for versions in self.site["kernels"].values() for version in versions]
        return sorted(found, key=lambda version: version["pushed"])

    def calls(self, command: str) -> int:
        return (self.folder / "site/calls").read_text().count(command)

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
        return self.launch(*command, module="launch.kaggle", environment={**self.environment, **environment})

    def relay(self, *words: str, **environment: str) -> Result:
        return self.start(*words, **environment).wait()

    def skip_option_check(self) -> None:
        """That check imports torch and comes before the first session only; here it would only take time."""
        self.run_dir.mkdir(parents=True)
        (self.run_dir / "kaggle.json").write_text('{"dataset": {}, "sessions": []}')


@pytest.fixture
def account(tmp_path: Path, launch: Launch) -> Account:
    for name in ("site", "bin", "home", "prepared/small"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "prepared/small/meta.json").write_text("{}")
    command = tmp_path / "bin/kaggle"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -IS {ROOT / "tests/kaggle_stand_in.py"} "$@"\n')
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    found = Account(tmp_path, launch)
    found.set()
    return found


@pytest.fixture
def quick(account: Account) -> Account:
    """An account whose run is at its beginning, its options checked."""
    account.skip_option_check()
    return account


def test_one_command_brings_a_run_through_its_sessions_to_the_end(account: Account) -> None:
    result = account.relay()
    assert result.status == 0, result
    a, b = (account.site["kernels"][kernel] for kernel in KERNELS)
    assert [(each["from"], each["step"], each["sources"]) for each in (a[0], b[0], a[1])] == [
        (0, 300, []),
        (300, 600, [KERNELS[0]]),
        (600, 900, [KERNELS[1]]),
    ]
    sessions = account.record["sessions"]
    assert [(each["kernel"], each["version"], each["step"]) for each in sessions] == [
        (KERNELS[0], 1, 300),
        (KERNELS[1], 1, 600),
        (KERNELS[0], 2, 900),
    ]
    assert all(each["pushed"] <= each["began"] <= each["ended"] for each in sessions)
    told = [line.partition("): ")[2] for line in result.out.splitlines() if line.startswith("session 2 ")]
    assert told == [
        "started, continues session 1 (relay-tiny-a version 1) at step 300",
        "running",
        "complete, step 600 of 900: the time budget is used up",
    ]
    assert f"kaggle kernels output {KERNELS[0]}/2" in result.out
    assert account.calls("datasets create") == 1 and account.calls("datasets version") == 0
    assert not list(account.run_dir.rglob("*.safetensors"))  # only the small files were fetched
    again = account.relay()
    assert again.status == 0 and "finished" in again.out and len(account.versions()) == 3


def test_killed_at_any_moment_no_session_is_doubled_or_lost(quick: Account) -> None:
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
    quick.set(kills=kills, steps=1200)
    results = [quick.relay()]
    while results[-1].status == -9:
        results.append(quick.relay())
    assert results[-1].status == 0, results[-1]
    assert len(results) == len(kills) + 1
    assert quick.site["overlaps"] == []
    assert [version["step"] for version in quick.versions()] == [300, 600, 900, 1200]
    assert [each["step"] for each in quick.record["sessions"]] == [300, 600, 900, 1200]


@pytest.mark.parametrize("how", ["lost", "not_arrived"])
def test_push_whose_answer_was_lost_is_recognised(quick: Account, how: str) -> None:
    quick.set(steps=600, faults=[{"command": "kernels push", "how": how, "times": 1}])
    result = quick.relay()
    assert result.status == 0, result
    assert [version["step"] for version in quick.versions()] == [300, 600] and quick.site["overlaps"] == []
    assert ("its push had arrived" if how == "lost" else "its push did not arrive") in result.out


def test_lost_record_is_asked_of_kaggle(quick: Account) -> None:
    quick.set(running_looks=5)
    relay = quick.start()
    wait_until(lambda: "session 2 (relay-tiny-b version 1): running" in relay.printed(), relay)
    relay.kill_all()
    (quick.run_dir / "kaggle.json").write_text('{"dataset": {}, "sessions": []}')
    result = quick.relay()
    assert result.status == 0, result
    assert [version["step"] for version in quick.versions()] == [300, 600, 900] and quick.site["overlaps"] == []
    assert "session 1 (relay-tiny-a version 1): found on Kaggle, complete" in result.out


def test_used_up_quota_says_when_to_come_back_and_goes_on_then(quick: Account) -> None:
    quick.set(hours_per_session=12.0, quota_h=24.0, renewed_in=3)
    result = quick.relay()
    assert result.status == 0, result
    assert "Maximum weekly GPU quota of 24.00 hours reached: new GPU hours on " in result.out
    assert quick.versions()[2]["pushed"] >= quick.site["renewed"]
    assert "12.0 of 24 left, new ones on" in result.out


def test_quota_and_busy_account_do_not_end_the_wait(quick: Account) -> None:
    quick.set(busy=2)
    relay = quick.start()
    wait_until(lambda: "no session is free" in relay.printed(), relay)
    time.sleep(0.5)
    assert relay.printed().count("no session is free") == 1  # not at every try
    quick.set(busy=0)
    assert relay.wait().status == 0 and quick.site["overlaps"] == []


def test_token_is_nowhere(quick: Account) -> None:
    home_token = "0123456789abcdef0123456789abcdef"
    (quick.folder / "home/.kaggle").mkdir()
    (quick.folder / "home/.kaggle/kaggle.json").write_text(json.dumps({"username": OWNER, "key": home_token}))
    commands = ("kernels status", "datasets status", "kernels push", "kernels output", "quota")
    quick.set(
        steps=300,
        faults=[{"command": command, "how": "network", "times": 1} for command in commands],
    )
    result = quick.relay()
    assert result.status == 0 and "[token]" in result.err, result
    (quick.run_dir / "kaggle.json").write_text('{"dataset": {}, "sessions": []}')
    (quick.folder / "site/site.json").unlink()
    quick.set(refusal=f"the token {TOKEN} or {home_token} may not do that", steps=600)
    refused = quick.relay()
    assert refused.status == 1 and "the token [token] or [token] may" in refused.err, refused
    said = [result.out, result.err, refused.out, refused.err]
    said += [path.read_text("utf-8", "replace") for path in quick.run_dir.rglob("*") if path.is_file()]
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
    quick: Account, settings: dict[str, Any], words: list[str], environment: dict[str, str], expected: str
) -> None:
    quick.set(**settings)
    result = quick.relay(*words, **environment)
    assert result.status == 1 and "Traceback" not in result.err, result
    assert len(result.error_lines) == 1 and expected in result.error_lines[0], result.err
    assert quick.record["sessions"] == []


def test_misspelt_option_is_found_before_the_first_session(account: Account) -> None:
    result = account.relay("--optim.lrr", "1")
    assert result.status == 1 and "optim.lr" in result.error_lines[0], result
    assert not (account.run_dir / "kaggle.json").exists()


def test_failed_session_is_followed_by_one_from_the_last_usable_output(quick: Account) -> None:
    failed = {
        "state": "ERROR",
        "restart": True,
        "reason": "Your notebook tried to allocate more memory than is available.",
    }
    quick.set(steps=1200, outcomes=[{}, failed, {}, {"state": "CANCEL_ACKNOWLEDGED"}])
    result = quick.relay()
    assert result.status == 0, result
    assert [version["from"] for version in quick.versions()] == [0, 300, 300, 600, 600, 900]
    assert "session 2 (relay-tiny-b version 1): error, step 600 of 1,200: Your notebook tried" in result.out
    assert "not valid kernel sources" not in result.err


def test_session_without_the_output_before_it_does_not_begin_anew(quick: Account) -> None:
    quick.set(outcomes=[{}, {"detached": True}])
    result = quick.relay()
    assert result.status == 0, result
    assert [(version["from"], version["step"]) for version in quick.versions()] == [
        (0, 300),
        (0, 0),
        (300, 600),
        (600, 900),
    ]
    assert "session 2 (relay-tiny-b version 1): complete, no checkpoint: its input is missing" in result.out


def test_three_sessions_without_progress_stop_with_reason_and_log(quick: Account) -> None:
    nothing = {"steps": 0, "state": "ERROR", "reason": "no data set found"}
    quick.set(outcomes=[{}, nothing, nothing, nothing])
    result = quick.relay()
    assert result.status == 1 and len(quick.versions()) == 4
    assert (
        "3 sessions in a row brought nothing" in result.error_lines[0] and "no data set found" in result.error_lines[0]
    )
    log = result.error_lines[0].split("its log: ")[1].split(". The same command")[0]
    assert Path(log).is_file()
    again = quick.relay()  # the user looked at it, and wants it to go on
    assert again.status == 0 and [version["step"] for version in quick.versions()][-2:] == [600, 900]


def test_run_that_must_not_go_on_by_itself_does_not(quick: Account) -> None:
    quick.set(
        outcomes=[
            {"restart": False, "status": "failed", "reason": "the loss is not a number"},
            {"restart": False, "status": "resumable", "reason": "the user asked for it"},
        ]
    )
    failed = quick.relay()
    assert failed.status == 1 and "failed: the loss is not a number" in failed.error_lines[0], failed
    stopped = quick.relay()
    assert stopped.status == 75 and "rests: the user asked for it" in stopped.out, stopped
    assert quick.relay().status == 0 and [version["step"] for version in quick.versions()] == [300, 600, 900]


def test_changed_config_is_uploaded_and_the_same_one_is_not(quick: Account) -> None:
    config = quick.folder / "configs/gpt/own.yaml"
    config.parent.mkdir(parents=True)
    config.write_text((ROOT / "configs/gpt/sample.yaml").read_text())
    quick.set(outcomes=[{"restart": False, "status": "resumable"}] * 2, steps=600)
    for change in ("", "", "# changed\n"):
        config.write_text(config.read_text() + change)
        words = ["--run_dir", str(quick.run_dir), "--data", str(quick.folder / "prepared/small"), "--every", "0.1"]
        started = quick.launch("relay", str(config), *words, module="launch.kaggle", environment=quick.environment)
        assert started.wait().status in (0, 75)
        if not change:
            assert quick.calls("datasets version") == 0
        quick.set(outcomes=[{"restart": False, "status": "resumable"}] * 3, steps=1500)
    assert quick.calls("datasets create") == 1 and quick.calls("datasets version") == 1
    assert quick.record["dataset"]["version"] == 2


def test_two_relays_of_one_run_are_refused(quick: Account) -> None:
    quick.set(running_looks=50, steps=300)
    first = quick.start()
    wait_until(lambda: "running" in first.printed(), first)
    second = quick.relay()
    assert second.status == 1 and "another relay is driving" in second.error_lines[0]
    quick.set(running_looks=1)
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
    assert client.status(KERNELS[0], 1) is None
    assert clock.waits == [30, 60, 120, 240, 480, 900, 900]


def test_errors_that_do_not_pass_end_after_a_day(account: Account, kaggle: tuple[Kaggle, FakeClock]) -> None:
    account.set(faults=[{"command": "kernels status", "how": "500", "times": 200}])
    client, clock = kaggle
    clock.sleep = lambda seconds: setattr(clock, "time", clock.time + 20 * seconds)  # type: ignore[method-assign]
    with pytest.raises(
        UserError, match=r"no answer from Kaggle for 1d00h, the last error: 503 Server Error.*nothing is lost"
    ):
        client.status(KERNELS[0], 1)


def test_push_is_tried_again_only_if_it_cannot_have_arrived(
    account: Account, kaggle: tuple[Kaggle, FakeClock], tmp_path: Path
) -> None:
    client, clock = kaggle
    (tmp_path / "kernel").mkdir()
    about = {"id": KERNELS[0], "code_file": "code.json", "kernel_sources": [], "dataset_sources": []}
    (tmp_path / "kernel/kernel-metadata.json").write_text(json.dumps(about))
    (tmp_path / "kernel/code.json").write_text("{}")
    account.set(faults=[{"command": "kernels push", "how": "429", "times": 2}])
    assert client.push(tmp_path / "kernel").version == 1 and clock.waits == [30, 60]
    account.set(faults=[{"command": "-"}, {"command": "kernels push", "how": "500", "times": 1}])
    with pytest.raises(LostAnswer):
        client.push(tmp_path / "kernel")


def session(number: int, kernel: str = "a", **known: Any) -> Session:
    known = {"version": number, "state": "complete", "step": 100 * number, **known}
    version = known.pop("version")
    return Session(number, kernel, version, [], None, **known)


def test_gpu_hours_of_this_week_are_added_up() -> None:
    hour = 3600.0
    sessions = [
        session(1, began=utc(-3 * hour), ended=utc(1 * hour)),  # begun last week
        session(2, began=utc(2 * hour), ended=utc(4.5 * hour)),
        session(3, began=utc(5 * hour)),  # running
        session(4),  # queued
    ]
    assert hours_between(sessions, 0.0, 6 * hour) == pytest.approx(1 + 2.5 + 1)


def test_next_session_continues_what_can_be_attached(tmp_path: Path) -> None:
    record = Record(tmp_path, sessions=[session(1, "a"), session(2, "b"), session(3, "a", state="error")])
    assert to_continue(record, ["a", "b"]) is record.sessions[1]  # an output of a failed kernel cannot be attached
    record.sessions.append(session(4, "b", step=None))
    assert to_continue(record, ["a", "b"]) is None  # nor an older version than the newest


def test_progress_that_cannot_be_continued_does_not_count() -> None:
    done = [session(1), session(2, state="error"), session(3, state="cancelled"), session(4, state="error")]
    assert vain_sessions(done) == 3
    assert vain_sessions([*done, session(5)]) == 0


def test_record_survives_being_written_and_read(tmp_path: Path) -> None:
    record = Record(tmp_path / "kaggle.json", {"name": "n"}, [session(1)])
    record.write()
    assert Record.read(record.path) == record
    record.path.write_text("{")
    with pytest.raises(UserError, match="cannot be read; move it away"):
        Record.read(record.path)
    assert os.listdir(tmp_path) == ["kaggle.json"]  # noqa: PTH208
