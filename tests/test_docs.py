"""README, docs/ and configs: every link leads somewhere, every command is run on small data, or can be given as it is.

Whoever copies the README's commands in their order, from an empty machine, gets what it says. A command of another page
goes through its own options, and its config must be there; the rest names the test that runs it, or why none does.
"""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
import sys
from argparse import ArgumentParser
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

import launch.slurm.__main__ as slurm
from tests.support.commands import PATIENCE_S, ROOT
from tests.support.zygote import Forked, usual_environment
from training.base.options import CommandLine, parse

README, CHINESE = ROOT / "README.md", ROOT / "docs/README.zh.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
CONFIGS = sorted((ROOT / "configs").glob("*/*.yaml"))
PROGRAMS = (
    *("python", "bash", "source", "pip", "git", "cp", "sed", "for", "torchrun", "deepspeed", "srun", "sbatch"),
    *("hf", "wandb", "ollama", "vllm", "lm_eval", "llama-cli"),
)

# Commands that are not run here, by how they begin: the test that runs them, or why none does.
ELSEWHERE = {
    "bash launch/quickstart.sh": "tests/launch/test_scripts.py",
    "bash tests/run.sh": "runs this very test",
    "source .venv/bin/activate": "the tests run in an environment",
    "python -m launch.prove": "tests/launch/test_prove.py",
    "python -m launch.slurm": "tests/launch/test_slurm_submit.py",
    "python -m launch.kaggle": "tests/launch/test_kaggle_relay.py",
    "python -m launch.run -m launch.doctor": "tests/launch/test_doctor.py",
    "python -m launch.doctor": "tests/launch/test_doctor.py",
    "bash launch/setup.sh": "tests/launch/test_scripts.py",
    "python -m launch.run configs/gpt/zero2.yaml": "tests/training/engine/test_zero.py",
    "python -m tests.bench": "tests/test_bench.py",
    "python -m tests.support.base_models": "makes the model of a test below",
    "python -m tests.support.picture": "tests/training/report/test_pages.py",
    "python -m characters": "tests/training/test_your_own_training.py",
    "python -m launch.run --script characters": "tests/training/test_your_own_training.py",
    "torchrun": "tests/launch/test_launchers.py",
    "deepspeed": "tests/launch/test_launchers.py",
    "srun": "tests/launch/test_launchers.py",
    "sbatch": "tests/launch/test_slurm_job.py",
    "for ": "are loops of commands for SLURM",
    "wandb": "tests/training/engine/test_wandb.py",
    "git log": "reads the history",
    "pip install": "asks the package index",
    "hf ": "writes to the hub",
    "ollama": "is not here",
    "vllm": "is not here",
    "lm_eval": "is not here",
    "llama-cli": "is not here",
}

# What stands for what in the README's commands, so that they take seconds.
SMALL = {
    "Qwen/Qwen2.5-3B-Instruct": "models/tiny-qwen2",
    "configs/qlora/qwen2.5-3b-t4x2.yaml": "configs/qlora/tiny.yaml",
}
SHORT = ("--optim.steps", "4", "--optim.warmup_steps", "1", "--log.generate_samples", "0")


def commands_of(page: Path) -> list[str]:
    """The commands of a page in their order: of indented blocks, in sentences and tables, in comments of configs."""
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.M | re.S)
    if page.suffix == ".yaml":
        return [" ".join(each.split()) for each in re.findall(r"^# +(python -m .*)$", text.replace("\\\n#", " "), re.M)]
    text = re.sub(r"(\n {4,}for .*?)\n {4,}done", lambda loop: loop[1].replace("\n", " ") + "; done", text, flags=re.S)
    text = text.replace("\\\n", " ")
    found = []
    for match in re.finditer(r"^ {4,}(\S.*)$|`([^`]+)`", text, re.M):
        words = re.sub(r"\s+# .*", "", " ".join((match[1] or match[2]).split()))
        first = words.split()[0].split("=")[0] if words.split() else ""
        is_command = first in PROGRAMS and (match[1] or re.match(r"(python -m|bash|cp|sed|torchrun|sbatch) \S", words))
        if is_command:
            found.append(words.strip())
        elif match[1] and page.name != "architecture.md":  # whose only block is a tree of folders
            raise AssertionError(f"{page}: {words!r} begins with none of the programs that are known here")
    return found


def elsewhere(command: str) -> str | None:
    return next((why for beginning, why in ELSEWHERE.items() if command.startswith(beginning)), None)


def is_form(command: str) -> bool:
    """Whether it has words that a reader puts in: CONFIG, runs/NAME, FILE..., or less than a whole command."""
    return re.search(r"\b[A-Z]{2,}\b|\.\.\.|…", re.sub(r"--\S+|https?\S+", "", command)) is not None


def module_of(command: str) -> tuple[str, list[str]]:
    """What `python -m` runs in the end, and its words; launch.run's own way of starting it is tested in test_run.py."""
    words = shlex.split(command.split("&&")[0].split(" < ")[0])
    assert words[:2] == ["python", "-m"], command
    module, rest = words[2], words[3:]
    if module != "launch.run":
        return module, rest
    if rest[0] == "-m":
        return rest[1], rest[2:]
    return f"training.{Path(rest[0]).parent.name}", rest


def test_readme_is_a_way_in_and_not_a_manual():
    assert len(README.read_text("utf-8").splitlines()) <= 200


@pytest.mark.parametrize("page", [*PAGES, ROOT / "configs/README.md"], ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path):
    text = re.sub(r"^```.*?^```$|`[^`\n]*`", "", page.read_text("utf-8"), flags=re.M | re.S)
    links = re.findall(r"\]\(([^)\s]+)\)|(?:src|srcset|href)=\"([^\"]+)\"", text)
    for link in (inside or tag for inside, tag in links):
        if re.match(r"https?:", link):
            continue
        name, _, heading = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.is_relative_to(ROOT) and target.exists(), f"{page.name}: {link}"
        if heading:
            headings = re.findall(r"^#+ (.*)$", target.read_text("utf-8"), re.M)
            assert heading in {re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in headings}, link


def test_every_page_is_named_in_the_readme_and_every_test_that_runs_a_command_is_there():
    text = README.read_text("utf-8")
    assert [page.name for page in PAGES[1:] if f"(docs/{page.name})" not in text] == []
    tests = [why for why in ELSEWHERE.values() if why.startswith("tests/")]
    assert [name for name in tests if not (ROOT / name).is_file()] == []
    used = [command for page in PAGES for command in commands_of(page)]
    assert [each for each in ELSEWHERE if not any(command.startswith(each) for command in used)] == []


def test_the_chinese_readme_has_the_same_commands_and_figures():
    assert commands_of(CHINESE) == commands_of(README)
    figures = [sorted(re.findall(r"\d+\.\d+", page.read_text("utf-8"))) for page in (README, CHINESE)]
    assert figures[0] == figures[1]
    blocks = [re.findall(r"^```text.*?^```$", page.read_text("utf-8"), re.M | re.S) for page in (README, CHINESE)]
    assert blocks[0] == blocks[1] and len(blocks[0]) == 2


class Taken(Exception):
    """A command has understood its words."""


@pytest.mark.parametrize("page", [*PAGES, *CONFIGS], ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_has_options_that_its_program_knows(page: Path, monkeypatch):
    def taken(*words: Any, **more: Any) -> Any:
        parse(*words, **more)
        raise Taken

    def parsed(self: CommandLine, *words: Any) -> Any:
        ArgumentParser.parse_intermixed_args(self, *words)
        raise Taken

    monkeypatch.chdir(ROOT)
    for name in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(CommandLine, name, parsed)
    for command in commands_of(page):
        if elsewhere(command) is not None or is_form(command) or command.startswith(("cp ", "sed ")):
            continue
        module, words = module_of(command)
        script = importlib.import_module(module)
        if hasattr(script, "parse"):
            monkeypatch.setattr(script, "parse", taken)
        monkeypatch.setattr("sys.argv", [module, *words])
        with pytest.raises(Taken):
            script.main()


def test_the_ranks_of_every_job_can_share_the_steps_of_its_config(monkeypatch):
    monkeypatch.chdir(ROOT)
    jobs = 0
    for command in (*(line.strip() for line in slurm.__doc__.splitlines()), *chain(*map(commands_of, PAGES))):
        job = re.match(r"python -m launch.slurm() (configs/\S+)(.*)|sbatch (.*) slurm/run.sbatch (\S+)(.*)", command)
        if job is not None and not is_form(command):
            before, config, behind = filter(lambda part: part is not None, job.groups())
            assert slurm.main([config, "--time", "4:00:00", *shlex.split(before + behind), "--print"]) == 0
            jobs += 1
    assert jobs >= 5


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder like a fresh clone in which the quickstart has been, with less to train on."""
    (tmp_path / "data_prep").mkdir()
    lines = (ROOT / "data_prep/sample.tsv").read_text("utf-8").splitlines(keepends=True)
    (tmp_path / "data_prep/sample.tsv").write_text("".join(lines[:120]), "utf-8")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    return tmp_path


def run_in(folder: Path, module: str, words: Sequence[str]) -> None:
    with (folder / "said").open("w+b") as said:
        kind = "chat" if re.search("records|qlora|base_models", f"{module} {words}") else "plain"
        status = Forked(kind, module, words, usual_environment(), said, said, cwd=folder).wait(PATIENCE_S)
        said.seek(0)
        assert status == 0, (module, words, said.read().decode())


def follow(clone: Path, commands: Iterable[str]) -> list[str]:
    """Runs them in their order, trainings for four steps. Returns the modules that ran."""
    ran = []
    for command in commands:
        if elsewhere(command) is not None or is_form(command):
            continue
        if command.startswith(("cp ", "sed ")):
            subprocess.run(["bash", "-c", command], cwd=clone, check=True)
            continue
        for large, small in SMALL.items():
            command = command.replace(large, small)
        command = re.sub(r" --budget \S+", "", command)  # which chooses more steps than SHORT: see test_budget.py
        module, words = module_of(command)
        short = {"training.gpt": SHORT, "training.seq2seq": SHORT, "training.qlora": SHORT[:4]}.get(module, ())
        run_in(clone, module, [*words, *short])
        ran.append(module)
    return ran


def is_about_records(command: str) -> bool:
    return "records" in command or "mine.jsonl" in command


def test_the_readmes_commands_for_sentence_pairs_work_in_their_order(clone: Path):
    run_in(clone, "data_prep.pairs", ["--source", "data_prep/sample.tsv", "--output", "prepared/sample"])
    ran = follow(clone, (command for command in commands_of(README) if not is_about_records(command)))
    assert ran == [
        *("data_prep.pairs", "training.seq2seq", "training.evaluation.evaluate", "training.evaluation.translate"),
        "training.gpt",
    ]
    assert (clone / "runs/mine/report.html").is_file()


def test_the_random_model_is_made_without_what_only_tests_need():
    code = "import sys; sys.modules['pytest'] = None; import tests.support.base_models"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=usual_environment(), check=True)


@pytest.mark.whole
def test_the_readmes_commands_for_records_work_in_their_order(clone: Path):
    run_in(clone, "tests.support.base_models", ["models/tiny-qwen2"])
    ran = follow(clone, filter(is_about_records, commands_of(README)))
    assert ran == [
        *("data_prep.instructions", "training.qlora", "training.qlora", "training.evaluation.evaluate"),
        *("training.evaluation.chat", "training.evaluation.export"),
    ]
    assert list((clone / "exports/records").glob("*.gguf"))
