"""A run folder, opened: what kind of run it is, and what belongs to its weights."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NotRequired

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config
from torch import Tensor
from typing_extensions import TypedDict  # pydantic wants this one before Python 3.12

from training.base.console import UserError
from training.base.files import read_json
from training.data.conversations import FORMAT as CONVERSATIONS
from training.data.prepared import FORMAT as PAIRS
from training.data.prepared import PreparedFolder
from training.engine.checkpoint import Checkpoint
from training.engine.run_folder import keep_private
from training.engine.task import RunOptions
from training.engine.weights import Weights, check_run_folder

TRANSLATION, QLORA = "translation", "QLoRA"  # the kinds of runs
_KIND_BY_FORMAT = {PAIRS: TRANSLATION, CONVERSATIONS: QLORA}


@with_config(ConfigDict(extra="allow"))
class _Data(TypedDict):
    """What is read of a data.json, which may be a stranger's."""

    format: str
    fingerprint: str
    files: dict[str, Any]
    options: NotRequired[dict[str, Any]]
    source: NotRequired[dict[str, Any]]
    tokenizer: NotRequired[dict[str, Any]]


_DATA: TypeAdapter[Any] = TypeAdapter(_Data)


def kind_of(run_dir: Path) -> str | None:
    """TRANSLATION or QLORA, by the format of the data it is trained on; None where its folder does not say.

    Several runs between commas are an ensemble, of translators.
    """
    if "," in str(run_dir) and not run_dir.exists():
        return TRANSLATION
    try:
        return _KIND_BY_FORMAT.get(read_json(run_dir / "data.json")["format"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


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

    def versions(self, *libraries: str) -> dict[str, str]:
        """Of Python and libraries, in training and, of these `libraries`, here."""
        return {
            **{f"{name}, training": found for name, found in self.checkpoint.manifest["versions"].items()},
            **{f"{name}, evaluation": version(name) for name in libraries},
            "python, evaluation": platform.python_version(),
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
    check_run_folder(run_dir)
    if not (run_dir / "data.json").is_file():
        raise UserError(f"{run_dir} is not a run folder: there is no data.json in it")
    checkpoints = wanted.choose(run_dir)
    state = wanted.read(checkpoints)
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
    try:
        data = _DATA.validate_python(read_json(run_dir / "data.json"))
    except (OSError, ValueError):
        raise UserError(
            f"{run_dir / 'data.json'} cannot be read: copy meta.json of its prepared data, {config.data}, there"
        ) from None
    return TrainedRun(run_dir, wanted, checkpoints, config, data), state
