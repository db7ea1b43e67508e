"""The rooms of the house and the direction of its imports, so that whoever reads one file knows what it can rest on."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

from tests.support.commands import ROOT

PACKAGES = ("training", "data_prep", "launch")

# What a room may import besides itself. `training` stands for the scripts in it.
MAY_IMPORT = {
    "training/base": (),
    "training/data": ("training/base",),
    "training/engine": ("training/base",),
    "training/models": ("training/base", "training/data", "training/engine"),
    "training/report": ("training/base", "training/engine"),
    "training/evaluation": (
        *("training", "training/base", "training/data", "training/engine", "training/models", "training/report"),
    ),
    "training": ("training/base", "training/data", "training/engine", "training/models", "training/report"),
    "data_prep": ("training/base", "training/data"),
    "launch": ("training", "training/base", "training/data", "training/engine", "training/models"),
}


def files() -> list[Path]:
    return [path.relative_to(ROOT) for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def room_of(path: Path) -> str:
    two = "/".join(path.parts[:2])
    return two if two in MAY_IMPORT else path.parts[0]


def imports(path: Path) -> Iterator[Path]:
    """The files of this project that it imports, inside functions too."""
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names = [f"{node.module}.{alias.name}" for alias in node.names] + [str(node.module)]
        for name in names:
            module = Path(*name.split("."))
            for found in (module.with_suffix(".py"), module / "__init__.py"):
                if found.parts[0] in (*PACKAGES, "tests") and (ROOT / found).is_file():
                    yield found


def test_imports_run_in_one_direction():
    against = [
        f"{path} imports {imported}"
        for path in files()
        for imported in imports(path)
        if room_of(imported) not in (room_of(path), *MAY_IMPORT[room_of(path)])
        and imported != Path("training/__init__.py")
    ]
    assert against == []


def test_no_imports_run_in_a_circle():
    graph = {path: {each for each in imports(path) if each.name != "__init__.py"} for path in files()}
    TopologicalSorter(graph).prepare()  # raises CycleError
