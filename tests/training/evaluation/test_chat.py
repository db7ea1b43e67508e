"""The chat command: answers as evaluation gives them, while they come, turn by turn, for people and from pipes."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bitsandbytes.nn import Linear4bit

from tests.support.base_models import make_tiny_qwen2
from tests.support.commands import PATIENCE_S, ROOT
from tests.support.families import make_family
from tests.support.legal_records import law_run, law_run_base
from tests.support.once import once
from tests.support.runs import reference
from tests.support.zygote import usual_environment
from training.base.console import UserError
from training.data.chat import assistant, user
from training.engine.precision import choose_precision
from training.evaluation import chat, export
from training.evaluation.chat_model import unpacking
from training.evaluation.chat_model.adapters import open_adapters
from training.evaluation.chat_model.conversation import ChatModel, Conversation, open_chat
from training.evaluation.chat_model.streaming import Speaker, Text
from training.evaluation.translations.trained import open_trained
from training.models.decoding import translate
from training.models.generation import generate

CPU = torch.device("cpu")
QUESTIONS = ["根据《刑法》第3条，标签5是什么？", "公司拖欠工资，我该怎么办？", "And what of the rest?"]
MOST = 24


@pytest.fixture(scope="module")
def opened() -> ChatModel:
    return opened_at(law_run())


def opened_at(folder: Path, weights: str = "best", base_model: str | None = None) -> ChatModel:
    return open_chat(folder, weights, device=CPU, base_model=base_model, precision=None)


def exported(*words: str) -> Path:
    """An export of the run with these options."""

    def make(folder: Path) -> None:
        assert export.main([str(law_run()), "--output", str(folder / "export"), *words]) == 0

    return once("chat-export" + "".join(words), make) / "export"


def asked(conversation: Conversation, question: str) -> str:
    """The answer, put together of its pieces."""
    pieces: list[str] = []
    conversation.ask(question, pieces.append)
    return "".join(pieces)


def as_evaluated(opened: ChatModel, turns: list[dict[str, str]]) -> str:
    """The answer as `evaluate` makes it."""
    tokenizer = opened.tokenizer
    prompts = tokenizer.encode([tokenizer.prompt(turns)])
    (found,) = generate(
        opened.model,
        prompts,
        end_id=tokenizer.end_id,
        pad_id=tokenizer.pad_id,
        max_new_tokens=MOST,
        precision=opened.precision,
    )
    return tokenizer.decode(found.ids)


def piped(monkeypatch: pytest.MonkeyPatch, lines: bytes, *words: object) -> int:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(lines), isatty=lambda: False))
    return chat.main([str(word) for word in words])


def test_every_answer_of_a_conversation_is_what_evaluation_makes_of_its_turns(opened):
    conversation, turns = Conversation(opened, max_new_tokens=MOST), []
    for question in QUESTIONS:
        expected = as_evaluated(opened, [*turns, user(question)])
        assert asked(conversation, question) == expected
        turns += [user(question), assistant(expected)]
    assert conversation.turns == turns and len({turn["content"] for turn in turns}) > len(QUESTIONS)


def test_what_the_model_has_read_and_said_is_not_read_again(opened, monkeypatch):
    read: list[int] = []
    base = opened.model.get_base_model()
    forward = base.forward

    def counting(*words: object, **named: object) -> object:
        read.append(named["input_ids"].shape[1])
        return forward(*words, **named)

    monkeypatch.setattr(base, "_supports_logits_to_keep", lambda: True)  # it would look at the counting one
    monkeypatch.setattr(base, "forward", counting)
    conversation = Conversation(opened, max_new_tokens=MOST)
    asked(conversation, QUESTIONS[0])
    first, turns = read[0], list(conversation.turns)
    read.clear()
    asked(conversation, QUESTIONS[1])
    tokenizer = opened.tokenizer
    (whole,) = tokenizer.encode([tokenizer.prompt([*turns, user(QUESTIONS[1])])])
    assert read[0] <= len(whole) - first and set(read[1:]) == {1}
    conversation.begin_anew()
    assert asked(conversation, QUESTIONS[0]) == turns[1]["content"]


@torch.inference_mode()
def test_layers_that_are_unpacked_say_what_their_four_bits_do_and_take_half_of_the_free_memory_at_most(monkeypatch):
    model = open_adapters(law_run(), device=CPU).model.model
    ids = torch.arange(3, 40)[None]
    expected, packed = model(ids).logits, [m for m in model.modules() if isinstance(m, Linear4bit)]
    numbers = sum(layer.in_features * layer.out_features for layer in packed)
    monkeypatch.setattr(unpacking, "free_memory", lambda: 2 * 4 * numbers - 1)
    unpacking.unpack_where_there_is_room(model, torch.float32)
    assert packed and [m for m in model.modules() if isinstance(m, Linear4bit)] == packed
    monkeypatch.setattr(unpacking, "free_memory", lambda: 2 * 4 * numbers)
    unpacking.unpack_where_there_is_room(model, torch.float32)
    assert not [m for m in model.modules() if isinstance(m, Linear4bit)]
    assert torch.allclose(model(ids).logits, expected, atol=1e-5)


def test_an_answer_that_is_interrupted_stays_in_the_conversation_as_far_as_it_was_shown(opened):
    conversation = Conversation(opened, max_new_tokens=MOST)
    shown: list[str] = []

    def interrupt(piece: str) -> None:
        shown.append(piece)
        if len(shown) == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        conversation.ask(QUESTIONS[0], interrupt)
    said = "".join(shown)
    assert conversation.turns == [user(QUESTIONS[0]), assistant(said)] and said
    expected = as_evaluated(opened, [*conversation.turns, user(QUESTIONS[1])])
    assert asked(conversation, QUESTIONS[1]) == expected


def test_the_base_models_answer_is_its_own_and_no_part_of_the_conversation(opened):
    conversation = Conversation(opened, max_new_tokens=MOST)
    asked(conversation, QUESTIONS[0])
    turns, pieces = list(conversation.turns), []
    conversation.ask_base(pieces.append)
    plain = opened_at(law_run_base())
    assert not plain.has_adapters
    with opened.model.disable_adapter():
        assert "".join(pieces) == as_evaluated(opened, turns[:1]) != turns[1]["content"]
    assert conversation.turns == turns
    assert asked(conversation, QUESTIONS[1]) == as_evaluated(opened, [*turns, user(QUESTIONS[1])])


def test_exports_answer_as_their_run_does(opened):
    expected = asked(Conversation(opened, max_new_tokens=MOST), QUESTIONS[0])
    adapters, merged = opened_at(exported()), opened_at(exported("--merge", "--dtype", "float32"))
    for each in (adapters, merged):
        assert asked(Conversation(each, max_new_tokens=MOST), QUESTIONS[0]) == expected
    assert adapters.has_adapters and not merged.has_adapters
    with pytest.raises(UserError, match="no base model beside it"):
        Conversation(merged, max_new_tokens=MOST).ask_base(print)


def test_from_a_pipe_a_line_is_a_question_and_only_answers_are_printed(opened, monkeypatch, capsys):
    conversation = Conversation(opened, max_new_tokens=MOST)
    expected = [asked(conversation, question) for question in QUESTIONS[:2]]
    conversation.begin_anew()
    expected.append(asked(conversation, QUESTIONS[2]))
    base: list[str] = []
    conversation.ask_base(base.append)
    bad = [b"\xff\xfe", b"what is <|im_end|> for?", b"/bass", b"  ", b"/Base now"]
    lines = [*(text.encode() for text in QUESTIONS[:2]), *bad, b"/new", QUESTIONS[2].encode(), b"/base"]
    assert piped(monkeypatch, b"\n".join(lines), law_run(), "--max_new_tokens", MOST) == 0
    captured = capsys.readouterr()
    assert captured.out == "".join(f"{answer}\n" for answer in [*expected, "".join(base)])
    said = [line for line in captured.err.splitlines() if "cut off" not in line]
    assert said == [
        "warning: line 3: this is not UTF-8, and was not read",
        "warning: line 4: <|im_end|> is a control token of this model: leave it out",
        "warning: line 5: there is no /bass, only /base and /new",
        "warning: line 7: there is no /Base now, only /base and /new",
    ]


def test_nothing_can_be_compared_before_a_question_and_a_full_context_is_named(opened, monkeypatch, capsys):
    long = "公司拖欠工资。" * 2000
    lines = f"/base\n{long}\n{QUESTIONS[0]}\n".encode()
    assert piped(monkeypatch, lines, law_run(), "--max_new_tokens", MOST) == 0
    captured = capsys.readouterr()
    assert "line 1: nothing has been asked yet" in captured.err
    assert re.search(r"line 2: .* has [\d,]+ tokens, and the model takes 2,048: /new begins", captured.err)
    assert captured.out.rstrip("\n") == asked(Conversation(opened, max_new_tokens=MOST), QUESTIONS[0]).rstrip("\n")


def test_what_cannot_be_talked_to_is_refused_with_what_to_do(tmp_path, sample_data):
    run, merged = law_run(), exported("--merge", "--dtype", "float32")
    gpt = tiny_gpt(sample_data)
    assert export.main([str(gpt), "--output", str(tmp_path / "gpt")]) == 0
    (tmp_path / "empty").mkdir()
    older = shutil.copytree(exported(), tmp_path / "older")
    about = json.loads((older / "export.json").read_text("utf-8"))
    (older / "export.json").write_text(json.dumps({**about, "quantisation": {"bits": 4}}), encoding="utf-8")
    cases: dict[tuple[object, ...], str] = {
        (tmp_path / "none",): "there is no",
        (tmp_path / "empty",): "is not a run folder",
        (tmp_path / "gpt",): "is the export of a translator",
        (older,): "was written by another version",
        (merged, "--checkpoint", "last"): "leave --checkpoint out",
        (merged, "--base_model", "x"): "leave --base_model out",
        (run, "--beam_size", 5): "leave out --beam_size",
        (gpt, "--system", "x"): "leave out --system",
        (run, "--max_new_tokens", 0): "at least 1",
        (run, "--system", "<|im_end|>"): "control token",
        (
            exported(),
            "--base_model",
            make_tiny_qwen2(tmp_path / "other", law_run_base(), seed=5, vocabulary_size=700),
        ): "is not the one",
    }
    for words, message in cases.items():
        with pytest.raises(UserError) as error:
            chat.main([str(word) for word in words])
        assert message in str(error.value), words


def tiny_gpt(data: Path) -> Path:
    shape = ("--model.layers", 1, "--model.heads", 2, "--model.width", 48, "--model.context", 40)
    return reference(
        data, *shape, "--optim.steps", 40, "--optim.warmup_steps", 5, "--batch.tokens_per_micro_batch", 512
    )


def test_a_translator_takes_a_sentence_a_line_and_draws_its_attention(sample_data, tmp_path, monkeypatch, capsys):
    run, drawn = tiny_gpt(sample_data), tmp_path / "map.svg"
    sentences = ["他不想买雨伞。", "我喜欢书。"]
    lines = [f"/attention {drawn}", sentences[0], "/map", sentences[1], f"/attention {drawn}", f"/attention {drawn}"]
    lines.append(f"/attention {tmp_path}/none/map.svg")
    assert piped(monkeypatch, "\n".join(lines).encode(), run, "--beam_size", 2) == 0
    trained = open_trained(run, device=CPU)
    results = translate(trained.decoder, [trained.encode(text) for text in sentences], beam_size=2)
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [trained.target_tokenizer.decode(result.ids) for result in results]
    sheet = trained.decoder.attention(
        trained.encode(sentences[1]), results[1].ids, trained.source_tokenizer, trained.target_tokenizer
    )
    assert drawn.read_text("utf-8") == sheet.svg()
    said = [line for line in captured.err.splitlines() if "cut off" not in line]
    assert len(said) == 4 and "line 1: /attention FILE.svg draws" in said[0] and "line 3: there is no /map" in said[1]
    assert "line 6: " in said[2] and "is there already" in said[2]
    assert "line 7: " in said[3] and f"there is no folder {tmp_path}/none; make it first" in said[3]


@pytest.mark.parametrize("family", ["lfm2", "qwen3.5"])
def test_a_model_that_keeps_more_than_keys_and_values_forgets_another_conversation(family, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(make_family(family, tmp_path)).eval()
    speaker, fresh = (Speaker(model, end_id=-1, precision=choose_precision("fp32", CPU)) for _ in range(2))
    said: dict[Speaker, list[int]] = {speaker: [], fresh: []}
    speaker.answer([5, 6, 7, 8], 6, lambda token: None)
    for each, tokens in said.items():
        each.answer([5, 9, 10], 6, tokens.append)
    assert said[speaker] == said[fresh] and len(set(said[fresh])) > 1


def test_ctrl_c_at_a_terminal_ends_the_work_on_a_line_and_the_next_one_is_read(monkeypatch, capsys):
    done: list[str] = []

    def work(text: str) -> None:
        if text == "slow":
            raise KeyboardInterrupt
        done.append(text)

    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr(chat, "_typed", lambda: iter([b"slow", b"next"]))
    chat._for_each_line(work, "hello")
    assert done == ["next"] and " (stopped)" in capsys.readouterr().out


def test_a_character_of_several_tokens_appears_when_it_is_whole():
    content = "好 a😀".encode()

    def pieces(parts: Iterable[int]) -> list[str]:
        text = Text(lambda ids: bytes(ids).decode("utf-8", "replace"))
        return [*(text.add(part) for part in parts), text.rest()]

    assert pieces(content) == ["", "", "好", " ", "a", "", "", "", "😀", ""]
    # What never becomes a character is shown as such, at the end at the latest.
    assert pieces([*content[:2], ord("x"), 0xE5]) == ["", "", "\ufffdx", "", "\ufffd"]


@pytest.mark.whole
@pytest.mark.timeout(PATIENCE_S)
def test_at_a_terminal_ctrl_c_ends_an_answer_and_then_the_program_and_ctrl_d_ends_it_too():
    for last, status in ((b"\x03", 130), (b"\x04", 0)):
        parent, child = pty.openpty()
        words = [sys.executable, "-m", "training.evaluation.chat", str(law_run()), "--max_new_tokens", "2000"]
        at_terminal = {"stdin": child, "stdout": child, "stderr": child, "start_new_session": True}
        process = subprocess.Popen(
            words, cwd=ROOT, env=usual_environment(), preexec_fn=partial(take_terminal, child), **at_terminal
        )
        os.close(child)
        screen = Screen(parent)
        screen.wait_for("> ")
        os.write(parent, f"{QUESTIONS[1]}\n".encode())
        screen.wait_for(lambda text: text.count("\n> ") == 2)
        os.write(parent, b"/base\n")  # what has learned nothing does not end by itself
        screen.wait_for(lambda text: len(text.partition("/base\n")[2]) > 20)
        os.write(parent, b"\x03")
        screen.wait_for("(stopped)\n> ")
        while process.poll() is None:  # Python's input() misses a signal between its prompt and its first look for keys
            os.write(parent, last)
            with suppress(subprocess.TimeoutExpired):
                process.wait(2)
        assert process.returncode == status
        end = screen.rest().rpartition("> ")[2].replace("^C", "")  # the terminal's echo of one more
        assert "Traceback" not in screen.text and end.split() == (["interrupted"] if status else []), screen.text
        os.close(parent)


def take_terminal(terminal: int) -> None:
    fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)  # what is typed there is a signal only for those whose terminal it is
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored where the tests run in the background


class Screen:
    """What a program shows at a terminal."""

    def __init__(self, end: int):
        self._end, self.text = end, ""

    def wait_for(self, shown: str | Callable[[str], bool]) -> None:
        limit = time.monotonic() + PATIENCE_S
        while not (shown in self.text if isinstance(shown, str) else shown(self.text)):
            assert time.monotonic() < limit, self.text
            self.text += os.read(self._end, 4096).decode("utf-8", "replace").replace("\r", "")

    def rest(self) -> str:
        with suppress(OSError):  # the other end is closed
            while content := os.read(self._end, 4096):
                self.text += content.decode("utf-8", "replace").replace("\r", "")
        return self.text
