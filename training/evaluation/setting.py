"""How a run is evaluated, and what the results are called: a label that says whatever is not the usual.

`test` is the test part, translated greedily by the best checkpoint; `test-last-beam5-penalty0.6-on-grouped` is the same
part of the data set in the folder `grouped`, translated by the last checkpoint with a beam of 5 and another length
penalty than the usual one. `test-20answers` is the test part of a QLoRA run, with answers to 20 questions of each task.
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from training.base.console import UserError
from training.data.prepared import PARTS, PreparedFolder
from training.engine.precision import PrecisionName
from training.evaluation.runs import TrainedRun
from training.models.decoding import check_search

LENGTH_PENALTY = 1.0
ANSWERS_PER_TASK, NEW_TOKENS = 100, 512

_LABEL = re.compile(
    rf"({'|'.join(PARTS)})(?:-(ema|last\d*|best\d+|step-\d+))?(?:-beam(\d+))?(?:-penalty([\d.e+-]+?))?"
    r"(?:-with-(.+?))?(?:-on-(.+))?"
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
class Asking:
    """What a chat model is asked; raises UserError for what cannot be, or has no effect."""

    answers_per_task: int = ANSWERS_PER_TASK  # 0: all
    max_new_tokens: int = NEW_TOKENS  # of an answer
    disc_law_eval: Path | None = None  # the benchmark's folder; None: it is not asked
    disc_law_eval_limit: int | None = None  # questions of each of its exams; None: all

    def __post_init__(self) -> None:
        for name, least in (("answers_per_task", 0), ("max_new_tokens", 1), ("disc_law_eval_limit", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"--{name} must be at least {least}, got {value}")
        if self.disc_law_eval_limit is not None and self.disc_law_eval is None:
            raise UserError(
                "--disc_law_eval_limit has no effect without --disc_law_eval FOLDER: add it, or leave it out"
            )

    @property
    def label(self) -> str:
        """Whatever is not the usual, for the end of a label."""
        found = ""
        if self.answers_per_task != ANSWERS_PER_TASK:
            found += f"-{self.answers_per_task or 'all'}answers"
        if self.max_new_tokens != NEW_TOKENS:
            found += f"-{self.max_new_tokens}tokens"
        if self.disc_law_eval is not None:
            found += f"-{self.disc_law_eval_limit or 'all'}ofexam"
        return found


@dataclass(frozen=True)
class Setting:
    """What is evaluated and how."""

    part: str = "test"
    weights: str = "best"  # as --checkpoint takes them
    search: Search = Search()
    data: str | None = None  # the folder name of another data set than the run's
    others: tuple[str, ...] = ()  # the folder names of the runs that translate together with this one

    def _unusual(self) -> Iterator[tuple[str, str]]:
        """For whatever is not the usual, except the part: its word in the label, and the option that asks for it."""
        if self.weights != "best":
            yield self.weights.replace(":", ""), f"--checkpoint {self.weights}"
        if self.search.beam_size > 1:
            yield f"beam{self.search.beam_size}", f"--beam_size {self.search.beam_size}"
            if self.search.length_penalty != LENGTH_PENALTY:
                penalty = f"{self.search.length_penalty:g}"
                yield f"penalty{penalty}", f"--length_penalty {penalty}"
        if self.others:
            yield f"with-{','.join(self.others)}", ""
        if self.data is not None:
            yield f"on-{self.data}", f"--data {shlex.quote(f'prepared/{self.data}')}"

    @property
    def label(self) -> str:
        """The part, and behind it whatever is not the usual."""
        return "-".join([self.part, *(word for word, _ in self._unusual())])

    @classmethod
    def of(
        cls, run: TrainedRun, data: PreparedFolder, part: str, search: Search = Search(), others: tuple[str, ...] = ()
    ) -> Setting:
        """The setting in which these weights of a run meet one part of `data`."""
        other = None if run.is_trained_on(data) else data.folder.resolve().name
        return cls(part, str(run.weights), search, other, others)

    @classmethod
    def of_label(cls, label: str) -> Setting | None:
        """The setting with this label; None if none has it."""
        found = _LABEL.fullmatch(label)
        if found is None:
            return None
        part, weights, beam_size, length_penalty, others, data = found.groups()
        weights = re.sub(r"(?<=t)(?=\d)", ":", weights or "best")
        try:
            search = Search(int(beam_size or 1), float(length_penalty or LENGTH_PENALTY))
            setting = cls(part, weights, search, data, tuple(others.split(",")) if others else ())
        except (UserError, ValueError):
            return None
        return setting if setting.label == label else None

    def command(self, run_dir: Path) -> str:
        """What to type to evaluate `run_dir` so."""
        runs = ",".join(map(str, [run_dir, *(run_dir.parent / other for other in self.others)]))
        part = [] if self.part == "test" else [f"--part {self.part}"]
        options = [option for _, option in self._unusual() if option]
        return " ".join([f"python -m training.evaluation.evaluate {shlex.quote(runs)}", *part, *options])


def add_model_options(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    """The options that say which model is used: those of every command on a run, or on several translators."""
    more = "; of translators also several, between commas: an ensemble" if several else ""
    parser.add_argument("run_dir", type=Path, metavar="RUN", help=f"run folder, for example runs/gpt-sample{more}")
    parser.add_argument(
        "--checkpoint",
        default="best",
        metavar="WHICH",
        help="best (on validation, the default), last, step-N, best:N or last:N (mean of N), ema (moving average)",
    )


class OptionsOf:
    """Those options of a command that runs of one kind have; one that is not given must be None, or false."""

    def __init__(self, kind: str, parser: argparse.ArgumentParser):
        self.kind = kind
        self._group = parser.add_argument_group(f"options for {kind} runs")
        self._actions: list[argparse.Action] = []

    def add_argument(self, name: str, **about: Any) -> None:
        self._actions.append(self._group.add_argument(name, **about))

    def check(self, arguments: argparse.Namespace, kind: str | None) -> None:
        """Raises UserError, naming them, if some were given for a run of another kind. None for one not known."""
        values = {action.option_strings[0]: getattr(arguments, action.dest) for action in self._actions}
        given = [name for name, value in values.items() if value is not None and value is not False]
        if given and kind not in (None, self.kind):
            raise UserError(
                f"{arguments.run_dir} is a {kind} run: leave out {', '.join(given)}, which would have no effect"
            )


def add_search_options(parser: argparse.ArgumentParser | OptionsOf) -> None:
    """The options that say how sentences are decoded."""
    parser.add_argument("--beam_size", type=int, metavar="N", help="default 1: greedy")
    parser.add_argument(
        "--length_penalty",
        type=float,
        metavar="A",
        help=f"of a beam search: 0 is none, more favours longer translations (default {LENGTH_PENALTY:g})",
    )


def search_of(arguments: argparse.Namespace) -> Search:
    """The search that these options ask for. Raises UserError for values that cannot be, or have no effect."""
    beam_size = 1 if arguments.beam_size is None else arguments.beam_size
    if arguments.length_penalty is None:
        return Search(beam_size)
    search = Search(beam_size, arguments.length_penalty)
    if search.beam_size == 1:
        raise UserError("--length_penalty has no effect on greedy decoding: add --beam_size 5, or leave it out")
    return search


def add_base_options(parser: argparse.ArgumentParser | OptionsOf) -> None:
    """The options of adapters: their base model, and the type in which both are computed."""
    parser.add_argument("--base_model", metavar="FOLDER", help="where the base model is (default: where it was)")
    parser.add_argument(
        "--precision", choices=get_args(PrecisionName), help="to compute in (default: as the run was told)"
    )


def add_asking_options(parser: argparse.ArgumentParser | OptionsOf) -> None:
    """The options that say what a chat model is asked."""
    parser.add_argument(
        "--answers_per_task",
        type=int,
        metavar="N",
        help=f"questions of each task to answer, drawn by a fixed seed (default {ANSWERS_PER_TASK}; 0: all)",
    )
    parser.add_argument("--max_new_tokens", type=int, metavar="N", help=f"of an answer (default {NEW_TOKENS})")
    parser.add_argument(
        "--disc_law_eval", type=Path, metavar="FOLDER", help="DISC-Law-Eval's data: ask its questions, four-shot"
    )
    parser.add_argument(
        "--disc_law_eval_limit", type=int, metavar="N", help="the first N questions of each exam only (default all)"
    )


def asking_of(arguments: argparse.Namespace) -> Asking:
    """What these options ask for. Raises UserError for values that cannot be, or have no effect."""
    names = ("answers_per_task", "max_new_tokens", "disc_law_eval", "disc_law_eval_limit")
    return Asking(**{name: value for name in names if (value := getattr(arguments, name)) is not None})
