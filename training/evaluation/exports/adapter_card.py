"""The model card of exported adapters, merged or not: what they are, how they are loaded, where they come from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from training.base.files import is_there
from training.base.hub import is_hub_name
from training.base.strict_yaml import read_yaml
from training.data.conversations import DISC_LAW_SFT
from training.evaluation.chat_model.adapters import TrainedAdapters
from training.evaluation.exports import cards
from training.evaluation.exports.folder import place_of, weights_in_words
from training.evaluation.exports.merging import Difference

# The licences of the models that Relay is made for, by how their names begin; the first that fits. As their pages on
# the hub say.
_LICENCES = (
    ("Qwen2.5-3B", "qwen-research", "Qwen Research License, which allows no commercial use"),
    ("Qwen2.5-72B", "qwen", "Qwen License"),
    ("Qwen2.5-", "apache-2.0", "Apache-2.0"),
    ("SmolLM2-", "apache-2.0", "Apache-2.0"),
)
_MOST_HEADER = 100_000  # characters of a card that are looked at
_ON_THE_HUB = {"apache-2.0", "mit"}  # what the hub knows by name; others are written as `other`


def licence_of(name: str, folder: Path) -> tuple[str | None, str]:
    """The base model's licence as the hub writes it, None if it is not known, and in words."""
    try:
        card = folder / "README.md"
        if not is_there(card):
            raise FileNotFoundError
        with card.open(encoding="utf-8") as file:
            header = read_yaml(file.read(_MOST_HEADER).split("---")[1])
        found = header.get("license_name") or header["license"]
        return str(found), str(found)
    except (OSError, ValueError, IndexError, KeyError, AttributeError, yaml.YAMLError):
        pass
    short = name.rstrip("/").rpartition("/")[2]
    for beginning, identifier, words in _LICENCES:
        if short.startswith(beginning):
            return identifier, words
    return None, "not known here: see where it comes from"


def card(trained: TrainedAdapters, about: dict[str, Any], differences: Sequence[tuple[str, object]]) -> str:
    """The card. about: the content of export.json so far.

    differences: pairs of what logits are compared, in words, and how far apart they are.
    """
    config, data, base = trained.config, trained.data, trained.config.base_model
    licence, in_words = licence_of(base, trained.base)
    on_hub = is_hub_name(base) and not Path(base).is_dir()
    law = DISC_LAW_SFT.rpartition("/")[2] in data["source"]["licence"]
    header: dict[str, Any] = {
        **({"base_model": base} if on_hub else {}),
        **({"datasets": [DISC_LAW_SFT], "language": ["zh"]} if law else {}),
        "library_name": {"merged": "transformers", "adapters": "peft"}.get(about["kind"], "gguf"),
        "pipeline_tag": "text-generation",
        "license": licence if licence in _ON_THE_HUB else "other" if licence else "unknown",
        **({"license_name": licence} if licence and licence not in _ON_THE_HUB else {}),
        "tags": ["qlora", *(["law"] if law else [])],
    }
    return cards.render(
        "gguf_card.md" if about["kind"] == "gguf" else "adapter_card.md",
        {
            "header": header,
            "about": about,
            "weights": weights_in_words(about, trained.weights),
            "base": base,
            "revision": config.base_revision,
            "lora": config.lora,
            "quantisation": config.quantisation,
            "compute": {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[trained.precision.name],
            "data": data,
            "learned": "conversations" if trained.is_chat else "texts",
            "place": place_of(data["source"]),
            "law": law,
            "licence": in_words,
            "differences": differences,
        },
    )


def merged_differences(
    apart: Difference, rounding: Difference | None, learned: Difference, dtype: str
) -> list[tuple[str, Difference]]:
    """What the card of a merged model compares."""
    return [
        ("this model's from the run's, in fp32", apart),
        *([(f"for comparison: the run's in {dtype} from itself in fp32", rounding)] if rounding else []),
        ("for comparison: the base model's from the run's", learned),
    ]
