"""Scores a trained model and writes the run's report.

    python -m training.evaluation.evaluate runs/NAME [--checkpoint best|last] [--data FOLDER] [--part test]
    torchrun --standalone --nproc-per-node=2 -m training.evaluation.evaluate runs/NAME   # the ranks share the sentences

Writes runs/NAME/report.html and, under runs/NAME/evaluation/, PART.json (scores), PART-translations.jsonl (source,
reference, translation of every row) and PART-attention-N.svg. A run that wandb shows gets the scores there, too.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from data_prep.files import write_atomically, writing_to
from data_prep.prepared import Part, Prepared, open_prepared
from data_prep.splits import PARTS
from data_prep.tokenizers import EOS, SEP, SOS
from launch.console import run_main, say
from training.engine.cluster import Cluster
from training.engine.tracking import read_metrics
from training.engine.wandb_tracker import publish_evaluation
from training.evaluation.attention_maps import attention_sheet
from training.evaluation.decoding import Translation, translate
from training.evaluation.report import SYNTHETIC, Example, Report, example_rows, render
from training.evaluation.scores import score_texts
from training.evaluation.trained import TrainedModel, open_trained
from training.gpt import Sequences, validation_scores

SHEETS = 3  # sentences with attention maps
SHEET_TOKENS = 32  # longer ones make a sheet that nobody can take in


def main(argv: Sequence[str] | None = None) -> int:
    """The command; raises UserError for everything the user can mend."""
    parser = argparse.ArgumentParser(prog="python -m training.evaluation.evaluate", description=__doc__.split("\n")[0])
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="run folder, for example runs/gpt-sample")
    parser.add_argument("--checkpoint", choices=("best", "last"), default="best", help="default best: on validation")
    parser.add_argument("--data", type=Path, help="prepared data to score on (default: what the run was trained on)")
    parser.add_argument("--part", choices=PARTS, default="test", help="default test")
    arguments = parser.parse_args(argv)
    with Cluster() as cluster:
        trained = open_trained(arguments.run_dir, arguments.checkpoint, device=cluster.device)
        data = open_prepared(arguments.data or trained.config.data)
        trained.check_fits(data)
        evaluate(trained, data, arguments.part, cluster)
    return 0


def evaluate(trained: TrainedModel, data: Prepared, part_name: str, cluster: Cluster) -> Path:
    """Decodes and scores one part of `data`, writes everything the module names, and returns the report's path."""
    part = data.part(part_name)
    # Every rank translates every world-size-th row: long and short ones are spread evenly, since rows come shuffled.
    sources = [part.source[row].tolist() for row in range(cluster.rank, len(part), cluster.world_size)]
    shares = cluster.gather(translate(trained.decoder, sources, label=f"translating {part_name}"))
    results = [shares[row % cluster.world_size][row // cluster.world_size] for row in range(len(part))]
    token_scores = _token_scores(trained, part, cluster)
    path = trained.run_dir / "report.html"
    if not cluster.is_first:
        return path
    translations = [trained.target_tokenizer.decode(result.ids) for result in results]
    scores = {
        "part": part_name,
        "split": data.meta["options"]["split"],
        "synthetic": data.meta["synthetic"],
        "data_fingerprint": data.fingerprint,
        "step": trained.step,
        **score_texts(translations, part.target_texts).to_json(),
        **token_scores,
        "cut_off": sum(not result.ended and result.problem is None for result in results),
        "not_translated": sum(result.problem is not None for result in results),
    }
    rows = example_rows(len(part))
    examples = [
        Example(part.source_texts[row], part.target_texts[row], translations[row], _note(results[row])) for row in rows
    ]
    sheets = _attention(trained, part, rows, results)
    report = Report(
        name=trained.run_dir.resolve().name,
        part=part_name,
        scores=scores,
        data=data.meta,
        training_data=trained.data,
        checkpoint=trained.checkpoint.manifest,
        metrics=read_metrics(trained.run_dir),
        examples=examples,
        attention=sheets,
        versions=_versions(trained),
    )
    folder = trained.run_dir / "evaluation"
    with writing_to(trained.run_dir, option="RUN"):
        folder.mkdir(exist_ok=True)
        write_atomically(folder / f"{part_name}.json", json.dumps(scores, indent=2, ensure_ascii=False) + "\n")
        write_atomically(folder / f"{part_name}-translations.jsonl", _translations(part, translations, results))
        for number, (_, svg) in enumerate(sheets, 1):
            write_atomically(folder / f"{part_name}-attention-{number}.svg", svg)
        write_atomically(path, render(report))
    _print(scores, examples)
    say(f"\nreport: {path}")
    shown = [(example.source, example.reference, example.translation, example.note) for example in examples]
    publish_evaluation(trained.run_dir, trained.config.wandb, scores, shown, path, part=part_name)
    return path


def _token_scores(trained: TrainedModel, part: Part, cluster: Cluster) -> dict[str, Any]:
    """Loss and accuracy as validation computes them in training; `unscored_pairs` are longer than the context."""
    sequences = Sequences(part, trained.config.model.context)
    validation = validation_scores(trained.model, sequences, cluster)
    trained.model.eval()  # validation hands the model back for training
    return {
        "loss": round(validation.loss, 5),
        "accuracy": round(validation.accuracy, 5),
        "target_tokens": int(sequences.target_tokens.sum()),
        "unscored_pairs": sequences.left_out,
    }


def _note(result: Translation) -> str:
    if result.problem is not None:
        return result.problem
    return "" if result.ended else "cut off at the length limit"


def _translations(part: Part, translations: Sequence[str], results: Sequence[Translation]) -> str:
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
) -> list[tuple[str, str]]:
    """Caption and SVG for the first of `rows` that are short enough, each over its whole sequence."""
    sheets: list[tuple[str, str]] = []
    for row in rows:
        source, result = part.source[row].tolist(), results[row]
        sequence = [SOS, *source, SEP, *result.ids, EOS]
        if len(sequence) > min(SHEET_TOKENS, trained.config.model.context) or not result.ended or len(sheets) == SHEETS:
            continue
        with torch.inference_mode():
            maps = trained.model.attention_maps(torch.tensor(sequence, device=trained.decoder.device))
        labels = [
            *trained.source_tokenizer.token_texts(sequence[: len(source) + 2]),
            *trained.target_tokenizer.token_texts(sequence[len(source) + 2 :]),
        ]
        sheets.append((part.source_texts[row], attention_sheet(maps, labels, separator=len(source) + 1)))
    return sheets


def _versions(trained: TrainedModel) -> dict[str, str]:
    own = {name: version(name) for name in ("torch", "sacrebleu", "matplotlib")}
    return {
        **{f"{name}, training": found for name, found in trained.checkpoint.manifest["versions"].items()},
        **{f"{name}, evaluation": found for name, found in own.items()},
        "python, evaluation": platform.python_version(),
    }


def _print(scores: dict[str, Any], examples: Sequence[Example]) -> None:
    for example in examples[:10]:
        note = f"  ({example.note})" if example.note else ""
        say(f"\n  {example.source}\n  = {example.reference}\n  > {example.translation}{note}")
    say(f"\n{scores['part']} part, {scores['split']} split, {scores['sentences']:,} sentences, step {scores['step']:,}")
    if scores["synthetic"]:
        say(f"  note         {SYNTHETIC}")
    say(f"  BLEU         {scores['bleu']:.2f}  {scores['bleu_signature']}")
    say(f"  chrF         {scores['chrf']:.2f}  {scores['chrf_signature']}")
    say(f"  normalised   {scores['bleu_normalised']:.2f}  {scores['bleu_normalised_signature']}")
    say(f"  exact        {scores['exact_matches']:,}, normalised {scores['exact_matches_normalised']:,}")
    say(f"  tokens       loss {scores['loss']:.4f}, accuracy {scores['accuracy']:.2%}")
    if scores["cut_off"] or scores["not_translated"]:
        say(f"  incomplete   {scores['cut_off']:,} cut off, {scores['not_translated']:,} not translated")


if __name__ == "__main__":
    run_main(main)
