"""Records for the report's tests: invented figures, in the shape that robx writes. No figure here was ever measured."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from robx.records import (
    Accuracy,
    Bundle,
    Calibration,
    DataInfo,
    Fidelity,
    Latency,
    Preprocessing,
    Rung,
    Student,
    TeacherInfo,
    TensorSpec,
    Value,
    append_measurements,
    describe_file,
    save_bundle,
    save_student,
)

PI = {"arch": "aarch64", "board": "Raspberry Pi 5 Model B", "cpu": {"model": "Cortex-A76", "cores": 4}}
PC = {"arch": "x86_64", "board": "ABC-1234", "cpu": {"model": "Some Core i7", "cores": 12}}
IMAGES = DataInfo(name="openclipart-png", images=2110, fingerprint="f" * 64, licence="public domain")
JUDGED = DataInfo(name="openclipart-png test", images=905, fingerprint="e" * 64, licence="public domain")


def student_of(name: str, weights: bytes) -> Student:
    return Student(
        timm_name=name,
        width=512,
        preprocessing=Preprocessing(size=256, crop=224),
        sha256=hashlib.sha256(weights).hexdigest(),
        teacher=TeacherInfo(name="dino_vits16", sha256="a" * 64, licence="CC-BY-NC 4.0"),
        data=IMAGES,
        recipe={"method": "rob_dino", "epochs": 30, "lr": 0.002},
        images_seen=63300,
        robx_version="0.1.0",
    )


def rungs_of(drop: float, *, kept: bool) -> tuple[Rung, ...]:
    def values(lost: float) -> dict[str, Value]:
        return {
            "cosine_mean": Value(value=0.9931, n=905),
            "cosine_p1": Value(value=0.9712, n=905),
            "probe_drop": Value(value=lost, low=lost - 0.4, high=lost + 0.45, n=905, unit="%"),
            "speedup_fp32": Value(value=2.13, low=2.08, high=2.17, n=20),
            "bytes": Value(value=11.3e6, unit="B"),
        }

    plain = Rung(
        name="plain per-channel",
        settings={"preset": "performance", "images": 300},
        precision="int8",
        accuracy="FAIL",
        speed="PASS",
        values=values(drop + 5),
        reason="loses more than 1 point",
    )
    careful = Rung(
        name="full bias correction",
        settings={"preset": "mixed", "images": 300},
        precision="int8",
        accuracy="PASS",
        speed="PASS",
        values=values(drop),
        reason="accurate and faster",
        kept=kept,
    )
    return plain, careful


def write_run(root: Path, name: str = "resnet18", *, seed: int = 0) -> Student:
    """A run folder with weights, curves and a recipe; returns its Student."""
    root.mkdir(parents=True, exist_ok=True)
    weights = f"{name} {seed}".encode() * 40
    (root / "student.safetensors").write_bytes(weights)
    student = student_of(name, weights)
    save_student(student, root)
    (root / "recipe.json").write_text(json.dumps(student.recipe))
    lines = [{"step": s, "epoch": s / 100, "loss": 9.0 * 0.998**s + 2, "lr": 0.002} for s in range(0, 2000, 20)]
    lines += [{"step": s, "epoch": s / 100, "knn_top1": 60 - 45 * 0.998**s} for s in range(0, 2000, 200)]
    (root / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    append_measurements(
        root / "measurements.jsonl",
        [accuracy(student.sha256[:16], "knn", 61.3), accuracy(student.sha256[:16], "linear", 64.8)],
    )
    return student


def write_bundle(folder: Path, student: Student, precision: str, size: int, **changes: object) -> Bundle:
    """A bundle folder with one model file of `size` bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.bin").write_bytes(bytes([len(precision) + len(folder.name)]) * size + student.sha256.encode())
    int8 = precision == "int8"
    bundle = Bundle(
        format="openvino",
        precision=precision,  # type: ignore[arg-type]
        requested=precision,  # type: ignore[arg-type]
        target="local",
        runtime="openvino",
        inputs=(TensorSpec(name="pixels", dtype="float32", shape=(None, 3, 224, 224)),),
        outputs=(TensorSpec(name="embedding", dtype="float32", shape=(None, 512)),),
        preprocessing=student.preprocessing,
        student=student,
        verdict="PASS",
        reason="the answers are torch's" if not int8 else "accurate and faster",
        rungs=rungs_of(0.22, kept=True) if int8 else (),
        calibration=Calibration(images=300, fingerprint="c" * 64, judged_images=905, judged_fingerprint="e" * 64)
        if int8
        else None,
        opset=20,
        versions={"openvino": "2026.3.0", "nncf": "3.4.0", "torch": "2.14.1"},
        files=(describe_file(folder, "model.bin", "model"),),
        parity={"cosine_min": Value(value=0.999998, n=32)},
        robx_version="0.1.0",
    )
    bundle = replace(bundle, **changes)  # type: ignore[arg-type]
    save_bundle(bundle, folder)
    return bundle


def accuracy(model_id: str, protocol: str, top1: float, **changes: object) -> Accuracy:
    record = Accuracy(
        model_id=model_id,
        model_name="m",
        protocol=protocol,
        device=PC,
        settings={"k": 20},
        data=JUDGED,
        values={
            "top1": Value(value=top1, low=top1 - 3.2, high=top1 + 3.1, n=905, unit="%"),
            "top5": Value(value=top1 + 20, low=top1 + 17.7, high=top1 + 22.1, n=905, unit="%"),
        },
        started="2026-11-20T10:00:00Z",
    )
    return replace(record, **changes)  # type: ignore[arg-type]


def fidelity(bundle_id: str, drop: float, verdict: str = "PASS") -> Fidelity:
    return Fidelity(
        bundle_id=bundle_id,
        device=PC,
        settings={"margin": 1.0},
        values={
            "cosine_mean": Value(value=0.9931, low=0.9928, high=0.9934, n=905),
            "cka": Value(value=0.9874, n=905),
            "similarity_spearman": Value(value=0.9752, n=905),
            "repeat_max_abs": Value(value=0.0, n=8),
            "probe_drop": Value(value=drop, low=drop - 0.41, high=drop + 0.52, n=905, unit="%"),
            "knn_drop": Value(value=drop - 0.1, low=drop - 0.6, high=drop + 0.5, n=905, unit="%"),
        },
        verdict=verdict,  # type: ignore[arg-type]
        reasons=(f"frozen probe: drop {drop} of at most 1 point",),
        started="2026-11-20T11:00:00Z",
    )


def write_latency(folder: Path, model_id: str, ms: float, *, device: dict = PI, **changes: object) -> Latency:
    """Append a Latency of median `ms` and its raw samples (five processes) to a bundle's folder."""
    rng = np.random.default_rng(int(ms * 1000))
    raw = {f"process_{i}": (ms * 1e6 * (1 + rng.gamma(2.0, 0.012, 300))).astype(np.int64) for i in range(5)}
    name = f"samples-{len(list(folder.glob('samples-*')))}.npz"
    np.savez(folder / name, **raw)
    pooled = np.concatenate(list(raw.values())) / 1e6
    p50, p90, bound = (float(np.quantile(pooled, q)) for q in (0.5, 0.9, 0.92))
    record = Latency(
        bundle_id=model_id,
        device=device,
        settings={"profile": "standard", "threads": 4, "batch": 1, "processes": 5},
        values={
            "p50": Value(value=p50, low=p50 * 0.99, high=p50 * 1.012, n=1500, unit="ms"),
            "p90": Value(value=p90, high=bound, n=1500, unit="ms"),
            "load": Value(value=ms * 31, n=5, unit="ms"),
            "first": Value(value=ms * 2.2, n=5, unit="ms"),
            "peak_memory": Value(value=143.2, n=5, unit="MB"),
        },
        verdict="VALID",
        reasons=(),
        samples=name,
        samples_sha256=hashlib.sha256((folder / name).read_bytes()).hexdigest(),
        started="2026-11-20T12:00:00Z",
        missing={"energy": "the device has no energy counter (RAPL)"},
    )
    record = replace(record, **changes)  # type: ignore[arg-type]
    append_measurements(folder / "measurements.jsonl", [record])
    return record


def write_everything(root: Path, *, scale: int = 1) -> None:
    """Two students, five bundles, two devices, one of them unquiet."""
    r18, vit = write_run(root / "r18"), write_run(root / "vit", "vit_tiny_patch16_224", seed=1)
    for student, folder, speed, top1 in ((r18, root / "r18", 1.0, 61.3), (vit, root / "vit", 1.45, 65.1)):
        append_measurements(
            folder / "measurements.jsonl",
            [accuracy(student.sha256[:16], "knn", top1, started="2026-11-20T10:30:00Z")],
        )
        for precision, size, ms in (("fp32", 44800, 21.4), ("fp16", 22500, 20.9), ("int8", 11300, 9.7)):
            place = folder / f"openvino-{precision}"
            bundle = write_bundle(place, student, precision, size * scale)
            drop = {"fp32": 0.0, "fp16": 0.0, "int8": 0.22 if student is r18 else 1.9}[precision]
            verdict = "PASS" if drop < 1 else "INCONCLUSIVE"
            append_measurements(
                place / "measurements.jsonl",
                [
                    accuracy(bundle.id, "knn", top1 - drop),
                    *([fidelity(bundle.id, drop, verdict)] if precision != "fp32" else []),
                ],
            )
            write_latency(place, bundle.id, ms * speed)
            if student is r18:
                write_latency(
                    place, bundle.id, ms / 5, device=PC, verdict="UNSTABLE", reasons=("background_load", "freq_drop")
                )
