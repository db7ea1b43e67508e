"""Scores: sacrebleu's own, with intervals, by kind of sentence and with all references; and the labels they go by."""

import argparse
import json
import random
import re

import pytest
from sacrebleu.metrics import BLEU, CHRF

from training.base.console import UserError
from training.data.languages import language_of
from training.evaluation.setting import Search, Setting, add_search_options, search_of
from training.evaluation.translations.scores import (
    measure,
    resample,
    score_by_length,
    score_by_seen,
    score_texts,
    score_with_all_references,
    sentence_counts,
    with_interval,
)

ENGLISH = language_of("en")
REFERENCES = [
    "He isn't a doctor.",
    "The cat sat on the mat, didn't it?",
    "I like reading long books in the evening.",
]


def imperfect(count: int) -> tuple[list[str], list[str]]:
    """Translations with random mistakes, and their references."""
    generator = random.Random(1)
    words = ["the", "a", "cat", "dog", "sat", "ran", "on", "under", "in", "old", "new", "mat", "house", "red"]
    references = [" ".join(generator.choices(words, k=generator.randint(3, 12))) + "." for _ in range(count)]
    translations = [
        " ".join(word if generator.random() < 0.8 else generator.choice(words) for word in reference.split())
        for reference in references
    ]
    return translations, references


def test_text_scores_are_sacrebleus_and_say_how_they_were_computed():
    perfect = score_texts(REFERENCES, REFERENCES, ENGLISH)
    assert (perfect["bleu"], perfect["chrf"], perfect["exact_matches"]) == (pytest.approx(100), pytest.approx(100), 3)
    words = ["he isn't a doctor", "the cat sat on the mat didn't it", "i like reading long books in the evening"]
    as_words = score_texts(words, REFERENCES, ENGLISH)
    assert as_words["bleu"] < 80 and as_words["bleu_normalised"] == pytest.approx(100)
    assert (as_words["exact_matches"], as_words["exact_matches_normalised"]) == (0, 3)
    assert "tok:13a" in as_words["bleu_signature"] and "version:" in as_words["chrf_signature"]
    assert (
        "tok:none" in as_words["bleu_normalised_signature"] and "lower-cased" in as_words["bleu_normalised_signature"]
    )
    json.dumps(as_words)


def test_a_missing_translation_counts_as_an_empty_one():
    references = ["Tom bought three red apples.", "Mary sold two old cars."]
    assert score_texts(["Tom bought three red apples.", ""], references, ENGLISH)["bleu"] < 70
    with pytest.raises(ValueError, match="1 translations for the references of 2"):
        score_texts(["a"], references, ENGLISH)
    with pytest.raises(ValueError, match="0 translations"):
        score_texts([], [], ENGLISH)


@pytest.mark.parametrize("metric", [BLEU, CHRF])
def test_intervals_are_those_of_sacrebleus_bootstrap(metric):
    translations, references = imperfect(300)
    expected_metric, lists = metric(), [[reference] for reference in references]
    expected = expected_metric.corpus_score(translations, [references], n_bootstrap=1000)
    found = measure(metric(), translations, lists)
    assert found.score == pytest.approx(expected.score)
    assert set(found.signature.split("|")) == set(str(expected_metric.get_signature()).split("|"))
    # It says the mean and half the width only, and these with two digits.
    (resampled,) = resample(metric(), sentence_counts(metric(), translations, lists))
    mean, half = (float(number) for number in re.search(r"μ = ([\d.]+) ± ([\d.]+)", str(expected)).groups())
    low, high = found.interval
    assert resampled.mean() == pytest.approx(mean, abs=0.01)
    assert (high - low) / 2 == pytest.approx(half, abs=0.02)
    assert ((resampled < low).sum(), (resampled > high).sum()) == (25, 25)
    narrower = measure(metric(), translations * 4, lists * 4).interval
    assert narrower[1] - narrower[0] < 0.7 * (high - low)


def test_scores_stand_where_samples_have_nothing_right_at_all():
    mixed = score_texts(
        ["Tom bought three red apples.", "", ""], ["Tom bought three red apples.", "Yes.", "No."], ENGLISH
    )
    assert mixed["bleu_interval"] == [0, pytest.approx(100)] and 0 < mixed["bleu"] < 100
    nothing = score_texts(["", ""], ["a b c d", "e f g h"], ENGLISH)
    assert (nothing["bleu"], nothing["bleu_interval"], nothing["chrf_interval"]) == (0, [0, 0], [0, 0])


def test_a_score_is_shown_with_its_interval():
    assert with_interval(score_texts(REFERENCES, REFERENCES, ENGLISH), "chrf") == "100.00 (100.00 to 100.00)"


def test_rows_that_share_a_source_are_one_sentence_with_all_references():
    sources = ["甲", "乙", "甲", "甲"]
    translations = ["He went home at once.", "I see the old dog.", "He went home at once.", "He went home at once."]
    references = ["He left without a word.", "I see an old dog.", "He went home at once.", "He left without a word."]
    found = score_with_all_references(sources, translations, references, ENGLISH)
    assert (found["sentences"], found["references"]) == (2, 3)
    lists = [["He left without a word.", "I see an old dog."], ["He went home at once.", None]]
    assert found["bleu"] == round(BLEU().corpus_score(translations[:2], lists).score, 2)
    assert found["chrf"] == round(CHRF().corpus_score(translations[:2], lists).score, 2)
    assert found["bleu"] > score_texts(translations, references, ENGLISH)["bleu"]
    assert "nrefs:var" in found["bleu_signature"]


def test_groups_by_length_and_by_seen_share_all_rows_among_them():
    translations, references = imperfect(40)
    lengths = [1, 5, 6, 10, 11, 15, 16, 25, 26, 400] * 4
    groups = score_by_length(lengths, translations, references, ENGLISH)
    assert [(group["source_tokens"], group["sentences"]) for group in groups] == [
        (name, 8) for name in ("1-5", "6-10", "11-15", "16-25", "26+")
    ]
    rows = [row for row, length in enumerate(lengths) if 6 <= length <= 10]
    of_rows = score_texts([translations[row] for row in rows], [references[row] for row in rows], ENGLISH)
    assert (groups[1]["bleu"], groups[1]["chrf"]) == (of_rows["bleu"], of_rows["chrf"])
    assert score_by_length([3], ["a"], ["a"], ENGLISH)[-1] == {
        "source_tokens": "26+",
        "sentences": 0,
        "bleu": None,
        "chrf": None,
    }
    seen = [translation == reference for translation, reference in zip(translations, references, strict=True)]
    halves = score_by_seen(seen, translations, references, ENGLISH)
    assert halves["seen"]["sentences"] + halves["unseen"]["sentences"] == 40
    assert halves["seen"]["bleu"] == 100 > halves["unseen"]["bleu"]


SETTINGS = {
    "test": Setting(),
    "validation": Setting("validation"),
    "test-last": Setting(weights="last"),
    "test-ema": Setting(weights="ema"),
    "train-best5": Setting("train", "best:5"),
    "test-beam5": Setting(search=Search(5)),
    "test-last3-beam5-penalty0.6": Setting(weights="last:3", search=Search(5, 0.6)),
    "test-beam4-penalty0-on-tatoeba-grouped": Setting(search=Search(4, 0), data="tatoeba-grouped"),
    "test-on-last-beam5": Setting(data="last-beam5"),
}


@pytest.mark.parametrize("label", SETTINGS)
def test_a_label_says_what_is_not_usual_and_nothing_else(label):
    assert SETTINGS[label].label == label
    assert Setting.of_label(label) == SETTINGS[label]


def test_what_no_evaluation_is_called_is_no_label():
    for label in (
        "",
        "tests",
        "test-",
        "test-beam1",
        "test-beam0",
        "test-penalty0.6",
        "test-ema3",
        "test-on-",
        "beam5",
    ):
        assert Setting.of_label(label) is None, label


def search_asked_for(*words: str) -> Search:
    parser = argparse.ArgumentParser()
    add_search_options(parser)
    return search_of(parser.parse_args(words))


def test_a_search_that_cannot_be_or_an_option_without_effect_is_refused():
    assert search_asked_for() == Search(1) and str(search_asked_for()) == "greedy"
    assert search_asked_for("--beam_size", "5") == Search(5, 1.0)
    assert str(search_asked_for("--beam_size", "5", "--length_penalty", "0.6")) == "beam 5, length penalty 0.6"
    for words, answer in (
        (["--beam_size", "0"], "must be 1"),
        (["--beam_size", "-2"], "must be 1"),
        (["--beam_size", "3", "--length_penalty", "-1"], "must be 0"),
        (["--beam_size", "3", "--length_penalty", "nan"], "must be 0"),
        (["--length_penalty", "0.6"], "no effect on greedy decoding: add --beam_size"),
    ):
        with pytest.raises(UserError, match=answer):
            search_asked_for(*words)
