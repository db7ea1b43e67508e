"""Which row goes to training, validation or test, and how much the parts leak into each other.

Sentences are compared by 64-bit digests of them, equal where the sentences are.

`random` is the usual split and leaks: many sentences have several translations, so the same sentence stands in training
and test. `grouped` keeps all pairs together that share a sentence on either side, directly or through others, so that
no test sentence was ever trained on.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from training.base.console import UserError
from training.data.languages import Language
from training.data.prepared import PARTS

TEST_SHARE = 0.1


@dataclass(frozen=True)
class Split:
    """Row numbers of the three parts, int64, each in a seeded random order, so that a prefix is a fair sample.

    Validation and test rows of files of their own are in the order of those.
    """

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    groups: int | None = None
    largest_group: int | None = None

    def rows(self, part: str) -> np.ndarray:
        """Row numbers of the part called train, validation or test."""
        return {"train": self.train, "validation": self.validation, "test": self.test}[part]

    def checked(self, dropped: int = 0) -> Split:
        """Itself. Raises UserError where a part is empty. dropped: pairs that stood in another part."""
        empty = [part for part in PARTS if len(self.rows(part)) == 0]
        if empty:
            rows = sum(len(self.rows(part)) for part in PARTS)
            grouped = "" if self.groups is None else f" (they are in {self.groups:,} groups that share sentences)"
            mend = "pass a larger file or `--source sample`" + ("" if self.groups is None else ", or --split random")
            if dropped:
                grouped, mend = (
                    f", without the {dropped:,} that --drop_leaked left out",
                    "leave --drop_leaked out, or pass other pairs",
                )
            raise UserError(
                f"{rows:,} sentence pairs are too few for this split{grouped}: nothing is left for "
                f"{' and '.join(empty)}; {mend}"
            )
        return self


def random_split(count: int, validation_share: float, seed: int, test_share: float = TEST_SHARE) -> Split:
    """Rows drawn one by one; test is exactly that of scikit-learn's `train_test_split(rows, test_size=test_share,
    shuffle=True, random_state=seed)`, in its order.

    Validation is the first `validation_share` of scikit-learn's training rows, which are in random order already.
    """
    # The legacy generator: NumPy has frozen its stream for ever, and it is the one that scikit-learn draws from.
    order = np.random.RandomState(seed).permutation(count).astype(np.int64)
    test = math.ceil(test_share * count)
    validation = math.ceil(validation_share * (count - test))
    return Split(order[test + validation :], order[test : test + validation], order[:test])


def grouped_split(labels: np.ndarray, validation_share: float, seed: int, test_share: float = TEST_SHARE) -> Split:
    """Whole groups drawn in random order until a part is full. labels: of `connected_groups`."""
    sizes = np.bincount(labels)
    test_room = math.ceil(test_share * len(labels))
    validation_room = math.ceil(validation_share * (len(labels) - test_room))
    part_of_group = np.zeros(len(sizes), dtype=np.int8)
    random = np.random.RandomState(seed)
    for group in random.permutation(len(sizes)).tolist():
        if sizes[group] <= test_room:
            part_of_group[group] = 2
            test_room -= sizes[group]
        elif sizes[group] <= validation_room:
            part_of_group[group] = 1
            validation_room -= sizes[group]
        elif not test_room and not validation_room:
            break
    order = random.permutation(len(labels)).astype(np.int64)
    part_of_row = part_of_group[labels[order]]
    train, validation, test = (order[part_of_row == part] for part in range(3))
    return Split(train, validation, test, groups=len(sizes), largest_group=int(sizes.max(initial=0)))


def connected_groups(*sides: np.ndarray) -> np.ndarray:
    """Group number of each row, int64 [rows]: rows that share a text on a side are in one group, transitively.

    sides: digests [rows] of each side's texts. Groups are numbered by their first row.
    """
    same = [np.unique(side, return_inverse=True)[1] for side in sides]
    first = np.arange(len(sides[0]))  # of each row, the smallest row known to be in its group
    while True:
        before = first
        for texts in same:
            smallest = np.full(texts.max(initial=-1) + 1, len(first))
            np.minimum.at(smallest, texts, first)
            first = smallest[texts]
        first = first[first]  # who is known to belong to another row belongs to that one's group
        if np.array_equal(first, before):
            return np.unique(first, return_inverse=True)[1].astype(np.int64)


@dataclass(frozen=True)
class Side:
    """One language of all rows: digests of the texts, uint64 [rows], as stored and as compared."""

    language: Language
    same: np.ndarray
    alike: np.ndarray


def leakage(split: Split, source: Side, target: Side) -> dict[str, dict[str, object]]:
    """For test and validation: how many of their rows have a sentence that was seen before, in numbers and in words."""
    seen = np.concatenate([split.train, split.validation])
    return {
        "test": _overlap("test", split.test, "train and validation", seen, source, target),
        "validation": _overlap("validation", split.validation, "train", split.train, source, target),
    }


def _overlap(
    part: str, rows: np.ndarray, against: str, seen_rows: np.ndarray, source: Side, target: Side
) -> dict[str, object]:
    def numbers(of_source: np.ndarray, of_target: np.ndarray) -> dict[str, float]:
        was_seen = [np.isin(digests[rows], digests[seen_rows]) for digests in (of_source, of_target)]
        either = was_seen[0] | was_seen[1]
        return {
            "source": int(was_seen[0].sum()),
            "target": int(was_seen[1].sum()),
            "either": int(either.sum()),
            "either_share": round(float(either.mean()), 6),
        }

    exact, alike = numbers(source.same, target.same), numbers(source.alike, target.alike)
    ignored = ["case", "punctuation"]
    if source.language.variants or target.language.variants:
        ignored = ["case, punctuation", "simplified or traditional form"]
    words = (
        f"of {len(rows):,} {part} rows, {_share(exact, rows)} have a sentence that stands "
        f"word for word in {against} ({source.language} {exact['source']:,}, {target.language} {exact['target']:,}); "
        f"ignoring {' and '.join(ignored)} {_share(alike, rows)}"
    )
    return {"rows": len(rows), "against": against, "exact": exact, "normalised": alike, "words": words}


def _share(numbers: Mapping[str, float], rows: np.ndarray) -> str:
    return f"{numbers['either']:,} ({numbers['either'] / len(rows):.1%})"


def stands_in(source: Side, target: Side, rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Which of `rows` share a sentence, as compared, with one of `others`: bool [rows]."""
    return np.isin(source.alike[rows], source.alike[others]) | np.isin(target.alike[rows], target.alike[others])


@dataclass(frozen=True)
class StratifiedSplit:
    """Which part each row is in, and a seeded order of all rows in which rows of one group are neighbours."""

    parts: np.ndarray  # int8 [rows], index into PARTS
    order: np.ndarray  # int64 [rows], row numbers
    strata: np.ndarray  # int64 [rows], the stratum of the row's group

    def rows(self, part: str) -> np.ndarray:
        """Row numbers of the part called train, validation or test, in the seeded order."""
        return self.order[self.parts[self.order] == PARTS.index(part)]

    def with_first(self, rows: Sequence[int], groups: np.ndarray) -> StratifiedSplit:
        """The same split with the groups of `rows` at the front of the order, so that they are in every share."""
        front = np.isin(groups[self.order], groups[np.array(rows, dtype=np.int64)])
        return replace(self, order=np.concatenate([self.order[front], self.order[~front]]))

    def first_share(self, part: str, fraction: float, groups: np.ndarray) -> np.ndarray:
        """The first `fraction` of a part's rows in each stratum, by whole groups, at least one; in the seeded order.

        A smaller fraction's rows are among a larger one's.
        """
        rows = self.rows(part)
        kept = np.zeros(len(rows), dtype=bool)
        for stratum in np.unique(self.strata[rows]):
            places = np.flatnonzero(self.strata[rows] == stratum)
            own = groups[rows[places]]
            begins = np.flatnonzero(np.concatenate([[True], own[1:] != own[:-1]]))
            sizes = np.diff([*begins, len(own)])
            # A group is in if the share is not yet full before it.
            kept[places] = np.repeat(begins < fraction * len(own), sizes)
        return rows[kept]


def stratified_split(strata: np.ndarray, groups: np.ndarray, validation_share: float, seed: int) -> StratifiedSplit:
    """A tenth of each stratum goes to test, `validation_share` of the rest to validation, by whole groups.

    strata int64 [rows]; groups uint64 [rows], equal where rows must not part. A group belongs to the stratum of its
    first row. What becomes of a group depends on the seed and on its own stratum only, so that one stratum may be left
    out or changed without moving the others. Every stratum has a test row, one of two groups or more a training row,
    and one of three or more a validation row.
    """
    unique, first, inverse, sizes = np.unique(groups, return_index=True, return_inverse=True, return_counts=True)
    drawn = np.fromiter((_draw(seed, group) for group in unique.tolist()), dtype=np.uint64, count=len(unique))
    stratum_of_group = strata[first]
    part_of_group = np.zeros(len(unique), dtype=np.int8)
    by_draw = np.lexsort((unique, drawn))
    for stratum in np.unique(stratum_of_group):
        left = by_draw[stratum_of_group[by_draw] == stratum]
        rows = int(sizes[left].sum())
        test = _take(left, sizes, math.ceil(TEST_SHARE * rows), leave=min(2, len(left) - 1))
        part_of_group[test] = PARTS.index("test")
        left = left[~np.isin(left, test)]
        if len(left) >= 2:
            validation = _take(left, sizes, math.ceil(validation_share * int(sizes[left].sum())), leave=1)
            part_of_group[validation] = PARTS.index("validation")
    order = np.lexsort((np.arange(len(groups)), unique[inverse], drawn[inverse]))
    split = StratifiedSplit(part_of_group[inverse], order, stratum_of_group[inverse])
    empty = [part for part in PARTS if len(split.rows(part)) == 0]
    if empty:
        raise UserError(
            f"{len(groups):,} records in {len(np.unique(strata))} tasks, with {len(unique):,} different questions, are "
            f"too few for this split: nothing is left for {' and '.join(empty)}; pass more of them"
        )
    return split


def validation_share_of(rows: int) -> float:
    """Validation's share of what is not test, of so many records, where nobody says."""
    return max(0.01, min(0.1, 50 / ((1 - TEST_SHARE) * max(1, rows))))


def wanted_rows(rows: int, validation_share: float) -> dict[str, float]:
    """How many of so many rows a stratified split is asked to hold out."""
    return {"test": TEST_SHARE * rows, "validation": validation_share * (1 - TEST_SHARE) * rows}


def _draw(seed: int, group: int) -> int:
    digest = hashlib.blake2b(group.to_bytes(8, "little"), digest_size=8, key=seed.to_bytes(8, "little"))
    return int.from_bytes(digest.digest(), "little")


def _take(groups: np.ndarray, sizes: np.ndarray, rows: int, *, leave: int) -> np.ndarray:
    """The first of `groups` that fit into `rows` rows, skipping others: at least one, at most all but `leave`."""
    taken: list[int] = []
    room = rows
    for group in groups.tolist():
        if room == 0 or len(taken) == len(groups) - leave:
            break
        if sizes[group] <= room:
            taken.append(group)
            room -= int(sizes[group])
    # Nothing fits where a stratum has few rows, and those are in few groups.
    return np.array(taken or [groups[np.argmin(sizes[groups])]], dtype=np.int64)
