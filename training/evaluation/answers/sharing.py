"""Long work shared by the ranks, so that none of them waits long for the others in a collective."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from training.engine.cluster import Cluster

Item = TypeVar("Item")
Result = TypeVar("Result")


def shared_out(
    cluster: Cluster, items: Sequence[Item], work: Callable[[Sequence[Item]], Sequence[Result]], *, per_rank: int
) -> list[Result]:
    """The result of every item, in order, on every rank. work(own items): as many results, in their order.

    The ranks meet whenever each has done `per_rank` items: that bounds how far apart they can drift.
    """
    results: list[Result] = []
    for start in range(0, len(items), per_rank * cluster.world_size):
        block = items[start : start + per_rank * cluster.world_size]
        shares = cluster.gather(list(work(cluster.share(block))))
        results += [shares[place % cluster.world_size][place // cluster.world_size] for place in range(len(block))]
    return results
