"""What the ladder needs to know of a network's ONNX graph: its kind, the layers to quantise, the layers of the head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import onnx

from robx.export.onnx_graph import WEIGHTED, Graph


@dataclass(frozen=True, kw_only=True)
class GraphFacts:
    """Names of nodes in the float32 ONNX graph."""

    kind: Literal["cnn", "vit"]  # "vit" for any network with attention
    weighted: tuple[str, ...]  # convolutions and matrix products with constant weights, in order
    head: tuple[str, ...]  # the products that only the logits need


def read_facts(model: onnx.ModelProto) -> GraphFacts:
    """Read a float32 graph whose first output is the embedding."""
    graph = Graph(model)
    needed = _upstream(graph, model.graph.output[0].name)
    products = [n for n in graph.nodes if n.op_type in WEIGHTED and graph.is_weight(n.input[1])]
    return GraphFacts(
        kind="vit" if any(n.op_type == "Softmax" for n in graph.nodes) else "cnn",
        weighted=tuple(n.name for n in products if n.output[0] in needed),
        head=tuple(n.name for n in products if n.output[0] not in needed),
    )


def _upstream(graph: Graph, output: str) -> set[str]:
    """The first outputs of all nodes that the tensor `output` depends on."""
    seen, pending = set[str](), [output]
    while pending:
        node = graph.producers.get(pending.pop())
        if node is not None and node.output[0] not in seen:
            seen.add(node.output[0])
            pending.extend(node.input)
    return seen
