"""`python -m data_prep.disc_law` and what it makes: every oddity of the files, kills, second runs, reading, exports.

Most tests use records of the published layouts that are made here and a small tokenizer that is trained here; where the
real records and the real tokenizer are at hand, the promises are kept on those too.
"""

import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
from transformers import AutoTokenizer

from data_prep import conversation_rows, disc_law, disc_law_records, export, prepare_conversations
from data_prep.disc_law_records import CUT_MARK, FILES, MIN_KEPT, TASK_NAMES, TASKS, shortened
from data_prep.pairs import main as prepare_pairs
from data_prep.splits import stratified_split
from tests.support import commands
from tests.support.base_models import CHATML
from tests.support.commands import REAL_TATOEBA, ROOT, Launch, Result
from tests.support.exports import content_of
from tests.support.legal_records import (
    PAIR,
    PAIR_QA,
    TRIPLET,
    TRIPLET_QA,
    make_tokenizer,
    record,
    sentence,
    write_source,
)
from training.base.console import UserError
from training.base.files import temporary_folder
from training.data.chat import load_chat_tokenizer
from training.data.conversations import Conversations, open_conversations
from training.data.languages import language_of
from training.data.prepared import PARTS, open_prepared
from training.data.text import normalise

CHINESE = language_of("zh")
DATA = REAL_TATOEBA.parents[1]
REAL_RECORDS = DATA / "disc-law-sft"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
REAL_TOKENIZER = DATA / "qwen2.5-tokenizer"


# --- what the tests are about: records, a tokenizer, a prepared set -----------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "small", pad_token="<|endoftext|>")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_source(tmp_path_factory.mktemp("source") / "law")


@pytest.fixture
def make(tmp_path, small):
    """Prepares in this process: `make(source, "--key", value, ...)`."""
    made = Counter()

    def prepare(source: Path | str, *words: object, output: Path | None = None, tokenizer: Path = small):
        made["sets"] += 1
        output = output or tmp_path / f"made-{made['sets']}"
        every = ["--source", source, "--output", output, "--tokenizer", tokenizer, "--workers", 1, *words]
        assert disc_law.main([str(word) for word in every]) == 0
        return open_conversations(output)

    return prepare


@pytest.fixture(scope="module")
def law(tmp_path_factory, source, small) -> Conversations:
    output = tmp_path_factory.mktemp("prepared") / "law"
    words = ["--source", source, "--output", output, "--tokenizer", small, "--workers", 2]
    assert disc_law.main([str(word) for word in words]) == 0
    return open_conversations(output)


@pytest.fixture(scope="module")
def real_law(tmp_path_factory) -> Conversations:
    if not REAL_RECORDS.is_dir() or not REAL_TOKENIZER.is_dir():
        pytest.skip(f"the real records are not at {REAL_RECORDS} (RELAY_DATA names the folder above it)")
    output = tmp_path_factory.mktemp("real") / "law"
    words = ["--source", REAL_RECORDS, "--output", output, "--tokenizer", REAL_TOKENIZER, "--workers", 1]
    assert disc_law.main([str(word) for word in words]) == 0
    return open_conversations(output)


run = partial(commands.run, module="data_prep.disc_law")


def assert_refused(result: Result, *expected: str) -> None:
    assert result.status == 1, result
    errors = [line for line in result.err.splitlines() if not line.startswith("warning: ")]
    assert len(errors) == 1 and errors[0].startswith("error: "), result.err
    for text in expected:
        assert text in errors[0]


def rows_of(law: Conversations, part: str | None = None) -> dict[str, tuple[str, list[dict[str, str]]]]:
    """Task and messages of every row, by its id."""
    found = {}
    for name in PARTS if part is None else (part,):
        opened = law.part(name)
        for uid, task, messages in zip(opened.uids, opened.tasks, opened.messages, strict=True):
            assert uid not in found, f"{uid} stands twice"
            found[uid] = task, json.loads(messages)
    return found


def question(law: Conversations, uid: str) -> str:
    return rows_of(law)[uid][1][0]["content"]


# --- tokens ------------------------------------------------------------------------------------------------------


def assert_tokens_are_those_of_inference(law: Conversations) -> None:
    tokenizer = AutoTokenizer.from_pretrained(law.folder / "tokenizer", local_files_only=True)
    about = law.meta["tokenizer"]
    assert len(tokenizer) == about["size"] and about["pad_id"] != about["end_id"]
    tasks = set()
    for name in PARTS:
        part = law.part(name)
        assert len(part) == law.meta["rows"][name] == len(part.prompt_lengths) == len(part.uids) == len(part.messages)
        for row in range(len(part)):
            messages = json.loads(part.messages[row])
            assert [message["role"] for message in messages] == ["user", "assistant"]
            prompt, supervised = np.split(part.ids[row], [part.prompt_lengths[row]])
            at_inference = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
            assert prompt.tolist() == at_inference
            assert tokenizer.decode(supervised) == messages[1]["content"] + "<|im_end|>"
            assert supervised[-1] == about["end_id"] and about["end_id"] not in supervised[:-1]
            assert len(part.ids[row]) <= law.meta["options"]["max_length"]
            tasks.add(part.tasks[row])
    assert sorted(tasks) == sorted(law.meta["tasks"]) == sorted(TASK_NAMES)


def test_supervised_tokens_are_the_answer_and_its_end_for_every_task(law):
    assert_tokens_are_those_of_inference(law)


def test_real_records_of_every_task_come_through_the_real_template(real_law):
    assert_tokens_are_those_of_inference(real_law)
    about = real_law.meta["tokenizer"]
    assert (about["pad_id"], about["end_id"], about["size"]) == (151643, 151645, 151665)
    assert real_law.meta["counts"]["records"] == 814 and real_law.meta["counts"]["duplicates"] == 1
    assert real_law.meta["counts"]["malformed"] == 0 and sum(real_law.meta["rows"].values()) == 813
    assert real_law.meta["lengths"]["legal_question_answering"]["tokens"]["max"] <= 752
    # The judgements' statutes are nowhere in their inputs, the one of Triplet-QA holds its own.
    judgement = question(real_law, f"{TRIPLET}:judgement_predit-1")
    assert judgement.startswith("《刑法》第一百一十四条：") and "\n基于下列案件，推测可能的判决结果。\n" in judgement
    assert question(real_law, f"{TRIPLET_QA}:legal_question_answering_1").count("第九百七十四条") == 1


def test_real_over_long_records_keep_instruction_structure_and_answer(real_law):
    cases = question(real_law, f"{PAIR}:sim_case_match-1")
    assert cases.startswith("根据案例A的内容") and '\n, "B": ' in cases and '\n, "C": ' in cases and CUT_MARK in cases
    summary = question(real_law, f"{PAIR}:jud_doc_sum-1")
    assert summary.startswith("请大致描述这篇文书的内容。\n\n") and CUT_MARK in summary
    assert summary.endswith("由负有举证责任的当事人承担不利后果。")
    assert real_law.meta["counts"]["truncated"] == 10 and real_law.meta["counts"]["too_long"] == 0


def test_tokenizer_kept_in_the_set_has_the_same_identity_as_the_one_given(law, small):
    kept = load_chat_tokenizer(str(law.folder / "tokenizer"))
    assert kept.sha256 == load_chat_tokenizer(str(small)).sha256 == law.meta["tokenizer"]["sha256"]
    assert law.identity == {"fingerprint": law.fingerprint, "tokenizer": kept.sha256}


def test_tokenizer_files_are_kept_as_they_were_published(small, tmp_path):
    published = Path(shutil.copytree(small, tmp_path / "published"))
    for name in ("merges.txt", "vocab.json", "added_tokens.json", "special_tokens_map.json", "tokenizer.model"):
        (published / name).write_text("{ }\n")
    (published / "config.json").write_text('{"model_type": "qwen2"}')
    expected = content_of(published)
    (published / "model.safetensors").write_text("weights")
    tokenizer = load_chat_tokenizer(str(published))
    tokenizer.save(tmp_path / "kept")
    assert content_of(tmp_path / "kept") == expected
    text = (published / "tokenizer.json").read_text(encoding="utf-8")
    (published / "tokenizer.json").write_text(text.replace("<|endoftext|>", "<|end|>"), encoding="utf-8")
    with pytest.raises(UserError, match="were changed meanwhile: prepare the data again"):
        tokenizer.save(tmp_path / "changed")


def test_other_template_is_another_tokenizer(small, tmp_path):
    other = make_tokenizer(tmp_path / "x", CHATML.replace("You help.", "You serve."), pad_token="<|endoftext|>")
    assert load_chat_tokenizer(str(other)).sha256 != load_chat_tokenizer(str(small)).sha256


WRONG_TEMPLATES = {
    "none": (None, "has no chat template"),
    "no_end": (CHATML.replace("message['content'] + '<|im_end|>'", "message['content']"), "no end-of-turn token"),
    "blank_before_end": (CHATML.replace("+ '<|im_end|>' + '\n'", "+ ' <|im_end|>'"), "no end-of-turn token"),
    "other_prompt": (CHATML.replace("assistant\n' }}{%- endif", "assistant\n<think>' }}{%- endif"), "does not begin"),
    "broken": (CHATML + "{{ raise_exception('no') }}", "fails on a question"),
    "answer_only": (CHATML.replace("message['content']", "(message['content'] if loop.last else '')"), "template"),
}


@pytest.mark.parametrize("name", WRONG_TEMPLATES)
def test_template_that_training_cannot_use_is_refused(name, tmp_path, source):
    template, expected = WRONG_TEMPLATES[name]
    make_tokenizer(tmp_path / "tokenizer", template)
    words = ["--source", source, "--output", tmp_path / "x", "--tokenizer", tmp_path / "tokenizer"]
    with pytest.raises(UserError, match=expected):
        disc_law.main([str(word) for word in words])
    assert not (tmp_path / "x").exists()


def test_answers_that_the_template_changes_are_left_out_by_name(tmp_path, source, make, law):
    template = CHATML.replace("message['content']", "message['content'] | replace('LABEL', 'label')")
    tokenizer = make_tokenizer(tmp_path / "tokenizer", template)
    with pytest.raises(UserError, match=r"more than the 10 .*the chat template changes the answer"):
        make(source, tokenizer=tokenizer)
    others = make(source, "--max_malformed_share", 0.1, "--max_length", 300, tokenizer=tokenizer)
    listed = others.meta["counts"]["malformed_listed"]
    assert listed and all('"sim_case_match-' in line["text"] for line in listed)
    left = {uid for uid in rows_of(law) if ":sim_case_match-" not in uid}
    assert {uid.split(":")[1] for uid in rows_of(others)} >= {uid.split(":")[1] for uid in left}


def test_padding_is_never_the_end_token(tmp_path):
    lacking = load_chat_tokenizer(str(make_tokenizer(tmp_path / "a")))
    same = load_chat_tokenizer(str(make_tokenizer(tmp_path / "b", pad_token="<|im_end|>")))
    for tokenizer in (lacking, same):
        assert (tokenizer.pad_id, tokenizer.end_id) == (0, 2)


def test_tokenizer_that_is_not_there_says_what_to_pass(tmp_path):
    for name, expected in (
        (tmp_path / "nothing", "no such folder"),
        (tmp_path, "holds no tokenizer.json"),
        ("Qwen2.5", "no name on the hub"),
    ):
        with pytest.raises(UserError, match=expected):
            load_chat_tokenizer(str(name))
    (tmp_path / "tokenizer.json").write_text("{")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be read"):
        load_chat_tokenizer(str(tmp_path))


# --- oddities ----------------------------------------------------------------------------------------------------


def test_ids_that_collide_or_are_null_become_unique_and_keep_file_and_id(make, tmp_path):
    _, again = record("exam", 0)
    again = {**again, "input": "另一个问题", "output": "A. 另一个答案"}
    law = make(write_source(tmp_path / "law", extra={PAIR: [again]}))
    rows = rows_of(law)
    assert len(rows) == 30 * 12 + 1
    assert rows[f"{PAIR_QA}:legal_question_answering_1"][0] == "legal_question_answering"
    assert rows[f"{TRIPLET_QA}:legal_question_answering_1"][0] == "legal_question_answering_reference"
    assert rows[f"{TRIPLET}:judgement_predit-3"][0] == "judgement_predict"
    assert rows[f"{TRIPLET}:null@2"][0] == "judgement_predict"
    assert rows[f"{PAIR}:exam-0@{30 * 9 + 1}"][1][1]["content"] == "A. 另一个答案"
    assert Counter(task for task, _ in rows.values()) == {**dict.fromkeys(TASK_NAMES, 30), "exam": 31}


def test_statutes_stand_before_the_question_once_and_on_request_not_at_all(law, make, source):
    _, judgement = record("judgement_predict", 3)
    _, asked = record("legal_question_answering_reference", 3)
    statute = judgement["reference"][0]
    uids = f"{TRIPLET}:judgement_predit-3", f"{TRIPLET_QA}:legal_question_answering_3"
    assert question(law, uids[0]) == f"{statute}\n{judgement['input']}"
    assert question(law, uids[1]) == asked["input"]
    bare = make(source, "--reference", "false")
    assert [question(bare, uid) for uid in uids] == [judgement["input"], asked["input"]]


def test_duplicates_are_dropped_and_equal_questions_with_other_answers_are_not(make, tmp_path):
    _, first = record("leg_case_cls", 0)
    variants = [{**first, "id": f"leg_case_cls-{900 + number}"} for number in range(3)]
    variants[1] = {**variants[1], "output": "另一个标签"}
    variants[2] = {**variants[2], "input": f"  {first['input']}\n"}  # trimmed, it is the same
    law = make(write_source(tmp_path / "law", extra={PAIR: variants}))
    assert law.meta["counts"]["tasks"]["leg_case_cls"]["duplicates"] == 2
    found = rows_of(law)
    assert f"{PAIR}:leg_case_cls-901" in found
    assert not {f"{PAIR}:leg_case_cls-900", f"{PAIR}:leg_case_cls-902"} & set(found)


def test_short_answers_are_dropped_from_prose_only(make, tmp_path):
    _, prose = record("legal_question_answering", 900)
    _, label = record("leg_case_cls", 900)
    extra = {PAIR_QA: [{**prose, "output": " 是"}], PAIR: [{**label, "output": "O"}]}
    source = write_source(tmp_path / "law", extra=extra)
    law = make(source)
    assert f"{PAIR}:leg_case_cls-900" in rows_of(law)
    assert f"{PAIR_QA}:legal_question_answering_900" not in rows_of(law)
    assert law.meta["counts"]["tasks"]["legal_question_answering"]["too_short"] == 1
    all_of_them = make(source, "--min_answer_characters", 1)
    assert f"{PAIR_QA}:legal_question_answering_900" in rows_of(all_of_them)
    strict = make(source, "--min_answer_characters", 1000)
    assert {task for task, _ in rows_of(strict).values()} == {task.name for task in TASKS if not task.free_text}


def test_exam_is_left_out_on_request_and_nothing_else_moves(law, make, source):
    without = make(source, "--exam", "false")
    assert "exam" not in without.meta["tasks"] and without.meta["counts"]["left_out"] == 30
    for part in PARTS:
        expected = {uid for uid, (task, _) in rows_of(law, part).items() if task != "exam"}
        assert set(rows_of(without, part)) == expected
    assert without.meta["questions"] == [uid for uid in law.meta["questions"] if "exam" not in uid]


GOOD = json.dumps(record("exam", 900)[1], ensure_ascii=False).encode()
BAD_LINES = {
    "cut_off": (PAIR, GOOD[:-20], "not"),
    "not_json": (PAIR, b"id: exam-900", "not JSON"),
    "a_list": (PAIR, b"[1]", "a list, not an object"),
    "missing_key": (PAIR, {"id": "exam-900", "input": "问题"}, "no output"),
    "missing_reference": (TRIPLET, {"id": None, "input": "问题", "output": "回答"}, "no reference"),
    "input_of_wrong_type": (PAIR, {"id": "exam-900", "input": ["问题"], "output": "回答"}, "input is a list"),
    "output_null": (PAIR, {"id": "exam-900", "input": "问题", "output": None}, "output is null"),
    "reference_of_wrong_type": (TRIPLET, {"id": None, "input": "问", "output": "答", "reference": "法"}, "not a list"),
    "statute_of_wrong_type": (TRIPLET, {"id": None, "input": "问", "output": "答", "reference": [5]}, "a number"),
    "id_of_wrong_type": (PAIR, {"id": 900, "input": "问题", "output": "回答"}, "id is a number"),
    "id_null_among_many_tasks": (PAIR, {"id": None, "input": "问题", "output": "回答"}, "id is null"),
    "unknown_task": (PAIR, {"id": "poem-900", "input": "问题", "output": "回答"}, "of no task"),
    "empty_answer": (PAIR, {"id": "exam-900", "input": "问题", "output": " \n"}, "output is empty"),
    "empty_input": (PAIR, {"id": "exam-900", "input": "", "output": "回答"}, "input is empty"),
    "invalid_utf8": (PAIR, GOOD.replace("问题".encode(), b"\xe9\x97"), "not UTF-8"),
    "half_a_character": (PAIR, b'{"id": "exam-900", "input": "\\ud800", "output": "B. x"}', "half a surrogate"),
    "end_token_in_answer": (PAIR, {"id": "exam-900", "input": "问题", "output": "答<|im_end|>案"}, "<|im_end|>"),
    "end_token_in_input": (PAIR, {"id": "exam-900", "input": "问<|im_start|>题", "output": "答"}, "<|im_start|>"),
    "end_token_in_statute": (
        TRIPLET,
        {"id": None, "input": "问", "output": "答", "reference": ["法<|endoftext|>"]},
        "<|endoftext|>",
    ),
    "weight_0": (PAIR, {"id": "exam-900", "input": "问题", "output": "B. 答案", "weight": 0}, "is to be learned"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_bad_line_is_counted_listed_and_never_trained_on(name, tmp_path, make, law):
    file, line, expected = BAD_LINES[name]
    source = write_source(tmp_path / "law", extra={file: [line, b"", b"  "]})
    made = make(source)
    counts = made.meta["counts"]
    assert (counts["malformed"], counts["blank"], counts["lines"]) == (1, 2, 12 * 30 + 3)
    (listed,) = counts["malformed_listed"]
    per_file = 30 * (9 if file == PAIR else 1)
    assert (listed["file"], listed["line"]) == (f"{file}.sample.jsonl", per_file + 1)
    assert expected in listed["reason"]
    assert set(rows_of(made)) == set(rows_of(law))
    with pytest.raises(
        UserError, match=rf"1 of 361 lines are no record .*line {per_file + 1}: .*fetch the files again"
    ):
        make(source, "--max_malformed_share", 0.002)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["law", "made-1"]


def test_a_key_that_is_read_in_another_file_only_is_counted_and_named(tmp_path, make, law, capsys):
    assert law.meta["counts"]["unread_keys"] == {}
    values = {"id": "exam-900", "input": "问题在哪里？", "output": "B. 在这里", "reference": ["《刑法》第一条"]}
    made = make(write_source(tmp_path / "law", extra={PAIR: [values, {**values, "id": "exam-901", "input": "谁？"}]}))
    assert made.meta["counts"]["unread_keys"] == {"reference": 2}
    assert "  not read  the keys reference (in 2 records)\n" in capsys.readouterr().out


def test_last_line_cut_off_crlf_and_byte_order_mark(tmp_path, make, law):
    source = write_source(tmp_path / "law")
    for path in source.iterdir():
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    path = source / f"{PAIR}.sample.jsonl"
    path.write_bytes(path.read_bytes() + GOOD[:-30])  # a copy that stopped in the middle of a line
    made = make(source)
    assert made.meta["counts"]["malformed"] == 1
    assert rows_of(made) == rows_of(law)


def test_pieces_of_a_file_meet_at_line_ends(tmp_path, make, law, source, monkeypatch):
    monkeypatch.setattr(conversation_rows, "BYTES_PER_PIECE", 700)
    made = make(source)
    assert made.fingerprint == law.fingerprint and made.meta["counts"] == law.meta["counts"]


# --- split -------------------------------------------------------------------------------------------------------


def test_equal_questions_are_in_one_part_whatever_their_punctuation(tmp_path, make):
    copies = []
    for number in range(30):
        _, values = record("leg_eve_detec", number)
        changed = values["input"].replace("'", "“").replace("\n", " ")
        copies.append({**values, "id": f"leg_eve_detec-{900 + number}", "input": changed, "output": "标签：'另一个'"})
    law = make(write_source(tmp_path / "law", extra={PAIR: copies}), "--validation_share", 0.2)
    part_of = {}
    for part in PARTS:
        for uid, (_, messages) in rows_of(law, part).items():
            key = normalise(messages[0]["content"], CHINESE)
            assert part_of.setdefault(key, part) == part, f"{uid} is in {part}, its like in {part_of[key]}"
    assert len(part_of) == 12 * 30 < len(rows_of(law))


def test_questions_about_one_case_are_in_one_part_and_a_question_is_with_and_without_statutes(tmp_path, make):
    more: dict[str, list[object]] = {PAIR: [], PAIR_QA: [], TRIPLET_QA: []}
    for number in range(30):
        _, values = record("jud_read_compre", number)
        case = str(values["input"]).split("\n")[1].split("问题为：")[0]
        more[PAIR] += [
            {**values, "id": f"jud_read_compre-{900 + 2 * number + n}", "input": f"请回答{n}\n{case}问题为：'另{n}？'"}
            for n in range(2)
        ]
        _, values = record("legal_question_answering_reference", number)
        asked = str(values["input"]).rpartition("<问题>：")[2]
        name = f"legal_question_answering_{900 + number}"
        more[TRIPLET_QA].append({**values, "id": name, "input": f"《民法典》第{number}条\n<问题>：{asked}"})
        more[PAIR_QA].append({"id": name, "input": asked.strip(), "output": values["output"]})
    law = make(write_source(tmp_path / "law", extra=more), "--validation_share", 0.2)
    found: dict[str, dict[str, str]] = {"case": {}, "question": {}}
    for part in PARTS:
        for uid, (task, messages) in rows_of(law, part).items():
            text = messages[0]["content"]
            key = {
                "jud_read_compre": ("case", text.partition("文本为：")[2].partition("问题为：")[0]),
                "legal_question_answering_reference": (
                    "question",
                    normalise(text.rpartition("<问题>：")[2], CHINESE),
                ),
                "legal_question_answering": ("question", normalise(text, CHINESE)),
            }.get(task)
            if key is not None:
                assert found[key[0]].setdefault(key[1], part) == part, f"{uid} is in {part}, its like is not"
    assert len(found["case"]) == 30 and len(found["question"]) == 60  # 30 of them are Pair-QA's own
    assert {*found["case"].values()} == {*found["question"].values()} == {*PARTS}


def test_every_task_gives_a_tenth_to_test_and_its_share_to_validation(law, tmp_path, make):
    big = make(write_source(tmp_path / "law", per_task=100), "--validation_share", 0.1)
    for task, count in big.meta["counts"]["tasks"].items():
        assert (count["train"], count["validation"], count["test"]) == (81, 9, 10), task
    assert law.meta["rows"] == {"train": 12 * 24, "validation": 36, "test": 36}


def test_other_seed_is_another_split(law, make, source):
    other = make(source, "--seed", 5)
    assert rows_of(other).keys() == rows_of(law).keys()
    assert rows_of(other, "test").keys() != rows_of(law, "test").keys()


def test_smaller_fraction_is_part_of_larger_and_never_trains_on_its_test(tmp_path, make):
    source = write_source(tmp_path / "law", per_task=60)
    sets = {share: make(source, "--fraction", share, "--validation_share", 0.1) for share in (0.1, 0.2, 0.5, 1.0)}
    rows = {share: {part: list(rows_of(law, part)) for part in PARTS} for share, law in sets.items()}
    for small, large in ((0.1, 0.2), (0.2, 0.5), (0.5, 1.0)):
        for part in PARTS:
            chosen = set(rows[small][part])
            assert chosen <= set(rows[large][part]) and (part != "train" or len(chosen) < len(rows[large][part]))
            assert [uid for uid in rows[large][part] if uid in chosen] == rows[small][part], "another order"
    seen_in_tests = {uid for share in sets for uid in rows[share]["test"]}
    assert not seen_in_tests & {uid for share in sets for part in ("train", "validation") for uid in rows[share][part]}
    counts = sets[0.1].meta["counts"]["tasks"]
    assert {(count["train"], count["test"]) for count in counts.values()} == {(5, 1)}


def test_one_question_per_task_is_held_out_whatever_the_fraction(tmp_path, make, source):
    sets = [make(source, "--fraction", share) for share in (0.02, 0.3, 1.0)]
    questions = sets[0].meta["questions"]
    assert [law.meta["questions"] for law in sets] == [questions] * 3
    for law in sets:
        test = rows_of(law, "test")
        assert [test[uid][0] for uid in questions] == list(TASK_NAMES)


def test_question_is_one_that_is_not_left_out_for_its_length(tmp_path, make):
    source = tmp_path / "law"
    extra = [record("exam", number)[1] for number in range(30, 300)]
    for values in extra:
        values["input"] += sentence(values["id"], length=600)
    write_source(source, extra={PAIR: extra})
    law = make(source, "--max_length", 700)
    assert law.meta["counts"]["tasks"]["exam"]["too_long"] == 270
    (asked,) = (uid for uid in law.meta["questions"] if "exam" in uid)
    assert int(asked.rsplit("-", 1)[1]) < 30
    little = make(source, "--max_length", 700, "--fraction", 0.01)
    assert little.meta["questions"] == law.meta["questions"] and asked in rows_of(little, "test")


def test_groups_are_drawn_whole_and_a_large_one_does_not_flood_the_test():
    groups = np.array([7] * 50 + list(range(100, 150)), dtype=np.uint64)
    strata = np.zeros(100, dtype=np.int64)
    split = stratified_split(strata, groups, 0.1, 1)
    assert [len(split.rows(part)) for part in PARTS] == [81, 9, 10]
    assert len(set(split.parts[:50].tolist())) == 1
    for sizes in ([1, 1, 1], [2, 2, 2], [9, 1, 1]):
        some = np.repeat(np.arange(len(sizes), dtype=np.uint64), sizes)
        split = stratified_split(np.zeros(len(some), dtype=np.int64), some, 0.1, 1)
        assert min(len(split.rows(part)) for part in PARTS) > 0, sizes
    with pytest.raises(UserError, match="too few for this split"):
        stratified_split(strata[:50], groups[:50], 0.1, 1)


# --- length ------------------------------------------------------------------------------------------------------


def long_record(task: str) -> tuple[str, dict[str, object]]:
    """A record whose document is far too long; its id is 900."""
    file, values = record(task, 900)
    text = sentence(task, 900, length=60)
    if task == "legal_question_answering_reference":  # there the question is short, and the statutes are the document
        text = sentence("statute", 900, length=40)
    longer = text + sentence(task, "long", length=3000)
    return file, json.loads(json.dumps(values, ensure_ascii=False).replace(text, longer))


def test_over_long_document_is_cut_and_question_instruction_and_answer_stay(tmp_path, make):
    extra: dict[str, list[object]] = {}
    for file, values in map(long_record, TASK_NAMES):
        extra.setdefault(file, []).append(values)
    source = write_source(tmp_path / "law", extra=extra)
    law = make(source, "--max_length", 1500)
    assert_tokens_are_those_of_inference(law)
    rows = rows_of(law)
    for task in TASKS:
        counts = law.meta["counts"]["tasks"][task.name]
        assert (counts["truncated"], counts["too_long"]) == ((0, 1) if task.cut is None else (1, 0)), task.name
        file, values = long_record(task.name)
        cut = [messages for uid, (_, messages) in rows.items() if uid.startswith(file) and CUT_MARK in str(messages)]
        cut = [messages for messages in cut if messages[1]["content"] == values["output"]]
        assert len(cut) == (0 if task.cut is None else 1), task.name
        for messages in cut:
            first, *_, last = values["input"].split("\n")
            if task.name != "legal_question_answering_reference":  # its document is its first line
                assert first in messages[0]["content"]
            assert messages[0]["content"].endswith(last[-8:])
            if task.question:
                assert values["input"][values["input"].index(task.question) :][:5] in messages[0]["content"]
    dropped = make(source, "--max_length", 1500, "--too_long", "drop")
    assert dropped.meta["counts"]["truncated"] == 0 and dropped.meta["counts"]["too_long"] == 12
    assert rows_of(dropped).keys() == {uid for uid, (_, m) in rows.items() if CUT_MARK not in m[0]["content"]}


def test_answer_that_alone_is_too_long_drops_the_record(tmp_path, make):
    _, values = record("sent_pred", 900)
    source = write_source(tmp_path / "law", extra={PAIR: [{**values, "output": sentence(length=3000)}]})
    law = make(source, "--max_length", 1500)
    assert law.meta["counts"]["tasks"]["sent_pred"]["too_long"] == 1
    assert f"{PAIR}:sent_pred-900" not in rows_of(law)


def test_cutting_takes_the_middle_of_long_lines_as_little_as_fits():
    task = TASKS[TASK_NAMES.index("sent_pred")]
    statutes, document = ["法" * 300], "预测。\n" + "甲" * 500 + "乙" * 500
    cut = shortened(task, statutes, document, "答", len, 900)
    law, instruction, text = cut.split("\n")
    assert law == statutes[0] and instruction == "预测。", "what is short lost something"
    assert text.startswith("甲" * 400) and text.endswith("乙" * 100) and CUT_MARK in text
    assert 890 <= len(cut) <= 900
    assert shortened(task, statutes, document, "答", len, 2 * MIN_KEPT) is None
    tight = shortened(task, statutes, document, "答", len, 2 * MIN_KEPT + 20)
    assert len(tight) <= 2 * MIN_KEPT + 20 and all(len(line) in (3, *range(195, 211)) for line in tight.split("\n"))


def test_a_record_that_cutting_hardly_shortens_is_given_up_soon():
    task = TASKS[TASK_NAMES.index("sent_pred")]
    asked = []

    def count(text: str) -> int:  # all of the tokens are at the ends, where nothing is cut
        asked.append(text)
        return 1001

    assert shortened(task, [], "甲" * 130_000, "答", count, 1000) is None
    assert len(asked) < 40


def test_question_behind_its_mark_is_never_cut_and_a_lost_span_gives_the_record_up():
    task = TASKS[TASK_NAMES.index("jud_read_compre")]
    asked = "，问题为：'" + "问" * 300 + "？'"
    text = "请回答\n文本为：'" + "甲" * 100 + "张三" + "乙" * 1000 + "李四" + "丙" * 100 + "'" + asked
    cut = shortened(task, [], text, "张三", len, 800)
    assert cut.endswith(asked) and "张三" in cut and len(cut) <= 800
    middle = text.replace("乙" * 1000, "乙" * 500 + "王五" + "乙" * 500)
    assert shortened(task, [], middle, "王五", len, 800) is None
    assert shortened(task, [], middle, "不在文中", len, 800) is not None


def test_lengths_per_task_are_those_of_the_rows_and_are_printed(law, make, source, capsys):
    tokens: dict[str, list[int]] = {}
    for name in PARTS:
        part = law.part(name)
        for row in range(len(part)):
            tokens.setdefault(part.tasks[row], []).append(len(part.ids[row]))
    for task, own in tokens.items():
        about = law.meta["lengths"][task]
        assert about["rows"] == len(own) and about["tokens"]["max"] == max(own)
        assert about["tokens"]["median"] == np.median(own) and about["tokens"]["p95"] == np.percentile(own, 95)
        assert about["answer"]["max"] < about["tokens"]["max"]
    make(source)
    said = capsys.readouterr().out
    for task in TASK_NAMES:
        (line,) = (line for line in said.splitlines() if line.split()[:1] == [task])
        assert f" {law.meta['lengths'][task]['tokens']['max']:,} " in line


# --- kills, second runs ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large_source(tmp_path_factory) -> Path:
    return write_source(tmp_path_factory.mktemp("large") / "law", per_task=500)


@pytest.fixture(scope="module")
def large_law(tmp_path_factory, large_source, small) -> Conversations:
    output = tmp_path_factory.mktemp("uninterrupted") / "law"
    words = ["--source", large_source, "--output", output, "--tokenizer", small, "--workers", 1]
    assert disc_law.main([str(word) for word in words]) == 0
    return open_conversations(output)


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_in_the_middle_it_goes_on_with_what_is_not_done(
    number, launch: Launch, large_source, large_law, tmp_path, small, make, monkeypatch
):
    output, shards = tmp_path / "x", tmp_path / ".x.shards"
    words = ["--source", large_source, "--output", output, "--tokenizer", small]
    running = launch("data_prep.disc_law", *words, "--workers", 2, module="tests.support.slow_preparing")
    while not list(shards.glob("*.arrow")):
        assert running.process.poll() is None, running.printed()
        time.sleep(0.001)
    running.process.send_signal(number)  # to the parent alone, as the memory watchdog or a scheduler does
    result = running.wait()
    end = time.monotonic() + 30
    while running.living():
        assert time.monotonic() < end, "workers outlive their parent"
        time.sleep(0.05)
    assert not output.exists()
    if number == signal.SIGTERM:
        assert result.status == 75 and "finished shards are kept" in result.out, result
    finished = {path.name: path.read_bytes() for path in shards.glob("*.arrow")}
    assert 0 < len(finished) < 8
    made = []
    monkeypatch.setattr(
        conversation_rows, "_make_shard", lambda shard: (made.append(shard.path.name), make_shard(shard))[1]
    )
    resumed = make(large_source, output=output)
    resumed.verify()
    assert not set(made) & set(finished), "tokenised again what was done"
    assert len(made) + len(finished) == sum(math.ceil(rows / 1000) for rows in resumed.meta["rows"].values())
    assert resumed.fingerprint == large_law.fingerprint and resumed.meta["files"] == large_law.meta["files"]
    assert {path.name for path in tmp_path.iterdir()} == {"x", "output-0"}


def test_shards_of_other_options_are_not_used(tmp_path, make, source, law, monkeypatch):
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    assemble = prepare_conversations.assemble
    monkeypatch.setattr(prepare_conversations, "assemble", killed)
    with pytest.raises(KeyboardInterrupt):
        make(source, "--reference", "false", output=tmp_path / "x")
    assert len(list((tmp_path / ".x.shards").glob("*.arrow"))) == 3
    monkeypatch.setattr(prepare_conversations, "assemble", assemble)
    assert make(source, output=tmp_path / "x").fingerprint == law.fingerprint


def test_number_of_workers_and_size_of_shards_change_nothing(law, make, source, monkeypatch):
    monkeypatch.setattr(prepare_conversations, "ROWS_PER_SHARD", 7)
    one = make(source)  # law was made by two workers, in shards of a thousand
    assert one.fingerprint == law.fingerprint and one.meta["files"] == law.meta["files"]


def killed_at_the_third(shard: conversation_rows.Shard) -> int:
    if shard.path.name == "train-00003.arrow":
        time.sleep(1)  # until the other process has done something
        os.kill(os.getpid(), signal.SIGKILL)
    return make_shard(shard)


make_shard = conversation_rows._make_shard


def test_worker_that_is_killed_is_named_and_what_is_done_is_kept(make, large_source, tmp_path, monkeypatch):
    monkeypatch.setattr(conversation_rows, "_make_shard", killed_at_the_third)
    with pytest.raises(UserError, match=r"worker process was killed.*fewer --workers"):
        make(large_source, "--workers", 2, output=tmp_path / "x")
    assert list((tmp_path / ".x.shards").glob("*.arrow")) and not (tmp_path / "x").exists()


def test_same_command_again_does_nothing_other_options_are_named(tmp_path, source, small, make):
    output = tmp_path / "x"
    first = make(source, output=output).fingerprint
    words = ["--source", source, "--output", output, "--tokenizer", small]
    again = run(*words, "--workers", 1, "--overwrite", "false")
    assert again.status == 0 and "nothing to do" in again.out, again
    assert_refused(
        run(*words, "--fraction", 0.5, "--max_length", 512),
        "fraction: 1.0 -> 0.5", "max_length: 1024 -> 512", "--overwrite",
    )  # fmt: skip
    other = make_tokenizer(tmp_path / "other", CHATML.replace("help", "serve"))
    with pytest.raises(UserError, match=f"tokenizer: {small}"):
        make(source, output=output, tokenizer=other)
    edited = write_source(tmp_path / "edited", extra={PAIR: [GOOD]})
    with pytest.raises(UserError, match=f"the source's content: {PAIR}.sample.jsonl: .* -> "):
        make(edited, output=output)
    assert open_conversations(output).fingerprint == first
    replaced = make(edited, "--overwrite", "true", output=output)
    assert replaced.fingerprint != first and f"{PAIR}:exam-900" in rows_of(replaced)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["edited", "other", "x"]


def test_output_that_is_taken_or_being_written_is_never_touched(tmp_path, source, make):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"holds other things \(thesis.tex\)"):
        make(source, "--overwrite", "true", output=tmp_path / "notes")
    with temporary_folder(tmp_path / "x"), pytest.raises(UserError, match="another process is writing"):
        make(source, output=tmp_path / "x")
    assert (tmp_path / "notes/thesis.tex").read_text() == "years of work"


def test_full_disk_is_one_clear_line_and_leaves_nothing_behind(small_disk, small, large_source):
    result = run("--source", large_source, "--output", small_disk / "x", "--tokenizer", small, "--workers", 2)
    assert_refused(result, "no space left", "--output")
    assert list(small_disk.iterdir()) == []


# --- sources -----------------------------------------------------------------------------------------------------


def test_some_of_the_files_are_enough_and_the_missing_are_named(tmp_path, source, make, capsys):
    (tmp_path / "some").mkdir()
    shutil.copy(source / f"{TRIPLET}.sample.jsonl", tmp_path / "some" / f"{TRIPLET}.jsonl")
    law = make(tmp_path / "some")
    assert law.meta["tasks"] == ["judgement_predict"]
    assert law.meta["source"]["missing"] == [f"{PAIR}.jsonl", f"{PAIR_QA}.jsonl", f"{TRIPLET_QA}.jsonl"]
    said = capsys.readouterr().err
    assert f"lacks {PAIR}.jsonl, {PAIR_QA}.jsonl, {TRIPLET_QA}.jsonl" in said
    assert f"{TRIPLET}.jsonl is not the published file" in said
    assert law.meta["source"]["files"][0]["published"] is False


def test_source_without_any_of_the_files_says_what_is_expected(tmp_path, source, small):
    words = ["--output", tmp_path / "x", "--tokenizer", small]
    assert_refused(run("--source", tmp_path, *words), "none of the files", f"{PAIR}.jsonl", "--source hub")
    for place, expected in (
        (tmp_path / "nothing", "does not exist"),
        (source / f"{PAIR}.sample.jsonl", "is a file"),
    ):
        with pytest.raises(UserError, match=expected):
            disc_law_records.find_files(str(place), "main")
    twice = shutil.copytree(source, tmp_path / "twice")
    shutil.copy(twice / f"{PAIR}.sample.jsonl", twice / f"{PAIR}.jsonl")
    with pytest.raises(UserError, match=f"holds {PAIR} twice"):
        disc_law_records.find_files(str(twice), "main")
    with pytest.raises(UserError, match="revision has no effect"):
        disc_law.main(["--source", str(source), "--output", str(tmp_path / "x"), "--revision", "v1"])


@pytest.fixture
def published(source, tmp_path, monkeypatch) -> Path:
    """A folder with four small files that count as the published ones."""
    folder = tmp_path / "published"
    folder.mkdir()
    files = []
    for file in FILES:
        path = shutil.copy(source / f"{file.stem}.sample.jsonl", folder / file.name)
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        files.append(
            disc_law_records.PublishedFile(file.stem, path.stat().st_size, sha256, file.tasks, file.has_reference)
        )
    monkeypatch.setattr(disc_law_records, "FILES", tuple(files))
    return folder


def test_published_files_are_known_by_their_content(published, make, capsys, law):
    made = make(published)
    assert [file["published"] for file in made.meta["source"]["files"]] == [True] * 4
    said = capsys.readouterr()
    assert "warning" not in said.err and said.out.count("as published") == 4
    assert rows_of(made) == rows_of(law)


def test_hub_is_fetched_by_revision_and_checked(published, make, monkeypatch, tmp_path):
    asked = []
    snapshot = tmp_path / "snapshots" / COMMIT
    snapshot.parent.mkdir()
    snapshot.symlink_to(published)

    def fetch_snapshot(name, *, revision, patterns, is_complete, kind):
        asked.append((name, revision, kind, sorted(patterns)))
        assert is_complete(published) and not is_complete(tmp_path)
        return snapshot

    monkeypatch.setattr(disc_law_records, "fetch_snapshot", fetch_snapshot)
    law = make("hub", "--revision", "abc", output=tmp_path / "x")
    names = sorted(file.name for file in FILES)
    assert asked == [("ShengbinYue/DISC-Law-SFT", "abc", "dataset", names)]
    assert law.meta["source"]["kind"] == "hub" and law.meta["source"]["place"] == "ShengbinYue/DISC-Law-SFT@abc"
    assert law.meta["source"]["commit"] == COMMIT
    make("hub", output=tmp_path / "x")
    assert len(asked) == 1, "asked for what was prepared already"
    with (published / f"{TRIPLET}.jsonl").open("a") as file:
        file.write("\n")
    with pytest.raises(UserError, match=r"not the published file.*another version.*--revision"):
        make("hub", output=tmp_path / "y")
    assert not (tmp_path / "y").exists()


def test_no_network_is_answered_soon_with_what_to_do_by_hand(tmp_path, small):
    offline = {"HF_HOME": str(tmp_path / "cache"), "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    began = time.monotonic()
    words = ["--source", "hub", "--output", tmp_path / "x", "--tokenizer", small]
    assert_refused(run(*words, environment=offline), "hf download ShengbinYue/DISC-Law-SFT", "--repo-type dataset")
    words = ["--source", tmp_path, "--output", tmp_path / "x", "--tokenizer", "Qwen/Qwen2.5-3B-Instruct"]
    assert_refused(run(*words, environment=offline), "hf download Qwen/Qwen2.5-3B-Instruct")
    assert time.monotonic() - began < 60
    assert not (tmp_path / "x").exists()


def test_dry_run_says_what_would_be_done_and_writes_nothing(tmp_path, source, small):
    words = ["--source", source, "--output", tmp_path / "x", "--tokenizer", small, "--dry-run"]
    result = run(*words)
    assert result.status == 0 and "would prepare" in result.out and "max_length: 1024" in result.out
    assert list(tmp_path.iterdir()) == []


# --- reading -----------------------------------------------------------------------------------------------------


def test_ids_are_views_on_the_file_and_the_library_reads_the_parts_too(law):
    for name in PARTS:
        allocated = pa.total_allocated_bytes()
        part = law.part(name)
        assert pa.total_allocated_bytes() == allocated, "copied instead of memory-mapped"
        assert part.ids.values.dtype == np.int32 and part.prompt_lengths.dtype == np.int64
        assert not part.ids.values.flags.owndata and not part.prompt_lengths.flags.writeable
        loaded = datasets.load_from_disk(str(law.folder / name))
        assert len(loaded) == len(part)
        row = loaded[len(part) - 1]
        assert row["ids"] == part.ids[-1].tolist() and row["uid"] == part.uids[len(part) - 1]
    with pytest.raises(UserError, match="train, validation, test"):
        law.part("dev")


def test_reading_needs_no_heavy_library(law):
    program = (
        "import sys; from training.data.conversations import open_conversations\n"
        "open_conversations(sys.argv[1]).part('train')\n"
        "print([name for name in ('torch', 'datasets', 'transformers', 'opencc') if name in sys.modules])"
    )
    words = [sys.executable, "-c", program, str(law.folder)]
    assert subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_damaged_missing_or_other_sets_are_refused_with_the_command_that_makes_one(law, tmp_path):
    with pytest.raises(UserError, match=r"there is no prepared .*python -m data_prep.disc_law .*--output"):
        open_conversations(tmp_path / "nothing")
    copy = shutil.copytree(law.folder, tmp_path / "copy")
    (data,) = (copy / "test").glob("data-*.arrow")
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    with pytest.raises(UserError, match="changed or damaged"):
        open_conversations(copy).verify()
    data.write_bytes(content[:-8])
    with pytest.raises(UserError, match=r"has .* bytes instead of .*data_prep.disc_law"):
        open_conversations(copy)
    assert prepare_pairs(["--source", "sample", "--output", str(tmp_path / "pairs")]) == 0
    with pytest.raises(UserError, match=r"holds sentence pairs .*conversations .*are expected"):
        open_conversations(tmp_path / "pairs")
    with pytest.raises(UserError, match=r"holds conversations .*sentence pairs .*are expected"):
        open_prepared(law.folder)
    pairs = open_prepared(tmp_path / "pairs")
    assert pairs.identity == {
        "fingerprint": pairs.fingerprint,
        "source_tokenizer": pairs.source_tokenizer.sha256,
        "target_tokenizer": pairs.target_tokenizer.sha256,
    }


# --- export ------------------------------------------------------------------------------------------------------


def test_exports_hold_every_conversation_in_the_form_that_is_read_elsewhere(law, tmp_path, capsys):
    part = law.part("validation")
    expected = [tuple(message["content"] for message in json.loads(text)) for text in part.messages]
    readers = {
        "messages": lambda line: [(m["role"], m["content"]) for m in line["messages"]],
        "sharegpt": lambda line: [(m["from"], m["value"]) for m in line["conversations"]],
        "alpaca": lambda line: [("instruction", line["instruction"] + line["input"]), ("output", line["output"])],
    }
    speakers = {"messages": ("user", "assistant"), "sharegpt": ("human", "gpt"), "alpaca": ("instruction", "output")}
    keys = {"messages": {"messages"}, "sharegpt": {"conversations"}, "alpaca": {"instruction", "input", "output"}}
    for name, reader in readers.items():
        output = tmp_path / f"{name}.jsonl"
        words = [str(law.folder), "--part", "validation", "--format", name, "--output", str(output)]
        assert export.main(words) == 0
        lines = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
        assert all(set(line) == keys[name] for line in lines)
        assert [reader(line) for line in lines] == [list(zip(speakers[name], texts, strict=True)) for texts in expected]
        about = json.loads(capsys.readouterr().out.splitlines()[-1])[name]
        assert about["file_name"] == f"{name}.jsonl" and set(about["columns"].values()) == keys[name]


def test_export_started_as_people_do_it_and_its_mistakes(law, tmp_path):
    words = [law.folder, "--part", "train", "--format", "sharegpt"]
    done = run(*words, "--output", tmp_path / "x.jsonl", module="data_prep.export")
    assert done.status == 0 and len((tmp_path / "x.jsonl").read_bytes().splitlines()) == len(law.part("train"))
    for output, expected in ((tmp_path / "no/x.jsonl", "there is no folder"), (tmp_path, "is a folder")):
        with pytest.raises(UserError, match=expected):
            export.main([str(word) for word in (*words, "--output", output)])
    with pytest.raises(UserError, match="there is no prepared data set"):
        export.main(["nothing", "--part", "train", "--format", "alpaca", "--output", str(tmp_path / "y")])
    assert [path.name for path in tmp_path.iterdir()] == ["x.jsonl"]
