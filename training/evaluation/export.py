"""Writes a trained GPT as a folder that Hugging Face transformers loads without custom code.

    python -m training.evaluation.export runs/NAME --output FOLDER [--checkpoint WHICH] [--overwrite]

The folder holds the weights (safetensors), the tokenizer, the settings of generation, a model card (README.md), and
export.json: what it was made from, and the size and SHA-256 of every other file.

Promises: the folder is complete or absent; before it appears, transformers has loaded it with nothing missing and
nothing left over, and its logits were the run's. Nothing is replaced but an earlier export that nobody has changed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from data_prep.files import check_room, publish_folder, recover, temporary_folder, write_atomically, writing_to
from data_prep.prepared import list_files
from launch.console import UserError, run_main, say
from training.engine.checkpoint import EMA, Checkpoint
from training.evaluation.setting import Setting, add_model_options
from training.evaluation.trained import TrainedModel, open_trained
from training.models.gpt import GPT

FORMAT = "relay-export-1"
ABOUT = "export.json"

# Config, tokenizer and card; a tokenizer of 100,000 pieces takes about half of it.
_ROOM_BESIDE_WEIGHTS = 10_000_000


def main(argv: Sequence[str] | None = None) -> int:
    """The command; raises UserError for everything the user can mend."""
    parser = argparse.ArgumentParser(prog="python -m training.evaluation.export", description=__doc__.split("\n")[0])
    add_model_options(parser)
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="the folder to make")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export that was not changed since")
    arguments = parser.parse_args(argv)
    # Of a link to a folder, the folder is replaced, not the link.
    output = arguments.output.resolve() if arguments.output.is_symlink() else arguments.output
    if output.name in ("", "..") or output.is_file():
        raise UserError(f"--output {output} is not the name of a folder to make; choose one, for example exports/gpt")
    with writing_to(output):
        if recover(output):
            say(f"an earlier replacement of {output} was interrupted; the previous export is back")
    _check_replaceable(output, arguments.overwrite)
    trained = open_trained(arguments.run_dir, arguments.checkpoint, device=torch.device("cpu"))
    about, difference = export(trained, output)
    say(f"{output}: step {trained.step:,} ({trained.weights}) of {trained.run_dir} as {about['architecture']}")
    say(f"  checked   loaded by transformers {about['transformers']}; logits differ by {difference:.1e} at most")
    say(f"  tokenizer {trained.source_tokenizer.kind}: <sos> Chinese <sep> from a text")
    if trained.data["options"]["simplify"]:
        say("  note      it does not convert traditional characters to simplified ones, which the model was trained on")
    if _scores(trained) is None:
        say(f"  scores    none of these weights: `{_setting(trained).command(trained.run_dir)}`, then again")
    return 0


def _check_replaceable(output: Path, overwrite: bool) -> None:
    """Raises UserError if there is anything at `output` that must be kept."""
    if not output.exists() or not any(output.iterdir()):
        return
    try:
        about = json.loads((output / ABOUT).read_text(encoding="utf-8"))
        ours = about["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError):
        ours = False
    if not ours:
        raise UserError(f"--output {output} holds something else than an export; choose a new folder")
    if not overwrite:
        raise UserError(
            f"{output} holds step {about['step']:,} of {about['run']} already; choose another --output, or replace it "
            "with --overwrite"
        )
    found = {name: file for name, file in list_files(output).items() if name != ABOUT}
    changed = sorted(name for name in {**found, **about["files"]} if found.get(name) != about["files"].get(name))
    if changed:
        raise UserError(
            f"{output} was changed since it was exported ({', '.join(changed[:3])}): choose another --output, or "
            "remove the folder yourself if the changes are of no use"
        )


def export(trained: TrainedModel, output: Path) -> tuple[dict[str, Any], float]:
    """Publishes `trained` at `output`, replacing what is there.

    Returns the content of export.json and the largest difference from the run's logits that was found. Raises UserError
    when transformers has no such model, or is missing.
    """
    if not isinstance(trained.model, GPT):
        raise UserError(
            f"{trained.run_dir} holds a {trained.checkpoint.manifest['task']} model: transformers has no architecture "
            "that computes the same, so only models of training.gpt can be exported"
        )
    try:
        # Here, because nothing else needs them, and transformers is slow to import.
        from training.evaluation import hugging_face
    except ModuleNotFoundError as error:
        if error.name not in ("transformers", "tokenizers"):
            raise
        raise UserError(f"the export needs {error.name}: `pip install -r requirements.txt`") from None
    hugging_face.transformers.utils.logging.disable_progress_bar()
    model = hugging_face.model_of(trained.model)
    with writing_to(output), temporary_folder(output) as folder:
        check_room(folder, sum(parameter.nbytes for parameter in model.parameters()) + _ROOM_BESIDE_WEIGHTS)
        model.save_pretrained(folder)
        for weights in folder.glob("*.safetensors"):
            # The library makes them for their owner's eyes only; an export is for others too.
            weights.chmod((folder / "config.json").stat().st_mode)
        tokenizer = hugging_face.tokenizer_of(trained.run_dir / "tokenizer/source", trained.model.options.context)
        tokenizer.save_pretrained(folder)
        difference = hugging_face.check_same(folder, trained.model)
        about = {
            "format": FORMAT,
            "run": trained.run_dir.resolve().name,
            "step": trained.step,
            "weights": str(trained.weights),
            "checkpoints": {
                checkpoint.step: _sha256_of_weights(trained, checkpoint) for checkpoint in trained.checkpoints
            },
            "data_fingerprint": trained.data["fingerprint"],
            "architecture": type(model).__name__,
            "parameters": model.num_parameters(),
            "transformers": version("transformers"),
        }
        write_atomically(folder / "README.md", card(trained, about, difference))
        about["files"] = list_files(folder)
        write_atomically(folder / ABOUT, json.dumps(about, indent=2) + "\n")
        publish_folder(folder, output, replace=output.exists())
    return about, difference


def _sha256_of_weights(trained: TrainedModel, checkpoint: Checkpoint) -> str:
    name = EMA if trained.weights.which == "ema" else "model.safetensors"
    return checkpoint.manifest["files"][name]["sha256"]


def _setting(trained: TrainedModel) -> Setting:
    """What the model card has the scores of: the usual evaluation of these weights."""
    return Setting(weights=str(trained.weights))


def _scores(trained: TrainedModel) -> dict[str, Any] | None:
    """The test scores of the run's evaluation, if they are of these weights."""
    try:
        path = trained.run_dir / f"evaluation/{_setting(trained).label}.json"
        scores = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return scores if scores.get("checkpoints") == [checkpoint.step for checkpoint in trained.checkpoints] else None


def card(trained: TrainedModel, about: dict[str, Any], difference: float) -> str:
    """The model card, Markdown with the header that the Hugging Face Hub reads. `about`: the content of export.json."""
    data, options = trained.data, trained.config.model
    source = data["source"]
    # A path on somebody's machine means nothing elsewhere.
    place = source["place"] if source["kind"] == "download" else Path(source["place"]).name
    licence = "cc-by-2.0" if "CC BY 2.0" in source["licence"] else "unknown"
    norm = {"layer": "LayerNorm", "rms": "RMSNorm"}[options.norm]
    which = {"best": "the best on validation", "last": "the newest", "ema": "the moving average of the weights"}
    steps = ", ".join(f"{step:,}" for step in about["checkpoints"])
    weights = f"the mean of steps {steps}" if len(about["checkpoints"]) > 1 else f"step {steps}"
    notes = [
        "A prompt is `<sos> Chinese <sep>`, which the tokenizer makes of a text; the answer ends with `<eos>`. Batches "
        "are padded on the left. Generation is greedy and ends with the model's context "
        f"({options.context} tokens, prompt and padding included) unless it is given another `max_length`."
    ]
    if data["options"]["simplify"]:
        notes.append(
            "The model was trained on simplified characters. The tokenizer does not convert traditional ones: do it "
            'before, with `opencc.OpenCC("t2s").convert(text)` of the package OpenCC.'
        )
    if trained.source_tokenizer.kind == "word":
        notes.append(
            "The tokenizer takes single Han characters and lower-case Latin words, and drops punctuation: the "
            "translations are lower-case words without punctuation too. Its ids can differ from those in training on "
            "characters that joined Unicode after version 11, and on a Greek word's last sigma."
        )
    if about["architecture"] == "ArceeForCausalLM" and options.dropout:
        notes.append(
            f"It was trained with dropout {options.dropout:g} on embeddings and on the outputs of each block, which "
            "this architecture does not have; that matters for training it further only."
        )
    usage = "\n\n".join(notes)
    return f"""---
language:
- zh
- en
license: {licence}
library_name: transformers
tags:
- translation
---

# {about["run"]}

A GPT that translates Chinese to English, trained from scratch with Relay: {about["parameters"]:,} parameters,
{options.layers} layers, width {options.width}, {options.heads} heads, {options.positions} positions, {norm}. For
transformers it is a `{about["architecture"]}`.

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # where this file is
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
inputs = tokenizer(["你好。", "他喜欢买书。"], padding=True, return_tensors="pt")
outputs = model.generate(**inputs)
answers = outputs[:, inputs["input_ids"].shape[1] :]
print(tokenizer.batch_decode(answers, skip_special_tokens=True))
```

{usage}

It needs transformers 5 or newer; it was written and checked with {about["transformers"]}.

## Scores

{_score_table(trained)}

## Where it comes from

| | |
| --- | --- |
| weights | {weights} of the run {about["run"]}, {which[trained.weights.which]} |
| their files, SHA-256 | {", ".join(f"`{sha256}`" for sha256 in about["checkpoints"].values())} |
| difference from them | at most {difference:.1e} in the logits of {options.context} random tokens, fp32 on a CPU |
| trained on | {data["rows"]["train"]:,} sentence pairs of {place}, {data["options"]["split"]} split |
| its source, SHA-256 | `{source["sha256"]}` |
| prepared data | `{data["fingerprint"]}` |

Licence of the sentences that it was trained on: {source["licence"]}
"""


def _score_table(trained: TrainedModel) -> str:
    scores = _scores(trained)
    if scores is None:
        return "These weights have not been evaluated."
    rows = [
        ("BLEU", f"{scores['bleu']:.2f}", f"`{scores['bleu_signature']}`"),
        ("chrF", f"{scores['chrf']:.2f}", f"`{scores['chrf_signature']}`"),
        ("BLEU, normalised", f"{scores['bleu_normalised']:.2f}", f"`{scores['bleu_normalised_signature']}`"),
        ("loss", f"{scores['loss']:.4f}", "nats per target token"),
    ]
    lines = [f"The {scores['sentences']:,} test sentences of the {scores['split']} split."]
    if scores["synthetic"]:
        lines[0] += " They are a synthetic sample corpus: these scores say nothing about real translation."
    else:
        lines[0] += f" Leakage: {trained.data['leakage']['test']['words']}."
    lines += ["", "| score | value | how |", "| --- | --- | --- |"]
    # A bar parts cells even in code, as signatures have it.
    cells = [" | ".join(cell.replace("|", r"\|") for cell in row) for row in rows]
    return "\n".join([*lines, *(f"| {row} |" for row in cells)])


if __name__ == "__main__":
    run_main(main)
