"""OpenVINO IR: fp32, fp16 weights, and int8 by NNCF."""

from __future__ import annotations

import io
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from robx.errors import ArtifactError, InputError, MissingExtra, first_line
from robx.export.int8.candidate import Candidate
from robx.export.quiet import quiet
from robx.export.request import BuiltFile, BuiltModel, ExportRequest
from robx.store.onnx_safety import load_checked


def build(
    model: nn.Module | None,
    onnx_path: Path,
    request: ExportRequest,
    folder: Path,
    calibration: np.ndarray | None,
    candidate: Candidate | None = None,
) -> BuiltModel:
    """Write model.xml and model.bin from float32 ONNX.

    fp16 is the weights' form: a CPU computes in float32 whatever the file says, unless its hint says otherwise. int8 is
    quantised on the OpenVINO graph itself, with `candidate`'s settings.

    Raises:
        MissingExtra: openvino or nncf is not installed.
        ArtifactError: OpenVINO cannot read or write the model.
    """
    try:
        import openvino as ov
    except ImportError as error:
        raise MissingExtra("openvino", "openvino", purpose="exporting to OpenVINO", cause=error) from error
    versions = {name: version(name) for name in ("onnx", "openvino", "torch")}
    network = read_onnx(onnx_path.read_bytes(), where=onnx_path.name)
    if request.precision == "int8":
        from robx.export.int8.by_nncf import quantize_openvino

        if calibration is None:
            raise InputError("an int8 export needs calibration images: give --data")
        chosen = candidate or Candidate(name="nncf", quantiser="nncf")
        network = quantize_openvino(network, load_checked(onnx_path), calibration, chosen)
        versions["nncf"] = version("nncf")
    try:
        ov.save_model(network, folder / "model.xml", compress_to_fp16=request.precision == "fp16")
    except Exception as error:
        raise ArtifactError(f"OpenVINO cannot write the model: {first_line(error)}") from error
    return BuiltModel(
        files=(BuiltFile(path="model.xml", role="model"), BuiltFile(path="model.bin", role="weights")),
        runtime="openvino",
        inputs=request.inputs,
        outputs=request.outputs,
        versions=versions,
        opset=request.target.opset,
    )


def read_onnx(model: bytes, *, where: str) -> Any:
    """The ``openvino.Model`` of a float32 ONNX model, with OpenVINO's own simplifications.

    Not ``Core.read_model``: where the batch is free it leaves each bias a computation with shapes, which is slower to
    run and no constant that NNCF could correct, and NNCF says nothing of that. From bytes, so that no weight stays
    mapped to a file that may go away.

    Raises:
        ArtifactError: OpenVINO cannot read it; the message names `where`.
    """
    import openvino as ov

    try:
        with quiet():
            return ov.convert_model(io.BytesIO(model))
    except Exception as error:
        raise ArtifactError(f"OpenVINO cannot read {where}: {first_line(error)}") from error
