"""Sentence pairs in the forms and packings of files that people have: the same pairs out of each."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep import pairs, tables
from data_prep.sources import sample_lines
from tests.support.disks import not_as_root
from training.base.console import UserError
from training.data.prepared import Prepared, open_prepared

PAIRS = [(english, chinese) for english, chinese, _ in (line.split("\t") for line in sample_lines()[:120])]
TEXT = "".join(f"{english}\t{chinese}\n" for english, chinese in PAIRS).encode()


def as_csv(delimiter: str, *heading: str) -> bytes:
    made = io.StringIO()
    writer = csv.writer(made, delimiter=delimiter, quoting=csv.QUOTE_ALL)
    writer.writerows([*([heading] if heading else []), *PAIRS])
    return made.getvalue().encode()


def as_lines(rows: Sequence[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def as_parquet(columns: dict[str, Any]) -> bytes:
    made = io.BytesIO()
    pq.write_table(pa.table(columns), made)
    return made.getvalue()


def as_zip(name: str, content: bytes) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as opened:
        opened.writestr(name, content)
        opened.writestr("_about.txt", "about")
    return made.getvalue()


def as_tar(name: str, content: bytes) -> bytes:
    made, about = io.BytesIO(), tarfile.TarInfo(name)
    about.size = len(content)
    with tarfile.open(fileobj=made, mode="w:gz") as opened:
        opened.addfile(about, io.BytesIO(content))
    return made.getvalue()


TRANSLATIONS = [{"id": n, "translation": {"en": en, "zh": zh}, "score": 0.5} for n, (en, zh) in enumerate(PAIRS)]
COLUMNS = {"zh": [zh for _, zh in PAIRS], "quality": [1.5] * len(PAIRS), "en": [en for en, _ in PAIRS]}

FORMS = {
    "tabs.tsv": TEXT,
    "packed.tsv.gz": gzip.compress(TEXT[:2000]) + gzip.compress(TEXT[2000:]),  # of two members
    "packed.txt.bz2": bz2.compress(TEXT),
    "packed.tsv.xz": lzma.compress(TEXT),
    "packed.tsv.zst": pa.compress(TEXT, codec="zstd", asbytes=True),
    "packed.zip": as_zip("deep/pairs.tsv", TEXT),
    "commas.csv": as_csv(",", "english", "chinese"),
    "semicolons.csv": as_csv(";"),
    "tabs.csv": as_csv("\t"),
    "packed.csv.gz": gzip.compress(as_csv(",", "en", "zh")),
    "lines.jsonl": as_lines([{"zh": zh, "en": en} for en, zh in PAIRS]),
    "translations.json": as_lines(TRANSLATIONS),
    "packed.jsonl.zst": pa.compress(as_lines(TRANSLATIONS), codec="zstd", asbytes=True),
    "packed.jsonl.zip": as_zip("lines.jsonl", as_lines(TRANSLATIONS)),
    "columns.parquet": as_parquet(COLUMNS),
    "translations.parquet": as_parquet({"translation": [row["translation"] for row in TRANSLATIONS]}),
    "named-otherwise": as_parquet(COLUMNS),
}


def prepared(folder: Path, source: str, *words: object) -> Prepared:
    assert pairs.main(["--source", source, "--output", str(folder / "x"), *map(str, words)]) == 0
    return open_prepared(folder / "x")


def texts(data: Prepared) -> set[tuple[str, str]]:
    parts = map(data.part, ("train", "validation", "test"))
    return {pair for part in parts for pair in zip(part.target_texts, part.source_texts, strict=True)}


def refused(folder: Path, source: object, *words: object) -> str:
    with pytest.raises(UserError) as error:
        prepared(folder, str(source), *words)
    assert not (folder / "x").exists()
    return str(error.value)


@pytest.mark.parametrize("name", FORMS)
def test_every_form_and_packing_holds_the_same_pairs(name: str, tmp_path: Path):
    (tmp_path / name).write_bytes(FORMS[name])
    data = prepared(tmp_path, str(tmp_path / name))
    assert texts(data) == set(PAIRS)
    plain = tables.open_text(tmp_path / name).sha256 if name.endswith("tsv") else None
    assert plain in (None, data.meta["source"]["sha256"])


def test_a_text_has_one_identity_however_it_is_packed(tmp_path: Path):
    names = [name for name in FORMS if name in ("tabs.tsv", "packed.zip") or name.startswith(("packed.t",))]
    for name in names:
        (tmp_path / name).write_bytes(FORMS[name])
    assert len({tables.open_text(tmp_path / name).sha256 for name in names}) == 1 and len(names) == 6


@pytest.mark.parametrize("first", ["zh", "en"])
def test_two_parallel_files_are_told_by_their_ends(first: str, tmp_path: Path):
    for place, end in enumerate(("en", "cmn")):
        text = "\n".join(pair[place] for pair in PAIRS) + "\n"
        (tmp_path / f"train.{end}.gz").write_bytes(gzip.compress(text.encode()))
    names = [str(tmp_path / f"train.{end}.gz") for end in (("cmn", "en") if first == "zh" else ("en", "cmn"))]
    data = prepared(tmp_path, ",".join(names))
    assert texts(data) == set(PAIRS)
    assert [file["place"] for file in data.meta["source"]["files"]] == names


def test_parallel_files_of_other_lengths_are_refused(tmp_path: Path):
    (tmp_path / "a.en").write_text("Hi.\nGo.\n")
    (tmp_path / "a.zh").write_text("嗨。\n走。\n跑。\n", encoding="utf-8")
    said = refused(tmp_path, f"{tmp_path / 'a.en'},{tmp_path / 'a.zh'}")
    assert "a.en has 2 lines and" in said and "a.zh 3: line N of one belongs to line N of the other" in said


def test_a_stray_cr_in_one_of_two_files_moves_no_sentence_to_another(tmp_path: Path):
    for end, place, number in (("en", 0, 7), ("zh", 1, 90)):
        lines = [pair[place] for pair in PAIRS]
        lines[number] = f"\r{lines[number]}"
        (tmp_path / f"a.{end}").write_bytes("\r\n".join(lines).encode())
    assert texts(prepared(tmp_path, f"{tmp_path / 'a.en'},{tmp_path / 'a.zh'}")) == set(PAIRS)


def test_a_folder_of_texts_is_not_left_to_a_library_that_takes_the_first_pair_for_a_heading(tmp_path: Path):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/a.tsv").write_bytes(TEXT)
    assert "is a folder of texts" in refused(tmp_path, tmp_path / "shards")


def test_a_file_that_may_not_be_read_is_one_line():
    with not_as_root() as folder:
        (folder / "a.tsv").write_bytes(TEXT)
        (folder / "a.tsv").chmod(0)
        assert "a.tsv cannot be read: Permission denied" in refused(folder, folder / "a.tsv")


def test_an_empty_line_of_one_of_two_files_is_no_pair_and_is_named(tmp_path: Path):
    rows = [*PAIRS, ("Alone.", ""), ("", "")]
    for place, end in enumerate(("en", "zh")):
        (tmp_path / f"a.{end}").write_text("\n".join(pair[place] for pair in rows) + "\n", encoding="utf-8")
    counts = prepared(tmp_path, f"{tmp_path / 'a.en'},{tmp_path / 'a.zh'}").meta["counts"]
    assert (counts["pairs"], counts["blank"]) == (120, 1)
    assert [(row["line"], row["reason"]) for row in counts["malformed_listed"]] == [(121, "no Chinese")]


def save_folder(folder: Path) -> None:
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(FORMS["lines.jsonl"])
    (folder / "LICENSE.txt").write_text("free")


def save_to_disk(folder: Path) -> None:
    datasets.Dataset.from_list(TRANSLATIONS).save_to_disk(folder)


def save_splits(folder: Path) -> None:
    datasets.DatasetDict({"train": datasets.Dataset.from_list(TRANSLATIONS)}).save_to_disk(folder)


@pytest.mark.parametrize("save", [save_folder, save_to_disk, save_splits])
def test_data_sets_of_the_datasets_library_are_read_from_folders(save: Callable[[Path], None], tmp_path: Path):
    save(tmp_path / "set")
    data = prepared(tmp_path, str(tmp_path / "set"))
    assert texts(data) == set(PAIRS)
    source = data.meta["source"]
    assert source["kind"] == "folder" and source["archive"] == {"split": "train", "subset": None, "revision": None}
    assert pairs.main(["--source", str(tmp_path / "set"), "--output", str(tmp_path / "x")]) == 0, "found done"


def test_a_split_that_a_data_set_lacks_is_named_with_those_that_it_has(tmp_path: Path):
    save_splits(tmp_path / "set")
    words = ["--train", str(tmp_path / "set"), "--test", str(tmp_path / "set"), "--output", str(tmp_path / "x")]
    with pytest.raises(UserError, match="has no split test; it has train"):
        pairs.main(words)


def test_a_data_set_of_the_hub_that_cannot_be_had_is_one_line_with_what_to_do(tmp_path: Path, monkeypatch: Any):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    said = refused(tmp_path, "hub:nobody/nothing-at-all", "--subset", "en-zh", "--revision", "main")
    assert "hub:nobody/nothing-at-all cannot be read as a data set" in said
    assert "hf download nobody/nothing-at-all --repo-type dataset --local-dir FOLDER" in said and "\n" not in said


def test_of_a_data_set_of_the_hub_the_commit_is_recorded(tmp_path: Path, monkeypatch: Any):
    save_folder(tmp_path / "set")
    load, asked = datasets.load_dataset_builder, []

    def from_the_hub(name: str, subset: str | None, *, revision: str | None) -> Any:
        """As the library has it of the hub, but for the files."""
        asked.append((name, subset, revision))
        builder = load(str(tmp_path / "set"))
        builder.base_path = f"hf://datasets/{name}@{'5' * 40}/{subset}"
        return builder

    monkeypatch.setattr(datasets, "load_dataset_builder", from_the_hub)
    words = ("--subset", "en-zh", "--revision", "main")
    data = prepared(tmp_path, "hub:owner/set", *words)
    assert asked == [("owner/set", "en-zh", "main")] and texts(data) == set(PAIRS)
    source = data.meta["source"]
    assert (source["kind"], source["place"]) == ("hub", "hub:owner/set")
    assert source["archive"] == {"split": "train", "subset": "en-zh", "revision": "5" * 40}


def test_columns_are_taken_by_name_or_number_where_that_is_asked_for(tmp_path: Path):
    rows = [{"left": zh, "mid": en[::-1], "right": en, "by": "me"} for en, zh in PAIRS]
    (tmp_path / "a.jsonl").write_bytes(as_lines(rows))
    assert "several columns hold Chinese or English" in refused(tmp_path, tmp_path / "a.jsonl")
    data = prepared(tmp_path / "json", str(tmp_path / "a.jsonl"), "--columns", "left,right,by")
    assert texts(data) == set(PAIRS) and data.meta["source"]["columns"]["not_read"] == ["mid"]
    assert data.columns("train")["attribution"][0].as_py() == "me"
    (tmp_path / "a.tsv").write_text("\n".join("\t".join(row.values()) for row in rows), encoding="utf-8")
    assert texts(prepared(tmp_path / "tsv", str(tmp_path / "a.tsv"), "--columns", "1,3")) == set(PAIRS)
    (tmp_path / "b.tsv").write_text(
        "\n".join(["\t".join(rows[0]), *("\t".join(row.values()) for row in rows)]), encoding="utf-8"
    )
    by_name = prepared(tmp_path / "heading", str(tmp_path / "b.tsv"), "--columns", "left,right")
    assert texts(by_name) == set(PAIRS) and by_name.meta["counts"]["malformed_listed"][0]["reason"] == "a heading"
    assert "has no column wrong (--columns); it has 'left', 'mid', 'right', 'by'" in refused(
        tmp_path, tmp_path / "a.jsonl", "--columns", "wrong,right"
    )
    assert "names 1 columns" in refused(tmp_path, tmp_path / "a.jsonl", "--columns", "left")
    assert "names a column twice" in refused(tmp_path, tmp_path / "a.jsonl", "--columns", "left,1")


def test_languages_of_one_script_are_told_by_names_or_asked_for(tmp_path: Path):
    french = ("--source_language", "fr")
    rows = [(f"Line number {n}.", f"Ligne numéro {n}.") for n in range(80)]
    (tmp_path / "a.tsv").write_text("\n".join(map("\t".join, rows)), encoding="utf-8")
    assert "French and English cannot be told apart by their script. Pass" in refused(
        tmp_path, tmp_path / "a.tsv", *french
    )
    asked = prepared(tmp_path / "asked", str(tmp_path / "a.tsv"), *french, "--columns", "2,1")
    assert texts(asked) == set(rows)
    for name, heading in (("plain", ("English", "French")), ("words", ("text_en", "text_fr"))):
        (tmp_path / f"{name}.tsv").write_text("\n".join(map("\t".join, [heading, *rows])), encoding="utf-8")
        assert texts(prepared(tmp_path / name, str(tmp_path / f"{name}.tsv"), *french)) == set(rows)
    credited = "\n".join(f"{en}\t{fr}\tCC-BY 2.0 (France) Attribution: tatoeba.org #1" for en, fr in rows)
    (tmp_path / "c.tsv").write_text(credited, encoding="utf-8")
    found = prepared(tmp_path / "credited", str(tmp_path / "c.tsv"), *french)
    assert texts(found) == set(rows) and "CC BY 2.0" in found.meta["source"]["licence"]


def test_english_is_told_from_languages_of_its_script_by_its_words(tmp_path: Path):
    rows = [(f"This is the line number {n}.", f"C'est la ligne numéro {n}.") for n in range(80)]
    french_first = [f"{fr}\t{en}" for en, fr in rows]
    credited = [f"{line}\tCC-BY 2.0 (France) Attribution: tatoeba.org #1" for line in french_first]
    headed = ["Français\tAnglais\tSource", *credited]
    one_stray = [*credited[:40], "Une ligne sans traduction", *credited[40:]]
    for name, lines in {"plain": french_first, "credited": credited, "headed": headed, "stray": one_stray}.items():
        path = tmp_path / f"{name}.tsv"
        path.write_text("\n".join(lines), encoding="utf-8")
        found = prepared(tmp_path / name, str(path), "--source_language", "fr", "--max_malformed_share", "0.02")
        assert texts(found) == set(rows), name
    assert "0 of 80 lines have Chinese in column 1: pass --source_language" in refused(
        tmp_path, tmp_path / "credited.tsv"
    )


BAD = {
    "bad.csv": (b'Hi.,"a"b\n', "is no CSV from line 1 on"),
    "open.csv": ('"Hi.","嗨。"\n"Go.,"走。"\n'.encode(), "is no CSV from line 2 on"),
    "unmatched.csv": ('"Hi.","嗨。"\nGo.,"走。\nRun.,跑。\n'.encode(), "is no CSV from line 2 on"),
    "gbk.csv": ('"Hi.","嗨。"\n'.encode("gb18030"), "/gbk.csv > gbk-utf8.csv`"),
    "gbk.csv.gz": (gzip.compress('"Hi.","嗨。"\n'.encode("gb18030")), "unpack it; it looks like GBK: convert"),
    "pairs.tar.gz": (as_tar("pairs.tsv", TEXT), "is an archive of tar: unpack it"),
    "list.json": ('[{"en": "Hi.", "zh": "嗨。"}]'.encode(), "is one JSON list, not a JSON object a line: `jq -c '.[]'"),
    "numbers.jsonl": (b"1\n2\n", "holds no JSON object a line"),
    "cut.parquet": (FORMS["columns.parquet"][:-30], "is a damaged Parquet file"),
    "cut.tsv.bz2": (FORMS["packed.txt.bz2"][:-30], "is a damaged bzip2 file"),
    "cut.tsv.xz": (FORMS["packed.tsv.xz"][:-30], "is a damaged xz file"),
    "cut.tsv.zst": (FORMS["packed.tsv.zst"][:-30], "is a damaged zstd file"),
    "two.zip": (as_zip("a.zh", TEXT), "should hold one text file of sentence pairs, found 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_is_one_line_that_says_why(name: str, tmp_path: Path):
    content, expected = BAD[name]
    (tmp_path / name).write_bytes(content)
    said = refused(tmp_path, tmp_path / name)
    assert expected in said and "\n" not in said


def test_lines_that_are_no_json_are_named_and_the_others_read(tmp_path: Path):
    lines = [*FORMS["lines.jsonl"].splitlines(), b'{"zh": "\xe5\x97\xa8', b'"text"', b'{"zh": "\xe5\x97\xa8"}', b""]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    counts = prepared(tmp_path, str(tmp_path / "a.jsonl"), "--max_malformed_share", 0.1).meta["counts"]
    reasons = [(row["line"], row["reason"].split(":")[0]) for row in counts["malformed_listed"]]
    assert reasons == [(121, "not JSON"), (122, "no JSON object"), (123, "no English")]
    assert counts["pairs"] == 120
