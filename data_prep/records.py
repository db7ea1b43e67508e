"""A corpus of conversations in files, whatever their form and layout: options, files, records.

A `Corpus` is what is particular to one command: its files, how a line of them is read, and what is asked of the model.
What cannot be read as a record is `Malformed`, with the reason, and never skipped in silence.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, TypeVar

import numpy as np
from pydantic import Field

from data_prep.preparing import MOST_MALFORMED, sha256_of_json
from training.base.environment import cores_seen
from training.base.options import Options, Pairs
from training.data.chat import Message, TextTokenizer, load_chat_tokenizer

# Keys of an answer, or of its record, that say with 0 or false that it is not to be learned.
WEIGHTS = ("weight", "loss_weight", "loss", "train")
NOT_LEARNED = f"no answer of it is to be learned ({', '.join(WEIGHTS[:-1])} or {WEIGHTS[-1]} is 0 or false)"


Learn = Literal["last", "all", "text"]


class ConversationOptions(Options):
    """The keys that every command has; it adds `source` and its own."""

    output: Path = Field(description="the folder to make, as in prepared/NAME")
    tokenizer: str = Field(
        "Qwen/Qwen2.5-3B-Instruct", description="folder or hub name of the base model, for its tokenizer and template"
    )
    template_options: Pairs = Field(
        {}, description="key=value words that the chat template is told, such as enable_thinking=false"
    )
    fraction: float = Field(1.0, gt=0, le=1, description="share of every part and task to keep; smaller are in larger")
    min_answer_characters: int = Field(1, ge=1, description="drop records with shorter answers")
    max_length: int = Field(1024, ge=64, description="tokens of prompt and answer, at most")
    validation_share: float | None = Field(
        None,
        gt=0,
        lt=0.5,
        description="validation's share of what is not test (10 %); null: 0.01, or of few records as much as makes "
        "50, up to 0.1",
    )
    max_malformed_share: float | None = Field(
        None,
        ge=0,
        le=1,
        description=f"refuse a source with more lines that are no record than this share; {MOST_MALFORMED}",
    )
    seed: int = Field(1234, ge=0, lt=2**32, description="seed of the split")
    workers: int = Field(cores_seen(), ge=1, description="processes that read and tokenise; by default one per core")
    overwrite: bool = Field(False, description="replace an output that was made with other options or another source")

    def load_tokenizer(self) -> TextTokenizer:
        """The tokenizer that these options name. Raises UserError."""
        tokenizer = load_chat_tokenizer(self.tokenizer, self.template_options)
        tokenizer.check_template_options()
        return tokenizer

    def defining(self) -> dict[str, object]:
        """The options that the prepared content depends on; source and tokenizer are compared by theirs."""
        others = {"source", "revision", "output", "tokenizer", "template_options", "max_malformed_share"}
        others |= {"workers", "overwrite"}
        values = self.model_dump(mode="json")
        return {key: values[key] for key in sorted(values.keys() - others)}


class Malformed(Exception):
    """A line that is no record; the message says why."""


@dataclass(frozen=True)
class Lines:
    """Records on the disk, one a line of JSON."""

    path: Path
    bytes: int
    numbers: np.ndarray | None = None  # int64, where each line stood in what it was unpacked from; None: as it is here

    def number(self, line: int) -> int:
        """What its owner calls line `line`, counted from 1."""
        return line if self.numbers is None else int(self.numbers[line - 1])


@dataclass(frozen=True)
class SourceFile:
    """A file of records."""

    path: Path
    bytes: int
    sha256: str

    @property
    def stem(self) -> str:
        """What its records' ids begin with."""
        return self.path.stem

    @property
    def lines(self) -> Lines:
        """Where its records can be read."""
        return Lines(self.path, self.bytes)

    @property
    def malformed(self) -> Sequence[tuple[int, str, str]]:
        """What was found to be no record before there were lines: line, reason, how it begins."""
        return ()

    def about(self) -> dict[str, object]:
        """What meta.json says of it."""
        return {"name": self.path.name, "bytes": self.bytes, "sha256": self.sha256}

    def __str__(self) -> str:
        return f"{self.path}: {self.bytes:,} bytes"


@dataclass(frozen=True)
class Record:
    """One well-formed record, texts trimmed."""

    id: str | None  # as in the file: unique neither there nor across files
    task: str
    messages: tuple[Message, ...]  # the last is an answer, which is learned
    unread: tuple[str, ...] = field(default=(), kw_only=True)  # keys that hold something and are not read, each once
    earlier: tuple[int, ...] = field(default=(), kw_only=True)  # places of other answers that may be learned, too
    tools: str = field(default="", kw_only=True)  # JSON of what the model may call
    notes: tuple[str, ...] = field(default=(), kw_only=True)  # what was done to read it

    @property
    def turns(self) -> tuple[Message, ...]:
        """All that stands before the last answer."""
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        """The text of the last answer."""
        return str(self.messages[-1]["content"])

    @property
    def question(self) -> str:
        """What the user asks first."""
        return next(turn["content"] for turn in self.turns if turn["role"] == "user")

    @property
    def group(self) -> str:
        """Records whose groups are equal, punctuation and blanks aside, are in one part."""
        return self.read_before(max(1, len(self.messages) - 1))  # of a text, which nothing stands before, all of it

    def read_before(self, place: int) -> str:
        """All that the model reads before it writes message `place`, as one text."""
        return "\n".join([self.tools, *map(as_text, self.messages[:place])])

    def texts(self) -> Iterator[tuple[str, str]]:
        """Every text, with what a message to the user calls it."""
        for number, message in enumerate(self.messages, 1):
            is_last = number == len(self.messages)
            yield (
                ("the answer" if number > 1 else "the text") if is_last else f"turn {number} ({message['role']})",
                as_text(message),
            )
        yield "tools", self.tools


def as_text(message: Message) -> str:
    """Everything that a message says, as one text."""
    more = {key: value for key, value in message.items() if key not in ("role", "content")}
    return message["content"] + (json.dumps(more, ensure_ascii=False) if more else "")


RecordT = TypeVar("RecordT", bound=Record)
FileT = TypeVar("FileT", bound=SourceFile)


class Corpus(ABC, Generic[RecordT, FileT]):
    """The records of one command. Every worker has a copy."""

    record_name: ClassVar[str]  # for messages: "57 lines are no ..."
    advice: ClassVar[str]  # what to do about those lines
    task_order: ClassVar[Sequence[str]] = ()  # of tasks in tables; others follow by name
    learn: Learn = "last"  # which answers are

    def __init__(
        self,
        options: ConversationOptions,
        files: Sequence[FileT],
        *,
        left_out: Sequence[str] = (),
        mixture: Mapping[str, float] | None = None,
    ):
        self.options = options
        self.mixture = dict(mixture or {})  # of several sources, how often an epoch has each
        self.files: tuple[FileT, ...] = tuple(files)
        self.left_out = tuple(left_out)  # tasks that are read and not prepared

    @property
    def sha256(self) -> str:
        """Identity of the source: the content of its files, and what their records' ids begin with."""
        return sha256_of_json([(file.stem, file.sha256) for file in self.files])

    @abstractmethod
    def about(self) -> dict[str, Any]:
        """What meta.json says of the source: kind, place and licence at least."""

    def source_of(self, file: SourceFile) -> str:
        """The name in `mixture` of the source that a file belongs to."""
        return ""

    def unpack(self, folder: Path) -> None:
        """Makes lines of JSON in `folder` of all files that are no such lines yet."""
        return None

    @abstractmethod
    def read(self, line: bytes, file: FileT) -> RecordT:
        """The record that `line` of `file` holds. Raises Malformed."""

    def is_short(self, record: RecordT) -> bool:
        """Whether the answer is too short to learn from."""
        return self.is_short_answer(record.messages[-1])

    def is_short_answer(self, answer: Message) -> bool:
        """The same of one answer; a call of a tool is as long as it is written."""
        return len(as_text(answer)) < self.options.min_answer_characters

    def asked(self, record: RecordT) -> list[Message]:
        """The turns that the model reads before it answers."""
        return list(record.turns)

    def shortened(self, record: RecordT, count: Callable[[list[Message]], int], room: int) -> list[Message] | None:
        """Those turns, cut so that `count` of them is at most `room`; None where that may not be done."""
        return None


def decoded(content: bytes) -> str:
    """Its text. Raises Malformed."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Malformed(f"not UTF-8 (byte {error.start + 1}); of GBK, `iconv -f GB18030 -t UTF-8` makes it") from None


def json_value(line: bytes) -> Any:
    """What a line holds. Raises Malformed."""
    try:
        return json.loads(decoded(line))
    except (ValueError, RecursionError) as error:
        raise Malformed(f"not JSON: {getattr(error, 'msg', error)}") from None


def json_object(line: bytes) -> dict[str, Any]:
    """The object that a line holds. Raises Malformed."""
    values = json_value(line)
    if not isinstance(values, dict):
        raise Malformed(f"{kind_of(values)}, not an object")
    return values


def is_learned(values: dict[str, Any]) -> bool:
    """Whether the answer in `values` is to be learned, by its `WEIGHTS`. Takes those of 0 and 1 out of `values`."""
    said = [values.pop(key) for key in WEIGHTS if key in values and values[key] in (0, 1)]  # false is 0, true is 1
    return 0 not in said


def keys_left(values: Mapping[str, Any]) -> list[str]:
    """The keys that nobody has read, of values that readers take out; null and what is empty says nothing."""
    return [key for key, value in values.items() if value not in (None, "", [], {})]


def unread_keys(values: dict[str, Any]) -> list[str]:
    """`keys_left` of a record that has been read. Raises Malformed if it says that it is not to be learned."""
    if not is_learned(values):
        raise Malformed(NOT_LEARNED)
    return keys_left(values)


def checked_text(key: str, value: object) -> str:
    """`value`, which stands under `key`. Raises Malformed unless it is text."""
    if not isinstance(value, str):
        raise Malformed(f"{key} is {kind_of(value)}, not text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise Malformed(f"{key} holds half a surrogate pair, which is no character") from None
    return value


def written_text(key: str, value: object) -> str:
    """`checked_text`, trimmed. Raises Malformed also if nothing is left of it."""
    text = checked_text(key, value).strip()
    if not text:
        raise Malformed(f"{key} is empty")
    return text


def kind_of(value: object) -> str:
    """What JSON calls it, in words."""
    names: dict[type, str] = {type(None): "null", bool: "true or false", dict: "an object", list: "a list", str: "text"}
    return names.get(type(value), "a number")


def unique_id(file: SourceFile, name: str | None, line: int, taken: set[str]) -> str:
    """An id that no earlier record has: the file and the id there, and the line where those are not enough."""
    uid = f"{file.stem}:{name}" if name is not None else f"{file.stem}:null@{line}"
    while uid in taken:
        uid = f"{uid}@{line}"
    taken.add(uid)
    return uid
