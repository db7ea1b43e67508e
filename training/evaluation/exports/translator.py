"""A trained GPT as a folder that Hugging Face transformers loads without custom code.

The folder holds the weights (safetensors), the tokenizer, the settings of generation, and a model card (README.md).

Promises: before the folder appears, transformers has loaded it with nothing missing and nothing left over, and its
logits were the run's.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

from training.base.console import UserError, say
from training.base.files import check_room, read_json
from training.data.text import Conversions
from training.evaluation.exports import cards
from training.evaluation.exports.folder import (
    needing,
    origin,
    place_of,
    publish,
    save_model,
    unpublished,
    weights_in_words,
)
from training.evaluation.setting import Setting
from training.evaluation.translations.trained import TrainedModel
from training.models.gpt import GPT

# What the model card translates, by the source's language.
EXAMPLES = {"zh": ["你好。", "他喜欢买书。"], "en": ["Hello.", "He likes to buy books."]}

# Config, tokenizer and card; a tokenizer of 100,000 pieces takes about half of it.
_ROOM_BESIDE_WEIGHTS = 10_000_000


def export(trained: TrainedModel, output: Path) -> None:
    """Publishes `trained` at `output`, replacing what is there, and says so.

    Raises UserError when transformers has no such model, or is missing.
    """
    if not isinstance(trained.model, GPT):
        raise UserError(
            f"{trained.run_dir} holds a {trained.checkpoint.manifest['task']} model: transformers has no architecture "
            "that computes the same, so only models of training.gpt can be exported"
        )
    with needing("transformers", "tokenizers"):
        # Here, because nothing else needs them, and transformers is slow to import.
        from transformers.utils import logging

        from training.evaluation.exports import hugging_face
    logging.disable_progress_bar()
    model = hugging_face.model_of(trained.model)
    with unpublished(output) as folder:
        check_room(folder, sum(parameter.nbytes for parameter in model.parameters()) + _ROOM_BESIDE_WEIGHTS)
        save_model(model, folder)
        target, context = trained.languages[1], trained.model.options.context
        tokenizer = hugging_face.tokenizer_of(trained.run_dir / "tokenizer/source", target, context)
        hugging_face.save_tokenizer(tokenizer, folder)
        difference = hugging_face.check_same(folder, trained.model)
        about = {
            **origin(trained),
            "architecture": type(model).__name__,
            "parameters": model.num_parameters(),
            "transformers": version("transformers"),
        }
        publish(folder, output, card(trained, about, difference), about)
    say(f"{output}: step {trained.step:,} ({trained.weights}) of {trained.run_dir} as {about['architecture']}")
    say(f"  checked   loaded by transformers {about['transformers']}; logits differ by {difference:.1e} at most")
    say(f"  tokenizer {trained.source_tokenizer.kind}: <sos> {trained.languages[0]} <sep> from a text")
    for conversion in _conversions(trained):
        say(f"  note      it does not convert {conversion}, as was done to what the model was trained on")
    if _scores(trained) is None:
        say(f"  scores    none of these weights: `{_setting(trained).command(trained.run_dir)}`, then again")


def _conversions(trained: TrainedModel) -> list[str]:
    """What was done to the sources that it was trained on and is not done by the exported tokenizer, in words."""
    done = Conversions.of(trained.data["options"])
    words = {
        "traditional characters to simplified ones": done.simplify and trained.languages[0].variants,
        "HTML's entities to characters": done.unescape,
        "full-width letters and digits to ordinary ones": done.narrow,
    }
    return [each for each, was_done in words.items() if was_done]


def _setting(trained: TrainedModel) -> Setting:
    """What the model card has the scores of: the usual evaluation of these weights."""
    return Setting(weights=str(trained.weights))


def _scores(trained: TrainedModel) -> dict[str, Any] | None:
    """The test scores of the run's evaluation, if they are of these weights."""
    try:
        path = trained.run_dir / f"evaluation/{_setting(trained).label}.json"
        scores = read_json(path)
        steps = scores["checkpoints"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return scores if steps == [checkpoint.step for checkpoint in trained.checkpoints] else None


def card(trained: TrainedModel, about: dict[str, Any], difference: float) -> str:
    """The model card. `about`: the content of export.json."""
    source = trained.data["source"]
    header = {
        "language": [language.code for language in trained.languages],
        "license": "cc-by-2.0" if "CC BY 2.0" in source["licence"] else "unknown",
        "library_name": "transformers",
        "tags": ["translation"],
    }
    return cards.render(
        "gpt_card.md",
        {
            "header": header,
            "about": about,
            "weights": weights_in_words(about, trained.weights),
            "options": trained.model.options,
            "data": trained.data,
            "languages": trained.languages,
            "examples": EXAMPLES.get(trained.languages[0].code, ["..."]),
            "conversions": _conversions(trained),
            "place": place_of(source),
            "scores": _scores(trained),
            "difference": difference,
        },
    )
