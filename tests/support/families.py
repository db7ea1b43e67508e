"""Small random chat models of the families that people fine-tune, each of its family's true structure.

True are the things that can go wrong: ties, caps and scales of logits, caps in attention, windows, which layers have
positions, norms and where they stand, fused layers; and what a chat template does: where it puts an answer's end, which
token that is. Sizes and weights are not. The windows are shorter than the conversations of the tests.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.base_models import CHATML, make_tokenizer
from tests.support.commands import Launch
from tests.support.lives import Life
from tests.support.once import once
from tests.support.runs import command_of

_LAYERS = ["sliding_attention", "full_attention"]
_WINDOWS = {"sliding_window": 16, "layer_types": _LAYERS}
_LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16},
}

_SPECIAL = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}


def _turns(begin: str, turn: str, ask: str) -> str:
    """A chat template: begin, then `turn` for each message (R the role, C what it says), then `ask`."""
    words = turn.replace("R", "' + role + '").replace("C", "' + message['content'] + '")
    return (
        f"{{{{- '{begin}' }}}}{{%- for message in messages %}}{{%- set role = message['role'] %}}"
        f"{{{{- '{words}' }}}}{{%- endfor %}}{{%- if add_generation_prompt %}}{{{{- '{ask}' }}}}{{%- endif %}}"
    )


_LLAMA = _turns(
    "<|begin_of_text|>",
    "<|start_header_id|>R<|end_header_id|>\\n\\nC<|eot_id|>",
    "<|start_header_id|>assistant<|end_header_id|>\\n\\n",
)
_MISTRAL = (
    "{{- '<s>' }}{%- for message in messages %}{%- if message['role'] == 'user' %}"
    "{{- '[INST] ' + message['content'] + ' [/INST]' }}"
    "{%- else %}{{- ' ' + message['content'] + '</s>' }}{%- endif %}{%- endfor %}"
)
_GEMMA = (
    "{{- '<bos>' }}{%- for message in messages %}{%- if message['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{%- endif %}"
    "{%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{- '<start_of_turn>' + role + '\n' + message['content'] + '<end_of_turn>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<start_of_turn>model\n' }}{%- endif %}"
)
_THINKING = (
    "{%- for message in messages %}{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{%- endif %}"
)
_COMMAND = (
    "{{- '<BOS_TOKEN>' }}{%- for message in messages %}{{- '<|START_OF_TURN_TOKEN|>' }}"
    "{{- '<|CHATBOT_TOKEN|>' if message['role'] == 'assistant' else '<|USER_TOKEN|>' }}"
    "{{- message['content'] + '<|END_OF_TURN_TOKEN|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{%- endif %}"
)


@dataclass(frozen=True)
class Family:
    """A family of chat models."""

    config: str  # the class of its config in transformers
    special: str  # what its structure has that Llama's has not
    shape: Mapping[str, Any] = field(default_factory=dict)
    template: str = CHATML
    tokens: Mapping[str, str] = field(default_factory=lambda: dict(_SPECIAL))
    control: tuple[str, ...] = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")


_LLAMA_TOKENS = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "pad_token": "<|end_of_text|>"}
_LLAMA_CONTROL = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>")
_AS_LLAMA = {"template": _LLAMA, "tokens": _LLAMA_TOKENS, "control": _LLAMA_CONTROL}
_AS_MISTRAL = {
    "template": _MISTRAL,
    "tokens": {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"},
    "control": ("<unk>", "<s>", "</s>", "[INST]", "[/INST]"),
}
_AS_GEMMA = {
    "template": _GEMMA,
    "tokens": {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"},
    "control": ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
}
_AS_PHI = {
    "template": _turns("", "<|R|>C<|end|>", "<|assistant|>"),
    "tokens": {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
    "control": ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
}
_AS_GLM = {  # nothing behind an answer but the next turn
    "template": _turns("[gMASK]<sop>", "<|R|>\\nC", "<|assistant|>"),
    "tokens": {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
    "control": ("<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>"),
}
_AS_COMMAND = {
    "template": _COMMAND,
    "tokens": {"bos_token": "<BOS_TOKEN>", "eos_token": "<|END_OF_TURN_TOKEN|>", "pad_token": "<PAD>"},
    "control": (
        *("<PAD>", "<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>"),
        "<|CHATBOT_TOKEN|>",
    ),
}
_AS_EXAONE = {
    "template": _turns("", "[|R|]\\nC[|endofturn|]\\n", "[|assistant|]\\n"),
    "tokens": {"bos_token": "[BOS]", "eos_token": "[|endofturn|]", "pad_token": "[PAD]"},
    "control": ("[PAD]", "[BOS]", "[|endofturn|]", "[|system|]", "[|user|]", "[|assistant|]"),
}
_LLAMA_POSITIONS = {
    **{"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0},
    **{"high_freq_factor": 4.0, "original_max_position_embeddings": 512},
}
_LONG_POSITIONS = {
    **{"rope_type": "longrope", "rope_theta": 10_000.0, "partial_rotary_factor": 0.75},
    **{"short_factor": [1.0] * 6, "long_factor": [2.0] * 6},
}

FAMILIES = {
    "qwen2.5": Family("Qwen2Config", "biases, tied head", {"tie_word_embeddings": True}),
    "qwen3": Family(
        "Qwen3Config", "norms of queries and keys", {"head_dim": 32, "tie_word_embeddings": True}, _THINKING
    ),
    "llama3": Family("LlamaConfig", "head apart, scaled positions", {"rope_parameters": _LLAMA_POSITIONS}, **_AS_LLAMA),
    "yi": Family("LlamaConfig", "Llama's", {"rope_parameters": {"rope_type": "default", "rope_theta": 5_000_000.0}}),
    "mistral": Family("MistralConfig", "sliding window", {"sliding_window": 16, "head_dim": 32}, **_AS_MISTRAL),
    "gemma2": Family(
        "Gemma2Config",
        "caps of logits and of attention, sliding window in every other layer, tied head, scaled embedding",
        {"head_dim": 32, "query_pre_attn_scalar": 32, **_WINDOWS},
        **_AS_GEMMA,
    ),
    "gemma3": Family(
        "Gemma3TextConfig",
        "sliding window and positions of their own in most layers, norms of queries and keys",
        {"head_dim": 32, "query_pre_attn_scalar": 32, **_WINDOWS},
        **_AS_GEMMA,
    ),
    "phi3": Family(
        "Phi3Config",
        "fused layers, sliding window, positions on a part of each head that change with the length",
        {"sliding_window": 16, "original_max_position_embeddings": 8, "rope_parameters": _LONG_POSITIONS},
        **_AS_PHI,
    ),
    "glm4": Family(
        "Glm4Config", "fused layers, norms on both sides, positions on half of each head", {"head_dim": 16}, **_AS_GLM
    ),
    "internlm3": Family("InternLM3Config", "head apart", {"head_dim": 32}),
    "smollm3": Family(
        "SmolLM3Config", "layers without positions", {"no_rope_layers": [1, 0], "tie_word_embeddings": True}, _THINKING
    ),
    "granite": Family(
        "GraniteConfig",
        "scales of embedding, attention, residual stream and logits",
        {
            **{"embedding_multiplier": 12.0, "attention_multiplier": 0.0625, "residual_multiplier": 0.22},
            **{"logits_scaling": 8.0, "tie_word_embeddings": True},
        },
    ),
    "olmo2": Family("Olmo2Config", "norms behind the layers, of queries and keys"),
    "olmo3": Family("Olmo3Config", "the same, sliding window", _WINDOWS),
    "command-r": Family("CohereConfig", "scale of logits, layers side by side", {"logit_scale": 0.0625}, **_AS_COMMAND),
    "command-r7b": Family(
        "Cohere2Config",
        "the same, sliding window, layers without positions",
        {"logit_scale": 0.25, "head_dim": 16, **_WINDOWS},
        **_AS_COMMAND,
    ),
    "exaone4": Family("Exaone4Config", "norms behind the layers, sliding window", _WINDOWS, **_AS_EXAONE),
    "stablelm": Family("StableLmConfig", "positions on a quarter of each head", {"use_qkv_bias": True}),
    "ernie4.5": Family("Ernie4_5Config", "other order in the heads", {"head_dim": 32, "tie_word_embeddings": True}),
    "hunyuan": Family("HunYuanDenseV1Config", "norms of queries and keys", {"head_dim": 32}),
    "seed-oss": Family("SeedOssConfig", "heads wider than the model, dropout of its own", {"head_dim": 32}),
    "ministral": Family("MinistralConfig", "sliding window", {"head_dim": 32, **_WINDOWS}, **_AS_MISTRAL),
    "lfm2": Family("Lfm2Config", "convolutions", {"layer_types": ["conv", "full_attention"]}),
    "qwen3.5": Family("Qwen3_5TextConfig", "linear attention, gates", {"head_dim": 32, **_LINEAR}, _THINKING),
}


def config_of(name: str, **more: object) -> Any:
    """The config of a small model of this family."""
    import transformers

    family = FAMILIES[name]
    usual = {
        **{"vocab_size": 600, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048},
        **{"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1},
    }
    return getattr(transformers, family.config)(**{**usual, **family.shape, **more})


def make_family(name: str, folder: Path, *, scale: float = 4.0, **more: object) -> Path:
    """A random model of this family in `folder`, without a tokenizer.

    scale: of its matrices, by the usual: as in trained models, layers and caps then matter.
    """
    import torch
    import transformers

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config_of(name, **more))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(scale)
    model.save_pretrained(folder)
    return folder


def estimate_error(name: str, folder: Path) -> float:
    """How much more of memory, relatively, is estimated for a step of such a model in 4 bits than it takes."""
    from tests.support.step_memory import compared
    from training.models.memory_estimate import Shape

    sizes = {"hidden_size": 128, "intermediate_size": 352, "vocab_size": 1024}
    sizes |= {"num_attention_heads": 8, "num_key_value_heads": 4}
    estimated, measured, _ = compared(make_family(name, folder / name, **sizes), Shape(2, 128, 100))
    return estimated.tensors / measured - 1


def _text(dice: random.Random, length: int) -> str:
    return "".join(chr(0x4E00 + dice.randrange(200)) for _ in range(length))


def chat_model(name: str) -> Path:
    """A random chat model of this family in `base`, and `data`, which is prepared for it, beside that."""
    return once(f"family-{name.replace('.', '-')}", lambda folder: _make_chat_model(name, folder))


def _make_chat_model(name: str, folder: Path) -> None:
    from data_prep import disc_law

    family, dice = FAMILIES[name], random.Random(0)
    records = [
        {"id": f"legal_question_answering_{number}", "input": _text(dice, 30), "output": _text(dice, 12)}
        for number in range(60)
    ]
    source = folder / "source/DISC-Law-SFT-Pair-QA-released.jsonl"
    source.parent.mkdir()
    source.write_text("".join(json.dumps(each, ensure_ascii=False) + "\n" for each in records), encoding="utf-8")
    texts = [str(each["input"]) for each in records]
    base = make_tokenizer(
        folder / "base", texts, template=family.template, special=family.tokens, control=family.control
    )
    make_family(name, base)
    words = ["--source", source.parent, "--tokenizer", base, "--output", folder / "data", "--workers", 1]
    words += ["--validation_share", 0.1]
    assert disc_law.main([str(word) for word in words]) == 0


STEPS = 6
RUN = (
    *("--lora.rank", 4, "--lora.alpha", 8, "--lora.dropout", 0.1, "--memory.logits_tokens", 50),
    *("--batch.tokens_per_micro_batch", 400, "--batch.micro_batches_per_step", 2),
    *("--optim.steps", STEPS, "--optim.warmup_steps", 1, "--optim.lr", 1e-2, "--log.every_steps", 1),
    *("--log.validate_every_steps", 3, "--log.generate_samples", 0, "--checkpoint.every_steps", 2),
    *("--wandb.mode", "disabled"),
)


def live_through(name: str, launch: Launch, folder: Path, *words: object) -> None:
    """Dry run, training on two ranks, kill, end bit-equal, evaluation, export, merge; raises where one fails.

    words: more options of the training.
    """
    made = chat_model(name)
    run = ("--base_model", made / "base", *RUN, *words)

    def command(module: str, *words: object) -> str:
        result = launch(*words, module=module).wait()
        assert result.status == 0, (name, module, result)
        return result.out

    uninterrupted = folder / "uninterrupted"
    training = command_of(uninterrupted, made / "data", *run)
    assert "GB of tensors a process" in command("training.qlora", *training, "--dry-run")
    whole = launch(*training, module="training.qlora", ranks=2).wait()
    assert whole.status == 0, (name, whole)
    life = Life(launch, folder, made / "data", ranks=2, run=run, module="training.qlora")
    life.kill_at(4)
    life.finish(uninterrupted)
    answers = ("--max_new_tokens", 4, "--answers_per_task", 2)
    command("training.evaluation.evaluate", life.run_dir, *answers)
    for merge in ((), ("--merge",)):
        # Both compare the logits of what is exported with the run's before they publish it.
        command("training.evaluation.export", life.run_dir, "--output", folder / f"export{len(merge)}", *merge)
