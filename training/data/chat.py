"""A base model's own tokenizer and chat template: conversations to ids, exactly as the model meets them at inference.

Promises: the prompt's ids are those of the prompt alone; the supervised ids are the answer's and the one end-of-turn
token behind it, nothing else; no text can produce a control token; padding is never the end token. Control tokens are
those that the tokenizer calls special, and the one that ends a turn: what else is one token, such as <think> in many
vocabularies, is a word that a model may be meant to write.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from training.base.console import UserError
from training.base.files import is_there, nearest_folder, read_json, write_atomically
from training.base.hub import commit_of, fetch_snapshot, is_hub_name
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
    "additional_chat_templates/*",
    "config.json",
)
# What a template may take for a conversation. Real ones take some 50 microseconds, and add less than 10,000 characters.
_SECONDS, _BYTES = 1.0, 1 << 30
_MORE_CHARACTERS, _TIMES_THE_TEXT = 100_000, 10
_BATCH = 256  # texts that are encoded at a time: what the library holds meanwhile is many times their size

# role, content, and perhaps tool_calls and reasoning_content, as chat templates read them.
Message = dict[str, Any]
Tools = list[dict[str, Any]]  # what the model is told that it may call, as JSON schemas

# Options by which templates let a model answer without thinking aloud.
_WITHOUT_THINKING = ({"enable_thinking": False}, {"thinking": False})


def user(content: str) -> Message:
    """What the user says."""
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    """What the model answers."""
    return {"role": "assistant", "content": content}


class Refused(Exception):
    """What the chat template makes no conversation of that could be learned; the message says why."""


class TextTokenizer:
    """A base model's tokenizer, for plain text; the constructor raises UserError if it cannot be used for training."""

    end_id: int  # of what ends an answer, or a document
    template_options: Mapping[str, Any] = {}

    def __init__(self, tokenizer: PreTrainedTokenizerFast, name: str, folder: Path):
        self.name = name
        self._folder = folder
        self._tokenizer = tokenizer
        if not tokenizer.is_fast:
            raise UserError(f"--tokenizer {name} has no tokenizer.json, which the tokenizers library reads")
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        # Some vocabularies hold runs of blanks as added tokens; those are text.
        added = {token.content: number for number, token in tokenizer.added_tokens_decoder.items()}
        self._added_ids = {text: number for text, number in added.items() if text.strip()}
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        self._end = self._find_end()
        self.end_id = self._added_ids[self._end]
        self._control = _any_of((special | {self._end}) & self._added_ids.keys())
        self._is_control = np.zeros(max([len(tokenizer) - 1, *added.values()]) + 1, dtype=bool)
        self._is_control[[self._added_ids[text] for text in (special | {self._end}) & self._added_ids.keys()]] = True
        self.pad_id = self._find_pad()

    @property
    def size(self) -> int:
        """Number of ids, added tokens included."""
        return len(self._tokenizer)

    @property
    def end(self) -> str:
        """What ends an answer, or a document."""
        return self._end

    @property
    def begin(self) -> str:
        """What the tokenizer puts before every text by itself; empty where that is nothing."""
        first = self._tokenizer("x")["input_ids"][0]
        return str(self._tokenizer.bos_token) if first == self._tokenizer.bos_token_id else ""

    @property
    def sha256(self) -> str:
        """Identity of vocabulary and template: where it is equal, so are the ids of every conversation."""
        template = self._tokenizer.chat_template or ""
        digest = hashlib.sha256(self._backend.to_str().encode())
        digest.update(b"\0" + (template if isinstance(template, str) else _json(template)).encode())
        if self.template_options:
            digest.update(b"\0" + _json(self.template_options).encode())
        return digest.hexdigest()

    def control_text(self, text: str) -> str | None:
        """The first thing in `text` that would become a control token; None if it is plain text."""
        found = self._control.search(text)
        return found[0] if found else None

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

    def document(self, text: list[int]) -> np.ndarray:
        """The ids of a document, int32: what begins a text for this model, those of the text, what ends it."""
        begin = self.end_id if self._tokenizer.bos_token_id is None else self._tokenizer.bos_token_id
        self._check_control(np.array(text, dtype=np.int32), 0)
        return np.array([begin, *text, self.end_id], dtype=np.int32)

    def about(self) -> dict[str, Any]:
        """What meta.json says of it."""
        return {**self._identity(), "template": False}

    def _identity(self) -> dict[str, Any]:
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
            copy = folder / path.relative_to(self._folder)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)
        if reopened(folder, self.about()).sha256 != self.sha256:
            raise UserError(f"the files of --tokenizer {self._folder} were changed meanwhile: prepare the data again")

    def _check_control(self, ids: np.ndarray, expected: int) -> None:
        """Raises UserError unless so many of `ids` are control tokens.

        One that `control_text` does not find is made by the tokenizer of another spelling.
        """
        if int(self._is_control[ids].sum()) != expected:
            raise UserError(
                f"--tokenizer {self.name} makes control tokens of plain text, such as {self._tokenizer.decode(ids)!r}; "
                "pass the tokenizer of another model"
            )

    def _find_end(self) -> str:
        """The token that ends a document."""
        end = self._tokenizer.eos_token
        if end is None or end not in self._added_ids:
            raise UserError(
                f"--tokenizer {self.name} names no token that ends a text (eos_token in tokenizer_config.json), so a "
                "model would not learn where a document ends; pass the tokenizer of another model"
            )
        return str(end)

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


class ChatTokenizer(TextTokenizer):
    """A tokenizer whose chat template does what training needs; the constructor raises UserError if it does not.

    template_options: what the template is told beside the messages, such as enable_thinking.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        name: str,
        folder: Path,
        template_options: Mapping[str, Any] | None = None,
    ):
        self.template_options = dict(template_options or {})
        self.name, self._tokenizer = name, tokenizer
        self._gap = ""  # blanks between what the template calls the prompt and an answer: they belong to the prompt
        self._unsaid_end = ""  # the token that ends an answer, where the template says it with the next turn only
        self._refusals: dict[object, str | None] = {}  # by the form of the turns, see `refusal`
        template = tokenizer.chat_template
        if not template:
            raise UserError(
                f"--tokenizer {name} has no chat template, so nothing says what a conversation looks like to its "
                "model; pass the tokenizer of an instruction-tuned model, for example Qwen/Qwen2.5-3B-Instruct"
            )
        if not isinstance(template, str) and "default" not in template:
            raise UserError(
                f"--tokenizer {name} has several chat templates ({', '.join(sorted(template))}), and none that is "
                "called default: name the one to use so, in a copy of its folder"
            )
        super().__init__(tokenizer, name, folder)

    def check_template_options(self) -> None:
        """Raises UserError for an option whose name the template never mentions: misspelt, it would do nothing."""
        words = set(re.findall(r"\w+", str(self._tokenizer.chat_template)))
        if unread := self.template_options.keys() - words:
            raise UserError(
                f"--template_options {min(unread)}: the chat template of {self.name} reads nothing of that name"
            )

    def refusal(self, turns: Sequence[Message], tools: Tools | None = None) -> str | None:
        """Why the template makes no prompt of turns of this form, such as a system's; None if it does."""
        form = (tuple(map(_form, turns)), len(tools or ()))
        if form not in self._refusals:
            self._refusals[form] = self._try_prompt(turns, tools)
        return self._refusals[form]

    def prompt(self, turns: Sequence[Message], tools: Tools | None = None) -> str:
        """The text that the model reads before it answers. The last of `turns` is not the model's own."""
        return self._render(turns, tools, add_generation_prompt=True) + self._gap

    def written(self, turns: Sequence[Message], answer: Message, tools: Tools | None = None) -> tuple[str, str]:
        """The prompt of `turns`, and what the model is to write behind it, up to the end-of-turn token.

        That is the answer's content; where the answer calls tools or shows its reasoning, what the template makes of
        it. Raises Refused unless the template's conversation is just that: prompt, answer, end of the turn.
        """
        prompt, content = self.prompt(turns, tools), str(answer["content"])
        is_plain = _is_plain(answer)
        lost = None if is_plain else self._lost_in_answer(turns, answer, tools)
        if lost:
            raise Refused(f"the chat template leaves {lost} out of an answer")
        try:
            whole = self._render([*turns, answer], tools, add_generation_prompt=False) + self._unsaid_end
        except UserError:
            raise
        except Exception as error:  # a template is a program of its own, and may raise whatever it likes
            raise Refused(f"the chat template fails on the answer ({error})") from None
        if is_plain:
            if not whole.startswith(prompt + content + self._end):
                raise Refused(self._why(whole, prompt, content))
            return prompt, content
        place = whole.rfind(self._end)
        if content not in whole[len(prompt) : place] or not whole.startswith(prompt) or place == len(prompt):
            raise Refused(self._why(whole, prompt, content or "\n"))
        return prompt, whole[len(prompt) : place]

    def to_write(self, turns: Sequence[Message], answer: Message, tools: Tools | None = None) -> tuple[str, str]:
        """`written`, of what has passed that before: without looking again, where nothing depends on it."""
        if _is_plain(answer):
            return self.prompt(turns, tools), str(answer["content"])
        return self.written(turns, answer, tools)

    def join(self, prompt: str, answer: str, prompt_ids: list[int], answer_ids: list[int]) -> np.ndarray:
        """The ids of a conversation, int32: those of the prompt, the answer's, the end of the turn.

        Raises UserError if there is a control token among them that the template did not put there: one that
        `control_text` does not find, since the tokenizer makes it of another spelling.
        """
        ids = np.array([*prompt_ids, *answer_ids, self.end_id], dtype=np.int32)
        self._check_control(ids, len(self._control.findall(prompt)) + len(self._control.findall(answer)) + 1)
        return ids

    def about(self) -> dict[str, Any]:
        options = {"template_options": dict(self.template_options)} if self.template_options else {}
        return {**self._identity(), **options}

    def settled_template(self) -> str | None:
        """The template that needs no options, and ends a prompt with the blanks that belong to it; None if it is so."""
        if not self.template_options and not self._gap:
            return None
        template = self._tokenizer.chat_template
        text = template if isinstance(template, str) else template["default"]
        told = "".join(f"{{%- set {key} = {_jinja(value)} %}}" for key, value in self.template_options.items())
        gap = f"{{% if add_generation_prompt %}}{{{{ {_jinja(self._gap)} }}}}{{% endif %}}" if self._gap else ""
        return told + text.removesuffix("\n") + gap

    def settle(self, folder: Path) -> None:
        """Puts `settled_template` into the tokenizer's files in `folder`, where every program finds it."""
        text = self.settled_template()
        if text is None:
            return
        write_atomically(folder / "chat_template.jinja", text)
        config = read_json(folder / "tokenizer_config.json")
        if "chat_template" in config:
            about = json.dumps({**config, "chat_template": text}, indent=2, ensure_ascii=False) + "\n"
            write_atomically(folder / "tokenizer_config.json", about)

    def _render(self, messages: Sequence[Message], tools: Tools | None, *, add_generation_prompt: bool) -> str:
        """What the template makes of `messages`. Raises UserError beyond its limits, and what it raises."""
        size = sum(len(str(value)) for message in messages for value in message.values()) + len(str(tools or ""))
        most = _MORE_CHARACTERS + _TIMES_THE_TEXT * size
        try:
            text: str = call_limited(
                lambda: self._tokenizer.apply_chat_template(
                    list(messages),
                    tools=tools or None,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    **self.template_options,
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

    def _try_prompt(self, turns: Sequence[Message], tools: Tools | None) -> str | None:
        plain, plain_tools = list(map(_probe, turns, range(len(turns)))), _probe_tools(tools)
        roles = ", ".join(turn["role"] for turn in plain)
        try:
            prompt = self.prompt(plain, plain_tools)
        except UserError:
            raise
        except Exception as error:  # a template is a program of its own, and may raise whatever it likes
            with_tools = " with tools" if tools else ""
            return f"the chat template takes no turns of {roles}{with_tools} ({error})"
        lost = [turn["role"] for turn in plain if turn["content"] not in prompt]
        if lost:
            return f"the chat template leaves out what {' and '.join(lost)} says in turns of {roles}"
        if any(text not in prompt for turn in plain for text in _call_texts(turn)):
            return "the chat template leaves out the calls of tools"
        if any(tool["function"]["name"] not in prompt for tool in plain_tools or ()):
            return "the chat template leaves out the tools"
        return None

    def _lost_in_answer(self, turns: Sequence[Message], answer: Message, tools: Tools | None) -> str | None:
        """What the template leaves out of an answer of this form, in words; None if nothing."""
        form = (tuple(map(_form, turns)), len(tools or ()), _form(answer))
        if form not in self._refusals:
            plain = list(map(_probe, [*turns, answer], range(len(turns) + 1)))
            try:
                whole = self._render(plain, _probe_tools(tools), add_generation_prompt=False)
            except UserError:
                raise
            except Exception as error:  # as above
                raise Refused(f"the chat template takes no such answer ({error})") from None
            text = whole[len(self.prompt(plain[:-1], _probe_tools(tools))) :]
            reasoning = plain[-1].get("reasoning_content", "")
            lost = [
                *(["its reasoning"] if reasoning not in text else []),
                *(["its calls of tools"] if any(each not in text for each in _call_texts(plain[-1])) else []),
            ]
            self._refusals[form] = " and ".join(lost) or None
        return self._refusals[form]

    def _why(self, whole: str, prompt: str, content: str) -> str:
        """Why `whole` is not the prompt, an answer of this content, and the end of the turn."""
        if content not in whole:
            return (
                "the chat template changes the answer, or leaves a part of it out, so training would not see what "
                "inference sees"
            )
        if not whole.startswith(prompt):
            return "the chat template does not begin a conversation with the prompt that it makes of what stands before"
        before, _, behind = whole[len(prompt) :].partition(content)
        if before:
            return f"the chat template puts {before!r} between the prompt and the answer{self._without_thinking()}"
        return f"the chat template puts no end-of-turn token right behind the answer (but {behind[:20]!r})"

    def _without_thinking(self) -> str:
        """The option that mends a template which opens every answer with its thoughts, in words."""
        for options in _WITHOUT_THINKING:
            try:
                other = ChatTokenizer(self._tokenizer, self.name, self._folder, {**self.template_options, **options})
                other.written([user("问题？")], assistant("回答。"))
            except (UserError, Refused):
                continue
            words = " ".join(f"{key}={str(value).lower()}" for key, value in options.items())
            return f"; with --template_options {words} that belongs to the prompt"
        return ""

    def _find_end(self) -> str:
        """The token that the template puts right behind an answer; sets `_gap` and `_unsaid_end`, too."""
        question, answer = "问题？", "回答。"
        try:
            prompt = self.prompt([user(question)])
            whole = self._render([user(question), assistant(answer)], None, add_generation_prompt=False)
            if whole.endswith(answer):  # GLM-4 ends an answer with the token that begins the next turn
                told = [user(question), assistant(answer), user(question)]
                next_turn = self._render(told, None, add_generation_prompt=False)
                token = _any_of(self._added_ids).match(next_turn.removeprefix(whole))
                self._unsaid_end = token[0] if token else ""
                whole += self._unsaid_end
        except UserError:
            raise
        except Exception as error:  # a template is a program of its own, and may raise whatever it likes
            raise UserError(
                f"the chat template of --tokenizer {self.name} fails on a question and its answer ({error}); pass the "
                "tokenizer of another model"
            ) from None
        before, found, behind = whole.removeprefix(prompt).partition(answer)
        end = _any_of(self._added_ids).match(behind)
        wrong = None
        if not whole.startswith(prompt) or question not in prompt:
            wrong = "does not begin a conversation with the prompt that it makes of the question alone"
        elif not found:
            wrong = "leaves answers out"
        elif end is None:
            wrong = f"puts no end-of-turn token right behind an answer (but {behind[:20]!r})"
        elif before.strip():
            # Thoughts, say, which a model that thinks aloud writes itself: answers that hold them can be learned.
            whole = self._render([user(question), assistant(before + answer)], None, add_generation_prompt=False)
            if not whole.startswith(prompt + before + answer + end[0]):
                wrong = f"puts {before!r} between the prompt and an answer"
        else:
            self._gap = before
        if wrong is not None or end is None:
            raise UserError(
                f"the chat template of --tokenizer {self.name} {wrong}, so a model trained on it would not know "
                "where to begin or to end; pass the tokenizer of another model"
            )
        return end[0]


def _json(value: object) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def _jinja(value: object) -> str:
    """A value as templates write it."""
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Finds any of `texts`, the longest first; nothing where there are none."""
    return re.compile("|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)) or r"(?!)")


def _form(message: Message) -> object:
    """What a template may look at beside the words: who speaks, and what there is in the message."""
    calls = len(message.get("tool_calls", ()))
    return message["role"], bool(message["content"]), calls, "reasoning_content" in message


def _is_plain(answer: Message) -> bool:
    """Whether an answer is words alone: no calls of tools, no reasoning."""
    return _form(answer) == _form(assistant("x"))


def _probe(message: Message, place: int) -> Message:
    """A message of the same form in which every text can be found again."""
    probe: Message = {"role": message["role"], "content": f"第{place}句。" if message["content"] else ""}
    if "reasoning_content" in message:
        probe["reasoning_content"] = f"第{place}思。"
    if message.get("tool_calls"):
        probe["tool_calls"] = [
            {**call, "function": {"name": f"f{place}n{number}", "arguments": {"a": f"第{place}值{number}。"}}}
            for number, call in enumerate(message["tool_calls"])
        ]
    return {**{key: value for key, value in message.items() if key in ("name", "tool_call_id")}, **probe}


def _call_texts(probe: Message) -> Iterator[str]:
    """What must be found of the calls of a probe."""
    for call in probe.get("tool_calls", ()):
        yield call["function"]["name"]
        yield call["function"]["arguments"]["a"]


def _probe_tools(tools: Tools | None) -> Tools | None:
    nothing: dict[str, Any] = {"type": "object", "properties": {}}
    return tools and [
        {"type": "function", "function": {"name": f"tool{number}", "description": "x", "parameters": nothing}}
        for number in range(len(tools))
    ]


def load_chat_tokenizer(name: str, template_options: Mapping[str, Any] | None = None) -> ChatTokenizer:
    """The tokenizer in the folder `name`, or of the model of that name on the Hugging Face hub.

    Raises UserError when there is none, it cannot be had, or it does not do what training needs.
    """
    tokenizer, folder = _load(name)
    return ChatTokenizer(tokenizer, name, folder, template_options)


def load_text_tokenizer(name: str) -> TextTokenizer:
    """The same for plain text, which needs no chat template."""
    tokenizer, folder = _load(name)
    return TextTokenizer(tokenizer, name, folder)


def reopened(folder: Path, about: Mapping[str, Any]) -> TextTokenizer:
    """The tokenizer in `folder`, used as the data was prepared whose meta.json says `about` it. Raises UserError."""
    if not about.get("template", True):
        return load_text_tokenizer(str(folder))
    return load_chat_tokenizer(str(folder), about.get("template_options"))


def _load(name: str) -> tuple[PreTrainedTokenizerFast, Path]:
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if not is_hub_name(name):
            raise UserError(
                f"--tokenizer {name}: there is no such folder{nearest_folder(folder)}, and it is no name on the hub "
                "(like Qwen/Qwen2.5-3B-Instruct)"
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
    return tokenizer, folder


def _is_whole(snapshot: Path) -> bool:
    """Whether what comes from the hub has all that decides how the tokenizer is read, the model's kind included."""
    return _holds_tokenizer(snapshot) and (snapshot / "config.json").is_file()


def _holds_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer.json").is_file() and (folder / "tokenizer_config.json").is_file()
