"""The command `python -m data_prep.pairs`, run as people run it: bad inputs, bad disks, kills, second runs."""

import gzip
import io
import json
import random
import re
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Barrier, Thread

import opencc
import pytest

from data_prep import pair_rows, pairs, sources, tables
from data_prep.sources import sample_lines
from tests.support.commands import ROOT, Result, run
from tests.support.disks import mounted
from training.base.console import UserError
from training.base.files import temporary_folder
from training.data.languages import Language
from training.data.prepared import PARTS, Prepared, open_prepared
from training.data.text import clean
from training.data.tokenizers import WordTokenizer


def prepare(*words: object, **environment: str) -> Result:
    return run(*words, module="data_prep.pairs", environment=environment)


def assert_refused(result: Result, *expected: str) -> None:
    """One line that says what is wrong, no traceback, a failing exit status."""
    assert result.status == 1, result
    (line,) = result.err.strip().splitlines()
    assert line.startswith("error: ")
    for text in expected:
        assert text in line


def prepare_here(*words: object) -> None:
    """The same in this process, where only its result matters: starting Python takes longer than preparing."""
    assert pairs.main([str(word) for word in words]) == 0


def small_corpus(path: Path, count: int = 400) -> Path:
    path.write_text("".join(line + "\n" for line in sample_lines()[:count]), encoding="utf-8")
    return path


def spreadsheet() -> bytes:
    """As Excel writes it, as far as its zip file tells what it is."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as opened:
        opened.writestr("[Content_Types].xml", "<Types/>")
    return content.getvalue()


CORPUS = "\n".join(sample_lines()[:200])
BAD_SOURCES = {
    "empty": (b"", "is empty"),
    "heading": (b"English\tChinese\n", "holds a heading only"),
    "blank_lines": (b"\n\n \n", "blank lines only"),
    "one_column": ("\n".join(line.split("\t")[0] for line in CORPUS.split("\n")).encode(), "one column, no TAB"),
    "gbk": (CORPUS.encode("gb18030"), "iconv -f GB18030 -t UTF-8"),
    "utf16": (CORPUS.encode("utf-16"), "iconv -f UTF-16 -t UTF-8"),
    "binary": (bytes(range(256)) * 9, "is not UTF-8 text (line 3)"),
    "another_language": (b"Go.\tVa !\tx\nHi.\tSalut !\tx\n", "(1: English, 2: English, 3: English). Pass"),
    "some_swapped": ((CORPUS + "\n" + 6 * "嗨。\tHi.\n跑。\tRun.\n").encode(), "in the order of the others"),
    "commas": ("Hi.,嗨。\nRun.,跑。\n".encode(), "separated by commas or semicolons (CSV), call the file .csv"),
    "cut_gzip": (gzip.compress(CORPUS.encode())[:-20], "is a damaged gzip file"),
    "spreadsheet": (spreadsheet(), "is a spreadsheet: save it as CSV or as text separated by tabs"),
    "semicolons": ("Hi.;嗨。\nRun.;跑。\n".encode(), "separated by commas or semicolons (CSV), call the file .csv"),
    "json": ('{"en": "Hi.", "zh": "嗨。"}\n'.encode(), "it looks like JSON: call the file .jsonl"),
    "latin1": (b"caf\xe9\tna\xefve\n", "not UTF-8 text (line 1); save it as UTF-8 (`iconv -f"),
    "cut_short": (CORPUS.encode() + "\nHi.\t嗨".encode()[:-1], "(line 201); it ends in the middle of a character"),
    "chinese_twice": (
        "嗨。\t嗨。\n跑。\t跑。\n".encode(),
        "no English in any column of their own (1: Ch",
    ),
    "damaged_zip": (b"PK\x05\x06" + bytes(18) + b"PK", "one text file of sentence pairs, found 0"),
    "two_of_each": (
        "Hi.\tHello.\t嗨。\t你好。\n".encode(),
        "several columns hold Chinese or English. Pass",
    ),
    "too_few": ("Hi.\t嗨。\nRun.\t跑。\n".encode(), "too few for this split"),
}


def test_a_zip_file_is_read_only_as_far_as_a_text_of_sentences_can_go(tmp_path):
    path = tmp_path / "cmn.zip"
    for unpacked, refused in ((60 << 20, False), (70 << 20, True)):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as opened:
            opened.writestr("cmn.txt", bytes(unpacked))
        if refused:
            with pytest.raises(UserError, match="unpacks to more than 67,108,864, which no text does"):
                tables.open_text(path)
        else:
            assert tables.open_text(path).bytes == unpacked
    noise = random.Random(1).randbytes(1 << 20)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as opened:
        opened.writestr("cmn.txt", noise + bytes(70 << 20))
    with pytest.raises(UserError, match=r"is not UTF-8 text \(line 1\)"):  # 100 times its size it may
        tables.open_text(path)


def test_commands_that_are_named_quote_the_name_of_the_file(tmp_path):
    path = tmp_path / "my $(touch x).txt"
    path.write_bytes(CORPUS.encode("utf-16"))
    with pytest.raises(UserError, match=r"-t UTF-8 '[^']*my \$\(touch x\).txt' >"):
        tables.open_text(path)
    (tmp_path / "$(touch x).json").write_text('[{"en": "Hi."}]')
    with pytest.raises(UserError, match=r"jq -c '\.\[\]' '[^']*\$\(touch x\).json' > '\$\(touch x\)-lines.jsonl'"):
        tables.open_text(tmp_path / "$(touch x).json")


@pytest.mark.parametrize("name", BAD_SOURCES)
def test_bad_source_is_one_clear_line_and_leaves_nothing_behind(name, tmp_path):
    content, expected = BAD_SOURCES[name]
    source = tmp_path / "cmn.txt"
    source.write_bytes(content)
    (tmp_path / "prepared").mkdir()
    assert_refused(prepare("--source", source, "--output", tmp_path / "prepared/x"), expected)
    assert list((tmp_path / "prepared").iterdir()) == []


def test_missing_source_and_folder_as_source_say_what_to_pass(tmp_path):
    missing = prepare("--source", tmp_path / "nothing.txt", "--output", tmp_path / "x")
    assert_refused(missing, "there is no file", "--source download", "--source sample")
    folder = prepare("--source", tmp_path, "--output", tmp_path / "x")
    assert_refused(folder, "cannot be read as a data set", "doesn't contain any data files", "holds the sentence pairs")


def test_what_is_no_source_is_called_what_it_is(tmp_path):
    source = small_corpus(tmp_path / "cmn.txt")
    prepare_here("--source", source, "--output", tmp_path / "made")
    (tmp_path / "pointer.parquet").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    (tmp_path / "page.tsv.gz").write_text("404\n")
    for words, said in (
        (("--source", tmp_path / "made"), "is prepared already: a training takes it as it is, --data"),
        (("--source", tmp_path / "pointer.parquet"), "`git lfs pull`"),
        (("--source", tmp_path / "page.tsv.gz"), "it is not what its name says: fetch it again"),
        (("--source", "https://example.com/x.tsv"), "is an address: fetch the file first"),
        (("--source", "download:fr-en"), "as in download:fra-eng"),
        (("--source", "hub:"), "expected hub:OWNER/NAME"),
        (("--source", source, "--subset", "zh-en"), "are those of a data set"),
        (("--train", source, "--test", source, "--drop_leaked"), "leave --drop_leaked out"),
    ):
        with pytest.raises(UserError, match=said):
            prepare_here(*words, "--output", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_more_malformed_lines_than_the_threshold_are_refused_fewer_are_listed(tmp_path):
    source = small_corpus(tmp_path / "cmn.txt")
    with source.open("a", encoding="utf-8") as file:
        file.write("\n   \nno tab here\nno Chinese\t \nthree\tcolumns\tand\tmore\n")
    assert_refused(
        prepare("--source", source, "--output", tmp_path / "x", "--max_malformed_share", 0.005),
        "3 of 403 lines are not", "--max_malformed_share 0.005", "line 403",
    )  # fmt: skip
    prepare_here("--source", source, "--output", tmp_path / "x")
    counts = json.loads((tmp_path / "x/meta.json").read_text())["counts"]
    assert (counts["lines"], counts["pairs"], counts["blank"], counts["malformed"]) == (405, 400, 2, 3)
    assert [entry["line"] for entry in counts["malformed_listed"]] == [403, 404, 405]


def test_bom_crlf_and_odd_blanks_are_cleaned_and_two_columns_are_enough(tmp_path):
    lines = [f"Line {number}.\t\u200b第\u3000{number}\u3000行。\u200b" for number in range(100)]
    source = tmp_path / "cmn.txt"
    source.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    assert pairs.main(["--source", str(source), "--output", str(tmp_path / "x")]) == 0
    part = open_prepared(tmp_path / "x").part("train")
    assert part.target_texts[0] == f"Line {part.rows[0]}."
    assert part.source_texts[0] == f"第 {part.rows[0]} 行。"


@pytest.mark.parametrize("bytes_per_part", [7, 1 << 20])
def test_lines_end_at_lf_crlf_and_cr_and_nowhere_within_a_sentence(bytes_per_part: int, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(tables, "BYTES_PER_PART", bytes_per_part)
    lines = [f"Line\u2028{number}.\t第\x0c{number}\u2029行\x85。" for number in range(60)]
    mixed = "".join(line + end for line, end in zip(lines, ("\n", "\r\n", "\r") * 20, strict=True))
    for text in (mixed, mixed + "\r", *(end.join(lines) for end in ("\n", "\r\n", "\r"))):
        (tmp_path / "cmn.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
        rows = [[clean(cell) for cell in cells] for _, cells in tables.open_text(tmp_path / "cmn.txt").rows()]
        assert [cells for cells in rows if any(cells)] == [
            [f"Line {number}.", f"第 {number} 行 。"] for number in range(60)
        ]
    (tmp_path / "cmn.txt").write_bytes(f"{lines[0]}\r{lines[1]}\r\n{lines[2]}\n".encode() + b"\xff\n")
    with pytest.raises(UserError, match=r"is not UTF-8 text \(line 4\)"):
        tables.open_text(tmp_path / "cmn.txt")


def test_half_a_sentence_before_a_tab_is_no_pair_and_the_line_is_named(tmp_path: Path, capsys):
    pairs = [f"Contract {number} costs 37 yuan.\t第{number}号合同要37元。" for number in range(1, 201)]
    torn = ["Contract\t5 costs 37 yuan.\t第5号合同要37元。", "It runs Linux.\t它用\tLinux。", "He left.\t他\t走了。"]
    attributed = [
        f"Hi {number}.\t嗨{number}。\tCC-BY 2.0 (France) Attribution: tatoeba.org #{number}" for number in range(300)
    ]
    source = tmp_path / "mine.tsv"
    source.write_text("\n".join([*pairs, *torn, *attributed, "Go.\t走。\t"]), encoding="utf-8")
    prepare_here("--source", source, "--output", tmp_path / "x")
    counts = open_prepared(tmp_path / "x").meta["counts"]
    assert (counts["pairs"], counts["malformed"]) == (501, 3)
    named = "; ".join(
        f"mine.tsv line {line}: 3 columns where others without an attribution have 2" for line in (201, 202, 203)
    )
    assert f"3 lines were left out, and meta.json lists them: {named}\n" in capsys.readouterr().out
    source.write_text("\n".join([*pairs, *4 * torn]), encoding="utf-8")
    expected = (
        r"12 of 212 lines .*without an attribution have 2, 12; the first of them is line 201: 'Contract.*if a tab "
        "stands inside"
    )
    with pytest.raises(UserError, match=expected):
        prepare_here("--source", source, "--output", tmp_path / "y")


def test_a_third_column_that_most_lines_have_is_an_attribution(tmp_path: Path):
    lines = [f"Line {number}.\t第{number}行。" + f"\t来源{number}" * (number % 3 > 0) for number in range(90)]
    (tmp_path / "mine.tsv").write_text("\n".join(lines), encoding="utf-8")
    prepare_here("--source", tmp_path / "mine.tsv", "--output", tmp_path / "x")
    assert open_prepared(tmp_path / "x").meta["counts"]["pairs"] == 90


@pytest.mark.parametrize("heading", ["English\tChinese", "en\tzh\tattribution", "英文\t中文"])
def test_a_heading_is_no_pair(heading: str, tmp_path: Path):
    source = small_corpus(tmp_path / "mine.tsv", count=80)
    source.write_text(f"{heading}\n{source.read_text(encoding='utf-8')}", encoding="utf-8")
    prepare_here("--source", source, "--output", tmp_path / "x")
    counts = json.loads((tmp_path / "x/meta.json").read_text())["counts"]
    assert counts["pairs"] == 80
    assert [(line["line"], line["reason"]) for line in counts["malformed_listed"]] == [(1, "a heading")]


DOUBTFUL = {
    "heading": ("left\tright\n" + CORPUS, "only the first pair has no Chinese ('right', 'left')"),
    "quotes": ("\n".join('"{}"\t"{}"'.format(*line.split("\t")[:2]) for line in CORPUS.split("\n")), "are in quotes"),
    "duplicates": ("\n".join([CORPUS] * 2), "200 of 400 pairs repeat an earlier one"),
    "few": (CORPUS, "200 pairs are few: with less than about 3,000"),
}


@pytest.mark.parametrize("name", DOUBTFUL)
def test_pairs_that_will_disappoint_are_prepared_with_a_warning(name: str, tmp_path: Path, capsys):
    text, expected = DOUBTFUL[name]
    (tmp_path / "mine.tsv").write_text(text, encoding="utf-8")
    prepare_here("--source", tmp_path / "mine.tsv", "--output", tmp_path / "x")
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("own", [False, True])
def test_few_rows_of_validation_are_told_with_the_option_that_gives_more(own: bool, tmp_path: Path, capsys):
    lines = CORPUS.splitlines(keepends=True)
    (tmp_path / "mine.tsv").write_text("".join(lines[:100]), encoding="utf-8")
    (tmp_path / "few.tsv").write_text("".join(lines[:5]), encoding="utf-8")
    words = ["--train", tmp_path / "mine.tsv", "--test", tmp_path / "mine.tsv", "--output", tmp_path / "x"]
    prepare_here(*words, *(["--validation", tmp_path / "few.tsv"] if own else []))
    assert f"or a larger {'--validation' if own else '--validation_share'}\n" in capsys.readouterr().err


def test_groups_that_no_part_has_room_for_are_named(tmp_path: Path):
    (tmp_path / "mine.tsv").write_text("Hi.\t嗨。\n" * 50, encoding="utf-8")
    with pytest.raises(UserError, match=r"50 sentence pairs .*in 1 groups that share sentences.*or --split random"):
        prepare_here("--source", tmp_path / "mine.tsv", "--output", tmp_path / "x", "--split", "grouped")


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs")
@pytest.mark.parametrize("kilobytes", [8, 128, 640])
def test_full_disk_is_one_clear_line_and_leaves_nothing_behind(kilobytes, tmp_path):
    with mounted(tmp_path / "disk", f"size={kilobytes}k") as disk:
        assert_refused(prepare("--source", "sample", "--output", disk / "x"), "no space left", "--output")
        assert list(disk.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs")
def test_read_only_output_is_one_clear_line(tmp_path):
    with mounted(tmp_path / "disk", "ro") as disk:
        assert_refused(prepare("--source", "sample", "--output", disk / "x"), "read-only", "--output")


def test_output_that_is_a_file_or_holds_other_things_is_never_touched(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/thesis.tex").write_text("years of work")
    for output, expected in (
        ("notes", "holds other things (thesis.tex)"),
        ("notes/thesis.tex", "is not the name of a folder"),
    ):
        result = prepare("--source", "sample", "--output", tmp_path / output, "--overwrite", "true")
        assert_refused(result, expected)
    for output in (".", ".."):
        with pytest.raises(UserError, match="not the name of a folder"):
            pairs.main(["--source", "sample", "--output", output])
    under_file = prepare("--source", "sample", "--output", tmp_path / "notes/thesis.tex/x")
    assert_refused(under_file, "a part of this path is a file")
    assert (tmp_path / "notes/thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("moment", [".", "tokenizer/source", "test"])
def test_killed_preparation_leaves_no_output_and_is_redone(moment, tmp_path):
    output, partial = tmp_path / "x", tmp_path / ".x.partial"
    # All of these are there when it looks for leaks; from then on it waits to be killed.
    code = "import time; from data_prep import pairs; pairs.leakage = lambda *_: time.sleep(3600); pairs.main()"
    words = ("--source", "sample", "--output", str(output))
    running = subprocess.Popen([sys.executable, "-c", code, *words], cwd=ROOT, stdout=subprocess.DEVNULL)
    while not (partial / moment).exists():
        assert running.poll() is None, "finished before it could be killed"
        time.sleep(0.001)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert not output.exists()
    assert pairs.main(["--source", "sample", "--output", str(output)]) == 0
    open_prepared(output).verify()
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_two_preparations_of_one_output_at_a_time_are_refused(tmp_path):
    output = tmp_path / "x"
    with temporary_folder(output) as held:  # what a running preparation builds in
        (held / "begun").touch()
        assert_refused(prepare("--source", "sample", "--output", output), "another process is writing")
        assert (held / "begun").exists()
    assert prepare("--source", "sample", "--output", output).status == 0
    open_prepared(output).verify()


def test_same_command_again_does_nothing_and_says_so(tmp_path):
    source = small_corpus(tmp_path / "cmn.txt")
    prepare_here("--source", source, "--output", tmp_path / "x")
    before = (tmp_path / "x/meta.json").stat().st_mtime_ns
    again = prepare("--source", source, "--output", tmp_path / "x", "--overwrite", "false")
    assert again.status == 0 and "nothing to do" in again.out
    assert (tmp_path / "x/meta.json").stat().st_mtime_ns == before


def test_other_options_or_an_edited_source_are_named_and_replaced_only_when_told(tmp_path):
    source = small_corpus(tmp_path / "cmn.txt")
    output = tmp_path / "x"
    prepare_here("--source", source, "--output", output)
    first = open_prepared(output).fingerprint
    assert_refused(
        prepare("--source", source, "--output", output, "--split", "grouped", "--seed", 5),
        "seed: 1234 -> 5", "split: random -> grouped", "--overwrite",
    )  # fmt: skip
    with source.open("a", encoding="utf-8") as file:
        file.write("One line more.\t又一行。\n")
    assert_refused(prepare("--source", source, "--output", output), "the source's content", str(source))
    assert open_prepared(output).fingerprint == first
    prepare_here("--source", source, "--output", output, "--overwrite", "true")
    assert open_prepared(output).meta["counts"]["pairs"] == 401
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cmn.txt", "x"]


def test_replacement_killed_between_its_renames_loses_nothing(tmp_path):
    source, output = small_corpus(tmp_path / "cmn.txt"), tmp_path / "x"
    prepare_here("--source", source, "--output", output)
    output.rename(tmp_path / ".x.replaced")  # the state that such a kill leaves
    result = prepare("--source", source, "--output", output)
    assert result.status == 0 and "the previous data set is back" in result.out
    assert "nothing to do" in result.out
    open_prepared(output).verify()


def test_part_of_a_copy_is_prepared_again_and_damage_is_refused(tmp_path):
    source, output = small_corpus(tmp_path / "cmn.txt"), tmp_path / "x"
    prepare_here("--source", source, "--output", output)
    (output / "meta.json").unlink()
    prepare_here("--source", source, "--output", output)
    (data,) = (output / "train").glob("data-*.arrow")
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    assert_refused(prepare("--source", source, "--output", output), "changed or damaged", "--overwrite")
    prepare_here("--source", source, "--output", output, "--overwrite", "true")
    open_prepared(output).verify()


def test_dry_run_says_what_would_be_done_and_writes_nothing(tmp_path):
    result = prepare("--source", "sample", "--output", tmp_path / "x", "--dry-run")
    assert result.status == 0 and "would prepare" in result.out and " pairs, 0 blank and 0 malformed" in result.out
    offline = prepare("--source", "download", "--output", tmp_path / "x", "--dry-run", https_proxy="http://127.0.0.1:9")
    assert offline.status == 0 and "would download" in offline.out
    assert list(tmp_path.iterdir()) == []


def test_no_network_is_answered_soon_with_what_to_do_by_hand(tmp_path):
    began = time.monotonic()
    result = prepare("--source", "download", "--output", tmp_path / "x", https_proxy="http://127.0.0.1:9")
    assert_refused(result, "could not be fetched", sources.DOWNLOAD_PAGE, "--source PATH")
    assert time.monotonic() - began < 30
    assert list(tmp_path.iterdir()) == []


class Site(BaseHTTPRequestHandler):
    """manythings.org in small: answers browsers only."""

    body = b""
    cut = 0
    asked = 0

    def do_GET(self) -> None:
        type(self).asked += 1
        self.send_response(200 if "Mozilla" in self.headers["User-Agent"] else 406)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body[: len(self.body) - self.cut])

    def log_message(self, *_: object) -> None:
        pass


def test_download_is_kept_and_prepared_like_the_file_in_it(tmp_path, monkeypatch, capsys):
    text = small_corpus(tmp_path / "cmn.txt")
    with zipfile.ZipFile(tmp_path / "cmn-eng.zip", "w") as archive:
        archive.write(text, "cmn.txt")
        archive.writestr("_about.txt", "about")
    Site.body = (tmp_path / "cmn-eng.zip").read_bytes()
    with ThreadingHTTPServer(("127.0.0.1", 0), Site) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(sources, "DOWNLOAD_PAGE", f"http://127.0.0.1:{server.server_port}/")
        words = ["--source", "download", "--output", str(tmp_path / "prepared/x")]
        Site.cut = 100
        with pytest.raises(UserError, match="could not be fetched"):
            pairs.main(words)
        assert list((tmp_path / "prepared").rglob("*.*")) == []
        Site.cut = 0
        assert pairs.main(words) == 0
        downloaded = open_prepared(tmp_path / "prepared/x")
        said = capsys.readouterr().out
        assert f"{len(Site.body):,} bytes" in said and downloaded.meta["source"]["archive"]["sha256"] in said
        asked = Site.asked
        assert pairs.main([*words[:3], str(tmp_path / "prepared/y"), "--split", "grouped"]) == 0
        (tmp_path / "prepared/downloads/cmn-eng.zip").unlink()
        assert pairs.main(words) == 0
        assert Site.asked == asked, "asked the network for what was there"
        server.shutdown()
    assert pairs.main(["--source", str(text), "--output", str(tmp_path / "from_file")]) == 0
    assert pairs.main(["--source", str(tmp_path / "cmn-eng.zip"), "--output", str(tmp_path / "from_zip")]) == 0
    same = {open_prepared(tmp_path / name).fingerprint for name in ("from_file", "from_zip", "prepared/x")}
    assert len(same) == 1


def test_two_preparations_that_download_at_once_have_the_same_file(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "cmn-eng.zip", "w") as archive:
        archive.write(small_corpus(tmp_path / "cmn.txt"), "cmn.txt")
    body, both = (tmp_path / "cmn-eng.zip").read_bytes(), Barrier(2)

    class SlowSite(Site):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body[:100])
            both.wait()
            self.wfile.write(body[100:])

    with ThreadingHTTPServer(("127.0.0.1", 0), SlowSite) as server, ThreadPoolExecutor(2) as pool:
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(sources, "DOWNLOAD_PAGE", f"http://127.0.0.1:{server.server_port}/")
        made = list(pool.map(lambda _: sources._downloaded("cmn-eng", tmp_path / "downloads"), range(2)))
        server.shutdown()
    assert made == [tmp_path / "downloads/cmn-eng.zip"] * 2
    assert [path.read_bytes() for path in (tmp_path / "downloads").iterdir()] == [body]


def write_pairs(path: Path, pairs: list[tuple[str, str]]) -> str:
    path.write_text("".join(f"{english}\t{chinese}\n" for english, chinese in pairs), encoding="utf-8")
    return str(path)


def pairs_of(data: Prepared, part: str) -> list[tuple[str, str]]:
    opened = data.part(part)
    return list(zip(opened.target_texts, opened.source_texts, strict=True))


LINES = [(english, chinese) for english, chinese, _ in (line.split("\t") for line in sample_lines()[:300])]
GIVEN = {"train": LINES[:220], "validation": LINES[220:250], "test": LINES[250:]}


def test_a_split_that_is_given_is_kept_row_for_row(tmp_path: Path):
    words = [word for part in GIVEN for word in (f"--{part}", write_pairs(tmp_path / f"{part}.tsv", GIVEN[part]))]
    prepare_here(*words, "--output", tmp_path / "x")
    data = open_prepared(tmp_path / "x")
    assert sorted(pairs_of(data, "train")) == sorted(GIVEN["train"]) and pairs_of(data, "train") != GIVEN["train"]
    for part in ("validation", "test"):
        assert pairs_of(data, part) == GIVEN[part], "in the order of the file"
        assert data.part(part).rows.tolist() == list(range(len(GIVEN[part])))
    assert [GIVEN["train"][row] for row in data.part("train").rows] == pairs_of(data, "train")
    assert data.meta["options"]["split"] == "given" and data.meta["rows"] == {k: len(v) for k, v in GIVEN.items()}
    assert [about["place"] for about in data.meta["source"]["parts"].values()] == words[1::2]
    assert prepare(*words, "--output", tmp_path / "x").out.count("nothing to do") == 1
    write_pairs(tmp_path / "test.tsv", GIVEN["test"][:-1])
    assert_refused(prepare(*words, "--output", tmp_path / "x"), "the source's content")


@pytest.mark.parametrize("split", ["random", "grouped"])
def test_validation_is_taken_from_train_where_it_is_not_given(split: str, tmp_path: Path):
    words = [word for part in ("train", "test") for word in (f"--{part}", write_pairs(tmp_path / part, GIVEN[part]))]
    prepare_here(*words, "--split", split, "--validation_share", 0.2, "--output", tmp_path / "x")
    data = open_prepared(tmp_path / "x")
    assert pairs_of(data, "test") == GIVEN["test"] and data.meta["rows"] == {"train": 176, "validation": 44, "test": 50}
    assert sorted(pairs_of(data, "train") + pairs_of(data, "validation")) == sorted(GIVEN["train"])
    assert data.meta["options"]["validation_from"] == f"train, {split}"


def test_leakage_of_a_given_split_is_said_and_dropped_on_request(tmp_path: Path, capsys):
    english, chinese = GIVEN["test"][0]
    leaking = [
        GIVEN["test"][3],
        (english.upper(), "别的。"),
        ("Something else.", f"{chinese}！"),
        GIVEN["validation"][5],
    ]
    words = [word for part in GIVEN for word in (f"--{part}", write_pairs(tmp_path / part, GIVEN[part]))]
    write_pairs(tmp_path / "train", GIVEN["train"] + leaking)
    prepare_here(*words, "--output", tmp_path / "kept")
    kept = open_prepared(tmp_path / "kept")
    leak = kept.meta["leakage"]["test"]
    assert (leak["exact"]["either"], leak["normalised"]["either"]) == (1, 2) and kept.meta["rows"]["train"] == 224
    said = capsys.readouterr().out
    assert leak["words"] in said and "--drop_leaked leaves out" in said
    prepare_here(*words, "--drop_leaked", "--output", tmp_path / "dropped")
    dropped = open_prepared(tmp_path / "dropped")
    assert sorted(pairs_of(dropped, "train")) == sorted(GIVEN["train"])
    assert [dropped.meta["leakage"][part]["normalised"]["either"] for part in ("test", "validation")] == [0, 0]
    assert dropped.meta["counts"]["dropped_leaked"] == 4
    assert "dropped   4 training pairs with a sentence that stands in another part" in capsys.readouterr().out


WRONG = {
    "no source": ((), "source is required; of a split that is given, train and test are"),
    "train alone": (("--train", "a"), "source is required; of a split that is given, train and test are"),
    "both": (("--source", "sample", "--test", "b"), "source is split here, and train, validation and test are given"),
    "drop": (("--source", "sample", "--drop_leaked"), "drop_leaked is for a given split"),
    "share": (("--train", "a", "--test", "b", "--test_share", "0.2"), "test_share has no effect"),
    "split": (
        ("--train", "a", "--validation", "b", "--test", "c", "--split", "random"),
        "have no effect where validat",
    ),
    "one language": (
        ("--source", "sample", "--source_language", "eng"),
        "source_language and target_language are both en",
    ),
    "no language": (("--source", "sample", "--source_language", "klingonish"), "ISO 639, of two or three letters"),
    "simplify": (("--source", "a", "--source_language", "fr", "--simplify"), "neither language is Chinese"),
}


@pytest.mark.parametrize("name", WRONG)
def test_options_that_do_not_fit_together_are_refused_with_the_reason(name: str, tmp_path: Path):
    words, expected = WRONG[name]
    with pytest.raises(UserError, match=re.escape(expected)):
        prepare_here(*words, "--output", tmp_path / "x")


def test_test_share_is_the_tests_share(tmp_path: Path):
    prepare_here("--source", "sample", "--output", tmp_path / "x", "--test_share", 0.25)
    assert open_prepared(tmp_path / "x").meta["rows"] == {"train": 4275, "validation": 225, "test": 1500}
    assert_refused(prepare("--source", "sample", "--output", tmp_path / "x"), "test_share: 0.25 -> 0.1")


def test_the_other_direction_has_the_same_rows_with_source_and_target_exchanged(tmp_path: Path):
    for name, words in (("there", ()), ("back", ("--source_language", "en", "--target_language", "zh"))):
        prepare_here("--source", "sample", "--split", "grouped", "--output", tmp_path / name, *words)
    there, back = open_prepared(tmp_path / "there"), open_prepared(tmp_path / "back")
    assert there.fingerprint != back.fingerprint
    assert there.meta["languages"]["source"] == back.meta["languages"]["target"]
    for part in PARTS:
        first, second = there.part(part), back.part(part)
        assert first.rows.tolist() == second.rows.tolist()
        assert list(first.source_texts) == list(second.target_texts)
    assert (back.source_tokenizer.language.code, back.target_tokenizer.language.code) == ("en", "zh")
    again = prepare("--source", "sample", "--split", "grouped", "--output", tmp_path / "back")
    assert_refused(again, "source_language: en -> zh", "target_language: zh -> en")
    taken = ("--tokenizers", tmp_path / "there", "--source_language", "en", "--target_language", "zh")
    assert_refused(
        prepare("--source", "sample", *taken, "--output", tmp_path / "z"), "are for zh to en, not for en to zh"
    )


def test_downloads_and_the_sample_are_of_their_languages(tmp_path: Path):
    for words, expected in (
        (("--source", "download", "--source_language", "fr"), "or --source download:fra-eng"),
        (("--source", "download:fra-eng"), "--source_language fr --target_language en (or the other way round)"),
        (("--source", "sample", "--source_language", "ja"), "the sample corpus is Chinese and English"),
    ):
        with pytest.raises(UserError, match=re.escape(expected)):
            prepare_here(*words, "--output", tmp_path / "x")
    words = ("--source", "download:jpn-eng", "--source_language", "ja", "--output", tmp_path / "x", "--dry-run")
    assert "would download https://www.manythings.org/anki/jpn-eng.zip" in prepare(*words).out


def test_workers_change_nothing_about_what_is_prepared(tmp_path: Path, monkeypatch):
    for name, workers in (("one", 1), ("three", 3)):
        monkeypatch.setattr(pair_rows, "HEAD_ROWS", 500)
        monkeypatch.setattr(pairs, "HEAD_ROWS", 500 if workers > 1 else 50_000)  # the vocabulary in its own process
        monkeypatch.setattr(pair_rows, "ROWS_PER_JOB", 70 * workers)
        words = ("--tokenizer", "sentencepiece", "--vocabulary_size", 600, "--simplify", "--workers", workers)
        prepare_here("--source", "sample", "--output", tmp_path / name, *words)
    one, three = open_prepared(tmp_path / "one"), open_prepared(tmp_path / "three")
    assert one.meta["files"] == three.meta["files"] and one.fingerprint == three.fingerprint


def test_what_is_not_given_is_chosen_by_the_data_and_is_as_if_given(tmp_path: Path, capsys):
    source, chosen = tmp_path / "zh.tsv", tmp_path / "chosen"
    lines = sample_lines()[:300]
    source.write_text("\n".join(lines), "utf-8")
    prepare_here("--source", source, "--output", chosen)
    said = "simplified characters, since 0% of the Chinese sentences have traditional ones; at most 1,000 pieces"
    assert f"  chosen    {said} of sentencepiece for each language, for 256 training" in capsys.readouterr().out
    given = ("--tokenizer", "sentencepiece", "--vocabularies", "separate", "--vocabulary_size", 1000, "--simplify")
    prepare_here("--source", source, "--output", tmp_path / "given", *given)
    assert open_prepared(chosen).fingerprint == open_prepared(tmp_path / "given").fingerprint
    capsys.readouterr()
    prepare_here("--source", source, "--output", chosen)
    prepare_here("--source", source, "--output", chosen, *given)
    assert capsys.readouterr().out.count("nothing to do") == 2
    assert_refused(prepare("--source", source, "--output", chosen, "--vocabulary_size", 900), "1000 -> 900")
    again = prepare("--source", source, "--output", tmp_path / "given")
    assert_refused(again, "vocabulary_size: 1000 -> chosen by the data", "simplify: true -> chosen by the data")

    convert = opencc.OpenCC("s2t").convert
    for count, simplified in ((300, False), (100, True)):  # all of it, and a third
        output = tmp_path / f"traditional-{count}"
        source.write_text("\n".join([*map(convert, lines[:count]), *lines[count:]]), "utf-8")
        prepare_here("--source", source, "--output", output)
        assert open_prepared(output).meta["options"]["simplify"] == simplified
    assert "characters as they are, since 98% of" in capsys.readouterr().out


def test_a_vocabulary_that_nobody_asked_for_has_room_for_all_characters(tmp_path: Path, monkeypatch):
    assert [pairs.vocabulary_size_for(count, "separate") for count in (20, 24_321, 5_000_000)] == [1000, 4000, 16_000]
    assert pairs.vocabulary_size_for(24_321, "joint") == 8000, "that of configs/gpt/plain.yaml"
    monkeypatch.setattr(pairs, "VOCABULARY_SIZES", ((10_000, 64),))
    monkeypatch.setattr(pairs, "HEAD_ROWS", 500)  # the vocabulary in its own process
    monkeypatch.setattr(pairs, "VOCABULARY_LINES", 1000)
    prepare_here("--source", "sample", "--output", tmp_path / "x")
    options = open_prepared(tmp_path / "x").meta["options"]
    assert 64 < options["vocabulary_size"] < 1000
    with pytest.raises(UserError, match="--vocabulary_size 64 has no room"):
        pairs.main(["--source", "sample", "--output", str(tmp_path / "y"), "--vocabulary_size", "64"])
    monkeypatch.setattr(pairs, "VOCABULARY_SIZES", ((2000, 64), (5200, 900)))
    prepare_here("--source", "sample", "--output", tmp_path / "z")
    assert open_prepared(tmp_path / "z").meta["options"]["vocabulary_size"] == 900, "by all pairs, not by the sample"


def test_a_vocabulary_is_made_from_a_seeded_sample_of_many_lines(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(pairs, "VOCABULARY_LINES", 1000)
    lines: list[tuple[str, Language]] = []
    train = WordTokenizer.train
    monkeypatch.setattr(WordTokenizer, "train", lambda texts, least: train(kept(texts, lines), least))
    for name in ("joint", "separate", "again"):
        lines.clear()
        words = ("--tokenizer", "word", "--vocabularies", "separate" if name == "separate" else "joint")
        prepare_here("--source", "sample", "--output", tmp_path / name, *words)
        assert len(lines) == (1000 if name != "separate" else 2000)
        most = "1,000" if name == "separate" else "500"
        assert f"a vocabulary is made from {most} of 5,130 training pairs, drawn by the seed" in capsys.readouterr().out
    assert open_prepared(tmp_path / "joint").fingerprint == open_prepared(tmp_path / "again").fingerprint


def kept(texts: Iterator[tuple[str, Language]], lines: list[tuple[str, Language]]) -> list[tuple[str, Language]]:
    found = list(texts)
    lines += found
    return found
