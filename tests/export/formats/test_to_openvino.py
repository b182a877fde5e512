"""OpenVINO's graph of a student of any batch: what NNCF can correct, and what it does with swishes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from robx.export.formats.to_openvino import read_onnx
from robx.export.int8.by_nncf import quantize_openvino, use_ranges
from robx.export.int8.candidate import Candidate
from tests.export.conftest import export_onnx, make_student

ov = pytest.importorskip("openvino")
nncf = pytest.importorskip("nncf")


@pytest.fixture(scope="module")
def swish_onnx(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> onnx.ModelProto:
    """An EfficientNet with dynamic batch."""
    run = make_student("test_efficientnet", tmp_path_factory.mktemp("runs") / "swish", scenes, size=64)
    return export_onnx(run, tmp_path_factory.mktemp("onnx") / "swish.onnx")


def _read(model: onnx.ModelProto) -> Any:
    return read_onnx(model.SerializeToString(), where="the test's model")


def _run(network: Any, images: np.ndarray) -> np.ndarray:
    config = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    return np.asarray(ov.Core().compile_model(network, "CPU", config)(images)[0])


def _swish_ranges(quantised: Any) -> dict[str, tuple[float, float]]:
    """(low, high) of the FakeQuantize behind each swish, by the swish's name."""
    found = {}
    for op in quantised.get_ops():
        before = op.input_value(0).get_node() if op.get_type_name() == "FakeQuantize" else None
        if before is not None and before.get_type_name() == "Swish":
            low, high = (float(np.ravel(op.input_value(i).get_node().data)[0]) for i in (1, 2))
            found[before.get_friendly_name()] = (low, high)
    return found


def test_with_any_batch_each_bias_is_a_constant_and_nothing_computes_with_shapes(swish_onnx: onnx.ModelProto) -> None:
    network = _read(swish_onnx)
    assert network.inputs[0].partial_shape[0].is_dynamic
    operations = network.get_ops()
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in swish_onnx.graph.initializer}
    biases = [weights[n.input[2]] for n in swish_onnx.graph.node if n.op_type == "Conv" and len(n.input) > 2]
    additions = [
        target.get_node()
        for op in operations
        if op.get_type_name() in ("Convolution", "GroupConvolution")
        for target in op.output(0).get_target_inputs()
        if target.get_node().get_type_name() == "Add"
    ]
    assert len(additions) == sum(bool(bias.any()) for bias in biases) > 10  # OpenVINO drops those that are 0
    assert {op.input_value(1).get_node().get_type_name() for op in additions} == {"Constant"}
    assert "ShapeOf" not in {op.get_type_name() for op in operations}


def test_bias_correction_takes_place_unless_it_is_off_and_the_full_one_is_another(
    swish_onnx: onnx.ModelProto, scene_pixels: np.ndarray
) -> None:
    network, images = _read(swish_onnx), scene_pixels[:24]
    off = nncf.AdvancedQuantizationParameters(disable_bias_correction=True, overflow_fix=nncf.OverflowFix.DISABLE)
    off.activations_range_estimator_params = nncf.quantization.range_estimator.RangeEstimatorParametersSet.MINMAX
    data = nncf.Dataset([image[None] for image in images])
    bare = _run(nncf.quantize(network.clone(), data, subset_size=len(images), advanced_parameters=off), images)
    plain = Candidate(name="x", quantiser="nncf")
    kept, fast, full = (
        _run(quantize_openvino(network, swish_onnx, images, dataclasses.replace(plain, **corrected)), images)
        for corrected in ({"keep_bias": True}, {}, {"full_bias": True})
    )
    scale = np.abs(_run(network, images)).mean()
    assert np.abs(kept - bare).max() < 1e-5 * scale
    assert np.abs(fast - bare).mean() > 0.005 * scale
    assert np.abs(fast - full).mean() > 0.005 * scale


def test_mean_ranges_are_narrower_than_the_extremes_of_all_images(
    swish_onnx: onnx.ModelProto, scene_pixels: np.ndarray
) -> None:
    tops = []
    for mean in (False, True):
        candidate = Candidate(name="x", quantiser="nncf", asymmetric=True, mean_ranges=mean)
        quantised = quantize_openvino(_read(swish_onnx), swish_onnx, scene_pixels[:24], candidate)
        tops.append({name: high for name, (_, high) in _swish_ranges(quantised).items()})
    assert tops[0].keys() == tops[1].keys() and all(tops[0][name] >= tops[1][name] for name in tops[0])
    assert sum(tops[0][name] > 1.05 * tops[1][name] for name in tops[0]) > len(tops[0]) / 2


@pytest.mark.parametrize("asymmetric", [False, True])
def test_asymmetric_ranges_follow_a_swish_below_zero(
    asymmetric: bool, swish_onnx: onnx.ModelProto, scene_pixels: np.ndarray
) -> None:
    candidate = Candidate(name="x", quantiser="nncf", asymmetric=asymmetric)
    quantised = quantize_openvino(_read(swish_onnx), swish_onnx, scene_pixels[:16], candidate)
    ranges = _swish_ranges(quantised)
    assert len(ranges) > 3
    for low, high in ranges.values():
        if asymmetric:
            assert -0.5 < low < 0 < high  # a swish is nowhere below -.28
        else:
            assert low == pytest.approx(-high * 128 / 127, rel=1e-3)


def test_trained_ranges_replace_those_of_their_activations(
    swish_onnx: onnx.ModelProto, scene_pixels: np.ndarray
) -> None:
    candidate = Candidate(name="x", quantiser="nncf", asymmetric=True, keep_bias=True)
    quantised = quantize_openvino(_read(swish_onnx), swish_onnx, scene_pixels[:24], candidate)
    before, layer = _activation_ranges(quantised), [n for n in swish_onnx.graph.node if n.op_type == "Conv"][1]
    use_ranges(quantised, {layer.input[0]: (-0.5, 2.05), "unknown": (0.0, 1.0)})
    after = _activation_ranges(quantised)
    changed = {name for name in before if after[name] != before[name]}
    assert len(changed) == 1 and before.keys() == after.keys()
    assert after[changed.pop()] == pytest.approx((-0.5, 2.05, -0.5, 2.05))
    assert np.isfinite(_run(quantised, scene_pixels[:4])).all()


def _activation_ranges(quantised: Any) -> dict[str, tuple[float, ...]]:
    """Input low and high and output low and high of each FakeQuantize that does not read weights, by its name."""
    return {
        op.get_friendly_name(): tuple(float(np.ravel(op.input_value(i).get_node().data)[0]) for i in range(1, 5))
        for op in quantised.get_ops()
        if op.get_type_name() == "FakeQuantize" and op.input_value(0).get_node().get_type_name() != "Constant"
    }
