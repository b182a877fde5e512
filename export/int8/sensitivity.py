"""How much quantising each layer alone changes the output; the most sensitive layers go back to float."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import helper, numpy_helper

from robx.errors import ArtifactError
from robx.export.int8.ranges import Ranges
from robx.export.onnx_graph import Graph, channel_axis
from robx.export.onnx_run import run_model
from robx.progress import Progress


def measure(
    model: onnx.ModelProto,
    ranges: Ranges,
    images: np.ndarray,
    nodes: Sequence[str],
    *,
    progress: Progress | None = None,
) -> dict[str, float]:
    """1 - mean centred cosine of the output with only that layer quantised, for each of `nodes`; the worst first.

    Computed as half the squared distance of the unit vectors, which is equal but accurate for small costs: 1 minus a
    float32 cosine is 0 below 6e-8, as for all layers of a residual branch that starts at zero.

    Args:
        model: float32 ONNX whose first output is the embedding.
        ranges: (low, high) of every activation.
        images: the model's input, (N, 3, H, W).
        nodes: convolutions and matrix products with constant weights.
        progress: called after every layer.

    Raises:
        ArtifactError: a layer is not in the graph, or its input has no range, so that its cost would seem to be 0.
    """
    reference = run_model(model, images).astype(np.float64)
    mean = reference.mean(axis=0)
    directions = _unit(reference - mean)
    found: dict[str, float] = {}
    for done, name in enumerate(nodes, start=1):
        answer = run_model(_quantise_one(model, name, ranges), images).astype(np.float64)
        found[name] = float(((directions - _unit(answer - mean)) ** 2).sum(axis=1).mean() / 2)
        if progress:
            progress(done, len(nodes), "measuring each layer's sensitivity")
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _unit(rows: np.ndarray) -> np.ndarray:
    """The rows (N, D) scaled to length 1; rows of zeros stay."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    unit: np.ndarray = rows / np.where(lengths > 0, lengths, 1)
    return unit


def _quantise_one(model: onnx.ModelProto, name: str, ranges: Ranges) -> onnx.ModelProto:
    """A copy with Q/DQ (uint8) on one layer's input and its weights rounded to int8, per channel."""
    one = onnx.ModelProto()
    one.CopyFrom(model)
    graph = Graph(one)
    position, node = next(((i, n) for i, n in enumerate(graph.nodes) if n.name == name), (0, None))
    if node is None or node.input[0] not in ranges:
        raise ArtifactError(f"layer {name!r} is not in the graph, or has no measured input range: export again")
    weight = graph.constant(node.input[1])
    if weight is not None:
        rounded = numpy_helper.from_array(_round(weight, node), f"{name}_weight")
        one.graph.initializer.append(rounded)
        node.input[1] = rounded.name
    low, high = ranges[node.input[0]]
    if high > low:
        scale = (high - low) / 255
        zero = np.clip(round(-low / scale), 0, 255)
        constants: list[np.ndarray] = [np.array(scale, np.float32), np.array(zero, np.uint8)]
        names = [f"{name}_scale", f"{name}_zero"]
        one.graph.initializer.extend(numpy_helper.from_array(v, n) for v, n in zip(constants, names, strict=True))
        pair = [
            helper.make_node("QuantizeLinear", [node.input[0], *names], [f"{name}_q"], name=f"{name}_quantize"),
            helper.make_node("DequantizeLinear", [f"{name}_q", *names], [f"{name}_dq"], name=f"{name}_dequantize"),
        ]
        node.input[0] = f"{name}_dq"
        one.graph.node.insert(position, pair[1])
        one.graph.node.insert(position, pair[0])
    return one


def _round(weight: np.ndarray, node: onnx.NodeProto) -> np.ndarray:
    """Weights rounded to symmetric int8, with one scale per output channel."""
    axis = channel_axis(node, weight.ndim)
    others = tuple(i for i in range(weight.ndim) if i != axis)
    scale = np.maximum(np.abs(weight).max(axis=others, keepdims=True), 1e-12) / 127
    rounded: np.ndarray = (np.round(weight / scale) * scale).astype(np.float32)
    return rounded
