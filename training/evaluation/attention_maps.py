"""Attention of a GPT as SVG: one sheet per sentence, a panel per layer and head.

Promises: the same input gives the same bytes; tokens are real text, so that Chinese shows wherever the page is read,
whatever fonts the training machine has.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence

import matplotlib
from matplotlib.figure import Figure
from torch import Tensor

CELL_INCHES = 0.14  # a token's row: as high as its label in FONT_POINTS
FONT_POINTS = 7
LABEL_INCHES = 0.75  # room for a label beside its panel
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "relay",
    "font.size": FONT_POINTS,
    # The reader's fonts, not the training machine's: only these names stand in the file.
    "font.sans-serif": ["DejaVu Sans", "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", "sans-serif"],
}


def attention_sheet(maps: Sequence[Tensor], tokens: Sequence[str], separator: int) -> str:
    """SVG of the attention weights `maps`, per layer [heads, T, T], over a sequence of T `tokens`.

    A row is the position that looks, a column what it looks at; the lines at position `separator` part source and
    target. Darker is more, white none, each panel from 0 to 1.
    """
    layers, heads, length = len(maps), maps[0].shape[0], len(tokens)
    panel = length * CELL_INCHES + LABEL_INCHES
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(heads * panel + 0.2, layers * (panel + 0.25)))
        panels = figure.subplots(layers, heads, squeeze=False)
        figure.subplots_adjust(
            left=LABEL_INCHES / figure.get_figwidth(),
            right=1 - 0.2 / figure.get_figwidth(),
            bottom=LABEL_INCHES / figure.get_figheight(),
            top=1 - 0.25 / figure.get_figheight(),
            wspace=LABEL_INCHES / (length * CELL_INCHES),
            hspace=(LABEL_INCHES + 0.25) / (length * CELL_INCHES),
        )
        for layer, weights in enumerate(maps):
            for head in range(heads):
                axes = panels[layer, head]
                # interpolation "none" keeps one pixel per weight in the file, whatever the figure's size
                axes.imshow(weights[head].float().cpu().numpy(), cmap="Blues", vmin=0, vmax=1, interpolation="none")
                axes.set_title(f"layer {layer + 1}, head {head + 1}", pad=3)
                # Tokens are text, never formulas, though one may hold a dollar sign.
                axes.set_xticks(range(length), tokens, rotation=90, parse_math=False)
                axes.set_yticks(range(length), tokens, parse_math=False)
                axes.tick_params(length=0, pad=2)
                axes.axhline(separator - 0.5, color="0.6", linewidth=0.5)
                axes.axvline(separator + 0.5, color="0.6", linewidth=0.5)
        return to_svg(figure)


def to_svg(figure: Figure) -> str:
    """`figure` as an SVG element, without the XML header, date or any address of another file."""
    buffer = io.StringIO()
    with warnings.catch_warnings():
        # The glyphs are looked up only to measure labels; what is shown comes from the reader's fonts.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :].strip() + "\n"
