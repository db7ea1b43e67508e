"""What is written of an evaluation of answers, and all that the report knows of scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from training.evaluation.answers.losses import LossComparison
from training.evaluation.answers.scores import AnswerComparison


@dataclass(frozen=True)
class AnswerEvaluation:
    """A model before and after training, on the same items.

    about: what was evaluated and how, under these keys at least: label (which names the file), task (of the training),
    part, step, weights, base_model, decoding (in words), data_fingerprint, synthetic (whether the data is made up).
    """

    about: Mapping[str, Any]
    answers: AnswerComparison
    losses: Sequence[LossComparison]

    def to_json(self) -> dict[str, Any]:
        """What runs/NAME/evaluation/LABEL.json holds: everything in `about`, and

        items: of all tasks. tasks: a list, in the order of TASKS, of {task, metric, how (in words), items,
        odd_references, references_sha256, before, after, difference, difference_interval, p}; before and after are each
        {score (0 to 100), interval, exact, format_errors, empty}. macro_average: {before, after: {score, interval},
        difference, difference_interval, p}. losses: a list, the last of which is ALL_TASKS, of {task, items, tokens,
        before, after, difference, difference_interval, p}; before and after are each {loss (nats per token), interval,
        perplexity, perplexity_interval}, and the difference is that of the loss. Intervals are those of 95 %, [low,
        high]; differences are after minus before.
        """
        return {
            **self.about,
            "items": sum(task.after.items for task in self.answers.tasks),
            **self.answers.to_json(),
            "losses": [loss.to_json() for loss in self.losses],
        }
