"""A prepared set of conversations on disk, and how it is read.

    prepared/NAME/
      train/ validation/ test/   Arrow, as `datasets.load_from_disk` reads them
      tokenizer/                 the base model's own, as `AutoTokenizer.from_pretrained` reads it
      meta.json                  where everything comes from, and the size and SHA-256 of every other file

Reading costs no memory to speak of: ids are views on the memory-mapped files, and texts are decoded when asked for.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa

from training.base.console import UserError
from training.data.prepared import PreparedFolder, Ragged, Texts, ragged, read_meta

if TYPE_CHECKING:
    from training.data.chat import TextTokenizer

FORMAT = "relay-conversations-1"
DISC_LAW_SFT = "ShengbinYue/DISC-Law-SFT"  # the legal records, by their name on the hub
MAKE = (
    "python -m data_prep.disc_law --source FOLDER|hub --output {folder}` or "
    "`python -m data_prep.instructions --source FILE|FOLDER --output {folder}"
)


@dataclass(frozen=True)
class ConversationPart:
    """One of train, validation and test."""

    name: str
    ids: Ragged  # per row the chat template's tokens of the prompt, then the answer's, then its end-of-turn token
    prompt_lengths: np.ndarray  # int64 [rows]; ids[row][prompt_lengths[row]:] are the last answer and its end
    uids: Texts  # unique: the file, and the record's id there, as in "DISC-Law-SFT-Pair:leg_case_cls-17"
    tasks: Texts  # as in "leg_case_cls"
    messages: Texts  # JSON of the list of messages, as they were tokenised; the last is the answer
    sources: Texts | None = None  # of a mixture, which one each row is of
    learned: Ragged | None = None  # int32, per row from, to of every answer with its end, the last one as above

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Conversations(PreparedFolder):
    """An open prepared set of conversations.

    meta["tokenizer"] holds sha256 (of vocabulary and template), size (ids), pad_id and end_id; meta["questions"] the
    uids of one test row per task, for a table of answers before and after training; meta["tasks"] the tasks' names;
    meta["rows"] the rows of each part; meta["lengths"] tokens per task; of a mixture, meta["mixture"] the weight of
    each source by its name.
    """

    make = MAKE
    kinds: ClassVar = {
        "ids": pa.large_list(pa.int32()),
        "prompt_length": pa.int64(),
        **dict.fromkeys(("uid", "task", "messages"), pa.large_string()),
    }

    @property
    def mixture(self) -> dict[str, float]:
        """How often an epoch has a sample of each source, in the mean; empty where there is one source."""
        weights: dict[str, float] = self.meta.get("mixture", {})
        return weights

    def vocabulary_sizes(self) -> dict[str, int]:
        return {"ids": self.meta["tokenizer"]["size"]}

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
            Texts(columns["source"]) if "source" in columns else None,
            ragged(columns["learned"]) if "learned" in columns else None,
        )

    def check_tokenizer(self, folder: Path, vocabulary_size: int) -> None:
        """Raises UserError unless the data was prepared with the tokenizer of the base model in `folder`."""
        size = self.meta["tokenizer"]["size"]
        if size > vocabulary_size:
            raise UserError(
                f"{self.folder} was prepared with a tokenizer of {size:,} tokens, but the model in {folder} knows "
                f"{vocabulary_size:,}: prepare the data with --tokenizer {folder}"
            )
        if (folder / "tokenizer_config.json").is_file():
            from training.data.chat import reopened  # slow to import

            if reopened(folder, self.meta["tokenizer"]).sha256 != self.identity["tokenizer"]:
                raise UserError(
                    f"{self.folder} was prepared with another tokenizer or chat template than that of the model in "
                    f"{folder}: prepare the data with --tokenizer {folder}"
                )


def learned_tokens(learned: Ragged) -> np.ndarray:
    """How many tokens of each row are learned, int64 [rows], from the column `learned`."""
    lengths = learned.values[1::2].astype(np.int64) - learned.values[::2]
    row = np.repeat(np.arange(len(learned)), learned.lengths // 2)
    return np.bincount(row, lengths, len(learned)).astype(np.int64)


def open_conversations(folder: str | Path) -> Conversations:
    """The prepared conversations in `folder`. Raises UserError when missing, half there, changed or forged."""
    folder = Path(folder)
    return Conversations(folder, read_meta(folder, FORMAT, MAKE)).check_once()


Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Asked:
    """What a model is given to answer, and the answer that it is compared with."""

    prompt: list[int]
    question: str
    reference: str


def asked_of(part: ConversationPart, row: int, tokenizer: TextTokenizer) -> Asked:
    """The last question of a conversation; of a text, the half that is to be continued."""
    ids, messages = part.ids[row], json.loads(part.messages[row])
    *turns, answer = messages
    if not turns:
        half = max(1, len(ids) // 2)
        before, behind = ids[:half].tolist(), ids[half:].tolist()
        return Asked(before, tokenizer.decode(before), tokenizer.decode(behind))
    start = int(part.prompt_lengths[row])
    # What calls a tool or shows its reasoning is compared with what the template makes of that.
    is_plain = set(answer) == {"role", "content"}
    reference = answer["content"] if is_plain else tokenizer.decode(ids[start:].tolist())
    return Asked(ids[:start].tolist(), question_of(messages), reference)


def question_of(messages: Messages) -> str:
    """What stands before the answer, as one text; where that is more than a question, with who says it."""
    *turns, _ = messages
    return turns[0]["content"] if len(turns) == 1 else "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)
