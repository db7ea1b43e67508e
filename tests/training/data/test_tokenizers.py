"""Text to ids and back."""

import subprocess
import sys

import pytest

from data_prep import pairs
from data_prep.sources import SAMPLE_ATTRIBUTION, sample_lines
from tests.support.commands import ROOT
from training.base.console import UserError
from training.data.languages import language_of
from training.data.prepared import PARTS, Prepared, open_prepared
from training.data.tokenizers import (
    EOS,
    PAD,
    SEP,
    SOS,
    SPECIALS,
    UNK,
    SentencePieceTokenizer,
    WordTokenizer,
    cut,
    load_tokenizer,
)

CHINESE, ENGLISH = language_of("zh"), language_of("en")
ZH = ["我們喜歡Tom 的貓，你呢？", "“谢谢你的帮助。” “不用谢。”", "他用了１００美元（大約）……", "你有 3 本书吗?"]
EN = ["I don't like Tom's cat; do you?", '"Thanks!" he said.', "It costs $1,000 (about).", "A  hyphen-ated word."]


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> dict[str, Prepared]:
    """A joint and a separate preparation of the sample with each tokenizer."""
    folder = tmp_path_factory.mktemp("sets")
    for kind in ("word", "sentencepiece"):
        for vocabularies in ("joint", "separate"):
            output = folder / f"{kind}-{vocabularies}"
            words = ["--source", "sample", "--output", str(output), "--tokenizer", kind]
            words += ["--vocabulary_size", "600"] if kind == "sentencepiece" else []
            assert pairs.main([*words, "--vocabularies", vocabularies]) == 0
    return {path.name: open_prepared(path) for path in folder.iterdir()}


def pieces(content: bytes | None = None) -> dict[str, SentencePieceTokenizer]:
    texts = [(text, CHINESE) for text in ZH * 3] + [(text, ENGLISH) for text in EN * 3]
    content = content or SentencePieceTokenizer.train(texts, 300)
    return {language: SentencePieceTokenizer(content, language) for language in (CHINESE, ENGLISH)}


def test_special_tokens_have_their_fixed_ids_in_every_vocabulary(sets):
    assert (PAD, SOS, EOS, SEP, UNK) == (0, 1, 2, 3, 4)
    for data in sets.values():
        for tokenizer in (data.source_tokenizer, data.target_tokenizer):
            assert tuple(tokenizer.token_texts(range(5))) == SPECIALS


def test_text_cannot_forge_a_special_token(sets):
    for data in sets.values():
        for tokenizer in (data.source_tokenizer, data.target_tokenizer):
            for special in SPECIALS:
                ids = tokenizer.encode(f"我 {special} you {special}{special}")
                assert not {PAD, SOS, EOS, SEP} & set(ids)


def test_every_prepared_row_has_ids_of_its_own_vocabulary_and_no_special_token(sets):
    for data in sets.values():
        for name in PARTS:
            part = data.part(name)
            sides = ((part.source, data.source_tokenizer), (part.target, data.target_tokenizer))
            for ids, tokenizer in sides:
                assert ids.lengths.min() >= 1
                assert ids.values.min() >= UNK and ids.values.max() < tokenizer.vocabulary_size


def test_joint_vocabulary_is_one_and_separate_ones_are_two(sets):
    for name, data in sets.items():
        assert data.joint_vocabulary == name.endswith("joint")


def test_sentencepiece_gives_back_every_sample_sentence_as_it_was(sets):
    for name in ("sentencepiece-joint", "sentencepiece-separate"):
        source, target = sets[name].source_tokenizer, sets[name].target_tokenizer
        for english, chinese, _ in (line.split("\t") for line in sample_lines()[::7]):
            if UNK not in source.encode(chinese):
                assert source.decode(source.encode(chinese)) == chinese
            assert target.decode(target.encode(english)) == english


def test_sentencepiece_keeps_full_width_punctuation_case_and_single_blanks():
    by_language = pieces()
    for language, texts in ((CHINESE, ZH), (ENGLISH, EN)):
        for text in texts:
            ids = by_language[language].encode(text)
            assert by_language[language].decode(ids) == " ".join(text.split())


def test_sentencepiece_word_is_one_piece_wherever_it_stands_and_chinese_has_no_blank_in_front():
    texts = [("Tom likes Tom.", ENGLISH), ("汤姆喜欢汤姆。", CHINESE)] * 50
    by_language = pieces(SentencePieceTokenizer.train(texts, 100))
    first, _, last, *_ = by_language[ENGLISH].encode("Tom likes Tom.")
    assert first == last
    assert by_language[CHINESE].token_texts(by_language[CHINESE].encode("汤姆"))[0].startswith("汤")


def test_unknown_stays_visible_and_specials_do_not(sets):
    for data in sets.values():
        for tokenizer in (data.source_tokenizer, data.target_tokenizer):
            ids = tokenizer.encode("apple" if tokenizer.language == ENGLISH else "苹果")
            assert "<unk>" in tokenizer.decode([SOS, *ids, UNK, EOS, PAD])
            assert tokenizer.decode([SOS, *ids, SEP, EOS, PAD]) == tokenizer.decode(ids)
            assert len(tokenizer.token_texts([SOS, *ids])) == 1 + len(ids)
            assert tokenizer.decode([]) == ""


def test_words_are_lower_case_without_punctuation_but_with_inner_apostrophes():
    assert cut("I don’t KNOW, o'clock: 'quoted' dogs'!", ENGLISH) == ["i", "don't", "know", "o'clock", "quoted", "dogs"]
    assert cut("我們喜歡Tom Lee的１２隻貓，OK？", CHINESE) == [*"我們喜歡", "tom", "lee", "的", "12", *"隻貓", "ok"]


def test_word_decoding_joins_chinese_without_and_latin_with_blanks():
    content = WordTokenizer.train([("我喜欢Tom Lee的猫。", CHINESE), ("I like Tom.", ENGLISH)], 1)
    chinese, english = WordTokenizer(content, CHINESE), WordTokenizer(content, ENGLISH)
    assert chinese.decode(chinese.encode("我喜欢Tom Lee的猫。")) == "我喜欢tom lee的猫"
    assert english.decode(english.encode("I like Tom.")) == "i like tom"
    assert chinese.encode("Tom") == english.encode("tom!")


def test_text_with_nothing_to_keep_has_one_id_so_that_no_row_is_empty():
    for language in (CHINESE, ENGLISH):
        assert WordTokenizer(WordTokenizer.train([("a", ENGLISH)], 1), language).encode("……！?") == [UNK]
        assert pieces()[language].encode("") == [UNK]


def test_rare_words_become_unknown():
    content = WordTokenizer.train([("a a b", ENGLISH)], min_frequency=2)
    assert WordTokenizer(content, ENGLISH).encode("a b") == [5, UNK]


@pytest.mark.parametrize("kind", ["word", "sentencepiece"])
@pytest.mark.parametrize("vocabularies", ["joint", "separate"])
def test_vocabulary_never_sees_validation_or_test_rows(kind, vocabularies, tmp_path):
    lines = sample_lines()[:400]
    words = ["--source", str(tmp_path / "cmn.txt"), "--tokenizer", kind, "--vocabularies", vocabularies]
    words += ["--vocabulary_size", "400"] if kind == "sentencepiece" else []
    words += ["--output"]
    (tmp_path / "cmn.txt").write_text("\n".join(lines), encoding="utf-8")
    assert pairs.main([*words, str(tmp_path / "plain")]) == 0
    plain = open_prepared(tmp_path / "plain")
    for row in (*plain.part("validation").rows, *plain.part("test").rows):
        lines[row] = f"Zyzzyva qwertz {row}.\t龘靐龘齉 {row}。\t{SAMPLE_ATTRIBUTION}"
    (tmp_path / "cmn.txt").write_text("\n".join(lines), encoding="utf-8")
    assert pairs.main([*words, str(tmp_path / "planted")]) == 0
    planted = open_prepared(tmp_path / "planted")
    assert planted.source_tokenizer.sha256 == plain.source_tokenizer.sha256
    assert planted.target_tokenizer.sha256 == plain.target_tokenizer.sha256
    assert UNK in planted.source_tokenizer.encode("龘")
    assert planted.meta["tokenizer"]["unknown_share"]["test"]["source"] > 0.1


@pytest.mark.parametrize(("kind", "key"), [("word", "vocabulary_size"), ("sentencepiece", "min_frequency")])
def test_option_of_the_other_tokenizer_is_refused_not_ignored(kind, key, tmp_path):
    with pytest.raises(UserError, match=f"{key} has no effect with tokenizer {kind}"):
        pairs.main(["--source", "sample", "--output", str(tmp_path / "x"), "--tokenizer", kind, f"--{key}", "100"])
    assert not (tmp_path / "x").exists()


def test_vocabulary_size_that_does_not_fit_the_text_is_answered(tmp_path, capsys):
    with pytest.raises(UserError, match=r"--vocabulary_size 64 has no room for the \d+ .* pass at least \d+"):
        pairs.main(
            [
                "--source",
                "sample",
                "--output",
                str(tmp_path / "x"),
                "--tokenizer",
                "sentencepiece",
                "--vocabulary_size",
                "64",
            ]
        )
    assert list(tmp_path.iterdir()) == []
    text = "\n".join(sample_lines()[:100])
    (tmp_path / "cmn.txt").write_text(text, encoding="utf-8")
    words = ["--source", str(tmp_path / "cmn.txt"), "--output", str(tmp_path / "x")]
    assert pairs.main([*words, "--tokenizer", "sentencepiece", "--vocabulary_size", "30000"]) == 0
    size = open_prepared(tmp_path / "x").target_tokenizer.vocabulary_size
    assert size < 30_000 and f"only {size:,} pieces" in capsys.readouterr().err


def test_saved_tokenizer_is_the_same_and_a_changed_one_is_refused(sets, tmp_path):
    for name, data in sets.items():
        for tokenizer, text in ((data.source_tokenizer, "我喜欢读书。"), (data.target_tokenizer, "I like books.")):
            folder = tmp_path / name / tokenizer.language.code
            tokenizer.save(folder)
            loaded = load_tokenizer(folder)
            assert (loaded.kind, loaded.sha256, loaded.encode(text)) == (
                tokenizer.kind, tokenizer.sha256, tokenizer.encode(text),
            )  # fmt: skip
    vocabulary = tmp_path / "word-joint/en/vocabulary.txt"
    vocabulary.write_text(vocabulary.read_text(encoding="utf-8") + "more\n", encoding="utf-8")
    with pytest.raises(UserError, match="is not the one that was saved"):
        load_tokenizer(vocabulary.parent)
    with pytest.raises(UserError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)


def test_training_is_the_same_in_another_process(sets):
    program = (
        "import sys; from training.data.tokenizers import *; from training.data.prepared import open_prepared\n"
        "zh, en = language_of('zh'), language_of('en')\n"
        "p = open_prepared(sys.argv[1]).part('train')\n"
        "t = [(x, zh) for x in p.source_texts] + [(x, en) for x in p.target_texts]\n"
        "print(SentencePieceTokenizer(SentencePieceTokenizer.train(t, 600), zh).sha256)\n"
    )
    data = sets["sentencepiece-joint"]
    words = [sys.executable, "-c", program, str(data.folder)]
    told = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    assert told.stdout.strip() == data.source_tokenizer.sha256


def test_sample_corpus_is_distinct_on_both_sides_and_never_taken_for_real(sets):
    pairs = [line.split("\t") for line in sample_lines()]
    assert len(pairs) == 6_000
    assert len({english for english, _, _ in pairs}) == len({chinese for _, chinese, _ in pairs}) == 6_000
    for data in sets.values():
        assert data.meta["synthetic"] is True
        assert "Not real data" in data.meta["source"]["licence"]
