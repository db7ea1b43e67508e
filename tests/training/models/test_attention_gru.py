"""The GRU encoder-decoder: exact against plain formulas, blind to padding, and the same in training as in decoding."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from training import translation
from training.data.prepared import Part, Ragged, open_prepared
from training.data.tokenizers import EOS, PAD, SOS
from training.engine.batch_plan import BatchOptions, BatchPlan
from training.evaluation.translations.translators import AttentionGRUTranslator
from training.models.attention_gru import GRU, AttentionGRU, AttentionGRUOptions, ContextGRU, additive_attention
from training.seq2seq import LossOptions, TwoSides
from training.translation import held_out_scores, summed_loss

SOURCE, TARGET = 23, 19  # vocabularies
SHAPES = [
    {},
    {"layers": 2, "bidirectional": False},
    {"layers": 3, "tied_output": False},
    {"attention": "none"},
    {"attention": "none", "layers": 2, "bidirectional": False, "tied_output": False},
]


def tiny(**options: object) -> AttentionGRU:
    torch.manual_seed(1)
    shape = {"embedding_width": 10, "hidden_width": 12, "max_length": 20, "dropout": 0.0}
    model = AttentionGRU(AttentionGRUOptions(**{**shape, **options}), SOURCE, TARGET)
    with torch.no_grad():  # far from the initial near-uniform output
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def sentences(count: int, vocabulary: int, longest: int, seed: int) -> list[list[int]]:
    dice = random.Random(seed)
    return [[dice.randrange(5, vocabulary) for _ in range(dice.randint(1, longest))] for _ in range(count)]


def part_of(sources: list[list[int]], targets: list[list[int]]) -> Part:
    def ragged(rows: list[list[int]]) -> Ragged:
        values = np.array([number for row in rows for number in row], dtype=np.int32)
        return Ragged(values, np.cumsum([0, *map(len, rows)], dtype=np.int64))

    return Part("train", ragged(sources), ragged(targets), None, None, np.arange(len(sources)))


def pairs_of(count: int = 12, longest: int = 9) -> TwoSides:
    return TwoSides(part_of(sentences(count, SOURCE, longest, 1), sentences(count, TARGET, longest, 2)), 20)


def logits_of(model: AttentionGRU, pairs: TwoSides, sample: int) -> Tensor:
    return pairs.predictions(model, np.array([sample]), torch.device("cpu"))[0]


def test_additive_attention_is_the_formula_and_never_looks_at_padding():
    torch.manual_seed(0)
    query, keys, score = torch.randn(3, 4), torch.randn(3, 5, 4), torch.randn(4)
    lengths = torch.tensor([5, 1, 3])
    weights = additive_attention(query, keys, score, torch.arange(5) >= lengths[:, None])
    for row, length in enumerate(lengths.tolist()):
        energies = [float(score @ torch.tanh(query[row] + keys[row, place])) for place in range(length)]
        expected = torch.tensor(energies).softmax(0)
        torch.testing.assert_close(weights[row, :length], expected)
        assert weights[row, length:].sum() == 0
    unmasked = additive_attention(query, keys, score, None)
    torch.testing.assert_close(unmasked.sum(-1), torch.ones(3))


def test_context_gru_is_a_gru_cell_over_word_and_context():
    torch.manual_seed(0)
    ours, theirs = ContextGRU(3, 5, 4), nn.GRUCell(3 + 5, 4)
    with torch.no_grad():
        theirs.weight_ih.copy_(torch.cat([ours.from_word.weight, ours.from_context.weight], dim=1))
        theirs.bias_ih.copy_(ours.from_word.bias)
        theirs.weight_hh.copy_(ours.from_state.weight)
        theirs.bias_hh.copy_(ours.from_state.bias)
    word, context, state = torch.randn(6, 3), torch.randn(6, 5), torch.randn(6, 4)
    expected = theirs(torch.cat([word, context], dim=1), state)
    torch.testing.assert_close(ours(ours.from_word(word), ours.from_context(context), state), expected)


def test_recurrent_layers_stay_in_fp32_where_autocast_says_bf16():
    layer = GRU(4, 6, batch_first=True)
    rows = torch.randn(3, 5, 4)
    expected, _ = layer(rows)
    packed = pack_padded_sequence(rows, torch.tensor([5, 3, 2]), batch_first=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, last = layer(rows)
        short, _ = layer(packed)
    assert found.dtype == last.dtype == short.data.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("options", SHAPES, ids=str)
def test_a_sentence_gets_the_same_logits_alone_and_beside_longer_ones(options):
    model, pairs = tiny(**options), pairs_of()
    everything = np.arange(len(pairs.lengths))
    together, labels, _ = pairs.predictions(model, everything, torch.device("cpu"))
    alone = torch.cat([logits_of(model, pairs, sample) for sample in everything])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert labels.tolist() == [token for row in pairs.part.target for token in [*row.tolist(), EOS]]


@pytest.mark.parametrize("options", SHAPES, ids=str)
def test_decoding_word_by_word_gives_the_logits_of_training(options):
    model, pairs = tiny(**options), pairs_of()
    decoder = AttentionGRUTranslator(model)
    sources = [row.tolist() for row in pairs.part.source]
    longest = max(pairs.target_tokens)
    with torch.inference_mode():
        logits, state = decoder.begin(sources, longest)
        columns = [logits]
        for step in range(longest - 1):
            words = [row[step] if step < len(row) else PAD for row in map(list, pairs.part.target)]
            columns.append(decoder.extend(torch.tensor(words), state))
    for sample, length in enumerate(pairs.target_tokens):
        got = torch.stack([column[sample] for column in columns[:length]])
        torch.testing.assert_close(got, logits_of(model, pairs, sample), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", SHAPES, ids=str)
def test_selected_rows_go_on_as_they_would_have(options):
    model = tiny(**options)
    decoder = AttentionGRUTranslator(model)
    sources = sentences(5, SOURCE, 9, seed=3)
    rows = torch.tensor([4, 1, 1])
    with torch.inference_mode():
        _, whole = decoder.begin(sources, 9)
        _, some = decoder.begin(sources, 9)
        some = some.select(rows)
        words = torch.tensor([7, 8, 9, 10, 11])
        expected = decoder.extend(words, whole)[rows]
        torch.testing.assert_close(decoder.extend(words[rows], some), expected)


def test_without_teacher_forcing_the_model_reads_its_own_words():
    model, pairs = tiny(layers=2), pairs_of()
    samples = np.arange(len(pairs.lengths))
    source, lengths, inputs, _, _ = pairs.batch(samples)
    with torch.no_grad():
        logits = model(source, lengths, inputs, None, torch.ones(inputs.shape, dtype=torch.bool))
        fed = torch.cat([inputs[:, :1], logits.argmax(-1)[:, :-1]], dim=1)  # <sos>, then what it said
        torch.testing.assert_close(model(source, lengths, fed), logits, rtol=1e-4, atol=1e-5)
        given = model(source, lengths, inputs)
        assert (given - logits).abs().max() > 0.01
        none = model(source, lengths, inputs, None, torch.zeros(inputs.shape, dtype=torch.bool))
        torch.testing.assert_close(none, given, rtol=1e-4, atol=1e-5)


def test_share_of_own_words_is_what_the_option_says(monkeypatch):
    pairs, drawn = pairs_of(400), []
    model = tiny()
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda *inputs: drawn.append(inputs[4]) or forward(*inputs))
    torch.manual_seed(3)
    pairs.predictions(model, np.arange(400), torch.device("cpu"), LossOptions(teacher_forcing=0.8))
    assert drawn[0].float().mean().item() == pytest.approx(0.2, abs=0.03)
    pairs.predictions(model, np.arange(400), torch.device("cpu"))
    assert drawn[1] is None


def test_loss_is_over_real_target_tokens_only():
    model, pairs = tiny(), pairs_of()
    samples = np.arange(len(pairs.lengths))
    for smoothing in (0.0, 0.1):
        expected = sum(
            F.cross_entropy(
                logits_of(model, pairs, sample),
                torch.tensor([*pairs.part.target[sample].tolist(), EOS]),
                label_smoothing=smoothing,
                reduction="sum",
            ).item()
            for sample in samples
        )
        for r_drop in (0.0, 5.0):  # without dropout both passes say the same
            options = LossOptions(label_smoothing=smoothing, r_drop=r_drop)
            loss = summed_loss(model, pairs, samples, options, torch.device("cpu"))
            assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_validation_is_the_mean_over_real_target_tokens_without_dropout_whatever_the_batches(monkeypatch):
    model, pairs = tiny(dropout=0.5), pairs_of()
    loss = right = 0.0
    for sample in range(len(pairs.lengths)):
        logits = logits_of(model, pairs, sample)
        labels = torch.tensor([*pairs.part.target[sample].tolist(), EOS])
        loss += F.cross_entropy(logits, labels, reduction="sum").item()
        right += (logits.argmax(-1) == labels).sum().item()
    tokens = int(pairs.target_tokens.sum())
    model.train()
    for most in (15, 40, 2048):
        monkeypatch.setattr(translation, "VALIDATION_TOKENS", most)
        found = held_out_scores(model, pairs, SimpleNamespace(device="cpu", own_part=list, sum=lambda values: values))
        assert (found.loss, found.accuracy) == (pytest.approx(loss / tokens, rel=1e-5), pytest.approx(right / tokens))
        assert model.training


def test_r_drop_reads_every_pair_under_two_dropout_masks():
    model, pairs = tiny(dropout=0.5).train(), pairs_of()
    samples, cpu = np.arange(len(pairs.lengths)), torch.device("cpu")

    def loss(agreement: float) -> float:
        torch.manual_seed(5)
        return summed_loss(model, pairs, samples, LossOptions(r_drop=agreement), cpu).item()

    torch.manual_seed(5)
    logits, labels, _ = pairs.predictions(model, np.concatenate([samples, samples]), cpu)
    first, second = logits.log_softmax(-1).chunk(2)
    assert not torch.allclose(first, second)
    apart = ((first.exp() - second.exp()) * (first - second)).sum().item()
    expected = F.cross_entropy(logits, labels, reduction="sum").item() / 2
    assert loss(4.0) == pytest.approx(expected + apart, rel=1e-5)
    assert loss(8.0) == pytest.approx(expected + 2 * apart, rel=1e-5)


def test_batch_holds_what_the_encoder_reads_and_the_decoder_is_given():
    pairs = TwoSides(part_of([[5, 6, 7], [8]], [[9], [10, 11]]), 20)
    source, lengths, inputs, scored, labels = pairs.batch(np.array([0, 1]))
    assert source.tolist() == [[5, 6, 7, EOS], [8, EOS, PAD, PAD]]
    assert lengths.tolist() == [4, 2]
    assert inputs.tolist() == [[SOS, 9, EOS], [SOS, 10, 11]]  # behind a sentence's end nothing is scored
    assert scored.tolist() == [0, 1, 3, 4, 5]
    assert labels.tolist() == [9, EOS, 10, 11, EOS]
    assert pairs.lengths.tolist() == [[2, 4], [3, 2]]


def test_longer_pairs_are_left_out_and_counted():
    pairs = TwoSides(part_of([[5] * 20, [5] * 21, [5]], [[6], [6], [6] * 21]), 20)
    assert pairs.rows.tolist() == [0] and pairs.left_out == 2


def test_attention_map_has_a_row_for_every_word_that_is_said():
    model = tiny(layers=2)
    weights = model.attention_map(torch.tensor([5, 6, 7, EOS]), torch.tensor([SOS, 8, 9]))
    assert weights.shape == (3, 4)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3))


def test_batches_of_real_sentences_are_padded_little_on_both_sides(real_data):
    pairs = TwoSides(open_prepared(real_data).part("train"), 80)
    for tokens, most in ((1024, 0.05), (4096, 0.09)):
        options = BatchOptions(tokens_per_micro_batch=tokens)
        assert BatchPlan(pairs.lengths, pairs.target_tokens, options, seed=1, epochs=1).padding_share() < most


def test_flops_are_six_times_the_weights_that_a_token_passes():
    model = tiny(attention="none", tied_output=False)
    passed = {"encoder.embedding.weight", "embedding.weight", "first_state.weight"}
    matrices = {name: p.numel() for name, p in model.named_parameters() if p.dim() >= 2 and name not in passed}
    encoder = sum(count for name, count in matrices.items() if name.startswith("encoder."))
    decoder = sum(matrices.values()) - encoder
    expected = 6 * (encoder * 4 + decoder * 6) / 10
    assert model.flops_per_token(4, 6) == pytest.approx(expected)
    with_attention = tiny(tied_output=False)
    assert with_attention.flops_per_token(4, 6) > expected


def test_every_parameter_learns():
    for options in SHAPES:
        model, pairs = tiny(**options), pairs_of()
        summed_loss(model, pairs, np.arange(12), LossOptions(), torch.device("cpu")).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, (options, name)
