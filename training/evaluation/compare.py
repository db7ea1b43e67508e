"""Compares two evaluations of one kind on the same items: which one is better, and whether that can be told at all.

    python -m training.evaluation.compare runs/a runs/b
    python -m training.evaluation.compare runs/a:test runs/a:test-beam5
    python -m training.evaluation.compare 'runs/a-s*' 'runs/b-s*'

A name is a run folder, and behind a colon the label of an evaluation (default test; runs/NAME/evaluation/LABEL.json).
Two translators are compared by BLEU and chrF of the same sentences (see `training.evaluation.translations.comparison`),
two chat models by their answers to the same questions after training, task by task (see
`training.evaluation.answers.comparison`). Both tests are a paired bootstrap. A name with `*` in it, in quotes, is a
group of runs that differ in their seeds; one or two groups are told by means and spread (see
`training.evaluation.seeds`).
"""

from __future__ import annotations

import glob
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from training.base.console import UserError, run_main
from training.base.options import CommandLine
from training.engine.fork import set_aside_from
from training.engine.weights import check_is_there
from training.evaluation.runs import QLORA, TRANSLATION, kind_of
from training.evaluation.seeds import Group, print_groups


def main(argv: Sequence[str] | None = None) -> int:
    """The command; raises UserError for everything the user can mend."""
    parser = CommandLine("python -m training.evaluation.compare", __doc__.split("\n")[0])
    parser.add_argument(
        "names",
        metavar="RUN[:LABEL]",
        nargs="+",
        help="run folder and evaluation, for example runs/a:test-beam5; or a group of them, as in 'runs/a-s*'",
    )
    names = parser.parse_args(argv).names
    if len(names) > 2 or (len(names) == 1 and not is_magic(names[0])):
        raise UserError(
            f"two runs, or one or two groups, are compared, got {len(names)}: a group is named in quotes, as in "
            "'runs/a-s*', so that the shell does not take it apart"
        )
    groups = [_runs_of(name) for name in names]
    parts = [each for group in groups for each in group]
    for run_dir, _ in parts:
        check_is_there(run_dir)
    kinds = [kind_of(run_dir) for run_dir, _ in parts]
    if QLORA in kinds and TRANSLATION in kinds:
        answers, translates = (parts[kinds.index(kind)][0] for kind in (QLORA, TRANSLATION))
        raise UserError(
            f"{answers} answers questions and {translates} translates: only runs of one kind can be compared"
        )
    room = "answers" if QLORA in kinds else "translations"
    comparison = import_module(f"training.evaluation.{room}.comparison")
    if any(map(is_magic, names)):
        opened = [[comparison.open_evaluation(str(each[0]), *each) for each in group] for group in groups]
        for other in [each for group in opened for each in group][1:]:
            comparison.check_comparable(opened[0][0], other)
        print_groups(
            [Group(name, list(map(comparison.scores_of, group))) for name, group in zip(names, opened, strict=True)]
        )
        return 0
    first, second = (comparison.open_evaluation(name, *each) for name, each in zip(names, parts, strict=True))
    comparison.print_comparison(first, second, comparison.compare(first, second))
    return 0


def is_magic(name: str) -> bool:
    """Whether a name is that of a group: it has `*`, `?` or `[` in it and is no run folder."""
    return glob.has_magic(name) and not Path(name).is_dir() and not _parts_of(name)[0].is_dir()


def _runs_of(name: str) -> list[tuple[Path, str]]:
    """Run folder and label of each run that is meant. Raises UserError for a group without any."""
    path, label = _parts_of(name)
    if not is_magic(name):
        return [(path, label)]
    start = Path(path.anchor)
    try:
        named = sorted(each for each in start.glob(str(path.relative_to(start))) if each.is_dir())
    except ValueError as error:
        raise UserError(f"{name} names no group: {error}") from None
    found = [each for each in named if set_aside_from(each) not in named]
    if not found:
        raise UserError(f"there is no run folder {path}")
    return [(each, label) for each in found]


def _parts_of(name: str) -> tuple[Path, str]:
    """Run folder and label of RUN or RUN:LABEL."""
    if not Path(name).is_dir() and ":" in name:
        path, _, label = name.rpartition(":")
        return Path(path), label
    return Path(name), "test"


if __name__ == "__main__":
    run_main(main)
