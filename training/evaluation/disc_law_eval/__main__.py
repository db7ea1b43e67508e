"""Scores answers to the multiple-choice questions of DISC-Law-Eval as the published ones were scored.

    python -m training.evaluation.disc_law_eval score published_outputs/*/*/*_results.csv
    python -m training.evaluation.disc_law_eval score answers.csv

An answer is right when its letters (see `letters`) are exactly the right ones; what the file itself says in the
columns extract_ans and correctness is not looked at. For each file one line of JSON is printed: file, items, correct;
or, if one of them cannot be scored, nothing but what to do about it.

The right letters are those of the column output, if the file has it. The released files of answers have not: theirs
stand in objective/mcq_sing_NAME.csv for single/NAME_results.csv and in mcq_mult_NAME.csv for multi/NAME_results.csv.
The folder objective is found in the folders above the file, or named by --objective.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from training.base.console import run_main, say
from training.base.options import CommandLine
from training.evaluation.disc_law_eval.scoring import score_file


def main(argv: Sequence[str] | None = None) -> int:
    """The command; raises UserError for everything the user can mend."""
    parser = CommandLine("python -m training.evaluation.disc_law_eval", __doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    score = commands.add_parser("score", help="score files of answers")
    score.add_argument("files", nargs="+", type=Path, metavar="FILE", help="as multi/nje_results.csv")
    score.add_argument(
        "--objective",
        type=Path,
        metavar="FOLDER",
        help="folder of mcq_sing_NAME.csv and mcq_mult_NAME.csv (default: a folder `objective` above the file)",
    )
    arguments = parser.parse_args(argv)
    for scored in [score_file(path, arguments.objective) for path in arguments.files]:
        say(json.dumps(scored))
    return 0


if __name__ == "__main__":
    run_main(main, prints_product=True)
