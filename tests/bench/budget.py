"""How much of its budget a training takes: `--budget` by a config on given pairs, started as users start it.

`used_ratio` is the time from the start of `launch.run` to its end, as a share of the budget. --data names raw pairs;
--minutes the budget; --config the recipe. The score is the best of the run's own validations (greedy, 200 held-out
sentences), beside which recipes that were named beforehand can be put. --smoke is the same as --quick here.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.bench.common import SEQ2SEQ, Arguments, Figure, prepare, read_arguments, report, run_module
from training.base.console import run_main, say
from training.engine.metrics import read_metrics
from training.engine.status import read_sessions


def add_more(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", default=str(SEQ2SEQ), help="default: %(default)s")
    parser.add_argument("--minutes", type=float, default=10, metavar="N", help="the budget (default: %(default)s)")


def main(words: Sequence[str] | None = None) -> int:
    arguments = read_arguments("budget", __doc__, words, add_more)
    with tempfile.TemporaryDirectory(prefix="relay-bench-") as temporary:
        measure(arguments, Path(temporary))
    return 0


def measure(arguments: Arguments, folder: Path) -> None:
    config, budget_s = arguments.more.config, arguments.sized(whole=60 * arguments.more.minutes, quick=120.0)
    say(f"preparing {arguments.about_data}")
    data = prepare(arguments, folder / "data", "--split", "grouped")
    words = (config, "--data", data.folder, "--run_dir", folder / "run", "--budget", f"{budget_s:g}s")
    began = time.monotonic()
    run_module("launch.run", *words)
    used_s = time.monotonic() - began
    lines = read_metrics(folder / "run")
    scores = [line["bleu"] for line in lines if line["kind"] == "validation" and "bleu" in line]
    last = next(line for line in reversed(lines) if line["kind"] == "train")
    about = f"{config}, {len(data.part('train')):,} pairs, {len(read_sessions(folder / 'run'))} session(s)"
    figures = [
        Figure("used_ratio", used_s / budget_s, f"of the budget; {about}", "0.85 to 1.15"),
        Figure("minutes", used_s / 60, "from the start of launch.run to its end"),
        Figure("steps", last["step"], f"in {last['epoch']:.2f} epochs"),
        *([Figure("bleu", max(scores), f"the best of {len(scores)} validations")] if scores else []),
    ]
    report("budget", arguments, figures, config=config, budget_s=budget_s)


if __name__ == "__main__":
    run_main(main)
