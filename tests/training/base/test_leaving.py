"""Commands that have nothing to save leave in good order when they are told to: SIGTERM, as a scheduler sends it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.commands import PATIENCE_S, ROOT, Launch, Started
from training.base.processes import children


def wait_for(started: Started, happened: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not happened():
        assert started.process.poll() is None, started.printed()
        assert time.monotonic() < end, started.printed()
        time.sleep(0.01)


def test_preparation_told_to_stop_leaves_nothing_and_the_same_command_does_it_all(launch: Launch, tmp_path):
    output = tmp_path / "prepared" / "data"
    words = ("--source", "sample", "--tokenizer", "sentencepiece", "--vocabulary_size", 600, "--output", output)
    first = launch(*words, module="data_prep.pairs")
    wait_for(first, lambda: output.parent.is_dir() and list(output.parent.iterdir()))
    first.process.terminate()
    result = first.wait()
    assert result.status == 75, result
    assert "stopped by signal SIGTERM" in result.err and "Traceback" not in result.err
    assert list(output.parent.iterdir()) == []
    assert launch(*words, module="data_prep.pairs").wait().status == 0
    assert [path.name for path in output.parent.iterdir()] == ["data"]


TOLD_TO_LEAVE = """
import os, signal, time
from training.base.console import run_main
def main():
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    except BaseException:
        {meanwhile}
run_main(main)
"""


@pytest.mark.parametrize(
    "meanwhile",
    [
        pytest.param("raise ImportError('this module cannot be loaded')", id="a library makes an error of it"),
        pytest.param("os.kill(os.getpid(), signal.SIGTERM); raise", id="it comes twice"),
    ],
)
def test_a_program_that_was_told_to_leave_says_just_that(meanwhile: str, tmp_path: Path):
    (tmp_path / "leaving.py").write_text(TOLD_TO_LEAVE.format(meanwhile=meanwhile))
    command = [sys.executable, tmp_path / "leaving.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 75, result
    assert "stopped by signal SIGTERM" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("number", "ends_by", "status", "said"),
    [
        pytest.param("SIGTERM", "UserError('what is wrong')", 1, "error: what is wrong\n", id="other ranks have to go"),
        pytest.param("SIGINT", "KeyboardInterrupt", 130, "interrupted\n", id="Ctrl-C is pressed twice"),
    ],
)
def test_a_program_that_has_ended_is_not_disturbed_by(number: str, ends_by: str, status: int, said: str):
    script = (
        "import atexit, os, signal\n"
        "from training.base.console import UserError, run_main\n"
        "def main():\n"
        f"    atexit.register(os.kill, os.getpid(), signal.{number})\n"
        f"    raise {ends_by}\n"
        "run_main(main)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (status, said)


def test_evaluation_told_to_stop_ends_all_ranks_without_a_report(launch: Launch, sample_data, tmp_path):
    run_dir = tmp_path / "run"
    model = ("--model.width", 32, "--model.layers", 1, "--model.heads", 2, "--model.context", 64)
    short = ("--optim.steps", 3, "--optim.warmup_steps", 0)
    assert launch("--run_dir", run_dir, "--data", sample_data, *model, *short).wait().status == 0
    module = "training.evaluation.evaluate"
    first = launch(run_dir, module=module, ranks=2, real=True)
    wait_for(first, lambda: len(ranks := children(first.process.pid)) == 2 and all(map(works, ranks)))
    os.kill(first.rank(1), signal.SIGTERM)
    result = first.wait()
    assert result.status != 0
    assert "Traceback" not in result.err.partition("torch/distributed")[0], result.err
    assert not (run_dir / "evaluation").exists()
    assert launch(run_dir, module=module, ranks=2).wait().status == 0
    assert (run_dir / "evaluation/test.json").exists()


def works(pid: int) -> bool:
    """Whether the process has got as far as loading torch."""
    return "libtorch" in Path(f"/proc/{pid}/maps").read_text(encoding="utf-8")


PRINTS = """
import os, sys
from training.base.console import UserError, run_main, say, warn
def main():
    say("译" * 40_000)
    warn("看")
    if "fails" in sys.argv:
        raise UserError("no such thing")
run_main(main, prints_product="training" not in sys.argv)
"""


def printing(tmp_path: Path, around: str = '"$@"', *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A command that prints, in the surroundings of a line of shell."""
    (tmp_path / "printing.py").write_text(PRINTS)
    command = ["bash", "-o", "pipefail", "-c", around, "bash", sys.executable, str(tmp_path / "printing.py"), *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def test_a_process_that_is_alone_speaks_whatever_rank_its_surroundings_have(tmp_path: Path):
    for variables in ({"RANK": "1"}, {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}):
        result = printing(tmp_path, '"$@"', "fails", **variables)
        assert (result.returncode, result.stdout) == (1, "译" * 40_000 + "\n")
        assert result.stderr == "warning: 看\nerror: no such thing\n"


def test_another_rank_than_the_first_leaves_an_error_to_it_and_tells_it_if_it_is_left_alone(tmp_path: Path):
    second = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
    (tmp_path / "told").touch()
    told = printing(tmp_path, '"$@"', "fails", **second, RELAY_ERROR_FILE=str(tmp_path / "told"))
    assert (told.returncode, told.stdout, told.stderr) == (1, "", "")
    alone = printing(tmp_path, '"$@"', "fails", **second, RELAY_ERROR_FILE=str(tmp_path / "untold"))
    assert (alone.returncode, alone.stdout, alone.stderr) == (1, "", "error: no such thing\n")
    assert (tmp_path / "untold").read_text() == "no such thing"


def test_a_reader_that_has_seen_enough_ends_a_command_quietly(tmp_path: Path):
    result = printing(tmp_path, '"$@" | head -c 3')
    assert (result.returncode, result.stdout, result.stderr) == (141, "译", "")


def test_output_that_cannot_be_written_is_an_error_and_what_cannot_be_told_is_none(tmp_path: Path):
    result = printing(tmp_path, '"$@" > /dev/full')
    assert result.returncode == 1
    assert result.stderr == "error: standard output cannot be written (No space left on device): it is incomplete\n"
    for around in ('"$@" 2> /dev/full', '"$@" training > /dev/full', '"$@" training | head -c 0'):
        assert printing(tmp_path, around).returncode == 0
    # Closed files, too, and the next file that somebody opens is not taken for one of them.
    result = printing(tmp_path, '"$@" <&- >&- 2>&-')
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_a_character_that_a_terminal_cannot_show_is_spelt_out(tmp_path: Path):
    result = printing(tmp_path, PYTHONIOENCODING="ascii")
    assert (result.returncode, result.stderr) == (0, "warning: \\u770b\n")
    assert result.stdout.startswith("\\u8bd1\\u8bd1")
