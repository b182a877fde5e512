"""Cross-layer equalisation: move scale between two convolutions with a ReLU between them (Nagel et al. 2019, 4.1).

ReLU(s x) = s ReLU(x) for s > 0, so channel i of the first convolution may be divided by s_i and the second multiplied
by it without changing the function. With s_i = sqrt(r1_i / r2_i), r the channel's largest weight, both ranges become
equal.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper

from robx.export.onnx_graph import Graph

_LARGEST_SCALE = 100.0  # a nearly dead channel is not worth an overflow


def equalize(model: onnx.ModelProto) -> tuple[onnx.ModelProto, int]:
    """An equalised copy of a float32 model, and how many pairs of convolutions it changed."""
    equal = onnx.ModelProto()
    equal.CopyFrom(model)
    graph, count = Graph(equal), 0
    for first in graph.nodes:
        second = _partner(graph, first)
        if second is None:
            continue
        scale = _scales(graph, first, second)
        _multiply(graph, first.input[1], 1 / scale, axis=0)
        if len(first.input) > 2:
            _multiply(graph, first.input[2], 1 / scale, axis=0)
        grouped = _groups(second) > 1
        _multiply(graph, second.input[1], scale, axis=0 if grouped else 1)
        count += 1
    return equal, count


def _partner(graph: Graph, first: onnx.NodeProto) -> onnx.NodeProto | None:
    """The convolution that alone reads `first` through nothing or one ReLU; both with weights of their own."""
    if first.op_type != "Conv" or not _owns(graph, first):
        return None
    node, outputs = first, {o.name for o in graph.model.graph.output}
    for _ in range(2):
        readers = graph.consumers.get(node.output[0], [])
        if len(readers) != 1 or node.output[0] in outputs:
            return None
        node = readers[0]
        if node.op_type == "Conv":
            depthwise = _groups(node) == 1 or _groups(node) == graph.constant(first.input[1]).shape[0]  # type: ignore[union-attr]
            return node if _owns(graph, node) and depthwise and node.input[0] != node.input[1] else None
        if node.op_type != "Relu":
            return None
    return None


def _owns(graph: Graph, node: onnx.NodeProto) -> bool:
    return all(name in graph.initializers and len(graph.consumers[name]) == 1 for name in node.input[1:])


def _scales(graph: Graph, first: onnx.NodeProto, second: onnx.NodeProto) -> np.ndarray:
    one, two = (numpy_helper.to_array(graph.initializers[node.input[1]]) for node in (first, second))
    reach_one = np.abs(one).reshape(len(one), -1).max(axis=1)
    axis = 0 if _groups(second) > 1 else 1
    reach_two = np.abs(np.moveaxis(two, axis, 0)).reshape(reach_one.size, -1).max(axis=1)
    usable = (reach_one > 0) & (reach_two > 0)
    ratio = np.where(usable, reach_one, 1) / np.where(usable, reach_two, 1)
    scale: np.ndarray = np.clip(np.sqrt(ratio), 1 / _LARGEST_SCALE, _LARGEST_SCALE)
    return scale


def _multiply(graph: Graph, name: str, scale: np.ndarray, *, axis: int) -> None:
    tensor = graph.initializers[name]
    value = numpy_helper.to_array(tensor).astype(np.float64)
    shape = [1] * value.ndim
    shape[axis] = -1
    tensor.CopyFrom(numpy_helper.from_array((value * scale.reshape(shape)).astype(np.float32), name))


def _groups(node: onnx.NodeProto) -> int:
    return next((int(a.i) for a in node.attribute if a.name == "group"), 1)
