"""Prepares your own questions and answers, in files of JSON lines, for fine-tuning a chat model.

    python -m data_prep.instructions --source mine.jsonl --tokenizer Qwen/Qwen2.5-3B-Instruct --output prepared/mine
    python -m data_prep.instructions --source FOLDER --tokenizer models/mine --max_length 2048 --output prepared/mine

A line is a record in any of `LAYOUTS`; one file may hold several of them. The last answer that has no weight of 0 is
learned; the turns before it, and a system's, are what the model reads. A record is counted, split and scored as its
`task` or `category`, if it has one, and otherwise under the name of its file. This promises what
`prepare_conversations` does.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from data_prep.prepare_conversations import prepare
from data_prep.records import (
    NOT_LEARNED,
    WEIGHTS,
    ConversationOptions,
    Corpus,
    Malformed,
    Record,
    SourceFile,
    checked_text,
    is_learned,
    json_object,
    keys_left,
    kind_of,
    unread_keys,
    written_text,
)
from training.base.console import UserError, run_main
from training.base.files import check_there, sha256_of
from training.base.options import parse
from training.data.chat import Message, user

# Layouts of turns: the key of the list, and the keys of a turn for who speaks and what is said.
TURNS = (
    ("messages", "role", "content"),  # OpenAI, Hugging Face
    ("conversations", "from", "value"),  # ShareGPT
)
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model"), "assistant"),
}
# Layouts of a question and its answer: one key of each kind, and perhaps one with more to the question. Alpaca, others.
QUESTIONS, MORE = ("instruction", "prompt", "question"), ("input", "context")
ANSWERS = ("output", "completion", "response", "answer")
SYSTEM = ("system", "system_prompt")
LAYOUTS = (
    *(f"{turns}, a list of {{{speaker}, {text}}}" for turns, speaker, text in TURNS),
    f"{', '.join(QUESTIONS)} or input; {' or '.join(MORE)} (if there is more to it); "
    f"{', '.join(ANSWERS[:-1])} or {ANSWERS[-1]}",
)
ABOUT = f"""Prepares your own questions and answers for fine-tuning. A line of the files is a JSON object with the keys

  {(chr(10) + "  ").join(LAYOUTS)}

and, if you like, task or category, id, and {" or ".join(SYSTEM)}; other keys are not read, but counted and named. Of
several turns the last answer is learned in which none of {", ".join(WEIGHTS)} is 0 or false, and what stands
before it is read. Equal questions (of several, the first) are in one part. Dropped and counted: a record that is too
long, and one that says the same as another before it. A task is scored as free text, unless it bears the name of one of
DISC-Law-SFT's."""
# What the files of other formats begin with, and what to do about them.
NOT_TEXT = {
    b"\x1f\x8b": "it is compressed; `gunzip -k {path}` unpacks it",
    b"PK\x03\x04": "it is a zip file or a spreadsheet; unpack it, or export it as JSON lines",
    b"PAR1": "it is a Parquet file; `pandas.read_parquet(FILE).to_json(NEW, orient='records', lines=True)` converts it",
    b"\xff\xfe": "it is UTF-16; `iconv -f UTF-16 -t UTF-8 {path} > mine-utf8.jsonl` converts it",
    b"\xfe\xff": "it is UTF-16; `iconv -f UTF-16 -t UTF-8 {path} > mine-utf8.jsonl` converts it",
}
FOR_ALL = ("all", "all tasks")  # tables call all tasks together so
LICENCE = "Not stated in the records: the licence is that of wherever they came from."


class InstructionOptions(ConversationOptions):
    """The keys of `python -m data_prep.instructions`."""

    source: str = Field(description="a file of JSON lines, or a folder with .jsonl files")
    tasks: Literal["field", "file"] = Field(
        "field", description="field: a record's task or category, if it has one, is its task; file: its file's name is"
    )


class Instructions(Corpus[Record, SourceFile]):
    """The records in `files`."""

    record_name = "record"
    advice = f"mend these lines, or allow more of them. A line is a JSON object with the keys {' | '.join(LAYOUTS)}"
    options: InstructionOptions

    def about(self) -> dict[str, Any]:
        kind = "folder" if Path(self.options.source).expanduser().is_dir() else "file"
        return {"kind": kind, "place": self.options.source, "licence": LICENCE}

    def read(self, line: bytes, file: SourceFile) -> Record:
        values = json_object(line)
        turns, answer, unread = _turns_of(values)
        if values.get("history"):
            raise Malformed("history holds turns, which are read from messages or conversations only")
        system = next((key for key in SYSTEM if values.get(key)), None)
        if system and turns[0]["role"] != "system":
            turns = [_turn("system", written_text(system, values.pop(system))), *turns]
        name = values.pop("id", None)
        if name is not None and not isinstance(name, int):
            checked_text("id", name)
        task = _task_of(values) if self.options.tasks == "field" else None
        unread = tuple(dict.fromkeys([*unread, *unread_keys(values)]))
        return Record(None if name is None else str(name), task or file.stem, tuple(turns), answer, unread=unread)


def _task_of(values: dict[str, Any]) -> str | None:
    key = "task" if values.get("task") else "category"
    if not values.get(key):
        return None
    task = " ".join(written_text(key, values.pop(key)).split())
    if task in FOR_ALL:
        raise Malformed(f"{key} is {task!r}, which is what tables call all of them: name it otherwise")
    return task


def _turns_of(values: dict[str, Any]) -> tuple[list[Message], str, Sequence[str]]:
    """The turns before the answer, the answer, and keys of turns that are not read, whatever the layout.

    Takes what is read out of `values`. Raises Malformed.
    """
    for key, speaker, text in TURNS:
        if key in values:
            return _conversation(key, values.pop(key), speaker, text)
    questions = [key for key in QUESTIONS if key in values] or [key for key in MORE[:1] if key in values]
    answers = [key for key in ANSWERS if key in values]
    if questions and not answers:
        raise Malformed(f"no answer ({', '.join(ANSWERS)}) beside {', '.join(map(repr, values))}"[:200])
    if not questions:
        raise Malformed(f"no layout has the keys {', '.join(map(repr, values)) or '(none)'}"[:200])
    for both in (questions, answers):
        if len(both) > 1:
            raise Malformed(f"it has {' and '.join(both)}, of which one is expected")
    keys = dict.fromkeys([*questions, *(key for key in MORE if values.get(key))])
    asked = "\n".join(filter(None, (checked_text(key, values.pop(key)).strip() for key in keys)))
    return [user(written_text(" and ".join(keys), asked))], written_text(answers[0], values.pop(answers[0])), ()


def _conversation(key: str, turns: object, speaker: str, text: str) -> tuple[list[Message], str, Sequence[str]]:
    if not isinstance(turns, list):
        raise Malformed(f"{key} is {kind_of(turns)}, not a list of turns")
    read: list[Message] = []
    learned: list[int] = []  # places of turns
    unread: list[str] = []
    for number, turn in enumerate(turns, 1):
        where = f"turn {number} of {key}"
        if not isinstance(turn, dict) or speaker not in turn or text not in turn:
            found = f", but with {', '.join(turn) or 'nothing'}" if isinstance(turn, dict) else ""
            raise Malformed(f"{where} is no object with {speaker} and {text}{found}"[:200])
        who = checked_text(f"{speaker} of {where}", turn.pop(speaker))
        role = ROLES.get(who)
        if role is None:
            raise Malformed(f"{where} is of {who!r}, who is none of {', '.join(ROLES)}"[:200])
        if is_learned(turn) and role == "assistant":
            learned.append(len(read))
        read.append(_turn(role, written_text(f"{text} of {where}", turn.pop(text))))
        unread += (f"{key}[].{name}" for name in keys_left(turn))
    roles = [turn["role"] for turn in read]
    expected = ["system"] * (roles[:1] == ["system"])
    expected += ["user", "assistant"] * ((len(roles) - len(expected)) // 2)
    if roles != expected or "assistant" not in roles:
        raise Malformed(
            f"{key}: a user and an assistant take turns, behind a system at most, and the assistant has the last; here "
            f"they are of {', '.join(roles) or 'nobody'}"[:300]
        )
    if not learned:
        raise Malformed(NOT_LEARNED)
    last = learned[-1]
    return read[:last], read[last]["content"], unread


def _turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def find_files(source: str) -> list[SourceFile]:
    """The file `source`, or the .jsonl files in the folder, by name. Raises UserError when there is nothing to read."""
    place = Path(source).expanduser()
    if not place.exists():
        raise UserError(f"--source {source} does not exist: pass a file of JSON lines, or a folder with .jsonl files")
    paths = sorted(place.glob("*.jsonl")) if place.is_dir() else [place]
    if not paths:
        raise UserError(f"--source {source} holds no .jsonl file: pass the folder that they are in, or one file")
    check_there(paths if place.is_dir() else [])
    files = [SourceFile(path, path.stat().st_size, sha256_of(path)) for path in paths]
    for file in files:
        with file.path.open("rb") as opened:
            begin = opened.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()
        path = shlex.quote(str(file.path))
        for magic, mend in NOT_TEXT.items():
            if begin.startswith(magic):
                raise UserError(f"{file.path} is no text of JSON lines: {mend.format(path=path)}")
        convert = f"{path} > {shlex.quote(file.stem + '-lines.jsonl')}`"
        if begin.split(b"\n")[0].strip() == b"{":
            raise UserError(
                f"{file.path} has its records on several lines each: `jq -c . {convert} makes a file of one a line"
            )
        if begin.startswith(b"["):
            raise UserError(
                f"{file.path} is one JSON list, not a JSON object a line: `jq -c '.[]' {convert} makes a file of lines "
                "of it"
            )
    return files


def main(argv: Sequence[str] | None = None) -> int:
    """The command; raises UserError for everything the user can mend."""
    options, dry_run = parse(
        InstructionOptions,
        sys.argv[1:] if argv is None else argv,
        prog="python -m data_prep.instructions",
        about=ABOUT,
    )
    return prepare(options, dry_run, lambda: Instructions(options, find_files(options.source)), example="mine")


if __name__ == "__main__":
    run_main(main)
