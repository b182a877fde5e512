"""Q/DQ models in the form that TensorRT reads: symmetric int8, float biases, per-channel weights.

The inputs of convolutions, matrix products and residual additions are quantised and their outputs are not, so that each
Q fuses into the kernel before it; LayerNorm, Softmax and GELU stay in float (NVIDIA's rules for explicit quantisation).
"""

from __future__ import annotations

import dataclasses

import onnx

from robx.export.int8.by_onnxruntime import quantize as quantize_static
from robx.export.int8.candidate import Candidate
from robx.export.int8.ranges import Ranges
from robx.export.int8.tensorrt_qdq import FLOAT_ONLY, check_trt_qdq, rescale_to_int8
from robx.export.onnx_graph import WEIGHTED, Graph

_OPERATORS = [*WEIGHTED, "Add"]


def quantize(model: onnx.ModelProto, ranges: Ranges, candidate: Candidate) -> onnx.ModelProto:
    """A Q/DQ copy of a float32 ONNX model in TensorRT's form, checked.

    Args:
        model: float32 ONNX.
        ranges: (low, high) of every activation.
        candidate: which nodes stay in float.

    Raises:
        ArtifactError: the quantiser failed.
        InputError: the result is not in TensorRT's form.
    """
    candidate = dataclasses.replace(candidate, signed=True, reduce_range=False)
    quantised = quantize_static(
        model,
        ranges,
        dataclasses.replace(candidate, float_nodes=(*candidate.float_nodes, *_bias_additions(model))),
        op_types=_OPERATORS,
        options={
            "QuantizeBias": False,
            "DedicatedQDQPair": True,
            "OpTypesToExcludeOutputQuantization": _OPERATORS,
        },
    )
    _keep_float(quantised)
    check_trt_qdq(quantised)
    return quantised


def from_uint8(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of another quantiser's Q/DQ model in TensorRT's form: uint8 rescaled to int8, biases in float, checked.

    Raises:
        InputError: something cannot be rescaled.
    """
    signed = onnx.ModelProto()
    signed.CopyFrom(model)
    rescale_to_int8(signed)
    check_trt_qdq(signed)
    return signed


def _bias_additions(model: onnx.ModelProto) -> list[str]:
    """Additions of a constant, which TensorRT keeps in float: a bias after a MatMul, a position embedding."""
    constants = {i.name for i in model.graph.initializer}
    return [n.name for n in model.graph.node if n.op_type == "Add" and any(name in constants for name in n.input)]


def _keep_float(model: onnx.ModelProto) -> None:
    """Let LayerNorm, Softmax and GELU read the float tensor, in place.

    The quantiser inserts the Q/DQ that one consumer of a tensor needs before all of them: in a ViT, a LayerNorm shares
    its input with a residual addition.
    """
    graph = Graph(model)
    for node in graph.nodes:
        for position, name in enumerate(node.input):
            pair = graph.dequantized(name) if node.op_type in FLOAT_ONLY else None
            source = graph.producers.get(pair.input[0]) if pair is not None else None
            if source is not None and source.op_type == "QuantizeLinear":
                node.input[position] = source.input[0]
    for kind in ("DequantizeLinear", "QuantizeLinear"):  # pairs without a consumer
        read = {name for node in model.graph.node for name in node.input} | {o.name for o in model.graph.output}
        for node in [n for n in model.graph.node if n.op_type == kind and n.output[0] not in read]:
            model.graph.node.remove(node)
