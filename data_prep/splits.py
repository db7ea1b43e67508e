"""Which row goes to training, validation or test, and how much the parts leak into each other.

`random` is the usual split and leaks: many sentences have several translations, so the same sentence stands in training
and test. `grouped` keeps all pairs together that share a sentence on either side, directly or through others, so that
no test sentence was ever trained on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_prep.text import normalise
from launch.console import Progress, UserError

TEST_SHARE = 0.1
PARTS = ("train", "validation", "test")


@dataclass(frozen=True)
class Split:
    """Row numbers of the three parts, int64, each in a seeded random order, so that a prefix is a fair sample."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    groups: int | None = None
    largest_group: int | None = None

    def rows(self, part: str) -> np.ndarray:
        """Row numbers of the part called train, validation or test."""
        return {"train": self.train, "validation": self.validation, "test": self.test}[part]


def random_split(count: int, validation_share: float, seed: int) -> Split:
    """Rows drawn one by one; test is exactly that of scikit-learn's `train_test_split(rows, test_size=0.1,
    shuffle=True, random_state=seed)`, in its order.

    Validation is the first `validation_share` of scikit-learn's training rows, which are in random order already.
    """
    # The legacy generator: NumPy has frozen its stream for ever, and it is the one that scikit-learn draws from.
    order = np.random.RandomState(seed).permutation(count).astype(np.int64)
    test = math.ceil(TEST_SHARE * count)
    validation = math.ceil(validation_share * (count - test))
    return _checked(Split(order[test + validation :], order[test : test + validation], order[:test]))


def grouped_split(english: Sequence[str], chinese: Sequence[str], validation_share: float, seed: int) -> Split:
    """Whole groups drawn in random order until a part is full. The arguments are normalised texts of equal number."""
    labels = connected_groups(english, chinese)
    sizes = np.bincount(labels)
    test_room = math.ceil(TEST_SHARE * len(labels))
    validation_room = math.ceil(validation_share * (len(labels) - test_room))
    part_of_group = np.zeros(len(sizes), dtype=np.int8)
    random = np.random.RandomState(seed)
    for group in random.permutation(len(sizes)):
        if sizes[group] <= test_room:
            part_of_group[group] = 2
            test_room -= sizes[group]
        elif sizes[group] <= validation_room:
            part_of_group[group] = 1
            validation_room -= sizes[group]
    order = random.permutation(len(labels)).astype(np.int64)
    part_of_row = part_of_group[labels[order]]
    return _checked(
        Split(
            *(order[part_of_row == part] for part in range(3)),
            groups=len(sizes),
            largest_group=int(sizes.max(initial=0)),
        )
    )


def connected_groups(english: Sequence[str], chinese: Sequence[str]) -> np.ndarray:
    """Group number of each row, int64 [rows]: rows that share a text on either side are in one group, transitively."""
    parent = list(range(len(english)))

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    for side in (english, chinese):
        first_row: dict[str, int] = {}
        for row, text in enumerate(side):
            a, b = root(first_row.setdefault(text, row)), root(row)
            parent[max(a, b)] = min(a, b)
    return np.unique([root(row) for row in range(len(parent))], return_inverse=True)[1].astype(np.int64)


def _checked(split: Split) -> Split:
    empty = [part for part in PARTS if len(split.rows(part)) == 0]
    if empty:
        rows = sum(len(split.rows(part)) for part in PARTS)
        raise UserError(
            f"{rows:,} sentence pairs are too few for this split: nothing is left for {' and '.join(empty)}; "
            "pass a larger file or `--source sample`"
        )
    return split


def _share(numbers: dict[str, object], rows: np.ndarray) -> str:
    return f"{numbers['either']:,} ({numbers['either'] / len(rows):.1%})"


@dataclass(frozen=True)
class Side:
    """One language of all rows: the texts as stored, and as compared."""

    texts: Sequence[str]
    normalised: Sequence[str]


def leakage(split: Split, chinese: Side, english: Side) -> dict[str, dict[str, object]]:
    """For test and validation: how many of their rows have a sentence that was seen before, in numbers and in words."""
    seen = np.concatenate([split.train, split.validation])
    return {
        "test": _overlap("test", split.test, "train and validation", seen, chinese, english),
        "validation": _overlap("validation", split.validation, "train", split.train, chinese, english),
    }


def _overlap(
    part: str, rows: np.ndarray, against: str, seen_rows: np.ndarray, chinese: Side, english: Side
) -> dict[str, object]:
    def hits(texts: Sequence[str]) -> np.ndarray:
        seen = {texts[row] for row in seen_rows}
        return np.fromiter((texts[row] in seen for row in rows), dtype=bool, count=len(rows))

    def numbers(source: np.ndarray, target: np.ndarray) -> dict[str, object]:
        either = source | target
        return {
            "chinese": int(source.sum()),
            "english": int(target.sum()),
            "either": int(either.sum()),
            "either_share": round(float(either.mean()), 6),
        }

    exact = numbers(hits(chinese.texts), hits(english.texts))
    same = numbers(hits(chinese.normalised), hits(english.normalised))
    words = (
        f"of {len(rows):,} {part} rows, {_share(exact, rows)} have a sentence that stands "
        f"word for word in {against} (Chinese {exact['chinese']:,}, English {exact['english']:,}); ignoring case, "
        f"punctuation and simplified or traditional form {_share(same, rows)}"
    )
    return {"rows": len(rows), "against": against, "exact": exact, "normalised": same, "words": words}


def side_of(texts: Sequence[str], label: str) -> Side:
    """`texts` with what they are compared by; `label` names them in the progress line."""
    normalised = []
    with Progress(f"comparing {label}", len(texts), "rows") as progress:
        for text in texts:
            normalised.append(normalise(text))
            progress.advance()
    return Side(texts, normalised)
