"""The GPT, and what it is trained on: checked against plain, slow code that says the same thing."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from training.data.prepared import Part, Ragged
from training.data.tokenizers import EOS, PAD, SEP, SOS, UNK
from training.engine.batch_plan import BatchOptions, BatchPlan
from training.gpt import LossOptions, Sequences
from training.models.gpt import GPT, GPTOptions, Vocabularies, attend
from training.translation import summed_loss

VOCABULARY = 50
JOINT, APART = Vocabularies(VOCABULARY), Vocabularies(VOCABULARY, 40)
KINDS = [pytest.param(*kind, id="-".join(kind)) for kind in product(("learned", "rotary"), ("layer", "rms"))]


def model_of(
    positions: str = "rotary", norm: str = "layer", vocabularies: Vocabularies = JOINT, **options: object
) -> GPT:
    """A small model in evaluation mode, with weights large enough for every part to matter."""
    torch.manual_seed(0)
    values = {"layers": 2, "heads": 2, "width": 32, "context": 24, "dropout": 0.2, **options}
    model = GPT(GPTOptions(positions=positions, norm=norm, **values), vocabularies).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def tokens_of(*shape: int) -> Tensor:
    return torch.randint(5, VOCABULARY, shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(("positions", "norm"), KINDS)
@torch.no_grad()
def test_later_tokens_change_nothing_earlier(positions, norm):
    model, tokens = model_of(positions, norm), tokens_of(3, 12)
    logits = model(tokens)
    for place in range(12):
        changed = tokens.clone()
        changed[:, place] = (changed[:, place] + 7) % VOCABULARY
        difference = (model(changed) - logits).abs().amax(dim=(0, 2))
        assert (difference[:place] < 1e-5).all()
        assert (difference[place:] > 1e-3).all(), "every later position must see it"


@pytest.mark.parametrize(("positions", "norm"), KINDS)
@torch.no_grad()
def test_padding_on_the_right_changes_nothing(positions, norm):
    model, tokens = model_of(positions, norm), tokens_of(3, 10)
    padded = torch.cat([tokens, torch.full((3, 6), PAD)], dim=1)
    torch.testing.assert_close(model(padded)[:, :10], model(tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("positions", "norm"), KINDS)
@torch.no_grad()
def test_scored_gives_the_selected_rows_of_all_logits(positions, norm):
    model, tokens = model_of(positions, norm), tokens_of(3, 10)
    scored = torch.tensor([0, 4, 9, 10, 17, 29])
    torch.testing.assert_close(model(tokens, scored), model(tokens).flatten(0, 1)[scored], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("positions", "norm"), KINDS)
@torch.no_grad()
def test_decoding_with_the_cache_equals_the_whole_forward_pass(positions, norm):
    """Prompts of different lengths in one batch, and new tokens up to the end of the context."""
    model, context = model_of(positions, norm), 24
    lengths, tokens = torch.tensor([3, 9, 1, 6]), tokens_of(4, context)
    prompts = tokens[:, :9].clone()
    prompts[torch.arange(9) >= lengths[:, None]] = PAD
    rows = torch.arange(4)
    whole = model(tokens)
    logits, cache = model.prefill(prompts, lengths, capacity=context)
    torch.testing.assert_close(logits, whole[rows, lengths - 1], rtol=1e-5, atol=1e-5)
    for _ in range(context - 9):
        at = cache.lengths.clone()
        logits = model.extend(tokens[rows, at], cache)
        torch.testing.assert_close(logits, whole[rows, at], rtol=1e-5, atol=1e-5)
    assert cache.lengths.tolist() == (lengths + context - 9).tolist()


@torch.no_grad()
def test_selected_rows_of_the_cache_go_on_as_they_were():
    model, lengths, tokens = model_of(), torch.tensor([2, 5, 4]), tokens_of(3, 8)
    _, cache = model.prefill(tokens[:, :5], lengths, capacity=8)
    rows = torch.tensor([2, 0, 2])
    logits = model.extend(tokens[rows, 6], cache.select(rows))
    for row, expected in zip(rows, logits, strict=True):
        alone = torch.cat([tokens[row, : lengths[row]], tokens[row, 6:7]])
        torch.testing.assert_close(model(alone[None])[0, -1], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("positions", "norm"), KINDS)
@torch.no_grad()
def test_attention_maps_sum_to_one_and_see_no_future(positions, norm):
    model, tokens = model_of(positions, norm, layers=3), tokens_of(11)
    maps = model.attention_maps(tokens)
    assert [layer.shape for layer in maps] == [(2, 11, 11)] * 3
    for layer in maps:
        torch.testing.assert_close(layer.sum(-1), torch.ones(2, 11))
        assert (layer.triu(1) == 0).all()
        assert (layer >= 0).all()


@pytest.mark.parametrize(("positions", "norm"), KINDS)
@torch.no_grad()
def test_attention_maps_are_what_the_model_attends_with(positions, norm):
    """With the maps put in the place of the fused kernel, the first layer's attention gives the same output."""
    model, tokens = model_of(positions, norm), tokens_of(11)
    block = model.blocks[0]
    x, rotation = model._embed(tokens[None], torch.arange(11))
    normed = block.attention_norm(x)
    _, _, value = block.attention.project(normed, rotation)
    weighted = block.attention.merge(model.attention_maps(tokens)[0] @ value)
    torch.testing.assert_close(weighted, block.attention(normed, rotation), rtol=1e-5, atol=1e-5)


def test_operations_are_counted():
    """Against torch's own counter, which knows the weights' products alone, and the attention pair by pair."""
    model = model_of(vocabularies=APART, context=32)
    tokens, scored = tokens_of(1, 28), torch.arange(11, 28)
    per_token = model.flops_per_token(28, len(scored))
    weights = 2 * 12 * 32**2 * 28 + VOCABULARY * 32 * len(scored)
    seen = 28 * 29 / 2
    assert per_token * 28 == pytest.approx(6 * weights + 3 * 2 * 4 * 32 * seen, rel=0.03)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens, scored).sum().backward()
    pairs = 28 * 28  # the counter takes attention for what a plain implementation computes
    assert counter.get_total_flops() == 6 * weights + 3 * 2 * 4 * 32 * pairs


def test_a_source_vocabulary_follows_behind_the_target_and_special_tokens_are_there_once():
    assert (JOINT.total, APART.total) == (50, 85)
    ids = [UNK, 5, 39]
    assert JOINT.prompt(ids).tolist() == [SOS, UNK, 5, 39, SEP]
    assert APART.prompt(ids).tolist() == [SOS, UNK, 50, 84, SEP]
    assert model_of(vocabularies=APART)(tokens_of(1, 4)).shape == (1, 4, 50), "the target's ids alone are written"


def test_bf16_gives_the_gradients_of_fp32_up_to_its_precision():
    def gradient(precision: torch.dtype) -> Tensor:
        model, tokens = model_of(), tokens_of(3, 12)
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            logits = model(tokens[:, :-1])
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        loss.backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    exact, rounded = gradient(torch.float32), gradient(torch.bfloat16)
    assert 0 < (rounded - exact).norm() / exact.norm() < 0.03


def test_attention_in_bf16_is_computed_in_fp32_on_a_cpu():
    inputs = torch.randn(3, 2, 2, 9, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        attended = attend(*inputs)
    assert torch.equal(attended, attend(*inputs.float()))


@torch.no_grad()
def test_rotary_attention_depends_on_distance_alone():
    """Su et al. 2021, eq. 16: the score of two equal tokens is a function of how far apart they stand."""
    model = model_of("rotary", layers=1, heads=1)
    block = model.blocks[0]
    x, rotation = model._embed(torch.full((1, 20), 7), torch.arange(20))
    query, key, _ = block.attention.project(block.attention_norm(x), rotation)
    scores = (query @ key.transpose(-2, -1))[0, 0]
    for distance in range(-19, 20):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[0].expand_as(diagonal), rtol=1e-4, atol=1e-4)
    assert scores[0].std() > 1e-3


def test_dropout_acts_in_training_and_not_in_evaluation():
    model, tokens = model_of(dropout=0.5), tokens_of(2, 8)
    assert torch.equal(model(tokens), model(tokens))
    model.train()
    assert not torch.equal(model(tokens), model(tokens))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"heads": 3, "width": 32}, r"model.heads \(3\) must divide model.width \(32\)"),
        ({"heads": 32, "width": 32}, "rotary positions need an even width per head"),
        ({"layers": 0}, "layers"),
        ({"dropout": 1.0}, "dropout"),
        ({"context": 3}, "context"),
        ({"positions": "sinus"}, "positions"),
        ({"source": "backwards"}, "source"),
        ({"norm": "batch"}, "norm"),
        ({"depth": 3}, "depth"),
    ],
)
def test_impossible_shape_is_refused(options, said):
    with pytest.raises(ValidationError, match=said):
        GPTOptions(**options)


def test_learned_positions_may_have_an_odd_width_per_head():
    GPTOptions(heads=32, width=32, positions="learned")


# What the model is trained on. The data below hold a longest pair, a shortest pair, and one that does not fit.

CONTEXT = 20
_random = np.random.default_rng(4)
SOURCES = [_random.integers(5, VOCABULARY, n).tolist() for n in (1, 9, 3, 12, 7, 1, 5, 30, 2, 6, 6, 8)]
TARGETS = [_random.integers(5, VOCABULARY, n).tolist() for n in (1, 9, 8, 2, 7, 14, 5, 4, 2, 3, 11, 1)]
FITTING = [row for row in range(12) if len(SOURCES[row]) + len(TARGETS[row]) + 2 <= CONTEXT]


def ragged(rows: list[list[int]]) -> Ragged:
    return Ragged(np.concatenate(rows).astype(np.int32), np.cumsum([0, *map(len, rows)], dtype=np.int64))


def sequences_of(vocabularies: Vocabularies) -> Sequences:
    sources = [[token if vocabularies.source is None else 5 + token % 35 for token in row] for row in SOURCES]
    part = Part("train", ragged(sources), ragged(TARGETS), [""] * 12, [""] * 12, np.arange(12))  # type: ignore[arg-type]
    return Sequences(part, CONTEXT, vocabularies)


@pytest.fixture(params=[JOINT, APART], ids=["joint", "apart"])
def sequences(request: pytest.FixtureRequest) -> Sequences:
    return sequences_of(request.param)


def whole_sequence(sequences: Sequences, row: int) -> list[int]:
    return [*sequences.vocabularies.prompt(sequences.part.source[row]).tolist(), *TARGETS[row], EOS]


def test_pairs_longer_than_the_context_are_left_out_and_counted(sequences):
    assert len(FITTING) == 11
    assert sequences.left_out == 1
    assert sequences.lengths.tolist() == [len(whole_sequence(sequences, row)) - 1 for row in FITTING]
    assert sequences.lengths.max() == CONTEXT
    assert sequences.target_tokens.tolist() == [len(TARGETS[row]) + 1 for row in FITTING]
    assert sequences.source_tokens.tolist() == [len(SOURCES[row]) + 1 for row in FITTING]


@pytest.mark.parametrize("with_source", [False, True])
@pytest.mark.parametrize("samples", [list(range(11)), [3], [10, 0, 4, 1]], ids=["all", "one", "some"])
def test_batch_holds_source_separator_target_and_labels_one_further(sequences, samples, with_source):
    expected_inputs, expected_scored, expected_labels, expected_is_target = [], [], [], []
    width = max(len(whole_sequence(sequences, FITTING[sample])) - 1 for sample in samples)
    for place, sample in enumerate(samples):
        row = FITTING[sample]
        sequence = whole_sequence(sequences, row)
        inputs, labels = sequence[:-1], sequence[1:]
        expected_inputs.append(inputs + [PAD] * (width - len(inputs)))
        for position, label in enumerate(labels):
            is_target = position > len(SOURCES[row])  # what is predicted behind <sep> is the target's
            if with_source or is_target:
                expected_scored.append(place * width + position)
                expected_labels.append(label)
                expected_is_target.append(is_target)
    inputs, scored, labels, is_target = sequences.batch(np.array(samples), with_source=with_source)
    assert inputs.tolist() == expected_inputs
    assert scored.tolist() == expected_scored
    assert labels.tolist() == expected_labels
    assert is_target.tolist() == expected_is_target


def plain_mean_loss(model: GPT, sequences: Sequences, rows: list[int], options: LossOptions) -> float:
    """Token by token and sequence by sequence, unpadded, as the textbook has it; the mean over all tokens at once."""
    total = weights = 0.0
    for row in rows:
        sequence, prompt = whole_sequence(sequences, row), len(SOURCES[row]) + 2
        logits = model(torch.tensor([sequence[:-1]]))
        log_probabilities = logits[0].double().log_softmax(-1)
        for position, label in enumerate(sequence[1:]):
            weight = 1.0 if position >= prompt - 1 else options.source_weight
            if not weight:
                continue
            smooth = options.label_smoothing
            loss = -(1 - smooth) * log_probabilities[position, label] - smooth * log_probabilities[position].mean()
            total += weight * float(loss)
            weights += weight
    return total / weights


@pytest.mark.parametrize(("vocabularies", "source_weight"), [(JOINT, 0.0), (JOINT, 0.3), (JOINT, 1.0), (APART, 0.0)])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("r_drop", [0.0, 5.0])  # without dropout both passes say the same
@torch.no_grad()
def test_loss_of_a_step_is_the_mean_over_all_its_tokens(vocabularies, source_weight, label_smoothing, r_drop):
    """Never a mean of means: the micro-batches of a step differ much in how many tokens they score."""
    sequences = sequences_of(vocabularies)
    model = model_of(context=CONTEXT, vocabularies=vocabularies)
    options = LossOptions(source_weight=source_weight, label_smoothing=label_smoothing, r_drop=r_drop)
    batches = BatchOptions(tokens_per_micro_batch=40, micro_batches_per_step=3)
    plan = BatchPlan(sequences.lengths, sequences.weights(options), batches, seed=1, epochs=2)
    cpu = torch.device("cpu")
    for step in range(plan.steps):
        parts = [summed_loss(model, sequences, batch.samples, options, cpu) for batch in plan.step(step)]
        rows = [FITTING[sample] for batch in plan.step(step) for sample in batch.samples]
        expected = plain_mean_loss(model, sequences, rows, options)
        assert float(sum(parts)) / plan.weight(step) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_gradient_reaches_every_parameter(positions):
    for vocabularies in (JOINT, APART):
        model = model_of(positions, context=CONTEXT, vocabularies=vocabularies)
        sequences = sequences_of(vocabularies)
        summed_loss(model, sequences, np.arange(11), LossOptions(), torch.device("cpu")).backward()
        assert [name for name, parameter in model.named_parameters() if not parameter.grad.abs().sum() > 0] == []
