"""LiteRT (.tflite): fp32, and int8 by ai-edge-quantizer (see ``int8/by_ai_edge.py``)."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from robx.errors import ArtifactError, MissingExtra, RobxError, first_line
from robx.export.formats.builder import BuiltFile, BuiltModel, Source
from robx.export.formats.mobile import calibration_batches, example_input, fix_batch, float_modules, mobile_model
from robx.export.formats.operators import NAME as OPERATORS
from robx.export.formats.operators import needed_operators, to_config
from robx.export.int8 import by_ai_edge
from robx.export.int8.candidate import Candidate
from robx.export.quiet import quiet
from robx.export.request import ExportRequest
from robx.store.files import read_json, sha256_bytes, write_bytes, write_json, write_text


def build(source: Source, request: ExportRequest, folder: Path) -> BuiltModel:
    """Write model.tflite, with a fixed batch and the pixels as (N, 3, H, W).

    fp16 is not offered: LiteRT's GPU delegate runs the fp32 file in fp16.

    Raises:
        InputError: too few calibration images.
        MissingExtra: litert-torch or, for int8, ai-edge-quantizer is not installed.
        ArtifactError: the converter failed; the message has its own error.
    """
    try:
        import litert_torch
    except ImportError as error:
        raise MissingExtra("litert-torch", "litert", purpose="exporting to LiteRT", cause=error) from error
    mobile = mobile_model(source.model, request)
    packages = ["litert-torch", "torch"]
    try:
        with quiet():
            content = _float_file(litert_torch, mobile, source, request)
            if request.precision == "int8":
                content = _quantise(content, mobile, source, request)
                packages.append("ai-edge-quantizer")
    except RobxError:
        raise
    except Exception as error:
        raise ArtifactError(
            f"LiteRT cannot convert {request.student.timm_name} ({first_line(error)}): choose another format"
        ) from error
    write_bytes(folder / "model.tflite", content)
    operators = needed_operators(folder / "model.tflite")
    write_text(folder / OPERATORS, to_config(operators, runtime="LiteRT", model_bytes=len(content)))
    return BuiltModel(
        files=(BuiltFile(path="model.tflite", role="model"), BuiltFile(path=OPERATORS, role="operators")),
        runtime="litert",
        inputs=fix_batch(request.inputs, request.fixed_batch),
        outputs=fix_batch(request.outputs, request.fixed_batch),
        versions={name: version(name) for name in packages},
    )


def _float_file(litert_torch: Any, mobile: nn.Module, source: Source, request: ExportRequest) -> bytes:
    """The float .tflite; converted once, which takes most of the time, for all candidates of an export."""
    stored = source.shared / f"{_fingerprint(mobile)}.tflite" if source.shared is not None else None
    if stored is not None and stored.is_file():
        return stored.read_bytes()
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "model.tflite"
        litert_torch.convert(mobile, (example_input(request),)).export(str(path))
        content = path.read_bytes()
    if stored is not None:
        write_bytes(stored, content)
    return content


def _quantise(content: bytes, mobile: nn.Module, source: Source, request: ExportRequest) -> bytes:
    candidate = source.candidate or Candidate(name="static, min-max", quantiser="ai-edge")
    batches = [batch.numpy() for batch in calibration_batches(source.calibration, request)]
    measured = _measure(content, batches, source, candidate) if candidate.activations == "static" else None
    kept = [by_ai_edge.scope_of(mobile, name) for name in float_modules(source, mobile)]
    return by_ai_edge.quantize(content, measured, candidate, kept=kept)


def _measure(
    content: bytes, batches: Sequence[np.ndarray], source: Source, candidate: Candidate
) -> dict[str, by_ai_edge.Sides]:
    """The ranges of the float file's activations; measured once for all candidates of an export."""
    key = sha256_bytes(content + b"".join(batch.tobytes() for batch in batches))[:16]
    name = f"{key}-{'weighted' if candidate.weighted_only else 'all'}.json"
    stored = source.shared / name if source.shared is not None else None
    if stored is not None and stored.is_file():
        found: dict[str, by_ai_edge.Sides] = read_json(stored)
        return found
    measured = by_ai_edge.measure(content, batches, weighted_only=candidate.weighted_only)
    if stored is not None:
        write_json(stored, measured)
    return measured


def _fingerprint(network: nn.Module) -> str:
    """Sixteen hex digits that change with any weight."""
    tensors = network.state_dict().items()
    return sha256_bytes(b"".join(name.encode() + tensor.numpy().tobytes() for name, tensor in tensors))[:16]
