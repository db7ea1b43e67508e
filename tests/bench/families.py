"""Every family of chat models that is known to work, through all that a run goes through.

Small random models of each family's true structure (tests/support/families.py), in 4 bits: dry run, training on two
ranks, a kill, an end that is bit-equal to an uninterrupted run's, evaluation, adapters exported, merged. Exports
compare logits with the run's before they appear. `estimate_error`: of the memory of a step, estimated and measured.

`--families gemma2,glm4` are some; --quick takes three. A family that fails is named with what failed, and not counted.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from _pytest.outcomes import Failed

from tests.bench.common import Figure, read_arguments, report
from tests.support.commands import launching
from tests.support.families import FAMILIES, estimate_error, live_through
from tests.support.once import make_shared_folder, remove_shared_folder
from training.base.console import UserError, run_main, say, warn

QUICK = ("gemma2", "llama3", "qwen3")


def add_more(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--families", help="names with commas between them (default: all, with --quick three)")


def main(words: Sequence[str] | None = None) -> int:
    arguments = read_arguments("families", __doc__, words, add_more)
    some = arguments.more.families
    names = some.split(",") if some else arguments.sized(whole=list(FAMILIES), quick=list(QUICK))
    if unknown := set(names) - set(FAMILIES):
        raise UserError(f"--families {','.join(sorted(unknown))}: there are {', '.join(FAMILIES)}")
    errors: dict[str, float] = {}
    make_shared_folder()
    try:
        for name in names:
            began = time.monotonic()
            with tempfile.TemporaryDirectory(prefix="relay-bench-") as folder, launching(Path(folder)) as launch:
                try:
                    live_through(name, launch, Path(folder))
                    error = estimate_error(name, Path(folder))
                except (AssertionError, Exception, Failed) as failure:
                    said = traceback.format_exception_only(failure)[-1].strip()
                    warn(f"{name} failed: {said}")
                    continue
            errors[name] = error
            say(f"{name}: killed, ended bit-equal, exported; estimate {error:+.1%} ({time.monotonic() - began:.0f} s)")
    finally:
        remove_shared_folder()
    worst = max(map(abs, errors.values()), default=float("nan"))
    figures = [
        Figure("families", len(errors), f"of {len(names)} trained, killed, ended bit-equal, exported", "10"),
        Figure("estimate_error", worst, "the worst of them, estimated against measured", "0.1"),
    ]
    report("families", arguments, figures, failed=sorted(set(names) - set(errors)), estimate_errors=errors)
    return 0 if len(errors) == len(names) else 1


if __name__ == "__main__":
    run_main(main)
