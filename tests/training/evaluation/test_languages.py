"""Languages of other scripts and in the other direction: prepared, trained, translated, evaluated and reported."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
import torch

from data_prep import pairs
from tests.support.commands import Launch, launching, run
from tests.support.once import once
from tests.support.pages import Page
from tests.support.runs import command_of
from training.base.console import UserError
from training.data import translation_metrics
from training.data.languages import language_of
from training.data.prepared import open_prepared
from training.data.tokenizers import UNK, cut
from training.evaluation import compare, evaluate, translate
from training.evaluation.translations.scores import score_texts
from training.evaluation.translations.trained import open_trained

CPU = torch.device("cpu")

# Made up: who, does what, to what. Blanks and order are the language's own.
WORDS = {
    "ar": ("الطالب المعلمة الطبيب الطفلة", "يقرأ ترى يحب تشتري", "الكتاب البيت القِطّة"),
    "fr": ("L'étudiant Marie Robert Aïcha", "lit voit aime achète", "livre maison chat"),
    "ja": ("学生は 先生は 医者は 子供は", "読む 見る 好む 買う", "本を 家を ネコを"),
    "th": ("นักเรียน ครู หมอ เด็ก", "อ่าน เห็น ชอบ ซื้อ", "หนังสือ บ้าน แมว"),
}


def sentences(code: str) -> Iterator[str]:
    blank, end = (" ", ".") if language_of(code).blanks else ("", "。" if code == "ja" else "")
    for who, does, what, number in product(*map(str.split, WORDS[code]), range(2, 12)):
        words = [who, what, does] if code == "ja" else [who, does, what]
        yield blank.join([*words, str(number)]) + end


def write(folder: Path, source: str, target: str) -> list[str]:
    """Two parallel files for training, and two for the test; the words of a command that reads them."""
    rows = list(zip(sentences(source), sentences(target), strict=True))
    random.Random(1).shuffle(rows)
    words = ["--source_language", source, "--target_language", target]
    for part, own in (("train", rows[:-80]), ("test", rows[-80:])):
        paths = [folder / f"{part}.{code}" for code in (source, target)]
        for place, path in enumerate(paths):
            path.write_text("".join(f"{row[place]}\n" for row in own), encoding="utf-8")
        words += [f"--{part}", ",".join(map(str, paths))]
    return words


SHAPES = {
    "gpt": ("--model.layers", 1, "--model.heads", 2, "--model.width", 32, "--model.context", 80),
    "seq2seq": ("--model.embedding_width", 32, "--model.hidden_width", 32, "--model.max_length", 60),
}
TRAINED = [
    ("ar", "fr", "seq2seq", ("--tokenizer", "word", "--vocabularies", "joint")),
    ("ja", "th", "gpt", ("--vocabularies", "joint", "--vocabulary_size", "150")),
    ("en", "zh", "seq2seq", ("--tokenizer", "word", "--vocabularies", "separate")),
]


@pytest.fixture(scope="module", params=TRAINED, ids=lambda each: "-".join(each[:3]))
def evaluated(request) -> tuple[str, str, Path]:
    """Source, target and the run folder of a short training that has been evaluated."""
    source, target, task, words = request.param

    def make(folder: Path) -> None:
        options = ["--source", "sample", "--source_language", source, "--target_language", target]
        made = options if "zh" in (source, target) else write(folder, source, target)
        assert pairs.main([*made, *words, "--split", "grouped", "--output", str(folder / "data")]) == 0
        steps = ("--optim.steps", 30, "--optim.warmup_steps", 3, "--optim.lr", 8e-3, "--log.generate_samples", 20)
        batch = ("--batch.tokens_per_micro_batch", 512, "--log.validate_every_steps", 15)
        with launching(folder) as launch:
            command = command_of(folder / "run", folder / "data", *SHAPES[task], *steps, *batch)
            result = launch(*command, module=f"training.{task}").wait()
            assert result.status == 0, result
        assert evaluate.main([str(folder / "run")]) == 0

    return source, target, once(f"languages-{source}-{target}", make) / "run"


def test_scores_are_of_the_target_language_and_the_report_calls_both_by_name(evaluated):
    source, target, run_dir = evaluated
    languages = language_of(source), language_of(target)
    scores = json.loads((run_dir / "evaluation/test.json").read_text())
    assert scores["languages"] == {"source": source, "target": target}
    assert scores["split"] == ("grouped" if "zh" in (source, target) else "given")
    assert scores["sentences"] == (600 if "zh" in (source, target) else 80)
    tokenizer = {"fr": "13a", "th": "char", "zh": "zh"}[target]
    assert f"tok:{tokenizer}|" in scores["bleu_signature"] and 0 < scores["chrf"] <= 100
    text = (run_dir / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert f"{languages[0]} to {languages[1]}" in page.text and f"({languages[0]} 0, {languages[1]} 0)" in page.text
    assert f'<dd lang="{source}" dir="{"rtl" if source == "ar" else "ltr"}">' in text
    assert f'<dd lang="{target}" dir="ltr">' in text
    assert scores["bleu_signature"] in page.text and scores["chrf_signature"] in page.text
    assert "Chinese" not in page.text or "zh" in (source, target)
    maps = list((run_dir / "evaluation").glob("test-attention-*.svg"))
    assert maps and all(any(text in svg.read_text(encoding="utf-8") for text in labels(run_dir)) for svg in maps)
    assert compare.main([str(run_dir), str(run_dir)]) == 0


def labels(run_dir: Path) -> list[str]:
    """Tokens of the source, which stand beside the maps."""
    tokenizer = open_trained(run_dir, device=CPU).source_tokenizer
    return [text for text in tokenizer.token_texts(range(UNK + 1, tokenizer.vocabulary_size)) if text.isalpha()]


def test_translations_are_joined_as_the_language_is_written(evaluated, capsys):
    source, target, run_dir = evaluated
    data = open_prepared(run_dir.parent / "data")
    part = data.part("train")
    for ids, text in zip(part.target, part.target_texts[:20], strict=False):
        said = data.target_tokenizer.decode(ids)
        if data.target_tokenizer.kind == "sentencepiece":
            assert said == text
        else:
            plain = re.sub(r"[.。！？，]", "", text).lower()
            assert said.replace(" ", "") == plain.replace(" ", "") and (" " in said) == language_of(target).blanks
    first = part.source_texts[0]
    assert UNK not in data.source_tokenizer.encode(first)
    assert translate.main([str(run_dir), first, "12345"]) == 0
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 2
    assert f"1 of 2 sentences hold no {language_of(source)}, which this model translates from" in captured.err


def test_vowel_signs_and_joiners_stay_in_their_words():
    assert cut("القِطّة، نعم!", language_of("ar")) == ["القِطّة", "نعم"]
    assert cut("मैं हिन्दी बोलता हूँ।", language_of("hi")) == ["मैं", "हिन्दी", "बोलता", "हूँ"]
    assert cut("می\u200cخواهم بروم.", language_of("fa")) == ["می\u200cخواهم", "بروم"]
    assert cut("L’étudiant lit 1\ufe0f\u20e3.", language_of("fr")) == ["l'étudiant", "lit", "1"]
    assert cut("ネコが、3匹。OK", language_of("ja")) == ["ネ", "コ", "が", "3", "匹", "ok"]
    assert "".join(cut("เด็กชอบแมว 3 ตัว", language_of("th"))) == "เด็กชอบแมว3ตัว"


def test_a_score_whose_words_cannot_be_told_here_is_refused_with_what_to_install(monkeypatch):
    monkeypatch.setattr(translation_metrics, "find_spec", lambda name: None)
    for code, extra in (("ja", "ja"), ("ko", "ko")):
        language = language_of(code)
        with pytest.raises(
            UserError, match=rf"BLEU of {language} .*{code}-mecab.*`pip install 'sacrebleu\[{extra}\]=="
        ):
            score_texts(["a"], ["a"], language)


def test_a_training_without_it_has_chrf_and_its_evaluation_is_refused_at_once(tmp_path: Path, launch: Launch):
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['MeCab'] = None\n")  # as if it were not there
    without = {"PYTHONPATH": str(tmp_path)}
    assert pairs.main([*write(tmp_path, "th", "ja"), "--output", str(tmp_path / "data")]) == 0
    words = command_of(tmp_path / "run", tmp_path / "data", *SHAPES["gpt"], "--optim.steps", 2)
    words = (*words, "--optim.warmup_steps", 1, "--log.generate_samples", 5)
    result = launch(*words, module="training.gpt", environment=without).wait()
    assert result.status == 0 and "validations have no BLEU, chrF alone: BLEU of Japanese" in result.err, result
    assert "chrf " in result.out and "bleu " not in result.out
    refused = run(tmp_path / "run", module="training.evaluation.evaluate", environment=without)
    assert refused.status == 1 and "`pip install 'sacrebleu[ja]==" in refused.error_lines[0], refused
    assert not (tmp_path / "run/evaluation").exists()


@pytest.mark.parametrize(
    ("code", "translation", "reference", "bleu"),
    [("ja", "学生は本を買う。", "学生は本を読む。", 53.73), ("ko", "학생은 책을 산다.", "학생은 책을 읽는다.", 45.48)],
)
def test_japanese_and_korean_are_scored_by_the_words_that_mecab_finds(code, translation, reference, bleu):
    scores = score_texts([translation], [reference], language_of(code))
    assert f"tok:{code}-mecab" in scores["bleu_signature"] and scores["bleu"] == bleu
