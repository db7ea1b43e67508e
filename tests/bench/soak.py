"""Random kills, run after run: how many were survived, how many lost something.

Each run is a training of a small GPT under torchrun on two ranks, interrupted by SIGKILL (of one rank, of all, of the
launcher, in the middle of a save), polite stops, hang-ups, pauses that are longer than `session.hang_timeout`, outputs
that nobody reads any more and damaged records, at random moments, until it is finished; one time in eight perhaps
before its first step. Its last checkpoint must then equal that of an uninterrupted run byte for byte, and its
record line by line. A kill counts as lost if a published checkpoint is damaged or missing after it, or if its run ends
with a difference.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from launch.prove import Event, Training, differences, interrupt
from tests.bench.common import WORDS, Figure, prepare, read_arguments, report
from training.base.console import run_main, say
from training.base.durations import format_duration
from training.engine.goodput import KINDS, goodput, in_words
from training.engine.status import read_sessions, where_hours_went

STEPS = 150
KILLS_PER_RUN = 10
TRAINING = (
    *("training.gpt", "--model.width", 64, "--model.layers", 2, "--model.heads", 2, "--model.context", 128),
    *("--optim.steps", STEPS, "--optim.warmup_steps", 10, "--optim.lr", 3e-3, "--batch.tokens_per_micro_batch", 512),
    *("--checkpoint.every_steps", 4, "--log.every_steps", 1, "--log.validate_every_steps", 30),
    *("--session.hang_timeout", "6s"),
)


def add_more(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kills", type=int, help="how many (default 200, with --quick 5)")
    parser.add_argument("--hours", type=float, help="go on for so long, however many kills that makes")
    parser.add_argument("--random-seed", type=int, default=0, help="of the moments (default %(default)s)")


def main(words: Sequence[str] | None = None) -> int:
    arguments = read_arguments("soak", __doc__, words, add_more)
    more = arguments.more
    wanted = more.kills or arguments.sized(whole=200, quick=5)
    end = time.monotonic() + more.hours * 3600 if more.hours else None
    dice = random.Random(more.random_seed)
    events: list[Event] = []
    lost, runs, began = 0, 0, time.monotonic()
    waiting: list[str] = []
    hours = dict.fromkeys(KINDS, 0.0)
    with tempfile.TemporaryDirectory(prefix="relay-bench-") as folder:
        data = prepare(arguments, Path(folder, "data"), *WORDS)
        training = (*map(str, TRAINING), "--data", str(data.folder))
        whole = Training(training, Path(folder, "whole"), STEPS, 2)
        whole.finish()
        undisturbed = in_words(where_hours_went(read_sessions(whole.run_dir)))
        while time.monotonic() < end if end else len(events) < wanted:
            runs += 1
            broken = Training(training, Path(folder, f"run-{runs}"), STEPS, 2)
            new = interrupt(broken, KILLS_PER_RUN if end else min(KILLS_PER_RUN, wanted - len(events)), dice, waiting)
            different = differences(whole, broken)
            for kind, seconds in where_hours_went(read_sessions(broken.run_dir)).items():
                hours[kind] += seconds
            bad = len(new) if different else sum(event.lost is not None for event in new)
            events, lost = events + new, lost + bad
            problems = "; ".join([*different, *(event.lost for event in new if event.lost)])
            since = format_duration(time.monotonic() - began)
            say(f"run {runs}: {len(new)} kills, {problems or 'bit-equal'} ({len(events)} kills, {lost} lost, {since})")
    say(f"undisturbed: {undisturbed}")
    say(f"interrupted: {in_words(hours)}")
    named = sorted({event.accident for event in events})
    report(
        "soak",
        arguments,
        [
            Figure("kills", len(events), "at random moments, any rank, also during saves", "200"),
            Figure("lost", lost, "kills that cost more than steps done again", "0"),
            Figure("runs", runs, "that they were spread over"),
            Figure("goodput", goodput(hours)[1], "share of the sessions' time that went into steps that count"),
            Figure("steps_done_again", mean(event.at - event.saved for event in events), f"per kill, of {STEPS}"),
        ],
        accidents={name: sum(event.accident == name for event in events) for name in named},
    )
    return 1 if lost else 0


if __name__ == "__main__":
    run_main(main)
