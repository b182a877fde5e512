"""Judging: whatever a candidate's runtime returns, it becomes a verdict or a failed candidate, never a crash."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from robx.errors import ArtifactError
from robx.export.build import ExportSettings, export
from robx.export.gate.gate import Limits
from robx.export.gate.shipped import check_batches
from robx.export.request import ExportTarget
from robx.formats import FORMATS
from robx.records import Bundle
from robx.runtime.session import open_session
from tests.export.conftest import make_student
from tests.faults.test_images import bad_images, good_images


def _export(run: Path, data: Path, out: Path, precision: str = "fp16", *, calibration_images: int = 32) -> Bundle:
    settings = ExportSettings(
        run=run,
        target=ExportTarget(format="onnx", precision=precision),  # type: ignore[arg-type]
        data=data,
        out=out,
        limits=Limits(max_drop=60, min_speedup=0.01),
        calibration_images=calibration_images,
        candidates=1,
    )
    return export(settings)


def _nothing(images: np.ndarray) -> np.ndarray:
    time.sleep(60)
    return images


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda images: np.float32(1), "shape"),  # a scalar
        (lambda images: np.zeros((0, 96), np.float32), "shape"),
        (lambda images: np.zeros((len(images), 95), np.float32), "shape"),
        (lambda images: np.zeros((len(images), 1, 96), np.float32), "shape"),
        (lambda images: np.full((len(images), 96), np.nan, np.float32), "overflow"),
        (lambda images: np.ones((len(images), 96), np.float32), "the same|constant|cosine"),
        (_nothing, "within 0.5 s"),
    ],
)
def test_odd_answers_fail_the_candidate_and_the_float_model_ships(
    answer: Callable[[np.ndarray], np.ndarray],
    words: str,
    cnn_run: Path,
    scenes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def open_odd(folder: Path, **_: Any) -> Any:
        session = open_session(folder)
        if isinstance(session.bundle, Bundle) and session.bundle.precision == "fp16":
            monkeypatch.setattr(session._model, "run", answer)  # type: ignore[attr-defined]
        return session

    monkeypatch.setattr("robx.runtime.session.RUN_SECONDS", 0.5)
    for module in ("judge", "timing", "shipped"):
        monkeypatch.setattr(f"robx.export.gate.{module}.open_candidate", open_odd)
    bundle = _export(cnn_run, scenes, tmp_path / "b")
    assert (bundle.precision, bundle.requested) == ("fp32", "fp16")
    (half,) = bundle.rungs
    assert half.accuracy == "FAIL"
    assert any(word in half.reason for word in words.split("|")), half.reason


def test_a_format_without_fp16_falls_back_to_fp32_and_lists_no_other_candidate(
    cnn_run: Path, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_odd(folder: Path, **_: Any) -> Any:
        session = open_session(folder)
        if isinstance(session.bundle, Bundle) and session.bundle.precision == "int8":
            monkeypatch.setattr(session._model, "run", lambda images: np.ones((len(images), 96), np.float32))  # type: ignore[attr-defined]
        return session

    for module in ("judge", "timing", "shipped"):
        monkeypatch.setattr(f"robx.export.gate.{module}.open_candidate", open_odd)
    monkeypatch.setitem(FORMATS, "onnx", dataclasses.replace(FORMATS["onnx"], precisions=("fp32", "int8")))
    bundle = _export(cnn_run, scenes, tmp_path / "b", "int8")
    assert (bundle.precision, bundle.requested) == ("fp32", "int8")
    assert [rung.precision for rung in bundle.rungs] == ["int8"]


def test_an_answer_that_depends_on_the_batch_is_refused() -> None:
    together = np.random.default_rng(0).normal(size=(8, 16))
    check_batches(together, together + 1e-4, what="x")
    with pytest.raises(ArtifactError, match="x answers differently for one image alone than in a batch"):
        check_batches(together, together[::-1], what="x")


def test_a_re_parameterisable_student_is_judged_fused(scenes: Path, tmp_path: Path) -> None:
    run = make_student("repghostnet_050", tmp_path / "run", scenes, size=64)
    fused = _export(run, scenes, tmp_path / "fp32", "fp32")
    int8 = _export(run, scenes, tmp_path / "int8", "int8")
    assert fused.rewrites == int8.rewrites and "re-parameterised" in int8.rewrites[0]
    convolutions = [
        sum(node.op_type == "Conv" for node in onnx.load(tmp_path / name / "model.onnx").graph.node)
        for name in ("fp32", "int8")
    ]
    assert int8.rungs[0].values["cosine_mean"].n == 32  # against the student's own embeddings
    assert convolutions[0] == convolutions[1]


def test_odd_images_calibrate_and_broken_ones_are_left_out(cnn_run: Path, scenes: Path, tmp_path: Path) -> None:
    """CMYK, 16 bits, palettes, one pixel, 30,000 x 2 pixels: used. Cut, empty and foreign files: not."""
    data = tmp_path / "data"
    shutil.copytree(scenes, data)
    plain = {part: sum(1 for _ in (data / part).rglob("*.png")) for part in ("train", "test")}
    for part, odd in (("train", good_images() | bad_images()), ("test", bad_images())):
        folder = min((data / part).iterdir())
        for name, content in odd.items():
            (folder / f"{part}-{name}").write_bytes(content)
    bundle = _export(cnn_run, data, tmp_path / "b", "int8", calibration_images=plain["train"] + 8)
    assert bundle.precision == "int8" and bundle.calibration is not None
    # Some of the odd ones have the same pixels after resize and crop, and count once.
    assert bundle.calibration.images == plain["train"] + 8
    assert bundle.calibration.judged_images == plain["test"]
    (kept,) = [rung for rung in bundle.rungs if rung.kept]
    assert kept.values["not_finite"].value == 0 and kept.values["cosine_mean"].value > 0.9
