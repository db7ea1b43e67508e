"""Trained adapters as their run folder left them, on the base model that they were trained on.

Promises: what `open_adapters` returns fits together. The adapters have passed their checksums, the base model is the
very one (its fingerprint is in the checkpoint). They are computed in the type that the run was told; `auto` follows the
machine, as in training.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from training.base.console import UserError
from training.data.chat import ChatTokenizer, load_chat_tokenizer
from training.engine.checkpoint import Checkpoint, load_model_state
from training.engine.precision import Precision, PrecisionName, choose_precision
from training.evaluation.translations.trained import Weights
from training.models.adapted_model import AdaptedModel
from training.models.base_model import find_base_model, fingerprint_of, on_meta
from training.qlora import COMPUTE_TYPES, QLoRAConfig, build_model


@dataclass(frozen=True)
class TrainedAdapters:
    """A base model with a run's adapters, in evaluation mode.

    checkpoints: those that the adapters are the mean of, one if they are no mean. data: the meta.json of the data that
    they were trained on. base: the base model's folder.
    """

    run_dir: Path
    weights: Weights
    checkpoints: list[Checkpoint]
    config: QLoRAConfig
    data: dict[str, Any]
    base: Path
    model: AdaptedModel
    precision: Precision

    def without_model(self) -> TrainedAdapters:
        """What there is to know of it, for whoever needs the memory and not the model."""
        return replace(self, model=None)  # type: ignore[arg-type]  # nothing asks for the model afterwards

    @property
    def checkpoint(self) -> Checkpoint:
        """The first of `checkpoints`."""
        return self.checkpoints[0]

    @property
    def step(self) -> int:
        """Optimizer steps that the adapters have seen; of a mean, the first's of its checkpoints."""
        return self.checkpoint.step

    @cached_property
    def tokenizer(self) -> ChatTokenizer:
        """The tokenizer, with the chat template, that the data was prepared with."""
        return load_chat_tokenizer(str(self.run_dir / "tokenizer"))

    @property
    def parameters(self) -> int:
        """Of the base model: a layer in 4 bits counts by its weights, not by its bytes."""
        return sum(each.numel() for each in set(on_meta(self.model.model.get_base_model().config).parameters()))

    @contextmanager
    def adapters(self, active: bool) -> Iterator[None]:
        """Inside, with `active` false, the model is the base model: what it was before the training."""
        if active:
            yield
        else:
            with self.model.model.disable_adapter():
                yield


def open_adapters(
    run_dir: str | Path,
    weights: str = "best",
    *,
    device: torch.device,
    base_model: str | None = None,
    precision: PrecisionName | None = None,
) -> TrainedAdapters:
    """The adapters of a run folder, on `device`. weights: which ones, see `Weights`.

    base_model: where the base model is now, if not where the config says. precision: None for the run's own. Raises
    UserError when the folder is no run of adapters, has no valid checkpoint, or the base model is missing or another.
    """
    run_dir, wanted = Path(run_dir), Weights.parse(weights)
    if not (run_dir / "checkpoints").is_dir() or not (run_dir / "data.json").is_file():
        raise UserError(f"{run_dir} is not a run folder: data.json and checkpoints/ are expected in it")
    checkpoints, state = wanted.load(run_dir)
    manifest = checkpoints[0].manifest
    if manifest["task"] != "qlora":
        raise UserError(f"{run_dir} holds a {manifest['task']} model, and no adapters of training.qlora")
    try:
        config = QLoRAConfig.model_validate(manifest["config"])
    except ValidationError as error:
        keys = ", ".join(".".join(map(str, detail["loc"])) for detail in error.errors())
        raise UserError(
            f"{checkpoints[0].folder} was written by another version: its config differs in {keys}"
        ) from None
    base = find_base_model(base_model or config.base_model, config.base_revision)
    if fingerprint_of(base) != manifest["built_on"]["base_model"]:
        raise UserError(
            f"the model in {base} is not the one that the adapters in {run_dir} were trained on (config.yaml says "
            f"{config.base_model}): on another model they mean nothing; name the right one with --base_model"
        )
    chosen = choose_precision(precision or config.precision, device)
    model = build_model(config, base, COMPUTE_TYPES[chosen.name], device, trains=False)
    load_model_state(model, state)
    model.eval()
    data = json.loads((run_dir / "data.json").read_text(encoding="utf-8"))
    return TrainedAdapters(run_dir, wanted, checkpoints, config, data, base, model, chosen)
