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

from training.base.console import UserError, run_main, say
from training.base.files import check_room
from training.evaluation.exports.folder import (
    add_output_options,
    needing,
    origin,
    origin_rows,
    output_of,
    place_of,
    publish,
    task_of,
    unpublished,
)
from training.evaluation.setting import Setting, add_model_options
from training.evaluation.translations.trained import TrainedModel, open_trained
from training.models.gpt import GPT

# Config, tokenizer and card; a tokenizer of 100,000 pieces takes about half of it.
_ROOM_BESIDE_WEIGHTS = 10_000_000


def main(argv: Sequence[str] | None = None) -> int:
    """The command; raises UserError for everything the user can mend."""
    parser = argparse.ArgumentParser(prog="python -m training.evaluation.export", description=__doc__.split("\n")[0])
    add_model_options(parser)
    add_output_options(parser)
    arguments = parser.parse_args(argv)
    output = output_of(arguments, example="exports/gpt")
    if task_of(arguments.run_dir) == "qlora":
        raise UserError(
            f"{arguments.run_dir} holds adapters of training.qlora: export them with `python -m "
            f"training.evaluation.export_adapters {arguments.run_dir} --output {arguments.output}`"
        )
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
    with needing("transformers", "tokenizers"):
        # Here, because nothing else needs them, and transformers is slow to import.
        import transformers

        from training.evaluation.exports import hugging_face
    transformers.utils.logging.disable_progress_bar()
    model = hugging_face.model_of(trained.model)
    with unpublished(output) as folder:
        check_room(folder, sum(parameter.nbytes for parameter in model.parameters()) + _ROOM_BESIDE_WEIGHTS)
        model.save_pretrained(folder)
        tokenizer = hugging_face.tokenizer_of(trained.run_dir / "tokenizer/source", trained.model.options.context)
        tokenizer.save_pretrained(folder)
        difference = hugging_face.check_same(folder, trained.model)
        about = {
            **origin(trained.run_dir, trained.step, trained.weights, trained.checkpoints),
            "data_fingerprint": trained.data["fingerprint"],
            "architecture": type(model).__name__,
            "parameters": model.num_parameters(),
            "transformers": version("transformers"),
        }
        publish(folder, output, card(trained, about, difference), about)
    return about, difference


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
    assert isinstance(trained.model, GPT)
    data, options = trained.data, trained.model.options
    source = data["source"]
    licence = "cc-by-2.0" if "CC BY 2.0" in source["licence"] else "unknown"
    norm = {"layer": "LayerNorm", "rms": "RMSNorm"}[options.norm]
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
{origin_rows(about, trained.weights)}
| difference from them | at most {difference:.1e} in the logits of {options.context} random tokens, fp32 on a CPU |
| trained on | {data["rows"]["train"]:,} sentence pairs of {place_of(source)}, {data["options"]["split"]} split |
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
