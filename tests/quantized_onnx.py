"""Which layers of an ONNX model with Q/DQ pairs run in int8."""

from __future__ import annotations

import onnx

from robx.export.onnx_graph import WEIGHTED, Graph


def quantized_nodes(model: onnx.ModelProto) -> list[str]:
    """Names of the weighted nodes (Conv, Gemm, MatMul) whose inputs are all dequantised, so that they run in int8."""
    graph = Graph(model)
    return [
        node.name
        for node in graph.nodes
        if node.op_type in WEIGHTED and all(graph.dequantized(name) is not None for name in node.input[:2])
    ]
