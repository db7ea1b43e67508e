"""The records of DISC-Law-SFT: the published files, their tasks and oddities, and what the model is asked.

Whatever is odd in the files is dealt with here and nowhere else: two schemas, ids that collide across files or are
null, a misspelt task, statutes that are inside the question in one file and beside it in another.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Literal

from data_prep.records import (
    Malformed,
    Record,
    SourceFile,
    checked_text,
    json_object,
    kind_of,
    unread_keys,
    written_text,
)
from training.base.console import UserError, warn
from training.base.files import check_there, sha256_of
from training.base.hub import fetch_snapshot
from training.data.chat import assistant, user
from training.data.conversations import DISC_LAW_SFT

HUB_PAGE = f"https://huggingface.co/datasets/{DISC_LAW_SFT}"
LICENCE = f"DISC-Law-SFT, Apache-2.0 ({HUB_PAGE})"


@dataclass(frozen=True)
class LawTask:
    """One of the twelve tasks, and how its records are laid out."""

    name: str
    # The answer is prose, so that one of a character or two is a fault; elsewhere it is a label or a span.
    free_text: bool = False
    # What an over-long message may lose: the middle of its long lines, the middle of the text as a whole, or nothing,
    # since all of it is question or the answer tags it character by character.
    cut: Literal["lines", "text"] | None = "lines"
    # The text from here on is the question, and is never cut.
    question: str | None = None
    # What must not be in two parts: the whole message, the document (several questions are asked about one case) or the
    # question (it is asked with several choices of statutes, and in another file without).
    one_part: Literal["all", "document", "question"] = "all"

    def document_and_question(self, text: str) -> tuple[str, str]:
        """`text` in two: up to the last mark, and from there on; all of it is the document where there is no mark."""
        place = text.rfind(self.question) if self.question else -1
        return (text[:place], text[place:]) if place >= 0 else (text, "")


# A judgement or a news item to be summed up has many short lines and no long one.
TASKS = (
    LawTask("jud_read_compre", question="问题为：", one_part="document"),
    LawTask("leg_ele_extra", cut=None),
    LawTask("leg_eve_detec"),
    LawTask("exam", cut=None),
    LawTask("leg_case_cls"),
    LawTask("sent_pred", free_text=True),
    LawTask("jud_doc_sum", free_text=True, cut="text"),
    LawTask("sim_case_match"),
    LawTask("op_sum", free_text=True, cut="text"),
    LawTask("legal_question_answering", free_text=True, cut=None),
    LawTask("legal_question_answering_reference", free_text=True, question="<问题>：", one_part="question"),
    LawTask("judgement_predict", free_text=True),
)
TASK_NAMES = tuple(task.name for task in TASKS)
_PAIR = TASK_NAMES[:9]


@dataclass(frozen=True)
class PublishedFile:
    """One of the four files as it was published, and the task of each prefix of its ids."""

    stem: str
    bytes: int
    sha256: str
    tasks: dict[str, str]
    has_reference: bool = False

    @property
    def name(self) -> str:
        return f"{self.stem}.jsonl"


FILES = (
    PublishedFile(
        "DISC-Law-SFT-Pair",
        346_801_238,
        "d181a4baeca0b384a508dcba1e8c0888c57471ed1272e83c7e859c4464950aae",
        {f"{task}-": task for task in _PAIR},
    ),
    PublishedFile(
        "DISC-Law-SFT-Pair-QA-released",
        94_042_837,
        "0a12835997a2e8028b0c8073aecf840c93f0c5c294953471380275f43bb95280",
        {"legal_question_answering_": "legal_question_answering"},
    ),
    PublishedFile(
        "DISC-Law-SFT-Triplet-QA-released",
        85_520_456,
        "df3d2d7c75ae07e5be78c6214805c47b896874e58b4fffabe97fd0470aa3ef79",
        {"legal_question_answering_": "legal_question_answering_reference"},
        has_reference=True,
    ),
    PublishedFile(
        "DISC-Law-SFT-Triplet-released",
        52_814_582,
        "b368306f80a3f71e632298a8e7eda75a1bf029f8358dcb8af31fb912270890c2",
        {"judgement_predit-": "judgement_predict", "judgement_predict-": "judgement_predict"},
        has_reference=True,
    ),
)


@dataclass(frozen=True)
class LawFile(SourceFile):
    """One of the four as it was found."""

    published: PublishedFile

    @property
    def stem(self) -> str:
        return self.published.stem

    @property
    def is_published(self) -> bool:
        """Whether it is the published file, byte by byte."""
        return self.sha256 == self.published.sha256

    def about(self) -> dict[str, object]:
        return {**super().about(), "published": self.is_published}

    def __str__(self) -> str:
        return super().__str__() + (", as published" if self.is_published else "")


def as_published() -> list[LawFile]:
    """The four files as the hub has them."""
    return [LawFile(Path(published.name), published.bytes, published.sha256, published) for published in FILES]


def find_files(source: str, revision: str) -> list[LawFile]:
    """The files in the folder `source`, or those of the hub if it is "hub", in the order of `FILES`.

    A file is named as published, or with `.sample` and anything else before the ending. Warns of files that are missing
    or not what their name says. Raises UserError if there are none, if one is there twice, or if one of the hub's
    differs from the published one: it can only be another version.
    """
    folder = fetch(revision) if source == "hub" else Path(source).expanduser()
    if not folder.is_dir():
        what = (
            "is a file: pass the folder that it is in" if folder.exists() else "does not exist: pass a folder, or hub"
        )
        raise UserError(f"--source {source} {what}")
    found = []
    for published in FILES:
        pattern = re.compile(re.escape(published.stem) + r"(\.sample[^/]*)?\.jsonl")
        paths = sorted(path for path in folder.iterdir() if pattern.fullmatch(path.name))
        if len(paths) > 1:
            raise UserError(
                f"--source {source} holds {published.stem} twice ({' and '.join(path.name for path in paths)}); "
                "leave one of them there"
            )
        check_there(paths)
        for path in paths:
            found.append(LawFile(path, path.stat().st_size, sha256_of(path), published))
    missing = [published.name for published in FILES if published not in [file.published for file in found]]
    if not found:
        raise UserError(
            f"--source {source} holds none of the files of DISC-Law-SFT; expected {', '.join(missing)} "
            f"(from {HUB_PAGE}, or `--source hub`)"
        )
    if missing:
        warn(f"{source} lacks {', '.join(missing)}: their tasks will be missing")
    for file in found:
        if file.is_published or file.path.name != file.published.name:
            continue
        wrong = (
            f"{file.path} is not the published file: {file.bytes:,} bytes, sha256 {file.sha256[:16]}, expected "
            f"{file.published.bytes:,} bytes, sha256 {file.published.sha256[:16]}"
        )
        if source == "hub":
            raise UserError(f"{wrong}; the hub holds another version: pass the --revision that has the published one")
        warn(f"{wrong}; it is prepared as it is, and meta.json says so")
    return found


def fetch(revision: str) -> Path:
    """The folder with the four files in the hub's cache on this machine, fetched if need be."""
    return fetch_snapshot(
        DISC_LAW_SFT,
        revision=revision,
        patterns=[published.name for published in FILES],
        is_complete=lambda folder: all((folder / published.name).is_file() for published in FILES),
        kind="dataset",
    )


@dataclass(frozen=True)
class LawRecord(Record):
    """A record of DISC-Law-SFT."""

    reference: tuple[str, ...] = ()  # statutes, which may stand before the question

    @property
    def layout(self) -> LawTask:
        """How records of its task are laid out."""
        return TASKS[TASK_NAMES.index(self.task)]

    @property
    def missing_statutes(self) -> list[str]:
        """The statutes that the question does not hold already."""
        held = _without_blanks(self.question)
        return [statute for statute in self.reference if _without_blanks(statute) not in held]

    @property
    def group(self) -> str:
        task = self.layout
        document, question = task.document_and_question(self.question)
        if task.one_part == "question" and task.question:
            return question.removeprefix(task.question) or self.question
        if task.one_part == "document":
            return max(document.split("\n"), key=len)  # without the instruction, which has many wordings
        return self.question

    def texts(self) -> Iterator[tuple[str, str]]:
        yield from (("input", self.question), ("output", self.answer), ("reference", "\n".join(self.reference)))


def read_record(line: bytes, file: PublishedFile) -> LawRecord:
    """The record that `line` of `file` holds. Raises Malformed."""
    values = json_object(line)
    keys = ("id", "input", "output", "reference") if file.has_reference else ("id", "input", "output")
    lacking = [key for key in keys if key not in values]
    if lacking:
        raise Malformed(f"no {' and no '.join(lacking)}")
    question, answer = (written_text(key, values.pop(key)) for key in ("input", "output"))
    reference = values.pop("reference") if file.has_reference else []
    if not isinstance(reference, list):
        raise Malformed(f"reference is {kind_of(reference)}, not a list of texts")
    statutes = [checked_text("reference", statute).strip() for statute in reference]
    name = values.pop("id")
    if name is not None:
        checked_text("id", name)
    unread = tuple(unread_keys(values))
    task = _task_of(name, file)
    messages = (user(question), assistant(answer))
    return LawRecord(name, task, messages, tuple(filter(None, statutes)), unread=unread)


def _task_of(name: str | None, file: PublishedFile) -> str:
    if name is None:
        tasks = set(file.tasks.values())
        if len(tasks) > 1:
            raise Malformed(f"id is null, and {file.stem} has {len(tasks)} tasks")
        return tasks.pop()
    for prefix, task in file.tasks.items():
        if name.startswith(prefix):
            return task
    raise Malformed(f"the id {name[:60]!r} is of no task of {file.stem}")


def _without_blanks(text: str) -> str:
    return "".join(text.split())


CUT_MARK = "……"
MOST_CUTS = 30  # before a record is given up; two or three will do, and its tokens are counted anew after each
MIN_KEPT = 200  # characters of a line or text that are never cut: room for any instruction


def shortened(
    task: LawTask, statutes: list[str], question: str, answer: str, count: Callable[[str], int], room: int
) -> str | None:
    """What is asked, cut so that `count` of it is at most `room`; None where the rules of the task cannot do that.

    The rule: no line is longer than it has to be. Lines (or, for summaries, the text as a whole) above a common limit
    lose their middle to a mark; of what is kept, three quarters stand before the mark and one behind it. An instruction
    is a short line at either end, and a question is set apart (`LawTask.question`), so neither loses anything. Statutes
    are lines like any other. A record whose answer stood word for word in the text and no longer does is given up.
    """
    whole = "\n".join([*statutes, question])
    if task.cut is None:
        return None
    document, kept = task.document_and_question(question)
    blocks = [*statutes, *(document.split("\n") if task.cut == "lines" else [document])]
    tokens = count(whole)
    characters_per_token = max(1.0, len(whole) / max(1, tokens))
    text, to_remove = whole, 0
    for _ in range(MOST_CUTS):
        excess = count(text) - room
        if excess <= 0:
            return text if answer not in whole or answer in text else None
        to_remove += max(1, ceil(excess * characters_per_token))
        limit = _limit_that_removes(to_remove, [len(block) for block in blocks])
        if limit < MIN_KEPT:
            return None
        text = "\n".join(_cut(block, limit) for block in blocks) + kept
    return None


def _limit_that_removes(characters: int, lengths: list[int]) -> int:
    """The largest limit on lines of these lengths that takes away so many characters; 0 where none does."""
    low, high = 0, max(lengths)
    while low < high:
        middle = (low + high + 1) // 2
        if sum(max(0, length - middle) for length in lengths) >= characters:
            low = middle
        else:
            high = middle - 1
    return low


def _cut(block: str, limit: int) -> str:
    if len(block) <= limit:
        return block
    kept = limit - len(CUT_MARK)
    tail = kept // 4
    return block[: kept - tail] + CUT_MARK + block[len(block) - tail :]
