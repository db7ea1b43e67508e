"""Hands prepared conversations to other programs.

    python -m data_prep.export prepared/disc-law --part train --format sharegpt --output train.jsonl

writes a part, `messages` as most of them read it, `sharegpt` and `alpaca` as LLaMA-Factory does. The
file is complete or absent. Of several turns only the last answer is learned here; other programs may learn them all.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from training.base.console import UserError, run_main, say
from training.base.files import open_atomically, writing_to
from training.base.options import CommandLine
from training.base.progress import Progress
from training.data.conversations import Messages, open_conversations
from training.data.prepared import PARTS


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
    parser = CommandLine(
        "python -m data_prep.export",
        "Writes a part of prepared conversations for other programs, one JSON object a line.",
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
