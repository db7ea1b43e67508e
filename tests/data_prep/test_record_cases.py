"""Kinds of records that people have (tests/cases/records), and others of their kinds: each is read as it is meant."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep import instructions
from tests.support.base_models import CHATML, WITH_TOOLS, make_tokenizer
from tests.support.commands import ROOT
from training.base.console import UserError
from training.data.chat import load_chat_tokenizer
from training.data.conversations import Conversations, open_conversations
from training.data.prepared import PARTS

RECORDS, TOKENIZERS = ROOT / "tests/cases/records", ROOT / "tests/cases/tokenizers"
Messages = list[dict[str, object]]


def question(number: int) -> str:
    return f"第{number}号合同违约金如何计算，标的额为{37 * number}元？"


def answer(number: int) -> str:
    return f"第{number}号合同的违约金以实际损失为限，最多为{11 * number}元。"


def said(role: str, content: str) -> dict[str, object]:
    return {"role": role, "content": content}


def asked(*contents: str) -> Messages:
    return [said(("user", "assistant")[place % 2], content) for place, content in enumerate(contents)]


def plain(number: int) -> Messages:
    return asked(question(number), answer(number))


def call(arguments: object) -> list[dict[str, object]]:
    return [{"type": "function", "function": {"name": "calc", "arguments": arguments}}]


@dataclass(frozen=True)
class Case:
    """What is right of a file."""

    messages: Callable[[int], Messages] = plain
    rows: int = 60
    words: tuple[str, ...] = ()
    unread: dict[str, int] = field(default_factory=dict)
    notes: dict[str, tuple[int, int]] = field(default_factory=dict)  # by a word of it: records, first line
    malformed: dict[int, str] = field(default_factory=dict)  # by line
    refused: str | None = None


GREETED = "您好，请讲。"
NEWS = ("在吗", "请问有人吗", "你好")
CASES = {
    "i01": Case(),
    "i02": Case(),
    "i03": Case(),
    "i04": Case(),
    "i05": Case(lambda n: [
        said("user", question(n)),
        {**said("assistant", ""), "tool_calls": call({})},
        said("tool", f'{{"sum":{n}}}'),
        said("assistant", answer(n)),
    ]),
    "i06": Case(),
    "i08": Case(notes={"end with a turn that nobody answers": (6, 10)}),
    "i09": Case(
        lambda n: [*([said("assistant", "您好，请问有什么可以帮您？")] if n % 10 == 0 else []), *plain(n)],
        notes={"begin with the assistant": (6, 10)},
    ),
    "i11": Case(),
    "i13": Case(unread={"kind": 60}),
    "i13 task": Case(words=("--task_key", "kind")),
    "i15": Case(),
    "i16": Case(),
    "i17": Case(unread={"messages[].reasoning_content": 60}),
    "i18": Case(lambda n: [said("user", question(n)), {**said("assistant", answer(n)), "tool_calls": call({})}]),
    "i19": Case(lambda n: [
        said("user", question(n)),
        {**said("assistant", ""), "tool_calls": call({})},
        said("tool", "5"),
        said("assistant", answer(n)),
    ]),
    "i20": Case(),
    "i21": Case(),
    "i23": Case(lambda n: asked(question(n), str(n))),
    "i24": Case(lambda n: asked(f"第{n}题：这个数是偶数吗？\n0", f"第{n}题：是。")),
    "i25": Case(lambda n: asked("你好", GREETED, *(question(n), answer(n)))),
    "i26": Case(lambda n: asked("你好" if n < 55 else f"您好{n}号", GREETED, *(question(n), answer(n)))),
    "i28": Case(lambda n: asked(question(n), f"<think>\n先看条文。\n</think>\n\n{answer(n)}")),
    "i29": Case(lambda n: asked("在吗", "在的", question(n), answer(n))),
    "i30": Case(refused="with --answer_key chosen the preferred one is"),
    "i30 chosen": Case(words=("--answer_key", "chosen"), unread={"rejected": 60}),
    "i31": Case(refused="with --learn text whole texts are learned"),
    "i33": Case(
        lambda n: [said("system", "乙：简短回答。"), *plain(n)],
        unread={"system": 60},
    ),
    "i34": Case(),
    "i35": Case(),
    "i36": Case(),
    "i37": Case(),
    "i39": Case(),
    "i40": Case(),
    "i43": Case(),
    "i46": Case(refused="it has instruction and question, of which one is expected: choose with --question_key"),
    "i46 one": Case(words=("--question_key", "question"), unread={"instruction": 60}),
    "i46 both": Case(
        lambda n: asked(f"请回答下列法律问题。\n{question(n)}", answer(n)),
        words=("--question_key", "instruction", "question"),
    ),
    "i49": Case(lambda n: asked(question(n), f'<tool_call>\n{{"name":"calc"}}\n</tool_call>{answer(n)}')),
    "i58": Case(
        lambda n: asked(f"第{n}号合同违约金如何计算？", f"第{n}号合同的违约金最多为{11 * n}元。"),
        unread={"reference": 60},
    ),
    "i58 before": Case(
        lambda n: asked(f"民法典第585条。\n第{n}号合同违约金如何计算？", f"第{n}号合同的违约金最多为{11 * n}元。"),
        words=("--context_key", "reference"),
    ),
    "i59": Case(
        lambda n: asked(
            NEWS[(n - 1) % 3], GREETED, f"第{n}号合同违约金如何计算？", f"第{n}号合同的违约金最多为{11 * n}元。"
        ),
        rows=600,
    ),
    "i60": Case(lambda n: asked(f"第{n}号合同如何解除？", f"第{n}号合同应书面通知对方。")),
    "i61": Case(
        lambda n: asked(
            f"第{n}号合同违约金如何计算？",
            f"{'<think>' if n == 150 else ''}{chr(10) + '想' + chr(10) + '</think>' + chr(10) if n == 150 else ''}"
            f"第{n}号合同的违约金最多为{11 * n}元。",
        ),
        rows=300,
    ),
    "i63": Case(
        lambda n: asked(f"第{n}号合同违约金如何计算？", f"第{n}号合同的违约金最多为{11 * n}元。"),
        rows=300,
        malformed={301: "half a surrogate pair"},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose template shows tools and calls."""
    texts = [question(number) + answer(number) for number in range(60)]
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "small", texts, template=WITH_TOOLS)


@pytest.fixture
def make(tmp_path: Path, tokenizer: Path) -> Callable[..., Conversations]:
    made = Counter[str]()

    def prepare(source: Path, *words: object, tokenizer: Path = tokenizer) -> Conversations:
        made["sets"] += 1
        output = tmp_path / f"made-{made['sets']}"
        every = ["--source", source, "--output", output, "--tokenizer", tokenizer, "--workers", 1, *words]
        assert instructions.main([str(word) for word in every]) == 0
        return open_conversations(output)

    return prepare


def rows_of(data: Conversations) -> list[tuple[str, Messages]]:
    """Part and messages of every row."""
    return [(name, json.loads(messages)) for name in PARTS for messages in data.part(name).messages]


def messages_of(data: Conversations) -> list[Messages]:
    return sorted((messages for _, messages in rows_of(data)), key=str)


def assert_seen_as_at_inference(data: Conversations, tokenizer: Path) -> None:
    """Every token of every row: the prompt as the template makes it, then what it writes behind, to its end."""
    chat = load_chat_tokenizer(str(tokenizer), data.meta["tokenizer"].get("template_options"))
    for name in PARTS:
        part, columns = data.part(name), data.columns(name)
        for row, messages in enumerate(map(json.loads, part.messages)):
            text = columns["tools"][row].as_py() if "tools" in columns else ""
            prompt, written = chat.written(messages[:-1], messages[-1], json.loads(text) if text else None)
            before, learned = np.split(part.ids[row], [part.prompt_lengths[row]])
            assert before.tolist() == chat.encode([prompt])[0]
            assert learned.tolist() == [*chat.encode([written])[0], chat.end_id]


@pytest.mark.parametrize("name", CASES)
def test_a_kind_of_record_is_read_as_it_is_meant(name: str, make: Callable[..., Conversations], tokenizer: Path):
    case = CASES[name]
    (source,) = RECORDS.glob(f"{name.split()[0]}_*")
    if case.refused:
        with pytest.raises(UserError, match="lines are no record") as refused:
            make(source, *case.words)
        assert case.refused in str(refused.value)
        return
    data = make(source, *case.words)
    assert messages_of(data) == sorted((case.messages(n) for n in range(1, case.rows + 1)), key=str)
    counts = data.meta["counts"]
    assert counts["unread_keys"] == case.unread
    assert {line["line"] for line in counts["malformed_listed"]} == case.malformed.keys()
    assert all(case.malformed[line["line"]] in line["reason"] for line in counts["malformed_listed"])
    notes = counts.get("notes", {})
    assert len(notes) == len(case.notes)
    for word, (records, line) in case.notes.items():
        (about,) = (about for note, about in notes.items() if word in note)
        assert (about["records"], about["first"]["line"]) == (records, line)
    # Near the asked shares, whatever the greetings: a tenth for the test.
    assert data.meta["rows"]["test"] == pytest.approx(case.rows / 10, abs=2)
    assert_seen_as_at_inference(data, tokenizer)


def test_categories_and_ids_that_are_numbers_or_lists_are_taken_as_text(make: Callable[..., Conversations], tmp_path):
    data = make(RECORDS / "i21_category_number.jsonl")
    assert data.meta["tasks"] == ["1", "2", "3"]
    uids = {uid for name in PARTS for uid in make(RECORDS / "i20_float_id.jsonl").part(name).uids}
    assert uids == {f"i20_float_id:{number}.0" for number in range(1, 61)}
    lists = [{"question": question(n), "answer": answer(n), "category": ["法", n % 2]} for n in range(60)]
    (tmp_path / "lists.jsonl").write_text("\n".join(map(json.dumps, lists)))
    assert make(tmp_path / "lists.jsonl").meta["tasks"] == ["法, 0", "法, 1"]


RECORDS_60 = [{"question": question(number), "answer": answer(number), "id": number} for number in range(1, 61)]
AS_LINES = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS_60).encode()


def as_csv(records: list[dict[str, object]], delimiter: str = ",") -> bytes:
    rows = [list(records[0]), *(list(map(str, record.values())) for record in records)]
    return "\r\n".join(delimiter.join(f'"{cell}"' for cell in row) for row in rows).encode("utf-8-sig")


def as_zstd(content: bytes) -> bytes:
    packed = pa.BufferOutputStream()
    with pa.CompressedOutputStream(packed, "zstd") as out:
        out.write(content)
    return packed.getvalue().to_pybytes()


FORMS: dict[str, Callable[[], bytes]] = {
    "lines.jsonl": lambda: AS_LINES,
    "no_end.jsonl": lambda: AS_LINES.rstrip(),
    "crlf.jsonl": lambda: AS_LINES.replace(b"\n", b"\r\n"),
    "cr.jsonl": lambda: AS_LINES.replace(b"\n", b"\r"),
    "mixed.jsonl": lambda: AS_LINES.replace(b"\n", b"\r", 7).replace(b"\n", b"\r\n", 9),
    "marks.jsonl": lambda: AS_LINES.replace(b"\n", b"\n\xef\xbb\xbf"),
    "list.json": lambda: json.dumps(RECORDS_60).encode(),
    "pretty.json": lambda: json.dumps(RECORDS_60, ensure_ascii=False, indent=2).encode(),
    "one_after_another.json": lambda: "\n".join(json.dumps(each, indent=4) for each in RECORDS_60).encode(),
    "two_lists.json": lambda: (json.dumps(RECORDS_60[:9]) + "\n" + json.dumps(RECORDS_60[9:])).encode(),
    "of_messages.json": lambda: json.dumps([asked(question(n), answer(n)) for n in range(1, 61)]).encode(),
    "table.csv": lambda: as_csv(RECORDS_60),
    "table.tsv": lambda: as_csv(RECORDS_60, "\t"),
    "semicolons.csv": lambda: as_csv(RECORDS_60, ";"),
    "lines.jsonl.gz": lambda: gzip.compress(AS_LINES),
    "lines.jsonl.bz2": lambda: bz2.compress(AS_LINES),
    "lines.jsonl.xz": lambda: lzma.compress(AS_LINES),
    "lines.jsonl.zst": lambda: as_zstd(AS_LINES),
    "list.json.gz": lambda: gzip.compress(json.dumps(RECORDS_60, indent=1).encode()),
    "table.csv.xz": lambda: lzma.compress(as_csv(RECORDS_60)),
    "named_otherwise": lambda: gzip.compress(AS_LINES),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_a_file_gives_the_same_records(name: str, make: Callable[..., Conversations], tmp_path: Path):
    (tmp_path / name).write_bytes(FORMS[name]())
    data = make(tmp_path / name)
    assert messages_of(data) == sorted(map(plain, range(1, 61)), key=str)
    assert data.meta["source"]["files"][0]["name"] == name
    assert not list(tmp_path.glob(".*")), "what was unpacked is gone"


def test_parquet_and_what_datasets_saved_give_the_same_records(make: Callable[..., Conversations], tmp_path: Path):
    import datasets

    datasets.disable_progress_bars()
    mixed = [{"messages": None, "question": question(n), "answer": answer(n), "score": float("nan")} for n in range(9)]
    mixed += [{"messages": plain(n), "question": None, "answer": None, "score": None} for n in range(9, 60)]
    pq.write_table(pa.Table.from_pylist(mixed), tmp_path / "mine.parquet")
    expected = sorted(map(plain, range(60)), key=str)
    data = make(tmp_path / "mine.parquet")
    assert messages_of(data) == expected and data.meta["counts"]["unread_keys"] == {}
    saved = datasets.Dataset.from_list(mixed)
    saved.save_to_disk(tmp_path / "saved")
    assert messages_of(make(tmp_path / "saved")) == expected
    datasets.DatasetDict({"train_sft": saved}).save_to_disk(tmp_path / "splits")
    with pytest.raises(UserError, match="has the splits train_sft: choose one with --split"):
        make(tmp_path / "splits")
    data = make(tmp_path / "splits", "--split", "train_sft")
    assert messages_of(data) == expected
    with pytest.raises(UserError, match=r"hub:someone/something cannot be had \(.*fetch its files"):
        make(Path("hub:someone/something"))


BAD = {
    "lines.jsonl.gz": (gzip.compress(AS_LINES + b"no record\n"), 61, "not JSON"),
    "list.json": (json.dumps(RECORDS_60, indent=1).encode().replace(b'"id": 7\n', b'"id": 7x\n'), 32, "not JSON"),
    "one_a_line.json": (b"[\n" + AS_LINES.replace(b"}\n", b"},\n").replace(b"7},", b"7x},", 1) + b"]", 8, "not JSON"),
    "table.csv": (as_csv(RECORDS_60) + b'\r\n"one cell"\r\n', 62, "1 columns, and the heading has 3"),
    "gbk.csv": (as_csv(RECORDS_60) + '\r\n"问","答","1"'.encode("gb18030"), 62, "not UTF-8; of GBK"),
    "cr.jsonl": ((AS_LINES + b"5\n").replace(b"\n", b"\r"), 61, "a number, not an object"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_record_is_named_by_its_line_and_the_others_are_read(
    name: str, make: Callable[..., Conversations], tmp_path: Path
):
    content, line, reason = BAD[name]
    (tmp_path / name).write_bytes(content)
    data = make(tmp_path / name, "--max_malformed_share", 0.05)
    listed = data.meta["counts"]["malformed_listed"]
    assert (listed[0]["file"], listed[0]["line"]) == (name, line) and reason in listed[0]["reason"], listed
    assert len(listed) == 1 and sum(data.meta["rows"].values()) == (59 if name.endswith(".json") else 60)
    assert data.meta["counts"]["lines"] - data.meta["counts"]["blank"] == sum(data.meta["rows"].values()) + 1


OTHERS: dict[str, tuple[object, Messages, tuple[str, ...]]] = {
    "pairs": ({"conversation": [["a", "b"], ["Q", "A"]]}, asked("a", "b", "Q", "A"), ()),
    "texts": ({"id": 1, "data": ["a", "b", "Q", "A"]}, asked("a", "b", "Q", "A"), ()),
    "pair_objects": ({"turns": [{"question": "Q", "answer": "A"}]}, asked("Q", "A"), ()),
    "json_in_text": ({"messages": json.dumps(asked("Q", "A"))}, asked("Q", "A"), ()),
    "speakers": ({"messages": [{"from": "Human", "value": "Q"}, {"from": "GPT", "value": "A"}]}, asked("Q", "A"), ()),
    "query_history": (
        {"query": "Q", "response": "A", "history": [["a", "b"]], "system": "S"},
        [said("system", "S"), *asked("a", "b", "Q", "A")],
        (),
    ),
    "history_of_messages": ({"query": "Q", "response": "A", "history": asked("a", "b")}, asked("a", "b", "Q", "A"), ()),
    "trl": ({"prompt": asked("Q"), "completion": [said("assistant", "A")]}, asked("Q", "A"), ()),
    "chinese": ({"问题": "Q", "答案": "A"}, asked("Q", "A"), ()),
    "pair": ({"human": "Q", "assistant": "A"}, asked("Q", "A"), ()),
    "chosen": (
        {"prompt": "Q", "chosen": asked("Q", "A"), "rejected": asked("Q", "no")},
        asked("Q", "A"),
        ("--answer_key", "chosen"),
    ),
    "chosen_alone": ({"chosen": asked("Q", "A"), "rejected": "x"}, asked("Q", "A"), ("--answer_key", "chosen")),
    "own_keys": ({"ask": "Q", "say": "A"}, asked("Q", "A"), ("--question_key", "ask", "--answer_key", "say")),
    "own_turns": (
        {"log": [{"who": "客户", "what": "Q"}, {"who": "客服", "what": "A"}]},
        asked("Q", "A"),
        (
            *("--turns_key", "log", "--role_key", "who", "--content_key", "what"),
            *("--roles", "客户=user", "客服=assistant"),
        ),
    ),
    "parts": ({"messages": [said("user", "Q"), {"role": "assistant", "content": [{"type": "text", "text": "A"},
              {"type": "text", "text": "B"}]}]}, asked("Q", "A\nB"), ()),
    "former_calls": (
        {"messages": [said("user", "Q"), {"role": "assistant", "content": None, "function_call": {"name": "calc",
         "arguments": '{"x": 1}'}}, {"role": "function", "name": "calc", "content": {"y": 2}}, said("assistant", "A")]},
        [
            said("user", "Q"),
            {**said("assistant", ""), "tool_calls": call({"x": 1})},
            {**said("tool", '{"y": 2}'), "name": "calc"},
            said("assistant", "A"),
        ],
        (),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_layouts_are_read_by_their_keys_or_by_options(name: str, make: Callable[..., Conversations], tmp_path):
    record, expected, words = OTHERS[name]

    def numbered(value: object, number: int) -> str:
        return json.dumps(value, ensure_ascii=False).replace("Q", f"Q{number}")

    (tmp_path / "mine.jsonl").write_text("".join(numbered(record, n) + "\n" for n in range(30)), "utf-8")
    data = make(tmp_path / "mine.jsonl", *words)
    assert messages_of(data) == sorted((json.loads(numbered(expected, n)) for n in range(30)), key=str)
    assert data.meta["counts"]["malformed"] == 0


def test_reasoning_is_part_of_the_answer_by_option_where_the_template_has_it(make, tmp_path: Path):
    thinking = WITH_TOOLS.replace(
        "{%- if message['content'] %}",
        "{%- if message.reasoning_content %}{{ '<think>\n' + message.reasoning_content + '\n</think>\n' }}{%- endif %}"
        "{%- if message['content'] %}",
    )
    other = make_tokenizer(tmp_path / "thinking", [question(n) + answer(n) for n in range(60)], template=thinking)
    data = make(RECORDS / "i17_reasoning_content.jsonl", "--reasoning", tokenizer=other)
    assert data.meta["counts"]["unread_keys"] == {} and sum(data.meta["rows"].values()) == 60
    part = data.part("train")
    chat = load_chat_tokenizer(str(other))
    written = chat.decode(part.ids[0][part.prompt_lengths[0] :])
    assert written == f"<think>\n先看条文，再算数额。\n</think>\n{json.loads(part.messages[0])[-1]['content']}"
    assert_seen_as_at_inference(data, other)
    with pytest.raises(UserError, match="the chat template leaves its reasoning out of an answer"):
        make(RECORDS / "i17_reasoning_content.jsonl", "--reasoning")


def test_calls_of_tools_are_refused_where_the_template_has_no_place_for_them(make, tmp_path: Path):
    other = make_tokenizer(tmp_path / "plain", [question(n) + answer(n) for n in range(60)], template=CHATML)
    for name in ("i05_function_call_observation.jsonl", "i18_tool_calls_with_content.jsonl"):
        with pytest.raises(UserError, match=r"the chat template leaves .*(tools|calls)"):
            make(RECORDS / name, tokenizer=other)
