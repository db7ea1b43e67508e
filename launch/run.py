"""Starts a training on this machine, and starts it again from its last checkpoint when it crashes.

    python -m launch.run configs/gpt/base.yaml [--key value ...]
    python -m launch.run -m training.evaluation.evaluate runs/gpt-base

It finds the training that the config is for, and how many processes and threads suit this machine: one process for
each GPU, or fewer where these cannot share the micro-batches of a step equally; on a CPU as many as divide both its
cores and these. When one of them is killed, crashes or hangs, the session is over, and after a pause the next one
begins; --failure-limit sessions in a row without a checkpoint of a later step end the run. Ctrl-C, SIGTERM and SIGUSR1
stop it after a save. The exit status is 0 when the run is finished, 75 when it was stopped and the same command goes on
with it, 1 after an error. Options that it does not know go to the training (`python -m training.gpt --help` lists
them).

With -m it runs another command once, whose processes share the work; all that follows are the command's own words.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.scripts import last_step, micro_batches_of, note_killed, read_options, script_of
from launch.supervisor import Ending, Supervisor, layout
from training.base.console import TryLaterError, UserError, run_main, say
from training.base.environment import job_nodes, read_ranks
from training.base.options import CommandLine, raw_values


def main(argv: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if argv is None else argv)
    at = given.index("-m") if "-m" in given else len(given)
    usage = "%(prog)s [options] CONFIG.yaml [--key value ...] | %(prog)s [options] -m MODULE [words ...]"
    parser = CommandLine("python -m launch.run", __doc__, usage=usage)
    add = parser.add_argument
    add("--processes", type=int, metavar="N", help="processes on this machine (default: what suits it, see above)")
    add("--failure-limit", type=int, default=3, metavar="N", help="crashes in a row without progress (default 3)")
    add("--script", help="module that trains (default: what the config says)")
    arguments, words = parser.parse_known_args(given[:at])
    for option, value in (("--processes", arguments.processes), ("--failure-limit", arguments.failure_limit)):
        if value is not None and value < 1:
            raise UserError(f"{option} must be at least 1, got {value}")
    _check_place(words if at == len(given) else ())
    supervisor, command = Supervisor(), given[at + 1 :]
    if at < len(given):
        if words:
            wrong = f"there is no option {words[0]}" if words[0].startswith("-") else f"{words[0]} stands before -m"
            raise UserError(f"{wrong}: a command's own words follow its name")
        if not command:
            raise UserError("name a module behind -m, as in: launch.run -m training.evaluation.evaluate runs/gpt-base")
        ending = _once(supervisor, command, arguments.processes)
    else:
        if words and not words[0].startswith("-"):
            raw_values(words[:1])  # says what is wrong with the file
        elif arguments.script is None:
            stray = f", before {words[0]}" if words else ""
            raise UserError(f"name a config file first{stray}, as in: python -m launch.run configs/gpt/sample.yaml")
        script = arguments.script or script_of(Path(words[0]))
        ending = _train(supervisor, script, words, arguments.processes, arguments.failure_limit)
    if ending.outcome == "crashed":
        # Not one for the user to mend: a batch script may try again. Each node speaks of its own ranks.
        raise TryLaterError(ending.reason, speaks=True)
    if ending.outcome == "stopped" and ending.reason:
        say(f"stopped {ending.reason}; the same command starts it again")
    return ending.exit_status


def _once(supervisor: Supervisor, words: Sequence[str], processes: int | None) -> Ending:
    try:
        found = importlib.util.find_spec(words[0])
    except ModuleNotFoundError:  # nor its package
        found = None
    if found is None:
        raise UserError(f"there is no module {words[0]}")
    return supervisor.run(words, processes or layout().processes)


def _train(
    supervisor: Supervisor, script: str, words: Sequence[str], processes: int | None, failure_limit: int
) -> Ending:
    from training.engine.run_folder import check_free  # imports torch

    options = read_options(script, words)
    chosen = layout(micro_batches_of(options, words), processes)
    say(str(chosen))

    def session() -> Ending:
        check_free(options.run_dir)
        ending = supervisor.run([script, *words], chosen.processes)
        if ending.outcome == "crashed":  # any other end has written its own status, or has nothing to do with the run
            note_killed(options.run_dir, ending.reason)
        return ending

    return supervisor.run_to_the_end(session, lambda: last_step(options.run_dir), failure_limit=failure_limit)


def _check_place(words: Sequence[str]) -> None:
    """Raises UserError where this process is itself one of several ranks. srun may start it once on each node.

    words: of a training, which has one node.
    """
    here, nodes = read_ranks(), job_nodes()
    if here.launched:
        raise UserError(
            "RANK and WORLD_SIZE are set, as by torchrun: start launch.run alone, or the training by torchrun"
        )
    if here.local_world_size > 1:
        raise UserError(f"srun has started this {here.local_world_size} times on a node: take --ntasks-per-node=1")
    if words and (nodes > 1 or any(word.startswith("--nnodes") for word in words)):
        raise UserError(
            f"launch.run trains on one machine{f', and this job has {nodes}' if nodes > 1 else ''}; for several submit "
            "slurm/run.sbatch CONFIG by sbatch, or start torchrun --nnodes=N ... -m training.gpt CONFIG on each"
        )


if __name__ == "__main__":
    run_main(main)
