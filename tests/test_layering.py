"""Who may import whom, and who may touch a user's model: read from the source with ``ast``."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import jbrprune

PACKAGE = Path(jbrprune.__file__).parent

# A file imports only from files above it. `tpv` is `tpv/__init__.py`, `tpv.estimators` a file beside it.
ORDER = (
    "errors",
    "core",
    "core.atomic",
    "core.guest",
    "core.batches",
    "core.distributed",
    "core.portions",
    "core.measure",
    "core.drop",
    "core.objectives",
    "zoo",
    "criterion",
    "criterion.groups",
    "criterion.parameters",
    "criterion.packing",
    "criterion.sumfiles",
    "criterion.scores",
    "criterion.layers",
    "criterion.passes",
    "criterion.members",
    "criterion.tape",
    "criterion.relevance",
    "criterion.functions",
    "criterion.recording",
    "criterion.factors",
    "criterion.squares",
    "criterion.norms",
    "criterion.collectors",
    "criterion.weights",
    "data",
    "demo_data",
    "reporting",
    "reporting.records",
    "reporting.tables",
    "reporting.figures",
    "reporting.charts",
    "reporting.page",
    "reporting.report",
    "reporting.card",
    "sparse",
    "sparse.semi_structured",
    "sparse.sparsity",
    "sparse.unstructured",
    "forecasting",
    "forecasting.changes",
    "forecasting.residual",
    "forecasting.damage",
    "forecasting.forecast",
    "forecasting.checking",
    "forecasting.correction",
    "variants",
    "structure",
    "structure.architectures",
    "structure.tracing",
    "structure.units",
    "structure.channels",
    "structure.cuts",
    "structure.masking",
    "structure.slicing",
    "structure.removal",
    "structure.structured",
    "structure.shrinking",
    "repair",
    "calibration",
    "defaults",
    "budgets",
    "budgets.timing_cache",
    "budgets.timing",
    "budgets.cost",
    "budgets.layer_calls",
    "budgets.layer_times",
    "budgets.budget",
    "budgets.selection",
    "budgets.pricing",
    "scoring",
    "tpv.gradients",
    "tpv.bare",
    "tpv.responses",
    "tpv.recorded",
    "tpv.covariances",
    "tpv.removal",
    "tpv.sgd",
    "tpv.validity",
    "tpv.labels",
    "tpv.estimate",
    "tpv.agreement",
    "tpv.signs",
    "tpv.problem",
    "tpv.estimators",
    "tpv",
    "files",
    "files.hub",
    "files.description",
    "files.places",
    "files.rebuilding",
    "files.checkpoint",
    "files.runs",
    "files.identity",
    "files.journal",
    "inventory",
    "opening",
    "engine",
    "thinning",
    "plan",
    "arguments",
    "search",
    "prediction",
    "pruning",
    "degradation",
    "demo",
    "commands",
    "commands.options",
    "commands.output",
    "commands.predict",
    "commands.prune",
    "commands.score",
    "commands.evaluate",
    "commands.info",
    "commands.tpv",
    "commands.card",
    "commands.demo",
    "cli",
    "__init__",
    "__main__",
)
TIMM = {"zoo", "data", "demo_data", "structure.architectures"}
TORCH_PRUNING = {"structure.tracing", "structure.structured"}


def _name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


PATHS = {_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
FILES = sorted(PATHS)


def tree(name: str) -> ast.Module:
    return ast.parse(PATHS[name].read_text(encoding="utf-8"))


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
    ours = (module.split(".")[1:] for module in imported(tree(name)) if module.startswith("jbrprune."))
    return {_file(parts) for parts in ours}


def _file(parts: list[str]) -> str:
    """``["tpv", "estimators", "Estimate"]`` lives in ``tpv.estimators``; what no file holds, in the package itself."""
    candidates = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((name for name in candidates if name in PATHS), "__init__")


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


@pytest.mark.parametrize("name", [name for name in FILES if name != "core.guest"])
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
    assert name == "demo" or name.startswith(("cli", "commands")) or "print" not in names


def test_files_of_subpackages_are_looked_at() -> None:
    assert {"commands", "commands.prune"} <= set(FILES)
    assert _file(["commands", "prune", "prune_command"]) == "commands.prune"
    assert _file(["commands", "elsewhere"]) == "commands"
    assert _file(["prune"]) == "__init__"
