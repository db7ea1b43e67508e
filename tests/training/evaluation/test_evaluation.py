"""A finished run, scored, shown and used: on a real run folder, made by the training script itself."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from data_prep import pairs
from tests.support.browser import browser
from tests.support.commands import ROOT, run
from tests.support.lives import tell_otherwise
from tests.support.once import once
from tests.support.pages import Page
from tests.support.runs import command_of
from training.base.console import UserError
from training.data.languages import language_of
from training.data.prepared import Prepared, Ragged, list_files, open_prepared, write_part
from training.engine.status import EXIT_RESUMABLE
from training.evaluation import evaluate, translate
from training.evaluation.setting import Search
from training.evaluation.translations.evaluation import SHEETS
from training.evaluation.translations.report import SYNTHETIC
from training.evaluation.translations.scores import score_texts
from training.evaluation.translations.trained import open_trained
from training.models.decoding import translate as translate_ids
from training.report.examples import EXAMPLES
from training.report.page import evaluation_folder, write_evaluated, write_page

CPU = torch.device("cpu")


@pytest.fixture
def data(sample_data: Path) -> Prepared:
    return open_prepared(sample_data)


def first_pairs(data: Prepared, count: int) -> list[tuple[str, str]]:
    test = data.part("test")
    return list(zip(test.source_texts[:count], test.target_texts[:count], strict=True))


def with_test_part(data: Prepared, folder: Path, pairs: list[tuple[str, str]]) -> Path:
    """A copy of the data set with another test part."""
    shutil.copytree(data.folder, folder)
    shutil.rmtree(folder / "test")
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    (folder / "meta.json").unlink()
    texts = {side: [pair[place] for pair in pairs] for place, side in enumerate(("source", "target"))}
    ids = {}
    for side, tokenizer in (("source", data.source_tokenizer), ("target", data.target_tokenizer)):
        rows = [tokenizer.encode(text) for text in texts[side]]
        ids[side] = Ragged(np.array(list(chain(*rows)), np.int32), np.cumsum([0, *map(len, rows)], dtype=np.int64))
    columns = {side: pa.array(column, pa.large_string()) for side, column in texts.items()}
    fingerprint = write_part(folder / "test", np.arange(len(pairs)), columns, **ids)
    meta |= {"files": list_files(folder), "fingerprint": fingerprint}
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    return folder


def train(task: str, data: Path, **model: object) -> Path:
    """A run of a hundred steps, in two sessions: enough for translations to end, whatever the seed."""

    def make(folder: Path) -> None:
        run_dir = folder / task
        run_dir.mkdir()
        options = {
            **{f"model.{key}": value for key, value in model.items()},
            **{"optim.epochs": 4, "optim.lr": 8e-3, "optim.warmup_steps": 5, "checkpoint.every_steps": 25},
            **{"log.every_steps": 5, "log.validate_every_steps": 25, "batch.tokens_per_micro_batch": 1024},
        }
        words = command_of(run_dir, data, *(word for key, value in options.items() for word in (f"--{key}", value)))
        (run_dir / "STOP").touch()  # a first session that comes to nothing
        for status in (EXIT_RESUMABLE, 0):
            result = run(*words, module=f"training.{task}")
            assert result.status == status, result

    return once(f"evaluation-{task}", make) / task


@pytest.fixture
def trained_run(sample_data) -> Path:
    return train("gpt", sample_data, layers=2, heads=2, width=32, context=40)


@pytest.fixture
def seq2seq_run(sample_data) -> Path:
    return train("seq2seq", sample_data, layers=1, embedding_width=32, hidden_width=32, max_length=40)


@pytest.fixture(params=["gpt", "seq2seq"])
def either_run(request) -> Path:
    """A run of each family; tests do not write there."""
    return request.getfixturevalue({"gpt": "trained_run", "seq2seq": "seq2seq_run"}[request.param])


@pytest.fixture
def evaluated(trained_run) -> Path:
    """A copy of the run, which is evaluated; tests do not write there either."""

    def make(folder: Path) -> None:
        assert evaluate.main([str(shutil.copytree(trained_run, folder / trained_run.name))]) == 0

    return once("evaluation-evaluated", make) / trained_run.name


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
    words = ("--tokenizer", "word", "--vocabularies", "joint", "--seed", "7", "--min_frequency", "3")
    pairs.main(["--source", "sample", "--output", str(other), *words])
    with pytest.raises(UserError, match=r"another tokenizer than .* was trained with"):
        evaluate.main([str(run_copy), "--data", str(other)])
    shutil.rmtree(run_copy / "tokenizer")
    shutil.copytree(other / "tokenizer", run_copy / "tokenizer")
    with pytest.raises(UserError, match="is not the tokenizer that the model was trained with"):
        open_trained(run_copy, device=CPU)


def test_evaluation_writes_scores_translations_maps_and_report(evaluated, data):
    folder, test = evaluated / "evaluation", data.part("test")
    scores = json.loads((folder / "test.json").read_text())
    assert scores["sentences"] == len(test) == 600
    assert scores["split"] == "random" and scores["synthetic"] is True
    rows = [json.loads(line) for line in (folder / "test-translations.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["source"] for row in rows] == list(test.source_texts)
    assert [row["reference"] for row in rows] == list(test.target_texts)
    again = score_texts([row["translation"] for row in rows], list(test.target_texts), language_of("en"))
    assert again == {key: scores[key] for key in again}
    assert len(list(folder.glob("test-attention-*.svg"))) == SHEETS
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


def test_evaluating_again_gives_the_same_bytes(evaluated, tmp_path):
    evaluated = shutil.copytree(evaluated, tmp_path / evaluated.name)
    paths = [evaluated / "report.html", *sorted((evaluated / "evaluation").iterdir())]
    before = [path.read_bytes() for path in paths]
    assert evaluate.main([str(evaluated)]) == 0
    assert [path.read_bytes() for path in paths] == before


def test_ranks_that_share_the_sentences_write_what_one_process_writes(evaluated, run_copy):
    shutil.rmtree(run_copy / "evaluation", ignore_errors=True)
    assert run(run_copy, module="training.evaluation.evaluate", ranks=2).status == 0
    for name in ("test.json", "test-translations.jsonl"):
        assert (run_copy / "evaluation" / name).read_text() == (evaluated / "evaluation" / name).read_text()


def test_where_the_first_rank_fails_at_the_end_the_other_says_only_that_it_was_lost(run_copy):
    (run_copy / "report.html").unlink(missing_ok=True)
    (run_copy / "report.html").mkdir()
    alone = {"RANKS_LEFT_ALONE": "1"}  # or it might be told to leave before it notices
    result = run(run_copy, module="training.evaluation.evaluate", ranks=2, environment=alone)
    assert result.status == 1 and "[rank0]: IsADirectoryError" in result.err, result
    assert "rank 1 ends as well: lost contact" in result.err and "[rank1]" not in result.err, result


def test_scoring_a_translator_imports_nothing_of_chat_models(evaluated, tmp_path):
    run_dir = shutil.copytree(evaluated, tmp_path / "run")
    script = (
        "import sys; from training.evaluation import evaluate\n"
        f"assert evaluate.main([{str(run_dir)!r}]) == 0\n"
        "print([name for name in ('transformers', 'peft', 'bitsandbytes') if name in sys.modules])"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", script]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("\n[]\n"), done


@pytest.mark.parametrize("task", ["gpt", "seq2seq"])
def test_the_report_tells_of_the_run_and_of_those_beside_it(task, trained_run, seq2seq_run, data, tmp_path):
    runs = {"gpt": trained_run, "seq2seq": seq2seq_run}
    other = "seq2seq" if task == "gpt" else "gpt"
    small = with_test_part(data, tmp_path / "small", first_pairs(data, 15))
    for name, source in (("own", task), ("sibling", task), ("stranger", other)):
        shutil.copytree(runs[source], tmp_path / "runs" / name)
    for name in ("sibling", "stranger", "own"):
        assert evaluate.main([str(tmp_path / "runs" / name), "--data", str(small)]) == 0
    report = tmp_path / "runs/own/report.html"
    page = Page(report.read_text(encoding="utf-8")).text
    trained = open_trained(tmp_path / "runs/own", device=CPU)
    scores = json.loads((tmp_path / "runs/own/evaluation/test-on-small.json").read_text())
    for expected in (
        *(SYNTHETIC, f"{sum(p.numel() for p in trained.model.parameters()):,} parameters"),
        *(scores["bleu_signature"], scores["chrf_signature"], scores["all_references"]["bleu_signature"]),
        *("1-5 tokens", "a side seen in training", "Beside other evaluations", "sibling"),
        *(trained.data["source"]["sha256"], trained.data["tokenizer"]["target"]["sha256"], scores["data_fingerprint"]),
        trained.checkpoint.manifest["files"]["model.safetensors"]["sha256"],
        *("tokens_per_micro_batch: 1024", "tokens/s", "padding share", "2 sessions", f"/{task}/STOP"),
        *("Random", "Best", "Typical", "Worst", "(chrF "),
        *(["layer 2, head 2"] if task == "gpt" else []),
    ):
        assert expected in page, expected
    assert "stranger" not in page and page.count("reference") >= EXAMPLES + 15


@pytest.mark.whole
def test_a_reader_sees_a_real_report_on_a_phone_and_a_desk(evaluated):
    with browser() as reader:
        for width in (360, 1200):
            seen = reader.open(evaluated / "report.html", width=width)
            assert seen.complaints == seen.fetched == seen.outside == [] and seen.page_width <= width


def test_two_runs_translate_together_and_are_scored_as_such(run_copy, seq2seq_run, capsys):
    together = f"{run_copy},{seq2seq_run}"
    assert evaluate.main([together]) == 0
    said = capsys.readouterr().out
    assert "together with seq2seq (step " in said and "tokens       loss" not in said
    (label,) = (path.stem for path in (run_copy / "evaluation").glob("*.json"))
    assert label == "test-with-seq2seq"
    text = Page((run_copy / "report.html").read_text("utf-8")).text
    assert "together with" in text and "seq2seq, step" in text
    scores = json.loads((run_copy / f"evaluation/{label}.json").read_text())
    assert "loss" not in scores and scores["bleu"] > 0
    rows = [
        json.loads(line)
        for line in (run_copy / f"evaluation/{label}-translations.jsonl").read_text("utf-8").splitlines()
    ]
    assert translate.main([together, *(row["source"] for row in rows[:20])]) == 0
    assert capsys.readouterr().out.splitlines() == [row["translation"] for row in rows[:20]]
    alone = [open_trained(path, device=CPU) for path in (run_copy, seq2seq_run)]
    sources = [row["source"] for row in rows]
    by_each = [
        [
            each.target_tokenizer.decode(found.ids)
            for found in translate_ids(each.decoder, [each.encode(source) for source in sources])
        ]
        for each in alone
    ]
    assert [row["translation"] for row in rows] not in by_each


def test_runs_on_different_data_do_not_translate_together(run_copy, data, tmp_path):
    other = shutil.copytree(run_copy, tmp_path / "other")
    tell_otherwise(other, data.fingerprint, "of other data")
    with pytest.raises(UserError, match="was trained on other data than"):
        translate.main([f"{run_copy},{other}", "你好。"])


def test_attention_maps_come_as_svg(either_run, data, tmp_path):
    run = shutil.copytree(either_run, tmp_path / "run")
    small = with_test_part(data, tmp_path / "small", first_pairs(data, 5))
    assert evaluate.main([str(run), "--data", str(small)]) == 0
    svg = (run / "evaluation/test-on-small-attention-1.svg").read_text(encoding="utf-8")
    assert re.search(">[\u4e00-\u9fff]+<", svg) and "&lt;eos&gt;" in svg
    # A panel for each layer and head, or one for an encoder-decoder.
    assert svg.count("<image ") == (4 if either_run.name == "gpt" else 1)


def test_pairs_that_are_too_long_for_the_model_are_counted(either_run, data, tmp_path):
    run = shutil.copytree(either_run, tmp_path / "run")
    (source, target), *others = first_pairs(data, 4)
    pairs = [("我" * 200, target), (source, "a " * 200), *others]
    assert evaluate.main([str(run), "--data", str(with_test_part(data, tmp_path / "long", pairs))]) == 0
    scores = json.loads((run / "evaluation/test-on-long.json").read_text())
    assert (scores["sentences"], scores["not_translated"], scores["unscored_pairs"]) == (5, 1, 2)
    assert sum(group["sentences"] for group in scores["by_length"]) == 5
    rows = (run / "evaluation/test-on-long-translations.jsonl").read_text(encoding="utf-8").splitlines()
    assert "too long: 200 tokens" in json.loads(rows[0])["note"] and json.loads(rows[0])["translation"] == ""


def test_mistakes_are_answered_by_one_line_that_says_what_to_do(trained_run, seq2seq_run, data, tmp_path, launch):
    empty = with_test_part(data, tmp_path / "empty", [])
    long = with_test_part(data, tmp_path / "long", [("我" * 200, "a"), ("我", "a " * 200)])
    for run_dir in (trained_run, seq2seq_run):
        moved, untrained = (shutil.copytree(run_dir, tmp_path / f"{name}-{run_dir.name}") for name in ("moved", "un"))
        tell_otherwise(moved, data.folder, tmp_path / "gone")
        shutil.rmtree(untrained / "checkpoints")
        (untrained / "checkpoints").mkdir()
        pair = f"{moved},{moved}"
        answers = {
            (untrained,): f"{untrained} has no valid checkpoint: train first",
            (moved,): f"trained on the data in {tmp_path}/gone, and there is no such folder here: name where it is now",
            (moved, "--beam_size", 0): "the beam size must be 1 (greedy) or more, got 0",
            (pair, "--answers-per-task", 5): f"{pair} is a translation run: leave out --answers_per_task",
            (moved, "--data", empty): f"the test part of {empty} is empty: choose another --part",
            (moved, "--data", long): f"none of the 2 pairs in the test part of {long} fits the model",
        }
        commands = {words: launch(*words, module="training.evaluation.evaluate") for words in answers}
        for words, command in commands.items():
            result = command.wait()
            assert result.status == 1 and "Traceback" not in result.err, result
            assert len(result.error_lines) == 1 and answers[words] in result.error_lines[0]
        assert not (moved / "evaluation/test-on-long.json").exists()


def test_a_run_that_saves_while_it_is_opened_is_not_scored_by_two_checkpoints(run_copy):
    trained = open_trained(run_copy, device=CPU)
    for other, refused in (([[trained.step]], False), ([[trained.step + 1]], True)):
        cluster: Any = SimpleNamespace(gather=lambda own, kind, other=other: [own, other], on_first=lambda work: work())
        with pytest.raises(UserError, match="has saved while it was opened") if refused else nullcontext():
            evaluate.check_ready([trained], cluster)
    shutil.rmtree(trained.checkpoint.folder)
    gone = f"{trained.checkpoint.folder.name} is gone, since the run goes on: start the same command again"
    with pytest.raises(UserError, match=gone):
        trained.weights.read(trained.checkpoints)


def test_evaluations_of_one_run_may_begin_and_end_at_once(evaluated, run_copy):
    run_dir = shutil.copytree(evaluated, run_copy.with_name("evaluated"))
    trained = open_trained(run_dir, device=CPU)
    shown = json.loads((run_dir / "evaluation/test.page").read_text(encoding="utf-8"))
    files = set((run_dir / "evaluation").iterdir())
    cluster: Any = SimpleNamespace(gather=lambda own, kind: [own, own], on_first=lambda work: work())

    def evaluate_again(number: int) -> None:
        evaluate.check_ready([trained], cluster)
        with evaluation_folder(run_dir) as folder:
            write_evaluated(folder, "test", shown)
            write_page(run_dir, within=folder)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(evaluate_again, range(40)))
    assert set((run_dir / "evaluation").iterdir()) == files


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

    translations = translate.translate_lines(
        open_trained(trained_run, device=CPU), endless(), Search(), lines_per_block=10
    )
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
