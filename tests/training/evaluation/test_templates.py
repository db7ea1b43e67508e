"""Templates of pages and model cards: found from everywhere, and no text from elsewhere becomes a part of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from jinja2 import UndefinedError

from tests.support.commands import ROOT
from tests.support.pages import HOSTILE
from training.evaluation.report.templates import card, page
from training.models.gpt import GPTOptions

CARD = {
    "header": {"license": f"unknown {HOSTILE}"},
    "about": {"run": "run", "checkpoints": {6: "a" * 64}, "parameters": 1234, "architecture": "A", "transformers": "5"},
    "weights": f"step 6 | of [a](http://b)\n# {HOSTILE}",
    "options": GPTOptions(),
    "data": {
        **{"options": {"simplify": False, "split": "random"}, "tokenizer": {"kind": "word"}, "rows": {"train": 4000}},
        **{"source": {"sha256": "b" * 64, "licence": "*CC* `BY`\n\n<script>"}, "fingerprint": "c" * 64},
    },
    **{"place": "cmn.txt", "scores": None, "difference": 1e-7},
}


def test_a_card_has_what_it_was_given_as_text():
    text = card("gpt_card.md", CARD)
    assert yaml.safe_load(text.split("---")[1]) == {"license": f"unknown {HOSTILE}"}
    body = text.split("---\n", 2)[2]
    assert r"step 6 \| of \[a\](http://b) # \</td>" in body and "\0" not in body
    assert r": \*CC\* \`BY\` \<script>" in body
    rows = [line for line in body.splitlines() if line.startswith("| ")]
    assert all(row.replace(r"\|", "").count("|") == 3 for row in rows) and len(rows) == 8


def test_what_a_template_is_not_given_is_an_error():
    with pytest.raises(UndefinedError, match="'questions' is undefined"):
        page("open_questions.html", {"title": "page", "answers": [], "about": "", "sections": {}})


def test_templates_are_found_from_every_working_directory(tmp_path: Path):
    made = "from training.evaluation.disc_law_eval.open_questions import render; print(render('a page', [], []))"
    environment = {**os.environ, "PYTHONPATH": os.path.relpath(ROOT, tmp_path)}
    done = subprocess.run([sys.executable, "-c", made], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.startswith("<!DOCTYPE html>") and "--ground" in done.stdout, done
