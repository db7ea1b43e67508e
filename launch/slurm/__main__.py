"""Submits a run to SLURM once, shows how all runs stand, or stops one after a save.

    python -m launch.slurm configs/gpt/base.yaml --nodes 2 --gpus-per-node 4 --time 4:00:00 --partition gpu
    python -m launch.slurm configs/gpt/base.yaml --nodes 2 --gpus-per-node 4 --time 4:00:00 --print
    python -m launch.slurm status [FOLDER]
    python -m launch.slurm stop runs/gpt-base

The job saves before its time is over and goes back into the queue until the run is finished. Where requeueing is not
allowed, --chain N submits N jobs that follow each other. The batch script is slurm/run.sbatch with its
#SBATCH lines filled in. Options that this command does not know go to the training. The same command continues a run.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.scripts import job_name, last_step, read_options, script_of
from launch.slurm.job import JOBS, note
from launch.slurm.status import jobs_of, print_status, queue, stop
from training.base.console import UserError, run_main, say, warn
from training.base.durations import format_duration, parse_duration
from training.base.files import open_in_place, writing_to
from training.base.options import FLAG, CommandLine, unprintable
from training.engine.status import STOP_FILE, pace_s, read_sessions, read_status

_TEMPLATE = Path("slurm", "run.sbatch")

# SLURM's signal comes so long before the end of a job, so that the step and the save under way can end.
_LEAD_S = 300

_LEAST = {"nodes": 1, "cpus_per_rank": 1, "chain": 0, "failure_limit": 1}

# Variables of a job around this shell: sbatch would take them for the new job's, over its #SBATCH lines.
_NOT_OURS = (
    "SLURM_",
    *("SBATCH_TIMELIMIT", "SBATCH_JOB_NAME", "SBATCH_OUTPUT", "SBATCH_SIGNAL", "SBATCH_OPEN_MODE"),
    *("SBATCH_REQUEUE", "SBATCH_NO_REQUEUE", "SBATCH_GPUS_PER_NODE", "SBATCH_EXPORT"),
)

# What a session needs before its first step and keeps free after its last, where nothing better is known.
_START_S, _MARGIN_S = 60.0, 30.0


@dataclass(frozen=True)
class Job:
    """What is asked of SLURM for each job of a run."""

    script: str
    words: tuple[str, ...]  # config and options
    run_dir: Path
    nodes: int
    gpus_per_node: str  # as SLURM reads it, a100:4; empty: none
    ranks_per_node: int
    cpus_per_rank: int
    time_s: int  # the limit of the job
    may_requeue: bool
    sbatch: tuple[str, ...]  # more of its options
    settings: tuple[tuple[str, str], ...]  # variables of the batch script

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def name(self) -> str:
        """SLURM starts one job of a name at a time."""
        return job_name(self.run_dir)

    def text(self) -> str:
        """The batch script: the template with its #SBATCH lines, the run and the settings filled in."""
        minutes, seconds = divmod(self.time_s, 60)
        # SLURM looks every 30 s only: of a job of a minute, a longer lead would take half.
        lead_s = min(_LEAD_S, max(1, self.time_s // 20))
        header = [
            f"--job-name={shlex.quote(self.name)}",
            f"--nodes={self.nodes}",
            "--ntasks-per-node=1",
            f"--cpus-per-task={self.cpus_per_rank * self.ranks_per_node}",
            *([f"--gpus-per-node={self.gpus_per_node}"] if self.gpus_per_node else []),
            f"--time={minutes}:{seconds:02d}",
            f"--signal=B:USR1@{lead_s}",
            "--requeue" if self.may_requeue else "--no-requeue",
            "--open-mode=append",
            f"--chdir={shlex.quote(str(Path.cwd()))}",
            f"--output={shlex.quote(str(self.run_dir / 'slurm-%j.log'))}",
            *(shlex.quote(option) for option in self.sbatch),
        ]
        if problems := unprintable(header):  # a line feed would end SLURM's comment, and begin a command
            raise UserError("; ".join(problems))
        lines = _TEMPLATE.read_text(encoding="utf-8").splitlines()
        at = next(number for number, line in enumerate(lines) if line.startswith("#SBATCH"))
        before, after = lines[:at], [line for line in lines[at:] if not line.lstrip("#").startswith("SBATCH")]
        filled = [
            *(f"#SBATCH {option}" for option in header),
            "",
            *(f"export {name}={shlex.quote(value)}" for name, value in self.settings),
            f"set -- {shlex.join(self.words)}",
        ]
        return "\n".join([*before, *filled, *after]) + "\n"


def _time_limit(text: str) -> int:
    """Seconds of a time limit: SLURM's minutes, [hours:]minutes:seconds, days-hours[:minutes[:seconds]], or 11h30m."""
    if text.isdigit():
        return 60 * int(text)
    days = re.fullmatch(r"(\d+)-(\d+)(?::(\d+))?(?::(\d+))?", text)
    if days:
        return sum(int(part or 0) * unit for part, unit in zip(days.groups(), (86400, 3600, 60, 1), strict=True))
    return int(parse_duration(text))


def _read_job(argv: Sequence[str]) -> tuple[argparse.Namespace, Job]:
    parser = CommandLine("python -m launch.slurm", __doc__, usage="%(prog)s CONFIG.yaml [options] [--key value ...]")
    add = parser.add_argument
    add("config", type=Path, metavar="CONFIG.yaml")
    add("--nodes", type=int, default=1, help="nodes of a job (default %(default)s)")
    add("--gpus-per-node", default="0", metavar="[TYPE:]N", help="GPUs of a node, a rank each (default: train on CPUs)")
    add("--ranks-per-node", type=int, help="ranks of a node (default: one per GPU, or one)")
    add("--cpus-per-rank", type=int, default=4, help="CPU cores of a rank (default %(default)s)")
    add("--time", required=True, help="limit of a job, not of the run, as SLURM reads it (90 is minutes), or 11h30m")
    add("--partition", help="SLURM's partition")
    add("--account", help="the account that pays")
    add("--sbatch", default="", metavar="OPTIONS", help='more options of sbatch: --sbatch="--qos=long --mem=64G"')
    add("--chain", type=int, default=0, metavar="N", help="submit N jobs in a row, where requeueing is not allowed")
    add("--stage-to", metavar="FOLDER", help="copy data and .venv to this folder on a disk of each node first")
    add("--failure-limit", type=int, default=3, help="sessions in a row without progress (default %(default)s)")
    add("--no-preflight", **FLAG, help="leave out launch.doctor before the first session")
    add("--no-dry-run", **FLAG, help="do not try a step here first")
    add("--script", help="module that trains (default: what the config says)")
    add("--print", **FLAG, help="print the batch script and do nothing")
    arguments, words = parser.parse_known_args(argv)
    if re.search(r"(^|\s)(--array|-a)\b", " ".join([arguments.sbatch, *words])):
        raise UserError(
            "--array would start all of its tasks in one run folder, of which one trains and the others are refused: "
            "submit each run by a command of its own, with its own --run_dir (docs/slurm.md has a loop for it)"
        )
    time_s, gpus, ranks_per_node = _checked(arguments)
    script = arguments.script or script_of(arguments.config)
    words = [str(arguments.config), *words]
    options = read_options(script, words)
    sbatch = shlex.split(arguments.sbatch)
    sbatch += [f"--{name}={value}" for name in ("partition", "account") if (value := getattr(arguments, name))]
    settings = {
        "RANKS_PER_NODE": str(ranks_per_node),
        "FAILURE_LIMIT": str(arguments.failure_limit),
        "PREFLIGHT": str(int(not arguments.no_preflight)),
        **({"STAGE_TO": arguments.stage_to} if arguments.stage_to else {}),
        **({"SCRIPT": arguments.script} if arguments.script else {}),
    }
    job = Job(
        script=script,
        words=tuple(words),
        run_dir=options.run_dir,
        nodes=arguments.nodes,
        gpus_per_node=arguments.gpus_per_node if gpus else "",
        ranks_per_node=ranks_per_node,
        cpus_per_rank=arguments.cpus_per_rank,
        time_s=time_s,
        may_requeue=not arguments.chain,
        sbatch=tuple(sbatch),
        settings=tuple(settings.items()),
    )
    count = options.batch.micro_batches_per_step
    if count % job.ranks:
        fitting = ", ".join(str(ranks) for ranks in range(1, count + 1) if count % ranks == 0)
        raise UserError(
            f"{job.nodes} nodes x {ranks_per_node} ranks cannot share the {count} micro-batches of a step equally: "
            f"take {fitting} ranks in all, or in a new run another --batch.micro_batches_per_step"
        )
    return arguments, job


def _checked(arguments: argparse.Namespace) -> tuple[int, int, int]:
    """The job's limit in seconds, the GPUs and the ranks of a node. Raises UserError with every mistake."""
    if not arguments.config.is_file():
        raise UserError(f"there is no config file {arguments.config}; for example configs/gpt/base.yaml")
    mistakes = [
        f"--{name.replace('_', '-')} must be at least {least}, got {getattr(arguments, name)}"
        for name, least in _LEAST.items()
        if getattr(arguments, name) < least
    ]
    time_s = 0
    try:
        time_s = _time_limit(arguments.time)
        if time_s < 60:
            mistakes.append(f"--time must be at least a minute, got {arguments.time}")
    except ValueError as error:
        mistakes.append(f"--time: {error}")
    found = re.fullmatch(r"(?:[\w.-]+:)?(\d+)", arguments.gpus_per_node)
    if found is None:
        mistakes.append(f"--gpus-per-node: expected 4 or a100:4, got {arguments.gpus_per_node}")
    gpus = int(found[1]) if found is not None else 0
    ranks_per_node = arguments.ranks_per_node or gpus or 1
    if gpus and ranks_per_node != gpus:
        mistakes.append(f"--ranks-per-node {ranks_per_node}: each rank has a GPU of its own, so leave it out")
    if re.search(r"--(gres|gpus)", arguments.sbatch):
        mistakes.append("name GPUs by --gpus-per-node [TYPE:]N, not in --sbatch: it says how many ranks are started")
    if mistakes:
        raise UserError("; ".join(mistakes))
    return time_s, gpus, ranks_per_node


# What to expect.


@dataclass(frozen=True)
class Pace:
    """How fast the run is."""

    steps: int  # of the whole run
    step_s: float  # of one step
    known_from: str  # where that was measured


def _pace(job: Job, *, no_dry_run: bool) -> Pace | None:
    """From the run's own sessions, else from a dry run here; None where neither can tell."""
    status, sessions = read_status(job.run_dir) or {}, read_sessions(job.run_dir)
    last_s = next((found for session in reversed(sessions) if (found := pace_s(session))), None)
    if last_s is not None and "steps" in status:
        before = sessions[-1]["world_size"]
        return Pace(status["steps"], last_s * before / job.ranks, f"session {len(sessions)}, with {before} rank(s)")
    if no_dry_run:
        return None
    if job.gpus_per_node and not _has_gpu():
        nodes = [
            f"--nodes={job.nodes}",
            f"--gpus-per-node={job.gpus_per_node}",
            f"--ntasks-per-node={job.ranks_per_node}",
        ]
        command = ["srun", *nodes, "--time=10", *job.sbatch, "python", "-m", job.script, *job.words, "--dry-run"]
        say("no GPU here to try a step on: how many steps a job does is known after the first session, or from")
        say(f"  {shlex.join(command)}")
        return None
    say(f"trying two steps here with one process: python -m {job.script} {shlex.join(job.words)} --dry-run")
    command = [sys.executable, "-m", job.script, *job.words, "--dry-run"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(job.cpus_per_rank)}
    tried = subprocess.run(command, env=environment, capture_output=True, text=True)
    if tried.returncode:
        said = [line for line in tried.stderr.splitlines() if line.startswith("error: ")] or [tried.stderr[-2000:]]
        raise UserError(f"the dry run failed, so nothing was submitted: {said[-1].removeprefix('error: ')}")
    found = json.loads(tried.stdout.splitlines()[-1])
    about = f"a dry run with one process here, divided by {job.ranks} ranks"
    return Pace(found["steps"], found["step_s"] / job.ranks, about)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _print_plan(job: Job, pace: Pace | None, chain: int) -> None:
    kind = f"{job.gpus_per_node} GPUs" if job.gpus_per_node else f"{job.ranks_per_node * job.cpus_per_rank} CPU cores"
    say(
        f"{job.run_dir}: {job.ranks} ranks on {job.nodes} node(s) of {kind}, jobs of {format_duration(job.time_s)}, "
        + (f"a chain of {chain}" if chain else "requeued until the run is finished")
    )
    if pace is None:
        return
    left = pace.steps - last_step(job.run_dir)
    usable_s = max(0.0, job.time_s - _START_S - _MARGIN_S)
    steps_per_job = int(usable_s / pace.step_s)
    say(f"{left:,} of {pace.steps:,} steps to go, {pace.step_s:.3g} s each ({pace.known_from})")
    if steps_per_job == 0:
        warn(f"a job of {format_duration(job.time_s)} may be too short for a single step")
        return
    jobs = math.ceil(left / steps_per_job)
    say(f"{min(left, steps_per_job):,} steps per job, {jobs} job(s) expected")
    if chain and chain < jobs:
        warn(f"{chain} jobs will not be enough; the same command continues, or take --chain {jobs + 1}")


# Submitting.


def _asks_for_another_length(job: Job) -> bool:
    from training.engine.run_folder import has_another_length  # slow to import

    return has_another_length(job.run_dir, read_options(job.script, list(job.words)).optim)


def submit(argv: Sequence[str]) -> int:
    """Checks config and resources, shows the plan, and submits; with --print only shows the script."""
    arguments, job = _read_job(argv)
    if arguments.print:
        print(job.text(), end="")
        return 0
    if shutil.which("sbatch") is None:
        raise UserError("there is no sbatch on this machine: run this on the cluster's login node, or see --print")
    if (read_status(job.run_dir) or {}).get("status") == "finished" and not _asks_for_another_length(job):
        say(f"{job.run_dir} is finished; to train anew choose another --run_dir")
        return 0
    queued = [f"job {each.number} ({each.state.lower()})" for each in jobs_of(job.run_dir, queue())]
    if queued and not arguments.chain:
        raise UserError(
            f"{job.run_dir} is in the queue already, {', '.join(queued)}; stop it first to change something: "
            f"python -m launch.slurm stop {job.run_dir}"
        )
    accepted = _sbatch(job, "--test-only").stderr.strip().removeprefix("sbatch: ")
    _print_plan(job, _pace(job, no_dry_run=arguments.no_dry_run), arguments.chain)
    say(f"SLURM: {accepted}")
    numbers = []
    with writing_to(job.run_dir, option="--run_dir"):
        job.run_dir.mkdir(parents=True, exist_ok=True)  # for the log: a job that cannot open it ends at once, silently
        open_in_place(job.run_dir / JOBS).close()  # what is submitted has to be written down
        if not queued:
            (job.run_dir / STOP_FILE).unlink(missing_ok=True)  # it was meant for a session that did not live to see it
    for _ in range(arguments.chain or 1):
        # singleton: one at a time, even of several submissions
        numbers.append(_sbatch(job, "--parsable", "--dependency=singleton").stdout.strip().partition(";")[0])
        note(job.run_dir, "submitted", numbers[-1])
    first, command = numbers[0], "python -m launch.slurm"
    say(f"\nsubmitted {'job' if len(numbers) == 1 else 'jobs'} {', '.join(numbers)}")
    say(f"  follow:   tail -F {job.run_dir}/slurm-{first}.log   or   {command} status")
    say(f"  stop:     {command} stop {job.run_dir}   (saves first)")
    say("  resume:   the same command again")
    return 0


def _sbatch(job: Job, *options: str) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if key == "SLURM_CONF" or not key.startswith(_NOT_OURS)}
    done = subprocess.run(["sbatch", *options], input=job.text(), env=kept, capture_output=True, text=True)
    if done.returncode:
        said = re.sub(r"^(sbatch|allocation failure): (error: )?", "", done.stderr.strip(), flags=re.M)
        raise UserError(f"SLURM does not take the job: {said.replace(chr(10), '; ')}; nothing more was submitted")
    return done


def main(argv: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else list(argv)
    if words[:1] == ["status"]:
        return print_status(words[1:])
    if words[:1] == ["stop"]:
        return stop(words[1:])
    return submit(words)


if __name__ == "__main__":
    run_main(main, prints_product=True)
