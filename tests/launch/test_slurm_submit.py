"""`python -m launch.slurm` and the batch scripts as files: what is asked of SLURM, and what is said about mistakes."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from launch.slurm import __main__ as slurm
from launch.slurm.job import note, read_events
from launch.slurm.status import row
from tests.support.commands import PATIENCE_S, ROOT, Result
from tests.support.debian import program
from tests.support.lives import RUN, SLOW
from tests.support.runs import assert_same_model, assert_same_record, reference, status_of
from tests.support.slurm_cluster import write_config
from training.base.console import UserError
from training.base.options import to_yaml, with_values
from training.engine import run_folder
from training.engine.address.claim import newest_link
from training.engine.address.store import open_store
from training.engine.status import read_status, write_status
from training.engine.task import RunOptions

SCRIPT = "slurm/run.sbatch"


@pytest.fixture
def config(sample_data: Path, tmp_path: Path) -> Path:
    """A config of two ranks' work."""
    return write_config(tmp_path, sample_data)


@pytest.fixture
def submission(cluster, tmp_path: Path) -> Callable[..., Result]:
    """Runs `python -m launch.slurm`; what it submits has these accidents."""

    def run(*words: object, accidents: Sequence[dict[str, Any]] = ()) -> Result:
        environment = {
            "SCRIPT": "tests.support.faulty_training",
            "ACCIDENTS": json.dumps({"folder": str(tmp_path), "list": accidents}),
        }
        return cluster.relay(*words, environment=environment)

    return run


def wait_until(happened: Callable[[], object], what: str) -> None:
    end = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < end, what
        time.sleep(0.2)


def hold_at(step: int) -> dict[str, Any]:
    """The first rank waits there for the file go-forward-`step` in the test's folder."""
    return {"at": "forward", "step": step, "rank": 0, "do": "hold"}


def submitted(result: Result) -> list[int]:
    assert result.status == 0, result
    found = re.search(r"^submitted jobs? ([\d, ]+)$", result.out, flags=re.M)
    assert found, result
    return [int(number) for number in found[1].split(", ")]


# The scripts.


def test_scripts_are_free_of_what_shellcheck_finds():
    shellcheck = program(("shellcheck",), "shellcheck")
    scripts = [SCRIPT, *map(str, (ROOT / "slurm").glob("*.sh")), *map(str, (ROOT / "launch").glob("*.sh"))]
    words = [shellcheck, "--external-sources", "--severity=warning", "--shell=bash", *scripts]
    checked = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_script_is_taken_by_slurm_as_it_is(cluster):
    assert cluster.run("sbatch", "--test-only", SCRIPT).status == 0
    lines = (ROOT / SCRIPT).read_text().splitlines()
    first_command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any("SBATCH" in line for line in lines[first_command:]), "SLURM does not see these"


def test_script_outside_relays_folder_says_so(cluster, tmp_path):
    log = tmp_path / "log"
    job = cluster.submit("--chdir", tmp_path, "--output", log, ROOT / SCRIPT, "configs/gpt/sample.yaml")
    assert cluster.wait_for(job) == "FAILED"
    assert "submit from Relay's folder" in log.read_text()


# Submitting.


def test_mistakes_are_all_told_before_anything_is_submitted(submission, config, cluster, tmp_path, monkeypatch):
    for name in ("PATH", "SLURM_CONF"):
        monkeypatch.setenv(name, cluster.environment[name])
    for words, parts in (
        (("--time", "0:10", "--nodes", "0"), ("--nodes must be at least 1", "--time must be at least a minute")),
        (("--time", "tomorrow"), ("'tomorrow' is no duration",)),
        (("--time", "5", "--optim.lrr", "1", "--seed", "x"), ("optim.lrr (nearest: optim.lr)", "seed")),
        (("--time", "5", "--nodes", "3"), ("3 nodes x 1 rank ", "take 1, 2, 4 ranks")),
        (("--time", "5", "--gpus-per-node", "2", "--ranks-per-node", "1"), ("a GPU of its own",)),
        (("--time", "5", "--gpus-per-node", "many"), ("expected 4 or a100:4",)),
        (("--time", "5", "--sbatch=--gres=gpu:2"), ("name GPUs by --gpus-per-node",)),
        (("--time", "5", "--sbatch=--array=1-10"), ("--array would start all of its tasks in one run folder",)),
        (("--time", "5", "--dry-run"), ("--dry-run would be all that the job does",)),
        (("--time", "5", "--array", "1-10"), ("--array would start all of its tasks in one run folder",)),
        (("--time", "5", "--partition", "nowhere"), ("SLURM does not take the job", "invalid partition")),
        (("--time", "5", "--nodes", "4"), ("SLURM does not take the job", "sinfo -o")),
        (("--time", "5", "--data", tmp_path / "none"), ("the dry run failed", "nothing was submitted")),
    ):
        with pytest.raises(UserError) as raised:
            slurm.main([str(word) for word in (config, *words)])
        assert all(part in str(raised.value) for part in parts), raised.value
    result = submission(config, "--time", "0:10", "--nodes", "0")
    assert result.status == 1, result
    (line,) = result.error_lines
    assert "--nodes must be at least 1" in line and "--time must be at least a minute" in line
    assert "there is no config file" in submission(tmp_path / "none.yaml", "--time", "5").err
    assert not (tmp_path / "run").exists()


def test_print_shows_what_would_be_submitted_and_nothing_else(submission, config, cluster, tmp_path):
    words = (config, "--nodes", 2, "--time", "1-12", "--cpus-per-rank", 3, "--sbatch=--comment='two words'")
    result = submission(*words, "--print", "--optim.lr", "2e-3", "--run_at", "file:///drive/run")
    assert result.status == 0 and result.err == "" and not (tmp_path / "run").exists()
    held = int(cluster.ask("bash", "-c", result.out.replace(" sbatch ", " sbatch --hold --parsable ")))
    cluster.ask("scancel", held)
    about = cluster.ask("scontrol", "show", "job", held)
    for part in (
        "NumNodes=2",
        "TimeLimit=1-12:00:00",
        "CPUs/Task=3",
        "Comment=two words",
        "Requeue=1",
        "JobName=run-",
    ):
        assert part in about, part
    assert result.out.endswith(f" {SCRIPT} {config} --optim.lr 2e-3 --run_at file:///drive/run\n")
    assert (tmp_path / "run").is_dir(), "SLURM writes the log there, and ends a job in silence where it cannot"
    assert submission(*words, "--print", "--chain", 3).out.count(" sbatch --dependency=singleton ") == 3


def test_every_run_has_a_job_name_of_its_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)

    def name_of(run_dir: str | Path) -> str:
        slurm.main(["configs/gpt/sample.yaml", "--time", "5", "--run_dir", str(run_dir), "--print"])
        words = shlex.split(capsys.readouterr().out)
        return next(word.removeprefix("--job-name=") for word in words if word.startswith("--job-name="))

    clones = [tmp_path / clone / run for clone in ("one", "two") for run in ("runs/a-b", "runs/a/b", "runs/中文")]
    names = [name_of(each) for each in clones]
    assert len(set(names)) == len(names) and names[0].startswith("a-b-")
    (tmp_path / "link").symlink_to(tmp_path / "one/runs")
    assert name_of(tmp_path / "link/a-b") == name_of(os.path.relpath(clones[0])) == names[0]


def test_the_plan_is_for_the_steps_that_the_run_will_have(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    session = {"number": 1, "world_size": 2, "from_step": 0, "step": 100, "seconds": 200.0}
    monkeypatch.setattr(slurm, "read_sessions", lambda run_dir: [session])

    def job(*words: str) -> slurm.Job:
        always = ("--run_dir", str(tmp_path), "--time", "5", "--no-dry-run")
        return slurm._read_job(["configs/gpt/sample.yaml", *always, *words])

    write_status(tmp_path, "finished", "", restart=False, steps=300)
    begun = job("--optim.schedule", "wsd", "--optim.decay_steps", "50")
    (tmp_path / "config.yaml").write_text(to_yaml(begun.options))
    assert slurm._pace(begun) == (300, 4.0, "session 1, with 2 ranks")
    assert slurm._pace(job(*begun.words[-4:], "--optim.epochs", "900")) is None, "nobody knows how long that is"
    assert slurm._pace(job(*begun.words[-4:], "--optim.steps", "500"))[0] == 500

    def refuse(options: RunOptions) -> None:
        raise AssertionError("what the budget has chosen is not in the options")

    monkeypatch.setattr(run_folder, "refuse_other_options", refuse)
    asked = job("--budget", "10m", "--optim.steps", "100")  # these as in a config's file
    (tmp_path / "config.yaml").write_text(to_yaml(with_values(asked.options, {"optim.steps": 300})))
    assert slurm._pace(asked)[0] == 300
    assert slurm.submit([*asked.words, "--time", "5"]) == 0
    assert f"{tmp_path} is finished" in capsys.readouterr().out


def test_no_option_ends_a_line_and_begins_a_command(tmp_path, monkeypatch):
    config = tmp_path / "gpt/mine.yaml"
    config.parent.mkdir()
    config.write_text('data: prepared/x\nrun_dir: "runs/x\\ntouch pwned"\n')
    with pytest.raises(UserError, match=r"mine.yaml: run_dir: 'runs/x\\ntouch pwned' has the control character"):
        slurm.main([str(config), "--time", "5", "--print"])
    for words in (("--run_dir", "runs/x\ny"), ("--sbatch=--comment='a\ntouch pwned'",), ("--partition", "a\rb")):
        with pytest.raises(UserError, match="has the control character"):
            slurm.main(["configs/gpt/sample.yaml", "--time", "5", "--print", *words])
    (tmp_path / "two\nlines").mkdir()
    monkeypatch.chdir(tmp_path / "two\nlines")
    for name in ("configs", "slurm"):
        Path(name).symlink_to(ROOT / name)
    with pytest.raises(UserError, match="has the control character"):
        slurm.main(["configs/gpt/sample.yaml", "--time", "5", "--print"])


@pytest.mark.whole
def test_chain_without_requeueing_hands_the_run_on_and_its_rest_has_nothing_to_do(
    submission, config, cluster, sample_data
):
    run_dir = config.parents[1] / "run"
    result = submission(
        *(config, "--ranks-per-node", 2, "--cpus-per-rank", 1, "--time", "5", "--chain", 3, "--no-preflight"),
        accidents=({**SLOW, "seconds": 0.25}, hold_at(5)),  # time for the signal to arrive
    )
    jobs = submitted(result)
    assert "2 ranks on 1 node of" in result.out and "a chain of 3" in result.out
    assert "60 of 60 steps to go" in result.out and "1 job expected" in result.out
    assert f"tail -F {run_dir}/slurm-{jobs[0]}.log" in result.out
    wait_until((config.parents[1] / "at-forward-5-0").exists, "held at step 5")
    cluster.ask("scancel", "--signal=USR1", "--batch", jobs[0])
    (config.parents[1] / "go-forward-5").touch()
    assert [cluster.wait_for(job) for job in jobs] == ["FAILED", "COMPLETED", "COMPLETED"]
    assert cluster.about(jobs[0], "ExitCode") == "75:0"
    assert "The next job of its chain goes on" in (run_dir / f"slurm-{jobs[0]}.log").read_text()
    assert "nothing to do" in (run_dir / f"slurm-{jobs[2]}.log").read_text()
    outcomes = [(event["job"], event["outcome"]) for event in read_events(run_dir) if event["event"] == "ended"]
    assert outcomes == [(str(jobs[0]), "again"), (str(jobs[1]), "finished")]

    whole = reference(sample_data, *RUN, ranks=2)
    assert_same_model(run_dir, whole)
    assert_same_record(run_dir, whole)
    assert row(run_dir, [])[1:4] == ("finished", "60 of 60", "2")


def test_stop_saves_and_rests_and_status_tells_how_runs_stand(submission, config, cluster, tmp_path):
    run_dir = tmp_path / "run"
    words = (config, "--ranks-per-node", 2, "--cpus-per-rank", 1, "--time", "5", "--no-preflight")
    (job,) = submitted(submission(*words, accidents=(SLOW, hold_at(10))))
    assert submission("status", tmp_path / "gpt").status == 1
    again = submission(*words)
    assert again.status == 1 and f"job {job} (" in again.err and "launch.slurm stop" in again.err
    wait_until((tmp_path / "at-forward-10-0").exists, "held at step 10")

    def status() -> str:
        result = submission("status", tmp_path)
        assert result.status == 0, result
        return result.out

    seen = status()
    assert re.search(
        rf"run  +running +\d+ of 60 +1 +\d[\d.]* +[\d,]+ +(\d+% +)?\d\d-\d\d \d\d:\d\d +{job} running relay", seen
    ), seen
    stopping = submission("stop", run_dir)
    assert stopping.status == 0 and "saves at its next step" in stopping.out
    (tmp_path / "go-forward-10").touch()
    assert cluster.wait_for(job) == "FAILED"
    assert cluster.about(job, "ExitCode") == "75:0"
    assert status_of(run_dir)["status"] == "resumable"
    assert read_events(run_dir)[-1]["outcome"] == "resting"
    assert re.search(r"run  +resumable +\d+ of 60 +1 .* to go$", status(), flags=re.M), status()
    assert "has no job in the queue" in submission("stop", run_dir).out
    refused = submission(*words, "--optim.lr", 1e-5)
    assert refused.status == 1 and "another definition (optim.lr: " in refused.err and "submitted" not in refused.out
    note(run_dir, "ended", str(job), outcome="failed", reason="torn to\npieces", step=10, from_step=10)
    assert "failed: torn to pieces" in status()

    # One that waits is taken out of the queue, and nothing is left that would stop the next session.
    blocker = cluster.submit("--exclusive", "-N", 2, "-o", "/dev/null", "--wrap", "sleep 600")
    cluster.wait_for(blocker, "RUNNING")
    (waiting,) = submitted(submission(*words))
    foreign = tmp_path / "theirs"
    foreign.mkdir()
    note(foreign, "submitted", str(waiting))
    assert "has not the run's name" in submission("stop", foreign).out
    assert cluster.state(waiting) == "PENDING", "whoever names a job cancels it"
    assert re.search(rf"resumable, job pending .* {waiting} pending \(", status()), status()
    assert "taken out of the queue" in submission("stop", run_dir).out
    assert cluster.wait_for(waiting) == "CANCELLED"
    cluster.ask("scancel", blocker)
    assert not (run_dir / "STOP").exists()

    # A session that nobody saw end.
    content = {**status_of(run_dir), "status": "running"}
    (run_dir / "status.json").write_text(json.dumps(content))
    assert "interrupted" in status()
    with (run_dir / "lock").open() as held:  # one that is no job of SLURM's
        fcntl.flock(held, fcntl.LOCK_EX)
        assert "is trained by a session that is no job" in submission(*words).err
        assert "saves at its next step" in submission("stop", run_dir).out
        assert "told to stop and is still saving" in submission(*words).err
    (run_dir / "STOP").unlink()

    # What is damaged, or missing, is no reason to say nothing.
    (run_dir / "status.json").write_text('{"x": 1}')
    assert "not begun" in status()
    alone = cluster.relay("status", tmp_path, environment={"PATH": "/nowhere"})
    assert alone.status == 0 and "there is no squeue" in alone.err and "not begun" in alone.out
    assert cluster.relay("stop", run_dir, environment={"SLURM_CONF": str(tmp_path / "none")}).status == 1


def test_submission_is_not_bent_by_variables_of_this_shell_nor_by_an_old_stop_file(cluster, config, tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "STOP").touch()
    around = {"SLURM_MEM_PER_CPU": "100", "SLURM_NTASKS": "7", "SBATCH_TIMELIMIT": "7", "SLURM_JOB_ID": "1"}
    words = (config, "--time", "5", "--cpus-per-rank", 1, "--no-preflight", "--no-dry-run", "--sbatch=--mem=500M")
    words += ("--optim.steps", 12, "--run_at", f"file://{tmp_path}/address")
    result = cluster.relay(*words, environment=around)
    (job,) = submitted(result)
    assert cluster.about(job, "TimeLimit") == "00:05:00"
    assert cluster.wait_for(job) == "COMPLETED", (run_dir / f"slurm-{job}.log").read_text()
    assert status_of(run_dir)["status"] == "finished"
    # The run's address reaches the training as its other options do, and is nothing to what SLURM's side reads.
    link = newest_link(open_store(f"file://{tmp_path}/address"))
    assert max(link.checkpoints) == 12 and link.free
    assert row(run_dir, [])[1:4] == ("finished", "12 of 12", "1")
    again = cluster.relay(*words)
    assert again.status == 0 and f"{run_dir} is finished" in again.out and "submitted" not in again.out


def test_preflight_finds_what_is_wrong_before_the_first_session_and_nothing_is_tried_again(cluster, config, tmp_path):
    words = ("--data", tmp_path / "none", "--optim.lrr", "1")
    job = cluster.submit("--output", tmp_path / "log", "--cpus-per-task", 1, SCRIPT, config, *words)
    assert cluster.wait_for(job) == "FAILED"
    log = (tmp_path / "log").read_text()
    assert "optim.lrr" in log and f"there is no prepared data set {tmp_path / 'none'}" in log
    assert [event["event"] for event in read_events(tmp_path / "run")] == ["began", "ended"]
    assert read_status(tmp_path / "run") is None
    assert "launch.doctor found errors, see its report; not continued by itself" in log


def test_data_and_environment_are_copied_to_the_nodes_and_removed_again(cluster, config, tmp_path):
    """With a copy of this repository and a small environment, since the real one has some gigabytes."""
    folder, seen = tmp_path / "relay", tmp_path / "seen"
    tracked = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("this folder is no git checkout, from which a copy could be made (git clone it)")
    for name in tracked.stdout.splitlines():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / ".venv"], check=True)
    (folder / ".venv/installed-requirements.txt").touch()
    packages = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder / ".venv")}))
    # Not as sitecustomize, of which Debian's Python has one of its own.
    (packages / "all.pth").write_text(f"{sysconfig.get_path('purelib')}\nimport seen_at_start\n")
    (packages / "seen_at_start.py").write_text(
        "import sys\n"
        f"seen = open({str(seen)!r}, 'a')\n"
        "print(sys.prefix, file=seen, flush=True)\n"
        "sys.addaudithook(lambda event, words: event == 'open' and str(words[0]).endswith('/meta.json')\n"
        "    and print(words[0], file=seen, flush=True))\n"
    )

    disk = tmp_path / "disk"
    disk.mkdir()
    environment = {"STAGE_TO": str(disk), "PREFLIGHT": "0"}
    options = ("--chdir", folder, "--output", tmp_path / "log", "--nodes", 2, "--cpus-per-task", 1)
    job = cluster.submit(*options, folder / SCRIPT, config, "--optim.steps", 12, environment=environment)
    assert cluster.wait_for(job) == "COMPLETED", (tmp_path / "log").read_text()
    read = seen.read_text().split()
    (staged,) = {Path(place).parent for place in read if place.startswith(f"{disk}/") and place.endswith("/venv")}
    assert re.fullmatch(f"relay-{job}-[0-9a-f]{{32}}", staged.name), "nobody can have made it before"
    assert str(staged / "data/meta.json") in read
    assert (folder / ".venv.tar").is_file()
    assert str(staged) not in (tmp_path / "run/config.yaml").read_text(), "the copy does not outlive the job"
    assert not list(disk.iterdir())
