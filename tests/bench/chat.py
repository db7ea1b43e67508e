"""An answer that appears token by token: `training.evaluation.chat`, against transformers' `generate` and TextStreamer.

The same model on both sides, SmolLM2-135M-Instruct in 4 bits with adapters (with --data sample a tiny random one), the
same question, greedy, and the same number of tokens, whatever ends an answer; both must give the same tokens. A time is
that of a whole answer, tokenising and showing it included: of one token, which is the time until something can be
seen, and of many, whose difference gives the tokens a second. Each side is one process of two threads, and they take
turns.
"""

from __future__ import annotations

import io
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from statistics import median

import torch

from tests.bench.common import Figure, Work, ratio_by_rounds, read_arguments, report, start_worker, workers
from tests.support.base_models import CACHE, SMOLLM2, make_tiny_qwen2, make_tokenizer, smollm2
from training.base.console import UserError, run_main, say, say_part
from training.base.environment import keep_freed_memory
from training.data.chat import load_chat_tokenizer, user
from training.engine.precision import choose_precision
from training.evaluation.chat_model.streaming import Speaker, Text
from training.models.adapted_model import LoraOptions, add_adapters
from training.models.base_model import QuantisationOptions, load_base_model

MODEL = CACHE / SMOLLM2.replace("==", "-")
QUESTION = "公司拖欠工资，我该怎么办？ Please explain step by step what an employee should do, and name the documents."
SIDES = ("relay", "transformers")
MANY = 41  # tokens of the long answer


def side(way: str, folder: str) -> Work:
    """One side's work: asked for a number of tokens, it answers how many seconds an answer of so many took."""
    import transformers

    keep_freed_memory()
    device = torch.device("cpu")
    torch.manual_seed(0)
    base = load_base_model(Path(folder), QuantisationOptions(), torch.float32, device)
    model = add_adapters(base, LoraOptions()).eval()
    tokenizer = load_chat_tokenizer(folder)
    library = transformers.AutoTokenizer.from_pretrained(folder)
    precision = choose_precision("fp32", device)
    model.generation_config = base.generation_config = transformers.GenerationConfig()

    def relay(tokens: int) -> list[int]:
        (prompt,) = tokenizer.encode([tokenizer.prompt([user(QUESTION)])])
        text, ids = Text(tokenizer.decode), []

        def tell(token: int) -> None:
            ids.append(token)
            say_part(text.add(token))

        Speaker(model, -1, precision).answer(prompt, tokens, tell)
        say(text.rest())
        return ids

    def theirs(tokens: int) -> list[int]:
        turns = [{"role": "user", "content": QUESTION}]
        inputs = library.apply_chat_template(turns, add_generation_prompt=True, return_dict=True, return_tensors="pt")
        streamer = transformers.TextStreamer(library, skip_prompt=True, skip_special_tokens=True)
        settings = transformers.GenerationConfig(do_sample=False, max_new_tokens=tokens, pad_token_id=tokenizer.pad_id)
        with torch.inference_mode():
            whole = model.generate(**inputs, generation_config=settings, streamer=streamer)
        return whole[0, inputs["input_ids"].shape[1] :].tolist()

    ways: dict[str, Callable[[int], list[int]]] = {"relay": relay, "transformers": theirs}

    def measure(tokens: float) -> float:
        began = time.monotonic()
        with redirect_stdout(io.StringIO()):  # the pipe is for results
            ways[way](int(tokens))
        return time.monotonic() - began

    with redirect_stdout(io.StringIO()):
        if relay(8) != theirs(8):
            raise UserError("the two sides do not give the same tokens: nothing to compare")
    return measure


def main(words: Sequence[str] | None = None) -> int:
    arguments = read_arguments("chat", __doc__, words, data=MODEL, what="folder of a chat model")
    rounds = arguments.sized(whole=9, quick=2, smoke=1)
    with tempfile.TemporaryDirectory(prefix="relay-bench-") as temporary:
        folder = Path(arguments.data)
        if arguments.data == "sample":
            folder = make_tiny_qwen2(Path(temporary, "tiny"), make_tokenizer(Path(temporary, "words"), [QUESTION] * 9))
        elif folder == MODEL:
            folder = smollm2()
        seconds: defaultdict[tuple[str, int], list[float]] = defaultdict(list)
        started = {name: start_worker(arguments, "tests.bench.chat", "side", name, folder, threads=2) for name in SIDES}
        with workers(**started):
            for number in range(-1, rounds):  # the first round also sets things up
                for name in SIDES if number % 2 else reversed(SIDES):
                    for tokens in (1, MANY):
                        started[name].ask(tokens)
                        seconds[name, tokens].append(started[name].answer())
                say(f"round {number + 1} of {rounds}: " + ", ".join(f"{k} {v[-1]:.3f} s" for k, v in seconds.items()))
        rates = {}
        for name in SIDES:
            pairs = zip(seconds[name, 1][1:], seconds[name, MANY][1:], strict=True)
            rates[name] = [(MANY - 1) / (many - one) for one, many in pairs]
        first = {name: seconds[name, 1][1:] for name in SIDES}
        waits = ratio_by_rounds(first["transformers"], first["relay"])
        figures = [
            Figure("tokens_ratio", ratio_by_rounds(*rates.values()), "tokens a second over generate's", ">= 1"),
            Figure("first_token_ratio", waits, "generate's time to the first token over Relay's", ">= 1"),
            *(Figure(f"{name}_tokens_per_s", median(rates[name]), "behind the first") for name in SIDES),
            *(
                Figure(f"{name}_first_token_s", median(first[name]), "the question read, a token seen")
                for name in SIDES
            ),
        ]
        report("chat", arguments, figures)
    return 0


if __name__ == "__main__":
    run_main(main)
