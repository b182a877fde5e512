"""The Q/DQ form that TensorRT reads: symmetric int8, float biases, per-channel weights, additions quantised on both sides.

Inputs of convolutions and matrix products are quantised and their outputs are not, so that each Q fuses into the kernel
before it; LayerNorm, Softmax and GELU stay in float (NVIDIA's rules for explicit quantisation).
"""

from __future__ import annotations

import dataclasses

import onnx

from robx.export.candidate import Candidate
from robx.export.qdq import check_trt_qdq, rescale_to_int8
from robx.export.quantize_onnxruntime import quantize as quantize_static
from robx.export.ranges import Ranges

_OPERATORS = ["Conv", "ConvTranspose", "Gemm", "MatMul", "Add"]


def quantize(model: onnx.ModelProto, ranges: Ranges, candidate: Candidate) -> onnx.ModelProto:
    """A Q/DQ copy of a float32 model in TensorRT's form, checked.

    Raises:
        ArtifactError: the quantiser failed.
        InputError: the result is not in TensorRT's form.
    """
    operators = [op for op in _OPERATORS if op not in candidate.float_ops]
    candidate = dataclasses.replace(candidate, signed=True, reduce_range=False)
    quantised = quantize_static(
        model,
        ranges,
        dataclasses.replace(candidate, float_nodes=(*candidate.float_nodes, *_bias_additions(model))),
        op_types=operators,
        options={
            "QuantizeBias": False,
            "DedicatedQDQPair": True,
            "OpTypesToExcludeOutputQuantization": operators,
        },
    )
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
