"""What the ladder has to know of a network's ONNX graph: its kind, and the layers that quantise badly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import onnx

from robx.export.onnx_graph import WEIGHTED, Graph

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
    last: tuple[str, ...]  # the products nearest to the embedding; both, where a block adds two
    squeeze_excite: tuple[str, ...]  # the products of the squeeze-excite branches
    head: tuple[str, ...]  # the products that the logits alone need


def read_facts(model: onnx.ModelProto) -> GraphFacts:
    """Walk a float32 graph whose first output is the embedding."""
    graph = Graph(model)
    levels = _upstream(graph, model.graph.output[0].name)
    needed = {node.output[0] for level in levels for node in level}
    products = [n for n in graph.nodes if _is_product(graph, n)]
    weighted = [n for n in products if n.output[0] in needed]
    squeezed = {n.name for n in graph.nodes for n in _gate_of(graph, n)}
    attention = any(n.op_type == "Softmax" for n in graph.nodes)
    names = [n.name for n in weighted]
    return GraphFacts(
        kind="vit" if attention else "cnn",
        weighted=tuple(names),
        first=tuple(names[:1]),
        last=_nearest(graph, levels) if len(names) > 1 else (),
        squeeze_excite=tuple(n for n in names if n in squeezed),
        head=tuple(n.name for n in products if n.output[0] not in needed),
    )


def _is_product(graph: Graph, node: onnx.NodeProto) -> bool:
    return node.op_type in WEIGHTED and graph.is_weight(node.input[1])


def _upstream(graph: Graph, output: str) -> list[list[onnx.NodeProto]]:
    """The nodes that make the tensor `output`, by their distance from it."""
    levels, seen = [], set[str]()
    names = [output]
    while names:
        makers = [graph.producers[name] for name in names if name in graph.producers]
        nodes = {node.output[0]: node for node in makers if node.output[0] not in seen}
        seen.update(nodes)
        levels.append(list(nodes.values()))
        names = [name for node in nodes.values() for name in node.input]
    return levels


def _nearest(graph: Graph, levels: list[list[onnx.NodeProto]]) -> tuple[str, ...]:
    found = ([n.name for n in level if _is_product(graph, n)] for level in levels)
    return tuple(next((names for names in found if names), []))


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
