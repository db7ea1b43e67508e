"""How good translations are, in numbers that can be compared with others' because each says how it was computed.

BLEU and chrF are sacrebleu's, on plain text against the references as they stand in the corpus, case and punctuation
included; where words end is decided by the target language alone. A model with word tokens writes neither, so its BLEU
is low however well it translates; `bleu_normalised` takes both away on both sides, as scores computed on word tokens
do. Nothing is left out: a sentence without a translation counts as an empty one.

An interval is where 95 % of the scores lie that a bootstrap finds (Koehn 2004; see `bootstrap`): it is what
another choice of test sentences of the same kind would change, and says nothing about another training with another
seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from typing import Any

import numpy as np
from sacrebleu.metrics import BLEU, CHRF

from training.data.languages import Language
from training.data.tokenizers import cut
from training.data.translation_metrics import bleu_of
from training.evaluation import bootstrap
from training.evaluation.bootstrap import RESAMPLES, SEED, Interval, interval_of, rounded

# Longest source, in tokens, of each group that is scored for itself; the last one has no end.
LENGTH_GROUPS = (5, 10, 15, 25, None)


def sentence_counts(
    metric: BLEU | CHRF, translations: Sequence[str], references: Sequence[Sequence[str]]
) -> np.ndarray:
    """What `metric` counts in each sentence, [n, counts]: the score of any of them is a function of the sum.

    references: those of each translation, one or more: as many lists as translations, at least one.
    """
    if len(translations) != len(references) or not references:
        raise ValueError(f"{len(translations)} translations for the references of {len(references)}")
    # sacrebleu wants the first references of all, then the second ones, None where there is none.
    columns = [list(column) for column in zip_longest(*references)]
    return np.array(metric._extract_corpus_statistics(list(translations), columns), dtype=np.float64)


def score_of(metric: BLEU | CHRF, summed_counts: np.ndarray) -> float:
    """The score, 0 to 100, of sentences whose counts sum to this."""
    score = metric._compute_score_from_stats(summed_counts)  # type: ignore[arg-type]  # an array does as well as a list
    return float(score.score)


def resample(metric: BLEU | CHRF, *systems: np.ndarray) -> np.ndarray:
    """Scores [systems, RESAMPLES] of random choices of sentences, the same for each of `systems` (their counts).

    Not sacrebleu's own bootstrap: that needs gigabytes for some ten thousand sentences, and fails where some choices,
    but not all, have nothing right at all.
    """
    return bootstrap.resample(partial(score_of, metric), *systems)


def signature_of(metric: BLEU | CHRF) -> str:
    """sacrebleu's signature of a score that has been computed with `metric` and resampled."""
    signature = metric.get_signature()
    signature.update("bs", RESAMPLES)
    signature.update("seed", SEED)
    return str(signature)


@dataclass(frozen=True)
class Measured:
    """A score from 0 to 100, its interval of 95 %, and how it was computed."""

    score: float
    interval: Interval
    signature: str

    def to_json(self, name: str) -> dict[str, Any]:
        """Its entries in a JSON object, rounded to what can be told apart."""
        interval = rounded(self.interval, 2)
        return {name: round(self.score, 2), f"{name}_interval": interval, f"{name}_signature": self.signature}


def measure(metric: BLEU | CHRF, translations: Sequence[str], references: Sequence[Sequence[str]]) -> Measured:
    """Scores translations, each against its own references; see `sentence_counts`."""
    counts = sentence_counts(metric, translations, references)
    (resampled,) = resample(metric, counts)
    return Measured(score_of(metric, counts.sum(0)), interval_of(resampled), signature_of(metric))


def score_texts(translations: Sequence[str], references: Sequence[str], language: Language) -> dict[str, Any]:
    """Scores plain texts, one reference per translation, as a JSON object.

    bleu (Papineni et al. 2002) and chrf (Popović 2015) go from 0 to 100; bleu_normalised is of both sides in lower case
    and without punctuation. language: of the texts. Raises ValueError when the numbers of texts differ or are zero.
    """
    normalised, normalised_references = (
        [_normalise(text, language) for text in texts] for texts in (translations, references)
    )
    bleu = measure(bleu_of(language), translations, [[reference] for reference in references])
    chrf = measure(CHRF(), translations, [[reference] for reference in references])
    # The normalised text is words and blanks already, there is nothing left for sacrebleu to cut.
    words = measure(BLEU(tokenize="none"), normalised, [[reference] for reference in normalised_references])
    words = replace(words, signature=f"{words.signature} on lower-cased words without punctuation")
    return {
        "sentences": len(references),
        **bleu.to_json("bleu"),
        **chrf.to_json("chrf"),
        **words.to_json("bleu_normalised"),
        "exact_matches": _matches(translations, references),
        "exact_matches_normalised": _matches(normalised, normalised_references),
    }


def score_with_all_references(
    sources: Sequence[str], translations: Sequence[str], references: Sequence[str], language: Language
) -> dict[str, Any]:
    """Scores each distinct source once, against all references that the corpus has for it.

    The translation is that of the source's first row: equal sources have equal translations, up to ties within
    rounding. A reference that stands twice counts once.
    """
    first: dict[str, str] = {}
    known: dict[str, dict[str, None]] = {}  # keys in the order of the rows
    for source, translation, reference in zip(sources, translations, references, strict=True):
        first.setdefault(source, translation)
        known.setdefault(source, {})[reference] = None
    everything = [list(own) for own in known.values()]
    bleu, chrf = (measure(metric, list(first.values()), everything) for metric in (bleu_of(language), CHRF()))
    return {
        "sentences": len(everything),
        "references": sum(map(len, everything)),
        **bleu.to_json("bleu"),
        **chrf.to_json("chrf"),
    }


def score_by_length(
    lengths: Sequence[int], translations: Sequence[str], references: Sequence[str], language: Language
) -> list[dict[str, Any]]:
    """BLEU and chrF of the sentences in each of LENGTH_GROUPS; lengths: of the sources, in tokens, at least 1."""
    groups, shortest = [], 1
    for longest in LENGTH_GROUPS:
        rows = [
            row for row, length in enumerate(lengths) if shortest <= length and (longest is None or length <= longest)
        ]
        name = f"{shortest}+" if longest is None else f"{shortest}-{longest}"
        groups.append({"source_tokens": name, **_score_rows(rows, translations, references, language)})
        shortest = (longest or 0) + 1
    return groups


def score_by_seen(
    seen: Sequence[bool], translations: Sequence[str], references: Sequence[str], language: Language
) -> dict[str, Any]:
    """BLEU and chrF of the rows that are `seen`, and of those that are not."""
    return {
        name: _score_rows(
            [row for row, is_seen in enumerate(seen) if is_seen == wanted], translations, references, language
        )
        for name, wanted in (("seen", True), ("unseen", False))
    }


def with_interval(scores: Mapping[str, Any], key: str) -> str:
    """The score `key` of a JSON object of this module, in words, with its interval."""
    low, high = scores[f"{key}_interval"]
    return f"{scores[key]:.2f} ({low:.2f} to {high:.2f})"


def _score_rows(
    rows: Sequence[int], translations: Sequence[str], references: Sequence[str], language: Language
) -> dict[str, Any]:
    """Of some rows, without intervals; None for the scores of no row."""
    if not rows:
        return {"sentences": 0, "bleu": None, "chrf": None}
    chosen = [translations[row] for row in rows], [[references[row]] for row in rows]
    metrics = bleu_of(language), CHRF()
    bleu, chrf = (score_of(metric, sentence_counts(metric, *chosen).sum(0)) for metric in metrics)
    return {"sentences": len(rows), "bleu": round(bleu, 2), "chrf": round(chrf, 2)}


def _normalise(text: str, language: Language) -> str:
    return " ".join(cut(text, language))


def _matches(translations: Sequence[str], references: Sequence[str]) -> int:
    return sum(translation == reference for translation, reference in zip(translations, references, strict=True))
