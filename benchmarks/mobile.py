"""Size and parity of the mobile formats, each converted and run in its own environment.

    .venv-executorch/bin/python benchmarks/mobile.py executorch --runs runs/export-table/resnet18
    .venv-litert/bin/python benchmarks/mobile.py litert
    .venv-ncnn/bin/python benchmarks/mobile.py ncnn
    .venv-coreml/bin/python benchmarks/mobile.py coreml

Each command replaces the rows of its format and weights in benchmarks/results/mobile.json and .md. --runs takes
distilled students, with the demo's images or those of --data. Without it the weights are random, with batch statistics
of rendered scenes: that shows whether a conversion is correct; int8 of random weights is a hard case. `centred` is the
cosine after subtracting the mean of the fp32 embeddings. No latencies are measured: this is not a phone.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from robx.export.formats.builder import Source
from robx.export.formats.network import export_model, tensor_specs
from robx.export.request import ExportRequest, ExportTarget
from robx.images.decode import preprocess
from robx.images.scenes import make_scene, render
from robx.images.sources import open_source
from robx.records import Preprocessing, Student, describe_file, to_json
from robx.store.files import write_json, write_text
from robx.trunk import build_trunk, embed, embedding_width, load_trunk

RESULTS = Path(__file__).parent / "results" / "mobile.json"
MODELS = ("resnet18", "vit_tiny_patch16_224")
PRECISIONS = {
    "executorch": ("fp32", "int8"),
    "litert": ("fp32", "int8"),
    "ncnn": ("fp32", "fp16"),
    "coreml": ("fp32", "fp16", "int8"),
}
SIZE, FITTED, CALIBRATION, JUDGED = 96, 64, 64, 64


@dataclass(frozen=True)
class Subject:
    """A network and the preprocessed images to calibrate and compare it with, float32 (N, 3, H, W)."""

    weights: str  # random, or distilled
    trunk: nn.Module
    student: Student
    calibration: np.ndarray
    judging: np.ndarray


def main() -> None:
    """Convert and compare every model in one format."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("format", choices=sorted(PRECISIONS))
    parser.add_argument("--runs", type=Path, nargs="+", help="students' folders; default: random weights")
    parser.add_argument("--data", type=Path, help="images for --runs, in train/ and test/; default: the demo's")
    given = parser.parse_args()
    rows = []
    for subject in distilled(given.runs, given.data) if given.runs else random_ones():
        for precision in PRECISIONS[given.format]:
            rows.append(measure(given.format, precision, subject))
            print(json.dumps(rows[-1]))
    old = json.loads(RESULTS.read_text())["rows"] if RESULTS.is_file() else []
    mine = {(row["format"], row["weights"]) for row in rows}
    write_down([row for row in old if (row["format"], row.get("weights", "random")) not in mine] + rows)


def write_down(rows: list[dict[str, Any]]) -> None:
    """The rows as JSON and as a table, sorted."""
    rows = sorted(rows, key=lambda row: (row["weights"], row["format"], row["model"]))
    settings = {"calibration": CALIBRATION, "judged": JUDGED, "batch": 1}
    RESULTS.parent.mkdir(exist_ok=True)
    write_json(RESULTS, {"command": "python benchmarks/mobile.py FORMAT", "settings": settings, "rows": rows})
    lines = ["# Mobile formats: size, and parity with PyTorch", "", *_table(rows), ""]
    lines += [
        f"- {JUDGED} test images and, for int8, {CALIBRATION} others for calibration. Distilled: the students of "
        "export_table.py on the demo's clip art; random: random weights on rendered scenes.",
        "- Centred cosine: after subtracting the mean of the fp32 embeddings. Core ML runs on Apple's systems only.",
        "",
    ]
    write_text(RESULTS.with_suffix(".md"), "\n".join(lines))


def _table(rows: list[dict[str, Any]]) -> list[str]:
    headings = ["weights", "format", "model", "px", "precision", "MB", "centred cosine", "5 %", "least", "max abs"]
    lines = [headings, ["---"] * len(headings)]
    for row in rows:
        found = row["parity"]
        figures = ["not testable here", "", "", ""]
        if isinstance(found, dict):
            figures = [f"{found[name]:.4f}" for name in ("centred_mean", "centred_p5", "centred_min")]
            figures.append(f"{found['max_abs']:.1e}")
        facts = (row["weights"], row["format"], row["model"], str(row["size"]), row["precision"])
        lines.append([*facts, f"{row['bytes'] / 1e6:.1f}", *figures])
    return ["| " + " | ".join(line) + " |" for line in lines]


def distilled(folders: list[Path], data: Path | None) -> Iterator[Subject]:
    """Distilled students, with real images."""
    from robx.demo.demo_data import prepare_demo_data
    from robx.store.files import cache_folder

    if data is None:
        data = prepare_demo_data(cache_folder(), say=print, progress=lambda *_: None).folder
    for folder in folders:
        student, trunk = load_trunk(folder)
        sets = []
        for split, count in (("train", CALIBRATION), ("test", JUDGED)):
            source = open_source(data, split=split)
            places = np.random.default_rng(0).permutation(len(source))[:count]
            sets.append(np.stack([preprocess(source.read(int(place)), student.preprocessing) for place in places]))
        yield Subject("distilled", trunk.eval(), student, sets[0], sets[1])


def random_ones() -> Iterator[Subject]:
    """Networks with random weights, with rendered scenes."""
    for name in MODELS:
        trunk, student = fitted(name)
        sets = (scenes(first, count, student.preprocessing) for first, count in ((1000, CALIBRATION), (5000, JUDGED)))
        yield Subject("random", trunk, student, *sets)


def scenes(first: int, count: int, preprocessing: Preprocessing) -> np.ndarray:
    """Preprocessed rendered scenes, float32 (count, 3, SIZE, SIZE)."""
    pictures = [render(make_scene(7, first + index), size=SIZE) for index in range(count)]
    return np.stack([np.asarray(preprocess(picture, preprocessing)) for picture in pictures]).astype(np.float32)


def fitted(name: str) -> tuple[nn.Module, Student]:
    """A network with random weights and BatchNorm statistics of the scenes."""
    torch.manual_seed(0)
    trunk = build_trunk(name)
    preprocessing = Preprocessing(size=SIZE, crop=SIZE)
    for module in trunk.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the plain mean over all batches
            # timm initialises residual branches to zero, which a compiler removes.
            nn.init.uniform_(module.weight, 0.5, 1.5)
    trunk.train()
    with torch.no_grad():
        trunk(torch.from_numpy(scenes(0, FITTED, preprocessing)))
    record = Student(
        timm_name=name, width=embedding_width(trunk), preprocessing=preprocessing, sha256="0" * 64,
        teacher=None, data=None, recipe={},
    )  # fmt: skip
    return trunk.eval(), record


def measure(format_: Any, precision: Any, subject: Subject) -> dict[str, Any]:
    """One row: the conversion, its size and, if the format runs here, its parity with PyTorch."""
    trunk, student = subject.trunk, subject.student
    model = export_model(trunk, student)
    inputs, outputs = tensor_specs(student, batch=None, uint8_input=False, labels=None)
    target = ExportTarget(format=format_, precision=precision)
    request = ExportRequest(target=target, student=student, inputs=inputs, outputs=outputs)
    calibration = subject.calibration if precision == "int8" else None
    builder = importlib.import_module(f"robx.export.formats.to_{format_}")
    with tempfile.TemporaryDirectory() as name:
        folder, started = Path(name), time.monotonic()
        built = builder.build(Source(model=model, onnx=Path("unused.onnx"), calibration=calibration), request, folder)
        files = [describe_file(folder, file.path, file.role) for file in built.files]
        row: dict[str, Any] = {
            "format": format_,
            "weights": subject.weights,
            "size": student.preprocessing.crop,
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
        engine = importlib.import_module(f"robx.runtime.engines.on_{built.runtime}")
        model_there = engine.open_model(str(folder), manifest, {"threads": 1})
        pixels = subject.judging
        answers = np.concatenate([model_there.run(pixels[i : i + 1]) for i in range(len(pixels))])
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
