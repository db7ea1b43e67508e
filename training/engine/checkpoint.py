"""A checkpoint is published or it does not exist.

It is written to a temporary folder, brought to the disk, and renamed; the manifest, written last, holds the size and
SHA-256 of every other file and vouches for itself. On loading it is checked first: a checkpoint that fails is set aside
with a message and the newest valid one before it is taken. Which checkpoint is newest or best follows from what is in
the folder; no pointer file can lie about it. Loading runs no code: tensors are safetensors, everything else is JSON.

    runs/NAME/checkpoints/step-0000012000/
      model.safetensors  optimizer.safetensors  [ema.safetensors]  state.json  manifest.json

`python -m training.engine.checkpoint runs/NAME` lists the checkpoints of a run and verifies every byte of them. When
and how a running training saves is the business of `training.engine.saver`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NotRequired

import torch
from pydantic import ConfigDict, TypeAdapter, with_config
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typing_extensions import TypedDict

from training.base.console import UserError, counted, run_main, say, warn
from training.base.files import (
    check_room,
    copy_plain,
    drop_from_cache,
    open_plain,
    publish_folder,
    read_json,
    read_plain,
    sha256_of,
    temporary_folder,
    write_atomically,
    writing_to,
)
from training.base.options import CommandLine
from training.engine.status import KEPT, Best, badness, checkpoint_folder, read_record, saved_steps

MANIFEST = "manifest.json"
MODEL, EMA = "model.safetensors", "ema.safetensors"

# What is written besides tensors is a few kilobytes; a file system needs some room for itself too.
_ROOM_BESIDE_TENSORS = 200_000

Tensors = Mapping[str, Tensor]


class EngineState(TypedDict):
    """What a checkpoint holds of a `Parallel` besides tensors."""

    scaler: dict[str, Any] | None


class MeasuredInterval(TypedDict):
    """Steps between two checkpoints, as measured for so many hours between kills."""

    steps: int
    hours: float


class RunState(Best, EngineState):
    """state.json: what a run needs to go on, besides tensors."""

    scores: dict[str, float]  # of this very step, if the model was validated at it
    validated_step: int
    waited: int  # validations since the last new best
    ended: int | None  # the step at which that was too many
    steps: int  # of the whole run
    fork: int  # see `training.engine.optim.Course`
    measured_interval: MeasuredInterval | None  # of `checkpoint.every_steps auto`, once it is known
    samples: int  # that are answered at a validation
    window_losses: list[float]  # see `training.engine.metrics.Window`
    wandb_id: str | None
    due: bool  # false where an uninterrupted run, or a longer one, has no checkpoint


class _File(TypedDict):
    bytes: int
    sha256: str


@with_config(ConfigDict(extra="allow"))
class _Manifest(TypedDict):
    """What is read of a manifest.json before anything vouches for it."""

    step: int
    task: str
    config: dict[str, Any]
    data: dict[str, str]
    versions: dict[str, str]
    files: dict[str, _File]


@with_config(ConfigDict(extra="allow", allow_inf_nan=False))
class _State(TypedDict):
    """What is read of a state.json that may be a stranger's."""

    scores: NotRequired[dict[str, float]]
    best_by: NotRequired[str]
    due: NotRequired[bool]
    fork: NotRequired[int]


_MANIFEST = TypeAdapter(_Manifest)
_STATE = TypeAdapter(_State)


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
        found: dict[str, Any] = read_json(self.folder / MANIFEST)
        _MANIFEST.validate_python(found)
        return found

    def verify(self) -> str | None:
        """What is wrong with it, or None. Reads every byte."""
        try:
            files = self.manifest["files"]
            # Nothing else vouches for the manifest: written again from what was read, it must be the same to the byte.
            intact = read_plain(self.folder / MANIFEST) == _manifest_text(self.manifest).encode()
            present = {path.name for path in self.folder.iterdir()} - {MANIFEST}
        except (OSError, ValueError) as error:
            return f"its {MANIFEST} cannot be read ({' '.join(str(error).split())})"
        if not intact:
            return f"the content of {MANIFEST} has changed (SHA-256 differs)"
        if self.manifest["step"] != self.step:
            return f"its {MANIFEST} is that of step {self.manifest['step']}"
        if present != set(files):
            missing, extra = sorted(set(files) - present), sorted(present - set(files))
            return f"files missing: {missing or 'none'}, files that do not belong: {extra or 'none'}"
        for name, about in files.items():
            path = self.folder / name
            try:
                with open_plain(path) as file:
                    size = os.fstat(file.fileno()).st_size
                    if size != about["bytes"]:
                        return f"{name} has {size:,} bytes instead of {about['bytes']:,}"
                    if hashlib.file_digest(file, "sha256").hexdigest() != about["sha256"]:
                        return f"the content of {name} has changed (SHA-256 differs)"
            except OSError as error:  # a sector that the disk cannot read any more
                return f"{name} cannot be read ({error.strerror})"
        return None

    def remove(self) -> None:
        """Removes it from the disk."""
        # Renamed first: a kill in the middle must not leave a half-empty checkpoint under a valid name.
        doomed = self.folder.with_name(f"removing-{self.folder.name}")
        self.folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)  # what somebody still reads may stay; `retire` looks again

    def state(self) -> RunState:
        """The small values."""
        state: RunState = read_json(self.folder / "state.json")
        _STATE.validate_python(state)
        return state

    @property
    def is_due(self) -> bool:
        """Whether a run that is never stopped has it, too; one that only a stop made is removed after the next."""
        with suppress(OSError, ValueError):  # damaged: as good as any
            return self.state().get("due", True)
        return True

    @property
    def fork(self) -> int:
        """Up to which step a longer run is the same."""
        with suppress(OSError, ValueError):  # damaged: there is nothing to go back to
            return self.state().get("fork", self.step)
        return self.step

    def model_state(self) -> dict[str, Tensor]:
        """The model's tensors by parameter name, on the CPU."""
        return load_file(self.folder / MODEL)

    def optimizer_state(self) -> dict[str, Tensor]:
        """The optimizer's tensors by kind and parameter name, on the CPU."""
        return load_file(self.folder / "optimizer.safetensors")

    def optimizer_tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        """The same one by one, as kind, parameter name and tensor: they need not be in memory all at once."""
        with safe_open(self.folder / "optimizer.safetensors", "pt") as file:
            for key in file.keys():  # noqa: SIM118
                kind, _, name = key.partition("/")
                yield kind, name, file.get_tensor(key)

    def ema_state(self) -> dict[str, Tensor]:
        """The moving average of the model's tensors by parameter name; raises UserError if the run keeps none."""
        path = self.folder / EMA
        if not path.is_file():
            raise UserError(f"{self.folder} has no moving average: train with --optim.ema_decay, for example 0.999")
        return load_file(path)

    def load_into(self, model: nn.Module, optimizer: torch.optim.Optimizer, ema: nn.Module | None = None) -> None:
        """Restores parameters, optimizer state and, if there is one, the moving average in place."""
        load_model_state(model, self.model_state())
        if ema is not None:
            load_model_state(ema, self.ema_state())
        names = {parameter: name for name, parameter in model.named_parameters()}
        ordered = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
        index_of = {name: index for index, name in enumerate(ordered)}
        state: dict[int, dict[str, Tensor | int]] = {}  # empty before the first step
        for kind, name, tensor in self.optimizer_tensors():
            number = tensor.dtype == torch.int64 and tensor.dim() == 0  # see `tensors_of`
            state.setdefault(index_of[name], {})[kind] = int(tensor) if number else tensor
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def tensors_of(
    model: nn.Module, optimizer: torch.optim.Optimizer, ema: nn.Module | None = None
) -> dict[str, dict[str, Tensor]]:
    """What a checkpoint holds of them, by file and by name; nothing is copied.

    Optimizer state goes by the parameter's name, since its index means nothing once the model changes. A count that an
    optimizer keeps as a plain number becomes an int64 scalar.
    """
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    tensors = {
        MODEL: model_state(model),
        "optimizer.safetensors": {
            f"{kind}/{names[parameter]}": value.detach() if isinstance(value, Tensor) else torch.tensor(value)
            for parameter, kinds in optimizer.state.items()
            for kind, value in kinds.items()
        },
    }
    if ema is not None:
        tensors[EMA] = model_state(ema)
    return tensors


def model_state(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint holds of a model: all of it, or, where some of it is frozen, what is trained.

    What is frozen comes from elsewhere, like the base model under adapters, and is there again at the next start.
    """
    trained = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
    if len(trained) < sum(1 for _ in model.parameters()):
        return trained
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def load_model_state(model: nn.Module, state: Tensors) -> None:
    """Takes back what `model_state` gave. Raises UserError where names or shapes are not the model's."""
    check_shapes({name: tensor.shape for name, tensor in model_state(model).items()}, state)
    model.load_state_dict(state, strict=False)  # what is frozen is not among them


def check_shapes(own: Mapping[str, torch.Size], state: Tensors) -> None:
    """Raises UserError where names or shapes of `state` are not the model's own."""
    differing = sorted(
        name
        for name in own.keys() | state.keys()
        if name not in own or name not in state or own[name] != state[name].shape
    )
    if differing:
        raise UserError(
            f"the checkpoint is of another model: {len(differing)} of {len(own)} tensors differ in name or shape, the "
            f"first is {differing[0]}"
        )


def bytes_of(tensors: Mapping[str, Tensors]) -> int:
    """The size of such tensors, by file and name."""
    return sum(tensor.nbytes for part in tensors.values() for tensor in part.values())


def checkpoints(run_dir: str | Path) -> list[Checkpoint]:
    """The published checkpoints of a run, oldest first, unverified."""
    return [Checkpoint(folder) for folder in saved_steps(run_dir).values()]


def newest_valid(run_dir: str | Path, *, set_aside: bool = True) -> Checkpoint | None:
    """The newest checkpoint that passes `verify`; those that do not are named, and renamed to `invalid-step-...`."""
    for checkpoint in reversed(checkpoints(run_dir)):
        problem = checkpoint.verify()
        if problem is None:
            return checkpoint
        said = f"checkpoint {checkpoint.folder} is damaged: {problem}. "
        if set_aside:
            aside = checkpoint.folder.with_name(f"invalid-{checkpoint.folder.name}")
            shutil.rmtree(aside, ignore_errors=True)
            checkpoint.folder.rename(aside)
            said += f"Set aside as {aside.name}, taking an older one"
        warn(said)
    return None


def best(run_dir: str | Path, count: int, by: str | None = None) -> list[Checkpoint]:
    """The `count` checkpoints of the best validations, best first, unverified; of equal ones the older.

    by: the score that says which is better; None for the one that the run's newest checkpoint goes by.
    """
    found = checkpoints(run_dir)
    return _best(found, count, by or _best_by(found))


def _best_by(found: Sequence[Checkpoint]) -> str:
    for checkpoint in reversed(found):
        with suppress(OSError, ValueError, KeyError):
            return checkpoint.state()["best_by"]
    return "accuracy"


def _best(found: Sequence[Checkpoint], count: int, by: str) -> list[Checkpoint]:
    scored = []
    for checkpoint in found:
        with suppress(OSError, ValueError):  # damaged: it is no candidate
            score = checkpoint.state().get("scores", {}).get(by)
            if score is not None and checkpoint.is_due:
                scored.append((badness(score, by), checkpoint.step, checkpoint))
    return [checkpoint for _, _, checkpoint in sorted(scored, key=lambda each: each[:2])[:count]]


def choose(run_dir: str | Path, which: Literal["best", "last"], count: int = 1) -> list[Checkpoint]:
    """The `count` newest checkpoints, or those with the best validation scores, the first one first; all verified.

    Raises UserError where there are not as many.
    """
    newest_first = checkpoints(run_dir)[::-1]
    candidates = newest_first if which == "last" else best(run_dir, len(newest_first))
    found = _first_valid(candidates, count)
    if not found and (found := _first_valid([each for each in newest_first if each not in candidates], 1)):
        warn(f"{run_dir} has no checkpoint with a validation's score: step {found[0].step:,}, the newest, is taken")
    if not found:
        raise UserError(
            f"{run_dir} has no valid checkpoint: train first (for example python -m training.gpt and a config)"
        )
    if len(found) < count:
        option = "keep" if which == "last" else "keep_best"
        raise UserError(
            f"{run_dir} has {counted(len(found), f'{which} checkpoint')}, not {count}: ask for fewer, or train with "
            f"--checkpoint.{option} {count}"
        )
    return found


def check_not_removed(checkpoint: Checkpoint) -> None:
    """Raises UserError where it was removed since it was chosen."""
    if not checkpoint.folder.is_dir():
        raise UserError(f"{checkpoint.folder} is gone, since the run goes on: start the same command again")


def _first_valid(candidates: Sequence[Checkpoint], count: int) -> list[Checkpoint]:
    """Those that pass `verify`, up to `count`: that reads every byte, so it stops when it has enough."""

    def is_valid(checkpoint: Checkpoint) -> bool:
        problem = checkpoint.verify()
        if problem is not None:
            check_not_removed(checkpoint)
            warn(f"{checkpoint.folder} is damaged and left out: {problem}")
        return problem is None

    return list(islice(filter(is_valid, candidates), count))


def publish(
    run_dir: str | Path,
    step: int,
    tensors: Mapping[str, Tensors],
    *,
    state: Mapping[str, Any],
    about: Mapping[str, Any],
    keep: int,
    keep_best: int = 1,
) -> Checkpoint:
    """Publishes a checkpoint of `step` and then removes those beyond the `keep` newest and the `keep_best` best.

    tensors: what goes into which file, in host memory. state: a `RunState`; its "scores" decide which checkpoints are
    best by its "best_by", and by its "due" an interrupted run ends with the checkpoints of an uninterrupted one. about:
    goes into the manifest. An older checkpoint is removed only after the new one was read back from the disk and found
    valid. Raises UserError when the disk is full or not writable, OSError when it fails otherwise; the older
    checkpoints then stand untouched.
    """
    final = checkpoint_folder(run_dir, step)
    with writing_to(final, option="--run_dir"), temporary_folder(final) as folder:
        check_room(folder, bytes_of(tensors) + _ROOM_BESIDE_TENSORS)
        for name, part in tensors.items():
            save_file(dict(part), folder / name)
        write_atomically(folder / "state.json", json.dumps(state, indent=2))
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in sorted(folder.iterdir())
        }
        written = {"step": step, **about, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "files": files}
        write_atomically(folder / MANIFEST, _manifest_text(written))
        publish_folder(folder, final, replace=True)
    checkpoint = Checkpoint(final)
    retire(run_dir, checkpoint, keep, keep_best, state.get("best_by", "accuracy"))
    return checkpoint


def copy_checkpoint(checkpoint: Checkpoint, run_dir: Path) -> Checkpoint:
    """Publishes a copy of a checkpoint in another run folder; raises UserError if what arrived is not what was read."""
    final = Path(run_dir, "checkpoints", checkpoint.folder.name)
    with writing_to(final, option="--run_dir"), temporary_folder(final) as folder:
        check_room(
            folder, sum(about["bytes"] for about in checkpoint.manifest["files"].values()) + _ROOM_BESIDE_TENSORS
        )
        for name in (*checkpoint.manifest["files"], MANIFEST):
            copy_plain(checkpoint.folder / name, folder / name)
        publish_folder(folder, final, replace=True)
    copy = Checkpoint(final)
    problem = copy.verify()
    if problem is not None:
        raise UserError(
            f"the copy of {checkpoint.folder} to {final} went wrong: {problem}; start the same command again"
        )
    return copy


def _manifest_text(content: Mapping[str, Any]) -> str:
    """The manifest as it is written, its last key the SHA-256 of the rest."""
    content = {key: value for key, value in content.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(content, indent=2).encode()).hexdigest()
    return json.dumps({**content, "sha256": digest}, indent=2) + "\n"


def retire(run_dir: str | Path, newest: Checkpoint, keep: int, keep_best: int, best_by: str) -> None:
    """Removes the checkpoints beyond those to keep, once `newest` was read back. Raises OSError if it is damaged.

    Behind the fork, all that was kept there is kept too: a longer run goes on from it. So is what `keep_for_good` was
    told.
    """

    def to_keep(found: Sequence[Checkpoint]) -> list[Checkpoint]:
        return [each for each in found if each == found[-1] or each.is_due][-keep:] + _best(found, keep_best, best_by)

    found = checkpoints(run_dir)
    kept = to_keep(found) + to_keep([each for each in found if each.step <= newest.fork])
    surplus = [each for each in found if each not in kept]
    if surplus:
        # What the disk holds counts, not what the system still has in memory.
        for path in newest.folder.iterdir():
            drop_from_cache(path)
        problem = newest.verify()
        if problem is not None:
            raise OSError(errno.EIO, f"{newest.folder} read back from the disk is damaged: {problem}")
    for checkpoint in surplus:
        for_good = kept_for_good(run_dir)  # only now: to read back takes its time, in which somebody may ask for one
        if for_good is not None and checkpoint.step not in for_good:
            checkpoint.remove()
    for leftover in Path(run_dir, "checkpoints").glob("removing-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def kept_for_good(run_dir: str | Path) -> set[int] | None:
    """The steps that `keep_for_good` was told; None where its file is damaged, so that nobody knows them."""
    steps = read_record(run_dir, KEPT)
    if steps is None and os.path.lexists(Path(run_dir, KEPT)):
        return None
    return set(steps or ())


def keep_for_good(run_dir: Path, step: int) -> None:
    """Has the checkpoint of a step stay, however many newer or better ones follow. Raises UserError if that fails."""
    steps = kept_for_good(run_dir)
    if steps is None:
        raise UserError(f"{run_dir / KEPT} is damaged: write the steps into it that are to be kept, as in [300, 600]")
    with writing_to(run_dir, option="RUN"):
        write_atomically(run_dir / KEPT, json.dumps(sorted({*steps, step})) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Lists and verifies; the exit status is 1 if a checkpoint is damaged or there is none."""
    parser = CommandLine(
        "python -m training.engine.checkpoint",
        "Lists the checkpoints of a run and verifies every byte of them.",
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="run folder, for example runs/gpt-sample")
    parser.add_argument("--keep", type=int, metavar="STEP", help="first has the checkpoint of this step stay for good")
    arguments = parser.parse_args(argv)
    run_dir = arguments.run_dir
    if not (run_dir / "checkpoints").is_dir():
        raise UserError(f"{run_dir} is not a run folder: there is no folder checkpoints in it")
    if arguments.keep is not None:
        kept = Checkpoint(checkpoint_folder(run_dir, arguments.keep))
        problem = kept.verify() if kept.folder.is_dir() else "there is none"
        if problem is None:
            keep_for_good(run_dir, kept.step)
            problem = None if kept.folder.is_dir() else "the training has just removed it"
        if problem is not None:
            there = ", ".join(str(each.step) for each in checkpoints(run_dir)) or "none"
            raise UserError(
                f"the checkpoint of step {kept.step:,} cannot be kept: {problem}; the steps of {run_dir} are {there}"
            )
    found, for_good = checkpoints(run_dir), kept_for_good(run_dir) or ()
    problems, sizes = {}, {}
    for checkpoint in found:
        problems[checkpoint.step] = checkpoint.verify()
        with suppress(FileNotFoundError):  # the run goes on, and has removed it
            sizes[checkpoint.step] = sum(path.stat().st_size for path in checkpoint.folder.iterdir()) / 1e6
    found = [checkpoint for checkpoint in found if checkpoint.step in sizes]
    valid = [checkpoint for checkpoint in found if problems[checkpoint.step] is None]
    best_one = best(run_dir, 1)
    say(f"{'step':>12}  {'MB':>9}  {'written':<24}  verified")
    for checkpoint in found:
        problem = problems[checkpoint.step]
        written = "unknown" if problem else checkpoint.manifest.get("time", "unknown")
        role = ", ".join(
            name
            for name, holds in (
                ("newest", checkpoint == valid[-1] if valid else False),
                ("best", checkpoint in best_one),
                ("kept for good", checkpoint.step in for_good),
            )
            if holds
        )
        verdict = f"DAMAGED: {problem}" if problem else "ok" + (f" ({role})" if role else "")
        say(f"{checkpoint.step:>12,}  {sizes[checkpoint.step]:>9,.1f}  {written:<24}  {verdict}")
    for folder in sorted((run_dir / "checkpoints").glob("invalid-step-*")):
        say(f"{folder.name}: set aside earlier as damaged; remove it when you do not need it any more")
    if not valid:
        raise UserError(
            f"{run_dir} has no valid checkpoint: put a copy of one back, or move the folder aside to begin anew"
        )
    return 1 if len(valid) < len(found) else 0


if __name__ == "__main__":
    run_main(main, prints_product=True)
