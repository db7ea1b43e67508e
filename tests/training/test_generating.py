"""What a model answers while it is trained is scored as an evaluation scores it, and costs the training nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.support.commands import Launch
from tests.support.legal_records import law_base, law_data
from tests.support.lives import Life
from tests.support.runs import (
    MODEL,
    assert_only_one_line_is_said,
    assert_same_model,
    assert_same_record,
    command_of,
    last_checkpoint,
    reference,
    status_of,
)
from training.engine.checkpoint import checkpoints
from training.engine.generating import drawn
from training.engine.metrics import read_metrics

ALL = ("--log.generate_samples", 1000)  # more than there are
RUN = (
    *(*MODEL, "--batch.sentences_per_micro_batch", 16, "--batch.micro_batches_per_step", 2),
    *("--optim.steps", 18, "--optim.warmup_steps", 2, "--optim.lr", 1e-2),
    *("--log.validate_every_steps", 6, "--checkpoint.every_steps", 6, "--checkpoint.keep", 3),
)


def validations(run_dir: Path) -> list[dict[str, object]]:
    return [line for line in read_metrics(run_dir) if line["kind"] == "validation"]


def test_scores_are_those_of_an_evaluation(launch: Launch, sample_data, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(reference(sample_data, *RUN, *ALL), run_dir)
    words = (run_dir, "--checkpoint", "last", "--part", "validation", "--beam_size", 1)
    result = launch(*words, module="training.evaluation.evaluate").wait()
    assert result.status == 0, result
    (path,) = (run_dir / "evaluation").glob("*.json")
    evaluated, last = json.loads(path.read_text("utf-8")), validations(run_dir)[-1]
    assert [round(last[name], 2) for name in ("bleu", "chrf")] == [evaluated[name] for name in ("bleu", "chrf")]
    assert last["chrf"] > 1, "it has learned to say something"
    (said,) = (run_dir / "evaluation").glob("*-translations.jsonl")
    rows = [json.loads(line) for line in said.read_text("utf-8").splitlines()]
    keys = {"source": "source", "reference": "reference", "answer": "translation"}
    drawn_first = [rows[row] for row in drawn(1000, len(rows))[:4].tolist()]
    assert last["examples"] == [{own: row[key] for own, key in keys.items()} for row in drawn_first]


def test_scores_do_not_depend_on_ranks_and_kills_and_change_no_weight(launch: Launch, sample_data, tmp_path):
    whole, without = (reference(sample_data, *RUN, *words) for words in (ALL, ("--log.generate_samples", 0)))
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (last_checkpoint(whole).folder / name).read_bytes() == (
            last_checkpoint(without).folder / name
        ).read_bytes()
    assert all("bleu" not in line for line in validations(without))
    life = Life(launch, tmp_path, sample_data, ranks=2, run=(*RUN, *ALL))
    life.kill_at(7)
    assert life.start().wait().status == 0
    alone, together = ([line["chrf"] for line in validations(each)] for each in (whole, life.run_dir))
    assert together == pytest.approx(alone, abs=0.5), "up to words whose probabilities differ by rounding"
    assert_same_model(life.run_dir, reference(sample_data, *RUN, *ALL, ranks=2))
    assert_same_record(life.run_dir, reference(sample_data, *RUN, *ALL, ranks=2))


def test_a_checkpoint_has_every_score_and_another_one_may_say_which_is_best(launch: Launch, sample_data, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(reference(sample_data, *RUN, *ALL), run_dir)
    scores = {each.step: each.state()["scores"] for each in checkpoints(run_dir)}
    names = ("loss", "accuracy", "bleu", "chrf")
    assert scores == {line["step"]: {name: line[name] for name in names} for line in validations(run_dir)}
    shutil.rmtree(last_checkpoint(run_dir).folder)  # as if it had been killed before its end
    result = launch(*command_of(run_dir, sample_data, *RUN, *ALL, "--checkpoint.best_by", "chrf")).wait()
    assert result.status == 0, result
    status, found = status_of(run_dir), max(scores, key=lambda step: scores[step]["chrf"])
    assert (status["best_by"], status["best_step"], status["best_score"]) == ("chrf", found, scores[found]["chrf"])
    other = ("--checkpoint.best_by", "chrf", "--log.generate_samples", 5)
    result = launch(*command_of(run_dir, sample_data, *RUN, *other)).wait()
    assert_only_one_line_is_said(result, "chrf of 1000 samples, with which that of 5 cannot be compared")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--checkpoint.best_by", "bleu", "--log.generate_samples", 0), "gives accuracy, loss; log.generate_samples"),
        (("--checkpoint.best_by", "rouge"), "gives accuracy, loss, bleu, chrf"),
        (("--parallel", "deepspeed", "--zero.stage", 3, "--log.generate_samples", 5), "--zero.stage 2"),
    ],
)
def test_what_no_validation_gives_is_refused(launch: Launch, sample_data, tmp_path, words, said):
    assert_only_one_line_is_said(launch(*command_of(tmp_path / "run", sample_data, *RUN, *words)).wait(), said)


def test_answers_of_a_chat_model_are_scored_by_their_tasks(launch: Launch, tmp_path):
    run = (
        *("--lora.rank", 4, "--batch.tokens_per_micro_batch", 400, "--batch.micro_batches_per_step", 2),
        *("--optim.steps", 4, "--optim.warmup_steps", 2, "--optim.lr", 1e-2, "--log.generate_samples", 3),
        *("--log.validate_every_steps", 2, "--checkpoint.every_steps", 2, "--checkpoint.best_by", "score"),
    )
    command = command_of(tmp_path / "run", law_data(), "--base_model", law_base(), *run)
    result = launch(*command, module="training.qlora").wait()
    assert result.status == 0, result
    lines = validations(tmp_path / "run")
    assert all(0 <= line["score"] <= 100 and len(line["examples"]) == 3 for line in lines)
    assert status_of(tmp_path / "run")["best_score"] == max(line["score"] for line in lines)
