"""Submit once, come back to a finished model: the batch scripts on a real SLURM, through everything that ends a job.

Each test ends in the model of a run that nothing happened to, bit for bit, or in the job's end with the reason. What
happens to a training happens while it is held at a step (tests/support/faulty_training.py), or while it is paced.
"""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from launch.slurm.job import read_events
from tests.support.commands import PATIENCE_S
from tests.support.lives import RUN, SLOW, STEPS, assert_little_is_lost
from tests.support.runs import assert_same_model, assert_same_record, last_checkpoint, reference, status_of
from tests.support.slurm_cluster import ENDED, SlurmCluster, write_config
from training.engine.status import read_sessions

# Minutes of waiting, in which the machine can do other things: these come first.
pytestmark = pytest.mark.timeout(1200)

DEEPSPEED = ("--parallel", "deepspeed", "--zero.stage", 2)


def hold_at(step: int) -> dict[str, Any]:
    """The first rank waits there; the others, which need it for the step, with it."""
    return {"at": "forward", "step": step, "rank": 0, "do": "hold"}


@pytest.fixture
def uninterrupted(sample_data: Path) -> Callable[..., Path]:
    """The run folder of an uninterrupted run on two ranks, with such options."""
    return lambda *words: reference(sample_data, *RUN, *words, ranks=2)


class Submission:
    """A run of two ranks and the job that trains it, in a folder of its own."""

    def __init__(self, cluster: SlurmCluster, folder: Path, data: Path):
        self._cluster, self.run_dir, self._log = cluster, folder / "run", folder / "log"
        self.config = write_config(folder, data)

    def submit(
        self,
        *options: object,
        nodes: int = 1,
        pause_s: float = 0.06,
        accidents: tuple[dict[str, Any], ...] = (),
        words: tuple[object, ...] = (),
        environment: dict[str, str] | None = None,
    ) -> int:
        """The job's number. pause_s: how long each of a step's two forward passes of a rank takes longer."""
        about = {"folder": str(self.run_dir.parent), "list": [{**SLOW, "seconds": pause_s}, *accidents]}
        self._job = self._cluster.submit(
            *("--job-name", self.run_dir.parent.name, "--output", self._log, "--nodes", nodes, "--cpus-per-task", 2),
            *("--time", "30", *options, "slurm/run.sbatch", self.config, *words),
            environment={
                **{"SCRIPT": "tests.support.faulty_training", "ACCIDENTS": json.dumps(about)},
                **{"PREFLIGHT": "0", "RANKS_PER_NODE": str(2 // nodes)},
                **(environment or {}),
            },
        )
        return self._job

    def log(self) -> str:
        return self._log.read_text("utf-8", "replace") if self._log.exists() else ""

    def wait_until(self, happened: Callable[[], object], what: str) -> None:
        end = time.monotonic() + PATIENCE_S
        while not happened():
            state = self._cluster.state(self._job)
            if state in ENDED or time.monotonic() > end:
                pytest.fail(f"{state} before {what}:\n{self.log()}")
            time.sleep(0.1)

    def wait_at(self, step: int, rank: int = 0) -> None:
        """Waits until the rank is held at the step."""
        held = self.run_dir.parent / f"at-forward-{step}-{rank}"
        self.wait_until(held.exists, f"held at step {step}")

    def go_on(self, step: int) -> None:
        (self.run_dir.parent / f"go-forward-{step}").touch()

    def wait_until_told(self) -> None:
        """Waits until SLURM's SIGTERM is on its way to both ranks."""
        self.wait_until(lambda: re.search(r"STEP \S+ ON \S+ CANCELLED AT", self.log()), "cancelled")

    def assert_rests(self, job: int) -> None:
        """It does not come back, which would take seconds."""
        time.sleep(8)
        assert self._cluster.state(job) == "CANCELLED"

    def assert_finished_like(self, uninterrupted: Path) -> None:
        """The job came to its end, and the run is the one that nothing happened to."""
        assert self._cluster.wait_for(self._job) == "COMPLETED", self.log()
        assert self._cluster.about(self._job, "ExitCode") == "0:0"
        assert_same_model(self.run_dir, uninterrupted)
        assert_same_record(self.run_dir, uninterrupted)

    def ends(self) -> list[tuple[str, str]]:
        """How its sessions ended: outcome and reason."""
        return [(each["outcome"], each["reason"]) for each in read_events(self.run_dir) if each["event"] == "ended"]

    def assert_nothing_lost(self) -> None:
        """Every session began where the one before had ended, at its very last step."""
        sessions = read_sessions(self.run_dir)
        for before, after in pairwise(sessions):
            assert after["from_step"] == before["step"] > before["from_step"], sessions
        assert "is done again" not in self.log()


@pytest.fixture
def submission(cluster: SlurmCluster, sample_data: Path, tmp_path: Path) -> Submission:
    return Submission(cluster, tmp_path, sample_data)


@pytest.mark.whole
def test_one_submission_of_two_minutes_finishes_a_run_that_needs_four(submission, cluster, uninterrupted):
    # SLURM looks every 30 s: the signal comes 10 to 40 s before the end.
    limit = ("--time", "2", "--signal", "B:USR1@10")
    words = ("--session.margin", "5")
    # On a machine so busy that a start takes that long, the signal comes before there is anything to save.
    patient = {"FAILURE_LIMIT": "20"}
    job = submission.submit(*limit, pause_s=240 / STEPS / 2, words=words, environment=patient)
    submission.assert_finished_like(uninterrupted())
    submission.assert_nothing_lost()
    *again, last = submission.ends()
    assert last == ("finished", "all steps done")
    assert len(again) == int(cluster.about(job, "Restarts"))
    told = [each for each in again if "before it came to train" not in each[1]]
    assert set(told) == {("again", "signal SIGUSR1")} and len(told) >= 2


def test_suspended_job_goes_on_and_a_signal_to_its_shell_saves_and_requeues_on_two_nodes(
    submission, cluster, uninterrupted
):
    job = submission.submit(nodes=2, pause_s=0.25, accidents=(hold_at(15),), words=("--session.hang_timeout", "20s"))
    submission.wait_at(15)
    cluster.ask("scontrol", "suspend", job)
    assert cluster.state(job) == "SUSPENDED"
    time.sleep(30)
    cluster.ask("scontrol", "resume", job)
    cluster.ask("scancel", "--signal=USR1", "--batch", job)
    submission.go_on(15)
    submission.assert_finished_like(uninterrupted())
    submission.assert_nothing_lost()
    assert submission.ends() == [("again", "signal SIGUSR1"), ("finished", "all steps done")]


@pytest.mark.whole
@pytest.mark.parametrize("words", [(), DEEPSPEED])
def test_ranks_that_hang_at_the_time_limit_are_ended_and_the_run_goes_on(submission, cluster, uninterrupted, words):
    hang = {"at": "forward", "step": 20, "rank": 1, "do": "hold"}
    job = submission.submit("--signal", "B:USR1@1", accidents=(hang,), words=words)
    submission.wait_at(20, rank=1)
    hours, minutes, _ = map(int, cluster.about(job, "RunTime").split(":"))
    cluster.ask("scontrol", "update", f"JobId={job}", f"TimeLimit={60 * hours + minutes + 1}")  # within a minute
    submission.wait_until(lambda: cluster.state(job) == "PENDING", "queued again")
    cluster.ask("scontrol", "update", f"JobId={job}", "TimeLimit=30")
    submission.go_on(20)
    submission.assert_finished_like(uninterrupted(*words))
    assert submission.ends()[0][0] == "again"
    assert read_sessions(submission.run_dir)[1]["from_step"] == 18


@pytest.mark.whole
@pytest.mark.parametrize("words", [(), DEEPSPEED])
def test_cancelled_job_whose_port_was_taken_saves_and_rests_until_it_is_submitted_again(
    submission, cluster, uninterrupted, words
):
    before = cluster.submit("--hold", "--wrap", "true")
    # Another program has the port that follows from the job's number: it is passed over.
    with socket.create_server(("", 12000 + 101 * (before + 1) % 20000)):
        job = submission.submit(accidents=(hold_at(15),), words=words)
        assert job == before + 1
        submission.wait_at(15)
    cluster.ask("scancel", job)
    submission.wait_until_told()
    submission.go_on(15)
    assert cluster.wait_for(job) == "CANCELLED"
    assert status_of(submission.run_dir)["reason"] == "signal SIGTERM"
    assert last_checkpoint(submission.run_dir).step == status_of(submission.run_dir)["step"]
    submission.assert_rests(job)
    submission.submit(pause_s=0, words=words)
    submission.assert_finished_like(uninterrupted(*words))
    submission.assert_nothing_lost()


@pytest.mark.whole
def test_job_that_is_cancelled_while_it_judges_a_crash_does_not_come_back_to_life(submission, cluster, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import pathlib, sys, time\n"
        "here = pathlib.Path(__file__).parent\n"
        "if 'launch.slurm.job' in sys.orig_argv and 'end' in sys.orig_argv:\n"
        "    (here / 'judging').touch()\n"
        "    while not (here / 'go').exists(): time.sleep(0.1)\n"
    )
    crash = {"at": "forward", "step": 8, "rank": 1, "do": "raise"}
    job = submission.submit(accidents=(crash,), pause_s=0, environment={"PYTHONPATH": str(tmp_path)})
    submission.wait_until((tmp_path / "judging").exists, "the crash is judged")
    cluster.ask("scancel", job)
    while "CANCELLED AT" not in submission.log():  # the batch shell has its signal
        time.sleep(0.1)
    (tmp_path / "go").touch()
    assert cluster.wait_for(job) == "CANCELLED"
    submission.assert_rests(job)
    assert [outcome for outcome, _ in submission.ends()] == ["again", "taken"]


@pytest.mark.whole
def test_mistake_of_the_user_is_told_and_not_tried_again(submission, cluster, uninterrupted):
    submission.submit(pause_s=0)
    submission.assert_finished_like(uninterrupted())
    job = submission.submit(pause_s=0, words=("--seed", "5"))
    assert cluster.wait_for(job) == "FAILED"
    outcome, reason = submission.ends()[-1]
    assert outcome == "failed" and "holds a run with another definition (seed: 1234 -> 5)" in reason
    assert reason in submission.log()
    assert int(cluster.about(job, "Restarts")) == 0
    assert_same_model(submission.run_dir, uninterrupted())


@pytest.mark.whole
@pytest.mark.parametrize(("words", "partition"), [((), "main"), (DEEPSPEED, "abrupt")])
def test_preempted_job_saves_gives_way_and_comes_back_on_two_nodes(
    submission, cluster, uninterrupted, words, partition
):
    job = submission.submit("--partition", partition, nodes=2, accidents=(hold_at(15),), words=words)
    submission.wait_at(15)
    urgent = cluster.submit(*("-p", "urgent", "-N", 2, "--exclusive", "-o", "/dev/null", "--wrap", "sleep 3"))
    submission.wait_until_told()
    submission.go_on(15)
    assert cluster.wait_for(urgent) == "COMPLETED"
    submission.assert_finished_like(uninterrupted(*words))
    submission.assert_nothing_lost()
    assert int(cluster.about(job, "Restarts")) == 1


@pytest.mark.whole
@pytest.mark.parametrize("node", [0, 1])
def test_dead_node_costs_no_more_than_a_checkpoint_interval(submission, cluster, uninterrupted, node):
    job = submission.submit(nodes=2, accidents=(hold_at(20),))
    submission.wait_at(20)
    cluster.kill_node(cluster.nodes[node])
    submission.go_on(20)
    cluster.wait_for(job, "PENDING", "COMPLETING")
    newest = assert_little_is_lost(submission.run_dir)
    cluster.start_node(cluster.nodes[node])
    submission.assert_finished_like(uninterrupted())
    # More than two only where SLURM's word to end the job, meant for the dead node, reaches it when it lives again.
    first, *others = read_sessions(submission.run_dir)
    assert first["from_step"] == 0
    assert [each["from_step"] for each in others] == [newest, *(each["step"] for each in others[:-1])]


@pytest.mark.whole
def test_job_that_always_crashes_stops_after_three_sessions_and_says_why(submission, cluster):
    crash = {"at": "forward", "step": 8, "rank": 1, "do": "raise"}
    job = submission.submit(accidents=(crash,), pause_s=0)
    assert cluster.wait_for(job) == "FAILED"
    assert cluster.about(job, "ExitCode") == "1:0"
    *again, (outcome, reason) = submission.ends()
    assert outcome == "failed" and [each for each, _ in again] == ["again"] * 3
    assert "3 sessions in a row came no further than step 6" in reason
    assert reason in submission.log()
    assert "a planted mistake" in submission.log()
