"""A corpus of questions and answers becomes prepared conversations: split, meta.json and report.

Promises, whatever the command: the output is complete or absent. The same command again continues a preparation that
was killed, and finds a finished one done; with other options, or after the source was edited, it refuses to touch what
is there and says what differs. Rows are split before `--fraction` leaves any out, so that sets of different fractions
never train on each other's test rows.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.conversation_rows import (
    MadePart,
    Records,
    Work,
    assemble,
    choose_questions,
    leave_out_trained_prompts,
    read_records,
    set_work,
    tokenise,
)
from data_prep.preparing import (
    LISTED_MALFORMED,
    claim_output,
    is_done,
    say_malformed,
    sha256_of_json,
    too_many_malformed,
    versions,
    warn_of_few,
    write_meta,
)
from data_prep.records import ConversationOptions, Corpus, Learn
from data_prep.shards import Workers, scratch_folder, shard_folder
from data_prep.splits import StratifiedSplit, stratified_split, validation_share_of, wanted_rows
from training.base.console import UserError, say, warn
from training.base.durations import format_duration
from training.base.files import publish_folder, temporary_folder, writing_to
from training.base.options import differing_keys, to_yaml
from training.data.chat import TextTokenizer
from training.data.conversations import FORMAT, Conversations, open_conversations
from training.data.prepared import PARTS, list_files

ROWS_PER_SHARD = 1000  # what a kill costs each worker at most; a second or two
LISTED_KEYS, NAMED_KEYS = 100, 10  # that were not read, the most frequent, in meta.json and in the report
MAX_TASKS = 100  # each has a question of its own in the report, and a row in its tables


def prepare(
    options: ConversationOptions,
    dry_run: bool,
    find: Callable[[], Corpus],
    *,
    known: Corpus | None = None,
    example: str,
) -> int:
    """Runs the command with these options; its exit status. Raises UserError for what the user can mend.

    find: opens the source. known: what it will find, where that is known before it is fetched. example: a name for
    messages.
    """
    began = time.monotonic()
    output, existing = claim_output(options.output, dry_run, options.overwrite, open_conversations, example=example)
    replaces, tokenizer = output.exists(), options.load_tokenizer()

    def done(corpus: Corpus) -> bool:
        return existing is not None and is_done(
            existing, _differences(existing, options, corpus, tokenizer), options.overwrite
        )

    if known is not None:  # so that there may be no reason to ask the network
        if done(known):
            return 0
        if dry_run:
            say(f"would fetch {known.about()['place']} and prepare {output} with:\n{to_yaml(options)}")
            return 0
    corpus = find()
    if done(corpus):
        return 0
    for file in corpus.files:
        say(str(file))
    if dry_run:
        say(f"would prepare {output} with:\n{to_yaml(options)}")
        return 0
    with writing_to(output), scratch_folder(output) as scratch:
        corpus.unpack(scratch)
        # The workers come first: what is locked when they are forked stays so for a moment after a kill.
        with (
            Workers(options.workers, partial(set_work, Work(tokenizer, corpus, options.max_length))) as workers,
            temporary_folder(output) as temporary,
        ):
            meta = build(temporary, output, options, corpus, tokenizer, workers)
            publish_folder(temporary, output, replace=replaces)
    _report(output, meta, corpus, time.monotonic() - began)
    return 0


def _differences(
    existing: Conversations, options: ConversationOptions, corpus: Corpus, tokenizer: TextTokenizer
) -> list[str]:
    """What `existing` was made with and is not asked for now, each as `key: then -> now`."""
    lines = differing_keys(existing.meta["options"], options.defining())
    before = {file["name"]: file["sha256"][:12] for file in existing.meta["source"]["files"]}
    if existing.meta["source"]["sha256"] != corpus.sha256:
        now = {str(file.about()["name"]): file.sha256[:12] for file in corpus.files}
        lines.append(f"the source's content: {'; '.join(differing_keys(before, now)) or 'the names of its files'}")
    then = existing.meta["tokenizer"]
    if then["sha256"] != tokenizer.sha256:
        lines.append(f"tokenizer: {then['name']} {then['sha256'][:12]} -> {tokenizer.name} {tokenizer.sha256[:12]}")
        lines += differing_keys(then.get("template_options", {}), dict(tokenizer.template_options), "template_options.")
    return lines


def build(
    folder: Path,
    output: Path,
    options: ConversationOptions,
    corpus: Corpus,
    tokenizer: TextTokenizer,
    workers: Workers,
) -> dict[str, Any]:
    """Fills the empty `folder` with the prepared conversations and returns its meta.json, which is written last."""
    made_by = versions("datasets", "pyarrow", "numpy", "transformers", "tokenizers", "OpenCC")
    content = {
        "format": FORMAT,
        "options": options.defining(),
        "source": corpus.sha256,
        "tokenizer": tokenizer.sha256,
    }
    with shard_folder(output, {**content, "rows_per_shard": ROWS_PER_SHARD, "versions": made_by}) as shards:
        records = read_records(workers, corpus)
        _check_records(records, options, corpus)
        share = options.validation_share or validation_share_of(len(records.task))
        split = stratified_split(records.task, records.group, share, options.seed)
        _warn_of_shares(split, records, share)
        if corpus.learn == "all":
            leave_out_trained_prompts(records, split)
        questions = choose_questions(records, split) if corpus.learn != "text" else []
        split = split.with_first(questions, records.group)
        chosen = {part: split.first_share(part, options.fraction, records.group) for part in PARTS}
        if corpus.learn == "all":
            chosen = {part: np.array([row for row in rows if records.learned[row]]) for part, rows in chosen.items()}
            if empty := [part for part, rows in chosen.items() if not len(rows)]:
                raise UserError(
                    f"nothing is left for {' and '.join(empty)}, since training has every prompt of its conversations, "
                    "too: pass each conversation once, without its beginnings, or use --learn last"
                )
        columns = [
            *(["learned"] if corpus.learn == "all" else []),
            *(["tools"] if records.has_tools else []),
            *(["source"] if corpus.mixture else []),
        ]
        paths = tokenise(workers, shards, records, chosen, ROWS_PER_SHARD, tuple(columns))
        workers.close()  # what follows is the disk's work, and maps the parts into memory
        parts = {part: assemble(folder / part, paths[part], records.tasks) for part in PARTS}
    empty = [part for part, made in parts.items() if not len(made.task)]
    if empty:
        raise UserError(
            f"nothing is left for {' and '.join(empty)} once records of more than {options.max_length:,} tokens "
            "are dropped: pass a larger --max_length, or more records"
        )
    tokenizer.save(folder / "tokenizer")
    about = corpus.about()
    meta = {
        "format": FORMAT,
        "fingerprint": sha256_of_json({**content, "parts": {part: made.sha256 for part, made in parts.items()}}),
        "options": options.defining(),
        "source": {
            "kind": about.pop("kind"),
            "place": about.pop("place"),
            "sha256": corpus.sha256,
            "files": [file.about() for file in corpus.files],
            **about,
        },
        "counts": _counts(records, parts, corpus.learn),
        "tasks": [task for number, task in enumerate(records.tasks) if number in records.task],
        "rows": {part: len(made.task) for part, made in parts.items()},
        **({"mixture": corpus.mixture} if corpus.mixture else {}),
        **({"sources": _of_sources(corpus, parts)} if corpus.mixture else {}),
        "questions": [records.uid[row] for row in questions],
        "tokenizer": tokenizer.about(),
        "lengths": _lengths(list(parts.values()), records.tasks),
        "files": list_files(folder),
        "versions": made_by,
    }
    write_meta(folder, meta)
    return meta


def _check_records(records: Records, options: ConversationOptions, corpus: Corpus) -> None:
    found = records.lines - records.blank
    if found == 0:
        raise UserError(f"the files of --source {corpus.about()['place']} hold no record")
    if too_many := too_many_malformed(len(records.malformed), found, options.max_malformed_share):
        reason, count = Counter(str(entry["reason"]) for entry in records.malformed).most_common(1)[0]
        first = records.malformed[0]
        mostly = "" if first["reason"] == reason else f"mostly: {reason}, {count:,}; "
        raise UserError(
            f"{len(records.malformed):,} of {found:,} lines are no {corpus.record_name}, {too_many} "
            f"({mostly}the first is {first['file']} line {first['line']}: {first['reason']}); {corpus.advice}"
        )
    if len(records.tasks) > MAX_TASKS:
        count, advice = len(corpus.files), "--tasks file takes the names of the files"
        advice = f"join some of the {count} files" if count > MAX_TASKS else advice
        raise UserError(
            f"the records are of {len(records.tasks):,} tasks (such as {', '.join(records.tasks[:3])}), more than "
            f"{MAX_TASKS}: {advice} instead"
        )


def _warn_of_shares(split: StratifiedSplit, records: Records, validation_share: float) -> None:
    """Says where a part has other than its share of the records, since groups stay together."""
    strata = len(np.unique(split.strata))
    for part, wanted in wanted_rows(len(records.task), validation_share).items():
        found = len(split.rows(part))
        if abs(found - wanted) > max(strata, 0.25 * wanted):
            largest = int(np.unique(records.group, return_counts=True)[1].max())
            warn(
                f"{part} has {found:,} of {len(records.task):,} records, where {wanted:,.0f} were asked for: records "
                f"that are read alike before their answer stay in one part (here up to {largest:,})"
            )


def _counts(records: Records, parts: dict[str, MadePart], learn: Learn) -> dict[str, Any]:
    """Lines and records: of each task, and of all."""
    of_turns = learn == "all"
    read = ("records", "duplicates", "too_short", "left_out", *(("in_training", "turns_in_training") * of_turns))
    made_of = ("truncated", "too_long", *(("split", "turns", "cut_turns") * of_turns))
    tasks = {
        task: {
            **{name: records.counts[name, task] for name in read},
            **{name: sum(made.counts[name, task] for made in parts.values()) for name in made_of},
            **{part: int(np.sum(made.task == number)) for part, made in parts.items()},
        }
        for number, task in enumerate(records.tasks)
    }
    totals = {name: sum(count[name] for count in tasks.values()) for name in next(iter(tasks.values()))}
    return {
        "lines": records.lines,
        "blank": records.blank,
        "malformed": len(records.malformed),
        "malformed_listed": records.malformed[:LISTED_MALFORMED],
        "unread_keys": {repr(key[:60])[1:-1]: count for key, count in records.unread.most_common(LISTED_KEYS)},
        **({"notes": records.notes} if records.notes else {}),
        **totals,
        "tasks": tasks,
    }


def _of_sources(corpus: Corpus, parts: dict[str, MadePart]) -> dict[str, dict[str, int]]:
    """Rows of each source in each part."""
    counts = {name: {part: made.sources[name] for part, made in parts.items()} for name in corpus.mixture}
    for name, rows in counts.items():
        if not rows["train"]:
            raise UserError(f"nothing of the source {name} is left for training: leave it out, or pass more of it")
        if not rows["validation"]:
            warn(
                f"nothing of the source {name} is in validation, so its loss is not measured: raise --validation_share"
            )
    return counts


def _lengths(parts: Sequence[MadePart], tasks: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Tokens of prompt and answer together, and of the answer with its end token: of each task, and of all."""
    task, tokens, answers = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("task", "tokens", "answer_tokens")
    )
    rows = {name: task == number for number, name in enumerate(tasks) if number in task}
    rows["all"] = np.ones(len(task), dtype=bool)
    return {
        name: {"rows": int(own.sum()), "tokens": _statistics(tokens[own]), "answer": _statistics(answers[own])}
        for name, own in rows.items()
    }


def _statistics(lengths: np.ndarray) -> dict[str, float]:
    median, p95 = (float(value) for value in np.percentile(lengths, (50, 95)))
    return {"median": median, "p95": p95, "max": int(lengths.max()), "total": int(lengths.sum())}


def _report(output: Path, meta: dict[str, Any], corpus: Corpus, seconds: float) -> None:
    counts = meta["counts"]
    say(f"prepared {output} in {format_duration(seconds)}")
    say("  rows      " + ", ".join(f"{part} {meta['rows'][part]:,}" for part in PARTS))
    say(
        f"  left out  {counts['duplicates']:,} duplicates, {counts['too_short']:,} with too short an answer, "
        f"{counts['too_long']:,} too long"
        + (f", {counts['left_out']:,} of {', '.join(corpus.left_out)}" if counts["left_out"] else "")
    )
    say_malformed(counts)
    warn_of_few(meta["rows"])
    if counts["unread_keys"]:
        keys = [f"{key} (in {count:,} records)" for key, count in counts["unread_keys"].items()]
        more = ", ... (meta.json lists them)" if len(keys) > NAMED_KEYS else ""
        say(f"  not read  the keys {', '.join(keys[:NAMED_KEYS])}{more}")
    for note, about in counts.get("notes", {}).items():
        where = about["first"]
        say(f"  changed   {about['records']:,} records {note}; the first is {where['file']} line {where['line']}")
    for name, weight in meta.get("mixture", {}).items():
        rows = ", ".join(f"{part} {count:,}" for part, count in meta["sources"][name].items())
        say(f"  source    {name}: {rows}; an epoch has {weight:g} times its training rows")
    if "turns" in counts:
        say(
            f"  answers   {counts['turns']:,} are learned or scored; {counts['split']:,} records became one sample an "
            f"answer, {counts['cut_turns']:,} answers stand beyond --max_length, and in validation and test "
            f"{counts['turns_in_training']:,} are read only, since training has their prompt, too "
            f"({counts['in_training']:,} records have no other)"
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
