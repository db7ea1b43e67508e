"""What has to be known of a language to clean, compare, cut, join and score its sentences: one table.

A language that is not in it works as well: its words are parted by blanks, its BLEU is that of 13a, and nobody can tell
by its script which column of a file it is.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator

# Scripts, each as it stands inside [...] of a regular expression. Those of languages without blanks hold letters and
# marks only, no punctuation and no digits, since a word tokenizer takes each of their characters as a word.
HAN = "\u3005\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"  # with 々 and 〇
KANA = "\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff"
THAI = "\u0e01-\u0e3a\u0e40-\u0e4e"
LAO = "\u0e81-\u0ebd\u0ec0-\u0ecd\u0edc-\u0edf"
KHMER = "\u1780-\u17d3\u17d7\u17dc\u17dd"
MYANMAR = "\u1000-\u103f\u1050-\u108f\u109a-\u109d\ua9e0-\ua9ef\ua9fa-\ua9fe\uaa60-\uaa76\uaa7a-\uaa7f"
LATIN = "A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u1e00-\u1eff"
CYRILLIC = "\u0400-\u052f\u1c80-\u1c88"
GREEK = "\u0370-\u03ff\u1f00-\u1fff"
ARABIC = "\u0600-\u06ff\u0750-\u077f\u08a0-\u08ff\ufb50-\ufdff\ufe70-\ufefc"
HEBREW = "\u0590-\u05ff\ufb1d-\ufb4f"
HANGUL = "\u1100-\u11ff\u3130-\u318f\uac00-\ud7a3"
DEVANAGARI = "\u0900-\u097f"


@dataclass(frozen=True)
class Language:
    """A language; `script` is "" where it is not known."""

    code: str  # of ISO 639: two letters where there are two
    name: str  # in English
    aliases: tuple[str, ...] = ()  # codes of three letters, manythings.org's first
    script: str = ""
    blanks: bool = True  # whether they part its words
    right_to_left: bool = False
    variants: bool = False  # whether it is written in traditional and in simplified characters
    bleu: str = "13a"  # sacrebleu's tokenizer
    headings: tuple[str, ...] = ()  # what a heading may call it besides, in lower case

    def __str__(self) -> str:
        return self.name

    @property
    def direction(self) -> str:
        """What HTML calls it."""
        return "rtl" if self.right_to_left else "ltr"

    def shares_script(self, other: Language) -> bool:
        """Whether a text of one may look like one of the other; true where a script is not known."""
        if not self.script or not other.script:
            return True
        ours, theirs = _ranges(self.script), _ranges(other.script)
        return any(first <= end and begin <= last for first, last in ours for begin, end in theirs)


def _ranges(script: str) -> list[tuple[str, str]]:
    """The first and last character of each range of a script."""
    return [(found[0][0], found[0][-1]) for found in re.finditer("(?s).-.|.", script)]


LANGUAGES = (
    Language(
        "zh",
        "Chinese",
        ("cmn", "zho", "chi"),
        HAN,
        blanks=False,
        variants=True,
        bleu="zh",
        headings=("中文", "汉语", "漢語", "mandarin", "cn"),
    ),
    Language("en", "English", ("eng",), LATIN, headings=("英文", "英语", "英語", "anglais", "englisch", "inglés")),
    Language("ja", "Japanese", ("jpn",), HAN + KANA, blanks=False, bleu="ja-mecab", headings=("日本語",)),
    Language("ko", "Korean", ("kor",), HANGUL, bleu="ko-mecab", headings=("한국어",)),
    Language("yue", "Cantonese", (), HAN, blanks=False, bleu="zh"),
    Language("th", "Thai", ("tha",), THAI, blanks=False, bleu="char"),
    Language("lo", "Lao", ("lao",), LAO, blanks=False, bleu="char"),
    Language("km", "Khmer", ("khm",), KHMER, blanks=False, bleu="char"),
    Language("my", "Burmese", ("mya", "bur"), MYANMAR, blanks=False, bleu="char"),
    Language("ar", "Arabic", ("ara",), ARABIC, right_to_left=True, headings=("العربية",)),
    Language("fa", "Persian", ("pes", "fas", "per"), ARABIC, right_to_left=True),
    Language("ur", "Urdu", ("urd",), ARABIC, right_to_left=True),
    Language("ug", "Uyghur", ("uig",), ARABIC, right_to_left=True),
    Language("ps", "Pashto", ("pus",), ARABIC, right_to_left=True),
    Language("he", "Hebrew", ("heb",), HEBREW, right_to_left=True),
    Language("yi", "Yiddish", ("yid",), HEBREW, right_to_left=True),
    Language("ru", "Russian", ("rus",), CYRILLIC, headings=("русский",)),
    Language("uk", "Ukrainian", ("ukr",), CYRILLIC),
    Language("be", "Belarusian", ("bel",), CYRILLIC),
    Language("bg", "Bulgarian", ("bul",), CYRILLIC),
    Language("mk", "Macedonian", ("mkd", "mac"), CYRILLIC),
    Language("sr", "Serbian", ("srp",), CYRILLIC + LATIN),
    Language("kk", "Kazakh", ("kaz",), CYRILLIC),
    Language("mn", "Mongolian", ("mon", "khk"), CYRILLIC + "\u1800-\u18af"),
    Language("el", "Greek", ("ell", "gre"), GREEK),
    Language("hi", "Hindi", ("hin",), DEVANAGARI),
    Language("mr", "Marathi", ("mar",), DEVANAGARI),
    Language("ne", "Nepali", ("nep", "npi"), DEVANAGARI),
    Language("bn", "Bengali", ("ben",), "\u0980-\u09ff"),
    Language("pa", "Punjabi", ("pan",), "\u0a00-\u0a7f"),
    Language("gu", "Gujarati", ("guj",), "\u0a80-\u0aff"),
    Language("ta", "Tamil", ("tam",), "\u0b80-\u0bff"),
    Language("te", "Telugu", ("tel",), "\u0c00-\u0c7f"),
    Language("kn", "Kannada", ("kan",), "\u0c80-\u0cff"),
    Language("ml", "Malayalam", ("mal",), "\u0d00-\u0d7f"),
    Language("si", "Sinhala", ("sin",), "\u0d80-\u0dff"),
    Language("ka", "Georgian", ("kat", "geo"), "\u10a0-\u10ff\u1c90-\u1cbf"),
    Language("hy", "Armenian", ("hye", "arm"), "\u0530-\u058f\ufb13-\ufb17"),
    Language("am", "Amharic", ("amh",), "\u1200-\u139f\u2d80-\u2ddf"),
    Language("fr", "French", ("fra", "fre"), LATIN, headings=("français",)),
    Language("de", "German", ("deu", "ger"), LATIN, headings=("deutsch",)),
    Language("es", "Spanish", ("spa",), LATIN, headings=("español",)),
    *(
        Language(code, name, tuple(aliases.split()), LATIN)
        for code, name, aliases in (
            ("it", "Italian", "ita"),
            ("pt", "Portuguese", "por"),
            ("nl", "Dutch", "nld dut"),
            ("sv", "Swedish", "swe"),
            ("da", "Danish", "dan"),
            ("nb", "Norwegian", "nob nor no"),
            ("fi", "Finnish", "fin"),
            ("is", "Icelandic", "isl ice"),
            ("pl", "Polish", "pol"),
            ("cs", "Czech", "ces cze"),
            ("sk", "Slovak", "slk slo"),
            ("sl", "Slovenian", "slv"),
            ("hr", "Croatian", "hrv"),
            ("bs", "Bosnian", "bos"),
            ("hu", "Hungarian", "hun"),
            ("ro", "Romanian", "ron rum"),
            ("sq", "Albanian", "sqi alb"),
            ("lt", "Lithuanian", "lit"),
            ("lv", "Latvian", "lvs lav"),
            ("et", "Estonian", "est ekk"),
            ("tr", "Turkish", "tur"),
            ("az", "Azerbaijani", "aze"),
            ("uz", "Uzbek", "uzb"),
            ("vi", "Vietnamese", "vie"),
            ("id", "Indonesian", "ind"),
            ("ms", "Malay", "zsm msa may"),
            ("tl", "Tagalog", "tgl fil"),
            ("sw", "Swahili", "swh swa"),
            ("af", "Afrikaans", "afr"),
            ("ca", "Catalan", "cat"),
            ("gl", "Galician", "glg"),
            ("eu", "Basque", "eus baq"),
            ("ga", "Irish", "gle"),
            ("cy", "Welsh", "cym wel"),
            ("eo", "Esperanto", "epo"),
            ("la", "Latin", "lat"),
        )
    ),
)

_BY_NAME = {
    name: language for language in LANGUAGES for name in (language.code, *language.aliases, language.name.lower())
}


def known_language(name: str) -> Language | None:
    """The language of the table that is called so: by its code, an alias or its English name, in any case."""
    found = _BY_NAME.get(name.lower())
    return found or _BY_NAME.get(re.split("[-_]", name.lower())[0])


def codes_called(word: str) -> set[str]:
    """The codes of the languages that a word of a heading names: by code, alias, name, or as their speakers do."""
    known = known_language(word)
    return {each.code for each in LANGUAGES if each is known or word.lower() in each.headings}


# Codes of countries that are no language's, and are often taken for one.
_COUNTRIES = {"cn": "zh", "jp": "ja", "kr": "ko", "cz": "cs", "ua": "uk", "gr": "el", "vn": "vi", "dk": "da"}


def language_of(code: str) -> Language:
    """The language with this code, alias or English name. Raises ValueError for what is none of them and no code."""
    found = known_language(code)
    if found is not None:
        return found
    if code in _COUNTRIES:
        raise ValueError(f"{code} is a country; its language has the code {_COUNTRIES[code]}")
    if not re.fullmatch("[a-z]{2,3}", code):
        near = difflib.get_close_matches(code.lower(), _BY_NAME, n=1)
        raise ValueError(
            "a language is named by its code in ISO 639, of two or three letters, as in zh or fr"
            + (f" (nearest: {near[0]})" if near else "")
        )
    return Language(code, code)


# The code of a language, as an option; any alias is taken for it.
LanguageCode = Annotated[str, AfterValidator(lambda name: language_of(name).code)]
