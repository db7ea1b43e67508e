"""What a model attends to, as a sheet of pictures for its report."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from training.report.sheets import Sheet

INK = (37, 114, 235)  # full attention; less lets the ground through, so it suits a dark one as well as a light one


def attention_sheet(maps: Sequence[Tensor], tokens: Sequence[str], separator: int) -> Sheet:
    """The attention weights `maps` of a GPT, per layer [heads, T, T], over a sequence of T `tokens`.

    A row is the position that looks, a column what it looks at; the lines behind position `separator` part source and
    target. Stronger is more, nothing none, each panel from 0 to 1.
    """
    edge, end = separator + 1, len(tokens)
    panels = [
        [(f"layer {layer}, head {head}", _picture(weights)) for head, weights in enumerate(heads, 1)]
        for layer, heads in enumerate(maps, 1)
    ]
    return Sheet(panels, tokens, tokens, [((0, edge), (end, edge)), ((edge, 0), (edge, end))])


def alignment_map(weights: Tensor, source_tokens: Sequence[str], target_tokens: Sequence[str]) -> Sheet:
    """What each target word's step looked at: weights [T, S] over S source tokens, a row per target token."""
    return Sheet([[("", _picture(weights))]], target_tokens, source_tokens)


def _coloured(weights: np.ndarray) -> np.ndarray:
    """The weights [rows, columns] as ink: red, green, blue and opacity, uint8 [rows, columns, 4]."""
    pixels = np.empty((*weights.shape, 4), np.uint8)
    pixels[..., :3] = INK
    pixels[..., 3] = np.rint(255 * np.nan_to_num(weights).clip(0, 1))
    return pixels


def _picture(weights: Tensor) -> str:
    """The weights [rows, columns] as a PNG (ISO/IEC 15948) of one pixel each, in base64."""
    height, width = weights.shape
    pixels = _coloured(weights.detach().float().cpu().numpy())
    lines = b"".join(b"\0" + line.tobytes() for line in pixels)  # 0: the line as it is

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)  # 8 bits each of red, green, blue, opacity
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines, 9)) + chunk(b"IEND", b"")
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + chunks).decode()
