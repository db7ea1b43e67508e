"""From a config file to its training."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from launch.scripts import micro_batches_of, peek, read_options, run_and_data, script_of
from tests.support.commands import PATIENCE_S, ROOT
from training.base.console import UserError


@pytest.mark.parametrize(
    ("line", "script"), [("", "training.gpt"), ("training: training.seq2seq\n", "training.seq2seq")]
)
def test_config_says_what_it_is_for_or_its_folder_does(tmp_path, line: str, script: str):
    config = tmp_path / "gpt/mine.yaml"
    config.parent.mkdir()
    config.write_text(f"{line}run_dir: runs/x\ndata: prepared/x\n", encoding="utf-8")
    assert script_of(config) == script
    options = read_options(script, [str(config)])
    assert type(options).__module__ == script and str(options.run_dir) == "runs/x"


def test_folder_decides_where_there_is_no_config_that_could_be_read(tmp_path):
    assert script_of(tmp_path / "seq2seq/none.yaml") == "training.seq2seq"
    (tmp_path / "gpt").mkdir()
    (tmp_path / "gpt/torn.yaml").write_text("a: [", encoding="utf-8")
    assert script_of(tmp_path / "gpt/torn.yaml") == "training.gpt"


@pytest.mark.parametrize("module", ["runs.stranger.evil", "cProfile", "os", "training.gpt.x", "../evil", "tests.x"])
def test_a_config_starts_no_module_that_nobody_here_has_put_beside_relays(tmp_path, module: str):
    config = tmp_path / "gpt/theirs.yaml"
    config.parent.mkdir()
    config.write_text(f"training: {module}\nrun_dir: x\ndata: y\n", encoding="utf-8")
    with pytest.raises(UserError, match="name it by --script"):
        script_of(config)


def test_micro_batches_of_a_step_are_those_that_a_run_has_chosen_by_its_budget(tmp_path):
    words = [str(ROOT / "configs/gpt/sample.yaml"), "--run_dir", str(tmp_path), "--budget", "10m"]

    def found(*more: str, within: tuple[str, ...] = ()) -> int:
        return micro_batches_of(read_options("training.gpt", [*words, *within]), [*words, *more])

    assert found() == 2, "the config's"
    (tmp_path / "config.yaml").write_text("budget: 10m00s\nbatch: {micro_batches_per_step: 1}\n")
    assert found() == 1
    assert found("--batch.micro_batches_per_step", "2") == 2, "as given"
    assert found(within=("--budget", "20m")) == found(within=("--budget", "null")) == 2, "another run"
    (tmp_path / "config.yaml").write_text("budget: [")
    assert found() == 2


def test_what_is_said_of_a_run_is_known_without_its_script(tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text("run_dir: runs/x\nseed: 5\nwandb: {mode: auto}\n", encoding="utf-8")
    said = {"run_dir": "runs/x", "run_at": "s3://b/r", "no_such": "key"}
    assert peek([str(config), "--run_at", "s3://b/r", "--no_such=key"]) == said
    assert [str(path) for path in run_and_data([str(config), "--data", "prepared/x"])] == ["runs/x", "prepared/x"]
    with pytest.raises(UserError, match=r"mine.yaml and the options do not say data"):
        run_and_data([str(config)])


@pytest.mark.parametrize(
    "module", ["slurm.job", "slurm.status", "slurm.__main__", "run", "kaggle.relay", "kaggle.kernel_run"]
)
def test_what_only_starts_a_run_does_not_wait_for_torch(module: str):
    code = f"import sys, launch.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_lock_has_every_requirement_with_the_sha256_of_its_files():
    wanted = {line for line in (ROOT / "requirements.txt").read_text().lower().split() if "==" in line}
    blocks = re.split(r"\n(?=\S)", (ROOT / "launch/requirements.lock").read_text())
    locked = {re.sub(r"^typing-", "typing_", block.split()[0]): block for block in blocks if "==" in block.split()[0]}
    assert wanted - locked.keys() == {line for line in wanted if line.startswith("torch==")}
    assert all("--hash=sha256:" in block for block in locked.values())


@pytest.mark.whole
def test_quickstart_looks_at_the_run_that_its_options_name(tmp_path):
    short = ("--optim.steps", "4", "--optim.warmup_steps", "1", "--log.generate_samples", "0", "--model.layers", "1")
    command = ["bash", "launch/quickstart.sh", "--run_dir", str(tmp_path / "run"), *short]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done
    assert "finished: 4 steps" in done.stdout and "Not finished" not in done.stderr
    assert (tmp_path / "run/evaluation/test.json").is_file()


@pytest.mark.parametrize("module", ["launch.run", "launch.doctor", "training.gpt", "data_prep.pairs"])
def test_python_without_the_packages_is_told_where_they_come_from(module: str):
    words = [sys.executable, "-S", "-m", module, "--help"]
    tried = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)
    assert tried.returncode == 1
    (line,) = tried.stderr.splitlines()
    assert "run `source launch/setup.sh` first" in line
