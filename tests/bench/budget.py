"""How much of its budget a training takes: `--budget` by a config on given pairs, started as users start it.

`used_ratio` is the time from the start of `launch.run` to its end, as a share of the budget. --data names raw pairs;
--minutes the budget; --config the recipe. The score is that of the whole validation part, greedy. With --recipes five
others are trained for as long, named here before any was tried: `bleu_difference` is what the budget's choice has more
than the best of them. --smoke is the same as --quick here.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.bench.common import SEQ2SEQ, Arguments, Figure, prepare, read_arguments, report, run_module
from training.base.console import counted, run_main, say
from training.base.options import FLAG
from training.engine.metrics import read_metrics
from training.engine.status import read_sessions

# What one would try on so many pairs in ten minutes, and for which share of them.
_FEW_PAIRS = 10_000
_FEW: tuple[tuple[str, float], ...] = (
    ("--model.dropout 0.3 --loss.r_drop 1", 1),
    ("--model.dropout 0.4 --loss.r_drop 1", 1),
    ("--model.dropout 0.4 --loss.r_drop 0", 1),
    ("--model.dropout 0.5 --loss.r_drop 1", 1),
    ("--model.dropout 0.4 --loss.r_drop 1", 0.5),
)
_MANY: tuple[tuple[str, float], ...] = (
    ("--model.dropout 0.3 --loss.r_drop 1", 1),
    ("--model.dropout 0.2 --loss.r_drop 0", 1),
    ("--model.dropout 0.3 --loss.r_drop 0", 1),
    ("--model.dropout 0.2 --loss.r_drop 1", 1),
    ("--model.dropout 0.3 --loss.r_drop 0 --optim.kind muon", 1),
)


def add_more(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", default=str(SEQ2SEQ), help="default: %(default)s")
    parser.add_argument("--recipes", **FLAG, help="five others for as long, too")
    parser.add_argument("--minutes", type=float, default=10, metavar="N", help="the budget (default: %(default)s)")


def main(words: Sequence[str] | None = None) -> int:
    arguments = read_arguments("budget", __doc__, words, add_more)
    with tempfile.TemporaryDirectory(prefix="relay-bench-") as temporary:
        measure(arguments, Path(temporary))
    return 0


def measure(arguments: Arguments, folder: Path) -> None:
    config, budget_s = arguments.more.config, arguments.sized(whole=60 * arguments.more.minutes, quick=120.0)
    say(f"preparing {arguments.about_data}")
    data = prepare(arguments, folder / "data", "--split", "grouped", validation_share=0.05)  # as users have it
    pairs = len(data.part("train"))

    def train(name: str, budget_s: float, *words: str) -> tuple[float, float]:
        """How long it took, in seconds, and the BLEU of its translations."""
        began = time.monotonic()
        budget = ("--budget", f"{budget_s:g}s")
        run_module("launch.run", config, "--data", data.folder, "--run_dir", folder / name, *budget, *words)
        took_s = time.monotonic() - began
        run_module("training.evaluation.evaluate", folder / name, "--part", "validation", ranks=2)
        return took_s, json.loads((folder / name / "evaluation/validation.json").read_text())["bleu"]

    used_s, bleu = train("run", budget_s)
    last = next(line for line in reversed(read_metrics(folder / "run")) if line["kind"] == "train")
    about = f"{config}, {pairs:,} pairs, {counted(len(read_sessions(folder / 'run')), 'session')}"
    figures = [
        Figure("used_ratio", used_s / budget_s, f"of the budget; {about}", "0.85 to 1.15"),
        Figure("minutes", used_s / 60, "from the start of launch.run to its end"),
        Figure("steps", last["step"], f"in {last['epoch']:.2f} epochs"),
        Figure("bleu", bleu, f"of {len(data.part('validation')):,} held-out sentences"),
    ]
    if arguments.more.recipes:
        found = []
        for number, (words, share) in enumerate(_FEW if pairs < _FEW_PAIRS else _MANY, 1):
            say(f"recipe {number}: {words}, for {share:g} of the budget")
            took_s, other = train(f"recipe-{number}", share * budget_s, *words.split())
            found.append(other)
            figures.append(Figure(f"bleu_{number}", other, f"{words}, {took_s / 60:.1f} minutes"))
        figures.append(Figure("bleu_difference", bleu - max(found), "to the best of those", "at least -1"))
    report("budget", arguments, figures, config=config, budget_s=budget_s)


if __name__ == "__main__":
    run_main(main)
