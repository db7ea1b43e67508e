"""JoeyNMT (2.3.0, Apache-2.0) as a peer: installed, configured, trained and asked by its own commands.

It lives in an environment of its own in ~/.cache/relay-tests, where it uses the torch of this one; its releases want
older versions of what Relay uses. It gets the very pieces that Relay has cut the sentences into, as words.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from tests.bench.common import ASLEEP, WAYS, environment
from tests.support.base_models import CACHE
from training.base.console import UserError, say
from training.data.prepared import Prepared
from training.models.attention_gru import AttentionGRUOptions
from training.models.gpt import GPTOptions

Model = dict[str, Any]

PACKAGE = "joeynmt==2.3.0"
# What it imports beside what Relay has, in versions that go with it.
NEEDS = (
    "protobuf==3.20.3",
    "tensorboard==2.20.0",
    "importlib_metadata==7.2.1",
    "sacremoses==0.2.0",
    "subword-nmt==0.3.8",
    "seaborn==0.13.2",
    "matplotlib==3.11.2",
    "plotly==7.1.0",
)


def python() -> Path:
    """The interpreter of JoeyNMT's environment, made when first asked for. Raises UserError where it cannot be made."""
    folder = CACHE / PACKAGE.replace("==", "-")
    interpreter, ready = folder / "bin/python", folder / "ready"
    installed = "\n".join((PACKAGE, *NEEDS))
    packages = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"

    def find_ours() -> None:  # behind its own packages it finds ours, torch above all
        (packages / "relay.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")

    if ready.exists() and ready.read_text() == installed:
        find_ours()  # it may have been made by an environment that is gone
        return interpreter
    say(f"installing {PACKAGE} into {folder}")
    pip = [str(interpreter), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    for command in (
        [sys.executable, "-m", "venv", "--clear", str(folder)],
        [*pip, "--no-deps", PACKAGE],
        [*pip, *NEEDS],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"{PACKAGE} cannot be installed: {done.stderr.strip()[-500:]}")
        if command[1:3] == ["-m", "venv"]:
            find_ours()
    ready.write_text(installed)
    return interpreter


def write_pairs(data: Prepared, folder: Path, *, dev: int | None = None, test: int | None = None) -> None:
    """The parts of `data` as text files, ids for words. dev, test: how many pairs of validation and test; None: all."""
    folder.mkdir()
    for name, part_name, count in (("train", "train", None), ("dev", "validation", dev), ("test", "test", test)):
        part = data.part(part_name)
        for language, rows in (("zh", part.source), ("en", part.target)):
            lines = [" ".join(map(str, row.tolist())) for row in rows][:count]
            (folder / f"{name}.{language}").write_text("\n".join(lines) + "\n")
    for language, tokenizer in (("zh", data.source_tokenizer), ("en", data.target_tokenizer)):
        words = map(str, range(4, tokenizer.vocabulary_size))
        lines = ["<unk>", "<pad>", "<s>", "</s>", *words]
        (folder / f"vocabulary.{language}").write_text("\n".join(lines) + "\n")


def _tied(data: Prepared) -> Model:
    """Whose embeddings are one table: both sides', where they have one vocabulary, and the output layer's always."""
    return {"tied_embeddings": data.joint_vocabulary, "tied_softmax": True}


def transformer(options: GPTOptions, data: Prepared) -> Model:
    """About as many parameters as the GPT has: its layers are shared out among encoder and decoder."""
    side = {
        "type": "transformer",
        "num_layers": options.layers // 2,
        "num_heads": options.heads,
        "embeddings": {"embedding_dim": options.width, "scale": True, "dropout": options.dropout},
        "hidden_size": options.width,
        "ff_size": 3 * options.width,  # not 4: the decoder attends twice
        "dropout": options.dropout,
        "layer_norm": "pre",
    }
    return {**_tied(data), "encoder": side, "decoder": side}


def recurrent(options: AttentionGRUOptions, data: Prepared) -> Model:
    """Recurrent layers and attention as wide as Relay's; embeddings, too: else it ties no output layer to them."""
    width = options.hidden_width
    side = {
        "type": "recurrent",
        "rnn_type": "gru",
        "num_layers": options.layers,
        "embeddings": {"embedding_dim": width, "scale": False, "dropout": options.dropout},
        "hidden_size": width,
        "dropout": options.dropout,
    }
    encoder = {**side, "bidirectional": options.bidirectional}
    decoder = {**side, "attention": "bahdanau", "init_hidden": "bridge", "input_feeding": True}
    return {**_tied(data), "encoder": encoder, "decoder": decoder}


def write_config(pairs: Path, model: Model, batches: tuple[int, int], **training: Any) -> Path:
    """A config for the pairs in a folder, and a new folder for what comes of it; returns the config's path.

    batches: sentences in one, and how many a step has. training: what else its training has.
    """

    def side(language: str) -> dict[str, Any]:
        vocabulary = str(pairs / f"vocabulary.{language}")
        return {"lang": language, "level": "word", "max_length": 128, "voc_file": vocabulary}

    model_dir = pairs / f"model-{time.monotonic_ns()}"
    config = {
        "name": "peer",
        "model_dir": str(model_dir),
        "use_cuda": False,
        "data": {
            **{part: str(pairs / part) for part in ("train", "dev", "test")},
            "dataset_type": "plain",
            "src": side("zh"),
            "trg": side("en"),
        },
        "testing": {
            "batch_size": 64,
            "batch_type": "sentence",
            "eval_metrics": ["bleu"],
            "beam_size": 5,
            "beam_alpha": 1.0,
            "max_output_length": 60,  # no translation is longer
        },
        "training": {
            "optimizer": "adamw",
            "learning_rate": 1e-3,
            "normalization": "tokens",
            "label_smoothing": 0.1,
            "clip_grad_norm": 1.0,
            "batch_size": batches[0],
            "batch_type": "sentence",
            "batch_multiplier": batches[1],
            "epochs": 1000,
            **training,
        },
        "model": model,
    }
    path = model_dir.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config))
    return path


def run(verb: str, config: Path, *words: object, way: str = ASLEEP, timeout: float | None = None) -> str:
    """What `python -m joeynmt VERB CONFIG` printed, run in one of WAYS; cut off after `timeout` seconds.

    Raises UserError with the end of it when it fails.
    """
    command = [str(python()), "-m", "joeynmt", verb, str(config), *map(str, words)]
    process = subprocess.Popen(
        command,
        cwd=config.parent,
        env=environment(**WAYS[way]),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        said, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.communicate()[0]
    if process.returncode:
        raise UserError(f"{' '.join(command)} failed:\n{said[-3000:]}")
    return said


def speed(
    data: Prepared, pairs: Path, model: Model, batches: tuple[int, int], steps: int, *, way: str = ASLEEP
) -> tuple[float, int]:
    """Trains for so many steps; returns the sentences a second behind the first quarter, and the model's parameters."""
    config = write_config(
        pairs,
        model,
        batches,
        scheduling="warmupinversesquareroot",
        learning_rate_warmup=150,
        updates=steps,
        logging_freq=steps // 4,
        validation_freq=steps // 4 * 10**6,
    )
    said = run("train", config, "--skip-test", way=way)
    speeds = [float(each) for each in re.findall(r"Tokens per Sec:\s+(\d+)", said)]
    parameters = re.search(r"Total params: (\d+)", said)
    if len(speeds) < 4 or parameters is None:
        raise UserError(f"JoeyNMT says nothing of its speed:\n{said[-3000:]}")
    # Tokens of the target, `<eos>` included. The intervals have as many steps each.
    target = data.part("train").target.lengths.mean() + 1
    return len(speeds[1:]) / sum(1 / speed for speed in speeds[1:]) / target, int(parameters[1])
