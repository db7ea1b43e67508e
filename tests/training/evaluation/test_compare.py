"""Two evaluations compared: the better one is found, equal ones are not told apart, like is compared to like only."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import sacrebleu
from scipy.stats import ttest_ind

from tests.support.commands import Launch
from training.base.console import UserError
from training.evaluation import compare, evaluate
from training.evaluation.bootstrap import p_value
from training.evaluation.translations import comparison

WORDS = [f"{first}{second}" for first in "bdgklm" for second in ("a", "e", "i")]


def references_of(count: int) -> list[str]:
    dice = random.Random(1)
    return [" ".join(dice.choices(WORDS, k=dice.randint(5, 14))) for _ in range(count)]


def with_mistakes(references: list[str], share: float, seed: int) -> list[str]:
    """The references, with so large a share of wrong words."""
    dice = random.Random(seed)
    return [
        " ".join(word if dice.random() >= share else dice.choice(WORDS) for word in reference.split())
        for reference in references
    ]


REFERENCES = references_of(300)
GOOD = with_mistakes(REFERENCES, 0.15, seed=2)
BAD = with_mistakes(REFERENCES, 0.30, seed=3)


def evaluated(run: Path, translations: list[str], references: list[str], label: str = "test", **about: object) -> Path:
    """A run folder with an evaluation as `training.evaluation.evaluate` writes it, as far as it is read here."""
    folder = run / "evaluation"
    folder.mkdir(parents=True, exist_ok=True)
    languages = {"source": "zh", "target": "en"}
    scores = {"part": "test", "split": "random", "languages": languages, "sentences": len(references), **about}
    (folder / f"{label}.json").write_text(json.dumps(scores))
    rows = [
        {"row": number, "source": "你好。", "reference": reference, "translation": translation, "note": ""}
        for number, (reference, translation) in enumerate(zip(references, translations, strict=True))
    ]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / f"{label}-translations.jsonl").write_text(lines, encoding="utf-8")
    return run


def refused(*words: object) -> str:
    with pytest.raises(UserError) as error:
        compare.main(list(map(str, words)))
    return str(error.value)


def test_the_better_one_is_found_whichever_stands_first(tmp_path: Path, launch: Launch, capsys):
    good, bad = evaluated(tmp_path / "good", GOOD, REFERENCES), evaluated(tmp_path / "bad", BAD, REFERENCES)
    result = launch(good, bad, module="training.evaluation.compare").wait()
    assert (result.status, result.err) == (0, ""), result
    verdicts = result.out.splitlines()[-2:]
    assert verdicts == [f"{metric}: {good} is better, p = 0.001" for metric in ("BLEU", "chrF")]
    assert "test part, random split, 300 sentences" in result.out
    assert "bs:1000|seed:12345" in result.out and "version:" in result.out
    assert compare.main([str(bad), str(good)]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == verdicts


def test_equal_ones_are_not_told_apart(tmp_path: Path, capsys):
    first = evaluated(tmp_path / "first", GOOD, REFERENCES)
    alike = evaluated(tmp_path / "alike", with_mistakes(REFERENCES, 0.15, seed=4), REFERENCES)
    evaluated(first, GOOD, REFERENCES, "test-beam5")
    assert compare.main([str(first), str(alike)]) == 0
    said = capsys.readouterr().out
    assert said.count("no difference can be told") == 2 and "is better" not in said
    assert compare.main([str(first), f"{first}:test-beam5"]) == 0
    said = capsys.readouterr().out
    assert said.count("no difference can be told at p < 0.05 (p = 1.000)") == 2
    assert "300 of 300 translations are identical (100.0%)" in said and f"{first}:test-beam5" in said


def plain_bleu(counts: np.ndarray) -> float:
    """BLEU of summed counts: n-grams right, n-grams said, each for n of 1 to 4, and the lengths of both sides."""
    right, said, (own, wanted) = counts[0:4], counts[4:8], counts[8:]
    return 100 * np.exp(np.log(right / said).mean() + min(0, 1 - wanted / own))


def plain_counts(translation: str, reference: str) -> list[int]:
    def grams(text: str, n: int) -> Counter[tuple[str, ...]]:
        words = text.split()
        return Counter(zip(*(words[start:] for start in range(n)), strict=False))

    own, wanted = translation.split(), reference.split()
    right = [(grams(translation, n) & grams(reference, n)).total() for n in range(1, 5)]
    return [*right, *(max(0, len(own) - n) for n in range(4)), len(own), len(wanted)]


def test_scores_and_p_are_those_of_a_plain_bootstrap(tmp_path: Path):
    slightly_worse = with_mistakes(REFERENCES, 0.16, seed=5)
    runs = {"a": GOOD, "b": slightly_worse}
    folders = [evaluated(tmp_path / name, translations, REFERENCES) for name, translations in runs.items()]
    verdict, _ = comparison.compare(*(comparison.open_evaluation(folder.name, folder, "test") for folder in folders))

    counts = np.array([[plain_counts(*pair) for pair in zip(said, REFERENCES, strict=True)] for said in runs.values()])
    scores = [plain_bleu(own) for own in counts.sum(1)]
    assert verdict.scores == pytest.approx(scores)
    dice, samples = np.random.default_rng(7), []
    for _ in range(4000):
        drawn = dice.choice(len(REFERENCES), len(REFERENCES))
        samples.append([plain_bleu(own[drawn].sum(0)) for own in counts])
    differences = np.diff(samples, axis=1)[:, 0]
    chance = np.abs(differences - differences.mean()) >= abs(scores[1] - scores[0])
    assert 0.05 < chance.mean() < 0.6, "a p that any test would find shows nothing"
    assert verdict.p == pytest.approx(chance.mean(), abs=0.04)
    expected = [np.percentile(system, [2.5, 97.5]) for system in np.transpose(samples)]
    assert np.array(verdict.intervals) == pytest.approx(np.array(expected), abs=0.3)
    assert np.array(verdict.difference_interval) == pytest.approx(np.percentile(differences, [2.5, 97.5]), abs=0.3)


def test_where_there_is_no_difference_one_is_found_once_in_twenty_times():
    dice, found = np.random.default_rng(0), 0
    for _ in range(400):
        differences = dice.normal(size=100)  # of single sentences, none on average
        resampled = differences[dice.integers(100, size=(500, 100))].mean(1)
        found += p_value(differences.mean(), resampled) < 0.05
    assert 0.025 < found / 400 < 0.09


def test_what_was_not_scored_on_the_same_rows_is_refused_with_what_differs(tmp_path: Path, launch: Launch):
    first = evaluated(tmp_path / "first", GOOD, REFERENCES)
    other = [*REFERENCES[:5], "another one", *REFERENCES[6:]]
    changed = evaluated(tmp_path / "changed", GOOD, other)
    result = launch(first, changed, module="training.evaluation.compare").wait()
    assert result.status == 1 and len(result.error_lines) == 1 and "Traceback" not in result.err, result
    assert f"first, row 5 ({REFERENCES[5]!r}) and row 5 ('another one')" in result.err and "--data" in result.err
    shorter = evaluated(tmp_path / "shorter", GOOD[:200], REFERENCES[:200], split="grouped")
    assert "split random and grouped; sentences 300 and 200. Two splits have other sentences" in refused(first, shorter)
    validation = evaluated(tmp_path / "part", GOOD[::-1], REFERENCES[::-1], "validation", part="validation")
    assert "part test and validation" in refused(first, f"{validation}:validation")


def test_a_missing_evaluation_names_the_command_that_makes_it(tmp_path: Path):
    run = evaluated(tmp_path / "a:b", GOOD, REFERENCES)  # a colon in the folder's name is no label
    label = "validation-last3-beam5-penalty0.6-with-b-1,c"
    runs = f"{run},{tmp_path / 'b-1'},{tmp_path / 'c'}"
    command = (
        f"evaluate {runs} --part validation --checkpoint last:3 --beam_size 5 --length_penalty 0.6`; there is test"
    )
    said = refused(run, f"{run}:{label}")
    assert f"{run} was not evaluated as {label}: run `python -m training.evaluation.{command}" in said
    (tmp_path / "new").mkdir()
    assert f"run `python -m training.evaluation.evaluate {tmp_path / 'new'}`" in refused(run, tmp_path / "new")
    assert "there is no run folder" in refused(run, tmp_path / "nowhere")
    assert "'best' is no label of an evaluation: it begins with" in refused(run, f"{run}:best")


@pytest.mark.parametrize("damage", ["not JSON", "[]", '{"part": "test", "split": "random", "sentences": 301}'])
def test_a_damaged_evaluation_is_named_with_the_command_that_mends_it(tmp_path: Path, damage: str):
    run = evaluated(tmp_path / "run", GOOD, REFERENCES)
    (run / "evaluation/test.json").write_text(damage)
    assert f"are damaged: run `python -m training.evaluation.evaluate {run}` again" in refused(run, run)


def test_evaluations_of_a_trained_run_are_compared(sample_data: Path, tmp_path: Path, launch: Launch, capsys):
    run = tmp_path / "run"
    small = ("--model.layers", 1, "--model.heads", 2, "--model.width", 32, "--model.context", 40, "--optim.steps", 20)
    started = launch("--run_dir", run, "--data", sample_data, *small, "--optim.warmup_steps", 5, "--optim.lr", 6e-3)
    assert started.wait().status == 0
    for words in ((), ("--beam_size", "2")):
        assert evaluate.main([str(run), *words]) == 0
    capsys.readouterr()
    assert compare.main([str(run), f"{run}:test-beam2"]) == 0
    said = capsys.readouterr().out
    for label in ("test", "test-beam2"):
        scores = json.loads((run / f"evaluation/{label}.json").read_text())
        for key in ("bleu", "chrf"):
            low, high = scores[f"{key}_interval"]
            assert f"{scores[key]:6.2f}   {low:.2f} to {high:.2f}" in said
    assert "of 600 translations are identical" in said


# Groups of runs, each with a seed of its own.


def seeds_of(tmp_path: Path, name: str, share: float, seeds: range) -> str:
    for seed in seeds:
        evaluated(tmp_path / f"{name}-s{seed}", with_mistakes(REFERENCES, share, seed), REFERENCES)
    return f"{tmp_path}/{name}-s*"


def test_groups_are_told_by_mean_and_spread_and_the_better_one_is_found(tmp_path: Path, capsys):
    good, bad = seeds_of(tmp_path, "good", 0.15, range(3)), seeds_of(tmp_path, "bad", 0.2, range(10, 13))
    assert compare.main([good, bad]) == 0
    said = capsys.readouterr().out
    one, other = (
        [sacrebleu.corpus_bleu(with_mistakes(REFERENCES, share, seed), [REFERENCES]).score for seed in seeds]
        for share, seeds in ((0.15, range(3)), (0.2, range(10, 13)))
    )
    expected = ttest_ind(other, one, equal_var=False)
    assert re.search(rf"{re.escape(good)} +3 +{np.mean(one):.2f} +{np.std(one, ddof=1):.2f} ", said), said
    assert f"{np.mean(other) - np.mean(one):+.2f} (95 %" in said and f"p = {expected.pvalue:.3f}" in said
    assert f"BLEU: {good} is better" in said and f"chrF: {good} is better" in said


def test_groups_of_one_recipe_are_not_told_apart(tmp_path: Path, capsys):
    groups = seeds_of(tmp_path, "a", 0.15, range(3)), seeds_of(tmp_path, "b", 0.15, range(10, 13))
    assert compare.main(list(groups)) == 0
    assert capsys.readouterr().out.count("no difference can be told") == 2


def test_groups_without_any_spread_are_not_told_apart(tmp_path: Path, capsys):
    for name, said in (("a", GOOD), ("b", BAD)):
        for seed in range(2):
            evaluated(tmp_path / f"{name}-s{seed}", said, REFERENCES)
    assert compare.main([f"{tmp_path}/a-s*", f"{tmp_path}/b-s*"]) == 0
    printed = capsys.readouterr().out
    assert "BLEU: the runs of each group score the same, so there is no spread to test by" in printed
    assert "better" not in printed


def test_what_a_run_was_before_it_became_longer_is_no_run_of_the_group(tmp_path: Path, capsys):
    group = seeds_of(tmp_path, "a", 0.15, range(3))
    evaluated(tmp_path / "a-s1-at-300", BAD, REFERENCES)
    assert compare.main([group]) == 0
    assert re.search(rf"{re.escape(group)} +3 ", capsys.readouterr().out)


def test_one_group_is_told_alone_and_a_single_run_has_no_spread(tmp_path: Path, capsys):
    group = seeds_of(tmp_path, "a", 0.15, range(3))
    assert compare.main([group]) == 0
    assert "better" not in capsys.readouterr().out
    single = evaluated(tmp_path / "single", GOOD, REFERENCES)
    assert compare.main([group, str(single)]) == 0
    said = capsys.readouterr().out
    assert "is a single run" in said and "p =" not in said


def test_what_is_no_group_is_refused(tmp_path: Path):
    group = seeds_of(tmp_path, "a", 0.15, range(2))
    evaluated(tmp_path / "a-s9", GOOD[:200], REFERENCES[:200])
    assert "not scored on the same rows" in refused(group)
    assert "there is no run folder" in refused(f"{tmp_path}/none-*")
    assert "names no group" in refused(f"{tmp_path}/**a")
    assert "in quotes" in refused(*(tmp_path / f"a-s{seed}" for seed in (0, 1, 9)))
    assert "in quotes" in refused(tmp_path / "a-s0")
    (tmp_path / "a-s1/evaluation/test.json").unlink()
    assert "was not evaluated as test" in refused(group)
