"""Processes without the seconds that imports take: forked from one that has everything imported already.

What is forked is a process of its own, with its own session, signals, files and ranks; all that it lacks is the start
of an interpreter. A zygote has one thread, no process group and no GPU, which it checks before every fork; signal
handlers, umask, faulthandler, argv and environment are a new process's. Tests of what happens in a start (imports,
threads, memory, launchers, what hangs or is orphaned) start for real: `real=True` of `launch`.

One zygote of a kind serves all workers of a test run, started when first asked and gone when pytest is. Its children
have one hash seed: a result that depends on it would show only in real starts.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import fcntl
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

from tests.support.once import shared_folder

ROOT = Path(__file__).resolve().parents[2]

# The tests run on the CPU everywhere, one thread per process, since several processes run at once, and show nobody's
# wandb anything.
_OWN = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}


@cache
def usual_environment() -> Mapping[str, str]:
    """The variables that commands of the tests get: as they are when the first asks, whatever a test sets later."""
    return {**{key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}, **_OWN}


# What each kind has imported, beside what the kind before it has, from which it is forked. torch's optimizers import
# torch._dynamo when the first is made. Nothing that a command promises not to import belongs here, such as wandb.
KINDS = {
    "plain": [
        *("training", "torch", "torch.distributed", "torch._dynamo", "training.gpt", "training.seq2seq"),
        *("training.evaluation.evaluate", "data_prep.pairs"),
        *("datasets", "sacrebleu", "sklearn.model_selection", "sentencepiece", "opencc"),
    ],
    "chat": ["transformers", "peft", "bitsandbytes", "training.qlora", "data_prep.disc_law"],
    "deepspeed": ["deepspeed"],
}
_BEFORE = {"chat": "plain", "deepspeed": "chat"}
_CHAT = ("qlora", "answers", "adapters", "disc_law", "instructions", "conversations")

# Variables that count while a process runs; all others might have been read when something was imported.
_READ_LATE = ("ACCIDENTS", "KAGGLE_", "MASTER_", "RELAY_", "SLURM_", "STAGED_", "WANDB_", "RANKS")

# How long a launcher waits for its ranks to leave, as torchrun does.
_PATIENCE_S = 30


def can_fork(module: str, environment: Mapping[str, str]) -> bool:
    """Whether the process would be the same as one that is started anew."""
    return all(name.startswith(_READ_LATE) for name in environment)


def fork(
    module: str, words: Sequence[str], environment: Mapping[str, str], out: BinaryIO, err: BinaryIO, ranks: int | None
) -> Forked:
    """`python -m module words`, or so many ranks of it with their launcher; out, err: where they print."""
    return Forked(_kind_of(module, words), module, words, environment, out, err, ranks)


def _kind_of(module: str, words: Sequence[str]) -> str:
    """The zygote that has imported what the command needs."""
    if "deepspeed" in words or "zero" in module:
        return "deepspeed"
    about = Path(words[0], "data.json") if words else ROOT / "none"  # of a run that is evaluated
    data = json.loads(about.read_text(encoding="utf-8"))["format"] if about.is_file() else ""
    return "chat" if any(name in each for each in (module, *words[:1], data) for name in _CHAT) else "plain"


class Forked:
    """A process of a zygote, to be used as a `subprocess.Popen` is."""

    def __init__(
        self,
        kind: str,
        module: str,
        words: Sequence[str],
        environment: Mapping[str, str],
        out: BinaryIO,
        err: BinaryIO,
        ranks: int | None = None,
        cwd: Path = ROOT,
    ):
        folder = shared_folder()
        self._log = folder / f"{kind}.log"
        self._connection = _connect(folder, kind)
        request = {"module": module, "words": [*words], "ranks": ranks, "env": {**environment}, "folder": str(cwd)}
        socket.send_fds(self._connection, [json.dumps(request).encode()], [out.fileno(), err.fileno()])
        self.pid: int = self._answer(None)
        self.returncode: int | None = None

    def _answer(self, timeout: float | None) -> int:
        self._connection.settimeout(timeout)
        said = self._connection.recv(64)
        assert said, f"the zygote has ended: {self._log.read_text()}"
        return int(said)

    def poll(self) -> int | None:
        """Its exit status, or None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Waits for its end; raises TimeoutExpired."""
        if self.returncode is None:
            try:
                self.returncode = self._answer(timeout)
            except (TimeoutError, BlockingIOError):
                raise subprocess.TimeoutExpired("a forked process", timeout or 0) from None
            self._connection.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Sends it a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _connect(folder: Path, kind: str) -> socket.socket:
    """A connection to the zygote of this kind, which is started if there is none yet."""
    address = folder / f"{kind}.socket"
    with (folder / f"{kind}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not address.exists():
            controller = os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid()
            words = [kind, str(address), str(controller)]
            # Arrow's memory pool has a thread, which could hold a lock that nobody in a child would ever open.
            environment = {**usual_environment(), "JE_ARROW_MALLOC_CONF": "background_thread:false"}
            zygote: subprocess.Popen[bytes] | Forked
            with (folder / f"{kind}.log").open("wb") as log:
                if kind in _BEFORE:
                    zygote = Forked(_BEFORE[kind], __name__, words, environment, log, log)
                else:
                    command = [sys.executable, "-m", __name__, *words]
                    how = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, "start_new_session": True}
                    zygote = subprocess.Popen(command, env=environment, **how)
            while not address.exists():
                assert zygote.poll() is None, (folder / f"{kind}.log").read_text()
                time.sleep(0.02)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.connect(str(address))
    return connection


def _check() -> None:
    """That a child will be as fresh as a process that was started anew."""
    threads = [Path(path, "comm").read_text().strip() for path in Path("/proc/self/task").iterdir()]
    assert len(threads) == 1, f"the zygote has threads: {threads}"
    torch = sys.modules["torch"]
    assert not torch.distributed.is_initialized() and not torch.cuda.is_initialized()
    for number in signal.valid_signals():
        handler = signal.getsignal(number)
        assert not callable(handler) or handler is signal.default_int_handler, f"signal {number} is handled"
    assert not faulthandler.is_enabled()


def _serve(listener: socket.socket, controller: int) -> dict[str, Any]:
    """Forks what is asked for, and tells each client how its process has ended. Returns in the children only."""
    poller, children = select.poll(), dict[int, tuple[int, socket.socket]]()
    poller.register(listener, select.POLLIN)
    while True:
        for ready, _ in poller.poll(1000):
            if ready != listener.fileno():
                pid, client = children.pop(ready)
                poller.unregister(ready)
                os.close(ready)
                with contextlib.suppress(OSError):  # the client may be gone
                    client.send(str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])).encode())
                client.close()
                continue
            client, _ = listener.accept()
            message, files, _, _ = socket.recv_fds(client, 1 << 20, 2)
            _check()
            pid = os.fork()
            if pid == 0:
                for each in (listener, client, *(other for _, other in children.values())):
                    each.close()
                for each in children:
                    os.close(each)
                for number, file in zip((1, 2), files, strict=True):
                    os.dup2(file, number)
                    os.close(file)
                return json.loads(message)
            for file in files:
                os.close(file)
            client.send(str(pid).encode())
            ended = os.pidfd_open(pid)
            children[ended] = pid, client
            poller.register(ended, select.POLLIN)
        try:
            os.kill(controller, 0)
        except ProcessLookupError:
            os._exit(0)


def fork_ranks(count: int) -> None:
    """Returns in each of `count` ranks; this process becomes their launcher, as torchrun would be.

    With RANKS_LEFT_ALONE it is one that has not looked yet when a rank has failed: the others end by themselves.
    """
    import torch

    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    ranks: set[int] = set()
    for rank in range(count):
        pid = os.fork()
        if pid == 0:
            listener.close()
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
            os.environ |= {name: str(value) for name, value in names.items()}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
            os.environ |= {"TORCHELASTIC_RUN_ID": str(os.getppid()), "TORCHELASTIC_RESTART_COUNT": "0"}
            return
        ranks.add(pid)

    def end_all(number: int) -> None:
        for pid in ranks:
            with contextlib.suppress(ProcessLookupError):  # just waited for, and not struck off the list yet
                os.kill(pid, number)
        signal.alarm(_PATIENCE_S)

    status = 0

    def pass_on(number: int, frame: object) -> None:
        nonlocal status
        status = 1
        end_all(signal.SIGKILL if number == signal.SIGALRM else number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGALRM):
        signal.signal(number, pass_on)
    # Last, since it has threads.
    store = torch.distributed.TCPStore(
        "127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
    )
    while ranks:
        pid, ended = os.wait()
        ranks.discard(pid)
        if ended and not status:
            status = 1
            if "RANKS_LEFT_ALONE" in os.environ:
                signal.alarm(_PATIENCE_S)
            else:
                end_all(signal.SIGTERM)
    del store
    os._exit(status)


def _run(request: dict[str, Any]) -> None:
    """What `python -m module words...` would do in this environment."""
    os.setsid()
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["folder"])
    if request["ranks"] is not None:
        fork_ranks(request["ranks"])

    import numpy as np

    from training.base.environment import set_thread_defaults

    np.random.seed()
    set_thread_defaults()
    sys.argv = [request["module"], *request["words"]]
    # That the module is imported already, and run again by this name, is as in any `python -m`.
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="runpy")
    status: object = 0
    try:
        runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        status = end.code
    except Exception:
        sys.excepthook(*sys.exc_info())
        status = 1
    if not isinstance(status, int):
        raise SystemExit(status)
    # The end of an interpreter but for taking apart all modules, which would copy the zygote's whole memory.
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def main(kind: str, address: str, controller: str) -> None:
    for module in KINDS[kind]:
        importlib.import_module(module)
    from training.engine import surroundings

    for path in surroundings.computing_files():
        surroundings.digest_of(path)  # kept, as what is imported is
    gc.freeze()  # garbage collection in a child shall not touch, and so copy, what is here
    # A shell's background job comes with Ctrl-C ignored, one under nohup with SIGHUP.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(f"{address}.new")
    listener.listen(64)
    Path(f"{address}.new").rename(address)
    _run(_serve(listener, int(controller)))


if __name__ == "__main__":
    main(*sys.argv[1:])
