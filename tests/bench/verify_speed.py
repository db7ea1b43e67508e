"""How fast a checkpoint is verified, in GB/s: from memory and from the disk, against nothing but reading and hashing.

The checkpoint is that of 100 M parameters (1.3 GB); with --quick of 20 M. The peer reads the same files in blocks and
feeds them to SHA-256; less than that cannot be done to see that every byte is what was written.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch

from tests.bench.common import NO_RUN, Figure, ratio_by_rounds, read_arguments, report
from training.base.console import UserError, run_main
from training.base.files import drop_from_cache
from training.engine.checkpoint import Checkpoint, publish


def main(words: Sequence[str] | None = None) -> int:
    arguments = read_arguments("verify_speed", __doc__, words)
    parameters, rounds = arguments.sized(whole=(100_000_000, 5), quick=(20_000_000, 2), smoke=(1_000_000, 2))
    tensor = torch.arange(parameters, dtype=torch.float32)
    tensors = {
        "model.safetensors": {"weight": tensor},
        "optimizer.safetensors": {"exp_avg/weight": tensor + 1, "exp_avg_sq/weight": tensor + 2},
    }
    ours, cold, plain = [], [], []
    with tempfile.TemporaryDirectory(prefix="relay-bench-") as folder:
        checkpoint = publish(folder, 1, tensors, state={"scores": {}}, about=NO_RUN, keep=1)
        gigabytes = sum(path.stat().st_size for path in checkpoint.folder.iterdir()) / 1e9

        def speed(work: Callable[[], None]) -> float:
            began = time.monotonic()
            work()
            return gigabytes / (time.monotonic() - began)

        speed(lambda: verify(checkpoint.folder))  # brings the files into memory
        for _ in range(rounds):
            ours.append(speed(lambda: verify(checkpoint.folder)))
            plain.append(speed(lambda: read_and_hash(checkpoint.folder)))
        for _ in range(rounds):
            for path in checkpoint.folder.iterdir():
                drop_from_cache(path)
            cold.append(speed(lambda: verify(checkpoint.folder)))
    report(
        "verify_speed",
        arguments,
        [
            Figure("verify_gb_per_s", median(ours), "files in memory"),
            Figure("from_disk_gb_per_s", median(cold), "files on the disk"),
            Figure("plain_gb_per_s", median(plain), "reading and SHA-256 alone, files in memory"),
            Figure("verify_ratio", ratio_by_rounds(ours, plain), "verifying over reading and hashing"),
        ],
        gigabytes=round(gigabytes, 3),
    )
    return 0


def verify(folder: Path) -> None:
    problem = Checkpoint(folder).verify()
    if problem is not None:
        raise UserError(f"the checkpoint that was just written is damaged: {problem}")


def read_and_hash(folder: Path) -> None:
    for path in folder.iterdir():
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(1 << 18):
                digest.update(block)


if __name__ == "__main__":
    run_main(main)
