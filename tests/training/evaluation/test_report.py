"""A run's report page: what it tells, what it keeps out, and what a browser makes of it."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.browser import browser
from tests.support.pages import Page, Poison, assert_fenced, brightness, make_session
from training.data.languages import language_of
from training.engine.status import Sessions, read_sessions
from training.evaluation.translations.attention_maps import alignment_map, attention_sheet
from training.evaluation.translations.report import (
    RANKED,
    SYNTHETIC,
    Beside,
    Example,
    content_of,
    ranked_rows,
    runs_beside,
)
from training.evaluation.translations.scores import (
    score_by_length,
    score_by_seen,
    score_texts,
    score_with_all_references,
)
from training.report.curves import HEIGHT, WIDTH, Line, curve
from training.report.examples import EXAMPLES, example_rows
from training.report.page import render
from training.report.training_history import standing

SOURCES = ["他是医生。", "他是医生。", "我喜欢读书。", "猫坐在垫子上。", "今天天气很好。", "你好。"] * 5
REFERENCES = ["He is a doctor.", "He's a doctor.", "I like reading.", "The cat sat.", "It is fine today.", "Hello."] * 5
TRANSLATIONS = ["He is a doctor.", "He is a doctor.", "I like to read.", "The cat is.", "Fine day.", "Hi."] * 5

ENGLISH = language_of("en")


def make_scores(split: str = "random", fingerprint: str = "f" * 64) -> dict[str, Any]:
    return {
        "label": "test",
        "task": "gpt",
        "part": "test",
        "split": split,
        "synthetic": False,
        "data_fingerprint": fingerprint,
        "step": 600,
        "weights": "best:5",
        "search": "beam 5, length penalty 1",
        **score_texts(TRANSLATIONS, REFERENCES, ENGLISH),
        "loss": 2.1234,
        "accuracy": 0.4567,
        "target_tokens": 6543,
        "unscored_pairs": 17,
        "empty": 31,
        "cut_off": 3,
        "not_translated": 19,
        "sources_with_unknown_words": 23,
        "translations_with_unknown_words": 29,
        "all_references": score_with_all_references(SOURCES, TRANSLATIONS, REFERENCES, ENGLISH),
        "by_length": score_by_length([4, 4, 6, 7, 16, 2] * 5, TRANSLATIONS, REFERENCES, ENGLISH),
        "by_seen": score_by_seen([True, False] * 15, TRANSLATIONS, REFERENCES, ENGLISH),
    }


def make_report() -> dict[str, Any]:
    tokens = ["<sos>", *"他是医生。", "<sep>", "He", "is", "a", "doctor", ".", "<eos>"]
    gpt = attention_sheet([torch.eye(13).expand(8, 13, 13)] * 6, tokens, 6)
    scores = make_scores()
    saves = {"saves": 4, "stall_s": 0.012, "save_s": 0.5}
    train = [
        {"kind": "train", "step": step, "epoch": step / 100, "loss": 9 / step, "lr": 1e-3, "tokens_per_s": 5000.0}
        | {"padding_share": 0.0123, "memory_mb": 1234.0, "time": 1.7e9 + step}
        for step in range(10, 601, 10)
    ]
    validations = [
        {"kind": "validation", "step": step, "loss": 3.0, "accuracy": 0.4, "time": 1.7e9} for step in (200, 400, 600)
    ]
    examples = [Example(*texts) for texts in zip(SOURCES[:6], REFERENCES[:6], TRANSLATIONS[:6], strict=True)]
    data = {
        "synthetic": False,
        "source": {"place": "cmn.txt", "bytes": 4052123, "sha256": "a" * 64, "licence": "CC BY 2.0 FR"},
        "options": {"split": "random"},
        "rows": {"train": 24321, "validation": 1281, "test": 2845},
        "leakage": {"test": {"words": "of 2,845 test rows 673 leak"}},
        "tokenizer": {
            **{"kind": "sentencepiece", "vocabularies": "joint"},
            **{"source": {"sha256": "b" * 64}, "target": {"sha256": "c" * 64}},
        },
        "fingerprint": "d" * 64,
    }
    return {
        "name": "gpt-base",
        "scores": scores,
        "languages": {
            "source": {"code": "zh", "name": "Chinese", "direction": "ltr"},
            "target": {"code": "en", "name": "English", "direction": "ltr"},
        },
        "data": data,
        "training_data": data,
        "checkpoint": {
            "task": "gpt",
            "step": 600,
            "config": {
                **{"run_dir": "runs/gpt-base", "model": {"layers": 6, "heads": 8}, "seed": 1234},
                "checkpoint": {"every_steps": 100, "hours_between_kills": 24},
            },
            "data": {"fingerprint": "e" * 64},
            "files": {"model.safetensors": {"sha256": "1" * 64}},
        },
        "config": {"checkpoint": {"every_steps": 100, "hours_between_kills": 24}},
        "save_every": 100,
        "status": {"status": "finished", "reason": "all 600 steps were done", "step": 600, "steps": 600},
        "parameters": 5_234_567,
        "metrics": [*train, *validations],
        "sessions": [
            make_session(1, 0, 250, "killed, or its machine went down", **saves),
            make_session(2, 200, 450, "signal SIGTERM", **saves),
            make_session(3, 450, 600, "all 600 steps were done", **saves),
        ],
        "examples": examples,
        "ranked": [("best", examples[:2]), ("typical", []), ("worst", [replace(examples[5], note="chrF 3.2")])],
        "attention": [
            ("他是医生。", gpt),
            ("你好。", alignment_map(torch.eye(2, 3), list("你好。"), ["Hi", "."])),
        ],
        "beside": [("gpt-base-grouped", make_scores("grouped", "0" * 64) | {"bleu": 26.01})],
        "versions": {"torch, training": "2.13.0"},
    }


def rendered(report: dict[str, Any]) -> str:
    return render("translations", {**content_of(report)["content"], "standing": standing(report)})


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return make_report()


def poisoned(report: dict[str, Any], poison: Poison) -> dict[str, Any]:
    """The report with hostile texts in all fields."""
    changed = {name: poison.into(value, name) for name, value in report.items()}
    # Where keys are data, too.
    changed["versions"] = {poison.text("version's name"): poison.text("version")}
    changed["checkpoint"]["config"]["model"][poison.text("option's name")] = poison.text("option")
    changed["checkpoint"]["files"] = {poison.text("file's name"): {"sha256": poison.text("file's hash")}}
    changed["data"]["rows"] = {poison.text("part's name"): 1}
    changed["data"]["leakage"][poison.text("leaking part's name")] = {"words": poison.text("leakage")}
    changed["data"]["leakage"][changed["scores"]["part"]] = {"words": poison.text("leakage of the part")}
    sheet = attention_sheet([torch.eye(3)[None]], [poison.text("token"), "]]>", ' id="x'], 1)
    changed["attention"] = [(poison.text("caption"), sheet)]
    return changed


def test_the_page_tells_all_of_the_run(report):
    text = Page(rendered(report)).text
    scores = report["scores"]
    for expected in (
        # summary
        *("gpt-base: gpt", "5,234,567 parameters", "step 600 (best:5), beam 5", "3 sessions, at least 6h00m in all"),
        # scores, each with its interval and how it was computed
        f"{scores['bleu']:.2f} ({scores['bleu_interval'][0]:.2f} to {scores['bleu_interval'][1]:.2f})",
        f"{scores['chrf']:.2f} ({scores['chrf_interval'][0]:.2f} to {scores['chrf_interval'][1]:.2f})",
        *(scores["bleu_signature"], scores["chrf_signature"], scores["bleu_normalised_signature"]),
        *("2.1234", "45.67%", "6,543 target tokens"),
        *(
            "17too long for the model",
            "19sources too long",
            "31translations without a single word",
            "3translations that reached",
            "29translations with words",
            "23sources",
        ),
        "test part, random split: of 2,845 test rows 673 leak.",
        # all references
        *(
            "5 distinct sources with 6 references, each against all of its own",
            scores["all_references"]["bleu_signature"],
        ),
        # by kind of sentence
        *("source of 1-5 tokens15", "source of 16-25 tokens5", "source of 26+ tokens0--"),
        *("a side seen in training15", "neither side seen in training15"),
        # the other split
        *("gpt-base-groupedgroupedtest26.01 (", "other"),
        # training and sessions
        *("5,000 tokens/s", "1.23%", "1,234 MB", "session 2 begins after step 200", "session 3 begins after step 450"),
        *("2026-01-01 03:04", "node7 (job 4711)", "2 on cuda", "0 to 250 or later", "killed, or its machine went down"),
        *("resumed, from an older checkpoint200 to 4502h00msignal SIGTERM", "resumed450 to 600"),
        *("12 checkpoints", "12.0 ms", "0.50 s", "every 100 steps is one every 55m23s, and a kill costs half of that"),
        # examples and maps
        *("Random", "Best", "Worst", "(chrF 3.2)", "layer 6, head 8"),
        # where all of it comes from
        *("a" * 64, "b" * 64, "c" * 64, "d" * 64, "e" * 64, "1" * 64, "CC BY 2.0 FR", "seed: 1234", "2.13.0"),
    ):
        assert expected in text, expected
    assert "Typical" not in text  # there are none


def test_the_page_comes_alone_and_the_same_every_time(report):
    html = rendered(report)
    assert html == rendered(make_report())
    assert_fenced(html)
    page = Page(html)
    assert not {"script", "link", "iframe", "object", "img"} & set(page.tags)
    assert page.tags.count("svg") == 4 + len(report["attention"])
    for name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("src", "href", "xlink:href"):
            assert value.startswith(("data:image/png;base64,", "#"))
    assert not re.search(r"@import|url\((?!#)", html)
    ids = [value for name, value in page.attributes if name == "id"]
    targets = [value[1:] for name, value in page.attributes if name == "href" and value.startswith("#")]
    assert len(ids) == len(set(ids)) and set(targets) <= set(ids)


def test_hostile_text_stays_text_in_every_field(report):
    poison = Poison()
    html = rendered(poisoned(report, poison))
    page = Page(html)
    assert not {"script", "img"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert not re.search("[\x00-\x08\x0b-\x1f]", html)
    missing = poison.missing_in(page.text)
    assert not {"beside", "beside.split"} & missing
    # YAML quotes the config. Of other runs' scores and of the training data little is shown. The rest is not shown, was
    # replaced above, or is a kind of example of which there is none.
    assert {place for place in missing if not place.startswith(("checkpoint.", "beside.", "training_data."))} == {
        *("scores.label", "scores.task", "scores.data_fingerprint", "data.options.split"),
        *("sessions.started", "sessions.seen", "sessions.ended"),  # of the beginning, date and minute are shown
        *("attention", "versions.torch, training", "ranked"),
        # In attributes, as `lang` and `dir`.
        *(f"languages.{side}.{value}" for side in ("source", "target") for value in ("code", "direction")),
    }
    config = re.search("<pre>(.*?)</pre>", html, re.DOTALL)[1]
    assert config.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 3 and "<" not in config
    assert page.text.count("<script>alert(1)</script>") > len(poison.places) / 2


def test_a_run_without_a_record_has_a_report_all_the_same(report):
    bare = {**report, "metrics": [], "sessions": [], "ranked": [], "attention": [], "beside": []}
    text = Page(rendered({**bare, "scores": {**report["scores"], "by_seen": None}})).text
    assert "metrics.jsonl has no training steps" in text and "No map" in text and "is not known" in text
    assert "Sessions" not in text and "Beside other evaluations" not in text


def test_a_record_with_gaps_has_a_report_all_the_same(report):
    first, *others = report["metrics"]
    bare = {"kind": "train", "step": 5, "loss": None, "time": 1.7e9}
    text = Page(rendered({**report, "metrics": [bare, first | {"lr": None}, *others[:-1]]})).text
    assert "5,000 tokens/s" in text and "1,234 MB" in text and "nan" not in text
    assert "metrics.jsonl has no training steps" not in Page(rendered({**report, "metrics": [bare]})).text


def test_the_saves_of_a_session_that_was_killed_count(report, tmp_path):
    for step in (0, 200):  # the second finds that nobody wrote down the first one's end
        sessions = Sessions(tmp_path, step=step, steps=600, world_size=2, device="cpu", surroundings={})
        sessions.update(step + 100, stalls_s=[0.01], saves_s=[0.2])
    sessions.end(600, "all steps done", stalls_s=[0.01, 0.03], saves_s=[0.2, 0.2])
    text = Page(rendered({**report, "sessions": read_sessions(tmp_path)})).text
    assert "0 to 100 or later" in text and "200 to 600" in text and "600 or later" not in text
    assert "3 checkpoints" in text and "16.7 ms" in text and "2 sessions, at least" in text


def test_a_run_that_did_nothing_but_save_has_no_pace_to_tell_of(report):
    session = make_session(1, 600, 600, "all steps done", saves=1, stall_s=0.01, save_s=0.02) | {"seconds": 0.0}
    text = Page(rendered({**report, "sessions": [session]})).text
    assert "1 checkpoints" in text and "At this pace" not in text


def test_synthetic_data_gets_a_banner_and_real_data_none(report):
    synthetic = {**report["data"], "synthetic": True}
    assert SYNTHETIC not in rendered(report)
    assert SYNTHETIC in rendered({**report, "data": synthetic})
    assert SYNTHETIC in rendered({**report, "training_data": synthetic})


@pytest.mark.whole
def test_a_reader_sees_the_page_as_meant_on_a_phone_and_a_desk_in_light_and_dark(report, tmp_path):
    examples = [Example("我" * 300, "x" * 3000, "y" * 3000)]
    long = {**report, "name": "n" * 500, "versions": {"v" * 300: "w" * 3000}, "examples": examples}
    pages = {"plain": report, "long": long, "hostile": poisoned(report, Poison())}
    with browser() as reader:
        for name, each in pages.items():
            path = tmp_path / f"{name}.html"
            path.write_text(rendered(each), encoding="utf-8")
            for width in (360, 1200):
                seen = {dark: reader.open(path, width=width, dark=dark) for dark in (False, True)}
                for look in seen.values():
                    assert look.complaints == [] and look.fetched == []
                    assert look.page_width <= width and look.outside == []
                assert brightness(seen[False].ground) > 3 * brightness(seen[False].ink)
                assert brightness(seen[True].ink) > 3 * brightness(seen[True].ground) > 0


def test_random_examples_are_the_same_rows_for_every_run_and_at_least_ten():
    assert EXAMPLES >= 10 and example_rows(600) == example_rows(600) and len(set(example_rows(600))) == EXAMPLES
    assert sorted(example_rows(4)) == [0, 1, 2, 3]


def test_best_typical_and_worst_examples_are_picked_by_chrf():
    references = ["This is a sentence like any other one."] * 21
    # The further back, the less of the reference is there.
    translations = [reference[: len(reference) - number] for number, reference in enumerate(references)]
    picked = ranked_rows(translations, references)
    assert [row for row, _ in picked["best"]] == list(range(RANKED))
    assert {row for row, _ in picked["worst"]} == set(range(21 - RANKED, 21))
    assert sorted(row for row, _ in picked["typical"]) == [8, 9, 10, 11, 12]
    assert picked["best"][0][1] == pytest.approx(100)
    # Of equal ones the longest reference, and nothing twice.
    few = ranked_rows(["a b c", "a b c d", "x"], ["a b c", "a b c d", "y z"])
    assert {kind: [row for row, _ in rows] for kind, rows in few.items()} == {
        "best": [1, 0, 2],
        "typical": [],
        "worst": [],
    }


def test_runs_of_the_same_task_evaluated_likewise_stand_beside(tmp_path):
    def run(name: str, label: str, content: object) -> Path:
        folder = tmp_path / name / "evaluation"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{label}.json").write_text(content if isinstance(content, str) else json.dumps(content))
        return tmp_path / name

    scores = make_scores()
    own = run("own", "test", scores)
    run("other-split", "test", make_scores("grouped"))
    run("another-way", "test-beam5", scores)
    run("another-task", "test", {**scores, "task": "seq2seq"})
    run("older", "test", {key: value for key, value in scores.items() if key != "task"})
    run("torn", "test", json.dumps(scores)[:-9])
    run("foreign", "test", [1])
    (tmp_path / "a-file").touch()
    assert [(name, found["split"]) for name, found in runs_beside(own, "test", "gpt")] == [("other-split", "grouped")]
    assert [name for name, _ in runs_beside(own, "test-beam5", "gpt")] == ["own:test", "another-way"]
    run("own", "validation", scores)
    assert [name for name, _ in runs_beside(own, "test", "gpt")] == ["own:validation", "other-split"]
    assert scores.keys() >= Beside.__annotations__.keys()


def test_a_long_run_s_curve_is_small_and_keeps_its_peaks():
    points = [(step, 2.0) for step in range(200_000)]
    points[77_777] = (77_777, 9.0)
    svg = curve([Line(points, "faint")], about="loss")
    assert len(svg) < 30_000
    heights = [
        float(y) for path in re.findall(r'class="faint" d="([^"]+)"', svg) for y in re.findall(r" ([\d.]+)", path)
    ]
    assert len(heights) > WIDTH / 2 and min(heights) < 0.2 * HEIGHT and max(heights) > 0.8 * HEIGHT


def test_a_curve_has_gaps_where_values_are_not_finite_and_marks_where_told():
    points = [(0, 1.0), (1, 2.0), (2, math.nan), (3, 3.0), (4, math.inf), (5, 2.0), (6, 2.0)]
    svg = curve([Line(points, "faint")], [(3, "session 2 & more")], about="loss")
    assert re.search(r'class="faint" d="(M[^M]+M[^ML]+ [^ML]+M[^M]+)"', svg)
    assert svg.count('class="mark"') == 1 and "<title>session 2 &amp; more</title>" in svg and "nan" not in svg
    assert "<svg" in curve([Line([])], about="nothing")
