"""LoRA adapters on a 4-bit model as Relay trains them, and as a usual script does with `transformers.Trainer` and peft.

The same model (a random Qwen2 with Qwen2.5's vocabulary of 151,936, which is what makes the logits matter; for the
sample one of 32,768), in 4 bits by the same quantisation; the same adapters (all linear layers, rank 16, dropout 0.05),
AdamW, learning rate, clipping; the same records of DISC-Law-SFT, tokenised once; layers computed a second time in the
backward pass on both sides.

- The Trainer: a Dataset of ids and labels, -100 on the prompt; batches of 4, drawn at random and padded to the longest
  of each, with a mask; the model's own loss, from logits at all positions; two batches a step. It is spared reading
  text, logging and saving, and its loss is over tokens, not a mean of means, as only newer versions have it.
- Relay: plan, model and step of `training.qlora`, two micro-batches of up to 1,024 tokens a step.

Each is one process of two threads; Relay also runs as a user runs it, under torchrun with two ranks of one thread (not
with --quick). A sample counts as so many tokens as the mean record has, so the luck of the draw plays no part. Before
anything is timed, both must give the same loss for the same records and weights, to 1e-5 of it.

`memory_ratio` is of all tensors at the peak of a step: weights, adapters, optimizer, and what is computed. Both sides
compute the same four records at once, near the 95th percentile of length and nearly equally long, so that padding and
the size of a batch play no part. `activation_ratio`: without the weights.

A small model on a CPU is not Qwen2.5-3B on a card: the head is most of this one and a tenth of that one. So the
products with weights that either side does for a sample are counted too, for this model (`operations_ratio`) and for
the shape of Qwen2.5-3B (`operations_ratio_3b`); they say nothing about the speed at which they are done.

With a GPU: a random model of Qwen2.5-3B's true shape, in bf16, or fp16 below sm_80, micro-batches of up to 4,096
tokens, and --card_gb of the card. On either, `estimate_gb` is what training/models/memory_estimate.py says that Relay
needs, and `measured_gb` what it needed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from data_prep.disc_law_records import FILES
from tests.bench.common import (
    IGNORED,
    ROOT,
    SHARED,
    Arguments,
    Figure,
    Padded,
    Work,
    counting_trainer,
    environment,
    forked,
    held_bytes,
    peak_of_tensors,
    ratio_by_rounds,
    read_arguments,
    report,
    run_module,
    start_worker,
    timed_training,
    workers,
)
from tests.support.base_models import make_tokenizer
from tests.support.steps import run_micro_batches
from training.base.console import UserError, run_main, say
from training.base.options import parse
from training.data.conversations import Conversations, open_conversations
from training.engine.cluster import Cluster
from training.engine.metrics import memory_mb
from training.engine.optim import build_optimizer
from training.engine.parallel import DataParallel
from training.engine.precision import choose_precision
from training.models.adapted_model import lora_config
from training.models.base_model import linear_layers, on_meta, read_config
from training.models.memory_estimate import Shape, estimate
from training.qlora import COMPUTE_TYPES, Answers, QLoRAConfig, build_model, losses_of, plan_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig

RECORDS, TOKENIZER = SHARED / "disc-law-sft", SHARED / "qwen2.5-tokenizer"
VOCABULARY, SAMPLE_VOCABULARY = 151_936, 32_768
BATCH = 4

SMALL_SHAPE = {"hidden_size": 128, "intermediate_size": 704, "num_hidden_layers": 2, "num_attention_heads": 2}
CPU_SHAPE = {"hidden_size": 384, "intermediate_size": 2112, "num_hidden_layers": 8, "num_attention_heads": 6}
SHAPE_OF_3B = {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16}

ON_CARD = torch.cuda.is_available()
if not ON_CARD:
    # The Trainer loads DeepSpeed where it is installed, which then says on standard output that it finds no GPU.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


# --- data and model -------------------------------------------------------------------------------------------------


def sample_records(folder: Path) -> Path:
    """Question and answer records, a few judgements among them, as long as the real ones; and a tokenizer of them."""
    draw = random.Random(0)
    characters = [chr(0x4E00 + number) for number in range(300)]
    lines = []
    for number in range(600):
        middle, spread = (500, 0.33) if number % 15 == 0 else (180, 0.37)
        length = min(900, round(middle * draw.lognormvariate(0, spread)))
        text = "".join(draw.choices(characters, k=length))
        question, answer = text[: length * 2 // 5], text[length * 2 // 5 :]
        lines.append({"id": f"legal_question_answering_{number}", "input": question, "output": answer})
    folder.mkdir()
    (pair_qa,) = (file for file in FILES if file.stem.endswith("Pair-QA-released"))
    written = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (folder / f"{pair_qa.stem}.sample.jsonl").write_text(written, encoding="utf-8")
    make_tokenizer(folder / "tokenizer", [line["output"] for line in lines], vocabulary_size=1000)
    return folder


def sentences_of(folder: Path) -> list[str]:
    """Every sentence of the questions and answers in a folder of DISC-Law-SFT, once, in a fixed order."""
    records = [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]
    return sorted({part for each in records for part in re.findall(r"[^。]+。?", each["input"] + each["output"])})


def drawn_text(dice: random.Random, sentences: Sequence[str], length: int) -> str:
    """So many characters of sentences drawn one after the other."""
    drawn = ""
    while len(drawn) < length:
        drawn += dice.choice(sentences)
    return drawn[:length]


def prepare_records(arguments: Arguments, folder: Path) -> Conversations:
    """The records, tokenised by Qwen2.5's tokenizer; the sample's by its own."""
    if arguments.data == "sample":
        source = sample_records(folder / "records")
        tokenizer = source / "tokenizer"
    else:
        source, tokenizer = Path(arguments.data), TOKENIZER
        if not tokenizer.is_dir():
            raise UserError(f"there is no tokenizer in {tokenizer} (RELAY_DATA names the folder above): --data sample")
    workers = 1 if arguments.quick else 2
    words = ["--source", source, "--tokenizer", tokenizer, "--output", folder / "data", "--workers", workers]
    run_module("data_prep.disc_law", *words, here=arguments.quick)
    return open_conversations(folder / "data")


def config_of(shape: dict[str, int], vocabulary_size: int, **more: int | None) -> PretrainedConfig:
    """Qwen2.5-3B's config, of another shape perhaps."""
    import transformers

    usual = {"num_key_value_heads": 2, "tie_word_embeddings": True}
    return transformers.Qwen2Config(vocab_size=vocabulary_size, **(usual | shape), **more)


def make_base(folder: Path, data: Conversations, shape: dict[str, int], vocabulary_size: int) -> Path:
    """A random model of Qwen2.5's structure as people have it on disk, its tokenizer beside it."""
    import transformers

    shutil.copytree(data.folder / "tokenizer", folder)
    about = data.meta["tokenizer"]
    ids = {"pad_token_id": about["pad_id"], "eos_token_id": about["end_id"], "bos_token_id": None}
    config = config_of(shape, vocabulary_size, **ids)
    torch.manual_seed(0)
    with torch.device("cuda" if ON_CARD else "cpu"):
        # In the type in which Qwen2.5 is published where it is large; a CPU computes in fp32.
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if ON_CARD else None)
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    return folder


def recipe(data: Path, base: Path) -> list[object]:
    """The options of `training.qlora`; the Trainer is given the same."""
    return [
        *("--data", data, "--base_model", base, "--lora.rank", 16, "--lora.alpha", 32),
        *("--batch.tokens_per_micro_batch", 4096 if ON_CARD else 1024, "--batch.micro_batches_per_step", 2),
        *("--optim.lr", 2e-4, "--optim.weight_decay", 0.0, "--optim.schedule", "constant"),
        *("--optim.warmup_steps", 0, "--optim.steps", 1_000_000),
    ]


# --- the two sides --------------------------------------------------------------------------------------------------


class Relay:
    """The training of `training.qlora`, a step at a time."""

    def __init__(self, data: Conversations, base: Path):
        self.config, _ = parse(
            QLoRAConfig, [*map(str, recipe(data.folder, base)), "--run_dir", "unused"], prog="qlora", about=""
        )
        self.cluster = Cluster()
        self.answers = Answers(data.part("train"), data.meta["tokenizer"]["pad_id"])
        self.plan = plan_of(self.config, self.answers)
        precision = choose_precision("auto", self.cluster.device)
        self.compute_type = COMPUTE_TYPES[precision.name]
        torch.manual_seed(self.config.seed)
        self.model = build_model(self.config, base, self.compute_type, self.cluster.device)
        optimizer = build_optimizer(self.model, self.config.optim, self.plan.steps)
        self.engine = DataParallel(self.model, optimizer, self.cluster, precision, self.config.optim.clip_norm)
        self.step = 0

    def train(self, steps: float) -> float:
        """Trains for so many steps; samples a second."""
        tokens, began = 0, time.monotonic()
        for _ in range(int(steps)):
            batches = [batch.samples for batch in self.plan.micro_batches_of(self.step, 0, 1)]
            self.train_on(batches, self.plan.weight(self.step))
            tokens += sum(int(self.answers.lengths[batch].sum()) for batch in batches)
            self.step += 1
        return tokens / self.answers.lengths.mean() / (time.monotonic() - began)

    def train_on(self, batches: list[np.ndarray], weight: float) -> None:
        """A step on these micro-batches."""

        def loss(model: nn.Module, samples: np.ndarray) -> Tensor:
            return losses_of(model, self.answers, samples, self.cluster.device)[0].sum()

        total = run_micro_batches(self.engine, self.cluster, batches, weight, loss)
        self.engine.step(self.config.optim.lr)
        total.item()

    def train_on_samples(self, samples: np.ndarray) -> None:
        """Two steps on these as one micro-batch."""
        for _ in range(2):
            self.train_on([samples], float(self.answers.answer_tokens[samples].sum()))

    def estimate(self, base: Path, samples: np.ndarray) -> float:
        """What training/models/memory_estimate.py says that this takes, in bytes."""
        lengths, tokens = self.answers.lengths[samples], self.answers.answer_tokens[samples]
        return estimate(
            read_config(base, self.config.quantisation),
            self.config.quantisation,
            self.config.lora,
            Shape(len(samples), int(lengths.max()), int(tokens.sum())),
            compute_type=self.compute_type,
            optimizer=self.config.optim.kind,
            checkpoint_layers=self.config.memory.checkpoint_layers,
            logits_tokens=self.config.memory.logits_tokens,
            device_type=self.cluster.device.type,
        ).tensors


class Records(torch.utils.data.Dataset):
    """What a usual script makes of the records: ids, and labels that are IGNORED on the prompt."""

    def __init__(self, data: Conversations, samples: np.ndarray | None = None):
        self.part = data.part("train")
        self.samples = np.arange(len(self.part)) if samples is None else samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sample = int(self.samples[index])
        ids = torch.from_numpy(self.part.ids[sample].astype(np.int64))
        labels = ids.clone()
        labels[: int(self.part.prompt_lengths[sample])] = IGNORED
        return {"input_ids": ids, "labels": labels}


class Usual:
    """`transformers.Trainer` with peft and bitsandbytes, as their documentation puts them together."""

    def __init__(self, data: Conversations, base: Path):
        import peft
        import transformers

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self.data = data
        self.config, _ = parse(
            QLoRAConfig, [*map(str, recipe(data.folder, base)), "--run_dir", "unused"], prog="qlora", about=""
        )
        device = torch.device("cuda", 0) if ON_CARD else torch.device("cpu")
        self.precision = choose_precision("auto", device)
        compute_type = COMPUTE_TYPES[self.precision.name]
        model = transformers.AutoModelForCausalLM.from_pretrained(
            base,
            dtype=compute_type,
            device_map={"": str(device)},
            quantization_config=transformers.BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=self.config.quantisation.double,
                bnb_4bit_compute_dtype=compute_type,
            ),
        )
        model = peft.prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}
        )
        model.config.use_cache = False
        torch.manual_seed(self.config.seed)
        self.model = peft.get_peft_model(model, lora_config(self.config.lora))
        self.lengths = data.part("train").ids.lengths
        self.asked = 0

    def trainer(self, folder: str, steps: int, accumulated: int, records: Records) -> Any:
        """A Trainer over `records` that takes so many steps of `accumulated` batches."""
        optim = self.config.optim
        return counting_trainer(
            folder,
            self.model,
            records,
            self.data.meta["tokenizer"]["pad_id"],
            per_device_train_batch_size=BATCH,
            gradient_accumulation_steps=accumulated,
            max_steps=steps,
            learning_rate=optim.lr,
            adam_beta1=optim.beta1,
            adam_beta2=optim.beta2,
            weight_decay=optim.weight_decay,
            max_grad_norm=optim.clip_norm,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            bf16=self.precision.name == "bf16",
            fp16=self.precision.name == "fp16",
            use_cpu=not ON_CARD,
            seed=self.asked,  # another order of the data each time
        )

    def train(self, steps: float) -> float:
        """Trains for so many steps of two batches; samples a second, from when the first begins."""
        self.asked += 1
        with tempfile.TemporaryDirectory() as folder:
            trainer = self.trainer(folder, int(steps), 2, Records(self.data))
            trainer.train()
            return int(trainer.tokens) / self.lengths.mean() / (time.monotonic() - trainer.began)

    def train_on_samples(self, samples: np.ndarray) -> None:
        """Two steps on these as one batch."""
        with tempfile.TemporaryDirectory() as folder:
            self.trainer(folder, 2, 1, Records(self.data, samples)).train()


SIDES: dict[str, type[Relay] | type[Usual]] = {"relay": Relay, "trainer": Usual}


def long_samples(answers: Answers) -> np.ndarray:
    """BATCH samples around the 95th percentile of length, nearly equally long."""
    order = np.argsort(answers.lengths, kind="stable")
    start = min(int(0.95 * len(order)), len(order) - BATCH)
    return order[start : start + BATCH]


# --- what is measured -----------------------------------------------------------------------------------------------


def check_losses(data: Conversations, base: Path) -> float:
    """How far the two losses of a step of eight records lie apart, relatively. Raises UserError above 1e-5.

    Two batches of 4, without dropout. Adapters change nothing before the first step, so both sides get others first.
    """
    relay, usual = Relay(data, base), Usual(data, base)
    for model in (relay.model, usual.model):
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.02)
        model.eval()
        for module in model.modules():  # see load_base_model
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    lengths = relay.answers.lengths
    batches = np.split(np.random.default_rng(0).choice(len(lengths), 2 * BATCH, replace=False), 2)
    scored = int(relay.answers.answer_tokens[np.concatenate(batches)].sum())
    collate = Padded(data.meta["tokenizer"]["pad_id"])
    ours = theirs = 0.0
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        trainer = usual.trainer(folder, 1, 2, Records(data))
        for batch in batches:
            ours += losses_of(relay.model, relay.answers, batch, torch.device("cpu"))[0].sum().item() / scored
            rows = Records(data, batch)
            inputs = collate([rows[number] for number in range(BATCH)])
            theirs += trainer.compute_loss(usual.model, inputs, num_items_in_batch=torch.tensor(scored)).item()
    if not abs(ours - theirs) <= 1e-5 * theirs:
        raise UserError(f"the two sides do not train the same: loss {ours:.7f} (Relay) and {theirs:.7f} (Trainer)")
    return abs(ours - theirs) / theirs


def measure_memory(side: str, data: Conversations, base: Path, card_gb: float | None) -> dict[str, float]:
    """Bytes of all tensors at the peak of a step, and of what was there before; the process's peak memory in MB."""
    if ON_CARD and card_gb:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, card_gb * 1e9 / total))
    trained = SIDES[side](data, base)
    samples = long_samples(Answers(data.part("train"), data.meta["tokenizer"]["pad_id"]))
    if ON_CARD:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        held = float(torch.cuda.memory_allocated())
        trained.train_on_samples(samples)
        peak = float(torch.cuda.max_memory_allocated())
    else:
        held = held_bytes(trained.model)
        peak = held + peak_of_tensors(lambda: trained.train_on_samples(samples))
    found = {"held": held, "peak": peak, "process_mb": memory_mb(torch.device("cpu"))}
    return found | ({"estimate": trained.estimate(base, samples)} if isinstance(trained, Relay) else {})


def batches_of_usual(lengths: np.ndarray) -> float:
    """Share of the positions of random batches of BATCH that is padding."""
    draw, real, computed = np.random.default_rng(0), 0, 0
    for _ in range(20):
        order = draw.permutation(lengths)[: len(lengths) // BATCH * BATCH].reshape(-1, BATCH)
        real, computed = real + int(order.sum()), computed + int(order.max(axis=1).sum()) * BATCH
    return 1 - real / computed


def operations_ratio(config: PretrainedConfig, answers: Answers, padding: float, usual_padding: float) -> float:
    """Products with weights per sample, the Trainer's over Relay's.

    A layer's are done forward, forward again, and backward for what it reads; the head's forward and backward.
    """
    model = on_meta(config)
    layers = sum(layer.weight.numel() for layer in linear_layers(model))
    head = model.get_output_embeddings().weight.numel()
    ours = 3 * layers * answers.lengths.mean() / (1 - padding) + 2 * head * answers.answer_tokens.mean()
    theirs = (3 * layers + 2 * head) * (answers.lengths.mean() + 1) / (1 - usual_padding)
    return float(theirs / ours)


# What a side's process sees: a GPU, where there is one.
DEVICES = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]} if ON_CARD else {}


def ask_process(arguments: Arguments, *words: object, on_cpu: bool = False) -> Any:
    """What `python -m tests.bench.qlora words...` prints on its last line, as JSON: see `result_of`.

    What needs nothing but a CPU is done in this process: to start another takes longer. With --smoke so is the rest;
    with --quick a process is forked from this one where there is no GPU.
    """
    if (on_cpu and not ON_CARD) or (arguments.smoke and not on_cpu):
        return result_of(list(map(str, words)))
    if arguments.quick and not ON_CARD:
        return forked(partial(result_of, list(map(str, words))), threads=2)
    command = [sys.executable, "-m", "tests.bench.qlora", *map(str, words)]
    surroundings = environment(2, **({} if on_cpu else DEVICES))
    done = subprocess.run(command, cwd=ROOT, env=surroundings, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(command)} failed:\n{done.stdout[-1000:]}{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def result_of(words: list[str]) -> Any:
    """Of `check` or `memory SIDE`, then the data's and the model's folder, and `-- CARD_GB` perhaps."""
    what, *side, data, base = words[: words.index("--")] if "--" in words else words
    with warnings.catch_warnings():
        ignore_old_names()
        if what == "check":
            return check_losses(open_conversations(data), Path(base))
        card_gb = float(words[-1]) if "--" in words else None
        return measure_memory(side[0], open_conversations(data), Path(base), card_gb)


def speed(side: str, data: str, base: str) -> Work:
    """A side's work: asked for a number of steps, it answers with the samples a second."""
    ignore_old_names()
    return SIDES[side](open_conversations(data), Path(base)).train


def ignore_old_names() -> None:
    """No warnings of old names of options, under which most scripts know them."""
    warnings.filterwarnings("ignore", category=FutureWarning)


def add_card(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--card_gb", type=float, metavar="GB", help="of the GPU, how much the sides may use")


def main(words: Sequence[str] | None = None) -> int:
    if words is None and sys.argv[1:2] and sys.argv[1] in ("check", "memory"):
        print(json.dumps(result_of(sys.argv[1:])))
        return 0
    arguments = read_arguments("qlora", __doc__, words, add_card, data=RECORDS, what="folder of DISC-Law-SFT")
    rounds, steps, shape = arguments.sized(
        whole=(3, 3, CPU_SHAPE), quick=(1, 1, SMALL_SHAPE), smoke=(1, 1, SMALL_SHAPE)
    )
    if ON_CARD:
        rounds, steps, shape = arguments.sized(
            whole=(3, 40, SHAPE_OF_3B), quick=(1, 10, SHAPE_OF_3B), smoke=(1, 1, SMALL_SHAPE)
        )
    card_gb = arguments.more.card_gb
    with tempfile.TemporaryDirectory(prefix="relay-bench-") as temporary:
        folder = Path(temporary)
        say(f"preparing {arguments.about_data}")
        data = prepare_records(arguments, folder)
        vocabulary_size = SAMPLE_VOCABULARY if arguments.data == "sample" else VOCABULARY
        base = make_base(folder / "base", data, shape, vocabulary_size)
        small_base = make_base(folder / "small", data, SMALL_SHAPE, vocabulary_size) if ON_CARD else base
        more = ["--", card_gb] if card_gb else []
        ask = partial(ask_process, arguments)
        asked = [partial(ask, "memory", side, data.folder, base, *more) for side in SIDES]
        asked.append(partial(ask, "check", data.folder, small_base, on_cpu=True))
        # Nothing here is timed, but a card is each side's alone, and so is a process that is forked from.
        with ThreadPoolExecutor(3) as pool:
            together = map if ON_CARD or arguments.quick else pool.map
            *measured, difference = together(lambda question: question(), asked)
        say(f"the same loss on both sides, difference {difference:.1e}")
        memory = dict(zip(SIDES, measured, strict=True))

        speeds: dict[str, list[float]] = {"relay": [], "trainer": [], "two_ranks": []}
        start, how = partial(start_worker, arguments, "tests.bench.qlora", "speed"), {"threads": 2, **DEVICES}
        started = {side: start(side, data.folder, base, **how) for side in SIDES}
        answers = Answers(data.part("train"), data.meta["tokenizer"]["pad_id"])
        with workers(**started):
            for side in SIDES:  # the first piece of work also sets things up
                started[side].ask(1)
                started[side].answer()
            for number in range(rounds):
                for side in SIDES:
                    started[side].ask(steps)
                    speeds[side].append(started[side].answer())
                if not arguments.quick and not ON_CARD:
                    run_dir, options = folder / f"run-{number}", recipe(data.folder, base)[4:-4]
                    how = {"steps": 2 * steps, "ranks": 2, "threads": 1}
                    speed = timed_training("qlora", ["--base_model", base, *options], data, run_dir, **how)
                    speeds["two_ranks"].append(speed.tokens_per_s / float(answers.lengths.mean()))
                about = ", ".join(f"{side} {values[-1]:.4g}" for side, values in speeds.items() if values)
                say(f"round {number + 1} of {rounds}: {about} samples a second")

        ours, theirs = memory["relay"], memory["trainer"]
        config, _ = parse(
            QLoRAConfig, [*map(str, recipe(data.folder, base)), "--run_dir", "unused"], prog="qlora", about=""
        )
        padding, usual_padding = plan_of(config, answers).padding_share(), batches_of_usual(answers.lengths + 1)
        shapes = read_config(base, config.quantisation), config_of(SHAPE_OF_3B, VOCABULARY)
        ratios = [operations_ratio(each, answers, padding, usual_padding) for each in shapes]
        activations = (ours["peak"] - ours["held"]) / (theirs["peak"] - theirs["held"])
        figures = [
            Figure("samples_ratio", ratio_by_rounds(speeds["relay"], speeds["trainer"]), "Relay / Trainer", ">= 1.5"),
            Figure("relay_samples_per_s", median(speeds["relay"]), "1 process x 2 threads"),
            Figure("trainer_samples_per_s", median(speeds["trainer"]), f"1 process x 2 threads, batches of {BATCH}"),
            Figure("memory_ratio", ours["peak"] / theirs["peak"], "all tensors at the peak, Relay / Trainer", "< 0.7"),
            Figure("relay_memory_mb", ours["peak"] / 1e6, "weights and everything, the same four records"),
            Figure("trainer_memory_mb", theirs["peak"] / 1e6, "likewise"),
            Figure("activation_ratio", activations, "what a step adds to the weights, Relay / Trainer"),
            Figure("weights_mb", ours["held"] / 1e6, "base model and adapters, Relay"),
            Figure("relay_process_mb", ours["process_mb"], "peak resident memory of the process, libraries included"),
            Figure("trainer_process_mb", theirs["process_mb"], "likewise"),
            Figure("padding_share", padding, "of the positions Relay computes in an epoch", "< 0.03"),
            Figure("trainer_padding_share", usual_padding, "of those of the Trainer"),
            Figure("operations_ratio", ratios[0], "products with weights a sample, Trainer / Relay, this model"),
            Figure("operations_ratio_3b", ratios[1], "likewise with the shape of Qwen2.5-3B"),
            Figure("loss_difference", difference, "relative, same records and weights", "<= 1e-5"),
            Figure(
                "estimate_gb", ours["estimate"] / 1e9, "what Relay would need by training/models/memory_estimate.py"
            ),
            Figure("measured_gb", ours["peak"] / 1e9, "what it needed"),
            Figure("estimate_error", ours["estimate"] / ours["peak"] - 1, "estimated / measured - 1", "within 0.1"),
        ]
        if speeds["two_ranks"]:
            ratio = ratio_by_rounds(speeds["two_ranks"], speeds["trainer"])
            figures.insert(1, Figure("two_ranks_ratio", ratio, "Relay by torchrun, 2 ranks x 1 thread, over the same"))
        report("qlora", arguments, figures, device=torch.cuda.get_device_name() if ON_CARD else "cpu")
    return 0


if __name__ == "__main__":
    run_main(main)
