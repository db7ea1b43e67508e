"""One answer of a chat model, token by token, and its text while it comes.

Promises: greedy, the tokens that `training.models.generation` gives, up to ties within rounding; what a conversation
has read and said is not read again; no character is given out in parts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from training.engine.precision import Precision

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PART = "\ufffd"  # what a decoder shows of a character that is not whole yet


class Speaker:
    """A chat model that goes on from what it has read: it keeps the keys and values of one conversation."""

    def __init__(self, model: PreTrainedModel, end_id: int, precision: Precision):
        # What peft has around it does nothing for an answer; the adapters are in its layers.
        self._model = getattr(model, "get_base_model", lambda: model)()
        self._end_id, self._precision = end_id, precision
        self._device = model.get_input_embeddings().weight.device
        # The head is asked for the last position alone: of a long prompt, all logits are gigabytes.
        self._more = {"logits_to_keep": 1} if self._model._supports_logits_to_keep() else {}
        self._forget()

    def _forget(self) -> None:
        self._held: list[int] = []  # the ids whose keys and values are kept
        self._cache: Any = None

    @torch.inference_mode()
    def answer(self, prompt: Sequence[int], most: int, tell: Callable[[int], None]) -> bool:
        """Calls `tell` with each token behind `prompt` (ids, at least one), the end token left out.

        Returns whether the answer ended by itself, with `most` tokens at most.
        """
        ids = list(prompt[self._keep_beginning(prompt) :])
        with self._precision.autocast():
            for _ in range(most):
                token = self._next(ids)
                if token == self._end_id:
                    return True
                tell(token)
                ids = [token]
        return False

    def _next(self, ids: list[int]) -> int:
        """The token behind what is kept and `ids`, which are kept from now on, too."""
        inputs = torch.tensor([ids], device=self._device)
        try:
            found = self._model(input_ids=inputs, past_key_values=self._cache, use_cache=True, **self._more)
            token = int(found.logits[0, -1].argmax())
        except BaseException:  # Ctrl-C between two layers: some have read `ids`, others have not
            self._forget()
            raise
        self._held += ids
        return token

    def _keep_beginning(self, prompt: Sequence[int]) -> int:
        """Keeps what is known of the beginning of `prompt`, its last token left out; returns how many ids that are."""
        import transformers

        pairs = zip(self._held, prompt[:-1], strict=False)
        same = next((place for place, (held, read) in enumerate(pairs) if held != read), None)
        same = min(len(self._held), len(prompt) - 1) if same is None else same
        others = len(self._held) - same
        # What has left the window of a layer, or went into the state of a convolution, cannot be brought back.
        if self._cache is None or (others and any(self._cache.is_sliding + self._cache.is_linear)):
            self._forget()
            self._cache = transformers.DynamicCache(config=self._model.config)
            return 0
        if others:
            self._cache.crop(-others)
            del self._held[same:]
        return same


class Text:
    """The text of ids that come one by one."""

    def __init__(self, decode: Callable[[Sequence[int]], str]):
        """decode: from all ids so far to their text."""
        self._decode = decode
        self._ids: list[int] = []
        self.shown = ""

    def add(self, token: int) -> str:
        """What can be shown now: nothing while a character is not whole, of which a token may be a part."""
        self._ids.append(token)
        return self._show(self._decode(self._ids).rstrip(_PART))

    def rest(self) -> str:
        """What is left when no token comes any more."""
        return self._show(self._decode(self._ids))

    def _show(self, text: str) -> str:
        # As a whole: what a token looks like may depend on those before it, such as a blank at the beginning.
        new = text[len(self.shown) :]
        self.shown += new
        return new
