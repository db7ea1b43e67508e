"""The tests notice what they are there for: see tests/mutations.py."""

from __future__ import annotations

import pytest

from tests.mutations import FAULTS, misfit
from tests.support.commands import PATIENCE_S, run


def test_every_fault_fits_the_code_and_its_test_exists():
    assert [f"{fault.name}: {problem}" for fault in FAULTS if (problem := misfit(fault))] == []
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)


@pytest.mark.whole
@pytest.mark.timeout(PATIENCE_S)
def test_every_fault_is_caught():
    result = run(module="tests.mutations", real=True)
    assert result.status == 0, result
    assert f"{len(FAULTS)} of {len(FAULTS)} faults caught" in result.out
