"""What a second process costs: two ranks of one thread under torchrun against one process of two threads.

Both train configs/gpt/plain.yaml on the same data by the same plan, so every step is the same work: two micro-batches,
one after the other on two threads, or side by side on one each with the gradients added up between the processes. Both
are whole runs of `training.gpt`, started as users start them; their speeds stand in their own metrics.jsonl.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from tests.bench.common import (
    PLAIN_DATA,
    Figure,
    how_to_run,
    plain_of,
    prepare,
    ratio_by_rounds,
    read_arguments,
    report,
    timed_training,
)
from training.base.console import run_main, say


def main(words: Sequence[str] | None = None) -> int:
    arguments = read_arguments("scaling", __doc__, words)
    rounds, steps = arguments.sized(whole=(5, 40), quick=(1, 3), smoke=(1, 2))
    one: list[float] = []
    two: list[float] = []
    with tempfile.TemporaryDirectory(prefix="relay-bench-") as folder:
        say(f"preparing {arguments.about_data}")
        data = prepare(arguments, Path(folder, "data"), *PLAIN_DATA)
        for number in range(rounds):
            for speeds, ranks in ((two, 2), (one, 1)):
                run_dir = Path(folder, f"run-{number}-{ranks}")
                how = {"steps": steps, "ranks": ranks, "threads": 2 // ranks, **how_to_run(arguments)}
                speed = timed_training("gpt", plain_of(arguments), data, run_dir, **how)
                speeds.append(speed.tokens_per_s)
            say(f"round {number + 1} of {rounds}: 2 ranks x 1 thread {two[-1]:,.0f} tokens/s, 1 x 2 {one[-1]:,.0f}")
    report(
        "scaling",
        arguments,
        [
            Figure("ddp_ratio", ratio_by_rounds(two, one), "two ranks over one process, same plan", ">= 0.95"),
            Figure("two_ranks_one_thread_tokens_per_s", median(two), "torchrun, 2 processes x 1 thread"),
            Figure("one_rank_two_threads_tokens_per_s", median(one), "1 process x 2 threads"),
        ],
        ddp_ratios=[round(ours / theirs, 4) for ours, theirs in zip(two, one, strict=True)],
    )
    return 0


if __name__ == "__main__":
    run_main(main)
