"""Size and parity of the mobile formats, and of each int8 candidate, each in its converter's own environment.

    .venv-executorch/bin/python benchmarks/mobile.py executorch --runs runs/export-table/resnet18 --judged 3000
    .venv-litert/bin/python benchmarks/mobile.py litert
    .venv-ncnn/bin/python benchmarks/mobile.py ncnn
    .venv-coreml/bin/python benchmarks/mobile.py coreml

Each row is written into benchmarks/results/NAME.json and .md as soon as it is measured, and a row that is there for
the same student and images is not measured again: the benchmark can be stopped at any time, and --only measures a part.
--runs takes distilled students, with the demo's images or those of --data. Without it the weights are random, with
batch statistics of rendered scenes: that shows whether a conversion is correct; int8 of random weights is a hard case.
"vendor int8" is what the vendor's manual shows, calibrated on the same images as robx's candidates. `centred` is the
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
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from vendors import MOBILE_DEFAULTS

from robx.export.formats.builder import BuiltModel, Source, build_model
from robx.export.formats.network import export_model, tensor_specs
from robx.export.int8.candidate import Candidate
from robx.export.int8.graph_facts import GraphFacts
from robx.export.int8.ladder import Machine, ladder
from robx.export.request import ExportRequest, ExportTarget
from robx.images.decode import preprocess
from robx.images.scenes import make_scene, render
from robx.images.sources import open_source
from robx.records import Preprocessing, Student, describe_file, to_json
from robx.store.files import sha256_bytes, write_json, write_text
from robx.trunk import build_trunk, embed, embedding_width, is_vit, load_trunk

RESULTS = Path(__file__).parent / "results"
VENDOR = "vendor int8"
MODELS = ("resnet18", "vit_tiny_patch16_224")
PRECISIONS = {
    "executorch": ("fp32", "int8"),
    "litert": ("fp32", "int8"),
    "ncnn": ("fp32", "fp16"),
    "coreml": ("fp32", "fp16", "int8"),
}
SIZE, FITTED = 96, 64
BATCH = 32


@dataclass
class Subject:
    """A network and the preprocessed images to calibrate and compare it with, float32 (N, 3, H, W)."""

    weights: str  # random, or distilled
    trunk: nn.Module
    student: Student
    calibration: np.ndarray
    judging: np.ndarray
    shared: Path | None  # where files that all candidates need are kept

    @cached_property
    def reference(self) -> np.ndarray:
        """PyTorch's embeddings of the judged images, (N, D)."""
        pieces = np.array_split(self.judging, -(-len(self.judging) // BATCH))
        return np.concatenate([embed(self.trunk, torch.from_numpy(piece)).numpy() for piece in pieces])

    @cached_property
    def fingerprint(self) -> str:
        """Of the weights and all images."""
        weights = b"".join(tensor.numpy().tobytes() for tensor in self.trunk.state_dict().values())
        return sha256_bytes(weights + self.calibration.tobytes() + self.judging.tobytes())[:16]


def main() -> None:
    """Convert and compare every model in one format."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("format", choices=sorted(PRECISIONS))
    parser.add_argument("--runs", type=Path, nargs="+", help="students' folders; default: random weights")
    parser.add_argument("--data", type=Path, help="images for --runs, in train/ and test/; default: the demo's")
    parser.add_argument("--calibration", type=int, default=64, help="calibration images")
    parser.add_argument("--judged", type=int, default=64, help="test images")
    parser.add_argument("--name", default="mobile", help="name of the result files")
    parser.add_argument("--only", nargs="+", help="precisions and int8 candidates to measure, by name; default: all")
    given = parser.parse_args()
    for subject in distilled(given) if given.runs else random_ones(given):
        for name, candidate in variants(given.format, subject):
            key = (given.format, subject.weights, subject.student.timm_name, name)
            settings = [len(subject.calibration), subject.fingerprint]
            if (given.only and name not in given.only) or any(
                _is(row, key, settings) for row in stored_rows(given.name)
            ):
                continue
            row = {"variant": name, "settings": settings, **measure(given.format, candidate, subject)}
            print(json.dumps(row), flush=True)
            write_down([old for old in stored_rows(given.name) if not _is(old, key)] + [row], given.name)


def stored_rows(name: str) -> list[dict[str, Any]]:
    """The rows measured so far."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text())["rows"] if path.is_file() else []


def _is(row: dict[str, Any], key: tuple[str, ...], settings: list[Any] | None = None) -> bool:
    name = row.get("variant", row["precision"])
    return (row["format"], row["weights"], row["model"], name) == key and settings in (None, row.get("settings"))


def variants(format_: Any, subject: Subject) -> Iterator[tuple[str, Candidate | None]]:
    """The names of the rows, with the candidate; None is the vendor's int8."""
    for precision in PRECISIONS[format_]:
        if precision != "int8":
            yield precision, Candidate(name=precision, precision=precision)  # type: ignore[arg-type]
            continue
        if format_ in MOBILE_DEFAULTS:
            yield VENDOR, None
        kind: Literal["vit", "cnn"] = "vit" if is_vit(subject.student.timm_name) else "cnn"
        for candidate in ladder(format_, GraphFacts(kind=kind, weighted=(), head=()), Machine()):
            yield candidate.name, candidate


def write_down(rows: list[dict[str, Any]], name: str) -> None:
    """The rows as JSON and as a table, sorted by student; the order within is that of measurement."""
    rows = sorted(rows, key=lambda row: (row["weights"], row["format"], row["model"]))
    RESULTS.mkdir(exist_ok=True)
    write_json(RESULTS / f"{name}.json", {"command": "python benchmarks/mobile.py FORMAT", "rows": rows})
    lines = ["# Mobile formats: size, and parity with PyTorch", "", *_table(rows), ""]
    lines += [
        "- Distilled: students of export_table.py on the demo's clip art, which is neither ImageNet nor photographs; "
        "random: random weights on rendered scenes. The columns say how many images calibrate and how many are judged.",
        "- Vendor int8: what the vendor's manual shows, calibrated on the same images. The other int8 rows are the "
        "candidates from which `robx export --int8` chooses, by its gate.",
        "- Centred cosine: after subtracting the mean of the fp32 embeddings. Core ML runs on Apple's systems only.",
        "",
    ]
    write_text(RESULTS / f"{name}.md", "\n".join(lines))


def _table(rows: list[dict[str, Any]]) -> list[str]:
    headings = ["weights", "format", "model", "px", "variant", "MB", "calibrated", "judged"]
    headings += ["centred cosine", "1 %", "least", "max abs"]
    lines = [headings, ["---"] * len(headings)]
    for row in rows:
        found = row["parity"]
        figures = ["not testable here", "", "", ""]
        if isinstance(found, dict):
            names = ("centred_mean", "centred_p1", "centred_min")
            figures = [f"{found[name]:.4f}" if name in found else "" for name in names]
            figures.append(f"{found['max_abs']:.1e}")
        facts = (row["weights"], row["format"], row["model"], str(row["size"]), row.get("variant", row["precision"]))
        images = (str(row.get("calibrated", 64) if row["precision"] == "int8" else ""), str(row.get("judged", 64)))
        lines.append([*facts, f"{row['bytes'] / 1e6:.1f}", *images, *figures])
    return ["| " + " | ".join(line) + " |" for line in lines]


def distilled(given: argparse.Namespace) -> Iterator[Subject]:
    """Distilled students, with real images."""
    from robx.demo.demo_data import prepare_demo_data
    from robx.store.files import cache_folder

    data = given.data
    if data is None:
        data = prepare_demo_data(cache_folder(), say=print, progress=lambda *_: None).folder
    for folder in given.runs:
        student, trunk = load_trunk(folder)
        sets = []
        for split, count in (("train", given.calibration), ("test", given.judged)):
            source = open_source(data, split=split)
            places = np.random.default_rng(0).permutation(len(source))[:count]
            sets.append(np.stack([preprocess(source.read(int(place)), student.preprocessing) for place in places]))
        yield Subject("distilled", trunk.eval(), student, sets[0], sets[1], folder / "mobile")


def random_ones(given: argparse.Namespace) -> Iterator[Subject]:
    """Networks with random weights, with rendered scenes."""
    counts = ((1000, given.calibration), (5000, given.judged))
    for name in MODELS:
        trunk, student = fitted(name)
        calibration, judging = (scenes(first, count, student.preprocessing) for first, count in counts)
        yield Subject("random", trunk, student, calibration, judging, None)


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


def measure(format_: Any, candidate: Candidate | None, subject: Subject) -> dict[str, Any]:
    """One row: the conversion, its size and, if the format runs here, its parity with PyTorch."""
    precision = candidate.precision if candidate is not None else "int8"
    with tempfile.TemporaryDirectory() as name:
        folder, started = Path(name), time.process_time()
        built = build(format_, candidate, subject, folder)
        files = [describe_file(folder, file.path, file.role) for file in built.files]
        row: dict[str, Any] = {
            "format": format_,
            "weights": subject.weights,
            "size": subject.student.preprocessing.crop,
            "model": subject.student.timm_name,
            "precision": precision,
            "bytes": sum(file.bytes for file in files),
            "calibrated": len(subject.calibration),
            "judged": len(subject.judging),
            "convert_cpu_seconds": round(time.process_time() - started, 1),
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
    return {**row, "parity": compare(subject.reference, answers)}


def build(format_: Any, candidate: Candidate | None, subject: Subject, folder: Path) -> BuiltModel:
    """The files of one row in `folder`."""
    student, vendor = subject.student, candidate is None
    precision: Any = "int8" if candidate is None else candidate.precision
    model = export_model(subject.trunk, student)
    inputs, outputs = tensor_specs(student, batch=None, uint8_input=False, labels=None)
    target = ExportTarget(format=format_, precision=precision)
    request = ExportRequest(target=target, student=student, inputs=inputs, outputs=outputs)
    source = Source(
        model=model,
        onnx=Path("unused.onnx"),
        calibration=subject.calibration if precision == "int8" else None,
        candidate=candidate,
        shared=subject.shared,
    )
    return MOBILE_DEFAULTS[format_](source, request, folder) if vendor else build_model(source, request, folder)


def compare(reference: np.ndarray, answers: np.ndarray) -> dict[str, float]:
    """Absolute difference, and plain and centred cosines, of embeddings (N, D)."""
    mean = reference.mean(0)
    plain, centred = cosine(reference, answers), cosine(reference - mean, answers - mean)
    found = {
        "max_abs": np.abs(reference - answers).max(),
        "cosine_min": plain.min(),
        "centred_mean": centred.mean(),
        "centred_p1": np.percentile(centred, 1),
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
