"""A Modelfile, by which Ollama runs a GGUF file: the chat template in Go's words, what ends an answer, the system text.

Promise: with a system text or without, and for one question or several, the template gives the prompt that the chat
template gives; where it would give another, there is no Modelfile. (Some chat templates also take the blanks off the
ends of what is said.)
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from training.base.files import write_atomically
from training.data.chat import ChatTokenizer, Message, assistant, user

# What the turns of a probe say; none of it is in a template.
_SYSTEM, _TURNS = "第零句。", ("第一句。", "第二句。", "第三句。", "第四句。", "第五句。")


@dataclass(frozen=True)
class Pieces:
    """What a chat template puts around what is said."""

    begin: str  # before the first question, where there is no system text
    before_system: str
    after_system: str
    after_question: str  # before an answer that has been given
    after_answer: str
    prompt: str  # behind the last question

    def render(self, system: str | None, turns: Sequence[str]) -> str:
        """What the Modelfile's template makes of questions and answers in turn."""
        text = self.begin if system is None else self.before_system + system + self.after_system
        for number, turn in enumerate(turns, 1):
            between = self.after_answer if number % 2 == 0 else self.after_question
            text += turn + (self.prompt if number == len(turns) else between)
        return text

    @property
    def default_system(self) -> str | None:
        """The system text that the template itself puts where there is none; None if it has none."""
        inner = self.begin.removeprefix(self.before_system).removesuffix(self.after_system)
        is_whole = self.before_system + inner + self.after_system == self.begin
        return inner if inner and is_whole and '"""' not in inner else None


def pieces_of(tokenizer: ChatTokenizer) -> Pieces | None:
    """The pieces of its chat template; None where it is not made of such."""
    first, second, third = _TURNS[:3]
    try:
        alone = _prompt(tokenizer, None, [first])
        whole = _prompt(tokenizer, _SYSTEM, [first, second, third])
        before_system, rest = whole.split(_SYSTEM)
        after_system, rest = rest.split(first)
        after_question, rest = rest.split(second)
        after_answer, prompt = rest.split(third)
        begin, _ = alone.split(first)
        pieces = Pieces(begin, before_system, after_system, after_question, after_answer, prompt)
        same = all(
            pieces.render(system, _TURNS[:count]) == _prompt(tokenizer, system, _TURNS[:count])
            for system in (None, _SYSTEM)
            for count in (1, 3, 5)
        )
    except Exception:  # a template is a program of its own, and may raise whatever it likes
        return None
    return pieces if same else None


def write(tokenizer: ChatTokenizer, folder: Path, gguf: str) -> bool:
    """Writes the Modelfile for the file called `gguf` in `folder`; returns whether there is one."""
    pieces = pieces_of(tokenizer)
    if pieces is not None:
        text = modelfile(pieces, gguf, end=tokenizer.end, begin=tokenizer.begin)
        write_atomically(folder / "Modelfile", text)
    return pieces is not None


def modelfile(pieces: Pieces, gguf: str, *, end: str, begin: str) -> str:
    """The Modelfile. gguf: the file's name. end: what ends an answer. begin: what llama.cpp puts before every text."""

    def said(text: str) -> str:
        return f"{{{{ {_go(text)} }}}}" if text else ""

    def first(text: str) -> str:
        return said(text.removeprefix(begin))

    behind_question = said(pieces.prompt)
    if pieces.prompt != pieces.after_question:
        behind_question = (
            f"{{{{ if $is_last }}}}{behind_question}{{{{ else }}}}{said(pieces.after_question)}{{{{ end }}}}"
        )
    template = (
        f"{{{{ if .System }}}}{first(pieces.before_system)}{{{{ .System }}}}{said(pieces.after_system)}"
        f"{{{{ else }}}}{first(pieces.begin)}{{{{ end }}}}"
        "{{ range $number, $_ := .Messages }}{{ $is_last := eq (len (slice $.Messages $number)) 1 }}"
        f'{{{{ if eq .Role "user" }}}}{{{{ .Content }}}}{behind_question}'
        f'{{{{ else if eq .Role "assistant" }}}}{{{{ .Content }}}}{{{{ if not $is_last }}}}{said(pieces.after_answer)}'
        "{{ end }}{{ end }}{{ end }}"
    )
    lines = [f"FROM ./{gguf}", f'TEMPLATE """{template}"""', f'PARAMETER stop "{end}"', "PARAMETER temperature 0"]
    if pieces.default_system is not None:
        lines.append(f'SYSTEM """{pieces.default_system}"""')
    return "\n".join(lines) + "\n"


def _go(text: str) -> str:
    """A Go string; those of JSON are some."""
    return json.dumps(text, ensure_ascii=False)


def _prompt(tokenizer: ChatTokenizer, system: str | None, turns: Sequence[str]) -> str:
    messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    messages += [(user, assistant)[number % 2](turn) for number, turn in enumerate(turns)]
    return tokenizer.prompt(messages)
