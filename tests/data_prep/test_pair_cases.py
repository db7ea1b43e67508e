"""Files of sentence pairs as people have them, in tests/cases/pairs: what becomes of each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_prep import pairs
from tests.support.commands import ROOT
from training.base.console import UserError
from training.data.prepared import PARTS, Prepared, open_prepared
from training.data.tokenizers import UNK

CASES = ROOT / "tests/cases/pairs"
PIECES = ("--tokenizer", "sentencepiece", "--vocabulary_size", "400")


def prepared(folder: Path, case: str | Path, *words: object) -> Prepared:
    assert pairs.main(["--source", str(CASES / case), "--output", str(folder / "x"), *map(str, words)]) == 0
    return open_prepared(folder / "x")


def texts(data: Prepared) -> list[tuple[str, str]]:
    """All pairs, in the order of the file."""
    found: dict[int, tuple[str, str]] = {}
    for part in map(data.part, PARTS):
        found |= zip(part.rows.tolist(), zip(part.source_texts, part.target_texts, strict=True), strict=True)
    return [found[row] for row in range(len(found))]


def contract(number: int) -> tuple[str, str]:
    yuan, town = 37 * number, number % 7
    return f"第{number}号合同在{town}镇要{yuan}元。", f"Contract number {number} costs {yuan} yuan in town {town}."


CONTRACTS = [contract(number) for number in range(1, 401)]


@pytest.mark.parametrize(
    ("case", "columns"),
    [
        ("t01_tatoeba_4col.tsv", ("column 2", "column 4", ["column 1", "column 3"])),
        ("t03_mixed_cr_lf.tsv", ("column 2", "column 1", [])),
        ("t05_zh_first_score.tsv", ("column 2", "column 1", ["column 3"])),
        ("t06_pairs.tsv.bz2", ("column 2", "column 1", [])),
        ("t12_invisible.tsv", ("column 2", "column 1", [])),
    ],
)
def test_all_pairs_are_read_wherever_they_stand_and_what_is_not_read_is_named(
    case: str, columns: tuple[str, str, list[str]], tmp_path: Path, capsys: Any
):
    data = prepared(tmp_path, case)
    assert texts(data) == CONTRACTS
    about = data.meta["source"]["columns"]
    assert (about["source"], about["target"], about["not_read"]) == columns
    said = capsys.readouterr().out
    assert f"{columns[0]} (source), {columns[1]} (target), by their script" in said
    assert all(f"  not read  {', '.join(columns[2])}\n" in said for _ in columns[2])


def test_chinese_first_and_a_score_third_are_read_as_well(tmp_path: Path):
    rows = [line.split("\t") for line in (CASES / "t05_zh_first_score.tsv").read_text(encoding="utf-8").splitlines()]
    (tmp_path / "swapped.tsv").write_text("\n".join(f"{zh}\t{en}\t{score}" for en, zh, score in rows), encoding="utf-8")
    data = prepared(tmp_path, tmp_path / "swapped.tsv")
    assert texts(data) == CONTRACTS and data.meta["source"]["columns"]["not_read"] == ["column 3"]
    assert {text.as_py() for text in data.columns("train")["attribution"]} == {""}


def test_a_tab_inside_the_chinese_makes_no_pair_of_half_a_sentence(tmp_path: Path):
    with pytest.raises(UserError, match=r"80 of 400 lines .*mostly: 3 columns where others .* have 2, 80; .* line 5: "):
        prepared(tmp_path, "t04_extra_tab_in_chinese.tsv")
    data = prepared(tmp_path, "t04_extra_tab_in_chinese.tsv", "--max_malformed_share", 0.3)
    assert texts(data) == [pair for number, pair in enumerate(CONTRACTS, 1) if number % 5]
    assert data.meta["counts"]["malformed"] == 80


def test_quotes_are_characters_of_a_text_with_tabs_and_cells_of_a_csv(tmp_path: Path, capsys: Any):
    unmatched = prepared(tmp_path / "unmatched", "t07_unmatched_quote.tsv")
    assert len(texts(unmatched)) == 400 and any(text.startswith('"') for pair in texts(unmatched) for text in pair)
    first = '"Contract number 1 costs 37 yuan in town 1. He said ""yes""."'
    assert texts(prepared(tmp_path / "tabs", "t08_csv_quoted_tabs.tsv"))[0][1] == first
    assert "400 of 400 lines are in quotes, which the model learns to write, too" in capsys.readouterr().err
    (tmp_path / "quoted.csv").write_bytes((CASES / "t08_csv_quoted_tabs.tsv").read_bytes())
    as_csv = texts(prepared(tmp_path / "csv", tmp_path / "quoted.csv"))
    assert as_csv == [(zh, f'{en} He said "yes".') for zh, en in CONTRACTS]


@pytest.mark.parametrize("case", ["t09_long_docs.tsv", "t10_some_long.tsv"])
def test_long_lines_count_for_the_vocabulary(case: str, tmp_path: Path):
    data = prepared(tmp_path, case, *PIECES)
    assert len(texts(data)) == 40
    assert max(len(text.encode()) for pair in texts(data) for text in pair) > 4192
    ids = data.target_tokenizer.encode("Contract number 7 costs")
    assert UNK not in ids and len(ids) <= 5, "the words of long lines are pieces"
    assert data.meta["tokenizer"]["unknown_share"]["train"] == {"source": 0, "target": 0}


def test_a_character_that_sentencepiece_reserves_does_not_hide_its_line(tmp_path: Path):
    data = prepared(tmp_path, "t15_lower_one_block.tsv", *PIECES)
    part = data.part("train")
    known = data.source_tokenizer.encode("第5号合同在5镇要185元。")
    assert UNK not in known
    assert all((row == UNK).sum() == 1 for row in part.source), "the reserved character alone is unknown"


@pytest.mark.parametrize(
    ("case", "option", "count", "noted", "first", "converted"),
    [
        (
            "t14_html_entities.tsv",
            "unescape",
            "with_entities",
            "400 pairs have characters as HTML writes them (&quot;)",
            ("第1号合同在1镇要37元。&quot;是&quot;", "&quot;Yes&quot; &amp; &#39;no&#39;"),
            ('第1号合同在1镇要37元。"是"', "\"Yes\" & 'no'"),
        ),
        (
            "t17_fullwidth_english.tsv",
            "narrow",
            "with_full_width",
            "200 pairs have full-width Latin letters or digits",
            ("Ａ2ｂ１２３", "Contract number 2"),
            ("A2b123", "Contract number 2"),
        ),
    ],
)
def test_entities_and_full_width_letters_are_told_and_converted_on_request(
    case: str,
    option: str,
    count: str,
    noted: str,
    first: tuple[str, str],
    converted: tuple[str, str],
    tmp_path: Path,
    capsys: Any,
):
    for words, expected, said in (
        ((), first, f"kept as they are; --{option} converts them"),
        ((f"--{option}",), converted, "converted to the ordinary ones"),
    ):
        data = prepared(tmp_path / said[:4], case, *words)
        found = texts(data)
        assert len(found) == 400 and data.meta["counts"][count] == int(noted.split()[0])
        assert any(pair[0] == expected[0] and expected[1] in pair[1] for pair in found[:2])
        assert f"{noted}: {said}" in capsys.readouterr().out
    assert first[0] not in [pair[0] for pair in found]


def test_what_unicode_calls_a_line_end_stands_inside_a_sentence(tmp_path: Path):
    found = texts(prepared(tmp_path, "t20_u2028.tsv"))
    assert found == [(f"{zh} 又。", f"{en} More.") for zh, en in CONTRACTS]


def test_every_case_has_a_test():
    here = Path(__file__).read_text(encoding="utf-8")
    of_translate = (ROOT / "tests/training/evaluation/test_translate.py").read_text(encoding="utf-8")
    names = [path.name for path in CASES.iterdir()]
    assert len(names) == 17 and [name for name in names if name not in here and name not in of_translate] == []


def test_what_was_converted_is_converted_in_the_data_sets_identity(tmp_path: Path):
    fingerprints = set()
    for words in ((), ("--unescape",), ("--narrow",), ("--source_language", "en", "--target_language", "zh")):
        data = prepared(tmp_path / str(len(fingerprints)), "t14_html_entities.tsv", "--tokenizer", "word", *words)
        fingerprints.add(data.fingerprint)
    assert len(fingerprints) == 4
    assert json.loads((tmp_path / "0/x/meta.json").read_text())["options"].keys() == {
        *("min_frequency", "seed", "simplify", "split", "tokenizer", "validation_share", "vocabularies"),
    }
