"""Post-training quantisation for LiteRT by ai-edge-quantizer, operator by operator.

Weights are symmetric int8 with one scale per output channel. Activations are asymmetric int8 per tensor ("static"),
float between layers and quantised by a layer at run time ("dynamic"), or float throughout ("float").
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from robx.activation_bounds import INTERESTING, Bounds
from robx.errors import ArtifactError, MissingExtra
from robx.export.int8.candidate import Candidate
from robx.export.int8.saturation import EVERYTHING, union

_WEIGHTED = ("CONV_2D", "DEPTHWISE_CONV_2D", "CONV_2D_TRANSPOSE", "FULLY_CONNECTED")
_FUNCTIONS = {"RELU": "relu", "RELU6": "relu6", "HARD_SWISH": "hardswish", "LOGISTIC": "sigmoid", "GELU": "gelu"}
_BITS = 8
Sides = dict[str, list[Any]]  # "min" and "max" of a tensor, and "mean min" and "mean max" over the batches


def quantize(
    content: bytes, measured: Mapping[str, Sides] | None, candidate: Candidate, *, kept: Collection[str] = ()
) -> bytes:
    """A float .tflite file as int8.

    Args:
        content: the float file.
        measured: what `measure` returned for it; None where the activations are not static.
        candidate: ranges (the extremes over all images, or the mean of each batch's extremes), the kind of activations,
            which operators, and how a weight's scale is chosen.
        kept: scopes of operators that stay in float, from `scope_of`.

    Raises:
        MissingExtra: ai-edge-quantizer is not installed.
        ArtifactError: a range rule that this quantiser does not have.
    """
    with _package():
        from ai_edge_quantizer import algorithm_manager, qtyping, quantizer

    if candidate.ranges != "minmax":
        raise ArtifactError(f"{candidate.name}: ai-edge-quantizer has no {candidate.ranges} ranges: choose minmax")
    engine, algorithms = quantizer.Quantizer(content), algorithm_manager.AlgorithmName
    everything = qtyping.TFLOperationName.ALL_SUPPORTED
    for operation, algorithm in _operations(candidate).items():
        _configure(engine, qtyping.TFLOperationName(operation), candidate, algorithms(algorithm))
    for scope in kept:
        engine.update_quantization_recipe(scope, everything, algorithm_key=algorithms.NO_QUANTIZE)
    ranges = _ranges(content, measured or {}, candidate) if candidate.activations == "static" else None
    return bytes(engine.quantize(ranges, enable_progress_report=False).quantized_model)


def measure(content: bytes, images: Sequence[np.ndarray], *, weighted_only: bool) -> dict[str, Sides]:
    """The extremes of each activation of a float .tflite file, over all images and on average.

    The quantiser's own rule is a moving average of the batches' extremes, which mostly sees the last 20 of them.

    Args:
        content: the float file.
        images: its inputs, float32 (B, 3, H, W), each of the file's batch.
        weighted_only: only the inputs and outputs of convolutions and linear layers.

    Raises:
        MissingExtra: ai-edge-quantizer is not installed.
    """
    with _package():
        from ai_edge_litert.interpreter import Interpreter
        from ai_edge_quantizer import calibrator, recipe_manager
        from ai_edge_quantizer.qtyping import TFLOperationName

    manager = recipe_manager.RecipeManager()
    for name in _WEIGHTED if weighted_only else ("*",):
        manager.add_static_config(".*", TFLOperationName(name), activation_num_bits=_BITS, weight_num_bits=_BITS)
    collector = calibrator.Calibrator(content, num_threads=1, qsv_update_func=_merge)
    signatures = Interpreter(model_content=content).get_signature_list()
    key, names = next((key, value["inputs"]) for key, value in signatures.items())
    collector.calibrate({key: [{names[0]: batch} for batch in images]}, manager)
    found: dict[str, Sides] = {}
    for name, stored in collector.get_model_qsvs().items():
        if "min" in stored:
            count = stored.get("batches", 1)
            sums = {side: stored.get(f"sum {side}", stored[side]) / count for side in ("min", "max")}
            found[name] = {side: np.asarray(stored[side]).tolist() for side in ("min", "max")}
            found[name] |= {f"mean {side}": np.asarray(value).tolist() for side, value in sums.items()}
    return found


def scope_of(network: nn.Module, name: str) -> str:
    """A regular expression for the operators that were converted from a module, which carry its types and names.

    Such as ``robx.export.formats.network.ExportModel/timm.models.resnet.ResNet_trunk/torch...Conv2d_conv1;``.
    """
    module, parts = network, [_type_of(network)]
    for part in name.split("."):
        module = module.get_submodule(part)
        parts.append(f"{_type_of(module)}_{part}")
    return f"{re.escape('/'.join(parts))};"


def _type_of(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _operations(candidate: Candidate) -> dict[str, str]:
    """The operators that are quantised, with how their weights' scales are chosen; later ones have precedence."""
    plain = "min_max_uniform_quantize"
    algorithm = "OCTAV" if candidate.clipped_weights else plain
    if candidate.activations == "dynamic":
        # XNNPACK has no kernel for a depthwise convolution that quantises its own input: LiteRT's is ten times slower.
        return dict.fromkeys((name for name in _WEIGHTED if name != "DEPTHWISE_CONV_2D"), algorithm)
    if candidate.weighted_only:
        return dict.fromkeys(_WEIGHTED, algorithm)
    return {"*": plain, **(dict.fromkeys(_WEIGHTED, algorithm) if candidate.clipped_weights else {})}


def _configure(engine: Any, operation: Any, candidate: Candidate, algorithm: Any) -> None:
    options = {"algorithm_key": algorithm}
    if candidate.activations == "static":
        engine.add_static_config(".*", operation, activation_num_bits=_BITS, weight_num_bits=_BITS, **options)
    elif candidate.activations == "dynamic":
        engine.add_dynamic_config(".*", operation, num_bits=_BITS, **options)
    else:
        engine.add_weight_only_config(".*", operation, num_bits=_BITS, **options)


def _merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The extremes so far, and the sums of the batches' extremes: an update function of ai-edge-quantizer."""
    if not old:
        return new
    return {
        "min": np.minimum(old["min"], new["min"]),
        "max": np.maximum(old["max"], new["max"]),
        "sum min": old.get("sum min", old["min"]) + new["min"],
        "sum max": old.get("sum max", old["max"]) + new["max"],
        "batches": old.get("batches", 1) + 1,
    }


def _ranges(content: bytes, measured: Mapping[str, Sides], candidate: Candidate) -> dict[str, dict[str, np.ndarray]]:
    """The range of each activation, as ai-edge-quantizer takes them."""
    prefix = "mean " if candidate.mean_ranges else ""
    ranges = {
        name: {side: np.array(sides[prefix + side], np.float32) for side in ("min", "max")}
        for name, sides in measured.items()
    }
    for name, (low, high) in _saturating(content).items():
        if name in ranges:
            ranges[name] = {side: np.clip(value, low, high) for side, value in ranges[name].items()}
    return ranges


@contextlib.contextmanager
def _package() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise MissingExtra("ai-edge-quantizer", "litert", purpose="quantising for LiteRT", cause=error) from error


def _saturating(content: bytes) -> dict[str, Bounds]:
    """The tensors that only activation functions read, and the values that matter to those."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    plain = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES  # a delegate would hide its operators
    interpreter = Interpreter(model_content=content, experimental_op_resolver_type=plain)
    readers: dict[int, list[dict[str, Any]]] = {}
    for operator in interpreter._get_ops_details():
        for tensor in operator["inputs"]:
            readers.setdefault(int(tensor), []).append(operator)
    names = {details["index"]: details["name"] for details in interpreter.get_tensor_details()}
    found = {names[tensor]: union(_bounds(tensor, readers)) for tensor in readers if tensor in names}
    return {name: bounds for name, bounds in found.items() if bounds != EVERYTHING}


def _bounds(tensor: int, readers: dict[int, list[dict[str, Any]]]) -> list[Bounds]:
    """For each operator that reads a tensor; x * sigmoid(x) counts as SiLU."""
    mine = readers[tensor]
    gates = {int(op["outputs"][0]) for op in mine if op["op_name"] == "LOGISTIC"}
    products = [op for op in mine if op["op_name"] == "MUL" and gates & {int(i) for i in op["inputs"]}]
    if products and len(mine) == 2 and readers[gates.pop()] == products:
        return [INTERESTING["silu"]]
    return [INTERESTING.get(_FUNCTIONS.get(op["op_name"], ""), EVERYTHING) for op in mine]
