"""Conversations of four questions and answers, learned in one pass (`--learn all`), against a record for each answer.

Both have the same answers, each after the same prompt, so that the same tokens are learned. What one pass saves is
reading the earlier turns again: with turns of one length 4 lengths instead of 1 + 2 + 3 + 4, which is 2.5 times, and
less as far as the head counts, which computes the same on both sides; more where the first question is long, as
with a document (`document_ratio`). The model is that of `tests.bench.qlora`, but its head is a ninth of its layers, as
in Qwen2.5-3B; one process of two threads; the sides take turns. The conversations are made up.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from tests.bench.common import Arguments, Figure, ratio_by_rounds, read_arguments, report, run_module, start_worker
from tests.bench.common import workers as started_workers
from tests.bench.qlora import (
    CPU_SHAPE,
    SMALL_SHAPE,
    drawn_text,
    make_base,
    sample_records,
    sentences_of,
)
from training.base.console import UserError, run_main, say
from training.data.conversations import Conversations, open_conversations

TURNS = 4
VOCABULARY = 6_600  # rows of the head
CHARACTERS = {"equal": (50, 50), "document": (400, 50)}  # of the first question, and of everything else


def main(words: Sequence[str] | None = None) -> int:
    arguments = read_arguments("turns", __doc__, words)
    rounds, steps, shape = arguments.sized(whole=(5, 4, CPU_SHAPE), quick=(1, 1, SMALL_SHAPE))
    figures = []
    with tempfile.TemporaryDirectory(prefix="relay-bench-") as temporary:
        for kind in CHARACTERS:
            folder = Path(temporary, kind)
            folder.mkdir()
            data = {learn: prepare(arguments, folder, kind, learn) for learn in ("all", "last")}
            base = make_base(folder / "base", data["all"], shape, VOCABULARY)
            speeds = measure(arguments, data, base, rounds, steps)
            lengths = {learn: float(each.part("train").ids.lengths.mean()) for learn, each in data.items()}
            figures += [
                Figure(f"{kind}_ratio", ratio_by_rounds(*speeds.values()), "conversations a second, over four records"),
                Figure(f"{kind}_tokens_ratio", TURNS * lengths["last"] / lengths["all"], "tokens of four records"),
                Figure(f"{kind}_conversations_per_s", median(speeds["all"]), "in one pass"),
            ]
    report("turns", arguments, figures)
    return 0


def prepare(arguments: Arguments, folder: Path, kind: str, learn: str) -> Conversations:
    """The same made-up conversations, whole or as a record for each answer."""
    sample = folder / "sample"
    if not sample.exists():
        sample_records(sample)
    dice, (first, other) = random.Random(1), CHARACTERS[kind]
    sentences = sentences_of(sample)

    lines = []
    for _ in range(arguments.sized(whole=400, quick=60)):
        turns = [
            {"role": role, "content": drawn_text(dice, sentences, other if place or role == "assistant" else first)}
            for place in range(TURNS)
            for role in ("user", "assistant")
        ]
        ends = [2 * TURNS] if learn == "all" else range(2, 2 * TURNS + 1, 2)
        lines += [json.dumps({"messages": turns[:end]}, ensure_ascii=False) + "\n" for end in ends]
    path = folder / f"{learn}.jsonl"
    path.write_text("".join(lines), encoding="utf-8")
    words = ("--source", path, "--tokenizer", sample / "tokenizer", "--learn", learn, "--max_length", 2048)
    run_module("data_prep.instructions", *words, "--output", folder / learn, "--workers", 1, here=arguments.quick)
    return open_conversations(folder / learn)


def measure(
    arguments: Arguments, data: dict[str, Conversations], base: Path, rounds: int, steps: int
) -> dict[str, list[float]]:
    """Conversations a second of each side, by rounds: as many as there are answers, divided by those of one."""
    answers = {learn: answers_a_sample(each) for learn, each in data.items()}
    if abs(answers["last"] - 1) > 1e-9 or abs(answers["all"] - TURNS) > 1e-9:
        raise UserError(f"samples have {answers} answers: the two sides do not learn the same")
    sides = {
        learn: start_worker(arguments, "tests.bench.qlora", "speed", "relay", each.folder, base, threads=2)
        for learn, each in data.items()
    }
    speeds: dict[str, list[float]] = {learn: [] for learn in data}
    with started_workers(**sides) as started:
        for number in range(rounds + 1):
            for learn, side in started.items():
                side.ask(steps * (TURNS if learn == "last" else 1) if number else 1)
                samples = side.answer()
                if number:  # the first piece of work also sets things up
                    speeds[learn].append(samples * answers[learn] / TURNS)
            if number:
                about = ", ".join(f"{learn} {values[-1]:.4g}" for learn, values in speeds.items())
                say(f"round {number} of {rounds}: {about} conversations a second")
    return speeds


def answers_a_sample(data: Conversations) -> float:
    """How many answers a sample for training has in the mean."""
    part = data.part("train")
    spans = len(part) if part.learned is None else int(part.learned.lengths.sum()) // 2
    return spans / len(part)


if __name__ == "__main__":
    run_main(main)
