"""The layouts in which people keep conversations, and how each becomes one list of messages.

A layout is told by its keys. What stands under a key that no layout has is named by the caller, never dropped in
silence. What is null or NaN is absent; 0 is not.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from data_prep.records import (
    NOT_LEARNED,
    Malformed,
    checked_text,
    is_learned,
    keys_left,
    kind_of,
    written_text,
)
from training.data.chat import Message

# Lists of turns, and the keys of a turn for who speaks and what is said.
TURNS = ("messages", "conversations", "conversation", "dialogue", "dialog", "turns", "chat", "data")
SPEAKERS, SAID = ("role", "from", "speaker"), ("content", "value", "text")
USER, ASSISTANT, TOOL = "user", "assistant", "tool"
CALL = "function_call"  # a speaker of ShareGPT who calls a tool, and OpenAI's former key
ROLES = {
    **dict.fromkeys(("system", "developer", "系统"), "system"),
    **dict.fromkeys((USER, "human", "prompter", "用户", "问"), USER),
    **dict.fromkeys((ASSISTANT, "gpt", "model", "bot", "chatgpt", "bing", "bard", "ai", "助手", "答"), ASSISTANT),
    **dict.fromkeys((TOOL, "function", "observation", "function_response", "ipython"), TOOL),
    CALL: ASSISTANT,
}
# A question and its answer: one key of each kind, and perhaps one with more to the question.
QUESTIONS, MORE = ("instruction", "prompt", "question", "query", "问题"), ("input", "context")
ANSWERS = ("output", "completion", "response", "answer", "target", "答案", "回答")
PAIR = ("human", "user", "assistant")  # keys of questions and of answers where there is none of those
HISTORY, SYSTEM, TOOLS = "history", ("system", "system_prompt"), ("tools", "functions")
REASONING = ("reasoning_content", "reasoning", "thinking")

LAYOUTS = (
    f"{', '.join(TURNS[:-1])} or {TURNS[-1]}, a list of {{role or from, content or value}}, of {{human, assistant}}, "
    "or of pairs; a line may also be such a list itself",
    f"{', '.join(QUESTIONS)} or input; {' or '.join(MORE)} (if there is more to it); {HISTORY} (pairs before it); "
    f"{', '.join(ANSWERS[:-1])} or {ANSWERS[-1]}",
)


@dataclass(frozen=True)
class Keys:
    """What the keys of a record are called where no layout says so; None: as in the layouts."""

    turns: str | None = None
    role: str | None = None
    content: str | None = None
    roles: Mapping[str, str] = field(default_factory=dict)  # speakers, in lower case, besides those of ROLES
    question: tuple[str, ...] = ()
    context: tuple[str, ...] = ()  # what is put before the question
    answer: str | None = None
    system: str | None = None
    reasoning: bool = False  # whether it belongs to the answers


@dataclass
class Conversation:
    """What was read of a record. Places are those of messages."""

    messages: list[Message] = field(default_factory=list)
    unlearned: set[int] = field(default_factory=set)  # answers that are read only
    unread: list[str] = field(default_factory=list)  # keys of turns
    notes: list[str] = field(default_factory=list)  # what was done to make a conversation of it
    tools: list[dict[str, Any]] = field(default_factory=list)

    def add(self, role: str, content: str, **more: Any) -> None:
        """One more message."""
        self.messages.append({"role": role, "content": content, **more})


def conversation_of(values: dict[str, Any], keys: Keys) -> Conversation:
    """The conversation in a record, up to its last answer. Takes what is read out of `values`. Raises Malformed."""
    read = Conversation()
    _read_layout(values, keys, read)
    system = keys.system or next((key for key in SYSTEM if key in values), None)
    if system in values and not any(each["role"] == "system" for each in read.messages[:1]):
        text = text_of(system, values.pop(system)).strip()
        if text:
            read.messages.insert(0, {"role": "system", "content": text})
            read.unlearned = {place + 1 for place in read.unlearned}
    for key in (key for key in TOOLS if key in values):
        read.tools += _tools_of(key, values.pop(key))
    _mend(read)
    return read


def without_absent(value: Any) -> Any:
    """`value` without keys whose value is null or NaN, at any depth; in lists they stay, since places count there."""
    if isinstance(value, dict):
        return {key: without_absent(each) for key, each in value.items() if not _is_absent(each)}
    return [without_absent(each) for each in value] if isinstance(value, list) else value


def _is_absent(value: object) -> bool:
    return value is None or (isinstance(value, float) and value != value)


def text_of(key: str, value: object) -> str:
    """The text under `key`: a number as JSON writes it, parts joined by line ends. Raises Malformed for others."""
    if isinstance(value, int | float):
        return json.dumps(value)
    if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
        for part in value:
            if not isinstance(part.get("text"), str):
                raise Malformed(f"{key} has a part that is no text: {part.get('type', ', '.join(part) or 'nothing')}")
        return "\n".join(checked_text(key, part["text"]) for part in value)
    return checked_text(key, value)


def is_turns(value: object, keys: Keys) -> bool:
    """Whether a list is of turns, and not of records."""
    return isinstance(value, list) and bool(value) and all(is_turn(each, keys) for each in value)


def is_turn(value: object, keys: Keys) -> bool:
    """Whether a value says who speaks and what is said."""
    return isinstance(value, dict) and None not in (_speaker(value, keys), _said(value, keys))


def _speaker(turn: dict[str, Any], keys: Keys) -> str | None:
    return next((key for key in (keys.role, *SPEAKERS) if key and not _is_absent(turn.get(key))), None)


def _said(turn: dict[str, Any], keys: Keys) -> str | None:
    present = [key for key in (keys.content, *SAID, "tool_calls", CALL) if key and key in turn]
    return next((key for key in present if not _is_absent(turn[key])), present[0] if present else None)


def _read_layout(values: dict[str, Any], keys: Keys, read: Conversation) -> None:
    key = keys.turns or next((key for key in TURNS if key in values and _may_be_turns(key, values[key])), None)
    if key in values:
        _read_turns(key, _list_of(key, values.pop(key)), keys, read)
        return
    questions = keys.question or _only([key for key in QUESTIONS if key in values], "--question_key")
    questions = questions or tuple(key for key in (MORE[0], *PAIR[:2]) if key in values)[:1]
    answers = (keys.answer,) if keys.answer else _only([key for key in ANSWERS if key in values], "--answer_key")
    answers = tuple(key for key in answers or PAIR[2:] if key in values)
    if not answers and "chosen" in values and "rejected" in values:
        can_be = questions or isinstance(values["chosen"], list)
        raise Malformed(
            "it is a pair of a preferred answer and another one (chosen, rejected), which is not learned as such"
            + (": with --answer_key chosen the preferred one is" if can_be else ", and has no question of its own")
        )
    if questions and not answers:
        raise Malformed(f"no answer ({keys.answer or ', '.join(ANSWERS)}) beside {_names(values)}"[:300])
    if not answers and "text" in values:
        raise Malformed("it has a text and no question: with --learn text whole texts are learned")
    if not questions and not (answers and isinstance(values[answers[0]], list)):
        raise Malformed(f"no layout has the keys {_names(values)}: name them (--question_key, --answer_key)"[:300])
    if keys.question and not values.keys() & set(keys.question) and not isinstance(values[answers[0]], list):
        raise Malformed(f"no question ({', '.join(keys.question)}) beside {_names(values)}"[:300])
    if HISTORY in values:
        _read_turns(HISTORY, _list_of(HISTORY, values.pop(HISTORY)), keys, read)
    answer = values.pop(answers[0])
    before = read.messages
    read.messages = []
    _read_question(values, [key for key in questions if key in values], keys, read)
    # A preferred answer may hold the whole conversation once more.
    if isinstance(answer, list) and is_turns(answer, keys) and ROLES.get(str(answer[0].get("role"))) != ASSISTANT:
        read.messages = []
    read.messages = before + read.messages
    if isinstance(answer, list) and is_turns(answer, keys):
        _read_turns(answers[0], answer, keys, read)
    else:
        read.add(ASSISTANT, _written(answers[0], answer), **_reasoning(values, keys, read, ""))


def _may_be_turns(key: str, value: object) -> bool:
    return key in TURNS[:2] or isinstance(value, list) or (isinstance(value, str) and value.lstrip().startswith("["))


def _read_question(values: dict[str, Any], questions: Sequence[str], keys: Keys, read: Conversation) -> None:
    for key in questions:
        if isinstance(values[key], list) and is_turns(values[key], keys):
            _read_turns(key, values.pop(key), keys, read)
            return
    if not questions:
        return
    chosen = dict.fromkeys([*keys.context, *questions, *(key for key in MORE if key not in keys.context)])
    present = [key for key in chosen if key in values]
    texts = [_joined(key, values.pop(key)) for key in present]
    read.add(USER, written_text(" and ".join(questions), "\n".join(filter(None, texts))))


def _joined(key: str, value: object) -> str:
    """The text under a key of the question, which may be a list of texts where an option has named it."""
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return "\n".join(checked_text(key, each).strip() for each in value)
    return text_of(key, value).strip()


def _only(found: list[str], option: str) -> tuple[str, ...]:
    if len(found) > 1:
        raise Malformed(f"it has {' and '.join(found)}, of which one is expected: choose with {option}")
    return tuple(found)


def _names(values: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, values)) or "(none)"


def _list_of(key: str, value: object) -> list[Any]:
    """A list of turns; what CSV holds is the JSON of one."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise Malformed(f"{key} is text that begins like a list, but is no JSON") from None
    if not isinstance(value, list):
        raise Malformed(f"{key} is {kind_of(value)}, not a list of turns")
    return value


def _read_turns(key: str, turns: list[Any], keys: Keys, read: Conversation) -> None:
    if turns and all(isinstance(turn, str) for turn in turns):  # the user and the assistant in turn
        turns = [list(turns[start : start + 2]) for start in range(0, len(turns), 2)]
    for number, turn in enumerate(turns, 1):
        where = f"turn {number} of {key}"
        if isinstance(turn, list) and 1 <= len(turn) <= 2:
            for role, said in zip((USER, ASSISTANT), turn, strict=False):
                read.add(role, _written(where, said))
        elif isinstance(turn, dict) and _speaker(turn, keys) is not None:
            _read_turn(key, where, dict(turn), keys, read)
        elif isinstance(turn, dict) and any(name in turn for name in (*ANSWERS, PAIR[2])):
            pair = Conversation()
            left = without_absent(turn)
            _read_layout(left, keys, pair)
            if not is_learned(left):
                pair.unlearned |= set(range(len(pair.messages)))
            read.unlearned |= {len(read.messages) + place for place in pair.unlearned}
            read.messages += pair.messages
            read.unread += [*pair.unread, *(f"{key}[].{name}" for name in keys_left(left))]
        else:
            found = f", but with {', '.join(turn) or 'nothing'}" if isinstance(turn, dict) else ""
            raise Malformed(f"{where} is no object with {SPEAKERS[0]} and {SAID[0]}{found}"[:200])


def _read_turn(key: str, where: str, turn: dict[str, Any], keys: Keys, read: Conversation) -> None:
    speaker = _speaker(turn, keys)
    assert speaker is not None
    who = checked_text(f"{speaker} of {where}", turn.pop(speaker))
    name = who.strip().lower()
    role = keys.roles.get(name) or ROLES.get(name)
    if role is None:
        raise Malformed(f"{where} is of {who!r}, who is none of {', '.join(ROLES)}: say who it is with --roles"[:400])
    said = _said(turn, keys)
    if said is None:
        raise Malformed(
            f"{where} is no object with {speaker} and {SAID[0]}, but with {speaker}, {', '.join(turn)}"[:200]
        )
    value = turn.pop(said) if said in (keys.content, *SAID) else None
    if name == CALL:
        turn, value = {**turn, "tool_calls": _parsed(where, value)}, None
    turn = without_absent(turn)
    more: dict[str, Any] = {}
    calls = [*_as_list(turn.pop("tool_calls", [])), *_as_list(turn.pop(CALL, []))] if role == ASSISTANT else []
    if calls:
        more["tool_calls"] = [_call_of(where, call) for call in calls]
    if role == ASSISTANT:
        more |= _reasoning(turn, keys, read, f"{key}[].")
    if role == TOOL:
        more |= {name: turn.pop(name) for name in ("name", "tool_call_id") if name in turn}
    if not is_learned(turn):
        read.unlearned.add(len(read.messages))
    read.unread += (f"{key}[].{name}" for name in keys_left(turn))
    if role == "system" and not (_is_absent(value) or text_of(f"{said} of {where}", value).strip()):
        return  # nothing was said
    if calls:
        content = "" if _is_absent(value) else text_of(f"{said} of {where}", value).strip()
    elif role == TOOL and isinstance(value, dict | list) and not is_parts(value):
        content = json.dumps(value, ensure_ascii=False)
    else:
        content = _written(f"{said} of {where}", value)
    read.add(role, content, **more)


def is_parts(value: object) -> bool:
    """Whether a value is a list of parts of a text."""
    return isinstance(value, list) and all(isinstance(part, dict) and "type" in part for part in value)


def _written(where: str, value: object) -> str:
    if _is_absent(value):
        raise Malformed(f"{where} is null")
    return written_text(where, text_of(where, value))


def _reasoning(turn: dict[str, Any], keys: Keys, read: Conversation, prefix: str) -> dict[str, Any]:
    """What stands under a key of reasoning, if it is to belong to the answer; else the key is left there."""
    found = next((name for name in REASONING if turn.get(name)), None)
    if found is None or not keys.reasoning:
        return {}
    return {REASONING[0]: written_text(prefix + found, text_of(prefix + found, turn.pop(found)))}


def _as_list(value: object) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _parsed(where: str, value: object) -> Any:
    """What a text of JSON holds, or the value itself."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise Malformed(f"{where} calls a tool, but {value[:60]!r} is no JSON") from None


def _call_of(where: str, call: object) -> dict[str, Any]:
    """A call of a tool as chat templates read it: its arguments are an object, where they are JSON of one."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise Malformed(f"{where} has a call of a tool without a name")
    arguments = function.get("arguments", function.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments or "{}")
            arguments = parsed if isinstance(parsed, dict) else arguments
        except (ValueError, RecursionError):
            pass  # it stays the text that it is
    called = {"name": function["name"], "arguments": arguments}
    checked_text(where, json.dumps(called, ensure_ascii=False))
    named = {"id": call["id"]} if isinstance(call, dict) and isinstance(call.get("id"), str) else {}
    return {**named, "type": "function", "function": called}


def _tools_of(key: str, value: object) -> list[dict[str, Any]]:
    value = _parsed(key, value) if isinstance(value, str) and value.strip() else value
    tools = []
    for tool in _as_list(value or []):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Malformed(f"{key} has a tool without a name")
        tools.append({"type": "function", "function": function})
    return tools


STARTS = "begin with the assistant, which is read and not learned"
ENDS = "end with a turn that nobody answers, which is left out"


def _mend(read: Conversation) -> None:
    """Brings the turns into an order that can be learned from, and notes what it did. Raises Malformed."""
    roles = [message["role"] for message in read.messages]
    if ASSISTANT not in roles:
        raise Malformed(f"nobody answers: its turns are of {', '.join(roles) or 'nobody'}"[:300])
    last = len(roles) - 1 - roles[::-1].index(ASSISTANT)
    if last < len(roles) - 1:
        read.messages = read.messages[: last + 1]
        read.notes.append(ENDS)
    wrong = list(_wrong_turns(roles[: last + 1]))
    if wrong:
        raise Malformed(
            f"a user (or a tool) and an assistant take turns, behind a system at most; here they are of "
            f"{', '.join(roles)}"[:300]
        )
    first = int(roles[0] == "system")
    if roles[first] == ASSISTANT:
        read.unlearned.add(first)
        read.notes.append(STARTS)
    if all(place in read.unlearned for place, role in enumerate(roles[: last + 1]) if role == ASSISTANT):
        raise Malformed(NOT_LEARNED if ASSISTANT in roles[first + 1 :] else "nobody asks what the assistant says")


def _wrong_turns(roles: Sequence[str]) -> Iterator[int]:
    """Places of turns that may not stand where they do."""
    allowed = {None: ("system", USER, ASSISTANT), "system": (USER, ASSISTANT), USER: (ASSISTANT,)}
    allowed |= {ASSISTANT: (USER, TOOL), TOOL: (TOOL, ASSISTANT)}
    for place, role in enumerate(roles):
        if role not in allowed[roles[place - 1] if place else None]:
            yield place
