"""Core ML (an ML program for iOS 16, macOS 13 and later): fp32, fp16, and int8 weights with fp16 activations.

Core ML runs on Apple's systems only. robx converts on any system but cannot run the result, so its outputs are not
compared with PyTorch's; the bundle says so.
"""

from __future__ import annotations

import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from robx.errors import ArtifactError, MissingExtra, first_line
from robx.export.formats.builder import BuiltFile, BuiltModel, Role, Source
from robx.export.formats.mobile import example_input, fix_batch, mobile_model
from robx.export.quiet import quiet
from robx.export.request import ExportRequest
from robx.store.files import write_bytes

_PACKAGE = "model.mlpackage"
_ROLES: dict[str, Role] = {"Manifest.json": "model", "model.mlmodel": "weights", "weight.bin": "weights"}


def build(source: Source, request: ExportRequest, folder: Path) -> BuiltModel:
    """Write model.mlpackage, with a fixed batch and float32 at both ends; int8 needs no calibration images.

    Raises:
        MissingExtra: coremltools is not installed.
        ArtifactError: the converter failed; the message has its own error.
    """
    mobile, example = mobile_model(source.model, request), example_input(request)
    names = [spec.name for spec in request.outputs]
    with quiet():
        try:
            import coremltools
        except ImportError as error:
            raise MissingExtra("coremltools", "coreml", purpose="exporting to Core ML", cause=error) from error
        try:
            package = _convert(coremltools, mobile, example, request.inputs[0].name, names, request.precision)
            paths = _write(package, folder)
        except Exception as error:
            raise ArtifactError(
                f"Core ML cannot convert {request.student.timm_name} ({first_line(error)}): choose another format"
            ) from error
    why = "robx has no Core ML engine" if sys.platform == "darwin" else "Core ML runs on Apple's systems only"
    notes = [f"outputs not compared with PyTorch's: {why}"]
    if request.precision == "int8":
        notes.append("weights are int8 with one scale per channel; activations stay in fp16")
    return BuiltModel(
        files=tuple(BuiltFile(path=path, role=_ROLES[Path(path).name]) for path in paths),
        runtime="coreml",
        inputs=fix_batch(request.inputs, request.fixed_batch),
        outputs=fix_batch(request.outputs, request.fixed_batch),
        versions={name: version(name) for name in ("coremltools", "torch")},
        notes=tuple(notes),
    )


def _convert(
    ct: Any, model: nn.Module, example: torch.Tensor, input_name: str, output_names: list[str], precision: str
) -> Any:
    """The converted model, in memory."""
    exported = torch.export.export(model, (example,)).run_decompositions({})
    converted = ct.convert(
        exported,
        convert_to="mlprogram",
        inputs=[ct.TensorType(name=input_name, shape=tuple(example.shape), dtype=np.float32)],
        outputs=[ct.TensorType(name=name, dtype=np.float32) for name in output_names],
        compute_precision=ct.precision.FLOAT32 if precision == "fp32" else ct.precision.FLOAT16,
        minimum_deployment_target=ct.target.iOS16,
        skip_model_load=True,
    )
    if precision != "int8":
        return converted
    optimize = ct.optimize.coreml
    per_channel = optimize.OpLinearQuantizerConfig(mode="linear_symmetric", dtype=np.int8)
    return optimize.linear_quantize_weights(converted, optimize.OptimizationConfig(global_config=per_channel))


def _write(package: Any, folder: Path) -> list[str]:
    """Write the package's files below `folder`, without the converter's debugging files; returns their paths."""
    with tempfile.TemporaryDirectory() as scratch:
        saved = Path(scratch) / _PACKAGE
        package.save(str(saved))
        kept = sorted(path for path in saved.rglob("*") if path.name in _ROLES)
        for path in kept:
            write_bytes(folder / path.relative_to(saved.parent), path.read_bytes())
        return [path.relative_to(saved.parent).as_posix() for path in kept]
