"""Where the hours of a run went adds up, whatever happened to it."""

from __future__ import annotations

import re
import time

import pytest

from tests.support.commands import Launch
from tests.support.lives import Life
from tests.support.runs import SHORT_RUN, command_of, reference, status_of
from training.engine.checkpoint import checkpoints
from training.engine.goodput import KINDS, Clock, goodput, hours_of, in_words
from training.engine.status import read_sessions, where_hours_went


def session(began: float, from_step: int, step: int, hours: dict[str, float], **more: float) -> dict[str, object]:
    return {"began": began, "from_step": from_step, "step": step, "hours": hours, **more}


def test_clock_counts_each_moment_once(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr("training.engine.goodput.process_age_s", lambda: 4.0)
    monkeypatch.setattr(Clock, "_ended", 0.0)
    clock = Clock()
    for kind, seconds in (("steps", 1.0), ("validation", 10.0), ("steps", 2.0), ("end", 3.0)):
        clock.enter(kind)
        now[0] += seconds
        with clock.during("saves"):
            now[0] += 0.5
    assert clock.seconds() == {"start": 4.0, "steps": 3.0, "validation": 10.0, "end": 3.0, "saves": 2.0}


def test_steps_that_a_kill_or_a_fallback_took_do_not_count():
    """Killed 6 s behind its save at step 10, and started again 20 s after that; then taken back from step 20 to 15."""
    sessions = [
        session(0.0, 0, 10, {"start": 2.0, "steps": 10.0}, last_sign=18.0),
        session(38.0, 10, 20, {"start": 2.0, "steps": 10.0, "saves": 1.0}),
        session(60.0, 15, 30, {"start": 2.0, "steps": 15.0, "end": 1.0}),
    ]
    hours = hours_of(sessions, [True, False, False])
    expected = {"steps": 10 + 5 + 15, "again": 6 + 5, "start": 6, "saves": 1, "end": 1, "unknown": 20, "between": 9}
    assert hours == {**dict.fromkeys(KINDS, 0.0), **expected}
    assert sum(hours.values()) == 60 + 18
    assert goodput(hours) == (30 / 78, 30 / 49)
    shares = re.findall(r"([\d.]+)% ", in_words(hours).partition("first start on: ")[2])
    assert sum(map(float, shares)) == pytest.approx(100, abs=0.05 * len(shares))


def test_steps_beyond_what_a_session_did_are_taken_from_those_before_it():
    """Stopped at 260; a session that did not a step; another that did one; and back to 240."""
    sessions = [
        session(0.0, 0, 260, {"steps": 260.0}),
        session(300.0, 260, 260, {"start": 1.0}),
        session(310.0, 260, 261, {"steps": 9.0}),
        session(400.0, 240, 241, {"steps": 1.0}),
    ]
    hours = hours_of(sessions, [False] * 4)
    assert (hours["steps"], hours["again"]) == (240 + 1, 20 + 9)


def test_second_run_of_a_process_does_not_count_the_first(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr("training.engine.goodput.process_age_s", lambda: now[0])
    monkeypatch.setattr(Clock, "_ended", 0.0)
    first = Clock()
    first.enter("end")
    now[0] += 50
    assert first.seconds() == {"start": 100.0, "end": 50.0}
    now[0] += 7
    assert Clock().seconds() == {"start": 7.0}


def test_sessions_of_before_there_were_hours_are_left_out():
    assert in_words(hours_of([{"from_step": 0, "step": 3}], [False])) == ""


def test_run_that_was_killed_says_where_its_hours_went(launch: Launch, sample_data, tmp_path):
    run = (*SHORT_RUN, "--optim.steps", 12, "--checkpoint.every_steps", 4, "--log.validate_every_steps", 6)
    life = Life(launch, tmp_path, sample_data, ranks=2, run=run)
    began = time.time()
    life.kill_at(8)
    life.kill_at(11)
    result = life.start().wait()
    assert result.status == 0, result
    sessions = read_sessions(life.run_dir)
    hours = where_hours_went(sessions)
    whole = sum(hours.values())
    last = sessions[-1]["began"] + sum(sessions[-1]["hours"].values())
    assert whole == pytest.approx(last - sessions[0]["began"], abs=0.1)
    assert whole > 0
    assert {kind for kind, seconds in hours.items() if seconds > 0} >= {
        "steps",
        "again",
        "start",
        "validation",
        "saves",
    }
    assert sessions[1]["began"] > began
    status = status_of(life.run_dir)
    assert (status["goodput_since_first_start"], status["goodput"]) == pytest.approx(goodput(hours), abs=0.05)
    assert "goodput" in result.out and "steps done again" in result.out


def test_uninterrupted_run_has_no_time_between_and_none_done_again(sample_data):
    hours = where_hours_went(read_sessions(reference(sample_data, *SHORT_RUN, "--optim.steps", 3)))
    assert hours["steps"] > 0 and hours["again"] == hours["unknown"] == hours["between"] == 0


def test_how_often_to_save_is_measured_once(launch: Launch, sample_data, tmp_path):
    run = (*SHORT_RUN, "--optim.steps", 30, "--checkpoint.every_steps", "auto", "--checkpoint.keep", 9)
    life = Life(launch, tmp_path, sample_data, ranks=2, run=run)
    first = life.start({"at": "forward", "step": 15, "rank": 0, "do": "hold"})
    life.wait_at(first, "forward-15")
    (life.run_dir / "STOP").touch()
    life.go_on("forward-15")
    printed = first.wait().out
    found = re.search(r"with a kill every 24 hours one every ([\d,]+) steps \(.*\) loses least", printed)
    assert found, printed
    measured = int(found[1].replace(",", ""))

    def known() -> dict[int, int | None]:
        found = {each.step: each.state()["measured_interval"] for each in checkpoints(life.run_dir)}
        return {step: each and each["steps"] for step, each in found.items()}

    assert known() == {10: None, 15: measured}
    assert life.start().wait().status == 0
    assert known() == {10: None, 30: measured}, "a session that goes on has the same"
    # A run that begins with another one's weights has saved before its first step, from which nothing can be told.
    run_dir = tmp_path / "other"
    command = command_of(run_dir, sample_data, *run, "--init_from", life.run_dir, "--checkpoint.hours_between_kills", 2)
    result = launch(*command).wait()
    assert result.status == 0 and "with a kill every 2 hours" in result.out, result
    assert [each.state()["measured_interval"] for each in checkpoints(run_dir)][:2] == [None, None]
