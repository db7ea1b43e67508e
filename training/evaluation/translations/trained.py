"""A trained model as its run folder left it: weights, tokenizers, and everything needed to use them without the data.

Promises: what `open_trained` returns fits together. The weights have passed their checksums, and the tokenizers are the
ones that the model was trained with.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from training.base.console import UserError
from training.data.prepared import Prepared
from training.data.text import clean, simplify
from training.data.tokenizers import Tokenizer, load_tokenizer
from training.engine.checkpoint import Checkpoint, choose
from training.engine.task import RunOptions
from training.evaluation.translations.decoders import FAMILIES, Family
from training.evaluation.translations.decoding import Decoder


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
        """The checkpoints meant, the first one first, and the weights; raises UserError where the run has them not."""
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
class TrainedModel:
    """A model in evaluation mode and what belongs to it.

    checkpoints: those that the weights are the mean of, one if they are no mean. data: the meta.json of the data that
    the model was trained on.
    """

    run_dir: Path
    weights: Weights
    checkpoints: list[Checkpoint]
    family: Family
    config: RunOptions
    data: dict[str, Any]
    source_tokenizer: Tokenizer
    target_tokenizer: Tokenizer
    model: nn.Module
    decoder: Decoder

    @property
    def checkpoint(self) -> Checkpoint:
        """The first of `checkpoints`."""
        return self.checkpoints[0]

    @property
    def step(self) -> int:
        """Optimizer steps that the weights have seen; of a mean, the first's of its checkpoints."""
        return self.checkpoint.step

    def encode(self, text: str) -> list[int]:
        """Ids of a source sentence, its characters treated as those of the training data; none for a blank one."""
        text = clean(text)
        if self.data["options"]["simplify"]:
            text = simplify(text)
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
    run_dir, wanted = Path(run_dir), Weights.parse(weights)
    if not run_dir.is_dir():
        raise UserError(f"there is no run folder {run_dir}; a run is made by one of the training scripts")
    if not (run_dir / "checkpoints").is_dir() or not (run_dir / "data.json").is_file():
        raise UserError(f"{run_dir} is not a run folder: data.json and checkpoints/ are expected in it")
    checkpoints, state = wanted.load(run_dir)
    manifest = checkpoints[0].manifest
    family = FAMILIES.get(manifest["task"])
    if family is None:
        known = " and ".join(f"training.{name}" for name in FAMILIES)
        mend = f"only those of {known} translate"
        if manifest["task"] == "qlora":
            mend += f"; its answers are evaluated by `python -m training.evaluation.answers {run_dir}`"
        raise UserError(f"{run_dir} holds a {manifest['task']} model; {mend}")
    try:
        config = family.config.model_validate(manifest["config"])
    except ValidationError as error:
        keys = ", ".join(".".join(map(str, detail["loc"])) for detail in error.errors())
        raise UserError(
            f"{checkpoints[0].folder} was written by another version: its config differs in {keys}"
        ) from None
    tokenizers = {side: _tokenizer(run_dir, side, manifest) for side in ("source", "target")}
    sizes = {side: tokenizer.vocabulary_size for side, tokenizer in tokenizers.items()}
    model = family.build(config, sizes["source"], sizes["target"])
    model.load_state_dict(state)
    model.to(device).eval()
    data = json.loads((run_dir / "data.json").read_text(encoding="utf-8"))
    return TrainedModel(
        run_dir,
        wanted,
        checkpoints,
        family,
        config,
        data,
        tokenizers["source"],
        tokenizers["target"],
        model,
        family.decoder(model),
    )


def _tokenizer(run_dir: Path, side: str, manifest: dict[str, Any]) -> Tokenizer:
    folder = run_dir / "tokenizer" / side
    mend = f"copy tokenizer/ from the run's prepared data, {manifest['config']['data']}"
    if not folder.is_dir():
        raise UserError(f"{folder} is missing: {mend}")
    tokenizer = load_tokenizer(folder)
    if tokenizer.sha256 != manifest["data"][f"{side}_tokenizer"]:
        raise UserError(f"{folder} is not the tokenizer that the model was trained with: {mend}")
    return tokenizer
