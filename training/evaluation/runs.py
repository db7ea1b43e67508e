"""A run folder, opened: what kind of run it is, which of its weights are wanted, and what belongs to them.

Promises: the weights have passed their checksums, and the mean of several is computed in double precision.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError
from torch import Tensor

from training.base.console import UserError
from training.base.files import nearest_folder, read_json
from training.data.conversations import FORMAT as CONVERSATIONS
from training.data.prepared import FORMAT as PAIRS
from training.data.prepared import PreparedFolder
from training.engine.checkpoint import Checkpoint, choose
from training.engine.run_folder import keep_private
from training.engine.task import RunOptions

TRANSLATION, QLORA = "translation", "QLoRA"  # the kinds of runs
_KIND_BY_FORMAT = {PAIRS: TRANSLATION, CONVERSATIONS: QLORA}


def kind_of(run_dir: Path) -> str | None:
    """TRANSLATION or QLORA, by the format of the data it is trained on; None where its folder does not say."""
    try:
        return _KIND_BY_FORMAT.get(read_json(run_dir / "data.json")["format"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


@dataclass(frozen=True)
class Weights:
    """Which weights of a run to use: of its best or last checkpoint, the mean of several, or the moving average.

    Written as `best`, `last`, `best:5` (mean of the five best), `last:5`, or `ema` (in the last checkpoint).
    """

    which: Literal["best", "last", "ema"] = "best"
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Weights:
        """Raises UserError for what is none of these."""
        found = re.fullmatch(r"(best|last)(?::([1-9]\d*))?|ema", text)
        if found is None:
            raise UserError(f"--checkpoint {text} is none of best, last, best:N, last:N (mean of N), ema")
        return cls(found[1] or "ema", int(found[2] or 1))  # type: ignore[arg-type]  # the pattern has only these

    def __str__(self) -> str:
        return self.which + (f":{self.count}" if self.count > 1 else "")

    def load(self, run_dir: Path) -> tuple[list[Checkpoint], dict[str, Tensor]]:
        """The checkpoints meant, the first one first, and the weights; raises UserError where the run lacks them."""
        if self.which == "ema":
            chosen = choose(run_dir, "last")
            return chosen, chosen[0].ema_state()
        chosen = choose(run_dir, self.which, self.count)
        weights = chosen[0].model_state()
        if self.count > 1:
            total = {name: tensor.double() for name, tensor in weights.items()}
            for checkpoint in chosen[1:]:
                for name, tensor in checkpoint.model_state().items():
                    total[name] += tensor
            weights = {name: (total[name] / self.count).to(tensor.dtype) for name, tensor in weights.items()}
        return chosen, weights


@dataclass(frozen=True)
class TrainedRun:
    """What is known of the weights of a run."""

    run_dir: Path
    weights: Weights
    checkpoints: list[Checkpoint]  # those that the weights are the mean of, one if they are no mean
    config: RunOptions
    data: dict[str, Any]  # meta.json of the data that the run is trained on

    @property
    def checkpoint(self) -> Checkpoint:
        """The first of `checkpoints`."""
        return self.checkpoints[0]

    @property
    def step(self) -> int:
        """Optimizer steps that the weights have seen; of a mean, the first's of its checkpoints."""
        return self.checkpoint.step

    def about(self, data: PreparedFolder, part: str, label: str) -> dict[str, Any]:
        """What every evaluation of these weights on a part of `data` says of itself."""
        return {
            "label": label,
            "task": self.checkpoint.manifest["task"],
            "part": part,
            "synthetic": bool(data.meta.get("synthetic")),
            "data_fingerprint": data.fingerprint,
            "step": self.step,
            "weights": str(self.weights),
            "checkpoints": [checkpoint.step for checkpoint in self.checkpoints],
        }

    def is_trained_on(self, data: PreparedFolder) -> bool:
        """Whether `data` has the very content that the run is trained on."""
        return data.fingerprint == self.checkpoint.manifest["data"]["fingerprint"]

    def data_folder(self, named: Path | None) -> Path:
        """The data to score on: `named`, or else what the run is trained on; raises UserError if that is gone."""
        if named is None and not self.config.data.is_dir():
            raise UserError(
                f"{self.run_dir} was trained on the data in {self.config.data}, and there is no such folder here: name "
                "where it is now, or a data set that was prepared with the same tokenizer, with --data FOLDER"
            )
        return named or self.config.data


def open_run(
    run_dir: str | Path, weights: str, configs: Mapping[str, type[RunOptions]], *, what: str
) -> tuple[TrainedRun, dict[str, Tensor]]:
    """A run of one of the trainings in `configs`, and its weights. weights: see `Weights`; what: such runs do.

    Raises UserError when the folder is no such run or has no valid checkpoint.
    """
    run_dir, wanted = Path(run_dir), Weights.parse(weights)
    if not run_dir.is_dir():
        near = nearest_folder(run_dir)
        raise UserError(f"there is no run folder {run_dir}{near}; a run is made by one of the training scripts")
    if not (run_dir / "checkpoints").is_dir() or not (run_dir / "data.json").is_file():
        raise UserError(f"{run_dir} is not a run folder: data.json and checkpoints/ are expected in it")
    checkpoints, state = wanted.load(run_dir)
    manifest = checkpoints[0].manifest
    if manifest["task"] not in configs:
        known = " and ".join(f"training.{name}" for name in configs)
        raise UserError(f"{run_dir} holds a {manifest['task']} model; only those of {known} {what}")
    try:
        config = configs[manifest["task"]].model_validate(manifest["config"])
    except ValidationError as error:
        keys = ", ".join(".".join(map(str, detail["loc"])) for detail in error.errors())
        raise UserError(
            f"{checkpoints[0].folder} was written by another version: its config differs in {keys}"
        ) from None
    if config.private:
        keep_private(run_dir)
    data = read_json(run_dir / "data.json")
    return TrainedRun(run_dir, wanted, checkpoints, config, data), state
