"""OpenVINO IR: fp32, fp16 weights, and int8 by NNCF."""

from __future__ import annotations

import io
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

from robx.errors import ArtifactError, InputError, MissingExtra, first_line
from robx.export.formats.builder import BuiltFile, BuiltModel, Source
from robx.export.int8.candidate import Candidate
from robx.export.quiet import quiet
from robx.export.request import ExportRequest
from robx.records import Normalisation, Preprocessing
from robx.store.onnx_safety import load_checked

_NAMED_BY_OPENVINO = re.compile(
    r"[A-Z][A-Za-z0-9]*_\d+"
)  # such as Constant_8076; the nodes of an ONNX file begin small


def build(source: Source, request: ExportRequest, folder: Path) -> BuiltModel:
    """Write model.xml and model.bin from float32 ONNX.

    fp16 concerns the stored weights: a CPU computes in float32 unless the inference precision hint says otherwise. int8
    is quantised on the OpenVINO graph itself, with the candidate's settings.

    Raises:
        MissingExtra: openvino or nncf is not installed.
        ArtifactError: OpenVINO cannot read or write the model.
    """
    try:
        import openvino as ov
    except ImportError as error:
        raise MissingExtra("openvino", "openvino", purpose="exporting to OpenVINO", cause=error) from error
    versions = {name: version(name) for name in ("onnx", "openvino", "torch")}
    network = read_onnx(source.onnx.read_bytes(), where=source.onnx.name)
    if request.precision == "int8":
        from robx.export.int8.by_nncf import quantize_openvino, use_ranges

        if source.calibration is None:
            raise InputError("an int8 export needs calibration images: give --data")
        candidate = source.candidate or Candidate(name="nncf", quantiser="nncf")
        network = quantize_openvino(network, load_checked(source.onnx), source.calibration, candidate)
        if source.ranges is not None:
            use_ranges(network, source.ranges)
        versions["nncf"] = version("nncf")
    _number_unnamed(network)
    try:
        ov.save_model(network, folder / "model.xml", compress_to_fp16=request.precision == "fp16")
    except Exception as error:
        raise ArtifactError(f"OpenVINO cannot write the model ({first_line(error)}): choose another format") from error
    return BuiltModel(
        files=(BuiltFile(path="model.xml", role="model"), BuiltFile(path="model.bin", role="weights")),
        runtime="openvino",
        inputs=request.inputs,
        outputs=request.outputs,
        versions=versions,
        opset=request.target.opset,
    )


def add_front_to(
    folder: Path, front: Normalisation, preprocessing: Preprocessing, made: Path, *, request: ExportRequest
) -> BuiltModel:  # fmt: skip
    """Write the model of `folder` into `made` with `front` before it; see `front_openvino`.

    Raises:
        ArtifactError: OpenVINO cannot write the model.
    """
    import openvino as ov

    from robx.export.formats.front_openvino import add_front

    try:
        network = add_front(ov.Core().read_model(folder / "model.xml"), front, preprocessing)
        _number_unnamed(network)
        ov.save_model(network, made / "model.xml", compress_to_fp16=False)  # weights in fp16 stay so
    except Exception as error:
        raise ArtifactError(
            f"OpenVINO cannot put the resize before the model ({first_line(error)}): drop --resize-in-graph"
        ) from error
    return BuiltModel(
        files=(BuiltFile(path="model.xml", role="model"), BuiltFile(path="model.bin", role="weights")),
        runtime="openvino",
        inputs=request.inputs,
        outputs=request.outputs,
        versions={},
    )


def _number_unnamed(network: Any) -> None:
    """Number the nodes that OpenVINO named itself from 0, in place.

    Its own counter runs through the whole process, and one network would give other files with each export.
    """
    for number, node in enumerate(network.get_ordered_ops()):
        name = node.get_friendly_name()
        if _NAMED_BY_OPENVINO.fullmatch(name):
            node.set_friendly_name(f"{name.rpartition('_')[0]}_{number}")


def read_onnx(model: bytes, *, where: str) -> Any:
    """The ``openvino.Model`` of a float32 ONNX model, simplified by OpenVINO's converter.

    Not ``Core.read_model``: with a dynamic batch it leaves each bias as a computation on shapes instead of a constant.
    That is slower to run, and NNCF silently corrects no bias. Read from bytes, so that no weight stays mapped to a file
    that is removed later.

    Raises:
        ArtifactError: OpenVINO cannot read it; the message names `where`.
    """
    import openvino as ov

    try:
        with quiet():
            return ov.convert_model(io.BytesIO(model))
    except Exception as error:
        raise ArtifactError(f"OpenVINO cannot read {where} ({first_line(error)}): choose another format") from error
