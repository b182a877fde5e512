"""A network's forward pass with int8 simulated in it, for training weights that tolerate int8.

Every convolution and linear layer computes with weights rounded to int8 per output channel (symmetric) and an input
rounded to 8 bits per tensor (with a zero point). Its output is rounded too where a sum, a product, a pooling or a
smooth activation function reads it, after BatchNorm; and so is what the smooth function gives, where no layer reads it.
The rounding's gradient is the straight-through estimator (Jacob et al. 2018, arXiv:1712.05877): 1 inside the range and
0 where a value is clipped.

Ranges follow the extremes of the activations, or start at quantiles and are trained (LSQ+, Bhalgat et al. 2020,
arXiv:2004.09576). Extremes leave weights for which any format's min-max calibration is right. They are of no use to an
EfficientNet-B0 at 64 px: the simulated error is .27 with extremes, .17 without a ten-thousandth of the values, and .11
where the inputs of its SiLUs are also cut off at -8, as an export cuts them off.

On a ResNet-10t, the squared error that is simulated is then that of ONNX Runtime and of OpenVINO, .0034 of the
embeddings' variance, and .0027 without the outputs. 60 steps of training with both lowered ONNX Runtime's from .0035 to
.0025, and with the inputs alone to .0033.

Weights that are trained so also suit runtimes without zero points (TensorRT, ARM): 60 steps on EfficientNet-Lite0 at 64
px raised the centred cosine of plain min-max int8 from .977 to .993 with zero points and from .976 to .990 without
them. Training without zero points gave less in both: .991 and .989.

The rounding and its gradients are PyTorch's own FakeQuantize and _LearnableFakeQuantize. NNCF and torchao also simulate
int8, but each is installed with some export formats only, and both rewrite the network; here it stays as timm builds
it, and training it in place leaves a plain network for any exporter.

BatchNorm must be in eval mode, as running statistics are what ships. It is not folded, because with one scale for each
output channel that makes no difference: folding multiplies a channel's weights and their scale by the same number.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.ao.quantization._learnable_fake_quantize import _LearnableFakeQuantize
from torch.ao.quantization.fake_quantize import FakeQuantize
from torch.ao.quantization.observer import MovingAverageMinMaxObserver, MovingAveragePerChannelMinMaxObserver
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from robx.activation_bounds import INTERESTING

RANGE_MOMENTUM = 0.01  # weight of a batch in the moving average of an activation's range
_SAMPLE = 200_000  # values of one activation that the quantiles are taken from


Place = Literal["input", "output", "function"]


class LayerRange(NamedTuple):
    """The range of an activation: of a layer's input, its output, or what a smooth function makes of its output."""

    layer: str
    place: Place
    low: float
    high: float


class Int8Simulation(nn.Module):
    """Runs `network` with int8 simulated in its convolutions and linear layers.

    The network itself is not changed: its parameters are the float weights that an optimiser trains, and
    ``simulation.network`` without the simulation is the result.
    """

    def __init__(self, network: nn.Module, *, skip: tuple[str, ...] = (), outputs: bool = True) -> None:
        """Prepare the simulation; call `set_ranges` before the first forward pass.

        Args:
            network: in eval mode, apart from what may be trained with the simulation.
            skip: prefixes of the names of modules that stay in float, such as a projection head.
            outputs: also round what a layer gives to a sum, a product, a pooling, or a smooth activation function.
        """
        super().__init__()
        self.network = network
        names = [name for name, module in network.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
        self.layers = tuple(name for name in names if not name.startswith(skip)) if skip else tuple(names)
        self.weight_rounding = nn.ModuleList(_weight_rounding() for _ in self.layers)
        self.input_rounding = nn.ModuleList(Rounding() for _ in self.layers)
        self.output_rounding = nn.ModuleList(Rounding() for _ in self.layers if outputs)
        self.function_rounding = nn.ModuleList(Rounding() for _ in self.layers if outputs)
        with torch.no_grad():  # the buffers of the weights' scales take their sizes
            self._rounded_weights()

    def forward(self, *inputs: Any) -> Any:
        """The network's answer to `inputs`, with int8 simulated."""
        with self._rounded_activations():
            return functional_call(self.network, self._rounded_weights(), inputs)

    @torch.no_grad()
    def set_ranges(self, batches: Iterable[Tensor], *, clipped: float = 0.0) -> None:
        """Set each activation's range to that of the float network, averaged over `batches` (n, 3, H, W).

        Ranges that were learnt follow the activations again.

        Args:
            batches: images.
            clipped: share of a batch's values outside of the range, half of it at each end; 0: the extremes.
        """
        roundings = self._activation_roundings
        for rounding in roundings:
            rounding.activation_post_process.clipped = clipped
            rounding.toggle_fake_quant(False)
            rounding.toggle_qparam_learning(False)
            rounding.toggle_observer_update(True)
        for count, batch in enumerate(batches, start=1):
            for rounding in roundings:  # the plain mean over the batches
                rounding.activation_post_process.averaging_constant = 1 / count
            with self._rounded_activations():
                self.network(batch)
        for rounding in roundings:
            rounding.activation_post_process.averaging_constant = RANGE_MOMENTUM
            rounding.toggle_fake_quant(True)

    def learn_ranges(self) -> list[Rounding]:
        """Let an optimiser train the ranges that `set_ranges` found, instead of letting them follow the activations.

        Returns:
            The roundings in use; the parameters of each are its `scale` and `zero_point`.
        """
        used = [each for each in self._activation_roundings if each.has_range]
        for rounding in used:
            rounding.enable_param_learning()
        return used

    def hold_ranges(self, hold: bool = True) -> None:
        """Keep ranges that follow the activations as they are, for an evaluation, or let them follow again."""
        for rounding in self._activation_roundings:
            if not rounding.scale.requires_grad:
                rounding.toggle_observer_update(not hold)

    def trained_ranges(self) -> list[LayerRange]:
        """The activation ranges in use."""
        kinds: tuple[tuple[Place, nn.ModuleList], ...] = (
            ("input", self.input_rounding), ("output", self.output_rounding), ("function", self.function_rounding)
        )  # fmt: skip
        return [
            LayerRange(layer, place, *rounding.ends())
            for place, roundings in kinds
            for layer, rounding in zip(self.layers, roundings, strict=False)  # there may be none of a kind
            if isinstance(rounding, Rounding) and rounding.has_range
        ]

    def ranges(self) -> dict[str, Tensor]:
        """The state besides the network's own: the activation ranges, for a checkpoint."""
        return {key: value for key, value in self.state_dict().items() if not key.startswith("network.")}

    def load_ranges(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `ranges` gave."""
        own = {key: value for key, value in self.state_dict().items() if key.startswith("network.")}
        self.load_state_dict({**own, **state})

    @property
    def _activation_roundings(self) -> list[Rounding]:
        every = (*self.input_rounding, *self.output_rounding, *self.function_rounding)
        return [rounding for rounding in every if isinstance(rounding, Rounding)]

    def _rounded_weights(self) -> dict[str, Tensor]:
        """The rounded weights by the names of the parameters that they replace."""
        return {
            f"{name}.weight": rounding(self.network.get_submodule(name).weight)
            for name, rounding in zip(self.layers, self.weight_rounding, strict=True)
        }

    @contextlib.contextmanager
    def _rounded_activations(self) -> Iterator[None]:
        """Round every layer's first input, and its output where it does not end in the next layer, in the block."""
        handles = []
        for place, name in enumerate(self.layers):
            layer = self.network.get_submodule(name)
            handles.append(layer.register_forward_pre_hook(partial(_round_input, self.input_rounding[place])))
            if self.output_rounding:
                handles.append(layer.register_forward_hook(partial(_mark_output, place)))
        try:
            with self._rounded_outputs():
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _rounded_outputs(self) -> contextlib.AbstractContextManager[Any]:
        if not self.output_rounding:
            return contextlib.nullcontext()
        return _RoundOutputs(self.output_rounding, self.function_rounding)


class _RoundOutputs(TorchFunctionMode):
    """Rounds a layer's output when a function reads it that does not become part of the layer in an int8 runtime.

    BatchNorm and ReLU do. After a ReLU, the next layer's input is rounded, and rounding twice would gain nothing.
    What a smooth function makes of a layer's output is rounded too where a function other than a layer reads it, as
    in squeeze-and-excitation.
    """

    def __init__(self, outputs: nn.ModuleList, functions: nn.ModuleList) -> None:
        super().__init__()
        self.outputs, self.functions = outputs, functions

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "").strip("_")
        place = getattr(args[0], _PLACE, None) if args else None
        if name in _ROUNDED_FOR:
            args = tuple(self._rounded(each, name) if isinstance(each, Tensor) else each for each in args)
        result = func(*args, **(kwargs or {}))
        if name == "batch_norm" and place is not None:
            setattr(result, _PLACE, place)
        elif name in _SMOOTH and place is not None:
            setattr(result, _PLACE, _Place(place.layer, of_function=True))
        elif name in _FUSED and hasattr(result, _PLACE):  # in place, it returns what it was given
            delattr(result, _PLACE)
        return result

    def _rounded(self, value: Tensor, function: str) -> Tensor:
        place = getattr(value, _PLACE, None)
        if place is None:
            return value
        if function in INTERESTING:  # what an exported model's range leaves out
            value = value.clamp(*INTERESTING[function])
        rounded: Tensor = (self.functions if place.of_function else self.outputs)[place.layer](value)
        return rounded


class _Place(NamedTuple):
    """Where a tensor comes from."""

    layer: int  # its number
    of_function: bool = False  # a smooth function of the layer's output, rather than the output itself


_PLACE = "_robx_place"  # attribute of a layer's output, and of what a smooth function makes of it
# Names of functions without their underscores, which mark operators and in-place forms.
_FUSED = frozenset({"relu", "relu6", "hardtanh", "clamp"})
_SMOOTH = frozenset({"gelu", "silu", "hardswish", "sigmoid", "hardsigmoid"})
_ROUNDED_FOR = _SMOOTH | {"add", "radd", "iadd", "mul", "rmul", "imul", "cat", "mean", "adaptive_avg_pool2d"}


def _round_input(rounding: nn.Module, _: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (rounding(inputs[0]), *inputs[1:])


def _mark_output(place: int, _: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
    setattr(output, _PLACE, _Place(place))


def _weight_rounding() -> FakeQuantize:
    """int8 in [-127, 127] with one scale per output channel, from the weights of this step."""
    return FakeQuantize(  # type: ignore[no-untyped-call]
        observer=MovingAveragePerChannelMinMaxObserver,
        averaging_constant=1.0,
        quant_min=-127,
        quant_max=127,
        dtype=torch.qint8,
        qscheme=torch.per_channel_symmetric,
        ch_axis=0,
    )


class Rounding(_LearnableFakeQuantize):
    """Rounds to 8 bits with one scale and zero point for a tensor, which follow the activations or are learnt.

    The gradients of both are those of LSQ+ (Bhalgat et al. 2020, arXiv:2004.09576) without its factor, which puts many
    gradients below Adam's epsilon.
    """

    def __init__(self) -> None:
        super().__init__(  # type: ignore[no-untyped-call]
            observer=_QuantileObserver,
            averaging_constant=RANGE_MOMENTUM,
            quant_min=0,
            quant_max=255,
            dtype=torch.quint8,
            qscheme=torch.per_tensor_affine,
        )
        self.toggle_qparam_learning(False)

    @property
    def has_range(self) -> bool:
        """Whether a value was seen; a layer's output that the next layer alone reads is rounded as its input."""
        return bool(self.activation_post_process.max_val.isfinite().all())

    def ends(self) -> tuple[float, float]:
        """The least and the greatest value that are not clipped."""
        scale, zero = (float(value) for value in self.calculate_qparams())
        return (self.quant_min - zero) * scale, (self.quant_max - zero) * scale


class _QuantileObserver(MovingAverageMinMaxObserver):
    """The moving average of the quantiles that leave out a share of a batch's values; 0: of the extremes."""

    clipped = 0.0

    def forward(self, x_orig: Tensor) -> Tensor:
        """`x_orig`, unchanged."""
        if not self.clipped:
            return super().forward(x_orig)  # type: ignore[no-any-return, no-untyped-call]
        flat = x_orig.detach().float().flatten()
        step = max(1, len(flat) // _SAMPLE)
        while math.gcd(step, len(flat)) > 1:  # so that the sample has values of every channel
            step += 1
        sample = flat[::step]
        beyond = max(1, round(len(sample) * self.clipped / 2))
        ends = -torch.topk(-sample, beyond).values[-1], torch.topk(sample, beyond).values[-1]
        super().forward(torch.stack(ends))  # type: ignore[no-untyped-call]
        return x_orig
