"""The model card of exported adapters, merged or not: what they are, how they are loaded, where they come from."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from training.data.conversations import DISC_LAW_SFT
from training.evaluation.chat_model.adapters import TrainedAdapters
from training.evaluation.exports.folder import origin_rows, place_of
from training.evaluation.exports.merging import Difference

# The licences of the models that Relay is made for, by how their names begin; the first that fits. As their pages on
# the hub say.
_LICENCES = (
    ("Qwen2.5-3B", "qwen-research", "Qwen Research License, which allows no commercial use"),
    ("Qwen2.5-72B", "qwen", "Qwen License"),
    ("Qwen2.5-", "apache-2.0", "Apache-2.0"),
    ("SmolLM2-", "apache-2.0", "Apache-2.0"),
)
_ON_THE_HUB = {"apache-2.0", "mit"}  # what the hub knows by name; others are written as `other`

LAW_QUESTION, ANY_QUESTION = "公司拖欠工资，我该怎么办？", "What can you tell me?"


def licence_of(name: str, folder: Path) -> tuple[str | None, str]:
    """The base model's licence as the hub writes it, None if it is not known, and in words."""
    try:
        header = yaml.safe_load((folder / "README.md").read_text(encoding="utf-8").split("---")[1])
        found = header.get("license_name") or header["license"]
        return str(found), str(found)
    except (OSError, ValueError, IndexError, KeyError, AttributeError, yaml.YAMLError):
        pass
    short = name.rstrip("/").rpartition("/")[2]
    for beginning, identifier, words in _LICENCES:
        if short.startswith(beginning):
            return identifier, words
    return None, "not known here: see where it comes from"


def card(trained: TrainedAdapters, about: dict[str, Any], *, difference: str) -> str:
    """Markdown with the header that the Hugging Face Hub reads. about: the content of export.json so far.

    difference: how far the logits are from the run's, as rows of a table.
    """
    config, data, base = trained.config, trained.data, trained.config.base_model
    is_merged = about["kind"] == "merged"
    licence, in_words = licence_of(base, trained.base)
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", base) is not None and not Path(base).is_dir()
    law = DISC_LAW_SFT.rpartition("/")[2] in data["source"]["licence"]
    header: dict[str, Any] = {
        **({"base_model": base} if on_hub else {}),
        **({"datasets": [DISC_LAW_SFT], "language": ["zh"]} if law else {}),
        "library_name": "transformers" if is_merged else "peft",
        "pipeline_tag": "text-generation",
        "license": licence if licence in _ON_THE_HUB else "other" if licence else "unknown",
        **({"license_name": licence} if licence and licence not in _ON_THE_HUB else {}),
        "tags": ["qlora", *(["law"] if law else [])],
    }
    lora, quantised = config.lora, config.quantisation.kind == "nf4"
    what = f"{'DoRA' if lora.dora else 'LoRA'} adapters of rank {lora.rank}"
    held = "in 4 bits (NF4)" if quantised else "unquantised"
    intro = (
        f"{base}, with {what} merged into it: {about['parameters']:,} parameters in {about['dtype']}."
        if is_merged
        else f"{what[0].upper()}{what[1:]} for {base}: {about['parameters']:,} numbers."
    )
    return f"""---
{yaml.safe_dump(header, sort_keys=False, allow_unicode=True).strip()}
---

# {about["run"]}

{intro} Trained with Relay on {data["rows"]["train"]:,} conversations, the base model being held {held}.

## Use

```python
{_merged_usage(about) if is_merged else _adapters_usage(trained)}
messages = [{{"role": "user", "content": "{LAW_QUESTION if law else ANY_QUESTION}"}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
outputs = model.generate(**inputs.to(model.device), max_new_tokens=256)
print(tokenizer.decode(outputs[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

{_merged_notes(quantised) if is_merged else _adapters_notes(quantised)}

It was written and checked with {", ".join(f"{name} {number}" for name, number in about["versions"].items())}.

## Where it comes from

| | |
| --- | --- |
{origin_rows(about, trained.weights)}
| base model | {base}{f", revision {config.base_revision}" if config.base_revision else ""} |
| its fingerprint | `{about["base_fingerprint"]}` |
| adapters | {_adapters_in_words(trained)} |
| trained on | {data["rows"]["train"]:,} conversations of {place_of(data["source"])} |
| its source, SHA-256 | `{data["source"]["sha256"]}` |
| prepared data | `{data["fingerprint"]}` |
| logits compared on | {about["compared_on"]} |
{difference}

Licence of the base model: {in_words}

Licence of the data: {data["source"]["licence"]}
"""


def _adapters_in_words(trained: TrainedAdapters) -> str:
    lora = trained.config.lora
    targets = lora.targets if isinstance(lora.targets, str) else ", ".join(lora.targets)
    scale = "alpha / square root of rank" if lora.rslora else "alpha / rank"
    return f"rank {lora.rank}, alpha {lora.alpha:g} (scaled by {scale}), dropout {lora.dropout:g}, on {targets}"


def _adapters_usage(trained: TrainedAdapters) -> str:
    config = trained.config
    compute = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[trained.precision.name]
    # Under fp16 what the layers add up stays in fp32, as in training: it can exceed the largest number of fp16.
    dtype = "float32" if compute == "float16" else compute
    revision = f', revision="{config.base_revision}"' if config.base_revision else ""
    quantised = config.quantisation.kind == "nf4"
    quantisation = f"""quantisation = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant={config.quantisation.double},
    bnb_4bit_compute_dtype=torch.{compute},
)
"""
    more = ", quantization_config=quantisation" if quantised else ""
    imports = "AutoModelForCausalLM, AutoTokenizer" + (", BitsAndBytesConfig" if quantised else "")
    return f"""import torch
from peft import PeftModel
from transformers import {imports}

folder = "."  # where this file is
base = {json.dumps(config.base_model, ensure_ascii=False)}
{quantisation if quantised else ""}tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(base{revision}, dtype=torch.{dtype}{more})
model = PeftModel.from_pretrained(model, folder)"""


def _merged_usage(about: dict[str, Any]) -> str:
    return f"""import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # where this file is
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.{about["dtype"]})"""


def _adapters_notes(quantised: bool) -> str:
    if not quantised:
        return "The base model was not quantised in training; in 4 bits the adapters meet another one."
    return (
        "The adapters were trained on what these 4 bits leave of the base model. On the unquantised one, or merged "
        "into it, they make another model: `python -m training.evaluation.export_adapters --merge` merges them into "
        "the right one."
    )


def _merged_notes(quantised: bool) -> str:
    if not quantised:
        return "The adapters were added in fp32, and the sum was rounded once."
    return (
        "The adapters were trained on what 4 bits leave of the base model, so that is what they were merged into: its "
        "4 bits unpacked, the adapters added in fp32, the sum rounded once. It needs neither peft nor bitsandbytes."
    )


def merged_rows(apart: Difference, rounding: Difference | None, learned: Difference, dtype: str) -> str:
    """The differences of a merged model, as rows of the last table."""
    rows = [("this model's from the run's, in fp32", apart)]
    if rounding:
        rows.append((f"for comparison: the run's in {dtype} from itself in fp32", rounding))
    rows.append(("for comparison: the base model's from the run's", learned))
    return "\n".join(f"| {what} | {found} |" for what, found in rows)
