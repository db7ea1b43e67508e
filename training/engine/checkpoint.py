"""A checkpoint is published or it does not exist.

It is written to a temporary folder, brought to the disk, and renamed; the manifest, written last, holds the size and
SHA-256 of every other file. On loading the manifest is checked first: a checkpoint that fails is set aside with a
message and the newest valid one before it is taken. Which checkpoint is newest or best follows from what is in the
folder; no pointer file can lie about it. Loading runs no code: tensors are safetensors, everything else is JSON.

    runs/NAME/checkpoints/step-0000012000/
      model.safetensors  optimizer.safetensors  state.json  manifest.json
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from data_prep.files import publish_folder, sha256_of, temporary_folder, write_atomically, writing_to
from launch.config import Options
from launch.console import UserError, warn

MANIFEST = "manifest.json"


class CheckpointOptions(Options):
    """How often to save and what to keep."""

    every_steps: int = Field(500, ge=1, description="steps between checkpoints")
    keep: int = Field(2, ge=1, description="newest checkpoints to keep, besides the best one")


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint; `verify` tells whether it is still what was published."""

    folder: Path

    @property
    def step(self) -> int:
        """Optimizer steps done when it was taken."""
        return int(self.folder.name.removeprefix("step-"))

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """step, task, config, data, versions, `files` (bytes and SHA-256 of each), and the `sha256` of all this."""
        return json.loads((self.folder / MANIFEST).read_text(encoding="utf-8"))

    def verify(self) -> str | None:
        """What is wrong with it, or None. Reads every byte."""
        try:
            files = self.manifest["files"]
            # Written again from what was read, every byte must be the same: nothing else vouches for the manifest.
            intact = (self.folder / MANIFEST).read_bytes() == _manifest_text(self.manifest).encode()
        except (OSError, ValueError, KeyError, TypeError) as error:
            return f"its {MANIFEST} cannot be read ({error})"
        if not intact:
            return f"the content of {MANIFEST} has changed (SHA-256 differs)"
        present = {path.name for path in self.folder.iterdir()} - {MANIFEST}
        if present != set(files):
            missing, extra = sorted(set(files) - present), sorted(present - set(files))
            return f"files missing: {missing or 'none'}, files that do not belong: {extra or 'none'}"
        for name, about in files.items():
            path = self.folder / name
            if path.stat().st_size != about["bytes"]:
                return f"{name} has {path.stat().st_size:,} bytes instead of {about['bytes']:,}"
            if sha256_of(path) != about["sha256"]:
                return f"the content of {name} has changed (SHA-256 differs)"
        return None

    def state(self) -> dict[str, Any]:
        """The small values: gradient scaler, best score and its step."""
        return json.loads((self.folder / "state.json").read_text(encoding="utf-8"))

    def model_state(self) -> dict[str, Tensor]:
        """The model's tensors by parameter name, on the CPU."""
        return load_file(self.folder / "model.safetensors")

    def load_into(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Restores parameters and optimizer state in place."""
        model.load_state_dict(self.model_state())
        tensors = load_file(self.folder / "optimizer.safetensors")
        names = {parameter: name for name, parameter in model.named_parameters()}
        ordered = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
        state: dict[int, dict[str, Tensor]] = {index: {} for index in range(len(ordered))}
        for index, name in enumerate(ordered):
            for kind in ("step", "exp_avg", "exp_avg_sq"):
                state[index][kind] = tensors[f"{kind}/{name}"]
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def checkpoints(run_dir: str | Path) -> list[Checkpoint]:
    """The published checkpoints of a run, oldest first, unverified."""
    folders = sorted(Path(run_dir, "checkpoints").glob("step-*"))
    return [Checkpoint(folder) for folder in folders if folder.name.removeprefix("step-").isdigit()]


def newest_valid(run_dir: str | Path) -> Checkpoint | None:
    """The newest checkpoint that passes `verify`; those that do not are renamed to `invalid-step-...` and named."""
    for checkpoint in reversed(checkpoints(run_dir)):
        problem = checkpoint.verify()
        if problem is None:
            return checkpoint
        aside = checkpoint.folder.with_name(f"invalid-{checkpoint.folder.name}")
        shutil.rmtree(aside, ignore_errors=True)
        checkpoint.folder.rename(aside)
        warn(f"checkpoint {checkpoint.folder} is damaged: {problem}. Set aside as {aside.name}, taking an older one")
    return None


def choose(run_dir: str | Path, which: Literal["best", "last"]) -> Checkpoint:
    """The newest checkpoint, or the one with the best validation score. Raises UserError where there is none."""
    valid = [checkpoint for checkpoint in checkpoints(run_dir) if checkpoint.verify() is None]
    if not valid:
        raise UserError(f"{run_dir} has no valid checkpoint: train first (python -m training.gpt CONFIG)")
    if which == "last":
        return valid[-1]
    best_step = valid[-1].state()["best_step"]
    return next((checkpoint for checkpoint in valid if checkpoint.step == best_step), valid[-1])


def save(
    run_dir: str | Path,
    step: int,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    about: dict[str, Any],
    keep: int,
) -> Checkpoint:
    """Publishes a checkpoint of `step` and then removes those beyond `keep` and the best.

    `state` holds what `Checkpoint.state` gives back ("best_step" among it), `about` goes into the manifest. Raises
    UserError when the disk is full or not writable; older checkpoints stand untouched.
    """
    final = Path(run_dir, "checkpoints", f"step-{step:010d}")
    with writing_to(final, option="--run_dir"), temporary_folder(final) as folder:
        _write_tensors(folder / "model.safetensors", _tensors(model))
        _write_tensors(folder / "optimizer.safetensors", _optimizer_tensors(model, optimizer))
        write_atomically(folder / "state.json", json.dumps(state, indent=2))
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in sorted(folder.iterdir())
        }
        write_atomically(folder / MANIFEST, _manifest_text({"step": step, **about, "files": files}))
        publish_folder(folder, final, replace=True)
    _retire(run_dir, keep, state["best_step"])
    return Checkpoint(final)


def _manifest_text(content: dict[str, Any]) -> str:
    """The manifest as it is written, its last key the SHA-256 of the rest."""
    content = {key: value for key, value in content.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(content, indent=2).encode()).hexdigest()
    return json.dumps({**content, "sha256": digest}, indent=2) + "\n"


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        # The library wraps what the system said; `writing_to` knows a full disk by its number.
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Optimizer state by parameter name: a parameter's index means nothing once the model changes."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{kind}/{names[parameter]}": value.detach().cpu().contiguous()
        for parameter, kinds in optimizer.state.items()
        for kind, value in kinds.items()
    }


def _retire(run_dir: str | Path, keep: int, best_step: int | None) -> None:
    for checkpoint in checkpoints(run_dir)[:-keep]:
        if checkpoint.step != best_step:
            # Renamed first: a kill in the middle of removing must not leave a half-empty checkpoint under a valid name.
            doomed = checkpoint.folder.with_name(f"removing-{checkpoint.folder.name}")
            checkpoint.folder.rename(doomed)
            shutil.rmtree(doomed)
    for leftover in Path(run_dir, "checkpoints").glob("removing-*"):
        shutil.rmtree(leftover, ignore_errors=True)
