"""Sizes and parity of the mobile formats, each converted and run in its own environment.

    .venv-executorch/bin/python benchmarks/mobile.py executorch
    .venv-litert/bin/python benchmarks/mobile.py litert
    .venv-ncnn/bin/python benchmarks/mobile.py ncnn
    .venv-coreml/bin/python benchmarks/mobile.py coreml

Each adds its rows to benchmarks/results/mobile.json. The weights are random, with batch statistics fitted on rendered
scenes: the figures say whether a conversion is right, not how accurate a trained student is; int8 of random weights is
a harsh case. `centred` is the cosine after the fp32 set's mean is removed. No latencies: this is no phone.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from robx.export.request import ExportRequest, ExportTarget
from robx.export.to_onnx import export_model, tensor_specs
from robx.files import write_json
from robx.images import preprocess
from robx.records import Preprocessing, Student, describe_file, to_json
from robx.scenes import make_scene, render
from robx.trunk import build_trunk, embed, embedding_width

RESULTS = Path(__file__).parent / "results" / "mobile.json"
MODELS = ("resnet18", "vit_tiny_patch16_224")
PRECISIONS = {
    "executorch": ("fp32", "int8"),
    "litert": ("fp32", "int8"),
    "ncnn": ("fp32", "fp16"),
    "coreml": ("fp32", "fp16", "int8"),
}
SIZE, FITTED, CALIBRATION, JUDGED = 96, 64, 64, 64


def main() -> None:
    """Convert and compare every model in one format."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("format", choices=sorted(PRECISIONS))
    format_ = parser.parse_args().format
    rows = []
    for name in MODELS:
        trunk, student = fitted(name)
        for precision in PRECISIONS[format_]:
            rows.append(measure(format_, precision, trunk, student))
            print(json.dumps(rows[-1]))
    old = json.loads(RESULTS.read_text())["rows"] if RESULTS.is_file() else []
    kept = [row for row in old if row["format"] != format_]
    settings = {"size": SIZE, "calibration": CALIBRATION, "judged": JUDGED, "weights": "random", "batch": 1}
    RESULTS.parent.mkdir(exist_ok=True)
    write_json(RESULTS, {"command": "python benchmarks/mobile.py FORMAT", "settings": settings, "rows": kept + rows})


def scenes(first: int, count: int, preprocessing: Preprocessing) -> np.ndarray:
    """Preprocessed rendered scenes, float32 (count, 3, SIZE, SIZE)."""
    pictures = [render(make_scene(7, first + index), size=SIZE) for index in range(count)]
    return np.stack([np.asarray(preprocess(picture, preprocessing)) for picture in pictures]).astype(np.float32)


def fitted(name: str) -> tuple[nn.Module, Student]:
    """A network with random weights whose batch normalisation knows the scenes."""
    torch.manual_seed(0)
    trunk = build_trunk(name)
    preprocessing = Preprocessing(size=SIZE, crop=SIZE)
    for module in trunk.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the plain mean over what it sees
            # timm starts residual branches at zero, which a compiler folds away.
            nn.init.uniform_(module.weight, 0.5, 1.5)
    trunk.train()
    with torch.no_grad():
        trunk(torch.from_numpy(scenes(0, FITTED, preprocessing)))
    record = Student(
        timm_name=name, width=embedding_width(trunk), preprocessing=preprocessing, sha256="0" * 64,
        teacher=None, data=None, recipe={},
    )  # fmt: skip
    return trunk.eval(), record


def measure(format_: Any, precision: Any, trunk: nn.Module, student: Student) -> dict[str, Any]:
    """One row: the conversion, its size and, where the format runs here, its answers against PyTorch's."""
    model = export_model(trunk, student)
    inputs, outputs = tensor_specs(student, batch=None, uint8_input=False, labels=None)
    target = ExportTarget(format=format_, precision=precision)
    request = ExportRequest(target=target, student=student, inputs=inputs, outputs=outputs)
    calibration = scenes(1000, CALIBRATION, student.preprocessing) if precision == "int8" else None
    builder = importlib.import_module(f"robx.export.to_{format_}")
    with tempfile.TemporaryDirectory() as name:
        folder, started = Path(name), time.monotonic()
        built = builder.build(model, Path("unused.onnx"), request, folder, calibration)
        files = [describe_file(folder, file.path, file.role) for file in built.files]
        row: dict[str, Any] = {
            "format": format_,
            "model": student.timm_name,
            "precision": precision,
            "bytes": sum(file.bytes for file in files),
            "convert_seconds": round(time.monotonic() - started, 1),
            "versions": {**built.versions, "python": platform.python_version()},
            "notes": list(built.notes),
        }
        if format_ == "coreml":
            return {**row, "parity": "not verifiable off macOS"}
        manifest = {"runtime": built.runtime, "files": [to_json(f) for f in files], "inputs": to_json(built.inputs)}
        manifest["outputs"] = to_json(built.outputs)
        engine = importlib.import_module(f"robx.runtime.on_{built.runtime}")
        model_there = engine.open_model(str(folder), manifest, {"threads": 1})
        pixels = scenes(5000, JUDGED, student.preprocessing)
        answers = np.concatenate([model_there.run(pixels[i : i + 1]) for i in range(JUDGED)])
        model_there.close()
    return {**row, "parity": compare(embed(trunk, torch.from_numpy(pixels)).numpy(), answers)}


def compare(reference: np.ndarray, answers: np.ndarray) -> dict[str, float]:
    """Absolute difference, and plain and centred cosines, of embeddings (N, D)."""
    mean = reference.mean(0)
    plain, centred = cosine(reference, answers), cosine(reference - mean, answers - mean)
    found = {
        "max_abs": np.abs(reference - answers).max(),
        "cosine_min": plain.min(),
        "centred_mean": centred.mean(),
        "centred_p5": np.percentile(centred, 5),
        "centred_min": centred.min(),
    }
    return {name: float(f"{value:.6g}") for name, value in found.items()}


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Row by row, (N, D) and (N, D) -> (N,)."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    result: np.ndarray = (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    return result


if __name__ == "__main__":
    main()
