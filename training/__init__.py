"""The training scripts, each readable from top to bottom, and what they share."""

import sys
from importlib.util import find_spec

from training.base.environment import set_thread_defaults

if find_spec("pydantic_core") is None:  # every program here needs it
    sys.exit(f"error: {sys.executable} has none of the packages that this needs: run `source launch/setup.sh` first")

set_thread_defaults()  # here and not in a main: OpenMP reads them once, when a script's imports load torch
