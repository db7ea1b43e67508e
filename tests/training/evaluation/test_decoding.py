"""Decoding both models in batches: the same translations as the obvious way, and an end to every sentence."""

import math
import random
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import cache

import pytest
import torch

from tests.bench.decoding import translate_plainly
from training.base.console import UserError
from training.data.tokenizers import EOS, PAD, SEP, SOS
from training.evaluation.translations.translators import AttentionGRUTranslator, GPTTranslator
from training.models.attention_gru import AttentionGRU, AttentionGRUOptions
from training.models.decoders import Ensemble
from training.models.decoding import Decoder, Translation, beam_search, greedy_search, translate
from training.models.gpt import GPT, GPTOptions, Vocabularies

VOCABULARY = 40
JOINT, APART = Vocabularies(VOCABULARY), Vocabularies(VOCABULARY, VOCABULARY + 3)

Logits = Callable[[Sequence[int], Sequence[int]], torch.Tensor]


def tiny_gpt(vocabularies: Vocabularies = JOINT, **options: object) -> GPT:
    torch.manual_seed(1)
    model = GPT(GPTOptions(**{"layers": 2, "heads": 2, "width": 16, "context": 48, **options}), vocabularies)
    # Far from the initial near-uniform output, so that rounding decides no token, and each model says different things.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.4)
        model.embedding.weight[EOS] *= 1.6  # chosen often enough for translations of all lengths
    return model.eval()


def tiny_gru(**options: object) -> AttentionGRU:
    torch.manual_seed(1)
    shape = {"embedding_width": 16, "hidden_width": 16, "max_length": 30, **options}
    model = AttentionGRU(AttentionGRUOptions(**shape), VOCABULARY + 3, VOCABULARY)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
        model.output_bias[EOS] += 1
    return model.eval()


@cache
def decoders() -> dict[str, tuple[Decoder, Logits]]:
    """Every kind of model as a decoder, and the logits behind a source and a beginning, by the forward of training."""

    def of_gpt(model: GPT) -> tuple[Decoder, Logits]:
        with torch.no_grad():
            model.embedding.weight[EOS] *= 1.5  # more of the beam searches come to an end than are cut off

        def logits(source: Sequence[int], ids: Sequence[int]) -> torch.Tensor:
            prompt = model.vocabularies.prompt(source)
            return model(torch.tensor([[*prompt, *ids]]))[0, -1]

        return GPTTranslator(model), logits

    def of_gru(model: AttentionGRU) -> tuple[Decoder, Logits]:
        def logits(source: Sequence[int], ids: Sequence[int]) -> torch.Tensor:
            lengths = torch.tensor([len(source) + 1])
            return model(torch.tensor([[*source, EOS]]), lengths, torch.tensor([[SOS, *ids]]))[0, -1]

        return AttentionGRUTranslator(model), logits

    def together(*members: tuple[Decoder, Logits]) -> tuple[Decoder, Logits]:
        def logits(source: Sequence[int], ids: Sequence[int]) -> torch.Tensor:
            return torch.stack([of(source, ids).softmax(-1) for _, of in members]).mean(0).log()

        return Ensemble([decoder for decoder, _ in members]), logits

    return {
        "ensemble": together(of_gpt(tiny_gpt(APART)), of_gru(tiny_gru())),
        "gpt": of_gpt(tiny_gpt()),
        "gpt, learned positions": of_gpt(tiny_gpt(positions="learned")),
        "gpt, RMSNorm": of_gpt(tiny_gpt(norm="rms", heads=4, layers=3)),
        "gpt, two vocabularies": of_gpt(tiny_gpt(APART)),
        "seq2seq": of_gru(tiny_gru()),
        "seq2seq, two layers": of_gru(tiny_gru(layers=2, bidirectional=False)),
        "seq2seq, no attention": of_gru(tiny_gru(attention="none", tied_output=False)),
    }


KINDS = [
    *("gpt", "gpt, learned positions", "gpt, RMSNorm", "gpt, two vocabularies"),
    *("seq2seq", "seq2seq, two layers", "seq2seq, no attention", "ensemble"),
]


@cache
def log_probabilities(kind: str, source: tuple[int, ...], ids: tuple[int, ...]) -> list[float]:
    """Of each token behind `source` and `ids`, among those that may be produced."""
    with torch.inference_mode():
        logits = decoders()[kind][1](source, ids)
        logits[[PAD, SOS, SEP]] = -torch.inf
        return logits.log_softmax(-1).tolist()


def search_plainly(kind: str, source: Sequence[int], beam_size: int, length_penalty: float) -> Translation:
    """`beam_search` as its docstring defines it, one hypothesis after the other, without a cache or a batch."""
    limit = min(2 * len(source) + 10, decoders()[kind][0].room(len(source)))

    def normalised(log_probability: float, length: int) -> float:
        return log_probability / ((5 + length) / 6) ** length_penalty

    live = [(0.0, ())]
    finished = []
    for step in range(1, limit + 1):
        candidates = []
        for log_probability, ids in live:
            gains = log_probabilities(kind, tuple(source), ids)
            candidates += [(log_probability + gain, (*ids, token)) for token, gain in enumerate(gains)]
        candidates = sorted(candidates, key=lambda candidate: -candidate[0])[: 2 * beam_size]
        candidates = [candidate for candidate in candidates if candidate[0] > -math.inf]
        finished += [
            (normalised(log_probability, step), ids[:-1])
            for log_probability, ids in candidates[:beam_size]
            if ids[-1] == EOS
        ]
        live = [candidate for candidate in candidates if candidate[1][-1] != EOS][:beam_size]
        if len(finished) >= beam_size:
            break
        if finished and max(finished)[0] >= max(normalised(log_probability, limit) for log_probability, _ in live):
            break
    return Translation(list(max(finished)[1]), ended=True) if finished else Translation(list(live[0][1]))


def random_sources(count: int, longest: int) -> list[list[int]]:
    generator = random.Random(1)
    return [[generator.randrange(5, VOCABULARY) for _ in range(generator.randint(1, longest))] for _ in range(count)]


class Scripted:
    """A decoder that says what the test wants: token `source[0]` as often as `source[1]` says, then `<eos>`."""

    def __init__(self, room: int = 1000):
        self._room = room
        self.rows_per_step: list[int] = []
        self.batches: list[list[list[int]]] = []

    @property
    def longest_source(self) -> int:
        return self._room - 1

    def room(self, source_length: int) -> int:
        return self._room - source_length

    def begin(self, sources, limit):
        self.batches.append([list(source) for source in sources])
        state = ScriptState([(source[0], source[1]) for source in sources], 0)
        return self._logits(state), state

    def extend(self, tokens, state):
        state.step += 1
        assert len(tokens) == len(state.script)
        return self._logits(state)

    def _logits(self, state):
        self.rows_per_step.append(len(state.script))
        logits = torch.zeros(len(state.script), VOCABULARY)
        for row, (token, times) in enumerate(state.script):
            logits[row, token if state.step < times else EOS] = 1
        return logits


class ScriptState:
    def __init__(self, script, step):
        self.script, self.step = script, step

    def select(self, rows):
        return ScriptState([self.script[row] for row in rows.tolist()], self.step)


SEARCHED = random_sources(20, longest=14)
SEARCHES = [(1, 1.0), (2, 1.0), (5, 0.0), (5, 1.0), (5, 3.0)]

# What a model is made of matters to a step, not to the search: one of each is enough for the beams.
CASES = [
    *((kind, *SEARCHES[0]) for kind in KINDS),
    *((kind, *how) for kind in ("gpt", "seq2seq") for how in SEARCHES[1:]),
]


@pytest.mark.parametrize("kind, beam_size, length_penalty", CASES)
def test_batches_give_what_a_plain_search_of_each_sentence_finds(kind, beam_size, length_penalty):
    decoder, _ = decoders()[kind]
    expected = [search_plainly(kind, source, beam_size, length_penalty) for source in SEARCHED]
    assert len({tuple(result.ids) for result in expected}) >= 10, "a model that always says the same shows nothing"
    search = {"beam_size": beam_size, "length_penalty": length_penalty}
    for tokens_per_batch in (1, 700, 10_000):
        assert translate(decoder, SEARCHED, tokens_per_batch=tokens_per_batch, **search) == expected, tokens_per_batch


@pytest.mark.parametrize("kind", ["gpt", "seq2seq"])
def test_the_searches_that_are_compared_differ_and_come_to_both_ends(kind):
    decoder, _ = decoders()[kind]
    said = [translate(decoder, SEARCHED, beam_size=beam, length_penalty=penalty) for beam, penalty in SEARCHES]
    assert all(one != other for number, one in enumerate(said) for other in said[:number])
    assert {result.ended for results in said for result in results} == {True, False}
    lengths = [sum(len(result.ids) for result in results) for results in said[-3:]]
    assert lengths == sorted(lengths) and lengths[0] < lengths[-1], "a penalty favours longer translations"


def test_special_tokens_are_never_produced():
    model = tiny_gpt()
    with torch.no_grad():  # the forbidden ones would otherwise be the most probable by far
        model.final_norm.bias.copy_(10 * model.embedding.weight[[PAD, SOS, SEP]].mean(0))
    sources = random_sources(20, longest=20)
    unforced = {int(model(torch.tensor([[SOS, *source, SEP]]))[0, -1].argmax()) for source in sources}
    assert unforced & {PAD, SOS, SEP}, "nothing to forbid"
    produced = {token for result in translate(GPTTranslator(model), sources) for token in result.ids}
    assert produced and not produced & {PAD, SOS, EOS, SEP}


def test_a_model_that_never_ends_is_cut_off_at_the_limit_of_each_source():
    sources = [[7, 999], [8, 999, 5, 5, 5]]
    results = translate(Scripted(), sources)
    assert [len(result.ids) for result in results] == [2 * 2 + 10, 2 * 5 + 10]
    assert not any(result.ended or result.problem for result in results)
    short = translate(Scripted(), sources, limit_factor=1, limit_extra=1)
    assert [len(result.ids) for result in short] == [3, 6]


def test_the_context_is_a_limit_too_and_may_be_filled_to_its_end():
    model = tiny_gpt(context=16)
    with torch.no_grad():  # the same token for ever
        model.final_norm.weight.zero_()
        model.final_norm.bias.copy_(model.embedding.weight[9])
    sources = [[5] * length for length in (13, 12, 9, 3, 1)]
    results = translate(GPTTranslator(model), sources)
    assert [len(result.ids) for result in results] == [1, 2, 5, 11, 12]
    assert [result.ids for result in results] == [translate_plainly(model, source) for source in sources]


def test_sources_that_cannot_be_translated_are_named_and_stop_nobody_else():
    model = tiny_gpt(context=16)
    good = [[5, 6, 7], [8]]
    results = translate(GPTTranslator(model), [good[0], [], [9] * 14, good[1], [9] * 500])
    assert [bool(result.problem) for result in results] == [False, True, True, False, True]
    assert "empty" in results[1].problem
    assert "14 tokens, the model takes 13 at most" in results[2].problem
    assert "500 tokens" in results[4].problem
    assert [results[0].ids, results[3].ids] == [translate_plainly(model, source) for source in good]
    assert translate(GPTTranslator(model), []) == []


def test_order_is_kept_and_similar_lengths_share_a_batch():
    decoder = Scripted()
    sources = [[5 + number % 30, number % 7] + [5] * (number * 7 % 23) for number in range(60)]
    results = translate(decoder, sources, tokens_per_batch=300)
    assert [result.ids for result in results] == [[source[0]] * source[1] for source in sources]
    assert all(result.ended for result in results)
    assert len(decoder.batches) > 3
    for batch in decoder.batches:
        longest = max(map(len, batch))
        assert len(batch) * (longest + 2 * longest + 10) <= 300


def test_finished_sentences_leave_the_batch():
    decoder = Scripted()
    translate(decoder, [[6, times, 5, 5] for times in [1] * 30 + [8] * 2])
    assert decoder.rows_per_step[:2] == [32, 32] and decoder.rows_per_step[-1] == 2
    assert sum(decoder.rows_per_step) < 32 * 2 + 2 * 8


def test_a_progress_line_counts_sentences(capsys, monkeypatch):
    monkeypatch.setattr("training.base.console.time.monotonic", iter(range(0, 10_000, 100)).__next__)
    translate(Scripted(), [[6, 1]] * 3, label="translating test", tokens_per_batch=1)
    assert "translating test  33% 1/3 sentences" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["gpt", "seq2seq"])
@pytest.mark.parametrize("rows", [[1, 0, 2], [2, 0, 0], [1]], ids=str)
def test_selected_rows_go_on_from_what_they_have_read_and_said(kind, rows):
    decoder, sources, said = decoders()[kind][0], [[9, 11], [12], [7, 8, 9]], torch.tensor([5, 6, 7])
    with torch.inference_mode():
        (_, whole), (_, some) = (decoder.begin(sources, 9) for _ in range(2))
        some = some.select(torch.tensor(rows))
        for _ in range(2):
            expected = decoder.extend(said, whole)[rows]
            torch.testing.assert_close(decoder.extend(said[rows], some), expected)


@pytest.mark.parametrize("kind", ["gpt", "seq2seq"])
def test_a_beam_of_one_is_the_greedy_search(kind):
    decoder, sources = decoders()[kind][0], random_sources(40, longest=15)
    limits = [min(2 * len(source) + 10, decoder.room(len(source))) for source in sources]
    with torch.inference_mode():
        assert beam_search(decoder, sources, limits, 1, 1.0) == greedy_search(decoder, sources, limits)


@pytest.mark.parametrize("kind", ["gpt", "seq2seq"])
def test_a_beam_wider_than_the_vocabulary_finds_the_most_probable_translation_of_all(kind):
    source = (9, 11)
    with torch.inference_mode():
        (result,) = beam_search(decoders()[kind][0], [source], [3], 2000, 0.0)

    def log_probability(ids: tuple[int, ...]) -> float:
        return sum(log_probabilities(kind, source, ids[:n])[token] for n, token in enumerate((*ids, EOS)))

    words = range(4, VOCABULARY)
    every = [(), *((a,) for a in words), *((a, b) for a in words for b in words)]
    assert result == Translation(list(max(every, key=log_probability)), ended=True)


@pytest.mark.parametrize("beam_size", [1, 3])
def test_a_beam_too_is_cut_off_at_each_limit_and_leaves_the_batch_when_done(beam_size):
    decoder = Scripted()
    endless, brief = [[7, 999], [8, 999, 5, 5, 5]], [[6, 1, 5, 5]] * 4
    results = translate(decoder, [*endless, *brief], beam_size=beam_size)
    assert [len(result.ids) for result in results[:2]] == [2 * 2 + 10, 2 * 5 + 10]
    assert not any(result.ended or result.problem for result in results[:2])
    assert [result.ids for result in results[2:]] == [[6]] * 4 and all(result.ended for result in results[2:])
    assert decoder.rows_per_step[0] == 6 and decoder.rows_per_step[-1] == beam_size


def test_what_is_no_beam_size_or_length_penalty_is_refused():
    for beam_size in (0, -3):
        with pytest.raises(UserError, match=rf"beam size must be 1 \(greedy\) or more, got {beam_size}"):
            translate(Scripted(), [[6, 1]], beam_size=beam_size)
    with pytest.raises(UserError, match="must be 1000 or less, got 100000"):
        translate(Scripted(), [[6, 1]], beam_size=100_000)
    for length_penalty in (-0.5, math.nan, math.inf):
        with pytest.raises(UserError, match=r"length penalty must be 0 \(none\) or more"):
            translate(Scripted(), [[6, 1]], beam_size=2, length_penalty=length_penalty)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", ["gpt", "seq2seq"])
@pytest.mark.parametrize("beam_size", [1, 5])
def test_a_gpu_gives_the_same_translations(kind, beam_size):
    decoder, _ = decoders()[kind]
    on_gpu = type(decoder)(deepcopy(decoder.model).to("cuda"))
    expected = translate(decoder, SEARCHED, beam_size=beam_size)
    assert translate(on_gpu, SEARCHED, beam_size=beam_size) == expected
