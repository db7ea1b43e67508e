"""Text to ids and back: words, or characters where no blanks part words; or sentencepiece.

A tokenizer belongs to one side and its language, since languages are cut and joined differently; with a joint
vocabulary the two sides share their ids, and their `sha256`. Ids 0-4 are the special tokens on every vocabulary, and no
text can produce `<pad>`, `<sos>`, `<eos>` or `<sep>`.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import unicodedata
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import chain
from pathlib import Path

import sentencepiece

from training.base.console import UserError
from training.base.files import read_json, read_plain, write_atomically
from training.data.languages import Language, language_of
from training.data.text import nfkc

PAD, SOS, EOS, SEP, UNK = range(5)
SPECIALS = ("<pad>", "<sos>", "<eos>", "<sep>", "<unk>")

# The rarest characters, one in ten thousand, become <unk>: a model that never met <unk> in training does not know what
# to do with characters that it first meets in a test.
CHARACTER_COVERAGE = 0.9999

# sentencepiece leaves a line out of the vocabulary that is longer than this, in bytes, or has this character in it.
LONGEST_LINE, RESERVED = 4192, "\u2585"

# Marks that choose between forms of a character, and so are no part of a word.
_SELECTORS = range(0xFE00, 0xFE10)


class Tokenizer(ABC):
    """What every tokenizer does for its `language`; `kind` says how it cuts."""

    kind: str
    file_name: str  # of the vocabulary in the saved folder

    def __init__(self, content: bytes, language: Language):
        self.language = language
        self._content = content

    @property
    def sha256(self) -> str:
        """Identity of the vocabulary: equal ids mean equal tokens if and only if this is equal."""
        return hashlib.sha256(self._content).hexdigest()

    @property
    @abstractmethod
    def vocabulary_size(self) -> int:
        """Number of ids, special tokens included."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of `text` without special tokens around it; at least one (`UNK` for a text with nothing to keep)."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Plain text of `ids`; special tokens are left out, except `<unk>`, which stays visible."""

    @abstractmethod
    def token_texts(self, ids: Iterable[int]) -> list[str]:
        """One label for each id, special tokens included, as an axis of an attention map shows them."""

    def save(self, folder: Path) -> None:
        """Writes the tokenizer to `folder`, which `load_tokenizer` reads."""
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / self.file_name, self._content)
        about = {"kind": self.kind, "language": self.language.code, "sha256": self.sha256}
        write_atomically(folder / "tokenizer.json", json.dumps(about, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path, language: Language) -> Tokenizer:
        """The tokenizer of this kind that `save` wrote to `folder`."""
        return cls(read_plain(folder / cls.file_name), language)


class WordTokenizer(Tokenizer):
    """Lower-case words without punctuation; of a language without blanks, characters of its script and other words."""

    kind = "word"
    file_name = "vocabulary.txt"  # one token per line, the line number is the id

    def __init__(self, content: bytes, language: Language):
        super().__init__(content, language)
        self._tokens = content.decode("utf-8").split("\n")[:-1]
        self._ids = {token: number for number, token in enumerate(self._tokens)}

    @classmethod
    def train(cls, texts: Iterable[tuple[str, Language]], min_frequency: int) -> bytes:
        """The vocabulary of `texts`: tokens that occur at least `min_frequency` times, the most frequent first."""
        counts = Counter(chain.from_iterable(cut(text, language) for text, language in texts))
        kept = sorted(
            (token for token, count in counts.items() if count >= min_frequency), key=lambda t: (-counts[t], t)
        )
        return "".join(f"{token}\n" for token in (*SPECIALS, *kept)).encode()

    @property
    def vocabulary_size(self) -> int:
        return len(self._tokens)

    def encode(self, text: str) -> list[int]:
        # The special tokens cannot be looked up by accident: no word contains < or >.
        return [self._ids.get(token, UNK) for token in cut(text, self.language)] or [UNK]

    def decode(self, ids: Iterable[int]) -> str:
        words = [self._tokens[number] for number in ids if number >= UNK]
        if self.language.blanks:
            return " ".join(words)
        own = re.compile(f"[{self.language.script}]")
        text = ""
        for word in words:
            # Two Latin words in a row need a blank between them, characters of the language's script never do.
            apart = text and not own.match(text[-1]) and not own.match(word)
            text += f" {word}" if apart else word
        return text

    def token_texts(self, ids: Iterable[int]) -> list[str]:
        return [self._tokens[number] for number in ids]


def cut(text: str, language: Language) -> list[str]:
    """The words of a text, those without blanks in characters of their script; punctuation is dropped."""
    # NFKC makes full-width letters and digits ordinary ones; the typographic apostrophe is not its business.
    return _words(language).findall(nfkc(text).replace("’", "'").lower())


@cache
def _words(language: Language) -> re.Pattern[str]:
    if not language.blanks:
        return re.compile(rf"[{language.script}]|[^\W_{language.script}]+")
    # Marks that stand for vowels are no letters to Python, nor are the joiners within Persian and Indic words. Runs are
    # taken whole, so that a word is looked at once.
    word = rf"(?:[^\W_]++[{word_marks()}]*+)++"
    return re.compile(f"{word}(?:'{word})*+")


@cache
def word_marks() -> str:
    """The characters within a word that are neither letters nor digits, as inside [...] of a regular expression."""
    marks = (chr(code) for code in range(0x300, 0x1F000) if code not in _SELECTORS)
    return "\u200c\u200d" + "".join(mark for mark in marks if unicodedata.category(mark) in ("Mn", "Mc"))


class TooManyCharacters(UserError):
    """A vocabulary has no room for the characters of its text. advised_size: one that has."""

    advised_size: int  # no __init__ sets it: an exception with one of its own does not pass between processes


class SentencePieceTokenizer(Tokenizer):
    """Byte-pair pieces by sentencepiece; decoding gives the text back as it was, character by character."""

    kind = "sentencepiece"
    file_name = "sentencepiece.model"

    def __init__(self, content: bytes, language: Language):
        super().__init__(content, language)
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=content)

    @classmethod
    def train(cls, texts: Iterable[tuple[str, Language]], vocabulary_size: int) -> bytes:
        """A model of at most `vocabulary_size` pieces. Raises UserError when that is below the number of characters.

        BPE rather than unigram: its statistics are whole numbers, so the model is the same on every machine, while
        unigram's depends on the order in which threads add floating-point numbers.
        """
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=chain.from_iterable(_lines(_spaced(text, language)) for text, language in texts),
                model_writer=model,
                model_type="bpe",
                vocab_size=vocabulary_size,
                hard_vocab_limit=False,
                character_coverage=CHARACTER_COVERAGE,
                # Identity, because NFKC would turn full-width Chinese punctuation into ASCII, and blanks are ours
                # (`_spaced`): a dummy prefix on every sentence would split words without blanks into two forms.
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                add_dummy_prefix=False,
                pad_id=PAD,
                bos_id=SOS,
                eos_id=EOS,
                unk_id=UNK,
                pad_piece=SPECIALS[PAD],
                bos_piece=SPECIALS[SOS],
                eos_piece=SPECIALS[EOS],
                unk_piece=SPECIALS[UNK],
                unk_surface=SPECIALS[UNK],
                control_symbols=[SPECIALS[SEP]],  # takes the free id 3; a control symbol is never read from text
                minloglevel=2,
            )
        except RuntimeError as error:
            needed = re.search(r"required_chars\. \d+ vs (\d+)", str(error))
            if not needed:
                raise
            advised_size = int(needed[1]) * 2
            refusal = TooManyCharacters(
                f"--vocabulary_size {vocabulary_size} has no room for the {needed[1]} characters of the training text; "
                f"pass at least {advised_size}"
            )
            refusal.advised_size = advised_size
            raise refusal from None
        return model.getvalue()

    @property
    def vocabulary_size(self) -> int:
        return self._processor.vocab_size()

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(_spaced(text, self.language)) or [UNK]

    def decode(self, ids: Iterable[int]) -> str:
        text: str = self._processor.decode([int(number) for number in ids])
        return text.strip()

    def token_texts(self, ids: Iterable[int]) -> list[str]:
        pieces = (self._processor.id_to_piece(int(number)) for number in ids)
        return [piece.replace("▁", "") or "▁" for piece in pieces]


def _spaced(text: str, language: Language) -> str:
    """`text` with single blanks, and one in front where they part words, so that a word is one piece anywhere."""
    single = " ".join(text.split())
    return f" {single}" if language.blanks and single else single


def _lines(text: str) -> Iterator[str]:
    """A text in pieces of which sentencepiece takes each for its vocabulary."""
    text = text.replace(RESERVED, " ")
    while len(text.encode()) > LONGEST_LINE:
        # A character has four bytes at most; a blank begins the next piece, as it begins a word.
        most = LONGEST_LINE // 4
        end = text.rfind(" ", 1, most)
        end = end if end > 0 else most
        yield text[:end]
        text = text[end:]
    yield text


KINDS: dict[str, type[Tokenizer]] = {cls.kind: cls for cls in (WordTokenizer, SentencePieceTokenizer)}


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer saved in `folder`. Raises UserError if there is none, or not the one that was saved."""
    try:
        about = read_json(folder / "tokenizer.json")
        tokenizer = KINDS[about["kind"]].load(folder, language_of(about["language"]))
        identity = about["sha256"]
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"{folder} holds no tokenizer that can be read ({error}); prepare the data again") from None
    if tokenizer.sha256 != identity:
        raise UserError(f"the vocabulary in {folder} is not the one that was saved there; prepare the data again")
    return tokenizer
