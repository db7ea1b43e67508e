"""What becomes of the command that a user wants to be run at the end of a session."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.support.commands import Launch
from tests.support.lives import Life
from tests.support.runs import SHORT_RUN
from training.engine import logbook


def test_command_at_the_end_of_each_session_hears_how_the_run_stands(launch: Launch, sample_data, tmp_path):
    said = tmp_path / "said"
    command = f'echo "$RELAY_STATUS|$RELAY_REASON|$RELAY_RUN_DIR" >> {said}; exit 3'
    run = (*SHORT_RUN, "--optim.steps", 4, "--session.on_end", command)
    life = Life(launch, tmp_path, sample_data, ranks=2, run=run)
    stopped = life.start({"at": "forward", "step": 3, "rank": 1, "do": "SIGTERM"}).wait()
    assert stopped.status == 0 and "session.on_end ended with status 3" in stopped.err, stopped
    assert life.start().wait().status == 0
    where = life.run_dir.resolve()
    assert said.read_text("utf-8").splitlines() == [
        f"resumable|signal SIGTERM|{where}",
        f"finished|all steps done|{where}",
    ]


def test_command_that_does_not_end_is_ended_with_all_it_started(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(logbook, "ON_END_LIMIT_S", 0.2)
    logbook.send_word(f"(sleep 1; touch {tmp_path}/late) & wait", tmp_path, "failed", "a reason")
    assert "had not ended after 0.2 s" in capsys.readouterr().err
    time.sleep(1.2)
    assert not Path(tmp_path, "late").exists()


@pytest.mark.parametrize("reason", ["$(touch hole)", "`touch hole`", "'; touch hole; '"])
def test_reason_is_text_and_no_part_of_the_command(tmp_path, monkeypatch, reason):
    monkeypatch.chdir(tmp_path)
    logbook.send_word('printf %s "$RELAY_REASON" > said', tmp_path, "failed", reason)
    assert (tmp_path / "said").read_text("utf-8") == reason and not (tmp_path / "hole").exists()
