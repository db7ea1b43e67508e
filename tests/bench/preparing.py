"""How fast pairs and records are prepared, and how much memory all processes together hold at the most.

- Two million made-up sentence pairs, of words that are as frequent as in a language and of which every tenth shares a
  sentence with another, are simplified, split by groups and cut by sentencepiece.
- 285,781 made-up records, as many and as long as DISC-Law-SFT's, of sentences of its sample, are tokenised by Qwen2.5's
  tokenizer; with --data sample of made-up characters, by a small one.

Each by two processes; --quick takes a fiftieth. Memory is what /proc says of each process, shared pages divided among
those that share them, mapped files included. `core_minutes` is what a busy machine does not stretch.
"""

from __future__ import annotations

import json
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
from typing import NamedTuple

from data_prep.disc_law_records import FILES
from tests.bench.common import PLAIN_DATA, Arguments, Figure, environment, read_arguments, report
from tests.bench.qlora import RECORDS, TOKENIZER, drawn_text, sample_records, sentences_of
from training.base.console import UserError, run_main
from training.base.files import read_json
from training.base.processes import family_of

PAIRS, QUICK = 2_000_000, 50  # as many; --quick takes a part of all
ROWS = (166_758, 79_692, 23_331, 16_000)  # of the published files, in the order of `FILES`
WORDS, KEPT = 30_000, 5000  # words of each language; pairs whose sentences come again
LOOKS_PER_S = 4


class Measured(NamedTuple):
    """What a preparation took."""

    minutes: float
    core_minutes: float  # of one core that computes
    peak_gb: float  # of all processes, mapped files included
    peak_own_gb: float  # the same without the files
    rows: dict[str, int]  # by part


def main(words: Sequence[str] | None = None) -> int:
    arguments = read_arguments("preparing", __doc__, words, data=RECORDS, what="folder with records of DISC-Law-SFT")
    share = arguments.sized(whole=1, quick=QUICK)
    with tempfile.TemporaryDirectory(prefix="relay-bench-") as temporary:
        folder = Path(temporary)
        write_pairs(folder / "pairs.tsv", PAIRS // share)
        options = [*PLAIN_DATA, "--split", "grouped"]
        pairs = measure(folder, "data_prep.pairs", folder / "pairs.tsv", *options)
        tokenizer = write_records(folder / "records", arguments, share)
        records = measure(folder, "data_prep.disc_law", folder / "records", "--tokenizer", tokenizer)
    figures = []
    for what, made, minutes in (("pairs", pairs, "8"), ("records", records, "15")):
        count = sum(made.rows.values())
        figures += [
            Figure(f"{what}_minutes", made.minutes, f"for {count:,} that were kept", minutes),
            Figure(f"{what}_core_minutes", made.core_minutes, "of one core that computes"),
            Figure(f"{what}_peak_gb", made.peak_gb, "of all processes, mapped files included", "2"),
            Figure(f"{what}_peak_own_gb", made.peak_own_gb, "the same without the files"),
        ]
    report("preparing", arguments, figures, rows={"pairs": pairs.rows, "records": records.rows})
    return 0


def measure(folder: Path, module: str, source: Path, *options: str | Path) -> Measured:
    """Prepares `source` into a folder below `folder`. Raises UserError with the last line where that fails."""
    output, log = folder / "prepared" / module, folder / "log"
    command = [sys.executable, "-m", module, "--source", source, "--output", output, "--workers", "2", *options]
    began, computed = time.monotonic(), processor_seconds()
    with log.open("wb") as opened:
        process = subprocess.Popen(command, env=environment(1), stdout=opened, stderr=opened)
        mapped, own = watch(process)
    seconds, computed = time.monotonic() - began, processor_seconds() - computed
    if process.returncode:
        raise UserError(log.read_text("utf-8").strip().splitlines()[-1])
    return Measured(seconds / 60, computed / 60, mapped, own, read_json(output / "meta.json")["rows"])


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


def write_records(folder: Path, arguments: Arguments, share: int) -> Path:
    """Made-up files of DISC-Law-SFT in `folder`, the same every time; returns the tokenizer for them."""
    dice = random.Random(1)
    source, tokenizer = Path(arguments.data), TOKENIZER
    if arguments.data == "sample":
        source = sample_records(folder.with_name("sample"))
        tokenizer = source / "tokenizer"
    sentences = sentences_of(source)

    def text(mean: int) -> str:
        return drawn_text(dice, sentences, int(mean * dice.lognormvariate(-0.1, 0.45)))  # of mean 1

    folder.mkdir()
    for published, rows in zip(FILES, ROWS, strict=True):
        characters = published.bytes // rows // 3 - 40  # of Chinese, three bytes each; without keys
        prefixes = sorted(published.tasks)
        with (folder / f"{published.stem}.sample.jsonl").open("w", encoding="utf-8") as file:
            for number in range(rows // share):
                record: dict[str, object] = {"id": f"{dice.choice(prefixes)}{number}"}
                if published.has_reference:
                    record["reference"] = [text(characters // 3)]
                asked = characters // 3 if published.has_reference else characters // 2
                record |= {"input": text(asked), "output": text(characters // 3)}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
    return tokenizer


if __name__ == "__main__":
    run_main(main)
