"""Prepares your own conversations, whatever their files and layouts, for fine-tuning a chat model.

    python -m data_prep.instructions --source mine.jsonl --tokenizer Qwen/Qwen2.5-3B-Instruct --output prepared/mine
    python -m data_prep.instructions --source FOLDER --tokenizer models/mine --max_length 2048 --output prepared/mine

A record is in any of `LAYOUTS`; one file may hold several of them. The last answer that has no weight of 0 is learned;
the turns before it, and a system's, are what the model reads. A record is counted, split and scored as its `task` or
`category`, if it has one, and otherwise under the name of its file. This promises what `prepare_conversations` does.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from data_prep.layouts import ASSISTANT, LAYOUTS, Keys, conversation_of, is_turns, text_of, without_absent
from data_prep.prepare_conversations import prepare
from data_prep.preparing import sha256_of_json
from data_prep.record_files import RecordFile, files_in, from_hub, saved, unpacked
from data_prep.records import (
    WEIGHTS,
    ConversationOptions,
    Corpus,
    Learn,
    Malformed,
    Record,
    SourceFile,
    checked_text,
    json_value,
    kind_of,
    unread_keys,
    written_text,
)
from data_prep.tables import is_saved
from training.base.console import UserError, run_main, warn
from training.base.options import Pairs, Revision, Words, parse
from training.data.chat import TextTokenizer, assistant, load_text_tokenizer

ABOUT = f"""Prepares your own conversations for fine-tuning. Files of JSON lines, JSON, CSV and Parquet are read, also
compressed ones, folders of them, and data sets of the Hugging Face hub (hub:NAME). A record has the keys

  {(chr(10) + "  ").join(LAYOUTS)}

and, if you like, task or category, id, and system or system_prompt; options name other keys. What is not read is
counted and named. Of several turns the last answer is learned in which none of {", ".join(WEIGHTS)} is 0 or
false, and what stands before it is read; with --learn all, every such answer is learned. With --learn text, a record is
a text (key text), and so is a .txt or .md file. Records with the same turns before the answer are in one part. Dropped
and counted: a record that is too long, and one that says the same as another before it. A task is scored as free text,
unless it bears the name of one of DISC-Law-SFT's."""
FOR_ALL = ("all", "all tasks")  # tables call all tasks together so
IDS = ("id", "conversation_id", "idx")
HUB = "hub:"
MOST_SOURCES, MOST_WEIGHT = 16, 100  # a source is a curve and some keys of every line of the record
LICENCE = "Not stated in the records: the licence is that of wherever they came from."


class InstructionOptions(ConversationOptions):
    """The keys of `python -m data_prep.instructions`."""

    source: Words = Field(
        description="files, folders with such files, hub:NAME for data sets of the hub; of A.jsonl:2 B.jsonl:0.5 an "
        "epoch has each record of A twice, and half of B"
    )
    subset: str | None = Field(None, description="of a data set of the hub: its configuration")
    split: str = Field("train", description="of a data set of the hub, or one that `datasets` saved: the part to read")
    revision: Revision = Field("main", description="of a data set of the hub: commit or branch")
    learn: Learn = Field(
        "last",
        description="last: a conversation's last answer; all: every answer, in one pass where that is exact; text: "
        "whole texts, for continued training of a base model",
    )
    text_key: str = Field("text", description="key of the text, with --learn text")
    tasks: Literal["field", "file"] = Field(
        "field", description="field: a record's task or category, if it has one, is its task; file: its file's name is"
    )
    turns_key: str | None = Field(None, description="key of the list of turns; null: as in the layouts")
    role_key: str | None = Field(None, description="key of a turn that says who speaks; null: role, from or speaker")
    content_key: str | None = Field(None, description="key of a turn that says what; null: content, value or text")
    roles: Pairs = Field({}, description="name=role words for other speakers: user, assistant, system or tool")
    question_key: Words = Field((), description="keys of the question, joined by line ends; none: as in the layouts")
    context_key: Words = Field((), description="keys of what is put before the question, such as reference")
    answer_key: str | None = Field(None, description="key of the answer, such as chosen; null: as in the layouts")
    system_key: str | None = Field(None, description="key of the system's text; null: system or system_prompt")
    task_key: str | None = Field(None, description="key of the task; null: task or category")
    reasoning: bool = Field(
        False,
        description="learn reasoning_content, reasoning or thinking as the template writes them before the answer",
    )

    @model_validator(mode="after")
    def _without_template(self) -> InstructionOptions:
        if self.learn == "text" and self.template_options:
            raise ValueError("template_options has no effect with learn text, which needs no chat template")
        return self

    @model_validator(mode="after")
    def _of_data_sets(self) -> InstructionOptions:
        named = sorted({"subset", "split", "revision"} & self.model_fields_set)
        words = [_weighted(word)[0] for word in self.source]
        if named and not any(word.startswith(HUB) or is_saved(Path(word).expanduser()) for word in words):
            raise ValueError(
                f"{named[0]} is that of a data set, hub:NAME or a folder that `datasets` has saved: leave it out"
            )
        return self

    @field_validator("roles")
    @classmethod
    def _known_roles(cls, roles: dict[str, Any]) -> dict[str, Any]:
        wrong = [role for role in roles.values() if role not in ("system", "user", "assistant", "tool")]
        if wrong:
            raise ValueError(f"{wrong[0]} is none of user, assistant, system and tool")
        return {name.lower(): role for name, role in roles.items()}

    def load_tokenizer(self) -> TextTokenizer:
        return load_text_tokenizer(self.tokenizer) if self.learn == "text" else super().load_tokenizer()

    def defining(self) -> dict[str, object]:
        return {key: value for key, value in super().defining().items() if key not in ("subset", "split")}

    @property
    def keys(self) -> Keys:
        """What the keys of records are called."""
        return Keys(
            turns=self.turns_key,
            role=self.role_key,
            content=self.content_key,
            roles=self.roles,
            question=self.question_key,
            context=self.context_key,
            answer=self.answer_key,
            system=self.system_key,
            reasoning=self.reasoning,
        )


class Instructions(Corpus[Record, RecordFile]):
    """The records in `files`."""

    record_name = "record"
    advice = "mend these lines, or allow more of them; `python -m data_prep.instructions --help` lists the layouts"
    options: InstructionOptions

    def __init__(self, options: InstructionOptions, files: Sequence[RecordFile], mixture: dict[str, float]):
        super().__init__(options, files, mixture=mixture)
        self.learn = options.learn

    @property
    def sha256(self) -> str:
        if not self.mixture:
            return super().sha256
        return sha256_of_json([self.mixture, [(file.source, file.stem, file.sha256) for file in self.files]])

    def source_of(self, file: SourceFile) -> str:
        return file.source if isinstance(file, RecordFile) else ""

    def about(self) -> dict[str, Any]:
        words = self.options.source
        kind = "folder" if all(Path(word).expanduser().is_dir() for word in words) else "file"
        return {"kind": kind, "place": " ".join(words), "licence": LICENCE}

    def unpack(self, folder: Path) -> None:
        self.files = tuple(
            file if file.is_lines else unpacked(file, folder, number, self.options.keys)
            for number, file in enumerate(self.files)
        )

    def read(self, line: bytes, file: SourceFile) -> Record:
        options = self.options
        values = json_value(line)
        if options.learn == "text":
            return self._text(values, file)
        if is_turns(values, options.keys):
            values = {"messages": values}
        if not isinstance(values, dict):
            raise Malformed(f"{kind_of(values)}, not an object")
        values = {key: value for key, value in values.items() if value == value and value is not None}
        read = conversation_of(values, options.keys)
        answers = [
            place
            for place, message in enumerate(read.messages)
            if message["role"] == ASSISTANT and place not in read.unlearned
        ]
        if options.learn == "all":  # what is too short is read only, unless there is nothing else
            answers = [place for place in answers if not self.is_short_answer(read.messages[place])] or answers[-1:]
        name = next((values.pop(key) for key in IDS if key in values), None)
        if isinstance(name, list | dict):
            raise Malformed(f"id is {kind_of(name)}, not text")
        task = self._task_of(values) if options.tasks == "field" else None
        tools = json.dumps(without_absent(read.tools), ensure_ascii=False) if read.tools else ""
        return Record(
            None if name is None else text_of("id", name),
            task or _task_by(file),
            tuple(read.messages[: answers[-1] + 1]),
            unread=tuple(dict.fromkeys([*read.unread, *unread_keys(values)])),
            earlier=tuple(answers[:-1]) if options.learn == "all" else (),
            tools=checked_text("tools", tools),
            notes=tuple(read.notes),
        )

    def _text(self, values: Any, file: SourceFile) -> Record:
        """A document."""
        if not isinstance(values, dict) or self.options.text_key not in values:
            keys = ", ".join(map(repr, values)) if isinstance(values, dict) else kind_of(values)
            raise Malformed(f"no {self.options.text_key} in it, but {keys}: name the key with --text_key"[:300])
        values = {key: value for key, value in values.items() if value == value and value is not None}
        text = written_text(self.options.text_key, values.pop(self.options.text_key, ""))
        name = next((values.pop(key) for key in IDS if key in values), None)
        task = self._task_of(values) if self.options.tasks == "field" else None
        name = None if name is None else text_of("id", name)
        # A file of plain text is one of many, which are no tasks of their own.
        whole = file.source if isinstance(file, RecordFile) and file.form == "text" else _task_by(file)
        return Record(name, task or whole, (assistant(text),), unread=tuple(unread_keys(values)))

    def _task_of(self, values: dict[str, Any]) -> str | None:
        key = self.options.task_key or ("task" if "task" in values else "category")
        if values.get(key) in (None, "", []):
            return None
        value = values.pop(key)
        parts = value if isinstance(value, list) else [value]
        task = " ".join(", ".join(text_of(key, part) for part in parts).split())
        if task in FOR_ALL:
            raise Malformed(f"{key} is {task!r}, which is what tables call all of them: name it otherwise")
        return task or None


def _task_by(file: SourceFile) -> str:
    """The task of records that name none: their file's name, without its endings and the number of a shard."""
    task = re.sub(r"[-_.](\d{5,}|\d+[-_]of[-_]\d+)$", "", file.stem) or file.stem
    return file.path.name if task in FOR_ALL else task


def open_corpus(options: InstructionOptions) -> Instructions:
    """The records of every source. Raises UserError when there is nothing to read."""
    files: list[RecordFile] = []
    weights: dict[str, float] = {}
    words: set[str] = set()
    for whole in options.source:
        word, weight = _weighted(whole)
        place = Path(word).expanduser()
        if word in words:
            raise UserError(f"--source names {word} twice: name it once, with a weight ({word}:2)")
        words.add(word)
        if word.startswith(HUB):
            found = [from_hub(word[len(HUB) :], options.subset, options.split, options.revision, word)]
        elif dataset := saved(place, options.split, word):
            found = [dataset]
        else:
            found = files_in(place, word, options.keys, text=options.learn == "text")
            _warn_of_parts(word, found)
        name = found[0].stem if len(found) == 1 else place.name
        name = word if name in weights else name
        weights[name] = weight
        files += (replace(file, source=name) for file in found)
    if len(weights) > MOST_SOURCES:
        raise UserError(f"--source names {len(weights)} sources, more than {MOST_SOURCES}: put them into folders")
    is_mixture = len(weights) > 1 or set(weights.values()) != {1.0}
    return Instructions(options, files, weights if is_mixture else {})


def _warn_of_parts(word: str, files: Sequence[RecordFile]) -> None:
    """Says that the parts into which others split their records are all read."""
    parts = [file for file in files if file.stem in ("train", "test", "validation", "valid", "dev")]
    if len(parts) > 1:
        warn(
            f"{word} has {', '.join(file.name for file in parts)}, all of which are read and split anew: pass the one "
            f"to learn from, as in --source {parts[0].path}"
        )


def _weighted(word: str) -> tuple[str, float]:
    """A source, and the weight behind it."""
    found = re.fullmatch(r"(.+):(-?\d+\.?\d*(?:e-?\d+)?|nan)", word)
    if found is None or Path(word).expanduser().exists():
        return word, 1.0
    weight = float(found[2])
    if not 0 < weight <= MOST_WEIGHT:
        raise UserError(
            f"--source {word}: a weight is above 0 and at most {MOST_WEIGHT}, the times that an epoch has it"
        )
    return found[1], weight


def main(argv: Sequence[str] | None = None) -> int:
    """The command; raises UserError for everything the user can mend."""
    options, dry_run = parse(
        InstructionOptions,
        sys.argv[1:] if argv is None else argv,
        prog="python -m data_prep.instructions",
        about=ABOUT,
    )
    return prepare(options, dry_run, lambda: open_corpus(options), example="mine")


if __name__ == "__main__":
    run_main(main)
