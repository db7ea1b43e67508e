"""What a rank's host memory comes to while a base model is loaded in 4 bits, whole or spread under ZeRO 3.

    torchrun --standalone --nproc-per-node=4 -m tests.support.zero_loading FOLDER [--whole]

Prints a JSON object: by how many bytes the first rank's memory grew at the most. Counted is what no file stands behind:
pages of the mapped weights are given back whenever the system wants them.
"""

from __future__ import annotations

import gc
import json
import sys
import threading
from pathlib import Path

import torch

from training.engine import cluster as cluster_module
from training.engine.cluster import Cluster
from training.engine.zero import Spreading, ZeroOptions
from training.evaluation.exports.merging import give_memory_back
from training.models.base_model import QuantisationOptions, load_base_model, on_meta, read_config


def anonymous_bytes() -> int:
    """This process's own memory, of which no file has a copy."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


class Peak:
    """The most of `anonymous_bytes` inside a with block, above what there was; looked at every millisecond."""

    bytes = 0

    def __enter__(self) -> Peak:
        gc.collect()
        self._before = anonymous_bytes()
        self._done = threading.Event()
        self._watch = threading.Thread(target=self._look)
        self._watch.start()
        return self

    def _look(self) -> None:
        while not self._done.wait(0.001):
            self.bytes = max(self.bytes, anonymous_bytes() - self._before)

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._watch.join()


def main() -> None:
    folder, whole = Path(sys.argv[1]), "--whole" in sys.argv
    # On a CPU a training keeps what it frees, which would hide what it needs.
    cluster_module.keep_freed_memory = lambda: None
    give_memory_back()
    with Cluster() as cluster:
        import peft  # noqa: F401  # libraries are no part of the model
        import transformers

        transformers.utils.logging.set_verbosity_error()
        quantisation = QuantisationOptions()
        published = sum(each.nbytes for each in on_meta(read_config(folder, quantisation), torch.bfloat16).parameters())
        take = None if whole else Spreading(ZeroOptions(stage=3), cluster).take
        with Peak() as peak:
            load_base_model(folder, quantisation, torch.bfloat16, cluster.device, take)
        if cluster.is_first:
            print(json.dumps({"peak": peak.bytes, "published": published}), flush=True)


if __name__ == "__main__":
    main()
