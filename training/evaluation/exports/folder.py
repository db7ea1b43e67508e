"""What every export has in common: where it may appear, how it appears, and what stands in it about itself.

Promises: the folder is complete or absent; nothing is replaced but an earlier export that nobody has changed. A model's
config.json has the keys of transformers 5 and of 4, so that both load the same model.
export.json says what an export was made from, and holds the size and SHA-256 of every other file.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.base.console import UserError, say
from training.base.files import publish_folder, recover, temporary_folder, write_atomically, writing_to
from training.base.options import FLAG
from training.data.prepared import list_files
from training.engine.weights import Weights
from training.evaluation.runs import TrainedRun

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT = "relay-export-1"
ABOUT = "export.json"
CARD = "README.md"

_SHARD = "2GB"

WHICH = {
    "best": "the best on validation",
    "last": "the newest",
    "step": "which was asked for",
    "ema": "the moving average of the weights",
}


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """The options that say where an export goes."""
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="the folder to make")
    parser.add_argument("--overwrite", **FLAG, help="replace an earlier export that was not changed since")


def output_of(arguments: argparse.Namespace, *, example: str) -> Path:
    """The folder that these options ask for. Raises UserError if it cannot be made, or holds what must be kept."""
    # A link to a folder stays; the folder is replaced.
    output: Path = arguments.output.resolve() if arguments.output.is_symlink() else arguments.output
    if output.name in ("", "..") or output.is_file():
        raise UserError(f"--output {output} is not the name of a folder to make; choose one, for example {example}")
    with writing_to(output):
        if recover(output):
            say(f"an earlier replacement of {output} was interrupted; the previous export is back")
    _check_replaceable(output, arguments.overwrite)
    return output


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


@contextmanager
def unpublished(output: Path) -> Iterator[Path]:
    """An empty folder to fill and then hand to `publish`; disk errors that a user can mend become a UserError."""
    with writing_to(output), temporary_folder(output) as folder:
        yield folder


def save_model(model: PreTrainedModel, folder: Path) -> bool:
    """Writes the weights of `model`, config.json and the settings of generation; whether transformers 4 loads it, too.

    transformers 4 passes over the keys for rotary positions that 5 writes, and computes another model in silence.
    """
    model.save_pretrained(folder, max_shard_size=_SHARD)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    older = older_keys(config)
    write_atomically(path, json.dumps({**config, **(older or {})}, indent=2, sort_keys=True) + "\n")
    return older is not None


def older_keys(config: dict[str, Any]) -> dict[str, Any] | None:
    """The keys of transformers 4 (4.57.6) for the rotary positions of `config`, a config.json of transformers 5.

    None where that is not known here: each kind of layers has positions of its own, or the language model's config is
    inside that of a larger model. None, too, where scores of attention are capped (Gemma 2): 4.57.6 computes attention
    by a kernel that leaves the caps out, and no key keeps it from that.
    """
    if config.get("attn_logit_softcapping"):
        return None
    rotary = config.get("rope_parameters")
    if rotary is None and "text_config" not in config:
        return {}
    if rotary is None or "rope_theta" not in rotary:
        return None
    scaling = dict(rotary)
    base, share = scaling.pop("rope_theta"), scaling.pop("partial_rotary_factor", None)
    scaled = {} if scaling["rope_type"] == "default" else {"rope_scaling": scaling}
    if config["model_type"] == "gpt_neox":
        return {"rotary_emb_base": base, "rotary_pct": share, **scaled}
    return {"rope_theta": base, **({} if share is None else {"partial_rotary_factor": share}), **scaled}


def publish(folder: Path, output: Path, card: str, about: dict[str, Any]) -> None:
    """Adds the card and export.json to the filled `folder`, and makes it appear as `output`, whatever is there.

    `about` gets the list of files, as export.json has it.
    """
    write_atomically(folder / CARD, card)
    for weights in folder.glob("*.safetensors"):
        # The libraries make them for their owner's eyes only; an export is for others, too.
        weights.chmod((folder / CARD).stat().st_mode)
    about["files"] = list_files(folder)
    write_atomically(folder / ABOUT, json.dumps(about, indent=2, ensure_ascii=False) + "\n")
    publish_folder(folder, output, replace=output.exists())


def origin(run: TrainedRun) -> dict[str, Any]:
    """What an export was made from: the beginning of its export.json."""
    return {
        "format": FORMAT,
        "run": run.run_dir.resolve().name,
        "step": run.step,
        "weights": str(run.weights),
        "checkpoints": run.weights.sums(run.checkpoints),
        "data_fingerprint": run.data["fingerprint"],
    }


def weights_in_words(about: dict[str, Any], weights: Weights) -> str:
    """The same for the model card: which weights of which run."""
    steps = ", ".join(f"{step:,}" for step in about["checkpoints"])
    which = f"the mean of steps {steps}" if len(about["checkpoints"]) > 1 else f"step {steps}"
    return f"{which} of the run {about['run']}, {WHICH[weights.which]}"


def place_of(source: dict[str, Any]) -> str:
    """Where data came from, for others: a path on somebody's machine means nothing elsewhere."""
    if "parts" in source:  # a split that was given
        return ", ".join(f"{part} {place_of(each)}" for part, each in source["parts"].items())
    return source["place"] if source["kind"] in ("download", "hub") else Path(source["place"]).name


@contextmanager
def needing(*packages: str) -> Iterator[None]:
    """Turns the lack of one of these packages into a UserError that says what to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in packages:
            raise
        raise UserError(f"the export needs {error.name}: `pip install -r requirements.txt`") from None
