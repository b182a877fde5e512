"""Int8 as the vendors' manuals recommend it: the baseline of export_table.py and mobile.py."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from robx.errors import first_line
from robx.export.formats import to_litert
from robx.export.formats.builder import BuiltFile, BuiltModel, Source, draft_manifest
from robx.export.formats.mobile import calibration_batches, example_input, fix_batch, mobile_model
from robx.export.formats.network import export_model, tensor_specs
from robx.export.quiet import quiet
from robx.export.request import ExportRequest, ExportTarget
from robx.records import Bundle, Student, describe_file, load_bundle, save_bundle
from robx.trunk import is_vit, load_trunk


def vendor_bundle(engine: str, fp32: Path, folder: Path, calibration: np.ndarray) -> tuple[Bundle, str]:
    """Write the vendor's int8 of the bundle `fp32` as a bundle in `folder`, so that the same Session opens both.

    Args:
        engine: onnx or openvino.
        fp32: the float bundle to quantise.
        folder: where the files go.
        calibration: the images that robx calibrates on, float32 (N, 3, H, W).

    Returns:
        The bundle, and a note about it, which may be empty.
    """
    bundle = load_bundle(fp32)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with quiet():
        note = DEFAULTS[engine](fp32, folder, calibration, bundle.student)
    files = tuple(describe_file(folder, f.path, f.role) for f in bundle.files if (folder / f.path).is_file())
    bundle = dataclasses.replace(bundle, precision="int8", requested="int8", files=files, rungs=(), parity={})
    save_bundle(bundle, folder)
    return bundle, note


def onnxruntime_default(fp32: Path, folder: Path, calibration: np.ndarray, student: Student) -> str:
    """quant_pre_process, then quantize_static with its three required arguments only."""
    from onnxruntime.quantization import CalibrationDataReader, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.rows = iter(calibration)

        def get_next(self) -> Any:
            row = next(self.rows, None)
            return None if row is None else {"pixels": row[None]}

    source, note = fp32 / "model.onnx", ""
    with tempfile.TemporaryDirectory() as name:
        prepared = Path(name) / "prepared.onnx"
        try:
            quant_pre_process(source, prepared)
        except Exception as error:
            prepared, note = source, f"quant_pre_process failed ({first_line(error)[:80]}) and was skipped"
        quantize_static(prepared, folder / "model.onnx", Reader())
    return note


def openvino_default(fp32: Path, folder: Path, calibration: np.ndarray, student: Student) -> str:
    """nncf.quantize with its defaults, and with ModelType.TRANSFORMER for a ViT, as its manual recommends."""
    import nncf
    import openvino as ov

    kind = nncf.ModelType.TRANSFORMER if is_vit(student.timm_name) else None
    model = ov.Core().read_model((fp32 / "model.xml").read_bytes(), (fp32 / "model.bin").read_bytes())
    quantised = nncf.quantize(model, nncf.Dataset([image[None] for image in calibration]), model_type=kind)
    ov.save_model(quantised, folder / "model.xml", compress_to_fp16=False)
    return ""


def mobile_vendor_bundle(engine: str, run: Path, folder: Path, calibration: np.ndarray) -> Bundle:
    """Write the vendor's int8 of the student in `run` as a bundle in `folder`; engine: executorch or litert."""
    student, trunk = load_trunk(run)
    inputs, outputs = tensor_specs(student, batch=None, uint8_input=False, labels=None)
    target = ExportTarget(format=engine, precision="int8")  # type: ignore[arg-type]
    request = ExportRequest(target=target, student=student, inputs=inputs, outputs=outputs)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    source = Source(model=export_model(trunk, student), onnx=Path("unused.onnx"), calibration=calibration)
    save_bundle(draft_manifest(request, MOBILE_DEFAULTS[engine](source, request, folder), folder), folder)
    return load_bundle(folder)


def executorch_default(source: Source, request: ExportRequest, folder: Path) -> BuiltModel:
    """XNNPACKQuantizer with its symmetric per-channel configuration for all operators, as ExecuTorch's tutorial."""
    import executorch.exir
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    mobile, example = mobile_model(source.model, request), (example_input(request),)
    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    with quiet():
        prepared = prepare_pt2e(torch.export.export(mobile, example).module(), quantizer)
        with torch.inference_mode():
            for batch in calibration_batches(source.calibration, request):
                prepared(batch)
        exported = torch.export.export(convert_pt2e(prepared), example)
        program = executorch.exir.to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
        (folder / "model.pte").write_bytes(bytes(program.to_executorch().buffer))
    return _built("executorch", "model.pte", request, ("executorch", "torch", "torchao"))


def litert_default(source: Source, request: ExportRequest, folder: Path) -> BuiltModel:
    """The static_wi8_ai8 recipe of ai-edge-quantizer's manual."""
    from ai_edge_litert.interpreter import Interpreter
    from ai_edge_quantizer import quantizer, recipe

    float_request = dataclasses.replace(request, target=dataclasses.replace(request.target, precision="fp32"))
    to_litert.build(source, float_request, folder)
    content = (folder / "model.tflite").read_bytes()
    key, signature = next(iter(Interpreter(model_content=content).get_signature_list().items()))
    batches = calibration_batches(source.calibration, request)
    with quiet():
        engine = quantizer.Quantizer(content, recipe.static_wi8_ai8())
        data = {key: [{signature["inputs"][0]: batch.numpy()} for batch in batches]}
        made = engine.quantize(engine.calibrate(data, num_threads=1), enable_progress_report=False)
    (folder / "model.tflite").write_bytes(bytes(made.quantized_model))
    return _built("litert", "model.tflite", request, ("litert-torch", "torch", "ai-edge-quantizer"))


def _built(runtime: str, path: str, request: ExportRequest, packages: Sequence[str]) -> BuiltModel:
    return BuiltModel(
        files=(BuiltFile(path=path, role="model"),),
        runtime=runtime,
        inputs=fix_batch(request.inputs, request.fixed_batch),
        outputs=fix_batch(request.outputs, request.fixed_batch),
        versions={name: version(name) for name in packages},
    )


MOBILE_DEFAULTS: dict[str, Callable[[Source, ExportRequest, Path], BuiltModel]] = {
    "executorch": executorch_default,
    "litert": litert_default,
}
DEFAULTS: dict[str, Callable[[Path, Path, np.ndarray, Student], str]] = {
    "onnx": onnxruntime_default,
    "openvino": openvino_default,
}
