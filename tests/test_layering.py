"""A folder imports only from folders below it; read from the source with ``ast``."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import jbrprune

PACKAGE = Path(jbrprune.__file__).parent
ORDER = (
    *("__main__", "cli", "demo", "__init__", "prediction", "pruning", "checkpoint", "integrations", "report", "repair"),
    *("budgets", "tpv", "criteria", "evaluation", "sparsity", "structure", "data", "models", "errors"),
)


UPWARDS = {"pruning/api.py": {"prediction"}}
"""What is imported inside a function: `prune(max_drop=)` calls the search, which drives the loop of `pruning`."""


def imported_folders(path: Path) -> set[str]:
    """First parts of all modules of the package that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "jbrprune":
            below = node.module.split(".")[1:2]
            found |= set(below) if below else {alias.name for alias in node.names}
    return found & set(ORDER) - UPWARDS.get(path.relative_to(PACKAGE).as_posix(), set())


@pytest.mark.parametrize("name", ORDER)
def test_a_folder_imports_only_what_is_below(name):
    paths = sorted((PACKAGE / name).rglob("*.py")) or [PACKAGE / f"{name}.py"]
    above = set(ORDER[: ORDER.index(name)])
    assert {str(path): sorted(imported_folders(path) & above) for path in paths if imported_folders(path) & above} == {}


def test_every_folder_has_its_place():
    assert {path.stem for path in PACKAGE.iterdir() if path.name != "__pycache__" and path.name != "py.typed"} == set(
        ORDER
    )
