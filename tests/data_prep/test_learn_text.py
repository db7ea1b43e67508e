"""`--learn text`: documents for continued training of a base model, cut at the length without losing any of them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from data_prep import instructions
from tests.support.base_models import make_tiny_qwen2, make_tokenizer
from tests.support.commands import Launch
from tests.support.legal_records import sentence
from training.base.console import UserError
from training.data.chat import load_text_tokenizer
from training.data.conversations import Conversations, open_conversations
from training.data.prepared import PARTS
from training.evaluation import evaluate

END = {"eos_token": "<|endoftext|>", "pad_token": "<|im_end|>"}


def document(number: int) -> str:
    return "".join(f"{sentence(number, line, length=9 + line % 5)}。\n" for line in range(2 + 3 * (number % 7))).strip()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model's: without a chat template."""
    folder = tmp_path_factory.mktemp("tokenizer") / "base"
    return make_tokenizer(folder, [document(number) for number in range(60)], template=None, special=END)


def prepare(source: Path, output: Path, tokenizer: Path, *words: object) -> Conversations:
    every = (
        "--source",
        source,
        "--output",
        output,
        "--tokenizer",
        tokenizer,
        "--learn",
        "text",
        "--workers",
        1,
        *words,
    )
    assert instructions.main([str(word) for word in every]) == 0
    return open_conversations(output)


def test_every_token_of_every_document_is_learned_once(tokenizer: Path, tmp_path: Path):
    lines = [json.dumps({"id": number, "text": document(number), "url": "x"}) + "\n" for number in range(60)]
    (tmp_path / "books.jsonl").write_text("".join(lines))
    data = prepare(tmp_path / "books.jsonl", tmp_path / "data", tokenizer, "--max_length", 64)
    assert data.meta["counts"]["unread_keys"] == {"url": 60} and data.meta["counts"]["too_long"] == 0
    text = load_text_tokenizer(str(tokenizer))
    learned: dict[str, list[int]] = {}
    parts: dict[str, set[str]] = {}
    for name in PARTS:
        part = data.part(name)
        assert (part.ids.lengths <= 64).all() and (part.prompt_lengths == 1).all()
        for row, uid in enumerate(part.uids):
            book = uid.split("#")[0]
            parts.setdefault(book, set()).add(name)
            before = learned.setdefault(book, [])
            # The first token is only read: what begins a text, or the last token of the piece before.
            assert part.ids[row][0] == (before[-1] if before else text.end_id)
            before += part.ids[row][1:].tolist()
    assert all(len(names) == 1 for names in parts.values()), "the pieces of a document are in one part"
    expected = dict(enumerate(text.encode([document(number) for number in range(60)])))
    assert learned == {f"books:{number}": [*ids, text.end_id] for number, ids in expected.items()}
    assert {len(ids) // 63 for ids in expected.values()} >= {0, 1, 2}, "some are cut, some are not"
    assert text.decode(learned["books:6"]) == document(6)


def test_files_of_plain_text_are_documents_and_odd_ones_are_named(tokenizer: Path, tmp_path: Path):
    folder = tmp_path / "library"
    folder.mkdir()
    for number in range(30):
        (folder / f"{number:02}.{'md' if number % 2 else 'txt'}").write_text(document(number), "utf-8")
    (folder / "gbk.txt").write_bytes("合同".encode("gb18030"))
    (folder / "empty.txt").write_text("  \n")
    (folder / "more.jsonl").write_text(json.dumps({"text": document(31)}) + "\n")
    data = prepare(folder, tmp_path / "data", tokenizer, "--tasks", "field", "--max_malformed_share", 0.1)
    listed = {line["file"]: line["reason"] for line in data.meta["counts"]["malformed_listed"]}
    assert "not UTF-8" in listed["gbk.txt"] and "text is empty" in listed["empty.txt"] and len(listed) == 2
    texts = {json.loads(text)[0]["content"] for name in PARTS for text in data.part(name).messages}
    assert texts == {document(number) for number in [*range(30), 31]}
    for record, expected in (
        ({"content": "x"}, "no text in it, but 'content': name the key with --text_key"),
        ({"text": "a<|im_end|>"}, "the text holds <|im_end|>"),
    ):
        (tmp_path / "wrong.jsonl").write_text(json.dumps(record) + "\n")
        with pytest.raises(UserError, match=expected.replace("|", r"\|")):
            prepare(tmp_path / "wrong.jsonl", tmp_path / "wrong", tokenizer)
    with pytest.raises(UserError, match="template_options has no effect with learn text"):
        prepare(folder, tmp_path / "wrong", tokenizer, "--template_options", "enable_thinking=false")


def test_a_base_model_without_a_template_goes_on_learning_texts(tokenizer: Path, launch: Launch, tmp_path: Path):
    base, run_dir = make_tiny_qwen2(tmp_path / "base", tokenizer), tmp_path / "run"
    (tmp_path / "books.jsonl").write_text("".join(json.dumps({"text": document(n)}) + "\n" for n in range(60)))
    data = prepare(tmp_path / "books.jsonl", tmp_path / "data", base, "--max_length", 64, "--validation_share", 0.1)
    result = launch(
        *("--run_dir", run_dir, "--data", data.folder, "--base_model", base, "--lora.rank", 16, "--optim.lr", 2e-2),
        *("--batch.tokens_per_micro_batch", 600, "--batch.micro_batches_per_step", 2),
        *("--optim.steps", 20, "--optim.warmup_steps", 2, "--log.generate_samples", 2),
        module="training.qlora",
    ).wait()
    assert result.status == 0, result
    words = ("--max_new_tokens", 8, "--answers_per_task", 2)
    result = launch(run_dir, *words, module="training.evaluation.evaluate").wait()
    assert result.status == 0, result
    scores = json.loads((run_dir / "evaluation/test-2answers-8tokens.json").read_text("utf-8"))
    total = scores["losses"][-1]
    assert total["after"]["loss"] < total["before"]["loss"]
    with pytest.raises(UserError, match="learned texts, not answers"):
        evaluate.main([str(run_dir), "--disc_law_eval", str(tmp_path)])
    result = launch(run_dir, "--output", tmp_path / "adapters", module="training.evaluation.export").wait()
    assert result.status == 0, result
    card = (tmp_path / "adapters/README.md").read_text("utf-8")
    assert re.search(r"Trained with Relay on \d+ texts,", card) and 'tokenizer("Once upon a time"' in card
    assert "chat_template" not in card
