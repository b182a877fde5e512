"""Explicit Q/DQ in ONNX for TensorRT: what it would refuse or misread, and the conversion from uint8 to its int8 form.

TensorRT supports only symmetric int8. Its parser turns a uint8 QuantizeLinear with zero point 0 into int8 with no more
than a warning, which halves every range: EfficientNet-Lite0's embeddings drop to a cosine of .24 without an error.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from robx.errors import InputError
from robx.export.onnx_graph import WEIGHTED, Graph, channel_axis
from robx.store.onnx_safety import load_checked

FLOAT_ONLY = ("LayerNormalization", "Softmax", "Gelu", "Erf")
_NAMES = {onnx.TensorProto.INT8: "int8", onnx.TensorProto.UINT8: "uint8", onnx.TensorProto.INT32: "int32"}


@dataclass(frozen=True)
class Linear:
    """One QuantizeLinear or DequantizeLinear with its constants."""

    node: onnx.NodeProto
    scale: np.ndarray | None  # None: computed at run time
    zero: np.ndarray | None
    dtype: str  # of the quantised side: int8, uint8, int32, ...


def linears(graph: Graph) -> Iterator[Linear]:
    """Every QuantizeLinear and DequantizeLinear of the main graph."""
    for node in graph.nodes:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        zero = graph.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else None
        yield Linear(node, graph.constant(node.input[1]), zero, _dtype_of(graph, node, zero))


def trt_faults(model: onnx.ModelProto) -> list[str]:
    """What TensorRT would refuse or silently misread in a Q/DQ model; [] if nothing."""
    graph, faults = Graph(model), []
    pairs = list(linears(graph))
    if not pairs:
        return ["the model has no QuantizeLinear or DequantizeLinear: it is not int8"]
    for pair in pairs:
        name = pair.node.name or pair.node.output[0]
        if pair.dtype != "int8":
            why = "biases stay in float" if pair.dtype == "int32" else "it would be read as int8, with only a warning"
            faults.append(f"{name} is {pair.dtype}, and TensorRT takes only int8 ({why})")
        if pair.zero is not None and np.any(pair.zero):
            faults.append(f"{name} has a non-zero zero point, and TensorRT takes only symmetric int8")
        if pair.scale is None:
            faults.append(f"{name} has a scale that is computed at run time")
        elif not np.all(pair.scale > 0) or not np.all(np.isfinite(pair.scale)):
            faults.append(f"{name} has a scale that is not positive and finite")
    return faults + _placement_faults(graph)


def trt_advice(model: onnx.ModelProto) -> list[str]:
    """What is correct but slow in TensorRT: residual additions with only one side quantised."""
    graph, advice = Graph(model), []
    for node in graph.nodes:
        if node.op_type == "Add" and not any(graph.is_weight(name) for name in node.input):
            sides = [graph.dequantized(name) is not None for name in node.input]
            if sum(sides) == 1:
                advice.append(f"{node.name}: one side of this addition is quantised, so it is not fused")
    return advice


def check_trt_qdq(model: onnx.ModelProto | Path) -> None:
    """Refuse a Q/DQ model that TensorRT would refuse or misread.

    The rules: int8 with zero point 0 everywhere, constant positive scales, no int32 biases, per-channel weights, and
    LayerNorm, Softmax and GELU in float.

    Raises:
        InputError: names the first of `trt_faults` and counts the others.
    """
    where = str(model) if isinstance(model, Path) else "the model"
    faults = trt_faults(load_checked(model) if isinstance(model, Path) else model)
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise InputError(
            f"{where} is not in TensorRT's Q/DQ form: {faults[0]}{more}; export it with --format trt --int8"
        )


def rescale_to_int8(model: onnx.ModelProto) -> None:
    """Turn every uint8 Q/DQ into symmetric int8 of the same or a wider range, in place.

    A uint8 range [lo, hi] becomes [-m, m] with m = max(|lo|, |hi|) and scale m / 127: no further value saturates, and
    the step of a one-sided range doubles. uint8 with zero point 0 also acts as a ReLU, which quantisers then remove: it
    is inserted again. int32 biases become float.

    Raises:
        InputError: a uint8 weight, or a scale or zero point that is not constant.
    """
    graph = Graph(model)
    for pair in list(linears(graph)):
        if pair.dtype != "uint8":
            continue
        if pair.scale is None or graph.is_weight(pair.node.input[0]):
            raise InputError(f"{pair.node.name} is uint8 and cannot be rescaled: use symmetric int8 weights")
        zero = np.zeros_like(pair.scale, dtype=np.float64) if pair.zero is None else pair.zero.astype(np.float64)
        reach = np.maximum(zero, 255 - zero) * pair.scale
        if pair.node.op_type == "QuantizeLinear" and not zero.any():
            _clamp_below(graph, pair.node)
        scale, point = _fresh(graph, reach / 127, pair.scale.dtype), _fresh(graph, np.zeros(pair.scale.shape), np.int8)
        del pair.node.input[1:]
        pair.node.input.extend([scale, point])
    _float_biases(graph)
    _drop_unused(model)
    del model.graph.value_info[:]  # stale: it still says uint8


def _clamp_below(graph: Graph, node: onnx.NodeProto) -> None:
    """Insert a ReLU before a QuantizeLinear, unless its input is non-negative already."""
    producer = graph.producers.get(node.input[0])
    if producer is not None and producer.op_type in ("Relu", "Sigmoid", "HardSigmoid", "Softmax"):
        return
    name = f"{node.output[0]}_relu"
    relu = onnx.helper.make_node("Relu", [node.input[0]], [name], name=name)
    graph.model.graph.node.insert(list(graph.model.graph.node).index(node), relu)
    node.input[0] = name


def _placement_faults(graph: Graph) -> list[str]:
    faults = []
    for node in graph.nodes:
        if node.op_type in FLOAT_ONLY and any(graph.dequantized(name) is not None for name in node.input):
            faults.append(f"{node.name} ({node.op_type}) is quantised, but LayerNorm, Softmax and GELU stay in float")
        if node.op_type in WEIGHTED and len(node.input) > 1 and graph.is_weight(node.input[1]):
            weight = graph.dequantized(node.input[1])
            scale = graph.constant(weight.input[1]) if weight is not None else None
            axes, channels = _output_channels(graph, node)
            if weight is None or scale is None or channels == 1:
                continue
            if scale.size == 1:
                faults.append(f"{node.name} ({node.op_type}) has one scale for all channels: weights are per channel")
            elif next((a.i for a in weight.attribute if a.name == "axis"), 1) not in axes:
                faults.append(f"{node.name} ({node.op_type}) has its scales along another axis than its channels")
    return faults


def _output_channels(graph: Graph, node: onnx.NodeProto) -> tuple[tuple[int, int], int]:
    """The output channels' axis in the weight, counted from both ends, and their number; 1 where it is unknown."""
    name = node.input[1]
    while (producer := graph.producers.get(name)) is not None and producer.op_type != "Constant":
        name = producer.input[0]
    value = graph.constant(name)
    if value is None:
        return (0, 0), 1
    axis = channel_axis(node, value.ndim)
    return (axis, axis - value.ndim), int(value.shape[axis])


def _dtype_of(graph: Graph, node: onnx.NodeProto, zero: np.ndarray | None) -> str:
    if zero is not None:
        return str(zero.dtype)
    for attribute in node.attribute:
        if attribute.name == "output_dtype" and attribute.i and node.op_type == "QuantizeLinear":
            return _NAMES.get(attribute.i, f"type {attribute.i}")
    if node.op_type == "QuantizeLinear":
        return "uint8"  # the operator's default
    value = graph.constant(node.input[0])
    if value is not None:
        return str(value.dtype)
    producer = graph.producers.get(node.input[0])
    if producer is None or producer.op_type != "QuantizeLinear":
        return "unknown"
    point = graph.constant(producer.input[2]) if len(producer.input) > 2 else None
    return _dtype_of(graph, producer, point)


def _float_biases(graph: Graph) -> None:
    for pair in list(linears(graph)):
        if pair.dtype != "int32" or pair.node.op_type != "DequantizeLinear":
            continue
        value = graph.constant(pair.node.input[0])
        if value is None or pair.scale is None:
            raise InputError(f"{pair.node.name} is int32 and not a constant bias, so it cannot become float")
        name = _fresh(graph, value.astype(np.float64) * pair.scale, pair.scale.dtype)
        for consumer in graph.consumers.get(pair.node.output[0], []):
            for position, current in enumerate(consumer.input):
                if current == pair.node.output[0]:
                    consumer.input[position] = name
        graph.model.graph.node.remove(pair.node)


def _fresh(graph: Graph, value: np.ndarray, dtype: np.dtype | type) -> str:
    name = next(name for i in itertools.count() if (name := f"robx_{i}") not in graph.initializers)
    tensor = numpy_helper.from_array(np.asarray(value).astype(dtype), name)
    graph.model.graph.initializer.append(tensor)
    graph.initializers[name] = tensor
    return name


def _drop_unused(model: onnx.ModelProto) -> None:
    used = {name for node in model.graph.node for name in node.input} | {o.name for o in model.graph.output}
    keep = [i for i in model.graph.initializer if i.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(keep)
