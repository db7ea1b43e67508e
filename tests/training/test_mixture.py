"""A mixture of sources: prepared with weights, drawn by the plan, and counted by source wherever it is shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_prep import instructions
from tests.support.base_models import make_tiny_qwen2, make_tokenizer
from tests.support.commands import Launch
from tests.support.legal_records import sentence
from tests.support.lives import Life
from tests.support.runs import losses, status_of, train_lines
from training.base.console import UserError
from training.data.conversations import Conversations, open_conversations
from training.engine.metrics import read_metrics
from training.qlora import Answers, QLoRAConfig, plan_of

NAMES, SIZES = ("law", "chat", "web"), (40, 60, 30)
RUN = (
    *("--lora.rank", 4, "--lora.alpha", 8, "--lora.dropout", 0.1, "--memory.logits_tokens", 50),
    *("--batch.tokens_per_micro_batch", 300, "--batch.micro_batches_per_step", 4, "--optim.steps", 12),
    *("--optim.warmup_steps", 2, "--optim.lr", 1e-2, "--log.every_steps", 1, "--log.validate_every_steps", 6),
    *("--checkpoint.every_steps", 3),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sources and a base model."""
    folder = tmp_path_factory.mktemp("mixture")
    for name, size in zip(NAMES, SIZES, strict=True):
        records = [
            {"question": sentence(name, n, length=6 + n % 9), "answer": sentence(name, "a", n, length=9 + n % 5)}
            for n in range(size)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    texts = [sentence(name, n, length=20) for name in NAMES for n in range(40)]
    make_tiny_qwen2(folder / "base", make_tokenizer(folder / "tokenizer", texts))
    return folder


def prepare(folder: Path, output: Path, *sources: str, words: tuple[object, ...] = ()) -> Conversations:
    every = ["--source", *sources, "--output", output, "--tokenizer", folder / "base", "--workers", 1]
    assert instructions.main([str(word) for word in (*every, "--validation_share", 0.1, *words)]) == 0
    return open_conversations(output)


@pytest.fixture(scope="module")
def data(folder: Path) -> Conversations:
    return prepare(folder, folder / "data", f"{folder}/law.jsonl:2", f"{folder}/chat.jsonl:0.5", f"{folder}/web.jsonl")


def test_every_row_says_its_source_and_meta_json_the_weights(folder: Path, data: Conversations, tmp_path: Path, capsys):
    assert data.mixture == {"law": 2, "chat": 0.5, "web": 1}
    for name in ("train", "validation", "test"):
        part = data.part(name)
        assert part.sources is not None
        assert all(uid.split(":")[0] == source for uid, source in zip(part.uids, part.sources, strict=True))
        assert {source: list(part.sources).count(source) for source in NAMES} == {
            source: data.meta["sources"][source][name] for source in NAMES
        }
    sources = [f"{folder}/{name}.jsonl" for name in NAMES]
    same = prepare(folder, tmp_path / "same", *sources)
    assert same.fingerprint != data.fingerprint and same.mixture == dict.fromkeys(NAMES, 1)
    assert "law: train" in capsys.readouterr().out
    alone = prepare(folder, tmp_path / "alone", sources[0])
    assert alone.mixture == {} and alone.part("train").sources is None
    for words, expected in (
        ((f"{sources[0]}:0", sources[1]), "a weight is above 0 and at most 100"),
        ((sources[0], sources[0]), "twice: name it once"),
        ((f"{sources[0]}:x",), "does not exist"),
    ):
        with pytest.raises(UserError, match=expected):
            prepare(folder, tmp_path / "wrong", *words)


def test_a_mixture_resumed_in_mid_epoch_on_other_ranks_draws_the_same_at_every_step(
    folder: Path, data: Conversations, launch: Launch, tmp_path: Path
):
    run = ("--base_model", folder / "base", *RUN)
    folders = [tmp_path / name for name in ("whole", "halves")]
    for each in folders:
        each.mkdir()
    whole, halves = (Life(launch, each, data.folder, None, run=run, module="training.qlora") for each in folders)
    result = whole.start().wait()
    assert result.status == 0, result
    halves.kill_at(8)
    result = halves.start(ranks=2).wait()
    assert result.status == 0 and "resuming at step 6" in result.out, result
    assert status_of(halves.run_dir)["status"] == "finished"

    config = QLoRAConfig.model_validate({
        **{"run_dir": "unused", "data": data.folder, "base_model": str(folder / "base")},
        **{"batch": {"tokens_per_micro_batch": 300, "micro_batches_per_step": 4}, "optim": {"steps": 12}},
    })  # fmt: skip
    plan = plan_of(config, Answers(data.part("train"), 0, data.mixture))
    begins = [plan.epoch(step) for step in (6, 8)]
    assert all(int(epoch) != epoch for epoch in begins), "in the middle of an epoch"

    def drawn(run_dir: Path) -> list[list[int]]:
        return [[line[f"samples/{name}"] for name in NAMES] for line in train_lines(run_dir)]

    assert drawn(halves.run_dir) == drawn(whole.run_dir) == [plan.drawn(step).tolist() for step in range(12)]
    assert losses(halves.run_dir) == pytest.approx(losses(whole.run_dir), rel=1e-4)
    for run_dir in (whole.run_dir, halves.run_dir):
        validations = [line for line in read_metrics(run_dir) if line["kind"] == "validation"]
        part = data.part("validation")
        counts = {name: list(part.sources or ()).count(name) for name in NAMES}
        assert all(counts.values()) and len(validations) == 2
        for line in validations:
            of_sources = [line[f"loss/{name}"] for name in NAMES]
            assert min(of_sources) < line["loss"] < max(of_sources)
        page = (run_dir / "report.html").read_text("utf-8")
        assert "samples drawn" in page and "loss/chat" in page


def test_the_plan_is_said_by_source(folder: Path, data: Conversations, launch: Launch, tmp_path: Path):
    words = ("--run_dir", tmp_path / "run", "--data", data.folder, "--base_model", folder / "base", *RUN, "--dry-run")
    result = launch(*words, module="training.qlora").wait()
    rows = {name: data.meta["sources"][name]["train"] for name in NAMES}
    assert result.status == 0, result
    assert f"{2 * rows['law']:,} of law (weight 2), {round(rows['chat'] / 2):,} of chat (weight 0.5)" in result.out
