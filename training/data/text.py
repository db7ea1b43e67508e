"""What is done to the characters of a sentence: cleaning, conversions on request, and what counts as the same."""

from __future__ import annotations

import codecs
import html
import re
import shlex
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.data.languages import Language

if TYPE_CHECKING:
    import opencc

# Inside [...] of a regular expression: what nobody sees in a sentence and no word needs. Blanks without width, marks of
# byte order and of direction, soft hyphens, control characters; not the joiners that Persian, Hindi and emoji need.
INVISIBLE = "\x00-\x08\x0e-\x1b\x7f\xad\u200b\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff"

_INVISIBLE = re.compile(f"[{INVISIBLE}]")
_ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")
_FULL_WIDTH = {
    code: code - 0xFEE0 for start, end in ("０９", "ＡＺ", "ａｚ") for code in range(ord(start), ord(end) + 1)
}
_IS_FULL_WIDTH = re.compile("[０-９Ａ-Ｚａ-ｚ]")

_NOT_COMPARED = ("P", "S", "Z", "C")  # Unicode categories: punctuation, symbols, blanks, control characters


def split_lines(parts: Iterable[bytes]) -> Iterator[bytes]:
    """The lines of a UTF-8 text without their ends: LF, CRLF or CR. No part ends between a CR and its LF.

    What else Unicode calls the end of a line (U+2028, U+0085, a form feed) stands inside sentences.
    """
    for part in parts:
        yield from part.splitlines()  # of bytes: at these three only


def in_utf8(path: Path) -> str:
    """What the file at `path` may be called once it was converted, as a shell reads it."""
    return shlex.quote(f"{path.stem}-utf8{path.suffix}".lstrip("-"))


def encoding_advice(content: bytes, path: Path) -> str:
    """What to do about the file at `path`, which holds `content` and is not UTF-8; `-` is standard input."""
    place = f"{shlex.quote(str(path))} > {in_utf8(path)}"
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return f"it looks like UTF-16: convert it with `iconv -f UTF-16 -t UTF-8 {place}`"
    try:
        codecs.getincrementaldecoder("gb18030")().decode(content)  # the content may end within a character
    except UnicodeDecodeError:
        return (
            "save it as UTF-8 (`iconv -f ITS-ENCODING -t UTF-8` converts a text; `iconv -l` lists encodings), or "
            "fetch it again"
        )
    return (
        f"it looks like GBK: convert it with `iconv -f GB18030 -t UTF-8 {place}`, with `-f BIG5` if that "
        "gives other characters"
    )


def clean(text: str) -> str:
    """`text` without what is `INVISIBLE`, every run of blanks as one space, trimmed."""
    return " ".join(_INVISIBLE.sub("", text).split())


@dataclass(frozen=True)
class Conversions:
    """What is done to clean sentences on request; a model's input is treated as its training data was."""

    simplify: bool = False
    unescape: bool = False
    narrow: bool = False

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Conversions:
        """Those that the options of a prepared data set name."""
        return cls(**{name: bool(options.get(name)) for name in ("simplify", "unescape", "narrow")})

    def apply(self, text: str, language: Language) -> str:
        """The sentence, cleaned and converted."""
        if self.unescape:
            text = _ENTITY.sub(lambda found: html.unescape(found[0]), text)
        text = clean(text)
        if self.narrow:
            text = text.translate(_FULL_WIDTH)
        return simplify(text) if self.simplify and language.variants else text


def has_entity(text: str) -> bool:
    """Whether a character of the text is written as HTML writes it, as in `&quot;`."""
    return any(html.unescape(found) != found for found in _ENTITY.findall(text))


def has_full_width(text: str) -> bool:
    """Whether the text has full-width Latin letters or digits."""
    return _IS_FULL_WIDTH.search(text) is not None


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


class _Compared(dict[int, int | None]):
    """Characters that are compared, by their codes; None for the others. Each is looked up in Unicode's tables once."""

    def __missing__(self, code: int) -> int | None:
        compared = unicodedata.category(chr(code))[0] not in _NOT_COMPARED
        return self.setdefault(code, code if compared else None)


_compared = _Compared()


def normalise(text: str, language: Language) -> str:
    """`text` as it is compared for sameness: NFKC, case folded, without punctuation and blanks; Chinese simplified.

    A text of nothing but punctuation is compared as it stands; otherwise all of those would be one sentence.
    """
    # Folding can undo NFKC (and the other way round), so it is applied on both sides, as Unicode advises.
    folded = nfkc(nfkc(simplify(text) if language.variants else text).casefold())
    return folded.translate(_compared) or text
