"""The weights of a run, for whoever needs nothing else of it: an evaluation, an export, a new run.

Promises: the weights have passed their checksums, and the mean of several is computed in double precision.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NotRequired

import torch
from pydantic import TypeAdapter
from torch import Tensor
from typing_extensions import TypedDict  # pydantic wants this one before Python 3.12

from training.base.console import UserError
from training.base.files import nearest_folder
from training.base.options import differing_keys
from training.engine.checkpoint import EMA, MODEL, Checkpoint, check_not_removed, checkpoints, choose
from training.engine.status import checkpoint_folder

ReadForeign = Callable[[Path], dict[str, Tensor] | None]


@dataclass(frozen=True)
class Weights:
    """Which weights of a run to use: of its best or last checkpoint, the mean of several, or the moving average.

    Written as `best`, `last`, `step-300`, `best:5` (mean of the five best), `last:5`, or `ema` (in the last
    checkpoint).
    """

    which: Literal["best", "last", "ema", "step"] = "best"
    count: int = 1  # of `step`: which one

    @classmethod
    def parse(cls, text: str) -> Weights:
        """Raises UserError for what is none of these."""
        found = re.fullmatch(r"(best|last)(?::([1-9]\d{0,3}))?|(step)-(\d{1,15})|ema", text)
        if found is None:
            raise UserError(f"{text!r} names no weights: best, last, step-N, best:N, last:N (mean of N) or ema does")
        return cls(found[1] or found[3] or "ema", int(found[2] or found[4] or 1))  # type: ignore[arg-type]  # no others

    def __str__(self) -> str:
        if self.which == "step":
            return f"step-{self.count}"
        return self.which + (f":{self.count}" if self.count > 1 else "")

    def choose(self, run_dir: Path) -> list[Checkpoint]:
        """The checkpoints meant, the first one first, verified; raises UserError where the run lacks them."""
        if self.which == "step":
            return [_of_step(run_dir, self.count)]
        return choose(run_dir, "last") if self.which == "ema" else choose(run_dir, self.which, self.count)

    def sums(self, chosen: Sequence[Checkpoint]) -> dict[int, str]:
        """By step, the SHA-256 of the file that the weights lie in."""
        name = EMA if self.which == "ema" else MODEL
        return {each.step: each.manifest["files"][name]["sha256"] for each in chosen}

    def read(self, chosen: Sequence[Checkpoint]) -> dict[str, Tensor]:
        """The weights, from what `choose` gave. Raises UserError where the run went on, and has removed some since."""
        try:
            return self._read(chosen)
        except FileNotFoundError:
            for checkpoint in chosen:
                check_not_removed(checkpoint)
            raise

    def _read(self, chosen: Sequence[Checkpoint]) -> dict[str, Tensor]:
        if self.which == "ema":
            return chosen[0].ema_state()
        weights = chosen[0].model_state()
        if len(chosen) > 1:
            total = {name: tensor.double() for name, tensor in weights.items()}
            for checkpoint in chosen[1:]:
                for name, tensor in checkpoint.model_state().items():
                    total[name] += tensor
            weights = {name: (total[name] / len(chosen)).to(tensor.dtype) for name, tensor in weights.items()}
        return weights


def _of_step(run_dir: Path, step: int) -> Checkpoint:
    found = Checkpoint(checkpoint_folder(run_dir, step))
    problem = found.verify() if found.folder.is_dir() else "there is none"
    if problem is not None:
        there = ", ".join(str(each.step) for each in checkpoints(run_dir)) or "none"
        aside = (
            " (one is set aside as damaged)" if found.folder.with_name(f"invalid-{found.folder.name}").exists() else ""
        )
        raise UserError(f"{run_dir} has no valid checkpoint of step {step}: {problem}{aside}; its steps are {there}")
    return found


def check_is_there(run_dir: Path) -> None:
    """Raises UserError unless there is such a folder."""
    if not run_dir.is_dir():
        near = nearest_folder(run_dir)
        raise UserError(f"there is no run folder {run_dir}{near}; a run is made by one of the training scripts")


_OTHER_KINDS = {
    "meta.json": "prepared data",
    "adapter_config.json": "an export of adapters",
    "config.json": "a model or an export",
}


def other_kind(folder: Path) -> str | None:
    """What a folder holds instead of a run, by its files; None where it is a run's, or nothing tells."""
    if (folder / "checkpoints").is_dir():
        return None
    return next((kind for name, kind in _OTHER_KINDS.items() if (folder / name).is_file()), None)


def check_run_folder(run_dir: Path) -> None:
    """Raises UserError unless the folder is that of a run."""
    check_is_there(run_dir)
    if not (run_dir / "checkpoints").is_dir():
        kind = other_kind(run_dir)
        instead = f", but {kind}" if kind else ""
        raise UserError(f"{run_dir} is not a run folder{instead}: there is no folder checkpoints in it")


# What a new run begins with.


class Origin:
    """Weights of another run, for the first step of a new one."""

    def __init__(self, text: str, read_foreign: ReadForeign):
        """text: RUN or RUN:WEIGHTS, see `Weights`, or a folder that read_foreign(folder) can read."""
        parts = text.split(":")  # a folder's name may have some, too
        splits = [(Path(":".join(parts[:count])), ":".join(parts[count:])) for count in range(len(parts), 0, -1)]
        self._run_dir, weights = next((each for each in splits if each[0].is_dir()), splits[-1])
        self._weights = weights or "best"
        self._read_foreign = read_foreign

    def find(self, about: Mapping[str, Any], shapes: Mapping[str, torch.Size]) -> dict[str, Any]:
        """What is to be said of the weights for good: their run, steps and SHA-256, and where that run's came from.

        about: the definition of the new run. shapes: of its model's weights. Raises UserError where there are no such
        weights, or with all in which the two runs differ and must not.
        """
        foreign = self._read_foreign(self._run_dir) if self._run_dir.is_dir() else None
        if foreign is not None:
            _check_fits(self._run_dir, about, foreign, about, shapes)
            return {"run": str(self._run_dir), "checkpoints": {}}
        weights = Weights.parse(self._weights)
        check_run_folder(self._run_dir)
        chosen = weights.choose(self._run_dir)
        manifest = chosen[0].manifest
        _check_fits(self._run_dir, manifest, weights.read(chosen[:1]), about, shapes)
        return {
            "run": str(self._run_dir),
            "weights": str(weights),
            "checkpoints": {str(step): sha256 for step, sha256 in weights.sums(chosen).items()},
            "data": manifest["data"],
            **_ancestors(manifest),
        }

    def read(self, found: Mapping[str, Any]) -> dict[str, Tensor]:
        """The weights that `find` found, on whatever rank."""
        if not found["checkpoints"]:
            return self._read_foreign(self._run_dir) or {}
        chosen = [Checkpoint(checkpoint_folder(self._run_dir, int(step))) for step in found["checkpoints"]]
        return Weights.parse(self._weights).read(chosen)


_MOST_ANCESTORS = 20


class Ancestor(TypedDict):
    """What a manifest says of the weights that a run began with; its own `init_from` of those before."""

    run: str
    checkpoints: dict[str, str]
    weights: NotRequired[str]
    data: NotRequired[dict[str, str]]


_ANCESTOR = TypeAdapter(Ancestor)


def ancestor(manifest: Mapping[str, Any]) -> Ancestor | None:
    """The run that a run began with, by its manifest, which may be a stranger's; None where it began with none."""
    found = manifest.get("init_from")
    try:
        return _ANCESTOR.validate_python(found) if found and len(str(found)) < 100_000 else None
    except (ValueError, RecursionError):
        return None


def _ancestors(manifest: Mapping[str, Any], most: int = _MOST_ANCESTORS) -> dict[str, Any]:
    found = ancestor(manifest) if most else None
    return {} if found is None else {"init_from": {**found, **_ancestors(manifest["init_from"], most - 1)}}


def _function(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a config that say what the weights compute."""
    groups = {key: dict(config[key]) for key in ("model", "lora") if isinstance(config.get(key), Mapping)}
    for group in groups.values():
        for key in ("dropout", "context", "max_length"):  # for training alone, or what the shapes tell
            group.pop(key, None)
    return groups


def _check_fits(
    run_dir: Path,
    manifest: Mapping[str, Any],
    state: Mapping[str, Tensor],
    about: Mapping[str, Any],
    shapes: Mapping[str, torch.Size],
) -> None:
    differences = []
    if manifest["task"] != about["task"]:
        differences.append(f"task: {manifest['task']} -> {about['task']}")
    for key in about["data"]:
        if key.endswith("tokenizer") and manifest["data"].get(key) != about["data"][key]:
            differences.append(f"the data's {key.replace('_', ' ')}")
    if manifest.get("built_on", {}) != about.get("built_on", {}):
        differences.append("the base model's weights")
    found = {name: tensor.shape for name, tensor in state.items()}
    before, now = (_function(config) for config in (manifest["config"], about["config"]))
    differences += differing_keys(before, now)
    if found != shapes:
        differing = sum(found.get(name) != shapes.get(name) for name in found.keys() | shapes.keys())
        differences.append(f"{differing} tensors in name or shape")
    if differences:
        raise UserError(
            f"--init_from: a new run cannot begin with the weights of {run_dir}, from which it differs in "
            f"{'; '.join(differences)}: give it what that run has, or begin without"
        )
