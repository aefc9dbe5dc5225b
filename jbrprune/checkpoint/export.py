"""Export of a model to ONNX and torch.export; a file is kept only if it gives the outputs of the model."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from jbrprune.data.files import check_file
from jbrprune.errors import ArgumentError, ModelError
from jbrprune.models import preserve, timm_models
from jbrprune.models.preserve import unwrap
from jbrprune.report.records import import_optional


def export(
    model: nn.Module, path: str | os.PathLike[str], *, size: Sequence[int] | None = None, tolerance: float = 1e-4
) -> None:
    """Write a model as an ONNX file (``.onnx``) or as a program of torch.export (``.pt2``), with an open batch size.

    The file is read back and run, ONNX by onnxruntime, and takes its name only if it gives the outputs of the model on
    1, 3 and 7 images of noise: max |f(x) - f_file(x)| <= tolerance * max |f(x)|, for every output.

    Args:
        model: A model without masks; left as it was. It is exported on the CPU, in eval mode.
        path: The file to write or replace.
        size: Channels, height and width of the images; default: what timm says.
        tolerance: Largest relative difference, of a model in half precision at least its resolution.

    Raises:
        ArgumentError: Another ending, or the size of the images is not known.
        CheckpointError: The file cannot be written there.
        ImportError: The packages of ``jbrprune[export]`` are missing.
        ModelError: The model is masked, cannot be exported, or the export gives other outputs. Nothing is written.

    Example:
        >>> net = timm_models.create("resnet10t", pretrained=False)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export(net, f"{folder}/net.pt2", size=(3, 32, 32))
        ...     os.listdir(folder)
        ['net.pt2']
    """
    model = unwrap(model)
    path, size, onnx = Path(path), size or timm_models.image_size(model), str(path).endswith(".onnx")
    if not onnx and path.suffix != ".pt2":
        raise ArgumentError(f"{path}: the name must end in .onnx, or in .pt2 for a program of torch.export.")
    if size is None:
        raise ArgumentError(f"{type(model).__name__} does not say which images it takes: pass size=(C, H, W).")
    check_file(path)
    preserve.refuse_masked(model)
    runtime: Any = onnx and import_optional("onnxscript", "export") and import_optional("onnxruntime", "export")
    twin, generator = preserve.copy_model(model).cpu().eval(), torch.Generator().manual_seed(0)
    tensor = preserve.first_tensor(twin)
    dtype = torch.float32 if tensor is None else tensor.dtype
    tolerance = max(tolerance, torch.finfo(dtype).eps)
    traced, *batches = (torch.randn(count, *size, generator=generator).to(dtype) for count in (2, 1, 3, 7))
    shapes = ({0: torch.export.Dim("batch")},)
    # In a directory of its own beside the target: exporters choose names of further files by that of the first.
    with torch.no_grad(), tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as directory:
        temporary = Path(directory) / path.name
        try:
            if onnx:
                single = len(tree_leaves(twin(traced))) == 1
                names = {"input_names": ["images"], "output_names": ["output"] if single else None}
                made: Any = torch.onnx.export(
                    twin, (traced,), dynamo=True, dynamic_shapes=shapes, verbose=False, **names
                )
                made.save(temporary, external_data=False)
                session = runtime.InferenceSession(temporary, providers=["CPUExecutionProvider"])
                run = lambda images: session.run(None, {"images": images.numpy()})  # noqa: E731
            else:
                torch.export.save(torch.export.export(twin, (traced,), dynamic_shapes=shapes), temporary)
                run = torch.export.load(temporary).module()
            for images in batches:
                pair = ([o for o in tree_leaves(out) if hasattr(o, "shape")] for out in (run(images), twin(images)))
                for found, wanted in zip(*pair, strict=True):
                    limit = tolerance * float(wanted.abs().max())
                    torch.testing.assert_close(torch.as_tensor(found), wanted, rtol=0, atol=limit)
        except Exception as error:  # whatever an exporter stumbles over
            raise ModelError(
                f"{path.name}: the model cannot be exported, nothing was written: {type(error).__name__}: {error}"
            ) from error
        os.replace(temporary, path)
