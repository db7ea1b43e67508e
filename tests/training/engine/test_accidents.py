"""Every accident in the life of a run, with real processes, signals and files.

Each ends in a run that is finished and equal, byte for byte, to one that nothing ever happened to; or in the clear
error that was promised. The accidents happen at exact places (tests/support/faulty_training.py), not after seconds.
"""

from __future__ import annotations

import math
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.commands import Result, Started
from tests.support.lives import (
    EPOCH,
    LOG_EVERY,
    RUN,
    SAVE_EVERY,
    SECONDS,
    SLOW,
    STEPS,
    Life,
    assert_all_gone,
    assert_little_is_lost,
    assert_stopped,
    resumed_at,
    wait_until,
)
from tests.support.runs import (
    assert_only_one_line_is_said,
    assert_same_model,
    assert_same_record,
    content_of,
    last_checkpoint,
    reference,
    status_of,
    train_lines,
)
from training.base.environment import KAGGLE_LIMIT_S, time_left
from training.base.processes import family_of, signal_all
from training.engine.checkpoint import checkpoints
from training.engine.metrics import read_metrics
from training.engine.status import read_sessions


@pytest.fixture
def uninterrupted(sample_data: Path) -> Callable[[int], Path]:
    """The run folder of `RUN` on so many ranks, trained when it is first asked for."""
    return lambda ranks: reference(sample_data, *RUN, ranks=ranks)


# Kills.


def test_kills_at_any_moment_lose_no_more_than_since_the_last_checkpoint(uninterrupted, launch, sample_data, tmp_path):
    life = Life(launch, tmp_path, sample_data, ranks=2)
    dice = random.Random(11)

    # One rank, at some moment.
    session = life.start(SLOW)
    session.wait_for_step(life.run_dir, 5)
    time.sleep(dice.uniform(0, 0.5))
    os.kill(session.rank(1), signal.SIGKILL)
    assert session.wait().status != 0
    assert_all_gone(session)
    newest = assert_little_is_lost(life.run_dir)

    # All of them and the launcher, while a checkpoint is being written.
    session = life.start(SLOW, {"at": "write", "step": 27, "do": "hold"})
    life.wait_at(session, "write-27")
    assert (life.run_dir / "checkpoints/.step-0000000027.partial").is_dir()
    time.sleep(dice.uniform(0, 0.3))
    session.kill_all()
    assert resumed_at(session) == newest
    newest = assert_little_is_lost(life.run_dir)
    assert newest == 24

    # The one that writes, in the middle of it: the others must notice.
    session = life.start({"at": "write", "step": 36, "do": "SIGKILL"})
    assert session.wait().status != 0
    assert_all_gone(session)
    assert resumed_at(session) == newest
    newest = assert_little_is_lost(life.run_dir)
    assert newest == 33

    # All of them, at some moment.
    session = life.start(SLOW, {"at": "forward", "step": STEPS, "do": "hold"})
    session.wait_for_step(life.run_dir, 45)
    time.sleep(dice.uniform(0, 0.5))
    session.kill_all()
    assert resumed_at(session) == newest
    newest = assert_little_is_lost(life.run_dir)

    result = life.finish(uninterrupted(2))
    assert f"resuming at step {newest} from" in result.out
    listing = launch(life.run_dir, module="training.engine.checkpoint").wait()
    assert listing.status == 0 and "ok (newest" in listing.out, listing
    reasons = [session["reason"] for session in read_sessions(life.run_dir)]
    assert reasons[1] == reasons[3] == "killed, or its machine went down" and reasons[-1] == "all steps done"


def test_ranks_whose_launcher_is_killed_save_and_go_away_by_themselves(uninterrupted, launch, sample_data, tmp_path):
    life = Life(launch, tmp_path, sample_data, ranks=2, real=True)
    # When the ranks have met and nothing else has happened.
    session = life.start(SLOW, {"at": "plan", "do": "hold"})
    for rank in range(2):
        life.wait_at(session, "plan-0", rank)
    os.kill(session.process.pid, signal.SIGKILL)
    assert session.wait().status == -signal.SIGKILL
    life.go_on("plan-0")
    assert_all_gone(session)
    assert_stopped(life.run_dir, "the end of the launcher")

    # In the middle; torchrun does not catch SIGUSR1 unless told to.
    session = life.start(SLOW, {"at": "forward", "step": 31, "rank": 0, "do": "hold"})
    life.wait_at(session, "forward-31")
    os.kill(session.process.pid, signal.SIGUSR1)
    assert session.wait().status == -signal.SIGUSR1
    life.go_on("forward-31")
    assert_all_gone(session)
    assert_stopped(life.run_dir, "the end of the launcher")

    # While the ranks are only starting: they have no place then to meet at.
    session = life.start()
    wait_until(session, lambda: len(session.living()) == 3, "starting its ranks")
    os.kill(session.process.pid, signal.SIGKILL)
    assert session.wait().status == -signal.SIGKILL
    assert_all_gone(session)
    life.finish(uninterrupted(2))


# Signals.


@pytest.mark.whole
def test_signal_to_one_of_four_ranks_or_to_all_stops_all_at_the_same_step(uninterrupted, launch, sample_data, tmp_path):
    life = Life(launch, tmp_path, sample_data, ranks=4)
    # The signal comes during step 7: all stop behind that one.
    session = life.start(SLOW, {"at": "forward", "step": 7, "rank": 2, "do": "SIGTERM"})
    assert session.wait().status == 0
    assert_all_gone(session)
    assert_stopped(life.run_dir, "signal SIGTERM", 7)

    session = life.start(SLOW, {"at": "forward", "step": 43, "rank": 1, "do": "hold"})
    life.wait_at(session, "forward-43", rank=1)
    for rank in range(4):
        os.kill(session.rank(rank), signal.SIGUSR1)
    life.go_on("forward-43")
    assert session.wait().status == 0
    assert_all_gone(session)
    assert_stopped(life.run_dir, "signal SIGUSR1", 43)
    life.finish(uninterrupted(4))


def test_signal_to_the_launcher_is_passed_on_and_stops_the_run(uninterrupted, launch, sample_data, tmp_path):
    life = Life(launch, tmp_path, sample_data, ranks=2)
    session = life.start(SLOW, torchrun=("--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1"))
    session.wait_for_step(life.run_dir, 10)
    os.kill(session.process.pid, signal.SIGUSR1)
    session.wait()
    assert_all_gone(session)
    assert_stopped(life.run_dir, "signal SIGUSR1")
    life.finish(uninterrupted(2))


def test_stop_file_counts_when_another_stop_came_first(launch, sample_data, tmp_path):
    life = Life(launch, tmp_path, sample_data, ranks=2)
    places = ({"at": "forward", "step": 20, "rank": 0, "do": "SIGTERM"}, {"at": "write", "step": 20, "do": "hold"})
    session = life.start(*places)
    life.wait_at(session, "write-20")  # the last save
    (life.run_dir / "STOP").touch()
    life.go_on("write-20")
    assert session.wait().status == 0
    assert_stopped(life.run_dir, "signal SIGTERM", 20)
    assert status_of(life.run_dir)["restart"] is False and not (life.run_dir / "STOP").exists()


def test_stop_signal_can_be_chosen_or_none_and_a_second_ctrl_c_leaves_at_once(
    uninterrupted, launch, sample_data, tmp_path
):
    life = Life(launch, tmp_path, sample_data, ranks=None)

    def held(step: int, *words: object) -> Started:
        session = life.start({"at": "forward", "step": step, "do": "hold"}, words=words)
        life.wait_at(session, f"forward-{step}")
        return session

    # Before the first step there is nothing yet that an optimizer could remember.
    life.run_dir.mkdir()
    (life.run_dir / "STOP").touch()
    assert life.start().wait().status == 75
    assert_stopped(life.run_dir, f"the file {life.run_dir / 'STOP'}", 0)

    session = held(8, "--session.stop_signal", "SIGUSR2")
    session.process.send_signal(signal.SIGUSR2)
    life.go_on("forward-8")
    assert session.wait().status == 75
    stopped_at = assert_stopped(life.run_dir, "signal SIGUSR2")
    assert 8 <= stopped_at < 18

    session = held(20, "--session.stop_signal", "null")
    session.process.send_signal(signal.SIGUSR1)
    assert session.wait().status == -signal.SIGUSR1
    newest = assert_little_is_lost(life.run_dir)

    session = held(35)
    session.process.send_signal(signal.SIGINT)
    # Two signals that are sent at once may arrive as one; people do not press keys that quickly.
    time.sleep(1)
    assert session.process.poll() is None, "once is a polite stop"
    assert "stopping behind this step" in session.printed()
    session.process.send_signal(signal.SIGINT)
    result = session.wait()
    assert result.status == 130, result
    assert "Traceback" not in result.err
    assert resumed_at(session) == newest
    assert status_of(life.run_dir)["status"] == "resumable"
    assert "interrupted" in status_of(life.run_dir)["reason"]
    assert_little_is_lost(life.run_dir)
    assert last_checkpoint(life.run_dir).step <= 33
    life.finish(uninterrupted(1))


# A stop may come in the middle of anything.


def test_stop_during_a_validation_at_an_epoch_boundary_or_in_a_log_window_leaves_no_mark(
    uninterrupted, launch, sample_data, tmp_path
):
    life = Life(launch, tmp_path, sample_data, ranks=2)

    def validations() -> list[int]:
        return [line["step"] for line in read_metrics(life.run_dir) if line["kind"] == "validation"]

    def stopped_in_validation(step: int) -> None:
        session = life.start(SLOW, {"at": "batch", "step": step, "rank": 1, "do": "SIGTERM"})
        assert session.wait().status == 0
        assert_stopped(life.run_dir, "signal SIGTERM", step)
        assert last_checkpoint(life.run_dir).state()["validated_step"] < step
        assert step not in validations()

    stopped_in_validation(20)

    # The validation comes first. Then: at the end of an epoch, and with two steps of a window of five done.
    accident = {"at": "forward", "step": EPOCH, "rank": 1, "do": "SIGTERM"}
    assert life.start(SLOW, accident).wait().status == 0
    assert_stopped(life.run_dir, "signal SIGTERM", EPOCH)
    assert train_lines(life.run_dir)[-1]["step"] == EPOCH - EPOCH % LOG_EVERY < EPOCH
    assert validations() == [20]

    # In another window's middle, of which no checkpoint would be due.
    assert life.start(SLOW, {"at": "forward", "step": 37, "rank": 0, "do": "SIGUSR1"}).wait().status == 0
    assert_stopped(life.run_dir, "signal SIGUSR1", 37)

    # Right behind a validation, which is not done again. Its batches are slow, too: the ranks agree at every look.
    accident = {"at": "validated", "step": 40, "rank": 1, "do": "SIGINT"}
    assert life.start(SLOW, {**SLOW, "at": "batch"}, accident).wait().status == 0
    assert_stopped(life.run_dir, "signal SIGINT", 40)
    assert last_checkpoint(life.run_dir).state()["validated_step"] == 40

    stopped_in_validation(STEPS)
    life.finish(uninterrupted(2))


def test_stop_during_the_last_validation_is_made_up_for_also_when_that_one_is_not_the_best(
    launch, sample_data, tmp_path
):
    """At such a learning rate all validations are alike: the first one stays the best."""
    lives = []
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
        life = Life(launch, tmp_path / name, sample_data, ranks=None)
        life.command = (*life.command, "--optim.steps", 12, "--optim.lr", 1e-9, "--log.validate_every_steps", 4)
        lives.append(life)
    whole, stopped = lives
    assert whole.start().wait().status == 0
    assert last_checkpoint(whole.run_dir).state()["best_step"] == 4
    accident = {"at": "batch", "step": 12, "do": "SIGTERM"}
    assert stopped.start(SLOW, accident).wait().status == 75
    assert_stopped(stopped.run_dir, "signal SIGTERM", 12)
    stopped.finish(whole.run_dir)
    assert f"{stopped.run_dir} is finished" in stopped.start().wait().out


# Damage.


def cut_in_half(folder: Path) -> None:
    os.truncate(folder / "optimizer.safetensors", (folder / "optimizer.safetensors").stat().st_size // 2)


def flip_a_bit(folder: Path) -> None:
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[len(content) // 2] ^= 16
    (folder / "model.safetensors").write_bytes(content)


def lose_a_file(folder: Path) -> None:
    (folder / "state.json").unlink()


def add_a_file(folder: Path) -> None:
    (folder / "state.json.bak").touch()


def put_a_folder_in_place_of_a_file(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").mkdir()


def test_damaged_checkpoints_are_named_and_set_aside_and_the_run_goes_on_before_them(
    uninterrupted, launch, sample_data, tmp_path
):
    life = Life(launch, tmp_path, sample_data, ranks=2)
    session = life.start(
        SLOW, {"at": "forward", "step": 26, "rank": 0, "do": "SIGTERM"}, words=("--checkpoint.keep", 6)
    )
    assert session.wait().status == 0
    saved = checkpoints(life.run_dir)[-6:]
    damages = (cut_in_half, flip_a_bit, lose_a_file, add_a_file, put_a_folder_in_place_of_a_file)
    for each, damage in zip(saved[1:], damages, strict=True):
        damage(each.folder)
    result = life.finish(uninterrupted(2))
    assert f"resuming at step {saved[0].step} from" in result.out
    for each in saved[1:]:
        assert f"checkpoint {each.folder} is damaged: " in result.err
        assert each.folder.with_name(f"invalid-{each.folder.name}").is_dir()

    for each in checkpoints(life.run_dir):
        flip_a_bit(each.folder)
        (each.folder / "state.json").unlink()
    damaged = checkpoints(life.run_dir)
    result = life.start().wait()
    assert all(f"checkpoint {each.folder} is damaged: " in result.err for each in damaged)
    assert_refuses_to_train_anew(result, life.run_dir)


def assert_refuses_to_train_anew(result: Result, run_dir: Path) -> None:
    assert result.status == 1
    (line,) = result.error_lines
    assert "no valid one is left: put a copy of one back" in line and f"mv {run_dir} {run_dir}-1" in line


def test_damaged_or_lost_files_beside_the_checkpoints_are_set_aside_or_written_again(
    uninterrupted, launch, sample_data, tmp_path
):
    life = Life(launch, tmp_path, sample_data, ranks=None)
    session = life.start({"at": "forward", "step": 26, "do": "SIGTERM"})
    assert session.wait().status == 75
    run_dir = life.run_dir
    first, *others = (run_dir / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    no_lines = b'not JSON\n\0\0\n{"kind": "train", "step": 9}\n\xff\n[]\n'
    damages = {
        "metrics.jsonl": b"".join([first, no_lines, *others]),
        "sessions.json": b'[{"number": 1}]',
        "status.json": b"\xff\xfe",
        "wandb.json": b"[]",
        "config.yaml": b"\x80",
    }
    for name, content in damages.items():
        (run_dir / name).write_bytes(content)
    (run_dir / "data.json").unlink()
    shutil.rmtree(run_dir / "tokenizer")

    result = life.finish(uninterrupted(1))
    for name, content in damages.items():
        assert f"{run_dir / name} is damaged" in result.err
        assert (run_dir / f"damaged-1-{name}").read_bytes() == content
    assert (run_dir / "config.yaml").is_file()
    whole = uninterrupted(1)
    for path in (whole / "data.json", *(whole / "tokenizer").rglob("*")):
        assert path.is_dir() or (run_dir / path.relative_to(whole)).read_bytes() == path.read_bytes()

    # Of a finished run, too.
    (run_dir / "sessions.json").write_text("{}")
    config = (run_dir / "config.yaml").read_bytes()
    (run_dir / "config.yaml").write_bytes(config.replace(b"seed: 1234\n", b""))
    result = life.start().wait()
    assert result.status == 0 and "is finished" in result.out and "damaged-2-sessions.json" in result.err
    assert "damaged (a part is missing)" in result.err and (run_dir / "config.yaml").read_bytes() == config

    shutil.rmtree(run_dir / "checkpoints")
    (run_dir / "checkpoints").mkdir()
    before = content_of(run_dir)
    assert_refuses_to_train_anew(life.start().wait(), run_dir)
    assert content_of(run_dir) == before


def test_run_whose_first_session_was_killed_does_not_begin_again_when_its_checkpoints_are_gone(
    launch, sample_data, tmp_path
):
    life = Life(launch, tmp_path, sample_data, ranks=None)
    life.kill_at(10)
    assert checkpoints(life.run_dir)
    shutil.rmtree(life.run_dir / "checkpoints")
    assert_refuses_to_train_anew(life.start().wait(), life.run_dir)


# Disks.


def fill(disk: Path) -> Path:
    """Leaves room on the disk for small files, but not for a checkpoint."""
    filler = disk / "filler"
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    filler.write_bytes(bytes(free - 250_000))
    return filler


def test_full_disk_is_survived_while_a_checkpoint_stands_and_stops_the_run_when_it_stays_full(
    uninterrupted, launch, sample_data, small_disk, tmp_path
):
    life = Life(launch, tmp_path, sample_data, ranks=None, run_dir=small_disk / "run")
    once = ("--checkpoint.keep", 1)
    places = (8, 10, 14)
    session = life.start(*({"at": "forward", "step": step, "do": "hold"} for step in places), words=once)

    def hold_with(step: int) -> None:
        """Held in the step, with nothing in flight: the newest checkpoint due is there."""
        life.wait_at(session, f"forward-{step}")
        newest = (step - 1) // SAVE_EVERY * SAVE_EVERY
        wait_until(session, lambda: [each.step for each in checkpoints(life.run_dir)] == [newest], "saved")

    hold_with(8)
    filler = fill(small_disk)
    life.go_on("forward-8")
    wait_until(session, lambda: "failed saves in a row: 1" in session.printed(), "warned")
    life.wait_at(session, "forward-10")
    filler.unlink()
    life.go_on("forward-10")
    hold_with(14)
    filler = fill(small_disk)
    life.go_on("forward-14")
    result = session.wait()
    assert result.status == 75, result
    status = status_of(life.run_dir)
    assert status["status"] == "resumable"
    assert "failing saves" in status["reason"] and "no space left on the disk" in status["reason"]
    assert result.err.count("failed saves in a row: 1") == 2, "room again: counted anew"
    assert "failed saves in a row: 3" in result.err
    assert result.error_lines == []
    assert last_checkpoint(life.run_dir).step == 12

    filler.unlink()
    life.command = (*life.command, *once)
    life.finish(uninterrupted(1))

    # No checkpoint stands: there is nothing to go on with.
    fill(small_disk)
    fresh = Life(launch, tmp_path / "fresh", sample_data, ranks=2, run_dir=small_disk / "fresh")
    (tmp_path / "fresh").mkdir()
    result = fresh.start().wait()
    assert_only_one_line_is_said(result, "no space left on the disk", "--run_dir")
    assert status_of(fresh.run_dir)["status"] == "failed"

    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert_only_one_line_is_said(life.start().wait(), "read-only file system", "--run_dir")
    assert_little_is_lost(life.run_dir)


def test_failing_disk_and_jumping_clock_change_nothing(uninterrupted, launch, sample_data, tmp_path):
    life = Life(launch, tmp_path, sample_data, ranks=2)
    life.command = (*life.command, "--session.time_limit", "30m")
    result = life.finish(
        uninterrupted(2),
        {"at": "forward", "do": "clock", "seconds": 86400, "always": True},
        {"at": "write", "step": 15, "do": "EIO"},
        {"at": "write", "step": 30, "do": "EROFS"},
        {"at": "write", "step": 45, "do": "ESTALE"},
    )
    assert "saving step 15: [Errno 5] Input/output error; trying again in 1 s" in result.err
    assert "the checkpoint of step 30 could not be written: " in result.err
    assert "read-only file system" in result.err
    assert "saving step 45: " in result.err and "failed saves in a row: 2" not in result.err


# Limits of time.


def test_time_limit_ends_a_session_in_time_and_the_next_ones_finish(uninterrupted, launch, sample_data, tmp_path):
    life = Life(launch, tmp_path, sample_data, ranks=2)
    slower = {**SLOW, "seconds": 0.2}  # 60 steps then take 24 s at least

    def limited(limit_s: float, *words: object, environment: dict[str, str] | None = None) -> str:
        words = ("--session.margin", "2s", *words)
        session = life.start(slower, words=words, environment=environment, real=False)
        wait_until(session, lambda: "this session ends in" in session.printed(), "told the limit")
        told = time.time()
        result = session.wait()
        assert result.status == 0, result
        # The status is written last. What the processes then need to go away is what the margin is for.
        over_s = (life.run_dir / "status.json").stat().st_mtime - told - limit_s
        assert over_s < 0, f"all was written only {over_s:.1f} s after the limit"
        assert_stopped(life.run_dir, "the time limit")
        return result.out

    limited(15, "--session.time_limit", "15s")
    first = status_of(life.run_dir)
    assert 0 < first["step"] < STEPS
    assert first["sessions_done"] == 1 and first["sessions_to_go"] >= 1 and first["remaining_s"] > 0

    # SLURM says it: by its own count of what is left, or else by the time of the end.
    programs = tmp_path / "programs"
    programs.mkdir()
    squeue = programs / "squeue"
    began = tmp_path / "began"
    squeue.write_text(
        f"#!/bin/sh\n[ -e {began} ] || date +%s > {began}\necho 0:0$(($(cat {began}) + 9 - $(date +%s)))\n"
    )
    squeue.chmod(0o755)
    slurm = {"SLURM_JOB_ID": "4711", "PATH": f"{programs}:{os.environ['PATH']}"}
    assert "this session ends in 9s: SLURM's time limit" in limited(9, environment=slurm)
    second = status_of(life.run_dir)["step"]
    assert first["step"] < second < STEPS
    assert read_sessions(life.run_dir)[-1]["job"] == "4711"

    life.finish(uninterrupted(2))


@pytest.mark.parametrize(
    ("said", "left_s"), [("0:14", 14), ("1-02:00:00", 93600), ("UNLIMITED", None), ("INVALID", 50)]
)
def test_slurm_tells_what_is_left_or_when_the_job_ends(tmp_path, monkeypatch, said, left_s):
    squeue = tmp_path / "squeue"
    squeue.write_text(f"#!/bin/sh\n[ \"$*\" = '--noheader --jobs 7 --format %L' ] && echo {said}\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(time.time() + 50))
    left = time_left()
    if left_s is None:
        assert left is None
        return
    assert left is not None and left[0] == pytest.approx(left_s, abs=5) and left[1] == "SLURM's time limit"
    squeue.write_text("#!/bin/sh\nexit 1\n")
    left = time_left()
    assert left is not None and left[0] == pytest.approx(50, abs=20)
    # Variables of a job that is over, in a shell that it has left: SLURM may know it still, or not.
    for answer in ("exit 0", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"):
        squeue.write_text(f"#!/bin/sh\n{answer}\n")
        assert time_left() == (math.inf, "SLURM has no job 7 now, so the variables of that job are ignored")
    squeue.write_text("#!/bin/sh\nexit 1\n")
    # A job whose limit has passed.
    monkeypatch.delenv("SLURM_JOB_END_TIME")
    assert time_left() is None
    squeue.write_text("#!/bin/sh\necho INVALID\n")
    assert time_left() == (0.0, "SLURM's time limit")


def test_kaggle_gives_twelve_hours_from_the_start_of_its_container(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert time_left() is None
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    left = time_left()
    assert left is not None and left[1] == "Kaggle's 12 hours"
    assert left[0] < KAGGLE_LIMIT_S, "the container is older than nothing"


# Ranks that fail.


def test_hanging_rank_is_named_with_its_stack_and_a_stopped_one_by_its_silence(
    uninterrupted, launch, sample_data, tmp_path
):
    life = Life(launch, tmp_path, sample_data, ranks=2, real=True)
    patience = ("--session.hang_timeout", "4s")

    session = life.start({"at": "forward", "step": 17, "rank": 1, "do": "sleep"}, words=patience)
    result = session.wait()
    assert result.status == 1, result
    assert_all_gone(session)
    assert "error: rank 1 (process " in result.err and "hangs: no progress for " in result.err
    assert "rank 0 waits for it" in result.err
    assert "where rank 1 is:" in result.err and "in sleep_for_ever" in result.err
    status = status_of(life.run_dir)
    assert status["status"] == "failed" and "rank 1 (process" in status["reason"]
    assert_little_is_lost(life.run_dir)

    stopped = {"at": "forward", "step": 37, "rank": 0, "do": "SIGSTOP"}
    session = life.start(stopped, words=patience)
    result = session.wait()  # torchrun tries politely for 30 s to end the stopped one
    assert result.status == 1, result
    assert_all_gone(session)
    assert "rank 0 of 2 gives no sign of life" in result.err
    status = status_of(life.run_dir)
    assert status["status"] == "failed" and "rank 0 of 2 gives no sign of life" in status["reason"]
    assert_little_is_lost(life.run_dir)
    life.finish(uninterrupted(2))


def test_mistake_on_one_rank_is_told_before_the_others_notice_and_ends_all(
    uninterrupted, launch, sample_data, tmp_path
):
    life = Life(launch, tmp_path, sample_data, ranks=2)
    session = life.start({"at": "forward", "step": 17, "rank": 1, "do": "raise"})
    session.wait_for_step(life.run_dir, 15)
    began = time.monotonic()
    result = session.wait()
    assert time.monotonic() - began < SECONDS
    assert result.status == 1, result
    assert_all_gone(session)
    mistake, notice = result.err.find("PlantedError: a planted mistake"), result.err.find("rank 0 ends as well: ")
    assert -1 < mistake < notice, result.err
    assert status_of(life.run_dir)["status"] == "failed"
    assert_little_is_lost(life.run_dir)
    life.finish(uninterrupted(2))


@pytest.mark.parametrize("ranks_of_it", ["one", "all"])
def test_error_to_mend_is_told_once_whichever_ranks_it_is_of(launch, sample_data, tmp_path, ranks_of_it):
    life = Life(launch, tmp_path, sample_data, ranks=2, real=ranks_of_it == "one")
    where = {"rank": 1} if ranks_of_it == "one" else {}
    result = life.start({"at": "forward", "step": 7, "do": "mend", **where}).wait()
    assert result.status == 1, result
    assert result.err.count("error: a planted mistake that the user can mend\n") >= 1
    own = [line for line in result.err.splitlines() if line == "error: a planted mistake that the user can mend"]
    assert len(own) == 1, result.err


def test_error_of_all_ranks_is_told_by_the_first_however_late_it_comes(launch, sample_data, tmp_path):
    life = Life(launch, tmp_path, sample_data, ranks=2)
    late = {"at": "begin", "rank": 0, "do": "pause", "seconds": 1}
    assert_only_one_line_is_said(life.start(late, words=("--modle.width", 32)).wait(), "modle.width")


def test_process_whose_lock_a_library_never_gives_back_is_shown_where_it_is_and_ended(launch, sample_data, tmp_path):
    life = Life(launch, tmp_path, sample_data, ranks=None)
    session = life.start({"at": "forward", "step": 7, "do": "lock"}, words=("--session.hang_timeout", "3s"))
    result = session.wait()
    assert result.status == -signal.SIGKILL
    assert "a library may hold Python's lock" in result.err and "in happen" in result.err
    assert last_checkpoint(life.run_dir).step == 6
    assert_all_gone(session)


@pytest.mark.parametrize("ranks", [pytest.param(None, marks=pytest.mark.whole), 2])
def test_pause_of_a_whole_run_is_survived_however_long(ranks, uninterrupted, launch, sample_data, tmp_path):
    life = Life(launch, tmp_path, sample_data, ranks, real=ranks is not None)
    session = life.start(SLOW, words=("--session.hang_timeout", "6s"))
    session.wait_for_step(life.run_dir, 10)
    family = family_of(session.process.pid)
    signal_all(family, signal.SIGSTOP)
    time.sleep(20)  # longer than torchrun waits for its own sign of life, too
    signal_all(family, signal.SIGCONT)
    assert session.wait().status == 0, session.printed()
    assert_same_model(life.run_dir, uninterrupted(ranks or 1))
    assert_all_gone(session)


def test_hanging_process_that_can_write_no_report_says_so_and_ends(launch, sample_data, tmp_path):
    life = Life(launch, tmp_path, sample_data, ranks=None, real=True)
    life.run_dir.mkdir()
    (life.run_dir / "hang").touch()  # where the folder of the reports would be
    session = life.start({"at": "forward", "step": 7, "do": "sleep"}, words=("--session.hang_timeout", "3s"))
    result = session.wait()
    assert result.status == 1, result
    assert "error: rank 0 made no progress for " in result.err and "cannot report it in" in result.err
    assert "in sleep_for_ever" in result.err


# Folders.


def test_second_run_in_the_same_folder_is_refused_and_does_not_disturb_the_first(
    uninterrupted, launch, sample_data, tmp_path
):
    life = Life(launch, tmp_path, sample_data, ranks=2)
    first = life.start({"at": "forward", "step": 17, "rank": 1, "do": "hold"})
    life.wait_at(first, "forward-17", rank=1)
    # The last save, in the background, must be done, and what it replaces removed.
    kept = [f"step-{step:010d}" for step in (12, 15)]
    folder = life.run_dir / "checkpoints"
    wait_until(first, lambda: sorted(path.name for path in folder.iterdir()) == kept, "done with saving step 15")
    writer = first.rank(0)
    before = content_of(life.run_dir)
    began = time.monotonic()
    second = launch(*life.command, ranks=2).wait()
    assert time.monotonic() - began < SECONDS
    assert_only_one_line_is_said(second, f"{life.run_dir} is in use by process {writer} on {socket.gethostname()}")
    assert content_of(life.run_dir) == before
    life.go_on("forward-17")
    assert first.wait().status == 0
    assert_same_model(life.run_dir, uninterrupted(2))
    assert_same_record(life.run_dir, uninterrupted(2))


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Nobody can write below the folder; root neither, where it may mount."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    mounted = os.geteuid() == 0 and not subprocess.run(["mount", "--bind", folder, folder]).returncode
    try:
        if mounted:
            subprocess.run(["mount", "-o", "remount,ro,bind", folder], check=True)
        yield
    finally:
        if mounted:
            subprocess.run(["umount", folder], check=True)
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)


def test_run_goes_on_in_another_folder_from_a_read_only_one(uninterrupted, launch, sample_data, tmp_path):
    source = Life(launch, tmp_path, sample_data, ranks=2, run_dir=tmp_path / "source")
    assert source.start(SLOW, {"at": "forward", "step": 23, "rank": 1, "do": "SIGTERM"}).wait().status == 0
    # Not the newest: a best one beside it, which only a validation can make.
    best = last_checkpoint(source.run_dir).state()["best_step"]
    assert best == 20 and checkpoints(source.run_dir)[0].step == best
    before = content_of(source.run_dir)

    with read_only(source.run_dir):
        refused = Life(launch, tmp_path / "refused", sample_data, ranks=None)
        (tmp_path / "refused").mkdir()
        result = refused.start(words=("--resume_from", source.run_dir, "--optim.lr", 1e-3)).wait()
        assert_only_one_line_is_said(result, "another definition (optim.lr: 0.003 -> 0.001)")
        assert not list(refused.run_dir.glob("*.json*")) and not checkpoints(refused.run_dir)

        (tmp_path / "life").mkdir()
        life = Life(launch, tmp_path / "life", sample_data, ranks=2)
        life.command = (*life.command, "--resume_from", source.run_dir)
        session = life.start(SLOW, {"at": "forward", "step": 38, "rank": 0, "do": "SIGTERM"})
        assert session.wait().status == 0, session.printed()
        assert f"continuing the run in {source.run_dir} at step 23" in session.printed()
        assert resumed_at(session) == 23
        assert_stopped(life.run_dir, "signal SIGTERM", 38)
        assert best in [each.step for each in checkpoints(life.run_dir)], "the best checkpoint came along"
        result = life.finish(uninterrupted(2))
        assert "resuming at step 38" in result.out and "continuing the run in" not in result.out
    assert content_of(source.run_dir) == before
    assert [each["from_step"] for each in read_sessions(life.run_dir)] == [0, 23, 38]
    assert os.access(life.run_dir / "config.yaml", os.W_OK)
    shutil.rmtree(life.run_dir)


@pytest.mark.whole
def test_number_of_ranks_may_change_between_sessions_and_the_account_shows_it(
    uninterrupted, launch, sample_data, tmp_path
):
    life = Life(launch, tmp_path, sample_data, ranks=2)
    plans = ((2, 13), (0, 27))  # none: a plain process
    for ranks, step in plans:
        session = life.start(SLOW, {"at": "forward", "step": step, "rank": 0, "do": "hold"}, ranks=ranks)
        life.wait_at(session, f"forward-{step}")
        (life.run_dir / "STOP").touch()
        life.go_on(f"forward-{step}")
        assert session.wait().status == (0 if ranks else 75)
        assert_stopped(life.run_dir, f"the file {life.run_dir / 'STOP'}", step)

    session = life.start(SLOW, {"at": "forward", "step": 41, "rank": 0, "do": "hold"}, ranks=2)
    life.wait_at(session, "forward-41")
    session.kill_all()
    newest = assert_little_is_lost(life.run_dir)
    last = life.start(ranks=4).wait()
    assert last.status == 0 and "not as in the last session: ranks: 2 -> 4" in last.out

    expected = train_lines(uninterrupted(2))
    got = train_lines(life.run_dir)
    assert [line["step"] for line in got] == [line["step"] for line in expected]
    assert [line["loss"] for line in got] == pytest.approx([line["loss"] for line in expected], rel=1e-4)
    stop_file = f"the file {life.run_dir / 'STOP'}"
    assert [
        (each["world_size"], each["from_step"], each["step"], each["reason"], each["host"])
        for each in read_sessions(life.run_dir)
    ] == [
        (2, 0, 13, stop_file, socket.gethostname()),
        (1, 13, 27, stop_file, socket.gethostname()),
        (2, 27, read_sessions(life.run_dir)[2]["step"], "killed, or its machine went down", socket.gethostname()),
        (4, newest, STEPS, "all steps done", socket.gethostname()),
    ]
    assert newest <= read_sessions(life.run_dir)[2]["step"] <= newest + SAVE_EVERY  # the last save was cut off, or not
