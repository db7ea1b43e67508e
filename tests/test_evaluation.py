"""A finished run, scored, shown and used: on a real run folder, made by the training script itself."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch

from data_prep import tatoeba
from data_prep.prepared import open_prepared
from launch.console import UserError
from training import gpt
from training.evaluation import evaluate, translate
from training.evaluation.attention_maps import attention_sheet
from training.evaluation.report import EXAMPLES, Example, Report, example_rows, render
from training.evaluation.scores import score_texts
from training.evaluation.trained import open_trained

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
HOSTILE = "</td></svg><script>alert(1)</script><img src=x onerror=alert(2)> \" ' & ]]> $x^2$"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared") / "sample"
    assert tatoeba.main(["--source", "sample", "--output", str(folder)]) == 0
    return open_prepared(folder)


@pytest.fixture(scope="module")
def trained_run(data, tmp_path_factory) -> Path:
    """A run of a few dozen steps: enough for translations to end."""
    run_dir = tmp_path_factory.mktemp("runs") / "tiny"
    words = {
        "run_dir": run_dir,
        "data": data.folder,
        **{"model.layers": 2, "model.heads": 2, "model.width": 32, "model.context": 40},
        **{"optim.epochs": 1, "optim.lr": 5e-3, "optim.warmup_steps": 5, "checkpoint.every_steps": 10},
        **{"log.every_steps": 5, "log.validate_every_steps": 10, "batch.tokens_per_micro_batch": 2048},
    }
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sys, "argv", ["gpt", *(str(word) for key, value in words.items() for word in (f"--{key}", value))]
        )
        assert gpt.main() == 0
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return run_dir


@pytest.fixture(scope="module")
def evaluated(trained_run) -> Path:
    assert evaluate.main([str(trained_run)]) == 0
    return trained_run


@pytest.fixture
def run_copy(trained_run, tmp_path) -> Path:
    return shutil.copytree(trained_run, tmp_path / "copy")


def test_best_and_last_checkpoint_are_opened_with_their_weights(trained_run):
    last = open_trained(trained_run, "last", device=CPU)
    assert not last.model.training
    state = last.checkpoint.model_state()
    assert all(torch.equal(tensor, state[name]) for name, tensor in last.model.state_dict().items())
    best = open_trained(trained_run, "best", device=CPU)
    assert best.step == best.checkpoint.state()["best_step"] <= last.step


def test_what_is_no_usable_run_is_refused_with_the_reason(run_copy, tmp_path):
    def refusal() -> str:
        with pytest.raises(UserError) as error:
            open_trained(run_copy, device=CPU)
        return str(error.value)

    with pytest.raises(UserError, match="there is no run folder"):
        open_trained(tmp_path / "nowhere", device=CPU)
    with pytest.raises(UserError, match="is not a run folder"):
        open_trained(tmp_path, device=CPU)
    vocabulary = run_copy / "tokenizer/source/vocabulary.txt"
    vocabulary.write_text(vocabulary.read_text(encoding="utf-8") + "extra\n", encoding="utf-8")
    assert "vocabulary" in refusal()
    shutil.rmtree(run_copy / "tokenizer/source")
    assert "is missing: copy tokenizer/ from" in refusal()
    shutil.rmtree(run_copy / "checkpoints")
    (run_copy / "checkpoints").mkdir()
    assert "no valid checkpoint" in refusal()


def test_another_tokenizer_than_the_trained_one_is_refused(run_copy, tmp_path):
    other = tmp_path / "other"
    tatoeba.main(["--source", "sample", "--output", str(other), "--seed", "7", "--min_frequency", "3"])
    with pytest.raises(UserError, match=r"another tokenizer than .* was trained with"):
        evaluate.main([str(run_copy), "--data", str(other)])
    shutil.rmtree(run_copy / "tokenizer")
    shutil.copytree(other / "tokenizer", run_copy / "tokenizer")
    with pytest.raises(UserError, match="is not the tokenizer that the model was trained with"):
        open_trained(run_copy, device=CPU)


def test_text_scores_are_sacrebleus_and_say_how_they_were_computed():
    references = [
        "He isn't a doctor.",
        "The cat sat on the mat, didn't it?",
        "I like reading long books in the evening.",
    ]
    perfect = score_texts(references, references)
    assert (perfect.bleu, perfect.chrf, perfect.exact_matches) == (pytest.approx(100), pytest.approx(100), 3)
    words = ["he isn't a doctor", "the cat sat on the mat didn't it", "i like reading long books in the evening"]
    as_words = score_texts(words, references)
    assert as_words.bleu < 80 and as_words.bleu_normalised == pytest.approx(100)
    assert (as_words.exact_matches, as_words.exact_matches_normalised) == (0, 3)
    assert "tok:13a" in as_words.bleu_signature and "version:" in as_words.chrf_signature
    assert "tok:none" in as_words.bleu_normalised_signature and "lower-cased" in as_words.bleu_normalised_signature
    json.dumps(as_words.to_json())


def test_a_missing_translation_counts_as_an_empty_one():
    references = ["Tom bought three red apples.", "Mary sold two old cars."]
    assert score_texts(["Tom bought three red apples.", ""], references).bleu < 70
    with pytest.raises(ValueError, match="1 translations for 2 references"):
        score_texts(["a"], references)


def test_evaluation_writes_scores_translations_maps_and_report(evaluated, data):
    folder, test = evaluated / "evaluation", data.part("test")
    scores = json.loads((folder / "test.json").read_text())
    assert scores["sentences"] == len(test) == 600
    assert scores["split"] == "random" and scores["synthetic"] is True
    rows = [json.loads(line) for line in (folder / "test-translations.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["source"] for row in rows] == list(test.source_texts)
    assert [row["reference"] for row in rows] == list(test.target_texts)
    again = score_texts([row["translation"] for row in rows], list(test.target_texts)).to_json()
    assert again == {key: scores[key] for key in again}
    assert len(list(folder.glob("test-attention-*.svg"))) == evaluate.SHEETS
    assert (evaluated / "report.html").is_file()


def test_token_scores_are_those_of_single_sentences_added_up(evaluated, data):
    trained, test = open_trained(evaluated, device=CPU), data.part("test")
    losses, right, count = 0.0, 0, 0
    with torch.inference_mode():
        for source, target in zip(test.source, test.target, strict=True):
            sequence = torch.tensor([1, *source.tolist(), 3, *target.tolist(), 2])
            logits = trained.model(sequence[None, :-1])[0, len(source) + 1 :]
            labels = sequence[len(source) + 2 :]
            losses += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
            right += int((logits.argmax(-1) == labels).sum())
            count += len(labels)
    scores = json.loads((evaluated / "evaluation/test.json").read_text())
    assert scores["target_tokens"] == count
    assert scores["loss"] == pytest.approx(losses / count, abs=1e-4)
    assert scores["accuracy"] == pytest.approx(right / count, abs=1e-4)


def test_evaluating_again_gives_the_same_bytes(evaluated):
    paths = [evaluated / "report.html", *sorted((evaluated / "evaluation").iterdir())]
    before = [path.read_bytes() for path in paths]
    assert evaluate.main([str(evaluated)]) == 0
    assert [path.read_bytes() for path in paths] == before


def test_ranks_that_share_the_sentences_write_what_one_process_writes(evaluated, run_copy):
    shutil.rmtree(run_copy / "evaluation", ignore_errors=True)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    words = [*torchrun, "training.evaluation.evaluate", str(run_copy)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ("test.json", "test-translations.jsonl"):
        assert (run_copy / "evaluation" / name).read_text() == (evaluated / "evaluation" / name).read_text()


def test_examples_are_drawn_by_a_fixed_seed_and_at_least_ten(evaluated, capsys):
    assert EXAMPLES >= 10 and example_rows(600) == example_rows(600)
    assert sorted(example_rows(4)) == [0, 1, 2, 3]
    page = (evaluated / "report.html").read_text(encoding="utf-8")
    assert page.count("<dt>translation</dt>") == EXAMPLES and "not picked by quality" in page


def test_attention_maps_show_every_layer_and_head_with_tokens_as_text(evaluated):
    svg = (evaluated / "evaluation/test-attention-1.svg").read_text(encoding="utf-8")
    texts = ["".join(node.itertext()) for node in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
    for layer in (1, 2):
        for head in (1, 2):
            assert f"layer {layer}, head {head}" in texts
    assert texts.count("<sos>") == texts.count("<sep>") == 2 * 4  # both axes of four panels
    assert re.search("[\u4e00-\u9fff]", "".join(texts))
    assert svg.count("<image") == 4


def test_attention_maps_are_deterministic_quiet_and_safe(recwarn):
    maps = [torch.softmax(torch.arange(32.0).view(2, 4, 4), -1)]
    tokens = ["<sos>", "我", HOSTILE, "<sep>"]
    svg = attention_sheet(maps, tokens, separator=3)
    assert svg == attention_sheet(maps, tokens, separator=3)
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]
    texts = {"".join(node.itertext()) for node in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")}
    assert set(tokens) <= texts
    assert "<script" not in svg and "http" not in svg.replace("http://www.w3.org/", "")


class Page(HTMLParser):
    """Collects the tags, attributes and text of a page; void elements aside, tags must nest."""

    VOID = ("meta", "img", "br", "link", "!doctype")

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def hostile_report(evaluated: Path, **changes: object) -> Report:
    trained = open_trained(evaluated, device=CPU)
    scores = json.loads((evaluated / "evaluation/test.json").read_text())
    maps = [torch.softmax(torch.arange(32.0).view(2, 4, 4), -1)]
    fields = {
        "name": HOSTILE,
        "part": "test",
        "scores": scores,
        "data": trained.data,
        "training_data": trained.data,
        "checkpoint": {**trained.checkpoint.manifest, "config": {"run_dir": HOSTILE, HOSTILE: [HOSTILE]}},
        "metrics": [],
        "examples": [Example(HOSTILE, HOSTILE, HOSTILE, HOSTILE)],
        "attention": [(HOSTILE, attention_sheet(maps, [HOSTILE, ' id="x', "url(#x)", "&lt;"], 2))],
        "versions": {HOSTILE: HOSTILE},
    }
    return Report(**{**fields, **changes})


def test_the_report_is_one_page_without_scripts_or_anything_from_elsewhere(evaluated):
    page = Page((evaluated / "report.html").read_text(encoding="utf-8"))
    assert not {"script", "link", "iframe", "object", "img"} & set(page.tags)
    assert page.tags.count("svg") == 1 + evaluate.SHEETS
    for name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("src", "href", "xlink:href"):
            assert value.startswith(("data:image/png;base64,", "#"))
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    style = (evaluated / "report.html").read_text(encoding="utf-8")
    assert "prefers-color-scheme: dark" in style and "width=device-width" in style
    assert not re.search(r"@import|url\((?!#)", style)


def test_hostile_text_stays_text_wherever_it_stands(evaluated):
    text = render(hostile_report(evaluated))
    page = Page(text)
    assert not {"script", "img"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    # Title, heading, four in the example, caption, two axes, two in versions; the config has it quoted by YAML.
    assert "".join(page.words).count(HOSTILE) >= 11
    assert ' id="x' in "".join(page.words) and "url(#x)" in page.words and "&lt;" in page.words


def test_the_report_names_split_leakage_scores_hashes_config_and_speed(evaluated):
    page = " ".join(Page((evaluated / "report.html").read_text(encoding="utf-8")).words)
    trained = open_trained(evaluated, device=CPU)
    scores = json.loads((evaluated / "evaluation/test.json").read_text())
    for expected in (
        "random split",
        trained.data["leakage"]["test"]["words"],
        scores["bleu_signature"],
        scores["chrf_signature"],
        trained.data["fingerprint"],
        trained.data["source"]["sha256"],
        trained.checkpoint.manifest["files"]["model.safetensors"]["sha256"],
        "tokens_per_micro_batch: 2048",
        "tokens/s",
        "padding share",
        "layer 2, head 2",
    ):
        assert expected in page


def test_synthetic_data_gets_a_banner_and_real_data_none(evaluated):
    banner = "synthetic sample corpus: these scores say nothing about real translation"
    real = {**open_trained(evaluated, device=CPU).data, "synthetic": False}
    assert banner in (evaluated / "report.html").read_text(encoding="utf-8")
    assert banner not in render(hostile_report(evaluated, data=real, training_data=real))
    assert banner in render(hostile_report(evaluated, data=real))  # trained on synthetic data


def test_a_sentence_on_the_command_line_is_translated_without_the_data(run_copy, data, capsys):
    source = data.part("test").source_texts[0]
    config = run_copy / "checkpoints"
    assert config.is_dir()
    assert translate.main([str(run_copy), source, source]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == second != ""


def test_a_file_keeps_its_lines_and_names_those_without_a_translation(trained_run, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(translate, "LINES_PER_BLOCK", 4)  # blocks must not show
    sentences = list(data.part("test").source_texts[:6])
    lines = [sentences[0], "", *sentences[1:3], "我" * 200, "  ", *sentences[3:]]
    source, output = tmp_path / "zh.txt", tmp_path / "en.txt"
    source.write_bytes("\r\n".join(lines).encode())  # and no line end behind the last
    assert translate.main([str(trained_run), "--input", str(source), "--output", str(output)]) == 0
    translated = output.read_text(encoding="utf-8").split("\n")
    assert len(translated) == len(lines) + 1 and translated[-1] == ""
    warnings = capsys.readouterr().err
    for number in (2, 5, 6):
        assert translated[number - 1] == "" and f"line {number}: " in warnings
    assert "line 5: the sentence is too long: 200 tokens" in warnings
    translate.main([str(trained_run), *sentences])
    assert [line for line in translated if line] == capsys.readouterr().out.splitlines()


def test_a_stream_is_read_no_further_than_its_translations_are_asked_for(trained_run):
    read = []

    def endless():
        while True:
            read.append(b"\n")
            yield read[-1]

    translations = translate.translate_lines(open_trained(trained_run, device=CPU), endless(), lines_per_block=10)
    assert [next(translations) for _ in range(11)] == [""] * 11
    assert len(read) == 20


def test_text_is_simplified_exactly_if_the_training_data_was(run_copy, data):
    source, traditional = "他喜欢买书。", "他喜歡買書。"
    plain = open_trained(run_copy, device=CPU)
    assert plain.encode(source) != plain.encode(traditional)
    about = json.loads((run_copy / "data.json").read_text(encoding="utf-8"))
    about["options"]["simplify"] = True
    (run_copy / "data.json").write_text(json.dumps(about), encoding="utf-8")
    simplifying = open_trained(run_copy, device=CPU)
    assert simplifying.encode(traditional) == simplifying.encode(source) == plain.encode(source)


def test_test_sentences_typed_in_get_the_ids_they_have_in_the_data(trained_run, data):
    trained, test = open_trained(trained_run, device=CPU), data.part("test")
    for row in range(50):
        assert trained.encode(f" {test.source_texts[row]}\u200b\n") == test.source[row].tolist()


def test_bytes_that_are_no_text_are_named_and_stop_nobody_else(trained_run, capsys, monkeypatch):
    stdin = SimpleNamespace(buffer=io.BytesIO("\ufeff你好。\n".encode() + b"\xff\xfe\n"), isatty=lambda: False)
    monkeypatch.setattr(sys, "stdin", stdin)
    assert translate.main([str(trained_run)]) == 0
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 2
    assert "line 2: not UTF-8" in captured.err and "line 1" not in captured.err


def test_mistakes_on_the_command_line_are_answered(trained_run, tmp_path):
    for words, answer in (
        (["你好", "--input", "x.txt"], "leave one out"),
        (["--input", str(tmp_path / "none.txt")], "cannot be read: No such file"),
        (["你好", "--output", str(tmp_path / "none/en.txt")], "there is no folder"),
    ):
        with pytest.raises(UserError, match=answer):
            translate.main([str(trained_run), *words])


def test_a_reader_that_leaves_ends_the_pipe_quietly(trained_run, data, tmp_path):
    source = tmp_path / "zh.txt"
    source.write_text("".join(f"{text}\n" for text in data.part("train").source_texts), encoding="utf-8")
    command = [sys.executable, "-m", "training.evaluation.translate", str(trained_run), "--input", str(source)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline().strip()
        process.stdout.close()
        errors = process.stderr.read()
        assert process.wait(timeout=120) == 141
    assert "Traceback" not in errors
