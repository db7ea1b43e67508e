"""A merged model as one GGUF file, which llama.cpp and what is built on it (Ollama, LM Studio) load.

Of models of the structures of Llama (SmolLM2 among them), Qwen2 and Qwen2.5, and Qwen3, with byte-level BPE tokenizers.
Promises: what the file could not say of a model is refused before anything is made; the file is read back, and every
tensor in it is the merged model's, rounded to 8 bits where that was asked for. No more than a tensor is in memory.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. What decides how it is computed is llama.cpp's.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import safe_open

from training.base.console import UserError
from training.base.files import read_json

if TYPE_CHECKING:
    import gguf
    from transformers import PretrainedConfig

KINDS = ("f16", "q8_0")
STRUCTURES = ("llama", "qwen2", "qwen3")

_ELSEWHERE = "{} (by llama.cpp's own converter: --merge, then `python convert_hf_to_gguf.py FOLDER --outtype f16`)"

# How llama.cpp names the rules by which a text is parted before BPE: what the tokenizer does first, by its own words.
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_RULES = {
    (f"Split {_QWEN2}", "ByteLevel"): "qwen2",
    ("Split " + _QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|"), "ByteLevel"): "llama-bpe",
    ("Digits", "ByteLevel with its regex"): "smollm",
    ("ByteLevel with its regex",): "gpt-2",
}
_WHOLE_WORDS_FIRST = ("llama-bpe",)  # whose words in the vocabulary are taken whole, whatever the merges say


def check_convertible(config: PretrainedConfig, tokenizer: Path) -> None:
    """Raises UserError unless a model of this config, with the tokenizer in this folder, can be said in GGUF here."""
    if config.model_type not in STRUCTURES:
        what = f"GGUF is written here for the structures {', '.join(STRUCTURES)}, and this model is {config.model_type}"
        raise UserError(_ELSEWHERE.format(what))
    rotary = config.rope_parameters
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    known = {
        "hidden_act": config.hidden_act == "silu",
        "layer_types": kinds == {"full_attention"},
        "rope_parameters": rotary.get("rope_type", "default") in ("default", "linear", "yarn", "llama3")
        and rotary.get("partial_rotary_factor", 1.0) == 1.0
        and not {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"} & rotary.keys(),
        "attention_bias": config.model_type != "qwen3" or not config.attention_bias,
    }
    if strange := [name for name, is_known in known.items() if not is_known]:
        raise UserError(_ELSEWHERE.format(f"this model's {', '.join(strange)} cannot be said in GGUF here"))
    _rules_of(read_json(tokenizer / "tokenizer.json"))


def write(source: Path, output: Path, kind: str, *, name: str, end_id: int) -> None:
    """Writes the model in `source`, as `save_model` left it in float16, with its tokenizer, to the file `output`.

    kind: one of KINDS. name: of the model. end_id: of the token that ends an answer. Raises UserError as
    `check_convertible` does, and where the file is not what it should be.
    """
    import gguf
    import transformers

    config = transformers.AutoConfig.from_pretrained(source, local_files_only=True)
    check_convertible(config, source)
    logging.getLogger("gguf").setLevel(logging.WARNING)
    writer = gguf.GGUFWriter(output, config.model_type)
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if kind == "f16" else gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_shape(writer, config)
    _add_tokenizer(writer, source, config.vocab_size, end_id)
    for tensor, values, stored in _tensors(source, config, kind):
        writer.add_tensor_info(tensor, values.shape, values.dtype, values.nbytes, stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, values, _ in _tensors(source, config, kind):
        writer.write_tensor_data(values)
    writer.close()
    _check_same(output, source, config, kind)


def _check_same(output: Path, source: Path, config: PretrainedConfig, kind: str) -> None:
    import gguf

    found = {tensor.name: tensor.data for tensor in gguf.GGUFReader(output).tensors}
    for name, values, _ in _tensors(source, config, kind):
        read = found.pop(name, None)
        if read is None or read.dtype != values.dtype or not np.array_equal(read, values):
            raise UserError(f"{output}: the tensor {name} is not read back as it was written; is the disk sound?")
    if found:
        raise UserError(f"{output} holds {', '.join(found)}, which nobody wrote; is the disk sound?")


def _head_size(config: PretrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _add_shape(writer: gguf.GGUFWriter, config: PretrainedConfig) -> None:
    import gguf

    rotary, head_size = config.rope_parameters, _head_size(config)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_size)
    writer.add_rope_freq_base(rotary["rope_theta"])
    if rotary.get("rope_type") in ("linear", "yarn"):  # llama3 has a tensor instead
        writer.add_rope_scaling_type(gguf.RopeScalingType(rotary["rope_type"]))
        writer.add_rope_scaling_factor(rotary["factor"])
    if rotary.get("rope_type") == "yarn":
        original = rotary.get("original_max_position_embeddings") or config.max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(original)


def _rules_of(tokenizer: dict[str, Any]) -> str:
    """What llama.cpp calls the rules of a tokenizer.json. Raises UserError where it has none for them."""
    first = tokenizer["pre_tokenizer"] or {"type": "nothing"}
    parts = tuple(map(_in_words, first.get("pretokenizers", [first])))
    rules, model = _RULES.get(parts), tokenizer["model"]
    normaliser = (tokenizer["normalizer"] or {"type": "NFC"})["type"]  # llama.cpp leaves NFC to whoever writes the text
    takes_whole_words = bool(model.get("ignore_merges"))
    if (
        rules is None
        or (model["type"], normaliser) != ("BPE", "NFC")
        or takes_whole_words != (rules in _WHOLE_WORDS_FIRST)
    ):
        raise UserError(_ELSEWHERE.format("this model's tokenizer cannot be said in GGUF here"))
    return rules


def _in_words(part: dict[str, Any]) -> str:
    kind = str(part["type"])
    if kind == "Split" and part["behavior"] == "Isolated" and not part["invert"]:
        return f"Split {part['pattern'].get('Regex')}"
    if kind == "ByteLevel" and not part["add_prefix_space"]:
        return "ByteLevel with its regex" if part.get("use_regex", True) else kind
    return kind if kind == "Digits" and part["individual_digits"] else "other"


def _add_tokenizer(writer: gguf.GGUFWriter, folder: Path, size: int, end_id: int) -> None:
    """The tokenizer in `folder`; size: rows of the embedding, of which the tokenizer may have fewer."""
    import gguf
    import transformers

    about = read_json(folder / "tokenizer.json")
    kinds = [gguf.TokenType.UNUSED] * size
    tokens = [f"[PAD{number}]" for number in range(size)]
    for token, number in about["model"]["vocab"].items():
        tokens[number], kinds[number] = token, gguf.TokenType.NORMAL
    for added in about["added_tokens"]:
        is_control = added["special"] or added["id"] == end_id
        kinds[added["id"]] = gguf.TokenType.CONTROL if is_control else gguf.TokenType.USER_DEFINED
        tokens[added["id"]] = added["content"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_rules_of(about))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    special = gguf.SpecialVocab(folder, load_merges=True, n_vocab=size)
    # What the tokenizer itself puts around a text, whatever its files say of it.
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    ids = tokenizer("x")["input_ids"]
    special.add_special_token = {"bos": ids[0] == tokenizer.bos_token_id, "eos": ids[-1] == tokenizer.eos_token_id}
    special.add_to_gguf(writer, quiet=True)
    writer.add_eot_token_id(end_id)


def _tensors(
    source: Path, config: PretrainedConfig, kind: str
) -> Iterator[tuple[str, np.ndarray, gguf.GGMLQuantizationType]]:
    """Every tensor as GGUF has it, one by one: its name, its values (q8_0: as bytes) and how they are stored."""
    import gguf

    names = gguf.get_tensor_name_map(
        {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2, "qwen3": gguf.MODEL_ARCH.QWEN3}[
            config.model_type
        ],
        config.num_hidden_layers,
    )
    stored = gguf.GGMLQuantizationType
    if config.rope_parameters.get("rope_type") == "llama3":
        yield "rope_freqs.weight", _rope_factors(config), stored.F32
    for path in sorted(source.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as file:
            for name in sorted(file.keys()):
                values = file.get_tensor(name)
                if not np.isfinite(values).all():
                    raise UserError(f"{name} holds numbers beyond what 16 bits of GGUF hold: export it with --merge")
                if config.model_type == "llama":
                    values = _in_pairs(name, values, config)
                called = names.get_name(name, try_suffixes=(".weight", ".bias"))
                if called is None:
                    raise UserError(_ELSEWHERE.format(f"{name} has no place in GGUF"))
                if values.ndim == 1:  # norms and biases: small, and llama.cpp adds them in fp32
                    yield called, values.astype(np.float32), stored.F32
                elif kind == "q8_0" and values.shape[-1] % gguf.GGML_QUANT_SIZES[stored.Q8_0][0] == 0:
                    yield called, gguf.quantize(values, stored.Q8_0), stored.Q8_0
                else:
                    yield called, values.astype(np.float16, copy=False), stored.F16


def _in_pairs(name: str, values: np.ndarray, config: PretrainedConfig) -> np.ndarray:
    """The rows of a query or key projection as llama.cpp turns them in a model of Llama's structure.

    transformers turns number i of a head with number i + half of it, llama.cpp with its neighbour.
    """
    layer = name.rpartition(".")[0].rpartition(".")[2]
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(layer)
    if heads is None:
        return values
    halves = values.reshape(heads, 2, _head_size(config) // 2, *values.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)


def _rope_factors(config: PretrainedConfig) -> np.ndarray:
    """By what each frequency of Llama 3's rotary positions is divided, fp32 [half of a head]."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    size = _head_size(config)
    plain = config.rope_parameters["rope_theta"] ** (-torch.arange(0, size, 2, dtype=torch.float32) / size)
    return (plain / scaled).numpy().astype(np.float32)
