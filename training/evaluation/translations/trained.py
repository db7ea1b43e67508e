"""A trained translator as its run folder left it: weights, tokenizers, and everything needed to use them without data.

Promises: what `open_trained` returns fits together. The weights have passed their checksums, and the tokenizers are the
ones that the model was trained with.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from training.base.console import UserError
from training.data.languages import Language
from training.data.prepared import Prepared
from training.data.text import Conversions
from training.data.tokenizers import Tokenizer, load_tokenizer
from training.evaluation.runs import TrainedRun, open_run
from training.evaluation.translations.translators import (
    TRANSLATORS,
    AttentionGRUTranslator,
    EnsembleTranslator,
    GPTTranslator,
)


@dataclass(frozen=True)
class TrainedModel(TrainedRun):
    """A translator in evaluation mode and what belongs to it."""

    source_tokenizer: Tokenizer
    target_tokenizer: Tokenizer
    model: nn.Module
    decoder: GPTTranslator | AttentionGRUTranslator | EnsembleTranslator
    others: tuple[TrainedModel, ...] = ()  # of an ensemble, whose first member all else is of

    @property
    def languages(self) -> tuple[Language, Language]:
        """Of the source and of the target."""
        return self.source_tokenizer.language, self.target_tokenizer.language

    def encode(self, text: str) -> list[int]:
        """Ids of a source sentence, its characters treated as those of the training data; none for a blank one."""
        text = Conversions.of(self.data["options"]).apply(text, self.source_tokenizer.language)
        return self.source_tokenizer.encode(text) if text else []

    def check_fits(self, data: Prepared) -> None:
        """Raises UserError unless `data` was tokenised with this model's vocabularies: its ids mean nothing else."""
        own = (self.source_tokenizer.sha256, self.target_tokenizer.sha256)
        if own != (data.source_tokenizer.sha256, data.target_tokenizer.sha256):
            raise UserError(
                f"{data.folder} has another tokenizer than {self.run_dir} was trained with: name the data set of this "
                f"run (config.yaml says {self.config.data}), or one prepared from the same source with the same options"
            )


def open_trained(run_dir: str | Path, weights: str = "best", *, device: torch.device) -> TrainedModel:
    """The model of a run folder, on `device`. weights: which ones, see `Weights`.

    Raises UserError when the folder is no run, has no valid checkpoint, or when its tokenizers are missing or not the
    model's.
    """
    configs = {task: decoder.config for task, decoder in TRANSLATORS.items()}
    run, state = open_run(run_dir, weights, configs, what="translate")
    manifest = run.checkpoint.manifest
    decoder = TRANSLATORS[manifest["task"]]
    source, target = (_tokenizer(run.run_dir, side, manifest) for side in ("source", "target"))
    model = decoder.build(run.config, source, target)
    model.load_state_dict(state)
    model.to(device).eval()
    return TrainedModel(
        **vars(run), source_tokenizer=source, target_tokenizer=target, model=model, decoder=decoder(model)
    )


def open_translator(runs: str | Path, weights: str = "best", *, device: torch.device) -> TrainedModel:
    """What `open_trained` opens, or, of several run folders between commas, their ensemble.

    Raises UserError also when these were not trained on the same data.
    """
    names = [str(runs)] if Path(runs).exists() else str(runs).split(",")
    first, *others = [open_trained(name, weights, device=device) for name in names]
    for other in others:
        if other.checkpoint.manifest["data"] != first.checkpoint.manifest["data"]:
            raise UserError(
                f"{other.run_dir} was trained on other data than {first.run_dir}: only runs on the same prepared data "
                "translate together"
            )
    if not others:
        return first
    decoder = EnsembleTranslator([each.decoder for each in (first, *others)])
    return replace(first, decoder=decoder, others=tuple(others))


def _tokenizer(run_dir: Path, side: str, manifest: dict[str, Any]) -> Tokenizer:
    folder = run_dir / "tokenizer" / side
    mend = f"copy tokenizer/ from the run's prepared data, {manifest['config']['data']}"
    if not folder.is_dir():
        raise UserError(f"{folder} is missing: {mend}")
    tokenizer = load_tokenizer(folder)
    if tokenizer.sha256 != manifest["data"][f"{side}_tokenizer"]:
        raise UserError(f"{folder} is not the tokenizer that the model was trained with: {mend}")
    return tokenizer
