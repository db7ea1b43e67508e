"""What is done to the characters of a sentence: cleaning, conversion to simplified, and what counts as the same."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import groupby
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


# Where Unicode has its marks that combine with a letter, with letters among them; Han and Latin are elsewhere.
_MARK = (
    r"[\u0300-\u1fff\u20d0-\u20ff\u2cef-\u2dff\u302a-\u302f\u3099\u309a\ua66f-\uabff\ufb1e\ufe20-\ufe2f\uff9e\uff9f"
    r"\U000101fd-\U0001ffff]"
)
_MANY_MARKS = re.compile(f"{_MARK}{_MARK}{{31,}}")  # faster to look for than {32,}


def nfkc(text: str) -> str:
    """`text` in Unicode's normal form NFKC, in a time that grows as its length does.

    Python's own function sorts the marks on a letter by exchanging neighbours: 10 seconds for 100,000 of them.
    """
    return unicodedata.normalize("NFKC", _MANY_MARKS.sub(lambda found: _marks_in_order(found[0]), text))


def _marks_in_order(text: str) -> str:
    """NFKD of a text."""
    apart = "".join(unicodedata.normalize("NFKD", char) for char in text)
    runs = (list(run) for _, run in groupby(apart, key=lambda char: unicodedata.combining(char) > 0))
    return "".join("".join(sorted(run, key=unicodedata.combining)) for run in runs)


def normalise(text: str) -> str:
    """`text` as it is compared for sameness: simplified, NFKC, case folded, without punctuation and blanks.

    A text of nothing but punctuation is compared as it stands; otherwise all of those would be one sentence.
    """
    # Folding can undo NFKC (and the other way round), so it is applied on both sides, as Unicode advises.
    folded = nfkc(nfkc(simplify(text)).casefold())
    return "".join(char for char in folded if unicodedata.category(char)[0] not in _NOT_COMPARED) or text
