"""Translations after the same minutes of training on two cores: Relay's against JoeyNMT's, scored on the test part.

Relay trains by configs/seq2seq/base.yaml, as `torchrun --nproc-per-node=2`. Then JoeyNMT's Transformer, of as many
parameters as configs/gpt/plain.yaml has, trains on the same pieces for the minutes that this took; start, validations
and saving are counted on both sides. Its recipe is that of its own config for IWSLT'14 (label smoothing 0.1, AdamW)
but for what so few minutes ask for: dropout 0.1 instead of 0.3 (--peer_dropout), batches of 64 sentences, hence more
steps, and a learning rate that rises to 1e-3 and falls with the inverse square root of the step, instead of waiting for
plateaus. It is one process, with one thread or two, whichever is faster here. Validation picks the checkpoint on both
sides; JoeyNMT's is short, since it translates in each. Both decode with a beam of 5 and a length penalty of 1, and the
same code scores what came out.

`bleu_difference` is Relay's BLEU less JoeyNMT's; p by paired bootstrap. Takes an hour. --smoke is the same as
--quick here.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from tests.bench import joeynmt
from tests.bench.common import (
    ASLEEP,
    PLAIN,
    SEQ2SEQ,
    SEQ2SEQ_DATA,
    WAYS,
    Arguments,
    Figure,
    config_of,
    read_arguments,
    report,
    run_module,
)
from training.base.console import UserError, run_main, say
from training.data.languages import language_of
from training.data.prepared import Prepared, open_prepared
from training.data.translation_metrics import bleu_of
from training.evaluation.bootstrap import paired
from training.evaluation.translations.scores import score_of, sentence_counts
from training.models.gpt import GPTOptions

# Steps and warm-up of --quick: enough to see that everything runs.
QUICK = ("--optim.steps", 24, "--optim.warmup_steps", 4, "--log.validate_every_steps", 12)

TARGETS = {("zh-en", "random"): ">= 32", ("zh-en", "grouped"): ">= 26"}  # BLEU

# JoeyNMT translates in each validation, which takes it minutes for all of the part.
VALIDATIONS, DEV = 10, 200


def relay(data: Prepared, run_dir: Path, *words: object) -> tuple[list[str], float]:
    """Trains and translates the test part; returns the translations, and the seconds that the training took."""
    began = time.monotonic()
    run_module("training.seq2seq", SEQ2SEQ, "--data", data.folder, "--run_dir", run_dir, *words, ranks=2)
    took = time.monotonic() - began
    run_module("training.evaluation.evaluate", run_dir, "--beam_size", 5, ranks=2)
    lines = (run_dir / "evaluation/test-beam5-translations.jsonl").read_text().splitlines()
    return [json.loads(line)["translation"] for line in lines], took


def peer(data: Prepared, pairs: Path, options: GPTOptions, dropout: float, seconds: float, *, quick: bool) -> list[str]:
    """JoeyNMT's translations of the test part, from what it learned in `seconds`."""
    joeynmt.write_pairs(data, pairs, dev=16 if quick else DEV, test=16 if quick else None)
    model = joeynmt.transformer(options.model_copy(update={"dropout": dropout}), data)
    batches = (64, 1)
    speeds = {
        way: joeynmt.speed(data, pairs, model, batches, 4 if quick else 64, way=way)[0]
        for way in ([ASLEEP] if quick else WAYS)
    }
    way = max(speeds, key=speeds.__getitem__)
    say("JoeyNMT, sentences a second: " + ", ".join(f"{speed:,.4g} ({way})" for way, speed in speeds.items()))
    every = 4 if quick else max(1, int(seconds * speeds[way] / batches[0] / VALIDATIONS))
    config = joeynmt.write_config(
        pairs,
        model,
        batches,
        scheduling="warmupinversesquareroot",
        learning_rate_warmup=4 if quick else 400,
        updates=12 if quick else 10**9,  # until its time is over
        logging_freq=every,  # it validates at multiples of this only
        validation_freq=every,
        early_stopping_metric="bleu",
    )
    joeynmt.run("train", config, "--skip-test", way=way, timeout=None if quick else seconds)
    joeynmt.run("test", config, "--output-path", pairs / "translations", way=way)
    tokenizer = data.target_tokenizer
    lines = (pairs / "translations.test").read_text().splitlines()
    return [tokenizer.decode([int(word) for word in line.split() if word.isdigit()]) for line in lines]


def add_more(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--split", choices=("random", "grouped"), default="grouped", help="default: %(default)s")
    parser.add_argument("--direction", choices=("zh-en", "en-zh"), default="zh-en", help="default: %(default)s")
    parser.add_argument("--peer_dropout", type=float, default=0.1, metavar="X", help="default: %(default)s")
    parser.add_argument("--keep", metavar="FOLDER", type=Path, help="a new folder for the data and both trainings")


def main(words: Sequence[str] | None = None) -> int:
    arguments = read_arguments("quality", __doc__, words, add_more)
    if (keep := arguments.more.keep) is not None:
        if keep.exists():
            raise UserError(f"--keep {keep} is there already: name a new folder")
        keep.mkdir(parents=True)
        measure(arguments, keep.absolute())
        return 0
    with tempfile.TemporaryDirectory(prefix="relay-bench-") as temporary:
        measure(arguments, Path(temporary))
    return 0


def measure(arguments: Arguments, folder: Path) -> None:
    say(f"preparing {arguments.about_data}")
    split, direction = arguments.more.split, arguments.more.direction
    source, target = direction.split("-")
    words = ("--source", arguments.data, "--output", folder / "data", "--split", split)
    words += ("--source_language", source, "--target_language", target)
    run_module("data_prep.pairs", *words, *SEQ2SEQ_DATA)
    data = open_prepared(folder / "data")
    ours, seconds = relay(data, folder / "run", *(QUICK if arguments.quick else ()))
    say(f"Relay trained for {seconds / 60:.1f} minutes")
    options = config_of("gpt", [PLAIN], data).model
    theirs = peer(data, folder / "pairs", options, arguments.more.peer_dropout, seconds, quick=arguments.quick)
    references = [[text] for text in data.part("test").target_texts][: len(theirs)]
    bleu = bleu_of(language_of(target))
    counts = [sentence_counts(bleu, texts[: len(theirs)], references) for texts in (theirs, ours)]
    test = paired(partial(score_of, bleu), *counts)
    about = f"{len(references):,} sentences, {direction}, {split} split, after {seconds / 60:.1f} minutes"
    figures = [
        Figure("bleu", test.scores[1], f"Relay, {about}", TARGETS.get((direction, split), "")),
        Figure("joeynmt_bleu", test.scores[0], f"JoeyNMT, {about}"),
        Figure("bleu_difference", test.difference, f"p = {test.p:.3f}", "> 0"),
        Figure("minutes", seconds / 60, "of training, on either side"),
    ]
    report("quality", arguments, figures, direction=direction, split=split, p=test.p)


if __name__ == "__main__":
    run_main(main)
