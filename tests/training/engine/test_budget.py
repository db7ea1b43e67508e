"""A run that goes by `--budget`: what it chooses, that it chooses once, and that it is then a run like any other."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from tests.support.commands import Launch
from tests.support.legal_records import law_base, law_data
from tests.support.lives import Life
from tests.support.runs import assert_only_one_line_is_said, command_of, config_of, last_checkpoint, losses
from training.base.console import UserError
from training.base.options import to_yaml, with_values
from training.data.prepared import open_prepared
from training.engine import budget
from training.engine.batch_plan import BatchOptions
from training.engine.budget import FEWEST_STEPS, Measured, length_of, shared_out, warmup_of
from training.engine.checkpoint import checkpoints
from training.engine.cluster import Cluster
from training.engine.run_folder import has_another_length
from training.gpt import GPTConfig, Sequences
from training.models.memory_estimate import OVERHEAD, WANTED_STEPS, FineTuningChooser, MemoryEstimate
from training.translation import TranslationChooser

RUN = (
    *("--model.width", 32, "--model.layers", 1, "--model.heads", 2, "--model.context", 64, "--log.every_steps", 1),
    *("--batch.tokens_per_micro_batch", 784, "--checkpoint.every_steps", 4, "--log.generate_samples", 20),
)
BUDGET = ("--budget", "10m")  # of which so small a run measures seconds

# What such a run is left to choose.
CHOSEN = ("precision", "optim.steps", "optim.warmup_steps", "log.validate_every_steps", "model.dropout", "loss.r_drop")

MEASURED = Measured(spent_s=20, setup_s=3, step_s=0.25, validation_s=4, save_s=0.5, stall_s=0.1)


def chosen_in(config: dict[str, Any], keys: tuple[str, ...] = CHOSEN) -> dict[str, Any]:
    found = {}
    for key in keys:
        value: Any = config
        for part in key.split("."):
            value = value[part]
        found[key] = value
    return found


def config_in(run_dir: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((run_dir / "config.yaml").read_text())
    return found


def at_step(run_dir: Path, step: int) -> dict[str, bytes]:
    """The weights and the optimizer of a checkpoint."""
    (found,) = (each for each in checkpoints(run_dir) if each.step == step)
    return {name: (found.folder / name).read_bytes() for name in ("model.safetensors", "optimizer.safetensors")}


# --- it chooses once, and is then a run like any other --------------------------------------------------------------


def test_run_with_a_budget_is_bit_for_bit_that_with_its_choices_written_out_and_keeps_them_when_killed(
    launch: Launch, sample_data: Path, tmp_path: Path
):
    life = Life(launch, tmp_path, sample_data, ranks=None, run=(*RUN, *BUDGET))
    printed = life.kill_at(10).printed()
    chosen = chosen_in(config_in(life.run_dir))
    for key, value in chosen.items():
        assert f"\n  {key} {value} " in printed or key == "precision"
    assert "\n  as given: batch.tokens_per_micro_batch, checkpoint.every_steps\n" in printed

    printed = life.kill_at(22).printed()
    assert f"as chosen at the run's first start, {chosen['optim.steps']:,} steps" in printed
    assert "resuming at step 8" in printed
    assert chosen_in(config_in(life.run_dir)) == chosen

    (tmp_path / "other").mkdir()
    by_hand = [word for key, value in chosen.items() for word in (f"--{key}", value)]
    other = Life(launch, tmp_path / "other", sample_data, ranks=None, run=(*RUN, *by_hand))
    other.kill_at(22)
    assert at_step(life.run_dir, 20) == at_step(other.run_dir, 20)
    assert losses(life.run_dir)[:20] == losses(other.run_dir)[:20]


def test_what_two_ranks_chose_holds_on_one_rank_in_another_folder_and_for_this_budget_only(
    launch: Launch, sample_data: Path, tmp_path: Path
):
    run = (*RUN, *BUDGET, "--model.dropout", 0.25, "--batch.micro_batches_per_step", 2)
    life = Life(launch, tmp_path, sample_data, ranks=2, run=run)
    life.kill_at(10)
    chosen = chosen_in(config_in(life.run_dir))
    assert chosen["model.dropout"] == 0.25, "as given"
    assert chosen_in(last_checkpoint(life.run_dir).manifest["config"]) == chosen

    (life.run_dir / "config.yaml").unlink()
    (tmp_path / "other").mkdir()
    elsewhere = ("--resume_from", life.run_dir)
    moved = Life(launch, tmp_path / "other", sample_data, ranks=None, run=(*run, *elsewhere))
    assert f"first start, {chosen['optim.steps']:,} steps" in moved.kill_at(14).printed()
    assert chosen_in(config_in(moved.run_dir)) == chosen

    result = life.start(words=("--budget", "20m"), ranks=0).wait()
    assert_only_one_line_is_said(result, "another definition (budget: 10m00s -> 20m00s)", "nothing was changed")
    result = launch(*command_of(life.run_dir, sample_data, *RUN)).wait()
    assert_only_one_line_is_said(result, "another definition", "budget: 10m00s -> null")


def test_a_machine_with_an_empty_disk_takes_the_choice_from_the_runs_address(
    launch: Launch, sample_data: Path, tmp_path: Path
):
    (tmp_path / "drive").mkdir()
    run = (*RUN, *BUDGET, "--run_at", f"file://{tmp_path}/drive/run")
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    first, second = (Life(launch, tmp_path / name, sample_data, ranks=None, run=run) for name in ("first", "second"))
    assert first.start({"at": "forward", "step": 6, "do": "SIGTERM"}).wait().status == 75
    assert "as chosen at the run's first start" in second.kill_at(9).printed()
    assert chosen_in(config_in(second.run_dir)) == chosen_in(config_in(first.run_dir))


def test_a_run_that_was_begun_keeps_its_choice_before_its_first_checkpoint_unless_it_is_another_run(
    sample_data: Path, tmp_path: Path
):
    command = command_of(tmp_path / "run", sample_data, *RUN, *BUDGET)
    config, data = config_of(command), open_prepared(sample_data)
    keys = [*budget.KEYS, *TranslationChooser.keys]
    assert budget._chosen_before(config, data, keys) is None, "nothing is there"
    chosen = with_values(config, {"optim.steps": 1234, "optim.warmup_steps": 56, "model.dropout": 0.2})
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text(to_yaml(chosen))
    (tmp_path / "run/data.json").write_bytes(Path(data.kept["data.json"]).read_bytes())
    found = budget._chosen_before(config, data, keys)
    assert found is not None and with_values(config, found) == chosen
    assert budget._chosen_before(config_of((*command, "--log.every_steps", 5)), data, keys) == found
    for other in (("--seed", 5), ("--optim.lr", 0.5), ("--budget", "20m"), ("--data", tmp_path)):
        assert budget._chosen_before(config_of((*command, *other)), data, keys) is None, other
    named = [key for key in keys if key != "model.dropout"]
    assert budget._chosen_before(config_of((*command, "--model.dropout", 0.5)), data, named) is None
    (tmp_path / "run/data.json").write_text("{}")
    assert budget._chosen_before(config, data, keys) is None, "the data was prepared anew"
    with pytest.raises(UserError, match="holds prepared data, and a run has a folder of its own"):
        budget._chosen_before(config_of((*command, "--run_dir", sample_data)), data, keys)


def test_a_run_with_a_budget_is_not_taken_for_one_that_is_to_be_longer(tmp_path: Path):
    command = command_of(tmp_path, tmp_path, "--budget", "10m")
    for text, longer in (("10m", False), ("null", True)):
        chosen = with_values(config_of((*command, "--budget", text)), {"optim.steps": 1234})
        (tmp_path / "config.yaml").write_text(to_yaml(chosen))
        assert has_another_length(tmp_path, config_of(command).optim) is longer


def test_dry_run_says_what_would_be_chosen_and_writes_nothing(launch: Launch, sample_data: Path, tmp_path: Path):
    result = launch(*command_of(tmp_path / "run", sample_data, *RUN, *BUDGET, "--dry-run")).wait()
    assert result.status == 0, result
    steps = result.out.partition("\n  optim.steps ")[2].split()[0]
    assert f'{{"steps": {steps}, ' in result.out, "the figures are those of the run that was chosen"
    assert f"\n  steps: {steps}\n" in result.out and "\nbudget: 10m00s\n" in result.out
    assert not (tmp_path / "run").exists()


# --- QLoRA ----------------------------------------------------------------------------------------------------------


def test_qlora_goes_by_a_budget_and_keeps_what_it_chose(launch: Launch, tmp_path: Path):
    run = ("--base_model", law_base(), "--lora.rank", 4, "--log.every_steps", 1, "--checkpoint.every_steps", 2)
    run += ("--batch.tokens_per_micro_batch", 400, *BUDGET)
    life = Life(launch, tmp_path, law_data(), ranks=None, run=run, module="training.qlora")
    printed = life.kill_at(4).printed()
    chosen = chosen_in(config_in(life.run_dir), ("optim.steps", "optim.warmup_steps", "log.validate_every_steps"))
    assert f"\n  optim.steps {chosen['optim.steps']} " in printed
    assert "3 passes over the data: more would learn it by heart; " in printed
    assert "resuming at step 2" in life.kill_at(6).printed()
    assert chosen_in(config_in(life.run_dir), tuple(chosen)) == chosen


def memory_for(batch: BatchOptions) -> MemoryEstimate:
    return MemoryEstimate(0, 0, 0, 0, (batch.tokens_per_micro_batch or 0) * 1_000_000, 0)


@pytest.mark.parametrize(
    ("card_gb", "count", "tokens"), [(20, 8, 4096), (4, 16, 2048), (3, 32, 1024), (0.1, 64, 700), (None, 8, 4096)]
)
def test_micro_batches_of_qlora_are_those_for_which_the_card_has_room_and_a_step_keeps_its_tokens(
    card_gb, count, tokens
):
    config: Any = SimpleNamespace(batch=BatchOptions(tokens_per_micro_batch=4096, micro_batches_per_step=8))
    chooser = FineTuningChooser(700, 10**9, memory_for, None if card_gb is None else card_gb * 1e9)
    choices = {each.key: each.value for each in chooser.batch(config, Cluster())}
    found = config.batch.model_copy(update={key.removeprefix("batch."): value for key, value in choices.items()})
    assert (found.micro_batches_per_step, found.tokens_per_micro_batch) == (count, tokens)
    if card_gb is not None and tokens > 700:
        assert memory_for(found).tensors <= card_gb * 1e9 - OVERHEAD


@pytest.mark.parametrize(
    ("ranks", "records", "count", "tokens"),
    [(1, 200, 4, 75), (2, 200, 4, 75), (1, 20, 1, 60), (3, 20, 3, 60), (1, 5000, 8, 938), (1, 50_000, 8, 4096)],
)
def test_few_records_are_learned_in_small_steps_so_that_three_passes_have_a_hundred(ranks, records, count, tokens):
    config: Any = SimpleNamespace(batch=BatchOptions(tokens_per_micro_batch=4096, micro_batches_per_step=8))
    cluster: Any = SimpleNamespace(world_size=ranks, on_first=lambda work: work(), gather=lambda found, kind: [found])
    chooser = FineTuningChooser(60, 50 * records, memory_for, None)
    found = {each.key.partition(".")[2]: each.value for each in chooser.batch(config, cluster)}
    assert found == {"micro_batches_per_step": count, "tokens_per_micro_batch": tokens}
    if ranks * 60 * WANTED_STEPS <= 3 * 50 * records <= 4096 * 8 * WANTED_STEPS:
        assert 3 * 50 * records / (count * tokens) == pytest.approx(WANTED_STEPS, rel=0.01)


# --- what is chosen -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("minutes", [2, 10, 40, 600])
def test_steps_validations_saves_and_starts_fit_into_the_budget_and_use_it(minutes):
    found = length_of(60 * minutes, MEASURED, save_every=500)
    used_s = found.steps * MEASURED.step_s + found.steps // 500 * MEASURED.save_s
    used_s += found.validations * (MEASURED.validation_s + MEASURED.save_s) + MEASURED.spent_s + MEASURED.setup_s
    assert 0.88 * 60 * minutes < used_s < 0.96 * 60 * minutes
    assert 3 <= found.validations <= 12


def test_validations_that_are_given_cost_time_too():
    often, seldom = (length_of(600, MEASURED, save_every=500, validate_every=every) for every in (20, 2000))
    assert often.steps < 0.6 * seldom.steps
    assert often.validations == -(-often.steps // 20)


def test_a_run_that_has_read_its_data_often_enough_leaves_time_over():
    found = length_of(600, MEASURED, save_every=500, validate_every=20, enough=(99.5, "enough"))
    assert (found.steps, found.validations) == (100, 5)
    assert found.reason == (
        "enough; 25s for steps of 0.25 s with their saves, 22s for 5 validations, 23s for starting and measuring, "
        "8m49s to spare"
    )


def test_a_budget_that_is_too_short_says_what_takes_how_long_and_what_is_enough():
    with pytest.raises(UserError, match=r"leaves time for 0 steps: .* 20s, .* 3s, .* 4s, a step 0\.25 s; give it 2m"):
        length_of(25, MEASURED, save_every=500)
    assert length_of(120, MEASURED, save_every=500).steps > FEWEST_STEPS


@pytest.mark.parametrize(("steps", "warmup"), [(10, 2), (100, 20), (500, 50), (3000, 150), (1_000_000, 500)])
def test_warmup_is_a_twentieth_of_the_steps_within_bounds(steps, warmup):
    assert warmup_of(steps)[0] == warmup


@pytest.mark.parametrize(
    ("r_drop", "passes", "chosen"),
    [
        (0, 1.2, (0.1, 0)),
        (0, 11, (0.2, 0)),
        (1, 5.5, (0.2, 0)),
        (1, 15, (0.3, 1)),
        (0, 30, (0.3, 1)),
        (0, 130, (0.4, 1)),
    ],
)
def test_learning_is_made_harder_the_oftener_each_pair_is_read(r_drop, passes, chosen, sample_data: Path):
    config = GPTConfig.model_validate({"run_dir": "unused", "data": "unused", "loss": {"r_drop": r_drop}})
    chooser = TranslationChooser(Sequences.of(open_prepared(sample_data), "train", 64))
    assert tuple(each.value for each in chooser.by_passes(config, passes)) == chosen


@pytest.mark.parametrize(
    ("ranks", "longest", "chosen"), [(2, 100, (4, 512)), (8, 100, (8, 256)), (3, 100, (12, 171)), (1, 700, (4, 700))]
)
def test_micro_batches_suit_the_ranks_and_the_longest_sample(ranks, longest, chosen):
    found = {each.key.partition(".")[2]: each.value for each in shared_out(512, 4, ranks, longest)}
    batch = BatchOptions(tokens_per_micro_batch=512, micro_batches_per_step=4).model_copy(update=found)
    assert (batch.micro_batches_per_step, batch.tokens_per_micro_batch) == chosen


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("--budget", "10"), ("budget: say the unit, as in 40m or 1h30m, got '10'",)),
        (("--budget", "soon"), ("budget", "got 'soon'")),
        (("--budget", "-5m"), ("budget", "-5m")),
        (("--budget", "0s"), ("budget", "greater than 0")),
        (("--budget", "0.001s"), ("--budget 0s is too short: starting took", "give it 1m or more")),
        (("--budget", "10m", "--optim.steps", 50), ("--budget 10m00s chooses the length", "--optim.steps: leave one")),
        (("--budget", "10m", "--optim.epochs", 2), ("--budget 10m00s chooses the length", "--optim.epochs")),
    ],
)
def test_a_budget_that_cannot_be_is_refused_in_one_line(
    words, parts, launch: Launch, sample_data: Path, tmp_path: Path
):
    result = launch(*command_of(tmp_path / "run", sample_data, *RUN, *words)).wait()
    assert_only_one_line_is_said(result, *parts)
    assert not (tmp_path / "run/checkpoints").exists()


def test_ranks_that_cannot_share_a_step_are_told_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(budget, "process_age_s", lambda: 1.0)  # not that of the tests, which may be half an hour
    config = config_of(command_of(tmp_path, tmp_path, *BUDGET, "--batch.micro_batches_per_step", 2))
    cluster: Any = SimpleNamespace(world_size=3, maximum=list)
    chooser: Any = SimpleNamespace(keys=(), longest=10)
    decision = budget._Decision(config, [], pytest.fail, cluster, chooser)
    with pytest.raises(UserError, match="3 ranks cannot share the 2 micro-batches"):
        decision.make(dry_run=True)


def test_the_config_of_a_run_with_a_budget_is_read_back_as_it_was_chosen(tmp_path: Path):
    for text in ("10m", "1h30m", "90.5s", "1h00m20s"):
        config = config_of(command_of(tmp_path, tmp_path, "--budget", text))
        (tmp_path / "config.yaml").write_text(to_yaml(config))
        assert config_of((tmp_path / "config.yaml",)) == config
