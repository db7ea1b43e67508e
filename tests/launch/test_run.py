"""launch.run: one command from the first session to the last, whatever happens to its processes in between."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from launch import run, supervisor
from launch.supervisor import Ending, Session, Supervisor, layout
from tests.support.commands import Launch, Started
from tests.support.lives import RUN, SECONDS, assert_all_gone, assert_stopped, resumed_at, wait_for, wait_until
from tests.support.runs import (
    assert_only_one_line_is_said,
    assert_same_model,
    assert_same_record,
    reference,
)
from tests.support.slurm_cluster import write_config
from training.base.console import TryLaterError, UserError
from training.base.processes import children, handles
from training.engine import run_folder
from training.engine.status import read_sessions, read_status, write_status


class Command:
    """`python -m launch.run` with a config of two ranks' work, to which accidents happen at exact places."""

    def __init__(self, launch: Launch, folder: Path, data: Path):
        self._launch, self._folder, self.config = launch, folder, write_config(folder, data)
        self.run_dir = folder / "run"

    def start(self, *accidents: dict[str, Any], words: Sequence[object] = ()) -> Started:
        how = {"ACCIDENTS": json.dumps({"folder": str(self._folder), "list": accidents})}
        faulty = ("--script", "tests.support.faulty_training", "--processes", 2)
        return self._launch(*faulty, self.config, *words, module="launch.run", environment=how)

    def hold_at(self, step: int) -> dict[str, Any]:
        return {"at": "forward", "step": step, "rank": 0, "do": "hold", "saved": True}

    def wait_at(self, started: Started, step: int) -> list[int]:
        """The process ids of the ranks, once the first is held at the step."""
        wait_until(started, (self._folder / f"at-forward-{step}-0").exists, f"at step {step}")
        return children(started.process.pid)

    def go_on(self, step: int) -> None:
        (self._folder / f"go-forward-{step}").touch()


@pytest.fixture
def command(launch: Launch, sample_data: Path, tmp_path: Path) -> Command:
    return Command(launch, tmp_path, sample_data)


def assert_no_traceback(started: Started) -> None:
    assert "Traceback" not in started.printed() and "torch" not in started.printed().lower(), started.printed()


@pytest.mark.whole  # test_prove.py starts and kills by launch.run, too
def test_run_survives_a_killed_rank_ctrl_c_and_the_death_of_its_launcher_bit_for_bit(command, sample_data):
    started = command.start(command.hold_at(20), command.hold_at(35))
    ranks = command.wait_at(started, 20)
    os.kill(ranks[1], signal.SIGKILL)
    command.go_on(20)
    command.wait_at(started, 35)
    assert len(read_sessions(command.run_dir)) == 2, "started again"
    os.kill(started.process.pid, signal.SIGINT)
    command.go_on(35)
    assert started.wait().status == 75, started.printed()
    step = assert_stopped(command.run_dir, "signal SIGINT")
    assert_all_gone(started)
    # Beside what the training says: what was chosen and why, and the crash.
    said = started.printed()
    assert said.count("2 processes of ") == said.count("warning: rank 1 was ended by SIGKILL") == 1
    assert said.count("starting again from step 18 in 5s") == 1
    assert "Traceback" not in said and "torch" not in said.lower()

    started = command.start(command.hold_at(step + 4))
    command.wait_at(started, step + 4)
    os.kill(started.process.pid, signal.SIGKILL)
    command.go_on(step + 4)
    assert_all_gone(started)
    assert resumed_at(started) == step
    assert_stopped(command.run_dir, "signal SIGTERM")
    assert "Traceback" not in started.printed()

    result = command.start().wait()
    assert result.status == 0, result
    whole = reference(sample_data, *RUN, ranks=2)
    assert_same_model(command.run_dir, whole)
    assert_same_record(command.run_dir, whole)


def test_misspelt_key_is_one_line_and_no_process_is_started(command):
    result = command.start(words=("--optim.lrr", "1")).wait()
    assert_only_one_line_is_said(result, "optim.lrr", "nearest: optim.lr")
    assert result.out == "" and result.err.count("\n") == 1
    assert not command.run_dir.exists()


def test_after_three_sessions_in_a_row_without_progress_it_ends_and_pauses_grow(monkeypatch, capsys, handlers):
    slept: list[float] = []
    monkeypatch.setattr(Supervisor, "_sleep", lambda self, seconds: slept.append(seconds))
    # What the newest checkpoint is before and after each session.
    found = iter([0, 0, 0, 10, 10, 10, 10, 10, 10, 10])

    def crash() -> Ending:
        return Ending("crashed", "rank 1 ended with status 1")

    ending = Supervisor().run_to_the_end(crash, lambda: next(found), failure_limit=3)
    assert slept == [10.0, 5.0, 10.0, 20.0]
    assert ending.outcome == "crashed" and ending.exit_status == 1
    assert ending.reason == ("3 sessions in a row came no further than step 10; the last: rank 1 ended with status 1")
    assert "starting again from step 10 in 20s" in capsys.readouterr().err
    for once in (Ending("finished"), Ending("stopped"), Ending("to mend")):
        assert Supervisor().run_to_the_end(iter([once]).__next__, lambda: 0, failure_limit=3) is once


def program(folder: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """A module `program`, which the ranks find."""
    (folder / "program.py").write_text(code, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(folder))


def test_rank_that_hangs_when_another_has_failed_is_ended_and_the_failed_one_is_named(tmp_path, monkeypatch, handlers):
    program(
        tmp_path,
        monkeypatch,
        "import os, signal, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "if os.environ['RANK'] == '1': os._exit(3)\n"
        "time.sleep(3600)\n",
    )
    monkeypatch.setattr(supervisor, "_NOTICE_S", 0.1)
    monkeypatch.setattr(supervisor, "_KILL_S", 0.5)
    began = time.monotonic()
    ending = Supervisor().run(["program"], 2)
    assert (ending.outcome, ending.reason) == ("crashed", "rank 1 ended with status 3")
    assert time.monotonic() - began < SECONDS


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1, signal.SIGQUIT])
def test_signal_before_a_rank_handles_any_ends_it_in_silence(tmp_path, monkeypatch, capfd, handlers, number):
    program(tmp_path, monkeypatch, "import time; open('here', 'w').close(); time.sleep(3600)")
    monkeypatch.chdir(tmp_path)
    boss = Supervisor()

    def ask(session: Session) -> None:
        if Path("here").exists() and not boss.asked:
            os.kill(os.getpid(), number)

    ending = boss.run(["program"], 2, look=ask)
    assert ending.outcome == "stopped" and ending.exit_status == 75 and ending.reason
    assert boss.asked == [number]
    assert capfd.readouterr() == ("", "")
    assert boss.run(["program"], 2) == ending, "the next one does not begin"


def test_error_that_the_user_can_mend_is_tried_once(tmp_path, monkeypatch, handlers):
    program(
        tmp_path,
        monkeypatch,
        "import os, sys; from training.base.console import tell_launcher\n"
        "tell_launcher('there is no data', to_mend=os.environ['RANK'] == '0'); sys.exit(1)\n",
    )
    ending = Supervisor().run(["program"], 2)
    assert ending == Ending("to mend", "there is no data") and ending.exit_status == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signal_reaches_each_rank_once(tmp_path, monkeypatch, handlers, number):
    program(
        tmp_path,
        monkeypatch,
        "import os, pathlib, signal, time\n"
        "told = []\n"
        "for number in (signal.SIGTERM, signal.SIGUSR1): signal.signal(number, lambda number, _: told.append(number))\n"
        "here = pathlib.Path('rank-' + os.environ['RANK']); here.touch()\n"
        "while not told: time.sleep(0.01)\n"
        "time.sleep(0.3); here.write_text(str(told)); raise SystemExit(75)\n",
    )
    monkeypatch.chdir(tmp_path)
    boss = Supervisor()

    def ask(session: Session) -> None:
        if len(list(Path().glob("rank-*"))) == 2 and not boss.asked:
            os.kill(os.getpid(), number)

    assert boss.run(["program"], 2, look=ask) == Ending("stopped")
    assert [Path(f"rank-{rank}").read_text() for rank in range(2)] == [f"[{int(number)}]"] * 2


def test_ctrl_c_counts_in_a_shells_background_and_a_hang_up_under_nohup_does_not(handlers):
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    boss = Supervisor()
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.raise_signal(number)
    assert boss.asked == [signal.SIGINT]


def test_handlers_of_a_process_are_seen(handlers):
    signal.signal(signal.SIGUSR2, lambda *_: None)
    assert handles(os.getpid(), signal.SIGUSR2)
    signal.signal(signal.SIGUSR2, signal.SIG_DFL)
    assert not handles(os.getpid(), signal.SIGUSR2)
    assert not handles(2**22 + 1, signal.SIGTERM)


# The table of decisions.


@pytest.mark.parametrize(
    ("gpus", "cores", "micro_batches", "wanted", "processes", "threads"),
    [
        (4, 64, 8, None, 4, 16),
        (3, 64, 8, None, 2, 32),  # three cannot share eight
        (8, 64, 1, None, 1, None),
        (2, 8, None, None, 2, 4),
        (0, 2, 4, None, 2, 1),
        (0, 12, 8, None, 4, 3),
        (0, 7, 4, None, 1, None),
        (0, 16, None, None, 2, 8),
        (0, 2, 4, 4, 4, 1),
        (4, 64, 8, 1, 1, None),
    ],
)
def test_processes_share_gpus_or_cores_and_micro_batches(
    monkeypatch, gpus, cores, micro_batches, wanted, processes, threads
):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    found = layout(micro_batches, wanted)
    assert (found.processes, found.threads, found.gpus) == (processes, threads, gpus)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert layout(micro_batches, wanted).threads == 5, "as somebody has said"


def test_cores_of_a_slurm_job_count_though_the_task_is_not_bound_to_them(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "4")
    assert layout(4).processes == 4 and layout(4).threads == 16, "no job, whatever the variable says"
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert layout(4).threads == 1 and layout(4, 1).threads == 4


@pytest.mark.parametrize(
    ("words", "variables", "said"),
    [
        (
            ["configs/gpt/sample.yaml", "--nnodes", "2"],
            {},
            "on one machine; .* sbatch, or start torchrun",
        ),
        (["configs/gpt/sample.yaml"], {"SLURM_JOB_ID": "7", "SLURM_NNODES": "3"}, "this job has 3; .*slurm/run.sbatch"),
        (["configs/gpt/sample.yaml"], {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, "as by torchrun"),
        ([], {}, "name a config file"),
        (["--proceses", "2", "configs/gpt/sample.yaml"], {}, "name a config file first, before --proceses"),
        (["--processes", "0", "-m", "launch.doctor"], {}, "--processes must be at least 1"),
        (["--failure-limit", "0", "configs/gpt/sample.yaml"], {}, "--failure-limit must be at least 1"),
        (["configs/gpt/sample.yaml", "-m", "launch.doctor"], {}, "stands before -m"),
        (["--proc", "1", "-m", "launch.doctor"], {}, "there is no option --proc: .* follow its name"),
        (["-m"], {}, "name a module behind -m"),
        (["-m", "no.module"], {}, "there is no module no.module"),
        (["nothere.yaml"], {}, "there is no config file nothere.yaml"),
    ],
)
def test_what_it_does_not_start_is_told_with_what_does(monkeypatch, handlers, words, variables, said):
    for name, text in variables.items():
        monkeypatch.setenv(name, text)
    with pytest.raises(UserError, match=said):
        run.main(words)


def test_a_folder_in_use_ends_a_second_start_at_once(command, monkeypatch, handlers, capsys):
    monkeypatch.setattr(run_folder, "_LOCK_PATIENCE_S", 0.0)
    monkeypatch.setattr(Supervisor, "run", lambda *_, **__: pytest.fail("a session was started"))
    command.run_dir.mkdir()
    with (command.run_dir / "lock").open("w") as held:
        held.write("process 7 on there\n")
        held.flush()
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(TryLaterError, match="is in use by process 7 on there: wait or stop it"):
            run.main(["--script", "training.gpt", str(command.config)])


def test_a_session_that_was_killed_does_not_leave_a_status_that_says_running(command, monkeypatch, handlers):
    reason = "rank 0 was ended by SIGKILL"
    monkeypatch.setattr(Supervisor, "run", lambda *_, **__: Ending("crashed", reason))
    command.run_dir.mkdir()

    def after_a_start() -> tuple[str, str, bool, int]:
        with pytest.raises(TryLaterError, match=reason):
            run.main(["--script", "training.gpt", "--failure-limit", "1", str(command.config)])
        status = read_status(command.run_dir)
        return status["status"], status["reason"], status["restart"], status["step"]

    for before in (("running", "training", True, 5), ("failed", "gradients", False, 7)):
        status, why, restart, step = before
        write_status(command.run_dir, status, why, restart=restart, step=step)
        assert after_a_start() == (("resumable", reason, True, 5) if status == "running" else before)

    # What ends in good order has written what is to be known of it: a dry run nothing, for one.
    write_status(command.run_dir, "running", "training", restart=True, step=5)
    monkeypatch.setattr(Supervisor, "run", lambda *_, **__: Ending("finished", ""))
    assert run.main(["--script", "training.gpt", str(command.config), "--dry-run"]) == 0
    assert read_status(command.run_dir)["status"] == "running"


def test_ctrl_z_makes_the_ranks_stand_still_and_fg_go_on(tmp_path, monkeypatch, handlers):
    code = "import time, pathlib, os\nwhile True: pathlib.Path(os.environ['RANK']).write_text(str(time.time()))"
    program(tmp_path, monkeypatch, code)
    monkeypatch.chdir(tmp_path)
    session = Session(["program"], 2, dict(os.environ))
    try:
        pids = [rank.pid for rank in session._ranks]
        wait_for(lambda: (tmp_path / "1").exists() and (tmp_path / "0").exists())
        supervisor_, stopped = Supervisor(), []
        supervisor_._session = session

        def stand_still(pid: int, number: int) -> None:
            if pid == os.getpid():
                wait_for(lambda: all(state_of(each) == "T" for each in pids))
                stopped.append(number)
            else:
                kill(pid, number)

        kill = os.kill
        monkeypatch.setattr(os, "kill", stand_still)
        supervisor_._pause(signal.SIGTSTP, None)
        assert stopped == [signal.SIGTSTP] and signal.getsignal(signal.SIGTSTP) == supervisor_._pause
        wait_for(lambda: all(state_of(each) != "T" for each in pids))
    finally:
        monkeypatch.undo()
        session.kill()


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_under_srun_each_node_starts_its_part_of_the_ranks(tmp_path, monkeypatch, handlers):
    program(tmp_path, monkeypatch, "import os; open(os.environ['RANK'], 'w').write(repr(dict(os.environ)))")
    monkeypatch.chdir(tmp_path)
    node = {"RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "1"}
    for name, text in {**node, "MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "2345"}.items():
        monkeypatch.setenv(name, text)
    assert Supervisor().run(["program"], 2).exit_status == 0
    for place in range(2):
        seen = eval(Path(str(2 + place)).read_text())
        names = ("LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        assert [seen[name] for name in names] == [str(place), "6", "2", "10.0.0.7", "2345"]
        assert seen["RELAY_LAUNCHER"] == str(os.getpid())
