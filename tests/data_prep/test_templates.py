"""Chat templates as models have them (tests/cases/tokenizers), and files in the structure of three other projects."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers

from data_prep import instructions
from tests.support.base_models import WITH_TOOLS, make_tiny_qwen2, make_tokenizer
from tests.support.commands import ROOT, Launch
from training.base.console import UserError
from training.data.chat import assistant, load_chat_tokenizer, user
from training.data.conversations import Conversations, open_conversations
from training.data.prepared import PARTS

RECORDS, TOKENIZERS = ROOT / "tests/cases/records", ROOT / "tests/cases/tokenizers"
PLAIN = RECORDS / "i60_plain.jsonl"


def prepare(source: Path, output: Path, tokenizer: Path, *words: object) -> Conversations:
    every = ["--source", source, "--output", output, "--tokenizer", tokenizer, "--workers", 1, *words]
    assert instructions.main([str(word) for word in every]) == 0
    return open_conversations(output)


# What stands before the answer that training sees, behind the question, and what ends it.
EXACT: dict[str, tuple[tuple[str, ...], str, str]] = {
    "many_templates": ((), "<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n", "{a}<|im_end|>"),
    "qwen3_like": (
        ("--template_options", "enable_thinking=false"),
        "<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        "{a}<|im_end|>",
    ),
    "mistral_like": ((), "[INST] {q} [/INST] ", "{a}<|im_end|>"),
    "r1_like": ((), "<|im_start|>User{q}<|im_start|>Assistant", "{a}<|im_end|>"),
    "gemma_like": ((), "<|im_start|>user\n{q}<|im_end|>\n<|im_start|>model\n", "{a}<|im_end|>"),
    "llama3_like": ((), "<|im_start|>user\n\n{q}<|im_end|><|im_start|>assistant\n\n", "{a}<|im_end|>"),
}


@pytest.mark.parametrize("name", EXACT)
def test_a_template_is_seen_in_training_as_it_is_at_inference(name: str, tmp_path: Path):
    words, prompt, learned = EXACT[name]
    data = prepare(PLAIN, tmp_path / "data", TOKENIZERS / name, *words)
    tokenizer = transformers.AutoTokenizer.from_pretrained(data.folder / "tokenizer", local_files_only=True)
    for part in map(data.part, PARTS):
        for row, text in enumerate(part.messages):
            asked, answered = (message["content"] for message in json.loads(text))
            place = part.prompt_lengths[row]
            assert tokenizer.decode(part.ids[row][:place]) == prompt.format(q=asked)
            assert tokenizer.decode(part.ids[row][place:]) == learned.format(a=answered)
    assert sum(data.meta["rows"].values()) == 60 and data.meta["counts"]["malformed"] == 0


def test_a_refusal_gives_the_true_reason(tmp_path: Path):
    thinking = r"puts '<think>\\n\\n</think>\\n\\n' between the prompt and the answer; with --template_options "
    with pytest.raises(UserError, match=thinking + "enable_thinking=false that belongs to the prompt"):
        prepare(PLAIN, tmp_path / "x", TOKENIZERS / "qwen3_like")
    with pytest.raises(UserError, match=r"the chat template takes no turns of system, user .System role not supported"):
        prepare(RECORDS / "i33_system_twice.jsonl", tmp_path / "x", TOKENIZERS / "gemma_like")
    with pytest.raises(UserError, match="the chat template changes the answer, or leaves a part of it out"):
        prepare(RECORDS / "i28_think_in_answer.jsonl", tmp_path / "x", TOKENIZERS / "r1_like")
    with pytest.raises(UserError, match="expected words like key=value"):
        prepare(PLAIN, tmp_path / "x", TOKENIZERS / "qwen3_like", "--template_options", "enable_thinking")
    several = tmp_path / "several"
    several.mkdir()
    for path in (TOKENIZERS / "many_templates").rglob("*.json*"):
        (several / path.name).write_bytes(path.read_bytes())
    (several / "additional_chat_templates").mkdir()
    (several / "additional_chat_templates/rag.jinja").write_text("{{ messages }}")
    with pytest.raises(UserError, match=r"several chat templates .rag., and none that is called default"):
        prepare(PLAIN, tmp_path / "x", several)


def test_one_answer_that_the_template_cuts_does_not_end_the_preparation_of_299_others(tmp_path: Path):
    data = prepare(RECORDS / "i61_one_think_among_plain.jsonl", tmp_path / "data", TOKENIZERS / "r1_like")
    (left_out,) = data.meta["counts"]["malformed_listed"]
    assert left_out["line"] == 150 and "changes the answer" in left_out["reason"]
    assert sum(data.meta["rows"].values()) == 299


def test_answers_that_hold_their_thoughts_are_learned_by_a_model_that_thinks(tmp_path: Path):
    data = prepare(RECORDS / "i28_think_in_answer.jsonl", tmp_path / "data", TOKENIZERS / "qwen3_like")
    chat = load_chat_tokenizer(str(TOKENIZERS / "qwen3_like"))
    think = chat.encode(["<think>"])[0]
    assert len(think) == 1, "a token, and no special one"
    part = data.part("train")
    for row in range(len(part)):
        assert part.ids[row][part.prompt_lengths[row]] == think[0], "learned as the token that it is"
        assert chat.decode(part.ids[row][part.prompt_lengths[row] :]) == json.loads(part.messages[row])[-1]["content"]


def test_other_template_options_are_another_data_set(tmp_path: Path):
    words = ("--template_options", "enable_thinking=false")
    first = prepare(PLAIN, tmp_path / "data", TOKENIZERS / "qwen3_like", *words)
    assert prepare(PLAIN, tmp_path / "data", TOKENIZERS / "qwen3_like", *words).fingerprint == first.fingerprint
    with pytest.raises(UserError, match=r"template_options.enable_thinking: false -> null"):
        prepare(PLAIN, tmp_path / "data", TOKENIZERS / "qwen3_like")


@pytest.mark.parametrize("name", ["qwen3_like", "mistral_like"])
def test_the_option_holds_in_training_answers_and_exports(name: str, launch: Launch, tmp_path: Path):
    words, prompt, _ = EXACT[name]
    base, run_dir = make_tiny_qwen2(tmp_path / "base", TOKENIZERS / name), tmp_path / "run"
    data = prepare(PLAIN, tmp_path / "data", base, *words, "--validation_share", 0.1)
    result = launch(
        *("--run_dir", run_dir, "--data", data.folder, "--base_model", base, "--lora.rank", 4),
        *("--batch.tokens_per_micro_batch", 600, "--batch.micro_batches_per_step", 1, "--optim.steps", 2),
        *("--optim.warmup_steps", 0, "--log.generate_samples", 1),
        module="training.qlora",
    ).wait()
    assert result.status == 0, result
    for merge in ((), ("--merge",)):
        output = tmp_path / f"export{len(merge)}"
        result = launch(run_dir, "--output", output, *merge, module="training.evaluation.export").wait()
        assert result.status == 0, result
        exported = transformers.AutoTokenizer.from_pretrained(output, local_files_only=True)
        asked = exported.apply_chat_template([user("为何？")], add_generation_prompt=True, tokenize=False)
        assert asked == prompt.format(q="为何？"), "the template does by itself what it was told"
        assert ("enable_thinking=false" in (output / "README.md").read_text("utf-8")) == bool(words)


# --- files in the structure of other projects --------------------------------------------------------------------


def tool_calls(number: int) -> dict[str, object]:
    """As a data set of calls has them: tools beside, arguments as text, the model's content null."""
    called = {"id": "call_1", "type": "function", "function": {"name": "law", "arguments": f'{{"article": {number}}}'}}
    return {
        "tools": [{"type": "function", "function": {"name": "law", "parameters": {"type": "object"}}}],
        "messages": [
            {"role": "user", "content": f"第{number}条？"},
            {"role": "assistant", "content": None, "tool_calls": [called]},
            {"role": "tool", "tool_call_id": "call_1", "content": f"条文{number}"},
            {"role": "assistant", "content": f"第{number}条说：条文{number}"},
        ],
    }


def with_parts(number: int) -> dict[str, object]:
    """As trainers of models that also see pictures have them: every content a list of parts."""

    def parts(text: str) -> list[dict[str, str]]:
        return [{"type": "text", "text": text}]

    return {"messages": [
        {"role": "system", "content": parts("简短。")},
        {"role": "user", "content": parts(f"问{number}？")},
        {"role": "assistant", "content": parts(f"答{number}。")},
    ]}  # fmt: skip


def lists_of_lists(number: int) -> list[dict[str, object]]:
    """A conversation that is nothing but the list of its messages, as nanochat's are."""
    return [user(f"问{number}？"), assistant(f"答{number}。"), user("再说？"), assistant(f"再答{number}。")]


LAW = '{"type": "function", "function": {"name": "law", "parameters": {"type": "object"}}}'
SYSTEM = f"<|im_start|>system\nYou may call\n{LAW}<|im_end|>\n"
ASKED, ANSWERS = "<|im_start|>user\n{}<|im_end|>\n", "<|im_start|>assistant\n"
# What the file is, the record in it, and what one of its samples reads and learns (in brackets) with --learn all.
PROJECTS: dict[str, tuple[Callable[[list[object]], str], Callable[[int], object], Callable[[int], str]]] = {
    "calls.jsonl": (
        lambda records: "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records),
        tool_calls,
        lambda n: (
            SYSTEM + ASKED.format(f"第{n}条？") + ANSWERS
            + f'[<tool_call>law {{"article": {n}}}</tool_call><|im_end|>]\n'
            f"<|im_start|>tool\n条文{n}<|im_end|>\n" + ANSWERS + f"[第{n}条说：条文{n}<|im_end|>]"
        ),
    ),
    "parts.json": (
        lambda records: json.dumps(records, ensure_ascii=False, indent=2),
        with_parts,
        lambda n: (
            f"<|im_start|>system\n简短。<|im_end|>\n{ASKED.format(f'问{n}？')}{ANSWERS}[答{n}。<|im_end|>]"
        ),
    ),
    "lists.json": (
        lambda records: json.dumps(records),
        lists_of_lists,
        lambda n: (
            f"{ASKED.format(f'问{n}？')}{ANSWERS}[答{n}。<|im_end|>]\n"
            f"{ASKED.format('再说？')}{ANSWERS}[再答{n}。<|im_end|>]"
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PROJECTS)
def test_files_of_other_projects_are_learned_token_by_token(name: str, tmp_path: Path):
    written, record, expected = PROJECTS[name]
    texts = [expected(number) for number in range(30)]
    tokenizer = make_tokenizer(tmp_path / "tokenizer", texts, template=WITH_TOOLS)
    (tmp_path / name).write_text(written([record(number) for number in range(30)]), "utf-8")
    data = prepare(tmp_path / name, tmp_path / "data", tokenizer, "--learn", "all")
    plain = transformers.AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
    found = []
    for part in map(data.part, PARTS):
        assert part.learned is not None
        for row in range(len(part)):
            ids, text, place = part.ids[row].tolist(), "", 0
            for first, behind in part.learned[row].reshape(-1, 2).tolist():
                text += f"{plain.decode(ids[place:first])}[{plain.decode(ids[first:behind])}]"
                place = behind
            assert place == len(ids)
            found.append(text)
    assert sorted(found) == sorted(texts)
    assert data.meta["counts"]["unread_keys"] == {} and data.meta["counts"]["malformed"] == 0
