"""The proof that users run themselves: it succeeds, and it would fail if there were a difference."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest

from launch import prove
from launch.prove import ACCIDENTS, Training, differences, have_accident
from tests.support.commands import ROOT, Launch
from training.base.console import UserError
from training.engine.checkpoint import checkpoints
from training.engine.status import METRICS

CONFIG = ROOT / "configs/gpt/sample.yaml"
SMALL = ("--model.width", 32, "--model.layers", 1, "--batch.tokens_per_micro_batch", 512)


def training(run_dir: Path, data: Path, *words: object, steps: int = 40) -> Training:
    options = (*SMALL, *prove._shortened(steps, {}), "--data", data, *words)
    return Training(("training.gpt", str(CONFIG), *map(str, options)), run_dir, steps, 1)


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", "1")
    monkeypatch.setitem(os.environ, "CUDA_VISIBLE_DEVICES", "")


def test_proof_ends_with_equal_sums_and_leaves_nothing_behind(launch: Launch, sample_data):
    before = set(Path("runs").glob("*"))
    words = (*SMALL, "--data", sample_data, "--steps", 40, "--kills", 1, "--processes", 2)
    result = launch(CONFIG, *words, module="launch.prove").wait()
    assert result.status == 0, result
    assert "the same, bit for bit: 1 accident, all" in result.out
    for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
        (line,) = [line for line in result.out.splitlines() if line.strip().startswith(name)]
        _, one, other, verdict = line.split()
        assert one == other and verdict == "same"
    assert set(Path("runs").glob("*")) == before


def test_every_difference_between_two_runs_is_found(launch: Launch, sample_data, tmp_path):
    one, same, other = (
        training(tmp_path / name, sample_data, *words)
        for name, words in (("one", ()), ("same", ()), ("other", ("--model.dropout", 0.2)))
    )
    for each in (one, same, other):
        module, *options = each.words
        assert launch(*options, "--run_dir", each.run_dir, module=module, ranks=2).wait().status == 0
    assert differences(one, same) == []
    found = differences(one, other)
    assert {"model.safetensors", "optimizer.safetensors"} <= set(found)
    assert any("metrics.jsonl: 0 of" in each for each in found)
    metrics = same.run_dir / METRICS
    metrics.write_text(metrics.read_text("utf-8").replace('"step": 7,', '"step": 8,'), encoding="utf-8")
    assert [each.split(":")[0] for each in differences(one, same)] == ["metrics.jsonl"]


def test_a_published_checkpoint_that_an_accident_damages_counts_as_lost(sample_data, tmp_path, monkeypatch):
    broken = training(tmp_path / "run", sample_data, steps=400)

    def kill_and_damage(family: list[int]) -> None:
        while not checkpoints(broken.run_dir):  # the first save may be the one in which it is killed
            time.sleep(0.001)
        real_kill_all(family)
        file = checkpoints(broken.run_dir)[-1].folder / "state.json"
        file.write_bytes(file.read_bytes()[:-1])

    real_kill_all = prove.kill_all
    monkeypatch.setattr(prove, "kill_all", kill_and_damage)
    event = have_accident(broken, "killed while saving", random.Random(1))
    assert event is not None and event.accident in ACCIDENTS
    assert event.lost is not None and "state.json has" in event.lost


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["configs/gpt/none.yaml"], "there is no config file"),
        ([str(CONFIG), "--steps", "3"], "--steps must be at least 20"),
    ],
)
def test_what_cannot_be_proven_is_one_clear_error(words, said):
    with pytest.raises(UserError, match=said):
        prove.main(words)


@pytest.mark.whole
def test_training_that_fails_is_shown_with_its_own_words(sample_data, tmp_path):
    with pytest.raises(UserError, match=r"did not finish(?s:.*)there is no key model.widht"):
        training(tmp_path / "run", sample_data, "--model.widht", 3).finish()
