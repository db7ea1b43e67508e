"""The tests notice what they are there for: see tests/mutations.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mutations import FAULTS, Fault, check_controls, copy_tree, is_caught, misfit


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the working tree for this worker alone."""
    folder = tmp_path_factory.mktemp("tree")
    copy_tree(folder)
    return folder


def test_every_fault_fits_the_code_and_its_test_exists():
    assert [f"{fault.name}: {problem}" for fault in FAULTS if (problem := misfit(fault))] == []
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)


@pytest.mark.whole
def test_without_a_fault_every_one_of_these_tests_passes(tree: Path):
    check_controls(tree, FAULTS)


@pytest.mark.whole
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name.replace(" ", "-"))
def test_fault_is_caught(fault: Fault, tree: Path):
    caught, printed = is_caught(fault, tree)
    assert caught, printed
