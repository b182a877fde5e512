"""From a candidate's ONNX or PyTorch network to the files of a format: what every ``to_x.py`` takes and returns.

Each builder is one function in one file, found through ``robx.formats.FORMATS``:

    build(source: Source, request: ExportRequest, folder: Path) -> BuiltModel

It writes its files into `folder`, which exists and is empty, and raises a RobxError in one line when it cannot. ncnn's
has no int8 and Core ML's no calibration: a builder uses the parts of `source` that its converter needs.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from torch import nn

from robx import __version__
from robx.export.int8.candidate import Candidate
from robx.export.int8.ranges import Ranges
from robx.export.request import ExportRequest
from robx.formats import FORMATS
from robx.records import Bundle, TensorSpec, describe_file

Role = Literal["model", "weights", "recipe", "engine", "operators", "labels", "notes"]


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a builder converts from."""

    # The float32 network (with its head) in eval mode, rewritten for export: pixels in, embedding (and logits) out.
    model: nn.Module | None
    # The candidate's ONNX file, self-contained and checked: in the target precision (fp16 tensors, or int8 Q/DQ) for
    # formats with `onnx_precision`, else float32.
    onnx: Path
    # Images (N, 3, H, W) as the model takes them in deployment; present whenever the precision is int8.
    calibration: np.ndarray | None = None
    ranges: Ranges | None = None  # of activations by the ONNX tensors' names, where they were trained with the weights
    candidate: Candidate | None = None  # how to quantise, for formats whose builder does it
    shared: Path | None = None  # folder for files that the candidates of one export have in common; None: none is kept


@dataclass(frozen=True, kw_only=True)
class BuiltFile:
    """A file that a builder wrote, relative to the bundle's folder."""

    path: str
    role: Role


@dataclass(frozen=True, kw_only=True)
class BuiltModel:
    """What a builder wrote."""

    files: tuple[BuiltFile, ...]  # exactly one with the role "model": what the runtime opens
    runtime: str  # a key of robx.formats.RUNTIMES
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    versions: dict[str, str]  # package -> version, of what made the files
    opset: int | None = None
    notes: tuple[str, ...] = field(default=())  # what the user should know; kept in the manifest's reason


def build_model(source: Source, request: ExportRequest, folder: Path) -> BuiltModel:
    """Write `source` in the request's format into `folder`.

    Raises:
        RobxError: the format cannot be built.
    """
    builder = importlib.import_module(f"robx.export.formats.{FORMATS[request.target.format].builder}")
    built: BuiltModel = builder.build(source, request, folder)
    return built


def draft_manifest(
    request: ExportRequest, built: BuiltModel, folder: Path, *, versions: Mapping[str, str] | None = None
) -> Bundle:
    """The manifest of what a builder wrote into `folder`, not judged yet."""
    return Bundle(
        format=request.target.format,
        precision=request.precision,
        requested=request.precision,
        target=request.target.device,
        runtime=built.runtime,
        inputs=built.inputs,
        outputs=built.outputs,
        preprocessing=request.host_preprocessing,
        student=request.student,
        verdict="NOT_JUDGED",
        reason="; ".join(built.notes),
        rungs=(),
        calibration=None,
        opset=built.opset,
        versions={"robx": __version__, **built.versions, **(versions or {})},
        files=tuple(describe_file(folder, file.path, file.role) for file in built.files),
        labels=request.labels,
        robx_version=__version__,
        in_model=request.in_model,
        rewrites=request.rewrites,
    )
