"""A new run begins with the weights of another, and with nothing else of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.support.commands import Launch
from tests.support.legal_records import law_base, law_data
from tests.support.lives import Life
from tests.support.runs import (
    MODEL,
    assert_only_one_line_is_said,
    command_of,
    content_of,
    damage,
    reference,
    status_of,
)
from training.engine.checkpoint import best, checkpoints, newest_valid
from training.engine.metrics import read_metrics
from training.evaluation.setting import Setting

RUN = (
    *(*MODEL, "--batch.sentences_per_micro_batch", 16, "--batch.micro_batches_per_step", 2),
    *("--optim.steps", 12, "--optim.warmup_steps", 2, "--optim.lr", 5e-3, "--optim.ema_decay", 0.9),
    *("--log.validate_every_steps", 4, "--checkpoint.every_steps", 4, "--checkpoint.keep", 3),
)
SEQ2SEQ = (
    *("--model.embedding_width", 16, "--model.hidden_width", 16, "--model.layers", 1),
    *("--batch.sentences_per_micro_batch", 16, "--batch.micro_batches_per_step", 2, "--optim.steps", 8),
    *("--optim.warmup_steps", 2, "--optim.lr", 5e-3, "--log.validate_every_steps", 4, "--checkpoint.every_steps", 4),
)
QLORA = (
    *("--lora.rank", 4, "--lora.alpha", 8, "--batch.tokens_per_micro_batch", 400, "--batch.micro_batches_per_step", 2),
    *("--optim.steps", 8, "--optim.warmup_steps", 2, "--optim.lr", 1e-2),
    *("--log.validate_every_steps", 4, "--checkpoint.every_steps", 4),
)
ZERO = ("--parallel", "deepspeed")


@pytest.fixture
def source(sample_data: Path) -> Path:
    return reference(sample_data, *RUN)


def validations(run_dir: Path) -> dict[int, tuple[float, float]]:
    lines = [line for line in read_metrics(run_dir) if line["kind"] == "validation"]
    return {line["step"]: (line["loss"], line["accuracy"]) for line in lines}


@pytest.mark.parametrize(
    ("words", "ranks"), [((), None), ((), 2), ((*ZERO, "--zero.stage", 2), 2), ((*ZERO, "--zero.stage", 3), 2)]
)
def test_new_run_begins_with_what_the_other_validated_and_is_the_same_after_kills(
    launch: Launch, source, sample_data, tmp_path, words, ranks
):
    run = RUN if "--zero.stage" not in words or 3 not in words else RUN_WITHOUT_AVERAGE
    run = (*run, *words, "--seed", 7, "--optim.lr", 1e-3, "--init_from", source)
    life = Life(launch, tmp_path, sample_data, ranks=ranks, run=run)
    moved = tmp_path / "moved"
    shutil.copytree(source, moved)
    life.command = tuple(moved if word == source else word for word in life.command)
    life.kill_at(2)  # the weights are in a checkpoint of its own already
    before = content_of(moved)
    shutil.rmtree(moved)
    result = life.start().wait()
    assert result.status == 0, result
    chosen = best(source, 1)[0]
    assert validations(life.run_dir)[0] == pytest.approx(validations(source)[chosen.step], abs=1e-6)
    manifest = checkpoints(life.run_dir)[-1].manifest
    sums = {str(chosen.step): chosen.manifest["files"]["model.safetensors"]["sha256"]}
    assert manifest["init_from"]["checkpoints"] == sums and manifest["init_from"]["run"] == str(moved)
    assert before and manifest["config"]["seed"] == 7


RUN_WITHOUT_AVERAGE = tuple(word for word in RUN if word not in ("--optim.ema_decay", 0.9))


def test_seq2seq_begins_on_other_pairs_of_the_same_vocabulary(launch: Launch, sample_data, tmp_path):
    """With the loss that the source's weights have on these."""
    source, other = tmp_path / "source", tmp_path / "other"
    shutil.copytree(reference(sample_data, *SEQ2SEQ, module="training.seq2seq"), source)
    words = ("--source", "sample", "--seed", 9, "--tokenizers", source, "--output", other)
    assert launch(*words, module="data_prep.pairs").wait().status == 0
    command = command_of(tmp_path / "run", other, *SEQ2SEQ, "--seed", 3, "--init_from", f"{source}:last")
    assert launch(*command, module="training.seq2seq").wait().status == 0
    words = (source, "--checkpoint", "last", "--part", "validation", "--data", other)
    assert launch(*words, module="training.evaluation.evaluate").wait().status == 0
    scores = json.loads((source / "evaluation/validation-last-on-other.json").read_text("utf-8"))
    assert validations(tmp_path / "run")[0][0] == pytest.approx(scores["loss"], abs=1e-5)  # which is rounded


def test_adapters_begin_as_another_runs_or_as_pefts(launch: Launch, tmp_path):
    data, base = law_data(), law_base()
    source = reference(data, "--base_model", base, *QLORA, module="training.qlora")
    run = ("--base_model", base, *QLORA, "--seed", 5)
    command = command_of(tmp_path / "run", data, *run, "--init_from", f"{source}:last")
    assert launch(*command, module="training.qlora").wait().status == 0
    assert validations(tmp_path / "run")[0] == pytest.approx(validations(source)[8], abs=1e-6)

    adapters = tmp_path / "adapters"
    words = (source, "--checkpoint", "last", "--output", adapters)
    assert launch(*words, module="training.evaluation.export").wait().status == 0
    command = command_of(tmp_path / "second", data, *run, "--init_from", adapters)
    assert launch(*command, module="training.qlora").wait().status == 0
    assert validations(tmp_path / "second")[0] == pytest.approx(validations(source)[8], abs=1e-6)
    own = load_file(checkpoints(tmp_path / "run")[0].folder / "model.safetensors")
    others = load_file(checkpoints(tmp_path / "second")[0].folder / "model.safetensors")
    assert own.keys() == others.keys()

    about = json.loads((adapters / "adapter_config.json").read_text("utf-8"))
    (adapters / "adapter_config.json").write_text(json.dumps({**about, "lora_alpha": 16}), "utf-8")
    refused = launch(*command_of(tmp_path / "third", *command[3:4], *command[4:]), module="training.qlora").wait()
    assert_only_one_line_is_said(refused, "lora_alpha 16, not 8", "lora.*")


def test_ancestors_are_on_record_and_every_weight_can_be_named(launch: Launch, source, sample_data, tmp_path):
    for name, weights in (("mean", "best:2"), ("ema", "ema"), ("step", "step-8")):
        command = command_of(
            tmp_path / name, sample_data, *RUN, "--optim.steps", 3, "--init_from", f"{source}:{weights}"
        )
        assert launch(*command).wait().status == 0
    command = command_of(tmp_path / "child", sample_data, *RUN, "--optim.steps", 3, "--init_from", tmp_path / "step")
    assert launch(*command).wait().status == 0
    newest = newest_valid(tmp_path / "child")
    assert newest is not None
    assert newest.manifest["init_from"]["init_from"]["checkpoints"].keys() == {"8"}
    assert Setting.of_label("test-step-8") == Setting(weights="step-8")


def test_source_that_cannot_be_begun_with_is_refused_with_every_difference(
    launch: Launch, source, sample_data, tmp_path
):
    broken = tmp_path / "broken"
    shutil.copytree(source, broken)
    damage(checkpoints(broken)[-1])
    assert newest_valid(broken) is not None  # sets the damaged one aside
    last = checkpoints(source)[-1].step
    other = reference(sample_data, *SEQ2SEQ, module="training.seq2seq")
    for init_from, words, said in (
        (other, (), ("task: seq2seq -> gpt", "tensors")),
        (source, ("--model.width", 64, "--model.layers", 1), ("model.layers: 2 -> 1", "model.width: 32 -> 64")),
        (source, ("--model.heads", 4), ("model.heads: 2 -> 4",)),
        (tmp_path / "nothing", (), ("there is no run folder",)),
        (tmp_path, (), ("is not a run folder",)),
        (f"{broken}:step-{last}", (), (f"no valid checkpoint of step {last}", "set aside as damaged")),
        (f"{source}:newest", (), ("names no weights",)),
        (f"{source}:best:9", (), ("not 9",)),
    ):
        command = command_of(tmp_path / "run", sample_data, *RUN, *words, "--init_from", init_from)
        assert_only_one_line_is_said(launch(*command).wait(), *said)
    assert not (tmp_path / "run/status.json").exists() or status_of(tmp_path / "run")["status"] != "finished"
