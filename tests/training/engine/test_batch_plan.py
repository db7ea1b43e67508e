"""The order of data: a pure function of lengths, seed and step, within the bounds, and cheap."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from itertools import chain, pairwise

import numpy as np
import pytest

from training.base.console import UserError
from training.data.prepared import open_prepared
from training.engine.batch_plan import BatchOptions, BatchPlan, MicroBatch, Mixture
from training.gpt import Sequences

LENGTHS = np.random.default_rng(5).integers(3, 40, 997)
WEIGHTS = np.random.default_rng(6).integers(1, 20, 997)


def plan_of(
    lengths: np.ndarray = LENGTHS,
    weights: np.ndarray | None = None,
    *,
    tokens: int | None = 128,
    sentences: int | None = None,
    per_step: int = 4,
    seed: int = 1,
    epochs: float = 3,
    mixture: Mixture | None = None,
) -> BatchPlan:
    options = BatchOptions(
        tokens_per_micro_batch=tokens, sentences_per_micro_batch=sentences, micro_batches_per_step=per_step
    )
    weights = WEIGHTS if weights is None else weights
    return BatchPlan(lengths, weights, options, seed=seed, epochs=epochs, mixture=mixture)


def content(batches: list[MicroBatch]) -> list[tuple[int, list[int]]]:
    return [(batch.number, batch.samples.tolist()) for batch in batches]


def stream(plan: BatchPlan, micro_batches: int) -> list[np.ndarray]:
    """The first `micro_batches` micro-batches, over all steps."""
    steps = -(-micro_batches // plan.micro_batches_per_step)
    return [batch.samples for step in range(steps) for batch in plan.step(step)][:micro_batches]


def epochs_of(plan: BatchPlan, count: int) -> list[list[np.ndarray]]:
    each = plan.micro_batches_per_epoch
    batches = stream(plan, count * each)
    return [batches[number * each : (number + 1) * each] for number in range(count)]


BOUNDS = [
    {"tokens": 128},
    {"tokens": 40},  # the longest sample fits just alone
    {"tokens": None, "sentences": 7},
    {"tokens": 300, "sentences": 10},  # either is reached first
    {"tokens": 10**9},  # everything in one micro-batch: several epochs in one step
]


@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
@pytest.mark.parametrize("per_step", [1, 4, 6])
def test_every_sample_is_seen_exactly_once_an_epoch(bounds, per_step):
    for batches in epochs_of(plan_of(per_step=per_step, **bounds), 3):
        assert Counter(np.concatenate(batches).tolist()) == Counter(range(len(LENGTHS)))


@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
def test_micro_batches_stay_within_both_bounds(bounds):
    plan = plan_of(**bounds)
    tokens, sentences = bounds["tokens"], bounds.get("sentences")
    for batch in stream(plan, plan.micro_batches_per_epoch):
        assert len(batch) > 0
        assert np.all(np.diff(LENGTHS[batch]) >= 0), "shortest first"
        if tokens is not None:
            assert len(batch) * LENGTHS[batch].max() <= tokens
        if sentences is not None:
            assert len(batch) <= sentences


def test_no_micro_batch_could_take_the_next_sample():
    """As few micro-batches as the sorted order allows: a plan of single sentences would keep every bound as well."""
    plan = plan_of(tokens=300, sentences=10)
    in_order = np.split(np.sort(LENGTHS), plan.cuts[1:-1])
    for batch, following in pairwise(in_order):
        assert len(batch) == 10 or (len(batch) + 1) * following[0] > 300


def test_epoch_boundary_inside_a_step_loses_and_repeats_nothing():
    plan = plan_of(per_step=7)
    crossing, before = divmod(plan.micro_batches_per_epoch, 7)
    assert before > 0, "the epoch must end inside a step for this test to test anything"
    batches = [batch.samples.tolist() for batch in plan.step(crossing)]
    first_epoch = [batch.samples.tolist() for step in range(crossing) for batch in plan.step(step)] + batches[:before]
    assert sorted(chain(*first_epoch)) == list(range(len(LENGTHS)))
    second_epoch = batches[before:]
    while len(second_epoch) < plan.micro_batches_per_epoch:
        crossing += 1
        second_epoch += [batch.samples.tolist() for batch in plan.step(crossing)]
    assert sorted(chain(*second_epoch[: plan.micro_batches_per_epoch])) == list(range(len(LENGTHS)))


@pytest.mark.parametrize("per_step", [2, 4, 6])
def test_every_step_takes_a_micro_batch_of_each_class_of_length(per_step):
    plan = plan_of(tokens=60, per_step=per_step)
    in_order = np.sort(LENGTHS)
    micro_batches = [in_order[start:end] for start, end in zip(plan.cuts, plan.cuts[1:], strict=False)]
    classes = [
        np.concatenate(micro_batches[each[0] : each[-1] + 1])
        for each in np.array_split(np.arange(len(micro_batches)), per_step)
    ]
    whole, shared = 0, 0
    orders = set()
    for step in range(plan.steps):
        if int(plan.epoch(step)) != int(plan.epoch(step + 1) - 1e-9):
            shared += 1
            continue
        whole += 1
        lengths = [LENGTHS[batch.samples] for batch in plan.step(step)]
        orders.add(tuple(np.argsort([each.mean() for each in lengths], kind="stable").tolist()))
        for expected, each in zip(classes, sorted(lengths, key=np.mean), strict=True):
            assert expected.min() <= each.min() and each.max() <= expected.max()
    assert whole > 10 and shared >= 1
    assert len(orders) > 1, "no rank has the long ones alone"


def test_steps_asked_in_any_order_or_of_a_fresh_plan_are_the_same():
    plan = plan_of()
    last = 3 * plan.micro_batches_per_epoch // 4
    in_order = [content(plan.step(step)) for step in range(last)]
    backwards = [content(plan.step(step)) for step in reversed(range(last))]
    assert backwards[::-1] == in_order
    for step in (last - 1, 0, last // 2, last // 3):
        assert content(plan_of().step(step)) == in_order[step], "a fresh plan, as in a resumed session"


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_shares_of_all_ranks_add_up_to_the_same_micro_batches(world_size):
    plan = plan_of()
    for step in (0, 3, plan.micro_batches_per_epoch // 4, plan.steps - 1):
        shares = [content(plan.micro_batches_of(step, rank, world_size)) for rank in range(world_size)]
        assert {len(share) for share in shares} == {4 // world_size}
        assert sorted(chain(*shares)) == content(plan.step(step))
        assert [number for number, _ in content(plan.step(step))] == [0, 1, 2, 3]


def test_epochs_and_seeds_differ_in_order_and_in_composition():
    first, second, _ = epochs_of(plan_of(), 3)
    (other,) = epochs_of(plan_of(seed=2), 1)
    for left, right in ((first, second), (first, other)):
        assert len(left) == len(right)
        assert [LENGTHS[batch].tolist() for batch in left] != [LENGTHS[batch].tolist() for batch in right], "order"
        same = {tuple(sorted(batch)) for batch in left} & {tuple(sorted(batch)) for batch in right}
        assert len(same) < 0.1 * len(left), "composition"


def test_number_of_steps_is_the_epochs_rounded_up():
    plan = plan_of(epochs=2.5)
    assert plan.steps == -(-5 * plan.micro_batches_per_epoch // 8)
    assert plan.epoch(plan.steps) >= 2.5 > plan.epoch(plan.steps - 1)
    assert plan_of(epochs=1e-9).steps == 1


def test_weight_of_a_step_is_the_sum_over_its_samples():
    plan = plan_of()
    for step in (0, 1, plan.micro_batches_per_epoch // 4, plan.steps - 1):
        plain = sum(int(WEIGHTS[sample]) for batch in plan.step(step) for sample in batch.samples)
        assert plan.weight(step) == plain
    fractions = WEIGHTS + 0.1
    assert plan_of(weights=fractions).weight(0) == pytest.approx(
        sum(float(fractions[sample]) for batch in plan.step(0) for sample in batch.samples), rel=1e-12
    )


def test_padding_share_is_what_the_micro_batches_have():
    plan = plan_of(tokens=300)
    for batches in epochs_of(plan, 2):
        computed = sum(len(batch) * int(LENGTHS[batch].max()) for batch in batches)
        assert plan.padding_share() == pytest.approx(1 - LENGTHS.sum() / computed)
    assert plan.padding_share() > 0


def test_padding_is_below_three_per_cent_on_real_sentences(real_data):
    pairs = Sequences.of(open_prepared(real_data), "train", 128)
    for tokens in (512, 2048, 4096):
        plan = plan_of(pairs.lengths, pairs.target_tokens, tokens=tokens)
        assert plan.padding_share() < 0.03


def test_laying_out_a_million_samples_takes_at_most_16_bytes_each():
    count = 1_000_000
    lengths = np.random.default_rng(0).integers(3, 100, count).astype(np.int32)
    weights = np.ones(count, dtype=np.int32)
    plan = plan_of(lengths, weights, tokens=2048)
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        plan.step(0)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    small_change = 1_000_000  # the order of the micro-batches and the like: a byte a sample
    assert peak - before <= 16 * count + small_change
    assert kept - before <= 4 * count + small_change


def test_sample_that_fits_no_micro_batch_is_answered_with_the_bound_it_needs():
    with pytest.raises(UserError, match=r"longest sample has 39 tokens.*tokens_per_micro_batch \(38\).*raise.*to 39"):
        plan_of(tokens=38)


def test_no_sample_at_all_is_one_clear_line():
    with pytest.raises(UserError, match="no sample to train on"):
        plan_of(np.array([], dtype=np.int64), np.array([], dtype=np.int64))


SOURCES = np.random.default_rng(7).integers(0, 3, len(LENGTHS))
MIXTURE = Mixture(("law", "chat", "web"), (2, 0.5, 1.3), SOURCES)


@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
@pytest.mark.parametrize("per_step", [1, 4, 6])
def test_every_epoch_of_a_mixture_has_each_source_by_its_weight_in_as_many_micro_batches(bounds, per_step):
    plan = plan_of(per_step=per_step, mixture=MIXTURE, **bounds)
    expected = [round(weight * (source == SOURCES).sum()) for source, weight in enumerate(MIXTURE.weights)]
    assert MIXTURE.drawn() == tuple(expected) and plan.samples_per_epoch == sum(expected)
    seen = Counter[int]()
    for number, batches in enumerate(epochs_of(plan, 7), 1):
        assert len(batches) == plan.micro_batches_per_epoch
        drawn = np.concatenate(batches)
        assert np.bincount(SOURCES[drawn]).tolist() == expected
        seen.update(drawn.tolist())
        for sample, count in enumerate(SOURCES):
            share = expected[count] / (count == SOURCES).sum()
            assert abs(seen[sample] - share * number) < 1, "none comes again before its turn"
        for batch in batches:
            if bounds["tokens"] is not None:
                assert len(batch) * LENGTHS[batch].max() <= bounds["tokens"]
            if bounds.get("sentences"):
                assert len(batch) <= bounds["sentences"]


def test_epochs_of_a_mixture_have_all_lengths_alike():
    plan = plan_of(mixture=MIXTURE)
    means = [LENGTHS[np.concatenate(batches)].mean() for batches in epochs_of(plan, 6)]
    assert max(means) - min(means) < 0.15
    assert 0 <= plan.tokens_per_epoch() / sum(LENGTHS[np.concatenate(epochs_of(plan, 1)[0])]) - 1 < 0.01


def test_a_mixture_is_a_function_of_seed_and_step_alone():
    plan = plan_of(mixture=MIXTURE)
    last = 2 * plan.micro_batches_per_epoch // 4 + 3
    in_order = [content(plan.step(step)) for step in range(last)]
    for step in (last - 1, 0, last // 2, last // 3):
        fresh = plan_of(mixture=MIXTURE)
        assert content(fresh.step(step)) == in_order[step]
        drawn = np.concatenate([batch.samples for batch in plan.step(step)])
        assert fresh.drawn(step).tolist() == np.bincount(SOURCES[drawn], minlength=3).tolist()
    assert content(plan_of(mixture=MIXTURE, seed=2).step(0)) != in_order[0]
    assert plan_of().drawn(0).size == 0


def test_a_source_of_few_samples_and_one_of_none_are_drawn_too():
    few = Mixture(("one", "two", "none"), (0.01, 3, 5), np.array([0, 1, 1]))
    plan = plan_of(np.array([5, 6, 7]), np.ones(3), mixture=few, tokens=14, per_step=1)
    assert few.drawn() == (1, 6, 0)
    for batches in epochs_of(plan, 3):
        assert Counter(np.concatenate(batches).tolist()) == {0: 1, 1: 3, 2: 3}
