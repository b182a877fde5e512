"""What float16 arithmetic does to a model, computed literally: a CPU without it computes fp16 models in float32.

A GPU or NPU rounds every result to float16, whose largest value is 65504. On such a CPU the same file hides both the
rounding and the overflow, which ends in NaN on the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from robx.export.image_splits import whole_batches
from robx.export.int8 import ranges
from robx.export.onnx_graph import input_batch

LARGEST = float(np.finfo(np.float16).max)
_BATCH = 4  # every activation of these images is in memory at once
_SHOWN = 3


def in_half_arithmetic(model: onnx.ModelProto) -> onnx.ModelProto:
    """A float32 copy of a float32 or float16 model that rounds its weights and every operator's result to float16.

    Sums inside an operator stay in float32, as on tensor cores. To be run without graph optimisation.
    """
    half = onnx.ModelProto()
    half.CopyFrom(model)
    for tensor in half.graph.initializer:
        _round(tensor)
    for node in half.graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                _round(attribute.t)
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT16:
                attribute.i = TensorProto.FLOAT
    del half.graph.value_info[:]
    for value in half.graph.input:
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            _rename_input(half.graph, value.name)
    _round_results(half)
    return half


def overflowing_layers(model: onnx.ModelProto, images: np.ndarray) -> list[str]:
    """Each layer of the float32 `model` that overflows in float16 on `images`, in order, with its largest value.

    Args:
        model: float32 ONNX.
        images: its input, (N, 3, H, W); a few are enough.
    """
    name = model.graph.input[0].name
    seen = ranges.collect(model, whole_batches(images, input_batch(model) or _BATCH), input_name=name)
    reach = {tensor: max(abs(found.low), abs(found.high)) for tensor, found in seen.items()}
    found = []
    for node in model.graph.node:
        largest = max((reach.get(output, 0.0) for output in node.output), default=0.0)
        if largest > LARGEST:
            found.append(f"{node.name or node.output[0]} ({node.op_type}) reaches {largest:.2g}")
    return found


def overflow_line(layers: Sequence[str]) -> str:
    """What is beyond the range of float16, in one line."""
    if not layers:
        return f"a sum inside a layer exceeds float16's largest value, {LARGEST:.0f}, although no activation does"
    more = f" and {len(layers) - _SHOWN} more" if len(layers) > _SHOWN else ""
    return f"beyond float16's largest value, {LARGEST:.0f}: {', '.join(layers[:_SHOWN])}{more}"


def _round(tensor: TensorProto) -> None:
    """Round a float tensor to float16's values, stored as float32."""
    if tensor.data_type in (TensorProto.FLOAT, TensorProto.FLOAT16):
        with np.errstate(over="ignore"):
            value = numpy_helper.to_array(tensor).astype(np.float16).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))


def _rename_input(graph: onnx.GraphProto, name: str) -> None:
    """Let the nodes read the input through an Identity, whose result is rounded like any other."""
    for node in graph.node:
        for place, read in enumerate(node.input):
            if read == name:
                node.input[place] = f"{name}_read"
    graph.node.insert(0, helper.make_node("Identity", [name], [f"{name}_read"]))


def _round_results(model: onnx.ModelProto) -> None:
    """Cast every float result to float16 and back, in place; the graph's outputs keep their names."""
    inferred = onnx.shape_inference.infer_shapes(model).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*inferred.value_info, *inferred.output)}
    nodes = []
    for node in model.graph.node:
        nodes.append(node)
        for place, name in enumerate(node.output):
            if name and types.get(name) == TensorProto.FLOAT:
                node.output[place] = f"{name}_exact"
                nodes.append(helper.make_node("Cast", [f"{name}_exact"], [f"{name}_half"], to=TensorProto.FLOAT16))
                nodes.append(helper.make_node("Cast", [f"{name}_half"], [name], to=TensorProto.FLOAT))
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(kept)
