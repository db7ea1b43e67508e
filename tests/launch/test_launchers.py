"""Whatever starts a run, torchrun, DeepSpeed's launcher, srun: the run is the same, and no rank outlives its launcher.

srun is imitated by plain processes with the variables that SLURM 22.05 was seen to set for the tasks of a step.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import PrefixStore, TCPStore

from launch.supervisor import free_port
from tests.support.commands import ROOT, Launch, Started, usual_environment
from tests.support.lives import RUN, SECONDS, SLOW, STEPS, Life, assert_all_gone, assert_stopped, resumed_at, wait_until
from tests.support.ranks import task
from tests.support.runs import (
    assert_only_one_line_is_said,
    assert_same_model,
    assert_same_record,
    reference,
    status_of,
)
from training.base.console import UserError
from training.base.environment import without_local_rank
from training.base.options import parse
from training.base.processes import children, command_line
from training.data.conversations import FORMAT as CONVERSATIONS
from training.data.prepared import FORMAT as PAIRS
from training.gpt import GPTConfig


def hold_at(step: int) -> dict[str, Any]:
    """The first rank waits there, the others with it; meanwhile something happens to them."""
    return {"at": "forward", "step": step, "rank": 0, "do": "hold"}


def slow_behind(step: int) -> list[dict[str, Any]]:
    """Steps that take long enough for what happened to the launcher to get through to the ranks."""
    return [{**SLOW, "seconds": 0.25, "step": each} for each in range(step + 1, STEPS)]


@pytest.fixture
def deepspeed(launch: Launch, tmp_path: Path) -> Callable[..., Started]:
    """`launch` by the real `deepspeed` command, with two ranks on the CPU."""
    # The launcher shows its ranks the GPUs that they are to have; this hides them again.
    (tmp_path / "hiding").mkdir()
    (tmp_path / "hiding/sitecustomize.py").write_text("import os\nos.environ['CUDA_VISIBLE_DEVICES'] = ''\n")
    program = Path(sysconfig.get_path("scripts"), "deepspeed")
    starter = (str(program), "--num_gpus", "2", "--master_port", str(free_port()), "--module")
    hidden = {"PYTHONPATH": str(tmp_path / "hiding"), "DS_ACCELERATOR": "cpu"}

    def start(*words: object, environment: dict[str, str] | None = None, **how: Any) -> Started:
        return launch(*words, starter=starter, **how, environment={**(environment or {}), **hidden})

    return start


def launcher_below(command: Started) -> list[int]:
    """DeepSpeed's launcher on this node, once the `deepspeed` command has started it."""
    return [pid for pid in children(command.process.pid) if "deepspeed.launcher.launch" in command_line(pid)]


def test_run_handed_from_launcher_to_launcher_is_the_one_of_torchrun_alone(launch, deepspeed, sample_data, tmp_path):
    for name in ("deepspeed", "srun", "torchrun"):
        (tmp_path / name).mkdir()
    run_dir = tmp_path / "run"
    by_deepspeed = Life(deepspeed, tmp_path / "deepspeed", sample_data, None, run_dir)
    by_srun = Life(launch, tmp_path / "srun", sample_data, None, run_dir)
    by_torchrun = Life(launch, tmp_path / "torchrun", sample_data, 2, run_dir)

    # Ctrl-C at a terminal reaches both processes of the launcher and all ranks; and to these it sends SIGTERM, too.
    session = by_deepspeed.start(hold_at(5))
    by_deepspeed.wait_at(session, "forward-5")
    os.killpg(session.process.pid, signal.SIGINT)
    by_deepspeed.go_on("forward-5")
    session.wait()
    assert_all_gone(session)
    reason = status_of(run_dir)["reason"]
    assert reason in ("signal SIGINT", "signal SIGTERM")
    step = assert_stopped(run_dir, reason)

    # A rank of srun comes early, and waits for the first one for as long as another session takes.
    early = by_srun.start(hold_at(35), environment=task(1))

    # SIGTERM to the `deepspeed` command, which passes nothing on.
    session = by_deepspeed.start(hold_at(20), *slow_behind(20))
    by_deepspeed.wait_at(session, "forward-20")
    session.process.terminate()
    assert session.wait().status == -signal.SIGTERM
    by_deepspeed.go_on("forward-20")
    assert_all_gone(session)
    assert resumed_at(session) == step
    step = assert_stopped(run_dir, "the end of the launcher")

    # SIGTERM to every task, as from a scheduler. srun passes their statuses on.
    first = by_srun.start(hold_at(35), environment=task(0))
    by_srun.wait_at(first, "forward-35")
    for each in (first, early):
        each.process.terminate()
    by_srun.go_on("forward-35")
    assert [each.wait().status for each in (first, early)] == [75, 75], first.printed() + early.printed()
    assert early.printed() == "", "the first rank speaks for all"
    assert resumed_at(first) == step
    step = assert_stopped(run_dir, "signal SIGTERM")

    session = by_torchrun.start()
    assert session.wait().status == 0, session.printed()
    assert resumed_at(session) == step
    whole = reference(sample_data, *RUN, ranks=2)
    assert_same_model(run_dir, whole)
    assert_same_record(run_dir, whole)


@pytest.mark.whole
def test_deepspeeds_ranks_do_not_outlive_its_launcher_nor_the_command_that_started_that(
    deepspeed, sample_data, tmp_path
):
    life = Life(deepspeed, tmp_path, sample_data, None)
    session = life.start(hold_at(5), *slow_behind(5))
    life.wait_at(session, "forward-5")
    (launcher,) = launcher_below(session)
    os.kill(launcher, signal.SIGKILL)
    session.wait()
    life.go_on("forward-5")
    assert_all_gone(session)
    assert_stopped(life.run_dir, "the end of the launcher")
    shutil.rmtree(life.run_dir)

    # Before there are any ranks, to which it would mean nothing.
    session = life.start(SLOW)
    wait_until(session, lambda: launcher_below(session), "started its launcher")
    session.process.kill()
    session.wait()
    assert_all_gone(session)
    assert "the launcher is gone" in session.printed()
    assert not life.run_dir.exists()

    # While the first rank loads what it needs: it then waits for others that perhaps do not come.
    session = life.start(SLOW)
    wait_until(session, lambda: launcher_below(session) and children(launcher_below(session)[0]), "started a rank")
    os.kill(launcher_below(session)[0], signal.SIGTERM)
    session.wait()
    assert_all_gone(session)
    assert not life.run_dir.exists()


def nothing_pends(pid: int) -> bool:
    """Whether the process has taken all signals that were sent to it."""
    status = Path(f"/proc/{pid}/status").read_text()
    return re.findall(r"^S(?:ig|hd)Pnd:\s*(\w+)$", status, flags=re.M) == ["0" * 16] * 2


def test_second_ctrl_c_leaves_at_once_though_the_launcher_sends_sigterm_after_the_first(launch, sample_data, tmp_path):
    life = Life(launch, tmp_path, sample_data, None)
    session = life.start({"at": "forward", "step": 8, "do": "hold"})
    life.wait_at(session, "forward-8")
    for number in (signal.SIGINT, signal.SIGTERM):
        session.process.send_signal(number)
        wait_until(session, lambda: nothing_pends(session.process.pid), "told")
        time.sleep(0.5)
        assert session.process.poll() is None
    session.process.send_signal(signal.SIGINT)
    assert session.wait().status == 130, session.printed()


@pytest.mark.parametrize("by_another_run", [True, False])
def test_ranks_whose_port_is_taken_say_so_and_do_not_disturb_who_has_it(launch, sample_data, tmp_path, by_another_run):
    life = Life(launch, tmp_path, sample_data, None)
    with ExitStack() as stack:
        if by_another_run:
            store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            port, before = store.port, store.num_keys()
            other = PrefixStore(f"{os.getpid()}.7", store)  # the same job's step 7
        else:  # who takes the call and says nothing
            port = stack.enter_context(socket.create_server(("", 0))).getsockname()[1]
        first, second = (life.start(environment=task(rank, MASTER_PORT=str(port))) for rank in range(2))
        assert_only_one_line_is_said(first.wait(), f"127.0.0.1:{port}", "choose another port")
        if by_another_run:
            wait_until(second, lambda: store.num_keys() > before, "at the port")
            assert other.add("came", 0) == 0
        second.process.terminate()  # as the launcher does
        began = time.monotonic()
        assert second.wait().status in (75, -signal.SIGTERM)
        assert time.monotonic() - began < SECONDS
    assert not life.run_dir.exists()


def listening(pid: int) -> set[str]:
    """The addresses at which a process can be reached over the network, as the kernel writes them."""
    own = {str(each.readlink()) for each in Path(f"/proc/{pid}/fd").iterdir()}
    found = set()
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == "0A" and f"socket:[{inode}]" in own:
                found.add(local.partition(":")[0])
    return found


def test_ranks_of_one_machine_can_be_reached_from_no_other(launch, sample_data, tmp_path):
    life = Life(launch, tmp_path, sample_data, None)
    port = str(free_port())
    second = life.start(environment=task(1, MASTER_PORT=port))
    first = life.start(hold_at(2), environment=task(0, MASTER_PORT=port))
    life.wait_at(first, "forward-2")
    loopback = "0100007F"
    assert [listening(each.process.pid) for each in (first, second)] == [{loopback}, {loopback}]


def test_a_shell_in_one_task_of_srun_hears_whom_its_command_waits_for_and_how_to_run_alone(
    launch, sample_data, tmp_path
):
    life = Life(launch, tmp_path, sample_data, None)
    session = life.start(environment=task(0, 4))
    wait_until(session, lambda: "rank 0 waits: only 1 of 4 ranks came to meet" in session.printed(), "told")
    step = f"{os.getpid()}.0"
    assert f"a task of SLURM's step {step}, which has 4 tasks" in session.printed()
    assert "begin the command with: env -u SLURM_STEP_ID" in session.printed()
    session.process.terminate()
    assert session.wait().status == 75 and not life.run_dir.exists()
    alone = {name: text for name, text in task(0, 4).items() if name != "SLURM_STEP_ID"}
    assert seen_by_a_process(**alone)["ranks"] == [0, 0, 1, 1]


def seen_by_a_process(**environment: str) -> dict[str, Any]:
    """The ranks and variables of a process that is started in such surroundings."""
    code = (
        "import json, os; from training.base.environment import adopt_srun_task, read_ranks;"
        "adopt_srun_task(); adopt_srun_task(); ranks = read_ranks();"
        "numbers = [ranks.rank, ranks.local_rank, ranks.world_size, ranks.local_world_size];"
        "names = 'MASTER_ADDR', 'MASTER_PORT', 'OMP_NUM_THREADS';"
        "seen = {name: os.environ.get(name) for name in names};"
        "print(json.dumps({'ranks': numbers, 'launched': ranks.launched, **seen}))"
    )
    usual = {name: text for name, text in usual_environment().items() if not name.startswith(("SLURM_", "OMP_"))}
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=usual | environment, capture_output=True)
    assert result.returncode == 0, result
    return json.loads(result.stdout)


def test_srun_step_of_several_tasks_makes_ranks_and_nothing_else_does():
    step = {"SLURM_STEP_TASKS_PER_NODE": "4(x2),3", "SLURM_STEP_NODELIST": "gpu[07-08],login1", "SLURM_GTIDS": "8,9,10"}
    last = seen_by_a_process(**task(10, 11, **step, SLURM_LOCALID="2", SLURM_NODEID="2", SLURM_CPUS_PER_TASK="6"))
    assert last["ranks"] == [10, 2, 11, 3] and not last["launched"]
    assert (last["MASTER_ADDR"], last["OMP_NUM_THREADS"]) == ("gpu07", "6")

    first, second = (seen_by_a_process(**task(rank)) for rank in range(2))
    assert second["ranks"] == [1, 1, 2, 2]
    assert second["MASTER_ADDR"] == "127.0.0.1" and second["OMP_NUM_THREADS"] == "1"
    assert first["MASTER_PORT"] == second["MASTER_PORT"]
    others = [{"SLURM_STEP_ID": "1"}, {"SLURM_JOB_ID": str(os.getpid() + 1)}]
    assert len({seen_by_a_process(**task(0, **other))["MASTER_PORT"] for other in ({}, *others)}) == 3
    told = seen_by_a_process(**task(1, MASTER_ADDR="10.0.0.7", MASTER_PORT="2345"))
    assert (told["MASTER_ADDR"], told["MASTER_PORT"]) == ("10.0.0.7", "2345")

    plain = {
        "ranks": [0, 0, 1, 1],
        "launched": False,
        **dict.fromkeys(("MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")),
    }
    assert seen_by_a_process(**task(0, 1)) == plain
    batch = {name: text for name, text in task(0).items() if "STEP" not in name}
    assert seen_by_a_process(**batch) == plain
    # A batch script that a task has submitted keeps the variables of that step.
    assert seen_by_a_process(**task(0, SLURM_GTIDS="0")) == plain

    torchrun = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
    below = seen_by_a_process(**task(1), **torchrun)
    assert below["ranks"] == [5, 1, 8, 4] and below["launched"] and below["MASTER_ADDR"] is None


def test_deepspeeds_hostfile_of_several_nodes_makes_ranks():
    node = {"CROSS_RANK": "1", "CROSS_SIZE": "3", "LOCAL_SIZE": "4", "MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "29500"}
    seen = seen_by_a_process(**node, RANK="6", LOCAL_RANK="2", WORLD_SIZE="12")
    assert seen["ranks"] == [6, 2, 12, 4] and seen["launched"]
    assert (seen["MASTER_ADDR"], seen["OMP_NUM_THREADS"]) == ("10.0.0.7", "1")


def test_local_rank_is_a_launchers_word_and_no_users(monkeypatch):
    words = ["--run_dir", "run", "--data", "data"]
    expected, _ = parse(GPTConfig, words, prog="", about="")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(UserError, match="there is no key local_rank"):
        parse(GPTConfig, ["--local_rank=1", *words], prog="", about="")
    monkeypatch.setenv("LOCAL_RANK", "1")  # alone it may be anybody's
    with pytest.raises(UserError, match="there is no key local_rank"):
        parse(GPTConfig, ["--local_rank=1", *words], prog="", about="")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert parse(GPTConfig, ["--local_rank=1", *words], prog="", about="")[0] == expected
    for other in (["--local_rank=2"], ["--local_rank", "1"], ["--local_ranks=1"]):
        with pytest.raises(UserError, match="there is no key local_rank"):
            parse(GPTConfig, [*other, *words], prog="", about="")
    assert without_local_rank(["--local_rank=1", "runs/a", "--beam_size", "5"]) == ["runs/a", "--beam_size", "5"]


@pytest.mark.parametrize("data", [PAIRS, CONVERSATIONS])
def test_evaluation_takes_the_launchers_word_too(launch, tmp_path, data):
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    (tmp_path / "none").mkdir()
    (tmp_path / "none/data.json").write_text(json.dumps({"format": data}))
    words = ("--local_rank=0", tmp_path / "none")
    result = launch(*words, module="training.evaluation.evaluate", environment=alone).wait()
    assert_only_one_line_is_said(result, str(tmp_path / "none"))
