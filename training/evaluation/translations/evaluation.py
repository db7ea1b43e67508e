"""Scores a translator's translations of one part of a data set, and writes the run's report.

Under runs/NAME/evaluation/ it leaves LABEL-translations.jsonl (source, reference, translation of every row),
LABEL-attention-N.svg and LABEL.json (scores). The report also shows the scores of the run's other evaluations, and
those under the same label of the other runs in the folder of this one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from training.base.console import UserError, say
from training.base.files import write_atomically
from training.data.languages import Language, language_of
from training.data.prepared import Part, Prepared
from training.data.tokenizers import UNK
from training.data.translation_metrics import bleu_of
from training.engine.cluster import Cluster
from training.engine.wandb.tracker import publish_evaluation
from training.evaluation.setting import Search, Setting
from training.evaluation.translations.report import SYNTHETIC, Example, content_of, ranked_rows, runs_beside
from training.evaluation.translations.scores import (
    score_by_length,
    score_by_seen,
    score_texts,
    score_with_all_references,
    with_interval,
)
from training.evaluation.translations.seen import seen_rows, training_part
from training.evaluation.translations.trained import TrainedModel
from training.evaluation.translations.translators import EnsembleTranslator
from training.models.decoding import Translation, translate
from training.report.examples import example_rows
from training.report.page import REPORT, Evaluated, evaluation_folder, write_evaluated, write_page
from training.report.sheets import Sheet
from training.translation import held_out_scores

SHEETS = 3  # sentences with attention maps
SHEET_TOKENS = 32  # longer ones make a sheet that nobody can take in


def evaluate(trained: TrainedModel, data: Prepared, part_name: str, search: Search, cluster: Cluster) -> Path:
    """Decodes and scores one part of `data`, writes everything the module names, and returns the report's path.

    Raises UserError when the part has nothing that can be scored, or the target language has no BLEU here.
    """
    part = data.part(part_name)
    _check_part(trained, data, part)
    bleu_of(trained.languages[1])  # before anything that takes long
    results = _translated(trained, part, search, cluster)
    token_scores = _token_scores(trained, part, cluster)
    train = training_part(trained, data)
    seen = None if train is None else seen_rows(part, train, trained.languages, cluster)
    path = trained.run_dir / REPORT
    if not cluster.is_first:
        return path
    others = tuple(other.run_dir.name for other in trained.others)
    label = Setting.of(trained, data, part_name, search, others).label
    translations = [trained.target_tokenizer.decode(result.ids) for result in results]
    scores = {
        **trained.about(data, part_name, label),
        "others": {other.run_dir.name: other.step for other in trained.others},
        "languages": {side: each.code for side, each in zip(("source", "target"), trained.languages, strict=True)},
        "split": data.meta["options"]["split"],
        "search": str(search),
        **_text_scores(part, translations, seen, trained.languages[1]),
        **token_scores,
        "empty": sum(not result.ids and result.problem is None for result in results),
        "cut_off": sum(not result.ended and result.problem is None for result in results),
        "not_translated": sum(result.problem is not None for result in results),
        "sources_with_unknown_words": sum(UNK in part.source[row] for row in range(len(part))),
        "translations_with_unknown_words": sum(UNK in result.ids for result in results),
    }
    shown = _shown(trained, data, part, results, translations, scores)
    examples, sheets = shown["content"]["examples"], shown["content"]["attention"]
    with evaluation_folder(trained.run_dir) as folder:
        write_atomically(folder / f"{label}-translations.jsonl", _lines(part, translations, results))
        for earlier in range(1, SHEETS + 1):
            (folder / f"{label}-attention-{earlier}.svg").unlink(missing_ok=True)
        for number, (_, sheet) in enumerate(sheets, 1):
            write_atomically(folder / f"{label}-attention-{number}.svg", sheet.svg())
        write_evaluated(folder, label, shown)
        # The scores last: where they stand, their translations do too.
        write_atomically(folder / f"{label}.json", json.dumps(scores, indent=2, ensure_ascii=False) + "\n")
        write_page(trained.run_dir, within=folder)
    _print(scores, examples)
    say(f"\nscores: {folder / label}.json\nreport: {path}")
    table = [(example.source, example.reference, example.translation, example.note) for example in examples]
    # Numbers can be compared there; tables are in the report.
    figures = {key: value for key, value in scores.items() if not isinstance(value, dict | list)}
    publish_evaluation(trained.run_dir, trained.config.wandb, figures, table, path, part=label)
    return path


def _check_part(trained: TrainedModel, data: Prepared, part: Part) -> None:
    """Raises UserError unless `part` has a pair that fits the model."""
    if len(part) == 0:
        raise UserError(f"the {part.name} part of {data.folder} is empty: choose another --part, or other --data")
    longest, room = trained.decoder.longest_source, trained.decoder.room
    lengths = zip(part.source.lengths.tolist(), part.target.lengths.tolist(), strict=True)
    if not any(source <= longest and target < room(source) for source, target in lengths):
        raise UserError(
            f"none of the {len(part):,} pairs in the {part.name} part of {data.folder} fits the model, which takes "
            f"sources of {longest:,} tokens at most: choose another --part, or other --data"
        )


def _translated(trained: TrainedModel, part: Part, search: Search, cluster: Cluster) -> list[Translation]:
    """The translation of every row; every rank translates its share."""
    # Every world-size-th row: long and short ones are spread evenly, since rows come shuffled.
    sources = [part.source[row].tolist() for row in cluster.own_part(range(len(part)))]
    translated = translate(
        trained.decoder,
        sources,
        beam_size=search.beam_size,
        length_penalty=search.length_penalty,
        label=f"translating {part.name}",
    )
    shares = cluster.gather(translated, list[Translation])
    return [shares[row % cluster.world_size][row // cluster.world_size] for row in range(len(part))]


def _token_scores(trained: TrainedModel, part: Part, cluster: Cluster) -> dict[str, Any]:
    """Loss and accuracy as validation computes them in training; `unscored_pairs` are too long for the model.

    Nothing for an ensemble, whose members lay sentences out in ways of their own.
    """
    if isinstance(trained.decoder, EnsembleTranslator):
        return {}
    pairs = trained.decoder.pairs(part)
    validation = held_out_scores(trained.model, pairs, cluster)
    trained.model.eval()  # validation hands the model back for training
    return {
        "loss": round(validation.loss, 5),
        "accuracy": round(validation.accuracy, 5),
        "target_tokens": int(pairs.target_tokens.sum()),
        "unscored_pairs": pairs.left_out,
    }


def _text_scores(
    part: Part, translations: Sequence[str], seen: Sequence[bool] | None, language: Language
) -> dict[str, Any]:
    """Scores of the translations against the references, in all and by kind of sentence."""
    references = list(part.target_texts)
    return {
        **score_texts(translations, references, language),
        "all_references": score_with_all_references(list(part.source_texts), translations, references, language),
        "by_length": score_by_length(part.source.lengths.tolist(), translations, references, language),
        "by_seen": None if seen is None else score_by_seen(seen, translations, references, language),
    }


def _shown(
    trained: TrainedModel,
    data: Prepared,
    part: Part,
    results: Sequence[Translation],
    translations: Sequence[str],
    scores: dict[str, Any],
) -> Evaluated:
    """What the page shows."""

    def example(row: int, *notes: str) -> Example:
        note = "; ".join(filter(None, (*notes, _note(results[row]))))
        return Example(part.source_texts[row], part.target_texts[row], translations[row], note)

    rows = example_rows(len(part))
    ranked = ranked_rows(translations, list(part.target_texts))
    evaluation = {
        "checkpoint": trained.checkpoint.manifest,
        "versions": trained.versions("torch", "sacrebleu"),
        "scores": scores,
        "languages": {
            side: {"code": each.code, "name": each.name, "direction": each.direction}
            for side, each in zip(("source", "target"), trained.languages, strict=True)
        },
        "data": data.meta,
        "training_data": trained.data,
        "parameters": sum(
            parameter.numel() for each in (trained, *trained.others) for parameter in each.model.parameters()
        ),
        "examples": [example(row) for row in rows],
        "ranked": [
            (kind, [example(row, f"chrF {chrf:.1f}") for row, chrf in picked]) for kind, picked in ranked.items()
        ],
        "attention": _attention(trained, part, rows, results),
        "beside": runs_beside(trained.run_dir, scores["label"], scores["task"]),
    }
    return content_of(evaluation)


def _note(result: Translation) -> str:
    if result.problem is not None:
        return result.problem
    return "" if result.ended else "cut off at the length limit"


def _lines(part: Part, translations: Sequence[str], results: Sequence[Translation]) -> str:
    rows = zip(part.rows.tolist(), part.source_texts, part.target_texts, translations, results, strict=True)
    return "".join(
        json.dumps(
            {"row": row, "source": source, "reference": reference, "translation": translation, "note": _note(result)},
            ensure_ascii=False,
        )
        + "\n"
        for row, source, reference, translation, result in rows
    )


def _attention(
    trained: TrainedModel, part: Part, rows: Sequence[int], results: Sequence[Translation]
) -> list[tuple[str, Sheet]]:
    """The source and a sheet over source and translation for the first of `rows` that are short enough."""
    sheets: dict[str, Sheet] = {}
    for row in rows:
        source, result = part.source[row].tolist(), results[row]
        if not result.ended or len(source) + len(result.ids) + 3 > SHEET_TOKENS or len(sheets) == SHEETS:
            continue
        tokenizers = trained.source_tokenizer, trained.target_tokenizer
        sheet = trained.decoder.attention(source, result.ids, *tokenizers)
        if sheet is not None:
            sheets[part.source_texts[row]] = sheet  # the same sentence would give the same map
    return list(sheets.items())


def _directed(codes: dict[str, str]) -> str:
    """Which languages are translated, in words."""
    return f"{language_of(codes['source'])} to {language_of(codes['target'])}"


def _together(scores: dict[str, Any]) -> str:
    """Of an ensemble, the other members in words."""
    names = [f"{name} (step {step:,})" for name, step in scores["others"].items()]
    return f", together with {', '.join(names)}" if names else ""


def _print(scores: dict[str, Any], examples: Sequence[Example]) -> None:
    for example in examples[:10]:
        note = f"  ({example.note})" if example.note else ""
        say(f"\n  {example.source}\n  = {example.reference}\n  > {example.translation}{note}")
    say(
        f"\n{_directed(scores['languages'])}: {scores['part']} part, {scores['split']} split, "
        f"{scores['sentences']:,} sentences, step {scores['step']:,} ({scores['weights']}), "
        f"{scores['search']}{_together(scores)}"
    )
    if scores["synthetic"]:
        say(f"  note         {SYNTHETIC}")
    say(f"  BLEU         {with_interval(scores, 'bleu')}  {scores['bleu_signature']}")
    say(f"  chrF         {with_interval(scores, 'chrf')}  {scores['chrf_signature']}")
    say(f"  normalised   {with_interval(scores, 'bleu_normalised')}  {scores['bleu_normalised_signature']}")
    both = scores["all_references"]
    say(
        f"  multi-ref    BLEU {with_interval(both, 'bleu')}, chrF {with_interval(both, 'chrf')}: "
        f"{both['sentences']:,} distinct sources with {both['references']:,} references"
    )
    say(f"  exact        {scores['exact_matches']:,}, normalised {scores['exact_matches_normalised']:,}")
    if not scores["others"]:
        say(f"  tokens       loss {scores['loss']:.4f}, accuracy {scores['accuracy']:.2%}")
    if scores["empty"] or scores["cut_off"] or scores["not_translated"]:
        say(
            f"  incomplete   {scores['empty']:,} empty, {scores['cut_off']:,} cut off, "
            f"{scores['not_translated']:,} not translated"
        )
    unknown = scores["sources_with_unknown_words"], scores["translations_with_unknown_words"]
    if any(unknown):
        say(f"  <unk>        in {unknown[0]:,} sources, in {unknown[1]:,} translations")
    say(f"\n  {'':<28} {'sentences':>9} {'BLEU':>6} {'chrF':>6}")
    groups = [(f"source of {group['source_tokens']} tokens", group) for group in scores["by_length"]]
    if scores["by_seen"] is None:
        say("  the data that the run was trained on is not at hand: seen and unseen rows cannot be told apart")
    else:
        names = {"seen": "a side seen in training", "unseen": "neither side seen"}
        groups += [(names[name], group) for name, group in scores["by_seen"].items()]
    for name, group in groups:
        if group["sentences"]:
            say(f"  {name:<28} {group['sentences']:>9,} {group['bleu']:>6.2f} {group['chrf']:>6.2f}")
