"""LiteRT (.tflite): fp32, and int8 with per-channel weights and static int8 activations, input and output included."""

from __future__ import annotations

import tempfile
from importlib.metadata import version
from pathlib import Path

import torch

from robx.errors import ArtifactError, InputError, MissingExtra, first_line
from robx.export.formats.builder import BuiltFile, BuiltModel, Source
from robx.export.formats.mobile import calibration_batches, example_input, fix_batch, mobile_model
from robx.export.quiet import quiet
from robx.export.request import ExportRequest
from robx.store.files import write_bytes


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
        with quiet(), tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "model.tflite"
            litert_torch.convert(mobile, (example_input(request),)).export(str(path))
            content = path.read_bytes()
            if request.precision == "int8":
                content = _quantise(content, calibration_batches(source.calibration, request))
                packages.append("ai-edge-quantizer")
    except (InputError, MissingExtra):
        raise
    except Exception as error:
        raise ArtifactError(
            f"LiteRT cannot convert {request.student.timm_name} ({first_line(error)}): choose another format"
        ) from error
    write_bytes(folder / "model.tflite", content)
    return BuiltModel(
        files=(BuiltFile(path="model.tflite", role="model"),),
        runtime="litert",
        inputs=fix_batch(request.inputs, request.fixed_batch),
        outputs=fix_batch(request.outputs, request.fixed_batch),
        versions={name: version(name) for name in packages},
    )


def _quantise(content: bytes, batches: list[torch.Tensor]) -> bytes:
    """A float .tflite as int8; activation ranges are the minimum and maximum over the images."""
    try:
        from ai_edge_litert.interpreter import Interpreter
        from ai_edge_quantizer import quantizer, recipe
    except ImportError as error:
        raise MissingExtra("ai-edge-quantizer", "litert", purpose="quantising for LiteRT", cause=error) from error
    signatures = Interpreter(model_content=content).get_signature_list()
    key, names = next((key, value["inputs"]) for key, value in signatures.items())
    engine = quantizer.Quantizer(content, recipe.static_wi8_ai8())
    ranges = engine.calibrate({key: [{names[0]: batch.numpy()} for batch in batches]}, num_threads=1)
    return bytes(engine.quantize(ranges, enable_progress_report=False).quantized_model)
