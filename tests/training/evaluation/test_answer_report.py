"""The report of a model that answers questions: what it tells, what it keeps out, and what a browser makes of it."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from typing import Any

import pytest

from tests.support.browser import browser
from tests.support.pages import HOSTILE, Page, Poison, assert_fenced, make_session
from training.evaluation.answers.before_after import scores_of
from training.evaluation.answers.losses import compare_losses, loss_by_task
from training.evaluation.answers.report import (
    FOLDED,
    SYNTHETIC,
    AnsweredQuestion,
    content_of,
)
from training.evaluation.answers.scores import compare_tasks, score_answers
from training.report.page import render
from training.report.training_history import standing


def rendered(report: dict[str, Any]) -> str:
    return render("answers", {**content_of(report)["content"], "standing": standing(report)})


def shown(report: dict[str, Any]) -> str:
    """The text of the page, blanks that no line ends at being blanks like others."""
    return Page(rendered(report)).text.replace("\N{NO-BREAK SPACE}", " ")


TASKS = ["exam"] * 30 + ["op_sum"] * 30
REFERENCES = ["A. 甲\n解析：略"] * 30 + ["判决驳回原告全部诉讼请求。"] * 30
BEFORE = ["我选B"] * 20 + ["A"] * 10 + ["驳回。"] * 30
AFTER = ["A"] * 29 + [""] + ["驳回原告诉讼请求。"] * 30


def make_scores() -> dict[str, Any]:
    compared = compare_tasks(*(score_answers(TASKS, answers, REFERENCES) for answers in (BEFORE, AFTER)))
    tokens = [10 + row % 7 for row in range(60)]
    losses = compare_losses(
        loss_by_task(TASKS, [2.0 * count for count in tokens], tokens),
        loss_by_task(TASKS, [(1.5 + row % 3 / 10) * count for row, count in enumerate(tokens)], tokens),
    )
    about = {
        **{"label": "test", "task": "qlora", "part": "test", "step": 600, "weights": "best", "synthetic": False},
        **{"base_model": "Qwen2.5-0.5B-Instruct", "decoding": "greedy, at most 512 tokens"},
        "data_fingerprint": "d" * 64,
    }
    return scores_of(about, compared, losses)


def make_law_side(accuracy: float, exam: str = "NJE") -> dict[str, Any]:
    side = {
        **{"items": 1500, "accuracy": accuracy, "accuracy_interval": [accuracy - 2, accuracy + 2]},
        "without_letters": 13,
    }
    return {**side, "kinds": {"single": side}, "exams": [{"exam": exam, "kind": "single", **side}]}


def make_law_eval(exam: str = "NJE", overlap: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        "before": make_law_side(20.0, exam),
        "after": make_law_side(23.0, exam),
        "compared": {"difference": 3.0, "difference_interval": [1.5, 4.5], "p": 0.002, "gained": 61, "lost": 16},
        "overlap": overlap,
        "open_questions": 300,
        "page": "test-disc-law-eval-open.html",
    }


def make_report() -> dict[str, Any]:
    questions = [
        AnsweredQuestion("exam", "问题：\nA. 甲", "A. 甲", "B", "A", (0, 100)),
        AnsweredQuestion(
            *("jud_doc_sum", "判决书" * 500, "驳回。" * 100, "驳回" * 90, " "),
            scores=(51.25, 0),
            notes=("cut off at the length limit", ""),
        ),
    ]
    train = [
        {"kind": "train", "step": step, "epoch": step / 100, "loss": 9 / step, "lr": 1e-3, "tokens_per_s": 5000.0}
        | {"padding_share": 0.0123, "memory_mb": 1234.0, "time": 1.7e9 + step}
        for step in range(10, 601, 10)
    ]
    counts = {"records": 300, "duplicates": 17, "too_short": 3, "truncated": 5, "train": 270, "test": 30}
    return {
        "name": "qlora-sample",
        "scores": make_scores(),
        "data": {
            "format": "relay-conversations-1",
            "fingerprint": "f" * 64,
            "source": {
                **{"place": "disc-law-sft", "licence": "Apache-2.0"},
                "files": [{"name": "Pair.jsonl", "bytes": 346801238, "sha256": "a" * 64, "published": True}],
            },
            "counts": {
                **{"blank": 7, "malformed": 11, "malformed_listed": [{"line": 987654}], **counts},
                "tasks": {"exam": counts, "op_sum": {**counts, "duplicates": 19}},
            },
            "tokenizer": {"sha256": "b" * 64},
            "questions": ["not-shown-uid"],
            "lengths": {"exam": 31337},
        },
        "checkpoint": {
            "config": {"run_dir": "runs/qlora", "seed": 1234, "checkpoint": {"every_steps": 100}},
            "data": {"fingerprint": "e" * 64},
            "files": {"model.safetensors": {"sha256": "1" * 64}},
        },
        "config": {"checkpoint": {"every_steps": 100, "hours_between_kills": 24}},
        "save_every": 100,
        "status": {"status": "finished", "reason": "all 600 steps were done", "step": 600, "steps": 600},
        "parameters": 494_032_768,
        "trained_parameters": 8_798_208,
        "questions": questions,
        "examples": [replace(questions[0], question="例题", scores=(12.34, 56.78))],
        "metrics": [*train, {"kind": "validation", "step": 600, "loss": 3.0, "accuracy": 0.4, "time": 1.7e9}],
        "sessions": [make_session(1, 0, 600, "all 600 steps were done", saves=4, stall_s=0.012, save_s=0.5)],
        "versions": {"torch, training": "2.13.0"},
        "law_eval": make_law_eval(),
    }


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return make_report()


def test_the_page_tells_all_of_the_run(report):
    text = shown(report)
    exam, summary = report["scores"]["tasks"]
    macro, losses = report["scores"]["macro_average"], report["scores"]["losses"]
    for expected in (
        # summary
        *(
            "qlora-sample: Qwen2.5-0.5B-Instruct before and after training",
            "step 600 (best), greedy, at most 512 tokens",
        ),
        *("test part, 60 questions of 2 tasks", "494,032,768 parameters, 8,798,208 trained", "1 session, 2h00m in all"),
        f"{macro['after']['score']:.2f} (",
        "better after training, p = 0.001",
        # scores: each with metric, items, intervals, the difference with p, what is exact and in what form
        "examaccuracy3033.33 (16.67 to 50.00)96.67 (90.00 to 100.00)+63.33 (",
        f"{exam['p']:.3f}10 / 2920 / 10 / 1",
        f"op_sumROUGE-L30{summary['before']['score']:.2f} (",
        f"mean of the tasks60{macro['before']['score']:.2f} (",
        *("accuracy: exam", "exactly the letters", "two-sided paired bootstrap"),
        # perplexity
        f"all tasks60{losses[-1]['tokens']:,}7.39 (7.39 to 7.39){losses[-1]['after']['perplexity']:.2f} (",
        f"{losses[-1]['difference']:+.4f} (",
        # questions and examples
        *(
            "2 held-out questions",
            "1,500 characters",
            "驳回" * 90,
            "score 51.2; cut off at the length limit",
            "(empty)",
        ),
        *("1 rows of the test part drawn by a fixed seed (1234)", "例题", "score 12.3", "score 56.8"),
        # DISC-Law-Eval, training, sessions
        *(
            "23.00 (21.00 to 25.00)",
            "Answers to the 300 open questions",
            "5,000 tokens/s",
            "node7 (job 4711)",
            "all 600 steps were done",
        ),
        # data: rows by part and task, what was left out, licence and hashes
        *("exam3001735270", "op_sum3001935270", "all6003661054060", "counts, malformed11", "too short", "truncated"),
        *(
            "source, licenceApache-2.0",
            "source, files 1name Pair.jsonl; bytes 346,801,238; sha256 aaa",
            "published True",
        ),
        *("a" * 64, "b" * 64, "e" * 64, "f" * 64, "1" * 64, "seed: 1234", "2.13.0"),
    ):
        assert expected in text, expected
    for kept_out in ("not-shown-uid", "31,337", "987,654"):
        assert kept_out not in text


def test_the_page_comes_alone_and_the_same_every_time(report):
    html = rendered(report)
    assert html == rendered(make_report())
    assert_fenced(html)
    page = Page(html)
    assert not {"script", "link", "iframe", "object", "img"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    ids = [value for name, value in page.attributes if name == "id"]
    links = [value for name, value in page.attributes if name == "href"]
    links.remove("evaluation/test-disc-law-eval-open.html")
    assert len(ids) == len(set(ids)) and {link[1:] for link in links} == set(ids) and len(ids) == 10
    assert not re.search(r"@import|url\((?!#)", html)


def test_a_long_text_is_folded_and_stands_in_the_page_in_full(report):
    short, long = "甲" * FOLDED, "乙" * (FOLDED + 1)
    question = replace(report["questions"][0], question=short, reference=long)
    html = rendered({**report, "questions": [question], "examples": []})
    assert html.count("<details>") == 1 and "161 characters" in html
    assert html.count(short) == 1 and html.count(long) == 1 and html.count(long[:FOLDED]) == 2


def poisoned(report: dict[str, Any], poison: Poison) -> dict[str, Any]:
    """The report with hostile texts in all fields."""

    def into(value: Any, place: str) -> Any:
        if isinstance(value, AnsweredQuestion):
            return AnsweredQuestion(*(into(getattr(value, f.name), f"{place}.{f.name}") for f in fields(value)))
        if isinstance(value, list) and value and isinstance(value[0], AnsweredQuestion):
            return [into(each, f"{place} {number}") for number, each in enumerate(value)]
        return poison.into(value, place)

    changed = {name: into(value, name) for name, value in report.items()}
    changed["versions"] = {poison.text("version's name"): poison.text("version")}
    changed["data"][poison.text("fact's name")] = poison.text("fact")
    changed["data"]["counts"]["tasks"] = {poison.text("task's name"): {poison.text("count's name"): 1}}
    changed["checkpoint"]["files"] = {poison.text("file's name"): {"sha256": poison.text("file's hash")}}
    return changed


def test_hostile_text_stays_text_in_every_field(report):
    poison = Poison()
    html = rendered(poisoned(report, poison))
    page = Page(html)
    assert not {"script", "img"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert page.text.count("<script>alert(1)</script>") > len(poison.places) / 2
    # What is not shown, or was replaced above, or is quoted by YAML.
    kept_out = {place for place in poison.missing_in(page.text) if not place.startswith("checkpoint.")}
    assert {re.sub(r"\.references_sha256$", "", place) for place in kept_out} == {
        *("scores.label", "scores.task", "scores.data_fingerprint", "scores.tasks"),
        *("sessions.started", "sessions.seen", "sessions.ended", "data.questions", "versions.torch, training"),
        *("law_eval.after.exams.exam", "law_eval.after.exams.kind", "law_eval.page"),
    }
    name_alone = HOSTILE.replace("\0", "\ufffd").replace("/", "")  # which leads to no other folder
    assert [value for name, value in page.attributes if name == "href" and name_alone in value]


def test_a_script_in_an_answer_is_shown_as_it_was_written(report):
    question = replace(report["questions"][0], after="<script>alert('甲')</script>\n</td>")
    html = rendered({**report, "questions": [question]})
    assert "&lt;script&gt;alert(&#39;甲&#39;)&lt;/script&gt;\n&lt;/td&gt;" in html and "<script" not in html


def test_a_run_without_a_record_has_a_report_all_the_same(report):
    bare = {**report, "metrics": [], "sessions": [], "questions": [], "examples": [], "law_eval": None}
    text = shown(bare)
    assert "metrics.jsonl has no training steps" in text
    for section in ("Sessions", "Before and after", "Random examples", "DISC-Law-Eval"):
        assert section not in text


def test_what_training_made_worse_or_did_not_change_is_called_so(report):
    def summary(**macro: float) -> str:
        scores = {**report["scores"], "macro_average": {**report["scores"]["macro_average"], **macro}}
        return re.search("mean score(.*?)perplexity", shown({**report, "scores": scores}), re.S)[1]

    assert "worse after training, p = 0.010" in summary(difference=-3.0, p=0.01)
    assert "no difference can be told at p < 0.05 (p = 0.300)" in summary(difference=3.0, p=0.3)
    assert "perplexity7.39 (7.39 to 7.39) before" in shown(report)
    assert "after: better after training" in re.search("perplexity(.*?)scored on", shown(report), re.S)[1]


def test_synthetic_data_gets_a_banner_and_real_data_none(report):
    assert SYNTHETIC not in rendered(report)
    assert SYNTHETIC in rendered({**report, "scores": {**report["scores"], "synthetic": True}})


def test_disc_law_eval_is_shown_by_exam_and_kind_with_the_test(report):
    def shown_with(overlap: dict[str, Any] | None) -> str:
        return shown({**report, "law_eval": make_law_eval(exam=HOSTILE, overlap=overlap)})

    text = shown_with(None)
    assert "was not looked at" in text and "all but" not in text
    less = {"difference": 1.0, "difference_interval": [-0.5, 2.5], "p": 0.2, "gained": 61, "lost": 16}
    without = {"before": make_law_side(19.0), "after": make_law_side(20.0), "compared": less}
    text = shown_with({"questions": 37, "without": without})
    assert "all1,50020.00 (18.00 to 22.00)23.00 (21.00 to 25.00)+3.0013 / 13" in text
    assert "all of single choice" in text and "single choice1,500" in text and "<script>alert(1)" in text
    assert "all but those in the training data1,50019.00 (17.00 to 21.00)20.00 (18.00 to 22.00)+1.00" in text
    assert "37 of the 1,500 questions share 20 characters in a row or more with the training data. Without" in text
    assert "+1.00 (-0.50 to +2.50): no difference can be told at p < 0.05 (p = 0.200)" in text
    nothing = shown_with({"questions": 0, "without": None})
    assert "0 of the 1,500 questions share" in nothing and "all but" not in nothing
    assert (
        "+3.00 (+1.50 to +4.50): better after training, p = 0.002." in text and "61 answers have become right" in text
    )


@pytest.mark.whole
def test_a_reader_sees_the_page_as_meant_on_a_phone_and_a_desk(report, tmp_path):
    wide = replace(
        report["questions"][0],
        task="t" * 60,
        question="q" * 3000,
        reference="x" * 150,
        before="y" * 900,
        after="我" * 150,
    )
    long = {
        **{**report, "name": "n" * 500, "versions": {"v" * 300: "w" * 3000}},
        **{"questions": [wide], "examples": [wide]},
    }
    pages = {"plain": report, "long": long, "hostile": poisoned(report, Poison())}
    with browser() as reader:
        for name, each in pages.items():
            path = tmp_path / f"{name}.html"
            # Opened, so that what is folded is seen to fit, too.
            for state in ("<details>", "<details open>"):
                path.write_text(rendered(each).replace("<details>", state), encoding="utf-8")
                for width in (360, 1200):
                    look = reader.open(path, width=width, dark=width == 360)
                    assert look.complaints == [] and look.fetched == []
                    assert look.page_width <= width and look.outside == []
