"""Options of every command: typed, from a YAML file, overridden on the command line.

Every mistake is found at once and answered with the nearest valid key. A YAML key and its command-line option have one
spelling: `optim: {lr: 3e-4}` in the file is `--optim.lr 3e-4` on the command line (where `-` may stand for `_`).
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
import types
import typing
from collections.abc import Collection, Iterable, Sequence
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    PlainSerializer,
    StringConstraints,
    ValidationError,
    field_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from training.base.console import UserError
from training.base.durations import format_duration, parse_duration
from training.base.environment import without_local_rank
from training.base.strict_yaml import read_yaml


class Options(BaseModel):
    """Base of all option groups: unknown keys are mistakes, values do not change after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="after")
    @classmethod
    def _at_home(cls, value: Any) -> Any:
        """A path that begins with ~/, which the shell does not read in a file, in quotes or behind an `=`."""
        return value.expanduser() if isinstance(value, Path) and value.parts[:1] == ("~",) else value


# Seconds, written as people write them: 90s, 30m, 11h30m, 1d12h, 4:00:00, or a number of seconds.
Duration = Annotated[
    float,
    BeforeValidator(lambda value: parse_duration(value) if isinstance(value, str) else value),
    PlainSerializer(lambda value: text if parse_duration(text := format_duration(value)) == value else value),
    "duration",
]


def _with_unit(value: object) -> object:
    if not isinstance(value, str) or not re.search(r"[dhms:]", value):
        raise ValueError("say the unit, as in 40m or 1h30m")
    return parse_duration(value)


# The same where a number alone would be a mistake: nobody means ten seconds by 10.
DurationWithUnit = Annotated[
    float,
    BeforeValidator(_with_unit),
    PlainSerializer(
        lambda value: text if parse_duration(text := format_duration(value)) == value else f"{value:.15g}s"
    ),
    "duration",
]


# Texts of a key that takes all words up to the next key, and more wherever it stands again: --source a b.
Words = Annotated[
    tuple[str, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value), "words"
]


def _pairs(value: object) -> object:
    """`key=value` words as a dictionary; what is YAML (false, 5) is read as such."""
    if isinstance(value, dict):
        return value
    words = [value] if isinstance(value, str) else value
    if not isinstance(words, list | tuple) or not all(isinstance(word, str) and "=" in word[1:] for word in words):
        raise ValueError("expected words like key=value")
    try:
        return {key: read_yaml(text) for key, _, text in (word.partition("=") for word in words)}
    except yaml.YAMLError as error:
        raise ValueError(f"not YAML behind the = ({getattr(error, 'problem', None) or error})") from None


# A dictionary that is written as words on the command line: --template_options enable_thinking=false.
Pairs = Annotated[dict[str, Any], BeforeValidator(_pairs), "words"]


# A commit, a branch or a tag. It comes to stand in commands and in code.
Revision = Annotated[str, StringConstraints(pattern=r"^[\w.][\w./-]*$")]


OptionsType = TypeVar("OptionsType", bound=Options)


_TRUE_OR_FALSE = {
    **dict.fromkeys(("true", "t", "yes", "y", "on", "1"), True),
    **dict.fromkeys(("false", "f", "no", "n", "off", "0"), False),
}


def _true_or_false(text: str) -> bool:
    if text.lower() not in _TRUE_OR_FALSE:
        raise argparse.ArgumentTypeError(f"expected true or false, got {text}")
    return _TRUE_OR_FALSE[text.lower()]


# Makes an option of a CommandLine a flag, false where it is not given: `add_argument("--merge", **FLAG, help=...)`.
FLAG: dict[str, Any] = {
    "nargs": "?",
    "const": True,
    "default": False,
    "type": _true_or_false,
    "metavar": "true|false",
}


class CommandLine(argparse.ArgumentParser):
    """The options of a command, in one style for all of them.

    Nothing may be abbreviated, `-` and `_` are the same in a name, a FLAG alone is true and `--flag false` undoes it,
    and a mistake is a UserError. A command that hands on to a training what it does not know asks `parse_known_args`.
    """

    def __init__(self, prog: str, about: str | None = None, usage: str | None = None, **more: Any):
        layout = argparse.RawDescriptionHelpFormatter
        more = {"description": about, "formatter_class": layout, "allow_abbrev": False, **more}
        super().__init__(prog=prog, usage=usage, **more)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        names = {name.replace("_", "-"): name for name in self._option_string_actions}
        given, words = list(sys.argv[1:] if args is None else args), []
        if problems := unprintable(given):
            raise UserError("; ".join(problems))
        while given:
            word = given.pop(0)
            name, equals, value = word.partition("=")
            name = names.get(name.replace("_", "-"), name) if name.startswith("--") else name
            action = self._option_string_actions.get(name)
            if action is not None and action.type is _true_or_false and not equals:
                # The next word is the value only if it is one: what stands behind a flag may be a file.
                equals, value = "=", given.pop(0) if given and given[0].lower() in _TRUE_OR_FALSE else "true"
            words.append(name + equals + value)
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> typing.NoReturn:
        kind, _, words = message.partition(": ")
        if kind == "unrecognized arguments":
            word = words.split()[0]
            near = difflib.get_close_matches(word.partition("=")[0], self._option_string_actions, n=1)
            message = f"{word} is none of the options" + (f" (nearest: {near[0]})" if near else "")
        raise UserError(f"{message}. All options: {self.prog} --help")


def parse(cls: type[OptionsType], argv: Sequence[str], *, prog: str, about: str) -> tuple[OptionsType, bool]:
    """Options from `argv`: an optional YAML file, `--key value`, `--key=value`, and `--dry-run`.

    A key of type bool is true where it stands alone. Returns the options and whether `--dry-run` was given. Raises
    UserError with every mistake found; `--help` prints all keys and exits.
    """
    argv = without_local_rank(argv)
    if any(word in ("-h", "--help") for word in argv):
        print(help_text(cls, prog=prog, about=about))
        sys.exit(0)
    keys = all_keys(cls)
    flags = {key for key, field in keys.items() if field.annotation in (bool, bool | None)} | {"dry_run"}
    lists = {key for key, field in keys.items() if "words" in field.metadata}
    files, overrides, mistakes = _split_words(argv, flags, lists, keys)
    dry_run = "false"
    values: dict[str, Any] = {}
    origin = "the command line"
    for file in files:
        values = _read_yaml(Path(file))
        origin = file
    for key, text in overrides:
        if key == "dry_run":
            dry_run = text
        else:
            words = [word for name, word in overrides if name == key]
            _place(values, key, words if key in lists and words != ["null"] else text, mistakes)
    if dry_run.lower() not in _TRUE_OR_FALSE:
        mistakes.append(f"--dry-run: expected true or false, got {dry_run}")
    options = None
    try:
        options = cls.model_validate(values)
    except ValidationError as error:
        mistakes += _explain(cls, error.errors())
    if files and prog.startswith("python -m training."):
        meant = meant_for(Path(origin), values)
        is_said = values.get("training") or (mistakes and find_spec(meant) is not None)
        if is_said and prog != f"python -m {meant}":
            mistakes.append(f"{origin} is for another training: python -m {meant} {origin}")
    if mistakes or options is None:
        found = f"{len(mistakes)} mistakes" if len(mistakes) > 1 else "a mistake"
        raise UserError(f"{found} in the options ({origin}): " + "; ".join(mistakes) + f". All keys: {prog} --help")
    return options, _TRUE_OR_FALSE[dry_run.lower()]


def meant_for(config: Path, values: dict[str, Any]) -> str:
    """The module that trains by a config file: what its key `training` says, or training.NAME for configs/NAME/..."""
    return str(values.get("training") or f"training.{config.resolve().parent.name}")


def raw_values(argv: Sequence[str]) -> dict[str, Any]:
    """What `parse` would read from `argv`, unchecked and without defaults, when the script's options are not at hand.

    Raises UserError when the file cannot be read or a word has no place.
    """
    files, overrides, mistakes = _split_words(argv, None)
    values = _read_yaml(Path(files[0])) if files else {}
    for key, text in overrides:
        _place(values, key, text, mistakes)
    if mistakes:
        raise UserError("; ".join(mistakes))
    return values


def named_keys(argv: Sequence[str]) -> set[str]:
    """The keys that the command line itself sets, with their dots, whatever a config file says besides."""
    return {key for key, _ in _split_words(without_local_rank(argv), None)[1]}


def with_values(options: OptionsType, values: dict[str, Any]) -> OptionsType:
    """The same options but for `values`, by dotted key. Raises pydantic's ValidationError where one does not fit."""
    content = options.model_dump()
    for key, value in values.items():
        *groups, last = key.split(".")
        place = content
        for group in groups:
            place = place[group]
        place[last] = value
    return type(options).model_validate(content)


def _split_words(
    argv: Sequence[str], flags: Collection[str] | None, lists: Collection[str] = (), known: Collection[str] = ()
) -> tuple[list[str], list[tuple[str, str]], list[str]]:
    """Config files, overrides (key, text) and mistakes.

    flags: the keys that are true where they stand alone; None: it is not known which, so every key that has no value.
    lists: the keys that take several words; each is an override of its own. known: those that need a value; of others
    that have none it is for the caller to say that there is no such key.
    """
    files: list[str] = []
    overrides: list[tuple[str, str]] = []
    mistakes: list[str] = unprintable(argv)
    words = list(argv)
    while words:
        word = words.pop(0)
        if word.startswith("--") and len(word) > 2:
            name, equals, text = word[2:].partition("=")
            key = name.replace("-", "_")
            alone = not words or (words[0].startswith("--") and len(words[0]) > 2)
            if not equals and (alone if flags is None else key in flags):
                text = words.pop(0) if words and words[0].lower() in _TRUE_OR_FALSE else "true"
            elif not equals:
                if alone and key in known:
                    mistakes.append(f"--{name} has no value (write --{name} VALUE)")
                    continue
                text = "true" if alone else words.pop(0)
            if not text:
                mistakes.append(f"--{name} has an empty value (write --{name} VALUE, or leave it out)")
                continue
            overrides.append((key, text))
            while key in lists and words and not words[0].startswith("--"):
                overrides.append((key, words.pop(0)))
        elif word.startswith("-"):
            mistakes.append(f"{word}: options begin with two dashes, as in --key VALUE")
            if words and not words[0].startswith("-"):
                words.pop(0)  # its value, which is no config file
        else:
            files.append(word)
    if len(files) > 1:
        mistakes.append(f"one config file is expected, found {len(files)}: {', '.join(files)}")
    return files[:1], overrides, mistakes


def unprintable(value: object, key: str = "") -> list[str]:
    """What is wrong with the texts in a value that YAML or a command line has given, at any depth.

    A control character has no place in an option: in the lines that are made of it, a line feed would begin one more.
    """
    if isinstance(value, str):
        found = _CONTROL.search(value)
        return [f"{f'{key}: ' if key else ''}{value!r} has the control character {found[0]!r} in it"] if found else []
    if isinstance(value, dict):
        parts = [(f"{key}.{name}" if key else str(name), each) for name, each in value.items()]
        return unprintable(list(map(str, value))) + [each for part in parts for each in unprintable(part[1], part[0])]
    return [each for part in value for each in unprintable(part, key)] if isinstance(value, list | tuple) else []


_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def _read_yaml(path: Path) -> dict[str, Any]:
    stray = "" if path.suffix in (".yaml", ".yml") else " (a word that belongs to no option is the config file)"
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = difflib.get_close_matches(str(path), [str(p) for p in Path("configs").glob("*/*.yaml")], n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UserError(f"there is no config file {path}{stray}.{hint}") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; name a .yaml file in it") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a UTF-8 text file; a config is YAML text{stray}") from None
    try:
        values = read_yaml(text)
    except (yaml.YAMLError, ValueError) as error:  # a ValueError is a date that does not exist
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or error
        raise UserError(f"{path}{where} is not valid YAML: {problem}{stray}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a {type(values).__name__}, not `key: value` lines{stray}")
    if problems := unprintable(values):
        raise UserError(f"{path}: {'; '.join(problems)}")
    return values


def _place(values: dict[str, Any], key: str, text: str | list[str], mistakes: list[str]) -> None:
    """Puts the override `key` (dotted) into the nested dictionary; pydantic turns the text into the field's type."""
    *groups, last = key.split(".")
    place = values
    for group in groups:
        inner = place.setdefault(group, {})
        if not isinstance(inner, dict):
            mistakes.append(f"--{key}: {group} is a value, not a group of keys")
            return
        place = inner
    place[last] = None if text == "null" else text


def _group_type(field: FieldInfo) -> type[Options] | None:
    candidate = field.annotation
    return candidate if isinstance(candidate, type) and issubclass(candidate, Options) else None


def all_keys(cls: type[Options], prefix: str = "") -> dict[str, FieldInfo]:
    """Every key of `cls` with its dots, in order of definition, and its field."""
    keys: dict[str, FieldInfo] = {}
    for name, field in cls.model_fields.items():
        group = _group_type(field)
        if group is not None:
            keys |= all_keys(group, f"{prefix}{name}.")
        else:
            keys[prefix + name] = field
    return keys


def _explain(cls: type[Options], details: Iterable[Any]) -> list[str]:
    """Pydantic's errors in our words, one for each key; of a key with several types it has one for each of them."""
    keys = all_keys(cls)
    by_key: dict[str, list[Any]] = {}
    for detail in details:
        name = ".".join(map(str, detail["loc"]))
        key = next((key for key in accumulate(map(str, detail["loc"]), "{}.{}".format) if key in keys), name)
        by_key.setdefault(key, []).append(detail)
    return [mistake for key, found in by_key.items() for mistake in _explain_key(keys, key, found)]


def _explain_key(keys: dict[str, FieldInfo], key: str, details: list[Any]) -> list[str]:
    kind, value = details[0]["type"], details[0]["input"]
    if kind == "extra_forbidden":
        if isinstance(value, dict) and value:  # an unknown group: name the keys in it
            return [
                each
                for name, inner in value.items()
                for each in _explain_key(keys, f"{key}.{name}", [{**details[0], "input": inner}])
            ]
        near = difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
        if not near:  # the right last name under the wrong group, or without its group
            last = {name.rsplit(".", 1)[-1]: name for name in keys}
            near = [last[match] for match in difflib.get_close_matches(key.rsplit(".", 1)[-1], last, n=1, cutoff=0.6)]
        return [f"there is no key {key}" + (f" (nearest: {near[0]})" if near else "")]
    if kind == "missing":
        return [f"{key} is required"]
    said = [each["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ") for each in details]
    inside = [name for name in keys if name.startswith(f"{key}.")]
    if inside and not isinstance(value, dict):
        some = ", ".join(inside[:3]) + (", ..." if len(inside) > 3 else "")
        return [f"{key} is a group of keys ({some}), which takes no value of its own, got {value!r}"]
    if inside or not key:  # a check across several keys; its message names them
        return said
    message = " or ".join(f"{each[0].lower()}{each[1:]}" for each in said)
    expected = f" (expected {_field_type(keys[key])})" if key in keys else ""
    return [f"{key}: {message}, got {value!r}{expected}"]


def _field_type(field: FieldInfo) -> str:
    named = [name for name in ("duration", "words") if name in field.metadata]
    return named[0] if named else _type_name(field.annotation)


def _type_name(annotation: Any) -> str:
    if annotation in (Duration, DurationWithUnit):
        return "duration"
    origin = typing.get_origin(annotation)
    if origin is typing.Literal:
        return "|".join(str(choice) for choice in typing.get_args(annotation))
    if origin in (typing.Union, types.UnionType):
        return "|".join(_type_name(part) for part in typing.get_args(annotation))
    if origin is typing.Annotated:
        return _type_name(typing.get_args(annotation)[0])
    if annotation is type(None):
        return "null"
    name = getattr(annotation, "__name__", str(annotation))
    return {"str": "text", "Path": "path"}.get(name, name)


def help_text(cls: type[Options], *, prog: str, about: str) -> str:
    """What `--help` prints: every key, its type, default and meaning."""
    lines = [f"usage: {prog} [CONFIG.yaml] [--key value ...] [--dry-run]", "", about, "", "keys:"]
    rows = []
    for key, field in all_keys(cls).items():
        default = "required" if field.default is PydanticUndefined else f"default {_default(field)}"
        rows.append((f"  --{key}", _field_type(field), default, field.description or ""))
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    for name, kind, default, meaning in rows:
        lines.append(f"{name:<{widths[0]}}  {kind:<{widths[1]}}  {meaning} ({default})")
    lines += ["", "  --dry-run  check everything, print the resolved options, what would be done and what it takes"]
    return "\n".join(lines)


def _default(field: FieldInfo) -> str:
    is_duration = _field_type(field).startswith("duration") and field.default is not None
    return format_duration(field.default) if is_duration else _show(field.default)


def _show(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "none"
    return str(value) if value != {} else "none"


def to_yaml(options: Options) -> str:
    """The resolved options as YAML that `parse` reads back to the same options."""
    return yaml.safe_dump(options.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def differing_keys(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys whose values differ between two nested dictionaries, each as `key: old -> new`."""
    lines: list[str] = []
    for key in sorted(set(old) | set(new)):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            lines += differing_keys(before, after, f"{prefix}{key}.")
        elif before != after:
            lines.append(f"{prefix}{key}: {_show(before)} -> {_show(after)}")
    return lines
