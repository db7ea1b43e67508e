"""`tests.faulty_training`, for a launcher that reads a training's options from its module: tests/test_kaggle.py."""

from __future__ import annotations

import sys

import training.gpt as gpt
from launch.console import run_main


class PacedConfig(gpt.GPTConfig):
    """The GPT's options, unchanged."""


if __name__ == "__main__":
    from tests.faulty_training import _Traps

    _Traps().set()
    sys.argv[0] = gpt.__file__
    run_main(gpt.main)
