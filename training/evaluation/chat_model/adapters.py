"""Trained adapters as their run folder left them, on the base model that they were trained on.

Promises: what `open_adapters` returns fits together. The adapters have passed their checksums, the base model is the
very one (its fingerprint is in the checkpoint). They are computed in the type that the run was told; `auto` follows the
machine, as in training.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from training.base.console import UserError
from training.data.chat import ChatTokenizer, TextTokenizer, reopened
from training.data.conversations import Conversations
from training.engine.checkpoint import load_model_state
from training.engine.precision import Precision, PrecisionName, choose_precision
from training.evaluation.runs import TrainedRun, open_run
from training.models.adapted_model import AdaptedModel
from training.models.base_model import find_base_model, fingerprint_of, on_meta
from training.qlora import COMPUTE_TYPES, QLoRAConfig, build_model


@dataclass(frozen=True)
class TrainedAdapters(TrainedRun):
    """A base model with a run's adapters, in evaluation mode."""

    config: QLoRAConfig
    base: Path  # the base model's folder
    model: AdaptedModel
    precision: Precision

    @cached_property
    def tokenizer(self) -> TextTokenizer:
        """The tokenizer, with the chat template unless the run learned texts, that the data was prepared with."""
        return reopened(self.run_dir / "tokenizer", self.data["tokenizer"])

    @property
    def is_chat(self) -> bool:
        """Whether it learned conversations, and not texts."""
        return isinstance(self.tokenizer, ChatTokenizer)

    @property
    def chat(self) -> ChatTokenizer:
        """The tokenizer of a run that learned conversations. Raises UserError for another one."""
        if not isinstance(self.tokenizer, ChatTokenizer):
            raise UserError(f"{self.run_dir} learned texts, not answers, so there is no form in which to ask it")
        return self.tokenizer

    @property
    def parameters(self) -> int:
        """Of the base model: a layer in 4 bits counts by its weights, not by its bytes."""
        return sum(each.numel() for each in set(on_meta(self.model.model.get_base_model().config).parameters()))

    def without_model(self) -> TrainedAdapters:
        """All of it but the model, for whoever needs the memory."""
        return replace(self, model=None)  # type: ignore[arg-type]  # nothing asks for the model afterwards

    @contextmanager
    def adapters(self, active: bool) -> Iterator[None]:
        """Inside, with `active` false, the model is the base model: what it was before the training."""
        if active:
            yield
        else:
            with self.model.model.disable_adapter():
                yield

    def check_fits(self, data: Conversations) -> None:
        """Raises UserError unless `data` was tokenised as the run's own: its ids mean nothing else."""
        if data.identity["tokenizer"] != self.checkpoint.manifest["data"]["tokenizer"]:
            raise UserError(
                f"{data.folder} was prepared with another tokenizer or chat template than {self.run_dir} was trained "
                "with: name the data set of this run, or one prepared with the same --tokenizer"
            )


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
    run, state = open_run(run_dir, weights, {"qlora": QLoRAConfig}, what="answer questions")
    config = run.config
    assert isinstance(config, QLoRAConfig)
    fingerprint = run.checkpoint.manifest["built_on"]["base_model"]
    base = find_base_of(run.run_dir, base_model, config.base_model, config.base_revision, fingerprint)
    chosen = choose_precision(precision or config.precision, device)
    model = build_model(config, base, COMPUTE_TYPES[chosen.name], device, trains=False)
    load_model_state(model, state)
    model.eval()
    return TrainedAdapters(**vars(run), base=base, model=model, precision=chosen)


def find_base_of(folder: Path, here: str | None, named: str, revision: str | None, fingerprint: str) -> Path:
    """The base model of the adapters in `folder`. here: where it is now, if not where it was when it was `named`.

    Raises UserError where it is missing or another.
    """
    try:
        base = find_base_model(here or named, revision)
    except UserError as error:
        raise error if here else UserError(f"{error}; or say with --base_model FOLDER where it is") from None
    if fingerprint_of(base) != fingerprint:
        raise UserError(
            f"the model in {base} is not the one that the adapters in {folder} were trained on ({named}): on another "
            "model they mean nothing; name the right one with --base_model"
        )
    return base
