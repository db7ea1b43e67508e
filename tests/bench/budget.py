"""How much of its budget a training takes: `--budget` by a config on given pairs, started as users start it.

`used_ratio` is the time from the start of `launch.run` to its end, as a share of the budget. --data names raw pairs,
--pairs how many of them to train with; --minutes the budget; --config the recipe. The score is that of the test part,
greedy. With --recipes five others are trained for as long, named here before any was tried: `bleu_difference` is what
the budget's choice has more than the best of them. --smoke is the same as --quick here.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tests.bench.common import SEQ2SEQ, Arguments, Figure, prepare, read_arguments, report, run_module
from tests.bench.preparing import write_pairs
from training.base.console import counted, run_main, say
from training.base.options import FLAG
from training.engine.metrics import read_metrics
from training.engine.status import read_sessions
from training.evaluation.translations.comparison import Evaluation, compare, open_evaluation

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

# With --pairs, how many others are held out to be scored: of fewer, recipes differ by chance.
_TESTED = 1280


def add_more(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", default=str(SEQ2SEQ), help="default: %(default)s")
    parser.add_argument("--recipes", **FLAG, help="five others for as long, too")
    parser.add_argument("--minutes", type=float, default=10, metavar="N", help="the budget (default: %(default)s)")
    parser.add_argument("--pairs", type=int, metavar="N", help="so many, drawn at random, or made up")


def main(words: Sequence[str] | None = None) -> int:
    arguments = read_arguments("budget", __doc__, words, add_more)
    with tempfile.TemporaryDirectory(prefix="relay-bench-") as temporary:
        measure(arguments, Path(temporary))
    return 0


def measure(arguments: Arguments, folder: Path) -> None:
    config, budget_s = arguments.more.config, arguments.sized(whole=60 * arguments.more.minutes, quick=120.0)
    test_share = 0.1
    if (count := arguments.more.pairs) is not None:
        path, test_share = folder / f"{count}-pairs.txt", _TESTED / (count + _TESTED)
        write_some(path, arguments.data, count + _TESTED)
        arguments = replace(arguments, data=str(path))
    say(f"preparing {arguments.about_data}")
    options = ("--split", "grouped", "--test_share", f"{test_share}")
    data = prepare(arguments, folder / "data", *options, validation_share=0.05)  # as users have it
    pairs = len(data.part("train"))

    def train(name: str, budget_s: float, *words: str) -> tuple[float, Evaluation]:
        """How long it took, in seconds, and its translations of the test part."""
        began = time.monotonic()
        budget = ("--budget", f"{budget_s:g}s")
        run_module("launch.run", config, "--data", data.folder, "--run_dir", folder / name, *budget, *words)
        took_s = time.monotonic() - began
        run_module("training.evaluation.evaluate", folder / name, ranks=2)
        return took_s, open_evaluation(name, folder / name, "test")

    used_s, chosen = train("run", budget_s)
    last = next(line for line in reversed(read_metrics(folder / "run")) if line["kind"] == "train")
    about = f"{config}, {pairs:,} pairs, {counted(len(read_sessions(folder / 'run')), 'session')}"
    figures = [
        Figure("used_ratio", used_s / budget_s, f"of the budget; {about}", "0.85 to 1.15"),
        Figure("minutes", used_s / 60, "from the start of launch.run to its end"),
        Figure("steps", last["step"], f"in {last['epoch']:.2f} epochs"),
        Figure("bleu", chosen.scores["bleu"], f"of {len(data.part('test')):,} held-out sentences"),
    ]
    if arguments.more.recipes:
        others = []
        for number, (words, share) in enumerate(_FEW if pairs < _FEW_PAIRS else _MANY, 1):
            say(f"recipe {number}: {words}, for {share:g} of the budget")
            took_s, other = train(f"recipe-{number}", share * budget_s, *words.split())
            others.append(other)
            figures.append(Figure(f"bleu_{number}", other.scores["bleu"], f"{words}, {took_s / 60:.1f} minutes"))
        bleu, _ = compare(max(others, key=lambda each: each.scores["bleu"]), chosen)
        about = "to the best of those; 95 %: {:.1f} to {:.1f}".format(*bleu.difference_interval)
        figures.append(Figure("bleu_difference", bleu.difference, about, "at least -1"))
    report("budget", arguments, figures, config=config, budget_s=budget_s)


def write_some(path: Path, data: str, count: int) -> None:
    """So many pairs of `data`, the same every time, into `path`; made-up ones if it has fewer, or is the sample."""
    lines: list[str] = []
    if data != "sample":
        with Path(data).open(encoding="utf-8") as file:
            lines = list(file)
    if count > len(lines):
        write_pairs(path, count)
    else:
        path.write_text("".join(random.Random(1).sample(lines, count)), encoding="utf-8")


if __name__ == "__main__":
    run_main(main)
