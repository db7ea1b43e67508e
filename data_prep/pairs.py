"""Prepares sentence pairs of two languages for training.

    python -m data_prep.pairs --source mine.tsv --output prepared/mine
    python -m data_prep.pairs --source cmn.txt --output prepared/tatoeba --split grouped
    python -m data_prep.pairs --source download:fra-eng --source_language fr --output prepared/french
    python -m data_prep.pairs --train train.zh,train.en --test test.zh,test.en --output prepared/given

What is not given is chosen by the data, and said: the size of the vocabularies by the number of training pairs, and
whether Chinese is simplified by the characters that it has.

The output is complete or absent. The same command again finds its work done; with other options, or after the source
was edited, it refuses to touch what is there and says what differs.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from data_prep.columns import EXTRA_TAB, HEADING, NO_TAB, SWAPPED, has_script
from data_prep.pair_options import LATER, PairOptions, take_tokenizers
from data_prep.pair_rows import HEAD_ROWS, SIDES, Pairs, Reader, TableCounts, texts_of, write_parts
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
from data_prep.shards import in_own_process
from data_prep.sources import Source, address_of, download_of, open_source
from data_prep.splits import (
    Side,
    Split,
    connected_groups,
    grouped_split,
    leakage,
    random_split,
    stands_in,
)
from training.base.console import UserError, run_main, say, warn
from training.base.durations import format_duration
from training.base.files import publish_folder, temporary_folder, writing_to
from training.base.options import differing_keys, parse, to_yaml
from training.data.languages import Language
from training.data.prepared import FORMAT, PARTS, Prepared, list_files, open_prepared
from training.data.text import Conversions
from training.data.tokenizers import (
    KINDS,
    SentencePieceTokenizer,
    Tokenizer,
    TooManyCharacters,
    WordTokenizer,
)

PROG = "python -m data_prep.pairs"
FEW_PAIRS = 3000  # the warm-up of configs/*/base.yaml does not fit into a run on much less
MANY_DUPLICATES = 0.1  # from this share on, they make scores on the random split misleading
VOCABULARY_LINES = 500_000  # sentences that a vocabulary is made from, at most

# Pieces of a language's vocabulary, and below how many training pairs it is taken. 4,000 is what was tried, in
# configs/README.md; the others keep the pieces of a vocabulary about as frequent.
VOCABULARY_SIZES = ((3_000, 1_000), (10_000, 2_000), (100_000, 4_000), (1_000_000, 8_000))
LARGEST_VOCABULARY = 16_000
CHOSEN = "chosen by the data"


def main(argv: Sequence[str] | None = None) -> int:
    """The command; raises UserError for everything the user can mend."""
    options, dry_run = parse(
        PairOptions,
        sys.argv[1:] if argv is None else argv,
        prog=PROG,
        about="Prepares sentence pairs of two languages for training: cleans, splits, tokenises.",
    )
    began = time.monotonic()
    output, existing = claim_output(options.output, dry_run, options.overwrite, open_prepared, example="tatoeba")
    replaces, downloads = output.exists(), output.parent / "downloads"
    missing = [
        download
        for name in options.tables.values()
        if (download := download_of(name, downloads)) is not None and not download[1].exists()
    ]
    if missing:
        if existing and existing.meta["source"]["kind"] == "download" and not options.overwrite:
            differences = _differences(existing, options, existing.meta["source"]["sha256"])
            if is_done(existing, differences, overwrite=False):  # although the zip file is gone
                return 0
        if dry_run:
            addresses = ", ".join(address_of(pair) for pair, _ in missing)
            say(f"would download {addresses} to {downloads} and prepare {output} with:\n{to_yaml(options)}")
            return 0
    sources = {
        part: open_source(name, options.languages, downloads, part, options.subset, options.revision)
        for part, name in options.tables.items()
    }
    if existing and is_done(existing, _differences(existing, options, _sha256(sources)), options.overwrite):
        return 0
    if dry_run:
        with TemporaryDirectory(prefix="relay-") as temporary:
            reading = read(Path(temporary) / "texts", options, sources)
        _say_chosen(reading.chosen)
        options = reading.options
        say(f"would prepare {output} with:\n{to_yaml(options)}")
        return 0
    with writing_to(output), temporary_folder(output) as temporary:
        meta = build(temporary, options, sources)
        publish_folder(temporary, output, replace=replaces)
    _report(output, options, meta, time.monotonic() - began)
    return 0


def _sha256(sources: Mapping[str, Source]) -> str:
    """Identity of what is read: of a source that is split here that of its content, however it is packed."""
    found = {part: source.table.sha256 for part, source in sources.items()}
    return found["train"] if len(found) == 1 else sha256_of_json(found)


def _differences(existing: Prepared, options: PairOptions, sha256: str) -> list[str]:
    """What `existing` was made with and is not asked for now, each as `key: then -> now`."""
    made, chosen = existing.meta["options"], existing.meta.get("chosen", {})
    asked = options.defining() | {key: made[key] if key in chosen else CHOSEN for key in options.open_choices}
    lines = differing_keys({**LATER, **made}, {**LATER, **asked})
    before = existing.meta["source"]
    if before["sha256"] != sha256:
        place = ", ".join(options.tables.values())
        lines.append(f"the source's content: {before['place']} {before['sha256'][:12]} -> {place} {sha256[:12]}")
    return lines


@dataclass(frozen=True)
class Reading:
    """The pairs of all sources, with what was chosen by them and why, and what was found in the source of each part."""

    reader: Reader
    options: PairOptions
    chosen: dict[str, str]
    found: dict[str, TableCounts]


def read(folder: Path, options: PairOptions, sources: Mapping[str, Source]) -> Reading:
    """Reads every source; the sentences lie in `folder`. Raises UserError where one is not what it should be."""
    conversions = Conversions(bool(options.simplify), options.unescape, options.narrow)
    reader = Reader(folder, options.languages, conversions, options.columns, options.workers)
    chosen: dict[str, str] = {}
    if "simplify" in options.open_choices:
        traditional = reader.choose_simplify(sources["train"].table)
        options = options.model_copy(update={"simplify": reader.conversions.simplify})
        done = "simplified characters" if options.simplify else "characters as they are"
        chosen["simplify"] = f"{done}, since {traditional:.0%} of the Chinese sentences have traditional ones"
    found = {part: _read(reader, part, source, options) for part, source in sources.items()}
    return Reading(reader, options, chosen, found)


def build(folder: Path, options: PairOptions, sources: Mapping[str, Source]) -> dict[str, Any]:
    """Fills the empty `folder` with the prepared data set and returns its meta.json, which is written last."""
    reading = read(folder / ".texts", options, sources)
    options, chosen, found = reading.options, reading.chosen, reading.found
    pairs = reading.reader.pairs()
    sides = {
        side: Side(language, pairs.same[side], pairs.alike[side])
        for side, language in zip(SIDES, options.languages, strict=True)
    }
    split, dropped = split_of(options, pairs, sides)

    if options.tokenizers is None:
        tokenizers, size = train_tokenizers(options, pairs, split)
        if "vocabulary_size" in options.open_choices:
            options = options.model_copy(update={"vocabulary_size": size})
            whose = "for both languages" if options.vocabularies == "joint" else "for each language"
            chosen["vocabulary_size"] = (
                f"at most {size:,} pieces of sentencepiece {whose}, for {len(split.train):,} training pairs"
            )
    else:
        tokenizers = take_tokenizers(options.tokenizers)
        _check_languages(tokenizers, options)
    for side, tokenizer in tokenizers.items():
        tokenizer.save(folder / "tokenizer" / side)
    rows = {part: split.rows(part) for part in PARTS}
    made = write_parts(folder, pairs, rows, tokenizers, options.workers)
    duplicates = len(pairs) - len(np.unique(pairs.pair))
    leaks = leakage(split, sides["source"], sides["target"])
    del pairs, reading
    shutil.rmtree(folder / ".texts")

    identity = {
        "options": options.defining(),
        "source": _sha256(sources),
        "tokenizers": {side: tokenizer.sha256 for side, tokenizer in tokenizers.items()},
        "parts": {part: each.sha256 for part, each in made.items()},
    }
    meta = {
        "format": FORMAT,
        "fingerprint": sha256_of_json(identity),
        "synthetic": any(source.synthetic for source in sources.values()),
        "languages": dict(zip(SIDES, map(_about_language, options.languages), strict=True)),
        "options": options.defining(),
        "chosen": chosen,
        "source": _about_source(sources, found),
        "counts": _counts(found, duplicates, dropped),
        "rows": {part: len(own) for part, own in rows.items()},
        "groups": {"count": split.groups, "largest": split.largest_group} if split.groups else None,
        "leakage": leaks,
        "tokenizer": {
            "kind": tokenizers["source"].kind,
            "vocabularies": "joint" if len({each.sha256 for each in tokenizers.values()}) == 1 else "separate",
            **{
                side: {"vocabulary_size": tokenizer.vocabulary_size, "sha256": tokenizer.sha256}
                for side, tokenizer in tokenizers.items()
            },
            "unknown_share": {
                part: {side: round(share, 6) for side, share in each.unknown.items()} for part, each in made.items()
            },
        },
        "lengths": {
            part: {side: _statistics(lengths) for side, lengths in each.lengths.items()} for part, each in made.items()
        },
        "files": list_files(folder),
        "versions": versions("datasets", "pyarrow", "numpy", "sentencepiece", "OpenCC"),
    }
    write_meta(folder, meta)
    return meta


# --- reading ---------------------------------------------------------------------------------------------------------


def _read(reader: Reader, part: str, source: Source, options: PairOptions) -> TableCounts:
    """Adds the pairs of a source, and says what was found. Raises UserError where it is not what it should be."""
    found = reader.read(part, source.table)
    place, columns = source.table.place, found.columns
    _check_malformed(place, found, options.max_malformed_share)
    say(
        f"{place}: {found.pairs:,} pairs, {found.counts['blank']:,} blank and {found.counts['malformed']:,} malformed "
        "lines"
    )
    say(f"  columns   {columns.names['source']} (source), {columns.names['target']} (target), by {columns.found_by}")
    if columns.unread:
        say(f"  not read  {', '.join(name[:40] for name in columns.unread[:10])}")
    for side, language in zip(SIDES, columns.languages, strict=True):
        with_script = found.counts[f"{side}_script"]
        if 2 * with_script < found.pairs:
            said = f"{place}: {with_script:,} of {found.pairs:,} lines have {language} in {columns.names[side]}"
            if options.columns is None:
                raise UserError(f"{said}: pass --source_language and --target_language, such as fr and en")
            warn(said)
        if with_script == found.pairs - 1 and not has_script(found.first[SIDES.index(side)], language):
            warn(
                f"{place}: only the first pair has no {language} ({found.first[0][:40]!r}, {found.first[1][:40]!r}): "
                "if that is a heading, delete the line"
            )
    if 2 * found.counts["quoted"] > found.pairs:
        warn(
            f"{place}: {found.counts['quoted']:,} of {found.pairs:,} lines are in quotes, which the model learns to "
            "write, too; if they are those of CSV, call the file .csv"
        )
    for count, what, option, done in (
        (found.counts["entities"], "characters as HTML writes them (&quot;)", "unescape", options.unescape),
        (found.counts["full_width"], "full-width Latin letters or digits", "narrow", options.narrow),
    ):
        if count:
            said = "converted to the ordinary ones" if done else f"kept as they are; --{option} converts them"
            say(f"  noted     {count:,} pairs have {what}: {said}")
    return found


def _check_malformed(place: str, found: TableCounts, most_share: float | None) -> None:
    reasons = {reason: count for reason, count in found.reasons.items() if reason != HEADING}
    total, malformed = found.pairs + found.counts["malformed"], sum(reasons.values())
    too_many = too_many_malformed(malformed, total, most_share)
    if too_many is None:
        return
    reason = max(reasons, key=lambda each: reasons[each])
    example = found.examples[reason]
    advice = "check that this is the right file"
    if reason == SWAPPED.format(*found.columns.languages):
        advice = "put the languages of these lines in the order of the others"
    elif reason == NO_TAB:
        advice = "put a tab between the languages on these lines, too"
    elif reason == EXTRA_TAB:
        advice = "if a tab stands inside a sentence, take it out; if notes stand behind these pairs, take those out"
    raise UserError(
        f"{place}: {malformed:,} of {total:,} lines are not sentence pairs like the others (mostly: {reason}, "
        f"{reasons[reason]:,}; the first of them is line {example['line']}: {example['text']!r}), {too_many}; "
        f"{advice}"
    )


def _about_source(sources: Mapping[str, Source], found: Mapping[str, TableCounts]) -> dict[str, Any]:
    """What meta.json says of where the pairs come from."""
    tables: dict[str, dict[str, Any]] = {}
    for part, source in sources.items():
        licence = source.licence(found[part].counts["tatoeba"], found[part].pairs)
        about = {**source.table.about(), "licence": licence, "columns": found[part].columns.about()}
        tables[part] = {"kind": source.kind, **about}
    if len(tables) == 1:
        return tables["train"]
    return {
        "kind": "given split",
        "place": ", ".join(f"{part} {about['place']}" for part, about in tables.items()),
        "bytes": sum(about["bytes"] for about in tables.values()),
        "sha256": _sha256(sources),
        "licence": " ".join(dict.fromkeys(about["licence"] for about in tables.values())),
        "parts": tables,
    }


def _about_language(language: Language) -> dict[str, str]:
    return {"code": language.code, "name": language.name, "direction": language.direction}


def _counts(found: Mapping[str, TableCounts], duplicates: int, dropped: int) -> dict[str, Any]:
    """What meta.json counts. A duplicate is a row whose pair stands in an earlier row as well."""
    tables = list(found.values())
    return {
        "lines": sum(each.lines for each in tables),
        "pairs": sum(each.pairs for each in tables),
        "blank": sum(each.counts["blank"] for each in tables),
        "malformed": sum(each.counts["malformed"] for each in tables),
        "malformed_listed": [row for each in tables for row in each.malformed][:LISTED_MALFORMED],
        "duplicate_pairs": duplicates,
        "dropped_leaked": dropped,
        "with_entities": sum(each.counts["entities"] for each in tables),
        "with_full_width": sum(each.counts["full_width"] for each in tables),
    }


# --- splitting -------------------------------------------------------------------------------------------------------


def split_of(options: PairOptions, pairs: Pairs, sides: Mapping[str, Side]) -> tuple[Split, int]:
    """Which pair is in which part, and how many training pairs were dropped because they stand in another part."""
    given = {part: np.arange(own.start, own.stop) for part, own in pairs.of_table.items()}
    if options.source is not None:
        return _divided(options, given["train"], sides, options.test_share).checked(), 0
    others = np.concatenate([rows for part, rows in given.items() if part != "train"])
    rows = given["train"]
    if options.drop_leaked:
        rows = rows[~stands_in(sides["source"], sides["target"], rows, others)]
    dropped = len(given["train"]) - len(rows)
    if options.validation is not None:
        order = np.random.RandomState(options.seed).permutation(len(rows))
        return Split(rows[order], given["validation"], given["test"]).checked(dropped), dropped
    divided = _divided(options, rows, sides, 0.0)
    return replace(divided, test=given["test"]).checked(dropped), dropped


def _divided(options: PairOptions, rows: np.ndarray, sides: Mapping[str, Side], test_share: float) -> Split:
    """These rows split as the options say."""
    if options.split == "random":
        split = random_split(len(rows), options.validation_share, options.seed, test_share)
    else:
        labels = connected_groups(*(side.alike[rows] for side in sides.values()))
        split = grouped_split(labels, options.validation_share, options.seed, test_share)
    return replace(split, **{part: rows[split.rows(part)] for part in PARTS})


# --- tokenizers ------------------------------------------------------------------------------------------------------


def _check_languages(tokenizers: Mapping[str, Tokenizer], options: PairOptions) -> None:
    theirs = [tokenizer.language.code for tokenizer in tokenizers.values()]
    if theirs != [options.source_language, options.target_language]:
        raise UserError(
            f"the tokenizers of {options.tokenizers} are for {theirs[0]} to {theirs[1]}, not for "
            f"{options.source_language} to {options.target_language}: pass --source_language and --target_language, or "
            "other tokenizers"
        )


def vocabulary_size_for(pairs: int, vocabularies: str) -> int:
    """Pieces of a vocabulary made from so many training pairs, where nobody says; of a joint one, twice as many."""
    size = next((size for most, size in VOCABULARY_SIZES if pairs < most), LARGEST_VOCABULARY)
    return size * 2 if vocabularies == "joint" else size


def train_tokenizers(options: PairOptions, pairs: Pairs, split: Split) -> tuple[dict[str, Tokenizer], int]:
    """The source's and the target's tokenizer, made from the training part only, or from a sample of it; their size.

    Its rows are in random order, so that the first of them are one. The size is that of `--vocabulary_size`, or the one
    that was chosen instead: never too small for the characters of the text.
    """
    kind = KINDS[options.tokenizer]
    languages = dict(zip(SIDES, options.languages, strict=True))
    together = [SIDES] if options.vocabularies == "joint" else [(side,) for side in SIDES]
    most = VOCABULARY_LINES // len(together[0])
    if len(split.train) > most:
        say(f"  sample    a vocabulary is made from {most:,} of {len(split.train):,} training pairs, drawn by the seed")
    wanted = options.vocabulary_size or vocabulary_size_for(len(split.train), options.vocabularies)
    contents: dict[str, bytes] = {}
    sizes = []
    for sides in together:
        say(f"  making a vocabulary of {options.tokenizer} tokens")
        train = partial(_train, options, pairs, {side: languages[side] for side in sides}, split.train[:most], wanted)
        content, size = in_own_process(train) if len(split.train) > HEAD_ROWS else train()
        contents |= dict.fromkeys(sides, content)
        sizes.append(size)
    tokenizers = {side: kind(contents[side], languages[side]) for side in SIDES}
    size = min(tokenizer.vocabulary_size for tokenizer in tokenizers.values())
    if options.vocabulary_size is not None and size < options.vocabulary_size:
        warn(f"the training text has only {size:,} pieces, so a vocabulary is below --vocabulary_size")
    return tokenizers, max(sizes)


def _train(
    options: PairOptions, pairs: Pairs, languages: Mapping[str, Language], rows: np.ndarray, size: int
) -> tuple[bytes, int]:
    """The vocabulary of the texts at `rows`, of the sides that have a language here, and of how many pieces at most.

    These are `size`, or more where nobody asked for it and the text has too many characters.
    """

    def texts() -> Iterator[tuple[str, Language]]:
        return ((text, language) for side, language in languages.items() for text in texts_of(pairs, side, rows))

    if options.tokenizer == "word":
        return WordTokenizer.train(texts(), options.min_frequency), 0
    try:
        return SentencePieceTokenizer.train(texts(), size), size
    except TooManyCharacters as error:
        if options.vocabulary_size is not None:
            raise
        return SentencePieceTokenizer.train(texts(), error.advised_size), error.advised_size


# --- the report ------------------------------------------------------------------------------------------------------


def _statistics(lengths: np.ndarray) -> dict[str, float]:
    """Ids per row: total, mean, percentiles and maximum."""
    p50, p95, p99 = (float(value) for value in np.percentile(lengths, (50, 95, 99)))
    mean = round(float(lengths.mean()), 3)
    return {"total": int(lengths.sum()), "mean": mean, "p50": p50, "p95": p95, "p99": p99, "max": int(lengths.max())}


def _say_chosen(chosen: Mapping[str, str]) -> None:
    if chosen:
        say(f"  chosen    {'; '.join(chosen.values())} (options of these names decide otherwise)")


def _report(output: Path, options: PairOptions, meta: dict[str, Any], seconds: float) -> None:
    tokenizer, lengths, counts = meta["tokenizer"], meta["lengths"]["train"], meta["counts"]
    say(
        f"prepared {output} in {format_duration(seconds)}"
        + (" (generated text, not real data)" if meta["synthetic"] else "")
    )
    _say_chosen(meta["chosen"])
    say("  rows      " + ", ".join(f"{part} {meta['rows'][part]:,}" for part in PARTS))
    if counts["dropped_leaked"]:
        say(f"  dropped   {counts['dropped_leaked']:,} training pairs with a sentence that stands in another part")
    for part in ("test", "validation"):
        say(f"  leakage   {meta['leakage'][part]['words']}")
    for side in SIDES:
        name = meta["languages"][side]["name"]
        say(
            f"  {name:<9} {tokenizer[side]['vocabulary_size']:,} ids, {lengths[side]['mean']:.1f} per sentence "
            f"(max {lengths[side]['max']}), <unk> on test {tokenizer['unknown_share']['test'][side]:.2%}"
        )
    if meta["options"]["split"] == "random" and counts["duplicate_pairs"] > MANY_DUPLICATES * counts["pairs"]:
        warn(
            f"{counts['duplicate_pairs']:,} of {counts['pairs']:,} pairs repeat an earlier one, so many test pairs "
            "were trained on: --split grouped keeps them in one part"
        )
    leaks = meta["leakage"]["test"]["normalised"]["either"]
    if leaks and meta["options"]["split"] == "given" and not counts["dropped_leaked"]:
        say("            --drop_leaked leaves out the training pairs that share those sentences")
    if counts["pairs"] < FEW_PAIRS:
        warn(
            f"{counts['pairs']:,} pairs are few: with less than about {FEW_PAIRS:,} a run by configs/*/base.yaml is "
            "shorter than its warm-up (--budget 10m chooses a length and warm-up that fit), and little can be learned"
        )
    say_malformed(counts)
    warn_of_few(meta["rows"], "--validation_share" if options.validation is None else "--validation")
    say(f"  identity  {meta['fingerprint'][:16]}")


if __name__ == "__main__":
    run_main(main)
