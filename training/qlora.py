"""Trains LoRA adapters on a chat model that is held in 4 bits: QLoRA (Dettmers et al. 2023).

    python -m launch.run configs/qlora/qwen2.5-3b-t4x2.yaml
    python -m training.qlora configs/qlora/qwen2.5-7b-t4x2.yaml --dry-run

The same command starts, resumes, and says so when the run is finished. --dry-run first says, from the model's config
alone, how much memory a process needs and whether the card has it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from training.base.console import UserError, run_main, say
from training.base.environment import staged
from training.base.hub import commit_of
from training.base.options import Revision, parse
from training.data.answer_metrics import mean_of_tasks
from training.data.conversations import (
    ConversationPart,
    Conversations,
    asked_of,
    learned_tokens,
    open_conversations,
)
from training.data.prepared import Ragged
from training.engine.batch_plan import BatchOptions, BatchPlan, Mixture, batches_by_length
from training.engine.budget import within_budget
from training.engine.cluster import Cluster
from training.engine.generating import GeneratedScores, OwnPart, answers_of, drawn
from training.engine.loop import train
from training.engine.precision import Precision, choose_precision
from training.engine.run_folder import refuse_other_options
from training.engine.task import RunOptions, Task, Validation
from training.engine.watchdog import watched_ranks
from training.engine.zero import Spreading
from training.models.adapted_model import AdaptedModel, LoraOptions, add_adapters, read_adapters, spread_by_layer
from training.models.base_model import (
    QuantisationOptions,
    find_base_model,
    fingerprint_of,
    flops_per_token,
    load_base_model,
    read_config,
)
from training.models.generation import generate
from training.models.memory_estimate import (
    FineTuningChooser,
    MemoryEstimate,
    MemoryOptions,
    card_of,
    checked_memory,
    memory_of,
)

COMPUTE_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LIBRARIES = ("transformers", "peft", "bitsandbytes")


class QLoRAConfig(RunOptions):
    """All options of a QLoRA training."""

    # Compared by content, or without consequence for the result.
    may_change = RunOptions.may_change | {"base_model", "base_revision", "memory"}

    base_model: str = Field(description="folder of the chat model, or its name on the Hugging Face hub")
    base_revision: Revision | None = Field(None, description="its commit on the hub; null: what is here, or the newest")
    quantisation: QuantisationOptions = Field(default_factory=QuantisationOptions)
    lora: LoraOptions = Field(default_factory=LoraOptions)
    memory: MemoryOptions = Field(default_factory=MemoryOptions)

    @model_validator(mode="after")
    def _without_average(self) -> QLoRAConfig:
        if self.optim.ema_decay is not None:
            raise ValueError("optim.ema_decay would keep a second copy of the base model: leave it out")
        return self

    @model_validator(mode="after")
    def _can_be_spread(self) -> QLoRAConfig:
        if self.spreads_weights and self.lora.dora:
            raise ValueError(
                "lora.dora reads the base model's weights apart from the layers they belong to, where zero.stage 3 has "
                "not brought them together: take --lora.dora false, or --zero.stage 2"
            )
        if self.spreads_weights and not self.memory.checkpoint_layers:
            raise ValueError(
                "memory.checkpoint_layers false does not go with zero.stage 3: DeepSpeed parts the adapters' weights "
                "before their gradients are there; take --memory.checkpoint_layers true, or --zero.stage 2"
            )
        return self


class Answers:
    """The conversations of a part: everything is read, the answers and their end tokens are learned.

    That is the last answer of each, or those that the data names. Raises UserError for a conversation without a
    supervised token, which would silently train nothing.
    """

    def __init__(self, part: ConversationPart, pad_id: int, weights: Mapping[str, float] | None = None):
        """weights: of a mixture, those of its sources."""
        self.part, self.pad_id = part, pad_id
        self.mixture = None
        if weights and part.sources is not None:
            numbers = {name: number for number, name in enumerate(weights)}
            source = np.array([numbers[name] for name in part.sources], dtype=np.int64)
            self.mixture = Mixture(tuple(weights), tuple(weights.values()), source)
        self.lengths = part.ids.lengths - 1  # [n], inputs: the last token is only a label
        learned = part.learned
        if learned is None:
            ends = np.stack([part.prompt_lengths, part.ids.lengths], axis=1)
            learned = Ragged(ends.ravel(), 2 * np.arange(len(part) + 1))
        self._learned = learned  # per row from, to of each answer with its end token
        self.answer_tokens = learned_tokens(learned)  # [n], supervised tokens
        row = np.repeat(np.arange(len(part)), learned.lengths // 2)
        first, behind = learned.values[::2], learned.values[1::2]
        wrong = np.bincount(row, (first < 1) | (behind <= first) | (behind > part.ids.lengths[row]), len(part))
        without = np.flatnonzero((self.answer_tokens < 1) | (wrong > 0))
        if len(without):
            raise UserError(
                f"{len(without):,} conversations of the {part.name} part have no supervised token, the first is "
                f"{part.uids[int(without[0])]}: prepare the data again"
            )

    def batch(self, samples: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs [B, T], padded on the right; scored [N], indices into the B*T positions; their labels [N]."""
        ids = self.part.ids.padded(samples, self.pad_id)
        learned = self._learned.take(samples)
        row = np.repeat(np.arange(len(samples)), learned.lengths // 2)
        ends = np.zeros(ids.shape, dtype=np.int64)
        # The token before an answer predicts its first one.
        np.add.at(ends, (row, learned.values[::2] - 1), 1)
        np.add.at(ends, (row, learned.values[1::2] - 1), -1)
        scored = ends.cumsum(axis=1)[:, :-1] > 0
        inputs, labels = ids[:, :-1], ids[:, 1:][scored]
        return torch.from_numpy(inputs.copy()), torch.from_numpy(np.flatnonzero(scored)), torch.from_numpy(labels)


def losses_of(model: nn.Module, answers: Answers, samples: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cross-entropy (nats) [N] of the samples' supervised tokens, in order, and whether each would be predicted."""
    inputs, scored, labels = (tensor.to(device, non_blocking=True) for tensor in answers.batch(samples))
    return model(inputs, scored, labels)


@torch.no_grad()
def validation_scores(
    model: nn.Module,
    answers: Answers,
    cluster: Cluster,
    precision: Precision,
    tokens: int,
    own_part: OwnPart | None = None,
) -> Validation:
    """Loss and accuracy over all supervised tokens, each given the conversation before it, without dropout.

    tokens: positions of a batch. Every rank scores its part.
    """
    model.eval()
    mixture = answers.mixture
    names = () if mixture is None else mixture.names
    totals = torch.zeros(2 + len(names), dtype=torch.float64)
    for samples in (own_part or cluster.own_part)(batches_by_length(answers.lengths, tokens)):
        with precision.autocast():
            losses, right = losses_of(model, answers, samples, cluster.device)
        totals[:2] += torch.tensor([losses.sum(dtype=torch.float64).item(), right.sum().item()], dtype=torch.float64)
        if mixture is not None:
            source = np.repeat(mixture.source[samples], answers.answer_tokens[samples])
            totals[2:].index_add_(0, torch.from_numpy(source), losses.double().cpu())
    model.train()
    summed = cluster.sum(totals.to(cluster.device)).tolist()
    tokens_in_all = int(answers.answer_tokens.sum())
    by_source = {}
    if mixture is not None:
        counts = np.bincount(mixture.source, answers.answer_tokens, len(names)).tolist()
        by_source = {name: nats / n for name, nats, n in zip(names, summed[2:], counts, strict=True) if n}
    return Validation(summed[0] / tokens_in_all, summed[1] / tokens_in_all, by_source)


# An answer that is generated at a validation ends here at the latest.
GENERATED_TOKENS = 512


class Answering(Task):
    """A training on conversations."""

    name = "qlora"
    libraries = LIBRARIES

    model: AdaptedModel

    def __init__(
        self,
        answers: Answers,
        held_out: Answers,
        data: Conversations,
        cluster: Cluster,
        precision: Precision,
        tokens: int,
        samples: int = 0,
    ):
        """tokens: positions of a batch of the validation. samples: how many are answered at each."""
        self.answers, self.held_out, self.data, self.cluster = answers, held_out, data, cluster
        self.precision, self.tokens, self.samples = precision, tokens, samples
        self.generated = ("score",) if samples and len(held_out.part) else ()

    def loss(self, model: nn.Module, samples: np.ndarray) -> Tensor:
        return losses_of(model, self.answers, samples, self.cluster.device)[0].sum()

    def read_foreign(self, folder: Path) -> dict[str, Tensor] | None:
        return read_adapters(folder, self.model.model)

    def validate(self, model: nn.Module, own_part: OwnPart) -> Validation:
        return validation_scores(model, self.held_out, self.cluster, self.precision, self.tokens, own_part)

    def show(self, run_dir: Path) -> None:
        from training.report.page import show  # its libraries are nothing that a start has to wait for

        show(run_dir)

    def generate(self, own_part: OwnPart) -> GeneratedScores:
        """The mean of the tasks' scores, see `training.data.answer_metrics`."""
        from training.data.chat import reopened  # slow to import

        tokenizer = reopened(self.data.folder / "tokenizer", self.data.meta["tokenizer"])
        part = self.held_out.part
        rows = drawn(self.samples, len(part))
        asked = {row: asked_of(part, row, tokenizer) for row in rows.tolist()}

        def answer(batch: list[int]) -> list[str]:
            found = generate(
                self.model.model,
                [asked[row].prompt for row in batch],
                end_id=tokenizer.end_id,
                pad_id=tokenizer.pad_id,
                max_new_tokens=GENERATED_TOKENS,
                precision=self.precision,
            )
            return [tokenizer.decode(each.ids) for each in found]

        lengths = np.array([len(each.prompt) for each in asked.values()])
        answers = answers_of(rows, lengths, answer, self.cluster, own_part, most=8)
        sources, references = ([getattr(each, of) for each in asked.values()] for of in ("question", "reference"))
        score = mean_of_tasks([part.tasks[row] for row in rows.tolist()], answers, references)
        return GeneratedScores.of({"score": score}, sources, references, answers)


def plan_of(config: QLoRAConfig, answers: Answers) -> BatchPlan:
    """The order in which the run trains on `answers`."""
    return BatchPlan(
        answers.lengths,
        answers.answer_tokens,
        config.batch,
        seed=config.seed,
        epochs=config.optim.epochs,
        steps=config.optim.steps,
        mixture=answers.mixture,
    )


def build_model(
    config: QLoRAConfig,
    folder: Path,
    compute_type: torch.dtype,
    device: torch.device,
    *,
    trains: bool = True,
    spreading: Spreading | None = None,
) -> AdaptedModel:
    """The base model in `folder` with new adapters, on `device`. Equal seeds of torch give equal adapters.

    spreading: spreads the base model while it is loaded, so that no rank has it whole.
    """
    take = None if spreading is None else spreading.take
    base = load_base_model(folder, config.quantisation, compute_type, device, take)
    adapted = add_adapters(base, config.lora)
    if trains and config.spreads_weights:
        spread_by_layer(adapted)
    memory = config.memory
    model = AdaptedModel(
        adapted, logits_tokens=memory.logits_tokens, checkpoint_layers=trains and memory.checkpoint_layers
    )
    with nullcontext() if spreading is None else spreading.brought_together(model):
        model.check()
    return model


def main() -> int:
    config, dry_run = parse(QLoRAConfig, sys.argv[1:], prog="python -m training.qlora", about=__doc__)
    data = open_conversations(staged(config.data))
    pad_id = data.meta["tokenizer"]["pad_id"]
    answers, held_out = (Answers(data.part(name), pad_id, data.mixture) for name in ("train", "validation"))
    # Made before a base model is fetched, since it says where a conversation is too long.
    plan_as_given = plan_of(config, answers) if config.budget is None else None
    folder = find_base_model(config.base_model, config.base_revision, weights=not dry_run)
    if commit := commit_of(folder):
        say(f"base model {config.base_model} at {commit}")
    about = read_config(folder, config.quantisation)
    text = about.get_text_config()

    with watched_ranks(config) as cluster:
        cluster.on_first(lambda: data.check_tokenizer(folder, text.vocab_size))
        longest = int(max(answers.lengths.max(), held_out.lengths.max(initial=0)))
        if longest > text.max_position_embeddings:
            raise UserError(
                f"{data.folder} has conversations of {longest:,} tokens, but the base model takes "
                f"{text.max_position_embeddings:,}: prepare the data with a smaller --max_length"
            )
        precision = choose_precision(config.precision, cluster.device)
        compute_type = COMPUTE_TYPES[precision.name]

        def build(config: QLoRAConfig) -> Answering:
            plan = plan_of(config, answers) if plan_as_given is None else plan_as_given
            memory = cluster.on_first(
                lambda: checked_memory(config, about, plan, compute_type, cluster, dry_run=dry_run)
            )
            if dry_run:  # not before it was said whether they fit
                find_base_model(config.base_model, config.base_revision or commit_of(folder))
            torch.manual_seed(config.seed)  # the same adapters on every rank
            tokens = config.batch.tokens_per_micro_batch or int(plan.lengths.max())
            supervised = float(answers.answer_tokens.sum() / answers.lengths.sum())
            samples = config.samples_to_generate(0)
            task = Answering(answers, held_out, data, cluster, precision, tokens, samples)
            spreading = Spreading(config.zero, cluster) if config.spreads_weights else None
            task.model = build_model(config, folder, compute_type, cluster.device, spreading=spreading)
            task.plan = plan
            task.flops_per_token = flops_per_token(about, float(answers.lengths.mean()), supervised)
            if memory is not None:  # on the first rank, which is the one that prints
                task.memory = f"{memory.tensors / 1e9:.2f} GB of tensors a process"
            task.built_on = {"base_model": fingerprint_of(folder)}
            return task

        def memory_for(batch: BatchOptions) -> MemoryEstimate:
            tried = config.model_copy(update={"batch": batch})
            return memory_of(tried, about, plan_of(tried, answers), compute_type, device_type, cluster.world_size)

        gpu_bytes, device_type = card_of(config.memory, cluster)
        lengths, mixture = answers.lengths, answers.mixture
        samples = len(lengths) if mixture is None else sum(mixture.drawn())
        chooser = FineTuningChooser(int(lengths.max()), int(samples * lengths.mean()), memory_for, gpu_bytes)
        config = within_budget(config, build, data, cluster, sys.argv[1:], chooser, dry_run=dry_run)
        if not dry_run:
            cluster.on_first(lambda: refuse_other_options(config))  # before minutes are spent on loading
        return train(config, build(config), data, cluster, dry_run=dry_run)


if __name__ == "__main__":
    run_main(main)
