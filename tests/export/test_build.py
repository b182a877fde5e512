"""Whole exports of small real students: what is written is what runs, and what does not pass is not called int8."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from safetensors.numpy import save_file

from robx.cli import main
from robx.errors import ArtifactError, GateFailed, InputError
from robx.export import to_onnx
from robx.export.build import Options, build, gate_error
from robx.export.calibration import open_data
from robx.export.folders import CACHE
from robx.export.gate import Limits
from robx.export.qdq import check_trt_qdq
from robx.export.request import ExportTarget
from robx.records import Bundle, load_bundle
from robx.runtime.session import open_session
from robx.trunk import embed, load_trunk

LENIENT = Options(limits=Limits(max_drop=60, min_speedup=0.01), calibration_images=32, rungs=1)
# No model is a thousand times as fast as itself.
HOPELESS = Options(limits=Limits(max_drop=60, min_speedup=1000), calibration_images=32, rungs=1)


def _export(run: Path, data: Path | None, out: Path, options: Options = LENIENT, **target: object) -> Bundle:
    source, judge = open_data(data) if data else (None, None)
    wanted = ExportTarget(**target)  # type: ignore[arg-type]
    return build(run, wanted, source=source, judge=judge, out=out, options=options)


def _torch(run: Path, pixels: np.ndarray) -> np.ndarray:
    return embed(load_trunk(run)[1], torch.from_numpy(pixels)).numpy()


@pytest.mark.parametrize("which", ["cnn_run", "vit_run"])
def test_fp32_onnx_answers_as_pytorch(
    which: str, scenes: Path, scene_pixels: np.ndarray, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    run: Path = request.getfixturevalue(which)
    bundle = _export(run, scenes, tmp_path / "b", format="onnx")
    assert (bundle.precision, bundle.verdict, bundle.opset) == ("fp32", "PASS", 20)
    assert load_bundle(tmp_path / "b") == bundle
    model = onnx.load(tmp_path / "b" / "model.onnx")
    assert model.ir_version == to_onnx.IR_VERSION
    assert {o.domain: o.version for o in model.opset_import}[""] == 20
    operators = {n.op_type for n in model.graph.node}
    assert not operators & {"GlobalAveragePool", "Range", "Resize"}
    assert str(Path.cwd()).encode() not in model.SerializeToString()  # no path of the machine that exported
    with open_session(tmp_path / "b") as session:
        np.testing.assert_allclose(session.run(scene_pixels[:5]), _torch(run, scene_pixels[:5]), atol=1e-4)
        np.testing.assert_allclose(session.run(scene_pixels[:1]), _torch(run, scene_pixels[:1]), atol=1e-4)


@pytest.mark.parametrize("fmt", ["onnx", "openvino"])
def test_int8_that_passes_ships_with_its_rungs(
    fmt: str, cnn_run: Path, scenes: Path, scene_pixels: np.ndarray, tmp_path: Path
) -> None:
    bundle = _export(cnn_run, scenes, tmp_path / "b", format=fmt, precision="int8")
    assert (bundle.precision, bundle.requested, bundle.verdict) == ("int8", "int8", "PASS")
    assert gate_error(bundle, tmp_path) is None
    kept = [rung for rung in bundle.rungs if rung.kept]
    assert len(kept) == 1
    expected = {
        "cosine_mean", "cosine_p5", "cosine_p1", "cosine_min", "knn_drop", "probe_drop", "speedup_fp32", "speedup_fp16",
        "bytes",
    }  # fmt: skip
    assert expected <= set(kept[0].values)
    assert bundle.calibration is not None and bundle.calibration.images == 32
    with open_session(tmp_path / "b") as session:
        together = session.run(scene_pixels[:5])
        alone = np.concatenate([session.run(scene_pixels[i : i + 1]) for i in range(5)])
    np.testing.assert_allclose(together, alone, atol=1e-3 * np.abs(together).max())
    reference = _torch(cnn_run, scene_pixels[:5])
    assert np.corrcoef(together.ravel(), reference.ravel())[0, 1] > 0.9


def test_none_passing_ships_the_fallback_under_its_true_precision(cnn_run: Path, scenes: Path, tmp_path: Path) -> None:
    bundle = _export(cnn_run, scenes, tmp_path / "b", HOPELESS, format="onnx", precision="int8")
    assert bundle.requested == "int8" and bundle.precision in ("fp16", "fp32")
    assert not any(rung.kept for rung in bundle.rungs if rung.precision == "int8")
    assert load_bundle(tmp_path / "b").precision == bundle.precision
    error = gate_error(bundle, tmp_path / "b")
    assert isinstance(error, GateFailed) and error.exit_status == 3
    assert bundle.precision in str(error)
    model = onnx.load(tmp_path / "b" / "model.onnx")
    assert not any(n.op_type == "QuantizeLinear" for n in model.graph.node)


def test_force_ships_int8_marked(cnn_run: Path, scenes: Path, tmp_path: Path) -> None:
    options = Options(limits=HOPELESS.limits, calibration_images=32, rungs=1, force=True)
    bundle = _export(cnn_run, scenes, tmp_path / "b", options, format="onnx", precision="int8")
    assert (bundle.precision, bundle.verdict) == ("int8", "FORCED")
    assert "FAILED" in bundle.reason


def test_tensorrt_int8_is_checked_and_its_speed_is_left_open(cnn_run: Path, scenes: Path, tmp_path: Path) -> None:
    bundle = _export(cnn_run, scenes, tmp_path / "b", format="trt", precision="int8")
    assert bundle.precision == "int8"
    check_trt_qdq(tmp_path / "b" / "model.onnx")
    kept = next(rung for rung in bundle.rungs if rung.kept)
    assert kept.accuracy == "PASS"
    if "speedup_fp32" not in kept.values:
        assert bundle.verdict == "INCONCLUSIVE" and "on the device" in bundle.reason


def test_fp16_onnx_and_openvino(cnn_run: Path, scenes: Path, tmp_path: Path) -> None:
    for fmt in ("onnx", "openvino"):
        bundle = _export(cnn_run, scenes, tmp_path / fmt, format=fmt, precision="fp16")
        assert bundle.precision == "fp16"
        assert bundle.parity["cosine_min"].value > 0.999
        assert bundle.inputs[0].dtype == "float32"


def test_ort_holds_its_operators(cnn_run: Path, scenes: Path, scene_pixels: np.ndarray, tmp_path: Path) -> None:
    bundle = _export(cnn_run, scenes, tmp_path / "b", format="ort")
    operators = (tmp_path / "b" / "operators.config").read_text()
    assert "Conv" in operators and "/tmp" not in operators
    assert {f.role for f in bundle.files} == {"model", "operators"}
    with open_session(tmp_path / "b") as session:
        np.testing.assert_allclose(session.run(scene_pixels[:3]), _torch(cnn_run, scene_pixels[:3]), atol=1e-4)


def test_a_fixed_batch_with_a_tail(cnn_run: Path, scenes: Path, scene_pixels: np.ndarray, tmp_path: Path) -> None:
    bundle = _export(cnn_run, scenes, tmp_path / "b", format="onnx", batch=4)
    assert bundle.inputs[0].shape == (4, 3, 64, 64)
    with open_session(tmp_path / "b") as session:
        np.testing.assert_allclose(session.run(scene_pixels[:6]), _torch(cnn_run, scene_pixels[:6]), atol=1e-4)


@pytest.mark.parametrize("fmt", ["onnx", "openvino"])
def test_uint8_input_holds_the_normalisation(
    fmt: str, cnn_run: Path, scenes: Path, scene_pixels: np.ndarray, tmp_path: Path
) -> None:
    bundle = _export(cnn_run, scenes, tmp_path / "b", format=fmt, uint8_input=True)
    assert bundle.inputs[0].dtype == "uint8"
    with open_session(tmp_path / "b") as session:
        np.testing.assert_allclose(session.run(scene_pixels[:3]), _torch(cnn_run, scene_pixels[:3]), atol=1e-3)


def test_a_head_adds_logits(cnn_run: Path, scene_pixels: np.ndarray, tmp_path: Path) -> None:
    import onnxruntime

    width = load_trunk(cnn_run)[0].width
    random = np.random.default_rng(0)
    weight, bias = random.normal(size=(3, width)).astype(np.float32), random.normal(size=3).astype(np.float32)
    save_file({"weight": weight, "bias": bias}, tmp_path / "head.safetensors", {"classes": json.dumps(["x", "y", "z"])})
    bundle = build(cnn_run, ExportTarget(format="onnx"), out=tmp_path / "b", head=tmp_path / "head.safetensors")
    assert bundle.labels == ("x", "y", "z") and [o.name for o in bundle.outputs] == ["embedding", "logits"]
    session = onnxruntime.InferenceSession(tmp_path / "b" / "model.onnx")
    embedding, logits = session.run(None, {"pixels": scene_pixels[:4]})
    np.testing.assert_allclose(logits, embedding @ weight.T + bias, atol=1e-3)
    save_file({"weight": weight[:, :5].copy(), "bias": bias}, tmp_path / "narrow.safetensors")
    with pytest.raises(InputError, match="the head takes 5 features"):
        build(cnn_run, ExportTarget(format="onnx"), out=tmp_path / "c", head=tmp_path / "narrow.safetensors")


def test_the_onnx_is_exported_once(cnn_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _export(cnn_run, None, tmp_path / "a", format="onnx")

    def never(*_: object, **__: object) -> None:
        raise AssertionError("exported twice")

    monkeypatch.setattr(to_onnx, "export_onnx", never)
    assert _export(cnn_run, None, tmp_path / "b", format="openvino").verdict == "NOT_JUDGED"
    assert not list((cnn_run / CACHE).glob(".work*"))


def test_what_cannot_be_judged_or_is_not_whole_writes_nothing(cnn_run: Path, scenes: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="give --data"):
        _export(cnn_run, None, tmp_path / "b", format="onnx", precision="int8")
    with pytest.raises(InputError, match="at least 300"):
        _export(cnn_run, scenes, tmp_path / "b", Options(), format="onnx", precision="int8")
    damaged = tmp_path / "run"
    shutil.copytree(cnn_run, damaged)
    with (damaged / "student.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    with pytest.raises(ArtifactError, match="SHA-256"):
        _export(damaged, None, tmp_path / "b", format="onnx")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"format": "tflite"}, "unknown format"),
        ({"format": "onnx", "opset": 13}, "opset 13"),
        ({"format": "onnx", "batch": 0}, "batch 0"),
        ({"format": "trt", "uint8_input": True}, "--uint8-input"),
    ],
)
def test_senseless_targets_are_refused(wanted: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        ExportTarget(**wanted)  # type: ignore[arg-type]


def test_another_opset_than_asked_is_an_error(cnn_onnx: onnx.ModelProto, cnn_run: Path) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(cnn_onnx)
    with pytest.raises(ArtifactError, match="opset 18 was asked for and the exporter gave 20"):
        to_onnx.finish(model, load_trunk(cnn_run)[0], opset=18)


def test_parity_refuses_what_differs() -> None:
    reference = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)
    assert to_onnx.parity(reference, reference + 1e-6, precision="fp32", what="x")["max_abs"].value < 1e-5
    for wrong in (reference * np.float32(1.01), reference[:, ::-1], np.full_like(reference, np.nan)):
        with pytest.raises(ArtifactError, match="not shipped"):
            to_onnx.parity(reference, wrong, precision="fp32", what="x")


def test_the_commands(cnn_run: Path, scenes: Path, tmp_path: Path) -> None:
    run = CliRunner()
    options = ["--data", str(scenes), "--calibration-images", "32", "--rungs", "1", "--max-drop", "60"]
    base = ["export", str(cnn_run), "--format", "onnx", "--int8", "--out", str(tmp_path / "b"), *options]
    refused = run.invoke(main, [*base, "--min-speedup", "1000"])
    assert refused.exit_code == 3, refused.output
    assert "Rungs tried" in refused.output and "static, min-max" in refused.output
    shipped = run.invoke(main, [*base, "--min-speedup", "0.01"])
    assert shipped.exit_code == 0, shipped.output
    shown = run.invoke(main, ["inspect", str(tmp_path / "b"), "--layers"])
    assert shown.exit_code == 0, shown.output
    assert "model.onnx" in shown.output and "int8" in shown.output and "Conv" in shown.output
    both = run.invoke(main, ["export", str(cnn_run), "--format", "onnx", "--int8", "--fp16"])
    assert both.exit_code == 2 and "two exports" in both.output
