"""Putting the front of a uint8 model (axes, channels, resize, crop) before the network that the gate has accepted.

The gate judges and times the network alone, on images that the host has resized; what the front makes of an image is
compared with that on the finished model.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from robx.embeddings import cosine
from robx.errors import ArtifactError
from robx.export.formats import to_onnx, to_openvino
from robx.export.formats.builder import BuiltModel, Source, build_model, draft_manifest
from robx.export.formats.front import add_front, front_input
from robx.export.gate.sessions import open_candidate
from robx.export.make import CandidateBuilder, source_of
from robx.formats import FORMATS
from robx.golden.picture import draw_picture
from robx.images.decode import host_input
from robx.records import Bundle, Normalisation, load_bundle, save_bundle
from robx.runtime.session import run_within
from robx.store.files import write_bytes
from robx.store.onnx_safety import load_checked

# Largest difference of a resized pixel from Pillow's, of 255 levels, on any image.
LEVELS = {"onnxruntime": 1, "openvino": 2}
_LEAST_COSINE = {"fp32": 0.999, "fp16": 0.999, "int8": 0.99}


def with_front(builder: CandidateBuilder, bundle: Bundle, folder: Path) -> tuple[Bundle, Path]:
    """The accepted bundle with the front that was asked for, in a folder of its own; itself if there is none.

    Raises:
        ArtifactError: the finished model does not answer as the network does on images that the host has resized.
    """
    front = builder.request.front
    if front is None:
        return bundle, folder
    made = Path(tempfile.mkdtemp(dir=builder.scratch))
    built = _build(builder, bundle, front, folder, made)
    draft = draft_manifest(builder.request, built, made)
    shipped = dataclasses.replace(
        bundle,
        files=draft.files,
        inputs=(front_input(bundle.inputs[0], front),),
        preprocessing=builder.request.front_preprocessing,
        in_model=front,
        rewrites=(*bundle.rewrites, _said(bundle, front)),
    )
    save_bundle(shipped, made)
    _check(folder, made, shipped)
    return shipped, made


def _build(builder: CandidateBuilder, bundle: Bundle, front: Normalisation, folder: Path, made: Path) -> BuiltModel:
    student = builder.request.student
    if not FORMATS[bundle.format].onnx_precision:
        return to_openvino.add_front_to(folder, front, student.preprocessing, made, request=builder.request)
    model = add_front(load_checked(source_of(folder)), front, student.preprocessing)
    to_onnx.finish(model, student, opset=builder.request.target.opset, front=front)
    write_bytes(source_of(made), model.SerializeToString())
    return build_model(Source(model=None, onnx=source_of(made)), builder.request, made)


def _said(bundle: Bundle, front: Normalisation) -> str:
    takes = f"takes {front.channels} pixels as {front.layout}"
    if not front.resize:
        return takes
    level = LEVELS[bundle.runtime]
    return (
        f"{takes} of any size and resizes and crops them itself, each pixel within {level} of 255 levels of Pillow's; "
        "the gate judged and timed the network behind that"
    )


def _check(before: Path, after: Path, bundle: Bundle) -> None:
    """Refuse a front after which the answers are not those of the network to images that the host has resized."""
    picture = draw_picture(bundle.student.preprocessing)
    images = [picture, picture.transpose(Image.Transpose.ROTATE_90), picture.resize((97, 61))]
    answers = []
    for folder in (before, after):
        record, session = load_bundle(folder), open_candidate(folder)
        if isinstance(session, str):
            raise ArtifactError(f"the model with its resize cannot be checked here ({session}): drop --resize-in-graph")
        with session:
            rows = [run_within(session, host_input(image, record)[None]) for image in images]
        answers.append(np.concatenate(rows))
    least = float(cosine(*answers).min())
    if not least >= _LEAST_COSINE[bundle.precision]:
        raise ArtifactError(
            f"the model that resizes by itself answers differently from Pillow's resize (cosine {least:.4f}): drop "
            "--resize-in-graph, --input-layout and --input-channels"
        )
