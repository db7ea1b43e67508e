"""The translate command on a trained run of each kind: every line gets its translation, every bad line is named."""

from __future__ import annotations

import io
import re
import shutil
from pathlib import Path

import pytest
import torch

from tests.support.commands import ROOT, Launch
from tests.support.runs import reference
from training.base.console import UserError
from training.data.prepared import open_prepared
from training.data.text import clean
from training.evaluation import translate
from training.evaluation.translations.trained import TrainedModel, open_trained
from training.models import decoding

CASES = ROOT / "tests/cases/pairs"
CPU = torch.device("cpu")
SHAPES = {
    "gpt": ("--model.layers", 1, "--model.heads", 2, "--model.width", 48, "--model.context", 40),
    "seq2seq": ("--model.embedding_width", 32, "--model.hidden_width", 32, "--model.max_length", 30),
}
COMMON = (
    "--batch.tokens_per_micro_batch",
    512,
    "--optim.steps",
    40,
    "--optim.warmup_steps",
    5,
    "--optim.lr",
    8e-3,
    "--optim.ema_decay",
    0.8,
)
SAVED = ("--checkpoint.every_steps", 10, "--log.validate_every_steps", 10, "--checkpoint.keep_best", 2)


@pytest.fixture(scope="module", params=SHAPES)
def run(request, sample_data: Path) -> Path:
    return reference(sample_data, *SHAPES[request.param], *COMMON, *SAVED, module=f"training.{request.param}")


@pytest.fixture(scope="module")
def trained(run: Path) -> TrainedModel:
    return open_trained(run, device=CPU)


@pytest.fixture(scope="module")
def sentences(sample_data: Path) -> list[str]:
    return list(open_prepared(sample_data).part("test").source_texts[:8])


def expected(trained: TrainedModel, texts: list[str], **search: float) -> list[str]:
    results = decoding.translate(trained.decoder, [trained.encode(text) for text in texts], **search)
    return [trained.target_tokenizer.decode(result.ids) for result in results]


def refused(*words: object) -> str:
    with pytest.raises(UserError) as error:
        translate.main(list(map(str, words)))
    return str(error.value)


def test_one_bad_line_of_each_kind_is_named_and_stops_no_other(run, trained, sentences, tmp_path, launch: Launch):
    bad = {
        3: b"",
        5: "书".encode() * 300,
        7: b"\xff\xfe\x80",
        9: "我喜欢 Linux 和 😀。".encode(),
        10: b" \t\xe3\x80\x80",
    }
    lines = [text.encode() for text in sentences]
    for number, line in bad.items():
        lines.insert(number - 1, line)
    source, output = tmp_path / "zh.txt", tmp_path / "en.txt"
    source.write_bytes(b"\n".join(lines))  # and no line end behind the last
    words = (run, "--input", source, "--output", output, "--beam_size", 5)
    result = launch(*words, module="training.evaluation.translate").wait()
    assert (result.status, result.out) == (0, ""), result
    translated = output.read_text(encoding="utf-8").splitlines()
    assert len(translated) == len(lines)
    good = [text for number, text in enumerate(translated, 1) if number not in bad]
    assert good == expected(trained, sentences, beam_size=5)
    assert len(set(good)) > 1, "a model that always says the same shows nothing"

    said = re.findall(r"warning: line (\d+): (.*)", result.err)
    named = [(number, text) for number, text in said if "cut off" not in text]
    most = trained.decoder.longest_source
    assert named == [
        ("3", "the sentence is empty; its line in the output is empty"),
        ("5", f"the sentence is too long: 300 tokens, the model takes {most} at most; its line in the output is empty"),
        ("7", "not UTF-8 throughout; what could not be read counts as unknown characters"),
        ("10", "the sentence is empty; its line in the output is empty"),
    ]
    assert [translated[number - 1] for number in (3, 5, 10)] == ["", "", ""]
    assert f"2 of {len(lines)} sentences hold characters that the model does not know (<unk>)" in result.err


def test_a_sentence_as_long_as_the_model_takes_is_translated_and_the_output_ends(run, trained, capsys):
    most = trained.decoder.longest_source
    assert translate.main([str(run), "书" * most, "书" * (most + 1)]) == 0
    captured = capsys.readouterr()
    assert "line 1: the sentence" not in captured.err and "line 2: the sentence is too long" in captured.err
    longest, nothing = captured.out.splitlines()
    assert len(longest.split()) <= trained.decoder.room(most) and nothing == ""


def test_input_lines_end_at_lf_crlf_or_cr_and_nowhere_within_a_sentence(run, trained, sentences, tmp_path, capsys):
    first, second, third, fourth = sentences[:4]
    lines = [first, second, third, f"{fourth[:2]}\u2028{fourth[2:]}"]
    (tmp_path / "zh.txt").write_bytes("{}\r{}\r\n{}\n{}\n".format(*lines).encode())
    assert translate.main([str(run), "--input", str(tmp_path / "zh.txt")]) == 0
    assert capsys.readouterr().out.splitlines() == expected(trained, lines)


def test_sentences_without_chinese_are_translated_with_a_warning(run, capsys):
    assert translate.main([str(run), "How are you?", "你好。", "Fine!"]) == 0
    assert "2 of 3 sentences hold no Chinese, which this model translates from" in capsys.readouterr().err
    assert translate.main([str(run), "你好。", ""]) == 0
    assert "hold no Chinese" not in capsys.readouterr().err


def test_a_file_in_another_encoding_is_refused_with_the_command_that_converts_it(run, tmp_path, monkeypatch):
    gbk = CASES / "t23_gbk_translate_input.txt"
    said = refused(run, "--input", gbk, "--output", tmp_path / "out.txt")
    advice = f"it looks like GBK: convert it with `iconv -f GB18030 -t UTF-8 {gbk} > {gbk.stem}-utf8.txt`"
    assert f"{gbk} is not UTF-8 text; {advice}" in said
    assert list(tmp_path.iterdir()) == []
    with gbk.open(encoding="gb18030") as file, monkeypatch.context() as patch:
        patch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(file.read().encode("utf-16"))))
        assert "the input is not UTF-8 text; it looks like UTF-16: convert it with `iconv -f UTF-16" in refused(run)


def test_blank_and_invisible_lines_stay_empty_and_all_others_are_where_they_were(run, trained, capsys):
    assert translate.main([str(run), "--input", str(CASES / "t24_translate_blank_crlf_bom.txt")]) == 0
    captured = capsys.readouterr()
    lines = (CASES / "t24_translate_blank_crlf_bom.txt").read_text(encoding="utf-8-sig").split("\n")[:13]
    empty = [number for number, line in enumerate(lines, 1) if not clean(line)]
    assert empty and empty == [int(number) for number in re.findall(r"line (\d+): the sentence is empty", captured.err)]
    translated = captured.out.splitlines()
    assert len(translated) == 13 and all(translated[number - 1] == "" for number in empty)
    assert translated[0] == expected(trained, [lines[0]])[0]
    assert translate.main([str(run), "--input", str(CASES / "t25_invisible_lines.txt")]) == 0
    captured = capsys.readouterr()
    assert captured.out == "\n" * 4 and captured.err.count("the sentence is empty") == 4


@pytest.mark.parametrize("which", ["best", "last", "best:2", "last:2", "ema"])
def test_the_weights_that_were_asked_for_translate(run, which, sentences, capsys):
    assert translate.main([str(run), "--checkpoint", which, *sentences]) == 0
    assert capsys.readouterr().out.splitlines() == expected(open_trained(run, which, device=CPU), sentences)


def test_what_is_no_search_is_refused_before_anything_is_loaded(tmp_path, launch: Launch):
    nowhere = tmp_path / "nowhere"
    for beam_size in (0, -1):
        said = refused(nowhere, "你好", "--beam_size", beam_size)
        assert f"the beam size must be 1 (greedy) or more, got {beam_size}" in said
    assert "the beam size must be 1000 or less, got 100000" in refused(nowhere, "你好", "--beam_size", 100_000)
    assert "no effect on greedy decoding" in refused(nowhere, "你好", "--length_penalty", 2)
    assert "must be 0 (none) or more, got -1" in refused(nowhere, "--beam_size", 2, "--length_penalty", -1, "你好")
    result = launch(nowhere, "--beam_size", 0, "你好", module="training.evaluation.translate").wait()
    assert (result.status, result.out, len(result.error_lines)) == (1, "", 1) and "Traceback" not in result.err, result


def test_an_output_that_is_the_input_or_a_folder_is_refused_and_the_input_stays(run, tmp_path):
    (tmp_path / "chinese.txt").write_text("你好\n")
    words = ("--input", tmp_path / "chinese.txt", "--output")
    assert "would replace what --input reads" in refused(run, *words, tmp_path / "chinese.txt")
    assert "is a folder: name a file in it" in refused(run, *words, tmp_path)
    assert (tmp_path / "chinese.txt").read_text() == "你好\n"


def test_a_run_that_has_not_what_is_needed_is_refused_with_what_to_do(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy")
    for which in ("best:99", "last:99"):
        assert "not 99: ask for fewer, or train with --checkpoint.keep" in refused(copy, "你好", "--checkpoint", which)
    assert "'newest' names no weights: best, last, step-N" in refused(copy, "你好", "--checkpoint", "newest")
    for checkpoint in (copy / "checkpoints").iterdir():
        shutil.rmtree(checkpoint)
    assert f"{copy} has no valid checkpoint: train first" in refused(copy, "你好")
    (copy / "checkpoints").rmdir()
    assert "is not a run folder: there is no folder checkpoints in it" in refused(copy, "你好")
    assert "there is no run folder" in refused(tmp_path / "nowhere", "你好")
