"""What the ladder has to know of a network's ONNX graph: its kind, and the layers that quantise badly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import onnx

from robx.export.qdq import WEIGHTED, Graph

_POOLS = ("ReduceMean", "GlobalAveragePool")
# What quantises badly and costs little in float: normalisation, attention's softmax, smooth activations and gates.
FLOAT_OPS = (
    "LayerNormalization", "Softmax", "Gelu", "Erf", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Mul", "ReduceMean",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class GraphFacts:
    """Names of nodes in the float32 ONNX graph."""

    kind: Literal["cnn", "vit"]
    weighted: tuple[str, ...]  # convolutions and matrix products with constant weights, in order
    first: tuple[str, ...]  # the stem or patch embedding
    last: tuple[str, ...]  # what makes the embedding, when a product does
    squeeze_excite: tuple[str, ...]  # the products of the squeeze-excite branches


def read_facts(model: onnx.ModelProto) -> GraphFacts:
    """Walk a float32 graph once."""
    graph = Graph(model)
    weighted = [n for n in graph.nodes if n.op_type in WEIGHTED and graph.is_weight(n.input[1])]
    squeezed = {n.name for n in graph.nodes for n in _gate_of(graph, n)}
    attention = any(n.op_type == "Softmax" for n in graph.nodes)
    names = [n.name for n in weighted]
    return GraphFacts(
        kind="vit" if attention else "cnn",
        weighted=tuple(names),
        first=tuple(names[:1]),
        last=tuple(names[-1:]) if len(names) > 1 else (),
        squeeze_excite=tuple(n for n in names if n in squeezed),
    )


def _gate_of(graph: Graph, pool: onnx.NodeProto) -> list[onnx.NodeProto]:
    """The nodes between a squeeze (a global mean) and the Mul that applies it; [] for another node."""
    if pool.op_type not in _POOLS:
        return []
    found: list[onnx.NodeProto] = []
    pending = list(graph.consumers.get(pool.output[0], []))
    while pending and len(found) < 16:
        node = pending.pop()
        if node.op_type == "Mul" and _meets_pooled(graph, node, pool.input[0]):
            return found
        if node.op_type in ("LayerNormalization", "Softmax"):
            return []
        found.append(node)
        pending.extend(n for output in node.output for n in graph.consumers.get(output, []) if n not in found)
    return []


def _meets_pooled(graph: Graph, node: onnx.NodeProto, pooled: str) -> bool:
    """Whether a Mul multiplies the tensor that was squeezed."""
    return pooled in node.input
