"""Where the input of an activation function may saturate in int8.

Outside of these bounds the function is constant, or changes by less than half a step of int8. A quantiser that covers a
tensor's whole range wastes most of its steps there. A ReLU6 that follows a convolution of EfficientNet-Lite0 reads
values from -168 to 204, and ExecuTorch's own int8 of that network falls to a centred cosine of 0.81. The first SiLU of
an EfficientNet-B0 (64 px, four epochs) reads values from -67 to 74: these bounds raise its centred cosine in ONNX
Runtime from .901 to .944 with percentile ranges.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import inf

import onnx

from robx.activation_bounds import INTERESTING, Bounds
from robx.export.onnx_graph import Graph

EVERYTHING: Bounds = (-inf, inf)
_ONNX_FUNCTIONS = {"HardSwish": "hardswish", "HardSigmoid": "hardsigmoid", "Sigmoid": "sigmoid", "Gelu": "gelu"}


def saturating(model: onnx.ModelProto) -> dict[str, Bounds]:
    """The tensors of an ONNX graph that only smooth activation functions read, and the values that matter to those.

    A ReLU's input is left out: ONNX Runtime's quantiser removes the ReLU and gives its output a range.
    """
    graph = Graph(model)
    outputs = {value.name for value in model.graph.output}
    found = {name: union(_bounds(name, graph)) for name in graph.consumers if name not in outputs}
    return {name: bounds for name, bounds in found.items() if bounds != EVERYTHING}


def silu_product(name: str, graph: Graph) -> onnx.NodeProto | None:
    """The product of x * sigmoid(x), if nothing else reads the tensor x; else None."""
    readers = graph.consumers.get(name, [])
    gates = {node.output[0] for node in readers if node.op_type == "Sigmoid"}
    products = [node for node in readers if node.op_type == "Mul" and gates & {*node.input}]
    fits = products and len(readers) == 2 and graph.consumers[gates.pop()] == products
    return products[0] if fits else None


def _bounds(name: str, graph: Graph) -> list[Bounds]:
    """For each node that reads a tensor; x * sigmoid(x) counts as SiLU."""
    if silu_product(name, graph) is not None:
        return [INTERESTING["silu"]]
    readers = graph.consumers[name]
    return [INTERESTING.get(_ONNX_FUNCTIONS.get(node.op_type, ""), EVERYTHING) for node in readers]


def union(bounds: Iterable[Bounds]) -> Bounds:
    """The bounds of a tensor that several functions read; everything if none does."""
    found = list(bounds) or [EVERYTHING]
    return min(low for low, _ in found), max(high for _, high in found)
