"""Submits a run to SLURM once, shows how all runs stand, or stops one after a save.

    python -m launch.slurm configs/gpt/base.yaml --nodes 2 --gpus-per-node 2 --time 4:00:00 --partition gpu
    python -m launch.slurm configs/gpt/base.yaml --nodes 2 --gpus-per-node 2 --time 4:00:00 --print
    python -m launch.slurm status [FOLDER]
    python -m launch.slurm stop runs/gpt-base

The job saves before its time is over and goes back into the queue until the run is finished. Where requeueing is not
allowed, --chain N submits N jobs that follow each other. The batch script is slurm/run.sbatch, and --print shows how it
would be submitted. Options that this command does not know go to the training. The same command continues a run.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from launch.scripts import job_name, last_step, micro_batches_of, read_options, script_of
from launch.slurm.job import JOBS, note
from launch.slurm.status import ask_slurm, in_training, jobs_of, print_status, queue, stop
from training.base.console import UserError, counted, run_main, say, warn
from training.base.durations import format_duration, parse_duration
from training.base.files import open_in_place, writing_to
from training.base.options import FLAG, CommandLine, named_keys, raw_values, unprintable
from training.engine.status import STOP_FILE, pace_s, read_sessions, read_status

if TYPE_CHECKING:
    from training.engine.task import RunOptions

# SLURM's signal comes so long before the end of a job, so that the step and the save under way can end.
_LEAD_S = 300

_LEAST = {"nodes": 1, "cpus_per_rank": 1, "chain": 0, "failure_limit": 1}

# Variables of a job around this shell, which sbatch would take for the new job's.
_NOT_OURS = ("SLURM_", "SBATCH_GPUS_PER_NODE", "SBATCH_EXPORT")

# Of sbatch: one job of a name, even of several submissions.
ONE_AT_A_TIME = "--dependency=singleton"

# What a session needs before its first step and keeps free after its last, where nothing better is known.
_START_S, _MARGIN_S = 60.0, 30.0


@dataclass(frozen=True)
class Job:
    """What is asked of SLURM for each job of a run."""

    asked: argparse.Namespace  # the command's own options
    script: str
    words: tuple[str, ...]  # config and options of the training
    options: RunOptions  # as its script reads them
    gpus: int  # of a node
    time_s: int  # the limit of the job

    @property
    def run_dir(self) -> Path:
        return self.options.run_dir

    @property
    def ranks_per_node(self) -> int:
        return int(self.asked.ranks_per_node or self.gpus or 1)

    @property
    def ranks(self) -> int:
        return int(self.asked.nodes) * self.ranks_per_node

    @property
    def settings(self) -> dict[str, str]:
        """Variables of the batch script."""
        asked = self.asked
        found = {"RANKS_PER_NODE": self.ranks_per_node, "FAILURE_LIMIT": asked.failure_limit}
        found |= {"PREFLIGHT": int(not asked.no_preflight), "STAGE_TO": asked.stage_to, "SCRIPT": asked.script}
        return {name: str(value) for name, value in found.items() if value is not None}

    def sbatch(self, *more: str) -> list[str]:
        """The command that submits a job."""
        asked, (minutes, seconds) = self.asked, divmod(self.time_s, 60)
        gpus = asked.gpus_per_node if self.gpus else None
        options = {
            "job-name": job_name(self.run_dir),  # SLURM starts one job of a name at a time
            "nodes": asked.nodes,
            "ntasks-per-node": 1,
            "cpus-per-task": asked.cpus_per_rank * self.ranks_per_node,
            "time": f"{minutes}:{seconds:02d}",
            # SLURM looks every 30 s only: of a job of a minute, a longer lead would take half.
            "signal": f"B:USR1@{min(_LEAD_S, max(1, self.time_s // 20))}",
            "open-mode": "append",
            "chdir": Path.cwd(),
            "output": self.run_dir / "slurm-%j.log",
            **{"gpus-per-node": gpus, "partition": asked.partition, "account": asked.account},
        }
        given = [f"--{name}={value}" for name, value in options.items() if value is not None]
        requeue = "--no-requeue" if asked.chain else "--requeue"
        words = [*given, requeue, *shlex.split(asked.sbatch)]
        if problems := unprintable(words):
            raise UserError("; ".join(problems))
        return ["sbatch", *more, *words, "slurm/run.sbatch", *self.words]


def _time_limit(text: str) -> int:
    """Seconds of a time limit: SLURM's minutes, [hours:]minutes:seconds, days-hours[:minutes[:seconds]], or 11h30m."""
    if text.isdigit():
        return 60 * int(text)
    if re.fullmatch(r"\d+-\d+(:\d+)?", text):
        text += ":00" * (2 - text.count(":"))
    return int(parse_duration(text))


def _read_job(argv: Sequence[str]) -> Job:
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
    add("--print", **FLAG, help="print the command that submits, and do nothing")
    asked, words = parser.parse_known_args(argv)
    raw_values([str(asked.config)])  # says what is wrong with the file
    time_s, gpus = _checked(asked, words)
    script = asked.script or script_of(asked.config)
    words = [str(asked.config), *words]
    options = read_options(script, words)
    job = Job(asked, script, tuple(words), options, gpus, time_s)
    count = micro_batches_of(options, words)
    if count % job.ranks:
        fitting = ", ".join(str(ranks) for ranks in range(1, count + 1) if count % ranks == 0)
        raise UserError(
            f"{counted(asked.nodes, 'node')} x {counted(job.ranks_per_node, 'rank')} cannot share the {count} "
            f"micro-batches of a step equally: take {fitting} ranks in all, or in a new run another "
            "--batch.micro_batches_per_step"
        )
    return job


def _checked(asked: argparse.Namespace, words: Sequence[str]) -> tuple[int, int]:
    """The job's limit in seconds, and the GPUs of a node. Raises UserError with every mistake."""
    found = re.fullmatch(r"(?:[\w.-]+:)?(\d+)", asked.gpus_per_node)
    gpus, time_s, no_time = int(found[1]) if found is not None else 0, 60, ""
    try:
        time_s = _time_limit(asked.time)
    except ValueError as error:
        no_time = str(error)
    mistakes = {
        "--dry-run would be all that the job does: a step is tried here before every submission, and --print shows "
        "what would be submitted": "dry_run" in named_keys(words),
        **{
            f"--{name.replace('_', '-')} must be at least {least}, got {vars(asked)[name]}": vars(asked)[name] < least
            for name, least in _LEAST.items()
        },
        f"--time: {no_time}": no_time,
        f"--time must be at least a minute, got {asked.time}": time_s < 60,
        f"--gpus-per-node: expected 4 or a100:4, got {asked.gpus_per_node}": found is None,
        f"--ranks-per-node {asked.ranks_per_node}: each rank has a GPU of its own, so leave it out": (
            gpus and asked.ranks_per_node not in (None, gpus)
        ),
        "name GPUs by --gpus-per-node [TYPE:]N, not in --sbatch: it says how many ranks are started": (
            re.search(r"--(gres|gpus)", asked.sbatch)
        ),
        "--array would start all of its tasks in one run folder, of which one trains and the others are refused: "
        "submit each run by a command of its own, with its own --run_dir (docs/slurm.md has a loop for it)": (
            re.search(r"(^|\s)(--array|-a)\b", " ".join([asked.sbatch, *words]))
        ),
    }
    if any(mistakes.values()):
        raise UserError("; ".join(text for text, is_made in mistakes.items() if is_made))
    return time_s, gpus


# What to expect.


def _pace(job: Job) -> tuple[int, float, str] | None:
    """The run's steps, the seconds that one takes, and where these are known from; None where nobody can tell.

    From the run's own sessions, else from a dry run here.
    """
    import torch  # long since imported by the script that read the options

    from training.engine.run_folder import has_another_length

    steps = job.options.optim.steps
    if not has_another_length(job.run_dir, job.options.optim):
        steps = (read_status(job.run_dir) or {}).get("steps", steps)
    paces = [(pace, session) for session in read_sessions(job.run_dir) if (pace := pace_s(session))]
    if paces and steps is not None:
        pace, last = paces[-1]
        known_from = f"session {last['number']}, with {counted(last['world_size'], 'rank')}"
        return steps, pace * last["world_size"] / job.ranks, known_from
    if job.asked.no_dry_run:
        return None
    if job.gpus and not torch.cuda.is_available():
        say("no GPU here to try a step on: how many steps a job does is known after the first session")
        return None
    trial = ["-m", job.script, *job.words, "--dry-run"]
    say(f"trying two steps here with one process: python {shlex.join(trial)}")
    environment = {**os.environ, "OMP_NUM_THREADS": str(job.asked.cpus_per_rank)}
    tried = subprocess.run([sys.executable, *trial], env=environment, capture_output=True, text=True)
    if tried.returncode:
        said = [line for line in tried.stderr.splitlines() if line.startswith("error: ")] or [tried.stderr[-2000:]]
        raise UserError(f"the dry run failed, so nothing was submitted: {said[-1].removeprefix('error: ')}")
    found = json.loads(tried.stdout.splitlines()[-1])
    known_from = "a dry run with one process here"
    if job.options.budget is not None:  # more ranks do more steps in the same time
        return found["steps"], found["step_s"], known_from
    return found["steps"], found["step_s"] / job.ranks, f"{known_from}, divided by {counted(job.ranks, 'rank')}"


def _print_plan(job: Job) -> None:
    asked, limit = job.asked, format_duration(job.time_s)
    cores = job.ranks_per_node * asked.cpus_per_rank
    kind = counted(asked.gpus_per_node, "GPU") if job.gpus else counted(cores, "CPU core")
    say(
        f"{job.run_dir}: {counted(job.ranks, 'rank')} on {counted(asked.nodes, 'node')} of {kind}, jobs of {limit}, "
        + (f"a chain of {asked.chain}" if asked.chain else "requeued until the run is finished")
    )
    pace = _pace(job)
    if pace is None:
        return
    steps, step_s, known_from = pace
    left = steps - last_step(job.run_dir)
    steps_per_job = int(max(0.0, job.time_s - _START_S - _MARGIN_S) / step_s)
    say(f"{left:,} of {steps:,} steps to go, {step_s:.3g} s each ({known_from})")
    if steps_per_job == 0:
        warn(f"a job of {limit} may be too short for a single step")
        return
    jobs = math.ceil(left / steps_per_job)
    say(f"{min(left, steps_per_job):,} steps per job, {counted(jobs, 'job')} expected")
    if asked.chain and asked.chain < jobs:
        warn(f"{asked.chain} jobs will not be enough; the same command continues, or take --chain {jobs + 1}")


# Submitting.


def submit(argv: Sequence[str]) -> int:
    """Checks config and resources, shows the plan, and submits; with --print only shows the command."""
    job = _read_job(argv)
    if job.asked.print:
        settings = (f"{name}={value}" for name, value in job.settings.items())
        print(shlex.join(["mkdir", "-p", str(job.run_dir)]))
        print("\n".join([shlex.join(["env", *settings, *job.sbatch(ONE_AT_A_TIME)])] * (job.asked.chain or 1)))
        return 0
    from training.engine.budget import is_to_choose  # slow to import, as the next
    from training.engine.run_folder import has_another_length, refuse_other_options

    if not is_to_choose(job.options, named_keys(job.words)):  # else the job compares, once all is chosen
        refuse_other_options(job.options)
    status = (read_status(job.run_dir) or {}).get("status")
    if status == "finished" and not has_another_length(job.run_dir, job.options.optim):
        say(f"{job.run_dir} is finished; to train anew choose another --run_dir")
        return 0
    queued = [f"job {each.number} ({each.state.lower()})" for each in jobs_of(job.run_dir, queue())]
    stopping = f"to change something stop it first: python -m launch.slurm stop {job.run_dir}"
    if (job.run_dir / STOP_FILE).exists():
        stopping = "it was told to stop and is still saving: try again in a moment"
    if queued and not job.asked.chain:
        raise UserError(f"{job.run_dir} is in the queue already, {', '.join(queued)}; {stopping}")
    if not queued and in_training(job.run_dir):
        raise UserError(f"{job.run_dir} is trained by a session that is no job of its own; {stopping}")
    accepted = re.sub(r"^sbatch: Job \d+", "a job is", _sbatch(job, "--test-only").stderr.strip())
    _print_plan(job)
    say(f"SLURM: {accepted}")
    numbers = []
    with writing_to(job.run_dir, option="--run_dir"):
        job.run_dir.mkdir(parents=True, exist_ok=True)  # for the log: a job that cannot open it ends at once, silently
        open_in_place(job.run_dir / JOBS).close()  # what is submitted has to be written down
        if not queued:
            (job.run_dir / STOP_FILE).unlink(missing_ok=True)  # it was meant for a session that did not live to see it
    for _ in range(job.asked.chain or 1):
        numbers.append(_sbatch(job, "--parsable", ONE_AT_A_TIME).stdout.strip().partition(";")[0])
        note(job.run_dir, "submitted", numbers[-1])
    first, command = numbers[0], "python -m launch.slurm"
    say(f"\nsubmitted {'job' if len(numbers) == 1 else 'jobs'} {', '.join(numbers)}")
    say(f"  follow:   tail -F {job.run_dir}/slurm-{first}.log   or   {command} status")
    say(f"  stop:     {command} stop {job.run_dir}   (saves first)")
    say("  resume:   the same command again")
    return 0


def _sbatch(job: Job, *more: str) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if key == "SLURM_CONF" or not key.startswith(_NOT_OURS)}
    advice = "sinfo -o '%P %l %c %G' shows the partitions with their time limits, cores and GPUs"
    refusal = "SLURM does not take the job: {}; " + (advice if "--test-only" in more else "nothing more was submitted")
    return ask_slurm(*job.sbatch(*more), refusal=refusal, env={**kept, **job.settings})


def main(argv: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else list(argv)
    verb = {"status": print_status, "stop": stop}.get(words[0]) if words else None
    return verb(words[1:]) if verb is not None else submit(words)


if __name__ == "__main__":
    run_main(main, prints_product=True)
