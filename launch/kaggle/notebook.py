"""Writes what a kernel run on Kaggle needs: a small notebook, and a data set with the code, the config and the data.

    python -m launch.kaggle notebook configs/gpt/t4x2.yaml --owner ME --output kaggle
    python -m launch.kaggle notebook configs/gpt/t4x2.yaml --owner ME --output kaggle --previous ME/relay

The folder is one for `kaggle kernels push -p`. Without --dataset it holds another one, for `kaggle datasets create -p`.
The config is checked as the training would check it, and nothing is written if there is a mistake. Equal code, config
and data give equal files, byte for byte, so that one hash tells whether anything is new to upload.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import subprocess
import tarfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO

from launch.kaggle.kernel_run import SUMMARY
from launch.scripts import digest_of, read_options, script_of
from training.base.console import UserError, run_main, say
from training.base.environment import KAGGLE_INPUT, KAGGLE_WORKING
from training.base.files import open_atomically, sha256_of, write_atomically, writing_to
from training.base.options import CommandLine

if TYPE_CHECKING:
    from training.engine.task import RunOptions

CODE, DATA, CONTENT = "relay.tar.gz", "data.tar", "content.json"
NOTEBOOK = "relay.ipynb"

# A slug has 50 characters at most, and `-files` is appended to it.
_SLUG_LENGTH = 44

# GPUs of one kernel run, one rank each.
GPUS = 2

# The accelerator that the editor calls "GPU T4 x2", as kernel-metadata.json names it.
MACHINE_SHAPE = "NvidiaTeslaT4"

# The parts of a checkout that a run needs, for when there is no git to ask.
_LAYOUT = ("README.md", "LICENSE", "requirements.txt", "launch", "slurm", "data_prep", "training", "configs")

_ROOT = Path(__file__).resolve().parents[2]

# The notebook's cells, in order; `{...}` is filled in. They run on Kaggle's Python and cannot import Relay.
_TITLE = """\
# {title}

One part of a training that takes several kernel runs: it goes on from where the last one stopped, trains on both GPUs
until its time is nearly over, saves, and leaves the run in the output. The next one has this output among its inputs.
Made by `python -m launch.kaggle`; `{command}`.
"""

_UNPACK = """\
# The code is kept out of the output. Kaggle may have unpacked the archives of the data set itself.
import os, shutil, subprocess, sys, tarfile, tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

inputs = Path(os.environ.get("{input_variable}", "/kaggle/input"))
code = Path(tempfile.gettempdir(), "relay")
shutil.rmtree(code, ignore_errors=True)
for unpacked in inputs.rglob("launch/kaggle/kernel_run.py"):
    shutil.copytree(unpacked.parents[2], code, dirs_exist_ok=True)
for name in ("{code}", "{data}"):
    for archive in filter(Path.is_file, inputs.rglob(name)):
        with tarfile.open(archive) as opened:
            opened.extractall(code, filter="data")
if not (code / "launch").is_dir():
    raise FileNotFoundError(f"Relay's code is not below {{inputs}}: add the data set {dataset} to the notebook's input")


def installed(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return None


# What the image lacks is installed; its torch stays, because that fits its driver.
listed = (code / "requirements.txt").read_text().split("\\n")
wanted = [each.split("==") for each in listed if each and not each.startswith(("#", "torch=="))]
lacking = [f"{{name}}=={{number}}" for name, number in wanted if installed(name) != number]
pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
if lacking:
    print("installing", *lacking)
    subprocess.run([*pip, "install", *lacking, "torch==" + version("torch")], check=True)
# peft refuses to work beside a torchao older than 0.16. Relay needs none.
torchao = installed("torchao")
if torchao is not None and [int(part) for part in torchao.split(".")[:2]] < [0, 16]:
    subprocess.run([*pip, "uninstall", "--yes", "torchao"], check=True)
"""

_TRAIN = """\
# The training has processes of its own. "Stop" asks them to save and end; a second "stop", to end at once.
import signal

words = {words}
command = [sys.executable, "-m", "launch.kaggle", "run", *words]
training = subprocess.Popen(
    command,
    cwd=code,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    errors="replace",
    start_new_session=True,
)
while True:
    try:
        for line in training.stdout:
            print(line, end="")
        break
    except KeyboardInterrupt:
        training.send_signal(signal.SIGINT)
print("the training ended with status", training.wait())  # 0 finished, 75 to be continued, 1 failed
"""

_RESULT = """\
# How the run stands. No error is raised here: the output of a notebook that failed may be lost.
print(Path(os.environ.get("{working_variable}", "/kaggle/working"), "{summary}").read_text())
"""


def write_kernel(
    folder: Path,
    *,
    owner: str,
    slug: str,
    title: str,
    words: Sequence[str],
    dataset: str,
    previous: Sequence[str],
    expected_step: int = 1,
) -> None:
    """Writes the notebook and kernel-metadata.json into `folder`, for `kaggle kernels push -p`.

    words: the training's config file and options, as on its command line. dataset: OWNER/SLUG of what `write_dataset`
    made. previous: OWNER/SLUG of kernels whose outputs may hold the run. expected_step: the step that the run has come
    to in them; without it, the kernel run ends at once. Raises UserError with every mistake in the names.
    """
    mistakes = [*name_mistakes(owner, slug), *_reference_mistakes("--dataset", [dataset])]
    mistakes += _reference_mistakes("--previous", previous)
    if len(title) < 5:
        mistakes.append(f"Kaggle asks for a title of at least 5 characters, got {title!r}")
    if mistakes:
        raise UserError("; ".join(mistakes))
    # Kaggle leaves out an input that it cannot attach, and the training would begin anew.
    expected = ["--expect-step", str(expected_step)] if previous else []
    config, *options = words
    notebook = _notebook(title, [str(config_in_archive(Path(config))), *expected, *options], dataset)
    metadata = {
        "id": f"{owner}/{slug}",
        "title": title,
        "code_file": NOTEBOOK,
        "language": "python",
        "kernel_type": "notebook",
        "is_private": True,
        "enable_gpu": True,
        "enable_internet": True,  # for what the image lacks, and for base models
        "machine_shape": MACHINE_SHAPE,
        "docker_image_pinning_type": "original",  # a run keeps its torch, and with it its bits
        "dataset_sources": [dataset],
        "competition_sources": [],
        "kernel_sources": list(previous),
        "model_sources": [],
    }
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / NOTEBOOK, json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")
        write_atomically(folder / "kernel-metadata.json", json.dumps(metadata, indent=2) + "\n")


def _notebook(title: str, words: Sequence[str], dataset: str) -> dict[str, Any]:
    """The notebook as nbformat 4.5 has it. words: those of `launch.kaggle run`."""
    filled = {
        "title": title,
        "command": f"run {' '.join(words)}",
        "input_variable": KAGGLE_INPUT,
        "working_variable": KAGGLE_WORKING,
        "code": CODE,
        "data": DATA,
        "summary": SUMMARY,
        "dataset": dataset,
        "words": json.dumps(words, ensure_ascii=False),
    }
    cells = [_cell("markdown", _TITLE, filled)] + [_cell("code", each, filled) for each in (_UNPACK, _TRAIN, _RESULT)]
    return {
        "cells": [{**cell, "id": f"cell-{number}"} for number, cell in enumerate(cells)],
        "metadata": {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def _cell(kind: str, text: str, filled: dict[str, str]) -> dict[str, Any]:
    more: dict[str, Any] = {"execution_count": None, "outputs": []} if kind == "code" else {}
    return {"cell_type": kind, "metadata": {}, "source": text.format(**filled).rstrip().splitlines(True), **more}


def name_mistakes(owner: str, slug: str) -> list[str]:
    """What Kaggle would not accept in a user's name and the name of a kernel or data set."""
    mistakes = []
    if not re.fullmatch(r"[A-Za-z0-9][\w-]*", owner):
        mistakes.append(f"--owner: expected a name on Kaggle, got {owner!r}")
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", slug) or not 5 <= len(slug) <= 50:
        mistakes.append(f"--slug: expected 5 to 50 lower-case letters, digits and single dashes within, got {slug!r}")
    return mistakes


def _reference_mistakes(option: str, references: Iterable[str]) -> list[str]:
    return [
        f"{option}: expected OWNER/SLUG, got {each!r}"
        for each in references
        if not re.fullmatch(r"[\w-]+/[\w-]+", each)
    ]


def config_in_archive(config: Path) -> PurePosixPath:
    """Where `write_dataset` puts a config that lies anywhere; the name of its folder still says what trains by it."""
    return PurePosixPath("configs", config.resolve().parent.name, config.name)


# The data set.


def write_dataset(folder: Path, *, owner: str, slug: str, config: Path, data: Path) -> None:
    """Writes code, config and prepared data into `folder`, for `kaggle datasets create -p` and `... version -p`.

    `content_hash` then tells whether anything in it is new. Raises UserError when there is nothing to write.
    """
    mistakes = [*name_mistakes(owner, slug), *_content_mistakes(config, data)]
    if mistakes:
        raise UserError("; ".join(mistakes))
    inside = str(config_in_archive(config))
    code = {name: _ROOT / name for name in _code_files(_ROOT)} | {inside: config}
    prepared = {
        str(PurePosixPath("prepared", data.name, path.relative_to(data).as_posix())): path
        for path in data.rglob("*")
        if path.is_file()
    }
    about = {
        "id": f"{owner}/{slug}",
        "title": f"Relay {slug}"[:50],
        "licenses": [{"name": "other"}],  # the data's own, which its meta.json names
    }
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        # The data has an archive of its own, since it changes less often and is much larger.
        _write_archive(folder / CODE, code)
        _write_archive(folder / DATA, prepared)
        files = {name: sha256_of(folder / name) for name in (CODE, DATA)}
        whole = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
        write_atomically(folder / "dataset-metadata.json", json.dumps(about, indent=2) + "\n")
        write_atomically(folder / CONTENT, json.dumps({"sha256": whole, "files": files}, indent=2) + "\n")


def content_hash(folder: Path) -> str | None:
    """The SHA-256 that `write_dataset` wrote down for what it put into a folder; None where it did not."""
    with suppress(OSError, ValueError, KeyError):
        return json.loads((folder / CONTENT).read_text(encoding="utf-8"))["sha256"]
    return None


def _content_mistakes(config: Path, data: Path) -> list[str]:
    mistakes = [] if config.is_file() else [f"there is no config file {config}"]
    if not (data / "meta.json").is_file():
        mistakes.append(f"{data} is no prepared data set: there is no meta.json in it; make it with data_prep")
    elif not data.name:
        mistakes.append(f"--data {data}: name the folder itself, because Kaggle's copy is found by that name")
    return mistakes


def _code_files(root: Path) -> list[str]:
    """The files of Relay below `root`: those that git tracks, and new Python and YAML; without git, the known folders.

    A training of the user's own is needed though it is not committed yet; other stray files must not leave the machine.
    """
    with suppress(OSError, subprocess.CalledProcessError):
        asked = ["git", "ls-files", "-z", "--exclude-standard"]
        tracked = subprocess.run(asked, cwd=root, capture_output=True, check=True).stdout
        asked += ["--others", "--", "*.py", "*.yaml"]
        new = subprocess.run(asked, cwd=root, capture_output=True, check=True).stdout
        names = [name for name in (tracked + new).decode().split("\0") if name and (root / name).is_file()]
        # If Relay lies within another repository, that one's git may ignore all of it.
        if "launch/kaggle/notebook.py" in names:
            return names
    found = [path for name in _LAYOUT for path in (root / name, *(root / name).rglob("*"))]
    return [str(path.relative_to(root)) for path in found if path.is_file() and "__pycache__" not in path.parts]


def _write_archive(path: Path, members: dict[str, Path]) -> None:
    """A tar file, compressed if its name says so. It holds no times and owners: equal members give equal bytes."""
    with open_atomically(path) as raw:
        if path.suffix == ".gz":
            with gzip.GzipFile("", "wb", mtime=0, fileobj=raw) as compressed:
                _write_tar(compressed, members)
        else:
            _write_tar(raw, members)


def _write_tar(file: BinaryIO | gzip.GzipFile, members: dict[str, Path]) -> None:
    with tarfile.open(fileobj=file, mode="w|", format=tarfile.GNU_FORMAT) as archive:
        for name, path in sorted(members.items()):
            about = tarfile.TarInfo(name)
            about.size = path.stat().st_size
            about.mode = 0o755 if os.access(path, os.X_OK) else 0o644
            with path.open("rb") as content:
                archive.addfile(about, content)


# The command.


def main(argv: Sequence[str] | None = None) -> int:
    parser = CommandLine(
        "python -m launch.kaggle notebook",
        __doc__,
        usage="%(prog)s CONFIG.yaml --owner ME --output DIR [options] [--key value ...]",
    )
    add = parser.add_argument
    add("config", type=Path, metavar="CONFIG.yaml")
    add("--output", type=Path, required=True, metavar="DIR", help="folder for the notebook")
    add("--owner", required=True, help="your name on Kaggle")
    add("--slug", help="the notebook's name on Kaggle (default: relay-, the run's name, and a digest of its path)")
    add("--dataset", metavar="OWNER/SLUG", help="data set with code, config and data (default: one is made to upload)")
    add("--previous", action="append", default=[], metavar="OWNER/SLUG", help="notebook whose output to go on from")
    add("--script", help="module that trains (default: what the config says)")
    arguments, words = parser.parse_known_args(argv)
    mistakes, options, slug = [], None, arguments.slug or "relay"
    try:
        options = checked_options(arguments.script or script_of(arguments.config), [str(arguments.config), *words])
    except UserError as error:
        mistakes.append(str(error))
    else:
        slug = arguments.slug or slug_of(options.run_dir)
        if arguments.dataset is None:
            mistakes += _content_mistakes(arguments.config, options.data)
    mistakes += name_mistakes(arguments.owner, slug)
    if not mistakes and arguments.dataset is None and len(slug) > _SLUG_LENGTH:
        mistakes.append(f"--slug: at most {_SLUG_LENGTH} characters, since its data set is called {slug}-files")
    mistakes += _reference_mistakes("--dataset", [arguments.dataset] if arguments.dataset is not None else [])
    mistakes += _reference_mistakes("--previous", arguments.previous)
    if mistakes or options is None:
        raise UserError("; ".join(mistakes) + "; nothing was written")
    dataset = arguments.dataset or f"{arguments.owner}/{slug}-files"
    words = [str(arguments.config), *(["--script", arguments.script] if arguments.script else []), *words]
    say(f"the run {options.run_dir.name}, on {GPUS} T4s")
    write_kernel(
        arguments.output,
        owner=arguments.owner,
        slug=slug,
        title=slug.replace("-", " "),  # Kaggle makes the slug of the title
        words=words,
        dataset=dataset,
        previous=arguments.previous,
    )
    if arguments.dataset is None:
        files = arguments.output / "dataset"
        write_dataset(files, owner=arguments.owner, slug=f"{slug}-files", config=arguments.config, data=options.data)
        say(f"first:  kaggle datasets create -p {files}   (later: kaggle datasets version -p {files} -m again)")
    say(f"then:   kaggle kernels push -p {arguments.output}")
    if not arguments.previous:
        say(f"next:   the same command with --previous {arguments.owner}/{slug}, and push again")
    return 0


def slug_of(run_dir: Path) -> str:
    """A new run's name on Kaggle. The prefix keeps it apart from the user's own notebooks."""
    readable = re.sub(r"[^a-z0-9]+", "-", f"relay-{run_dir.resolve().name}".lower())
    return f"{readable[: _SLUG_LENGTH - 9].strip('-')}-{digest_of(run_dir)}"


def checked_options(script: str, words: Sequence[str]) -> RunOptions:
    """The options `words` of the training `script`. Raises UserError with what is wrong in them on two T4s."""
    options, mistakes = read_options(script, words), []
    if options.precision == "bf16":
        mistakes.append("precision bf16: a T4 (sm_75) only emulates it, slowly; auto takes fp16 there")
    count = options.batch.micro_batches_per_step
    if count % GPUS:
        mistakes.append(
            f"{GPUS} GPUs cannot share the {count} micro-batches of a step equally: in a new run set "
            f"--batch.micro_batches_per_step {count + count % GPUS}"
        )
    if mistakes:
        raise UserError("; ".join(mistakes))
    return options


if __name__ == "__main__":
    run_main(main)
