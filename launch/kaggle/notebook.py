"""Writes what a kernel run on Kaggle needs: a small notebook, and a data set with the code, the config and the data.

    python -m launch.kaggle notebook configs/gpt/t4x2.yaml --owner ME --output kaggle
    python -m launch.kaggle notebook configs/gpt/t4x2.yaml --owner ME --output kaggle --previous ME/relay

The folder is one for `kaggle kernels push -p`. Without --dataset it holds another one, for `kaggle datasets create -p`.
The config is checked as the training would check it, and nothing is written if there is a mistake. Equal code, config
and data give equal files, byte for byte, so that one hash tells whether anything is new to upload.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.kaggle.dataset import (
    CODE,
    CONTENT,
    DATA,
    config_in_archive,
    content_hash,
    content_of,
    name_mistakes,
    write_dataset,
)
from launch.kaggle.kernel_run import SUMMARY
from launch.scripts import digest_of, read_options, script_of
from training.base.console import UserError, run_main, say
from training.base.environment import KAGGLE_INPUT, KAGGLE_WORKING
from training.base.files import write_atomically, writing_to
from training.base.options import CommandLine

if TYPE_CHECKING:
    from training.engine.task import RunOptions

NOTEBOOK = "relay.ipynb"

# A slug has 50 characters at most, and `-files` is appended to it.
_SLUG_LENGTH = 44

# GPUs of one kernel run, one rank each.
GPUS = 2

# The accelerator that the editor calls "GPU T4 x2", as kernel-metadata.json names it.
MACHINE_SHAPE = "NvidiaTeslaT4"

# The notebook's cells, in order; `{...}` is filled in. They run on Kaggle's Python and cannot import Relay.
_TITLE = """\
# {title}

One part of a training that takes several kernel runs: it goes on from where the last one stopped, trains on both GPUs
until its time is nearly over, saves, and leaves the run in the output. The next one has this output among its inputs.
Made by `python -m launch.kaggle`; `{command}`.
"""

_UNPACK = """\
# Only the run's own data set is code, and only as it was uploaded: its content.json lists the SHA-256 of every file,
# and this notebook knows that of content.json. The code is kept out of the output.
import hashlib, json, os, shutil, subprocess, sys, tarfile, tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

inputs = Path(os.environ.get("{input_variable}", "/kaggle/input"))
places = [inputs / "{slug}", inputs / "datasets/{dataset}"]
contents = {{each: (each / "{content}").read_bytes() for each in places if (each / "{content}").is_file()}}
if not contents:
    raise FileNotFoundError(f"{dataset} is not below {{inputs}}: add that data set to the notebook's input")
same = [each for each, content in contents.items() if hashlib.sha256(content).hexdigest() == "{sha256}"]
if not same:
    raise ValueError("{dataset} is not the version for this notebook: upload that one, or write the notebook anew")
place, expected = same[0], json.loads(contents[same[0]])["files"]
code, unpacked, taken = Path(tempfile.gettempdir(), "relay"), Path(tempfile.mkdtemp()), set()
shutil.rmtree(code, ignore_errors=True)


def take(name, file):
    target, digest = unpacked / name, hashlib.sha256()
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb") as copy:
        while block := file.read(1 << 20):
            digest.update(block)
            copy.write(block)
    if digest.hexdigest() != expected[name]:
        raise ValueError(f"{{name}} in {dataset} is not what was uploaded: upload the data set again")
    taken.add(name)


for archive in filter(Path.is_file, [place / "{code}", place / "{data}"]):
    with tarfile.open(archive) as opened:
        for member in opened:
            if member.isfile() and member.name in expected:
                take(member.name, opened.extractfile(member))
# Kaggle may have unpacked the archives itself.
folders = [place, *place.glob("*/"), *place.glob("*/*/")]
for name in sorted(expected.keys() - taken):
    found = next((each / name for each in folders if (each / name).is_file()), None)
    if found is None:
        raise FileNotFoundError(f"{{name}} is missing in {dataset}: upload the data set again")
    with found.open("rb") as file:
        take(name, file)
unpacked.rename(code)


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
    sha256: str,
    previous: Sequence[str],
    expected_step: int = 1,
) -> None:
    """Writes the notebook and kernel-metadata.json into `folder`, for `kaggle kernels push -p`.

    words: the training's config file and options, as on its command line. dataset: OWNER/SLUG of what `write_dataset`
    made. sha256: its `content_hash`; with any other content the kernel run ends at once. previous: OWNER/SLUG of the
    kernels whose outputs may hold the run; of none where the user adds them by hand. expected_step: the step that the
    run has come to in them; without it, the kernel run ends at once. Raises UserError with every mistake in the names.
    """
    mistakes = [*name_mistakes(owner, slug), *_reference_mistakes("--dataset", [dataset])]
    mistakes += [*_hash_mistakes(sha256), *_reference_mistakes("--previous", previous)]
    if len(title) < 5:
        mistakes.append(f"Kaggle asks for a title of at least 5 characters, got {title!r}")
    if mistakes:
        raise UserError("; ".join(mistakes))
    # Kaggle leaves out an input that it cannot attach, and the training would begin anew.
    expected = ["--expect-step", str(expected_step)] if previous else []
    named = [word for each in previous for word in ("--previous", each)]
    config, *options = words
    notebook = _notebook(title, [str(config_in_archive(Path(config))), *expected, *named, *options], dataset, sha256)
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


def _notebook(title: str, words: Sequence[str], dataset: str, sha256: str) -> dict[str, Any]:
    """The notebook as nbformat 4.5 has it. words: those of `launch.kaggle run`."""
    filled = {
        "title": title,
        "command": f"run {' '.join(words)}",
        "input_variable": KAGGLE_INPUT,
        "working_variable": KAGGLE_WORKING,
        "code": CODE,
        "data": DATA,
        "content": CONTENT,
        "summary": SUMMARY,
        "dataset": dataset,
        "slug": dataset.partition("/")[2],
        "sha256": sha256,
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


def _reference_mistakes(option: str, references: Iterable[str]) -> list[str]:
    return [
        f"{option}: expected OWNER/SLUG, got {each!r}"
        for each in references
        if not re.fullmatch(r"[\w-]+/[\w-]+", each)
    ]


def _hash_mistakes(sha256: str) -> list[str]:
    known = re.fullmatch(r"[0-9a-f]{64}", sha256)
    return [] if known else [f"--sha256: expected 64 hexadecimal digits, got {sha256!r}"]


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
    add("--sha256", metavar="HEX", help="with --dataset: of its content, as printed when its folder was written")
    add("--previous", action="append", default=[], metavar="OWNER/SLUG", help="notebook whose output to go on from")
    add("--script", help="module that trains (default: what the config says)")
    arguments, words = parser.parse_known_args(argv)
    mistakes, options, content, slug = [], None, None, arguments.slug or "relay"
    script = arguments.script or script_of(arguments.config)
    try:
        options = checked_options(script, [str(arguments.config), *words])
    except UserError as error:
        mistakes.append(str(error))
    else:
        slug = arguments.slug or slug_of(options.run_dir)
        if arguments.dataset is None:
            try:
                content = content_of(arguments.config, options.data, script)
            except UserError as error:
                mistakes.append(str(error))
    mistakes += name_mistakes(arguments.owner, slug)
    if not mistakes and arguments.dataset is None and len(slug) > _SLUG_LENGTH:
        mistakes.append(f"--slug: at most {_SLUG_LENGTH} characters, since its data set is called {slug}-files")
    mistakes += _reference_mistakes("--dataset", [arguments.dataset] if arguments.dataset is not None else [])
    if (arguments.dataset is None) != (arguments.sha256 is None):
        mistakes.append(
            "--dataset and --sha256 go together: the hash was printed when the data set's folder was written"
        )
    mistakes += _hash_mistakes(arguments.sha256) if arguments.sha256 is not None else []
    mistakes += _reference_mistakes("--previous", arguments.previous)
    if mistakes or options is None:
        raise UserError("; ".join(mistakes) + "; nothing was written")
    say(f"the run {options.run_dir.name}, on {GPUS} T4s")
    dataset, sha256 = arguments.dataset or f"{arguments.owner}/{slug}-files", arguments.sha256
    files = arguments.output / "dataset"
    if content is not None:
        say(f"data set {dataset}, for you to upload, holds")
        for line in content.described():
            say(f"  {line}")
        write_dataset(files, content, owner=arguments.owner, slug=f"{slug}-files")
        sha256 = content_hash(files)
    write_kernel(
        arguments.output,
        owner=arguments.owner,
        slug=slug,
        title=slug.replace("-", " "),  # Kaggle makes the slug of the title
        words=[str(arguments.config), *(["--script", arguments.script] if arguments.script else []), *words],
        dataset=dataset,
        sha256=str(sha256),
        previous=arguments.previous,
    )
    if content is not None:
        say(f"first:  kaggle datasets create -p {files}   (later: kaggle datasets version -p {files} -m again)")
    say(f"then:   kaggle kernels push -p {arguments.output}")
    if not arguments.previous:
        again = f"--dataset {dataset} --sha256 {sha256} --previous {arguments.owner}/{slug}"
        say(f"next:   the same command with {again}, and push again")
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
