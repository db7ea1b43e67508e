"""The engine around a model of a few hundred numbers, in this process: what whole trainings show, within seconds.

Where it takes several ranks, they are processes without a launcher.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import signal
import threading
import time
from contextlib import closing
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from launch.doctor.run import disk
from tests.support.disks import not_as_root
from tests.support.ranks import on_ranks
from tests.support.runs import assert_same_model, assert_same_record, last_checkpoint, status_of
from training.base.console import TryLaterError, UserError
from training.base.environment import Ranks
from training.base.files import nearest_folder
from training.engine import loop, run_folder, stopping, surroundings
from training.engine.batch_plan import BatchOptions, BatchPlan
from training.engine.cluster import Cluster, Watcher
from training.engine.loop import train
from training.engine.metrics import MetricsFile, is_damaged, read_metrics
from training.engine.optim import Course, OptimOptions, build_optimizer, learning_rate
from training.engine.parallel import DataParallel
from training.engine.precision import Precision
from training.engine.run_folder import RunFolder
from training.engine.status import EXIT_RESUMABLE
from training.engine.stopping import SessionOptions, StopFlag, Stopped
from training.engine.task import OwnPart, RunOptions, Task, Validation
from training.engine.wandb.tracker import _values
from training.models.dropout import Dropout

CPU = torch.device("cpu")
STOPPING = ("SIGTERM", "SIGINT", "SIGQUIT", "SIGXCPU", "SIGUSR1")

ONE = SimpleNamespace(rank=0, world_size=1, device=CPU, watcher=Watcher())
STEPS = 24
SAMPLES = 60
_dice = np.random.default_rng(3)
LENGTHS, WEIGHTS = _dice.integers(1, 30, SAMPLES), _dice.integers(1, 30, SAMPLES)
INPUTS = torch.from_numpy(_dice.normal(size=(SAMPLES, 6))).float()
LABELS = torch.from_numpy(_dice.integers(0, 5, SAMPLES))

FORKS = multiprocessing.get_context("forkserver")
# A process has one such server: where both files are run, it serves test_checkpoint.py, too.
FORKS.set_forkserver_preload(["tests.training.engine.test_checkpoint", __name__, "torch._dynamo"])


def model_of(dropout: float = 0.3, width: int = 20) -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), Dropout(dropout), nn.Linear(width, width), nn.Linear(width, 5))


def summed_loss(model: nn.Module, samples: np.ndarray) -> torch.Tensor:
    """As if a sample had as many supervised tokens as it weighs."""
    losses = F.cross_entropy(model(INPUTS[samples]).float(), LABELS[samples], reduction="none")
    return (losses * torch.from_numpy(WEIGHTS[samples])).sum()


def plan() -> BatchPlan:
    options = BatchOptions(sentences_per_micro_batch=5, tokens_per_micro_batch=None, micro_batches_per_step=4)
    return BatchPlan(LENGTHS, WEIGHTS, options, seed=5, epochs=1, steps=STEPS)


def config_of(run_dir: Path, **more: Any) -> RunOptions:
    options = {
        "optim": {"steps": STEPS, "warmup_steps": 3, "lr": 0.02, "ema_decay": 0.9},
        "batch": {"micro_batches_per_step": 4},
        "checkpoint": {"every_steps": 5},
        "log": {"every_steps": 4, "validate_every_steps": 10},
        "wandb": {"mode": "disabled"},
    }
    return RunOptions.model_validate({"run_dir": run_dir, "data": "unused", **options, **more})


def engine_of(
    model: nn.Module, *, precision: str = "fp32", lr: float = 0.0, clip_norm: float | None = None, cluster: Any = ONE
) -> DataParallel:
    """With plain gradient descent, so that a step is as large as its gradient."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    return DataParallel(model, optimizer, cluster, Precision(precision, "as asked for", CPU), clip_norm)


def forward_backward(engine: DataParallel, step: int, rank: int = 0, ranks: int = 1) -> torch.Tensor:
    shares = SimpleNamespace(rank=rank, world_size=ranks, device=CPU, watcher=Watcher())
    task = SimpleNamespace(plan=plan(), loss=summed_loss)
    return loop.forward_backward(SimpleNamespace(seed=11), task, engine, shares, step)


def gradient_of(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def weights_of(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


# A step.


def test_gradient_of_a_step_is_that_of_the_mean_over_all_its_tokens():
    model, samples = model_of(dropout=0), np.concatenate([batch.samples for batch in plan().step(2)])
    loss = forward_backward(engine_of(model), 2)
    found = gradient_of(model)
    model.zero_grad()
    expected = summed_loss(model, samples) / WEIGHTS[samples].sum()
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(found, gradient_of(model))


@pytest.mark.parametrize("ranks", [2, 4])
def test_micro_batches_and_their_dropout_do_not_depend_on_the_rank_that_runs_them(ranks):
    alone, shared = model_of(), model_of()
    loss = forward_backward(engine_of(alone), 3)
    torch.rand(5)  # whatever the process did before does not matter
    losses = [forward_backward(engine_of(shared), 3, rank, ranks) for rank in range(ranks)]
    torch.testing.assert_close(sum(losses), loss)
    torch.testing.assert_close(gradient_of(shared), gradient_of(alone))


def test_every_micro_batch_of_every_step_has_a_dropout_of_its_own():
    masks = []

    def loss(model: nn.Module, samples: np.ndarray) -> torch.Tensor:
        masks.append(tuple((model(torch.ones(4, 50)) == 0).flatten().tolist()))
        return model(torch.ones(1, 1)).sum() * nn.Parameter(torch.ones(()))

    engine, task = engine_of(nn.Sequential(Dropout(0.5), nn.Linear(1, 1))), SimpleNamespace(plan=plan(), loss=loss)
    engine.replica = Dropout(0.5)
    for seed, step in ((11, 0), (11, 1), (12, 0)):
        loop.forward_backward(SimpleNamespace(seed=seed), task, engine, ONE, step)
    assert len(set(masks)) == len(masks) == 12


def test_gradient_is_clipped_as_it_is_and_not_as_it_was_scaled():
    plain, scaled = model_of(dropout=0), model_of(dropout=0)
    engine = engine_of(plain)
    forward_backward(engine, 0)
    true_norm = float(engine.step(0.0))
    engine = engine_of(scaled, precision="fp16", clip_norm=true_norm / 4)
    forward_backward(engine, 0)
    before = weights_of(scaled)
    assert float(engine.step(1.0)) == pytest.approx(true_norm, rel=0.02)
    assert float((weights_of(scaled) - before).norm()) == pytest.approx(true_norm / 4, rel=0.02)


def spoiled(engine: DataParallel, model: nn.Module) -> None:
    """A step whose gradient is not finite."""
    forward_backward(engine, 0)
    next(model.parameters()).grad[0, 0] = torch.inf
    engine.step(0.1)


def test_gradient_that_is_not_finite_is_skipped_and_counted():
    model = model_of()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    engine = DataParallel(model, optimizer, ONE, Precision("fp32", "as asked for", CPU), 1.0)
    before = weights_of(model)
    for number in (1, 2, 3):
        spoiled(engine, model)
        assert int(engine.skipped_in_a_row) == number
    assert torch.equal(weights_of(model), before)
    forward_backward(engine, 0)
    engine.step(0.1)
    assert int(engine.skipped_in_a_row) == 0 and not torch.equal(weights_of(model), before)


def test_steps_that_the_scaler_skips_in_search_of_its_range_are_not_counted():
    model = model_of()
    engine = engine_of(model, precision="fp16")
    before = weights_of(model)
    for _ in range(6):
        spoiled(engine, model)
        assert int(engine.skipped_in_a_row) == 0
    assert torch.equal(weights_of(model), before)
    while engine.state()["scaler"]["scale"] > 1:
        spoiled(engine, model)
    spoiled(engine, model)
    assert int(engine.skipped_in_a_row) == 1, "there is no range left to search"


def gradients_of_steps(rank: int, ranks: int) -> list[torch.Tensor]:
    """The gradients of three steps over the same data with the same weights, as every rank has them."""
    # Large enough for the sums to differ in their last bits if they are added up in another order.
    model = model_of(width=120)
    engine = engine_of(model, cluster=SimpleNamespace(rank=rank, world_size=ranks, device=CPU))
    gradients = []
    for _ in range(3):
        forward_backward(engine, 3, rank, ranks)
        gradients.append(gradient_of(model).clone())
        engine.step(0.0)
    return gradients


def test_four_ranks_add_gradients_up_in_the_same_order_in_a_processs_first_step_as_later(tmp_path):
    """The first step of a resumed session is a later one of the uninterrupted run."""
    shared = on_ranks(4, tmp_path, gradients_of_steps)
    alone = model_of(width=120)
    forward_backward(engine_of(alone), 3)
    for first, *later in shared:
        torch.testing.assert_close(first, gradient_of(alone))
        assert all(torch.equal(first, each) for each in later)


def test_learning_rate_rises_to_its_peak_and_falls_to_the_share_of_it_that_is_asked_for():
    for schedule, halfway, last in (("cosine", 0.51, 0.02), ("linear", 0.51, 0.02), ("constant", 1.0, 1.0)):
        options = OptimOptions(lr=0.4, warmup_steps=10, schedule=schedule, final_lr_share=0.02)
        shares = [learning_rate(step, Course.of(options, 111), options) / 0.4 for step in range(111)]
        assert shares[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
        assert shares[10] == pytest.approx(1)
        assert (shares[60], shares[110]) == (pytest.approx(halfway), pytest.approx(last))
        assert shares[10:] == sorted(shares[10:], reverse=True)


def test_matrices_decay_and_biases_and_norms_do_not():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Embedding(3, 4))
    optimizer = build_optimizer(model, OptimOptions(weight_decay=0.1, warmup_steps=0), steps=10)
    decays = {id(each): group["weight_decay"] for group in optimizer.param_groups for each in group["params"]}
    assert {name: decays[id(each)] for name, each in model.named_parameters()} == {
        **{"0.weight": 0.1, "0.bias": 0.0, "1.weight": 0.0, "1.bias": 0.0, "2.weight": 0.1}
    }


# A run.


def train_here(folder: Path, name: str = "run", *, stop_at: int | None = None, **more: Any) -> int:
    """A session of a run; somebody makes the file STOP during its step `stop_at`."""
    (folder / name).mkdir(exist_ok=True)
    config = config_of(folder / name, **more)

    class Toy(Task):
        name, flops_per_token, passes = "toy", 1.0, 0

        def loss(self, model: nn.Module, samples: np.ndarray) -> torch.Tensor:
            self.passes += 1
            if stop_at is not None and self.passes == 4 * stop_at:
                (folder / name / "STOP").touch()
            return summed_loss(model, samples)

        @torch.no_grad()
        def validate(self, model: nn.Module, own_part: OwnPart) -> Validation:
            right = sum(
                float((model(INPUTS[samples]).argmax(-1) == LABELS[samples]).sum())
                for samples in own_part([slice(0, 60)])
            )
            return Validation(1.0, right / SAMPLES)

    data = SimpleNamespace(kept={}, identity={"fingerprint": "f00"})
    with Cluster() as cluster:
        task = Toy()
        task.model, task.plan = model_of(), plan()
        return train(config, task, data, cluster)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_stopped_run_ends_with_every_bit_of_the_uninterrupted_one(tmp_path, monkeypatch, handlers, precision):
    monkeypatch.setattr(stopping, "_AGREE_EVERY_S", 0)  # the ranks agree at every step, however short
    assert train_here(tmp_path, "whole", precision=precision) == 0
    for steps, reached in ((7, 7), (6, 13)):
        assert train_here(tmp_path, stop_at=steps, precision=precision) == 75
        assert status_of(tmp_path / "run")["step"] == last_checkpoint(tmp_path / "run").step == reached
    assert train_here(tmp_path, precision=precision) == 0
    assert_same_model(tmp_path / "run", tmp_path / "whole")
    assert_same_record(tmp_path / "run", tmp_path / "whole")
    # What is lacking in both is equal, too.
    last = last_checkpoint(tmp_path / "run")
    assert {"model.safetensors", "optimizer.safetensors", "ema.safetensors"} <= set(last.manifest["files"])
    scaler = last.state()["scaler"]
    assert (scaler or {}).get("_growth_tracker") == (STEPS if precision == "fp16" else None)


def test_run_with_another_definition_is_refused_and_what_may_change_is_not(tmp_path, handlers):
    assert train_here(tmp_path) == 0
    optim = config_of(tmp_path).optim.model_dump() | {"lr": 0.01}
    for change, said in (({"seed": 4}, "seed: 1234 -> 4"), ({"optim": optim}, "optim.lr: 0.02 -> 0.01")):
        with pytest.raises(UserError, match=said):
            train_here(tmp_path, **change)
    assert train_here(tmp_path, log={"every_steps": 1}, checkpoint={"keep": 3}) == 0


def test_run_folder_is_held_by_one_run_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "_LOCK_PATIENCE_S", 0)
    data = SimpleNamespace(kept={}, identity={})
    first, second = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run")
    begin = {"about": {}, "data": data, "config": "", "source": None, "may_change": set()}
    first.open(**begin)
    with pytest.raises(TryLaterError, match="is in use by process"):
        second.open(**begin)
    first.close()
    second.open(**begin)
    second.close()


def test_run_without_a_checkpoint_keeps_its_place_in_wandb_unless_another_run_is_begun_in_its_folder(tmp_path):
    """A sweep's variables are gone when a trial is started by hand, and what they said stands in its config."""

    def is_kept(config: str) -> bool:
        (tmp_path / "wandb.json").write_text('{"id": "trial"}')
        with closing(RunFolder(tmp_path)) as folder:
            data = SimpleNamespace(kept={}, identity={})
            folder.open({}, data, config=config, source=None, may_change=set())
        return (tmp_path / "wandb.json").exists()

    assert is_kept("{seed: 1, wandb: {project: theirs}}")
    assert is_kept("{seed: 1, wandb: {project: relay}}")
    assert not is_kept("{seed: 2, wandb: {project: relay}}")


def test_record_is_cut_back_to_the_step_that_a_run_falls_back_to(tmp_path):
    record = MetricsFile(tmp_path, resumed_step=0, validated_step=0)
    for step in (10, 20, 30):
        record.write("train", step, loss=1.0)
        record.write("validation", step, loss=1.0)
    record.close()
    record = MetricsFile(tmp_path, resumed_step=20, validated_step=10)
    record.write("validation", 20, loss=2.0)
    record.close()
    found = [(line["kind"], line["step"], line["loss"]) for line in read_metrics(tmp_path)]
    assert found == [("train", 10, 1.0), ("validation", 10, 1.0), ("train", 20, 1.0), ("validation", 20, 2.0)]
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == read_metrics(
        tmp_path
    )


def test_what_is_no_number_is_null_on_record_and_none_to_readers(tmp_path):
    record = MetricsFile(tmp_path, resumed_step=0, validated_step=0)
    followed = [record.write("train", 10, loss=math.nan, grad_norm=math.inf, lr=0.1)]
    record.close()
    path = tmp_path / "metrics.jsonl"
    (line,) = path.read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail) == followed[0]
    assert (followed[0]["loss"], followed[0]["grad_norm"], followed[0]["lr"]) == (None, None, 0.1)
    assert _values(followed[0]).keys() == {"step", "_timestamp", "train/lr"}, "wandb gets a gap"
    for text in (line, line.replace("null", "NaN")):  # written before there was a null, too
        path.write_text(f"{text}\n")
        assert read_metrics(tmp_path) == followed and not is_damaged(path)


@pytest.mark.parametrize("name", ["lock", "checkpoints", "metrics.jsonl"])
def test_what_may_not_be_written_is_one_clear_error_before_the_first_step(name, handlers):
    with not_as_root() as folder:
        place = folder / "run" / name
        (folder / "run/checkpoints").mkdir(parents=True)
        if place.suffix or name == "lock":
            place.touch()
        place.chmod(0o555 if place.is_dir() else 0o444)
        with pytest.raises(UserError, match=f"no permission to write {place}: choose another --run_dir"):
            train_here(folder)
        place.chmod(0o755)
        assert train_here(folder, stop_at=1) == EXIT_RESUMABLE


def test_link_to_what_is_not_there_is_said_to_be_one(tmp_path):
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    run_dir, said = tmp_path / "runs/gpt", f"{tmp_path}/runs is a link to {tmp_path}/disk, which is not there"
    folder, data = RunFolder(run_dir), SimpleNamespace(kept={}, identity={})
    with pytest.raises(UserError, match=f"^{said}: mount or make that, or choose another --run_dir"):
        folder.open({}, data, config="", source=None, may_change=set())
    assert nearest_folder(run_dir) == f" ({said})"
    with pytest.raises(UserError, match=said):
        next(disk(run_dir))


# The end of a session.


class Threads:
    """Ranks that are threads of this process: each waits in `maximum` for the others."""

    def __init__(self, ranks: int):
        self._barrier, self._values = threading.Barrier(ranks, timeout=5), [[0.0]] * ranks
        self.without_launcher: set[int] = set()

    def rank(self, number: int) -> SimpleNamespace:
        launcher = SimpleNamespace(is_gone=lambda: number in self.without_launcher)
        maximum = partial(self._maximum, number)
        about = {"rank": number, "is_first": number == 0, "ranks": Ranks(number, number)}
        return SimpleNamespace(**about, launcher=launcher, maximum=maximum, watcher=Watcher())

    def _maximum(self, rank: int, values: list[float]) -> list[float]:
        self._values[rank] = values
        self._barrier.wait()
        result = [max(each) for each in zip(*self._values, strict=True)]
        self._barrier.wait()
        return result


@pytest.mark.parametrize("name", STOPPING)
def test_every_signal_that_asks_a_process_to_leave_is_a_stop(tmp_path, handlers, name):
    """Also that of a limit of CPU time, and of Ctrl-backslash, which torchrun passes on."""
    cluster = SimpleNamespace(is_first=True, launcher=None, maximum=list, watcher=Watcher(), ranks=Ranks())
    flag = StopFlag(tmp_path, cluster, SessionOptions())
    flag.check()
    signal.raise_signal(signal.Signals[name])
    with pytest.raises(Stopped, match=f"signal {name}"):
        flag.check()


def test_all_ranks_stop_at_the_same_step_though_one_alone_has_a_reason(tmp_path, handlers):
    ranks = Threads(3)
    flags = [StopFlag(tmp_path, ranks.rank(number), SessionOptions()) for number in range(3)]
    stopped: dict[int, tuple[int, str]] = {}

    def run(number: int) -> None:
        for step in range(1, 5):
            if (number, step) == (2, 3):
                ranks.without_launcher.add(2)
            time.sleep(0.05)  # so long a step that they agree at each
            try:
                flags[number].check()
            except Stopped as reason:
                stopped[number] = step, str(reason)
                return

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert stopped == dict.fromkeys(range(3), (3, "the end of the launcher"))


@pytest.mark.parametrize(
    ("left_s", "save_s", "stops"), [(100, 20, False), (45, 20, True), (45, 5, False), (25, 0, True)]
)
def test_session_ends_while_a_save_and_a_margin_still_fit_into_its_time(
    tmp_path, monkeypatch, handlers, left_s, save_s, stops
):
    monkeypatch.setattr(stopping, "process_age_s", lambda: 0.0)
    monkeypatch.setattr(stopping, "time_left", lambda: None)
    cluster = SimpleNamespace(rank=0, is_first=True, launcher=None, maximum=list, watcher=Watcher(), ranks=Ranks())
    flag = StopFlag(tmp_path, cluster, SessionOptions(time_limit=left_s, margin=30))
    flag.reserve_s = lambda: save_s
    try:
        flag.check()
    except Stopped as reason:
        assert stops and str(reason) == "the time limit"
    else:
        assert not stops


def test_a_pause_is_no_slow_step_and_the_scheduler_is_asked_again_what_is_left(tmp_path, monkeypatch, handlers):
    left_s = iter([1000.0, 2000.0])  # SLURM does not count the time in which it has suspended a job
    monkeypatch.setattr(stopping, "time_left", lambda: (next(left_s), "SLURM's time limit"))
    paused_s = [0.0]
    watcher = SimpleNamespace(paused_s=lambda: paused_s[0])
    cluster = SimpleNamespace(rank=0, is_first=True, launcher=None, maximum=list, watcher=watcher, ranks=Ranks())
    flag = StopFlag(tmp_path, cluster, SessionOptions(margin=0))
    flag.check()
    later = time.monotonic() + 900
    monkeypatch.setattr(stopping.time, "monotonic", lambda: later)
    paused_s[0] = 890.0
    flag.check()
    assert (flag.usable_s() or 0) > 1900 and 9 < flag._slowest_step_s < 11


def test_options_of_deepspeed_without_it_are_warned_of(tmp_path, handlers, capsys):
    assert train_here(tmp_path, stop_at=2, zero={"stage": 3}) == EXIT_RESUMABLE
    assert "warning: zero.* has no effect with --parallel ddp: " in capsys.readouterr().err
    assert train_here(tmp_path) == 0
    assert "zero" not in capsys.readouterr().err


# What the bits depend on.


def test_other_surroundings_are_said_at_the_start_and_a_refusal_names_the_commit(
    tmp_path, handlers, monkeypatch, capsys
):
    assert train_here(tmp_path, stop_at=2) == EXIT_RESUMABLE
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert train_here(tmp_path) == 0
    finally:
        torch.set_num_threads(threads)
    said = f"not as in the last session: threads: {threads} -> {threads + 1}; the numbers are equal up to rounding only"
    assert said in capsys.readouterr().out
    monkeypatch.setattr(run_folder, "commit", lambda: "another")
    with pytest.raises(UserError, match=rf"it was saved by Relay's commit {surroundings.commit()}, this is another"):
        train_here(tmp_path, seed=4)


def test_a_process_that_is_alone_goes_on_with_as_many_threads_as_before(tmp_path, handlers, monkeypatch, capsys):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    threads = torch.get_num_threads()
    assert train_here(tmp_path, stop_at=2) == EXIT_RESUMABLE
    torch.set_num_threads(threads + 1)
    try:
        assert train_here(tmp_path) == 0
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(threads)
    assert "not as in the last session" not in capsys.readouterr().out


def test_code_is_the_same_whatever_its_comments(tmp_path):
    def digest(text: str) -> str:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.py"
        path.write_text(text)
        return surroundings.digest_of(path)

    code = digest("def half(x):\n    return x / 2\n")
    assert digest('"""Halves."""\n\ndef half(x):  # of it\n    """Half."""\n    return x / 2\n') == code
    assert digest("def half(x):\n    return x / 3\n") != code
