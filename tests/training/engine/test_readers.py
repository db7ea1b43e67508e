"""Nobody reads what a run prints any more: the terminal closes, the reader dies, the log's disk is full.

What the run writes down stands in its folder, so it goes on, or, told to end, it saves first.
"""

from __future__ import annotations

import json
import os
import pty
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.commands import PATIENCE_S
from tests.support.lives import RUN, SLOW, Life, assert_all_gone, assert_stopped
from tests.support.runs import assert_same_model, assert_same_record, command_of, reference
from tests.support.zygote import fork, usual_environment


@pytest.fixture
def uninterrupted(sample_data: Path) -> Callable[[int], Path]:
    return lambda ranks: reference(sample_data, *RUN, ranks=ranks)


def test_closed_terminal_leaves_a_checkpoint_and_under_nohup_the_run_goes_on(
    uninterrupted, launch, sample_data, tmp_path
):
    life = Life(launch, tmp_path, sample_data, ranks=None)
    for step, starter, status in ((8, None, 75), (20, ["nohup", sys.executable, "-m"], 0)):
        session = life.start({"at": "forward", "step": step, "do": "hold"}, starter=starter)
        life.wait_at(session, f"forward-{step}")
        session.process.send_signal(signal.SIGHUP)
        life.go_on(f"forward-{step}")
        assert session.wait().status == status
        if status:
            assert 8 <= assert_stopped(life.run_dir, "signal SIGHUP") < 20
    assert_same_model(life.run_dir, uninterrupted(1))
    assert_same_record(life.run_dir, uninterrupted(1))


def test_closed_terminal_of_torchrun_leaves_a_checkpoint_also_under_nohup(uninterrupted, launch, sample_data, tmp_path):
    # torchrun handles the signal whether nohup wants it ignored or not, and hands it on to its ranks.
    life = Life(launch, tmp_path, sample_data, ranks=2)
    session = life.start(SLOW, starter=["nohup", sys.executable, "-m"], real=True)
    session.wait_for_step(life.run_dir, 10)
    os.kill(session.process.pid, signal.SIGHUP)
    session.wait()
    assert_all_gone(session)
    assert_stopped(life.run_dir, "signal SIGHUP")
    life.finish(uninterrupted(2))


@pytest.mark.parametrize("gone", ["the reader of a pipe", "the terminal", "room for the log"])
def test_run_goes_on_when_nobody_reads_it(gone, uninterrupted, sample_data, tmp_path):
    read, write = os.pipe() if gone == "the reader of a pipe" else pty.openpty()
    accident = {"at": "forward", "step": 7, "rank": 0, "do": "hold"}
    environment = {**usual_environment(), "ACCIDENTS": json.dumps({"folder": str(tmp_path), "list": [accident]})}
    words = [str(word) for word in command_of(tmp_path / "run", sample_data, *RUN)]
    with Path("/dev/full" if gone == "room for the log" else f"/dev/fd/{write}").open("wb") as file:
        process = fork("tests.support.faulty_training", words, environment, file, file, None)
    while not (tmp_path / "at-forward-7-0").exists():
        assert process.poll() is None
    os.close(write)
    os.close(read)
    (tmp_path / "go-forward-7").touch()
    assert process.wait(PATIENCE_S) == 0
    assert_same_model(tmp_path / "run", uninterrupted(1))
    assert_same_record(tmp_path / "run", uninterrupted(1))
