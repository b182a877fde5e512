"""What an exporter is asked for and what it hands back: the seam between build.py and the to_*.py files.

Each builder is one function in one file, called lazily from build.py:

    build(model: nn.Module | None, onnx_path: Path, request: ExportRequest, folder: Path,
          calibration: np.ndarray | None) -> BuiltModel

`model` is the float32 trunk (with its head) in eval mode, rewritten for export: pixels in, embedding (and logits)
out. A builder that converts from PyTorch uses it; one that converts from ONNX uses `onnx_path`, which is self-contained
and checked, already in ``request.precision`` for onnx, ort and trt (fp16 tensors, or explicit int8 Q/DQ) and float32
for every other format. `calibration` is (N, 3, H, W), as the model takes it in deployment, present whenever
``request.precision`` is "int8". The builder writes its files into `folder`, which exists and is empty, and raises a
RobxError child in one line when it cannot.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from typing import Literal

from robx.errors import InputError
from robx.formats import FORMATS
from robx.records import Format, Precision, Student, TensorSpec

# TensorRT-RTX has no kernel for opset 23's Attention, and below 20 Gelu is taken apart.
DEFAULT_OPSET = 20

DEVICES = ("local", "arm64")  # of all formats but trt, which has its own

Role = Literal["model", "weights", "recipe", "engine", "operators", "labels", "notes"]


@dataclass(frozen=True, kw_only=True)
class ExportTarget:
    """What the user asked for."""

    format: Format
    precision: Precision = "fp32"
    device: str = "local"  # "local", "arm64", "rtx:sm89", "rtx:sm86,sm89", "jetson-orin", ...
    batch: int | None = None  # None: any batch size
    opset: int = DEFAULT_OPSET
    uint8_input: bool = False  # pixels are uint8 0..255 and the normalisation is part of the model

    @property
    def is_local(self) -> bool:
        """Whether this machine is what will run the model."""
        here = platform.machine() in ("aarch64", "arm64")
        return self.device == "local" or (self.device == "arm64" and here)

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise InputError(f"unknown format {self.format!r}: choose one of {', '.join(FORMATS)}")
        if self.format != "trt" and self.device not in DEVICES:
            raise InputError(
                f"--target {self.device!r} is not for {self.format}: give {' or '.join(DEVICES)} (jetson-orin and "
                "rtx:... are for --format trt)"
            )
        if self.precision not in ("fp32", "fp16", "int8"):
            raise InputError(f"unknown precision {self.precision!r}: choose one of fp32, fp16, int8")
        if self.batch is not None and self.batch < 1:
            raise InputError(f"batch {self.batch} is not positive: give a number such as 1, or dynamic")
        if self.uint8_input and self.format not in ("onnx", "ort", "openvino"):
            raise InputError(f"--uint8-input is for onnx, ort and openvino, not {self.format}: drop it")
        if self.format == "trt" and self.precision == "int8" and self.opset < 19:
            raise InputError(
                f"opset {self.opset} cannot quantise fp16 tensors, as TensorRT's int8 has to: give 19 to 22"
            )
        if not 18 <= self.opset <= 22:
            raise InputError(f"opset {self.opset} is not one that robx checks: give 18 to 22 (20 suits every runtime)")


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """What a builder is asked for: the target with the student and the model's inputs and outputs filled in."""

    target: ExportTarget
    student: Student
    inputs: tuple[TensorSpec, ...]  # of `onnx_path`: pixels (N, 3, H, W)
    outputs: tuple[TensorSpec, ...]  # embedding (N, D), and logits (N, C) with a head
    labels: tuple[str, ...] | None = None

    @property
    def precision(self) -> Precision:
        """The precision to build in."""
        return self.target.precision

    @property
    def image_size(self) -> int:
        """H and W of the input, in pixels."""
        return self.student.preprocessing.crop

    @property
    def fixed_batch(self) -> int:
        """The batch size for formats without dynamic shapes."""
        return self.target.batch or 1


@dataclass(frozen=True, kw_only=True)
class BuiltFile:
    """A file that a builder wrote, relative to the bundle's folder."""

    path: str
    role: Role


@dataclass(frozen=True, kw_only=True)
class BuiltModel:
    """What a builder wrote."""

    files: tuple[BuiltFile, ...]  # exactly one with the role "model": what the runtime opens
    runtime: str  # onnxruntime, openvino, tensorrt, tensorrt_rtx, executorch, litert, coreml, ncnn
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    versions: dict[str, str]  # package -> version, of what made the files
    opset: int | None = None
    notes: tuple[str, ...] = field(default=())  # what the user should know; shown, and kept in the manifest's reason
