"""Which columns of a table hold the sentences of a pair, and which of its rows are none.

Columns are where `--columns` says; else where headings name the languages; else where their scripts stand. A file of
manythings.org has English first, whatever the scripts. Where none of these tells, the columns are asked for.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from data_prep.tables import CSVTable, JSONTable, Row, Table, Unreadable
from training.base.console import UserError
from training.data.languages import Language, codes_called
from training.data.text import clean

# Kinds of malformed rows.
NO_TAB, HEADING = "one column, no TAB", "a heading"
EXTRA_TAB = "3 columns where others without an attribution have 2"

# What a heading calls sides, attribution and scores.
_SIDES = {"source": 0, "src": 0, "target": 1, "tgt": 1, "translation": 1}
_ATTRIBUTIONS = ("attribution", "author", "authors", "licence", "license", "credit")
_OTHER_FORMS = (".parquet", ".gz", ".bz2", ".xz", ".zst", ".zip")  # whose content tells them
# Words that most English texts have some of, and those of other languages in Latin letters none.
_ENGLISH = re.compile(r"\b(?:the|you|this|they|what|with)\b", re.IGNORECASE)
_NAME = re.compile(r"\w+(?:[_.-]\w+)*")
_NUMBER = re.compile(r"[-+]?[\d.,]+%?")

Languages = tuple[Language, Language]  # of source and target


def names_tatoeba(attribution: str) -> bool:
    """Whether the authors of a pair are those of Tatoeba."""
    return "tatoeba" in attribution.lower()


@dataclass(frozen=True)
class Columns:
    """Where the cells of a pair stand in a row."""

    source: int
    target: int
    attribution: int | None
    width: int  # cells of a row
    heading: bool  # whether the first row that is not blank names them
    found_by: str  # in words
    names: dict[str, str]  # source, target and attribution, as a message names them
    unread: tuple[str, ...]  # the other columns
    loose: bool  # whether a third cell may be an attribution, which a row has or not
    others_have_two: bool  # of these, whether most rows have none: a third cell is then half a sentence
    languages: Languages

    def about(self) -> dict[str, object]:
        """What meta.json says of them."""
        return {**self.names, "found_by": self.found_by, "not_read": list(self.unread)}

    def malformed(self, cells: Sequence[str]) -> str | None:
        """Why a row of clean cells, one of which is not empty, is no pair; None if it is one."""
        count = len(cells)
        if count == 1:
            return NO_TAB
        if self.loose and count > 3:
            return f"{count} columns"
        if not self.loose and count != self.width:
            return f"{count} columns where others have {self.width}"
        texts = cells[self.source], cells[self.target]
        for text, language in zip(texts, self.languages, strict=True):
            if not text:
                return f"no {language}"
        if swapped(texts, self.languages):
            return SWAPPED.format(*self.languages)
        if self.loose and self.others_have_two and count == 3 and cells[2] and not names_tatoeba(cells[2]):
            return EXTRA_TAB
        return None


SWAPPED = "{0} and {1} the other way round"


def swapped(texts: tuple[str, str], languages: Languages) -> bool:
    """Whether a text has its language's script on the other side and not where it belongs."""
    return any(
        script.search(texts[1 - side]) and not script.search(texts[side]) for side, script in _telling(languages)
    )


@cache
def _telling(languages: Languages) -> list[tuple[int, re.Pattern[str]]]:
    """Each side whose script tells it, and the script: not one that both share, nor Latin, which stands in all."""
    if languages[0].shares_script(languages[1]):
        return []
    return [(side, _script(language)) for side, language in enumerate(languages) if "A-Z" not in language.script]


@cache
def _script(language: Language) -> re.Pattern[str]:
    return re.compile(f"[{language.script}]")


def has_script(text: str, language: Language) -> bool:
    """Whether a character of the text is of the language's script, or that is not known."""
    return not language.script or _script(language).search(text) is not None


def _is_written_in(text: str, language: Language) -> bool:
    """Whether a text looks like one of a language whose script is known: in Latin letters most of it, else some."""
    if "A-Z" not in language.script:
        return has_script(text, language)
    letters = _script(language).findall(text)
    return bool(letters) and 2 * len(letters) > sum(map(str.isalpha, text))


def find_columns(table: Table, head: Sequence[Row], languages: Languages, asked: str | None) -> Columns:
    """The columns of `table`, whose first rows are `head`. asked: what `--columns` says.

    Raises UserError where they are not found, or not all of those that were asked for.
    """
    rows = [[clean(cell) for cell in cells] for _, cells in head if not isinstance(cells, Unreadable)]
    rows = [cells for cells in rows if any(cells)]
    if not rows:
        raise UserError(f"{table.place} holds blank lines only; expected sentence pairs")
    finder = _Finder(table, rows, languages)
    return finder.asked_for(asked) if asked else finder.found()


class _Finder:
    def __init__(self, table: Table, rows: list[list[str]], languages: Languages):
        self.table, self.languages = table, languages
        self.heading = table.names is None and _is_heading(rows[0], languages)
        self.names = list(table.names or (rows[0] if self.heading else ()))
        self.rows = rows[1:] if self.heading else rows
        if not self.rows:
            raise UserError(f"{table.place} holds a heading only; expected sentence pairs")
        self.plain = Counter(len(cells) for cells in self.rows if not names_tatoeba(cells[-1]))
        self.counts = Counter(map(len, self.rows))
        self.width = len(table.names) if table.names is not None else self.counts.most_common(1)[0][0]
        self.like = [cells for cells in self.rows if len(cells) == self.width]

    # --- by request

    def asked_for(self, asked: str) -> Columns:
        words = [word.strip() for word in asked.split(",")]
        if len(words) not in (2, 3) or not all(words):
            raise UserError(
                f"--columns {asked} names {len(words)} columns: those of source and target are expected, and perhaps "
                "that of the attribution, as in 2,4 or zh,en,author"
            )
        if not self.names and not all(word.isdigit() for word in words):
            first = self.rows[0]
            if not set(words) <= set(first):
                raise self._no_column(next(word for word in words if word not in first), first)
            self.heading, self.names = True, list(first)
            self.rows, self.like = self.rows[1:], self.like[1:]
        places = [self._place(word) for word in words]
        if len(set(places)) < len(places):
            raise UserError(f"--columns {asked} names a column twice")
        return self._columns("--columns", places[0], places[1], places[2] if len(places) == 3 else None)

    def _place(self, word: str) -> int:
        if word in self.names:
            return self.names.index(word)
        if word.isdigit() and 1 <= int(word) <= self.width:
            return int(word) - 1
        raise self._no_column(word, self.names or [str(number + 1) for number in range(self.width)])

    def _no_column(self, word: str, names: Sequence[str]) -> UserError:
        shown = ", ".join(name[:40] if name.isdigit() else repr(name[:40]) for name in names[:10])
        return UserError(f"{self.table.place} has no column {word} (--columns); it has {shown}")

    # --- by what is there

    def found(self) -> Columns:
        if self.width == 1:
            raise self._one_column()
        places = self._by_names()
        if places is not None:
            return self._columns("their names", *places)
        if self._of_manythings():
            return self._columns("the form of manythings.org", *self._with_english_in(self._english_column() or 0))
        if self.languages[0].shares_script(self.languages[1]):
            places, english = self._by_sides(), self._english_column()
            if places is not None:
                return self._columns("their names", *places)
            if english is not None:
                return self._columns("their English words", *self._with_english_in(english))
            raise self._unknown(f"{self.languages[0]} and {self.languages[1]} cannot be told apart by their script")
        return self._columns("their script", *self._by_script())

    def _by_names(self) -> tuple[int, int] | None:
        """The columns whose names are those of the languages, one each."""
        called = [_languages_called(name) for name in self.names]
        places = [
            [column for column, codes in enumerate(called) if language.code in codes] for language in self.languages
        ]
        if [len(each) for each in places] != [1, 1] or places[0] == places[1]:
            return None
        return places[0][0], places[1][0]

    def _by_sides(self) -> tuple[int, int] | None:
        sides = {_SIDES.get(name.lower()): column for column, name in enumerate(self.names)}
        return (sides[0], sides[1]) if {0, 1} <= sides.keys() else None

    def _of_manythings(self) -> bool:
        tatoeba = sum(len(cells) == 3 and names_tatoeba(cells[2]) for cells in self.rows)
        return "en" in (language.code for language in self.languages) and 2 * tatoeba > len(self.rows)

    def _english_column(self) -> int | None:
        """Which of two columns, or of the first two of three, has English words; None where that is unclear."""
        if self.width > 3 or "en" not in (language.code for language in self.languages):
            return None
        counts = [sum(_ENGLISH.search(cells[column]) is not None for cells in self.like) for column in (0, 1)]
        clear = max(counts) > 4 * min(counts) and 20 * max(counts) >= len(self.like)
        return counts.index(max(counts)) if clear else None

    def _with_english_in(self, column: int) -> tuple[int, int]:
        """The columns of source and target, of the first two, where English stands in `column`."""
        return (column, 1 - column) if self.languages[0].code == "en" else (1 - column, column)

    def _by_script(self) -> tuple[int, int]:
        """The columns in which at least half of the cells are written in the one and the other language."""
        fitting = [[column for column in range(self.width) if self._fits(column, each)] for each in self.languages]
        pairs = [(source, target) for source in fitting[0] for target in fitting[1] if source != target]
        # Two columns, or three of which the last is an attribution.
        first = [pair for pair in pairs if set(pair) == {0, 1}]
        if len(pairs) == 1 or (first and self.width <= 3):
            return (first or pairs)[0]
        if pairs:
            raise self._unknown(f"several columns hold {self.languages[0]} or {self.languages[1]}")
        looks = []
        for column in range(self.width):
            fits = [
                str(language) for language, columns in zip(self.languages, fitting, strict=True) if column in columns
            ]
            looks.append(f"{column + 1}: {fits[0] if fits else 'something else'}")
        missing = [str(each) for each, columns in zip(self.languages, fitting, strict=True) if not columns]
        raise self._unknown(
            f"most of its lines have no {' and no '.join(missing) or 'pair'} in any column of their own ("
            f"{', '.join(looks)})"
        )

    def _fits(self, column: int, language: Language) -> bool:
        # A column may be empty in some rows, and numbers tell nothing.
        return 2 * sum(_is_written_in(cells[column], language) for cells in self.like) >= len(self.like)

    def _unknown(self, why: str) -> UserError:
        names = f" (it has {', '.join(name[:40] for name in self.names[:10])})" if self.names else ""
        return UserError(
            f"{self.table.place}: which columns are source and target is not clear{names}: {why}. Pass their names or "
            "numbers, as in --columns 1,2, or other --source_language and --target_language"
        )

    def _one_column(self) -> UserError:
        text = self.rows[0][0]
        if text.startswith(("{", "[")):
            advice = (
                "it looks like JSON: call the file .jsonl; records of questions and answers are for "
                "data_prep.instructions"
            )
        elif text.startswith("version https://git-lfs"):
            advice = "it is the pointer to a file that git-lfs keeps: `git lfs pull` fetches that"
        elif Path(self.table.place).suffix.lower() in _OTHER_FORMS:
            advice = "it is not what its name says: fetch it again"
        elif "," in text or ";" in text:
            advice = "if its columns are separated by commas or semicolons (CSV), call the file .csv"
        else:
            advice = "put a tab between the languages, or pass two files, --source train.zh,train.en"
        number = sum(len(cells) == 1 for cells in self.rows)
        return UserError(
            f"{self.table.place}: {number:,} of its first {len(self.rows):,} lines are no sentence pairs ({NO_TAB}; "
            f"the first: {text[:80]!r}); {advice}"
        )

    # --- what was found

    def _columns(self, found_by: str, source: int, target: int, attribution: int | None = None) -> Columns:
        lines = not isinstance(self.table, CSVTable | JSONTable) and self.table.names is None
        loose = lines and {source, target} == {0, 1} and self.counts.keys() & {2, 3} != set() and self.width <= 3
        if attribution is None and loose and self.counts[3]:
            third = [cells[2] for cells in self.rows if len(cells) == 3 and cells[2]]
            attribution = None if third and all(map(_NUMBER.fullmatch, third)) else 2
        if attribution is None:
            called = [column for column, name in enumerate(self.names) if name.lower() in _ATTRIBUTIONS]
            attribution = called[0] if called else None
        width = max(self.width, *(column + 1 for column in (source, target, attribution or 0)))
        places = {"source": source, "target": target}
        if attribution is not None:
            places["attribution"] = attribution

        def name(column: int) -> str:
            return self.names[column] if column < len(self.names) else f"column {column + 1}"

        read = set(places.values())
        seen = max(self.counts) if loose else width
        unread = [name(column) for column in range(min(seen, 3) if loose else width) if column not in read]
        return Columns(
            source=source,
            target=target,
            attribution=attribution,
            width=width,
            heading=self.heading,
            found_by=found_by,
            names={side: name(column) for side, column in places.items()},
            unread=tuple(unread),
            loose=bool(loose),
            others_have_two=self.plain[2] > self.plain[3],
            languages=self.languages,
        )


def _languages_called(name: str) -> set[str]:
    """The codes of the languages that the name of a column mentions, as in translation.zh, en_text or 中文."""
    return {code for word in re.split(r"[\W_]+", name.lower()) for code in codes_called(word)}


def _is_heading(cells: Sequence[str], languages: Languages) -> bool:
    """Whether two cells of a first row, or more, name the languages or their sides."""
    codes = {language.code for language in languages}
    names = filter(_NAME.fullmatch, cells)
    return sum(name.lower() in _SIDES or bool(_languages_called(name) & codes) for name in names) >= 2
