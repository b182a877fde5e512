"""Named nodes stay in float in each quantiser's graph, and names that are not in the graph are refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from robx.errors import ArtifactError
from robx.export.formats.to_openvino import read_onnx
from robx.export.int8 import by_nncf, by_onnxruntime, ranges
from robx.export.int8.candidate import Candidate
from robx.export.int8.float_scope import kept_nodes, openvino_names
from robx.export.int8.graph_facts import read_facts
from robx.export.int8.ladder import sensitive_candidates
from robx.export.onnx_run import run_model
from tests.quantized_onnx import quantized_nodes

ov = pytest.importorskip("openvino")


def _read(model: onnx.ModelProto) -> Any:
    return read_onnx(model.SerializeToString(), where="the test's model")


def _run(network: Any, images: np.ndarray) -> np.ndarray:
    compiled = ov.Core().compile_model(network, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1})
    return np.concatenate([compiled(image[None])[0] for image in images])


def _has_int8_inputs(operation: Any) -> bool:
    """Whether an OpenVINO product's activations come through a FakeQuantize or its weights from int8."""
    pooling = ("MaxPool", "AvgPool", "Reshape", "Transpose")  # a FakeQuantize may stand before these
    data = operation.input_value(0).get_node()
    while data.get_type_name() in pooling:
        data = data.input_value(0).get_node()
    weights = operation.input_value(1).get_node()
    return bool(data.get_type_name() == "FakeQuantize" or weights.get_type_name() != "Constant")


def _convolutions(network: Any) -> dict[str, Any]:
    """By ONNX name: every convolution of these graphs has a bias, and is named for it."""
    found = (op for op in network.get_ordered_ops() if op.get_type_name() == "Convolution")
    return {op.get_friendly_name().removesuffix("/WithoutBiases"): op for op in found}


def test_the_openvino_names_of_a_convolution_include_the_convolution(cnn_onnx: onnx.ModelProto) -> None:
    facts, network = read_facts(cnn_onnx), _read(cnn_onnx)
    types = {op.get_friendly_name(): op.get_type_name() for op in network.get_ops()}
    for node in facts.weighted:
        names = openvino_names(network, cnn_onnx, Candidate(name="x", float_nodes=(node,)))
        assert [n for n in names if types[n] == "Convolution"] == [_convolutions(network)[node].get_friendly_name()]
        assert not any(types[n] in ("Relu", "Parameter", "Constant", "Result") for n in names)


def test_openvino_keeps_named_nodes_in_float(cnn_onnx: onnx.ModelProto, scene_pixels: np.ndarray) -> None:
    names, network, images = read_facts(cnn_onnx).weighted, _read(cnn_onnx), scene_pixels[:16]
    plain = Candidate(name="nncf", quantiser="nncf")
    rungs = [plain, *sensitive_candidates(plain, list(names))[:2]]
    assert len({rung.float_nodes for rung in rungs}) == len(rungs) == 3
    answers = []
    for rung in rungs:
        quantised = by_nncf.quantize_openvino(network, cnn_onnx, images, rung)
        in_float = {name for name, op in _convolutions(quantised).items() if not _has_int8_inputs(op)}
        assert in_float == set(rung.float_nodes)
        answers.append(_run(quantised, images))
    for first, second in ((0, 1), (1, 2)):
        assert np.abs(answers[first] - answers[second]).max() > 1e-3 * np.abs(answers[0]).max()


@pytest.mark.parametrize("quantiser", ["nncf", "onnxruntime"])
def test_onnx_keeps_named_nodes_in_float(cnn_onnx: onnx.ModelProto, scene_pixels: np.ndarray, quantiser: str) -> None:
    names, images = read_facts(cnn_onnx).weighted, scene_pixels[:16]
    chosen = ranges.choose(ranges.collect(cnn_onnx, [images], input_name="pixels"), "minmax")
    int8, answers = [], []
    for kept in ((), names[:1], names[:3]):
        candidate = Candidate(name="x", float_nodes=kept)
        if quantiser == "nncf":
            quantised = by_nncf.quantize_onnx(cnn_onnx, images, candidate)
        else:
            quantised = by_onnxruntime.quantize(cnn_onnx, chosen, candidate)
        int8.append(set(quantized_nodes(quantised)))
        assert not int8[-1] & set(kept) and int8[-1]
        answers.append(run_model(quantised, images))
    assert names[0] in int8[0] and int8[0] > int8[1] > int8[2]
    for first, second in ((0, 1), (1, 2)):
        assert np.abs(answers[first] - answers[second]).max() > 1e-3 * np.abs(answers[0]).max()


def test_a_node_that_is_not_in_the_graph_is_refused(cnn_onnx: onnx.ModelProto, scene_pixels: np.ndarray) -> None:
    candidate, images = Candidate(name="careful", float_nodes=("no_such_node",)), scene_pixels[:2]
    calls = (
        lambda: kept_nodes(cnn_onnx, candidate),
        lambda: by_nncf.quantize_openvino(_read(cnn_onnx), cnn_onnx, images, candidate),
        lambda: by_nncf.quantize_onnx(cnn_onnx, images, candidate),
        lambda: by_onnxruntime.quantize(cnn_onnx, {}, candidate),
    )
    for call in calls:
        with pytest.raises(ArtifactError, match=r"careful: 'no_such_node' should stay in float but is not in"):
            call()


def test_a_network_of_another_graph_is_refused(cnn_onnx: onnx.ModelProto) -> None:
    other = onnx.ModelProto()
    other.CopyFrom(cnn_onnx)
    stem = other.graph.node[0]
    renamed = {stem.output[0]: "of another graph"}
    for node in other.graph.node:
        for names in (node.input, node.output):
            names[:] = [renamed.get(name, name) for name in names]
    with pytest.raises(ArtifactError, match="has no counterpart in OpenVINO's graph"):
        openvino_names(_read(cnn_onnx), other, Candidate(name="x", float_nodes=(stem.name,)))
