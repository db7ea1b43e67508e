"""A run is made longer, or ends where it gains no more: as if it had been meant so from the start."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path

import pytest

from tests.support.commands import Launch
from tests.support.lives import Life
from tests.support.runs import (
    MODEL,
    assert_only_one_line_is_said,
    assert_same_model,
    assert_same_record,
    content_of,
    last_checkpoint,
    reference,
    status_of,
    train_lines,
)
from training.base.console import UserError
from training.engine import fork
from training.engine.checkpoint import Checkpoint, checkpoints, newest_valid
from training.engine.metrics import read_metrics
from training.engine.optim import Course, OptimOptions, learning_rate
from training.engine.wandb.log_file import visit_logs
from training.engine.wandb.options import read_wandb_record

# The decay of 10 steps begins where nothing else is due: a run of 33 steps at 23, one of 66 at 56.
WSD = ("--optim.schedule", "wsd", "--optim.decay_steps", 10)
COMMON = (
    *(*MODEL, "--batch.sentences_per_micro_batch", 16, "--batch.micro_batches_per_step", 2),
    *("--optim.warmup_steps", 5, "--optim.lr", 5e-3),
    *("--log.every_steps", 4, "--log.validate_every_steps", 6, "--checkpoint.every_steps", 5),
)
RUN = (*COMMON, *WSD)
SHORT, LONG, FORK = 33, 66, 23
ZERO = ("--parallel", "deepspeed", "--zero.stage", 2)


class Killed(BaseException):
    """Nothing catches it, as nothing catches a kill."""


def test_rate_of_wsd_is_that_of_a_longer_run_until_it_falls_with_the_square_root():
    options = OptimOptions(schedule="wsd", decay_steps=4, warmup_steps=2, lr=0.5, final_lr_share=0.0)
    short, longer = (Course.of(options, steps) for steps in (12, 100))
    rates = [learning_rate(step, short, options) for step in range(12)]
    assert rates[:8] == [learning_rate(step, longer, options) for step in range(8)] == [0.25] + 7 * [0.5]
    assert rates[8:] == pytest.approx([0.5 * (1 - math.sqrt(quarters / 4)) for quarters in (1, 2, 3, 4)])


@pytest.mark.parametrize(
    "strategy", [pytest.param((), id="ddp"), pytest.param(ZERO, id="zero2", marks=pytest.mark.whole)]
)
def test_finished_run_made_longer_and_killed_three_times_is_the_longer_one_from_the_start(
    launch: Launch, sample_data, tmp_path, strategy
):
    short, longer = (
        reference(sample_data, *RUN, *strategy, "--optim.steps", steps, ranks=2) for steps in (SHORT, LONG)
    )
    life = Life(launch, tmp_path, sample_data, ranks=2, run=(*RUN, *strategy, "--optim.steps", SHORT))
    life.finish(short)
    (life.run_dir / "evaluation").mkdir()
    (life.run_dir / "evaluation/test.json").write_text("{}")
    life.command = (*life.command, "--optim.steps", LONG)
    life.kill_at(FORK + 2)  # before it saves again: the next session goes back once more, from the same fork
    life.kill_at(SHORT + 2)
    life.kill_at(LONG - 4)
    life.finish(longer)
    assert [each.step for each in checkpoints(life.run_dir)] == [each.step for each in checkpoints(longer)]

    aside = tmp_path / f"run-at-{SHORT}"
    assert_same_model(aside, short)
    assert_same_record(aside, short)
    assert (aside / "evaluation/test.json").exists() and not (life.run_dir / "evaluation").exists()
    assert sorted(each.name for each in tmp_path.glob("*-at-*")) == [aside.name]


def test_run_killed_in_its_decay_before_a_save_is_another_one_in_wandb_when_it_is_made_longer(
    launch: Launch, sample_data, tmp_path
):
    """It goes on from the fork and has nothing to set aside, but wandb has the rows of its decay."""
    words = ("--optim.steps", SHORT, "--checkpoint.every_steps", 50, "--log.validate_every_steps", 50)
    life = Life(
        launch, tmp_path, sample_data, None, run=(*RUN, *words, "--log.every_steps", 1, "--wandb.mode", "offline")
    )
    life.kill_at(SHORT - 3)
    before = read_wandb_record(life.run_dir)["id"]
    life.command = (*life.command, "--optim.steps", LONG)
    result = life.start().wait()
    assert result.status == 0 and f"resuming at step {FORK}" in result.out, result
    now = read_wandb_record(life.run_dir)["id"]
    assert now != before and not list(tmp_path.glob("run-at-*"))
    logged = sorted(step for log in visit_logs(life.run_dir, now) for step in log.steps)
    assert logged == sorted({line["step"] for line in read_metrics(life.run_dir)})


@pytest.mark.whole
def test_patience_that_ends_where_the_decay_began_counts_in_a_longer_run(launch: Launch, sample_data, tmp_path):
    """Validated at the fork and without a gain since the step before: the longer run begins its decay there, too."""
    run = (*COMMON, *WSD, "--optim.lr", 0.05, "--optim.patience", 1, "--log.validate_every_steps", 2)
    longer = reference(sample_data, *run, "--optim.steps", 80)
    at = ended(longer)[0] - 10
    life = Life(launch, tmp_path, sample_data, None, run=(*run, "--optim.steps", at + 10))
    assert life.start().wait().status == 0
    life.command = (*life.command, "--optim.steps", 80)
    life.finish(longer)


def test_what_stood_where_the_decay_began_stays_until_the_end(sample_data):
    """Two newest and the best one of then, besides those of now: the longer run has them."""
    short = reference(sample_data, *RUN, "--optim.steps", SHORT, ranks=2)
    found = {each.step: each.is_due for each in checkpoints(short)}
    assert found.keys() >= {20, FORK, 30, SHORT}
    assert not found.pop(FORK) and all(found.values())


@pytest.mark.whole
def test_run_within_its_decay_goes_back_and_its_end_is_still_to_be_had(launch: Launch, sample_data, tmp_path):
    short, longer = (reference(sample_data, *RUN, "--optim.steps", steps, ranks=2) for steps in (SHORT, LONG))
    life = Life(launch, tmp_path, sample_data, ranks=2, run=(*RUN, "--optim.steps", SHORT))
    stopped = life.start({"at": "forward", "step": SHORT - 3, "rank": 0, "do": "SIGTERM"}).wait()
    at = status_of(life.run_dir)["step"]
    assert FORK < at < SHORT, stopped
    life.command = (*life.command, "--optim.steps", LONG)
    life.finish(longer)
    other = Life(launch, tmp_path / "run-at", sample_data, 2, tmp_path / f"run-at-{at}", (*RUN, "--optim.steps", SHORT))
    (tmp_path / "run-at").mkdir()
    other.finish(short)


def test_constant_run_stopped_and_made_longer_is_the_longer_one(launch: Launch, sample_data, tmp_path):
    run = (*COMMON, "--optim.schedule", "constant")
    longer = reference(sample_data, *run, "--optim.steps", 31)
    life = Life(launch, tmp_path, sample_data, ranks=None, run=(*run, "--optim.steps", 17))
    assert life.start().wait().status == 0
    life.command = (*life.command, "--optim.steps", 31)
    life.finish(longer)
    assert (tmp_path / "run-at-17").is_dir()


def test_longer_run_is_a_new_one_of_the_same_group_in_wandb_with_the_history_up_to_the_fork(
    launch: Launch, sample_data, tmp_path
):
    life = Life(launch, tmp_path, sample_data, None, run=(*RUN, "--optim.steps", SHORT, "--wandb.mode", "offline"))
    assert life.start().wait().status == 0
    life.command = (*life.command, "--optim.steps", LONG)
    life.kill_at(SHORT)
    assert life.start().wait().status == 0
    before, now = (read_wandb_record(folder) for folder in (tmp_path / f"run-at-{SHORT}", life.run_dir))
    assert before["id"] != now["id"] and before["group"] == now["group"] == before["name"] == "run"
    assert now["name"] == f"run from {FORK}"
    for folder, record in ((tmp_path / f"run-at-{SHORT}", before), (life.run_dir, now)):
        logged = sorted(step for log in visit_logs(folder, record["id"]) for step in log.steps)
        assert logged == sorted({line["step"] for line in read_metrics(folder)})


@pytest.mark.parametrize("dies_at", range(5))
def test_kill_while_a_run_goes_back_leaves_what_the_same_command_goes_on_with(
    sample_data, tmp_path, monkeypatch, dies_at
):
    """At each of its writes; what comes of it is what an undisturbed one leaves."""
    source = reference(sample_data, *RUN, "--optim.steps", SHORT, ranks=2)
    shutil.copytree(source, tmp_path / "run")
    latest = newest_valid(tmp_path / "run")
    assert latest is not None
    writes = 0

    def dying(write):
        def instead(*arguments, **more):
            nonlocal writes
            writes += 1
            if writes - 1 == dies_at:
                raise Killed
            return write(*arguments, **more)

        return instead

    for name in ("publish_folder", "write_lines", "write_status"):
        monkeypatch.setattr(fork, name, dying(getattr(fork, name)))
    monkeypatch.setattr(Checkpoint, "remove", dying(Checkpoint.remove))
    with pytest.raises(Killed):
        fork.go_back(tmp_path / "run", latest, FORK)
    monkeypatch.undo()
    again = newest_valid(tmp_path / "run")
    assert again == latest
    assert fork.go_back(tmp_path / "run", again, FORK).step == FORK
    assert [each.name for each in sorted(tmp_path.iterdir())] == ["run", f"run-at-{SHORT}"]
    assert content_of(tmp_path / f"run-at-{SHORT}").values() != ()
    assert [each.step for each in checkpoints(tmp_path / f"run-at-{SHORT}")] == [
        each.step for each in checkpoints(source)
    ]
    assert max(each.step for each in checkpoints(tmp_path / "run")) == FORK
    assert read_metrics(tmp_path / "run")[-1]["step"] <= FORK


def test_what_is_set_aside_shares_its_weights_and_nothing_that_is_written_again(sample_data, tmp_path):
    shutil.copytree(reference(sample_data, *RUN, "--optim.steps", SHORT, ranks=2), tmp_path / "run")
    latest = newest_valid(tmp_path / "run")
    assert latest is not None
    (tmp_path / "run/STOP").touch()
    (tmp_path / "run/link").symlink_to("/etc/passwd")
    os.mkfifo(tmp_path / "run/pipe")
    fork.go_back(tmp_path / "run", latest, FORK)
    run, aside = tmp_path / "run", tmp_path / f"run-at-{SHORT}"
    shared = {path.relative_to(aside) for path in aside.rglob("*") if path.is_file() and path.stat().st_nlink > 1}
    assert shared and all(path.parts[0] == "checkpoints" for path in shared)
    assert not {"STOP", "lock", "link", "pipe"} & {path.name for path in aside.iterdir()}
    assert status_of(aside)["status"] == "finished" and status_of(run)["status"] == "resumable"


def test_checkpoints_on_another_disk_are_set_aside_too(sample_data, tmp_path):
    source = reference(sample_data, *RUN, "--optim.steps", SHORT, ranks=2)
    shutil.copytree(source, tmp_path / "run")
    (tmp_path / "run/checkpoints").rename(tmp_path / "larger")
    (tmp_path / "run/checkpoints").symlink_to(tmp_path / "larger")
    latest = newest_valid(tmp_path / "run")
    assert latest is not None
    fork.go_back(tmp_path / "run", latest, FORK)
    aside = newest_valid(tmp_path / f"run-at-{SHORT}")
    assert aside is not None and aside.step == SHORT and (tmp_path / "run/checkpoints").is_symlink()


def test_run_without_a_checkpoint_before_its_decay_is_left_as_it_is(sample_data, tmp_path):
    shutil.copytree(reference(sample_data, *RUN, "--optim.steps", SHORT, ranks=2), tmp_path / "run")
    for each in checkpoints(tmp_path / "run"):
        if each.step <= FORK:
            each.remove()
    before, latest = content_of(tmp_path), newest_valid(tmp_path / "run")
    assert latest is not None
    with pytest.raises(UserError, match=r"no valid checkpoint of step 23 or before.*--init_from"):
        fork.go_back(tmp_path / "run", latest, FORK)
    assert content_of(tmp_path) == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--optim.steps", 20), ("has come to step 33 of 33", "not shorter")),
        (("--optim.schedule", "cosine", "--optim.decay_steps", "null"), ("optim.schedule: wsd -> cosine",)),
    ],
)
def test_run_is_not_made_shorter_than_it_is_nor_another(launch: Launch, sample_data, tmp_path, words, said):
    shutil.copytree(reference(sample_data, *RUN, "--optim.steps", SHORT, ranks=2), tmp_path / "run")
    before = content_of(tmp_path / "run")
    life = Life(launch, tmp_path, sample_data, ranks=None, run=(*RUN, "--optim.steps", SHORT, *words))
    assert_only_one_line_is_said(life.start().wait(), *said)
    assert content_of(tmp_path / "run") == before


def test_cosine_run_is_not_made_longer_and_told_what_helps(launch: Launch, sample_data, tmp_path):
    life = Life(launch, tmp_path, sample_data, ranks=None, run=(*COMMON, "--optim.steps", 12))
    assert life.start().wait().status == 0
    life.command = (*life.command, "--optim.steps", 24)
    assert_only_one_line_is_said(
        life.start().wait(), "optim.steps: 12 -> 24", "--init_from", "--optim.schedule wsd", "nothing was changed"
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((*WSD, "--optim.steps", 15), ("leave nothing in between of the run's 15 steps",)),
        (
            ("--optim.steps", 6, "--optim.patience", 2),
            ("optim.patience 2 counts validations", "every 6 steps"),
        ),
    ],
)
def test_lengths_without_a_meaning_are_one_line(launch: Launch, sample_data, tmp_path, words, said):
    life = Life(launch, tmp_path, sample_data, ranks=None, run=(*COMMON, *words))
    assert_only_one_line_is_said(life.start().wait(), *said)


def test_lengths_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="belong together"):
        OptimOptions(schedule="wsd")
    with pytest.raises(ValueError, match="belong together"):
        OptimOptions(schedule="cosine", decay_steps=3)


# Where a run gains no more. At this rate the sample's accuracy falls back now and then.

IMPATIENT = (*COMMON, "--log.validate_every_steps", 2, "--optim.steps", 80, "--optim.lr", 0.05, "--optim.patience", 4)
PATIENT = (*IMPATIENT, *WSD)


def ended(run_dir: Path) -> tuple[int, int | None]:
    state = json.loads((last_checkpoint(run_dir).folder / "state.json").read_text("utf-8"))
    assert state["ended"] is not None
    return state["steps"], state["best_step"]


def test_run_that_gains_no_more_decays_and_ends_there_however_often_it_is_killed(launch: Launch, sample_data, tmp_path):
    whole = reference(sample_data, *PATIENT, ranks=2)
    steps, best_step = ended(whole)
    assert best_step is not None and steps < 80 and train_lines(whole)[-1]["step"] == steps
    assert "no new best in 4 validations" in status_of(whole)["reason"]
    life = Life(launch, tmp_path, sample_data, ranks=2, run=PATIENT)
    begins = steps - 10
    for step in (3, begins - 3, begins, begins + 1, begins + 6):
        life.kill_at(step)
    life.finish(whole)
    assert ended(life.run_dir) == (steps, best_step)


def test_ended_run_goes_on_with_more_patience(launch: Launch, sample_data, tmp_path):
    """As the one that had it from the start, wherever the decay had come to."""
    longer = reference(sample_data, *PATIENT, "--optim.patience", 9, ranks=2)
    life = Life(launch, tmp_path, sample_data, ranks=2, run=PATIENT)
    assert life.start().wait().status == 0
    life.command = (*life.command, "--optim.patience", 9)
    life.finish(longer)


def test_another_score_that_tells_the_best_does_not_take_the_end_back(launch: Launch, sample_data, tmp_path):
    steps = status_of(reference(sample_data, *PATIENT, ranks=2))["steps"]
    life = Life(launch, tmp_path, sample_data, ranks=2, run=PATIENT)
    life.kill_at(steps - 7)
    life.command = (*life.command, "--checkpoint.best_by", "loss")
    life.kill_at(steps - 2)
    result = life.start().wait()
    assert result.status == 0 and "goes back" not in result.out, result
    assert status_of(life.run_dir)["steps"] == steps


def test_cosine_run_ends_where_it_gains_no_more(launch: Launch, sample_data, tmp_path):
    life = Life(launch, tmp_path, sample_data, ranks=None, run=IMPATIENT)
    result = life.start().wait()
    assert result.status == 0 and "the run ends here" in result.out, result
    status = status_of(life.run_dir)
    assert (status["status"], status["steps"]) == ("finished", status["step"]) and status["step"] < 80
    assert "is finished" in life.start().wait().out
    life.command = (*life.command, "--optim.patience", 9)
    result = life.start().wait()
    assert result.status == 0 and f"resuming at step {status['step']}" in result.out, result
