"""The benches: a table, then one JSON line with the promised figures. No speed is asserted.

Each is run with --smoke in this process; `whole`: with --quick, as people run them.
"""

import importlib
import json
import math
import os
import random
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from launch.prove import ACCIDENTS, Training
from tests.bench import joeynmt
from tests.bench.common import PLAIN, SEQ2SEQ, config_of
from tests.bench.peers import tokens_a_sentence
from tests.support.commands import PATIENCE_S, Launch
from tests.support.zygote import Forked, fork, usual_environment
from training.base.console import UserError
from training.data.prepared import open_prepared
from training.gpt import Sequences
from training.seq2seq import TwoSides
from training.translation import plan_of

ZERO = ("zero1", "zero2", "zero3")

PROMISED = {
    "gpt_training": [
        "sentences_ratio",
        "relay_sentences_per_s",
        "relay_one_process_sentences_per_s",
        "notebook_sentences_per_s",
        "padding_share",
        "notebook_padding_share",
        "peak_share",
        "peak_share_exact",
        "plain_tokens_per_s",
    ],
    "seq2seq_training": [
        "sentences_ratio",
        "relay_sentences_per_s",
        "relay_one_process_sentences_per_s",
        "tutorial_sentences_per_s",
        "padding_share",
        "tutorial_padding_share",
    ],
    "qlora": [
        "samples_ratio",
        "relay_samples_per_s",
        "trainer_samples_per_s",
        "memory_ratio",
        "relay_memory_mb",
        "trainer_memory_mb",
        "activation_ratio",
        "padding_share",
        "trainer_padding_share",
        "operations_ratio",
        "operations_ratio_3b",
    ],
    "decoding": [
        "gpt_ratio",
        "gpt_batched_sentences_per_s",
        "gpt_plain_sentences_per_s",
        "gpt_same_share",
        "seq2seq_ratio",
        "seq2seq_tutorial_ratio",
        "seq2seq_batched_sentences_per_s",
        "seq2seq_plain_sentences_per_s",
        "seq2seq_same_share",
    ],
    "chat": [
        "tokens_ratio",
        "first_token_ratio",
        *(f"{side}_{what}" for side in ("relay", "transformers") for what in ("tokens_per_s", "first_token_s")),
    ],
    "scaling": ["ddp_ratio", "two_ranks_one_thread_tokens_per_s", "one_rank_two_threads_tokens_per_s"],
    "address": ["drive_share", "sftp_share", "s3_share"],
    "save_stall": ["stall_ratio", "background_stall_s", "synchronous_stall_s", "published_after_s"],
    "resume_time": ["ratio", "resumed_s", "new_s"],
    "deepspeed": [
        "optimizer_memory_ratio",
        *(f"{side}_step_ratio" for side in ZERO),
        *(f"{side}_memory_ratio" for side in ZERO),
    ],
    "wandb_gone": ["added_share", "added_s", "step_s", "step_ratio"],
    "peers": [
        "gpt_vs_trainer",
        "gpt_vs_joeynmt",
        "seq2seq_vs_joeynmt",
        "gpt_parameters",
        "joeynmt_transformer_parameters",
        "seq2seq_parameters",
        "joeynmt_gru_parameters",
        "loss_difference",
    ],
    "budget": ["used_ratio", "minutes", "steps"],
    "quality": ["minutes"],  # after as few steps the scores may be 0
    "preparing": [
        f"{what}_{figure}"
        for what in ("pairs", "records")
        for figure in ("minutes", "core_minutes", "peak_gb", "peak_own_gb")
    ],
    "turns": [f"{kind}_{figure}" for kind in ("equal", "document") for figure in ("ratio", "tokens_ratio")],
    "verify_speed": ["verify_gb_per_s", "from_disk_gb_per_s", "plain_gb_per_s", "verify_ratio"],
}


# What --smoke leaves out: JoeyNMT, which has an environment of its own, and sides whose ranks take long to start.
NOT_IN_SMOKE = {
    "peers": ["gpt_vs_joeynmt", "seq2seq_vs_joeynmt", "joeynmt_transformer_parameters", "joeynmt_gru_parameters"],
}


# What these measure is processes of their own, or takes as long as --quick: they have no smaller size than that.
NO_SMOKE = ("budget", "deepspeed", "resume_time", "wandb_gone", "quality", "qlora", "preparing", "turns")


def check(name: str, printed: str, promised: list[str]) -> None:
    """What a bench has to print, whatever the machine's speed."""
    *table, last = printed.strip().splitlines()
    figures = json.loads(last)
    assert figures["bench"] == name
    for each in promised:
        assert math.isfinite(figures[each]), each
        if not each.startswith("added") and not each.endswith("difference"):  # of two measurements: may be nothing
            assert figures[each] > 0, each
        assert any(each in line for line in table), f"{each} is missing from the table"
    peer = {"gpt_training": "notebook", "seq2seq_training": "tutorial", "qlora": "trainer"}.get(name)
    if peer:
        assert figures["loss_difference"] <= 1e-5
        assert figures["padding_share"] < 0.03 < figures[f"{peer}_padding_share"]
    if name == "peers":
        assert figures["loss_difference"] <= 1e-5
    if name == "qlora":
        assert figures["memory_ratio"] < 0.7
        assert abs(figures["estimate_error"]) < 0.1
    if name == "deepspeed":
        assert figures["optimizer_memory_ratio"] <= 0.55
        assert max(figures[f"{side}_loss_difference"] for side in ZERO) <= 1e-4
    if name == "decoding":
        assert min(figures["gpt_same_share"], figures["seq2seq_same_share"]) >= 0.98


def bench(name: str) -> Any:
    """The module. Imported when it is asked for, since some load libraries that take seconds."""
    return importlib.import_module(f"tests.bench.{name}")


@pytest.fixture
def as_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Puts back what a bench or a training changes in its process, which usually ends with it; and hides GPUs."""
    taken = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGXCPU, signal.SIGUSR1)
    signals = {number: signal.getsignal(number) for number in taken}
    environment, threads = dict(os.environ), torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("tests.bench.qlora.ON_CARD", False)
    # transformers.Trainer loads it where it is installed, and it may abort a process at its end: see run_main.
    if "deepspeed" not in sys.modules:
        monkeypatch.setitem(sys.modules, "deepspeed", None)
    # glibc cannot be told to forget it, and this process would never give back what it freed.
    for module in (
        "training.engine.cluster",
        "tests.bench.chat",
        "tests.bench.common",
        "tests.bench.decoding",
        "tests.bench.save_stall",
    ):
        monkeypatch.setattr(f"{module}.keep_freed_memory", lambda: None)
    yield
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    torch.use_deterministic_algorithms(deterministic)
    torch.set_num_threads(threads)
    os.environ.clear()
    os.environ.update(environment)
    if "transformers" in sys.modules:  # the peers silence it
        transformers_logging = importlib.import_module("transformers.utils.logging")
        transformers_logging.set_verbosity_warning()
        transformers_logging.enable_progress_bar()
    for number, handler in signals.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("as_in_a_process_of_its_own")
@pytest.mark.parametrize(
    "name",
    [
        # Of "peers" as a whole, --all cannot do anything where JoeyNMT cannot be had.
        pytest.param(each, marks=pytest.mark.whole if each == "peers" else pytest.mark.part)
        for each in PROMISED
        if each not in NO_SMOKE
    ],
)
def test_smoke_of_a_bench_ends_with_the_promised_figures(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert bench(name).main(["--smoke", "--data", "sample"]) == 0
    promised = [each for each in PROMISED[name] if each not in NOT_IN_SMOKE.get(name, ())]
    check(name, capfd.readouterr().out, promised)


@pytest.mark.whole
@pytest.mark.timeout(PATIENCE_S)
@pytest.mark.parametrize("name", PROMISED)
def test_quick_bench_ends_with_the_promised_figures(name: str, launch: Launch) -> None:
    if name in ("peers", "quality"):
        try:
            joeynmt.python()
        except UserError as error:
            pytest.skip(str(error))
    # The sample corpus, so that the test is the same on every machine.
    result = launch("--quick", "--data", "sample", module=f"tests.bench.{name}").wait()
    assert result.status == 0, result
    check(name, result.out, PROMISED[name])


@pytest.mark.parametrize(("bench", "config"), [("gpt", PLAIN), ("seq2seq", SEQ2SEQ)])
def test_sentences_are_counted_once_whether_their_sides_are_read_together_or_apart(bench, config, sample_data):
    data = open_prepared(sample_data)
    options = config_of(bench, [config], data)
    part = data.part("train")
    rows = (
        Sequences.of(data, "train", options.model.context)
        if bench == "gpt"
        else TwoSides(part, options.model.max_length)
    )
    plan = plan_of(options, rows)
    tokens = sum(plan.tokens(step)[0] for step in range(plan.steps))
    assert tokens / (tokens_a_sentence(plan) * len(part)) == pytest.approx(plan.epoch(plan.steps), rel=0.01)


def test_bench_of_families_names_those_that_there_are() -> None:
    with pytest.raises(UserError, match=r"--families gemma9: there are qwen2\.5, .*gemma2"):
        bench("families").main(["--families", "gemma2,gemma9", "--data", "sample"])


@pytest.mark.whole
@pytest.mark.timeout(PATIENCE_S)
@pytest.mark.usefixtures("as_in_a_process_of_its_own")
def test_of_twenty_kills_at_random_moments_none_is_lost(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def start(training: Training, pipe: int | None = None) -> Forked:
        module, *words = training.words
        with training.output.open("ab") if pipe is None else open(pipe, "ab", closefd=False) as out:
            return fork(
                module, [*words, "--run_dir", str(training.run_dir)], usual_environment(), out, out, training.processes
            )

    # In the bench torchrun starts the ranks; here they are forked, which takes a tenth of the time.
    monkeypatch.setattr(Training, "start", start)
    assert bench("soak").main(["--kills", "20", "--data", "sample"]) == 0
    figures = json.loads(capfd.readouterr().out.strip().splitlines()[-1])
    assert (figures["kills"], figures["lost"]) == (20, 0)
    assert set(figures["accidents"]) == set(ACCIDENTS), "every kind of accident happened"


@pytest.mark.parametrize(("name", "words"), [("gpu", ["--data", "sample"]), ("as_t4", ["training.gpt"])])
def test_a_bench_of_the_gpu_says_that_there_is_none(
    name: str, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="there is no GPU"):
        bench(name).main(words)


@pytest.mark.parametrize("name", [*PROMISED, "soak", "gpu", "families"])
def test_bench_names_a_data_file_that_is_missing(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.txt"):
        bench(name).main(["--data", str(tmp_path / "none.txt")])
