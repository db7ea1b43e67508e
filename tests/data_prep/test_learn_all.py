"""`--learn all`: every answer of a conversation is learned in one pass, from just what it is given at inference."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep import instructions
from tests.support.base_models import CHATML, make_tiny_qwen2, make_tokenizer
from tests.support.commands import ROOT
from tests.support.legal_records import sentence
from training.base.console import UserError
from training.data.chat import assistant, load_chat_tokenizer, user
from training.data.conversations import Conversations, open_conversations
from training.data.prepared import PARTS
from training.qlora import Answers, QLoRAConfig, build_model, losses_of

Messages = list[dict[str, object]]
CPU = torch.device("cpu")
QWEN3 = ROOT / "tests/cases/tokenizers/qwen3_like"


def dialogue(number: int, turns: int = 4) -> Messages:
    """So many questions and answers, of this number alone."""
    return [
        {"role": role, "content": f"{sentence(role, number, place, length=8)}。"}
        for place in range(turns)
        for role in ("user", "assistant")
    ]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = [str(message["content"]) for number in range(40) for message in dialogue(number)]
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "small", texts)


@pytest.fixture
def make(tmp_path: Path, tokenizer: Path) -> Callable[..., Conversations]:
    def prepare(name: str, records: Sequence[object], *words: object, tokenizer: Path = tokenizer) -> Conversations:
        source = tmp_path / f"{name}.jsonl"
        source.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "utf-8")
        every = ["--source", source, "--output", tmp_path / name, "--tokenizer", tokenizer, "--workers", 1, *words]
        assert instructions.main([str(word) for word in every]) == 0
        return open_conversations(tmp_path / name)

    return prepare


def learned_of(data: Conversations, name: str) -> list[tuple[str, list[int], list[int]]]:
    """Uid, what stands before it and what is learned, of every answer."""
    part = data.part(name)
    found = []
    for row in range(len(part)):
        ids = part.ids[row]
        learned = [[part.prompt_lengths[row], len(ids)]] if part.learned is None else part.learned[row].reshape(-1, 2)
        found += [(part.uids[row], ids[:first].tolist(), ids[first:behind].tolist()) for first, behind in learned]
    return found


def test_every_answer_is_learned_as_four_single_records_teach_it(make, tokenizer: Path, tmp_path: Path):
    dialogues = [dialogue(number) for number in range(40)]
    whole = make("whole", [{"messages": each} for each in dialogues], "--learn", "all")
    single = make("single", [{"messages": each[: 2 * n]} for each in dialogues for n in (1, 2, 3, 4)])
    assert whole.meta["counts"]["turns"] == 160 and whole.meta["counts"]["split"] == 0
    assert sum(whole.meta["rows"].values()) == 40 and sum(single.meta["rows"].values()) == 160

    def taught(data: Conversations) -> list[tuple[list[int], list[int]]]:
        return sorted((before, learned) for name in PARTS for _, before, learned in learned_of(data, name))

    assert taught(whole) == taught(single)
    base = make_tiny_qwen2(tmp_path / "base", tokenizer)
    config = QLoRAConfig.model_validate({"run_dir": "unused", "data": whole.folder, "base_model": str(base)})
    torch.manual_seed(3)
    model = build_model(config, base, torch.float32, CPU).eval()

    def loss_of(data: Conversations) -> tuple[float, int]:
        total, tokens = 0.0, 0
        for name in PARTS:
            answers = Answers(data.part(name), data.meta["tokenizer"]["pad_id"])
            for samples in np.array_split(np.arange(len(answers.lengths)), -(-len(answers.lengths) // 8)):
                losses = losses_of(model, answers, samples, CPU)[0]
                assert len(losses) == answers.answer_tokens[samples].sum()
                total += losses.sum(dtype=torch.float64).item()
                tokens += len(losses)
        return total, tokens

    (one, tokens), (four, same_tokens) = loss_of(whole), loss_of(single)
    assert tokens == same_tokens and one == pytest.approx(four, rel=1e-6)


def test_the_last_answer_ends_a_row_and_others_are_read_where_they_weigh_nothing(make, tokenizer: Path):
    records = []
    for number in range(30):
        messages = dialogue(number)
        messages[3]["weight"] = 0
        messages[7]["loss"] = False
        records.append({"messages": messages})
    data = make("weighted", records, "--learn", "all")
    chat = load_chat_tokenizer(str(tokenizer))
    for name in PARTS:
        part = data.part(name)
        for row, messages in enumerate(map(json.loads, part.messages)):
            assert len(messages) == 6, "what stands behind the last answer that is learned is left out"
            first, behind = part.learned[row].reshape(-1, 2).T
            assert [chat.decode(part.ids[row][a:b]) for a, b in zip(first, behind, strict=True)] == [
                messages[1]["content"],
                messages[5]["content"],
            ]
            assert first[-1] == part.prompt_lengths[row] and behind[-1] == len(part.ids[row])
    assert data.meta["counts"]["turns"] == 60


def test_where_an_earlier_turn_is_shown_otherwise_each_answer_is_a_sample_of_its_own(make):
    """As Qwen3's template drops the think block of all answers but the last."""
    words = ("--learn", "all", "--template_options", "enable_thinking=false")
    data = make("thinking", [{"messages": dialogue(number)} for number in range(30)], *words, tokenizer=QWEN3)
    counts = data.meta["counts"]
    assert (counts["split"], counts["turns"], sum(data.meta["rows"].values())) == (30, 120, 120)
    assert data.meta["tokenizer"]["template_options"] == {"enable_thinking": False}
    chat = load_chat_tokenizer(str(QWEN3), {"enable_thinking": False})
    uids = []
    for name in PARTS:
        part = data.part(name)
        uids += part.uids
        for row, messages in enumerate(map(json.loads, part.messages)):
            prompt, written = chat.written(messages[:-1], messages[-1])
            assert part.learned[row].tolist() == [part.prompt_lengths[row], len(part.ids[row])]
            assert part.ids[row].tolist() == [*chat.encode([prompt])[0], *chat.encode([written])[0], chat.end_id]
    assert len(set(uids)) == 120 and "thinking:null@1" in uids and "thinking:null@1#3" in uids


def test_an_answer_that_fails_even_alone_is_read_only_and_said(make, tmp_path: Path, capsys):
    template = CHATML.replace("message['content']", "message['content'] | replace('甲', '乙')")
    texts = [str(message["content"]) for number in range(40) for message in dialogue(number)]
    tokenizer = make_tokenizer(tmp_path / "changing", texts, template=template)
    records = [{"messages": dialogue(number)} for number in range(30)]
    records[4]["messages"][3]["content"] += "甲"
    data = make("changed", records, "--learn", "all", tokenizer=tokenizer)
    assert data.meta["counts"]["turns"] == 119 and data.meta["counts"]["malformed"] == 0
    assert "1 records have an answer that the chat template writes otherwise" in capsys.readouterr().out


def test_answers_beyond_the_length_are_cut_off_and_counted(make):
    records = [{"messages": dialogue(number)} for number in range(30)]
    for record in records[:10]:
        record["messages"][5]["content"] = sentence("long", record["messages"][0]["content"], length=400)
    data = make("long", records, "--learn", "all", "--max_length", 512)
    counts = data.meta["counts"]
    assert (counts["truncated"], counts["cut_turns"], counts["turns"], counts["too_long"]) == (10, 20, 100, 0)
    for name in PARTS:
        part = data.part(name)
        assert (part.ids.lengths <= 512).all()
        assert all(len(json.loads(text)) in (4, 8) for text in part.messages)


def test_a_held_out_turn_whose_prompt_is_trained_on_is_read_and_not_scored(make):
    greeting: Messages = [user("你好"), assistant("您好，请讲。")]
    records = [{"messages": [*greeting, *dialogue(number, 1)]} for number in range(60)]
    records += [{"messages": [*greeting[:1], assistant(f"您好{number}。")]} for number in range(3)]
    data = make("greetings", records, "--learn", "all", "--validation_share", 0.1)
    trained = {tuple(before) for _, before, _ in learned_of(data, "train")}
    held_out = [tuple(before) for name in ("validation", "test") for _, before, _ in learned_of(data, name)]
    assert held_out and not trained & set(held_out)
    counts = data.meta["counts"]
    # Each of them is greeted, and some are nothing but a greeting.
    assert counts["turns_in_training"] == len(held_out) + counts["in_training"]
    for name in ("validation", "test"):
        part = data.part(name)
        assert all(json.loads(text)[0]["content"] == "你好" for text in part.messages), "it is read"


def test_conversations_that_are_passed_with_their_beginnings_leave_nothing_to_score_and_that_is_said(make):
    whole = [dialogue(number, 3) for number in range(6)]
    records = [{"messages": each[:turns]} for each in whole for turns in (2, 4, 6)]
    with pytest.raises(UserError, match="since training has every prompt of its conversations"):
        for seed in range(4):
            make(f"beginnings-{seed}", records, "--learn", "all", "--seed", seed)


def test_a_share_that_groups_do_not_allow_is_said(make, capsys):
    few = [{"question": f"问题{number % 3}？", "answer": sentence(number, length=9)} for number in range(90)]
    data = make("few", few)
    assert min(data.meta["rows"].values()) == 30
    said = capsys.readouterr().err
    assert "test has 30 of 90 records, where 9 were asked for" in said and "(here up to 30)" in said
    make("many", [{"question": f"问题{number}？", "answer": "好的。"} for number in range(90)])
    assert "were asked for" not in capsys.readouterr().err
