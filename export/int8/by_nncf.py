"""Post-training quantisation by NNCF, on an OpenVINO model or on ONNX."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from robx.errors import ArtifactError, MissingExtra, first_line
from robx.export.image_splits import whole_batches
from robx.export.int8.candidate import Candidate
from robx.export.int8.float_scope import kept_nodes, openvino_names
from robx.export.int8.ranges import Ranges
from robx.export.onnx_graph import input_batch
from robx.export.quiet import quiet
from robx.store.onnx_safety import check_model

_LEVELS = 256  # of 8 bits


def quantize_onnx(model: onnx.ModelProto, calibration: np.ndarray, candidate: Candidate) -> onnx.ModelProto:
    """A Q/DQ copy of a float32 ONNX model.

    Args:
        model: float32 ONNX, input ``pixels``.
        calibration: its inputs, (N, 3, H, W).
        candidate: ranges, bias correction, SmoothQuant, which nodes stay in float.

    Raises:
        MissingExtra: NNCF is not installed.
        ArtifactError: NNCF failed, or a node that should stay in float is not in the graph.
    """
    kept = [node.name for node in kept_nodes(model, candidate)]
    name = model.graph.input[0].name
    source = onnx.ModelProto()
    source.CopyFrom(model)
    items = [{name: batch} for batch in whole_batches(calibration, input_batch(model) or 1)]
    quantised: onnx.ModelProto = _quantize(source, items, candidate, kept)
    check_model(quantised, where=f"NNCF's output ({candidate.name})")
    return quantised


def quantize_openvino(network: Any, source: onnx.ModelProto, calibration: np.ndarray, candidate: Candidate) -> Any:
    """A quantised copy of an ``openvino.Model``; see `quantize_onnx`.

    Args:
        network: as OpenVINO converted it from `source`.
        source: float32 ONNX, whose node names the candidate uses.
        calibration: its inputs, (N, 3, H, W).
        candidate: as for `quantize_onnx`.

    Raises:
        MissingExtra, ArtifactError: as `quantize_onnx`.
    """
    kept = openvino_names(network, source, candidate)
    return _quantize(network.clone(), whole_batches(calibration, input_batch(source) or 1), candidate, kept)


def use_ranges(quantised: Any, ranges: Ranges) -> None:
    """Replace the ranges of activations in a quantised ``openvino.Model``, in place.

    Args:
        quantised: from `quantize_openvino`, with asymmetric activations.
        ranges: (low, high) by the names of the ONNX tensors, with a whole number of steps below 0; other activations
            keep theirs.
    """
    from openvino import opset13

    for op in quantised.get_ops():
        if op.get_type_name() != "FakeQuantize":
            continue
        known = sorted(op.input_value(0).get_names() & ranges.keys())
        if not known or op.get_attributes()["levels"] != _LEVELS:
            continue
        for place in range(1, 5):  # input low and high, output low and high
            value = ranges[known[0]][(place - 1) % 2]
            shape = op.input_value(place).get_shape()
            constant = opset13.constant(np.full(tuple(shape), value, np.float32))
            op.input(place).replace_source_output(constant.output(0))
    quantised.validate_nodes_and_infer_types()


def _quantize(model: Any, items: list[Any], candidate: Candidate, kept: list[str]) -> Any:
    try:
        with quiet():
            import nncf
    except Exception as error:  # not installed, or incompatible with an installed dependency
        raise MissingExtra("nncf", "openvino", purpose=f"the int8 candidate {candidate.name!r}", cause=error) from error
    try:
        with quiet():
            return nncf.quantize(
                model,
                nncf.Dataset(items),
                subset_size=len(items),
                preset=_preset(nncf, candidate),
                fast_bias_correction=not candidate.full_bias,
                model_type=nncf.ModelType.TRANSFORMER if candidate.transformer else None,
                ignored_scope=nncf.IgnoredScope(names=kept, validate=True),
                advanced_parameters=_advanced(nncf, candidate),
            )
    except Exception as error:
        raise ArtifactError(f"NNCF cannot quantise this model ({candidate.name}): {first_line(error)}") from error


def _preset(nncf: Any, candidate: Candidate) -> Any:
    """Symmetric or asymmetric activations; NNCF's default for transformers is asymmetric, which TensorRT refuses."""
    if candidate.signed:
        return nncf.QuantizationPreset.PERFORMANCE
    return nncf.QuantizationPreset.MIXED if candidate.asymmetric else None


def _advanced(nncf: Any, candidate: Candidate) -> Any:
    from nncf.quantization.advanced_parameters import AdvancedSmoothQuantParameters, OverflowFix
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet

    parameters = nncf.AdvancedQuantizationParameters(
        smooth_quant_alphas=AdvancedSmoothQuantParameters(
            convolution=-1, matmul=-1 if candidate.smooth_alpha is None else candidate.smooth_alpha
        )
    )
    # For all layers or none. NNCF's default, the first layer alone, guards CPUs whose sums saturate; on others it costs
    # that layer's weights a bit for nothing.
    parameters.overflow_fix = OverflowFix.ENABLE if candidate.reduce_range else OverflowFix.DISABLE
    parameters.disable_bias_correction = candidate.keep_bias
    if not candidate.mean_ranges:
        parameters.activations_range_estimator_params = RangeEstimatorParametersSet.MINMAX
    return parameters
