"""Which row goes where: the usual split to the row, the grouped one without a leak, and the leaks told in numbers."""

from pathlib import Path

import numpy as np
import pytest
from sklearn.model_selection import train_test_split

from data_prep import pairs
from data_prep.preparing import too_many_malformed
from data_prep.splits import connected_groups, grouped_split, random_split, validation_share_of, wanted_rows
from tests.support.commands import REAL_TATOEBA
from training.data.languages import language_of
from training.data.prepared import PARTS, Prepared, open_prepared
from training.data.text import normalise

ZH, EN = language_of("zh"), language_of("en")


def prepared(folder: Path, *words: str) -> Prepared:
    assert pairs.main(["--source", str(REAL_TATOEBA), "--output", str(folder), *words]) == 0
    return open_prepared(folder)


@pytest.fixture(scope="module")
def random(tmp_path_factory) -> Prepared:
    if not REAL_TATOEBA.exists():
        pytest.skip(f"the real Tatoeba file is not at {REAL_TATOEBA} (RELAY_DATA names the folder above it)")
    return prepared(tmp_path_factory.mktemp("random") / "x", "--tokenizer", "word", "--simplify", "false")


@pytest.fixture(scope="module")
def grouped(random, tmp_path_factory) -> Prepared:
    words = ("--tokenizer", "word", "--split", "grouped", "--simplify", "true")
    return prepared(tmp_path_factory.mktemp("grouped") / "x", *words)


def sentences(data: Prepared, *parts: str) -> tuple[list[str], list[str]]:
    opened = [data.part(name) for name in parts]
    return [t for part in opened for t in part.source_texts], [t for part in opened for t in part.target_texts]


def test_random_split_of_the_real_file_is_scikit_learns_to_the_row(random):
    lines = REAL_TATOEBA.read_text(encoding="utf-8").splitlines()
    assert len(lines) == random.meta["counts"]["pairs"] == 28_447
    train, test = train_test_split(np.arange(len(lines)), test_size=0.1, shuffle=True, random_state=1234)
    assert (len(train), len(test)) == (25_602, 2_845)
    np.testing.assert_array_equal(random.part("test").rows, test)
    np.testing.assert_array_equal(np.concatenate([random.part("validation").rows, random.part("train").rows]), train)
    for name in PARTS:
        part = random.part(name)
        assert list(part.target_texts) == [lines[row].split("\t")[0] for row in part.rows]


@pytest.mark.parametrize("share", [0.1, 0.25])
@pytest.mark.parametrize("count", [10, 11, 100, 28_447, 32_028])
@pytest.mark.parametrize("seed", [0, 1234])
def test_random_split_of_any_size_is_scikit_learns(count, seed, share):
    train, test = train_test_split(np.arange(count), test_size=share, shuffle=True, random_state=seed)
    split = random_split(count, 0.05, seed, share)
    np.testing.assert_array_equal(split.test, test)
    np.testing.assert_array_equal(np.concatenate([split.validation, split.train]), train)


@pytest.mark.parametrize(("records", "rows"), [(200, 18), (1000, 50), (5000, 50), (285_781, 2572)])
def test_few_records_have_a_validation_part_that_tells_checkpoints_apart(records, rows):
    assert round(wanted_rows(records, validation_share_of(records))["validation"]) == rows


@pytest.mark.parametrize(
    ("malformed", "lines", "share", "refused"),
    [
        *((4, 157, None, False), (11, 157, None, True), (2, 20, None, False), (3, 20, None, True)),
        *((10, 1000, None, False), (11, 1000, None, True), (500, 50_000, None, False), (501, 50_000, None, True)),
        *((1, 157, 0, True), (4, 157, 0.01, True), (20, 100, 0.2, False)),
    ],
)
def test_a_few_malformed_lines_of_a_small_source_are_left_out_and_many_or_more_than_was_said_refused(
    malformed, lines, share, refused
):
    assert (too_many_malformed(malformed, lines, share) is not None) == refused


def test_validation_share_does_not_move_a_test_row():
    np.testing.assert_array_equal(random_split(500, 0.05, 7).test, random_split(500, 0.2, 7).test)


def test_random_splits_leak_is_stated_in_numbers_and_words(random):
    leak = random.meta["leakage"]["test"]
    assert leak["exact"] == {
        "source": 501,
        "target": 247,
        "either": 670,
        "either_share": pytest.approx(0.2355, abs=1e-4),
    }
    assert "670 (23.6%)" in leak["words"]
    seen_zh, seen_en = map(set, sentences(random, "train", "validation"))
    chinese, english = sentences(random, "test")
    assert sum(zh in seen_zh or en in seen_en for zh, en in zip(chinese, english, strict=True)) == 670
    seen_zh, seen_en = {normalise(text, ZH) for text in seen_zh}, {normalise(text, EN) for text in seen_en}
    same = sum(
        normalise(zh, ZH) in seen_zh or normalise(en, EN) in seen_en for zh, en in zip(chinese, english, strict=True)
    )
    assert same == leak["normalised"]["either"] >= 670


def test_grouped_split_of_the_real_file_has_no_sentence_on_two_sides(grouped):
    for side in range(2):
        seen: dict[str, str] = {}
        for name in PARTS:
            for text in sentences(grouped, name)[side]:
                assert seen.setdefault(normalise(text, (ZH, EN)[side]), name) == name, text
    for part in ("test", "validation"):
        assert grouped.meta["leakage"][part]["normalised"]["either"] == 0
        assert grouped.meta["leakage"][part]["exact"]["either"] == 0


def test_grouped_split_of_the_real_file_uses_every_row_once_and_gives_test_a_tenth(grouped):
    rows = np.concatenate([grouped.part(name).rows for name in PARTS])
    np.testing.assert_array_equal(np.sort(rows), np.arange(28_447))
    assert grouped.meta["rows"] == {name: len(grouped.part(name)) for name in PARTS}
    assert len(grouped.part("test")) == 2_845
    assert len(grouped.part("validation")) == 1_281


def test_grouped_test_sentences_are_as_long_as_the_others(grouped):
    means = [grouped.meta["lengths"][name]["target"]["mean"] for name in PARTS]
    assert max(means) - min(means) < 0.3


def test_simplify_leaves_no_traditional_character(random, grouped):
    assert "".join(sentences(random, "test")[0]).count("們") > 0
    assert "".join(text for name in PARTS for text in sentences(grouped, name)[0]).count("們") == 0


def test_groups_join_rows_through_other_rows():
    english = np.array([5, 5, 1, 7, 2], dtype=np.uint64)
    chinese = np.array([9, 3, 3, 8, 4], dtype=np.uint64)
    assert connected_groups(english, chinese).tolist() == [0, 0, 0, 1, 2]
    # A chain through all rows, which nobody sees from one of its ends.
    chain = np.random.RandomState(1).permutation(1000).astype(np.uint64)
    assert connected_groups(chain // np.uint64(2), (chain + np.uint64(1)) // np.uint64(2)).tolist() == [0] * 1000


def test_same_sentence_is_recognised_in_any_dress():
    assert normalise("他們 去了，北京！", ZH) == normalise("他们去了北京。", ZH)
    assert normalise("ＡＢＣ　Café's", EN) == normalise("abc cafés", EN)
    assert normalise("他们", ZH) != normalise("她们", ZH)
    assert normalise("?!", EN) == "?!" != normalise("...", EN)
    assert normalise("經驗。", language_of("ja")) == "經驗", "variants of characters are one in Chinese alone"


def test_grouped_split_depends_on_the_seed_only():
    labels = np.arange(300) // 2
    first, again, other = (grouped_split(labels, 0.1, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.test, again.test)
    assert set(first.test) != set(other.test)
    assert first.groups == 150 and first.largest_group == 2
