"""Text on its way into HTML and SVG: whatever it holds, it stays text.

Data, options, host names and reasons come from elsewhere. Nothing of theirs may become an element, an attribute or a
character that a browser drops or that UTF-8 cannot write.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence

# What XML or HTML cannot hold: control characters but tab and line feed, half surrogate pairs, non-characters.
_UNWRITABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")


def escaped(value: object) -> str:
    """`value` as text for an element's content or a quoted attribute; what cannot be written becomes U+FFFD."""
    return html.escape(_UNWRITABLE.sub("\ufffd", str(value)))


def isolated(value: object) -> str:
    """`escaped`, and marks in it that turn the direction of writing end with it."""
    return f"<bdi>{escaped(value)}</bdi>"


def number(value: float) -> str:
    """A coordinate, to a hundredth: enough for the eye, and no more bytes than that."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def anchor(title: str) -> str:
    """The id of the section `title`."""
    return re.sub("[^a-z]+", "-", title.lower())


def section(title: str, body: str) -> str:
    """A heading and what stands under it; nothing where there is no body."""
    return f'<section id="{anchor(title)}"><h2>{escaped(title)}</h2>\n{body}</section>' if body else ""


def facts(rows: Iterable[tuple[object, object]]) -> str:
    """A table of names and values."""
    cells = "".join(f"<tr><th>{isolated(name)}</th><td>{isolated(value)}</td></tr>" for name, value in rows)
    return f'<table class="facts">{cells}</table>'


def wide_table(head: Sequence[str], rows: Iterable[Sequence[object]], marked: int | None = None) -> str:
    """A table of many columns, which scrolls in a box of its own where it is wider than the page. marked: a row.

    Whole numbers get commas, others two decimals.
    """
    top = "".join(f"<th>{escaped(name)}</th>" for name in head)
    body = "".join(
        f"<tr{' class=marked' if place == marked else ''}>"
        + "".join(f"<td{'' if isinstance(cell, str) else ' class=number'}>{isolated(_cell(cell))}</td>" for cell in row)
        + "</tr>"
        for place, row in enumerate(rows)
    )
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.2f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
