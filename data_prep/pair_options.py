"""The options of `python -m data_prep.pairs`, and which of them the prepared content depends on."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from data_prep.columns import Languages
from data_prep.pair_rows import SIDES
from data_prep.preparing import MOST_MALFORMED
from data_prep.sources import is_dataset
from data_prep.splits import TEST_SHARE
from training.base.console import UserError
from training.base.environment import cores_seen
from training.base.files import nearest_folder
from training.base.options import Options, Revision
from training.data.languages import LanguageCode, language_of
from training.data.prepared import PARTS
from training.data.tokenizers import Tokenizer, load_tokenizer

# Options that came later: where they are as here, they change nothing about what is prepared.
LATER = {
    "source_language": "zh",
    "target_language": "en",
    "test_share": TEST_SHARE,
    "columns": None,
    "unescape": False,
    "narrow": False,
    "drop_leaked": False,
    "validation_from": None,
}


class PairOptions(Options):
    """The keys of `python -m data_prep.pairs`."""

    source: str | None = Field(
        None,
        description="what to split here: sample (generated, to try things out), download or download:fra-eng "
        "(manythings.org), a file (tabs, .csv, .jsonl, .parquet; also .gz .bz2 .xz .zst .zip), two parallel ones with "
        "a comma between, hub:NAME or a folder (a data set of `datasets`)",
    )
    train: str | None = Field(None, description="instead of source: the training part, in any of these forms")
    validation: str | None = Field(None, description="the validation part; without it, it is taken from train")
    test: str | None = Field(None, description="the test part")
    output: Path = Field(description="the folder to make, for example prepared/tatoeba")
    source_language: LanguageCode = Field("zh", description="the language to translate from, by its ISO 639 code")
    target_language: LanguageCode = Field("en", description="the language to translate to")
    columns: str | None = Field(
        None,
        description="names or numbers of the columns of source and target, and perhaps of an attribution, as in 2,4 or "
        "zh,en,author; without it they are found, where names or scripts tell",
    )
    subset: str | None = Field(None, description="of a data set of several, as in en-zh")
    revision: Revision | None = Field(None, description="commit, branch or tag of a data set on the hub")
    split: Literal["random", "grouped"] = Field(
        "random", description="random: the usual one, which leaks; grouped: no sentence is in two parts"
    )
    tokenizer: Literal["word", "sentencepiece"] = Field(
        "sentencepiece",
        description="sentencepiece: byte-pair pieces; word: words, or characters where no blanks part them",
    )
    vocabularies: Literal["joint", "separate"] = Field(
        "separate", description="separate: each side has its own ids; joint: source and target share theirs"
    )
    vocabulary_size: int | None = Field(
        None,
        ge=64,
        description="pieces of each sentencepiece vocabulary, at most; null: by the number of training pairs",
    )
    min_frequency: int = Field(
        1,
        ge=1,
        description="rarer words of the training part become <unk>; with 1 a model never meets <unk> in training",
    )
    tokenizers: Path | None = Field(
        None, description="a prepared data set or a run whose tokenizers are taken, so that its model can read these"
    )
    simplify: bool | None = Field(
        None,
        description="convert the Chinese to simplified characters; null: unless nearly all of it is traditional",
    )
    unescape: bool = Field(False, description="convert HTML's entities, as &quot;, to their characters")
    narrow: bool = Field(False, description="convert full-width Latin letters and digits to ordinary ones")
    drop_leaked: bool = Field(
        False, description="of a given split: drop training pairs with a sentence that stands in test or validation"
    )
    test_share: float = Field(TEST_SHARE, gt=0, lt=0.5, description="test's share of the pairs that are split here")
    validation_share: float = Field(0.05, gt=0, lt=0.5, description="validation's share of what is not test")
    max_malformed_share: float | None = Field(
        None,
        ge=0,
        le=1,
        description=f"refuse a source with more lines that are no pair than this share; {MOST_MALFORMED}",
    )
    seed: int = Field(1234, ge=0, lt=2**32, description="seed of the split")
    workers: int = Field(cores_seen(), ge=1, description="processes that read and tokenise; by default one per core")
    overwrite: bool = Field(False, description="replace an output that was made with other options or another source")

    @model_validator(mode="after")
    def _fit_together(self) -> PairOptions:
        given = self.model_fields_set
        of_new_ones = {"tokenizer", "vocabularies", "vocabulary_size", "min_frequency"} & given
        if self.tokenizers is not None and of_new_ones:
            raise ValueError(f"{min(of_new_ones)} has no effect where tokenizers are taken: leave it out")
        other = "vocabulary_size" if self.tokenizer == "word" else "min_frequency"
        if other in of_new_ones:
            instead = "sentencepiece" if self.tokenizer == "word" else "word"
            raise ValueError(
                f"{other} has no effect with tokenizer {self.tokenizer}: leave it out, or pass --tokenizer {instead}"
            )
        if self.source is None and (self.train is None or self.test is None):
            raise ValueError("source is required; of a split that is given, train and test are")
        if self.source is not None and {"train", "validation", "test"} & given:
            raise ValueError(
                "source is split here, and train, validation and test are given: leave out one or the other"
            )
        if self.source is not None and self.drop_leaked:
            raise ValueError("drop_leaked is for a given split; of a source, split grouped leaks nothing")
        if self.source is None and "test_share" in given:
            raise ValueError("test_share has no effect where test is given: leave it out")
        if self.validation is not None and {"validation_share", "split"} & given:
            raise ValueError("validation_share and split have no effect where validation is given: leave them out")
        if {"subset", "revision"} & given and not any(map(is_dataset, self.tables.values())):
            raise ValueError("subset and revision are those of a data set, hub:NAME or a folder: leave them out")
        if self.source_language == self.target_language:
            raise ValueError(f"source_language and target_language are both {self.source_language}")
        if self.simplify and not any(language.variants for language in self.languages):
            raise ValueError("simplify has no effect, since neither language is Chinese: leave it out")
        return self

    @property
    def languages(self) -> Languages:
        """Of source and target."""
        return language_of(self.source_language), language_of(self.target_language)

    @property
    def tables(self) -> dict[str, str]:
        """What is to be read, by part; of a source that is split here, as train."""
        if self.source is not None:
            return {"train": self.source}
        return {part: name for part in PARTS if (name := getattr(self, part)) is not None}

    @property
    def open_choices(self) -> list[str]:
        """The keys whose values the data decides."""
        simplifies = any(language.variants for language in self.languages)
        makes_pieces = self.tokenizers is None and self.tokenizer == "sentencepiece"
        possible = (("simplify", simplifies), ("vocabulary_size", makes_pieces))
        return [key for key, wanted in possible if wanted and getattr(self, key) is None]

    def defining(self) -> dict[str, object]:
        """The options that the prepared content depends on."""
        keys = ["simplify", "validation_share", "seed"]
        if self.tokenizers is None:
            keys += ["tokenizer", "vocabularies", "min_frequency" if self.tokenizer == "word" else "vocabulary_size"]
        found = {key: getattr(self, key) for key in sorted(keys)} | {"simplify": bool(self.simplify)}
        found["split"] = self.split if self.source is not None else "given"
        if self.tokenizers is not None:
            found["tokenizers"] = {side: each.sha256 for side, each in take_tokenizers(self.tokenizers).items()}
        if self.source is None and self.validation is None:
            found["validation_from"] = f"train, {self.split}"
        later = {key: getattr(self, key) for key in LATER if key in type(self).model_fields}
        return found | {key: value for key, value in later.items() if value != LATER[key]}


def take_tokenizers(folder: Path) -> dict[str, Tokenizer]:
    """The source's and the target's tokenizer of a prepared data set or a run."""
    if not (folder / "tokenizer/source").is_dir():
        near = nearest_folder(folder)
        raise UserError(f"--tokenizers {folder} is no prepared data set and no run of sentence pairs{near}")
    return {side: load_tokenizer(folder / "tokenizer" / side) for side in SIDES}
