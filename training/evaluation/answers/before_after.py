"""Scores a chat model with its trained adapters against the same model without them, and writes the run's report.

Both are given the same rows: every answer of the part, for its loss, and some questions of every task, to answer them.
Under runs/NAME/evaluation/ it leaves LABEL-answers.jsonl (question, reference, both answers), LABEL.json (scores) and,
if asked for, LABEL-disc-law-eval/ (answers in the released form) and LABEL-disc-law-eval-open.html.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from training.base.console import UserError, say
from training.base.files import write_atomically
from training.base.progress import Progress
from training.data.conversations import ConversationPart, Conversations, asked_of
from training.engine.batch_plan import batches_by_length
from training.engine.cluster import Cluster
from training.engine.wandb.tracker import publish_evaluation
from training.evaluation.answers.comparison import ENDING, say_head, say_row
from training.evaluation.answers.losses import LossComparison, compare_losses, loss_by_task
from training.evaluation.answers.report import AnsweredQuestion, content_of
from training.evaluation.answers.scores import AnswerComparison, TaskScore, compare_tasks, score_answers
from training.evaluation.chat_model.adapters import TrainedAdapters
from training.evaluation.chat_model.answering import answers_to
from training.evaluation.disc_law_eval.asking import LawAnswers, ask_law_eval, load_law_questions
from training.evaluation.disc_law_eval.overlap import about_overlap, overlapping
from training.evaluation.setting import Asking, Setting
from training.models.generation import Generated
from training.qlora import LIBRARIES, Answers, losses_of
from training.report.examples import example_rows
from training.report.page import REPORT, evaluation_folder, write_evaluated, write_page

# Positions of a batch of losses; a single conversation may be longer.
LOSS_TOKENS = 4096

# How far a rank may be ahead of another, see `Cluster.shared_out`: minutes at most.
BATCHES_BETWEEN_MEETINGS = 64

QUESTIONS_SEED = 1234


@dataclass(frozen=True)
class Side:
    """What was found out before the training, or after it."""

    nats: np.ndarray  # of each row's answer, [rows]
    said: list[Generated]  # to each question
    law: LawAnswers | None


def evaluate(trained: TrainedAdapters, data: Conversations, part_name: str, asking: Asking, cluster: Cluster) -> Path:
    """Scores one part of `data` before and after, writes everything the module names, and returns the report's path.

    Raises UserError when the part is empty.
    """
    part = data.part(part_name)
    if len(part) == 0:
        raise UserError(f"the {part_name} part of {data.folder} is empty: choose another --part, or other --data")
    label = Setting.of(trained, data, part_name).label + asking.label
    # The questions of the table are asked in any case.
    table = [row for row, uid in enumerate(part.uids) if uid in set(data.meta["questions"])]
    rows = sorted({*questions_of(list(part.tasks), asking.answers_per_task or None), *table})
    answers = Answers(part, data.meta["tokenizer"]["pad_id"])
    before, after = _both_sides(trained, answers, rows, asking, cluster)
    path = trained.run_dir / REPORT
    if not cluster.is_first:
        return path

    tasks, counts = list(part.tasks), answers.answer_tokens.tolist()
    losses = compare_losses(*(loss_by_task(tasks, side.nats.tolist(), counts) for side in (before, after)))
    compared, answered = _scored(trained, part, rows, before, after)
    scores = scores_of(_about(trained, data, part_name, label, asking), compared, losses)
    law_eval, page_name = None, f"{label}-disc-law-eval-open.html"
    if before.law and after.law:
        own = trained.is_trained_on(data)
        overlap = overlapping(after.law.questions, _texts_of(data.part("train"))) if own else None
        scores["disc_law_eval"], law_page = before.law.compared(after.law, overlap)
        law_eval = {**scores["disc_law_eval"], "open_questions": len(after.law.open_questions), "page": page_name}
    held_out = [answered[rows.index(row)] for row in table]
    evaluation = {
        "checkpoint": trained.checkpoint.manifest,
        "versions": trained.versions("torch", *LIBRARIES),
        "scores": scores,
        "data": data.meta,
        "parameters": trained.parameters,
        "trained_parameters": sum(each.numel() for each in trained.model.parameters() if each.requires_grad),
        "questions": held_out,
        "examples": [answered[place] for place in example_rows(len(rows))],
        "law_eval": law_eval,
    }
    with evaluation_folder(trained.run_dir) as folder:
        lines = (_line(part.uids[row], each) for row, each in zip(rows, answered, strict=True))
        write_atomically(folder / f"{label}{ENDING}", "".join(lines))
        if before.law and after.law:
            before.law.write(folder / f"{label}-disc-law-eval/before")
            after.law.write(folder / f"{label}-disc-law-eval/after")
            write_atomically(folder / page_name, law_page)
        # The scores last: where they stand, the answers do too.
        write_atomically(folder / f"{label}.json", json.dumps(scores, indent=2, ensure_ascii=False) + "\n")
        write_evaluated(folder, label, content_of(evaluation))
        write_page(trained.run_dir, within=folder)
    _print(scores, held_out)
    say(f"\nscores: {folder / label}.json\nreport: {path}")
    shown = [(each.question, each.reference, each.after, each.notes[1]) for each in held_out]
    publish_evaluation(trained.run_dir, trained.config.wandb, _figures(scores), shown, path, part=label)
    return path


def _about(trained: TrainedAdapters, data: Conversations, part_name: str, label: str, asking: Asking) -> dict[str, Any]:
    """What was evaluated, and how."""
    return {
        **trained.about(data, part_name, label),
        "base_model": trained.config.base_model,
        "base_model_fingerprint": trained.checkpoint.manifest["built_on"]["base_model"],
        "decoding": f"greedy, at most {asking.max_new_tokens} tokens, computed in {trained.precision.name}",
    }


def scores_of(about: Mapping[str, Any], answers: AnswerComparison, losses: Sequence[LossComparison]) -> dict[str, Any]:
    """What runs/NAME/evaluation/LABEL.json holds: everything in `about`, and

    items: of all tasks. tasks: a list, in the order of TASKS, of {task, metric, how (in words), items,
    odd_references, references_sha256, before, after, difference, difference_interval, p}; before and after are each
    {score (0 to 100), interval, exact, format_errors, empty}. macro_average: {before, after: {score, interval},
    difference, difference_interval, p}. losses: a list, the last of which is ALL_TASKS, of {task, items, tokens,
    before, after, difference, difference_interval, p}; before and after are each {loss (nats per token), interval,
    perplexity, perplexity_interval}, and the difference is that of the loss. Intervals are those of 95 %, [low,
    high]; differences are after minus before.
    """
    return {
        **about,
        "items": sum(task.after.items for task in answers.tasks),
        **answers.to_json(),
        "losses": [loss.to_json() for loss in losses],
    }


def questions_of(tasks: Sequence[str], per_task: int | None) -> list[int]:
    """Which rows are asked: `per_task` of each task, drawn by a fixed seed; a larger number has those of a smaller."""
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

        sums = cluster.shared_out(batches, work, per_rank=BATCHES_BETWEEN_MEETINGS, kind=list[float])
    nats = np.full(len(answers.lengths), np.nan)
    for samples, own in zip(batches, sums, strict=True):
        nats[samples] = own
    return nats


def _both_sides(
    trained: TrainedAdapters, answers: Answers, rows: Sequence[int], asking: Asking, cluster: Cluster
) -> list[Side]:
    """Before and after: losses of all rows, and answers to the questions of `rows` and to the benchmark's."""
    folder = asking.disc_law_eval
    questions = None if folder is None else load_law_questions(trained.chat, folder, asking.disc_law_eval_limit)
    part, most = answers.part, asking.max_new_tokens
    prompts = [asked_of(part, row, trained.tokenizer).prompt for row in rows]
    sides = []
    for name in ("before", "after"):
        with trained.adapters(name == "after"):
            nats = losses_by_row(trained, answers, cluster, f"losses {name}")
            said = answers_to(trained, prompts, most, cluster, f"answers {name}")
            law = ask_law_eval(trained, questions, most, cluster, name) if questions is not None else None
            sides.append(Side(nats, said, law))
    return sides


def _scored(
    trained: TrainedAdapters, part: ConversationPart, rows: Sequence[int], before: Side, after: Side
) -> tuple[AnswerComparison, list[AnsweredQuestion]]:
    """The scores of the answers to the questions of `rows`, and question by question."""
    asked = [asked_of(part, row, trained.tokenizer) for row in rows]
    references = [each.reference for each in asked]
    tasks = [part.tasks[row] for row in rows]
    texts = [[trained.tokenizer.decode(each.ids) for each in side.said] for side in (before, after)]
    scored = [score_answers(tasks, said, references) for said in texts]
    items = [_in_order(tasks, side) for side in scored]
    answered = [
        AnsweredQuestion(
            task=tasks[place],
            question=asked[place].question,
            reference=references[place],
            before=texts[0][place],
            after=texts[1][place],
            scores=(items[0][place], items[1][place]),
            notes=(_note(before.said[place]), _note(after.said[place])),
        )
        for place in range(len(rows))
    ]
    return compare_tasks(*scored), answered


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


def _texts_of(part: ConversationPart) -> Iterator[str]:
    """What a model reads and learns in training."""
    with Progress("training data", len(part), "records") as progress:
        for messages in part.messages:
            yield from (turn["content"] for turn in json.loads(messages))
            progress.advance()


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
        f"{scores['decoding']}\n"
    )

    def row(name: str, items: int, compared: dict[str, Any], key: str, digits: int = 2) -> None:
        say_row(name, items, [compared[side][key] for side in ("before", "after")], compared, digits=digits)

    say_head("before", "after")
    for task in scores["tasks"]:
        row(f"{task['task']} ({task['metric']})", task["items"], task, "score")
    row("mean of tasks", scores["items"], scores["macro_average"], "score")
    say("\n  loss, nats per token of the reference")
    for task in scores["losses"]:
        row(task["task"], task["items"], task, "loss", 4)
    law = scores.get("disc_law_eval")
    if law:
        say("\n  DISC-Law-Eval, per cent of questions right")
        row("all", law["before"]["items"], {**law["compared"], **law}, "accuracy")
        say(f"  {about_overlap(law)}")


def _short(text: str) -> str:
    words = " ".join(text.split())
    return words if len(words) <= 70 else words[:70] + "…"
