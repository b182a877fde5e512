"""What the user asks of an export, checked before anything is read or built."""

from __future__ import annotations

import platform
from dataclasses import dataclass

from robx.errors import InputError
from robx.formats import FORMATS
from robx.records import Format, Precision, Student, TensorSpec

# TensorRT-RTX has no kernel for opset 23's Attention, and below 20 Gelu is decomposed.
DEFAULT_OPSET = 20
OPSETS = range(18, 23)  # tested

DEVICES = ("local", "arm64")  # of every format without targets of its own


@dataclass(frozen=True, kw_only=True)
class ExportTarget:
    """What to export to."""

    format: Format
    precision: Precision = "fp32"
    device: str = "local"  # "local", "arm64", "rtx:sm89", "rtx:sm86+sm89", "jetson-orin", ...
    batch: int | None = None  # None: dynamic
    opset: int = DEFAULT_OPSET
    uint8_input: bool = False  # pixels are uint8 0..255 and the normalisation is part of the model

    @property
    def is_local(self) -> bool:
        """Whether the model is for this machine."""
        here = platform.machine() in ("aarch64", "arm64")
        return self.device == "local" or (self.device == "arm64" and here)

    def __post_init__(self) -> None:
        """Refuse combinations that no builder supports."""
        if self.format not in FORMATS:
            raise InputError(f"unknown format {self.format!r}: choose one of {', '.join(FORMATS)}")
        row = FORMATS[self.format]
        if not row.own_targets and self.device not in DEVICES:
            raise InputError(
                f"--target {self.device!r} is not for {self.format}: give {' or '.join(DEVICES)} (jetson-orin and "
                "rtx:... are for --format trt)"
            )
        if self.precision not in ("fp32", "fp16", "int8"):
            raise InputError(f"unknown precision {self.precision!r}: choose one of fp32, fp16, int8")
        if self.precision not in row.precisions:
            offered = " or ".join(row.precisions)
            raise InputError(f"{row.title} is exported as {offered}, not {self.precision}: choose one of these")
        if self.batch is not None and self.batch < 1:
            raise InputError(f"batch must be at least 1, got {self.batch}: give a number such as 1, or dynamic")
        if self.uint8_input and not row.uint8_input:
            able = ", ".join(name for name, other in FORMATS.items() if other.uint8_input)
            raise InputError(f"--uint8-input is supported for {able}, not {self.format}: drop it")
        if self.format == "trt" and self.precision == "int8" and self.opset < 19:
            raise InputError(f"TensorRT int8 needs opset 19 or later (Q/DQ of fp16 tensors), got {self.opset}: give 20")
        if self.opset not in OPSETS:
            raise InputError(
                f"opset {self.opset} is not supported: give {OPSETS[0]} to {OPSETS[-1]} (20 suits every runtime)"
            )


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """A target together with the student and the model's inputs and outputs."""

    target: ExportTarget
    student: Student
    inputs: tuple[TensorSpec, ...]  # pixels (N, 3, H, W)
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
