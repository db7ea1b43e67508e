"""The proof on real weights: a pretrained chat model in 4 bits, real legal records, two processes, two kills.

Slow: about three minutes on two cores. Skipped where the records or the model cannot be had.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.base_models import smollm2
from tests.support.commands import PATIENCE_S, REAL_TATOEBA, ROOT, Launch
from tests.support.lives import Life
from tests.support.runs import losses, status_of

RECORDS = REAL_TATOEBA.parents[1] / "disc-law-sft"
STEPS = 6
# One conversation a micro-batch and a few large steps: enough to learn what such answers look like.
RECIPE = (
    *("--optim.steps", STEPS, "--optim.lr", 3e-3, "--lora.dropout", 0, "--batch.tokens_per_micro_batch", 432),
    *("--checkpoint.every_steps", 2, "--log.validate_every_steps", STEPS),
)


@pytest.mark.whole
@pytest.mark.timeout(PATIENCE_S)
@pytest.mark.skipif(not RECORDS.is_dir(), reason=f"the legal records are not at {RECORDS}")
def test_real_chat_model_killed_twice_learns_to_answer_legal_questions(launch: Launch, tmp_path: Path):
    base, data = smollm2(), tmp_path / "data"
    words = ("--source", RECORDS, "--tokenizer", base, "--output", data, "--max_length", 432, "--too_long", "drop")
    assert launch(*words, "--validation_share", 0.01, module="data_prep.disc_law").wait().status == 0
    config = ROOT / "configs/qlora/smollm2-cpu.yaml"
    run = (config, "--base_model", base, *RECIPE)
    life = Life(launch, tmp_path, data, ranks=2, run=run, module="training.qlora")
    for step in (4, 5):
        life.kill_at(step)
    result, run_dir = life.start().wait(), life.run_dir
    assert result.status == 0 and status_of(run_dir)["status"] == "finished", result
    assert len(json.loads((run_dir / "sessions.json").read_text("utf-8"))) == 3 and len(losses(run_dir)) == STEPS
    words = ("--answers_per_task", 1, "--max_new_tokens", 16)
    result = launch(run_dir, *words, module="training.evaluation.evaluate", ranks=2).wait()
    assert result.status == 0, result
    scores = json.loads((run_dir / "evaluation/test-1answers-16tokens.json").read_text("utf-8"))
    held_out = scores["losses"][-1]
    assert held_out["items"] >= 15
    assert held_out["after"]["loss"] < 0.9 * held_out["before"]["loss"], held_out
    assert held_out["p"] < 0.05
