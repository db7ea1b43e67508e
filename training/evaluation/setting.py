"""How a run's translations are made, and what the results are called: a label that says all that was not usual.

`test` is the test part, translated greedily by the best checkpoint; `test-last-beam5-penalty0.6-on-grouped` is the same
part of the data set in the folder `grouped`, translated by the last checkpoint with a beam of 5 and another length
penalty than the usual one.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from training.base.console import UserError
from training.data.prepared import PARTS
from training.evaluation.translations.decoding import check_search

LENGTH_PENALTY = 1.0

_LABEL = re.compile(
    rf"({'|'.join(PARTS)})(?:-(ema|last\d*|best\d+))?(?:-beam(\d+))?(?:-penalty([\d.e+-]+?))?(?:-on-(.+))?"
)


@dataclass(frozen=True)
class Search:
    """How sentences are decoded; raises UserError for what no search can be made with."""

    beam_size: int = 1
    length_penalty: float = LENGTH_PENALTY

    def __post_init__(self) -> None:
        check_search(self.beam_size, self.length_penalty)

    def __str__(self) -> str:
        return f"beam {self.beam_size}, length penalty {self.length_penalty:g}" if self.beam_size > 1 else "greedy"


@dataclass(frozen=True)
class Setting:
    """What is evaluated and how. weights: as --checkpoint takes them; data: the folder name of another data set."""

    part: str = "test"
    weights: str = "best"
    search: Search = Search()
    data: str | None = None

    def _unusual(self) -> Iterator[tuple[str, str]]:
        """Of whatever is not the usual, but the part: its word in the label, and the option that asks for it."""
        if self.weights != "best":
            yield self.weights.replace(":", ""), f"--checkpoint {self.weights}"
        if self.search.beam_size > 1:
            yield f"beam{self.search.beam_size}", f"--beam_size {self.search.beam_size}"
            if self.search.length_penalty != LENGTH_PENALTY:
                penalty = f"{self.search.length_penalty:g}"
                yield f"penalty{penalty}", f"--length_penalty {penalty}"
        if self.data is not None:
            yield f"on-{self.data}", f"--data prepared/{self.data}"

    @property
    def label(self) -> str:
        """The part, and behind it whatever is not the usual."""
        return "-".join([self.part, *(word for word, _ in self._unusual())])

    @classmethod
    def of_label(cls, label: str) -> Setting | None:
        """The setting with this label; None if none has it."""
        found = _LABEL.fullmatch(label)
        if found is None:
            return None
        part, weights, beam_size, length_penalty, data = found.groups()
        weights = re.sub(r"(?=\d)(?<!\d)", ":", weights or "best")
        try:
            setting = cls(part, weights, Search(int(beam_size or 1), float(length_penalty or LENGTH_PENALTY)), data)
        except (UserError, ValueError):
            return None
        return setting if setting.label == label else None

    def command(self, run_dir: Path) -> str:
        """What to type to evaluate `run_dir` so."""
        part = [] if self.part == "test" else [f"--part {self.part}"]
        options = [option for _, option in self._unusual()]
        return " ".join([f"python -m training.evaluation.evaluate {run_dir}", *part, *options])


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """The options that say which model is used: those of every command on a run."""
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="run folder, for example runs/gpt-sample")
    parser.add_argument(
        "--checkpoint",
        default="best",
        metavar="WHICH",
        help="best (on validation, the default), last, best:N or last:N (the mean of N), ema (the moving average)",
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that say which model translates and how: those of every command that translates."""
    add_model_options(parser)
    parser.add_argument("--beam_size", type=int, default=1, metavar="N", help="default 1: greedy")
    parser.add_argument(
        "--length_penalty",
        type=float,
        metavar="A",
        help=f"of a beam search: 0 is none, more favours longer translations (default {LENGTH_PENALTY:g})",
    )


def search_of(arguments: argparse.Namespace) -> Search:
    """The search that these options ask for. Raises UserError for values that cannot be, or have no effect."""
    if arguments.length_penalty is None:
        return Search(arguments.beam_size)
    search = Search(arguments.beam_size, arguments.length_penalty)
    if search.beam_size == 1:
        raise UserError("--length_penalty has no effect on greedy decoding: add --beam_size 5, or leave it out")
    return search
