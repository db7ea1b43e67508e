"""Trains on Kaggle, kernel run after kernel run: a kernel is a notebook, and every version of it runs once.

    python -m launch.kaggle notebook CONFIG --owner ME --output DIR   a notebook to push or to upload by hand
    python -m launch.kaggle run CONFIG                                what that notebook runs, on Kaggle
    python -m launch.kaggle relay ...                                 pushes kernels until the run is finished

`python -m launch.kaggle VERB --help` has the rest.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from training.base.console import UserError, run_main


def main(argv: Sequence[str] | None = None) -> int:
    verb, *words = (sys.argv[1:] if argv is None else list(argv)) or [""]
    # Each is loaded only when it is asked for: a kernel run needs no client of Kaggle's, nor a relay torch.
    if verb == "notebook":
        from launch.kaggle.notebook import main as notebook_main

        return notebook_main(words)
    if verb == "run":
        from launch.kaggle.kernel_run import main as run_main_on_kaggle

        return run_main_on_kaggle(words)
    if verb == "relay":
        from launch.kaggle.relay import main as relay_main

        return relay_main(words)
    if verb in ("-h", "--help"):
        print(__doc__)
        return 0
    raise UserError(f"say what to do: notebook, run or relay (python -m launch.kaggle --help), got {verb!r}")


if __name__ == "__main__":
    run_main(main)
