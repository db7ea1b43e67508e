"""What the checks find, and how the findings of many ranks become one report.

Promises: a check that breaks is itself a finding and hides no other; what all who looked found is said once; what only
some of them found is followed by their names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from training.base.console import PeerError, UserError, counted, say
from training.base.environment import Ranks

Level = Literal["ok", "warning", "error"]

# A report is read by people, whatever the number of nodes.
_NAMES_AT_MOST = 8


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    level: Level
    subject: str  # what was looked at, in a word or two
    text: str  # what was found and, if it is not ok, what to do


@dataclass(frozen=True)
class MustMatch:
    """A value that must be the same for all who look; a difference is an error."""

    subject: str
    name: str
    value: str
    advice: str


@dataclass(frozen=True)
class Check:
    """Something to look at."""

    subject: str
    asked: Literal["first", "node", "rank"]  # who looks: the first rank, the first rank of each node, or every rank
    look: Callable[[], Iterable[Finding | MustMatch]]


@dataclass(frozen=True)
class DoctorReport:
    """What one rank found."""

    host: str
    rank: int
    found: tuple[tuple[Finding | MustMatch, ...] | None, ...]  # by check; None where this rank was not asked

    @property
    def name(self) -> str:
        return f"rank {self.rank} on {self.host}"


def examine(checks: Sequence[Check], ranks: Ranks, host: str) -> DoctorReport:
    """Makes this rank's part of the checks; raises nothing that a check raises."""
    asks = {"first": ranks.rank == 0, "node": ranks.local_rank == 0, "rank": True}
    return DoctorReport(host, ranks.rank, tuple(_look(check) if asks[check.asked] else None for check in checks))


def _look(check: Check) -> tuple[Finding | MustMatch, ...]:
    found: list[Finding | MustMatch] = []
    try:
        for each in check.look():
            found.append(each)  # one by one: what was found before an error counts
    except UserError as error:
        found.append(Finding("error", check.subject, str(error)))
    except Exception as error:
        found.append(Finding("error", check.subject, f"this check itself broke: {first_words(error)}"))
    return tuple(found)


def first_words(error: Exception) -> str:
    """An error of whatever library in one line that is not too long."""
    said = " ".join(str(error).split())[:300]
    return said if isinstance(error, UserError | PeerError) else f"{type(error).__name__}: {said}"


def merge(checks: Sequence[Check], reports: Sequence[DoctorReport]) -> list[Finding]:
    """All reports as one list, in the order of the checks. What not all found who looked is followed by their names."""
    merged: list[Finding] = []
    for index, check in enumerate(checks):
        said = [
            (report.name if check.asked == "rank" else report.host, found)
            for report in reports
            if (found := report.found[index]) is not None
        ]
        finders: dict[Finding, list[str]] = {}
        values: dict[MustMatch, dict[str, list[str]]] = {}
        for name, found in said:
            for each in found:
                if isinstance(each, Finding):
                    finders.setdefault(each, []).append(name)
                else:
                    values.setdefault(replace(each, value=""), {}).setdefault(each.value, []).append(name)
        for finding, names in finders.items():
            everybody = len(names) == len(said)
            merged.append(finding if everybody else replace(finding, text=f"{finding.text} [{names_of(names)}]"))
        for must, by_value in values.items():
            if len(by_value) > 1:
                parts = ", ".join(f"{value} [{names_of(names)}]" for value, names in by_value.items())
                merged.append(Finding("error", must.subject, f"{must.name} differs: {parts}; {must.advice}"))
    return merged


def names_of(names: Sequence[str]) -> str:
    """The names in a row, the first few of them if there are many."""
    unique = list(dict.fromkeys(names))
    more = len(unique) - _NAMES_AT_MOST
    return ", ".join(unique[:_NAMES_AT_MOST]) + (f" and {more} more" if more > 0 else "")


def print_report(findings: Sequence[Finding], examined: str) -> int:
    """Prints all findings and their number; returns the exit status: 1 if there is an error."""
    width = max(len(each.subject) for each in findings)
    for each in findings:
        say(f"{each.level:<8} {each.subject:<{width}}  {each.text}")
    count = Counter(each.level for each in findings)
    verdict = "the errors must be mended before a run" if count["error"] else "a run can start"
    bad = f"{counted(count['error'], 'error')}, {counted(count['warning'], 'warning')}"
    say(f"\n{examined}: {bad}, {count['ok']} ok: {verdict}")
    return 1 if count["error"] else 0
