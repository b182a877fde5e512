"""fp16 is judged in float16 arithmetic, and an overflow is refused with its layers, not with a larger --max-drop."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper

from robx.cli import main
from robx.export.build import ExportSettings, export
from robx.export.formats.half import to_half
from robx.export.gate.gate import Limits
from robx.export.gate.half import in_half_arithmetic, overflow_line, overflowing_layers
from robx.export.onnx_run import run_model
from robx.export.request import ExportTarget
from robx.records import load_bundle
from robx.trunk import load_trunk, save_trunk


def _chain(scales: list[float]) -> onnx.ModelProto:
    """x (N, 4) -> y (N, 4): multiplies by each of `scales` in turn."""
    nodes, constants, last = [], [], "x"
    for place, scale in enumerate(scales):
        constants.append(numpy_helper.from_array(np.float32(scale), f"s{place}"))
        out = "y" if place == len(scales) - 1 else f"t{place}"
        nodes.append(helper.make_node("Mul", [last, f"s{place}"], [out], name=f"layer{place}"))
        last = out
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 4]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_float16_arithmetic_is_computed_to_the_bit() -> None:
    scales, images = [1.1, 0.3, 7.7, 1e-3], np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    expected = images.astype(np.float16)
    for scale in scales:
        expected = (expected.astype(np.float32) * np.float32(np.float16(scale))).astype(np.float16)
    found = run_model(in_half_arithmetic(_chain(scales)), images)
    np.testing.assert_array_equal(found, expected.astype(np.float32))
    assert not np.array_equal(found, run_model(_chain(scales), images))
    overflowing = run_model(in_half_arithmetic(_chain([10, 5e4, 1e-4, 1e-4])), images)
    assert np.isinf(overflowing).any()


@pytest.mark.parametrize("which", ["cnn_onnx", "vit_onnx"])
def test_float16_arithmetic_is_close_to_pytorch_half(
    which: str, scene_pixels: np.ndarray, request: pytest.FixtureRequest
) -> None:
    """An independent computation in float16: the distances from float32 are alike, and far above float32's own."""
    model: onnx.ModelProto = request.getfixturevalue(which)
    _, trunk = load_trunk(request.getfixturevalue(which.replace("onnx", "run")))
    pixels = torch.from_numpy(scene_pixels[:16])
    with torch.no_grad():
        exact, half = trunk(pixels).numpy(), trunk.half()(pixels.half()).float().numpy()
    simulated = run_model(in_half_arithmetic(model), scene_pixels[:16])
    distance, reference = np.abs(simulated - exact).mean(), np.abs(half - exact).mean()
    assert reference / 4 < distance < reference * 4
    # The float16 file, as ONNX Runtime computes it on a CPU without float16 kernels, and the same in float16.
    literal = run_model(in_half_arithmetic(to_half(model)), scene_pixels[:16])
    np.testing.assert_allclose(literal, simulated, atol=4 * reference)


def test_the_layers_beyond_the_range_are_named_in_order() -> None:
    images = np.full((6, 4), -2.0, np.float32)
    found = overflowing_layers(_chain([10, 5e3, 10, 1e-4, 1, 10]), images)
    assert found == ["layer1 (Mul) reaches 1e+05", "layer2 (Mul) reaches 1e+06"]
    assert overflow_line(found).endswith("65504: layer1 (Mul) reaches 1e+05, layer2 (Mul) reaches 1e+06")
    assert overflow_line([f"layer{i}" for i in range(5)]).endswith("layer0, layer1, layer2 and 2 more")
    assert overflowing_layers(_chain([2, 3]), images) == [] and "no activation" in overflow_line([])


@pytest.fixture(scope="module")
def overflowing_run(vit_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViT whose function is unchanged, but whose second block's normalisation answers beyond 65504."""
    run = tmp_path_factory.mktemp("overflow") / "vit"
    shutil.copytree(vit_run, run)
    student, trunk = load_trunk(run)
    block = trunk.blocks[1]  # type: ignore[index]
    with torch.no_grad():
        block.norm2.weight *= 5e4  # type: ignore[union-attr, operator]
        block.norm2.bias *= 5e4  # type: ignore[union-attr, operator]
        block.mlp.fc1.weight /= 5e4  # type: ignore[union-attr, operator]
    save_trunk(run, trunk, student)
    return run


def test_an_overflow_is_named_with_its_layers(overflowing_run: Path, scenes: Path, tmp_path: Path) -> None:
    out = tmp_path / "b"
    target = ["--format", "trt", "--target", "rtx:sm86", "--fp16"]
    given = ["--data", str(scenes), "--out", str(out), "--calibration-images", "32"]
    done = CliRunner().invoke(main, ["export", str(overflowing_run), *target, *given])
    message = done.output.strip().splitlines()[-1]
    assert done.exit_code == 3 and load_bundle(out).precision == "fp32"
    assert "overflow, beyond float16's largest value, 65504" in message and "LayerNorm" in message
    assert "in float16 arithmetic" in load_bundle(out).rungs[0].reason
    assert "keep fp32" in message and "--max-drop" not in message and "--force" not in message
    (half,) = load_bundle(out).rungs
    assert half.accuracy == "FAIL" and "overflow" in half.reason and not half.kept


def test_openvino_is_judged_in_float16_arithmetic(overflowing_run: Path, scenes: Path, tmp_path: Path) -> None:
    """Its CPU plugin computes the file in float32, where nothing overflows."""
    target = ExportTarget(format="openvino", precision="fp16")
    limits = Limits(max_drop=60)
    settings = ExportSettings(
        run=overflowing_run, target=target, data=scenes, out=tmp_path / "b", limits=limits, calibration_images=32
    )
    bundle = export(settings)
    assert (bundle.precision, bundle.rungs[0].accuracy) == ("fp32", "FAIL")
    assert "keep fp32, or try --int8" in bundle.rungs[0].reason
    assert "overflow, beyond float16" in bundle.rungs[0].reason and "LayerNorm" in bundle.rungs[0].reason


def test_an_overflow_that_this_cpu_hides_is_reported(overflowing_run: Path, scenes: Path, tmp_path: Path) -> None:
    """ONNX Runtime computes fp16 models in float32 on most CPUs."""
    target = ExportTarget(format="onnx", precision="fp16")
    limits = Limits(max_drop=60)
    settings = ExportSettings(
        run=overflowing_run, target=target, data=scenes, out=tmp_path / "b", limits=limits, calibration_images=32
    )
    bundle = export(settings)
    if bundle.precision == "fp16":
        assert "a device that computes in float16 may overflow" in bundle.reason and "LayerNorm" in bundle.reason
    else:
        assert "overflow, beyond float16" in bundle.rungs[0].reason


def test_an_fp16_model_within_the_range_is_not_said_to_overflow(vit_run: Path, scenes: Path, tmp_path: Path) -> None:
    target = ExportTarget(format="onnx", precision="fp16")
    limits = Limits(max_drop=60)
    settings = ExportSettings(
        run=vit_run, target=target, data=scenes, out=tmp_path / "b", limits=limits, calibration_images=32
    )
    bundle = export(settings)
    assert bundle.precision == "fp16" and "overflow" not in bundle.reason
    assert bundle.rungs[0].values["margin"].value == 60 and bundle.rungs[0].values["margin"].unit == "%"


def test_a_weight_beyond_the_range_is_named(vit_run: Path, scenes: Path, tmp_path: Path) -> None:
    run, out = tmp_path / "vit", tmp_path / "b"
    shutil.copytree(vit_run, run)
    student, trunk = load_trunk(run)
    block = trunk.blocks[1]  # type: ignore[index]
    with torch.no_grad():
        block.norm2.weight *= 1e6  # type: ignore[union-attr, operator]
        block.norm2.bias *= 1e6  # type: ignore[union-attr, operator]
        block.mlp.fc1.weight /= 1e6  # type: ignore[union-attr, operator]
    save_trunk(run, trunk, student)
    given = ["--data", str(scenes), "--out", str(out), "--calibration-images", "32"]
    done = CliRunner().invoke(main, ["export", str(run), "--format", "onnx", "--fp16", *given])
    message = done.output.strip().splitlines()[-1]
    assert done.exit_code == 3 and load_bundle(out).precision == "fp32"
    assert "norm2" in message and "beyond float16's 65504" in message
    assert "--max-drop" not in message and "--force" not in message
