"""Exported folders, a hub that nobody may ask, and transformers 4, which many programs still load models with."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.once import once

OLDER = ("transformers==4.57.6", "tokenizers==0.22.1", "huggingface_hub==0.36.0")
TEXTS = ["你好。", "他喜欢买书。", "公司拖欠工资，我该怎么办？ <|im_end|><eos>", ""]


@contextmanager
def nobody_asked() -> Iterator[dict[str, str]]:
    """Environment variables with which a look at the Hugging Face Hub comes here; fails if there was one."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        host, port = server.getsockname()
        yield {"HF_ENDPOINT": f"http://{host}:{port}"}
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_older_transformers_loads_the_same(folder: Path, output: Path) -> None:
    """In transformers 4, fetched for it, the export in `folder` is what it is here; skips where that cannot be had."""
    import torch

    packages = once("older-transformers", lambda packages: _install(packages, OLDER))
    command = [sys.executable, "-m", "tests.support.exports", str(folder), str(output)]
    environment = {**os.environ, "PYTHONPATH": str(packages), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    older, here = torch.load(output), as_loaded(folder)
    assert older.pop("version") == "4.57.6" and here.pop("version") != "4.57.6"
    assert torch.equal(older.pop("logits"), here.pop("logits"))
    assert older == here


def as_loaded(folder: Path) -> dict[str, object]:
    """What an export is in the transformers at hand: ids, texts, logits, and an answer."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    ids = tokenizer(TEXTS)["input_ids"]
    talk = [{"role": "user", "content": TEXTS[0]}]
    context = model.config.max_position_embeddings
    tokens = torch.randint(len(tokenizer), (2, min(context, 128)), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits = model(tokens).logits
        answer = model.generate(torch.tensor([ids[0]]), max_new_tokens=8, do_sample=False)
    return {
        "version": transformers.__version__,
        "ids": ids,
        "texts": tokenizer.batch_decode([*ids, *tokens.tolist()], skip_special_tokens=True),
        "prompt": tokenizer.chat_template
        and tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True),
        "logits": logits,
        "answer": answer.tolist(),
    }


def _install(folder: Path, packages: tuple[str, ...]) -> None:
    words = ["--quiet", "--no-deps", "--no-compile", "--target", str(folder)]
    done = subprocess.run([sys.executable, "-m", "pip", "install", *words, *packages], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{packages[0]} cannot be had: {done.stderr.strip()[-200:]}")


if __name__ == "__main__":
    import torch

    torch.save(as_loaded(Path(sys.argv[1])), sys.argv[2])
