"""The processes of a run: device, process group, and the few collectives that the engine uses.

The device's own backend (NCCL) carries gradients; small decisions of the host travel over gloo, so that asking "does
any rank want to stop?" never waits for queued work of the GPU.
"""

from __future__ import annotations

import datetime
import hashlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from pydantic import ConfigDict, TypeAdapter
from torch import Tensor, nn

from training.base.console import PeerError, UserError, counted, say_as_any_rank
from training.base.environment import (
    LAUNCHER_GONE,
    Ranks,
    gpus_of_node,
    keep_freed_memory,
    meeting_place,
    read_ranks,
    torchrun_restarts,
    watching_launcher,
    why_not_alone,
)
from training.base.network import listening_socket

T = TypeVar("T")
Result = TypeVar("Result")


class Watcher:
    """Who watches over a rank. This one does nothing; see `training.engine.watchdog`."""

    def beat(self, doing: str, slow: bool = False) -> None:
        """A sign of life. All ranks give equally many, at the same places.

        doing: what the rank begins with. slow: whether that may take much longer than a step.
        """

    def may_write(self) -> None:
        """To be called once the run folder is this run's own: how it ends may be written there."""

    def paused_s(self) -> float:
        """For how long this process has stood still so far."""
        return 0.0


# How long the ranks wait for each other: until all have come, and in a collective where nobody watches over them.
PATIENCE_S = 600.0

# How long torchrun may take to answer its ranks, which it does in milliseconds. Torch gives up after twice that.
_LAUNCHER_ANSWERS_S = 10.0

# How long a rank that ends with an error tries to find out whether another has announced it.
_ERROR_PATIENCE_S = 5.0

# How often a rank that waits for the others, without torchrun, looks whether that still makes sense; and after how long
# the first one says that it waits, unless a launcher has started the others, too.
_LOOK_EVERY_S = 0.25
_SAID_AFTER_S = 3.0

# What gloo and NCCL say when the process at the other end is gone.
_PEER_IS_GONE = (
    "connection closed by peer",
    "connection reset by peer",
    "broken pipe",
    "timed out waiting",
    "remote process exited",
    "nccl communicator was aborted",
    "watchdog caught collective operation timeout",
)


class Cluster:
    """A context: the process group exists inside it and is taken down at its end.

    An error that only means that another rank is gone leaves the context as `PeerError`.
    """

    def __init__(self, timeout_s: float = PATIENCE_S, *, deterministic: bool = False) -> None:
        """timeout_s: how long a rank waits for the others in a collective before it gives up, by the clock: a pause of
        all of them counts. deterministic: use only kernels that give the same bits every time.
        """
        if deterministic:
            # cuBLAS has one order of sums only with this, and torch looks once, at the first product on a GPU.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        self.timeout = datetime.timedelta(seconds=timeout_s)
        self.ranks: Ranks = read_ranks()
        # Looked up before the ranks meet: if they do, this was their launcher and not a process that adopts orphans.
        self.launcher = watching_launcher()
        self.device = self._own_device()
        self.watcher = Watcher()
        self._control: dist.ProcessGroup | None = None
        self._store: dist.Store | None = None

    @property
    def rank(self) -> int:
        return self.ranks.rank

    @property
    def world_size(self) -> int:
        return self.ranks.world_size

    @property
    def is_first(self) -> bool:
        return self.ranks.rank == 0

    def _own_device(self) -> torch.device:
        if not torch.cuda.is_available():
            return torch.device("cpu")
        seen = torch.cuda.device_count()
        present = max(seen, gpus_of_node() or 0)
        if self.ranks.local_world_size > present:
            raise UserError(
                f"{self.ranks.local_world_size} processes on this node but {present} GPUs: start {present} on it "
                f"(torchrun --nproc-per-node={present}, deepspeed --num_gpus {present}, "
                f"srun --ntasks-per-node={present}); each process needs a GPU of its own",
                speaks=self.ranks.local_rank == 0,
            )
        return torch.device("cuda", self.ranks.local_rank % seen)  # srun may show each task its own only

    def __enter__(self) -> Cluster:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        else:
            keep_freed_memory()
        if self.world_size > 1:
            with _naming_lost_peers():  # another rank may have left already, with an error of its own
                self._meet("nccl" if self.device.type == "cuda" else "gloo")
                self._control = dist.new_group(backend="gloo", timeout=self.timeout)
        return self

    def _meet(self, backend: str) -> None:
        if self.ranks.local_world_size == self.world_size and "lo" in (name for _, name in socket.if_nameindex()):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # nobody on the network has business with them
        if self.launcher is not None and self.launcher.keeps_store:
            # torchrun keeps the store through which ranks find each other, and has it ready before it starts them. If
            # it has been killed since, torch would try to reach it for as long as a collective may take.
            try:
                store, _, _ = next(dist.rendezvous("env://", timeout=datetime.timedelta(seconds=_LAUNCHER_ANSWERS_S)))
            except RuntimeError as error:
                raise PeerError("the launcher does not answer, it was probably killed; nothing was done") from error
        else:
            store = self._first_ranks_store()
        store.set_timeout(self.timeout)
        self._store = store
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.world_size, timeout=self.timeout)

    def _first_ranks_store(self) -> dist.Store:
        """The store that the first rank keeps, once all ranks have come to it."""
        host, port, name = meeting_place(self.launcher)
        where = f"{host}:{port} (MASTER_ADDR, MASTER_PORT)"
        found: list[dist.Store | Exception] = []

        def reach() -> None:
            try:
                found.append(self._store_at(host, port))
            except Exception as error:
                found.append(error)

        # In a thread of its own, since torch is deaf to signals while it waits.
        reaching = threading.Thread(target=reach, daemon=True)
        reaching.start()
        looks = count(1)
        while not found:
            reaching.join(_LOOK_EVERY_S)
            self._check_waiting(next(looks), f"the first rank does not answer at {where}")
        (server,) = found
        if isinstance(server, Exception):
            if not self.is_first:
                raise PeerError(f"the first rank does not answer at {where}") from server
            raise UserError(
                f"the first rank cannot wait for the others at {where}, where perhaps another run does: choose another "
                "port (deepspeed --master_port N; with srun export MASTER_PORT=N)"
            ) from server
        store = dist.PrefixStore(name, server)
        try:
            came = store.add("came", 1)
            while came < self.world_size:
                self._check_waiting(next(looks), f"only {came} of {self.world_size} ranks came to meet at {where}")
                time.sleep(_LOOK_EVERY_S)
                came = store.add("came", 0)
        except RuntimeError as error:
            raise PeerError(f"lost contact to the first rank at {where}") from error
        return store

    def _store_at(self, host: str, port: int) -> dist.TCPStore:
        """The store at an address; the first rank serves it there and at no other address of its machine."""
        how: dict[str, Any] = {"is_master": self.is_first, "timeout": self.timeout, "wait_for_workers": False}
        if self.is_first:
            # Of a name that many systems give their own loopback, other nodes mean another address.
            meant = listening_socket(host, port, from_elsewhere=self.ranks.local_world_size < self.world_size)
            how["master_listen_fd"] = meant.detach()
        return dist.TCPStore(host, port, **how)

    def _check_waiting(self, looks: int, what: str) -> None:
        """Raises PeerError if the launcher is gone, or with `what` after too many looks.

        They count, not the clock, which goes on while all processes of a job are paused.
        """
        if self.launcher is not None and self.launcher.is_gone():
            raise PeerError(LAUNCHER_GONE)
        if looks * _LOOK_EVERY_S >= min(PATIENCE_S, self.timeout.total_seconds()):
            raise PeerError(what)
        if self.is_first and self.launcher is None and looks * _LOOK_EVERY_S == _SAID_AFTER_S:
            say_as_any_rank(f"rank {self.rank} waits: {what}; {why_not_alone()}")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        if not dist.is_initialized():
            return
        # After an error the peers may be gone: leave without waiting, the launcher takes them down.
        if kind is None:
            with _naming_lost_peers():
                dist.barrier(self._control)
        if isinstance(error, UserError) and error.speaks is None:
            error.speaks = self._claims_message(str(error))
        # NCCL waits for what is queued, which never comes to an end after an error of this rank alone.
        if self.device.type != "cuda" or kind is None or isinstance(error, UserError):
            dist.destroy_process_group()
        if error is not None and means_lost_peer(error):
            raise peer_error(error) from error

    def _claims_message(self, message: str) -> bool:
        """Whether this rank is the first to announce the error: some happen to one rank alone, others to all."""
        if self._store is None:
            return self.is_first
        name = hashlib.sha256(message.encode()).hexdigest()
        try:
            self._store.set_timeout(datetime.timedelta(seconds=_ERROR_PATIENCE_S))
            return self._store.add(f"announced/{torchrun_restarts()}/{name}", 1) == 1
        except RuntimeError:  # the store has gone with whoever kept it
            return True

    def on_first(self, work: Callable[[], T]) -> T | None:
        """Runs `work` on the first rank while the others wait; they get None.

        A UserError there ends every rank, so that it is reported once and nobody waits for the one that left.
        """
        result: T | None = None
        error: UserError | None = None
        if self.is_first:
            try:
                result = work()
            except UserError as raised:
                error = raised
                error.speaks = True
        (failed,) = self.maximum([error is not None])
        if failed:
            raise error or UserError("the first rank stopped with an error", speaks=False)
        return result

    def own_part(self, items: Sequence[T]) -> Sequence[T]:
        """This rank's part of a list: every world-size-th item."""
        return items[self.rank :: self.world_size]

    def shared_out(
        self, items: Sequence[T], work: Callable[[Sequence[T]], list[Result]], *, per_rank: int, kind: Any
    ) -> list[Result]:
        """The result of every item, in order, on every rank. work(own items): as many results, in their order.

        The ranks meet whenever each has done `per_rank` items, so that none waits long for the others in a collective.
        kind: the type of a result, see `gather`.
        """
        results: list[Result] = []
        for start in range(0, len(items), per_rank * self.world_size):
            block = items[start : start + per_rank * self.world_size]
            parts = self.gather(work(self.own_part(block)), list[kind])
            results += [parts[place % self.world_size][place // self.world_size] for place in range(len(block))]
        return results

    def computed_apart(self, inputs: Sequence[Tensor], work: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
        """`work` of every tensor on this rank's device, in order, on every rank; it keeps their shapes and types.

        Each is computed by one rank, before the first comes, and sent to the others when it is asked for.
        """
        own = {place: work(inputs[place]) for place in range(self.rank, len(inputs), self.world_size)}
        for place, tensor in enumerate(inputs):
            result = own.pop(place) if place in own else torch.empty_like(tensor)
            if self.world_size > 1:
                dist.broadcast(result, place % self.world_size)
            yield result

    def sum(self, values: Tensor) -> Tensor:
        """Sum over ranks of a tensor on this rank's device."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: T, kind: Any) -> list[T]:
        """Every rank's `value`, in order of rank, on every rank. For results of moderate size.

        kind: its type, as pydantic reads it. Values travel as JSON: a pickle that came over the network could run code.
        """
        if self.world_size == 1:
            return [value]
        adapter: TypeAdapter[list[T]] = TypeAdapter(list[kind], config=ConfigDict(ser_json_inf_nan="constants"))
        own = torch.frombuffer(bytearray(adapter.dump_json([value])), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        dist.all_gather(sizes, torch.tensor([len(own)]), group=self._control)
        longest = max(int(size) for size in sizes)
        texts = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.world_size)]
        dist.all_gather(texts, nn.functional.pad(own, (0, longest - len(own))), group=self._control)
        whole = (text[: int(size)].numpy().tobytes() for text, size in zip(texts, sizes, strict=True))
        return [each for text in whole for each in adapter.validate_json(text)]

    def gather_tensors(self, tensor: Tensor) -> list[Tensor]:
        """Every rank's `tensor`, in order of rank, on the first rank; the others get none.

        tensor: in host memory, of one shape and type on all ranks.
        """
        if self.world_size == 1:
            return [tensor]
        found = [torch.empty_like(tensor) for _ in range(self.world_size)] if self.is_first else []
        dist.gather(tensor, found or None, group=self._control)
        return found

    def maximum(self, values: Sequence[float]) -> list[float]:
        """Element-wise maximum over ranks of a few host numbers; the device is not involved."""
        if self.world_size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._control)
        return tensor.tolist()

    def __str__(self) -> str:
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        if self.world_size == 1:
            return f"one process on {name}, {counted(torch.get_num_threads(), 'thread')}"
        backend = "NCCL" if self.device.type == "cuda" else "gloo"
        threads = f", {counted(torch.get_num_threads(), 'thread')} each" if self.device.type == "cpu" else ""
        return f"{self.world_size} processes on {name} ({backend}){threads}"


def means_lost_peer(error: BaseException) -> bool:
    """Whether an exception says no more than that another rank is gone or does not answer."""
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _PEER_IS_GONE)


@contextmanager
def _naming_lost_peers() -> Iterator[None]:
    """Raises PeerError for an error that only means that another rank is gone."""
    try:
        yield
    except RuntimeError as error:
        if means_lost_peer(error):
            raise peer_error(error) from error
        raise


def peer_error(error: BaseException) -> PeerError:
    """The same in one line for people, of a library's long message."""
    said = str(error).splitlines()[0].rpartition("] ")[2].partition(". ")[0]
    return PeerError(f"lost contact to another rank, whose error is the cause ({said[:120]})")
