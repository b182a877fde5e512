"""Which layers stay in float: a candidate's ONNX nodes, and their names in OpenVINO's and PyTorch's networks.

OpenVINO converts one ONNX node to several operations, and only the last one keeps the node's name: ``Conv`` becomes
the convolution ``NAME/WithoutBiases`` and the addition ``NAME``. A quantiser that is given just the ONNX name would
keep the addition in float and quantise the convolution.
"""

from __future__ import annotations

from typing import Any

import onnx
from torch import nn

from robx.errors import ArtifactError
from robx.export.int8.candidate import Candidate
from robx.export.onnx_graph import Graph


def kept_nodes(model: onnx.ModelProto, candidate: Candidate) -> list[onnx.NodeProto]:
    """The nodes of an ONNX graph that stay in float, in the graph's order.

    Raises:
        ArtifactError: a node of ``candidate.float_nodes`` is not in the graph.
    """
    named = set(candidate.float_nodes)
    missing = named - {node.name for node in model.graph.node}
    if missing:
        raise ArtifactError(_refusal(candidate, min(missing), "is not in the ONNX graph"))
    return [node for node in model.graph.node if node.name in named]


def openvino_names(network: Any, model: onnx.ModelProto, candidate: Candidate) -> list[str]:
    """Friendly names of the operations that stay in float in an ``openvino.Model`` that was converted from `model`.

    Both graphs use the same tensor names, so a node was converted to whatever lies between its outputs and the next
    ONNX tensors upstream.

    Raises:
        ArtifactError: a node of ``candidate.float_nodes`` is not in one of the graphs.
    """
    nodes = kept_nodes(model, candidate)
    if not nodes:
        return []
    makers = {name: output for op in network.get_ops() for output in op.outputs() for name in output.get_names()}
    graph = model.graph
    tensors = {value.name for value in (*graph.input, *graph.initializer)}
    tensors.update(name for node in graph.node for name in node.output)
    found: dict[str, None] = {}
    for node in nodes:
        names = _between(makers, tensors, node)
        if not names:
            raise ArtifactError(_refusal(candidate, node.name, "has no counterpart in OpenVINO's graph"))
        found.update(dict.fromkeys(names))
    return list(found)


def module_names(network: nn.Module, model: onnx.ModelProto, candidate: Candidate) -> list[str]:
    """Names of the PyTorch modules that a candidate's float nodes were exported from, found by their weights.

    A convolution's constant keeps its parameter's name. The exporter transposes a linear layer's weight into a constant
    without one, which is found by its values.

    Args:
        network: what `model` was exported from.
        model: float32 ONNX, whose node names the candidate uses.
        candidate: which nodes stay in float.

    Raises:
        ArtifactError: a node is not in the graph, or its weight is not one of the network's.
    """
    nodes = kept_nodes(model, candidate)
    if not nodes:
        return []
    graph, modules = Graph(model), dict(network.named_modules())
    by_value: dict[bytes, list[str]] = {}
    for name, module in modules.items():
        if isinstance(module, nn.Linear):
            by_value.setdefault(module.weight.detach().numpy().T.tobytes(), []).append(name)
    found: dict[str, None] = {}
    for node in nodes:
        owner = node.input[1].removesuffix(".weight")
        value = graph.constant(node.input[1])
        names = [owner] if owner in modules else by_value.get(value.tobytes() if value is not None else b"", [])
        if not names:
            raise ArtifactError(_refusal(candidate, node.name, "has no counterpart in PyTorch's network"))
        found.update(dict.fromkeys(names))
    return list(found)


def _between(makers: dict[str, Any], tensors: set[str], node: onnx.NodeProto) -> list[str]:
    """Names of the operations that compute `node`'s outputs from other ONNX tensors; [] if it was folded away."""
    upstream = tensors - set(node.output)
    pending = [makers[name] for name in node.output if name in makers]
    found: dict[str, None] = {}
    while pending:
        output = pending.pop()
        operation = output.get_node()
        name = operation.get_friendly_name()
        # A tensor that also carries the name of another ONNX tensor belongs to that one: `node` does not compute it.
        if name in found or operation.get_type_name() in ("Constant", "Parameter") or output.get_names() & upstream:
            continue
        found[name] = None
        pending.extend(operation.input_values())
    return list(found)


def _refusal(candidate: Candidate, name: str, why: str) -> str:
    return f"{candidate.name}: {name!r} should stay in float but {why}; export the student again"
