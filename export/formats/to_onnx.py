"""ONNX: the student's network as one self-contained, checked file.

Input ``pixels`` (N, 3, H, W), outputs ``embedding`` (N, D) and, with a head, ``logits`` (N, C). The opset is checked
after the export, because the exporter may silently fall back to another one, and the IR version is pinned, because
older runtimes reject newer ones.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx
import torch

from robx import __version__
from robx.errors import ArtifactError, first_line
from robx.export.formats.builder import BuiltFile, BuiltModel, Source
from robx.export.formats.network import EMBEDDING, LOGITS, PIXELS, ExportModel
from robx.export.quiet import quiet
from robx.export.request import ExportRequest
from robx.records import Normalisation, Student
from robx.store.files import write_bytes
from robx.store.onnx_safety import check_model

IR_VERSION = 10


def export_onnx(model: ExportModel, path: Path, *, student: Student, batch: int | None, opset: int) -> onnx.ModelProto:
    """Write `model` to `path` as float32 ONNX and return it.

    Raises:
        ArtifactError: the exporter failed, fell back to another opset, or wrote a file that the checker rejects.
    """
    dtype = torch.uint8 if model.uint8 else torch.float32
    # Two images where the batch is dynamic: the exporter would take 1 for a constant.
    example = torch.zeros((2 if batch is None else batch, 3, *student.preprocessing.shape), dtype=dtype)
    try:
        with quiet():
            program = torch.onnx.export(
                model,
                (example,),
                dynamo=True,
                opset_version=opset,
                input_names=[PIXELS],
                output_names=[EMBEDDING] if model.head is None else [EMBEDDING, LOGITS],
                dynamic_shapes=({0: torch.export.Dim("N")},) if batch is None else None,
                verbose=False,
            )
    except Exception as error:
        raise ArtifactError(
            f"{student.timm_name} cannot be exported to ONNX ({first_line(error)}): choose another student"
        ) from error
    if program is None:
        raise ArtifactError(f"{student.timm_name} cannot be exported to ONNX: the exporter returned no model")
    proto: onnx.ModelProto = program.model_proto
    finish(proto, student, opset=opset)
    write_bytes(path, proto.SerializeToString())
    return proto


def finish(
    proto: onnx.ModelProto, student: Student, *, opset: int, front: Normalisation | None = None
) -> None:  # fmt: skip
    """Check the opset, pin the IR version, remove the exporter's file paths, add robx's metadata; in place.

    Raises:
        ArtifactError: another opset than requested, or a model that the ONNX checker rejects.
    """
    found = {entry.domain: entry.version for entry in proto.opset_import}
    if found.get("", 0) != opset:
        raise ArtifactError(f"opset {opset} was asked for and the exporter gave {found.get('')}: give another --opset")
    proto.ir_version = IR_VERSION
    for node in proto.graph.node:  # every node carries a stack trace with paths of this machine
        del node.metadata_props[:]
        node.doc_string = ""
    for value in [*proto.graph.value_info, *proto.graph.input, *proto.graph.output, *proto.graph.initializer]:
        del value.metadata_props[:]
    del proto.graph.metadata_props[:]
    del proto.metadata_props[:]
    onnx.helper.set_model_props(proto, _properties(proto, student, front))
    proto.producer_name, proto.producer_version = "robx", __version__
    check_model(proto, where=f"the export of {student.timm_name}", full_check=True)


def _properties(proto: onnx.ModelProto, student: Student, front: Normalisation | None) -> dict[str, str]:
    """robx's metadata: what the file is, what the host has to do to an image, and what the model does itself."""
    pre = student.preprocessing
    host: dict[str, Any] = {"size": pre.size, "crop": pre.crop, "interpolation": pre.interpolation}
    if pre.crop_width is not None:
        host["crop_width"] = pre.crop_width
    normalisation = {"mean": pre.mean, "std": pre.std}
    found = {
        "robx.version": __version__,
        "robx.student": student.timm_name,
        "robx.student_sha256": student.sha256,
    }
    if front is not None:
        resizes = front.resize
        return found | {
            "robx.preprocessing": json.dumps({} if resizes else host),
            "robx.in_model": json.dumps(host | normalisation if resizes else normalisation),
            "robx.input": f"{front.channels} pixels 0..255, uint8, {front.layout}{', any size' if resizes else ''}",
        }
    if proto.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8:
        return found | {
            "robx.preprocessing": json.dumps(host),
            "robx.in_model": json.dumps(normalisation),
            "robx.input": "RGB pixels 0..255, uint8",
        }
    return found | {
        "robx.preprocessing": json.dumps(host | normalisation),
        "robx.input": "RGB, (pixels / 255 - mean) / std, float32",
    }


def build(source: Source, request: ExportRequest, folder: Path) -> BuiltModel:
    """Ship the candidate's ONNX file, which is in the requested precision already."""
    write_bytes(folder / "model.onnx", source.onnx.read_bytes())
    return BuiltModel(
        files=(BuiltFile(path="model.onnx", role="model"),),
        runtime="onnxruntime",
        inputs=request.inputs,
        outputs=request.outputs,
        versions={name: version(name) for name in ("onnx", "onnxruntime", "torch")},
        opset=request.target.opset,
    )
