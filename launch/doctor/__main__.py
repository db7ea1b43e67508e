"""Looks at what could end a run before it starts, and reports all of it at once.

    python -m launch.doctor                                            # this machine
    python -m launch.doctor configs/gpt/base.yaml --optim.lr 5e-4      # and what this run needs
    python -m launch.run -m launch.doctor configs/gpt/base.yaml        # and all ranks together
    srun python -m launch.doctor configs/gpt/base.yaml && srun python -m training.gpt configs/gpt/base.yaml

Each line says `ok`, `warning` or `error`, the subject, what was found and what can be done. The exit status is 1 if
there is an error, else 0. A run that is in the folder already is not touched, nothing is fetched, nothing is left
behind. What a training says in its first lines is left to it: precision, time limit, whether wandb answers.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from launch.doctor import machine, ranks, run
from launch.doctor.findings import Check, DoctorReport, Finding, MustMatch, examine, first_words, merge, print_report
from launch.scripts import peek, script_of
from training.base.console import UserError, counted, run_main, say_as_any_rank, tell_launcher
from training.base.environment import Ranks, read_ranks, without_local_rank
from training.base.options import CommandLine
from training.engine.cluster import Cluster

# torchrun ends all ranks as soon as one has failed. The first one is to speak before that, so the others leave later.
_AFTER_THE_FIRST_S = 30.0


def checks_of(
    script: str | None, words: Sequence[str], said: Mapping[str, str], run_dir: Path, place: Ranks
) -> list[Check]:
    """What a rank can find out without the others. said: what can be read of the options `words`, by key.

    Every rank has the same checks, since the reports are merged by their order; a check that does not apply finds
    nothing.
    """

    def named(key: str, look: Callable[[str], Iterable[Finding | MustMatch]]) -> Callable[[], Iterable[Any]]:
        return lambda: look(said[key]) if key in said else ()

    is_chat, revision = "base_model" in said, said.get("base_revision")
    return [
        Check("versions", "node", machine.versions),
        Check("GPUs", "node", lambda: machine.gpus(place)),
        Check("GPU", "rank", lambda: machine.gpu(place.local_rank)),
        Check("config", "node", lambda: run.config(script, words)),
        Check("disk", "node", lambda: run.disk(run_dir)),
        Check("data", "node", named("data", lambda name: run.data(Path(name), chat=is_chat))),
        Check("base model", "node", named("base_model", lambda name: run.base_model(name, revision))),
        Check("address", "first", named("run_at", run.address)),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    usage = "%(prog)s [CONFIG.yaml] [--script MODULE] [--key value ...]"
    parser = CommandLine("python -m launch.doctor", __doc__, usage=usage)
    parser.add_argument("--script", help="the training (default: what the config says)")
    arguments, words = parser.parse_known_args(without_local_rank(sys.argv[1:] if argv is None else argv))
    script = arguments.script
    if script is None and words and not words[0].startswith("--"):
        script = script_of(Path(words[0]))
    said: dict[str, str] = {}
    with suppress(UserError):  # the check of the config says what is wrong with it
        said = peek(words)
    place, host = read_ranks(), socket.gethostname()
    # NCCL's own watchdog would end the process; a thread of ours watches over it and can tell more.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    run_dir = Path(said.get("run_dir", "runs"))
    checks = checks_of(script, words, said, run_dir, place)
    report = examine(checks, place, host)
    findings: list[Finding] = []
    try:
        with Cluster(ranks.PATIENCE_S) as cluster:
            reports = cluster.gather(report, DoctorReport)
            findings += merge(checks, reports)
            names = [each.name for each in reports]
            findings += ranks.shared_folder(cluster, names, run_dir)
            found, failed = ranks.collectives(cluster, names)  # last, because they may hang
            nodes = counted(len({each.host for each in reports}), "node")
            status = print_report([*findings, found], f"{nodes}, {counted(len(reports), 'rank')}")
            if status:
                tell_launcher("launch.doctor found errors, see its report", to_mend=True)
            if failed:
                # Taking down a group in which a thread still waits could take for ever.
                with suppress(RuntimeError):
                    cluster.maximum([0.0])  # the first rank has spoken
                sys.stdout.flush()
                os._exit(status)
        return status
    except Exception as error:  # this rank cannot talk to the others
        reason = first_words(error)
        if place.rank:
            say_as_any_rank(f"rank {place.rank} on {host}: {reason}")
            time.sleep(_AFTER_THE_FIRST_S)
            return 1
        advice = f". {ranks.WHAT_TO_TRY}" if not isinstance(error, UserError) else ""
        alone = Finding("error", "ranks", f"they do not come together: {reason}{advice}")
        return print_report([*(findings or merge(checks, [report])), alone], host)


if __name__ == "__main__":
    run_main(main)
