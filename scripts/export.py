"""Export a model that `jbrprune prune --out` wrote to ONNX and torch.export; nothing is left that was not verified.

    python scripts/export.py pruned/ --onnx pruned.onnx --program pruned.pt2 --size 3 224 224

Both are traced with two images and an open batch size, and must then give the outputs of the model itself on 1, 3 and 7
random images (`BATCHES`), within ``--tolerance`` of the largest output. Needs ``pip install 'jbrprune[export]'``.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from jbrprune import load
from jbrprune.cli import check_file
from jbrprune.errors import ArgumentError, JBRError, ModelError
from jbrprune.models import timm_models
from jbrprune.models.preserve import logits_of
from jbrprune.sparsity.masks import make_permanent

BATCHES = (1, 3, 7)
"""Verified with so many images; none is the number that is traced."""
TRACED = 2

Runner = Callable[[Tensor], Tensor]


class _Logits(nn.Module):
    """The model as a function of images to logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return logits_of(self.model(images))


def to_onnx(model: nn.Module, example: Tensor, path: Path) -> Runner:
    """Write an ONNX file; a function that runs it with onnxruntime."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ArgumentError(f"{error.name} is not installed: pip install 'jbrprune[export]'.") from error
    program = torch.onnx.export(
        model,
        (example,),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        input_names=["images"],
        output_names=["logits"],
        verbose=False,
    )
    program.save(path, external_data=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def to_program(model: nn.Module, example: Tensor, path: Path) -> Runner:
    """Write a torch.export file; a function that runs what is read back from it."""
    program = torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, path)
    return torch.export.load(path).module()


def exported(model: nn.Module, size: Sequence[int], path: Path, write: Callable, tolerance: float) -> dict[str, object]:
    """Export, verify, and only then give the file its name; what a JSON line says of it.

    Raises:
        ModelError: The model cannot be exported, or the export gives other outputs.
    """
    generator = torch.Generator().manual_seed(0)
    wrapped = _Logits(model).eval()
    # In a directory of its own beside the target: exporters choose names of further files by that of the first.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as directory:
        temporary = Path(directory) / path.name
        try:
            run = write(wrapped, torch.randn(TRACED, *size, generator=generator), temporary)
        except JBRError:
            raise
        except Exception as error:  # whatever an exporter stumbles over
            raise ModelError(f"{path.name}: the model cannot be exported: {type(error).__name__}: {error}") from error
        images = {count: torch.randn(count, *size, generator=generator) for count in BATCHES}
        found = {count: difference(wrapped, run, batch) for count, batch in images.items()}
        for count, value in found.items():
            if not value <= tolerance:  # NaN is not
                raise ModelError(
                    f"{path.name}: on {count} images the outputs differ by {value:.2g} of the largest one, more than "
                    f"{tolerance:.2g}. Nothing was written."
                )
        os.replace(temporary, path)
    return {"file": str(path), "bytes": path.stat().st_size, "largest_difference": max(found.values())}


def difference(model: nn.Module, run: Runner, images: Tensor) -> float:
    """The largest difference between two functions, as a share of the largest output."""
    with torch.no_grad():
        wanted, found = model(images), run(images)
    if found.shape != wanted.shape:
        raise ModelError(f"{len(images)} images gave outputs of shape {tuple(found.shape)}, not {tuple(wanted.shape)}.")
    return float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-12))


def targets(onnx: Path | None, program: Path | None) -> dict[Path, Callable]:
    """File -> what writes it.

    Raises:
        ArgumentError: There is none, or both are the same.
        CheckpointError: One cannot be written.
    """
    wanted = {path: write for path, write in ((onnx, to_onnx), (program, to_program)) if path}
    if not wanted:
        raise ArgumentError("Say what to write: --onnx FILE, --program FILE, or both.")
    if onnx and program and onnx.resolve() == program.resolve():
        raise ArgumentError(f"--onnx and --program are both {onnx}: give each format a file of its own.")
    for path in wanted:
        check_file(path)
    return wanted


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pruned", type=Path, help="directory of a saved model")
    parser.add_argument("--onnx", type=Path, help="file to write (.onnx)")
    parser.add_argument("--program", type=Path, help="file to write (.pt2)")
    parser.add_argument("--size", type=int, nargs=3, metavar=("C", "H", "W"), help="default: what timm says")
    parser.add_argument("--tolerance", type=float, default=1e-4)
    args = parser.parse_args(argv)
    try:
        wanted = targets(args.onnx, args.program)
        model = make_permanent(load(args.pruned))
        size = args.size or timm_models.image_size(model)
        if size is None:
            raise ArgumentError("The model does not say what images it takes: pass --size C H W.")
        for path, write in wanted.items():
            print(json.dumps({"model": str(args.pruned)} | exported(model, size, path, write, args.tolerance)))
    except JBRError as error:
        raise SystemExit(f"export.py: {error}") from error


if __name__ == "__main__":
    main()
