"""Templates of pages and model cards: found from everywhere, and no text from elsewhere becomes a part of them."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from jinja2 import UndefinedError

from tests.support.browser import browser
from tests.support.commands import ROOT
from tests.support.pages import HOSTILE
from training.data.languages import language_of
from training.evaluation.disc_law_eval.open_questions import render
from training.evaluation.exports.cards import render as card
from training.models.adapted_model import LoraOptions
from training.models.base_model import QuantisationOptions
from training.models.gpt import GPTOptions
from training.report.templates import page

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
    **{"languages": (language_of("zh"), language_of("en")), "examples": ['"]<'], "conversions": ["*a*"]},
}


def test_a_card_has_what_it_was_given_as_text():
    text = card("gpt_card.md", CARD)
    assert yaml.safe_load(text.split("---")[1]) == {"license": f"unknown {HOSTILE}"}
    body = text.split("---\n", 2)[2]
    assert r"step 6 \| of \[a\](http://b) # \</td>" in body and "\0" not in body
    assert r": \*CC\* \`BY\` \<script>" in body
    rows = [line for line in body.splitlines() if line.startswith("| ")]
    assert all(row.replace(r"\|", "").count("|") == 3 for row in rows) and len(rows) == 8


ADAPTERS = {
    "about": {
        **{"run": "run", "kind": "adapters", "checkpoints": {6: "a" * 64}, "parameters": 1234},
        **{"versions": {"peft": "1"}, "base_fingerprint": "b" * 64, "compared_on": "9 tokens"},
    },
    **{"weights": "step 6", "lora": LoraOptions(), "quantisation": QuantisationOptions(), "compute": "bfloat16"},
    "data": {
        **{"rows": {"train": 4000}, "source": {"sha256": "c" * 64, "licence": "free"}, "fingerprint": "d" * 64},
        "tokenizer": {"template_options": {"enable_thinking": False}},
    },
    **{"place": "x.jsonl", "law": False, "licence": "free", "differences": [], "learned": "conversations"},
}


@pytest.mark.parametrize(
    "text", ["</td><script>", 'x"\nimport os\n```\n---\n# \\', '\\"; import os; "', "x\u2028\rimport os"]
)
def test_code_of_a_card_has_names_as_literals_and_nothing_else(text: str):
    def code_of(name: str) -> ast.Module:
        made = card("adapter_card.md", {**ADAPTERS, "base": name, "revision": name, "header": {"base_model": name}})
        header = re.match(r"---\n(.*?)\n---\n", made, re.DOTALL)
        assert header and yaml.safe_load(header[1]) == {"base_model": name}
        (code,) = re.findall(r"^```python\n(.*?)^```$", made, re.DOTALL | re.MULTILINE)
        return ast.parse(code)

    shapes = [[type(node) for node in ast.walk(code_of(name))] for name in ("plain", text)]
    assert shapes[0] == shapes[1]
    assert [node.value for node in ast.walk(code_of(text)) if isinstance(node, ast.Constant)].count(text) == 2


@pytest.mark.whole
def test_a_browser_runs_and_fetches_nothing_for_what_came_into_a_page(tmp_path: Path):
    place = "http://127.0.0.1:9/x"
    inserted = (
        "<script>console.log('it ran')</script><style>body { background: red }</style><b style='color: red'>b</b>"
        f"<img src='{place}'><img src=x onerror=\"console.log('it ran')\"><iframe src='{place}'></iframe>"
    )
    made = render("a page", [], [])
    (tmp_path / "page.html").write_text(made.replace("</h1>", f"</h1>{inserted}"), encoding="utf-8")
    with browser() as reader:
        seen = reader.open(tmp_path / "page.html", width=1200)
    assert not [complaint for complaint in seen.complaints if "it ran" in complaint]
    assert sum("Content Security Policy" in complaint for complaint in seen.complaints) >= 5, seen.complaints
    assert "255, 0, 0" not in seen.ground


def test_what_a_template_is_not_given_is_an_error():
    with pytest.raises(UndefinedError, match="'questions' is undefined"):
        page("open_questions.html", {"title": "page", "answers": [], "about": "", "sections": {}})


def test_templates_are_found_from_every_working_directory(tmp_path: Path):
    made = "from training.evaluation.disc_law_eval.open_questions import render; print(render('a page', [], []))"
    environment = {**os.environ, "PYTHONPATH": os.path.relpath(ROOT, tmp_path)}
    done = subprocess.run([sys.executable, "-c", made], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.startswith("<!DOCTYPE html>") and "--ground" in done.stdout, done
