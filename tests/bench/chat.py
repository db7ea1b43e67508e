"""An answer that appears token by token: `training.evaluation.chat`, against transformers' `generate` and TextStreamer.

The same model on both sides, SmolLM2-135M-Instruct in 4 bits with adapters (with --data sample a tiny random one), the
same question, greedy, and the same number of tokens, whatever ends an answer; both must give the same tokens. Relay's
4 bits are unpacked once, as the chat does on a CPU where there is room. A time is that of a whole answer, tokenising
and showing it included: of one token, which is the time until something can be seen, and of many, whose difference
gives the tokens a second. One process of two threads has both, which take turns in it: of two processes one may be
luckier with its cores.
"""

from __future__ import annotations

import io
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
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
from training.evaluation.chat_model.unpacking import unpack_where_there_is_room
from training.models.adapted_model import LoraOptions, add_adapters
from training.models.base_model import QuantisationOptions, load_base_model

MODEL = CACHE / SMOLLM2.replace("==", "-")
QUESTION = "公司拖欠工资，我该怎么办？ Please explain step by step what an employee should do, and name the documents."
SIDES = {"relay": 1, "transformers": -1}
MANY = 41  # tokens of the long answer


def both_sides(folder: str) -> Work:
    """Asked for n tokens, it answers how many seconds Relay's answer of so many took; for -n, those of `generate`."""
    import transformers

    keep_freed_memory()
    device = torch.device("cpu")
    torch.manual_seed(0)
    base = load_base_model(Path(folder), QuantisationOptions(), torch.float32, device)
    model = add_adapters(base, LoraOptions()).eval()
    torch.manual_seed(0)
    unpacked = add_adapters(load_base_model(Path(folder), QuantisationOptions(), torch.float32, device), LoraOptions())
    unpack_where_there_is_room(unpacked, torch.float32)
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

        Speaker(unpacked.eval(), -1, precision).answer(prompt, tokens, tell)
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

    def measure(tokens: float) -> float:
        way = relay if tokens > 0 else theirs
        began = time.monotonic()
        with redirect_stdout(io.StringIO()):  # the pipe is for results
            way(abs(int(tokens)))
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
        with workers(both=start_worker(arguments, "tests.bench.chat", "both_sides", folder, threads=2)) as started:
            for number in range(-1, rounds):  # the first round also sets things up
                for tokens in (1, MANY):
                    for name in SIDES if number % 2 else reversed(SIDES):
                        started["both"].ask(SIDES[name] * tokens)
                        seconds[name, tokens].append(started["both"].answer())
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
