"""metrics.jsonl for TensorBoard, in the run folder's tensorboard/: every step once, whatever lay between sessions.

Each session writes one event file with all lines so far and then its own. It tells TensorBoard to forget what older
files said, and they are removed. A failure costs the run nothing.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from training.base.console import UserError, warn
from training.base.files import remove
from training.engine.status import numbers_of

FOLDER = "tensorboard"


class Board:
    """Shows a run in TensorBoard. One a session, on the first rank only."""

    def __init__(self, run_dir: Path, lines: Iterable[Mapping[str, Any]]):
        """lines: those of metrics.jsonl so far. Raises UserError where TensorBoard is not installed."""
        if find_spec("tensorboard") is None:
            raise UserError(
                "tensorboard is not installed: `pip install tensorboard==2.21.0`, or go without it by "
                "--log.tensorboard false"
            )
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        self._failed = False
        folder = run_dir / FOLDER
        if folder.is_symlink():  # it may lead to what nobody meant to write to
            folder.unlink()
        older = list(folder.glob("events.*"))
        try:
            # Nobody knows the file's name before it is there, so nobody can lay a link under it.
            self._writer = SummaryWriter(str(folder), purge_step=0, filename_suffix=f".{secrets.token_hex(8)}")
            for line in lines:
                self.add(line)
            self._writer.flush()
            for path in older:
                remove(path)
        except OSError as error:
            self._give_up(error)

    def add(self, line: Mapping[str, Any]) -> None:
        """Takes in a line; never raises. What is null there leaves a gap."""
        if self._failed:
            return
        try:
            for name, value in numbers_of(line).items():
                self._writer.add_scalar(name, value, line["step"], line["time"])
        except OSError as error:
            self._give_up(error)

    def close(self) -> None:
        """Writes what is still to be written."""
        try:
            if not self._failed:
                self._writer.close()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self._failed = True
        warn(f"TensorBoard's file cannot be written ({error}); the run goes on, and metrics.jsonl has everything")
