"""Compares two evaluations of one kind on the same items: which one is better, and whether that can be told at all.

    python -m training.evaluation.compare runs/a runs/b
    python -m training.evaluation.compare runs/a:test runs/a:test-beam5

A name is a run folder, and behind a colon the label of an evaluation (default test; runs/NAME/evaluation/LABEL.json).
Two translators are compared by BLEU and chrF of the same sentences (see `training.evaluation.translations.comparison`),
two chat models by their answers to the same questions after training, task by task (see
`training.evaluation.answers.comparison`). Both tests are a paired bootstrap.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from training.base.console import UserError, run_main
from training.base.files import nearest_folder
from training.base.options import CommandLine
from training.evaluation.runs import QLORA, TRANSLATION, kind_of


def main(argv: Sequence[str] | None = None) -> int:
    """The command; raises UserError for everything the user can mend."""
    parser = CommandLine("python -m training.evaluation.compare", __doc__.split("\n")[0])
    for name in ("first", "second"):
        parser.add_argument(
            name, metavar="RUN[:LABEL]", help="run folder and evaluation, for example runs/a:test-beam5"
        )
    arguments = parser.parse_args(argv)
    names = arguments.first, arguments.second
    parts = [_parts_of(name) for name in names]
    for run_dir, _ in parts:
        if not run_dir.is_dir():
            near = nearest_folder(run_dir)
            raise UserError(f"there is no run folder {run_dir}{near}; a run is made by one of the training scripts")
    kinds = [kind_of(run_dir) for run_dir, _ in parts]
    if QLORA in kinds and TRANSLATION in kinds:
        raise UserError(
            f"{names[kinds.index(QLORA)]} answers questions and {names[kinds.index(TRANSLATION)]} translates: only "
            "runs of one kind can be compared"
        )
    room = "answers" if QLORA in kinds else "translations"
    comparison = import_module(f"training.evaluation.{room}.comparison")
    first, second = (comparison.open_evaluation(name, *each) for name, each in zip(names, parts, strict=True))
    comparison.print_comparison(first, second, comparison.compare(first, second))
    return 0


def _parts_of(name: str) -> tuple[Path, str]:
    """Run folder and label of RUN or RUN:LABEL."""
    if not Path(name).is_dir() and ":" in name:
        path, _, label = name.rpartition(":")
        return Path(path), label
    return Path(name), "test"


if __name__ == "__main__":
    run_main(main)
