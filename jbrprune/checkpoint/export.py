"""Export of a model to ONNX and torch.export; a file is kept only if it gives the outputs of the model."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from jbrprune.data.files import check_file
from jbrprune.errors import ArgumentError, ModelError
from jbrprune.models import preserve, timm_models
from jbrprune.report.records import import_optional

Runner = Callable[[Tensor], object]

TRACED = 2
BATCHES = (1, 3, 7)
"""A file is verified with so many images; none is the number that is traced."""


def export(
    model: nn.Module, path: str | os.PathLike[str], *, size: Sequence[int] | None = None, tolerance: float = 1e-4
) -> dict[str, object]:
    """Write a model as an ONNX file (``.onnx``) or as a program of torch.export (``.pt2``), with an open batch size.

    The file is read back and run, ONNX by onnxruntime, and takes its name only if it gives the outputs of the model on
    1, 3 and 7 images of noise: max |f(x) - f_file(x)| <= tolerance * max |f(x)|, for every output.

    Args:
        model: A model without masks; left as it was. It is exported on the CPU, in eval mode.
        path: The file to write or replace.
        size: Channels, height and width of the images; default: what timm says.
        tolerance: Largest relative difference, of a model in half precision at least its resolution.

    Returns:
        ``file``, ``bytes`` and ``largest_difference``.

    Raises:
        ArgumentError: Another ending, or the size of the images is not known.
        CheckpointError: The file cannot be written there.
        ImportError: The packages of ``jbrprune[export]`` are missing.
        ModelError: The model is masked, cannot be exported, or the export gives other outputs. Nothing is written.

    Example:
        >>> net = timm_models.create("resnet10t", pretrained=False)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     found = export(net, f"{folder}/net.pt2", size=(3, 32, 32))
        >>> found["largest_difference"] < 1e-4
        True
    """
    path, size = Path(path), size or timm_models.image_size(model)
    if path.suffix not in (".onnx", ".pt2"):
        raise ArgumentError(f"{path}: the name must end in .onnx, or in .pt2 for a program of torch.export.")
    if size is None:
        raise ArgumentError(f"{type(model).__name__} does not say which images it takes: pass size=(C, H, W).")
    check_file(path)
    preserve.refuse_masked(model)
    write, largest = write_onnx if path.suffix == ".onnx" else write_program, 0.0
    twin, generator = preserve.copy_model(model).cpu().eval(), torch.Generator().manual_seed(0)
    tensor = preserve.first_tensor(twin)
    dtype = torch.float32 if tensor is None else tensor.dtype
    tolerance = max(tolerance, torch.finfo(dtype).eps)

    def draw(count: int) -> Tensor:
        return torch.randn(count, *size, generator=generator).to(dtype)

    # In a directory of its own beside the target: exporters choose names of further files by that of the first.
    with torch.no_grad(), tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as directory:
        temporary = Path(directory) / path.name
        try:
            run = write(twin, draw(TRACED), temporary)
        except ImportError:
            raise
        except Exception as error:  # whatever an exporter stumbles over
            raise ModelError(f"{path.name}: the model cannot be exported: {type(error).__name__}: {error}") from error
        for count in BATCHES:
            images = draw(count)
            wanted, found = ([leaf for leaf in tree_leaves(f(images)) if isinstance(leaf, Tensor)] for f in (twin, run))
            shapes = [[tuple(leaf.shape) for leaf in leaves] for leaves in (found, wanted)]
            if shapes[0] != shapes[1]:
                raise ModelError(
                    f"{path.name}: {count} images gave outputs of shape {shapes[0]}, not {shapes[1]}. Nothing was "
                    "written."
                )
            for one, other in zip(found, wanted):
                apart = float((one - other).abs().max() / other.abs().max().clamp_min(1e-12))
                if not apart <= tolerance:  # NaN is not
                    raise ModelError(
                        f"{path.name}: on {count} images the outputs differ by {apart:.2g} of the largest one, more "
                        f"than {tolerance:.2g}. Nothing was written."
                    )
                largest = max(largest, apart)
        os.replace(temporary, path)
    return {"file": str(path), "bytes": path.stat().st_size, "largest_difference": largest}


def write_onnx(model: nn.Module, example: Tensor, path: Path) -> Runner:
    """Write an ONNX file; a function that runs it."""
    onnxruntime = import_optional("onnxruntime", "export")
    import_optional("onnxscript", "export")
    shapes = ({0: torch.export.Dim("batch")},)
    several = len(tree_leaves(model(example))) > 1
    names = {"input_names": ["images"]} | ({} if several else {"output_names": ["output"]})
    program = torch.onnx.export(model, (example,), dynamo=True, dynamic_shapes=shapes, verbose=False, **names)
    program.save(path, external_data=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: [torch.from_numpy(found) for found in session.run(None, {"images": images.numpy()})]


def write_program(model: nn.Module, example: Tensor, path: Path) -> Runner:
    """Write a program of torch.export; a function that runs what is read back."""
    program = torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, path)
    return torch.export.load(path).module()
