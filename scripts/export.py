"""Export a model that `jbrprune prune --out` wrote to ONNX and torch.export; nothing is left that was not verified.

    python scripts/export.py pruned/ --onnx pruned.onnx --program pruned.pt2 --size 3 224 224

Both are traced with two images and an open batch size, and must then give the outputs of the model itself on 1, 3 and 7
random images (`BATCHES`), within ``--tolerance`` of the largest output. Needs ``pip install 'jbrprune[export]'``.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from common import exit_on_error, make_parser
from torch import Tensor, nn

from jbrprune import load
from jbrprune.errors import ArgumentError, JBRError, ModelError
from jbrprune.models import timm_models
from jbrprune.models.preserve import logits_of
from jbrprune.sparsity.masks import make_permanent

BATCHES = (1, 3, 7)
"""Verified with so many images; none is the number that is traced."""
TRACED = 2

Runner = Callable[[Tensor], Tensor]


class Logits(nn.Module):
    """The model as a function of images to logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """``[B, K]``."""
        return logits_of(self.model(images))


def to_onnx(model: nn.Module, example: Tensor, path: Path) -> Runner:
    """Write an ONNX file; a function that runs it with onnxruntime."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ArgumentError(f"{error.name} is not installed: pip install 'jbrprune[export]'.") from error
    shapes = ({0: torch.export.Dim("batch")},)
    names = {"input_names": ["images"], "output_names": ["logits"]}
    program = torch.onnx.export(model, (example,), dynamo=True, dynamic_shapes=shapes, verbose=False, **names)
    program.save(path, external_data=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def to_program(model: nn.Module, example: Tensor, path: Path) -> Runner:
    """Write a torch.export file; a function that runs what is read back from it."""
    program = torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, path)
    return torch.export.load(path).module()


def export(model: nn.Module, size: Sequence[int], path: Path, write: Callable, tolerance: float) -> dict[str, object]:
    """Export, verify, and only then give the file its name; what a JSON line says of it.

    Raises:
        ModelError: The model cannot be exported, or the export gives other outputs.
    """
    generator = torch.Generator().manual_seed(0)
    wrapped, largest = Logits(model).eval(), 0.0
    # In a directory of its own beside the target: exporters choose names of further files by that of the first.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as directory:
        temporary = Path(directory) / path.name
        try:
            run = write(wrapped, torch.randn(TRACED, *size, generator=generator), temporary)
        except JBRError:
            raise
        except Exception as error:  # whatever an exporter stumbles over
            raise ModelError(f"{path.name}: the model cannot be exported: {type(error).__name__}: {error}") from error
        for count in BATCHES:
            images = torch.randn(count, *size, generator=generator)
            with torch.no_grad():
                wanted, found = wrapped(images), run(images)
            if found.shape != wanted.shape:
                shapes = f"{tuple(found.shape)}, not {tuple(wanted.shape)}"
                raise ModelError(f"{path.name}: {count} images gave outputs of shape {shapes}. Nothing was written.")
            apart = float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-12))
            if not apart <= tolerance:  # NaN is not
                raise ModelError(
                    f"{path.name}: on {count} images the outputs differ by {apart:.2g} of the largest one, more than "
                    f"{tolerance:.2g}. Nothing was written."
                )
            largest = max(largest, apart)
        os.replace(temporary, path)
    return {"file": str(path), "bytes": path.stat().st_size, "largest_difference": largest}


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("pruned", type=Path, help="directory of a saved model")
    parser.add_argument("--onnx", type=Path, help="file to write (.onnx)")
    parser.add_argument("--program", type=Path, help="file to write (.pt2)")
    parser.add_argument("--size", type=int, nargs=3, metavar=("C", "H", "W"), help="default: what timm says")
    parser.add_argument("--tolerance", type=float, default=1e-4)
    args = parser.parse_args(argv)
    with exit_on_error("export.py"):
        wanted = [(path, write) for path, write in ((args.onnx, to_onnx), (args.program, to_program)) if path]
        if not wanted:
            raise ArgumentError("Say what to write: --onnx FILE, --program FILE, or both.")
        for path, _ in wanted:
            if path.is_dir() or not path.absolute().parent.is_dir():
                raise ArgumentError(f"{path} cannot be written: expected a file in a directory that is there.")
        if len({path.resolve() for path, _ in wanted}) < len(wanted):
            raise ArgumentError(f"--onnx and --program are both {args.onnx}: give each format a file of its own.")
        model = make_permanent(load(args.pruned))
        size = args.size or timm_models.image_size(model)
        if size is None:
            raise ArgumentError("The model does not say what images it takes: pass --size C H W.")
        for path, write in wanted:
            print(json.dumps({"model": str(args.pruned)} | export(model, size, path, write, args.tolerance)))


if __name__ == "__main__":
    main()
