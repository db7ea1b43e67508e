"""Attention maps: as SVG, for every reader."""

import base64
import re
import struct
import zlib
from xml.etree import ElementTree

import numpy as np
import torch

from training.evaluation.translations.attention_maps import INK, alignment_map, attention_sheet
from training.report.sheets import CELL, SHOWN

HOSTILE = "</text></svg><script>alert(1)</script><img src=x onerror=alert(2)> \" ' & ]]> $x^2$"
SVG = "{http://www.w3.org/2000/svg}"
SOURCE, TARGET = ["我", "是", "医", "生"], ["I", "am", "a", "doctor", "<eos>"]


def weights(heads: int, length: int) -> torch.Tensor:
    """Attention of `heads` heads, [heads, length, length], different in every cell that is not in the future."""
    scores = torch.randn(heads, length, length, generator=torch.Generator().manual_seed(1))
    return torch.softmax(scores.masked_fill(torch.ones(length, length).triu(1) > 0, -torch.inf), -1)


def texts(node: ElementTree.Element) -> list[str]:
    return ["".join(text.itertext()) for text in node.iter(f"{SVG}text")]


def decoded(png: bytes) -> np.ndarray:
    """The picture, [rows, columns, 4], of a file of unfiltered lines."""
    width, height = struct.unpack(">II", png[16:24])
    lines = zlib.decompressobj().decompress(png[png.index(b"IDAT") + 4 :])
    return np.frombuffer(lines, np.uint8).reshape(height, 1 + 4 * width)[:, 1:].reshape(height, width, 4)


def test_a_sheet_has_a_panel_for_every_layer_and_head_with_its_tokens_as_text():
    tokens = ["<sos>", *SOURCE, "<sep>", *TARGET]
    root = ElementTree.fromstring(attention_sheet([weights(3, 11), weights(3, 11)], tokens, 5).svg())
    panels = root.findall(f"{SVG}g")
    expected = [f"layer {layer}, head {head}" for layer in (1, 2) for head in (1, 2, 3)]
    assert [texts(panel) for panel in panels] == [[title] for title in expected]
    # Labels are written down once, and every panel shows them.
    (labels,) = root.findall(f"{SVG}defs/{SVG}g")
    assert texts(labels) == tokens * 2
    for panel in panels:
        assert [use.attrib["href"] for use in panel.iter(f"{SVG}use")] == [f"#{labels.attrib['id']}"]


def test_every_cell_is_as_strong_as_its_weight_a_row_being_what_looks():
    maps = weights(2, 11)
    root = ElementTree.fromstring(attention_sheet([maps], ["x"] * 11, 5).svg())
    for image, expected in zip(root.iter(f"{SVG}image"), maps, strict=True):
        pixels = decoded(base64.b64decode(image.attrib["href"].partition(",")[2]))
        assert pixels.shape == (11, 11, 4)
        assert np.abs(pixels[..., 3] / 255 - expected.numpy()).max() < 0.003
        assert (pixels[..., :3] == INK).all()


def test_lines_part_source_and_target_behind_the_separator():
    svg = attention_sheet([weights(1, 11)], ["x"] * 11, 5).svg()
    assert f'd="M0 {6 * CELL}L{11 * CELL} {6 * CELL}"' in svg and f'd="M{6 * CELL} 0L{6 * CELL} {11 * CELL}"' in svg


def test_an_alignment_has_a_row_per_output_word_and_a_column_per_source_word():
    root = ElementTree.fromstring(alignment_map(torch.rand(5, 4), SOURCE, TARGET).svg())
    rows, columns = root.findall(f"{SVG}defs/{SVG}g/{SVG}g")
    assert rows.attrib["text-anchor"] == "end" and texts(rows) == TARGET
    assert columns.attrib["transform"] == "rotate(-90)" and texts(columns) == SOURCE
    (image,) = root.iter(f"{SVG}image")
    assert (image.attrib["width"], image.attrib["height"]) == (str(4 * CELL), str(5 * CELL))


def test_what_tokens_say_stays_text_and_the_same_sheet_is_the_same_bytes():
    tokens = ["<sos>", "我", HOSTILE, "\x00\ud800", "<sep>"]
    svg = attention_sheet([weights(2, 5)], tokens, 4).svg()
    assert svg == attention_sheet([weights(2, 5)], tokens, 4).svg()
    root = ElementTree.fromstring(svg.encode())
    assert {node.tag.removeprefix(SVG) for node in root.iter()} == {
        *("svg", "defs", "g", "rect", "path", "text", "title", "image", "use")
    }
    assert {"<sos>", "我", "\ufffd\ufffd", "<sep>"} < set(texts(root))
    assert "http" not in svg.replace("http://www.w3.org/2000/svg", "")
    # A long token is cut, and whole when it is pointed at.
    assert HOSTILE in [title.text for title in root.iter(f"{SVG}title")]
    assert any(text.startswith(f"{HOSTILE[: SHOWN - 1]}…") for text in texts(root))


def test_two_sheets_can_stand_in_one_page():
    names = [
        re.findall(r' id="([^"]+)"', alignment_map(torch.rand(1, 2), list(words), ["x"]).svg())
        for words in ("ab", "cd")
    ]
    assert len(names[0]) == len(names[1]) == 1 and names[0] != names[1]


def test_the_sheet_of_a_large_model_is_no_large_file():
    svg = attention_sheet([weights(12, 30)] * 12, ["<sos>", *"我" * 28, "<eos>"], 15).svg()
    assert svg.count("<use ") == 144 and len(svg) < 400_000
