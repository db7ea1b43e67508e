"""Attention maps: as SVG for every reader, as PNG where it is asked for and a font is found."""

import base64
import io
import re
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from matplotlib.image import imread

from training.base.console import UserError
from training.evaluation.translations import attention_maps
from training.evaluation.translations.attention_maps import (
    CELL,
    INK,
    SHOWN,
    alignment_map,
    attention_sheet,
    chinese_font,
)

HOSTILE = "</text></svg><script>alert(1)</script><img src=x onerror=alert(2)> \" ' & ]]> $x^2$"
SVG = "{http://www.w3.org/2000/svg}"
NO_CHINESE = Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")
SOURCE, TARGET = ["我", "是", "医", "生"], ["I", "am", "a", "doctor", "<eos>"]


def weights(heads: int, length: int) -> torch.Tensor:
    """Attention of `heads` heads, [heads, length, length], different in every cell that is not in the future."""
    scores = torch.randn(heads, length, length, generator=torch.Generator().manual_seed(1))
    return torch.softmax(scores.masked_fill(torch.ones(length, length).triu(1) > 0, -torch.inf), -1)


def texts(node: ElementTree.Element) -> list[str]:
    return ["".join(text.itertext()) for text in node.iter(f"{SVG}text")]


def make_font(path: Path, characters: str, style: str = "Regular") -> Path:
    """A font file with a box for each of `characters`, and for what it lacks."""
    pen = TTGlyphPen(None)
    pen.moveTo((100, 0))
    for corner in ((100, 700), (800, 700), (800, 0)):
        pen.lineTo(corner)
    pen.closePath()
    box, names = pen.glyph(), {ord(character): f"u{ord(character):04X}" for character in characters}
    font = FontBuilder(1000)
    font.setupGlyphOrder([".notdef", *names.values()])
    font.setupCharacterMap(names)
    font.setupGlyf(dict.fromkeys([".notdef", *names.values()], box))
    font.setupHorizontalMetrics(dict.fromkeys([".notdef", *names.values()], (900, 100)))
    font.setupHorizontalHeader(ascent=800, descent=-200)
    font.setupNameTable({"familyName": path.stem, "styleName": style})
    font.setupOS2()
    font.setupPost()
    font.save(path)
    return path


@pytest.fixture
def font(tmp_path) -> Path:
    return make_font(tmp_path / "chinese.ttf", "们們" + "".join(map(chr, range(32, 127))) + "".join(SOURCE))


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
        pixels = imread(io.BytesIO(base64.b64decode(image.attrib["href"].partition(",")[2])))
        assert pixels.shape == (11, 11, 4)
        assert np.abs(pixels[..., 3] - expected.numpy()).max() < 0.003
        assert np.allclose(pixels[..., :3] * 255, INK)


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


def test_a_png_is_the_same_picture(font, recwarn):
    eye = torch.eye(5)[None]
    sheet = attention_sheet([eye, eye], ["<sos>", "我", "<sep>", "I", "$x^2$"], 2)
    png = sheet.png(font)
    assert png == sheet.png(font) and not recwarn.list
    pixels = np.rint(255 * imread(io.BytesIO(png))[..., :3]).astype(int)
    full = (np.abs(pixels - INK).max(axis=-1) < 3).sum()
    cell = (CELL * attention_maps.PNG_SCALE) ** 2
    assert full == pytest.approx(2 * 5 * cell, rel=0.1)
    assert tuple(pixels[-1, -1]) == (255, 255, 255)


def test_a_large_png_is_scaled_down_to_what_memory_holds(font, monkeypatch):
    monkeypatch.setattr(attention_maps, "PNG_PIXELS", 10_000)
    pixels = imread(io.BytesIO(alignment_map(torch.rand(5, 4), SOURCE, TARGET).png(font)))
    assert 9_000 < pixels.shape[0] * pixels.shape[1] <= 10_500


def test_a_character_that_the_font_lacks_is_named_and_stops_nothing(font, capsys):
    assert alignment_map(torch.rand(1, 2), ["我", "龘"], ["I"]).png(font).startswith(b"\x89PNG")
    assert "chinese.ttf has no U+9F98: boxes stand for them" in capsys.readouterr().err


def test_a_font_that_will_not_do_is_refused_with_the_reason(tmp_path):
    torn = tmp_path / "torn.ttf"
    torn.write_bytes(NO_CHINESE.read_bytes()[:1000])
    for path, answer in (
        (tmp_path / "none.ttf", "none.ttf: there is no such file"),
        (torn, "torn.ttf cannot be read as a font"),
        (NO_CHINESE, "DejaVuSans.ttf has no Chinese"),
    ):
        with pytest.raises(UserError, match=answer):
            chinese_font(path)


def test_a_font_with_chinese_is_found_a_regular_one_first(tmp_path, monkeypatch, font):
    bold = make_font(tmp_path / "a.ttf", "们們", "Bold")
    traditional = make_font(tmp_path / "b.ttf", "們")
    installed = [str(NO_CHINESE), str(tmp_path / "gone.ttf"), str(bold), str(traditional), str(font)]
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: installed)
    assert chinese_font() == font == chinese_font(font)
    for better, expected in ((font, bold), (bold, traditional)):
        installed.remove(str(better))
        assert chinese_font() == expected
    installed.remove(str(traditional))
    with pytest.raises(UserError, match=r"none is installed: install one .* with --font FILE"):
        chinese_font()
