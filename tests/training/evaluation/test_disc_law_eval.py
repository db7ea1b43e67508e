"""DISC-Law-Eval: the published verdicts, questions as prompts, files and scores of answers, the open questions."""

from __future__ import annotations

import csv
import errno
import json
import os
import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.support.browser import browser
from tests.support.commands import REAL_TATOEBA, Launch
from tests.support.growth import assert_linear
from tests.support.pages import HOSTILE, Page, assert_fenced, brightness
from training.base.console import UserError
from training.evaluation.disc_law_eval import __main__ as disc_law_eval
from training.evaluation.disc_law_eval.asking import LawAnswers
from training.evaluation.disc_law_eval.letters import letters_of
from training.evaluation.disc_law_eval.open_questions import ModelAnswers, OpenQuestion, open_questions, render
from training.evaluation.disc_law_eval.overlap import about_overlap, overlapping
from training.evaluation.disc_law_eval.questions import KINDS, Question, four_shot_prompt, load_questions, load_samples
from training.evaluation.disc_law_eval.scoring import COLUMNS, compare_answers, score_answers, score_file, write_results

RELEASED = REAL_TATOEBA.parents[1] / "disc-law-eval"
RIGHT = {"DISC-LawLLM": 951, "GPT-3.5-turbo": 874, "ChatGLM": 632}  # as published: 37.10, 34.10 and 24.66 per cent
ITEMS = 2563

needs_release = pytest.mark.skipif(
    not RELEASED.is_dir(), reason=f"DISC-Law-Eval is not at {RELEASED} (RELAY_DATA names the folder above it)"
)

# --- the letters of an answer

BY_RULE = {
    # short: as it stands
    "": "",
    "B": "B",
    "DCA": "ACD",
    "A、C": "AC",
    "B. C公司的行为": "BC",
    "选A不选B": "AB",
    "当选A而不选BC好": "ABC",  # nine characters
    # a phrase with letters behind it
    "应当选A而不选BC好": "A",  # ten characters
    "本题的答案为C，其余不对": "C",
    "本题的答案应该是 A, C，其余不对": "AC",
    "本题正确的选项应为B和其他": "B",
    "所以说，选项该是D而不是别的": "D",
    "综合以上，答案ABD是正确答案": "ABD",
    "综合以上，答案应选C，不能选别的": "C",
    "综合以上，答案应该选 B、D，不能选别的": "BD",
    "综合以上，考生应选择A C D四项": "ACD",
    "综合以上各项，故选：B，不选C": "B",
    "综合以上各项，故选:AB。不选C": "AB",
    "选BC项，因为A项和D项说法错误": "BC",
    "因为甲的行为构成犯罪，所以 C</s>": "C",
    "AB。其余各项C和D都不符合题意": "AB",
    # written out options
    "A. 甲应当承担责任\nC．乙应当承担责任": "AC",
    "D.甲应当承担责任，与 B 公司无关": "D",
    # called right
    "综合以上各项，A、B都是正确的": "AB",
    "综合以上各项，A是正确的，而且C是正确的，B不是": "AC",
    "综合以上，选项A、D正确，B的说法不对": "AD",
    "综合以上，C选项正确，B的说法不对": "C",
    "综合以上，A和其他B是正确答案。C不对": "B",
    "综合以上，AC都为正确选项，B的说法不对": "AC",
    "综合以上，A选项属于民事责任，C错误": "A",
    "综合以上，A、B都属于民事责任，C错误": "AB",
    "综合以上，A选项属于不当得利，C属于民事责任": "C",
    "综合以上，A项属于错误，D属于民事责任": "D",
    # as it stands
    "甲和乙都应当承担责任，A和D的说法都对": "AD",
    "上述各项之中没有正确的说法": "",
}

# Each answer holds two rules; the one that stands first in the list must decide.
ORDER = {
    "short before phrases": ("答案是A不是B", "AB"),
    "phrases before options": ("A. 甲应当承担责任\nB. 乙应当承担责任\n故选B", "B"),
    "a phrase's place in the list, not in the answer": ("考生选择A的很多，但正确答案是C。", "C"),
    "答案 before 选择": ("考生选择A的很多，但正确答案C。", "C"),
    "选择 before 选": ("有人故选A，有人选择B，不一而足", "B"),
    "选 before the end": ("综合以上各项，应当选B，而不是 C</s>", "B"),
    "the end before the beginning": ("AB。综合以上各项，其实应当是 C</s>", "C"),
    "the first place of a phrase": ("有人选择A，有人选择B，不一而足", "A"),
    "options before what is called right": ("A. 甲应当承担责任，B是正确的", "A"),
    "the first of what is called right": ("综合以上各项，C选项正确，A是正确的", "A"),
    "called right before all": ("综合以上各项，A是正确的，B是错误的", "A"),
    "commas alone hide the rest": ("D. 从已知的可能性中进行选择，而选出了方案", ""),
}


@pytest.mark.parametrize("answer", BY_RULE)
def test_letters_are_read_by_each_rule(answer: str):
    assert letters_of(answer) == BY_RULE[answer]


@pytest.mark.parametrize("case", ORDER)
def test_the_earlier_rule_decides(case: str):
    answer, expected = ORDER[case]
    assert letters_of(answer) == expected


def test_a_long_run_of_letters_is_read_in_no_time():
    assert letters_of("AB、" * 700 + "等等都不对") == "AB"


@pytest.mark.parametrize(
    "piece", ["AB、", "A ", "A", ",", " ", "A.", "选", "选A", "选项 A", "答案", "选择,", "A属于错"]
)
@pytest.mark.parametrize("end", ["等等都不对", "</s"])
def test_the_time_to_read_an_answer_grows_as_its_length(piece: str, end: str):
    assert_linear(letters_of, piece, begin="综合以上各项", end=end)
    assert_linear(letters_of, piece, end=end)


# --- what of it the training data holds

STEM = "关于犯罪嫌疑人、被告人逃匿、死亡案件违法所得的没收程序，下列说法正确的是？"
OPTION = "没收违法所得案件审理过程中，在逃犯罪嫌疑人到案的，应当中止审理"


def test_a_question_counts_as_trained_on_by_its_text_or_by_one_option():
    questions = [
        Question("single", "NJE", 1, STEM, ("甲", OPTION, "丙", "丁"), "B"),
        Question("single", "NJE", 2, "下列哪项正确？", ("甲", "乙", "丙", "丁"), "A"),
    ]
    asked = "关于犯罪嫌疑人,被告人逃匿,死亡案件 违法所得的没收程序，以下陈述是否正确？"
    assert overlapping(questions, [asked]).tolist() == [True, False]
    assert overlapping(questions, ["其他", f"解析：{OPTION[3:24]}……"]).tolist() == [True, False]
    letters = OPTION.replace("，", "")
    assert overlapping(questions, [letters[:20]]).tolist() == [True, False]
    assert not overlapping(questions, [letters[:19], "下列哪项正确？甲乙丙丁", ""]).any()


def test_scores_without_the_questions_that_were_trained_on():
    questions = [Question("single", "NJE", n, "何者？", ("甲", "乙", "丙", "丁"), "A") for n in range(4)]
    before, after = (LawAnswers(questions, list(letters), [], [], 0) for letters in ("ABBB", "AAAB"))
    scores, _ = before.compared(after, np.array([False, True, True, False]))
    assert (scores["before"]["correct"], scores["after"]["correct"]) == (1, 3)
    overlap = scores["overlap"]
    without = overlap["without"]
    assert overlap["questions"] == 2 and without["before"]["items"] == 2
    assert (without["before"]["correct"], without["after"]["correct"], without["compared"]["difference"]) == (1, 1, 0)
    scores, _ = before.compared(after, np.full(4, True))
    assert scores["overlap"] == {"questions": 4, "without": None}
    assert "4 of the 4 questions share" in about_overlap(scores)
    assert before.compared(after, None)[0]["overlap"] is None


# --- the released files


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def released_files(model: str) -> Iterator[Path]:
    """A model's files of answers, in the order of the questions."""
    for kind in KINDS:
        for exam in kind.exams:
            yield RELEASED / "published_outputs" / model / kind.results / f"{exam.lower()}_results.csv"


@needs_release
@pytest.mark.parametrize("model", RIGHT)
def test_every_published_verdict_is_found_again(model: str):
    questions = load_questions(RELEASED)
    rows = [row for path in released_files(model) for row in rows_of(path)]
    assert len(rows) == len(questions) == ITEMS
    other = [
        (question.kind, question.exam, question.number)
        for question, row in zip(questions, rows, strict=True)
        if str(int(letters_of(row["model_output"]) == question.gold)) != row["correctness"]
    ]
    assert other == []
    assert sum(row["correctness"] == "1" for row in rows) == RIGHT[model]


@needs_release
def test_published_letters_are_found_but_where_the_published_text_is_not_what_was_read():
    def letters(text: str) -> str:
        return "".join(sorted(set(re.findall("[A-D]", text))))

    answers, other = {}, []
    for model in RIGHT:
        for path in released_files(model):
            for number, row in enumerate(rows_of(path), 1):
                key = path.relative_to(RELEASED / "published_outputs"), number
                answers[str(key[0]), number] = row["model_output"], row["extract_ans"]
                if letters_of(row["model_output"]) != letters(row["extract_ans"]):
                    other.append((model, row))
    # The end token was cut off the published answers of two models after they had been read.
    with_end = [row for _, row in other if letters_of(row["model_output"] + "</s>") != letters(row["extract_ans"])]
    assert [model for model, _ in other] == ["GPT-3.5-turbo"] + ["ChatGLM"] * 4
    assert len(with_end) == 1  # its text has no end either
    # No function of the text alone could do better: here one text was read as B and as C.
    same = [answers[f"{model}/single/pae_results.csv", 38] for model in ("DISC-LawLLM", "ChatGLM")]
    assert same[0][0] == same[1][0] and [read for _, read in same] == ["B", "C"]


@needs_release
def test_the_command_prints_one_line_of_json_per_file(launch: Launch, capsys: pytest.CaptureFixture[str]):
    paths = list(released_files("DISC-LawLLM"))
    result = launch("score", *paths[:2], module="training.evaluation.disc_law_eval").wait()
    assert (result.status, result.err) == (0, ""), result
    assert [json.loads(line) for line in result.out.splitlines()] == [
        {"file": str(paths[0]), "items": 537, "correct": 226},
        {"file": str(paths[1]), "items": 118, "correct": 48},
    ]
    for model, right in RIGHT.items():
        assert disc_law_eval.main(["score", *map(str, released_files(model))]) == 0
        scored = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [list(each) for each in scored] == [["file", "items", "correct"]] * 10
        assert (sum(each["items"] for each in scored), sum(each["correct"] for each in scored)) == (ITEMS, right)


@needs_release
def test_the_questions_are_those_of_the_release():
    questions = load_questions(RELEASED)
    assert Counter((question.kind, question.exam) for question in questions) == {
        **{("single", "NJE"): 537, ("single", "PAE"): 118, ("single", "CPA"): 197},
        **{("single", "UNGEE"): 320, ("single", "LBK"): 275, ("single", "PFE"): 170},
        **{("multiple", "NJE"): 463, ("multiple", "PAE"): 276, ("multiple", "CPA"): 120, ("multiple", "UNGEE"): 87},
    }
    assert all(len(question.gold) == 1 for question in questions if question.kind == "single")
    assert len({(question.kind, question.exam, question.number) for question in questions}) == ITEMS
    samples = load_samples(RELEASED)
    for question in (questions[0], questions[-1]):
        prompt = four_shot_prompt(question, samples)
        assert prompt.count("问题：") == prompt.count("答案：") == 5
        assert prompt.endswith(f"D. {question.options[3]}\n答案：")
    texts = {re.sub(r"\W", "", question.text) for question in questions}
    assert not [
        sample
        for kind in samples.values()
        for sample in kind
        if re.sub(r"\W", "", sample.question.split("\nA")[0]) in texts
    ], "a sample must not give a question away"


@needs_release
def test_released_answers_score_as_published_and_differ_as_they_should():
    questions = load_questions(RELEASED)
    answers = {
        model: [row["model_output"] for path in released_files(model) for row in rows_of(path)] for model in RIGHT
    }
    scores = {model: score_answers(questions, answers[model]) for model in RIGHT}
    assert [(score["items"], score["correct"]) for score in scores.values()] == [(ITEMS, n) for n in RIGHT.values()]
    assert [score["accuracy"] for score in scores.values()] == [37.10, 34.10, 24.66]
    test = compare_answers(questions, answers["GPT-3.5-turbo"], answers["DISC-LawLLM"])
    assert test["difference"] == 3.0 and test["gained"] - test["lost"] == 951 - 874 and 0.001 < test["p"] < 0.02


@needs_release
def test_answers_are_written_as_the_released_ones_are(tmp_path: Path):
    questions = load_questions(RELEASED)
    rows = [row for path in released_files("DISC-LawLLM") for row in rows_of(path)]
    written = write_results(tmp_path, questions, [row["model_output"] for row in rows])
    assert [path.relative_to(tmp_path) for path in written] == [
        path.relative_to(RELEASED / "published_outputs/DISC-LawLLM") for path in released_files("DISC-LawLLM")
    ]
    again = [row for path in written for row in rows_of(path)]
    for key in ("input", "multichoice", "model_output", "correctness"):
        assert [row[key] for row in again] == [row[key] for row in rows], key
    with written[0].open(encoding="utf-8", newline="") as file:
        assert file.readline() == next(released_files("DISC-LawLLM")).open(encoding="utf-8", newline="").readline()
    assert sum(score_file(path, RELEASED / "objective")["correct"] for path in written) == RIGHT["DISC-LawLLM"]


# --- a benchmark of one's own, as small as it gets


def benchmark(folder: Path, items: int = 3) -> Path:
    """A folder in the benchmark's form, with so many questions per exam: the first one's letter is A, and so on."""
    for part in ("objective", "few_shot", "subjective"):
        (folder / part).mkdir(parents=True)
    for kind in KINDS:
        for exam in kind.exams:
            text = f'{exam}的第%d题，“甲，或"乙",何者？\n'
            golds = ("AD", "BD", "CD", "D") if kind.name == "multiple" else "ABCD"
            rows = [(text % n, golds[n % 4], *"甲乙丙丁", "2021", kind.name == "multiple") for n in range(items)]
            write_csv(
                folder / "objective" / f"mcq_{kind.objective}_{exam.lower()}.csv",
                ("input", "output", *"ABCD", "source", "multichoice"),
                *rows,
            )
        samples = [(f"{kind.name}例{n}\nA. 甲\nB. 乙\nC. 丙\nD. 丁", "B. 乙") for n in range(6)]
        write_csv(folder / "few_shot" / f"mcq_{kind.objective}_examples.csv", ("input", "output"), *samples)
    write_open(folder, [{"input": f"问{n}？", "output": f"答{n}。", "id": n} for n in (1, 2, 3)])
    return folder


def write_csv(path: Path, *rows: tuple[object, ...]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
    return path


def write_open(folder: Path, records: object) -> None:
    (folder / "subjective/qa_short_answer.json").write_text(json.dumps(records), encoding="utf-8")


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return benchmark(tmp_path / "benchmark")


def test_a_prompt_tells_what_to_do_then_four_samples_of_the_kind_then_the_question(small: Path):
    samples = load_samples(small)
    question = Question("multiple", "NJE", 1, "何者正确？\n", ("甲", "乙", "丙", "丁"), "AB")
    shots = "".join(f"问题：multiple例{n}\nA. 甲\nB. 乙\nC. 丙\nD. 丁\n答案：B. 乙\n\n" for n in range(4))
    assert four_shot_prompt(question, samples) == (
        "以下是一道多项选择题，不需要做任何分析和解释，直接输出答案选项。\n\n"
        f"{shots}问题：何者正确？\nA. 甲\nB. 乙\nC. 丙\nD. 丁\n答案："
    )
    single = four_shot_prompt(replace(question, kind="single"), samples)
    assert single.startswith("以下是一道单项选择题，") and "single例3" in single and "multiple" not in single


def test_a_file_without_letters_is_scored_by_the_questions_above_it_or_those_named(small: Path, tmp_path: Path):
    questions = load_questions(small)
    answers = [question.gold for question in questions]
    for inside in write_results(small / "outputs/mine", questions, answers):
        assert score_file(inside) == {"file": str(inside), "items": 3, "correct": 3}
    (single, *_) = write_results(tmp_path / "elsewhere", questions, [*"ABD", *answers[3:]])
    assert score_file(single, small / "objective")["correct"] == 2
    with pytest.raises(UserError, match=r"above it has objective/mcq_sing_nje\.csv: name the .* --objective"):
        score_file(single)


def test_the_nearest_questions_are_taken_also_by_a_relative_path(small: Path, monkeypatch: pytest.MonkeyPatch):
    (path, *_) = write_results(small / "outputs/mine", load_questions(small), ["B"] * 30)
    benchmark(small / "outputs", items=2)
    with pytest.raises(UserError, match=r"has 3 answers, .*outputs/objective/mcq_sing_nje.csv has 2 questions"):
        score_file(path)
    monkeypatch.chdir(path.parent)
    with pytest.raises(UserError, match="has 2 questions"):
        score_file(Path(path.name))


def test_a_file_with_letters_of_its_own_needs_no_other(tmp_path: Path):
    rows = [("问一", "B", "B. 乙是对的，所以选它"), ("问二", "CA", "A、C"), ("问三", "AC", "A"), ("问四", "D", "")]
    path = write_csv(tmp_path / "answers.csv", ("input", "output", "model_output"), *rows)
    assert score_file(path) == {"file": str(path), "items": 4, "correct": 2}
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))  # as a spreadsheet saves it
    assert score_file(path)["correct"] == 2


def test_blanks_and_line_ends_make_no_other_question(small: Path):
    (path, *_) = write_results(small / "outputs/mine", load_questions(small), list("ABC") * 10)
    path.write_bytes(path.read_bytes().replace(b"\n", b" \r\n"))
    assert score_file(path)["correct"] == 3


COLUMN_NAMES = b"input,output,model_output\n"
BAD = {
    "missing": (None, "there is no file {path}: check the path"),
    "a folder": ("folder", "{path} cannot be read (Is a directory): name a CSV file"),
    "empty": (b"", "{path} has no column input, model_output; its first line has nothing: name a file with these"),
    "no rows": (COLUMN_NAMES, "{path} has column names but no row under them"),
    "wrong columns": (
        b"question,answer\na,b\n",
        "{path} has no column input, model_output; its first line has question, ",
    ),
    "a column twice": (b"input,model_output,output,output\na,A,B,C\n", "{path} has the column output twice: leave one"),
    "cells too many": (COLUMN_NAMES + b"a,A,B,C\n", "{path}, line 2: 4 cells under 3 column names"),
    "cells too few": (COLUMN_NAMES + b"a,A,B\nb,A\n", "{path}, line 3: 2 cells under 3 column names"),
    "open quote": (COLUMN_NAMES + b'a,A,"B\n', "{path} is no CSV file, line 2: unexpected end of data"),
    "text behind a quote": (COLUMN_NAMES + b'a,A,"B"C\n', "{path} is no CSV file, line 2"),
    "not UTF-8": (COLUMN_NAMES + "问,A,B\n".encode("gbk"), "{path} is not UTF-8 (byte 26): save it as CSV in UTF-8"),
    "not text": (b"PK\x03\x04\xff\xfe\x00", "{path} is not UTF-8"),
    "no right letter": (COLUMN_NAMES + b"a,E,A\n", "{path}, question 1: the column output has 'E' where letters"),
    "empty right letter": (COLUMN_NAMES + b"a,,A\n", "{path}, question 1: the column output has '' where letters"),
    "no place": (b"input,model_output\na,A\n", "does not tell which exam it answers: call it single/NAME_results.csv"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused_in_one_line_that_says_what_to_do(case: str, tmp_path: Path):
    content, expected = BAD[case]
    path = tmp_path / "answers.csv"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as error:
        disc_law_eval.main(["score", str(path)])
    assert expected.format(path=path) in str(error.value) and "\n" not in str(error.value)


def test_answers_to_other_questions_are_refused(small: Path):
    questions = load_questions(small)
    (path, *_) = write_results(small / "outputs/mine", questions, ["A"] * 30)
    head, *rows = [list(row.values()) for row in rows_of(path)]
    table = [COLUMNS, head, *rows]
    write_csv(path, *table[:-1])
    with pytest.raises(UserError, match=r"has 2 answers, .* has 3 questions: .* all of them and in the same"):
        score_file(path)
    write_csv(path, table[0], table[2], table[1], table[3])
    with pytest.raises(UserError, match=r"answer 1 is to 'NJE的第1题.* question 1 of .*nje\.csv is 'NJE的第0题"):
        score_file(path)
    with pytest.raises(UserError, match=r"there is no file .*nowhere/mcq_sing_nje\.csv"):
        score_file(path, small / "nowhere")


def test_nothing_is_printed_unless_all_files_can_be_scored(small: Path, launch: Launch):
    (path, *_) = write_results(small / "outputs/mine", load_questions(small), ["A"] * 30)
    result = launch("score", path, small / "none.csv", module="training.evaluation.disc_law_eval").wait()
    assert (result.status, result.out) == (1, ""), result
    assert result.err == f"error: there is no file {small / 'none.csv'}: check the path\n"


def test_a_benchmark_that_is_not_whole_is_refused(small: Path):
    (small / "objective/mcq_mult_cpa.csv").unlink()
    with pytest.raises(UserError, match=r"there is no file .*mcq_mult_cpa\.csv"):
        load_questions(small)
    write_csv(small / "few_shot/mcq_sing_examples.csv", ("input", "output"), ("问", "A. 甲"))
    with pytest.raises(UserError, match="has 1 samples, the prompt takes 4"):
        load_samples(small)


# --- scores of answers


def test_accuracies_are_of_all_answers_by_exam_and_kind(small: Path):
    questions = load_questions(small)
    # Of single choice all right; of multiple choice one letter is missing everywhere; one answer is none.
    answers = [question.gold[:1] for question in questions]
    answers[0] = "无法判断"
    scores = score_answers(questions, answers)
    assert (scores["items"], scores["correct"], scores["accuracy"], scores["without_letters"]) == (30, 17, 56.67, 1)
    low, high = scores["accuracy_interval"]
    assert low < 56.67 < high and 30 < high - low < 40  # 1.96 standard errors to both sides are 35.5
    assert {kind: (own["items"], own["correct"]) for kind, own in scores["kinds"].items()} == {
        "single": (18, 17),
        "multiple": (12, 0),
    }
    exams = {(own["kind"], own["exam"]): own for own in scores["exams"]}
    assert list(exams) == [(kind.name, exam) for kind in KINDS for exam in kind.exams]
    assert exams["single", "NJE"]["accuracy"] == 66.67 and exams["single", "PFE"]["accuracy_interval"] == [100, 100]
    assert exams["multiple", "UNGEE"] == {
        **{"exam": "UNGEE", "kind": "multiple", "items": 3, "correct": 0, "accuracy": 0},
        **{"accuracy_interval": [0, 0], "without_letters": 0},
    }
    assert json.loads(json.dumps(scores)) == scores
    for wrong in (answers[1:], []):
        with pytest.raises(ValueError, match=f"{len(wrong)} answers to 30 questions"):
            score_answers(questions, wrong)
    with pytest.raises(ValueError, match="0 answers to 0 questions"):
        score_answers([], [])


def test_a_better_model_is_told_from_an_equal_one(tmp_path: Path):
    questions = load_questions(benchmark(tmp_path / "benchmark", items=40))
    dice = random.Random(3)

    def answers(share: float) -> list[str]:
        return [question.gold if dice.random() < share else "无" for question in questions]

    bad, alike, good = answers(0.3), answers(0.3), answers(0.5)
    better, worse = compare_answers(questions, bad, good), compare_answers(questions, good, bad)
    assert better["p"] == 0.001 and better["difference"] > 10 and better["difference_interval"][0] > 0
    assert (worse["difference"], worse["p"], worse["gained"]) == (-better["difference"], 0.001, better["lost"])
    right = [sum(own == question.gold for own, question in zip(each, questions, strict=True)) for each in (bad, good)]
    assert better["gained"] - better["lost"] == right[1] - right[0]
    assert compare_answers(questions, bad, alike)["p"] > 0.05
    same = compare_answers(questions, good, good)
    assert (same["difference"], same["p"], same["gained"], same["lost"]) == (0, 1, 0, 0)
    with pytest.raises(ValueError, match="399 answers to 400 questions"):
        compare_answers(questions, bad, good[1:])


def test_what_was_written_is_read_back_whatever_the_answers_hold(small: Path, tmp_path: Path):
    questions = load_questions(small)
    answers = [f'{question.gold},"；\r\n\n,"\ud800 \x01 =1+1' for question in questions]
    answers[0] = ""
    written = write_results(tmp_path / "new/folder", questions, answers)
    assert sorted(tmp_path.rglob("*.csv")) == sorted([*small.rglob("*.csv"), *written])
    scored = [score_file(path, small / "objective") for path in written]
    # Longer answers than nine characters have no written out option: all their letters count.
    assert sum(each["correct"] for each in scored) == score_answers(questions, answers)["correct"] == 29
    assert rows_of(written[0])[1]["model_output"] == answers[1].replace("\ud800", "?")
    with pytest.raises(ValueError, match="1 answers to 30 questions"):
        write_results(tmp_path, questions, ["A"])


def test_a_full_disk_leaves_the_answers_that_were_there(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    questions = load_questions(small)
    before = {path: path.read_bytes() for path in write_results(tmp_path / "run", questions, ["A"] * 30)}

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_results(tmp_path / "run", questions, ["B"] * 30)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


# --- the open questions


def page_of(count: int = 3, text: str = "短") -> str:
    questions = [OpenQuestion(n, f"问{n}：{text}", f"参考{n}：{text}") for n in range(1, count + 1)]
    before, after = ([f"{name}{n}：{text}" for n in range(1, count + 1)] for name in ("先", "后"))
    return render(
        f"tuned {text}", questions, [ModelAnswers("before: base", before), ModelAnswers(f"after: {text}", after)]
    )


@needs_release
def test_the_open_questions_are_those_of_the_release_and_all_are_shown():
    questions = open_questions(RELEASED)
    assert len(questions) == 300 == len({question.number for question in questions})
    answers = [ModelAnswers("before", ["先"] * 300), ModelAnswers("after", ["后"] * 300)]
    text = Page(render("page", questions, answers, "greedy")).text
    assert "300 open questions" in text and "Answers: greedy." in text
    assert text.count("reference") >= 300 and (text.count("先"), text.count("后")) >= (300, 300)
    for question in questions:
        assert question.text.strip() in text and question.reference.strip() in text


def test_each_question_stands_with_its_reference_and_every_answer_to_it(small: Path):
    questions = open_questions(small)
    assert questions[1] == OpenQuestion(2, "问2？", "答2。")
    before = ModelAnswers("before: base", ["先1", "先2", "先3"])
    after = ModelAnswers("after: tuned", ["后1", " \n", "后3"])
    text = Page(render("page", questions, [before, after])).text
    order = "1问1？reference答1。before: base先1after: tuned后1"
    assert text.replace("\n", "").endswith(
        order + "2问2？reference答2。before: base先2after: tuned(no answer)" + order.replace("1", "3")
    )
    assert "答1。" in render("page", questions, []), "the benchmark alone can be shown, too"
    with pytest.raises(ValueError, match="2 answers by after: tuned to 3 questions"):
        render("page", questions, [before, replace(after, texts=["", ""])])


def test_the_page_comes_alone_and_hostile_text_stays_text():
    html = page_of(text=HOSTILE)
    assert_fenced(html)
    page = Page(html)
    assert not {"script", "img", "link", "iframe", "object"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert not re.search("[\x00-\x08\x0b-\x1f]", html) and not re.search(r"@import|url\(", html)
    # The title twice, and with each question four texts and a name.
    assert page.text.count(HOSTILE.replace("\0", "\ufffd")) == 2 + 3 * 5
    ids = [value for name, value in page.attributes if name == "id"]
    targets = [value[1:] for name, value in page.attributes if name == "href"]
    assert len(set(ids)) == len(ids) == 3 and targets == ids
    assert html == page_of(text=HOSTILE)


@pytest.mark.parametrize(
    "records",
    [
        *("not JSON", "{}", "[]", "[1]", "null", b"\xff\xfe", '[{"input": "问"}]'),
        '[{"input": "问", "output": 1, "id": 1}]',
        json.dumps([{"input": "问", "output": "答", "id": 1}] * 2),
    ],
)
def test_open_questions_not_as_released_are_refused(small: Path, records: str | bytes):
    path = small / "subjective/qa_short_answer.json"
    path.write_bytes(records if isinstance(records, bytes) else records.encode())
    with pytest.raises(UserError, match="is not a list of questions with input, output and an id"):
        open_questions(small)
    path.unlink()
    with pytest.raises(UserError, match=r"cannot be read .*: name a folder of DISC-Law-Eval"):
        open_questions(small)


_COLUMNS = "[...document.querySelectorAll('#open-1 dl > div')].map(e => Math.round(e.getBoundingClientRect().left))"


@pytest.mark.whole
def test_answers_stand_side_by_side_on_a_desk_and_stacked_on_a_phone(tmp_path: Path):
    with browser() as reader:
        for name, text in (("plain", "短"), ("long", "我" * 800 + "x" * 3000), ("hostile", HOSTILE)):
            path = tmp_path / f"{name}.html"
            path.write_text(page_of(text=text), encoding="utf-8")
            for width, columns in ((360, 1), (1200, 3)):
                seen = {dark: reader.open(path, width=width, dark=dark) for dark in (False, True)}
                for look in seen.values():
                    assert look.complaints == [] and look.fetched == []
                    assert look.page_width <= width and look.outside == []
                assert brightness(seen[False].ground) > 3 * brightness(seen[False].ink)
                assert brightness(seen[True].ink) > 3 * brightness(seen[True].ground) > 0
                lefts = reader._ask("Runtime.evaluate", expression=_COLUMNS, returnByValue=True)["result"]["value"]
                assert len(lefts) == 3 and len(set(lefts)) == columns, (name, width, lefts)
