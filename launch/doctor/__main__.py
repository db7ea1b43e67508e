"""Looks at everything that could end a run before it starts, and reports all of it at once.

    python -m launch.doctor                                            # this machine
    python -m launch.doctor configs/gpt/base.yaml --optim.lr 5e-4      # and what this run needs
    python -m launch.run -m launch.doctor configs/gpt/base.yaml        # and all ranks together
    srun python -m launch.doctor configs/gpt/base.yaml && srun python -m training.gpt configs/gpt/base.yaml

Each line says `ok`, `warning` or `error`, the subject, what was found and what can be done. The exit status is 1 if
there is an error, else 0. A run that is in the folder already is not touched, nothing is fetched, nothing is left
behind.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from launch.doctor import machine, ranks, run
from launch.doctor.findings import Check, DoctorReport, Finding, examine, first_words, merge, print_report
from launch.scripts import peek, script_of
from training.base.console import PeerError, UserError, run_main, say_as_any_rank, tell_launcher
from training.base.environment import Launcher, Ranks, read_ranks, without_local_rank
from training.base.options import CommandLine
from training.engine.cluster import Cluster

# torchrun ends all ranks as soon as one has failed. The first one is to speak before that, so the others leave later.
_AFTER_THE_FIRST_S = 30.0


@dataclass(frozen=True)
class Asked:
    """What the command line says."""

    script: str | None
    words: tuple[str, ...]  # the options of the training, its config file in front

    @cached_property
    def known(self) -> dict[str, str]:
        """What can be read of the options; nothing of a file that is no config at all."""
        with suppress(UserError):
            return peek(self.words)
        return {}

    @property
    def run_dir(self) -> Path:
        return Path(self.known.get("run_dir", "runs"))


def read_command_line(argv: Sequence[str]) -> Asked:
    """[CONFIG.yaml] [--script MODULE] [--key value ...]; `--help` prints and exits."""
    parser = CommandLine(
        "python -m launch.doctor", __doc__, usage="%(prog)s [CONFIG.yaml] [--script MODULE] [--key value ...]"
    )
    parser.add_argument("--script", help="the training (default: what the config says)")
    arguments, words = parser.parse_known_args(without_local_rank(argv))
    config = Path(words[0]) if words and not words[0].startswith("--") else None
    return Asked(arguments.script or (script_of(config) if config else None), tuple(words))


def checks_of(asked: Asked, place: Ranks, launcher: Launcher | None, device: torch.device | None) -> list[Check]:
    """What a rank can find out without the others. device: None where the rank could get none.

    Every rank has the same checks, since the reports are merged by their order; a check that does not apply finds
    nothing.
    """
    data, base = asked.known.get("data"), asked.known.get("base_model")
    revision, wandb_mode = asked.known.get("base_revision"), asked.known.get("wandb.mode")
    address = asked.known.get("run_at")

    def precision() -> Iterable[Finding]:
        return machine.precision(run.precision_of(asked.script, asked.words), device) if device is not None else ()

    return [
        Check("launcher", "first", lambda: machine.surroundings(place, launcher)),
        Check("versions", "node", machine.versions),
        Check("GPUs", "node", lambda: machine.gpus(place)),
        Check("GPU", "rank", lambda: machine.gpu(device) if device is not None else ()),
        Check("precision", "rank", precision),
        Check("limits", "node", machine.limits),
        Check("config", "node", lambda: run.config(asked.script, asked.words)),
        Check("disk", "node", lambda: run.disk(asked.run_dir)),
        Check("data", "node", lambda: run.data(Path(data), chat=base is not None) if data is not None else ()),
        Check("base model", "node", lambda: run.base_model(base, revision) if base is not None else ()),
        Check("wandb", "first", lambda: run.wandb(wandb_mode) if asked.script is not None else ()),
        Check("address", "first", lambda: run.address(address) if address is not None else ()),
    ]


def together(cluster: Cluster, reports: Sequence[DoctorReport], asked: Asked, findings: list[Finding]) -> bool:
    """Adds to `findings` what the ranks find out together; returns whether this process can only exit at once."""
    hosts, names = [report.host for report in reports], [report.name for report in reports]
    findings += ranks.threads(cluster, hosts)
    if cluster.world_size > 1:
        findings += ranks.clocks(cluster, hosts)
        try:
            folder = run.existing_folder(asked.run_dir)
        except UserError:
            folder = None
        findings += ranks.shared_folder(cluster, names, folder)
    found, stuck = ranks.collectives(cluster, names)  # last, because they may hang
    findings += found
    return stuck


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    asked = read_command_line(sys.argv[1:] if argv is None else argv)
    host = socket.gethostname()
    # NCCL's own watchdog would end the process; a thread of ours watches over it and can tell more.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    place = read_ranks()
    try:
        cluster = Cluster(ranks.PATIENCE_S)
    except (UserError, PeerError) as error:
        checks = checks_of(asked, place, None, None)
        return _report_alone(error, place, host, lambda: merge(checks, [examine(checks, place, host)]))
    checks = checks_of(asked, place, cluster.launcher, cluster.device)
    report = examine(checks, place, host)
    findings: list[Finding] = []
    try:
        with cluster:
            reports = cluster.gather(report, DoctorReport)
            findings += merge(checks, reports)
            stuck = together(cluster, reports, asked, findings)
            status = _report(findings, reports)
            if stuck:
                # Taking down a group in which a thread still waits could take for ever.
                with suppress(RuntimeError):
                    cluster.maximum([0.0])  # the first rank has spoken
                sys.stdout.flush()
                os._exit(status)
        return status
    except Exception as error:
        return _report_alone(error, place, host, lambda: findings or merge(checks, [report]))


def _report(findings: Sequence[Finding], reports: Sequence[DoctorReport]) -> int:
    nodes = len({report.host for report in reports})
    status = print_report(findings, f"{nodes} node(s), {len(reports)} rank(s)")
    if status:
        tell_launcher("launch.doctor found errors, see its report", to_mend=True)
    return status


def _report_alone(error: Exception, place: Ranks, host: str, known: Callable[[], list[Finding]]) -> int:
    """What a rank says that cannot talk to the others; the first one says all that it knows so far."""
    said = first_words(error)
    if place.rank:
        say_as_any_rank(f"rank {place.rank} on {host}: {said}")
        time.sleep(_AFTER_THE_FIRST_S)
        return 1
    advice = f". {ranks.WHAT_TO_TRY}" if not isinstance(error, UserError) else ""
    return print_report([*known(), Finding("error", "ranks", f"they do not come together: {said}{advice}")], host)


if __name__ == "__main__":
    run_main(main)
