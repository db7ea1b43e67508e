"""A prepared set of conversations on disk: how it is read, and how it is handed to other programs.

    prepared/NAME/
      train/ validation/ test/   Arrow, as `datasets.load_from_disk` reads them
      tokenizer/                 the base model's own, as `AutoTokenizer.from_pretrained` reads it
      meta.json                  where everything comes from, and the size and SHA-256 of every other file

Reading costs no memory to speak of: ids are views on the memory-mapped files, and texts are decoded when asked for.

    python -m data_prep.conversations prepared/disc-law --part train --format sharegpt --output train.jsonl

writes a part for other programs: `messages` as most of them read it, `sharegpt` and `alpaca` as LLaMA-Factory does. The
file is complete or absent. Of several turns only the last answer is learned here; other programs may learn them all.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.files import open_atomically, writing_to
from data_prep.prepared import PreparedFolder, Ragged, Texts, ragged, read_meta
from data_prep.splits import PARTS
from launch.console import Progress, UserError, run_main, say

FORMAT = "relay-conversations-1"
MAKE = (
    "python -m data_prep.disc_law --source FOLDER|hub --output {folder}` or "
    "`python -m data_prep.instructions --source FILE|FOLDER --output {folder}"
)


@dataclass(frozen=True)
class ConversationPart:
    """One of train, validation and test."""

    name: str
    ids: Ragged  # per row the chat template's tokens of the prompt, then the answer's, then its end-of-turn token
    prompt_lengths: np.ndarray  # int64 [rows]; ids[row][prompt_lengths[row]:] are the supervised tokens
    uids: Texts  # unique: the file, and the record's id there, as in "DISC-Law-SFT-Pair:leg_case_cls-17"
    tasks: Texts  # as in "leg_case_cls"
    messages: Texts  # JSON of the list of messages, as they were tokenised; the last is the answer

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Conversations(PreparedFolder):
    """An open prepared set of conversations.

    meta["tokenizer"] holds sha256 (of vocabulary and template), size (ids), pad_id and end_id; meta["questions"] the
    uids of one test row per task, for a table of answers before and after training; meta["tasks"] the tasks' names;
    meta["rows"] the rows of each part; meta["lengths"] tokens per task.
    """

    make = MAKE

    @property
    def identity(self) -> dict[str, str]:
        """What of the data defines a run: the content, and the tokenizer that its model speaks."""
        return {"fingerprint": self.fingerprint, "tokenizer": self.meta["tokenizer"]["sha256"]}

    def part(self, name: str) -> ConversationPart:
        """The part called train, validation or test, memory-mapped."""
        columns = self.columns(name)
        return ConversationPart(
            name,
            ragged(columns["ids"]),
            columns["prompt_length"].to_numpy(),
            Texts(columns["uid"]),
            Texts(columns["task"]),
            Texts(columns["messages"]),
        )


def open_conversations(folder: str | Path) -> Conversations:
    """The prepared conversations in `folder`. Raises UserError when missing, half there, or its sizes have changed."""
    folder = Path(folder)
    return Conversations(folder, read_meta(folder, FORMAT, MAKE))


Messages = list[dict[str, str]]


def question_of(messages: Messages) -> str:
    """What stands before the answer, as one text; where that is more than a question, with who says it."""
    *turns, _ = messages
    return turns[0]["content"] if len(turns) == 1 else "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)


def _as_messages(messages: Messages) -> dict[str, Any]:
    return {"messages": messages}


def _as_sharegpt(messages: Messages) -> dict[str, Any]:
    speaker = {"system": "system", "user": "human", "assistant": "gpt"}
    return {"conversations": [{"from": speaker[message["role"]], "value": message["content"]} for message in messages]}


def _as_alpaca(messages: Messages) -> dict[str, Any]:
    if len(messages) > 2:
        raise UserError("alpaca has one question and its answer, but here are more turns: take --format messages")
    # LLaMA-Factory puts a line end between instruction and input, so all of the question goes into the first.
    question, answer = (message["content"] for message in messages)
    return {"instruction": question, "input": "", "output": answer}


# Per format: what a conversation becomes, and what stands in LLaMA-Factory's dataset_info.json beside the file's name.
EXPORTS: dict[str, tuple[Callable[[Messages], dict[str, Any]], dict[str, Any]]] = {
    "messages": (
        _as_messages,
        {
            "formatting": "sharegpt",
            "columns": {"messages": "messages"},
            "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
        },
    ),
    "sharegpt": (_as_sharegpt, {"formatting": "sharegpt", "columns": {"messages": "conversations"}}),
    "alpaca": (_as_alpaca, {"columns": {"prompt": "instruction", "query": "input", "response": "output"}}),
}


def main(argv: Sequence[str] | None = None) -> int:
    """The command; raises UserError for everything the user can mend."""
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.conversations",
        description="Writes a part of prepared conversations for other programs, one JSON object a line.",
    )
    parser.add_argument("prepared", type=Path, metavar="PREPARED", help="the folder, for example prepared/disc-law")
    parser.add_argument("--part", choices=PARTS, required=True, help="which part")
    parser.add_argument("--format", choices=list(EXPORTS), required=True, help="sharegpt and alpaca: LLaMA-Factory's")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="a .jsonl file to make")
    arguments = parser.parse_args(argv)
    output: Path = arguments.output
    if not output.parent.is_dir():
        raise UserError(f"--output {output}: there is no folder {output.parent}; make it first")
    if output.is_dir():
        raise UserError(f"--output {output} is a folder; name a file in it, for example {output / 'train.jsonl'}")
    part = open_conversations(arguments.prepared).part(arguments.part)
    shape, about = EXPORTS[arguments.format]
    with (
        writing_to(output),
        open_atomically(output) as file,
        Progress("writing", len(part), "conversations") as progress,
    ):
        for text in part.messages:
            file.write(json.dumps(shape(json.loads(text)), ensure_ascii=False).encode() + b"\n")
            progress.advance()
    say(f"wrote {output}: {len(part):,} conversations. In LLaMA-Factory's dataset_info.json:")
    say(f"  {json.dumps({output.stem: {'file_name': output.name, **about}})}")
    return 0


if __name__ == "__main__":
    run_main(main)
