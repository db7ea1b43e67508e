"""The pages of runs while they go on: made of what lies in their folders, whoever left it there."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support import picture
from tests.support.browser import browser
from tests.support.commands import ROOT, Launch
from tests.support.lives import Life
from tests.support.pages import HOSTILE, Page, assert_fenced
from tests.support.runs import SHORT_RUN, command_of, reference, status_of
from training.engine.status import read_sessions, write_status
from training.report import overview, page
from training.report.overview import Summary, render, summaries, write_index
from training.report.page import run_record, show, write_page

RUN = (*SHORT_RUN, "--optim.steps", 12, "--log.validate_every_steps", 4, "--checkpoint.every_steps", 4)


@pytest.fixture
def run_dir(sample_data: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(reference(sample_data, *RUN), tmp_path / "runs/gpt"))


def text_of(path: Path) -> str:
    html = path.read_text("utf-8")
    assert_fenced(html)
    return Page(html).text


def test_training_leaves_a_page_and_a_place_among_the_runs(launch: Launch, sample_data, tmp_path):
    life = Life(launch, tmp_path, sample_data, ranks=2, run_dir=tmp_path / "runs/gpt", run=RUN)
    life.kill_at(9)
    result = life.start().wait()
    assert result.status == 0 and "warning" not in result.err, result
    text = text_of(life.run_dir / "report.html")
    metrics = (life.run_dir / "metrics.jsonl").read_text()
    answer = json.loads(metrics.splitlines()[-1])["examples"][0]["answer"]
    for expected in (
        *("finished: all steps done; step 12 of 12 (100%)", "session 2 begins after step 8", "killed, or its machine"),
        *("BLEU: validation", "token accuracy: validation", "step 12", "steps that count", "optim:", answer),
    ):
        assert expected in text, expected
    index = text_of(tmp_path / "runs/index.html")
    assert "gpt" in index and "12 of 12 (100%)" in index and "accuracy" in index


def test_page_of_a_run_that_goes_on_tells_when_it_was_heard_of(run_dir):
    write_status(run_dir, "running", "training", restart=True)
    show(run_dir)
    html = (run_dir / "report.html").read_text("utf-8")
    assert 'id="seen"' in html and "<script>" in html and "running; step 12 of 12" in text_of(run_dir / "report.html")
    write_status(run_dir, "finished", "all steps done", restart=False)
    show(run_dir)
    assert "<script" not in (run_dir / "report.html").read_text("utf-8"), "there is nothing to come"


def test_run_has_a_page_before_its_first_checkpoint(run_dir):
    shutil.rmtree(run_dir / "checkpoints")
    write_status(run_dir, "running", "training", restart=True)
    for name in ("metrics.jsonl", "sessions.json", "config.yaml"):
        show(run_dir)
        assert "running; step" in text_of(run_dir / "report.html")
        (run_dir / name).unlink()


def test_run_goes_on_without_a_page_that_cannot_be_made(launch: Launch, sample_data, tmp_path):
    (tmp_path / "run/report.html").mkdir(parents=True)
    (tmp_path / "run/checkpoints").mkdir()
    result = launch(*command_of(tmp_path / "run", sample_data, *RUN)).wait()
    assert result.status == 0 and status_of(tmp_path / "run")["status"] == "finished"
    assert result.err.count("page could not be made") == 1, result


def test_evaluation_stays_on_the_page_and_what_is_odd_in_it_costs_no_more_than_itself(run_dir, launch: Launch):
    words = (run_dir, "--part", "validation", "--beam_size", 1)
    assert launch(*words, module="training.evaluation.evaluate").wait().status == 0
    before = text_of(run_dir / "report.html")
    assert "BLEU, normalised" in before and "While it learned" in before
    (run_dir / "report.html").unlink()
    write_page(run_dir)
    assert text_of(run_dir / "report.html") == before, "it is all in the folder"
    (path,) = (run_dir / "evaluation").glob("*.page")
    evaluated = json.loads(path.read_text("utf-8"))
    evaluated["content"]["attention"] = [
        ["x", {"panels": [[["x", '"/><script>']]], "row_tokens": [], "column_tokens": []}]
    ]
    for odd in (evaluated, {**evaluated, "content": {"scores": HOSTILE}}, {"template": "../../x", "content": {}}, []):
        path.write_text(json.dumps(odd))
        write_page(run_dir)
        text = text_of(run_dir / "report.html")
        assert "BLEU, normalised" not in text and "finished: all steps done" in text


def a_summary(**more: Any) -> Summary:
    summary: Summary = {
        **{
            "task": "gpt",
            "status": "finished",
            "words": "finished",
            "step": 10,
            "steps": 10,
            "best": "bleu 3 at step 9",
        },
        **{"scores": {"loss": 2.0, "bleu": 3.0}, "goodput": 0.9, "at": time.time(), "silent_s": 180.0},
        **{"train": [(1, 9.0), (10, 2.5)], "validation": [(5, 3.0), (10, 2.0)]},
    }  # type: ignore[typeddict-item]
    return {**summary, **more}  # type: ignore[typeddict-item]


def test_index_has_what_is_a_summary_and_leaves_other_peoples_pages_alone(tmp_path, capsys):
    for name, content in (
        ("good", json.dumps(a_summary())),
        (
            HOSTILE.replace("/", "\N{DIVISION SLASH}").replace("\0", ""),
            json.dumps(a_summary(task=HOSTILE, best=HOSTILE)),
        ),
        ("torn", json.dumps(a_summary())[:-9]),
        ("odd", json.dumps(a_summary(train=[["x", 1]]))),
        ("endless", json.dumps(a_summary(at=1e999))),
        ("large", json.dumps(a_summary(words="x" * (1 << 17)))),
        ("far", json.dumps(a_summary(step=10**400))),
        ("many", json.dumps(a_summary(scores={f"score-{number}": 1.0 for number in range(100)}))),
    ):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "summary.json").write_text(content)
    odd_name = Path(os.fsdecode(bytes(tmp_path / "runs") + b"/b\xff"))
    odd_name.mkdir()
    (odd_name / "summary.json").write_text(json.dumps(a_summary()))
    (tmp_path / "runs/link").mkdir()
    (tmp_path / "runs/link/summary.json").symlink_to(tmp_path / "runs/good/summary.json")
    assert len(summaries(tmp_path / "runs")) == 3
    write_index(tmp_path / "runs/good", at_once=False)
    html = (tmp_path / "runs/index.html").read_text("utf-8")
    shown = Page(html)
    assert shown.tags.count("script") == 1 and "img" not in shown.tags and HOSTILE.replace("\0", "\ufffd") in shown.text
    assert not [value for name, value in shown.attributes if name == "href" and not value.endswith("/report.html")]
    (tmp_path / "summary.json").touch()
    write_index(tmp_path / "runs", at_once=True)
    assert not (tmp_path / "index.html").exists(), "only a folder called runs has one by itself"
    assert overview.main([str(tmp_path)]) == 0 and "No run" in text_of(tmp_path / "index.html")
    (tmp_path / "runs/index.html").write_text("my own")
    write_index(tmp_path / "runs/good", at_once=True)
    assert (tmp_path / "runs/index.html").read_text() == "my own"
    with pytest.raises(Exception, match="is another page"):
        overview.main([str(tmp_path / "runs")])


def test_index_is_made_again_after_a_minute_and_at_the_end_of_a_run_and_has_no_private_one(run_dir):
    index = run_dir.parent / "index.html"
    show(run_dir)
    shutil.copytree(run_dir, run_dir.parent / "sibling")
    write_status(run_dir, "running", "training", restart=True)
    show(run_dir)
    assert b"sibling" not in index.read_bytes()
    os.utime(index, (0, 0))
    show(run_dir)
    assert b"sibling" in index.read_bytes() and b"<bdi>running" in index.read_bytes()
    write_status(run_dir, "finished", "all steps done", restart=False)
    show(run_dir)
    assert b"<bdi>running" not in index.read_bytes()
    other = run_dir.parent / "private"
    record = {**run_record(run_dir), "config": {"private": True}}
    other.mkdir()
    overview.write_summary(other, record)
    assert not list(other.iterdir())


@pytest.mark.whole
def test_a_reader_sees_one_run_and_two_hundred_on_a_phone_and_a_desk_and_can_sort_and_filter(run_dir, tmp_path):
    old = time.time() - 7200
    many = {f"run-{number:03}": a_summary(scores={"loss": number / 10}, step=number % 11) for number in range(198)}
    many |= {HOSTILE: a_summary(task=HOSTILE, at=old, status="running"), "n" * 300: a_summary(best="b" * 300)}
    write_status(run_dir, "running", "training", restart=True)
    show(run_dir)
    with browser() as reader:
        for number, runs in enumerate(({}, {"one": a_summary()}, many)):
            path = tmp_path / f"{number}.html"
            path.write_text(render("runs", runs), "utf-8")
            for each in (path, run_dir / "report.html"):
                for width in (360, 1200):
                    seen = reader.open(each, width=width, dark=width == 360)
                    assert seen.complaints == seen.fetched == seen.outside == [] and seen.page_width <= width
        assert "ago" in reader.run("document.getElementById('seen').textContent")
        reader.open(path, width=1200)
        rows = "[...document.querySelectorAll('#runs tbody tr:not([hidden])')]"
        assert reader.run(f"{rows}.length") == 200
        lost = f"{rows}.filter(row => row.textContent.includes('not heard of for 2 h')).length"
        assert reader.run(lost) == 1
        reader.run("document.querySelectorAll('#runs th button')[4].click()")
        losses = f"{rows}.map(row => +row.cells[4].dataset.sort).filter(loss => loss === loss)"
        assert reader.run(losses) == sorted(each["scores"]["loss"] for each in many.values())
        reader.run(
            "const f = document.getElementById('filter'); f.value = 'RUN-01'; f.dispatchEvent(new Event('input'))"
        )
        assert reader.run(f"{rows}.length") == 10
        chosen = reader.run("location.hash")
        reader.open(path.with_name(path.name), width=1200)
        reader.run(f"location.hash = {json.dumps(chosen)}; location.reload()")
        # A run that was not heard of for long says so on its own page.
        sessions = read_sessions(run_dir)
        sessions[-1]["began"] = old
        (run_dir / "sessions.json").write_text(json.dumps(sessions))
        lines = (run_dir / "metrics.jsonl").read_text().splitlines()
        shown = [json.dumps({**json.loads(line), "time": old}) + "\n" for line in lines]
        (run_dir / "metrics.jsonl").write_text("".join(shown))
        show(run_dir)
        reader.open(run_dir / "report.html", width=1200)
        assert "not heard of since" in reader.run("document.getElementById('seen').textContent")
    assert page.REPORT == "report.html"


@pytest.mark.whole
def test_the_readmes_picture_of_a_page_is_made_light_and_dark_and_is_small(run_dir, tmp_path):
    light, dark = picture.main(run_dir, tmp_path)
    for made in (light, dark):
        kept = ROOT / "docs" / made.name
        assert made.read_bytes()[8:12] == kept.read_bytes()[8:12] == b"WEBP" and kept.stat().st_size < 80_000
        assert made.stat().st_size > 10_000, "a page with curves, not an empty one"
    assert light.read_bytes() != dark.read_bytes()
