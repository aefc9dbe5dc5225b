"""How large the project is, and how far it is from a call to the formula: one Markdown table.

    python scripts/size.py

Lines of code are without blank lines, comments and docstrings. Frames and files are those of this package that one
`jbrprune.prune` of a tensor to half of the multiply-accumulates goes through; the formula is the sum of squares.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).parents[1]


def code_lines(path: Path) -> int:
    """Lines of code of a file."""
    source, prose = path.read_text(encoding="utf-8"), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            prose |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = enumerate(source.splitlines(), 1)
    return sum(bool(line.strip()) and line.strip()[0] != "#" and number not in prose for number, line in lines)


def functions(paths: list[Path]) -> Iterator[ast.FunctionDef]:
    """All functions of modules, without methods and inner functions."""
    for path in paths:
        yield from (node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef))


def walk_through() -> tuple[int, int]:
    """Frames from `prune` to the formula, and files that are entered."""
    import torch

    import jbrprune
    from jbrprune.criteria.scores import Accumulator

    model = jbrprune.create("test_resnet", pretrained=False, num_classes=10, zero_init_last=False)
    entered, frames = set(), []

    def watch(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(str(ROOT / "jbrprune")):
            entered.add(frame.f_code.co_filename)
            if frame.f_code is Accumulator.add.__code__:
                above, depth = frame, 1
                while above.f_back and above.f_code is not jbrprune.prune.__code__:
                    above, depth = above.f_back, depth + 1
                frames.append(depth)

    sys.setprofile(watch)
    jbrprune.prune(model, torch.randn(20, 3, 32, 32), macs=0.5, progress=False)
    sys.setprofile(None)
    return max(frames), len(entered)


def main() -> None:
    package, scripts, baselines, tests = (
        sorted((ROOT / top).rglob("*.py")) for top in ("jbrprune", "scripts", "baselines", "tests")
    )
    lines = sum(map(code_lines, package))
    widest = max(functions(package), key=lambda f: len(f.args.posonlyargs + f.args.args + f.args.kwonlyargs))
    frames, entered = walk_through()
    rows = {
        "package, lines of code": lines,
        "package, files": len(package),
        "private functions of modules": sum(function.name.startswith("_") for function in functions(package)),
        f"largest signature (`{widest.name}`)": len(widest.args.args + widest.args.kwonlyargs),
        "frames from `prune` to the formula": frames,
        "files that one `prune` enters": entered,
        "scripts, lines of code": sum(map(code_lines, scripts)),
        "baselines, files": len(baselines),
        "README, lines": len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()),
        "tests : package": f"{sum(map(code_lines, tests)) / lines:.2f}",
    }
    print("| what | now |\n|---|--:|", *(f"| {name} | {value} |" for name, value in rows.items()), sep="\n")


if __name__ == "__main__":
    main()
