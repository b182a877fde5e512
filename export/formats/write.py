"""From a candidate's ONNX to the files of its format, and the manifest that describes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from robx import __version__
from robx.export.formats import to_onnx
from robx.export.int8.candidate import Candidate
from robx.export.request import BuiltModel, ExportRequest
from robx.records import Bundle, describe_file


def write_model(
    model: to_onnx.ExportModel,
    source: Path,
    request: ExportRequest,
    folder: Path,
    *,
    images: np.ndarray | None,
    candidate: Candidate,
) -> BuiltModel:
    """The visible match from format to builder.

    Args:
        model: the student in PyTorch, for the formats that start from it.
        source: the candidate's ONNX, for the formats that start from that.
        request: what is asked for; its target has the candidate's precision.
        folder: where the files go.
        images: calibration images as the model takes them, for int8; else None.
        candidate: how to quantise, for the formats whose builder does it.

    Raises:
        RobxError: it cannot be built.
    """
    match request.target.format:
        case "onnx":
            return to_onnx.build(model, source, request, folder, images)
        case "openvino":
            from robx.export.formats import to_openvino

            return to_openvino.build(model, source, request, folder, images, candidate)
        case "trt":
            from robx.export.formats import to_tensorrt

            return to_tensorrt.build(model, source, request, folder, images)
        case "ort":
            from robx.export.formats import to_ort

            return to_ort.build(model, source, request, folder, images)
        case "executorch":
            from robx.export.formats import to_executorch

            return to_executorch.build(model, source, request, folder, images)
        case "litert":
            from robx.export.formats import to_litert

            return to_litert.build(model, source, request, folder, images)
        case "coreml":
            from robx.export.formats import to_coreml

            return to_coreml.build(model, source, request, folder, images)
        case "ncnn":
            from robx.export.formats import to_ncnn

            return to_ncnn.build(model, source, request, folder, images)


def draft(request: ExportRequest, built: BuiltModel, folder: Path, *, versions: dict[str, str]) -> Bundle:
    """The manifest of what a builder wrote into `folder`, before any judgement."""
    return Bundle(
        format=request.target.format,
        precision=request.precision,
        requested=request.precision,
        target=request.target.device,
        runtime=built.runtime,
        inputs=built.inputs,
        outputs=built.outputs,
        preprocessing=request.student.preprocessing,
        student=request.student,
        verdict="NOT_JUDGED",
        reason="; ".join(built.notes),
        rungs=(),
        calibration=None,
        opset=built.opset,
        versions=versions,
        files=tuple(describe_file(folder, file.path, file.role) for file in built.files),
        labels=request.labels,
        robx_version=__version__,
    )
