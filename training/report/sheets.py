"""Attention as pictures: a GPT's sheet has a panel per layer and head, an encoder-decoder's is one alignment.

Promises: the same sheet gives the same bytes; tokens are real text, so that Chinese shows wherever it is read, whatever
fonts the training machine has; the ink is that of the page around it, on dark and on light ground.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import StringConstraints

from training.report.curves import number
from training.report.templates import escaped

CELL = 13  # side of a cell, in the user units that are pixels on a page at its natural size
FONT = 10
SHOWN = 16  # characters of a token; the rest of a longer one shows when it is pointed at
PAD = 4  # between labels and cells
GAP = 14  # between panels
TITLE = 18

# The reader's fonts, not the training machine's: only these names stand in the file.
FAMILIES = "'DejaVu Sans','Noto Sans CJK SC','PingFang SC','Microsoft YaHei',sans-serif"

Corner = tuple[int, int]  # x and y, in cells
Picture = Annotated[str, StringConstraints(pattern="^[A-Za-z0-9+/=]*$")]  # PNG in base64


@dataclass(frozen=True)
class Sheet:
    """A grid of panels, all over the same tokens."""

    panels: Sequence[Sequence[tuple[str, Picture]]]  # a title, and a PNG of a pixel per row and column
    row_tokens: Sequence[str]
    column_tokens: Sequence[str]
    lines: Sequence[tuple[Corner, Corner]] = ()  # from corner to corner, over every panel

    @property
    def _labels(self) -> tuple[float, float]:
        """The room at the left for labels, and the room above the cells for labels and titles."""
        titles = any(title for row in self.panels for title, _ in row)
        left, top = (max(map(_width, tokens), default=0) + PAD for tokens in (self.row_tokens, self.column_tokens))
        return left, top + (TITLE if titles else 0)

    @property
    def _cells(self) -> tuple[int, int]:
        """Width and height of a panel's cells."""
        return len(self.column_tokens) * CELL, len(self.row_tokens) * CELL

    def svg(self) -> str:
        """The sheet as an SVG, a file of its own or a part of a page."""
        (left, top), (width, height) = self._labels, self._cells
        # Every panel has the labels: in a sheet wider than the screen, those at its edge would be out of sight.
        surround = (
            f'<rect width="{width}" height="{height}" fill="none" stroke="currentColor" stroke-opacity=".35"/>'
            + "".join(
                f'<path d="M{x1 * CELL} {y1 * CELL}L{x2 * CELL} {y2 * CELL}" stroke="currentColor" '
                'stroke-opacity=".5"/>'
                for (x1, y1), (x2, y2) in self.lines
            )
            + f'<g text-anchor="end">{_labels(self.row_tokens, -PAD)}</g>'
            f'<g transform="rotate(-90)">{_labels(self.column_tokens, PAD)}</g>'
        )
        # A name of its own: a page has several sheets.
        name = f"labels-{hashlib.sha256(surround.encode()).hexdigest()[:12]}"
        parts = [f'<defs><g id="{name}">{surround}</g></defs>\n']
        for row, line in enumerate(self.panels):
            for column, (title, picture) in enumerate(line):
                x, y = left + column * (left + width + GAP), top + row * (top + height + GAP)
                head = f'<text y="{number(PAD - top + FONT)}" font-weight="bold">{escaped(title)}</text>'
                parts.append(
                    f'<g transform="translate({number(x)},{number(y)})">{head if title else ""}'
                    f'<image width="{width}" height="{height}" preserveAspectRatio="none" '
                    f'image-rendering="pixelated" href="data:image/png;base64,{picture}"/>'
                    f'<use href="#{name}"/></g>\n'
                )
        full_width = max(map(len, self.panels)) * (left + width + GAP) - GAP + 2
        full_height = len(self.panels) * (top + height + GAP) - GAP + 2
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{number(full_width)}" height="{number(full_height)}" '
            f'font-family="{FAMILIES}" font-size="{FONT}" fill="currentColor" stroke-width=".6">\n'
            f"{''.join(parts)}</svg>\n"
        )


def _labels(tokens: Sequence[str], x: float) -> str:
    return "".join(
        f'<text x="{x}" y="{number(_baseline(place))}">{_label(token)}</text>' for place, token in enumerate(tokens)
    )


def _label(token: str) -> str:
    whole = f"<title>{escaped(token)}</title>" if len(token) > SHOWN else ""
    return escaped(_shown(token)) + whole


def _shown(token: str) -> str:
    return token if len(token) <= SHOWN else f"{token[: SHOWN - 1]}…"


def _baseline(place: int) -> float:
    """Where the label of a row or column stands, across the direction of writing."""
    return (place + 0.5) * CELL + 0.35 * FONT


def _width(token: str) -> float:
    """About how wide the label of a token is, generously."""
    shown = _shown(token)
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in shown)
    return FONT * (1.05 * wide + 0.68 * (len(shown) - wide))
