"""Answers of a chat model to prompts: batched, with a key-value cache, each ending at its end token.

Greedy and without penalties, whatever the model's own generation config says: an answer depends on the model alone. In
16 bits it depends on its batch, too, where two words are equally likely up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from training.base.progress import Progress
from training.engine.precision import Precision

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Positions of a batch, prompts and answers together: their keys and values are what memory goes to.
TOKENS = 16384


@dataclass(frozen=True)
class Generated:
    """An answer as the model gave it."""

    ids: list[int]  # without the end token
    ended: bool  # with an end token before the limit


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    end_id: int,
    pad_id: int,
    max_new_tokens: int,
    precision: Precision,
    label: str | None = None,
    tokens: int = TOKENS,
) -> list[Generated]:
    """The answer to each of `prompts` (ids, at least one each), in their order.

    pad_id: fills prompts on the left; it is not attended to. label: of a progress line; None for none. tokens: most
    positions of a batch.
    """
    import transformers

    settings = transformers.GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=end_id, pad_token_id=pad_id, use_cache=True
    )
    # The library takes what the settings leave open from the model's own: Qwen2.5 has a penalty on repetition there.
    for each in (model, getattr(model, "get_base_model", lambda: model)()):
        each.generation_config = transformers.GenerationConfig()
    device = model.get_input_embeddings().weight.device
    answers: dict[int, Generated] = {}
    with Progress(label or "", len(prompts), "answers") as progress:
        for rows in _batches([len(prompt) for prompt in prompts], max_new_tokens, tokens):
            width = max(len(prompts[row]) for row in rows)
            inputs = torch.full((len(rows), width), pad_id)
            mask = torch.zeros_like(inputs)
            for place, row in enumerate(rows):
                inputs[place, width - len(prompts[row]) :] = torch.tensor(prompts[row])
                mask[place, width - len(prompts[row]) :] = 1
            with precision.autocast():
                whole = model.generate(
                    input_ids=inputs.to(device), attention_mask=mask.to(device), generation_config=settings
                )
            for row, ids in zip(rows, whole[:, width:].tolist(), strict=True):
                ended = end_id in ids
                answers[row] = Generated(ids[: ids.index(end_id)] if ended else ids, ended)
            if label is not None:
                progress.advance(len(rows))
    return [answers[row] for row in range(len(prompts))]


def _batches(lengths: Sequence[int], more: int, tokens: int) -> Iterator[list[int]]:
    """Indices in batches of about equally long prompts, the longest first, so that what does not fit fails at once."""
    batch: list[int] = []
    for row in np.argsort([-length for length in lengths], kind="stable").tolist():
        if batch and (len(batch) + 1) * (lengths[batch[0]] + more) > tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
