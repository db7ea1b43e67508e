"""On a T4 (sm_75), which Kaggle lends: fp16 with a scaler, no bf16 anywhere, attention that has a kernel there.

The card is imitated by tests/support/t4_training.py; what its kernels compute is not.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tests.training.test_qlora as qlora
import tests.training.test_seq2seq as seq2seq
from launch.kaggle.notebook import checked_options
from tests.support.base_models import make_tiny_qwen2
from tests.support.commands import ROOT, Launch, Result
from tests.support.legal_records import make_tokenizer, prepare
from tests.support.runs import SHORT_RUN, command_of, last_checkpoint, losses
from tests.support.t4_training import T4
from training.base.console import UserError
from training.engine import precision
from training.engine.precision import choose_precision

STEPS = ("--optim.steps", 12, "--log.every_steps", 1, "--log.validate_every_steps", 6, "--checkpoint.every_steps", 6)
COMMANDS = {
    "training.gpt": (*SHORT_RUN, "--batch.micro_batches_per_step", 2, *STEPS),
    "training.seq2seq": (*seq2seq.RUN, "--optim.warmup_steps", 2, *STEPS),
    "training.qlora": (*qlora.RUN, *STEPS),
}


def trained(launch: Launch, script: str, run_dir: Path, data: Path, *words: object) -> Result:
    command = command_of(run_dir, data, *COMMANDS[script], *words)
    return launch(script, *command, module="tests.support.t4_training", ranks=2).wait()


def assert_trained_in_fp16(result: Result, run_dir: Path) -> None:
    assert result.status == 0, result
    assert "fp16: Tesla T4 is sm_75, bf16 needs sm_80" in result.out
    products = [int(count) for count in re.findall(r"(\d+) products in fp16", result.out)]
    assert products and min(products) > 100
    assert len(losses(run_dir)) == 12 and last_checkpoint(run_dir).state()["scaler"]
    assert {tensor.dtype for tensor in last_checkpoint(run_dir).model_state().values()} == {torch.float32}


@pytest.mark.parametrize("script", ["training.gpt", "training.seq2seq"])
def test_translation_trains_in_fp16_alone(script, launch: Launch, sample_data: Path, tmp_path: Path):
    assert_trained_in_fp16(trained(launch, script, tmp_path / "run", sample_data), tmp_path / "run")


def test_chat_model_that_is_stored_in_bf16_trains_in_fp16_alone(launch: Launch, tmp_path: Path):
    tokenizer = make_tokenizer(tmp_path / "tokenizer", pad_token="<|endoftext|>")
    base = make_tiny_qwen2(tmp_path / "base", tokenizer)
    weights = {name: tensor.bfloat16() for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    data = prepare(tmp_path / "law", base)
    result = trained(launch, "training.qlora", tmp_path / "run", data, "--base_model", base)
    assert_trained_in_fp16(result, tmp_path / "run")


def test_bf16_is_refused_where_it_is_emulated(monkeypatch):
    device = torch.device("cuda", 0)
    monkeypatch.setattr(precision, "gpu_of", lambda device: T4)
    assert choose_precision("auto", device).name == choose_precision("fp16", device).name == "fp16"
    with pytest.raises(UserError, match="Tesla T4 is sm_75 and only emulates bf16, slowly; use --precision fp16"):
        choose_precision("bf16", device)
    monkeypatch.setattr(precision, "gpu_of", lambda device: precision.GPU("A100", (8, 0)))
    assert choose_precision("auto", device).name == "bf16"


@pytest.mark.parametrize("config", sorted((ROOT / "configs").glob("*/*t4x2.yaml")), ids=lambda path: path.stem)
def test_configs_for_two_t4s_fit_them(config: Path):
    assert checked_options(f"training.{config.parent.name}", [str(config)]).precision == "fp16"
