"""How fast sentence pairs are prepared, and how much memory all processes together hold at the most.

Two million made-up pairs (with --quick 40,000), of words that are as frequent as in a language and of which every tenth
shares a sentence with another, are simplified, split by groups and cut by sentencepiece, in two processes. Memory is
what /proc says of each process, shared pages divided among those that share them, mapped files included.
"""

from __future__ import annotations

import random
import resource
import subprocess
import sys
import tempfile
import time
from bisect import bisect
from collections.abc import Sequence
from contextlib import suppress
from itertools import accumulate
from pathlib import Path

from tests.bench.common import Figure, environment, read_arguments, report
from training.base.console import UserError, run_main
from training.base.files import read_json
from training.base.processes import family_of

WORDS, KEPT = 30_000, 5000  # words of each language; pairs whose sentences come again
LOOKS_PER_S = 4


def main(words: Sequence[str] | None = None) -> int:
    arguments = read_arguments("preparing", __doc__, words)
    pairs = arguments.sized(whole=2_000_000, quick=40_000, smoke=4000)
    with tempfile.TemporaryDirectory(prefix="relay-bench-") as folder:
        source, output = Path(folder, "pairs.tsv"), Path(folder, "prepared")
        write_pairs(source, pairs)
        size = source.stat().st_size
        options = ["--tokenizer", "sentencepiece", "--simplify", "--split", "grouped", "--workers", "2"]
        command = [sys.executable, "-m", "data_prep.pairs", "--source", str(source), "--output", str(output), *options]
        began, computed = time.monotonic(), processor_seconds()
        with Path(folder, "log").open("wb") as log:
            process = subprocess.Popen(command, env=environment(1), stdout=log, stderr=log)
            mapped, own = watch(process)
        seconds, computed = time.monotonic() - began, processor_seconds() - computed
        if process.returncode:
            raise UserError(Path(folder, "log").read_text("utf-8").strip().splitlines()[-1])
        rows = read_json(output / "meta.json")["rows"]
    report(
        "preparing",
        arguments,
        [
            Figure("pairs_per_s", pairs / seconds, "from the raw file to the prepared data"),
            Figure("minutes", seconds / 60, "for all of them", "8"),
            Figure("core_minutes", computed / 60, "of one core that computes: what a busy machine does not stretch"),
            Figure("peak_gb", mapped, "of all processes, mapped files included", "2"),
            Figure("peak_own_gb", own, "the same without the files"),
        ],
        pairs=pairs,
        megabytes=round(size / 1e6, 1),
        rows=rows,
    )
    return 0


def processor_seconds() -> float:
    """Of all processes that were waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def watch(process: subprocess.Popen[bytes]) -> tuple[float, float]:
    """Gigabytes that a process and all below it held at the most until its end: with mapped files, and without."""
    most, own = 0, 0
    while process.poll() is None:
        held = {"Pss": 0, "Pss_Anon": 0}
        for pid in family_of(process.pid):
            with suppress(OSError):
                for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                    name, _, value = line.partition(":")
                    if name in held:
                        held[name] += int(value.split()[0]) * 1024
        most, own = max(most, held["Pss"]), max(own, held["Pss_Anon"])
        time.sleep(1 / LOOKS_PER_S)
    return most / 1e9, own / 1e9


def write_pairs(path: Path, count: int) -> None:
    """A made-up text of English TAB Chinese, the same every time."""
    dice = random.Random(1)
    consonants, vowels = "bcdfghjklmnprstvwz", "aeiou"
    english = [
        "".join(dice.choice(consonants) + dice.choice(vowels) for _ in range(dice.randint(1, 4))) for _ in range(WORDS)
    ]
    characters = [chr(code) for code in range(0x4E00, 0x4E00 + 20_000, 5)]
    dice.shuffle(characters)
    common, traditional = characters[:1500], "們個這說時會學國來過對於還沒點樣發經問題開關"
    chinese = [
        "".join(dice.choice(common if dice.random() < 0.9 else characters) for _ in range(dice.choice((1, 2, 2, 2, 3))))
        for _ in range(WORDS)
    ]
    weights = list(accumulate(1 / (rank + 5) for rank in range(WORDS)))
    kept: list[tuple[str, str]] = []
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            drawn = [bisect(weights, dice.random() * weights[-1]) for _ in range(dice.randint(4, 24))]
            source = " ".join(english[word] for word in drawn).capitalize() + "."
            target = "".join(chinese[word] for word in drawn) + dice.choice(traditional) * (dice.random() < 0.3) + "。"
            if kept and dice.random() < 0.1:
                other = dice.choice(kept)
                source, target = (other[0], target) if dice.random() < 0.5 else (source, other[1])
            if len(kept) < KEPT:
                kept.append((source, target))
            file.write(f"{source}\t{target}\n")


if __name__ == "__main__":
    run_main(main)
