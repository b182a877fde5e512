"""Int8 as the vendors' manuals recommend it: the baseline of export_table.py."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from robx.errors import first_line
from robx.export.quiet import quiet
from robx.records import Bundle, Student, describe_file, load_bundle, save_bundle
from robx.trunk import is_vit


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

    class Reader(CalibrationDataReader):
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


DEFAULTS: dict[str, Callable[[Path, Path, np.ndarray, Student], str]] = {
    "onnx": onnxruntime_default,
    "openvino": openvino_default,
}
