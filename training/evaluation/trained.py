"""A trained model as its run folder left it: weights, tokenizers, and everything needed to use them without the data.

Promises: what `open_trained` returns fits together. The weights have passed their checksums, and the tokenizers are the
ones that the model was trained with.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError

from data_prep.prepared import Prepared
from data_prep.text import clean, simplify
from data_prep.tokenizers import Tokenizer, load_tokenizer
from launch.console import UserError
from training.engine.checkpoint import Checkpoint, choose
from training.evaluation.decoding import Decoder, GPTDecoder
from training.gpt import GPTConfig
from training.models.gpt import GPT

WhichCheckpoint = Literal["best", "last"]


@dataclass(frozen=True)
class TrainedModel:
    """A model in evaluation mode and what belongs to it. `data` is the meta.json of the data it was trained on."""

    run_dir: Path
    checkpoint: Checkpoint
    config: GPTConfig
    data: dict[str, Any]
    source_tokenizer: Tokenizer
    target_tokenizer: Tokenizer
    model: GPT
    decoder: Decoder

    @property
    def step(self) -> int:
        """Optimizer steps that the weights have seen."""
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


def open_trained(run_dir: str | Path, which: WhichCheckpoint = "best", *, device: torch.device) -> TrainedModel:
    """The model of a run folder, on `device`. `which`: highest validation accuracy, or newest.

    Raises UserError when the folder is no run, has no valid checkpoint, or when its tokenizers are missing or not the
    model's.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise UserError(f"there is no run folder {run_dir}; a run is what `python -m training.gpt CONFIG` makes")
    if not (run_dir / "checkpoints").is_dir() or not (run_dir / "data.json").is_file():
        raise UserError(f"{run_dir} is not a run folder: data.json and checkpoints/ are expected in it")
    checkpoint = choose(run_dir, which)
    manifest = checkpoint.manifest
    if manifest["task"] != "gpt":
        raise UserError(f"{run_dir} holds a {manifest['task']} model; only those of training.gpt can be decoded")
    try:
        config = GPTConfig.model_validate(manifest["config"])
    except ValidationError as error:
        keys = ", ".join(".".join(map(str, detail["loc"])) for detail in error.errors())
        raise UserError(f"{checkpoint.folder} was written by another version: its config differs in {keys}") from None
    tokenizers = {side: _tokenizer(run_dir, side, manifest) for side in ("source", "target")}
    state = checkpoint.model_state()
    size, trained_size = tokenizers["source"].vocabulary_size, len(state["embedding.weight"])
    if size != trained_size:
        raise UserError(f"{run_dir}/tokenizer has {size:,} tokens, the model in {checkpoint.folder} {trained_size:,}")
    model = GPT(config.model, size)
    model.load_state_dict(state)
    model.to(device).eval()
    data = json.loads((run_dir / "data.json").read_text(encoding="utf-8"))
    return TrainedModel(
        run_dir, checkpoint, config, data, tokenizers["source"], tokenizers["target"], model, GPTDecoder(model)
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
