"""Post-training quantisation for ExecuTorch: torchao's PT2E flow, for the operators that XNNPACK has int8 kernels for.

Weights are symmetric int8 with one scale per output channel, activations asymmetric int8 with one scale per tensor: the
form that XNNPACK executes. `kept` modules and, with ``weighted_only``, all but convolutions and linear layers stay in
float. "dynamic" activations stay in float between layers, and a linear layer or convolution quantises its own input at
run time; one that follows a padding of its own, as TensorFlow's "same" stems do, stays in float: XNNPACK cannot run it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from robx.activation_bounds import INTERESTING, Bounds
from robx.errors import ArtifactError
from robx.export.int8.candidate import Candidate
from robx.export.int8.saturation import EVERYTHING, union

_BATCH = 16
_EPS = 2.0**-12  # the smallest scale, as in ExecuTorch's own configuration


def quantize(model: nn.Module, images: Tensor, candidate: Candidate, *, kept: Collection[str] = ()) -> nn.Module:
    """The exported graph of a float model with Q/DQ pairs, calibrated, for any batch.

    Args:
        model: float32, in eval mode.
        images: its inputs, float32 (N, 3, H, W).
        candidate: ranges ("minmax", or "mse" for the least squared error), kind of activations, which operators.
        kept: names of modules that stay in float.

    Raises:
        ArtifactError: a range rule that this quantiser does not have.
    """
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    free = ({0: torch.export.Dim("N")},)
    graph = torch.export.export(model, (torch.zeros((2, *images.shape[1:])),), dynamic_shapes=free).module()
    prepared = prepare_pt2e(graph, _quantizer(candidate, kept))
    _saturate(prepared)
    # Without ranges to measure, one batch is enough: it shows the weights to their observers.
    seen = images if candidate.activations == "static" else images[:_BATCH]
    with torch.inference_mode():
        for batch in torch.split(seen, _BATCH):
            prepared(batch)
    quantised: nn.Module = convert_pt2e(prepared)
    return quantised


def _quantizer(candidate: Candidate, kept: Collection[str]) -> Any:
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )

    config = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=candidate.activations == "dynamic")
    if candidate.activations == "static":
        config = _with_ranges(config, candidate)
    quantizer = XNNPACKQuantizer()
    if candidate.weighted_only:
        aten = torch.ops.aten
        for operator in (aten.conv2d.default, aten.linear.default, aten.conv_transpose2d.input):
            quantizer.set_operator_type(operator, config)
    else:
        quantizer.set_global(config)
    dynamic = candidate.activations == "dynamic"
    return quantizer.set_filter_function(
        lambda node: not (_modules_of(node) & set(kept) or (dynamic and _follows_padding(node)))
    )


def _with_ranges(config: Any, candidate: Candidate) -> Any:
    from torchao.quantization.pt2e import HistogramObserver, MinMaxObserver

    observers = {"minmax": MinMaxObserver, "mse": HistogramObserver}
    if candidate.ranges not in observers:
        raise ArtifactError(f"{candidate.name}: PT2E has no {candidate.ranges} ranges: choose minmax or mse")
    observer = observers[candidate.ranges].with_args(eps=_EPS)
    spec = dataclasses.replace(config.input_activation, observer_or_fake_quant_ctr=observer)
    return dataclasses.replace(config, input_activation=spec, output_activation=spec)


def _modules_of(node: torch.fx.Node) -> set[str]:
    """Names of the modules that a node of an exported graph lies in."""
    stack: dict[str, tuple[str, Any]] = node.meta.get("nn_module_stack", {})
    return {path.removeprefix("L['self'].") for path, _ in stack.values()}


def _follows_padding(node: torch.fx.Node) -> bool:
    """Whether a node's input is padded by an operator of its own."""
    sources = [arg for arg in node.args[:1] if isinstance(arg, torch.fx.Node)]
    return any(
        source.target in (torch.ops.aten.pad.default, torch.ops.aten.constant_pad_nd.default) for source in sources
    )


def _saturate(prepared: nn.Module) -> None:
    """Limit what the observers in front of activation functions see to the inputs that matter, in place."""
    modules = dict(prepared.named_modules())
    for node in prepared.graph.nodes:  # type: ignore[union-attr]
        if node.op != "call_module" or not node.users:
            continue
        bounds = union(_bounds(user) for user in node.users)
        if bounds != EVERYTHING:
            modules[node.target].register_forward_pre_hook(_Clamp(*bounds))


def _bounds(node: torch.fx.Node) -> Bounds:
    """The inputs outside of which a node's output hardly changes."""
    packet = getattr(node.target, "_overloadpacket", None)
    name = str(packet).removeprefix("aten.").removesuffix("_")
    if name == "hardtanh":
        given = [*node.args[1:], *(node.kwargs[key] for key in ("min_val", "max_val") if key in node.kwargs)]
        low, high = given if len(given) == 2 else (-1.0, 1.0)
        return float(low), float(high)  # type: ignore[arg-type]
    return INTERESTING.get(name, EVERYTHING)


@dataclasses.dataclass(frozen=True)
class _Clamp:
    """A forward pre-hook that clamps a module's input."""

    low: float
    high: float

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0].clamp(self.low, self.high), *args[1:])
