"""`python -m data_prep.instructions`: a user's own records of every layout become what `training.qlora` trains on."""

from __future__ import annotations

import gzip
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from data_prep import disc_law, export, instructions, prepare_conversations
from tests.support.base_models import CHATML, WITH_TOOLS, make_tiny_qwen2, make_tokenizer
from tests.support.commands import Launch
from tests.support.legal_records import sentence
from training.base.console import UserError
from training.data.conversations import Conversations, open_conversations
from training.data.prepared import PARTS

Line = dict[str, object] | bytes
Make = Callable[..., Conversations]


def asked(number: int) -> str:
    return f"What is {sentence('question', number, length=8)}?"


def said(number: int) -> str:
    return f"It is {sentence('answer', number, length=6)}, number {number}."


def qa(number: int, **more: object) -> dict[str, object]:
    """A record of one of the layouts, none of which needs more than a question and an answer."""
    return {"question": asked(number), "answer": said(number), **more}


def turns(*contents: str, first: str = "user") -> list[dict[str, str]]:
    """Messages of the user and the assistant in turn, behind a system's or not."""
    roles = ["system"] * (first == "system") + ["user", "assistant"] * len(contents)
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]


def lines_of(records: Sequence[Line]) -> bytes:
    encoded = (line if isinstance(line, bytes) else json.dumps(line, ensure_ascii=False).encode() for line in records)
    return b"".join(line + b"\n" for line in encoded)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = [f"{asked(number)} {said(number)}" for number in range(60)]
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "small", texts)


@pytest.fixture
def make(tmp_path: Path, tokenizer: Path) -> Make:
    """Prepares records in this process: `make(records, "--key", value, ...)`, or the source at a path."""
    made = Counter[str]()

    def prepare(source: Sequence[Line] | Path, *words: object, output: Path | None = None, tokenizer: Path = tokenizer):
        made["sets"] += 1
        if not isinstance(source, Path):
            path = tmp_path / f"mine-{made['sets']}.jsonl"
            path.write_bytes(lines_of(source))
            source = path
        output = output or tmp_path / f"made-{made['sets']}"
        every = ["--source", source, "--output", output, "--tokenizer", tokenizer, "--workers", 1, *words]
        assert instructions.main([str(word) for word in every]) == 0
        return open_conversations(output)

    return prepare


def rows_of(data: Conversations) -> dict[str, tuple[str, str, list[dict[str, str]]]]:
    """Part, task and messages of every row, by its id."""
    found = {}
    for name in PARTS:
        part = data.part(name)
        for uid, task, messages in zip(part.uids, part.tasks, part.messages, strict=True):
            assert uid not in found, f"{uid} stands twice"
            found[uid] = name, task, json.loads(messages)
    return found


def messages_of(data: Conversations) -> list[list[dict[str, str]]]:
    return sorted((messages for _, _, messages in rows_of(data).values()), key=str)


def assert_only_the_last_answer_is_learned(data: Conversations) -> None:
    tokenizer = AutoTokenizer.from_pretrained(data.folder / "tokenizer", local_files_only=True)
    for name in PARTS:
        part = data.part(name)
        for row, messages in enumerate(map(json.loads, part.messages)):
            prompt, learned = np.split(part.ids[row], [part.prompt_lengths[row]])
            at_inference = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
            assert prompt.tolist() == at_inference
            assert tokenizer.decode(learned) == messages[-1]["content"] + "<|im_end|>"


# --- layouts -----------------------------------------------------------------------------------------------------


# What a line looks like, and the messages that it becomes, for a question and an answer.
LAYOUTS: dict[str, Callable[[str, str], tuple[dict[str, object], list[dict[str, str]]]]] = {
    "messages": lambda q, a: ({"messages": turns(q, a)}, turns(q, a)),
    "messages_system": lambda q, a: (
        {"messages": turns("Be brief.", q, a, first="system")},
        turns("Be brief.", q, a, first="system"),
    ),
    "messages_of_several_turns": lambda q, a: (
        {"messages": turns(q, "Just so.", "Why?", a)},
        turns(q, "Just so.", "Why?", a),
    ),
    "sharegpt": lambda q, a: (
        {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}], "id": a},
        turns(q, a),
    ),
    "sharegpt_system": lambda q, a: (
        {"system": "Be kind.", "conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]},
        turns("Be kind.", q, a, first="system"),
    ),
    "alpaca": lambda q, a: ({"instruction": "Answer:", "input": q, "output": a}, turns(f"Answer:\n{q}", a)),
    "alpaca_empty_input": lambda q, a: ({"instruction": q, "input": "", "output": a}, turns(q, a)),
    "alpaca_no_input": lambda q, a: ({"instruction": q, "output": a}, turns(q, a)),
    "dolly": lambda q, a: (
        {"instruction": q, "context": "A text.", "response": a, "category": "closed_qa"},
        turns(f"{q}\nA text.", a),
    ),
    "completion": lambda q, a: ({"prompt": f" {q}\n", "completion": f" {a}"}, turns(q, a)),
    "response": lambda q, a: ({"prompt": q, "response": a}, turns(q, a)),
    "input_output": lambda q, a: ({"input": q, "output": a}, turns(q, a)),
    "question_answer": lambda q, a: ({"question": q, "answer": a, "id": 7}, turns(q, a)),
    "openorca": lambda q, a: (
        {"system_prompt": "Think.", "question": q, "response": a},
        turns("Think.", q, a, first="system"),
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_is_read_and_its_last_answer_learned(name: str, make: Make):
    both = [LAYOUTS[name](asked(number), said(number)) for number in range(12)]
    data = make([line for line, _ in both])
    assert data.meta["counts"]["malformed"] == 0
    assert messages_of(data) == sorted((messages for _, messages in both), key=str)
    assert_only_the_last_answer_is_learned(data)


def test_layouts_may_be_mixed_in_files_of_a_folder_and_help_names_them(make: Make, tmp_path: Path, capsys):
    folder = tmp_path / "mine"
    folder.mkdir()
    both = [layout(asked(place), said(place)) for place, layout in enumerate(list(LAYOUTS.values()) * 2)]
    (folder / "one.jsonl").write_bytes(lines_of([line for line, _ in both[:14]]))
    (folder / "two.jsonl").write_bytes(b"\xef\xbb\xbf" + lines_of([line for line, _ in both[14:]]))
    (folder / "notes.txt").write_text("no record")
    data = make(folder)
    assert messages_of(data) == sorted((messages for _, messages in both), key=str)
    assert data.meta["source"]["kind"] == "folder"
    assert [file["name"] for file in data.meta["source"]["files"]] == ["one.jsonl", "two.jsonl"]
    with pytest.raises(SystemExit):
        instructions.main(["--help"])
    said_by_help = capsys.readouterr().out
    for key in {key for line, _ in both for key in line} | {"task", "from", "value", "role", "content"}:
        assert key in said_by_help


def test_task_or_category_of_a_record_or_the_name_of_its_file_is_its_task(make: Make, tmp_path: Path):
    records = [qa(number, task="rhymes") for number in range(20)]
    records += [qa(number, category="诗", task=None) for number in range(20, 40)] + [qa(n) for n in range(40, 60)]
    data = make(records, "--validation_share", 0.1)
    assert data.meta["tasks"] == ["mine-1", "rhymes", "诗"]
    for task in data.meta["tasks"]:
        counts = data.meta["counts"]["tasks"][task]
        assert (counts["train"], counts["validation"], counts["test"]) == (16, 2, 2), task
    rows = rows_of(data)
    assert [rows[uid][:2] for uid in data.meta["questions"]] == [("test", task) for task in data.meta["tasks"]]
    by_file = make(tmp_path / "mine-1.jsonl", "--tasks", "file")
    assert by_file.meta["tasks"] == ["mine-1"]
    with pytest.raises(UserError, match=r"of 120 tasks .*--tasks file"):
        make([qa(number, category=f"kind {number}") for number in range(120)])
    (tmp_path / "shards").mkdir()
    for number in range(120):
        (tmp_path / f"shards/part-{number:05d}.jsonl").write_bytes(lines_of([qa(number)]))
    (tmp_path / "shards/all.jsonl").write_bytes(lines_of([qa(number) for number in range(200, 220)]))
    assert make(tmp_path / "shards").meta["tasks"] == ["all.jsonl", "part"]


def test_parts_into_which_others_split_records_are_all_read_and_that_is_said(make: Make, tmp_path: Path, capsys):
    (tmp_path / "parts").mkdir()
    for place, part in enumerate(("train", "test")):
        lines = lines_of([qa(number) for number in range(40 * place, 40 * place + 40)])
        (tmp_path / f"parts/{part}.jsonl").write_bytes(lines)
    assert sum(make(tmp_path / "parts").meta["rows"].values()) == 80
    assert "has test.jsonl, train.jsonl, all of which are read and split anew" in capsys.readouterr().err
    with pytest.raises(UserError, match="split is that of a data set"):
        make(tmp_path / "parts", "--split", "train")


def test_what_appears_at_the_output_while_it_is_prepared_is_not_replaced(make: Make, tmp_path: Path, monkeypatch):
    def build(*words: object) -> object:
        (tmp_path / "made").mkdir()
        (tmp_path / "made/notes.txt").write_text("mine")
        return made(*words)

    made = prepare_conversations.build
    monkeypatch.setattr(prepare_conversations, "build", build)
    with pytest.raises(UserError, match="made was made meanwhile, by something else: choose another --output"):
        make([qa(number) for number in range(30)], output=tmp_path / "made")
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["notes.txt"]


def test_ids_are_the_records_own_or_their_lines_and_unique(make: Make):
    records = [qa(number, id=f"q{number % 6}") for number in range(12)] + [
        qa(99, id=5),
        qa(100),
        {**qa(101), "id": None},
    ]
    uids = rows_of(make(records)).keys()
    expected = {f"q{number}" for number in range(6)} | {f"q{number}@{number + 7}" for number in range(6)}
    assert uids == {f"mine-1:{uid}" for uid in expected | {"5", "null@14", "null@15"}}


# --- what cannot be read -----------------------------------------------------------------------------------------


BAD_LINES: list[tuple[Line, str]] = [
    (b"Q: what? A: that.", "not JSON"),
    (lines_of([qa(1)])[:-9], "not JSON"),
    (b'{"question": "\xff", "answer": "x"}', "not UTF-8 (byte 15); of GBK, `iconv"),
    ({"ask": "why?", "reply": "so"}, "no layout has the keys 'ask', 'reply': name them (--question_key, --answer_key)"),
    ({}, "no layout has the keys (none)"),
    (b'{"\\ud800": "half a character"}', r"no layout has the keys '\ud800'"),
    ({"question": "why?"}, "no answer (output, completion, response, answer, target, 答案, 回答) beside 'question'"),
    ({"question": "why?", "answer": " "}, "answer is empty"),
    ({"question": "why?", "answer": None}, "no answer"),
    (b'{"question": "why?", "answer": NaN}', "no answer"),
    ({"messages": [*turns("why?"), {"role": "assistant", "content": None}]}, "content of turn 2 of messages is null"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "has a part that is no text: image_url"),
    ({"question": "why?", "chosen": "so", "rejected": "no"}, "with --answer_key chosen the preferred one is"),
    ({"chosen": "Human: why? Assistant: so", "rejected": "no"}, "not learned as such, and has no question of its own"),
    ({"text": "A text."}, "with --learn text"),
    ({"messages": "[1"}, "begins like a list, but is no JSON"),
    ({"messages": [{"from": "function_call", "value": "calc("}]}, "turn 1 of messages calls a tool, but 'calc('"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]}, "has a call of a tool without a name"),
    (qa(1, tools=[{"type": "function"}]), "tools has a tool without a name"),
    (json.dumps(qa(1, tools=[{"name": "f", "description": "\ud83d"}])).encode(), "tools holds half a surrogate pair"),
    (
        json.dumps(
            {"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "\ud83d"}]}]}
        ).encode(),
        "turn 1 of messages holds half a surrogate pair",
    ),
    ({"messages": [*turns("why?"), {"role": "assistant", "tool_calls": [{"name": "f"}]}]}, "leaves"),
    ({"question": "why?", "answer": ["so"]}, "answer is a list, not text"),
    ({"instruction": " ", "input": "", "output": "x"}, "instruction is empty"),
    ({"prompt": "why?", "response": "so", "answer": "no"}, "it has response and answer, of which one is expected"),
    ({"prompt": "why?", "question": "how?", "answer": "so"}, "it has prompt and question"),
    ({"prompt": "why?", "answer": "so", "history": "a"}, "history is text, not a list of turns"),
    ({"prompt": "why?", "answer": "so", "history": [["a", "b", "c"]]}, "turn 1 of history is no object with role"),
    ({"messages": "why?"}, "messages is text, not a list"),
    ({"messages": []}, "its turns are of nobody"),
    ({"messages": turns("why?")}, "nobody answers: its turns are of user"),
    ({"messages": [*turns("why?", "so"), *turns("so", "so")[1:]]}, "here they are of user, assistant, assistant"),
    ({"messages": turns("why?", "so")[1:]}, "nobody asks what the assistant says"),
    ({"messages": [*turns("why?"), *turns("how?", "so")]}, "they are of user, user, assistant"),
    ({"messages": [*turns("why?", "so"), *turns("Be brief.", "a", "b", first="system")]}, "behind a system at most"),
    ({"messages": [{"role": "tool", "content": "5"}]}, "nobody answers: its turns are of tool"),
    ({"messages": [{"role": "narrator", "content": "5"}]}, "turn 1 of messages is of 'narrator', who is none of"),
    ({"messages": [{"role": "user"}]}, "turn 1 of messages is no object with role and content"),
    ({"messages": turns("why?", "")}, "content of turn 2 of messages is empty"),
    ({"conversations": [{"name": "user", "words": "x"}]}, "is no object with role and content, but with name, words"),
    (qa(1, task={"a": 1}), "task is an object, not text"),
    (qa(1, category="all"), "which is what tables call all of them"),
    (qa(1, system={"a": 1}), "system is an object, not text"),
    (qa(1, id=["a"]), "id is a list, not text"),
    ({"messages": turns("why?", "so<|im_end|>")}, "the answer holds <|im_end|>"),
    ({"messages": turns("why?<|im_start|>", "so")}, "turn 1 (user) holds <|im_start|>"),
]


def test_lines_that_are_no_record_are_named_with_file_line_and_reason(make: Make, tmp_path: Path):
    good = [qa(number) for number in range(1000, 1040)]
    source = tmp_path / "mine.jsonl"
    source.write_bytes(lines_of([*good, b"", *(line for line, _ in BAD_LINES)]))
    data = make(source, "--max_malformed_share", 0.6)
    counts = data.meta["counts"]
    assert (counts["malformed"], counts["blank"], counts["records"]) == (len(BAD_LINES), 1, 40)
    for number, ((_, expected), listed) in enumerate(zip(BAD_LINES, counts["malformed_listed"], strict=True)):
        assert (listed["file"], listed["line"]) == ("mine.jsonl", 42 + number)
        assert expected in listed["reason"]
    assert messages_of(data) == messages_of(make(good))
    expected = rf"{len(BAD_LINES)} of {40 + len(BAD_LINES)} lines are no record.*mine.jsonl line 42"
    with pytest.raises(UserError, match=expected + r".*mend these lines.*instruction"):
        make(source)


def test_an_answer_of_weight_0_is_read_and_never_learned(make: Make):
    def weighted(number: int, *weights: object, key: str = "weight") -> dict[str, object]:
        told = turns(asked(number), said(number), "Once more?", f"Wrong, {number}.")
        for turn, weight in zip(told[1::2], weights, strict=True):
            turn[key] = weight
        return {"messages": told}

    records = [weighted(number, 1, 0) for number in range(8)]
    records += [weighted(number, None, False, key="train") for number in range(8, 16)]
    records += [weighted(number, 0, 1.0) for number in range(16, 24)]
    never = [weighted(24, 0, 0), qa(25, loss_weight=0.0), {**weighted(26, 1, 1), "weight": 0}]
    data = make([*records, *never, qa(27, weight=0.5)], "--max_malformed_share", 0.2)
    both = [turns(asked(number), said(number), "Once more?", f"Wrong, {number}.") for number in range(24)]
    learned = [*(messages[:2] for messages in both[:16]), *both[16:], turns(asked(27), said(27))]
    assert messages_of(data) == sorted(learned, key=str)
    assert_only_the_last_answer_is_learned(data)
    counts = data.meta["counts"]
    assert [line["line"] for line in counts["malformed_listed"]] == [25, 26, 27]
    assert all("no answer of it is to be learned" in line["reason"] for line in counts["malformed_listed"])
    assert counts["unread_keys"] == {"weight": 1}, "half a weight is not known, so it is named"


def test_keys_that_were_not_read_are_counted_and_named(make: Make, tmp_path: Path, capsys):
    thought = [{**turn, "reasoning_content": "Hm.", "name": None} for turn in turns(asked(1), said(1))]
    records: list[Line] = [
        qa(0, id="a", task="t", system="Be brief.", context="", history=[]),  # all of it read, or nothing said
        {"messages": thought, "source": "web"},
        {"messages": turns("Be kind.", asked(2), said(2), first="system"), "system": "Be brief.", "tools": []},
        *(json.dumps(qa(number, reference=["§ 1"], **{"\ud800\n": 0})).encode() for number in range(3, 30)),
        b"no record",
    ]
    data = make(records, "--max_malformed_share", 0.1)
    expected = {"reference": 27, r"\ud800\n": 27, "messages[].reasoning_content": 1, "source": 1, "system": 1}
    assert data.meta["counts"]["unread_keys"] == expected
    named = capsys.readouterr().out
    assert ", ".join(f"{key} (in {count} records)" for key, count in expected.items()) in named
    assert "malformed 1 lines were left out, and meta.json lists them: mine-1.jsonl line 31: not JSON" in named


def test_sources_that_hold_no_records_say_what_to_do(make: Make, tmp_path: Path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "blank.jsonl").write_text("\n\n")
    (tmp_path / "half.jsonl.gz").write_bytes(gzip.compress(lines_of([qa(1), qa(2)]))[:-20])
    (tmp_path / "endless.jsonl.gz").write_bytes(gzip.compress(bytes(70 << 20)))
    (tmp_path / "none.json").write_text("[]")
    (tmp_path / "pointer.parquet").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    (tmp_path / "sheet.xlsx").write_bytes(b"PK\x03\x04")
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    (tmp_path / "wide.jsonl").write_text(json.dumps(qa(1)), encoding="utf-16")
    (tmp_path / "open.csv").write_text('question,answer\nQ,A\nQ,"A\nQ,"A"\n')
    (tmp_path / "twice.csv").write_text("\nquestion,answer,answer\nQ,A,B\n")
    for name, expected in (
        ("nothing.jsonl", "does not exist: pass a file of records, a folder"),
        ("folder", r"holds no \.jsonl, .* file"),
        ("blank.jsonl", "hold no record"),
        ("none.json", "hold no record"),
        ("none.json:nan", "a weight is above 0"),
        ("none.json:-1", "a weight is above 0"),
        ("pointer.parquet", "`git lfs pull`"),
        ("half.jsonl.gz", "half.jsonl.gz is a damaged gzip file .*: delete it and fetch it again"),
        ("endless.jsonl.gz", "unpacks to more than 67,108,864, which no text does"),
        ("sheet.xlsx", "a spreadsheet; .*export it as CSV"),
        ("rows.parquet", "is a damaged Parquet file"),
        ("wide.jsonl", "UTF-16; `iconv -f UTF-16 .* > wide-utf8.jsonl`"),
        ("open.csv", "is no CSV from line 3 on"),
        ("twice.csv", "has the column 'answer' twice"),
    ):
        with pytest.raises(UserError, match=expected):
            make(tmp_path / name, output=tmp_path / "x")
    make([qa(number) for number in range(30)], output=tmp_path / "made")
    with pytest.raises(UserError, match="is prepared already: a training takes it as it is, --data"):
        make(tmp_path / "made", output=tmp_path / "x")
    for words, said in (
        (("--question_key", "asked"), r"no question \(asked\) beside "),
        (("--answer_key", "said"), r"no answer \(said\) beside "),
        (("--split", "test"), "split is that of a data set"),
        (("--template_options", "enable_thinkin=false"), "reads nothing of that name"),
    ):
        with pytest.raises(UserError, match=said):
            make([qa(1)], *words, output=tmp_path / "x")
    with pytest.raises(UserError, match=r"3 records in 1 tasks, with 1 different questions, are too few"):
        make([{"question": "why?", "answer": str(number)} for number in range(3)], output=tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_turns_that_the_template_has_no_place_for_are_no_records(make: Make, tmp_path: Path):
    told = [{"messages": turns("Be brief.", asked(number), said(number), first="system")} for number in range(2)]
    records = [*told, *(qa(number) for number in range(2, 40))]
    refusing = CHATML.replace("{%- for", "{%- if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}"
                              "{%- endif %}{%- for", 1)  # fmt: skip
    ignoring = CHATML.replace(
        "{{- '<|im_start|>' + m", "{%- if message['role'] != 'system' %}{{- '<|im_start|>' + m", 1
    )
    ignoring = ignoring.replace("{%- endfor %}", "{%- endif %}{%- endfor %}", 1)
    for template, expected in ((refusing, r"takes no turns of system, user"), (ignoring, r"leaves out what system")):
        texts = [f"{asked(number)} {said(number)}" for number in range(60)]
        other = make_tokenizer(tmp_path / expected[:6], texts, template=template)
        data = make(records, "--max_malformed_share", 0.1, tokenizer=other)
        listed = data.meta["counts"]["malformed_listed"]
        assert [line["line"] for line in listed] == [1, 2] and all(expected in line["reason"] for line in listed)


# --- duplicates, groups, lengths -----------------------------------------------------------------------------------


def test_duplicates_are_dropped_and_what_is_read_alike_is_in_one_part(make: Make):
    records: list[Line] = [qa(number) for number in range(60)]
    records += [{"prompt": asked(number), "completion": f"{said(number)} "} for number in range(10)]  # the same
    records += [qa(number, answer=f"Another answer, {number}.") for number in range(20)]
    records += [{"question": asked(n).upper(), "answer": f"Loud, {n}."} for n in range(20, 40)]
    records += [{"messages": turns("Hi!", "Hello.", asked(n), said(n))} for n in range(40, 60)]
    records += [{"messages": turns("Hi!", "Hello.", asked(n), f"Or so, {n}.")} for n in range(40, 60)]
    data = make(records, "--validation_share", 0.2)
    counts = data.meta["counts"]
    assert counts["duplicates"] == 10 and sum(data.meta["rows"].values()) == counts["records"] - 10 == 140
    part_of: dict[str, str] = {}
    for part, _, messages in rows_of(data).values():
        before = str(messages[:-1]).casefold()
        assert part_of.setdefault(before, part) == part
    # Dialogues with the same greeting are not one group.
    assert len(part_of) == 80 and min(data.meta["rows"].values()) >= 10
    assert {part for before, part in part_of.items() if "hello" in before} == set(PARTS)
    again = make(records, "--validation_share", 0.2, "--seed", 5)
    assert rows_of(again).keys() and messages_of(again) == messages_of(data)
    assert {uid for uid, row in rows_of(again).items() if row[0] == "test"} != {
        uid.replace("mine-1", "mine-2") for uid, row in rows_of(data).items() if row[0] == "test"
    }


def test_answers_too_short_and_records_too_long_are_dropped_and_counted(make: Make):
    records = [qa(number) for number in range(40)]
    records += [qa(number, answer="No.") for number in range(40, 45)]
    records += [qa(number, answer=sentence(number, length=400)) for number in range(45, 65)]
    data = make(records, "--min_answer_characters", 4, "--max_length", 128)
    counts = data.meta["counts"]
    assert (counts["too_short"], counts["too_long"], counts["truncated"]) == (5, 20, 0)
    assert messages_of(data) == sorted((turns(asked(n), said(n)) for n in range(40)), key=str)
    with pytest.raises(UserError, match=r"nothing is left for train and validation and test .*--max_length"):
        make(records[45:], "--max_length", 128)


# --- kills, second runs ------------------------------------------------------------------------------------------


def test_killed_in_the_middle_it_goes_on_and_makes_the_same(
    launch: Launch, make: Make, tokenizer: Path, tmp_path: Path
):
    source, output, shards = tmp_path / "mine.jsonl", tmp_path / "x", tmp_path / ".x.shards"
    source.write_bytes(lines_of([qa(number) for number in range(6000)]))
    words = ("--source", source, "--output", output, "--tokenizer", tokenizer, "--workers", 2)
    running = launch("data_prep.instructions", *words, module="tests.support.slow_preparing")
    while not list(shards.glob("*.arrow")):
        assert running.process.poll() is None, running.printed()
        time.sleep(0.001)
    os.kill(running.process.pid, signal.SIGKILL)
    running.wait()
    assert 0 < len(list(shards.glob("*.arrow"))) < 7 and not output.exists()
    result = launch(*words, module="data_prep.instructions").wait()
    assert result.status == 0 and not shards.exists(), result
    whole = make(source, output=tmp_path / "whole")
    resumed = open_conversations(output)
    assert resumed.fingerprint == whole.fingerprint and resumed.meta["files"] == whole.meta["files"]


def test_what_was_made_with_other_options_or_by_the_other_command_is_not_replaced(
    make: Make, tmp_path: Path, tokenizer: Path, capsys
):
    source, output = tmp_path / "mine.jsonl", tmp_path / "x"
    source.write_bytes(lines_of([qa(number) for number in range(40)]))
    first = make(source, output=output).fingerprint
    assert make(source, output=output).fingerprint == first and "nothing to do" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"max_length: 1024 -> 512; tasks: field -> file.*--overwrite"):
        make(source, "--max_length", 512, "--tasks", "file", output=output)
    law = {"id": "leg_case_cls-1", "input": "问题", "output": "答案"}
    (tmp_path / "law").mkdir()
    (tmp_path / "law/DISC-Law-SFT-Pair.jsonl").write_bytes(lines_of([law]))
    with pytest.raises(UserError, match=r"was prepared differently \(.*exam: null -> true"):
        disc_law.main([
            *("--source", str(tmp_path / "law"), "--output", str(output), "--tokenizer", str(tokenizer)),
        ])  # fmt: skip
    source.write_bytes(lines_of([qa(number) for number in range(41)]))
    with pytest.raises(UserError, match=r"the source's content: mine.jsonl: "):
        make(source, output=output)
    assert open_conversations(output).fingerprint == first
    assert make(source, "--overwrite", "true", output=output).fingerprint != first


# --- what comes after --------------------------------------------------------------------------------------------


def test_several_turns_are_exported_where_the_form_has_a_place_for_them(make: Make, tmp_path: Path):
    told = turns("Be brief.", asked(1), said(1), "Sure?", "Yes.", first="system")
    data = make([{"messages": told}, *(qa(number) for number in range(2, 30))])
    part = rows_of(data)["mine-1:null@1"][0]
    for form, expected in (
        ("messages", {"messages": told}),
        ("sharegpt", {"conversations": [
            {"from": speaker, "value": message["content"]}
            for speaker, message in zip(("system", "human", "gpt", "human", "gpt"), told, strict=True)
        ]}),
    ):  # fmt: skip
        output = tmp_path / f"{form}.jsonl"
        words = (data.folder, "--part", part, "--format", form, "--output", output)
        assert export.main([str(word) for word in words]) == 0
        assert expected in [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    words = (data.folder, "--part", part, "--format", "alpaca", "--output", tmp_path / "alpaca.jsonl")
    with pytest.raises(UserError, match="--format messages"):
        export.main([str(word) for word in words])
    assert not (tmp_path / "alpaca.jsonl").exists()


def test_tools_are_exported_beside_their_messages_and_nowhere_else(make: Make, tmp_path: Path):
    tools = [{"type": "function", "function": {"name": "law"}}]
    call = {"type": "function", "function": {"name": "law", "arguments": {}}}
    told = [*turns(asked(1)), {"role": "assistant", "content": "", "tool_calls": [call]}]
    texts = [f"{asked(number)} {said(number)}" for number in range(60)]
    tokenizer = make_tokenizer(tmp_path / "tools", texts, template=WITH_TOOLS)
    data = make([{"messages": told, "tools": tools}, *(qa(number) for number in range(2, 30))], tokenizer=tokenizer)
    part, output = rows_of(data)["mine-1:null@1"][0], tmp_path / "out.jsonl"
    words = [str(word) for word in (data.folder, "--part", part, "--output", output)]
    assert export.main([*words, "--format", "messages"]) == 0
    assert {"messages": told, "tools": tools} in [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    with pytest.raises(UserError, match="no place for tools or reasoning: take --format messages"):
        export.main([*words, "--format", "sharegpt"])


def test_own_records_are_trained_on_and_scored_as_free_text_by_the_usual_commands(
    launch: Launch, tokenizer: Path, tmp_path: Path
):
    base = make_tiny_qwen2(tmp_path / "base", tokenizer)
    records: list[Line] = [qa(number, category="facts") for number in range(80)]
    records += [
        {"task": "chat", "messages": turns("Be brief.", asked(number), said(number), "Sure?", "Yes.", first="system")}
        for number in range(80, 160)
    ]
    (tmp_path / "mine.jsonl").write_bytes(lines_of(records))
    data, run_dir = tmp_path / "data", tmp_path / "run"
    words = ("--source", tmp_path / "mine.jsonl", "--tokenizer", base, "--output", data, "--validation_share", 0.1)
    result = launch(*words, module="data_prep.instructions").wait()
    assert result.status == 0 and "facts" in result.out, result
    result = launch(
        *("--run_dir", run_dir, "--data", data, "--base_model", base, "--lora.rank", 16, "--optim.lr", 2e-2),
        *("--batch.tokens_per_micro_batch", 1200, "--batch.micro_batches_per_step", 2),
        *("--optim.steps", 20, "--optim.warmup_steps", 2),
        module="training.qlora",
    ).wait()
    assert result.status == 0, result
    words = ("--max_new_tokens", 8, "--answers_per_task", 3)
    result = launch(run_dir, *words, module="training.evaluation.evaluate").wait()
    assert result.status == 0, result
    scores = json.loads((run_dir / "evaluation/test-3answers-8tokens.json").read_text("utf-8"))
    assert [(task["task"], task["metric"]) for task in scores["tasks"]] == [("chat", "ROUGE-L"), ("facts", "ROUGE-L")]
    total = scores["losses"][-1]
    assert total["after"]["loss"] < total["before"]["loss"]
    lines = (run_dir / "evaluation/test-3answers-8tokens-answers.jsonl").read_text("utf-8").splitlines()
    questions = [json.loads(line)["question"] for line in lines if json.loads(line)["task"] == "chat"]
    assert questions and all(text.startswith("system: Be brief.\nuser: ") for text in questions)
    assert all(text.endswith("\nuser: Sure?") for text in questions)
    page = (run_dir / "report.html").read_text("utf-8")
    assert "facts" in page and "Be brief." in page
