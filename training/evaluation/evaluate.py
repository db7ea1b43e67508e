"""Scores what a run has trained, and writes its report.

    python -m training.evaluation.evaluate runs/NAME [--checkpoint last] [--data FOLDER] [--part test]
    python -m training.evaluation.evaluate runs/TRANSLATOR --beam_size 5
    python -m training.evaluation.evaluate runs/QLORA --answers_per_task 20 --disc_law_eval DISC-Law-Eval/data
    python -m launch.run -m training.evaluation.evaluate runs/NAME   # the processes share the work

A translator's translations are scored (see `training.evaluation.translations.evaluation`), or the answers of a chat
model with its trained adapters, beside those without them (see `training.evaluation.answers.before_after`). Both write
runs/NAME/report.html and, under runs/NAME/evaluation/, LABEL.json (scores) and what was translated or answered. LABEL
says what was evaluated and how (see `training.evaluation.setting`): `test` is the usual, `test-beam5` the same with
--beam_size 5. `training.evaluation.compare` compares two of them. A run that wandb shows gets the scores there, too.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryFile

from training.base.console import UserError, run_main
from training.base.environment import without_local_rank
from training.base.files import writing_to
from training.base.options import CommandLine
from training.data.prepared import PARTS
from training.engine.cluster import Cluster
from training.evaluation.runs import QLORA, TRANSLATION, TrainedRun, kind_of
from training.evaluation.setting import (
    OptionsOf,
    add_asking_options,
    add_base_options,
    add_model_options,
    add_search_options,
    asking_of,
    search_of,
)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; raises UserError for everything the user can mend."""
    parser = CommandLine("python -m training.evaluation.evaluate", __doc__.split("\n")[0])
    add_model_options(parser, several=True)
    parser.add_argument("--data", type=Path, help="prepared data to score on (default: what the run was trained on)")
    parser.add_argument("--part", choices=PARTS, default="test", help="default test")
    of_translations, of_answers = OptionsOf(TRANSLATION, parser), OptionsOf(QLORA, parser)
    add_search_options(of_translations)
    add_base_options(of_answers)
    add_asking_options(of_answers)
    arguments = parser.parse_args(without_local_rank(sys.argv[1:] if argv is None else argv))
    kind = kind_of(arguments.run_dir)
    for options in (of_translations, of_answers):
        options.check(arguments, kind)
    (_answers if kind == QLORA else _translations)(arguments)
    return 0


# What one kind needs is imported for that kind only: transformers and peft take seconds.


def _translations(arguments: Namespace) -> None:
    from training.data.prepared import open_prepared
    from training.evaluation.translations.evaluation import evaluate
    from training.evaluation.translations.trained import open_translator

    search = search_of(arguments)
    with Cluster() as cluster:
        trained = open_translator(arguments.run_dir, arguments.checkpoint, device=cluster.device)
        data = open_prepared(trained.data_folder(arguments.data))
        trained.check_fits(data)
        check_ready([trained, *trained.others], cluster)
        evaluate(trained, data, arguments.part, search, cluster)


def _answers(arguments: Namespace) -> None:
    from training.data.conversations import open_conversations
    from training.evaluation.answers.before_after import evaluate
    from training.evaluation.chat_model.adapters import open_adapters

    asking = asking_of(arguments)
    with Cluster() as cluster:
        trained = open_adapters(
            arguments.run_dir,
            arguments.checkpoint,
            device=cluster.device,
            base_model=arguments.base_model,
            precision=arguments.precision,
        )
        data = open_conversations(trained.data_folder(arguments.data))
        trained.check_fits(data)
        check_ready([trained], cluster)
        evaluate(trained, data, arguments.part, asking, cluster)


def check_ready(opened: Sequence[TrainedRun], cluster: Cluster) -> None:
    """Raises UserError for what would spoil the work, which takes long, at its end.

    That is a folder that nothing can be written to, and other checkpoints on other ranks, as a run that saves meanwhile
    leaves them.
    """
    cluster.on_first(lambda: _check_writable(opened[0].run_dir))
    steps = [[checkpoint.step for checkpoint in each.checkpoints] for each in opened]
    if any(other != steps for other in cluster.gather(steps, list[list[int]])):
        raise UserError(f"{opened[0].run_dir} has saved while it was opened: start the same command again")


def _check_writable(run_dir: Path) -> None:
    folder = run_dir / "evaluation" if (run_dir / "evaluation").is_dir() else run_dir
    with writing_to(run_dir, option="RUN"), TemporaryFile(dir=folder):
        pass


if __name__ == "__main__":
    run_main(main)
