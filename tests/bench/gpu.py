"""What the configs come to on a GPU: tokens a second, share of the card's peak, memory, and what a save costs.

Each row trains a config as users start it, in one process, for a few steps, and reads the run's own record. The share
is of what a plain matrix product reaches in the run's own number format on this card, and counts the operations of the
model, not those that checkpointed layers do a second time. The chat models have the true shapes of Qwen2.5 and random
weights, in 4 bits. Rows `as T4` run in 15 GB, in fp16 and with no kernel that a T4 lacks: they show that a config fits
and holds, not how fast a T4 is.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tests.bench.common import (
    PLAIN,
    PLAIN_DATA,
    ROOT,
    SEQ2SEQ,
    SEQ2SEQ_DATA,
    Figure,
    config_of,
    prepare,
    read_arguments,
    report,
    timed_training,
)
from tests.bench.qlora import DEVICES, RECORDS, SHAPE_OF_3B, VOCABULARY, make_base, prepare_records
from training.base.console import UserError, run_main, say
from training.engine.precision import choose_precision
from training.engine.status import read_sessions

SHAPE_OF_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}
SHAPES = {"3b": SHAPE_OF_3B, "7b": SHAPE_OF_7B}
MATRIX_WIDTH = 8192


@dataclass(frozen=True)
class Row:
    """A training. batch: tokens of a micro-batch, micro-batches of a step; None: as the config has it."""

    config: Path
    steps: int
    batch: tuple[int, int] | None = None
    as_t4: bool = False

    @property
    def name(self) -> str:
        words = [f"{self.config.parent.name}/{self.config.stem}"]
        words += ["{1} x {0:,}".format(*self.batch)] if self.batch else []
        return ", ".join([*words, "as T4"] if self.as_t4 else words)

    @property
    def words(self) -> list[object]:
        batch = ("--batch.tokens_per_micro_batch", "--batch.micro_batches_per_step")
        return [self.config, *(word for pair in zip(batch, self.batch or (), strict=False) for word in pair)]


CONFIGS = ROOT / "configs"
ROWS = (
    Row(PLAIN, 400),
    Row(PLAIN, 200, batch=(16384, 1)),
    Row(CONFIGS / "gpt/t4x2.yaml", 200, as_t4=True),
    Row(SEQ2SEQ, 200),
    Row(CONFIGS / "seq2seq/t4x2.yaml", 80, as_t4=True),
    Row(CONFIGS / "qlora/qwen2.5-3b-h100.yaml", 8),
    Row(CONFIGS / "qlora/qwen2.5-3b-t4x2.yaml", 8, batch=(4096, 2), as_t4=True),
    Row(CONFIGS / "qlora/qwen2.5-7b-t4x2.yaml", 8, batch=(2048, 4), as_t4=True),
)


def peak_flops(dtype: torch.dtype) -> float:
    """Operations a second of a plain product of two square matrices."""
    a, b = (torch.randn(MATRIX_WIDTH, MATRIX_WIDTH, device="cuda").to(dtype) for _ in range(2))
    best = 0.0
    for _ in range(5):
        torch.cuda.synchronize()
        began = time.monotonic()
        for _ in range(10):
            torch.mm(a, b)
        torch.cuda.synchronize()
        best = max(best, 10 * 2 * MATRIX_WIDTH**3 / (time.monotonic() - began))
    return best


def add_only(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", metavar="TEXT", default="", help="the rows with this in their name, such as 7b")


def main(words: Sequence[str] | None = None) -> int:
    arguments = read_arguments("gpu", __doc__, words, add_only)
    chosen = [row for row in ROWS if arguments.more.only in row.name]
    if not chosen:
        raise UserError(f"no row has `{arguments.more.only}` in its name; they are " + "; ".join(r.name for r in ROWS))
    if not torch.cuda.is_available():
        raise UserError("there is no GPU here to measure")
    peaks = {"bf16": peak_flops(torch.bfloat16), "fp16": peak_flops(torch.float16)}
    card = torch.cuda.get_device_name()
    say(f"{card}: bf16 {peaks['bf16'] / 1e12:,.0f}, fp16 {peaks['fp16'] / 1e12:,.0f} TFLOP/s")
    figures, rows, bases = [], [], {}
    with tempfile.TemporaryDirectory(prefix="relay-bench-") as temporary:
        folder = Path(temporary)
        records = replace(arguments, data=str(RECORDS) if RECORDS.is_dir() else "sample")
        with ThreadPoolExecutor(2) as pool:
            joint = pool.submit(prepare, arguments, folder / "joint", *PLAIN_DATA)
            separate = pool.submit(prepare, arguments, folder / "separate", *SEQ2SEQ_DATA)
            conversations = prepare_records(records, folder)
            pairs = {"gpt": joint.result(), "seq2seq": separate.result()}
        for number, row in enumerate(chosen):
            family, options = row.config.parent.name, row.words
            if family == "qlora":
                size = row.config.stem.split("-")[1]
                if size not in bases:  # one at a time has room
                    for other in bases.values():
                        shutil.rmtree(other)
                    bases = {size: make_base(folder / size, conversations, SHAPES[size], VOCABULARY)}
                    torch.cuda.empty_cache()
                options += ["--base_model", bases[size]]
            data, run_dir = pairs.get(family, conversations), folder / f"run-{number}"
            steps = arguments.sized(whole=row.steps, quick=max(8, row.steps // 4), smoke=2)
            under = "tests.bench.as_t4" if row.as_t4 else None
            speed = timed_training(
                family, options, data, run_dir, steps=steps, ranks=1, threads=1, under=under, **DEVICES
            )
            asked = config_of(family, options, data).precision
            precision = "fp16" if row.as_t4 else choose_precision(asked, torch.device("cuda")).name
            share = speed.flops_per_s / peaks[precision]
            stall_s = read_sessions(run_dir)[-1]["stall_s"]
            memory_gb = speed.memory_mb / 1e3
            about = f"tokens/s; {share:.2%} of the peak, {memory_gb:.2f} GB, a save stalls {stall_s:.3f} s"
            figures.append(Figure(row.name, speed.tokens_per_s, about))
            say(f"{row.name}: {speed.tokens_per_s:,.0f} {about}")
            rows.append({"row": row.name, "peak_share": share, "memory_gb": memory_gb, "stall_s": stall_s})
        report("gpu", arguments, figures, device=card, peaks=peaks, rows=rows)
    return 0


if __name__ == "__main__":
    run_main(main)
