"""What is done to the characters of a sentence: cleaning, conversion to simplified, and what counts as the same."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import opencc

# Inside [...] of a regular expression: Han characters, with 々 and 〇.
HAN = "\u3005\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"

_NOT_COMPARED = ("P", "S", "Z", "C")  # Unicode categories: punctuation, symbols, blanks, control characters


def split_lines(parts: Iterable[bytes]) -> Iterator[bytes]:
    """The lines of a UTF-8 text without their ends: LF, CRLF or CR. No part ends between a CR and its LF.

    What else Unicode calls the end of a line (U+2028, U+0085, a form feed) stands inside sentences.
    """
    for part in parts:
        yield from part.splitlines()  # of bytes: at these three only


def clean(text: str) -> str:
    """`text` without zero-width blanks and byte-order marks, every other run of blanks as one space, trimmed."""
    return " ".join(text.replace("\u200b", "").replace("\ufeff", "").split())


@cache
def _simplifier() -> opencc.OpenCC:
    import opencc  # here, because training reads prepared data and converts nothing

    return opencc.OpenCC("t2s")


def simplify(text: str) -> str:
    """`text` in simplified characters (OpenCC t2s)."""
    simplified: str = _simplifier().convert(text)
    return simplified


def normalise(text: str) -> str:
    """`text` as it is compared for sameness: simplified, NFKC, case folded, without punctuation and blanks.

    A text of nothing but punctuation is compared as it stands; otherwise all of those would be one sentence.
    """
    # Folding can undo NFKC (and the other way round), so it is applied on both sides, as Unicode advises.
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", simplify(text)).casefold())
    return "".join(char for char in folded if unicodedata.category(char)[0] not in _NOT_COMPARED) or text
