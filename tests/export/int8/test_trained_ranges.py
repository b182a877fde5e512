"""Ranges that were trained in PyTorch belong to the ONNX tensors that have those values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from robx.export.formats import to_onnx
from robx.export.formats.network import PIXELS, export_model
from robx.export.int8 import for_tensorrt
from robx.export.int8.candidate import Candidate
from robx.export.int8.ranges import choose, collect
from robx.export.int8.tensorrt_qdq import linears
from robx.export.int8.trained_ranges import tensor_ranges
from robx.export.onnx_graph import Graph
from robx.int8_simulation import Int8Simulation
from robx.trunk import load_trunk
from tests.export.conftest import make_student


def test_every_trained_range_is_that_of_its_tensor(scenes: Path, scene_pixels: np.ndarray, tmp_path: Path) -> None:
    """In a network with SiLU and squeeze-and-excitation, against the histograms of the exported graph."""
    student, trunk = load_trunk(make_student("test_efficientnet", tmp_path / "swish", scenes, size=64))
    model = export_model(trunk, student)
    simulation = Int8Simulation(model.trunk)
    simulation.set_ranges([torch.from_numpy(scene_pixels)], clipped=1e-4)
    simulation.learn_ranges()
    trained = simulation.trained_ranges()
    proto = to_onnx.export_onnx(model, tmp_path / "m.onnx", student=student, batch=None, opset=20)
    found = tensor_ranges(proto, trained)
    places = [each.place for each in trained]
    # A tensor may be one layer's result and the next one's input; nothing else is missing.
    assert len(trained) - places.count("input") < len(found) <= len(trained)
    assert {"input", "output", "function"} == set(places)
    expected = choose(collect(proto, [scene_pixels], input_name=PIXELS), "percentile")
    for name, (low, high) in found.items():
        width = expected[name][1] - expected[name][0]
        assert (low, high) == pytest.approx(expected[name], abs=0.15 * width), name  # quantiles of few images
    # TensorRT has no zero points: a range's farther end decides.
    quantised = Graph(for_tensorrt.quantize(proto, expected | found, Candidate(name="trained", signed=True)))
    scales = {pair.node.input[0]: pair.scale for pair in linears(quantised) if pair.node.op_type == "QuantizeLinear"}
    assert len(scales.keys() & found.keys()) > places.count("input") / 2
    for name in scales.keys() & found.keys():
        assert scales[name] == pytest.approx(max(-found[name][0], found[name][1]) / 127, rel=1e-5), name
