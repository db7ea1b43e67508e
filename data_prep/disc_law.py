"""Prepares DISC-Law-SFT, Chinese legal instructions and their answers, for fine-tuning a chat model.

    python -m data_prep.disc_law --source FOLDER --tokenizer Qwen/Qwen2.5-3B-Instruct --output prepared/disc-law
    python -m data_prep.disc_law --source hub --fraction 0.1 --output prepared/disc-law-tenth

It promises what `prepare_conversations` does.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from data_prep.disc_law_records import (
    FILES,
    LICENCE,
    TASK_NAMES,
    LawFile,
    LawRecord,
    as_published,
    find_files,
    read_record,
    shortened,
)
from data_prep.prepare_conversations import prepare
from data_prep.records import ConversationOptions, Corpus
from training.base.console import run_main
from training.base.hub import commit_of
from training.base.options import Revision, parse
from training.data.chat import Message, user
from training.data.conversations import DISC_LAW_SFT


class DiscLawOptions(ConversationOptions):
    """The keys of `python -m data_prep.disc_law`."""

    source: str = Field(description=f"the folder with the files of DISC-Law-SFT, or hub ({DISC_LAW_SFT})")
    revision: Revision = Field(
        "main", description="commit or branch on the hub; the files' SHA-256 are checked in any case"
    )
    reference: bool = Field(True, description="put the statutes before a question that does not hold them already")
    exam: bool = Field(
        True,
        description="false leaves out the task exam, questions of the bar examinations that DISC-Law-Eval asks, too",
    )
    min_answer_characters: int = Field(
        2, ge=1, description="drop shorter answers where prose is asked for (many right ones have four: 劳动纠纷)"
    )
    too_long: Literal["truncate", "drop"] = Field(
        "truncate", description="truncate: cut the document of an over-long record, never question or answer"
    )

    @model_validator(mode="after")
    def _of_this_source(self) -> DiscLawOptions:
        if "revision" in self.model_fields_set and self.source != "hub":
            raise ValueError(f"revision has no effect with source {self.source}: leave it out")
        return self


class DiscLaw(Corpus[LawRecord, LawFile]):
    """The records of DISC-Law-SFT in `files`."""

    record_name = "record of DISC-Law-SFT"
    advice = "fetch the files again, or check that they are the right ones"
    task_order = TASK_NAMES
    options: DiscLawOptions

    def __init__(self, options: DiscLawOptions, files: Sequence[LawFile]):
        super().__init__(options, files, left_out=() if options.exam else ("exam",))

    def about(self) -> dict[str, Any]:
        from_hub = self.options.source == "hub"
        present = [file.stem for file in self.files]
        return {
            "kind": "hub" if from_hub else "folder",
            "place": f"{DISC_LAW_SFT}@{self.options.revision}" if from_hub else self.options.source,
            "commit": commit_of(self.files[0].path.parent) if from_hub else None,
            "missing": [file.name for file in FILES if file.stem not in present],
            "licence": LICENCE,
        }

    def read(self, line: bytes, file: LawFile) -> LawRecord:
        return read_record(line, file.published)

    def is_short(self, record: LawRecord) -> bool:
        return record.layout.free_text and super().is_short(record)

    def asked(self, record: LawRecord) -> list[Message]:
        return [user("\n".join([*self._statutes(record), record.question]))]

    def shortened(self, record: LawRecord, count: Callable[[list[Message]], int], room: int) -> list[Message] | None:
        if self.options.too_long == "drop":
            return None
        statutes = self._statutes(record)
        cut = shortened(record.layout, statutes, record.question, record.answer, lambda text: count([user(text)]), room)
        return None if cut is None else [user(cut)]

    def _statutes(self, record: LawRecord) -> list[str]:
        return record.missing_statutes if self.options.reference else []


def main(argv: Sequence[str] | None = None) -> int:
    """The command; raises UserError for everything the user can mend."""
    options, dry_run = parse(
        DiscLawOptions,
        sys.argv[1:] if argv is None else argv,
        prog="python -m data_prep.disc_law",
        about="Prepares DISC-Law-SFT for fine-tuning: reads, checks, splits, tokenises by the model's chat template.",
    )
    return prepare(
        options,
        dry_run,
        lambda: DiscLaw(options, find_files(options.source, options.revision)),
        known=DiscLaw(options, as_published()) if options.source == "hub" else None,
        example="disc-law",
    )


if __name__ == "__main__":
    run_main(main)
