"""Writes prepared conversations for other programs, one JSON object a line.

    python -m data_prep.export prepared/disc-law --part train --format sharegpt --output train.jsonl

`messages` is what most programs read, `sharegpt` and `alpaca` are LLaMA-Factory's. The file is complete or absent. It
does not say which of several answers are learned: other programs may learn them all.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from training.base.console import UserError, run_main, say
from training.base.files import check_folder_of, open_atomically, writing_to
from training.base.options import CommandLine
from training.base.progress import Progress
from training.data.conversations import Messages, open_conversations
from training.data.prepared import PARTS, Texts

# What stands in LLaMA-Factory's dataset_info.json beside the name of a file of this format.
EXPORTS: dict[str, dict[str, Any]] = {
    "messages": {
        "formatting": "sharegpt",
        "columns": {"messages": "messages"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
    },
    "sharegpt": {"formatting": "sharegpt", "columns": {"messages": "conversations"}},
    "alpaca": {"columns": {"prompt": "instruction", "query": "input", "response": "output"}},
}
_SPEAKERS = {"system": "system", "user": "human", "assistant": "gpt"}


def _shaped(messages: Messages, tools: str, form: str) -> dict[str, Any]:
    if len(messages) == 1:
        return {"text": messages[0]["content"]}
    if form == "messages":
        return {"messages": messages, **({"tools": json.loads(tools)} if tools else {})}
    if tools or any(message.keys() - {"role", "content"} or message["role"] not in _SPEAKERS for message in messages):
        raise UserError(f"{form} as it is written here has no place for tools or reasoning: take --format messages")
    if form == "sharegpt":
        return {"conversations": [{"from": _SPEAKERS[turn["role"]], "value": turn["content"]} for turn in messages]}
    if len(messages) > 2:
        raise UserError("alpaca has one question and its answer, but here are more turns: take --format messages")
    # LLaMA-Factory puts a line end between instruction and input, so all of the question goes into the first.
    question, answer = (message["content"] for message in messages)
    return {"instruction": question, "input": "", "output": answer}


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
    check_folder_of(output)
    data = open_conversations(arguments.prepared)
    part, columns = data.part(arguments.part), data.columns(arguments.part)
    tools = Texts(columns["tools"]) if "tools" in columns else [""] * len(part)
    with (
        writing_to(output),
        open_atomically(output) as file,
        Progress("writing", len(part), "conversations") as progress,
    ):
        for text, described in zip(part.messages, tools, strict=True):
            shaped = _shaped(json.loads(text), described, arguments.format)
            file.write(json.dumps(shaped, ensure_ascii=False).encode() + b"\n")
            progress.advance()
    say(f"wrote {output}: {len(part):,} conversations. In LLaMA-Factory's dataset_info.json:")
    say(f"  {json.dumps({output.stem: {'file_name': output.name, **EXPORTS[arguments.format]}})}")
    return 0


if __name__ == "__main__":
    run_main(main)
