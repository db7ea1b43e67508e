"""A base model's own tokenizer and chat template: conversations to ids, exactly as the model meets them at inference.

Promises: the prompt's ids are those of the prompt alone; the supervised ids are the answer's and the one end-of-turn
token behind it, nothing else; no text can produce a control token; padding is never the end token.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from training.base.console import UserError
from training.base.files import is_there, nearest_folder
from training.base.hub import commit_of, fetch_snapshot
from training.base.limits import call_limited

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Data is prepared by one process per core; threads in each of them would only take turns.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# A tokenizer's files in a model's folder. The model's config is one: it decides which class of transformers reads them.
_FILES = (
    "tokenizer*",
    "vocab*",
    "merges*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "config.json",
)
# What a template may take for a conversation. Real ones take some 50 microseconds, and add less than 10,000 characters.
_SECONDS, _BYTES = 1.0, 1 << 30
_MORE_CHARACTERS, _TIMES_THE_TEXT = 100_000, 10
_BATCH = 256  # texts that are encoded at a time: what the library holds meanwhile is many times their size

Message = dict[str, str]


def user(content: str) -> Message:
    """What the user says."""
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    """What the model answers."""
    return {"role": "assistant", "content": content}


class ChatTokenizer:
    """A tokenizer whose chat template does what training needs; the constructor raises UserError if it does not."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, name: str, folder: Path):
        self.name = name
        self._folder = folder
        self._tokenizer = tokenizer
        if not tokenizer.is_fast:
            raise UserError(f"--tokenizer {name} has no tokenizer.json, which the tokenizers library reads")
        if not tokenizer.chat_template:
            raise UserError(
                f"--tokenizer {name} has no chat template, so nothing says what a conversation looks like to its "
                "model; pass the tokenizer of an instruction-tuned model, for example Qwen/Qwen2.5-3B-Instruct"
            )
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        texts = {token.content: number for number, token in tokenizer.added_tokens_decoder.items()}
        # Some vocabularies hold runs of blanks as added tokens; those are text.
        self._control_ids = {text: number for text, number in texts.items() if text.strip()}
        alternatives = "|".join(re.escape(text) for text in sorted(self._control_ids, key=len, reverse=True))
        self._control = re.compile(alternatives or r"(?!)")
        self._end = self._find_end()
        self.end_id = self._control_ids[self._end]
        self.pad_id = self._find_pad()
        self._is_control = np.zeros(max(len(tokenizer), *texts.values()) + 1, dtype=bool)
        self._is_control[list(self._control_ids.values())] = True
        self._probed: dict[tuple[str, ...], int | str] = {}  # by roles, see `_probe`

    @property
    def size(self) -> int:
        """Number of ids, added tokens included."""
        return len(self._tokenizer)

    @property
    def sha256(self) -> str:
        """Identity of vocabulary and template: where it is equal, so are the ids of every conversation."""
        digest = hashlib.sha256(self._backend.to_str().encode())
        digest.update(b"\0" + self._tokenizer.chat_template.encode())
        return digest.hexdigest()

    def control_text(self, text: str) -> str | None:
        """The first thing in `text` that would become a control token; None if it is plain text."""
        found = self._control.search(text)
        return found[0] if found else None

    def refusal(self, turns: Sequence[Message]) -> str | None:
        """Why the template makes no prompt of turns in these roles, such as a system's; None if it does."""
        found = self._probe(turns)
        return found if isinstance(found, str) else None

    def prompt(self, turns: Sequence[Message]) -> str:
        """The text that the model reads before it answers. The last of `turns` is the user's."""
        return self._render(turns, add_generation_prompt=True)

    def check(self, prompt: str, turns: Sequence[Message], answer: str) -> None:
        """Raises UserError unless the whole conversation is `prompt`, then `answer`, then the end of the turn."""
        whole = self._render([*turns, assistant(answer)], add_generation_prompt=False)
        if not whole.startswith(prompt + answer + self._end):
            raise UserError(
                f"the chat template of --tokenizer {self.name} changes an answer or puts something between the prompt "
                f"and it (the answer begins {answer[:30]!r}), so training would not see what inference sees; pass the "
                "tokenizer of another model"
            )

    def join(self, turns: Sequence[Message], prompt: list[int], answer: list[int]) -> np.ndarray:
        """The ids of a conversation, int32: those of the prompt of `turns`, the answer's, the end of the turn.

        Raises UserError if there is a control token among them that the template did not put there: one that
        `control_text` does not find, since the tokenizer makes it of another spelling.
        """
        ids = np.array([*prompt, *answer, self.end_id], dtype=np.int32)
        expected = self._probe(turns)
        if isinstance(expected, str) or int(self._is_control[ids].sum()) != expected + 1:
            raise UserError(
                f"--tokenizer {self.name} makes control tokens of plain text, such as {self._tokenizer.decode(ids)!r}; "
                "pass the tokenizer of another model"
            )
        return ids

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without anything added."""
        ids: list[list[int]] = []
        for start in range(0, len(texts), _BATCH):
            batch = self._backend.encode_batch_fast(list(texts[start : start + _BATCH]), add_special_tokens=False)
            ids += (encoding.ids for encoding in batch)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, control tokens left out."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def about(self) -> dict[str, Any]:
        """What meta.json says of it."""
        return {
            "sha256": self.sha256,
            "size": self.size,
            "pad_id": self.pad_id,
            "end_id": self.end_id,
            "name": self.name,
            "commit": commit_of(self._folder),
            "kind": type(self._tokenizer).__name__,
        }

    def save(self, folder: Path) -> None:
        """Copies its files to `folder`, which is made: as they were published, since every version can read those.

        Raises UserError where the copy is another tokenizer: the files were changed since it was loaded.
        """
        folder.mkdir()
        for path in (path for pattern in _FILES for path in self._folder.glob(pattern) if is_there(path)):
            shutil.copyfile(path, folder / path.name)
        if load_chat_tokenizer(str(folder)).sha256 != self.sha256:
            raise UserError(f"the files of --tokenizer {self._folder} were changed meanwhile: prepare the data again")

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """What the template makes of `messages`. Raises UserError beyond its limits, and what it raises."""
        size = sum(len(message["content"]) for message in messages)
        most = _MORE_CHARACTERS + _TIMES_THE_TEXT * size
        try:
            text: str = call_limited(
                lambda: self._tokenizer.apply_chat_template(
                    list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
                ),
                _SECONDS,
                _BYTES,
            )
        except TimeoutError:
            what = f"takes longer than {_SECONDS:g} s"
        except MemoryError:
            what = f"wants more than {_BYTES >> 30} GiB of memory"
        else:
            if len(text) <= most:
                return text
            what = f"makes {len(text):,} characters"
        raise UserError(
            f"the chat template of --tokenizer {self.name} {what} for one conversation of {size:,} characters: do not "
            "use it; pass the tokenizer of another model"
        )

    def _probe(self, turns: Sequence[Message]) -> int | str:
        """How many control tokens a prompt of turns in these roles has, or why the template makes no prompt of them."""
        roles = tuple(turn["role"] for turn in turns)
        if roles not in self._probed:
            plain = [{"role": role, "content": f"第{place}句。"} for place, role in enumerate(roles)]
            try:
                prompt = self.prompt(plain)
            except UserError:
                raise
            except Exception as error:  # a template is a program of its own, and may raise whatever it likes
                self._probed[roles] = f"the chat template takes no turns of {', '.join(roles)} ({error})"
            else:
                lost = [turn["role"] for turn in plain if turn["content"] not in prompt]
                (ids,) = self.encode([prompt])
                self._probed[roles] = (
                    f"the chat template leaves out what {' and '.join(lost)} says in turns of {', '.join(roles)}"
                    if lost
                    else int(self._is_control[ids].sum())
                )
        return self._probed[roles]

    def _find_end(self) -> str:
        """The control token that the template puts right behind an answer."""
        question, answer = "问题？", "回答。"
        try:
            prompt = self.prompt([user(question)])
            whole = self._render([user(question), assistant(answer)], add_generation_prompt=False)
        except UserError:
            raise
        except Exception as error:  # a template is a program of its own, and may raise whatever it likes
            raise UserError(
                f"the chat template of --tokenizer {self.name} fails on a question and its answer ({error}); pass the "
                "tokenizer of another model"
            ) from None
        begins = whole.startswith(prompt + answer)
        rest = whole[len(prompt + answer) :] if begins else ""
        end = self._control.match(rest)
        if not begins or question not in prompt or end is None:
            wrong = (
                f"puts no end-of-turn token right behind an answer (but {rest[:20]!r})"
                if begins
                else "does not begin a conversation with the prompt that it makes of the question alone"
            )
            raise UserError(
                f"the chat template of --tokenizer {self.name} {wrong}, so a model trained on it would not know "
                "where to begin or to end; pass the tokenizer of another model"
            )
        return end[0]

    def _find_pad(self) -> int:
        """The padding token, or another special one where that is lacking or is the end token."""
        tokenizer = self._tokenizer
        special = [number for number, token in tokenizer.added_tokens_decoder.items() if token.special]
        for candidate in (tokenizer.pad_token_id, tokenizer.unk_token_id, *sorted(special)):
            if candidate is not None and candidate != self.end_id:
                return int(candidate)
        raise UserError(
            f"--tokenizer {self.name} has no special token beside the end-of-turn token {self._end!r} to pad with; "
            "add a padding token to it and pass its folder"
        )


def load_chat_tokenizer(name: str) -> ChatTokenizer:
    """The tokenizer in the folder `name`, or of the model of that name on the Hugging Face hub.

    Raises UserError when there is none, it cannot be had, or it does not do what training needs.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        near = nearest_folder(folder)
        if near or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            raise UserError(
                f"--tokenizer {name}: there is no such folder{near}, and it is no name on the hub (like "
                "Qwen/Qwen2.5-3B-Instruct)"
            )
        folder = fetch_snapshot(name, revision=None, patterns=_FILES, is_complete=_is_whole)
    if not _holds_tokenizer(folder):
        raise UserError(
            f"--tokenizer {folder} holds no tokenizer.json and tokenizer_config.json; pass a model's folder"
        )
    from transformers import AutoTokenizer  # slow to import

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # damaged files come out as whatever the parser at work raises
        if "trust_remote_code" in str(error):
            raise UserError(
                f"--tokenizer {folder} needs code of its own, which is never run here: pass one that transformers knows"
            ) from None
        raise UserError(f"--tokenizer {folder} cannot be read ({str(error).splitlines()[0]}); fetch it again") from None
    return ChatTokenizer(tokenizer, name, folder)


def _is_whole(snapshot: Path) -> bool:
    """Whether what comes from the hub has all that decides how the tokenizer is read, the model's kind included."""
    return _holds_tokenizer(snapshot) and (snapshot / "config.json").is_file()


def _holds_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer.json").is_file() and (folder / "tokenizer_config.json").is_file()
