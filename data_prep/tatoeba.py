"""Prepares English-Chinese sentence pairs (Tatoeba, as manythings.org hands them out) for training.

    python -m data_prep.tatoeba --source sample --output prepared/sample
    python -m data_prep.tatoeba --source cmn.txt --output prepared/tatoeba --split grouped --tokenizer sentencepiece

The output is complete or absent. The same command again finds its work done; with other options, or after the source
was edited, it refuses to touch what is there and says what differs.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from data_prep.preparing import claim_output, is_done, resolved, say_malformed, sha256_of_json, versions, write_meta
from data_prep.sources import DOWNLOAD_NAME, DOWNLOAD_URL, RawPairs, Source, open_source, read_pairs
from data_prep.splits import Split, grouped_split, leakage, random_split, side_of
from training.base.console import UserError, run_main, say, warn
from training.base.durations import format_duration
from training.base.files import nearest_folder, publish_folder, temporary_folder, writing_to
from training.base.options import Options, differing_keys, parse
from training.base.progress import Progress
from training.data.prepared import FORMAT, PARTS, Prepared, Ragged, list_files, open_prepared, write_part
from training.data.text import simplify
from training.data.tokenizers import (
    KINDS,
    UNK,
    Language,
    SentencePieceTokenizer,
    Tokenizer,
    WordTokenizer,
    load_tokenizer,
)

PROG = "python -m data_prep.tatoeba"
FEW_PAIRS = 3000  # the warm-up of configs/*/base.yaml does not fit into a run on much less
MANY_DUPLICATES = 0.1  # from this share on, they make scores on the random split misleading


class TatoebaOptions(Options):
    """The keys of `python -m data_prep.tatoeba`."""

    source: str = Field(
        description="sample (generated, to try things out), download (manythings.org), or a .txt or .zip file"
    )
    output: Path = Field(description="the folder to make, for example prepared/tatoeba")
    split: Literal["random", "grouped"] = Field(
        "random", description="random: the usual one, which leaks; grouped: no sentence is in two parts"
    )
    tokenizer: Literal["word", "sentencepiece"] = Field(
        "word", description="word: English words and Han characters; sentencepiece: byte-pair pieces"
    )
    vocabularies: Literal["joint", "separate"] = Field(
        "joint", description="joint: Chinese and English share their ids; separate: each side has its own"
    )
    vocabulary_size: int = Field(
        8000, ge=64, description="pieces of each sentencepiece vocabulary, at most (the sample wants about 600)"
    )
    min_frequency: int = Field(
        1,
        ge=1,
        description="rarer words of the training part become <unk>; with 1 a model never meets <unk> in training",
    )
    tokenizers: Path | None = Field(
        None, description="a prepared data set or a run whose tokenizers are taken, so that its model can read these"
    )
    simplify: bool = Field(False, description="convert the Chinese to simplified characters")
    validation_share: float = Field(0.05, gt=0, lt=0.5, description="validation's share of what is not test (10 %)")
    max_malformed_share: float = Field(
        0.01, ge=0, le=1, description="refuse a source with more lines that are no pair than this share"
    )
    seed: int = Field(1234, ge=0, lt=2**32, description="seed of the split")
    overwrite: bool = Field(False, description="replace an output that was made with other options or another source")

    @model_validator(mode="after")
    def _of_this_tokenizer(self) -> TatoebaOptions:
        of_new_ones = {"tokenizer", "vocabularies", "vocabulary_size", "min_frequency"} & self.model_fields_set
        if self.tokenizers is not None and of_new_ones:
            raise ValueError(f"{min(of_new_ones)} has no effect where tokenizers are taken: leave it out")
        other = "vocabulary_size" if self.tokenizer == "word" else "min_frequency"
        if other in of_new_ones:
            raise ValueError(f"{other} has no effect with tokenizer {self.tokenizer}: leave it out")
        return self

    def defining(self) -> dict[str, object]:
        """The options that the prepared content depends on."""
        keys = ["split", "simplify", "validation_share", "seed"]
        if self.tokenizers is None:
            keys += ["tokenizer", "vocabularies", "min_frequency" if self.tokenizer == "word" else "vocabulary_size"]
        found = {key: getattr(self, key) for key in sorted(keys)}
        if self.tokenizers is not None:
            found["tokenizers"] = {side: each.sha256 for side, each in take_tokenizers(self.tokenizers).items()}
        return found


def main(argv: Sequence[str] | None = None) -> int:
    """The command; raises UserError for everything the user can mend."""
    options, dry_run = parse(
        TatoebaOptions,
        sys.argv[1:] if argv is None else argv,
        prog=PROG,
        about="Prepares English-Chinese sentence pairs for training: cleans, splits, tokenises.",
    )
    began = time.monotonic()
    output, existing = claim_output(options.output, dry_run, options.overwrite, open_prepared, example="tatoeba")
    downloads = output.parent / "downloads"
    if options.source == "download" and not (downloads / DOWNLOAD_NAME).exists():
        if existing and existing.meta["source"]["kind"] == "download" and not options.overwrite:
            differences = _differences(existing, options, existing.meta["source"]["sha256"])
            if is_done(existing, differences, overwrite=False):  # although the zip file is gone
                return 0
        if dry_run:
            say(f"would download {DOWNLOAD_URL} to {downloads} and prepare {output} with:\n{resolved(options)}")
            return 0
    source = open_source(options.source, downloads)
    pairs = read_pairs(source, options.max_malformed_share)
    if existing and is_done(existing, _differences(existing, options, source.sha256), options.overwrite):
        return 0
    say(f"{source.place}: {len(pairs):,} pairs, {pairs.blank:,} blank and {len(pairs.malformed):,} malformed lines")
    if dry_run:
        say(f"would prepare {output} with:\n{resolved(options)}")
        return 0
    with writing_to(output), temporary_folder(output) as temporary:
        meta = build(temporary, options, source, pairs)
        publish_folder(temporary, output, replace=output.exists())
    _report(output, meta, time.monotonic() - began)
    return 0


def _differences(existing: Prepared, options: TatoebaOptions, sha256: str) -> list[str]:
    """What `existing` was made with and is not asked for now, each as `key: then -> now`."""
    lines = differing_keys(existing.meta["options"], options.defining())
    before = existing.meta["source"]
    if before["sha256"] != sha256:
        lines.append(
            f"the source's content: {before['place']} {before['sha256'][:12]} -> {options.source} {sha256[:12]}"
        )
    return lines


def build(folder: Path, options: TatoebaOptions, source: Source, pairs: RawPairs) -> dict[str, Any]:
    """Fills the empty `folder` with the prepared data set and returns its meta.json, which is written last."""
    chinese_texts = [simplify(text) for text in pairs.chinese] if options.simplify else pairs.chinese
    chinese, english = side_of(chinese_texts, "Chinese"), side_of(pairs.english, "English")
    if options.split == "random":
        split = random_split(len(pairs), options.validation_share, options.seed)
    else:
        split = grouped_split(english.normalised, chinese.normalised, options.validation_share, options.seed)

    if options.tokenizers is None:
        tokenizers = train_tokenizers(options, chinese.texts, english.texts, split)
    else:
        tokenizers = take_tokenizers(options.tokenizers)
    encoded = {}
    for side, texts in (("source", chinese.texts), ("target", english.texts)):
        tokenizers[side].save(folder / "tokenizer" / side)
        encoded[side] = _encode(tokenizers[side], texts)

    digests, lengths, unknown = {}, {}, {}
    for part in PARTS:
        rows = split.rows(part)
        ids = {side: encoded[side].take(rows) for side in encoded}
        columns = {
            "source": [chinese.texts[row] for row in rows],
            "target": [english.texts[row] for row in rows],
            "attribution": [pairs.attribution[row] for row in rows],
        }
        digests[part] = write_part(folder / part, rows, columns, ids["source"], ids["target"])
        lengths[part] = {side: _statistics(ids[side]) for side in ids}
        unknown[part] = {side: round(float(np.mean(ids[side].values == UNK)), 6) for side in ids}

    identity = {
        "options": options.defining(),
        "source": source.sha256,
        "tokenizers": {side: tokenizer.sha256 for side, tokenizer in tokenizers.items()},
        "parts": digests,
    }
    meta = {
        "format": FORMAT,
        "fingerprint": sha256_of_json(identity),
        "synthetic": source.synthetic,
        "options": options.defining(),
        "source": source.about(pairs),
        "counts": pairs.counts(),
        "rows": {part: len(split.rows(part)) for part in PARTS},
        "groups": {"count": split.groups, "largest": split.largest_group} if split.groups else None,
        "leakage": leakage(split, chinese, english),
        "tokenizer": {
            "kind": tokenizers["source"].kind,
            "vocabularies": "joint" if len({each.sha256 for each in tokenizers.values()}) == 1 else "separate",
            **{
                side: {"vocabulary_size": tokenizer.vocabulary_size, "sha256": tokenizer.sha256}
                for side, tokenizer in tokenizers.items()
            },
            "unknown_share": unknown,
        },
        "lengths": lengths,
        "files": list_files(folder),
        "versions": versions("datasets", "pyarrow", "numpy", "sentencepiece", "OpenCC"),
    }
    write_meta(folder, meta)
    return meta


def take_tokenizers(folder: Path) -> dict[str, Tokenizer]:
    """The source (Chinese) and target (English) tokenizer of a prepared data set or a run."""
    if not (folder / "tokenizer/source").is_dir():
        near = nearest_folder(folder)
        raise UserError(f"--tokenizers {folder} is no prepared data set and no run of sentence pairs{near}")
    return {side: load_tokenizer(folder / "tokenizer" / side) for side in ("source", "target")}


def train_tokenizers(
    options: TatoebaOptions, chinese: Sequence[str], english: Sequence[str], split: Split
) -> dict[str, Tokenizer]:
    """The source (Chinese) and target (English) tokenizer, made from the training part only."""
    texts: dict[str, list[tuple[str, Language]]] = {
        "source": [(chinese[row], "zh") for row in split.train],
        "target": [(english[row], "en") for row in split.train],
    }
    if options.vocabularies == "joint":
        both = _train(options, texts["source"] + texts["target"])
        contents = {"source": both, "target": both}
    else:
        contents = {side: _train(options, texts[side]) for side in texts}
    kind = KINDS[options.tokenizer]
    return {"source": kind(contents["source"], "zh"), "target": kind(contents["target"], "en")}


def _train(options: TatoebaOptions, texts: Sequence[tuple[str, Language]]) -> bytes:
    if options.tokenizer == "word":
        return WordTokenizer.train(texts, options.min_frequency)
    content = SentencePieceTokenizer.train(texts, options.vocabulary_size)
    size = SentencePieceTokenizer(content, "zh").vocabulary_size
    if size < options.vocabulary_size:
        warn(f"the training text has only {size:,} pieces, so a vocabulary is below --vocabulary_size")
    return content


def _encode(tokenizer: Tokenizer, texts: Sequence[str]) -> Ragged:
    rows = []
    with Progress(f"tokenising {tokenizer.language}", len(texts), "rows") as progress:
        for text in texts:
            rows.append(np.array(tokenizer.encode(text), dtype=np.int32))
            progress.advance()
    return Ragged.of(rows)


def _statistics(ids: Ragged) -> dict[str, float]:
    """Ids per row: total, mean, percentiles and maximum."""
    p50, p95, p99 = (float(value) for value in np.percentile(ids.lengths, (50, 95, 99)))
    mean = round(float(ids.lengths.mean()), 3)
    return {"total": len(ids.values), "mean": mean, "p50": p50, "p95": p95, "p99": p99, "max": int(ids.lengths.max())}


def _report(output: Path, meta: dict[str, Any], seconds: float) -> None:
    tokenizer, lengths = meta["tokenizer"], meta["lengths"]["train"]
    say(
        f"prepared {output} in {format_duration(seconds)}"
        + (" (generated text, not real data)" if meta["synthetic"] else "")
    )
    say("  rows      " + ", ".join(f"{part} {meta['rows'][part]:,}" for part in PARTS))
    for part in ("test", "validation"):
        say(f"  leakage   {meta['leakage'][part]['words']}")
    for side, name in (("source", "Chinese"), ("target", "English")):
        say(
            f"  {name}   {tokenizer[side]['vocabulary_size']:,} ids, {lengths[side]['mean']:.1f} per sentence "
            f"(max {lengths[side]['max']}), <unk> on test {tokenizer['unknown_share']['test'][side]:.2%}"
        )
    counts = meta["counts"]
    if meta["options"]["split"] == "random" and counts["duplicate_pairs"] > MANY_DUPLICATES * counts["pairs"]:
        warn(
            f"{counts['duplicate_pairs']:,} of {counts['pairs']:,} pairs repeat an earlier one, so many test pairs "
            "were trained on: --split grouped keeps them in one part"
        )
    if counts["pairs"] < FEW_PAIRS:
        warn(
            f"{counts['pairs']:,} pairs are few: with less than about {FEW_PAIRS:,} a run by configs/*/base.yaml is "
            "shorter than its warm-up (--optim.warmup_steps shortens that), and little can be learned"
        )
    say_malformed(counts)
    say(f"  identity  {meta['fingerprint'][:16]}")


if __name__ == "__main__":
    run_main(main)
