"""The Q/DQ form that TensorRT reads: symmetric int8, float biases, weights per channel, additions on both sides.

Inputs of convolutions and matrix products are quantised and their outputs are not, so that each Q fuses into the kernel
before it; LayerNorm, Softmax and GELU stay in float (NVIDIA's rules for explicit quantisation).
"""

from __future__ import annotations

import dataclasses

import onnx

from robx.export.int8.by_onnxruntime import quantize as quantize_static
from robx.export.int8.candidate import Candidate
from robx.export.int8.ranges import Ranges
from robx.export.int8.tensorrt_qdq import FLOAT_ONLY, check_trt_qdq, rescale_to_int8
from robx.export.onnx_graph import Graph

_OPERATORS = ["Conv", "ConvTranspose", "Gemm", "MatMul", "Add"]


def quantize(model: onnx.ModelProto, ranges: Ranges, candidate: Candidate) -> onnx.ModelProto:
    """A Q/DQ copy of a float32 model in TensorRT's form, checked.

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
    """A copy of another quantiser's Q/DQ model in TensorRT's form: uint8 rescaled, biases back to float, checked.

    Raises:
        InputError: what cannot be rescaled without loss of meaning.
    """
    signed = onnx.ModelProto()
    signed.CopyFrom(model)
    rescale_to_int8(signed)
    check_trt_qdq(signed)
    return signed


def _bias_additions(model: onnx.ModelProto) -> list[str]:
    """Additions of a constant: a bias behind a MatMul, a position embedding. TensorRT keeps them in float."""
    constants = {i.name for i in model.graph.initializer}
    return [n.name for n in model.graph.node if n.op_type == "Add" and any(name in constants for name in n.input)]


def _keep_float(model: onnx.ModelProto) -> None:
    """Let LayerNorm, Softmax and GELU read the float tensor: the quantiser hands every reader of a tensor the Q/DQ
    that one of them asked for, such as the addition that shares a ViT's residual with its LayerNorm; in place.
    """
    graph = Graph(model)
    for node in graph.nodes:
        for position, name in enumerate(node.input):
            pair = graph.dequantized(name) if node.op_type in FLOAT_ONLY else None
            source = graph.producers.get(pair.input[0]) if pair is not None else None
            if source is not None and source.op_type == "QuantizeLinear":
                node.input[position] = source.input[0]
    for kind in ("DequantizeLinear", "QuantizeLinear"):  # pairs that nobody reads any more
        read = {name for node in model.graph.node for name in node.input} | {o.name for o in model.graph.output}
        for node in [n for n in model.graph.node if n.op_type == kind and n.output[0] not in read]:
            model.graph.node.remove(node)
