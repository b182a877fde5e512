"""LiteRT (.tflite): fp32, and int8 with per-channel weights and static int8 activations, input and output included."""

from __future__ import annotations

import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import nn

from robx.errors import ArtifactError, InputError, MissingExtra, first_line
from robx.export.formats.mobile import calibration_batches, example_input, fix_batch, mobile_model
from robx.export.quiet import quiet
from robx.export.request import BuiltFile, BuiltModel, ExportRequest
from robx.store.files import write_bytes


def build(
    model: nn.Module | None, onnx_path: Path, request: ExportRequest, folder: Path, calibration: np.ndarray | None
) -> BuiltModel:
    """Write model.tflite, with a fixed batch and the pixels as (N, 3, H, W).

    Raises:
        InputError: fp16, or too few calibration images.
        MissingExtra: litert-torch or, for int8, ai-edge-quantizer is not installed.
        ArtifactError: the converter failed; its own words are in the message.
    """
    if request.precision == "fp16":
        raise InputError("LiteRT is exported as fp32 (which its GPU delegate runs in fp16) or int8: drop --fp16")
    try:
        import litert_torch
    except ImportError as error:
        raise MissingExtra("litert-torch", "litert", purpose="exporting to LiteRT", cause=error) from error
    mobile = mobile_model(model, request)
    packages = ["litert-torch", "torch"]
    try:
        with quiet(), tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "model.tflite"
            litert_torch.convert(mobile, (example_input(request),)).export(str(path))
            content = path.read_bytes()
            if request.precision == "int8":
                content = _quantise(content, calibration_batches(calibration, request))
                packages.append("ai-edge-quantizer")
    except (InputError, MissingExtra):
        raise
    except Exception as error:
        raise ArtifactError(
            f"{request.student.timm_name} cannot be converted to LiteRT: {first_line(error)}"
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
    """The int8 form of a float .tflite; ranges are the least and greatest values that the images give."""
    try:
        from ai_edge_litert.interpreter import Interpreter
        from ai_edge_quantizer import quantizer, recipe
    except ImportError as error:
        raise MissingExtra("ai-edge-quantizer", "litert", purpose="quantising for LiteRT", cause=error) from error
    signatures = Interpreter(model_content=content).get_signature_list()
    key, names = next((key, value["inputs"]) for key, value in signatures.items())
    quantiser = quantizer.Quantizer(content, recipe.static_wi8_ai8())
    ranges = quantiser.calibrate({key: [{names[0]: batch.numpy()} for batch in batches]}, num_threads=1)
    return bytes(quantiser.quantize(ranges, enable_progress_report=False).quantized_model)
