"""Walking an ONNX graph: who produces and consumes each tensor, constants, and the operators that hold weights."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper

WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")


class Graph:
    """A model's main graph, indexed by tensor name."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model, self.nodes = model, list(model.graph.node)
        self.initializers = {i.name: i for i in model.graph.initializer}
        self.producers = {output: node for node in self.nodes for output in node.output}
        self.consumers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in node.input:
                self.consumers.setdefault(name, []).append(node)

    def constant(self, name: str) -> np.ndarray | None:
        """The value of an initialiser or a Constant node, else None."""
        if name in self.initializers:
            return numpy_helper.to_array(self.initializers[name])
        node = self.producers.get(name)
        if node is not None and node.op_type == "Constant":
            return next((numpy_helper.to_array(a.t) for a in node.attribute if a.name == "value"), None)
        return None

    def dequantized(self, name: str) -> onnx.NodeProto | None:
        """The DequantizeLinear that produces the tensor `name`, or None."""
        node = self.producers.get(name)
        return node if node is not None and node.op_type == "DequantizeLinear" else None

    def is_weight(self, name: str) -> bool:
        """Whether the tensor `name` is a constant, directly or behind Q/DQ nodes."""
        while (node := self.producers.get(name)) is not None and node.op_type in ("DequantizeLinear", "QuantizeLinear"):
            name = node.input[0]
        return name in self.initializers or (node is not None and node.op_type == "Constant")


def channel_axis(node: onnx.NodeProto, ndim: int) -> int:
    """The axis of the output channels in the weight, of `ndim` axes, of one of the WEIGHTED operators."""
    if node.op_type == "Conv" or any(a.name == "transB" and a.i for a in node.attribute):
        return 0
    return 1 if node.op_type == "ConvTranspose" else ndim - 1


def input_batch(model: onnx.ModelProto) -> int | None:
    """The batch of the model's first input; None where it is dynamic."""
    axis = model.graph.input[0].type.tensor_type.shape.dim[0]
    return int(axis.dim_value) if axis.HasField("dim_value") else None
