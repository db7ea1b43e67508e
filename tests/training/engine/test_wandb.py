"""What wandb shows of a run, with the real client, real files, and a stand-in for the server on loopback.

The measure of all of them is the record: whatever happens to sessions or server, wandb has every step of it once.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import pytest

from tests.support.commands import PATIENCE_S, ROOT, Launch, Started
from tests.support.lives import RUN, Life, assert_all_gone
from tests.support.runs import command_of, train_lines
from tests.support.wandb_server import KEY, Run, WandbServer
from tests.support.wandb_training import CONFIG, EXAMPLES, SCORES, SUMMARY, row_of
from tests.support.zygote import Forked, fork
from training.base.console import UserError
from training.base.processes import children
from training.engine.wandb import visit as wandb_visit
from training.engine.wandb.log_file import VisitLog, item_key, read_records, visit_logs
from training.engine.wandb.options import mode_of, same_run, write_wandb_record
from training.engine.wandb.tracker import WandbOptions, WandbTracker, publish_evaluation

REFUSING = "http://127.0.0.1:9"  # nothing listens there

# For tests of what wandb gets in the end. Those of how long anyone waits for it have the product's own limits.
PATIENT = {f"{name}_LIMIT_S": 600.0 for name in ("INIT", "FINISH", "CLOSE", "PUBLISH")}


def steps(last: int) -> list[int]:
    return list(range(1, last + 1))


def lines_said(result: dict[str, Any]) -> list[str]:
    """What a session printed on both channels, besides its own first and last line."""
    return [line for line in result["printed"].splitlines() if line not in ("", "begun") and not line.startswith("{")]


class Runner:
    """Starts sessions of one run as processes that see no wandb setting of the machine."""

    def __init__(self, folder: Path):
        self.run_dir = folder / "run"
        self.run_dir.mkdir()
        (self.run_dir / "report.html").write_text("<h1>report</h1>", encoding="utf-8")
        self.home = folder / "home"
        self.home.mkdir()
        self.sessions: list[Started] = []
        outside = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
        self.environment = {
            **outside,
            "HOME": str(self.home),
            "NETRC": str(self.home / "netrc"),
            "NO_PROXY": "127.0.0.1",
            "OMP_NUM_THREADS": "1",
            "WANDB_BASE_URL": REFUSING,
            "WANDB_API_KEY": KEY,
            "WANDB__FILE_STREAM_TRANSMIT_INTERVAL": "1",
            "WANDB__FILE_STREAM_RETRY_WAIT_MIN_SECONDS": "1",
            "WANDB__FILE_STREAM_RETRY_WAIT_MAX_SECONDS": "1",
            "WANDB__STATS_COREWEAVE_METADATA_BASE_URL": REFUSING,
        }

    def start(self, mode: str = "offline", real: bool = False, patient: bool = True, **about: Any) -> Started:
        """A session from step `first` to step `last`; see tests/support/wandb_training.py.

        It is forked, unless `real`, with all of these variables: they are wandb's, which no zygote has imported.
        """
        about["limits"] = {**(PATIENT if patient else {}), **about.pop("limits", {})}
        about["from"], about["to"] = about.pop("first", 0), about.pop("last", 0)
        about = {"run_dir": str(self.run_dir), "options": {"mode": mode, "project": "lab"}, "end": "finished", **about}
        module, words = "tests.support.wandb_training", [json.dumps(about)]

        def start(out: BinaryIO, err: BinaryIO, mark: str) -> subprocess.Popen[bytes] | Forked:
            env = {**self.environment, "RELAY_TEST": mark}
            if not real:
                return fork(module, words, env, out, out, ranks=None)
            command = [sys.executable, "-m", module, *words]
            return subprocess.Popen(command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out)

        folder = self.home.parent / f"session-{len(self.sessions)}"
        folder.mkdir()
        self.sessions.append(Started(folder, start))
        return self.sessions[-1]

    def end(self, session: Started) -> dict[str, Any]:
        """Waits for its end: what it measured, what it `printed`, and when it `ended`."""
        result = session.wait()
        ended = time.monotonic()
        if result.status:
            assert_all_gone(session)
        assert result.status or result.out.splitlines()[-1].startswith("{"), result
        measured = json.loads(result.out.splitlines()[-1]) if result.status == 0 else {}
        return {"status": result.status, "ended": ended, **measured, "printed": result.out}

    def go_on(self) -> None:
        """Lets a session go on that holds."""
        (self.run_dir / "go").touch()

    def kill(self, session: Started) -> None:
        """SIGKILL; wandb's own process has ended behind it, too, and writes no more."""
        session.process.kill()
        session.wait()
        assert_all_gone(session)

    def session(self, mode: str = "offline", **about: Any) -> dict[str, Any]:
        """A session that ends by itself."""
        result = self.end(self.start(mode, **about))
        assert result["status"] == 0, result["printed"]
        return result

    @property
    def run_id(self) -> str:
        return json.loads((self.run_dir / "wandb.json").read_text(encoding="utf-8"))["id"]

    def logs(self) -> list[VisitLog]:
        return visit_logs(self.run_dir, self.run_id) if (self.run_dir / "wandb.json").exists() else []

    def offline_rows(self) -> list[dict[str, Any]]:
        """The history rows of all offline sessions in order, without wandb's own keys."""
        return [
            {item_key(item): json.loads(item.value_json) for item in record.history.item if item_key(item)[0] != "_"}
            for log in self.logs()
            if log.is_offline
            for record in read_records(log.path)
            if record.HasField("history")
        ]

    def sync(self, server: WandbServer) -> Run:
        """Uploads all offline sessions with wandb's own command; what the server then has."""
        command = [str(Path(sysconfig.get_path("scripts"), "wandb")), "sync", "--yes"]
        folders = sorted(map(str, self.run_dir.glob("wandb/offline-run-*")))
        own = {"WANDB_BASE_URL": server.url, "WANDB_ERROR_REPORTING": "false", "WANDB_CACHE_DIR": str(self.home.parent)}
        environment = {**self.environment, **own}
        done = subprocess.run([*command, *folders], env=environment, capture_output=True, text=True, timeout=PATIENCE_S)
        assert done.returncode == 0 and "ERROR" not in done.stderr, done
        return server.runs[self.run_id]


@pytest.fixture
def runner(tmp_path: Path) -> Iterator[Runner]:
    runner = Runner(tmp_path)
    yield runner
    for session in runner.sessions:
        if session.process.poll() is None:
            session.kill_all()


@pytest.fixture
def server(runner: Runner) -> Iterator[WandbServer]:
    with WandbServer() as server:
        runner.environment["WANDB_BASE_URL"] = server.url
        yield server


def wait_for(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, f"not within {PATIENCE_S} s: {what}"
        time.sleep(0.05)


def rows_of(run: Run) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key[0] != "_"} for row in run.history]


def test_disabled_imports_no_wandb(runner: Runner) -> None:
    runner.environment["WANDB_MODE"] = "online"  # behind the option
    result = runner.session("disabled", last=20, real=True)
    assert not result["wandb"] and result["run_id"] is None
    assert [path.name for path in runner.run_dir.iterdir()] == ["report.html"]


def test_one_run_over_many_sessions_offline(runner: Runner, server: WandbServer) -> None:
    server.die()
    first = runner.session(
        last=15, end="resumable", interrupt=True
    )  # stopped before the validation of step 15 was done
    (runner.run_dir / "wandb.json").unlink()
    second = runner.session(first=15, last=22, end="resumable", interrupted=True, run_id=first["run_id"])
    third = runner.session(first=22, last=40)  # without the checkpoint's id, by the run folder alone
    assert first["run_id"] == second["run_id"] == third["run_id"]
    assert [sorted(log.steps) for log in runner.logs()] == [steps(14), [*range(15, 22)], [*range(22, 41)]]
    assert runner.offline_rows() == [row_of(step) for step in steps(40)]
    server.come_back()
    run = runner.sync(server)
    assert list(server.runs) == [first["run_id"]]
    assert rows_of(run) == [row_of(step) for step in steps(40)]
    assert run.name == "run" and run.preempted and run.ends[-1] == 0
    assert run.history[19]["_timestamp"] == pytest.approx(1.7e9 + 20, abs=1)  # when it was trained, not when replayed


def test_kill_loses_no_row_and_doubles_none(runner: Runner, server: WandbServer) -> None:
    runner.end(runner.start(last=40, end="kill"))  # before wandb had begun
    killed = runner.start(last=20, end="hang", limits={"FLUSH_EVERY_S": 0.3})
    wait_for(lambda: any(log.steps for log in runner.logs()), "rows in a file")
    runner.kill(killed)
    log = runner.logs()[-1]
    assert log.steps and not log.ended
    os.truncate(log.path, log.whole - 5)  # torn, as a power cut leaves it
    torn = runner.logs()[-1]
    assert torn.whole < log.whole and torn.steps <= log.steps
    runner.session(first=5, last=50)
    assert runner.offline_rows() == [row_of(step) for step in steps(50)]
    assert rows_of(runner.sync(server)) == [row_of(step) for step in steps(50)]


def test_file_counts_up_to_its_first_damage(runner: Runner) -> None:
    runner.session(last=300)
    path = runner.logs()[0].path
    content = path.read_bytes()
    assert len(content) > 3 * 32 * 1024  # records across the borders of blocks
    for damage in (len(content) // 3, 32 * 1024 - 3, 32 * 1024 + 3, 2 * 32 * 1024):
        cut, flipped = content[:damage], content[:damage] + bytes([content[damage] ^ 1]) + content[damage + 1 :]
        # Where no more than six bytes of a block are left, they are nobody's: zeros that are not read.
        rest = content[damage : damage + -damage % (32 * 1024)]
        for damaged in (cut,) if 0 < len(rest) < 7 and not any(rest) else (cut, flipped):
            path.write_bytes(damaged)
            log = runner.logs()[0]
            assert log.whole <= damage and not log.ended
            assert log.steps == {*steps(len(log.steps))} and log.steps
            log.seal()
            assert path.read_bytes() == content[: log.whole]


@pytest.mark.whole
def test_what_a_dying_wandb_still_writes_is_not_counted_twice(runner: Runner) -> None:
    killed = runner.start(last=20, end="hang", limits={"FLUSH_EVERY_S": 0.3})
    wait_for(lambda: any(log.steps for log in runner.logs()), "rows in a file")
    wandb_core = children(killed.process.pid)
    for pid in wandb_core:
        os.kill(pid, signal.SIGSTOP)  # a machine so busy that it has not yet noticed its parent's end
    killed.process.kill()
    killed.wait()
    path = runner.logs()[-1].path
    runner.session(first=5, last=30, end="resumable")
    sealed = path.read_bytes()
    for pid in wandb_core:
        os.kill(pid, signal.SIGCONT)
    time.sleep(1)
    assert path.read_bytes() == sealed
    runner.session(first=30, last=50)
    assert runner.offline_rows() == [row_of(step) for step in steps(50)]


def test_step_that_wandb_has_is_not_logged_again_and_none_is_put_before_the_last(tmp_path):
    """wandb drops what goes back; after a kill and in a file that is not uploaded, steps stand that come again."""
    logged = []
    visit = wandb_visit.Visit(WandbOptions(), tmp_path, "abc", None)
    visit._run = SimpleNamespace(log=lambda row, step, commit: logged.append((row["step"], step)))
    visit._arrived, visit._held, visit._next = 3, frozenset({5}), 7  # 7: the server has renumbered some
    for step in (2, 3, 4, 5, 6, 9):
        visit.log({"step": step})
    assert logged == [(4, 7), (6, 8), (9, 9)]


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_fallback_to_an_older_checkpoint_logs_no_step_twice(runner: Runner, server: WandbServer, mode: str) -> None:
    runner.session(mode, last=40, end="resumable")
    runner.session(mode, first=10, last=60)
    run = runner.sync(server) if mode == "offline" else server.runs[runner.run_id]
    assert rows_of(run) == [row_of(step) for step in steps(60)]


def test_online_over_lost_connections_every_row_arrives_once(runner: Runner, server: WandbServer) -> None:
    server.lossy = True
    runner.session("online", last=60, pause=0.05, end="resumable")
    server.lossy = False
    assert server.lost > 2
    result = runner.session("online", first=60, last=70)
    run = server.runs[runner.run_id]
    assert rows_of(run) == [row_of(step) for step in steps(70)]
    assert lines_said(result) == [f"wandb: {server.url}/tester/lab/runs/{runner.run_id}"]


def test_online_kill_loses_no_row_and_doubles_none(runner: Runner, server: WandbServer) -> None:
    killed = runner.start("auto", last=60, end="hang")
    wait_for(lambda: any(len(run.history) > 10 for run in server.runs.values()), "rows on the server")
    runner.kill(killed)
    runner.session("auto", first=5, last=80)
    assert rows_of(server.runs[runner.run_id]) == [row_of(step) for step in steps(80)]


@pytest.mark.parametrize(
    "upload", ["by itself", *(pytest.param(way, marks=pytest.mark.whole) for way in ("by hand", "not possible"))]
)
def test_online_after_offline_is_one_run_in_order(runner: Runner, server: WandbServer, upload: str) -> None:
    runner.environment["WANDB_MODE"] = "offline"  # behind the option, in the upload too
    runner.session("auto", last=10, end="resumable")
    runner.session("offline", first=10, last=20, end="resumable")
    if upload == "by hand":
        runner.sync(server)
    limits = {"UPLOAD_LIMIT_S": 0.05} if upload == "not possible" else {}
    runner.session("auto", first=20, last=40, limits=limits)
    assert rows_of(server.runs[runner.run_id]) == [row_of(step) for step in steps(40)]
    assert [log.is_uploaded for log in runner.logs() if log.is_offline] == [True]  # not to be sent once more
    assert len(server.runs[runner.run_id].ends) == (2 if upload == "not possible" else 3)


def test_online_death_then_offline_loses_no_row(runner: Runner, server: WandbServer) -> None:
    killed = runner.start("auto", last=60, end="hang")
    wait_for(lambda: any(len(run.history) > 10 for run in server.runs.values()), "rows on the server")
    runner.kill(killed)
    runner.session("offline", last=70, end="resumable")  # cannot know which rows arrived: sends all
    runner.session("auto", first=70, last=120)
    found = [row["step"] for row in server.runs[runner.run_id].history]
    assert set(found) == {*steps(120)}
    assert found[-50:] == [*range(71, 121)]


@pytest.mark.parametrize(
    ("mode", "key", "reason"),
    [("auto", True, "does not answer"), ("online", True, "does not answer"), ("online", False, "there is no API key")],
)
def test_without_server_or_key_it_is_offline_within_seconds_and_says_why(
    runner: Runner, mode: str, key: bool, reason: str
) -> None:
    runner.environment["WANDB_MODE"] = "disabled"  # the options decide, not the shell
    if not key:
        del runner.environment["WANDB_API_KEY"]
    # How long wandb takes to start depends on the machine's other work, and is not what is bounded.
    session = runner.start(mode, last=20, hold=20, patient=False, limits={"FLUSH_EVERY_S": 0.3, "INIT_LIMIT_S": 600})
    wait_for(lambda: any(log.steps for log in runner.logs()), "rows in a file")
    runner.go_on()
    result = runner.end(session)
    assert result["status"] == 0
    (line,) = lines_said(result)
    assert reason in line and f"wandb sync {runner.run_dir}/wandb/offline-run-*" in line
    assert line.startswith("warning: ") == (mode == "online")
    assert result["made"] < 1 and result["close"] < 15
    assert runner.offline_rows() == [row_of(step) for step in steps(20)]


def test_server_dies_mid_run_training_does_not_notice_and_close_is_bounded(runner: Runner, server: WandbServer) -> None:
    process = runner.start("online", last=120, pause=0.03, hold=60, patient=False, limits={"FINISH_LIMIT_S": 2})
    wait_for(lambda: any(len(run.history) > 10 for run in server.runs.values()), "rows on the server")
    server.die()
    runner.go_on()
    result = runner.end(process)
    assert result["status"] == 0
    assert result["add"] < 1e-3  # seconds; a step of a training takes at least a hundred times as long
    assert result["close"] < 15 and "did not take the last rows in time" in result["printed"]
    assert len(server.runs[runner.run_id].history) < 120
    server.come_back()
    runner.session("online", first=120, last=120)  # the same command again
    assert rows_of(server.runs[runner.run_id]) == [row_of(step) for step in steps(120)]


def test_server_dies_mid_run_and_comes_back_every_row_arrives(runner: Runner, server: WandbServer) -> None:
    runner.environment["WANDB__FILE_STREAM_RETRY_MAX"] = "1"  # as if the server were away for longer than wandb likes
    process = runner.start("online", last=80, pause=0.05, hold=40)
    wait_for(lambda: any(len(run.history) > 10 for run in server.runs.values()), "rows on the server")
    server.die()
    runner.go_on()
    time.sleep(2.5)
    server.come_back()
    assert runner.end(process)["status"] == 0
    assert rows_of(server.runs[runner.run_id]) == [row_of(step) for step in steps(80)]


def test_server_that_never_answers_does_not_hold_up_the_end(runner: Runner, server: WandbServer) -> None:
    server.silent = True
    session = runner.start("online", last=20, hold=20, patient=False, limits={"CLOSE_LIMIT_S": 3})
    assert server.kept_waiting.wait(PATIENCE_S)
    runner.go_on()
    result = runner.end(session)
    # The process's exit, too, waits for nothing. (How long it takes to start depends on the machine's other work.)
    assert result["close"] < 5 and result["ended"] - result["closed"] < 5
    assert "was left" in result["printed"]
    server.silent = False
    runner.session("online", first=20, last=20)
    assert rows_of(server.runs[runner.run_id]) == [row_of(step) for step in steps(20)]


def test_wandb_that_is_still_imported_at_the_end_is_not_waited_for(tmp_path, monkeypatch, capsys) -> None:
    folder = tmp_path / "slow/wandb/sdk"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("import time\ntime.sleep(3600)\n")
    code = (
        "import sys; from pathlib import Path; from training.engine.wandb import tracker\n"
        "tracker.CLOSE_LIMIT_S = 0.5\n"
        "made = tracker.WandbTracker(tracker.WandbOptions(mode='offline'), Path(sys.argv[1]), run_id=None,"
        " config=None, lines=[])\n"
        "made.close('finished', 'because', {})\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{folder.parent.parent}:{ROOT}"}
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0 and "was left" in done.stderr, done


def check_what_wandb_collects(runner: Runner, run: Run) -> None:
    assert {key: run.value(key) for key in CONFIG} == CONFIG
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    assert run.commit == commit
    assert any("cpu" in key or "memory" in key for key in run.events[0])
    assert {"wandb-metadata.json", "requirements.txt", "config.yaml"} <= set(run.files)
    assert not any(name.startswith("code/") for name in run.files)
    assert run.summary.items() >= {"status": "finished", "reason": "because", **SUMMARY}.items()
    assert [*runner.home.iterdir()] == []  # all of wandb's files are in the run folder


def test_config_git_state_system_metrics_and_best_scores_are_there_online(runner: Runner, server: WandbServer) -> None:
    runner.session("online", last=10, end="resumable")
    runner.session("online", first=10, last=20)
    check_what_wandb_collects(runner, server.runs[runner.run_id])


def test_config_git_state_system_metrics_and_best_scores_are_there_offline(runner: Runner, server: WandbServer) -> None:
    runner.session(last=20)
    check_what_wandb_collects(runner, runner.sync(server))


@pytest.mark.parametrize("mode", [pytest.param("offline", marks=pytest.mark.whole), "online"])
def test_evaluation_is_in_the_same_run(runner: Runner, server: WandbServer, mode: str) -> None:
    runner.session(mode, last=10, end="resumable")
    runner.session(mode, evaluate="test")
    runner.session(mode, first=10, last=20)  # an evaluation does not end the run
    if mode == "offline":
        runner.session(mode, evaluate="validation")
    else:
        assert server.runs[runner.run_id].ends == [75, 0]  # nor does it say that it ended
    parts = ("test", "validation") if mode == "offline" else ("test",)
    run = runner.sync(server) if mode == "offline" else server.runs[runner.run_id]
    assert len(server.runs) == 1 and rows_of(run) == [row_of(step) for step in steps(20)]
    assert run.summary.items() >= {f"{part}/bleu": SCORES["bleu"] for part in parts}.items()
    assert run.summary.items() >= {"train/loss": 1 / 20, **SUMMARY}.items()
    for part in parts:
        table = run.summary[f"{part}/examples"]
        assert json.loads(run.files[table["path"]])["data"] == [list(example) for example in EXAMPLES]
    assert run.files["report.html"] == b"<h1>report</h1>"
    assert {key: run.value(key) for key in CONFIG} == CONFIG


def test_missing_wandb_is_said_before_the_training_and_only_a_warning_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(wandb_visit, "find_spec", lambda name: None)
    options = WandbOptions(mode="offline")
    with pytest.raises(UserError, match="pip install wandb"):
        WandbTracker(options, tmp_path, run_id=None, config={}, lines=[])
    publish_evaluation(tmp_path, options, SCORES, EXAMPLES, tmp_path / "report.html")
    assert "pip install wandb" in capsys.readouterr().err


def test_training_gives_wandb_its_record(runner: Runner, launch: Launch, sample_data: Path) -> None:
    runner.environment["WANDB_MODE"] = "offline"  # as good as the option
    words = ("--optim.steps", 12, "--log.every_steps", 1, "--wandb.project", "lab")
    command = command_of(runner.run_dir, sample_data, *RUN, *words)
    assert launch(*command, ranks=2, environment=runner.environment, real=False).wait().status == 0
    shown = [(row["step"], row["train/loss"]) for row in runner.offline_rows() if "train/loss" in row]
    assert shown == [(line["step"], line["loss"]) for line in train_lines(runner.run_dir)] and len(shown) == 12


@pytest.mark.parametrize(
    ("variables", "said", "mode"),
    [
        ({}, None, "disabled"),
        ({"WANDB_MODE": "online"}, None, "online"),
        ({"WANDB_MODE": "dryrun"}, None, "offline"),
        ({"WANDB_MODE": "disabled"}, "auto", "auto"),
        ({"WANDB_MODE": "online", "WANDB_DISABLED": "True"}, None, "disabled"),
        ({"WANDB_MODE": "online", "WANDB_DISABLED": "false"}, None, "online"),
        ({"WANDB_SWEEP_ID": "s"}, None, "auto"),
        ({"WANDB_SWEEP_ID": "s", "WANDB_MODE": "disabled"}, None, "disabled"),
    ],
)
def test_option_decides_on_the_mode_before_wandbs_variables(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], said: str | None, mode: str
) -> None:
    set_wandb(monkeypatch, variables)
    assert mode_of(said) == mode


def test_unknown_wandb_mode_is_an_error_of_the_options(monkeypatch: pytest.MonkeyPatch) -> None:
    set_wandb(monkeypatch, {"WANDB_MODE": "shared"})
    with pytest.raises(UserError, match="WANDB_MODE is shared: set it to online, offline or disabled"):
        WandbOptions()
    assert WandbOptions(mode="auto").mode == "auto"


def set_wandb(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    """These are all of wandb's variables that there are."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_place_in_wandb_is_the_options_then_the_runs_then_the_variables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "elsewhere"
    variables = {"WANDB_RUN_ID": "one", "WANDB_PROJECT": "variables", "WANDB_NAME": "named", "WANDB_DIR": str(folder)}
    set_wandb(monkeypatch, variables)
    options = WandbOptions(project="options")
    begun = {"id": "one", "project": "options", "entity": None, "name": "named", "group": None, "folder": str(folder)}
    assert same_run(options, tmp_path, None) == begun
    assert folder.is_dir()
    set_wandb(monkeypatch, {"WANDB_RUN_ID": "two", "WANDB_PROJECT": "other", "WANDB_DIR": "other"})
    assert same_run(WandbOptions(), tmp_path, "one") == begun
    # A sweep's trial is the run that the sweep says, whatever was here; with nothing of it, least of all what arrived.
    write_wandb_record(tmp_path, {**begun, "arrived": 9})
    set_wandb(monkeypatch, {"WANDB_SWEEP_ID": "s", "WANDB_RUN_ID": "two", "WANDB_PROJECT": "sweeps"})
    trial = {"id": "two", "project": "sweeps", "entity": None, "name": tmp_path.name, "group": None, "folder": None}
    assert same_run(options, tmp_path, "one") == trial
    set_wandb(monkeypatch, {})
    assert same_run(WandbOptions(), tmp_path, "two") == trial
    # A run that was made longer is another one there, whatever its older checkpoints say.
    assert same_run(WandbOptions(), tmp_path, "one") == trial


@pytest.mark.parametrize("sweep", [{"WANDB_SWEEP_ID": "sweep-1"}, {"WANDB_MODE": "online"}], ids=["sweep", "no-sweep"])
def test_run_begun_under_wandbs_variables_goes_on_as_the_same_one_without_them(
    runner: Runner, server: WandbServer, sweep: dict[str, str]
) -> None:
    usual = dict(runner.environment)
    folder = runner.home.parent / "elsewhere"
    variables = {"RUN_ID": "run-1", "PROJECT": "theirs", "NAME": "called", "NOTES": "why", "TAGS": "a,b"}
    variables |= {"RUN_GROUP": "group", "DIR": str(folder)}
    runner.environment |= sweep | {f"WANDB_{name}": value for name, value in variables.items()}
    first = runner.session(options={}, last=10, end="resumable")
    url = f"wandb: {server.url}/tester/theirs/runs/run-1"
    assert first["run_id"] == "run-1" and lines_said(first) == [url]
    runner.environment = usual
    second = runner.session("online", options={"mode": "online"}, first=10, last=20, run_id="run-1")
    assert lines_said(second) == [url]
    ((run_id, run),) = server.runs.items()
    assert run_id == runner.run_id == "run-1" and run.name == "called"
    assert rows_of(run) == [row_of(step) for step in steps(20)]
    said = {"project": "theirs", "notes": "why", "tags": ["a", "b"], "groupName": "group"}
    said |= {"sweep": "sweep-1"} if "WANDB_SWEEP_ID" in sweep else {}
    assert {key: run.said.get(key) for key in said} == said
    assert not (runner.run_dir / "wandb").exists() and len(visit_logs(folder, "run-1")) == 2


@pytest.mark.parametrize("trials", [1, pytest.param(2, marks=pytest.mark.whole)])
def test_sweep_of_the_docs_trains_each_trial_as_the_run_that_the_sweep_announced(
    runner: Runner, server: WandbServer, sample_data: Path, tmp_path: Path, trials: int
) -> None:
    text = (ROOT / "docs/sweeps.md").read_text(encoding="utf-8")
    (server.sweep,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    short = {"data": str(sample_data), "optim.steps": 3, "optim.warmup_steps": 1, "log.every_steps": 1}
    rates = {f"trial-{number}": number / 1000 for number in steps(trials)}
    server.trials = [(run_id, {"optim.lr": lr, "model.dropout": 0.0, **short}) for run_id, lr in rates.items()]
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    own = {"PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    agent = (
        "from wandb import wandb_agent; wandb_agent.Agent.POLL_INTERVAL = 0.1; wandb_agent.agent('tester/lab/sweep-1')"
    )
    done = subprocess.run(
        [sys.executable, "-c", agent],
        env={**runner.environment, **own, "CUDA_VISIBLE_DEVICES": ""},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done
    assert {run_id: run.said["sweep"] for run_id, run in server.runs.items()} == dict.fromkeys(rates, "sweep-1")
    for run_id, run in server.runs.items():
        run_dir = tmp_path / "runs/sweep-1" / run_id
        assert json.loads((run_dir / "status.json").read_text(encoding="utf-8"))["status"] == "finished"
        assert json.loads((run_dir / "wandb.json").read_text(encoding="utf-8"))["id"] == run_id
        assert run.value("optim", "lr") == run.value("optim.lr") == rates[run_id] and run.ends == [0]
        found = [(row["step"], row["train/loss"]) for row in run.history]
        assert found == [(line["step"], line["loss"]) for line in train_lines(run_dir)] and len(found) == 3
        assert "validation/accuracy" in run.summary


@pytest.mark.whole
def test_training_that_is_killed_and_loses_its_server_shows_its_record_once(
    runner: Runner, server: WandbServer, launch: Launch, sample_data: Path, tmp_path: Path
) -> None:
    last = 90
    words = ("--optim.steps", last, "--log.every_steps", 1, "--wandb.mode", "online", "--wandb.project", "lab")
    life = Life(launch, tmp_path, sample_data, ranks=2, run_dir=tmp_path / "training", run=(*RUN, *words))

    def hold(step: int) -> Started:
        at = {"at": "forward", "step": step, "rank": 0, "do": "hold"}
        session = life.start(at, environment=runner.environment)
        life.wait_at(session, f"forward-{step}")
        return session

    killed = hold(30)
    wait_for(lambda: any(len(run.history) > 10 for run in server.runs.values()), "rows on the server")
    killed.kill_all()
    ((run_id, run),) = server.runs.items()
    arrived = len(run.history)
    deserted = hold(60)
    wait_for(lambda: len(run.history) > arrived + 10, "rows of the second session on the server")
    server.die()
    life.go_on("forward-60")
    result = deserted.wait()
    assert result.status == 0 and "did not take the last rows in time" in result.err
    assert len(run.history) < last
    server.come_back()
    result = life.start(environment=runner.environment).wait()
    assert result.status == 0 and "is finished" in result.out
    assert list(server.runs) == [run_id]
    found = [(row["step"], row["train/loss"]) for row in run.history]
    assert found == [(line["step"], line["loss"]) for line in train_lines(life.run_dir)]
    assert len(found) == last
