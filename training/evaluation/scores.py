"""How good translations are, in numbers that can be compared with others' because each says how it was computed.

BLEU and chrF are sacrebleu's, on plain text against the references as they stand in the corpus, case and punctuation
included. A model with word tokens writes neither, so its BLEU is low however well it translates; `bleu_normalised`
takes both away on both sides, as scores computed on word tokens do. Nothing is left out: a sentence without a
translation counts as an empty one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sacrebleu.metrics import BLEU, CHRF

from data_prep.tokenizers import cut


@dataclass(frozen=True)
class TextScores:
    """Scores of translations as texts. BLEU (Papineni et al. 2002) and chrF (Popović 2015) go from 0 to 100."""

    sentences: int
    bleu: float
    bleu_signature: str
    chrf: float
    chrf_signature: str
    bleu_normalised: float  # both sides in lower case and without punctuation
    bleu_normalised_signature: str
    exact_matches: int
    exact_matches_normalised: int

    def to_json(self) -> dict[str, Any]:
        """As a JSON object, scores rounded to what can be told apart."""
        return {key: round(value, 2) if isinstance(value, float) else value for key, value in asdict(self).items()}


def score_texts(translations: Sequence[str], references: Sequence[str]) -> TextScores:
    """Scores plain texts, one reference per translation. Raises ValueError when their numbers differ or are zero."""
    translations, references = list(translations), list(references)
    if len(translations) != len(references) or not references:
        raise ValueError(f"{len(translations)} translations for {len(references)} references")
    bleu, chrf = BLEU(), CHRF()
    # The normalised text is words and blanks already, there is nothing left for sacrebleu to cut.
    words_bleu = BLEU(tokenize="none")
    normalised, normalised_references = [_normalise(t) for t in translations], [_normalise(r) for r in references]
    return TextScores(
        sentences=len(references),
        bleu=bleu.corpus_score(translations, [references]).score,
        bleu_signature=str(bleu.get_signature()),
        chrf=chrf.corpus_score(translations, [references]).score,
        chrf_signature=str(chrf.get_signature()),
        bleu_normalised=words_bleu.corpus_score(normalised, [normalised_references]).score,
        bleu_normalised_signature=str(words_bleu.get_signature()) + " on lower-cased words without punctuation",
        exact_matches=_matches(translations, references),
        exact_matches_normalised=_matches(normalised, normalised_references),
    )


def _normalise(text: str) -> str:
    return " ".join(cut(text, "en"))


def _matches(translations: list[str], references: list[str]) -> int:
    return sum(translation == reference for translation, reference in zip(translations, references, strict=True))
