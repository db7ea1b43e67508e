"""What is known of languages, and what follows from it."""

from __future__ import annotations

import re

import pytest
from sacrebleu.metrics import BLEU

from training.data.languages import LANGUAGES, Language, known_language, language_of
from training.data.text import Conversions, clean, has_entity, has_full_width
from training.data.tokenizers import SentencePieceTokenizer, WordTokenizer, cut


def test_a_language_has_one_code_and_its_other_names_are_of_no_other():
    names = [name for each in LANGUAGES for name in {each.code, *each.aliases, each.name.lower()}]
    assert len(names) == len(set(names))
    assert all(re.fullmatch("[a-z]{2,3}", language.code) for language in LANGUAGES)
    assert {language.bleu for language in LANGUAGES} <= set(BLEU.TOKENIZERS)
    for language in LANGUAGES:
        re.compile(f"[{language.script}]")


@pytest.mark.parametrize("name", ["zh cmn", "zh zho", "fr fra", "zh zh-CN", "en en_US", "th Thai", "en EN", "no nb"])
def test_other_codes_and_names_are_taken_for_the_language(name: str):
    code, other = name.split()
    assert language_of(other) == language_of(code)


def test_an_unknown_language_has_blanks_and_13a_and_no_script():
    assert language_of("tlh") == Language("tlh", "tlh") and known_language("tlh") is None
    assert language_of("tlh").blanks and language_of("tlh").bleu == "13a"
    assert language_of("tlh").shares_script(language_of("zh"))
    for name, near in (("frennch", "french"), ("x", ""), ("12", ""), ("", "")):
        with pytest.raises(ValueError, match=f"ISO 639.*{near}"):
            language_of(name)
    with pytest.raises(ValueError, match="cn is a country; its language has the code zh"):
        language_of("cn")


def test_languages_that_are_written_alike_are_not_told_by_script():
    alike = [("zh", "ja"), ("en", "fr"), ("ru", "uk"), ("sr", "en"), ("sr", "ru"), ("ar", "fa")]
    apart = [("zh", "en"), ("ja", "ko"), ("th", "lo"), ("ru", "el"), ("ar", "he"), ("hi", "bn")]
    for pairs, shares in ((alike, True), (apart, False)):
        for first, second in pairs:
            assert language_of(first).shares_script(language_of(second)) is shares, (first, second)


WITHOUT_BLANKS = {
    "zh": "他用电脑",
    "ja": "猫がいます",
    "th": "ฉันชอบแมว",
    "lo": "ຂ້ອຍມັກແມວ",
    "km": "ខ្ញុំចូលចិត្តឆ្មា",
    "my": "ကျွန်တော်ကြောင်",
}


@pytest.mark.parametrize("code", WITHOUT_BLANKS)
def test_languages_without_blanks_are_cut_into_characters_and_joined_without(code: str):
    text = WITHOUT_BLANKS[code]
    language = language_of(code)
    words = cut(f"{text}。 Linux 5!", language)
    assert words == [*text, "linux", "5"]
    tokenizer = WordTokenizer(WordTokenizer.train([(text, language), ("Linux 5", language)], 1), language)
    assert tokenizer.decode(tokenizer.encode(f"{text} Linux 5")) == "".join(cut(text, language)) + "linux 5"
    pieces = SentencePieceTokenizer(SentencePieceTokenizer.train([(text, language)] * 9, 120), language)
    assert pieces.decode(pieces.encode(text)) == text and not pieces.token_texts(pieces.encode(text))[0].startswith("▁")


def test_what_nobody_sees_is_cleaned_and_what_words_need_stays():
    assert clean("\u200e\u2060a\u00adb\x00\u200f \u202bc\u202c\u2066\u2069\ufeff") == "ab c"
    assert clean("می\u200cخواهم क्\u200dष 👩\u200d🚀") == "می\u200cخواهم क्\u200dष 👩\u200d🚀"


def test_conversions_are_done_on_request_and_to_their_language_alone():
    zh, ja = language_of("zh"), language_of("ja")
    text = " &quot;經驗&quot; Ａ１，AT&T &nosuch; "
    assert Conversions().apply(text, zh) == "&quot;經驗&quot; Ａ１，AT&T &nosuch;"
    every = Conversions(simplify=True, unescape=True, narrow=True)
    assert every.apply(text, zh) == '"经验" A1，AT&T &nosuch;' and every.apply(text, ja) == '"經驗" A1，AT&T &nosuch;'
    assert Conversions.of({"simplify": True, "split": "random"}) == Conversions(simplify=True)
    assert has_entity(text) and not has_entity("AT&T; &nosuch; R&D")
    assert has_full_width(text) and not has_full_width("，。「」 A1")
