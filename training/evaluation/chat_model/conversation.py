"""A conversation with a chat model: with the one that a run has trained, with an export of it, or with any other.

Promises: the model reads what it read in training, the chat template's own text; what cannot be asked is refused before
the model hears it, and the conversation stays as it was.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError

from training.base.console import UserError
from training.data.chat import ChatTokenizer, Message, assistant, load_chat_tokenizer, user
from training.engine.precision import Precision, PrecisionName, choose_precision
from training.evaluation.chat_model.adapters import find_base_of, open_adapters
from training.evaluation.chat_model.streaming import Speaker, Text
from training.evaluation.chat_model.unpacking import unpack_where_there_is_room
from training.evaluation.exports.folder import ABOUT
from training.models.base_model import (
    CONFIG,
    QuantisationOptions,
    find_base_model,
    load_base_model,
    read_config,
)
from training.qlora import COMPUTE_TYPES

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class ChatModel:
    """What can be talked to."""

    name: str
    model: PreTrainedModel  # or a PeftModel of one
    tokenizer: ChatTokenizer
    precision: Precision

    @property
    def has_adapters(self) -> bool:
        """Whether the base model can be asked, too."""
        return hasattr(self.model, "disable_adapter")

    @property
    def context(self) -> int:
        """Tokens of a conversation at most."""
        base = self.model.get_base_model() if self.has_adapters else self.model
        return int(base.config.get_text_config().max_position_embeddings)


def open_chat(
    folder: Path, weights: str, *, device: torch.device, base_model: str | None, precision: PrecisionName | None
) -> ChatModel:
    """The chat model of a run folder, an export, or another model's folder, on `device`.

    weights: which ones of a run, see `Weights`. base_model: where the base model of adapters is now, if not where it
    was. precision: None for the run's own, or what suits the device. Raises UserError when there is nothing to talk to.
    """
    about = _about(folder)
    if not about and not (folder / CONFIG).is_file():
        trained = open_adapters(folder, weights, device=device, base_model=base_model, precision=precision)
        if device.type == "cpu":
            unpack_where_there_is_room(trained.model.model, COMPUTE_TYPES[trained.precision.name])
        name = f"{folder}, step {trained.step:,} ({trained.weights})"
        return ChatModel(name, trained.model.model, trained.chat, trained.precision)
    if weights != "best":
        raise UserError(f"{folder} is no run and has no checkpoints: leave --checkpoint out")
    chosen = choose_precision(precision or "auto", device)
    compute_type = COMPUTE_TYPES[chosen.name]
    if about.get("kind") == "adapters":
        model = _adapters(folder, about, base_model, compute_type, device)
    elif base_model is not None:
        raise UserError(f"{folder} holds a whole model and needs no base: leave --base_model out")
    else:
        quantisation = QuantisationOptions(kind="none")
        read_config(find_base_model(str(folder), None), quantisation)
        model = load_base_model(folder, quantisation, compute_type, device)
    return ChatModel(str(folder), model.eval(), load_chat_tokenizer(str(folder)), chosen)


def _about(folder: Path) -> dict[str, Any]:
    """The export.json of a folder, empty where it has none. Raises UserError for an export of another kind."""
    try:
        about = dict(json.loads((folder / ABOUT).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except NotADirectoryError:
        raise UserError(f"{folder} is a file: name a run's folder, or that of an export") from None
    except (OSError, ValueError):
        raise UserError(f"{folder / ABOUT} cannot be read: export the run again") from None
    if about.get("kind") == "gguf":
        raise UserError(f"{folder} is for llama.cpp and Ollama: its README.md says how to talk to it; or name the run")
    if about.get("kind") not in ("adapters", "merged"):
        raise UserError(
            f"{folder} is the export of a translator, the run {about.get('run')}: name that run's folder, or use the "
            "script in its README.md"
        )
    return about


def _adapters(
    folder: Path, about: dict[str, Any], base_model: str | None, compute_type: torch.dtype, device: torch.device
) -> Any:
    """Exported adapters on their base model."""
    import peft

    try:
        named, revision, fingerprint = (about[f"base_{name}"] for name in ("model", "revision", "fingerprint"))
        quantisation = QuantisationOptions.model_validate(about["quantisation"])
    except (KeyError, ValidationError):
        raise UserError(f"{folder / ABOUT} was written by another version: export the run again") from None
    base = find_base_of(folder, base_model, named, revision, fingerprint)
    loaded = load_base_model(base, quantisation, compute_type, device)
    if device.type == "cpu":
        unpack_where_there_is_room(loaded, compute_type)
    return peft.PeftModel.from_pretrained(loaded, folder)


class Conversation:
    """Questions and answers, each of which the model reads before it answers the next question."""

    def __init__(self, opened: ChatModel, *, system: str | None = None, max_new_tokens: int):
        """system: what the model is told first. max_new_tokens: of an answer. Raises UserError if it cannot be told."""
        self._opened, self._most = opened, max_new_tokens
        self._speaker = self._new_speaker()
        self._before: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        if system is not None:
            self._prompt([*self._before, user("?")])
        self.turns: list[Message] = []

    def ask(self, question: str, show: Callable[[str], None]) -> bool:
        """Hands the answer to `show`, piece by piece; returns whether it ended by itself.

        Raises UserError if it cannot be asked. What was shown of an answer that is interrupted is part of it.
        """
        ids = self._prompt([*self._before, *self.turns, user(question)])
        self.turns += [user(question), assistant("")]
        text = Text(self._opened.tokenizer.decode)
        try:
            return self._answered(self._speaker, ids, text, show)
        finally:
            self.turns[-1] = assistant(text.shown)

    def ask_base(self, show: Callable[[str], None]) -> bool:
        """The same for the base model's answer to the last question, which does not become a part of this."""
        if not self._opened.has_adapters:
            raise UserError(f"{self._opened.name} has no base model beside it: name the run, or its adapters")
        if not self.turns:
            raise UserError("nothing has been asked yet")
        ids = self._prompt([*self._before, *self.turns[:-1]])
        with self._opened.model.disable_adapter():
            return self._answered(self._base_speaker, ids, Text(self._opened.tokenizer.decode), show)

    def begin_anew(self) -> None:
        """Forgets all questions and answers."""
        self.turns = []

    @cached_property
    def _base_speaker(self) -> Speaker:
        return self._new_speaker()

    def _new_speaker(self) -> Speaker:
        return Speaker(self._opened.model, self._opened.tokenizer.end_id, self._opened.precision)

    def _answered(self, speaker: Speaker, ids: list[int], text: Text, show: Callable[[str], None]) -> bool:
        most = min(self._most, self._opened.context - len(ids))
        ended = speaker.answer(ids, most, lambda token: show(text.add(token)))
        show(text.rest())
        return ended

    def _prompt(self, turns: list[Message]) -> list[int]:
        """What the model reads of these turns. Raises UserError if they cannot be asked."""
        tokenizer = self._opened.tokenizer
        for turn in turns:
            if turn["role"] != "assistant" and (found := tokenizer.control_text(turn["content"])):
                raise UserError(f"{found} is a control token of this model: leave it out")
        if refusal := tokenizer.refusal(turns):
            raise UserError(refusal)
        (ids,) = tokenizer.encode([tokenizer.prompt(turns)])
        if len(ids) >= self._opened.context:
            raise UserError(
                f"with this question the conversation has {len(ids):,} tokens, and the model takes "
                f"{self._opened.context:,}: /new begins another one"
            )
        return ids
