"""A QLoRA run evaluated by the command: a model with its adapters against itself without them, asked for real."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from tests.support.base_models import make_tiny_qwen2
from tests.support.commands import REAL_TATOEBA, Launch, launching
from tests.support.legal_records import RUN_STEPS, TASK_NAMES, law_data, law_run, law_run_base
from tests.support.lives import tell_otherwise
from tests.support.once import once
from tests.support.runs import assert_only_one_line_is_said
from training.base.console import UserError
from training.data.conversations import open_conversations
from training.data.prepared import FORMAT as PAIRS
from training.engine.cluster import Cluster
from training.evaluation.answers.before_after import losses_by_row, questions_of
from training.evaluation.chat_model.adapters import TrainedAdapters, open_adapters
from training.evaluation.compare import main as compare
from training.evaluation.evaluate import main as evaluate
from training.models.generation import generate
from training.qlora import Answers

CPU = torch.device("cpu")
LAW_EVAL = REAL_TATOEBA.parents[1] / "disc-law-eval"


@pytest.fixture
def base() -> Path:
    return law_run_base()


@pytest.fixture
def trained_run() -> Path:
    return law_run()


@pytest.fixture
def run_dir(trained_run: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(trained_run, tmp_path / "run")


@pytest.fixture
def evaluated_run(trained_run: Path) -> Path:
    """Another copy, which is evaluated; what was printed is in output-0/out beside it."""

    def evaluate(folder: Path) -> None:
        with launching(folder) as launch:
            evaluated(launch, shutil.copytree(trained_run, folder / "run"))

    return once("answers-evaluated", evaluate) / "run"


def evaluated(launch: Launch, run_dir: Path, *words: object, ranks: int | None = None) -> tuple[dict, list[dict], str]:
    """Scores, answers and what was printed."""
    words = ("--max_new_tokens", 12, "--answers_per_task", 2, *words)
    label = "test-2answers-12tokens" + ("-1ofexam" if "--disc_law_eval" in words else "")
    result = launch(run_dir, *words, module="training.evaluation.evaluate", ranks=ranks).wait()
    assert result.status == 0, result
    return *found_in(run_dir, label), result.out


def found_in(run_dir: Path, label: str) -> tuple[dict, list[dict]]:
    lines = (run_dir / f"evaluation/{label}-answers.jsonl").read_text("utf-8").splitlines()
    return json.loads((run_dir / f"evaluation/{label}.json").read_text("utf-8")), [json.loads(line) for line in lines]


def test_scores_answers_and_report_are_written_and_ranks_share_the_work(
    launch: Launch, run_dir: Path, evaluated_run: Path
):
    scores, answers = found_in(evaluated_run, "test-2answers-12tokens")
    out = (evaluated_run.parent / "output-0/out").read_text("utf-8")
    assert {task["task"] for task in scores["tasks"]} == set(TASK_NAMES)
    total = scores["losses"][-1]
    assert total["after"]["loss"] < total["before"]["loss"] and total["p"] < 0.05
    assert len(answers) == scores["items"] and {"uid", "question", "reference", "before", "after"} <= set(answers[0])
    data = open_conversations(law_data())
    assert {row["uid"] for row in answers} >= set(data.meta["questions"])
    page = (evaluated_run / "report.html").read_text("utf-8")
    assert "<script" not in page and all(task in page for task in TASK_NAMES)
    assert "loss, nats per token" in out and str(evaluated_run / "report.html") in out
    shared, same_answers, _ = evaluated(launch, run_dir, ranks=2)
    assert same_answers == answers
    for one, other in zip(scores["losses"], shared["losses"], strict=True):
        assert one["after"]["loss"] == pytest.approx(other["after"]["loss"], rel=1e-5)


@pytest.fixture
def trained(trained_run: Path) -> TrainedAdapters:
    return open_adapters(trained_run, device=CPU)


def prompts_of(trained: TrainedAdapters) -> list[list[int]]:
    part = open_conversations(trained.config.data).part("test")
    return [part.ids[row][: part.prompt_lengths[row]].tolist() for row in range(8)]


def test_answers_do_not_depend_on_the_batch_and_stop_at_the_end_token(trained: TrainedAdapters):
    prompts, tokenizer = prompts_of(trained), trained.tokenizer
    assert len({len(prompt) for prompt in prompts}) > 3
    how = {"pad_id": tokenizer.pad_id, "max_new_tokens": 10, "precision": trained.precision}
    model = trained.model.model
    together = generate(model, prompts, end_id=tokenizer.end_id, **how)
    for prompt, answer in zip(prompts, together, strict=True):
        assert not answer.ended or len(answer.ids) < 10
        # Without a cache, a word at a time, as the definition says.
        ids, said = list(prompt), []
        with torch.no_grad():
            while len(said) < 10:
                following = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
                if following == tokenizer.end_id:
                    break
                said.append(following)
                ids.append(following)
        assert answer.ids == said
    # Whatever is said first, called the end: then nothing is said.
    place, first = next((place, answer.ids[0]) for place, answer in enumerate(together) if answer.ids)
    ended = generate(model, prompts, end_id=first, **how)[place]
    assert ended.ended and ended.ids == []


def test_penalties_in_the_base_models_own_settings_play_no_part(trained: TrainedAdapters):
    prompts, tokenizer, model = prompts_of(trained)[:3], trained.tokenizer, trained.model.model
    # No token is the end, so that the model goes on and repeats itself.
    how = {"pad_id": tokenizer.pad_id, "end_id": tokenizer.size + 5, "max_new_tokens": 40}
    plain = generate(model, prompts, precision=trained.precision, **how)
    penalty = transformers.GenerationConfig(repetition_penalty=50.0, no_repeat_ngram_size=1)
    model.generation_config = model.get_base_model().generation_config = penalty
    assert generate(model, prompts, precision=trained.precision, **how) == plain
    assert any(len(set(answer.ids)) < len(answer.ids) for answer in plain), "an answer that repeats itself"


def test_wrong_folder_of_disc_law_eval_is_refused_before_the_work(launch: Launch, run_dir: Path, tmp_path: Path):
    result = launch(run_dir, "--disc_law_eval", tmp_path, module="training.evaluation.evaluate").wait()
    assert_only_one_line_is_said(result, str(tmp_path))
    assert "losses before" not in result.err


def test_before_is_the_base_model_itself_and_after_the_trained_one(trained: TrainedAdapters, run_dir: Path):
    law = open_conversations(law_data())
    answers = Answers(law.part("test"), law.meta["tokenizer"]["pad_id"])
    with Cluster() as cluster:
        with trained.adapters(False):
            before = losses_by_row(trained, answers, cluster, "")
        with trained.adapters(True):
            after = losses_by_row(trained, answers, cluster, "")
        untrained = open_adapters(run_dir, device=CPU)
        with torch.no_grad():
            for name, parameter in untrained.model.named_parameters():
                if "lora_B" in name:
                    parameter.zero_()
        expected = losses_by_row(untrained, answers, cluster, "")
    assert np.isfinite(after).all() and not np.allclose(before, after, rtol=1e-2)
    np.testing.assert_allclose(before, expected, rtol=1e-5)


def test_more_questions_hold_the_fewer_ones():
    tasks = ["a"] * 30 + ["b"] * 3
    some, more = questions_of(tasks, 5), questions_of(tasks, 10)
    assert len(some) == 8 and set(some) <= set(more) and questions_of(tasks, None) == list(range(33))


def test_adapters_on_another_model_are_refused(run_dir: Path, base: Path, tmp_path: Path):
    other = make_tiny_qwen2(tmp_path / "other", base, seed=5, vocabulary_size=700)
    with pytest.raises(UserError, match=r"not the one that the adapters .* were trained on"):
        open_adapters(run_dir, device=CPU, base_model=str(other))


def test_base_model_that_was_moved_is_named(launch: Launch, run_dir: Path, base: Path, tmp_path: Path):
    tell_otherwise(run_dir, base, tmp_path / "gone/base")
    result = launch(run_dir, module="training.evaluation.evaluate").wait()
    assert_only_one_line_is_said(result, str(tmp_path / "gone/base"), "there is no such folder")
    assert open_adapters(run_dir, device=CPU, base_model=str(base)).step == RUN_STEPS


def test_what_is_for_translators_is_refused_on_a_qlora_run(launch: Launch, run_dir: Path, tmp_path: Path):
    result = launch(run_dir, "你好。", module="training.evaluation.translate").wait()
    assert_only_one_line_is_said(result, "does not translate", f"training.evaluation.chat {run_dir}")
    result = launch(run_dir, "--beam-size", 5, module="training.evaluation.evaluate").wait()
    assert_only_one_line_is_said(result, f"{run_dir} is a QLoRA run: leave out --beam_size")


def test_what_cannot_be_asked_is_refused_by_name(run_dir: Path):
    for words, answer in (
        (("--answers_per_task", -1), "--answers_per_task must be at least 0"),
        (("--max_new_tokens", 0), "--max_new_tokens must be at least 1"),
        (("--disc_law_eval_limit", 3), "no effect without --disc_law_eval FOLDER"),
    ):
        with pytest.raises(UserError, match=answer):
            evaluate([str(run_dir), *map(str, words)])


def test_two_runs_are_compared_on_the_same_questions(evaluated_run: Path, tmp_path: Path, capsys):
    run_dir = evaluated_run
    twin = shutil.copytree(run_dir, tmp_path / "twin")
    names = [f"{folder}:test-2answers-12tokens" for folder in (run_dir, twin)]
    assert compare(names) == 0
    said = capsys.readouterr().out
    assert "mean of tasks" in said and said.rstrip().endswith("1.000")
    path = twin / "evaluation/test-2answers-12tokens-answers.jsonl"
    path.write_text("".join(path.read_text("utf-8").splitlines(keepends=True)[1:]), encoding="utf-8")
    with pytest.raises(UserError, match="not asked the same questions"):
        compare(names)
    path.unlink()
    with pytest.raises(UserError, match=f"{twin} has no answers called test-2answers-12tokens: .* make them with"):
        compare(names)
    translator = tmp_path / "translator"
    translator.mkdir()
    (translator / "data.json").write_text(json.dumps({"format": PAIRS}))
    with pytest.raises(UserError, match=f"{run_dir} answers questions and {translator} translates: only runs of one"):
        compare([str(translator), str(run_dir)])
    with pytest.raises(UserError, match=f"{run_dir} has no answers called test; there is test-2answers-12tokens"):
        compare([str(run_dir), str(run_dir)])


@pytest.mark.skipif(not LAW_EVAL.is_dir(), reason=f"DISC-Law-Eval is not at {LAW_EVAL}")
def test_disc_law_eval_is_asked_scored_and_shown(launch: Launch, run_dir: Path):
    scores, _, out = evaluated(launch, run_dir, "--disc_law_eval", LAW_EVAL, "--disc_law_eval_limit", 1)
    law = scores["disc_law_eval"]
    assert law["before"]["items"] == law["after"]["items"] == 10 and "DISC-Law-Eval" in out
    label = "test-2answers-12tokens-1ofexam"
    folder = run_dir / f"evaluation/{label}-disc-law-eval"
    assert {path.name for path in (folder / "after/multi").iterdir()} == {
        f"{exam}_results.csv" for exam in ("cpa", "nje", "pae", "ungee")
    }
    page = run_dir / f"evaluation/{label}-disc-law-eval-open.html"
    # The made-up records hold no question of a real exam.
    assert law["overlap"]["questions"] == 0 and "0 of the 10 questions share 20 characters" in out
    assert page.is_file() and f"evaluation/{page.name}" in (run_dir / "report.html").read_text("utf-8")
