"""Scores a model with trained adapters against the same model without them, and writes the run's report.

    python -m training.evaluation.answers runs/NAME [--checkpoint last] [--part test] [--answers_per_task 100]
    torchrun --standalone --nproc-per-node=2 -m training.evaluation.answers runs/NAME   # the ranks share the work
    python -m training.evaluation.answers runs/NAME --disc_law_eval DISC-Law-Eval/data  # its questions, too

Both models meet the same rows: the loss of every answer in the part, and answers of their own to some questions of
every task. Writes runs/NAME/report.html and, under runs/NAME/evaluation/, LABEL-answers.jsonl (question, reference,
both answers), LABEL.json (scores) and, if asked for, LABEL-disc-law-eval/ (answers in the released form) and
LABEL-disc-law-eval-open.html. LABEL is the part, and behind it whatever is not the usual.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from training.base.console import UserError, run_main, say
from training.base.environment import without_local_rank
from training.base.files import write_atomically, writing_to
from training.base.progress import Progress
from training.data.conversations import ConversationPart, Conversations, open_conversations, question_of
from training.data.prepared import PARTS
from training.engine.batch_plan import batches_by_length
from training.engine.cluster import Cluster
from training.engine.metrics import read_metrics
from training.engine.precision import PrecisionName
from training.engine.status import read_sessions
from training.engine.wandb.tracker import publish_evaluation
from training.evaluation.answers.comparison import ENDING
from training.evaluation.answers.evaluation import AnswerEvaluation
from training.evaluation.answers.losses import compare_losses, loss_by_task
from training.evaluation.answers.report import AnsweredQuestion, AnswerReport, about_overlap, render
from training.evaluation.answers.scores import TaskScore, compare_tasks, score_answers
from training.evaluation.chat_model.adapters import TrainedAdapters, open_adapters
from training.evaluation.chat_model.generation import Generated, answers_to
from training.evaluation.disc_law_eval.asking import LawAnswers, ask_law_eval, load_law_questions
from training.evaluation.disc_law_eval.overlap import overlapping
from training.evaluation.setting import Setting, add_model_options
from training.evaluation.translations.report import example_rows
from training.qlora import LIBRARIES, Answers, losses_of

# Positions of a batch of losses; a single conversation may be longer.
LOSS_TOKENS = 4096

# How far a rank may be ahead of another, see `Cluster.shared_out`: minutes at most.
BATCHES_BETWEEN_MEETINGS = 64

DEFAULT_ANSWERS, DEFAULT_TOKENS = 100, 512
QUESTIONS_SEED = 1234


@dataclass(frozen=True)
class Asking:
    """How much the models are asked to write. answers_per_task: questions of each task; None for all."""

    answers_per_task: int | None = DEFAULT_ANSWERS
    max_new_tokens: int = DEFAULT_TOKENS
    disc_law_eval: Path | None = None
    disc_law_eval_limit: int | None = None

    @property
    def label(self) -> str:
        """What of it is not the usual, for a label."""
        found = ""
        if self.answers_per_task != DEFAULT_ANSWERS:
            found += f"-{self.answers_per_task or 'all'}answers"
        if self.max_new_tokens != DEFAULT_TOKENS:
            found += f"-{self.max_new_tokens}tokens"
        return found + (f"-{self.disc_law_eval_limit}ofexam" if self.disc_law_eval_limit else "")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; raises UserError for everything the user can mend."""
    parser = argparse.ArgumentParser(prog="python -m training.evaluation.answers", description=__doc__.split("\n")[0])
    add_model_options(parser)
    parser.add_argument("--base_model", metavar="FOLDER", help="where the base model is (default: where it was)")
    parser.add_argument("--data", type=Path, help="prepared data to score on (default: what the run was trained on)")
    parser.add_argument("--part", choices=PARTS, default="test", help="default test")
    parser.add_argument(
        "--answers_per_task",
        type=int,
        default=DEFAULT_ANSWERS,
        metavar="N",
        help=f"questions of each task to answer, drawn by a fixed seed (default {DEFAULT_ANSWERS}; 0: all)",
    )
    parser.add_argument(
        "--max_new_tokens",
        type=int,
        default=DEFAULT_TOKENS,
        metavar="N",
        help=f"of an answer (default {DEFAULT_TOKENS})",
    )
    parser.add_argument(
        "--precision", choices=get_args(PrecisionName), help="to compute in (default: as the run was told)"
    )
    parser.add_argument(
        "--disc_law_eval", type=Path, metavar="FOLDER", help="DISC-Law-Eval's data: ask its questions, four-shot"
    )
    parser.add_argument(
        "--disc_law_eval_limit", type=int, metavar="N", help="the first N questions of each exam only (default all)"
    )
    arguments = parser.parse_args(without_local_rank(sys.argv[1:] if argv is None else argv))
    for name, least in (("answers_per_task", 0), ("max_new_tokens", 1), ("disc_law_eval_limit", 1)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise UserError(f"--{name} must be at least {least}")
    if arguments.disc_law_eval_limit is not None and arguments.disc_law_eval is None:
        raise UserError("--disc_law_eval_limit has no effect without --disc_law_eval FOLDER: add it, or leave it out")
    asking = Asking(
        arguments.answers_per_task or None,
        arguments.max_new_tokens,
        arguments.disc_law_eval,
        arguments.disc_law_eval_limit,
    )
    with Cluster() as cluster:
        trained = open_adapters(
            arguments.run_dir,
            arguments.checkpoint,
            device=cluster.device,
            base_model=arguments.base_model,
            precision=arguments.precision,
        )
        data = _open_data(trained, arguments.data)
        evaluate(trained, data, arguments.part, asking, cluster)
    return 0


def _open_data(trained: TrainedAdapters, named: Path | None) -> Conversations:
    folder = named or trained.config.data
    if named is None and not folder.is_dir():
        raise UserError(
            f"{trained.run_dir} was trained on the data in {folder}, and there is no such folder here: name where it "
            "is now, or a data set that was prepared with the same tokenizer, with --data FOLDER"
        )
    data = open_conversations(folder)
    if data.identity["tokenizer"] != trained.checkpoint.manifest["data"]["tokenizer"]:
        raise UserError(
            f"{data.folder} was prepared with another tokenizer or chat template than {trained.run_dir} was trained "
            "with: name the data set of this run, or one prepared with the same --tokenizer"
        )
    return data


def evaluate(trained: TrainedAdapters, data: Conversations, part_name: str, asking: Asking, cluster: Cluster) -> Path:
    """Scores one part of `data` before and after, writes everything the module names, and returns the report's path.

    Raises UserError when the part is empty.
    """
    part = data.part(part_name)
    if len(part) == 0:
        raise UserError(f"the {part_name} part of {data.folder} is empty: choose another --part, or other --data")
    own = data.fingerprint == trained.checkpoint.manifest["data"]["fingerprint"]
    label = Setting(part_name, str(trained.weights), data=None if own else data.folder.resolve().name).label
    label += asking.label
    # Before the work, which takes long: what would stop it at its end.
    cluster.on_first(lambda: _check_writable(trained.run_dir))
    questions = None
    if asking.disc_law_eval is not None:
        questions = load_law_questions(asking.disc_law_eval, asking.disc_law_eval_limit)
    tasks = list(part.tasks)
    rows = questions_of(tasks, asking.answers_per_task)
    # Those of the table of answers are asked in any case.
    table = [row for row, uid in enumerate(part.uids) if uid in set(data.meta["questions"])]
    rows = sorted({*rows, *table})

    answers = Answers(part, data.meta["tokenizer"]["pad_id"])
    prompts = [part.ids[row][: part.prompt_lengths[row]].tolist() for row in rows]
    nats: dict[str, np.ndarray] = {}
    texts: dict[str, list[Generated]] = {}
    law: dict[str, LawAnswers] = {}
    for side in ("before", "after"):
        with trained.adapters(side == "after"):
            nats[side] = losses_by_row(trained, answers, cluster, f"losses {side}")
            texts[side] = answers_to(trained, prompts, asking.max_new_tokens, cluster, f"answers {side}")
            if questions is not None:
                law[side] = ask_law_eval(trained, questions, asking.max_new_tokens, cluster, side)
    path = trained.run_dir / "report.html"
    if not cluster.is_first:
        return path

    decode = trained.tokenizer.decode
    said = {side: [decode(each.ids) for each in given] for side, given in texts.items()}
    turns = [json.loads(part.messages[row]) for row in rows]
    references = [messages[-1]["content"] for messages in turns]
    own_tasks = [tasks[row] for row in rows]
    scored = {side: score_answers(own_tasks, said[side], references) for side in said}
    counts = answers.answer_tokens.tolist()
    losses = {side: loss_by_task(tasks, nats[side].tolist(), counts) for side in nats}
    about = {
        "label": label,
        "task": "qlora",
        "part": part_name,
        "step": trained.step,
        "weights": str(trained.weights),
        "checkpoints": [checkpoint.step for checkpoint in trained.checkpoints],
        "base_model": trained.config.base_model,
        "base_model_fingerprint": trained.checkpoint.manifest["built_on"]["base_model"],
        "decoding": f"greedy, at most {asking.max_new_tokens} tokens, computed in {trained.precision.name}",
        "data_fingerprint": data.fingerprint,
        "synthetic": bool(data.meta.get("synthetic")),
    }
    evaluation = AnswerEvaluation(
        about, compare_tasks(scored["before"], scored["after"]), compare_losses(losses["before"], losses["after"])
    )
    scores = evaluation.to_json()
    per_item = {side: _in_order(own_tasks, scored[side]) for side in scored}

    def answered(place: int) -> AnsweredQuestion:
        before, after = (texts[side][place] for side in ("before", "after"))
        return AnsweredQuestion(
            own_tasks[place],
            question_of(turns[place]),
            references[place],
            said["before"][place],
            said["after"][place],
            (per_item["before"][place], per_item["after"][place]),
            (_note(before), _note(after)),
        )

    everything = [answered(place) for place in range(len(rows))]
    section, law_scores, open_page = "", None, None
    if law:
        overlap = overlapping(law["after"].questions, _texts_of(data.part("train"))) if own else None
        page_name = f"{label}-disc-law-eval-open.html"
        section, law_scores, open_page = law["before"].compared(law["after"], page_name, overlap)
        scores["disc_law_eval"] = law_scores
    report = AnswerReport(
        name=trained.run_dir.resolve().name,
        scores=scores,
        data=data.meta,
        checkpoint=trained.checkpoint.manifest,
        parameters=trained.parameters,
        trained_parameters=sum(each.numel() for each in trained.model.parameters() if each.requires_grad),
        questions=[everything[rows.index(row)] for row in table],
        examples=[everything[place] for place in example_rows(len(rows))],
        metrics=read_metrics(trained.run_dir),
        sessions=read_sessions(trained.run_dir),
        versions=_versions(trained),
        law_eval=section,
    )
    folder = trained.run_dir / "evaluation"
    with writing_to(trained.run_dir, option="RUN"):
        lines = (_line(part.uids[row], each) for row, each in zip(rows, everything, strict=True))
        write_atomically(folder / f"{label}{ENDING}", "".join(lines))
        for side, given in law.items():
            given.write(folder / f"{label}-disc-law-eval" / side)
        if open_page is not None:
            write_atomically(folder / f"{label}-disc-law-eval-open.html", open_page)
        # The scores last: where they stand, the answers do too.
        write_atomically(folder / f"{label}.json", json.dumps(scores, indent=2, ensure_ascii=False) + "\n")
        write_atomically(path, render(report))
    _print(scores, report.questions)
    say(f"\nscores: {folder / label}.json\nreport: {path}")
    shown = [(each.question, each.reference, each.after, each.notes[1]) for each in report.questions]
    publish_evaluation(trained.run_dir, trained.config.wandb, _figures(scores), shown, path, part=label)
    return path


def _texts_of(part: ConversationPart) -> Iterator[str]:
    """What a model reads and learns in training."""
    with Progress("training data", len(part), "records") as progress:
        for messages in part.messages:
            yield from (turn["content"] for turn in json.loads(messages))
            progress.advance()


def _check_writable(run_dir: Path) -> None:
    folder = run_dir / "evaluation"
    with writing_to(run_dir, option="RUN"):
        folder.mkdir(exist_ok=True)
        write_atomically(folder / ".writable", "")
        (folder / ".writable").unlink()


def questions_of(tasks: Sequence[str], per_task: int | None) -> list[int]:
    """Which rows are asked: of each task `per_task`, drawn by a fixed seed; more of them hold the fewer ones, too."""
    chosen = []
    for task in dict.fromkeys(tasks):
        own = [row for row, name in enumerate(tasks) if name == task]
        random.Random(QUESTIONS_SEED).shuffle(own)
        chosen += own[:per_task]
    return sorted(chosen)


@torch.no_grad()
def losses_by_row(trained: TrainedAdapters, answers: Answers, cluster: Cluster, label: str) -> np.ndarray:
    """Nats of each row's answer, [rows]; every rank computes its share."""
    batches = batches_by_length(answers.lengths, LOSS_TOKENS)
    with Progress(label, len(cluster.own_part(batches)), "batches") as progress:

        def work(own: Sequence[np.ndarray]) -> list[list[float]]:
            found = []
            for samples in own:
                with trained.precision.autocast():
                    losses, _ = losses_of(trained.model, answers, samples, cluster.device)
                ends = np.cumsum(answers.answer_tokens[samples])
                found.append([each.sum(dtype=torch.float64).item() for each in losses.tensor_split(ends[:-1].tolist())])
                progress.advance()
            return found

        sums = cluster.shared_out(batches, work, per_rank=BATCHES_BETWEEN_MEETINGS)
    nats = np.full(len(answers.lengths), np.nan)
    for samples, own in zip(batches, sums, strict=True):
        nats[samples] = own
    return nats


def _in_order(tasks: Sequence[str], scored: dict[str, TaskScore]) -> list[float]:
    """The score of every item, in the order of `tasks`."""
    left = {task: iter(score.of_items()) for task, score in scored.items()}
    return [next(left[task]) for task in tasks]


def _note(given: Generated) -> str:
    return "" if given.ended else "cut off at the length limit"


def _line(uid: str, each: AnsweredQuestion) -> str:
    content = {
        "uid": uid,
        "task": each.task,
        "question": each.question,
        "reference": each.reference,
        "before": each.before,
        "after": each.after,
        "scores": [round(score, 2) for score in each.scores],
        "notes": list(each.notes),
    }
    return json.dumps(content, ensure_ascii=False) + "\n"


def _versions(trained: TrainedAdapters) -> dict[str, str]:
    own = {name: version(name) for name in ("torch", *LIBRARIES)}
    return {
        **{f"{name}, training": found for name, found in trained.checkpoint.manifest["versions"].items()},
        **{f"{name}, evaluation": found for name, found in own.items()},
        "python, evaluation": platform.python_version(),
    }


def _figures(scores: dict[str, Any]) -> dict[str, Any]:
    """The numbers that can be compared between runs."""
    found = {key: value for key, value in scores.items() if not isinstance(value, dict | list)}
    for side in ("before", "after"):
        found[f"{side}/mean_score"] = scores["macro_average"][side]["score"]
        found[f"{side}/loss"] = scores["losses"][-1][side]["loss"]
    return found


def _print(scores: dict[str, Any], questions: Sequence[AnsweredQuestion]) -> None:
    for each in questions:
        say(f"\n  {each.task}: {_short(each.question)}\n  = {_short(each.reference)}")
        say(f"  before > {_short(each.before)}\n  after  > {_short(each.after)}")
    say(
        f"\n{scores['part']} part, {scores['items']:,} questions, step {scores['step']:,} ({scores['weights']}), "
        f"{scores['decoding']}"
    )
    say(f"\n  {'':<36} {'items':>6} {'before':>8} {'after':>8} {'difference (95 %)':>24} {'p':>6}")
    for task in scores["tasks"]:
        _row(f"{task['task']} ({task['metric']})", task["items"], task, "score", 2)
    _row("mean of tasks", scores["items"], scores["macro_average"], "score", 2)
    say("\n  loss, nats per token of the reference")
    for task in scores["losses"]:
        _row(task["task"], task["items"], task, "loss", 4)
    law = scores.get("disc_law_eval")
    if law:
        say("\n  DISC-Law-Eval, per cent of questions right")
        _row("all", law["before"]["items"], {**law["compared"], **law}, "accuracy", 2)
        say(f"  {about_overlap(law)}")


def _row(name: str, items: int, values: dict[str, Any], key: str, digits: int) -> None:
    low, high = values["difference_interval"]
    difference = f"{values['difference']:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"
    before, after = (f"{values[side][key]:.{digits}f}" for side in ("before", "after"))
    say(f"  {name:<36} {items:>6,} {before:>8} {after:>8} {difference:>24} {values['p']:>6.3f}")


def _short(text: str) -> str:
    words = " ".join(text.split())
    return words if len(words) <= 70 else words[:70] + "…"


if __name__ == "__main__":
    run_main(main)
