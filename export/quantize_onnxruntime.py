"""Static Q/DQ quantisation by ONNX Runtime's quantiser, from ranges that robx measured itself."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from robx.errors import ArtifactError
from robx.export.candidate import Candidate
from robx.export.float_scope import kept_nodes
from robx.export.quiet import quiet
from robx.export.ranges import Ranges
from robx.onnx_safety import load_checked


def quantize(
    model: onnx.ModelProto,
    ranges: Ranges,
    candidate: Candidate,
    *,
    nodes: list[str] | None = None,
    op_types: list[str] | None = None,
    options: dict[str, Any] | None = None,
) -> onnx.ModelProto:
    """A Q/DQ copy of a float32 model: per-channel int8 weights, activations as the candidate says.

    Args:
        model: float32 ONNX.
        ranges: (low, high) of every activation.
        candidate: activation type, 7-bit weights, what stays in float.
        nodes: quantise these nodes only.
        op_types: quantise these operators only; None: all that the quantiser knows but ``candidate.float_ops``.
        options: more of the quantiser's own.

    Raises:
        ArtifactError: the quantiser failed, or a node that is to stay in float is not there.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    from onnxruntime.quantization import (
        CalibrationMethod,
        QuantType,
        TensorData,
        TensorsData,
        quantize_static,
        save_tensors_data,  # type: ignore[attr-defined, unused-ignore]
    )
    from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

    kept = [node.name for node in kept_nodes(model, candidate)]
    known = op_types or sorted({*QDQRegistry, *QLinearOpsRegistry})
    data = {
        name: TensorData(lowest=np.array(low, np.float32), highest=np.array(high, np.float32))
        for name, (low, high) in ranges.items()
    }
    with tempfile.TemporaryDirectory(prefix="robx-") as folder, quiet():
        source, cache, target = (Path(folder) / name for name in ("float.onnx", "ranges.json", "int8.onnx"))
        source.write_bytes(model.SerializeToString())
        save_tensors_data(TensorsData(CalibrationMethod.MinMax, data), cache, smooth_quant=False)
        try:
            quantize_static(
                source,
                target,
                None,
                op_types_to_quantize=[op for op in known if op not in candidate.float_ops],
                per_channel=True,
                reduce_range=candidate.reduce_range,
                activation_type=QuantType.QInt8 if candidate.signed else QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                nodes_to_quantize=nodes,
                nodes_to_exclude=kept,
                calibration_cache_path=cache,
                extra_options={"ActivationSymmetric": candidate.signed, "WeightSymmetric": True, **(options or {})},
            )
        except Exception as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ArtifactError(f"ONNX Runtime cannot quantise this model ({candidate.name}): {first}") from error
        return load_checked(target)
