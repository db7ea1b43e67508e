"""Scores of generated answers: known values by hand for every form of answer, and tests that are right about chance."""

from __future__ import annotations

import json
import os
import random
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from data_prep.disc_law_records import TASK_NAMES
from tests.support.commands import ROOT
from tests.support.growth import assert_linear
from training.data.answer_metrics import (
    CASE,
    ENTITY_F1,
    LABEL,
    LABEL_F1,
    LETTERS,
    ROUGE_L,
    SPAN_F1,
    TASKS,
    common_subsequence,
    entities,
    mean_of_tasks,
    metric_of,
    named_labels,
    nearer_case,
    options_chosen,
    rouge_l,
    rows_by_task,
)
from training.evaluation import bootstrap
from training.evaluation.answers.before_after import scores_of
from training.evaluation.answers.losses import ALL_TASKS, compare_losses, loss_by_task
from training.evaluation.answers.scores import TaskScore, compare_tasks, score_answers, score_task
from training.evaluation.bootstrap import paired, seed_for

REAL_LAW = Path(os.environ.get("RELAY_DATA", ROOT.parent / "shared/data")) / "disc-law-sft"


def score(task: str, answer: str, reference: str) -> tuple[float, bool, bool]:
    """Of one answer: the score, whether it says exactly the same, and whether it is in the form of the task."""
    scored = score_task(task, [answer], [reference])
    return round(scored.value, 2), scored.exact == 1, scored.format_errors == 0


# --- free text


def plain_common_subsequence(one: str, other: str) -> int:
    row = [0] * (len(other) + 1)
    for sign in one:
        before = row[:]
        for place, wanted in enumerate(other, 1):
            row[place] = before[place - 1] + 1 if sign == wanted else max(before[place], row[place - 1])
    return row[-1]


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence_of_characters():
    assert rouge_l("甲乙丙丁", "甲丙丁戊己庚") == pytest.approx(2 * 3 / (4 + 6))
    assert (rouge_l("甲", "甲"), rouge_l("甲", "乙"), rouge_l("", "甲"), rouge_l("甲", ""), rouge_l("", "")) == (
        1,
        0,
        0,
        0,
        1,
    )
    # Full-width forms, blanks, line ends and case make no difference.
    assert rouge_l("根据 ABC，\n判决：１２元", "根据abc,判决:12元\u200b") == 1
    assert rouge_l("乙甲", "甲乙") == 0.5, "order counts"


def test_the_longest_common_subsequence_is_exact():
    dice = random.Random(3)
    for _ in range(300):
        one, other = ("".join(dice.choices("甲乙丙丁", k=dice.randint(0, 90))) for _ in range(2))
        assert common_subsequence(one, other) == plain_common_subsequence(one, other)


def test_rouge_l_of_two_long_texts_takes_milliseconds():
    dice = random.Random(4)
    one, other = ("".join(dice.choices("的一是在不了有和人这中大为上个国我以要他", k=2000)) for _ in range(2))
    began = time.process_time()
    assert 0.3 < rouge_l(one, other) < 0.6
    assert time.process_time() - began < 0.2


# What patterns in a row would begin anew at each of: a piece, and what stands before and behind many of it.
TIRING = [
    *(("letters", piece, begin, "x") for piece in ("A ", "A、", "A", "选A", " ") for begin in ("", "答案")),
    *(("letters", piece, "x", "x") for piece in ("\n", "\n ", "A和", "\n【", "选", "答案")),
    *(("case", piece, begin, "x") for piece in (" ", "的是", "案例", ":", "B") for begin in ("接近", "LABEL", "")),
    *(
        ("labels", piece, begin, "x")
        for piece in (" ", "'a' ", "'a',", "'", "“")
        for begin in ("标签：", "标签：'a'", "")
    ),
    *(("tags", piece, "", end) for piece in ("O ", "B-a", "B-a ", "I-", " ") for end in ("x", "。")),
    *((kind, piece, "", "") for kind in ("text", "span", "label") for piece in ("Ⅷ", "的一", " ", "\u0301\u0323")),
]
METRICS = {
    **{
        "letters": (LETTERS, "A"),
        "case": (CASE, "B"),
        "labels": (LABEL_F1, "标签：'甲', '乙'"),
        "tags": (ENTITY_F1, "B-x O"),
    },
    **{"text": (ROUGE_L, "判决驳回"), "span": (SPAN_F1, "判决"), "label": (LABEL, "劳动纠纷")},
}


@pytest.mark.parametrize("kind", METRICS)
def test_the_time_to_score_an_answer_grows_as_its_length(kind: str):
    metric, reference = METRICS[kind]
    for of, piece, begin, end in TIRING:
        if of == kind:
            assert_linear(lambda answer: metric.items([answer], [reference]), piece, begin=begin, end=end)


def test_texts_without_end_are_compared_by_their_beginning():
    dice = random.Random(5)
    one, other = ("".join(dice.choices("的一是在不了有和人", k=400_000)) for _ in range(2))
    began = time.process_time()
    assert 0.3 < rouge_l(one, other) < 0.8
    assert time.process_time() - began < 3


def test_free_text_has_one_format_error_only_being_empty():
    assert score("op_sum", "判决驳回", "判决驳回。") == (88.89, False, True)
    assert score("op_sum", " \n", "判决驳回。") == (0, False, False)
    assert score("sent_pred", "判处罚金。", "判处 罚金。") == (100, True, True)


# --- spans, labels, letters, JSON, tags


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("办理购车贷款", (100, True, True)),
        ("“办理购车贷款。”", (100, True, True)),
        ("购车贷款", (80, False, True)),  # 4 of 4 said, 4 of 6 wanted
        ("办理购车贷款办理购车贷款", (66.67, False, True)),  # said twice, so half of it is too much
        ("理由是办理购车贷款", (80, False, True)),
        ("骗钱", (0, False, True)),
        ("", (0, False, False)),
    ],
)
def test_spans_are_scored_by_their_characters(answer: str, expected: tuple[float, bool, bool]):
    assert score("jud_read_compre", answer, "办理购车贷款") == expected


def labelled(answer: str) -> tuple[float, bool, bool]:
    """Of an answer whose reference is 盗用风险, 资金风险 being known from another reference."""
    scored = score_task("leg_case_cls", [answer, "资金风险"], ["盗用风险", "资金风险"])
    assert scored.of_items()[1] == 100
    return scored.of_items()[0], scored.exact == 2, scored.format_errors == 0


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("盗用风险", (100, True, True)),
        (" “盗用风险”。\n", (100, True, True)),
        ("资金风险", (0, False, True)),
        ("合同风险", (0, False, True)),  # a label that no reference has
        ("该文本反映了盗用风险，因为有人盗用账号。", (100, True, False)),
        ("既有盗用风险，也有资金风险。", (0, False, False)),  # who names all has not decided
        ("重大盗用风险", (0, False, True)),  # another label, of which the right one is a part
        ("这段文字里面没有反映任何一种风险。", (0, False, False)),
        ("", (0, False, False)),
    ],
)
def test_a_label_is_found_in_a_sentence_and_the_form_told(answer: str, expected: tuple[float, bool, bool]):
    assert labelled(answer) == expected


def test_a_label_within_another_ones_name_is_not_named():
    labels = {"子女抚养", "限制行为能力子女抚养", "乙", ""}
    assert named_labels("涉及限制行为能力子女抚养", labels) == ["限制行为能力子女抚养"]
    assert named_labels("涉及限制行为能力子女抚养和子女抚养、子女抚养", labels) == ["限制行为能力子女抚养", "子女抚养"]


REFERENCE_LABELS = "标签：'婚后有子女', '限制行为能力子女抚养'"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (REFERENCE_LABELS, (100, True, True)),
        ("标签：'限制行为能力子女抚养', '婚后有子女'", (100, True, True)),  # a set has no order
        ("标签：'婚后有子女', '婚后有子女'", (66.67, False, True)),  # nor anything twice: 1 of 1, 1 of 2
        ("标签：'婚后有子女'", (66.67, False, True)),
        ("标签：'婚后有子女', '限制行为能力子女抚养', '离婚', '财产'", (66.67, False, True)),  # 2 of 4, 2 of 2
        ("标签:'有子女'", (0, False, True)),
        ("标签：", (0, False, True)),
        ("标签：婚后有子女、离婚", (50, False, False)),  # 1 of 2, 1 of 2
        ('["婚后有子女", "限制行为能力子女抚养"]', (100, True, False)),
        ("“本院应予支持”的标签：‘婚后有子女’", (66.67, False, False)),  # what is quoted before is the text
        ("该片段属于婚后有子女和限制行为能力子女抚养。", (100, True, False)),
        ("无法判断", (0, False, False)),
        ("", (0, False, False)),
    ],
)
def test_label_lists_are_scored_as_sets(answer: str, expected: tuple[float, bool, bool]):
    assert score("leg_eve_detec", answer, REFERENCE_LABELS) == expected


def test_the_label_score_of_a_task_is_of_all_labels_together():
    references = ["标签：'甲'", "标签：'乙', '丙', '丁'", "标签："]
    scored = score_task("leg_eve_detec", ["标签：'甲'", "标签：'戊'", "标签："], references)
    assert scored.value == pytest.approx(100 * 2 * 1 / (2 + 4)), "not the mean of 100, 0 and 100"
    assert (scored.of_items(), scored.exact) == ([100, 0, 100], 2)


@pytest.mark.parametrize(
    ("answer", "letters", "in_form"),
    [
        ("B. 可以作出承诺\n解析：选项A错误，因此选B。", "B", True),
        ("AC", "AC", True),
        ("Ａ、Ｃ．两项", "AC", True),
        ("A. 甲\nC. 乙\n解析：B. 丙是错误的", "AC", True),
        ("D", "D", True),
        ("答案：B", "B", False),
        ("正确答案是A、B、D。", "ABD", False),
        ("选项A错误，选项C正确，因此应选C", "C", False),
        ("A选项不正确，B选项正确", "B", False),
        ("首先看A和B。不选A，故选择B。", "B", False),
        ("不正确的是A，所以答案为B", "B", False),
        ("有人会选A，但是错了；因此答案为B。", "B", False),
        ("根据法律，应为C。", "C", False),
        ("A公司应当承担责任，B公司不应当。", "", False),
        ("我不知道。", "", False),
        ("", "", False),
    ],
)
def test_the_letters_of_an_exam_answer_are_read(answer: str, letters: str, in_form: bool):
    assert options_chosen(answer) == (frozenset(letters), in_form)


def test_an_exam_answer_is_right_with_exactly_the_letters_of_the_reference():
    assert score("exam", "B", "B. 可以\n解析：略") == (100, True, True)
    assert score("exam", "BC. 可以", "B. 可以\n解析：略") == (0, False, True)
    assert score("exam", "故选B", "B. 可以\n解析：略") == (100, True, False)
    # A reference without letters: as text. No letters in the answer is no match with none in the reference.
    odd = score_task("exam", ["不知道", "略"], ["略", "略"])
    assert (odd.of_items(), odd.odd_references) == ([0, 100], 2)


@pytest.mark.parametrize(
    ("answer", "case", "in_form"),
    [
        ('{"LABEL":"C"}', "C", True),
        (' {"LABEL": "B"}\n', "B", True),
        ("{'LABEL': 'C'}", "C", False),
        ("{'LABEL': C}", "C", False),
        ('```json\n{"LABEL":"C"}\n```', "C", False),
        ('{"LABEL":"C"} 因为案例B与A不同。', "C", False),
        ('{"LABEL":"C", "A": "B"}', "C", False),
        ('{"LABEL":"C"', "C", False),
        ("A更接近于案例C，而不是案例B。", "C", False),
        ("C", "C", False),
        ("{'LABEL': B_C}", None, False),
        ('{"LABEL":"B"} {"LABEL":"C"}', None, False),
        ("案例B和案例C都是借款纠纷", None, False),
        ('{"LABEL":"A"}', None, False),
        ("[" * 100_000, None, False),
        ("", None, False),
    ],
)
def test_the_case_is_found_in_what_should_be_json(answer: str, case: str | None, in_form: bool):
    assert nearer_case(answer) == (case, in_form)
    assert score("sim_case_match", answer, '{"LABEL":"C"}') == (100 * (case == "C"), case == "C", in_form)


def test_tags_become_entities():
    assert entities(["O", "B-data", "I-data", "O", "B-data", "B-data", "I-data"]) == {
        ("data", 1, 3),
        ("data", 4, 5),
        ("data", 5, 7),
    }
    assert entities(["B-data", "I-share", "I-share", "O", "I-data"]) == {
        ("data", 0, 1),
        ("share", 1, 3),
        ("data", 4, 5),
    }
    assert entities(["S-data", "I-data", "S", "O", "S"]) == {("data", 0, 1), ("data", 1, 2), ("", 2, 3), ("", 4, 5)}
    assert entities(["O"]) == entities([]) == set()


TAGS = "O B-data I-data O B-share I-share O"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (TAGS, (100, True, True)),
        ("O B-data I-data O B-share O O", (50, False, True)),  # 1 of 2, 1 of 2
        ("O B-data I-share I-data O O O", (0, False, True)),  # a data that ends too soon, and two that nobody wanted
        ("O B-share I-share O B-data I-data O", (0, False, True)),  # the places without the kinds
        ("O O O O O O O", (0, False, True)),
        (f"标注结果：\n{TAGS}", (100, True, False)),
        (TAGS.replace(" ", ","), (100, True, False)),
        (f"{TAGS} O", (100, False, False)),  # one tag too many
        (TAGS[2:], (0, False, False)),  # one lost at the start: every place is wrong
        ("我不会标注。", (0, False, False)),
        ("", (0, False, False)),
    ],
)
def test_tags_are_scored_by_the_entities_that_they_make(answer: str, expected: tuple[float, bool, bool]):
    assert score("leg_ele_extra", answer, TAGS) == expected


def test_where_nothing_is_to_be_tagged_whoever_tags_is_wrong():
    assert score("leg_ele_extra", "O", "O") == (100, True, True)
    assert score("leg_ele_extra", "S-data", "O") == (0, False, True)
    both = score_task("leg_ele_extra", ["O", "B-data O"], ["O", "B-data O"])
    assert both.value == 100 and both.exact == 2


# --- all tasks


def test_every_task_of_prepared_data_has_a_metric_of_its_own():
    assert set(TASK_NAMES) == TASKS.keys()


def test_an_unknown_task_is_free_text_and_known_ones_keep_their_order():
    assert metric_of("something_new").name == "ROUGE-L" == metric_of("legal_question_answering").name
    assert rows_by_task(["z", "exam", "a", "jud_read_compre", "exam"]) == {
        **{"jud_read_compre": [3], "exam": [1, 4]},
        **{"a": [2], "z": [0]},
    }
    with pytest.raises(ValueError, match="exam: 1 answers for 2 references"):
        score_task("exam", ["A"], ["A", "B"])
    with pytest.raises(ValueError, match="2 tasks, 1 answers and 2 references"):
        score_answers(["exam", "exam"], ["A"], ["A", "B"])
    with pytest.raises(ValueError, match="0 answers"):
        score_task("exam", [], [])


def real_records() -> tuple[list[str], list[str]]:
    """The tasks and outputs of all real records at hand."""
    if not REAL_LAW.is_dir():
        pytest.skip(f"the real DISC-Law-SFT records are not in {REAL_LAW} (RELAY_DATA names the folder above it)")
    tasks, outputs = [], []
    for path in sorted(REAL_LAW.glob("*.jsonl")):
        for line in path.read_bytes().splitlines():
            record = json.loads(line)
            kind = (record["id"] or "judgement_predit-").rstrip("0123456789").rstrip("-_")
            question = "legal_question_answering" + "_reference" * ("Triplet" in path.name)
            names = {"judgement_predit": "judgement_predict", "legal_question_answering": question}
            tasks.append(names.get(kind, kind))
            outputs.append(record["output"])
    return tasks, outputs


def test_real_references_against_themselves_are_right_in_every_task():
    tasks, outputs = real_records()
    scores = score_answers(tasks, outputs, outputs)
    assert scores.keys() == TASKS.keys()
    for task, scored in scores.items():
        assert (scored.value, scored.interval) == (pytest.approx(100), (pytest.approx(100), pytest.approx(100))), task
        assert (scored.exact, scored.format_errors, scored.odd_references) == (scored.items, 0, 0), task


def test_real_references_of_other_questions_score_low():
    tasks, outputs = real_records()
    rows = rows_by_task(tasks)
    for task in ("legal_question_answering", "judgement_predict"):
        own = [outputs[row] for row in rows[task]]
        assert score_task(task, own[1:] + own[:1], own).value < 35


GOLD = {
    "jud_read_compre": ["办理购车贷款", "二〇一二年", "被告人兰某"],
    "leg_ele_extra": ["B-data I-data O O", "O B-share O O", "O O S-purpose O"],
    "leg_eve_detec": ["标签：'甲', '乙'", "标签：'丙'", "标签：'丁', '戊'"],
    "exam": ["A. 一", "B. 二", "CD. 三"],
    "leg_case_cls": ["盗用风险", "资金风险", "合同风险"],
    "sim_case_match": ['{"LABEL":"B"}', '{"LABEL":"C"}', '{"LABEL":"B"}'],
}


@pytest.mark.parametrize("task", GOLD)
def test_references_of_other_items_score_low_in_every_form(task: str):
    gold = GOLD[task]
    assert score_task(task, gold, gold).value == 100
    assert score_task(task, gold[1:] + gold[:1], gold).value <= 34


# --- significance


def exams(right: list[bool]) -> TaskScore:
    return score_task("exam", ["A" if each else "B" for each in right], ["A"] * len(right))


def with_share(share: float, count: int, dice: random.Random) -> list[bool]:
    return [dice.random() < share for _ in range(count)]


def test_equal_systems_are_not_told_apart_and_a_clearly_better_one_is():
    dice = random.Random(1)
    worse, better = with_share(0.4, 150, dice), with_share(0.7, 150, dice)
    texts = ["甲" * 10 + "乙" * length for length in range(60)]
    first = {"exam": exams(worse), "op_sum": score_task("op_sum", ["甲"] * 60, texts)}
    second = {"exam": exams(better), "op_sum": score_task("op_sum", ["甲甲"] * 60, texts)}
    same = compare_tasks(first, first)
    assert [task.test.p for task in same.tasks] == [1, 1] and same.macro.p == 1 and same.macro.difference == 0
    found = compare_tasks(first, second)
    assert all(task.test.p < 0.05 and task.test.difference > 0 for task in found.tasks)
    low, high = found.macro.difference_interval
    assert found.macro.p < 0.05 and 0 < low < found.macro.difference < high
    assert found.macro.scores[1] == pytest.approx(np.mean([score.value for score in second.values()]))
    mixed = [("exam", "A", "A"), ("op_sum", "甲", "乙"), ("exam", "B", "A"), ("exam", "B", "C"), ("exam", "D", "D")]
    assert mean_of_tasks(*zip(*mixed, strict=True)) == (50 + 0) / 2, "while it trains, too"
    back = compare_tasks(second, first)
    assert back.macro.p == found.macro.p and back.macro.difference == -found.macro.difference
    # The interval is that of the proportion.
    half = 1.96 * 100 * (0.7 * 0.3 / 150) ** 0.5
    assert np.diff(second["exam"].interval)[0] / 2 == pytest.approx(half, rel=0.15)


def test_where_there_is_no_difference_one_is_found_once_in_twenty_times(monkeypatch):
    monkeypatch.setattr(bootstrap, "RESAMPLES", 300)
    dice, found, trials = random.Random(2), 0, 200
    wrong, right = exams([False, True]).counts
    for _ in range(trials):
        both = [with_share(0.5, 60, dice) for _ in range(2)]
        # The comparison's own test alone: intervals and averages over tasks would take four times as long.
        counts = [np.array([right if each else wrong for each in answers]) for answers in both]
        test = paired(metric_of("exam").score, *counts, seed_for("exam"))
        found += test.p < 0.05
    assert 0.015 < found / trials < 0.09
    first, second = map(exams, both)
    assert compare_tasks({"exam": first}, {"exam": second}).tasks[0].test == test


def test_a_handful_of_items_shows_nothing_however_it_turns_out(monkeypatch):
    """Neither one item, which has no spread, nor a dozen tasks of one item each."""
    for count, least in ((1, 1), (3, 0.25), (5, 0.0625)):
        (task,) = compare_tasks({"exam": exams([False] * count)}, {"exam": exams([True] * count)}).tasks
        assert task.test.p == least
    dice, found = random.Random(3), 0
    for _ in range(40):
        monkeypatch.setattr(bootstrap, "RESAMPLES", 1)  # nobody asks for the intervals of single tasks
        first, second = (
            {
                f"task {number}": score_task(f"task {number}", [text], ["甲乙丙丁戊己庚辛"])
                for number, text in enumerate(texts)
            }
            for texts in [["".join(dice.sample("甲乙丙丁戊己庚辛", 4)) for _ in range(12)] for _ in range(2)]
        )
        monkeypatch.setattr(bootstrap, "RESAMPLES", 200)
        found += compare_tasks(first, second).macro.p < 0.05
    assert found <= 8, "the mean of tasks that have one item each"


def test_only_the_same_items_are_compared():
    with pytest.raises(ValueError, match="tasks differ"):
        compare_tasks({"exam": exams([True])}, {"op_sum": score_task("op_sum", ["甲"], ["甲"])})
    with pytest.raises(ValueError, match="exam: not scored against the same references, 1 and 2 items"):
        compare_tasks({"exam": exams([True])}, {"exam": exams([True, True])})
    with pytest.raises(ValueError, match="exam: not scored against the same references"):
        compare_tasks({"exam": exams([True])}, {"exam": score_task("exam", ["A"], ["B"])})


# --- losses


def test_loss_is_nats_over_tokens_and_perplexity_its_exponential():
    found = loss_by_task(["exam", "op_sum", "exam"], [2.0, 30.0, 10.0], [1, 10, 3])
    assert list(found) == ["exam", "op_sum", ALL_TASKS]
    assert (found["exam"].loss, found["op_sum"].loss, found[ALL_TASKS].loss) == (3.0, 3.0, 3.0)
    assert found["exam"].perplexity == pytest.approx(20.0855, abs=1e-3)
    assert (found["exam"].items, found["exam"].tokens, found[ALL_TASKS].tokens) == (2, 4, 14)
    low, high = found["exam"].perplexity_interval
    assert (low, high) == (pytest.approx(np.exp(2)), pytest.approx(np.exp(10 / 3))), "each item alone"
    for wrong in ([float("nan")], [float("inf")]):
        with pytest.raises(ValueError, match="finite"):
            loss_by_task(["exam"], wrong, [1])
    with pytest.raises(ValueError, match="at least one token"):
        loss_by_task(["exam"], [1.0], [0])
    with pytest.raises(ValueError, match="0 tasks"):
        loss_by_task([], [], [])
    assert loss_by_task(["exam"], [5000.0], [1])["exam"].perplexity < float("inf")


def test_losses_are_compared_on_the_same_tokens():
    dice = np.random.default_rng(5)
    tokens = dice.integers(5, 60, 80)
    tasks = ["exam"] * 40 + ["op_sum"] * 40
    before = tokens * dice.normal(2.5, 0.3, 80)
    after = before - tokens * dice.normal([0.2] * 40 + [0.0] * 40, 0.1)
    exam, summary, everything = compare_losses(loss_by_task(tasks, before, tokens), loss_by_task(tasks, after, tokens))
    assert exam.test.p < 0.01 and exam.test.difference == pytest.approx(-0.2, abs=0.05)
    assert summary.test.p > 0.05 and everything.test.p < 0.05
    assert [
        each.test.p for each in compare_losses(loss_by_task(tasks, before, tokens), loss_by_task(tasks, before, tokens))
    ] == [1] * 3
    with pytest.raises(ValueError, match="exam: the two losses are not of the same tokens"):
        compare_losses(loss_by_task(["exam"], [1], [1]), loss_by_task(["exam"], [1], [2]))


def test_an_evaluation_as_json_says_everything_that_was_measured():
    before, after = {"exam": exams([False, True])}, {"exam": exams([True, True])}
    losses = compare_losses(loss_by_task(["exam"], [8.0], [4]), loss_by_task(["exam"], [4.0], [4]))
    found = scores_of({"label": "test", "step": 600}, compare_tasks(before, after), losses)
    assert json.loads(json.dumps(found)) == found
    assert (found["label"], found["step"], found["items"]) == ("test", 600, 2)
    (task,) = found["tasks"]
    assert task["before"] == {"score": 50.0, "interval": [0.0, 100.0], "exact": 1, "format_errors": 0, "empty": 0}
    assert (task["task"], task["metric"], task["after"]["score"], task["difference"], task["p"]) == (
        *("exam", "accuracy", 100.0),
        *(50.0, 1.0),
    )
    assert found["macro_average"]["difference"] == 50 and found["macro_average"]["after"]["score"] == 100
    assert [loss["task"] for loss in found["losses"]] == ["exam", ALL_TASKS]
    assert found["losses"][0]["before"]["perplexity"] == round(float(np.exp(2)), 3)
    assert found["losses"][0]["difference"] == -1.0


def test_the_same_answers_give_the_same_numbers():
    answers = ["甲乙", "乙丙丁", "丙", "丁戊"]
    references = ["甲", "乙丁", "丙丙", "戊"]
    first, second = (score_task("op_sum", answers, references) for _ in range(2))
    assert first == second and all(low <= high for low, high in pairwise(first.interval))
