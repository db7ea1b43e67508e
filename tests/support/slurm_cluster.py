"""A real SLURM on this machine: a controller and two nodes, each with a name of its own, where root may set it up.

The nodes are two `slurmd` on one machine, each in a UTS namespace, since programs ask for the host's name to find out
where they are. They share disk, loopback and cores, so neither a slow file system nor a broken link can be tried here.
Every pytest worker has a cluster of its own.
"""

from __future__ import annotations

import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.support.commands import PATIENCE_S, ROOT, Result, usual_environment
from tests.support.debian import program
from tests.support.lives import RUN
from tests.support.runs import command_of, config_of
from tests.support.zygote import fork
from training.base.options import to_yaml

# slurm.conf: two nodes that claim more than there is; partitions whose jobs give way to those of `urgent`, some seconds
# after a warning or at once; and short times for everything that is long in practice. Time limits are looked at every
# 30 s, which cannot be set.
_CONF = """
ClusterName={name}
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
FirstJobId={first_job}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
MailProg=/bin/true
MpiDefault=none
ProctrackType={proctrack}
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
KillWait=20
SlurmdTimeout=10
ReturnToService=2
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=main Nodes=ALL Default=YES State=UP PriorityTier=10 GraceTime=5
PartitionName=abrupt Nodes=ALL State=UP PriorityTier=10 GraceTime=0
PartitionName=urgent Nodes=ALL State=UP PriorityTier=100 PreemptMode=OFF
"""

_CGROUP_CONF = """
CgroupPlugin=cgroup/v1
CgroupMountpoint=/sys/fs/cgroup
ConstrainCores=no
ConstrainDevices=no
ConstrainRAMSpace=no
ConstrainSwapSpace=no
"""

ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "BOOT_FAIL"}


class SlurmCluster:
    """A running SLURM; see `slurm_cluster`. nodes: their names. environment: for commands that are to speak to it."""

    def __init__(self, root: Path, number: int):
        self._root = root
        self.nodes = [f"relay{number}n{each}" for each in (1, 2)]
        self.environment = {**usual_environment(), "SLURM_CONF": str(root / "slurm.conf")}
        self.environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        addresses = {node: f"127.0.{number + 1}.{index + 1}" for index, node in enumerate(self.nodes)}
        port = _port_of(number)
        lines = [
            f"NodeName={node} NodeHostname=localhost NodeAddr={address} Port={port + 1 + index} CPUs=16 RealMemory=9000"
            for index, (node, address) in enumerate(addresses.items())
        ]
        _make_known(addresses)
        # Signals reach a step's tasks only, and nothing outlives a step, as on a real cluster, with a tree of processes
        # that the kernel keeps; without one SLURM goes by parents, and signals everybody.
        kept_by_kernel = os.access("/sys/fs/cgroup/freezer", os.W_OK)
        conf = _CONF.format(
            name=f"relay{number}",
            root=root,
            port=port,
            first_job=1000 * number + 1,  # from which a job's port follows, and all share this machine
            nodes="\n".join(lines),
            proctrack="proctrack/cgroup" if kept_by_kernel else "proctrack/linuxproc",
        )
        (root / "slurm.conf").write_text(conf)
        if kept_by_kernel:
            (root / "cgroup.conf").write_text(_CGROUP_CONF)
        for folder in ("state", *(f"spool-{node}" for node in self.nodes)):
            (root / folder).mkdir()

    def start(self) -> None:
        """Starts everything and waits until both nodes are idle."""
        key = self._root / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        files = [
            f"--{what}={self._root}/munge.{what.partition('-')[0]}" for what in ("key-file", "pid-file", "log-file")
        ]
        self._run_daemon("munged", "munged", "--force", "--foreground", f"--socket={self._root}/munge.socket", *files)
        self._wait(lambda: (self._root / "munge.socket").exists(), "munged", 30)
        self._run_daemon("slurmctld", "slurmctld", "-D")
        for node in self.nodes:
            self.start_node(node)

    def _run_daemon(self, name: str, *words: str) -> None:
        with (self._root / f"{name}.out").open("ab") as out:
            self._daemons[name] = subprocess.Popen(
                words, env=self.environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
            )

    def start_node(self, node: str) -> None:
        """Starts a node, a dead one too, and waits until it can take jobs."""
        named = 'echo "$0" > /proc/sys/kernel/hostname && exec slurmd -D -N "$0"'
        self._run_daemon(node, "unshare", "--uts", "bash", "-c", named, node)
        self._wait(lambda: self.ask("sinfo", "-h", "-n", node, "-p", "main", "-o", "%t").strip() == "idle", node, 60)

    def kill_node(self, node: str) -> None:
        """The sudden death of a node: SIGKILL to all that runs on it."""
        for pid in self._on_node(node):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._daemons[node].wait()

    def _on_node(self, node: str) -> list[int]:
        def namespace(pid: object) -> str | None:
            with suppress(OSError):
                return str(Path(f"/proc/{pid}/ns/uts").readlink())
            return None

        own = namespace(self._daemons[node].pid)
        assert own is not None and own != namespace("self"), f"{node} is not in a namespace of its own"
        return [int(each.name) for each in Path("/proc").glob("[0-9]*") if namespace(each.name) == own]

    def stop(self) -> None:
        """Ends all jobs and daemons."""
        for node in self.nodes:
            if node in self._daemons:
                with suppress(AssertionError):
                    self.kill_node(node)
        for daemon in reversed(self._daemons.values()):
            daemon.kill()
            daemon.wait()
        for node in self.nodes:
            for folder in sorted(Path("/sys/fs/cgroup/freezer").glob(f"slurm_{node}/**/"), reverse=True):
                with suppress(OSError):
                    folder.rmdir()

    # Jobs.

    def run(self, *words: object, environment: Mapping[str, str] | None = None) -> Result:
        """A command that finds this cluster, to its end."""
        around = {**self.environment, **(environment or {})}
        done = subprocess.run([*map(str, words)], cwd=ROOT, env=around, capture_output=True, text=True)
        return Result(done.returncode, done.stdout, done.stderr)

    def relay(self, *words: object, environment: Mapping[str, str] | None = None) -> Result:
        """`python -m launch.slurm words`, to its end."""
        around = {**self.environment, **(environment or {})}
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            # None of these variables counts in a start: PATH, SLURM's own, and what the jobs get.
            # Not by `commands.run`: what carries its mark ends with it, and jobs would inherit that.
            forked = fork("launch.slurm", [*map(str, words)], around, out, err, ranks=None)
            try:
                status = forked.wait(PATIENCE_S)
            finally:
                forked.kill()
            texts = [(file.seek(0), file.read().decode())[1] for file in (out, err)]
        return Result(status, *texts)

    def ask(self, *words: object) -> str:
        """What a command of SLURM prints; an error of it fails the test."""
        result = self.run(*words)
        if result.status:
            pytest.fail(f"{words} ended with {result.status}: {result.err}\n{self.logs()}")
        return result.out

    def submit(self, *words: object, environment: Mapping[str, str] | None = None) -> int:
        """sbatch; returns the job's number."""
        result = self.run("sbatch", "--parsable", *words, environment=environment)
        assert result.status == 0, result
        return int(result.out)

    def clear(self) -> None:
        """Cancels all jobs, brings dead nodes back, and waits until nothing runs."""
        self.ask("scancel", "--me")
        for node in self.nodes:
            if self._daemons[node].poll() is not None:
                self.start_node(node)
        self._wait(lambda: not self.ask("squeue", "--noheader", "--me"), "empty", PATIENCE_S)

    def state(self, job: int) -> str:
        """PENDING, RUNNING, COMPLETED and so on."""
        return self.ask("squeue", "-h", "-t", "all", "-j", job, "-o", "%T").strip()

    def about(self, job: int, key: str) -> str:
        """A value of `scontrol show job`, such as Restarts or ExitCode."""
        found = re.search(rf"\b{key}=(\S*)", self.ask("scontrol", "show", "job", job))
        assert found, key
        return found[1]

    def wait_for(self, job: int, *states: str, patience_s: float = PATIENCE_S) -> str:
        """Waits until the job is in one of these states, by default an end; returns which."""
        wanted = set(states) or ENDED
        self._wait(lambda: self.state(job) in wanted, f"job {job} in {wanted}", patience_s)
        return self.state(job)

    def _wait(self, condition: Callable[[], object], what: str, patience_s: float) -> None:
        end = time.monotonic() + patience_s
        while not condition():
            if time.monotonic() > end:
                pytest.fail(f"not {what} after {patience_s} s\n{self.logs()}")
            time.sleep(0.2)

    def logs(self) -> str:
        """The ends of the daemons' logs, for a failing test's message."""
        return "\n".join(
            f"== {path.name}\n{path.read_text('utf-8', 'replace')[-1500:]}"
            for path in sorted((*self._root.glob("*.log"), *self._root.glob("*.out")))
        )


def _port_of(number: int) -> int:
    """The controller's port; those of the nodes follow it."""
    return 20000 + 10 * number


def _make_known(addresses: Mapping[str, str]) -> None:
    """Lets the names resolve, for all users of this machine."""
    with Path("/etc/hosts").open("r+") as hosts:
        fcntl.flock(hosts, fcntl.LOCK_EX)
        known = hosts.read()
        hosts.write("".join(f"{address} {name}\n" for name, address in addresses.items() if f" {name}\n" not in known))


@contextmanager
def slurm_cluster(folder: Path) -> Iterator[SlurmCluster]:
    """A cluster for the block, beside others that run at the same time. Skips where there can be none."""
    for name in ("slurmctld", "slurmd", "munged", "sbatch"):
        program((name,), "slurmctld", "slurmd", "slurm-client", "munge")
    if os.getuid() != 0:
        pytest.skip("a SLURM of two nodes on one machine takes root")
    if subprocess.run(["unshare", "--uts", "true"], capture_output=True).returncode:
        pytest.skip("two nodes on one machine need a name each: `unshare --uts` (in Docker: run --privileged)")
    with _own_number() as number:
        cluster = SlurmCluster(folder, number)
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()


@contextmanager
def _own_number() -> Iterator[int]:
    """The first number that no other cluster on this machine has: names, addresses and ports follow from it."""
    for number in range(100):
        with Path(tempfile.gettempdir(), f"relay-tests-slurm-{number}.lock").open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", _port_of(number))) == 0:
                    continue  # of a test run that was killed
            yield number
            return
    pytest.fail("a hundred clusters run on this machine")


def write_config(folder: Path, data: Path) -> Path:
    """A config of `RUN` in `folder`/run, in a folder whose name says what trains it."""
    path = folder / "gpt/run.yaml"
    path.parent.mkdir()
    path.write_text(to_yaml(config_of(command_of(folder / "run", data, *RUN))))
    return path
