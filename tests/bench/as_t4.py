"""Runs a training on a larger GPU as much like on a T4 (sm_75) as that can: 15 GB, fp16, and only kernels a T4 has.

    python -m tests.bench.as_t4 training.qlora configs/qlora/qwen2.5-3b-t4x2.yaml ...

Whether it fits a T4 and whether fp16 holds can be seen so; how fast a T4 is cannot.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

import torch

from tests.support.t4_training import T4
from training.base.console import UserError, run_main
from training.engine import precision
from training.models import base_model

BYTES = 15e9


def main(words: Sequence[str] | None = None) -> int:
    if not torch.cuda.is_available():
        raise UserError("there is no GPU to stand in for a T4; tests/support/t4_training.py is what a CPU can do")
    module, *sys.argv[1:] = sys.argv[1:] if words is None else words  # a training reads the command line
    script = importlib.import_module(module)
    torch.cuda.set_per_process_memory_fraction(BYTES / torch.cuda.get_device_properties(0).total_memory)
    precision.gpu_of = base_model.gpu_of = lambda device: T4
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)
    return script.main()


if __name__ == "__main__":
    run_main(main)
