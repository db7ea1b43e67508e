"""What becomes of a job after its session, for everything that a session can leave behind; and the record of jobs."""

from __future__ import annotations

import fcntl
import itertools
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from launch.scripts import note_killed
from launch.slurm import job as slurm_job
from launch.slurm.job import EXIT_RESTING, JOBS, begin, end, judge, note, read_events
from launch.slurm.status import row
from tests.support.commands import ROOT
from tests.support.disks import not_as_root
from training.base.console import UserError, tell_launcher
from training.engine.status import EXIT_RESUMABLE, read_status, write_status

JOB = "17"
_LATER = itertools.count()


@pytest.fixture(autouse=True)
def no_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody says how much time is left, unless the test does."""
    monkeypatch.setattr(slurm_job, "time_left", lambda: None)


def save(run_dir: Path, step: int) -> None:
    (run_dir / f"checkpoints/step-{step:010d}").mkdir(parents=True)


def leave(run_dir: Path, status: Any, reason: str, *, restart: bool) -> None:
    """A status as a session leaves it, at another time than the one before."""
    run_dir.mkdir(exist_ok=True)
    write_status(run_dir, status, reason, restart=restart)
    content = json.loads((run_dir / "status.json").read_text())
    content["time"] += f".{next(_LATER)}"
    (run_dir / "status.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("status", "reason", "restart", "outcome", "exit_status"),
    [
        ("finished", "all steps done", False, "finished", 0),
        ("resumable", "the time limit", True, "again", EXIT_RESUMABLE),
        ("resumable", "signal SIGUSR1", True, "again", EXIT_RESUMABLE),
        ("failed", "lost contact to another rank", True, "again", EXIT_RESUMABLE),
        ("running", "training", True, "again", EXIT_RESUMABLE),
        ("resumable", "the file run/STOP", False, "resting", EXIT_RESTING),
        ("failed", "the gradients were not finite", False, "failed", 1),
    ],
)
def test_status_file_and_not_the_exit_status_decides(tmp_path, status, reason, restart, outcome, exit_status):
    for step_exit in (0, 1, 137):
        run_dir = tmp_path / str(step_exit)
        assert begin(run_dir, JOB) is None
        save(run_dir, 5)
        leave(run_dir, status, reason, restart=restart)
        verdict = judge(run_dir, exit_status=step_exit)
        assert verdict.outcome == outcome
        expected = reason if status != "running" else f"it ended with status {step_exit} and could not say why"
        assert verdict.reason == expected
        assert end(run_dir, JOB, exit_status=step_exit) == exit_status
        last = read_events(run_dir)[-1]
        assert (last["event"], last["outcome"], last["from_step"], last["step"]) == ("ended", outcome, 0, 5)
        kept = read_status(run_dir) or {}
        assert (kept["status"], kept["reason"]) == ("resumable" if status == "running" else status, expected)


def test_status_of_a_run_that_somebody_holds_is_left_to_who_does(tmp_path):
    leave(tmp_path, "running", "training", restart=True)
    with (tmp_path / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        note_killed(tmp_path, "killed")
        assert (read_status(tmp_path) or {})["status"] == "running"


def test_status_of_an_earlier_session_is_not_taken_for_this_ones(tmp_path):
    for status, restart in (("finished", False), ("failed", False), ("resumable", False), ("resumable", True)):
        run_dir = tmp_path / f"{status}-{restart}"
        leave(run_dir, status, "of the last session", restart=restart)
        begin(run_dir, JOB)
        verdict = judge(run_dir, exit_status=1)
        assert (verdict.outcome, verdict.reason) == ("again", "it ended with status 1 before it came to train")


def test_failure_limit_counts_sessions_in_a_row_without_a_later_checkpoint(tmp_path):
    def session(step: int | None, *, taken: bool = False) -> str:
        begin(tmp_path, JOB)
        if step is not None:
            save(tmp_path, step)
        leave(tmp_path, "failed", "a planted mistake", restart=True)
        end(tmp_path, JOB, exit_status=1, taken=taken, failure_limit=3)
        return read_events(tmp_path)[-1]["outcome"]

    assert [session(step) for step in (None, None, 10, None, None)] == ["again"] * 5
    assert session(None, taken=True) == "taken"  # not the run's fault
    assert session(None) == "failed"
    assert "3 sessions in a row came no further than step 10; the last: a planted mistake" in (
        tmp_path / JOBS
    ).read_text("utf-8")
    # Submitted again, perhaps with what it lacked, it has as many tries as at first.
    assert [session(None) for _ in range(3)] == ["again", "again", "failed"]


def test_job_that_slurm_ends_is_left_to_slurm_unless_its_time_is_over(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", JOB)

    def ended(left: tuple[float, str] | None, status: Any = "resumable") -> int:
        monkeypatch.setattr(slurm_job, "time_left", lambda: left)
        begin(tmp_path, JOB)
        leave(tmp_path, status, "signal SIGTERM", restart=status != "finished")
        return slurm_job.main(["end", str(tmp_path), "--status", "1", "--taken"])

    assert ended((500.0, "SLURM's time limit")) == EXIT_RESTING
    assert ended(None) == EXIT_RESTING
    over = (0.0, "SLURM's time limit")
    # And that counts, where the limit is too short for a single step.
    assert [ended(over) for _ in range(3)] == [EXIT_RESUMABLE, EXIT_RESUMABLE, 1]
    assert ended((500.0, "SLURM's time limit"), "finished") == 0


def test_what_the_user_has_to_mend_is_the_reason_and_told_once(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", JOB)
    monkeypatch.setenv("RELAY_ERROR_FILE", str(tmp_path / "error.txt"))
    begin(tmp_path, JOB)
    tell_launcher("a rank hangs", to_mend=False)
    assert slurm_job.main(["end", str(tmp_path), "--status", "1"]) == EXIT_RESUMABLE
    begin(tmp_path, JOB)
    tell_launcher("there is no data", to_mend=True)
    assert slurm_job.main(["end", str(tmp_path), "--status", "1"]) == 1
    last = read_events(tmp_path)[-1]
    assert (last["outcome"], last["reason"]) == ("failed", "there is no data")
    begin(tmp_path, JOB)
    assert slurm_job.main(["end", str(tmp_path), "--status", "1"]) == EXIT_RESUMABLE


@pytest.mark.parametrize(
    ("status", "restart", "over"), [("finished", False, True), ("failed", False, True), ("failed", True, False)]
)
def test_jobs_of_a_chain_have_nothing_to_do_after_its_end_and_later_ones_train(tmp_path, status, restart, over):
    for job in ("1", "2", "3"):
        note(tmp_path, "submitted", job)
    begin(tmp_path, "1")
    leave(tmp_path, status, "as it was", restart=restart)
    end(tmp_path, "1", exit_status=1)
    found = begin(tmp_path, "2")
    assert (found is not None) == over
    if found is not None:
        assert "job 1 ended it: as it was" in found.reason
        assert read_events(tmp_path)[-1]["event"] == "ended", "it did not begin"
    note(tmp_path, "submitted", "4")
    assert begin(tmp_path, "4") is None


def test_record_survives_lines_that_are_no_events(tmp_path):
    note(tmp_path, "submitted", "1")
    with (tmp_path / JOBS).open("a") as file:
        file.write('3\n{"x": 1}\n{"event": "beg')
    note(tmp_path, "began", "1", step=3)
    assert [event["event"] for event in read_events(tmp_path)] == ["submitted", "began"]


@pytest.mark.parametrize(
    ("variables", "queued"), [({}, "8"), ({"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}, "7_2")]
)
def test_of_an_array_the_task_alone_is_queued_again(variables, queued, tmp_path):
    source = (ROOT / "slurm/session.sh").read_text()
    function = source[source.index("requeue() {") : source.index("# session CONFIG")]
    script = f'scontrol() {{ echo "$@" > {tmp_path}/asked; }}\n{function}\nrequeue'
    subprocess.run(
        ["bash", "-euc", script], env={"SLURM_JOB_ID": "8", "PATH": "/usr/bin:/bin", **variables}, check=True
    )
    assert (tmp_path / "asked").read_text() == f"requeue {queued}\n"


def test_record_of_jobs_that_may_not_be_written_is_one_clear_error():
    with not_as_root() as run_dir:
        note(run_dir, "submitted", JOB)
        (run_dir / JOBS).chmod(0o444)
        with pytest.raises(UserError, match=f"no permission to write {run_dir / JOBS}"):
            note(run_dir, "began", JOB)


def test_status_takes_a_loss_that_is_no_number_and_passes_over_lines_that_say_nothing(tmp_path):
    line = '{"kind": "train", "step": 7, "time": 1.0, "loss": NaN, "tokens_per_s": 1200.0}'
    (tmp_path / "metrics.jsonl").write_text(f'{line}\n[]\n{{"step": 8}}\n')
    assert row(tmp_path, [])[5] == "1,200"
