"""Who may import whom, and who may touch a user's model: read from the source with ``ast``."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import jbrprune

PACKAGE = Path(jbrprune.__file__).parent

# A file imports only from files above it.
ORDER = (
    "errors",
    "atomic",
    "guest",
    "batches",
    "measure",
    "objectives",
    "groups",
    "parameters",
    "semi_structured",
    "packing",
    "sumfiles",
    "scores",
    "layers",
    "passes",
    "relevance",
    "functions",
    "squares",
    "collectors",
    "weights",
    "zoo",
    "data",
    "demo_data",
    "architectures",
    "units",
    "channels",
    "cuts",
    "masking",
    "slicing",
    "removal",
    "cost",
    "budget",
    "selection",
    "structured",
    "sparsity",
    "unstructured",
    "shrinking",
    "repair",
    "records",
    "tables",
    "figures",
    "report",
    "description",
    "places",
    "rebuilding",
    "checkpoint",
    "calibration",
    "runs",
    "defaults",
    "scoring",
    "inventory",
    "prediction",
    "engine",
    "thinning",
    "arguments",
    "pruning",
    "demo",
    "cli",
    "__init__",
    "__main__",
)
TIMM = {"zoo", "data", "demo_data", "architectures"}
TORCH_PRUNING = {"units", "structured"}
FILES = sorted(path.stem for path in PACKAGE.glob("*.py"))


def tree(name: str) -> ast.Module:
    return ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))


def imported(module: ast.AST) -> Iterator[str]:
    """Dotted names of all modules that a file imports, wherever it does so."""
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own(name: str) -> set[str]:
    """Files of the package that a file imports."""
    dotted = [parts.split(".") for parts in imported(tree(name))]
    return {
        parts[1] if parts[1] in FILES else "__init__" for parts in dotted if parts[0] == "jbrprune" and len(parts) > 1
    }


def attributes(name: str) -> Iterator[ast.Call]:
    """Calls of the form ``something.attribute(...)``."""
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            yield node


def test_every_file_has_its_place() -> None:
    assert set(FILES) <= set(ORDER), f"add {set(FILES) - set(ORDER)} to ORDER"
    assert len(set(ORDER)) == len(ORDER)


@pytest.mark.parametrize("name", [name for name in FILES if name in ORDER])
def test_a_file_imports_only_from_files_above_it(name: str) -> None:
    above = set(ORDER[: ORDER.index(name)])
    assert own(name) <= above, f"{name}.py imports from below: {own(name) - above}"


@pytest.mark.parametrize(("library", "allowed"), [("timm", TIMM), ("torch_pruning", TORCH_PRUNING)])
def test_foreign_libraries_have_their_border(library: str, allowed: set[str]) -> None:
    users = {name for name in FILES if any(module.split(".")[0] == library for module in imported(tree(name)))}
    assert users <= allowed


@pytest.mark.parametrize("name", [name for name in FILES if name != "guest"])
def test_only_guest_switches_modes_or_registers_hooks(name: str) -> None:
    for call in attributes(name):
        assert isinstance(call.func, ast.Attribute)
        method = call.func.attr
        where = f"{name}.py:{call.lineno}: .{method}()"
        assert method != "train", where
        assert not (method.startswith("register_") and method.endswith("_hook")) or method == "register_hook", where
        assert method != "eval" or _of_a_copy(call), where


def _of_a_copy(call: ast.Call) -> bool:
    """``.eval()`` is allowed on a model that was made or copied in the same expression."""
    assert isinstance(call.func, ast.Attribute)
    return any(isinstance(node, ast.Call) for node in ast.walk(call.func.value))


def test_baselines_stand_outside() -> None:
    """They import the library, never the reverse, and one file speaks to torch-pruning."""
    assert not any(module.split(".")[0] == "baselines" for name in FILES for module in imported(tree(name)))
    for path in sorted((PACKAGE.parent / "baselines").glob("*.py")):
        libraries = {module.split(".")[0] for module in imported(ast.parse(path.read_text(encoding="utf-8")))}
        assert "timm" not in libraries, path.name
        assert "torch_pruning" not in libraries or path.name == "torch_pruning_shipped.py", path.name


@pytest.mark.parametrize("name", FILES)
def test_the_library_does_not_print(name: str) -> None:
    names = {
        node.func.id for node in ast.walk(tree(name)) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert name in ("cli", "demo") or "print" not in names
