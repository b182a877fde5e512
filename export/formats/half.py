"""Float32 ONNX to float16 by rewriting the graph; its inputs and outputs stay float32."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from robx.errors import ArtifactError

_F16_MAX = 65504.0
# Below 2^-17 a float16 scale has seven bits or fewer, and below 2^-25 it is 0, which cannot divide.
_LEAST_SCALE = 2.0**-17
_RANDOM = ("RandomNormal", "RandomUniform")


def to_half(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of `model` that computes in float16; its inputs and outputs keep their types.

    Raises:
        ArtifactError: a weight beyond float16's range (65504), or a graph with subgraphs.
    """
    half = onnx.ModelProto()
    half.CopyFrom(model)
    graph = half.graph
    if any(a.HasField("g") or a.graphs for node in graph.node for a in node.attribute):
        raise ArtifactError("a model with control flow cannot be converted to fp16: export it as fp32")
    _raise_scales(graph)
    for tensor in graph.initializer:
        _halve(tensor)
    for node in graph.node:
        _halve_attributes(node)
    for value in graph.value_info:
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = TensorProto.FLOAT16
    _cast_ends(graph)
    return half


def _raise_scales(graph: onnx.GraphProto) -> None:
    """Raise the scales of Q/DQ pairs that are too small for float16, as those of channels that training left dead.

    Weights that are quantised already are rounded to the new step.
    """
    constants = {tensor.name: tensor for tensor in graph.initializer}
    pairs = [n for n in graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear") and n.input[1] in constants]
    for name in dict.fromkeys(node.input[1] for node in pairs):
        old = numpy_helper.to_array(constants[name])
        new = np.maximum(old, np.float32(_LEAST_SCALE))
        if old.dtype != np.float32 or np.array_equal(old, new):
            continue
        constants[name].CopyFrom(numpy_helper.from_array(new, name))
        for node in pairs:
            if node.input[1] == name and node.op_type == "DequantizeLinear" and node.input[0] in constants:
                _requantise(constants[node.input[0]], old / new, node)


def _requantise(tensor: TensorProto, ratio: np.ndarray, node: onnx.NodeProto) -> None:
    """Multiply integers with zero point 0 by `ratio`: a scalar, or one value per channel of the node's axis."""
    value = numpy_helper.to_array(tensor)
    axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
    shape = [1] * value.ndim
    if ratio.size > 1:
        shape[axis] = -1
    moved = np.round(value * ratio.reshape(shape)).astype(value.dtype)
    tensor.CopyFrom(numpy_helper.from_array(moved, tensor.name))


def _halve(tensor: TensorProto) -> None:
    if tensor.data_type != TensorProto.FLOAT:
        return
    value = numpy_helper.to_array(tensor)
    finite = np.abs(value[np.isfinite(value)])
    if finite.size and finite.max() > _F16_MAX:
        raise ArtifactError(f"{tensor.name} holds {finite.max():.3g}, beyond float16's 65504: export it as fp32")
    tensor.CopyFrom(numpy_helper.from_array(value.astype(np.float16), tensor.name))


def _halve_attributes(node: onnx.NodeProto) -> None:
    if node.op_type in _RANDOM:
        raise ArtifactError(f"{node.name} ({node.op_type}) is random: choose another student")
    for attribute in node.attribute:
        if attribute.HasField("t"):
            _halve(attribute.t)
        if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT:
            attribute.i = TensorProto.FLOAT16


def _cast_ends(graph: onnx.GraphProto) -> None:
    """Cast inputs to float16 and outputs back to float32."""
    front, back = [], []
    for value in graph.input:
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            inner = f"{value.name}_fp16"
            for node in graph.node:
                _rename(node.input, value.name, inner)
            front.append(helper.make_node("Cast", [value.name], [inner], name=f"{inner}_cast", to=TensorProto.FLOAT16))
    for value in graph.output:
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            inner = f"{value.name}_fp16"
            for node in graph.node:
                _rename(node.input, value.name, inner)
                _rename(node.output, value.name, inner)
            back.append(helper.make_node("Cast", [inner], [value.name], name=f"{inner}_cast", to=TensorProto.FLOAT))
    nodes = [*front, *graph.node, *back]
    del graph.node[:]
    graph.node.extend(nodes)


def _rename(names: onnx.protobuf.RepeatedScalar, old: str, new: str) -> None:  # type: ignore[name-defined]
    for position, name in enumerate(names):
        if name == old:
            names[position] = new
