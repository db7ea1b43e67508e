"""Decoding in batches with a cache: the same translations as the obvious way, and an end to every sentence."""

import random

import pytest
import torch

from data_prep.tokenizers import EOS, PAD, SEP, SOS
from tests.bench.decoding import translate_plainly
from training.evaluation.decoding import GPTDecoder, translate
from training.models.gpt import GPT, GPTOptions

VOCABULARY = 40


def tiny_gpt(**options: object) -> GPT:
    torch.manual_seed(1)
    model = GPT(GPTOptions(**{"layers": 2, "heads": 2, "width": 16, "context": 48, **options}), VOCABULARY)
    # Far from the initial near-uniform output, so that rounding decides no token, and each model says different things.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.4)
        model.embedding.weight[EOS] *= 1.6  # chosen often enough for translations of all lengths
    return model.eval()


def random_sources(count: int, longest: int) -> list[list[int]]:
    generator = random.Random(1)
    return [[generator.randrange(5, VOCABULARY) for _ in range(generator.randint(1, longest))] for _ in range(count)]


class Scripted:
    """A decoder that says what the test wants: token `source[0]` as often as `source[1]` says, then `<eos>`."""

    def __init__(self, room: int = 1000):
        self._room = room
        self.rows_per_step: list[int] = []
        self.batches: list[list[list[int]]] = []

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


@pytest.mark.parametrize("options", [{}, {"positions": "learned"}, {"norm": "rms", "heads": 4, "layers": 3}])
@pytest.mark.parametrize("tokens_per_batch", [1, 200, 10_000])
def test_batches_with_a_cache_give_the_same_output_as_without(options, tokens_per_batch):
    model = tiny_gpt(**options)
    sources = random_sources(40, longest=30)
    expected = [translate_plainly(model, source) for source in sources]
    assert len({tuple(ids) for ids in expected}) > 20, "a model that always says the same shows nothing"
    assert any(len(ids) < 10 for ids in expected) and any(len(ids) > 20 for ids in expected)
    results = translate(GPTDecoder(model), sources, tokens_per_batch=tokens_per_batch)
    assert [result.ids for result in results] == expected


def test_special_tokens_are_never_produced():
    model = tiny_gpt()
    with torch.no_grad():  # the forbidden ones would otherwise be the most probable by far
        model.final_norm.bias.copy_(10 * model.embedding.weight[[PAD, SOS, SEP]].mean(0))
    sources = random_sources(20, longest=20)
    unforced = {int(model(torch.tensor([[SOS, *source, SEP]]))[0, -1].argmax()) for source in sources}
    assert unforced & {PAD, SOS, SEP}, "nothing to forbid"
    produced = {token for result in translate(GPTDecoder(model), sources) for token in result.ids}
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
    results = translate(GPTDecoder(model), sources)
    assert [len(result.ids) for result in results] == [1, 2, 5, 11, 12]
    assert [result.ids for result in results] == [translate_plainly(model, source) for source in sources]


def test_sources_that_cannot_be_translated_are_named_and_stop_nobody_else():
    model = tiny_gpt(context=16)
    good = [[5, 6, 7], [8]]
    results = translate(GPTDecoder(model), [good[0], [], [9] * 14, good[1], [9] * 500])
    assert [bool(result.problem) for result in results] == [False, True, True, False, True]
    assert "empty" in results[1].problem
    assert "14 tokens, the model takes 13 at most" in results[2].problem
    assert "500 tokens" in results[4].problem
    assert [results[0].ids, results[3].ids] == [translate_plainly(model, source) for source in good]
    assert translate(GPTDecoder(model), []) == []


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
    monkeypatch.setattr("launch.console.time.monotonic", iter(range(0, 10_000, 100)).__next__)
    translate(Scripted(), [[6, 1]] * 3, label="translating test", tokens_per_batch=1)
    assert "translating test  33% 1/3 sentences" in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same_translations():
    model = tiny_gpt()
    sources = random_sources(40, longest=30)
    expected = [result.ids for result in translate(GPTDecoder(model), sources)]
    assert [result.ids for result in translate(GPTDecoder(model.to("cuda")), sources)] == expected
