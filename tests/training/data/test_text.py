"""What is done to the characters of a sentence, whoever wrote it."""

from __future__ import annotations

import random
import unicodedata

import pytest

from tests.support.growth import assert_linear
from training.data import text
from training.data.languages import language_of
from training.data.text import clean, nfkc, normalise
from training.data.tokenizers import cut

ZH, EN = language_of("zh"), language_of("en")
CHARACTERS = [char for number in range(0x110000) if unicodedata.category(char := chr(number)) not in ("Cs", "Cn")]
MARKS = [char for char in CHARACTERS if unicodedata.combining(unicodedata.normalize("NFKD", char)[0])]


def test_the_normal_form_is_unicodes_own_however_many_marks_stand_on_a_letter():
    dice = random.Random(1)
    for _ in range(1000):
        parts = (dice.choices(of, k=dice.randint(0, most)) for of, most in ((CHARACTERS, 3), (MARKS, 90)) * 2)
        written = "".join(char for part in parts for char in part)
        assert nfkc(written) == unicodedata.normalize("NFKC", written), ascii(written)


def test_every_mark_is_known_as_one():
    assert len(MARKS) > 900 and not [ascii(mark) for mark in MARKS if not text._MANY_MARKS.fullmatch(mark * 32)]


@pytest.mark.parametrize("piece", ["\u0301\u0323", "\u0f73", "ﾞ\u0301", "a", " ", "。", "ﷺ", "a'", "ß", "\u200b "])
def test_the_time_for_a_text_grows_as_its_length(piece):
    normalise("", ZH)  # loads what it needs
    for read in (nfkc, lambda said: normalise(said, ZH), clean, lambda said: cut(said, EN), lambda said: cut(said, ZH)):
        assert_linear(read, piece, begin="a")
