"""Prepares DISC-Law-SFT, Chinese legal instructions and their answers, for fine-tuning a chat model.

    python -m data_prep.disc_law --source FOLDER --tokenizer Qwen/Qwen2.5-3B-Instruct --output prepared/disc-law
    python -m data_prep.disc_law --source hub --fraction 0.1 --output prepared/disc-law-tenth

The output is complete or absent. A preparation that was killed goes on where it was when the same command is started
again; a finished one is found done; with other options, or after the source was edited, it refuses to touch what is
there and says what differs. Rows are split before anything is left out by `--fraction`, so that sets of different
fractions never train on each other's test rows.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
import time
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from data_prep.chat import ChatTokenizer, load_chat_tokenizer
from data_prep.conversations import FORMAT, Conversations, open_conversations
from data_prep.disc_law_records import FILES, HUB_NAME, LICENCE, TASK_NAMES, SourceFile, as_published, find_files
from data_prep.disc_law_work import (
    MadePart,
    Records,
    Rules,
    Work,
    assemble,
    choose_questions,
    read_records,
    set_work,
    tokenise,
)
from data_prep.files import publish_folder, temporary_folder, write_atomically, writing_to
from data_prep.outputs import already, bring_back, existing_output, output_folder, refuse_to_replace, resolved
from data_prep.prepared import META, list_files
from data_prep.shards import Workers, cores, shard_folder
from data_prep.splits import PARTS, stratified_split
from launch.config import Options, differing_keys, parse
from launch.console import UserError, format_duration, run_main, say

PROG = "python -m data_prep.disc_law"
ROWS_PER_SHARD = 1000  # what a kill costs each worker at most; a second or two
LISTED_MALFORMED = 100


class DiscLawOptions(Options):
    """The keys of `python -m data_prep.disc_law`."""

    source: str = Field(description=f"the folder with the files of DISC-Law-SFT, or hub ({HUB_NAME})")
    output: Path = Field(description="the folder to make, for example prepared/disc-law")
    tokenizer: str = Field(
        "Qwen/Qwen2.5-3B-Instruct", description="folder or hub name of the base model, for its tokenizer and template"
    )
    revision: str = Field("main", description="commit or branch on the hub; the files' SHA-256 are checked in any case")
    fraction: float = Field(1.0, gt=0, le=1, description="share of every part and task to keep; smaller are in larger")
    reference: bool = Field(True, description="put the statutes before a question that does not hold them already")
    exam: bool = Field(True, description="false leaves out exam, which overlaps the public bar examinations")
    min_answer_characters: int = Field(
        2, ge=1, description="drop shorter answers where prose is asked for (many right ones have four: 劳动纠纷)"
    )
    max_length: int = Field(1024, ge=64, description="tokens of prompt and answer, at most")
    too_long: Literal["truncate", "drop"] = Field(
        "truncate", description="truncate: cut the document of an over-long record, never question or answer"
    )
    validation_share: float = Field(0.01, gt=0, lt=0.5, description="validation's share of what is not test (10 %)")
    max_malformed_share: float = Field(
        0.01, ge=0, le=1, description="refuse a source with more lines that are no record than this share"
    )
    seed: int = Field(1234, ge=0, lt=2**32, description="seed of the split")
    workers: int = Field(cores(), ge=1, description="processes that read and tokenise; by default one per core")
    overwrite: bool = Field(False, description="replace an output that was made with other options or another source")

    @model_validator(mode="after")
    def _of_this_source(self) -> DiscLawOptions:
        if "revision" in self.model_fields_set and self.source != "hub":
            raise ValueError(f"revision has no effect with source {self.source}: leave it out")
        return self

    def defining(self) -> dict[str, object]:
        """The options that the prepared content depends on."""
        keys = ["exam", "fraction", "max_length", "min_answer_characters", "reference", "seed", "too_long"]
        return {key: getattr(self, key) for key in [*keys, "validation_share"]}


def main(argv: Sequence[str] | None = None) -> int:
    """The command; raises UserError for everything the user can mend."""
    options, dry_run = parse(
        DiscLawOptions,
        sys.argv[1:] if argv is None else argv,
        prog=PROG,
        about="Prepares DISC-Law-SFT for fine-tuning: reads, checks, splits, tokenises by the model's chat template.",
    )
    began = time.monotonic()
    output = output_folder(options.output, example="prepared/disc-law")
    if not dry_run:
        bring_back(output)
    existing = existing_output(output, options.overwrite, open_conversations, example="disc-law")
    tokenizer = load_chat_tokenizer(options.tokenizer)
    if options.source == "hub":  # whose content is known, so that there may be no reason to ask the network
        if existing and not _differences(existing, options, as_published(), tokenizer):
            return already(existing)
        if dry_run:
            say(f"would fetch {HUB_NAME}@{options.revision} and prepare {output} with:\n{resolved(options)}")
            return 0
    files = find_files(options.source, options.revision)
    differences = _differences(existing, options, files, tokenizer) if existing else []
    if existing and not differences:
        return already(existing)
    if differences and not options.overwrite:
        refuse_to_replace(output, differences)
    for file in files:
        say(f"{file.path}: {file.bytes:,} bytes" + (", as published" if file.is_published else ""))
    if dry_run:
        say(f"would prepare {output} with:\n{resolved(options)}")
        return 0
    rules = Rules(options.reference, options.min_answer_characters, options.max_length, options.too_long == "truncate")
    with (
        Workers(options.workers, set_work, Work(tokenizer, tuple(files), rules)) as workers,
        writing_to(output),
        temporary_folder(output) as temporary,
    ):
        meta = build(temporary, output, options, files, tokenizer, workers)
        publish_folder(temporary, output, replace=output.exists())
    _report(output, meta, time.monotonic() - began)
    return 0


def _source_sha256(files: Sequence[SourceFile]) -> str:
    return hashlib.sha256(json.dumps([(file.published.stem, file.sha256) for file in files]).encode()).hexdigest()


def _differences(
    existing: Conversations, options: DiscLawOptions, files: Sequence[SourceFile], tokenizer: ChatTokenizer
) -> list[str]:
    """What `existing` was made with and is not asked for now, each as `key: then -> now`."""
    lines = differing_keys(existing.meta["options"], options.defining())
    before = {file["name"]: file["sha256"][:12] for file in existing.meta["source"]["files"]}
    if existing.meta["source"]["sha256"] != _source_sha256(files):
        now = {file.path.name: file.sha256[:12] for file in files}
        lines.append(f"the source's content: {'; '.join(differing_keys(before, now)) or 'the names of its files'}")
    then = existing.meta["tokenizer"]
    if then["sha256"] != tokenizer.sha256:
        lines.append(f"tokenizer: {then['name']} {then['sha256'][:12]} -> {tokenizer.name} {tokenizer.sha256[:12]}")
    return lines


def build(
    folder: Path,
    output: Path,
    options: DiscLawOptions,
    files: Sequence[SourceFile],
    tokenizer: ChatTokenizer,
    workers: Workers,
) -> dict[str, Any]:
    """Fills the empty `folder` with the prepared conversations and returns its meta.json, which is written last."""
    content = {
        "format": FORMAT,
        "options": options.defining(),
        "source": _source_sha256(files),
        "tokenizer": tokenizer.sha256,
    }
    with shard_folder(output, {**content, "rows_per_shard": ROWS_PER_SHARD, "versions": _versions()}) as shards:
        records = read_records(workers, files, leave_out=() if options.exam else ("exam",))
        _check_malformed(records, options)
        split = stratified_split(records.task, records.group, options.validation_share, options.seed)
        questions = choose_questions(records, split)
        split = split.with_first(questions, records.group)
        chosen = {part: split.first_share(part, options.fraction, records.group) for part in PARTS}
        paths = tokenise(workers, shards, records, chosen, ROWS_PER_SHARD)
        workers.close()  # what follows is the disk's work, and maps the parts into memory
        parts = {part: assemble(folder / part, paths[part]) for part in PARTS}
    tokenizer.save(folder / "tokenizer")
    identity = {**content, "parts": {part: made.sha256 for part, made in parts.items()}}
    tasks = [name for number, name in enumerate(TASK_NAMES) if number in records.task]
    counts = {
        task: {
            **{name: records.counts[name, task] for name in ("records", "duplicates", "too_short", "left_out")},
            **{name: sum(made.counts[name, task] for made in parts.values()) for name in ("truncated", "too_long")},
            **{part: int(np.sum(made.task == number)) for part, made in parts.items()},
        }
        for number, task in enumerate(TASK_NAMES)
        if records.counts["records", task]
    }
    totals = {name: sum(count[name] for count in counts.values()) for name in next(iter(counts.values()))}
    meta = {
        "format": FORMAT,
        "fingerprint": hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest(),
        "options": options.defining(),
        "source": {
            "kind": "hub" if options.source == "hub" else "folder",
            "place": f"{HUB_NAME}@{options.revision}" if options.source == "hub" else options.source,
            "sha256": _source_sha256(files),
            "files": [file.about() for file in files],
            "missing": [file.name for file in FILES if file.stem not in [found.published.stem for found in files]],
            "licence": LICENCE,
        },
        "counts": {
            "lines": records.lines,
            "blank": records.blank,
            "malformed": len(records.malformed),
            "malformed_listed": records.malformed[:LISTED_MALFORMED],
            **totals,
            "tasks": counts,
        },
        "tasks": tasks,
        "rows": {part: len(made.task) for part, made in parts.items()},
        "questions": [records.uid[row] for row in questions],
        "tokenizer": tokenizer.about(),
        "lengths": _lengths(list(parts.values())),
        "files": list_files(folder),
        "versions": {"python": platform.python_version(), **_versions()},
    }
    write_atomically(folder / META, json.dumps(meta, indent=2, ensure_ascii=False) + "\n")
    return meta


def _check_malformed(records: Records, options: DiscLawOptions) -> None:
    found = records.lines - records.blank
    if found == 0:
        raise UserError(f"the files of --source {options.source} hold blank lines only")
    if len(records.malformed) > options.max_malformed_share * found:
        reason, count = Counter(str(entry["reason"]) for entry in records.malformed).most_common(1)[0]
        first = records.malformed[0]
        raise UserError(
            f"{len(records.malformed):,} of {found:,} lines are no record of DISC-Law-SFT, more than "
            f"--max_malformed_share {options.max_malformed_share} (mostly: {reason}, {count:,}; the first is "
            f"{first['file']} line {first['line']}: {first['reason']}); fetch the files again, or check that they are "
            "the right ones"
        )


def _versions() -> dict[str, str]:
    names = ("datasets", "pyarrow", "numpy", "transformers", "tokenizers", "OpenCC")
    return {name: version(name) for name in names}


def _lengths(parts: Sequence[MadePart]) -> dict[str, dict[str, Any]]:
    """Tokens of prompt and answer, and of the answer with its end token, by task; and of all."""
    task, tokens, answers = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("task", "tokens", "answer_tokens")
    )
    rows = {name: task == number for number, name in enumerate(TASK_NAMES) if number in task}
    rows["all"] = np.ones(len(task), dtype=bool)
    return {
        name: {"rows": int(own.sum()), "tokens": _statistics(tokens[own]), "answer": _statistics(answers[own])}
        for name, own in rows.items()
    }


def _statistics(lengths: np.ndarray) -> dict[str, float]:
    median, p95 = (float(value) for value in np.percentile(lengths, (50, 95)))
    return {"median": median, "p95": p95, "max": int(lengths.max()), "total": int(lengths.sum())}


def _report(output: Path, meta: dict[str, Any], seconds: float) -> None:
    counts = meta["counts"]
    say(f"prepared {output} in {format_duration(seconds)}")
    say("  rows      " + ", ".join(f"{part} {meta['rows'][part]:,}" for part in PARTS))
    say(
        f"  left out  {counts['duplicates']:,} duplicates, {counts['too_short']:,} answers of nothing, "
        f"{counts['too_long']:,} too long, {counts['malformed']:,} malformed lines (meta.json lists them)"
        + (f", {counts['left_out']:,} of exam" if counts["left_out"] else "")
    )
    say(f"  {'tokens':<36}{'rows':>9}{'prompt and answer':>26}{'answer':>26}{'truncated':>11}{'too long':>10}")
    say(f"  {'':<36}{'':>9}{'median    p95    max':>26}{'median    p95    max':>26}")
    for task, about in meta["lengths"].items():
        spans = "".join(
            f"{about[of]['median']:>13,.0f}{about[of]['p95']:>7,.0f}{about[of]['max']:>6,}"
            for of in ("tokens", "answer")
        )
        of_task = counts["tasks"].get(task, counts)
        say(f"  {task:<36}{about['rows']:>9,}{spans}{of_task['truncated']:>11,}{of_task['too_long']:>10,}")
    say(f"  identity  {meta['fingerprint'][:16]}")


if __name__ == "__main__":
    run_main(main)
