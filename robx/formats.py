"""The table of export formats and the runtimes that execute them: a new format is one row here and one ``to_x.py``.

    FORMATS["openvino"]      how a student is written in this format: the builder, its precisions and options
    RUNTIMES["openvino"]     how such a bundle is opened: the engine file, the packages, how to install them

``robx export`` takes its choices from FORMATS, and ``runtime/session.py`` its engines from RUNTIMES. The file names are
modules of ``robx.export.formats`` and ``robx.runtime.engines``. Standard library only: the records import this.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Format = Literal["onnx", "openvino", "trt", "ort", "executorch", "litert", "coreml", "ncnn"]
Precision = Literal["fp32", "fp16", "int8"]
Int8Ladder = Literal["onnxruntime", "nncf", "tensorrt", "pt2e", "ai-edge", "converter"]


@dataclass(frozen=True, kw_only=True)
class FormatRow:
    """What an export format can do and which file writes it."""

    name: Format
    title: str  # as its project spells it
    builder: str  # module of robx.export.formats
    runtimes: tuple[str, ...]  # keys of RUNTIMES; the first is the default
    extra: str | None  # extra of robx that installs the converter; None: installed with robx
    precisions: tuple[Precision, ...] = ("fp32", "fp16", "int8")
    onnx_precision: bool = False  # the builder takes ONNX already in the target precision; else float32
    quantiser: Int8Ladder | None = None  # which int8 candidates are tried; None: no int8
    takes_opset: bool = False  # is made from ONNX, so that --opset counts
    uint8_input: bool = False  # can include the normalisation and take uint8 pixels
    own_targets: bool = False  # --target is parsed by the builder (rtx:sm89, jetson-orin)


@dataclass(frozen=True, kw_only=True)
class RuntimeRow:
    """What executes a bundle and how it is installed."""

    name: str
    engine: str | None  # module of robx.runtime.engines; None: robx cannot run it
    packages: tuple[str, ...]  # distributions, any of which provides it
    extra: str | None  # extra of robx that installs it; None: installed with robx
    device_install: str = ""  # command for a device without robx
    title: str = ""  # as its project spells it, where several runtimes execute one format
    uses_cpu: bool = True  # False: it runs on a GPU whatever is asked for, so that --threads has no effect


def _formats(*rows: FormatRow) -> dict[str, FormatRow]:
    return {row.name: row for row in rows}


def _runtimes(*rows: RuntimeRow) -> dict[str, RuntimeRow]:
    return {row.name: row for row in rows}


# fmt: off
FORMATS = _formats(
    FormatRow(name="onnx", title="ONNX", builder="to_onnx", runtimes=("onnxruntime",), extra=None,
              onnx_precision=True, quantiser="onnxruntime", takes_opset=True, uint8_input=True),
    FormatRow(name="openvino", title="OpenVINO", builder="to_openvino", runtimes=("openvino",), extra="openvino",
              quantiser="nncf", takes_opset=True, uint8_input=True),
    FormatRow(name="trt", title="TensorRT", builder="to_tensorrt", runtimes=("tensorrt", "tensorrt_rtx"), extra="trt",
              onnx_precision=True, quantiser="tensorrt", takes_opset=True, own_targets=True),
    FormatRow(name="ort", title="ONNX Runtime (.ort)", builder="to_ort", runtimes=("onnxruntime",), extra=None,
              onnx_precision=True, quantiser="onnxruntime", takes_opset=True, uint8_input=True),
    FormatRow(name="executorch", title="ExecuTorch", builder="to_executorch", runtimes=("executorch",),
              extra="executorch", precisions=("fp32", "int8"), quantiser="pt2e"),
    FormatRow(name="litert", title="LiteRT", builder="to_litert", runtimes=("litert",), extra="litert",
              precisions=("fp32", "int8"), quantiser="ai-edge"),
    FormatRow(name="coreml", title="Core ML", builder="to_coreml", runtimes=("coreml",), extra="coreml",
              quantiser="converter"),
    FormatRow(name="ncnn", title="ncnn", builder="to_ncnn", runtimes=("ncnn",), extra="ncnn",
              precisions=("fp32", "fp16")),
)

RUNTIMES = _runtimes(
    RuntimeRow(name="onnxruntime", engine="on_onnxruntime", packages=("onnxruntime", "onnxruntime-gpu"), extra=None,
               device_install="pip install onnxruntime"),
    RuntimeRow(name="openvino", engine="on_openvino", packages=("openvino",), extra="openvino",
               device_install="pip install openvino"),
    RuntimeRow(name="tensorrt", engine="on_tensorrt", packages=("tensorrt",), extra="trt",
               device_install="use the board's JetPack, or pip install tensorrt", title="TensorRT", uses_cpu=False),
    RuntimeRow(name="tensorrt_rtx", engine="on_tensorrt", packages=("tensorrt_rtx",), extra="trt-rtx",
               device_install="pip install tensorrt_rtx", title="TensorRT-RTX", uses_cpu=False),
    RuntimeRow(name="executorch", engine="on_executorch", packages=("executorch",), extra="executorch",
               device_install="pip install executorch"),
    RuntimeRow(name="litert", engine="on_litert", packages=("ai-edge-litert",), extra="litert",
               device_install="pip install ai-edge-litert"),
    RuntimeRow(name="coreml", engine=None, packages=("coremltools",), extra="coreml"),
    RuntimeRow(name="ncnn", engine="on_ncnn", packages=("ncnn",), extra="ncnn", device_install="pip install ncnn"),
)
# fmt: on

# Providers that compute in CPU threads; all others are accelerators.
CPU_PROVIDERS = ("cpu", "xnnpack")
# What any engine calls the hardware that it runs on; each engine refuses those it does not have.
PROVIDERS = ("cpu", "cuda", "gpu", "npu", "qnn", "tensorrt", "xnnpack")

# How the manifest.json of a bundle begins; manifests of other tools begin otherwise.
MANIFEST_START = re.compile(rf'\{{\s*"format": "({"|".join(FORMATS)})",\s*"precision": "')
