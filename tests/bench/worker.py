"""A process that works for a bench when it is asked: `python -m tests.bench.worker MODULE FUNCTION WORD...`.

It does what FUNCTION of MODULE returns when it is called with the words: see `start_worker` in common.py.
"""

from __future__ import annotations

import importlib
import sys

from tests.bench.common import serve
from training.base.console import run_main


def main() -> None:
    module, function, *words = sys.argv[1:]
    serve(getattr(importlib.import_module(module), function)(*words))


if __name__ == "__main__":
    run_main(main)
