"""What the two trainings on sentence pairs have in common: which pairs fit, what is learned, how it is scored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from training.base.console import UserError, say, warn
from training.base.options import Options
from training.data.prepared import Part
from training.data.tokenizers import Tokenizer
from training.data.translation_metrics import bleu_obstacle, bleu_of
from training.engine.batch_plan import BatchOptions, BatchPlan, batches_by_length
from training.engine.budget import Choice, Chooser
from training.engine.cluster import Cluster
from training.engine.generating import GeneratedScores, OwnPart, answers_of, drawn
from training.engine.optim import OptimOptions
from training.engine.task import Task, Validation
from training.models.cross_entropy import token_losses, twin_losses
from training.models.decoders import AttentionGRUDecoder, GPTDecoder
from training.models.decoding import translate

# Positions of a validation batch. Its logits are the widest tensor of all, and must not outgrow those of training.
VALIDATION_TOKENS = 2048


class TranslationLoss(Options):
    """How target tokens are learned."""

    label_smoothing: float = Field(0.0, ge=0, lt=1, description="probability spread evenly over the vocabulary")
    r_drop: float = Field(
        0.0,
        ge=0,
        description="R-Drop: each pair is read twice a step, which doubles a micro-batch's positions, and differing "
        "predictions cost so much; 0: once",
    )

    @property
    def readings(self) -> int:
        """How often the model reads each pair in a step."""
        return 2 if self.r_drop else 1

    def read(self, samples: np.ndarray) -> np.ndarray:
        """The samples as the model has to read them: with R-Drop twice, all of them and then all again."""
        return np.tile(samples, self.readings)

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of each token; logits [N, V] and labels [N] of what `read` gave, with R-Drop [N / 2] losses."""
        if self.r_drop:
            return twin_losses(logits.float(), labels.chunk(2)[0], self.label_smoothing, self.r_drop)
        return token_losses(logits.float(), labels, self.label_smoothing)


LossOptionsT = TypeVar("LossOptionsT", bound=TranslationLoss)


class TranslationRun(Protocol):
    """The options of a training on sentence pairs that are needed here."""

    @property
    def seed(self) -> int: ...
    @property
    def batch(self) -> BatchOptions: ...
    @property
    def optim(self) -> OptimOptions: ...
    @property
    def loss(self) -> TranslationLoss: ...
    def samples_to_generate(self, usual: int) -> int: ...


class Pairs(ABC, Generic[LossOptionsT]):
    """The sentence pairs of a part that a model can take, in an order of their own: sample i is row `rows[i]`."""

    lengths: np.ndarray  # [n, k] or [n]: the positions that a sample takes, column by column as the model lays it out
    source_tokens: np.ndarray  # [n]: predictions that belong to the source
    target_tokens: np.ndarray  # [n]: to the target; the last is `<eos>`

    def __init__(self, part: Part, fits: np.ndarray):
        self.part = part
        self.rows = np.flatnonzero(fits)
        self.left_out = len(fits) - len(self.rows)
        self.target_tokens = part.target.lengths[self.rows] + 1

    @abstractmethod
    def predictions(
        self, model: nn.Module, samples: np.ndarray, device: torch.device, options: LossOptionsT | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Logits [N, vocabulary], labels [N], and the weight of each label's loss [N], None where all weigh 1.

        options: the training's `loss`; None for a validation, in which all target tokens weigh 1.
        """

    def weights(self, options: LossOptionsT) -> np.ndarray:
        """Each sample's share in the loss's denominator, [n]: what the weights of its labels add up to."""
        return self.target_tokens

    def check(self, bound: str) -> None:
        """Tells how many pairs do not fit, and why: `bound` names the option. Raises UserError when none does."""
        if not len(self.rows):
            raise UserError(
                f"the {self.part.name} part has {self.left_out:,} pairs and none that fits {bound}: raise that, or "
                "prepare other data"
            )
        if self.left_out:
            say(f"{self.left_out:,} {self.part.name} pairs are longer than {bound}: left out")


class TranslationChooser(Chooser):
    """What a run with a `--budget` learns with: the oftener it can read its pairs, the harder learning is made.

    The bounds come from the trials in configs/README.md, where little time was too little for R-Drop, which reads each
    pair twice, and short runs liked less dropout than long ones.
    """

    keys = ("model.dropout", "loss.r_drop")
    tries_bf16 = True

    def __init__(self, pairs: Pairs[Any]):
        super().__init__(int(pairs.lengths.reshape(len(pairs.rows), -1).sum(axis=1).max()))

    def by_passes(self, config: TranslationRun, passes: float) -> list[Choice]:
        """See `Chooser`."""
        readings = passes * config.loss.readings
        dropout = next(value for bound, value in DROPOUTS if readings < bound)
        reason = f"there is time to read each pair {readings:.2g} times"
        few, often = f"fewer than {R_DROP_READINGS}", f"{R_DROP_READINGS} or more"
        r_drop = 1.0 if readings >= R_DROP_READINGS else 0.0
        return [
            Choice("model.dropout", dropout, reason),
            Choice("loss.r_drop", r_drop, f"these are {often if r_drop else few}, and it takes two for one"),
        ]


# Dropout by how often each pair is read, up to a bound; and from how many readings on R-Drop pays.
DROPOUTS = ((4, 0.1), (12, 0.2), (60, 0.3), (float("inf"), 0.4))
R_DROP_READINGS = 20


def plan_of(config: TranslationRun, pairs: Pairs[Any]) -> BatchPlan:
    """The order in which a run with these options trains on `pairs`."""
    optim = config.optim
    return BatchPlan(
        pairs.lengths,
        pairs.weights(config.loss),
        config.batch,
        seed=config.seed,
        epochs=optim.epochs,
        steps=optim.steps,
    )


def summed_loss(
    model: nn.Module, pairs: Pairs[LossOptionsT], samples: np.ndarray, options: LossOptionsT, device: torch.device
) -> Tensor:
    """Cross-entropy summed over a micro-batch's labels, each by its weight: a scalar, with gradient."""
    logits, labels, weights = pairs.predictions(model, options.read(samples), device, options)
    losses = options.losses(logits, labels)
    return (losses if weights is None else losses * weights[: len(losses)]).sum()


@torch.no_grad()
def held_out_scores(
    model: nn.Module, pairs: Pairs[Any], cluster: Cluster, own_part: OwnPart | None = None
) -> Validation:
    """Loss and accuracy over all target tokens, each given the reference before it, without smoothing or dropout.

    Every rank scores its part.
    """
    model.eval()
    batches = batches_by_length(pairs.lengths, VALIDATION_TOKENS)
    totals = torch.zeros(2, dtype=torch.float64)
    for samples in (own_part or cluster.own_part)(batches):
        logits, labels, _ = pairs.predictions(model, samples, cluster.device)
        logits = logits.float()
        totals[0] += F.cross_entropy(logits, labels, reduction="sum").item()
        totals[1] += (logits.argmax(-1) == labels).sum().item()
    model.train()
    loss, right = (cluster.sum(totals.to(cluster.device)) / int(pairs.target_tokens.sum())).tolist()
    return Validation(loss, right)


class Translating(Task):
    """A training on sentence pairs."""

    def __init__(
        self,
        name: str,
        config: TranslationRun,
        decoder: GPTDecoder | AttentionGRUDecoder,
        pairs: Pairs[Any],
        held_out: Pairs[Any],
        tokenizer: Tokenizer,
        cluster: Cluster,
        flops_per_token: float,
        *,
        calls_vary: bool = False,
    ):
        """tokenizer: the target's. flops_per_token: of reading each pair once."""
        self.name, self.model, self.calls_vary = name, decoder.model, calls_vary
        self.pairs, self.held_out, self.options, self.cluster = pairs, held_out, config.loss, cluster
        self.decoder, self.tokenizer = decoder, tokenizer
        self.samples = config.samples_to_generate(200)
        self.generated = self._generated() if self.samples and len(held_out.part) else ()
        self.plan = plan_of(config, pairs)
        self.flops_per_token = config.loss.readings * flops_per_token

    def _generated(self) -> tuple[str, ...]:
        obstacle = bleu_obstacle(self.tokenizer.language)
        if obstacle is None:
            return ("bleu", "chrf")
        if self.cluster.is_first:
            warn(f"validations have no BLEU, chrF alone: {obstacle}")
        return ("chrf",)

    def loss(self, model: nn.Module, samples: np.ndarray) -> Tensor:
        return summed_loss(model, self.pairs, samples, self.options, self.cluster.device)

    def validate(self, model: nn.Module, own_part: OwnPart) -> Validation:
        return held_out_scores(model, self.held_out, self.cluster, own_part)

    def show(self, run_dir: Path) -> None:
        from training.report.page import show  # its libraries are nothing that a start has to wait for

        show(run_dir)

    def generate(self, own_part: OwnPart) -> GeneratedScores:
        """BLEU, where there is one, and chrF (sacrebleu's) of greedy translations."""
        from sacrebleu.metrics import CHRF  # half a second, which no start has to wait for

        part = self.held_out.part
        rows = drawn(self.samples, len(part))

        def answer(batch: list[int]) -> list[str]:
            found = translate(self.decoder, [part.source[row].tolist() for row in batch])
            return [self.tokenizer.decode(each.ids) for each in found]

        answers = answers_of(rows, part.source.lengths[rows], answer, self.cluster, own_part, most=25)
        sources, references = (
            [texts[row] for row in rows.tolist()] for texts in (part.source_texts, part.target_texts)
        )
        scores = {}
        for name in self.generated:
            metric = bleu_of(self.tokenizer.language) if name == "bleu" else CHRF()
            scores[name] = metric.corpus_score(answers, [references]).score
        return GeneratedScores.of(scores, sources, references, answers)
