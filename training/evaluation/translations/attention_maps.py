"""Attention as pictures: of a GPT a sheet with a panel per layer and head, of an encoder-decoder one alignment.

Promises: the same input gives the same bytes; in an SVG tokens are real text, so that Chinese shows wherever it is
read, whatever fonts the training machine has; it takes its ink from the page around it, so that it can be read on dark
and on light ground. A PNG needs a font with Chinese, see `chinese_font`.
"""

from __future__ import annotations

import base64
import hashlib
import io
import math
import re
import unicodedata
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from training.base.console import UserError, warn
from training.evaluation.report.markup import escaped, number

if TYPE_CHECKING:
    from matplotlib.ft2font import FT2Font

CELL = 13  # side of a cell, in the user units that are pixels on a page at its natural size
FONT = 10
SHOWN = 16  # characters of a token; in an SVG the rest of a longer one shows when it is pointed at
PAD = 4  # between labels and cells
GAP = 14  # between panels
TITLE = 18
INK = (37, 114, 235)  # full attention; less lets the ground through, so it suits a dark one as well as a light one

# The reader's fonts, not the training machine's: only these names stand in the file.
FAMILIES = "'DejaVu Sans','Noto Sans CJK SC','PingFang SC','Microsoft YaHei',sans-serif"

PNG_SCALE = 2  # pixels of a PNG per user unit
PNG_PIXELS = 25_000_000  # of a larger sheet, which is scaled down to it: four bytes each in memory

Line = tuple[tuple[int, int], tuple[int, int]]


@dataclass(frozen=True)
class Sheet:
    """A grid of panels, each a title and weights [rows, columns] from 0 to 1, all over the same tokens.

    lines: from (x, y) to (x, y) in cells, over every panel.
    """

    panels: Sequence[Sequence[tuple[str, np.ndarray]]]
    row_tokens: Sequence[str]
    column_tokens: Sequence[str]
    lines: Sequence[Line] = ()

    @property
    def _labels(self) -> tuple[float, float]:
        """What labels take at the left, and above the cells with the title, if there are any."""
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
            for column, (title, weights) in enumerate(line):
                x, y = left + column * (left + width + GAP), top + row * (top + height + GAP)
                head = f'<text y="{number(PAD - top + FONT)}" font-weight="bold">{escaped(title)}</text>'
                parts.append(
                    f'<g transform="translate({number(x)},{number(y)})">{head if title else ""}'
                    f'<image width="{width}" height="{height}" preserveAspectRatio="none" '
                    f'style="image-rendering:pixelated" href="data:image/png;base64,{_pixels(weights)}"/>'
                    f'<use href="#{name}"/></g>\n'
                )
        full_width = max(map(len, self.panels)) * (left + width + GAP) - GAP + 2
        full_height = len(self.panels) * (top + height + GAP) - GAP + 2
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{number(full_width)}" height="{number(full_height)}" '
            f'font-family="{FAMILIES}" font-size="{FONT}" fill="currentColor" stroke-width=".6">\n'
            f"{''.join(parts)}</svg>\n"
        )

    def png(self, font: Path) -> bytes:
        """The sheet as a PNG file, black on white. font: as `chinese_font` finds it.

        Labels stand at the edges of the sheet only, where a picture that is seen as a whole has them. What the font
        does not have shows as a box, with a warning.
        """
        # Needed for this alone, and slow to load.
        from matplotlib.collections import LineCollection
        from matplotlib.figure import Figure
        from matplotlib.font_manager import FontProperties

        (left, top), (width, height) = self._labels, self._cells
        across, down = width + GAP, height + TITLE + GAP  # from panel to panel
        full_width = left + max(map(len, self.panels)) * across
        full_height = top + len(self.panels) * down - TITLE
        figure = Figure(figsize=(full_width / 100, full_height / 100))  # a unit is 1/100 inch, a point 1/72
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        text = partial(axes.text, fontproperties=FontProperties(fname=font, size=0.72 * FONT), parse_math=False)
        segments = []
        for row, line in enumerate(self.panels):
            y = top + row * down
            for place, token in enumerate(self.row_tokens):
                text(left - PAD, y + _baseline(place), _shown(token), horizontalalignment="right")
            for column, (title, weights) in enumerate(line):
                x = left + column * across
                axes.imshow(_coloured(weights), extent=(x, x + width, y + height, y), interpolation="nearest")
                text(x, y - PAD if row else FONT + PAD, title)
                segments.append([(x, y), (x + width, y), (x + width, y + height), (x, y + height), (x, y)])
                segments += [[(x + CELL * across, y + CELL * down) for across, down in ends] for ends in self.lines]
        for column in range(max(map(len, self.panels))):
            for place, token in enumerate(self.column_tokens):
                x = left + column * across + _baseline(place)
                text(x, top - PAD, _shown(token), rotation=90, rotation_mode="anchor")
        axes.add_collection(LineCollection(segments, colors="black", alpha=0.5, linewidths=0.4), autolim=False)
        axes.set(xlim=(0, full_width), ylim=(full_height, 0), aspect="auto")
        scale = min(PNG_SCALE, math.sqrt(PNG_PIXELS / (full_width * full_height)))
        file = io.BytesIO()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            figure.savefig(file, format="png", dpi=100 * scale, metadata={"Software": None})
        missing = {code for each in caught for code in re.findall(r"^Glyph (\d+) ", str(each.message))}
        if missing:
            names = ", ".join(f"U+{code:04X}" for code in sorted(map(int, missing)))
            warn(f"{font} has no {names}: boxes stand for them in the PNG; --font FILE names another font")
        return file.getvalue()


def attention_sheet(maps: Sequence[Tensor], tokens: Sequence[str], separator: int) -> Sheet:
    """The attention weights `maps` of a GPT, per layer [heads, T, T], over a sequence of T `tokens`.

    A row is the position that looks, a column what it looks at; the lines behind position `separator` part source and
    target. Stronger is more, nothing none, each panel from 0 to 1.
    """
    edge, end = separator + 1, len(tokens)
    panels = [
        [(f"layer {layer}, head {head}", _array(weights)) for head, weights in enumerate(heads, 1)]
        for layer, heads in enumerate(maps, 1)
    ]
    return Sheet(panels, tokens, tokens, [((0, edge), (end, edge)), ((edge, 0), (edge, end))])


def alignment_map(weights: Tensor, source_tokens: Sequence[str], target_tokens: Sequence[str]) -> Sheet:
    """What each target word's step looked at: weights [T, S] over S source tokens, a row per target token."""
    return Sheet([[("", _array(weights))]], target_tokens, source_tokens)


def chinese_font(named: Path | None = None) -> Path:
    """The font file for PNGs: `named`, else one of those installed with Chinese, a regular one if there is any.

    Raises UserError when it is no font with Chinese, or there is none.
    """
    from matplotlib.font_manager import findSystemFonts

    if named is not None:
        if not named.is_file():
            raise UserError(f"--font {named}: there is no such file; name a .ttf, .otf or .ttc file")
        font = _opened(named)
        if font is None:
            raise UserError(f"--font {named} cannot be read as a font; name a .ttf, .otf or .ttc file")
        if not _chinese_of(font):
            raise UserError(f"--font {named} has no Chinese; name a font that has, or leave --font out to look for one")
        return named
    fonts = {
        path: font for path in findSystemFonts() if (font := _opened(Path(path))) is not None and _chinese_of(font)
    }
    if not fonts:
        raise UserError(
            "--png needs a font with Chinese, and none is installed: install one (apt install fonts-noto-cjk), or name "
            "the file of one with --font FILE; without --png, the SVG files need none"
        )
    return Path(min(fonts, key=lambda path: (-_chinese_of(fonts[path]), fonts[path].style_name != "Regular", path)))


def _opened(path: Path) -> FT2Font | None:
    from matplotlib.ft2font import FT2Font

    try:
        return FT2Font(str(path))
    except (OSError, RuntimeError):
        return None


def _chinese_of(font: FT2Font) -> int:
    """How many of simplified and traditional characters the font has."""
    return sum(font.get_char_index(ord(character)) > 0 for character in "们們")


def _array(weights: Tensor) -> np.ndarray:
    return weights.detach().float().cpu().numpy()


def _coloured(weights: np.ndarray) -> np.ndarray:
    """The weights [rows, columns] as ink: red, green, blue and opacity, uint8 [rows, columns, 4]."""
    pixels = np.empty((*weights.shape, 4), np.uint8)
    pixels[..., :3] = INK
    pixels[..., 3] = np.rint(255 * np.nan_to_num(weights).clip(0, 1))
    return pixels


def _pixels(weights: np.ndarray) -> str:
    """The weights [rows, columns] as a PNG of one pixel each, in base64."""
    from matplotlib.image import imsave

    file = io.BytesIO()
    imsave(file, _coloured(weights), format="png", metadata={"Software": None})
    return base64.b64encode(file.getvalue()).decode()


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
