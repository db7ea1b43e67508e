"""A checkpoint is published or it does not exist: after kills, on full disks, with flipped bits."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import count, product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.support.disks import not_as_root
from training.base.console import UserError
from training.engine import checkpoint as checkpoint_module
from training.engine.checkpoint import (
    MANIFEST,
    Checkpoint,
    checkpoints,
    choose,
    copy_checkpoint,
    keep_for_good,
    main,
    newest_valid,
    publish,
    tensors_of,
)
from training.engine.saver import CheckpointOptions
from training.engine.status import end_killed_saves
from training.models.gpt import GPT, GPTOptions, Vocabularies

FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "manifest.json")
ABOUT = {
    "task": "gpt",
    "config": {"seed": 1234, "model": {"width": 32}},
    "data": {"fingerprint": "f00"},
    "versions": {},
}

# A server that has loaded torch once, with what it loads at the first optimizer step, and is forked for every process
# that a test kills.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([__name__, "torch._dynamo"])


def trained(steps: int, width: int = 16) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A small GPT after `steps` optimizer steps; the same in every process."""
    torch.manual_seed(0)
    model = GPT(GPTOptions(layers=1, heads=2, width=width, context=8, dropout=0), Vocabularies(12))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    for step in range(steps):
        train_step(model, optimizer, step)
    return model, optimizer


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    tokens = torch.randint(0, 12, (4, 8), generator=torch.Generator().manual_seed(step))
    nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
    optimizer.step()
    optimizer.zero_grad()


def save_step(run_dir: Path, step: int, *, keep: int = 2, best: int | None = None, width: int = 16) -> Checkpoint:
    """Publishes what `trained(step)` gives. best: the step that was validated with a high score."""
    return save_trained(run_dir, step, *trained(step, width), keep=keep, best=best)


def save_trained(
    run_dir: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, *, keep: int, best: int | None
) -> Checkpoint:
    state = {"scaler": None, "scores": {"accuracy": 1.0} if step == best else {}}
    return publish(run_dir, step, tensors_of(model, optimizer), state=state, about=ABOUT, keep=keep)


def steps_in(run_dir: Path) -> list[int]:
    return [checkpoint.step for checkpoint in checkpoints(run_dir)]


def names_in(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def folder_of(step: int) -> str:
    return f"step-{step:010d}"


def assert_restores(checkpoint: Checkpoint | None, step: int) -> None:
    """It is the checkpoint of `step` and gives back model and optimizer of that step bit for bit."""
    assert checkpoint is not None
    assert checkpoint.step == step
    expected_model, expected_optimizer = trained(step)
    model, optimizer = trained(0)
    checkpoint.load_into(model, optimizer)
    for name, value in expected_model.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    expected, restored = expected_optimizer.state_dict(), optimizer.state_dict()
    assert restored["param_groups"] == expected["param_groups"]
    assert restored["state"].keys() == expected["state"].keys()
    for index, values in expected["state"].items():
        assert restored["state"][index].keys() == values.keys()
        for kind, value in values.items():
            assert torch.equal(restored["state"][index][kind], value), (index, kind)


def test_restored_model_and_optimizer_are_bit_equal_and_train_on_alike(tmp_path):
    save_step(tmp_path, 5)
    checkpoint = newest_valid(tmp_path)
    assert_restores(checkpoint, 5)
    model, optimizer = trained(0)
    checkpoint.load_into(model, optimizer)
    for step in range(5, 9):
        train_step(model, optimizer, step)
    expected, _ = trained(9)
    for name, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_checkpoint_holds_all_and_nothing_that_runs_when_loaded(tmp_path):
    state = {"scaler": {"scale": 2.0**16, "_growth_tracker": 3}, "scores": {"accuracy": 0.1 + 0.2}}
    checkpoint = publish(tmp_path, 7, tensors_of(*trained(1)), state=state, about=ABOUT, keep=1)
    assert sorted(path.name for path in checkpoint.folder.iterdir()) == sorted(FILES)
    for path in checkpoint.folder.iterdir():
        start = path.read_bytes()[:2]
        assert start != b"PK" and start[:1] != b"\x80", f"{path.name} is a pickle"
    assert checkpoint.state() == state
    assert {key: checkpoint.manifest[key] for key in ABOUT} == ABOUT
    assert checkpoint.manifest["step"] == checkpoint.step == 7
    assert set(checkpoint.manifest["files"]) == set(FILES) - {MANIFEST}


# What is killed at which moment.


def die_at(moment: int) -> None:
    """Arranges that this process kills itself right before its `moment`-th operation on files from now on."""
    operations = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "os.listdir", "shutil.rmtree"}
    done = count()

    def watch(event: str, _: object) -> None:
        if event in operations and next(done) == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def save_and_die(run_dir: Path, step: int, best: int | None, moment: int) -> None:
    model, optimizer = trained(step)
    die_at(moment)
    save_trained(run_dir, step, model, optimizer, keep=1, best=best)


@pytest.mark.parametrize(
    ("best", "old_stays"),
    [pytest.param(None, False, id="retired"), pytest.param(1, True, id="best", marks=pytest.mark.whole)],
)
def test_kill_at_any_moment_of_a_save_keeps_the_previous_checkpoint(tmp_path, capsys, best, old_stays):
    """Before each single file operation of a save in turn, of the retirement of older checkpoints too."""
    for moment in count():
        run_dir = tmp_path / str(moment)
        save_step(run_dir, 1, keep=1, best=best)
        process = FORKS.Process(target=save_and_die, args=(run_dir, 2, best, moment))
        process.start()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        assert [each.verify() for each in checkpoints(run_dir) if each.verify()] == [], "what is published is whole"
        found = newest_valid(run_dir)
        assert found is not None, f"nothing is left after a kill at moment {moment}"
        assert_restores(found, found.step)
        # The next session trains on from there, saves the same step, and leaves no trace of the accident.
        if found.step == 1:
            found = save_step(run_dir, 2, keep=1, best=best)
        found = save_step(run_dir, 3, keep=1, best=best)
        assert_restores(newest_valid(run_dir), 3)
        assert names_in(run_dir) == ([folder_of(1)] if old_stays else []) + [folder_of(3)]
    assert moment > 20, "the save has more operations than that: the watch does not work"
    assert capsys.readouterr().err == "", "what is published is valid: there is nothing to set aside"


def save_for_ever(run_dir: Path) -> None:
    for step in count(2):
        save_step(run_dir, step, keep=1, width=512)


@pytest.mark.parametrize("trial", range(4))
def test_kill_at_a_random_moment_of_large_saves_keeps_a_valid_checkpoint(tmp_path, capsys, trial):
    save_step(tmp_path, 1, keep=1, width=512)
    process = FORKS.Process(target=save_for_ever, args=(tmp_path,))
    process.start()
    while not list((tmp_path / "checkpoints").glob(".*")) and steps_in(tmp_path) == [1]:
        assert process.is_alive()
        time.sleep(0.001)
    time.sleep(random.Random(trial).uniform(0, 0.3))
    process.kill()
    process.join()
    published = steps_in(tmp_path)
    found = newest_valid(tmp_path)
    assert found is not None and found.step == published[-1]
    assert capsys.readouterr().err == ""


# What is damaged, and how.


def flip(path: Path, place: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


def assert_set_aside(run_dir: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    """The damaged step 2 is noticed, renamed and named, and step 1 is taken. Puts step 2 back in its place."""
    found = newest_valid(run_dir)
    assert found is not None and found.step == 1, f"{case}: not noticed"
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and f"{folder_of(2)} is damaged: " in err and f"invalid-{folder_of(2)}" in err, case
    assert names_in(run_dir) == [f"invalid-{folder_of(2)}", folder_of(1)]
    damaged = run_dir / "checkpoints" / f"invalid-{folder_of(2)}"
    damaged.rename(damaged.with_name(folder_of(2)))


@pytest.mark.parametrize("name", FILES)
def test_single_flipped_bit_is_noticed_and_the_previous_checkpoint_taken(tmp_path, capsys, name):
    save_step(tmp_path, 1)
    path = save_step(tmp_path, 2).folder / name
    size = path.stat().st_size
    dice = random.Random(name)
    # Every byte of the small files, and of the large ones the ends and a choice.
    places = range(size) if size < 4096 else [0, 7, 8, size // 2, size - 1, *(dice.randrange(size) for _ in range(50))]
    for place in places:
        bit = dice.randrange(8)
        flip(path, place, bit)
        assert_set_aside(tmp_path, capsys, f"bit {bit} of byte {place}")
        flip(path, place, bit)
    assert_restores(newest_valid(tmp_path), 2)


def cut_in_half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def cut_by_a_byte(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def lengthen(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\n")


def remove(path: Path) -> None:
    path.unlink()


def replace_by_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def take_from_the_step_before(path: Path) -> None:
    path.write_bytes((path.parent.with_name(folder_of(1)) / path.name).read_bytes())


def add_a_file(path: Path) -> None:
    (path.parent / f"{path.name}.bak").write_bytes(path.read_bytes())


DAMAGES = (
    cut_in_half,
    cut_by_a_byte,
    empty,
    lengthen,
    remove,
    replace_by_a_folder,
    take_from_the_step_before,
    add_a_file,
)


# The state of both steps is the same, so that exchanging it does no damage.
CASES = [each for each in product(DAMAGES, FILES) if each != (take_from_the_step_before, "state.json")]


@pytest.mark.parametrize(("damage", "name"), CASES, ids=lambda each: getattr(each, "__name__", each))
def test_damaged_file_is_noticed_and_the_previous_checkpoint_taken(
    tmp_path, capsys, damage: Callable[[Path], None], name: str
):
    save_step(tmp_path, 1)
    damage(save_step(tmp_path, 2).folder / name)
    assert_set_aside(tmp_path, capsys, damage.__name__)
    assert_restores(newest_valid(tmp_path), 1)


def test_without_any_valid_checkpoint_the_damage_is_told_and_the_run_starts_anew(tmp_path, capsys):
    for step in (1, 2):
        cut_in_half(save_step(tmp_path, step).folder / "model.safetensors")
    with pytest.raises(UserError, match="has no valid checkpoint"):
        choose(tmp_path, "last")
    assert newest_valid(tmp_path) is None
    assert capsys.readouterr().err.count("is damaged: model.safetensors has") == 2
    save_step(tmp_path, 1)
    assert_restores(newest_valid(tmp_path), 1)


# What is kept.


@pytest.mark.parametrize("keep", [1, 2, 3])
@pytest.mark.parametrize("best", [None, 10, 40, 60])
def test_the_newest_and_the_best_are_kept(tmp_path, keep, best, capsys):
    saved = []
    for step in range(10, 70, 10):
        best_so_far = best if best is not None and step >= best else None
        save_step(tmp_path, step, keep=keep, best=best_so_far)
        saved.append(step)
        assert steps_in(tmp_path) == sorted({*saved[-keep:], *([best_so_far] if best_so_far else [])})
    assert all(checkpoint.verify() is None for checkpoint in checkpoints(tmp_path))
    assert choose(tmp_path, "last")[0].step == 60
    assert choose(tmp_path, "best")[0].step == (best or 60)
    unscored = f"warning: {tmp_path} has no checkpoint with a validation's score: step 60, the newest, is taken\n"
    assert capsys.readouterr().err == ("" if best else unscored)


def test_as_many_of_the_best_are_kept_as_asked_for_and_found_again_in_order(tmp_path, capsys):
    found = {10: 0.5, 20: 0.7, 30: None, 40: 0.6, 50: 0.7, 60: 0.1, 70: None}
    for step, accuracy in found.items():
        state = {"scores": {} if accuracy is None else {"accuracy": accuracy}}
        publish(tmp_path, step, tensors_of(*trained(step)), state=state, about=ABOUT, keep=1, keep_best=3)
    assert steps_in(tmp_path) == [20, 40, 50, 70]
    assert [each.step for each in choose(tmp_path, "best", 3)] == [20, 50, 40]
    assert [each.step for each in choose(tmp_path, "last", 4)] == [70, 50, 40, 20]
    cut_in_half(tmp_path / "checkpoints" / folder_of(50) / "model.safetensors")
    assert not capsys.readouterr().err
    assert [each.step for each in choose(tmp_path, "best", 2)] == [20, 40], "a damaged one is none"
    (said,) = capsys.readouterr().err.splitlines()
    assert f"{folder_of(50)} is damaged and left out: model.safetensors has " in said
    with pytest.raises(UserError, match=r"2 best checkpoint.*not 3.*--checkpoint.keep_best 3"):
        choose(tmp_path, "best", 3)
    with pytest.raises(UserError, match=r"3 last checkpoint.*not 9.*--checkpoint.keep 9"):
        choose(tmp_path, "last", 9)


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_stops_between_saves_leave_in_the_end_what_an_uninterrupted_run_keeps(tmp_path, keep):
    accuracy = {20: 0.7, 33: 0.9}  # a validated step that was not due and not the best, as far as that was known then
    for name, stops in (("plain", ()), ("stopped", (3, 17, 18, 33, 41))):
        for step in sorted({*range(10, 60, 10), *stops}):
            state = {"scores": {"accuracy": accuracy.get(step, 0.0)}, "due": step not in stops}
            save = publish(tmp_path / name, step, tensors_of(*trained(step)), state=state, about=ABOUT, keep=keep)
            assert newest_valid(tmp_path / name) == save
            assert len(steps_in(tmp_path / name)) <= keep + 1, "the disk has room for so many"
    assert steps_in(tmp_path / "stopped") == steps_in(tmp_path / "plain")
    assert [each.step for each in choose(tmp_path / "stopped", "last", keep)] == [50, 40, 30][:keep]


def test_a_checkpoint_that_was_being_replaced_when_a_kill_came_is_there_again(tmp_path, monkeypatch):
    save_step(tmp_path, 10)

    real = Path.rename

    def rename(path: Path, to: Path) -> None:
        if not to.name.endswith(".replaced"):
            raise KeyboardInterrupt  # between the two renames
        real(path, to)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        save_step(tmp_path, 10)
    monkeypatch.undo()
    assert newest_valid(tmp_path) is None
    (tmp_path / "checkpoints/.step-0000000007.partial").mkdir()
    end_killed_saves(tmp_path)
    assert_restores(newest_valid(tmp_path), 10)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [folder_of(10)]


@pytest.mark.parametrize(("best_by", "kept"), [("accuracy", [30, 40]), ("loss", [20, 40]), ("bleu", [10, 40])])
def test_the_score_that_is_named_says_which_is_best(tmp_path, best_by, kept):
    found = {10: (0.5, 2.0, 30.0), 20: (0.7, 1.0, 20.0), 30: (0.9, 1.5, 10.0), 40: (0.1, 9.0, 0.0)}
    for step, (accuracy, loss, bleu) in found.items():
        state = {"scores": {"accuracy": accuracy, "loss": loss, "bleu": bleu}, "best_by": best_by}
        publish(tmp_path, step, tensors_of(*trained(step)), state=state, about=ABOUT, keep=1)
    assert steps_in(tmp_path) == kept
    assert choose(tmp_path, "best")[0].step == kept[0]


def test_a_step_that_is_to_be_kept_for_good_stays(tmp_path, capsys):
    save_step(tmp_path, 10)
    with pytest.raises(UserError, match=r"step 20 cannot be kept: there is none; the steps of .* are 10"):
        main([str(tmp_path), "--keep", "20"])
    assert main([str(tmp_path), "--keep", "10"]) == 0 and "kept for good" in capsys.readouterr().out
    for step in (20, 30):
        save_step(tmp_path, step, keep=1)
    assert steps_in(tmp_path) == [10, 30]
    (tmp_path / "kept_steps.json").write_text("[10, ")
    save_step(tmp_path, 40, keep=1)
    assert steps_in(tmp_path) == [10, 30, 40], "which they were nobody knows, so all stay"
    with pytest.raises(UserError, match=r"kept_steps\.json is damaged: write the steps into it"):
        main([str(tmp_path), "--keep", "30"])
    (tmp_path / "kept_steps.json").write_text("[30]")
    save_step(tmp_path, 50, keep=1)
    assert steps_in(tmp_path) == [30, 50]


def test_a_step_that_is_asked_for_while_the_newest_is_read_back_stays(tmp_path, monkeypatch):
    for step in (10, 20):
        save_step(tmp_path, step)
    monkeypatch.setattr(checkpoint_module, "drop_from_cache", lambda _: keep_for_good(tmp_path, 10))
    save_step(tmp_path, 30, keep=1)
    assert steps_in(tmp_path) == [10, 30]


def test_what_the_run_removes_meanwhile_is_not_listed_and_not_replaced_by_the_next_best(tmp_path, capsys, monkeypatch):
    run_dir, verify = tmp_path / "run", Checkpoint.verify
    for step, accuracy in {10: 0.5, 20: 0.9, 30: 0.7}.items():
        state = {"scores": {"accuracy": accuracy}}
        publish(run_dir, step, tensors_of(*trained(step)), state=state, about=ABOUT, keep=3)
    same = shutil.copytree(run_dir, tmp_path / "same")

    def remove_first(checkpoint: Checkpoint) -> str | None:
        if checkpoint.step == 20 and checkpoint.folder.is_dir():
            checkpoint.remove()
        return verify(checkpoint)

    monkeypatch.setattr(Checkpoint, "verify", remove_first)
    with pytest.raises(UserError, match=rf"{folder_of(20)} is gone, since the run goes on: start the same command"):
        choose(run_dir, "best")
    assert main([str(same)]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["step", "10", "30"]


def test_a_damaged_best_one_does_not_take_the_place_of_a_valid_one(tmp_path):
    for step, accuracy in {10: 0.5, 20: 0.7, 30: 0.9}.items():
        state = {"scores": {"accuracy": accuracy}}
        publish(tmp_path, step, tensors_of(*trained(step)), state=state, about=ABOUT, keep=3)
    cut_in_half(tmp_path / "checkpoints" / folder_of(30) / "model.safetensors")
    assert [each.step for each in choose(tmp_path, "best", 2)] == [20, 10]


def test_keep_of_zero_is_refused():
    with pytest.raises(ValueError, match="keep"):
        CheckpointOptions(keep=0)


# Where it cannot be written.


def assert_refused_without_a_trace(run_dir: Path, said: str) -> None:
    """Saving step 2 fails with one clear line; step 1 stands untouched and nothing unfinished lies about."""
    with pytest.raises(UserError) as caught:
        save_step(run_dir, 2, keep=1, width=128)
    message = str(caught.value)
    assert said in message and "--run_dir" in message and "\n" not in message
    assert names_in(run_dir) == [folder_of(1)]
    assert_restores(newest_valid(run_dir), 1)


def test_full_disk_is_one_clear_error_and_the_old_checkpoint_stands(small_disk):
    run_dir = small_disk / "run"
    save_step(run_dir, 1)
    # Room for less and less of the new checkpoint, so that each of its files is once the one that does not fit.
    free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    for left in (900_000, 300_000, 40_000, 0):
        filler = small_disk / "filler"
        with filler.open("wb") as file:
            file.write(bytes(max(0, free - left)))
        assert_refused_without_a_trace(run_dir, "no space left on the disk")
        filler.unlink()
    save_step(run_dir, 2)
    assert_restores(newest_valid(run_dir), 2)


def test_read_only_disk_is_one_clear_error_and_the_old_checkpoint_stands(small_disk):
    run_dir = small_disk / "run"
    save_step(run_dir, 1)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert_refused_without_a_trace(run_dir, "is on a read-only file system")


def test_read_only_folder_is_one_clear_error_and_the_old_checkpoint_stands():
    with not_as_root() as run_dir:
        save_step(run_dir, 1)
        (run_dir / "checkpoints").chmod(0o555)
        assert_refused_without_a_trace(run_dir, "no permission to write")
        (run_dir / "checkpoints").chmod(0o755)


def test_manifest_is_json_that_people_can_read(tmp_path):
    text = (save_step(tmp_path, 1).folder / MANIFEST).read_text(encoding="utf-8")
    assert json.loads(text)["files"]["model.safetensors"]["bytes"] > 0
    assert text.count("\n") > 10


# What a user asks about a run's checkpoints.


def test_listing_names_newest_and_best_and_verifies_all(tmp_path, capsys):
    for step in (10, 20, 30):
        save_step(tmp_path, step, keep=2, best=10)
    before = names_in(tmp_path)
    assert main([str(tmp_path)]) == 0
    _, first, second, third = capsys.readouterr().out.splitlines()
    assert first.split()[0] == "10" and first.endswith("ok (best)")
    assert second.split()[0] == "20" and second.endswith("ok")
    assert third.split()[0] == "30" and third.endswith("ok (newest)")

    flip(tmp_path / "checkpoints" / folder_of(30) / "optimizer.safetensors", -9, 2)
    assert main([str(tmp_path)]) == 1
    _, first, second, third = capsys.readouterr().out.splitlines()
    assert second.endswith("ok (newest)")
    assert "DAMAGED: the content of optimizer.safetensors has changed" in third
    assert names_in(tmp_path) == before, "a listing changes nothing"


def test_listing_of_what_is_no_run_or_has_nothing_valid_is_one_clear_error(tmp_path):
    with pytest.raises(UserError, match="is not a run folder"):
        main([str(tmp_path)])
    empty(save_step(tmp_path, 1).folder / MANIFEST)
    with pytest.raises(UserError, match="no valid checkpoint"):
        main([str(tmp_path)])


# What is promised beside the writing itself.


def test_a_checkpoint_is_complete_and_on_the_disk_before_it_is_published(tmp_path, monkeypatch):
    """Or a power cut right behind the rename would leave a name without its content."""
    on_disk, published = set(), []
    fsync, rename = os.fsync, Path.rename

    def watch_fsync(descriptor: int) -> None:
        fsync(descriptor)
        on_disk.add(os.fstat(descriptor).st_ino)

    def watch_rename(path: Path, to: Path) -> Path:
        if to.name == folder_of(1):
            published.append({each.name: each.stat().st_ino in on_disk for each in (path, *path.iterdir())})
            on_disk.clear()
        return rename(path, to)

    monkeypatch.setattr(os, "fsync", watch_fsync)
    monkeypatch.setattr(Path, "rename", watch_rename)
    folder = save_step(tmp_path, 1).folder
    assert published == [dict.fromkeys((f".{folder.name}.partial", *FILES), True)]
    assert folder.parent.stat().st_ino in on_disk, "the new name, too"


def test_room_is_checked_before_the_first_byte_is_written(tmp_path, monkeypatch):
    save_step(tmp_path, 1, keep=1)
    written = []
    monkeypatch.setattr(checkpoint_module, "save_file", lambda *_: written.append(1))
    monkeypatch.setattr(checkpoint_module.shutil, "disk_usage", lambda _: SimpleNamespace(free=12_345))
    with pytest.raises(UserError, match=r"no space left .* MB needed, 0.0 MB free"):
        save_step(tmp_path, 2, keep=1)
    assert not written
    assert names_in(tmp_path) == [folder_of(1)]


def test_nothing_is_removed_before_the_new_checkpoint_was_read_back_whole(tmp_path, monkeypatch):
    """A disk that loses what it was given: the new checkpoint is no good, so the old one must stay."""
    save_step(tmp_path, 1, keep=1)
    monkeypatch.setattr(checkpoint_module, "drop_from_cache", lambda path: path.suffix == ".json" or flip(path, -1, 0))
    with pytest.raises(OSError, match="read back from the disk is damaged"):
        save_step(tmp_path, 2, keep=1)
    assert_restores(newest_valid(tmp_path), 1)


def test_manifest_of_another_step_is_noticed(tmp_path, capsys):
    save_step(tmp_path, 1)
    folder = save_step(tmp_path, 2).folder
    folder.rename(folder.with_name(folder_of(3)))
    assert newest_valid(tmp_path).step == 1
    assert "is that of step 2" in capsys.readouterr().err


def test_copy_is_verified_and_whole(tmp_path, monkeypatch):
    original = save_step(tmp_path / "from", 4)
    assert_restores(copy_checkpoint(original, tmp_path / "to"), 4)
    monkeypatch.setattr(checkpoint_module, "copy_plain", lambda source, target: target.write_bytes(b""))
    with pytest.raises(UserError, match="went wrong"):
        copy_checkpoint(original, tmp_path / "broken")
