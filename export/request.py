"""What the user asks of an export, checked before anything is read or built."""

from __future__ import annotations

import dataclasses
import math
import platform
from dataclasses import dataclass
from typing import Literal

from robx.errors import InputError
from robx.formats import FORMATS, FormatRow
from robx.records import MAX_SIDE, Format, Normalisation, Precision, Preprocessing, Student, TensorSpec

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
    resize_in_graph: bool = False  # with uint8_input: images of any size, and the resize and crop are part of the model
    input_layout: Literal["NCHW", "NHWC"] = "NCHW"  # with uint8_input: axes of the input
    input_channels: Literal["RGB", "BGR"] = "RGB"  # with uint8_input: order of the channels
    size: tuple[int, int] | None = None  # height and width of the input in pixels; None: as trained

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
        self._check_front(row)
        if self.format == "trt" and self.precision == "int8" and self.opset < 19:
            raise InputError(f"TensorRT int8 needs opset 19 or later (Q/DQ of fp16 tensors), got {self.opset}: give 20")
        if self.size is not None and not all(0 < side <= MAX_SIDE for side in self.size):
            raise InputError(f"--size must be 1 to {MAX_SIDE} pixels, got {self.size}: give a size such as 224")
        if self.opset not in OPSETS:
            raise InputError(
                f"opset {self.opset} is not supported: give {OPSETS[0]} to {OPSETS[-1]} (20 suits every runtime)"
            )

    def _check_front(self, row: FormatRow) -> None:
        options = {
            "--resize-in-graph": self.resize_in_graph,
            f"--input-layout {self.input_layout.lower()}": self.input_layout != "NCHW",
            f"--input-channels {self.input_channels.lower()}": self.input_channels != "RGB",
        }
        given = [option for option, is_given in options.items() if is_given]
        if not given:
            return
        if not row.uint8_input:
            able = ", ".join(name for name, other in FORMATS.items() if other.uint8_input)
            raise InputError(
                f"{given[0]} is supported for {able}, where uint8 input is, not for {self.format}: drop it"
            )
        if not self.uint8_input:
            raise InputError(f"{given[0]} is for uint8 pixels: add --uint8-input")
        if self.input_layout not in ("NCHW", "NHWC"):
            raise InputError(f"unknown input layout {self.input_layout!r}: give NCHW or NHWC")
        if self.input_channels not in ("RGB", "BGR"):
            raise InputError(f"unknown order of channels {self.input_channels!r}: give RGB or BGR")


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """A target together with the student and the model's inputs and outputs."""

    target: ExportTarget
    student: Student  # with the preprocessing of the exported size
    inputs: tuple[TensorSpec, ...]  # pixels (N, 3, H, W)
    outputs: tuple[TensorSpec, ...]  # embedding (N, D), and logits (N, C) with a head
    labels: tuple[str, ...] | None = None
    rewrites: tuple[str, ...] = ()  # how the exported network differs from timm's; see Bundle.rewrites

    @property
    def precision(self) -> Precision:
        """The precision to build in."""
        return self.target.precision

    @property
    def image_shape(self) -> tuple[int, int]:
        """Height and width of the input, in pixels."""
        return self.student.preprocessing.shape

    @property
    def host_preprocessing(self) -> Preprocessing:
        """What the host does to an image before the model; the student's, but for what the model does itself.

        With uint8 input that leaves the resize and crop: minus 0 and over 1 / 255 are the pixels 0..255 again.
        """
        if not self.target.uint8_input:
            return self.student.preprocessing
        return dataclasses.replace(self.student.preprocessing, mean=(0.0, 0.0, 0.0), std=(1 / 255, 1 / 255, 1 / 255))

    @property
    def in_model(self) -> Normalisation | None:
        """The normalisation that the model does itself; None with float input."""
        pre = self.student.preprocessing
        return Normalisation(mean=pre.mean, std=pre.std) if self.target.uint8_input else None

    @property
    def front(self) -> Normalisation | None:
        """What the shipped model does to its input, where that is more than `in_model`: axes, channels, resize."""
        target, inside = self.target, self.in_model
        if inside is None:
            return None
        front = dataclasses.replace(
            inside, layout=target.input_layout, channels=target.input_channels, resize=target.resize_in_graph
        )
        return front if front != inside else None

    @property
    def front_preprocessing(self) -> Preprocessing:
        """What the host does where a fixed size is needed, as for a test set: `host_preprocessing`, without its margin.

        Such an image has the size after the resize in the model, which leaves it as it is and crops it.
        """
        pre = self.host_preprocessing
        if not self.target.resize_in_graph:
            return pre
        height, width = pre.shape
        wide = None if height == width else math.ceil(pre.size * width / height)
        return dataclasses.replace(pre, crop=pre.size, crop_width=wide)

    @property
    def fixed_batch(self) -> int:
        """The batch size for formats without dynamic shapes."""
        return self.target.batch or 1
