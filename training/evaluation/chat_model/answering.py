"""Answers of a trained chat model, shared out over the ranks."""

from __future__ import annotations

from collections.abc import Sequence

from training.engine.cluster import Cluster
from training.evaluation.chat_model.adapters import TrainedAdapters
from training.models.generation import Generated, generate

# How far a rank may be ahead of another, see `Cluster.shared_out`: minutes at most.
ANSWERS_BETWEEN_MEETINGS = 64


def answers_to(
    trained: TrainedAdapters, prompts: Sequence[Sequence[int]], max_new_tokens: int, cluster: Cluster, label: str
) -> list[Generated]:
    """What the model, as it is now, says to each of `prompts`, in order; every rank answers its share."""
    # Long and short ones are spread evenly over the ranks.
    order = sorted(range(len(prompts)), key=lambda place: -len(prompts[place]))

    def work(own: Sequence[int]) -> list[Generated]:
        return generate(
            trained.model.model,
            [prompts[place] for place in own],
            end_id=trained.tokenizer.end_id,
            pad_id=trained.tokenizer.pad_id,
            max_new_tokens=max_new_tokens,
            precision=trained.precision,
            label=label,
        )

    given = cluster.shared_out(order, work, per_rank=ANSWERS_BETWEEN_MEETINGS, kind=Generated)
    everything = dict(zip(order, given, strict=True))
    return [everything[place] for place in range(len(prompts))]
