"""A trained GPT and its tokenizer as Hugging Face transformers has them, loadable without custom code.

Promises: the model has the GPT's logits, up to the order of floating-point sums; the tokenizer gives the run's ids,
between `<sos>` and `<sep>`, and the run's text of ids. What no architecture of transformers computes is refused, not
approximated.

| positions | norm      | architecture                                                                  |
| --------- | --------- | ----------------------------------------------------------------------------- |
| learned   | LayerNorm | GPT2LMHeadModel with exact GELU                                               |
| rotary    | LayerNorm | GPTNeoXForCausalLM, its residual sums one after another, all features rotated |
| rotary    | RMSNorm   | ArceeForCausalLM with exact GELU and biases                                   |
| learned   | RMSNorm   | none                                                                          |

Only of a GPT with one vocabulary: none writes fewer ids than it reads.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import sentencepiece
import torch
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE, WordLevel
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import (
    ArceeConfig,
    ArceeForCausalLM,
    AutoModelForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from training.base.console import UserError
from training.base.files import write_atomically
from training.data.languages import Language
from training.data.text import INVISIBLE
from training.data.tokenizers import (
    EOS,
    PAD,
    SEP,
    SOS,
    SPECIALS,
    UNK,
    SentencePieceTokenizer,
    load_tokenizer,
    word_marks,
)
from training.models.decoding import NEVER_PRODUCED
from training.models.gpt import GPT

# Two fp32 implementations of one model differ by rounding, about a millionth of the largest logit. Another base of the
# rotary positions moves the logits of even an untrained model by more than this share of the largest.
TOLERANCE = 2e-5

ROTARY_BASE = 10_000.0  # of `training.models.gpt.rotary_table`


def model_of(gpt: GPT) -> PreTrainedModel:
    """The same model as transformers computes it, with its generation settings. Raises UserError where there is none.

    Generation is greedy, produces what `training.models.decoding` does, and ends with the model's
    context.
    """
    options = gpt.options
    if gpt.vocabularies.source is not None:
        raise UserError(
            "transformers has no architecture with a vocabulary for each side, so this model cannot be exported; those "
            "with data prepared with --vocabularies joint can (configs/gpt/plain.yaml)"
        )
    convert = {("learned", "layer"): _gpt2, ("rotary", "layer"): _gpt_neox, ("rotary", "rms"): _arcee}.get(
        (options.positions, options.norm)
    )
    if convert is None:
        raise UserError(
            f"transformers has no architecture with {options.positions} positions and {options.norm} norm, so this "
            "model cannot be exported; those with model.norm layer, or with model.positions rotary, can"
        )
    model, state = convert(gpt)
    state["lm_head.weight"] = gpt.embedding.weight
    model.load_state_dict(state)
    model.generation_config = GenerationConfig(
        bos_token_id=SOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        suppress_tokens=list(NEVER_PRODUCED),
        max_length=options.context,
    )
    return model.eval()


def _shared(gpt: GPT) -> dict[str, Any]:
    """What all configs call by the same name; GPT2Config knows the sizes by these names too."""
    options = gpt.options
    return {
        "vocab_size": gpt.vocabularies.total,
        "hidden_size": options.width,
        "num_hidden_layers": options.layers,
        "num_attention_heads": options.heads,
        "max_position_embeddings": options.context,
        "tie_word_embeddings": True,
        "bos_token_id": SOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
    }


def _gpt2(gpt: GPT) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    config = GPT2Config(
        **_shared(gpt),
        activation_function="gelu",  # transformers calls the exact one so, and the approximation gelu_new
        layer_norm_epsilon=gpt.final_norm.eps,
        embd_pdrop=gpt.options.dropout,
        resid_pdrop=gpt.options.dropout,
        attn_pdrop=0.0,
    )
    names = {
        "embedding": "transformer.wte",
        "position_embedding": "transformer.wpe",
        "final_norm": "transformer.ln_f",
        "blocks": "transformer.h",
        "attention_norm": "ln_1",
        "attention.query_key_value": "attn.c_attn",
        "attention.output": "attn.c_proj",
        "feed_forward_norm": "ln_2",
        "expand": "mlp.c_fc",
        "contract": "mlp.c_proj",
    }
    state = _renamed(gpt, names)
    # GPT-2's layers hold their weights as [in, out].
    inside = {
        name: tensor.T for name, tensor in state.items() if name.startswith("transformer.h.") and tensor.dim() == 2
    }
    return GPT2LMHeadModel(config), {**state, **inside}


def _gpt_neox(gpt: GPT) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    config = GPTNeoXConfig(
        **_shared(gpt),
        intermediate_size=4 * gpt.options.width,
        hidden_act="gelu",
        layer_norm_eps=gpt.final_norm.eps,
        hidden_dropout=gpt.options.dropout,
        attention_dropout=0.0,
        use_parallel_residual=False,
        rope_parameters={"rope_type": "default", "rope_theta": ROTARY_BASE, "partial_rotary_factor": 1.0},
    )
    names = {
        "embedding": "gpt_neox.embed_in",
        "final_norm": "gpt_neox.final_layer_norm",
        "blocks": "gpt_neox.layers",
        "attention_norm": "input_layernorm",
        "attention.query_key_value": "attention.query_key_value",
        "attention.output": "attention.dense",
        "feed_forward_norm": "post_attention_layernorm",
        "expand": "mlp.dense_h_to_4h",
        "contract": "mlp.dense_4h_to_h",
    }
    state = _renamed(gpt, names)
    for name, tensor in state.items():
        if ".query_key_value." in name:
            # Ours: all queries, all keys, all values, each head by head. Theirs: query, key and value of each head.
            state[name] = tensor.unflatten(0, (3, gpt.options.heads, -1)).transpose(0, 1).flatten(0, 2)
    return GPTNeoXForCausalLM(config), state


def _arcee(gpt: GPT) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    config = ArceeConfig(
        **_shared(gpt),
        num_key_value_heads=gpt.options.heads,
        intermediate_size=4 * gpt.options.width,
        hidden_act="gelu",
        # torch's RMSNorm without an eps takes that of the numbers it is given.
        rms_norm_eps=torch.finfo(torch.float32).eps,
        attention_dropout=0.0,
        attention_bias=True,
        mlp_bias=True,
        rope_parameters={"rope_type": "default", "rope_theta": ROTARY_BASE},
    )
    names = {
        "embedding": "model.embed_tokens",
        "final_norm": "model.norm",
        "blocks": "model.layers",
        "attention_norm": "input_layernorm",
        "attention.query_key_value": "self_attn.{}_proj",
        "attention.output": "self_attn.o_proj",
        "feed_forward_norm": "post_attention_layernorm",
        "expand": "mlp.up_proj",
        "contract": "mlp.down_proj",
    }
    state: dict[str, Tensor] = {}
    for name, tensor in _renamed(gpt, names).items():
        if "{}" in name:
            state |= {name.format(part): piece for part, piece in zip("qkv", tensor.chunk(3), strict=True)}
        else:
            state[name] = tensor
    return ArceeForCausalLM(config), state


def _renamed(gpt: GPT, names: dict[str, str]) -> dict[str, Tensor]:
    """The parameters of `gpt` under other names: `names` by our names of layers, inside a block without its number."""
    state = {}
    for name, tensor in gpt.state_dict().items():
        layer, kind = name.rsplit(".", 1)
        prefix = ""
        if layer.startswith("blocks."):
            blocks, number, layer = layer.split(".", 2)
            prefix = f"{names[blocks]}.{number}."
        state[f"{prefix}{names[layer]}.{kind}"] = tensor
    return state


def check_same(folder: Path, gpt: GPT) -> float:
    """Loads the model in `folder` as a user does; the largest difference of its logits over a whole context.

    Raises UserError when it is not the same model: with another version of transformers than Relay was tested with, an
    architecture may have changed.
    """
    loaded, info = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, local_files_only=True, trust_remote_code=False, use_safetensors=True
    )
    wrong = sorted({str(key) for keys in info.values() for key in keys})
    tokens = torch.randint(gpt.vocabularies.total, (1, gpt.options.context), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        ours, theirs = gpt(tokens), loaded.eval()(tokens).logits
    difference = (ours - theirs).abs().max().item()
    if wrong or not difference <= TOLERANCE * ours.abs().max().item():
        raise UserError(
            f"transformers {transformers.__version__} loads the exported model as another one (logits differ by "
            f"{difference:.1e}; keys that do not fit: {', '.join(wrong) or 'none'}): install the version that "
            "requirements.txt names"
        )
    return difference


def tokenizer_of(folder: Path, target: Language, context: int) -> PreTrainedTokenizerFast:
    """The source's tokenizer that `Tokenizer.save` wrote to `folder`: `<sos> source <sep>` from a text.

    Of ids it makes a text in the language `target`. A text is cleaned as `training.data.text.clean` does, and not
    converted. Batches are padded on the left, as
    generation wants it; `context` is the longest sequence that the model takes. The word tokenizer's ids can differ
    from the run's where Unicode's tables do: on characters from after Unicode 11, and on a Greek word's last sigma.
    """
    tokenizer = load_tokenizer(folder)
    if isinstance(tokenizer, SentencePieceTokenizer):
        backend = _pieces(folder / tokenizer.file_name, tokenizer.language)
    else:
        backend = _words(tokenizer.token_texts(range(tokenizer.vocabulary_size)), tokenizer.language, target)
    # <unk> is none of them: what the model does not know stays visible when special tokens are left out.
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS[:UNK]])
    backend.post_processor = TemplateProcessing(
        single=f"{SPECIALS[SOS]} $A {SPECIALS[SEP]}", special_tokens=[(SPECIALS[SOS], SOS), (SPECIALS[SEP], SEP)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=SPECIALS[SOS],
        eos_token=SPECIALS[EOS],
        pad_token=SPECIALS[PAD],
        sep_token=SPECIALS[SEP],
        padding_side="left",
        model_max_length=context,
        model_input_names=["input_ids", "attention_mask"],
        split_special_tokens=True,  # no text can produce a special token
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes it to `folder` for `AutoTokenizer`; transformers 4 does not know the class name that 5 writes."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    about = {**json.loads(path.read_text(encoding="utf-8")), "tokenizer_class": "PreTrainedTokenizerFast"}
    write_atomically(path, json.dumps(about, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


# What `training.data.text.clean` does, up to blanks at the ends. Python counts four more characters as blanks than \s.
_CLEAN = (
    normalizers.Replace(Regex(f"[{INVISIBLE}]"), ""),
    normalizers.Replace(Regex(r"[\s\x1c-\x1f]+"), " "),
    normalizers.Strip(),
)


def _pieces(model_file: Path, source: Language) -> Tokenizer:
    """The sentencepiece model of `SentencePieceTokenizer`, for texts in the language `source`."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    pieces = [processor.id_to_piece(number) for number in range(processor.vocab_size())]
    ordinary = dict.fromkeys(pieces[len(SPECIALS) :])
    # sentencepiece joins two neighbours if together they are a piece, the piece with the lowest id first. Here a pair
    # must be named, so every way to cut a piece in two is.
    merges = [
        (piece[:cut], piece[cut:])
        for piece in ordinary
        for cut in range(1, len(piece))
        if piece[:cut] in ordinary and piece[cut:] in ordinary
    ]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    # A run of unknown characters is one <unk>, as sentencepiece has it.
    backend = Tokenizer(BPE(vocabulary, merges, unk_token=SPECIALS[UNK], fuse_unk=True))
    in_front = [normalizers.Prepend(" ")] if source.blanks else []
    backend.normalizer = normalizers.Sequence([*_CLEAN, *in_front, normalizers.Replace(" ", "▁")])
    # Not decoders.Strip, which fails on a text of nothing else.
    at_the_ends = Regex(r"\A +| +\z")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Replace(at_the_ends, "")]
    )
    return backend


def _words(tokens: list[str], source: Language, target: Language) -> Tokenizer:
    """The vocabulary of `WordTokenizer`, for texts in `source` and ids of `target` (`training.data.tokenizers.cut`)."""
    backend = Tokenizer(WordLevel({token: number for number, token in enumerate(tokens)}, unk_token=SPECIALS[UNK]))
    kept = r"\p{L}\p{N}" + source.script * (not source.blanks)
    backend.normalizer = normalizers.Sequence(
        [
            *_CLEAN,
            normalizers.NFKC(),
            normalizers.Replace("’", "'"),
            normalizers.Lowercase(),
            # A text with nothing to keep is one unknown word. A lone ? stands for it: there is nothing to keep in that.
            normalizers.Replace(Regex(rf"\A[^{kept}]+\z"), "?"),
        ]
    )
    if source.blanks:
        word = rf"[{kept}][{kept}{word_marks()}]*"
        words = Regex(rf"{word}(?:'{word})*|\A\?\z")
    else:
        words = Regex(rf"[{source.script}]|[{kept}&&[^{source.script}]]+|\A\?\z")
    backend.pre_tokenizer = pre_tokenizers.Split(words, behavior="removed", invert=True)
    if not target.blanks:  # otherwise transformers puts one between two words
        own = f"[{target.script}]"
        beside_own = Regex(rf"\A +|(?<={own}) | (?={own})")
        backend.decoder = decoders.Sequence(
            [decoders.Replace(Regex(r"\A"), " "), decoders.Fuse(), decoders.Replace(beside_own, "")]
        )
    return backend
