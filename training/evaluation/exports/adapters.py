"""Adapters of a QLoRA training as a folder that peft loads, or merged into a model that needs no peft.

Not merged: the adapters as `PeftModel.from_pretrained` takes them, some megabytes, for the base model in 4 bits.
Merged: base and adapters as one model in 16 bits, which `AutoModelForCausalLM` loads alone. Either way with tokenizer
and chat template. As GGUF: the merged model as one file for llama.cpp and Ollama.

Promises: before the folder appears it has been loaded as users load it. Adapters give the run's logits to the bit, a
merged model up to what computing in its type changes.

Merging needs as much memory as the merged model, and about 3 GB: 18 GB for 7 billion parameters, on a CPU.
"""

from __future__ import annotations

import gc
import shutil
import warnings
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from training.base.console import UserError, say, warn
from training.base.files import check_room, copy_plain
from training.data.chat import ChatTokenizer, load_chat_tokenizer, reopened, user
from training.data.conversations import open_conversations
from training.engine.checkpoint import checkpoints
from training.engine.precision import PrecisionName
from training.engine.status import read_sessions
from training.evaluation.chat_model.adapters import TrainedAdapters, open_adapters
from training.evaluation.chat_model.unpacking import free_memory
from training.evaluation.exports import gguf_file, modelfile
from training.evaluation.exports.adapter_card import card, merged_differences
from training.evaluation.exports.folder import origin, publish, save_model, unpublished
from training.evaluation.exports.merging import (
    Difference,
    compute_in_fp32,
    difference,
    give_memory_back,
    load_plain,
    logits_of,
    memory_of,
    merged,
)
from training.models.base_model import load_base_model, on_meta, read_config
from training.qlora import COMPUTE_TYPES, LIBRARIES

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig

CPU = torch.device("cpu")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

# So many conversations, up to so many tokens of each, are what logits are compared on.
_SEQUENCES, _TOKENS = 8, 96

# The run's model in 16-bit arithmetic is so far from itself in fp32, in the mean; a merged model, whose residual stream
# is in 16 bits too, was found 1.0 to 1.7 times as far. One made of the original weights is further by orders.
ROUNDING = 4.0
# In fp32 only the order of sums changes: 3e-7 to 3e-6 of the mean logit, found on 2 and on 30 layers.
TOLERANCE = 3e-5

_ROOM_BESIDE_WEIGHTS = 1_000_000  # config, card and the names of tensors; the tokenizer's size is known


@dataclass(frozen=True)
class Prompts:
    """Sequences to compare logits on: ids [B, T], padded on the right, and their lengths [B]."""

    ids: Tensor
    lengths: Tensor
    origin: str

    def __str__(self) -> str:
        return f"{int(self.lengths.sum()):,} tokens of {self.origin}"


def open_run(run_dir: Path, weights: str, base_model: str | None) -> TrainedAdapters:
    """The adapters as `open_adapters` has them, computed as they were trained; raises UserError as that does.

    Raises UserError too where the run's tokenizer is missing or another one.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    give_memory_back()
    # The 4 bits are those that the weights have in this type.
    trained = open_adapters(run_dir, weights, device=CPU, base_model=base_model, precision=trained_in(run_dir))
    folder = trained.run_dir / "tokenizer"
    mend = f"copy tokenizer/ from the run's prepared data, {trained.config.data}"
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder} is missing or incomplete: {mend}")
    _check_tokenizer(trained, folder, mend)
    return trained


def trained_in(run_dir: Path) -> PrecisionName | None:
    """The type that the run computes in; None where its folder does not tell."""
    try:
        newest = checkpoints(run_dir)[-1]
        wanted = newest.manifest["config"]["precision"]
        if wanted != "auto":
            return wanted
        if newest.state()["scaler"] is not None:
            return "fp16"
        return "fp32" if read_sessions(run_dir)[-1]["device"] == "cpu" else "bf16"
    except (IndexError, OSError, ValueError, KeyError, TypeError):
        return None


def _check_tokenizer(trained: TrainedAdapters, folder: Path, mend: str) -> None:
    """Raises UserError unless the folder has the tokenizer that the run's data was prepared with."""
    if reopened(folder, trained.data["tokenizer"]).sha256 != trained.checkpoint.manifest["data"]["tokenizer"]:
        raise UserError(f"{folder} is not the tokenizer that the adapters were trained with: {mend}")


def prompts_of(trained: TrainedAdapters) -> Prompts:
    """Held-out conversations of the run's data if it is still there, else random ids."""
    try:
        data = open_conversations(trained.config.data)
        part = next(part for part in map(data.part, ("test", "validation", "train")) if len(part))
        ours = data.fingerprint == trained.data["fingerprint"]
    except (UserError, OSError, StopIteration):
        ours = False
    if not ours:
        vocabulary = trained.model.model.get_base_model().config.get_text_config().vocab_size
        ids = torch.randint(vocabulary, (_SEQUENCES, _TOKENS), generator=torch.Generator().manual_seed(0))
        return Prompts(ids, torch.full((_SEQUENCES,), _TOKENS), "random ids")
    rows = np.unique(np.linspace(0, len(part) - 1, _SEQUENCES).astype(np.int64))
    lengths = torch.from_numpy(part.ids.lengths[rows]).clamp(max=_TOKENS)
    ids = torch.from_numpy(part.ids.padded(rows, data.meta["tokenizer"]["pad_id"]))[:, : int(lengths.max())]
    return Prompts(ids, lengths, f"{len(rows)} conversations of the {part.name} part")


class Export:
    """One export of trained adapters. Its methods use the model up, and can be called once."""

    def __init__(self, trained: TrainedAdapters):
        self.trained = trained
        self.prompts = prompts_of(trained)
        self.about: dict[str, Any] = {
            **origin(trained),
            "base_model": trained.config.base_model,
            "base_revision": trained.config.base_revision,
            "base_fingerprint": trained.checkpoint.manifest["built_on"]["base_model"],
            "quantisation": trained.config.quantisation.model_dump(),
        }
        self.versions = {name: version(name) for name in LIBRARIES}

    @property
    def title(self) -> str:
        """What is exported, for the first line that is printed."""
        trained = self.trained
        return f"step {trained.step:,} ({trained.weights}) of {trained.run_dir}"

    def adapters(self, output: Path) -> None:
        """Publishes the adapters as peft has them."""
        import peft

        trained, model = self.trained.without_model(), self.trained.model.model
        expected = self._logits(model)
        numbers = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        with unpublished(output) as folder:
            check_room(folder, 4 * numbers + self._tokenizer_bytes + _ROOM_BESIDE_WEIGHTS)
            config = model.peft_config["default"]
            config.base_model_name_or_path, config.revision = trained.config.base_model, trained.config.base_revision
            # peft makes a set of whole paths out of all-linear; others, vLLM among them, know names of layers.
            config.target_modules = sorted({name.rpartition(".")[2] for name in config.target_modules})
            model.save_pretrained(folder, save_embedding_layers=False)
            self._copy_tokenizer(folder)
            _check_tokenizer(trained, folder, "in an export it is read as another: add --merge")
            self._settle_template(folder)
            del model
            self._let_go()
            base = load_base_model(trained.base, trained.config.quantisation, self._compute_type, CPU)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                loaded = peft.PeftModel.from_pretrained(base, folder).eval()
            missing = [str(each.message) for each in caught if "missing adapter keys" in str(each.message)]
            apart = difference(expected, self._logits(loaded))
            # The same bits in, the same computation, on the same machine.
            if missing or apart.max != 0:
                raise UserError(
                    f"peft {self.versions['peft']} loads the exported adapters as others (logits differ by "
                    f"{apart}{'; ' + missing[0][:200] if missing else ''}): install the version that requirements.txt "
                    "names"
                )
            self.about |= {
                "kind": "adapters",
                "parameters": numbers,
                "versions": self.versions,
                "compared_on": str(self.prompts),
                "difference": apart.rounded(),
            }
            found = [("difference from the run's", "none, bit for bit")]
            publish(folder, output, card(trained, self.about, found), self.about)
        say(f"{output}: {self.title} as adapters for peft, {numbers:,} numbers")
        say(f"  checked   loaded by peft {self.versions['peft']} on {trained.base}; logits are the run's, bit for bit")
        say(f"  base      {trained.config.base_model}, which is not in the folder; --merge makes a model of both")

    def merged(self, output: Path, dtype_name: str) -> None:
        """Publishes base and adapters as one model in the type of this name."""
        trained, config = self.trained.without_model(), self._config
        self._tell_memory(config, dtype_name)
        with unpublished(output) as folder:
            check_room(folder, self._bytes_in(DTYPES[dtype_name]))
            found = self._write_merged(folder, config, dtype_name, computed_in=dtype_name)
            self.about |= {"kind": "merged", "dtype": dtype_name, "versions": self.versions}
            publish(folder, output, card(trained, self.about, merged_differences(*found, dtype_name)), self.about)
        numbers = f"{self.about['parameters']:,} parameters in {dtype_name}"
        say(f"{output}: {self.title} merged into {trained.config.base_model}, {numbers}")
        say(f"  checked   loaded by transformers {self.versions['transformers']} without peft and bitsandbytes")
        self._tell_differences(*found, dtype_name)

    def gguf(self, output: Path, kind: str) -> None:
        """Publishes base and adapters as a GGUF file of this kind, and a Modelfile where the chat template has one."""
        trained, config = self.trained.without_model(), self._config
        gguf_file.check_convertible(config, trained.run_dir / "tokenizer")
        versions = {**self.versions, "gguf": version("gguf")}
        run = self.about["run"]
        name = f"{run}-{kind}.gguf"
        self._tell_memory(config, "float16")
        with unpublished(output) as folder:
            check_room(folder, 2 * self._bytes_in(torch.float16))
            whole = folder / "merged"
            whole.mkdir()
            # The weights fit float16, GGUF's 16 bits; what is computed with them may not, so bfloat16 compares.
            found = self._write_merged(whole, config, "float16", computed_in="bfloat16")
            gguf_file.write(whole, folder / name, kind, name=run, end_id=trained.data["tokenizer"]["end_id"])
            has_modelfile = trained.is_chat and modelfile.write(load_chat_tokenizer(str(whole)), folder, name)
            shutil.rmtree(whole)
            self.about |= {"kind": "gguf", "dtype": kind, "modelfile": has_modelfile, "versions": versions}
            publish(folder, output, card(trained, self.about, merged_differences(*found, "bfloat16")), self.about)
        say(f"{output}: {self.title} merged into {trained.config.base_model}, as GGUF in {kind}")
        say(f"  checked   what was merged: loaded by transformers; {name}: read back by gguf {versions['gguf']}")
        self._tell_differences(*found, "bfloat16")
        if has_modelfile:
            say(f"  run it    ollama create {run} -f {output}/Modelfile && ollama run {run}")
        elif trained.is_chat:
            warn(
                "the chat template has no form that a Modelfile can have, so there is none; llama.cpp reads it as it is"
            )

    @property
    def _config(self) -> PretrainedConfig:
        return read_config(self.trained.base, self.trained.config.quantisation)

    def _bytes_in(self, dtype: torch.dtype) -> int:
        """Of the merged model's folder."""
        weights = sum(parameter.nbytes for parameter in on_meta(self._config, dtype).parameters())
        return weights + self._tokenizer_bytes + _ROOM_BESIDE_WEIGHTS

    def _write_merged(
        self, folder: Path, config: PretrainedConfig, dtype_name: str, *, computed_in: str
    ) -> tuple[Difference, Difference | None, Difference]:
        """Fills `folder` with the merged model, checks it, and adds to `about`.

        computed_in: the type for the comparison. Returns how far from the run's logits in fp32 are those of the merged
        model, the run's own in this type (None: it is fp32), and the base model's. Raises UserError where it is
        another model than the run's.
        """
        expected, learned, rounding = self._measured(DTYPES[computed_in])
        self._check_range(rounding, computed_in)
        written = self._write_model(folder, config, DTYPES[dtype_name])
        self._let_go()
        apart = difference(self._logits(load_plain(folder, DTYPES[computed_in])), expected)
        self._check_range(apart, dtype_name)
        most = ROUNDING * rounding.mean if rounding else TOLERANCE * expected.abs().mean().item()
        if not apart.mean <= most:
            raise UserError(
                f"the merged model is another one than the run's (logits differ by {apart}; up to {most:.1e} in "
                f"the mean would be rounding): install the versions that requirements.txt names"
            )
        self.about |= {
            **written,
            "compared_on": str(self.prompts),
            "difference": apart.rounded(),
            "of_computing_in_this_type": rounding and rounding.rounded(),
            "of_the_base_model": learned.rounded(),
        }
        return apart, rounding, learned

    def _tell_differences(
        self, apart: Difference, rounding: Difference | None, learned: Difference, computed_in: str
    ) -> None:
        say(f"  logits    differ from the run's by {apart}, on {self.prompts}")
        if rounding:
            say(f"            computing the run's model in {computed_in} makes a difference of {rounding}")
        say(f"            the base model without adapters differs by {learned}")

    def _tell_memory(self, config: PretrainedConfig, dtype_name: str) -> None:
        """Says how much memory merging needs, and warns where less is free."""
        logits = 4 * int(self.prompts.lengths.sum()) * config.get_text_config().vocab_size
        in_4_bits = self.trained.config.quantisation.kind == "nf4"
        needed = memory_of(config, DTYPES[dtype_name], logits, in_4_bits=in_4_bits)
        say(f"merging in {dtype_name} needs about {needed / 1e9:.1f} GB of memory")
        free = free_memory()
        if free is not None and needed > free:
            warn(f"{free / 1e9:.1f} GB of memory are free: the system may end this process; nothing would be lost")

    def _measured(self, dtype: torch.dtype) -> tuple[Tensor, Difference, Difference | None]:
        """The run's logits in fp32; how far from them those of the base model are, and the run's own in 16 bits."""
        model = self.trained.model.model
        compute_in_fp32(model)
        expected = self._logits(model)
        with model.disable_adapter():
            learned = difference(self._logits(model), expected)
        if dtype == torch.float32:
            return expected, learned, None
        with torch.autocast("cpu", dtype=dtype):
            return expected, learned, difference(self._logits(model), expected)

    def _write_model(self, folder: Path, config: PretrainedConfig, dtype: torch.dtype) -> dict[str, Any]:
        """The merged model, its tokenizer and settings; returns what it is, for export.json."""
        plain = merged(self.trained.model.model, config, dtype)
        plain.generation_config = _generation_of(self.trained)
        for_transformers_4 = save_model(plain, folder)
        self._copy_tokenizer(folder)
        self._settle_template(folder)
        return {
            "architecture": type(plain).__name__,
            "parameters": plain.num_parameters(),
            "for_transformers_4": for_transformers_4,
        }

    @property
    def _compute_type(self) -> torch.dtype:
        return COMPUTE_TYPES[self.trained.precision.name]

    @property
    def _tokenizer_bytes(self) -> int:
        return sum(path.stat().st_size for path in (self.trained.run_dir / "tokenizer").rglob("*") if path.is_file())

    def _copy_tokenizer(self, folder: Path) -> None:
        """As it was published, which any version reads, with the base model's config.json, which has a say in that."""
        source = self.trained.run_dir / "tokenizer"
        for path in source.rglob("*"):
            name = path.relative_to(source)
            named = f"tokenizer/{name.as_posix()}" in self.trained.data["files"]
            if named and not (folder / name).exists():  # a merged model has a config.json of its own
                (folder / name).parent.mkdir(exist_ok=True)
                copy_plain(path, folder / name)

    def _settle_template(self, folder: Path) -> None:
        """Makes the exported template do by itself what it was told in training.

        Raises UserError where its prompt is another one all the same.
        """
        tokenizer, question = self.trained.tokenizer, [user("问题？")]
        if not isinstance(tokenizer, ChatTokenizer) or tokenizer.settled_template() is None:
            return
        tokenizer.settle(folder)
        if load_chat_tokenizer(str(folder)).prompt(question) != tokenizer.prompt(question):
            raise UserError(
                f"the chat template of {self.trained.run_dir / 'tokenizer'} cannot be exported as it is used"
            )

    def _let_go(self) -> None:
        """Frees the run's model, for which there is no room beside another one."""
        self.trained = self.trained.without_model()
        gc.collect()

    def _logits(self, model: torch.nn.Module) -> Tensor:
        return logits_of(model, self.prompts.ids, self.prompts.lengths).float()

    def _check_range(self, found: Difference | None, dtype_name: str) -> None:
        if found and not np.isfinite(found.mean):
            raise UserError(
                f"in {dtype_name} this model computes no finite logits: its values exceed that type; export it with "
                "--merge --dtype bfloat16"
            )


def _generation_of(trained: TrainedAdapters) -> GenerationConfig:
    """The base model's settings of generation, which also ends with the token that ends an answer in training."""
    import transformers

    try:
        settings = transformers.GenerationConfig.from_pretrained(trained.base, local_files_only=True)
    except OSError:  # it has none
        settings = transformers.GenerationConfig()
    tokenizer = trained.data["tokenizer"]
    known = settings.eos_token_id
    ends = [known] if isinstance(known, int) else list(known or [])
    if tokenizer["end_id"] not in ends:
        settings.eos_token_id = [tokenizer["end_id"], *ends]
    if settings.pad_token_id is None:
        settings.pad_token_id = tokenizer["pad_id"]
    return settings
