"""A run on Kaggle, rehearsed: the very notebook, executed in folders laid out like Kaggle's, on the CPU.

What cannot be rehearsed here are the GPUs, the image, and what Kaggle does with a notebook before and after it runs.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import pytest

from launch.kaggle import kernel_run, notebook
from launch.kaggle.dataset import CODE, CONTENT, DATA, content_hash, content_of, write_dataset
from launch.kaggle.kernel_run import (
    Disk,
    Retention,
    Training,
    bytes_below,
    margin_s,
    previous_run,
    retention,
)
from launch.kaggle.notebook import slug_of, write_kernel
from launch.supervisor import Ending, Supervisor
from tests.support.commands import ROOT, Launch, Started, usual_environment
from tests.support.lives import RUN, STEPS, wait_until
from tests.support.runs import assert_same_model, assert_same_record, command_of, config_of, reference
from training.base.console import UserError
from training.base.environment import (
    KAGGLE_INPUT,
    KAGGLE_LIMIT,
    KAGGLE_LIMIT_S,
    KAGGLE_QUOTA,
    KAGGLE_WORKING,
    container_age_s,
    time_left,
)
from training.base.options import to_yaml
from training.base.processes import command_line, descendants
from training.engine.status import read_sessions, saved_steps

# More than the quota of a rehearsal has room for.
KEEPING = ("--checkpoint.keep", 3, "--checkpoint.keep_best", 2, "--session.margin", 0.5)


def write_config(folder: Path, data: Path, *words: object) -> Path:
    """A config of two ranks' work, in a folder whose name says what trains it."""
    path = folder / "gpt/run.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(to_yaml(config_of(command_of(folder / "run", data, *RUN, *KEEPING, *words))))
    return path


@pytest.fixture
def config(sample_data: Path, tmp_path: Path) -> Path:
    return write_config(tmp_path, sample_data)


def written(folder: Path, config: Path, data: Path, script: str | None = None) -> str:
    """Writes the data set me/relay-files into `folder`; returns the SHA-256 of its content."""
    write_dataset(folder, content_of(config, data, script), owner="me", slug="relay-files")
    sha256 = content_hash(folder)
    assert sha256 is not None
    return sha256


@pytest.fixture
def uninterrupted(sample_data: Path) -> Path:
    """The folder of the same run, trained by two ranks in one go."""
    return reference(sample_data, *RUN, ranks=2)


class Kaggle:
    """A machine of Kaggle's, as far as a notebook sees it. Its inputs are read-only mounts where that is allowed."""

    def __init__(self, launch: Launch, folder: Path, config: Path, data: Path):
        self._launch, self._folder = launch, folder
        self.input = folder / "input"
        self._mounts: list[Path] = []
        self.sessions = 0
        script = "tests.support.faulty_training"
        self._words = [str(config), "--script", script]
        self._sha256 = written(folder / "dataset", config, data, script)
        self.mount(folder / "dataset", "relay-files")

    def mount(self, folder: Path, name: str) -> None:
        """Adds a read-only copy of a folder to the inputs."""
        copy, place = self._folder / "storage" / name, self.input / name
        shutil.copytree(folder, copy)
        place.mkdir(parents=True)
        for words in (["mount", "--bind", str(copy), str(place)], ["mount", "-o", "remount,ro,bind", str(place)]):
            if subprocess.run(words, capture_output=True).returncode == 0:
                self._mounts.append(place)
        if place not in self._mounts:  # root writes there all the same: then only the training's word counts
            shutil.copytree(copy, place, dirs_exist_ok=True)
            for path in (place, *place.rglob("*")):
                path.chmod(path.stat().st_mode & ~0o222)

    def unmount(self) -> None:
        for place in set(self._mounts):
            subprocess.run(["umount", str(place)], check=True)

    def start(
        self,
        *,
        holds: Sequence[int] = (),
        pause_s: float = 0,
        limit_s: float,
        quota: int = 10**9,
        run_type: str = "Batch",
    ) -> Started:
        """Begins a session in a fresh container.

        holds: steps at which the first rank waits, the others with it. pause_s: before each of two forward passes of a
        step behind these.
        """
        self.sessions += 1
        self._place = place = self._folder / f"session-{self.sessions}"
        self.working, self.notebook = place / "working", place / "kernel/relay.ipynb"
        self.working.mkdir(parents=True)
        (place / "tmp").mkdir()
        previous = [f"me/relay-{number}" for number in range(1, self.sessions)]
        write_kernel(
            place / "kernel",
            owner="me",
            slug="relay-run",
            title="relay run",
            words=self._words,
            dataset="me/relay-files",
            sha256=self._sha256,
            previous=previous,
        )
        accidents: list[dict[str, Any]] = [{"at": "forward", "step": step, "rank": 0, "do": "hold"} for step in holds]
        if pause_s:
            slow = range(max(holds, default=0) + 1, STEPS + 1)
            pause = {"at": "forward", "do": "pause", "seconds": pause_s, "always": True}
            accidents += [{**pause, "step": step} for step in slow]
        environment = {
            KAGGLE_INPUT: str(self.input),
            KAGGLE_WORKING: str(self.working),
            KAGGLE_LIMIT: str(container_age_s() + limit_s),
            KAGGLE_QUOTA: str(quota),
            "KAGGLE_KERNEL_RUN_TYPE": run_type,
            "RANKS": "2",
            "TMPDIR": str(place / "tmp"),
            "ACCIDENTS": json.dumps({"folder": str(place), "list": accidents}),
        }
        execute = Path(sysconfig.get_path("scripts"), "jupyter-execute")
        return self._launch(
            "--inplace",
            "--timeout=-1",
            module=str(self.notebook),
            starter=[str(execute)],
            environment=environment,
        )

    def wait_at(self, session: Started, step: int) -> None:
        """Waits until the session's first rank is held at the step."""
        wait_until(session, (self._place / f"at-forward-{step}-0").exists, f"held at step {step}")

    def go_on(self, step: int) -> None:
        (self._place / f"go-forward-{step}").touch()

    def summary(self) -> dict[str, Any]:
        return json.loads((self.working / "kernel_run.json").read_text())

    def printed(self) -> str:
        """What the notebook's cells have printed."""
        cells = nbformat.read(self.notebook, as_version=4).cells
        return "".join(output.get("text", "") for cell in cells for output in cell.get("outputs", ()))

    def commit(self) -> None:
        """The session's output becomes an input of the next."""
        self.mount(self.working, f"relay-{self.sessions}")


@pytest.fixture
def kaggle(launch: Launch, tmp_path: Path, config: Path, sample_data: Path) -> Iterator[Kaggle]:
    machine = Kaggle(launch, tmp_path, config, sample_data)
    try:
        yield machine
    finally:
        machine.unmount()


class Peak:
    """The most that a folder has held while the block ran."""

    def __init__(self, folder: Callable[[], Path]):
        self._folder, self._over = folder, threading.Event()
        self.bytes = 0

    def __enter__(self) -> Peak:
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._over.wait(0.05):
            self.bytes = max(self.bytes, bytes_below(self._folder()))

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._thread.join()


# Whole runs.


def quota_of_four_checkpoints(whole: Path) -> tuple[int, int]:
    """The size of a checkpoint, and a quota with room for four, where the config wants six at once."""
    checkpoint_bytes = max(map(bytes_below, saved_steps(whole).values()))
    others = bytes_below(whole) - bytes_below(whole / "checkpoints")
    return checkpoint_bytes, int((4.4 * checkpoint_bytes + 1.1 * others) / 0.95)


@pytest.mark.whole
@pytest.mark.timeout(1200)
def test_run_is_finished_in_three_kernel_runs_bit_for_bit_and_its_output_stays_below_the_quota(
    launch, sample_data, tmp_path, kaggle
):
    whole, began = tmp_path / "whole", time.monotonic()
    assert launch(*command_of(whole, sample_data, *RUN), ranks=2, real=True).wait().status == 0
    start_s = time.monotonic() - began - read_sessions(whole)[0]["seconds"]
    # Nobody knows the size of a checkpoint before the first one.
    checkpoint_bytes, quota = quota_of_four_checkpoints(whole)
    # Long enough to start twice; and so slow that two sessions never do it.
    limit_s = 6 * start_s + 20
    lost_s, steps = [], [0]
    for number in (1, 2, 3):
        began = time.monotonic()
        pace = {"pause_s": limit_s / 25 / 2, "limit_s": limit_s} if number < 3 else {"limit_s": KAGGLE_LIMIT_S}
        started = kaggle.start(**pace, quota=quota)
        with Peak(lambda: kaggle.working) as peak:
            result = started.wait()
        wall_s = time.monotonic() - began
        assert result.status == 0, result
        summary, said = kaggle.summary(), kaggle.printed()
        assert summary["status"] == ("resumable" if number < 3 else "finished"), said
        assert summary["reason"] == ("the time limit" if number < 3 else "all steps done"), said
        assert wall_s < pace["limit_s"]
        assert {path.name for path in kaggle.working.iterdir()} == {"run", "kernel_run.json"}
        assert checkpoint_bytes < peak.bytes <= quota
        assert summary["output_bytes"] <= bytes_below(kaggle.working) <= quota
        assert summary["step"] > summary["from_step"] == steps[-1], said
        assert number == 1 or f"resuming at step {steps[-1]} from {kaggle.working}" in said
        steps.append(summary["step"])
        lost_s.append(wall_s - summary["training_seconds"])
        kaggle.commit()
    assert_same_model(kaggle.working / "run", whole)
    assert_same_record(kaggle.working / "run", whole)
    assert len(saved_steps(kaggle.working / "run")) <= 3
    # What a session of twelve hours has for training: all but what one of these took beside it (the notebook, torch,
    # the ranks, the copy of the run, its end; in the first one with a start too many), and the margin of a real one.
    # To install what an image lacks, and to bring a larger model to a GPU, come on top and are not measured here.
    share = 1 - (max(lost_s) + margin_s(KAGGLE_LIMIT_S)) / KAGGLE_LIMIT_S
    print(f"lost {lost_s} s, {share:.2%} of twelve hours for training; steps {steps}")
    assert share >= 0.97


@pytest.mark.timeout(1200)
@pytest.mark.whole
def test_run_survives_a_killed_rank_a_stop_by_hand_and_a_session_that_is_cut_off(uninterrupted, kaggle):
    # A rank that is killed costs a start.
    checkpoint_bytes, quota = quota_of_four_checkpoints(uninterrupted)
    limits = {"limit_s": KAGGLE_LIMIT_S, "quota": quota}
    session = kaggle.start(holds=(8, 20), pause_s=0.25, run_type="Interactive", **limits)
    run_dir = kaggle.working / "run"
    kaggle.wait_at(session, 8)
    rank = ["-u", "-m", "tests.support.faulty_training"]
    ranks = [pid for pid in descendants(session.process.pid) if command_line(pid)[1:4] == rank]
    trainings = len(read_sessions(run_dir))  # 2 if it was first started again to keep fewer checkpoints
    os.kill(ranks[1], signal.SIGKILL)
    kaggle.go_on(8)
    kaggle.wait_at(session, 20)
    assert len(read_sessions(run_dir)) == trainings + 1, "started again"

    # Whoever stops an interactive session keeps what it has done.
    (kernel,) = [pid for pid in descendants(session.process.pid) if "ipykernel_launcher" in command_line(pid)]
    os.kill(kernel, signal.SIGINT)
    kaggle.go_on(20)
    result = session.wait()
    assert result.status == 0, result
    summary = kaggle.summary()
    assert (summary["status"], summary["reason"]) == ("resumable", "signal SIGINT"), kaggle.printed()
    assert not summary["restart"], "whoever stops a session by hand wants it to rest"
    assert max(saved_steps(run_dir)) == summary["step"] >= 20
    assert "save a version" in kaggle.printed()
    kaggle.commit()

    # A session that is cut off leaves what the next one goes on from.
    holding = summary["step"] + 8
    assert holding < STEPS, "the signal took too long"
    session = kaggle.start(holds=(holding,), **limits)
    kaggle.wait_at(session, holding)
    session.kill_all()
    assert not (kaggle.working / "kernel_run.json").exists()
    newest = max(saved_steps(kaggle.working / "run"))
    assert newest > summary["step"]
    kaggle.commit()

    started = kaggle.start(**limits)
    with Peak(lambda: kaggle.working) as peak:
        result = started.wait()
    assert result.status == 0 and kaggle.summary()["from_step"] == newest, result
    assert checkpoint_bytes < peak.bytes <= quota
    assert kaggle.summary()["output_bytes"] <= bytes_below(kaggle.working) <= quota
    assert_same_model(kaggle.working / "run", uninterrupted)
    assert_same_record(kaggle.working / "run", uninterrupted)


def test_another_run_of_the_same_name_among_the_inputs_is_refused_and_told(
    uninterrupted, launch, config, sample_data, tmp_path
):
    shutil.copytree(uninterrupted, tmp_path / "input/notebooks/me/relay/run")
    environment = {KAGGLE_INPUT: str(tmp_path / "input"), KAGGLE_WORKING: str(tmp_path / "working")}
    result = launch("run", config, "--seed", 7, module="launch.kaggle", environment=environment).wait()
    assert result.status == 1, result
    summary = json.loads((tmp_path / "working/kernel_run.json").read_text())
    assert summary["status"] == "failed" and "seed: 1234 -> 7" in summary["reason"] and not summary["restart"]


def test_missing_output_of_the_kernel_run_before_ends_this_one_at_once(launch, config, tmp_path):
    environment = {KAGGLE_INPUT: str(tmp_path / "input"), KAGGLE_WORKING: str(tmp_path / "working")}
    words = ("run", config, "--expect-step", 300)
    result = launch(*words, module="launch.kaggle", environment=environment).wait()
    assert result.status == 1 and "run has come to step 300, but nothing of it is below" in result.err, result
    summary = json.loads((tmp_path / "working/kernel_run.json").read_text())
    assert summary["status"] == "failed" and summary["restart"], "the next session may have it"


def test_data_that_is_nowhere_is_told_in_the_summary(launch, config, tmp_path):
    environment = {KAGGLE_INPUT: str(tmp_path), KAGGLE_WORKING: str(tmp_path / "working")}
    result = launch("run", config, "--data", "missing", module="launch.kaggle", environment=environment).wait()
    assert result.status == 1 and "no prepared data missing" in result.err
    assert "no prepared data missing" in json.loads((tmp_path / "working/kernel_run.json").read_text())["reason"]


# The parts.


def test_furthest_run_among_the_inputs_is_the_one_to_go_on_from(tmp_path):
    assert previous_run(tmp_path / "none", "run", []) is None
    for place, step in (("relay/run", 20), ("notebooks/me/relay-2/run", 300), ("relay/other", 4000)):
        (tmp_path / place / f"checkpoints/step-{step:010d}").mkdir(parents=True)
    (tmp_path / "relay-3/run").mkdir(parents=True)  # it never came to a checkpoint
    assert previous_run(tmp_path, "run", []) == tmp_path / "notebooks/me/relay-2/run"


def test_only_the_outputs_of_the_kernels_that_were_named_are_gone_on_from(tmp_path):
    for place, step in (("relay-1/run", 20), ("notebooks/me/relay-2/run", 30), ("stranger/run", 4000)):
        (tmp_path / place / f"checkpoints/step-{step:010d}").mkdir(parents=True)
    assert previous_run(tmp_path, "run", ["me/relay-1"]) == tmp_path / "relay-1/run"
    assert previous_run(tmp_path, "run", ["me/relay-1", "me/relay-2"]) == tmp_path / "notebooks/me/relay-2/run"
    assert previous_run(tmp_path, "run", ["me/relay-3"]) is None


def test_as_many_checkpoints_are_kept_as_have_room():
    assert retention(Retention(5, 2), 0, 100) == Retention(5, 2), "before the first one nobody knows"
    assert retention(Retention(5, 2), 10, 80) == Retention(5, 2)
    assert retention(Retention(5, 2), 10, 79) == Retention(4, 2)
    assert retention(Retention(1, 4), 10, 40) == Retention(1, 2)
    assert retention(Retention(3, 2), 10, 40) == Retention(2, 1)
    assert retention(Retention(5, 2), 10, 30) == Retention(1, 1)
    assert retention(Retention(5, 2, can_be_longer=True), 10, 110) == Retention(3, 2, can_be_longer=True)
    with pytest.raises(UserError, match="3 need to fit"):
        retention(Retention(5, 2), 10, 29)


def test_notebook_without_gpu_is_told_to_choose_one(launch, config, tmp_path):
    environment = {KAGGLE_INPUT: str(tmp_path), KAGGLE_WORKING: str(tmp_path), "KAGGLE_KERNEL_RUN_TYPE": "Interactive"}
    result = launch("run", config, module="launch.kaggle", environment=environment).wait()
    assert result.status == 1 and "choose the accelerator GPU T4 x2" in result.error_lines[0], result


def test_training_that_does_not_end_is_killed_before_the_limit(monkeypatch, tmp_path, handlers):
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    monkeypatch.setenv(KAGGLE_LIMIT, str(container_age_s() + 62))
    deaf = "import signal, time; [signal.signal(n, signal.SIG_IGN) for n in (2, 15)]; time.sleep(3600)"
    (tmp_path / "deaf.py").write_text(deaf)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    training = Training(("deaf",), 1, Disk(tmp_path, tmp_path / "run", None), Retention(2, 1), margin=240)
    assert training.run(Supervisor()) == Ending("stopped")
    left = time_left()
    assert left is not None and left[0] > 0


# What is written.


def notebook_command(launch: Launch, *words: object) -> Started:
    return launch("notebook", *words, module="launch.kaggle")


def test_notebook_is_valid_and_its_metadata_are_those_that_kaggle_documents(launch, config, tmp_path):
    folder = tmp_path / "kaggle"
    words = (config, "--owner", "me", "--output", folder, "--previous", "me/relay-1", "--optim.lr", "2e-3")
    result = notebook_command(launch, *words).wait()
    assert result.status == 0, result
    assert f"kaggle kernels push -p {folder}" in result.out
    slug = slug_of(tmp_path / "run")
    kernel = nbformat.read(folder / "relay.ipynb", as_version=4)
    nbformat.validate(kernel)
    assert [cell.cell_type for cell in kernel.cells] == ["markdown", "code", "code", "code"]
    for cell in kernel.cells[1:]:
        compile(cell.source, "cell", "exec")
    words = '["configs/gpt/run.yaml", "--expect-step", "1", "--previous", "me/relay-1", "--optim.lr", "2e-3"]'
    assert words in kernel.cells[2].source
    assert json.loads((folder / "kernel-metadata.json").read_text()) == {
        "id": f"me/{slug}",
        "title": slug.replace("-", " "),
        "code_file": "relay.ipynb",
        "language": "python",
        "kernel_type": "notebook",
        "is_private": True,
        "enable_gpu": True,
        "enable_internet": True,
        "machine_shape": "NvidiaTeslaT4",
        "docker_image_pinning_type": "original",
        "dataset_sources": [f"me/{slug}-files"],
        "competition_sources": [],
        "kernel_sources": ["me/relay-1"],
        "model_sources": [],
    }
    about = json.loads((folder / "dataset/dataset-metadata.json").read_text())
    assert about["id"] == f"me/{slug}-files" and 6 <= len(about["title"]) <= 50 and len(about["licenses"]) == 1


def test_mistakes_are_all_told_before_anything_is_written(launch, config, tmp_path):
    folder = tmp_path / "kaggle"
    always = (config, "--owner", "me", "--output", folder)
    result = notebook_command(launch, *always, "--optim.lrr", "1", "--seed", "x").wait()
    assert result.status == 1, result
    (line,) = result.error_lines
    assert "optim.lrr (nearest: optim.lr)" in line and "seed" in line and "nothing was written" in line
    for words, parts in (
        (("--owner", "no body", "--slug", "A", "--optim.lrr", "1"), ("--owner", "--slug", "optim.lrr")),
        (("--dataset", "data", "--previous", "a/b/c"), ("--dataset: expected OWNER/SLUG", "--previous")),
        (("--dataset", "me/files"), ("--dataset and --sha256 go together",)),
        (("--sha256", 64 * "a"), ("--dataset and --sha256 go together",)),
        (("--dataset", "me/files", "--sha256", "a"), ("--sha256: expected 64 hexadecimal digits",)),
        (("--precision", "bf16", "--batch.micro_batches_per_step", "3"), ("only emulates", "cannot share the 3")),
        (("--data", tmp_path / "none"), ("is no prepared data set",)),
        (("--slug", 45 * "a"), ("--slug: at most 44 characters",)),
        (("--slug", "two--dashes"), ("single dashes",)),
    ):
        with pytest.raises(UserError) as raised:
            notebook.main([str(word) for word in (*always, *words)])
        assert all(part in str(raised.value) for part in parts), raised.value
    assert not folder.exists()


def test_data_set_that_was_uploaded_before_is_named_with_its_hash(launch, config, tmp_path):
    always = (config, "--owner", "me", "--output")
    first = notebook_command(launch, *always, tmp_path / "first").wait()
    assert first.status == 0, first
    (line,) = [line for line in first.out.splitlines() if line.startswith("next:")]
    words = line.partition("with ")[2].partition(",")[0].split()
    second = notebook_command(launch, *always, tmp_path / "second", *words).wait()
    assert second.status == 0 and not (tmp_path / "second/dataset").exists(), second
    first_cell, second_cell = (
        nbformat.read(tmp_path / name / "relay.ipynb", as_version=4).cells[1] for name in ("first", "second")
    )
    assert first_cell == second_cell and words[words.index("--sha256") + 1] in second_cell.source


def test_equal_code_config_and_data_give_equal_archives(config, sample_data, tmp_path):
    def files(name: str, data: Path = sample_data) -> dict[str, bytes]:
        written(tmp_path / name, config, data)
        return {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}

    first = files("first")
    later = tmp_path / "later" / sample_data.name
    shutil.copytree(sample_data, later, copy_function=shutil.copyfile)
    os.utime(config, (1, 1))
    assert files("second", later) == first
    config.write_text(config.read_text().replace("width: 32", "width: 64"))
    third = files("third")
    assert third[CODE] != first[CODE] and third[DATA] == first[DATA]
    assert content_hash(tmp_path / "first") == content_hash(tmp_path / "second") != content_hash(tmp_path / "third")


def names_in(archive: Path) -> set[str]:
    with tarfile.open(archive) as opened:
        assert all(member.isfile() for member in opened)
        return set(opened.getnames())


def test_only_what_a_kernel_run_needs_leaves_the_machine(sample_data, tmp_path):
    # A checkout in use: keys and other things of the user's own lie about in it.
    root, data, stranger = tmp_path / "checkout", tmp_path / "prepared" / sample_data.name, tmp_path / "stranger.py"
    own = shutil.ignore_patterns("__pycache__")
    for name in ("launch", "training", "data_prep", "configs", "slurm"):
        shutil.copytree(ROOT / name, root / name, ignore=own)
    for name in ("requirements.txt", "LICENSE", "README.md", ".gitignore"):
        shutil.copy(ROOT / name, root)
    stranger.write_text("KEY = 1\n")
    (root / "training/tracked_link.py").symlink_to(stranger)
    git = ["git", "-c", "user.name=me", "-c", "user.email=me@here"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *words], cwd=root, check=True)
    for name in ("slurm/environment.sh", "secrets.yaml", "configs/gpt/secrets.yaml", "secrets.py", "launch/.env.py"):
        (root / name).write_text("WANDB_API_KEY=1\n")
    (root / "training/.hidden").mkdir()
    (root / "training/.hidden/keys.py").write_text("KEY = 1\n")
    (root / "training/link.py").symlink_to(stranger)
    (root / "training/link").symlink_to(ROOT / "launch")
    (root / "training/mine.py").write_text("import training.gpt\n")
    shutil.copy(root / "configs/gpt/sample.yaml", root / "configs/gpt/own.yaml")
    shutil.copytree(sample_data, data)
    (data / ".env").write_text("WANDB_API_KEY=1\n")
    (data / "notes.txt").write_text("mine\n")
    (data / "link").symlink_to(tmp_path)

    def uploaded(name: str) -> tuple[set[str], set[str], str]:
        words = ["notebook", "configs/gpt/own.yaml", "--owner", "me", "--output", tmp_path / name]
        words += ["--run_dir", tmp_path / "run", "--data", data]
        command = [sys.executable, "-m", "launch.kaggle", *map(str, words)]
        done = subprocess.run(command, cwd=root, env=usual_environment(), capture_output=True, text=True)
        assert done.returncode == 0, done
        folder = tmp_path / name / "dataset"
        code, prepared = names_in(folder / CODE), names_in(folder / DATA)
        assert set(json.loads((folder / CONTENT).read_text())["files"]) == code | prepared
        return code, prepared, done.stdout

    code, prepared, said = uploaded("with-git")
    listed = json.loads((data / "meta.json").read_text())["files"]
    assert prepared == {f"prepared/{data.name}/{name}" for name in ("meta.json", *listed)}
    tracked = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, text=True, check=True).stdout.split()
    folders = ("launch/", "training/", "data_prep/", "configs/", "requirements.txt", "LICENSE")
    needed = {name for name in tracked if name.startswith(folders)} - {"training/tracked_link.py"}
    assert code == needed | {"training/mine.py", "configs/gpt/own.yaml"}
    assert f"configs ({sum(name.startswith('configs/') for name in code)} files, 0." in said
    assert f"prepared ({len(prepared)} files, " in said
    assert "not tracked by git: training/mine.py, configs/gpt/own.yaml\n" in said

    shutil.rmtree(root / ".git")
    without, same, said = uploaded("without-git")
    assert same == prepared and "without git: all files there that end in .py" in said
    endings = (".py", ".html", ".css", ".js", ".md", "LICENSE", "requirements.txt", "configs/gpt/own.yaml")
    assert without == {name for name in code if name.endswith(endings)}

    # A link in the place of a file that meta.json lists is refused, and so is what else lies in the folder to upload.
    (data / "train/state.json").rename(tmp_path / "state.json")
    (data / "train/state.json").symlink_to(tmp_path / "state.json")
    with pytest.raises(UserError, match=r"lists 'train/state\.json', which is no plain file there"):
        content_of(root / "configs/gpt/own.yaml", data)
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset/notes.txt").touch()
    with pytest.raises(UserError, match=r"dataset/notes\.txt would be uploaded too"):
        written(tmp_path / "dataset", root / "configs/gpt/own.yaml", sample_data)


def test_training_of_the_users_own_goes_with_its_package(config, sample_data):
    names = set(content_of(config, sample_data, "tests.support.faulty_training").code)
    assert {"tests/support/faulty_training.py", "training/gpt.py"} < names
    assert not [name for name in content_of(config, sample_data).code if name.startswith("tests/")]


class Unpacking:
    """The notebook's first cell, on the data set in `tmp_path/dataset`, whose mount is `mounted`."""

    def __init__(self, tmp_path: Path, config: Path, data: Path):
        self._tmp_path, self.dataset = tmp_path, tmp_path / "dataset"
        self.input, self.mounted = tmp_path / "input", tmp_path / "input/datasets/me/relay-files"
        self.mounted.mkdir(parents=True)
        self.code = tmp_path / "relay"
        sha256 = written(self.dataset, config, data)
        kernel = {"owner": "me", "slug": "relay-run", "title": "relay run", "dataset": "me/relay-files"}
        write_kernel(tmp_path / "kernel", words=[str(config)], previous=[], sha256=sha256, **kernel)
        self._cell = nbformat.read(tmp_path / "kernel/relay.ipynb", as_version=4).cells[1].source

    def mount(self, *, unpacked: bool) -> None:
        shutil.rmtree(self.mounted)
        shutil.copytree(self.dataset, self.mounted)
        for name in (CODE, DATA) if unpacked else ():
            place = self.mounted / name.partition(".")[0]
            place.mkdir()
            subprocess.run(["tar", "-xf", str(self.mounted / name), "-C", str(place)], check=True)
            (self.mounted / name).unlink()

    def run(self) -> subprocess.CompletedProcess[str]:
        environment = {**usual_environment(), KAGGLE_INPUT: str(self.input), "TMPDIR": str(self._tmp_path)}
        return subprocess.run([sys.executable, "-c", self._cell], env=environment, capture_output=True, text=True)

    def refused(self) -> str:
        """Runs the cell, which has to leave no code behind; returns its last words."""
        done = self.run()
        assert done.returncode == 1 and not self.code.exists(), done
        return done.stderr.splitlines()[-1]


@pytest.fixture
def unpacking(tmp_path: Path, config: Path, sample_data: Path) -> Unpacking:
    return Unpacking(tmp_path, config, sample_data)


def files_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("unpacked", [False, True])
def test_code_comes_only_from_the_runs_own_data_set(unpacking, unpacked):
    unpacking.mount(unpacked=unpacked)
    for place in ("relay-run", "datasets/stranger/relay-files", "notebooks/me/relay-run"):
        evil = unpacking.input / place / "launch/kaggle/kernel_run.py"
        evil.parent.mkdir(parents=True)
        evil.write_text("raise SystemExit('a stranger')\n")
        with tarfile.open(unpacking.input / place / CODE, "w:gz") as archive:
            for name in ("launch/kaggle/kernel_run.py", "launch/more.py"):
                member = tarfile.TarInfo(name)
                member.size = evil.stat().st_size
                archive.addfile(member, io.BytesIO(evil.read_bytes()))
    (unpacking.mounted / "more.py").write_text("KEY = 1\n")  # nor is anything taken that is not listed
    done = unpacking.run()
    assert done.returncode == 0, done
    assert files_below(unpacking.code) == set(json.loads((unpacking.dataset / CONTENT).read_text())["files"])
    assert (unpacking.code / "launch/kaggle/kernel_run.py").read_bytes() == (
        ROOT / "launch/kaggle/kernel_run.py"
    ).read_bytes()


def test_code_and_data_that_differ_from_what_was_uploaded_are_refused(unpacking, sample_data):
    unpacking.mount(unpacked=True)
    for name in ("relay/launch/kaggle/kernel_run.py", f"data/prepared/{sample_data.name}/meta.json"):
        path = unpacking.mounted / name
        content = path.read_bytes()
        path.write_bytes(content + b" ")
        assert f"{name.partition('/')[2]} in me/relay-files is not what was uploaded" in unpacking.refused()
        path.unlink()
        assert f"{name.partition('/')[2]} is missing in me/relay-files" in unpacking.refused()
        path.write_bytes(content)

    # A list that fits other files is not the one that the notebook knows.
    (unpacking.mounted / CONTENT).write_text((unpacking.dataset / CONTENT).read_text().replace("0", "1"))
    assert "me/relay-files is not the version for this notebook" in unpacking.refused()

    # The same in an archive.
    unpacking.mount(unpacked=False)
    with tarfile.open(unpacking.mounted / CODE, "w:gz") as archive:
        archive.add(ROOT / "LICENSE", "launch/kaggle/kernel_run.py")
    assert "launch/kaggle/kernel_run.py in me/relay-files is not what was uploaded" in unpacking.refused()

    shutil.rmtree(unpacking.mounted)
    assert "add that data set to the notebook's input" in unpacking.refused()
    assert unpacking.run().stderr.splitlines()[-1].startswith("FileNotFoundError: me/relay-files is not below")


def test_archives_that_kaggle_has_unpacked_serve_as_well(unpacking, config, sample_data, tmp_path):
    unpacking.mount(unpacked=True)
    done = unpacking.run()
    assert done.returncode == 0 and done.stdout == "", done
    assert (unpacking.code / "configs/gpt/run.yaml").read_bytes() == config.read_bytes()
    assert files_below(unpacking.code / "prepared" / sample_data.name) == files_below(sample_data)
    # Nor is git needed where the code was unpacked, to pack it again.
    words = ("notebook", "configs/gpt/run.yaml", "--owner", "me", "--output", tmp_path / "again")
    again = [sys.executable, "-m", "launch.kaggle", *map(str, words)]
    subprocess.run(again, cwd=unpacking.code, check=True)
    names = names_in(tmp_path / "again/dataset" / CODE)
    assert {"launch/kaggle/kernel_run.py", "configs/gpt/run.yaml", "requirements.txt"} < names
    assert {"training/report/page.html", "training/evaluation/exports/card.md"} < names


def test_a_run_with_an_address_gets_its_credentials_from_the_secrets_of_the_notebook(monkeypatch):
    secrets = {"AWS_ACCESS_KEY_ID": "name", "AWS_SECRET_ACCESS_KEY": "word"}
    stand_in = SimpleNamespace(UserSecretsClient=lambda: SimpleNamespace(get_secret=lambda name: secrets[name]))
    monkeypatch.setitem(sys.modules, "kaggle_secrets", stand_in)
    for name in kernel_run._SECRETS:
        monkeypatch.setenv(name, "")  # so that it is taken back at the end
        monkeypatch.delenv(name)
    kernel_run.reach_address("s3://bucket/run")
    assert secrets.items() <= os.environ.items() and "AWS_ENDPOINT_URL" not in os.environ
