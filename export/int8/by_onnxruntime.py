"""Static Q/DQ quantisation by ONNX Runtime's quantiser, with activation ranges that robx measured."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from robx.errors import ArtifactError, first_line
from robx.export.int8.candidate import Candidate
from robx.export.int8.float_scope import kept_nodes
from robx.export.int8.ranges import Ranges
from robx.export.onnx_graph import Graph
from robx.export.quiet import quiet
from robx.store.onnx_safety import check_model


def quantize(
    model: onnx.ModelProto,
    ranges: Ranges,
    candidate: Candidate,
    *,
    op_types: list[str] | None = None,
    options: dict[str, Any] | None = None,
) -> onnx.ModelProto:
    """A Q/DQ copy of a float32 model with per-channel int8 weights.

    Args:
        model: float32 ONNX.
        ranges: (low, high) of every activation.
        candidate: the activations' type, 7-bit weights, which nodes stay in float.
        op_types: the operators to quantise; None: all that the quantiser supports.
        options: further options of the quantiser (``extra_options``).

    Raises:
        ArtifactError: the quantiser failed, or a node that should stay in float is not in the graph.
    """
    from onnxruntime.quantization import CalibrationMethod, QDQQuantizer, QuantType
    from onnxruntime.quantization.calibrate import TensorData, TensorsData
    from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

    kept = [node.name for node in kept_nodes(model, candidate)]
    known = op_types or sorted({*QDQRegistry, *QLinearOpsRegistry})
    data = {
        name: TensorData(lowest=np.array(low, np.float32), highest=np.array(high, np.float32))
        for name, (low, high) in ranges.items()
    }
    # What quantize_static does in the end, after measuring ranges of its own.
    try:
        with quiet():
            known_shapes = onnx.shape_inference.infer_shapes(model)
            quantiser = QDQQuantizer(
                known_shapes if op_types else _with_pooling(known_shapes),
                per_channel=True,
                reduce_range=candidate.reduce_range,
                weight_qType=QuantType.QInt8,
                activation_qType=QuantType.QInt8 if candidate.signed else QuantType.QUInt8,
                tensors_range=TensorsData(CalibrationMethod.MinMax, data),
                nodes_to_quantize=[],
                nodes_to_exclude=kept,
                op_types_to_quantize=known,
                extra_options={"ActivationSymmetric": candidate.signed, "WeightSymmetric": True, **(options or {})},
            )
            quantiser.quantize_model()
            quantiser.model.topological_sort()
    except Exception as error:
        raise ArtifactError(
            f"ONNX Runtime cannot quantise this model ({candidate.name}): {first_line(error)}"
        ) from error
    quantised: onnx.ModelProto = quantiser.model.model
    check_model(quantised, where=f"ONNX Runtime's output ({candidate.name})")
    return quantised


def _with_pooling(model: onnx.ModelProto) -> onnx.ModelProto:
    """Replace means over all positions, as in squeeze-and-excitation, by GlobalAveragePool, in place; returns `model`.

    ONNX Runtime computes ReduceMean in float32, in an order that depends on the batch. A value between two levels of
    int8 may then be rounded up in a batch and down alone, which changed an EfficientNet-B0's embedding to a cosine of
    .92. GlobalAveragePool has an int8 kernel, which gives the same in every batch and is faster.
    """
    graph = Graph(model)
    ranks = {v.name: len(v.type.tensor_type.shape.dim) for v in (*model.graph.value_info, *model.graph.input)}
    for node in graph.nodes:
        if node.op_type != "ReduceMean" or len(node.input) != 2 or ranks.get(node.input[0]) != 4:
            continue
        axes = graph.constant(node.input[1])
        keeps = all(attribute.i for attribute in node.attribute if attribute.name == "keepdims")
        if keeps and axes is not None and sorted(axes.reshape(-1) % 4) == [2, 3]:
            node.op_type = "GlobalAveragePool"
            del node.input[1:], node.attribute[:]
    return model
