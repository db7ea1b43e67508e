"""The base model that adapters are trained on: where its files are, what identifies it, and how it is loaded.

Promises: a model of the hub is fetched by one process of a node, while the others wait for it; what is loaded has all
of its files; nothing of the base is ever trained.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field
from pydantic_core import from_json
from safetensors import SafetensorError
from torch import Tensor, nn

from training.base.console import UserError
from training.base.files import nearest_folder, read_json
from training.base.hub import fetch_snapshot, is_hub_name
from training.base.known_files import sha256_once
from training.base.options import Options
from training.engine.precision import gpu_of

if TYPE_CHECKING:
    import bitsandbytes
    from transformers import PretrainedConfig, PreTrainedModel

# On a CPU it looks on the hub for a package with faster kernels, and would report that there is none.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

CONFIG = "config.json"
_ADAPTERS = "adapter_config.json"
_INDEX = "model.safetensors.index.json"
_WHOLE = "model.safetensors"
_ABOUT = ["*.json", "*.model", "*.txt", "*.jinja"]

# What a name in the index may be: a file beside it whose tensors can be read without running code.
_WEIGHTS = re.compile(r"\w[\w.-]*\.safetensors")

# A variable of transformers'.
_READS_NOT_AHEAD = "HF_DEACTIVATE_ASYNC_LOAD"

# The longest header that safetensors itself accepts.
_MOST_HEADER_BYTES = 100_000_000


class QuantisationOptions(Options):
    """How the base model is held in memory (Dettmers et al. 2023, QLoRA)."""

    kind: Literal["nf4", "none"] = Field("nf4", description="linear layers in 4 bits; none: in the compute type")
    double: bool = Field(True, description="quantise the scales of the blocks too, which saves 0.4 bits a weight")


def find_base_model(name: str, revision: str | None, *, weights: bool = True) -> Path:
    """The folder of the model called `name`: a folder, or a name on the Hugging Face hub, fetched if need be.

    weights: whether they must be there, too, or only what says what the model is. Raises UserError where it is not
    there, and says how to get it.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if not is_hub_name(name):
            raise UserError(
                f"base_model {name}: there is no such folder{nearest_folder(folder)}, and it is no name on the hub "
                "(like Qwen/Qwen2.5-3B-Instruct); name a folder with config.json, weights (.safetensors) and tokenizer"
            )
        folder = fetch_snapshot(
            name,
            revision=revision,
            patterns=[*_ABOUT, *(["*.safetensors"] if weights else [])],
            is_complete=lambda found: missing_file(found, weights) is None,
        )
    if (folder / _ADAPTERS).is_file():
        raise UserError(
            f"{folder} holds adapters ({_ADAPTERS}), which would be taken into the model in silence: name the base "
            "model itself, or merge them into a model first (python -m training.evaluation.export RUN --merge)"
        )
    if (folder / "checkpoints").is_dir():
        raise UserError(
            f"{folder} is a run, and base_model is a model: to train on from its weights pass --init_from {folder} "
            "beside the base model that it has, or make a model of it (python -m training.evaluation.export --merge)"
        )
    missing = missing_file(folder, weights)
    if missing == _WHOLE and any(folder.glob("*.bin")):
        raise UserError(
            f"the base model in {folder} has its weights as .bin files, which may hold code: fetch a version with "
            ".safetensors, or convert it (load it by transformers and call save_pretrained)"
        )
    if missing == CONFIG and not any(folder.glob("*.safetensors")):
        raise UserError(
            f"{folder} holds no model: name a folder with config.json, weights (.safetensors) and tokenizer"
        )
    if missing:
        raise UserError(
            f"the base model in {folder} is incomplete: {missing} is missing. Fetch it again: "
            f"hf download {name if '/' in name and not Path(name).is_dir() else 'NAME'} --local-dir FOLDER"
        )
    return folder


def _weight_files(folder: Path) -> list[Path]:
    """Raises UserError where the index names anything but files of tensors beside it."""
    if not (folder / _INDEX).is_file():
        return [folder / _WHOLE]
    try:
        names = sorted(set(from_json((folder / _INDEX).read_bytes())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{folder / _INDEX} is no index of weights: fetch the model again") from None
    for name in names:
        if not isinstance(name, str) or not _WEIGHTS.fullmatch(name):
            raise UserError(f"{folder / _INDEX} names {name!r}, which is no .safetensors file beside it: do not use it")
    return [folder / name for name in names]


def missing_file(folder: Path, weights: bool = True) -> str | None:
    """The first of the model's files that `folder` lacks; None where all are there. weights: whether they count."""
    wanted = (folder / CONFIG, *(_weight_files(folder) if weights else ()))
    return next((path.name for path in wanted if not path.is_file()), None)


def fingerprint_of(folder: Path) -> str:
    """Identifies a base model by its weights, wherever it lies: adapters fit this one and no other.

    Reads them whole, once on a machine. Raises UserError where a file is none of tensors.
    """
    digest = hashlib.sha256()
    for path in _weight_files(folder):
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
        if header_bytes > min(_MOST_HEADER_BYTES, path.stat().st_size):
            raise UserError(f"{path} is no file of tensors, or a damaged one: fetch it again")
        digest.update(sha256_once(path).encode())
    return digest.hexdigest()


def _implementations(config: object, named: bool = False) -> Iterator[str]:
    """What a config.json, at any depth, has transformers compute its layers with. named: if a key above says that."""
    if isinstance(config, dict):
        for name, value in config.items():
            yield from _implementations(value, named or name.endswith("_implementation"))
    elif isinstance(config, list):
        for value in config:
            yield from _implementations(value, named)
    elif named and isinstance(config, str):
        yield config


def read_config(folder: Path, quantisation: QuantisationOptions) -> PretrainedConfig:
    """The model's config. Raises UserError where such a model cannot be trained here."""
    import transformers

    try:
        kernels = next((name for name in _implementations(read_json(folder / CONFIG)) if re.search("[/:]", name)), None)
        if kernels is not None:
            raise UserError(f"the model in {folder} asks for kernels of its own ({kernels}), which are never run here")
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except UserError:
        raise
    except Exception as error:  # the library believes whatever the file says
        if "trust_remote_code" in str(error):
            raise UserError(
                f"the model in {folder} needs code of its own, which is never run here: name a model that transformers "
                "knows"
            ) from None
        said = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{folder / CONFIG} describes no model that transformers knows ({said})") from None
    if config.is_encoder_decoder or type(config) not in transformers.AutoModelForCausalLM._model_mapping:
        raise UserError(f"the base model in {folder} ({config.model_type}) is no decoder-only language model")
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(
            f"the base model in {folder} is quantised already: name the original model, it is quantised when loaded"
        )
    if config.get_text_config() is not config:
        raise UserError(
            f"the base model in {folder} ({config.model_type}) reads more than text, and its other half would get "
            "adapters that learn nothing: name a model of the family that is for text alone"
        )
    model = on_meta(config)
    if _has_experts(model):
        raise UserError(
            f"the base model in {folder} ({config.model_type}) is a mixture of experts, whose weights are no linear "
            "layers: 4 bits and adapters here are for those. Choose a dense model"
        )
    if quantisation.kind == "nf4" and not linear_layers(model):
        raise UserError(
            f"the base model in {folder} ({config.model_type}) has no linear layers that can be held in 4 bits: choose "
            "another one, or --quantisation.kind none"
        )
    return config


def on_meta(config: PretrainedConfig, compute_type: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model without memory: modules, names and shapes."""
    import transformers

    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=compute_type, trust_remote_code=False)


def _has_experts(model: nn.Module) -> bool:
    """Whether there are matrices stacked in one parameter, of which each token passes a few."""
    return any(
        parameter.ndim > 2
        for module in model.modules()
        if not isinstance(module, nn.modules.conv._ConvNd)
        for parameter in module.parameters(recurse=False)
    )


def linear_layers(model: PreTrainedModel) -> list[nn.Linear]:
    """The layers that go into 4 bits: all linear ones but the head."""
    head = model.get_output_embeddings()
    return [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]


def load_base_model(
    folder: Path,
    quantisation: QuantisationOptions,
    compute_type: torch.dtype,
    device: torch.device,
    take: Callable[[nn.Parameter], None] | None = None,
) -> PreTrainedModel:
    """The frozen base model on `device`, everything that is not in 4 bits in `compute_type`.

    take: gets each weight as soon as it is read and quantised, before the next one, and may leave a part of it.

    With fp16 the residual stream, to which every layer adds, is kept in fp32: in models of the Qwen2.5 kind single
    values of it come close to the largest number of fp16 or exceed it. What a layer reads and computes stays in fp16.
    """
    import transformers

    more: dict[str, Any] = {}
    if quantisation.kind == "nf4":
        more["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=quantisation.double,
            bnb_4bit_compute_dtype=compute_type,
        )
    with (
        _naming_damage(folder),
        _quiet(transformers),
        nullcontext() if take is None else _weight_by_weight(take),
    ):
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            output_loading_info=True,
            dtype=compute_type,
            # Every process holds the whole model on a device of its own: "auto" would spread it over all.
            device_map={"": str(device)},
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            **more,
        )
    if lacking := sorted(found["missing_keys"]):  # the library would make them up
        raise UserError(
            f"the weights in {folder} lack {len(lacking)} that its {CONFIG} asks for ({lacking[0]}): fetch both again"
        )
    for module in model.modules():
        # On a CPU with AVX512-BF16, a model in evaluation mode would convert its weights in place to a layout that
        # training cannot use, and compute in bf16 from then on.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    freeze(model, compute_type)
    gpu = gpu_of(device)
    if gpu is not None and not gpu.has_flash_attention:
        repeat_heads_in_attention()
    return model


@contextmanager
def _naming_damage(folder: Path) -> Iterator[None]:
    """Raises UserError for what the libraries raise in this block over files that are damaged or not of one model."""
    try:
        yield
    except SafetensorError as error:
        raise UserError(f"the weights in {folder} are damaged or not all there ({error}): fetch them again") from None
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise UserError(f"the weights in {folder} are not those of its {CONFIG}: fetch both again") from None


def repeat_heads_in_attention() -> None:
    """Gives torch's attention as many heads of keys and values as of queries, in this process, from now on.

    Without FlashAttention, the kernel that saves memory cannot share heads of keys among several heads of queries, and
    torch would silently fall back on one that holds the score of every pair of tokens.
    """
    from transformers.integrations import sdpa_attention

    sdpa_attention.use_gqa_in_sdpa = lambda *arguments: False


def freeze(model: PreTrainedModel, compute_type: torch.dtype) -> None:
    """Makes nothing of the model trainable, and under fp16 its residual stream fp32: see `load_base_model`."""
    model.requires_grad_(False)
    if compute_type != torch.float16:
        return

    def in_fp32(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output.float()

    def in_fp16(module: nn.Module, inputs: Any, output: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        return output.half() if isinstance(output, Tensor) else tuple(each.half() for each in output)

    model.get_input_embeddings().register_forward_hook(in_fp32)
    for module in model.modules():
        if type(module).__name__.endswith(("Norm", "RotaryEmbedding")):  # what a layer reads of the stream
            module.register_forward_hook(in_fp16)


def read_weights_again(model: nn.Module) -> None:
    """Lets layers in 4 bits read their weight anew in the backward pass, under ZeRO 3.

    bitsandbytes keeps hold of what it read in the forward pass, in a way that checkpointing of layers does not see. At
    the end of that pass every weight would still be there as a whole.
    """
    import bitsandbytes

    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.forward = partial(_Product.apply, module)


class _Product(torch.autograd.Function):
    """x [..., in] times the weight of a frozen layer in 4 bits, both ways as the layer itself computes it."""

    @staticmethod
    def forward(ctx: Any, layer: bitsandbytes.nn.Linear4bit, x: Tensor) -> Tensor:
        ctx.layer, ctx.input_type = layer, x.dtype
        return type(layer).forward(layer, x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        from bitsandbytes.functional import dequantize_4bit

        weight, state = ctx.layer.weight, ctx.layer.weight.quant_state
        if 2 * weight.numel() < state.shape.numel():  # its kernels do not look
            raise RuntimeError("a weight is needed in the backward pass that was not brought together")
        gradient = gradient.to(ctx.layer.compute_dtype or gradient.dtype)
        return None, (gradient @ dequantize_4bit(weight.data, state).to(gradient.dtype)).to(ctx.input_type)


@contextmanager
def _weight_by_weight(take: Callable[[nn.Parameter], None]) -> Iterator[None]:
    """Inside, transformers reads no weight ahead, and hands over each as it takes its place in the model."""
    from transformers import core_model_loading as loading

    place = loading.set_param_for_module

    def place_and_hand_over(model: nn.Module, name: str, *more: Any) -> None:
        place(model, name, *more)
        module, _, kind = name.rpartition(".")
        weight = getattr(model.get_submodule(module), kind)
        if isinstance(weight, nn.Parameter):  # not a buffer
            take(weight)

    ahead = os.environ.get(_READS_NOT_AHEAD)
    os.environ[_READS_NOT_AHEAD] = "1"
    loading.set_param_for_module = place_and_hand_over
    try:
        yield
    finally:
        loading.set_param_for_module = place
        os.environ.pop(_READS_NOT_AHEAD)
        if ahead is not None:
            os.environ[_READS_NOT_AHEAD] = ahead


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without the library's own progress bars and notes, which every process would print."""
    log = transformers.utils.logging
    level, bar = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bar:
            log.enable_progress_bar()


def flops_per_token(about: PretrainedConfig, mean_length: float, supervised_share: float) -> float:
    """Floating-point operations of forward and backward per token of input, computing nothing twice.

    Frozen weights pass a gradient on but get none of their own: two products instead of three.
    """
    model = on_meta(about)
    text = about.get_text_config()
    head = model.get_output_embeddings().weight.numel()
    layers = sum(layer.weight.numel() for layer in linear_layers(model))
    width = text.num_attention_heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    attention = 3 * 2 * 2 * text.num_hidden_layers * width * mean_length / 2  # looks back over half of it, in the mean
    return 2 * 2 * (layers + supervised_share * head) + attention
