"""Simulated int8 against integers computed in numpy, against ONNX Runtime's own rounding, and against folding."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from robx.int8_simulation import Int8Simulation
from robx.trunk import build_trunk

PIXELS = torch.randn((4, 3, 16, 16), generator=torch.Generator().manual_seed(1))


def _simulated(network: nn.Module, batches: list[Tensor], **options: bool) -> Int8Simulation:
    simulation = Int8Simulation(network.eval(), **options)  # type: ignore[arg-type]
    simulation.set_ranges(batches)
    simulation.learn_ranges()
    return simulation


def _conv(**settings: int) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(3, 8, 3, **settings)


def test_a_convolution_is_one_of_integers() -> None:
    """The sum of products of 8-bit integers, exact in float64, times the two scales."""
    conv, beyond = _conv(), PIXELS * 2  # half of the values are clipped
    found = _simulated(conv, [PIXELS])(beyond).detach().numpy()

    weight = conv.weight.detach().numpy().astype(np.float64)
    weight_scale = np.abs(weight).max(axis=(1, 2, 3), keepdims=True) / 127
    low, high = PIXELS.numpy().min(), PIXELS.numpy().max()
    input_scale = (high - low) / 255
    zero = np.rint(-low / input_scale)
    integers = np.clip(np.rint(beyond.numpy() / input_scale) + zero, 0, 255) - zero
    levels = np.clip(np.rint(weight / weight_scale), -127, 127)
    assert levels.max() == 127 and integers.min() == -zero
    windows = np.lib.stride_tricks.sliding_window_view(integers, (3, 3), axis=(2, 3))
    sums = np.einsum("ncyxij,ocij->noyx", windows, levels)
    assert conv.bias is not None
    expected = sums * input_scale * weight_scale.reshape(1, -1, 1, 1) + conv.bias.detach().numpy().reshape(1, -1, 1, 1)
    # A value on the border between two integers may fall to either side: a step of the input, rarely.
    off = np.abs(found - expected)
    assert np.quantile(off, 0.99) < 1e-5 and off.max() < 2 * input_scale


def test_it_is_what_onnx_runtime_computes_with_the_same_scales() -> None:
    conv = _conv()
    simulation = _simulated(conv, [PIXELS])
    found = simulation(PIXELS).detach().numpy()
    scales = [simulation.input_rounding[0].scale, simulation.weight_rounding[0].scale]
    assert conv.bias is not None
    arrays = {
        "sx": scales[0].detach().numpy().reshape(()),
        "sw": scales[1].numpy(),
        "w": conv.weight.detach().numpy(),
        "b": conv.bias.detach().numpy(),
        "zx": simulation.input_rounding[0].zero_point.detach().numpy().astype(np.uint8).reshape(()),
        "zw": np.zeros(8, np.int8),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "sx", "zx"], ["qx"]),
        helper.make_node("DequantizeLinear", ["qx", "sx", "zx"], ["dx"]),
        helper.make_node("QuantizeLinear", ["w", "sw", "zw"], ["qw"], axis=0),
        helper.make_node("DequantizeLinear", ["qw", "sw", "zw"], ["dw"], axis=0),
        helper.make_node("Conv", ["dx", "dw", "b"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "conv",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 3, 16, 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4, 8, 14, 14])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {"x": PIXELS.numpy()})
    # ONNX Runtime divides by the scale, PyTorch multiplies by its inverse: a border value may differ by one step.
    off = np.abs(found - expected)
    assert np.quantile(off, 0.99) < 1e-5 and off.max() < scales[0].item()


def test_folding_batch_norm_changes_nothing() -> None:
    torch.manual_seed(3)
    conv, norm = _conv(bias=False), nn.BatchNorm2d(8)  # type: ignore[arg-type]
    with torch.no_grad():
        norm.weight.copy_(torch.rand(8) * 3 - 1)  # negative ones too
        norm.bias.normal_()
        norm.running_mean.normal_()  # type: ignore[union-attr]
        norm.running_var.copy_(torch.rand(8) * 5 + 0.1)  # type: ignore[union-attr]
    unfolded = _simulated(nn.Sequential(conv, norm), [PIXELS])
    folded = _simulated(nn.Sequential(fuse_conv_bn_eval(conv.eval(), norm.eval())), [PIXELS])
    with torch.no_grad():
        torch.testing.assert_close(folded(PIXELS), unfolded(PIXELS), rtol=1e-6, atol=2e-6)


class _Residual(nn.Module):
    """BatchNorm of one convolution, plus another."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(_conv(padding=1), nn.BatchNorm2d(8))
        self.right = _conv(padding=1)
        with torch.no_grad():
            self.left[1].running_mean.normal_()  # type: ignore[union-attr, operator]

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.left(x) + self.right(x))


def test_both_terms_of_a_sum_are_rounded_after_batch_norm() -> None:
    network = _Residual().eval()
    found = _simulated(network, [PIXELS])(PIXELS).detach().numpy()

    def rounded(branch: nn.Module) -> tuple[np.ndarray, float]:
        with torch.no_grad():
            wide = branch(PIXELS).numpy().astype(np.float64)
            value = _simulated(branch, [PIXELS], outputs=False)(PIXELS).numpy().astype(np.float64)
        scale = (wide.max() - wide.min()) / 255
        zero = np.rint(-wide.min() / scale)
        return (np.clip(np.rint(value / scale) + zero, 0, 255) - zero) * scale, scale

    (left, step), (right, other) = rounded(network.left), rounded(network.right)
    off = np.abs(found - np.maximum(left + right, 0))
    assert np.quantile(off, 0.99) < 1e-5 and off.max() < 1.01 * (step + other)


@pytest.mark.parametrize(("function", "rounds"), [(nn.ReLU, False), (nn.ReLU6, False), (nn.SiLU, True)])
def test_an_output_is_rounded_once(function: type[nn.Module], rounds: bool) -> None:
    """A ReLU becomes part of the layer, whose output is then the next layer's input; a SiLU reads rounded values."""
    conv, norm, after = _conv(), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 3)
    network = nn.Sequential(conv, norm, function(), after).eval()
    with torch.no_grad():
        both, alone = (_simulated(network, [PIXELS], outputs=outputs)(PIXELS) for outputs in (True, False))
        assert torch.equal(alone, both) is not rounds


def test_gradients_pass_where_nothing_is_clipped() -> None:
    layer = nn.Linear(4, 1, bias=False)
    nn.init.ones_(layer.weight)
    simulation = _simulated(layer, [torch.tensor([[-1.0, 0.5, 0.2, 1.0]])])
    inputs = torch.tensor([[-0.9, 0.3, 2.0, -3.0]], requires_grad=True)
    simulation(inputs).sum().backward()
    assert inputs.grad is not None and inputs.grad.tolist() == [[1.0, 1.0, 0.0, 0.0]]
    assert layer.weight.grad is not None and layer.weight.grad.abs().min() > 0


def test_ranges_are_the_mean_of_the_batches_and_follow_until_they_are_learnt() -> None:
    simulation = Int8Simulation(nn.Linear(2, 2))
    simulation.set_ranges([torch.tensor([[-1.0, 4.0]]), torch.tensor([[-3.0, 2.0]])])
    observer = simulation.input_rounding[0].activation_post_process
    assert (float(observer.min_val), float(observer.max_val)) == (-2.0, 3.0)  # type: ignore[union-attr, arg-type]
    simulation(torch.full((1, 2), 100.0))
    assert float(observer.max_val) == pytest.approx(3.0 + 0.01 * 97)  # type: ignore[union-attr, arg-type]
    simulation.learn_ranges()
    (before,) = simulation.trained_ranges()
    simulation(torch.full((1, 2), 100.0))
    assert simulation.trained_ranges() == [before]


def test_a_range_leaves_out_the_tails() -> None:
    values = np.random.default_rng(0).standard_t(3, size=(64, 4000)).astype(np.float32)
    simulation, clipped = Int8Simulation(nn.Linear(4000, 2)), 1e-3
    simulation.set_ranges([torch.from_numpy(values)], clipped=clipped)
    (found,) = simulation.trained_ranges()
    step = (found.high - found.low) / 255  # the zero point is an integer
    assert found.low == pytest.approx(np.quantile(values, clipped / 2), abs=step, rel=0.05)
    assert found.high == pytest.approx(np.quantile(values, 1 - clipped / 2), abs=step, rel=0.05)
    assert found.high < values.max() / 2


def test_ranges_have_the_gradients_of_lsq_plus() -> None:
    """Bhalgat et al. 2020, equations 4 and 5: the rounding's error inside, the distance of the end from 0 outside."""
    layer = nn.Linear(4, 1, bias=False)
    simulation = _simulated(layer, [torch.tensor([[-1.0, 0.5, 0.2, 1.0]])])
    values = np.array([-0.93, 0.31, 2.0, -3.0])
    simulation(torch.tensor(values[None], dtype=torch.float32)).sum().backward()
    rounding: Any = simulation.input_rounding[0]
    scale, zero = rounding.scale.item(), round(rounding.zero_point.item())
    weight = np.abs(layer.weight.detach().numpy()).max() / 127
    slopes = np.rint(layer.weight.detach().numpy()[0] / weight) * weight
    steps = values / scale
    inside = (steps + zero > 0) & (steps + zero < 255)
    ends = np.where(steps > 0, 255 - zero, -zero)
    of_scale = np.where(inside, np.rint(steps) - steps, ends)
    of_zero = np.where(inside, 0.0, -scale)
    assert inside.tolist() == [True, True, False, False]
    assert rounding.scale.grad.item() == pytest.approx((slopes * of_scale).sum(), rel=1e-4)
    assert rounding.zero_point.grad.item() == pytest.approx((slopes * of_zero).sum(), rel=1e-4)


def test_what_a_smooth_function_gives_is_rounded_where_no_layer_reads_it() -> None:
    torch.manual_seed(0)
    conv, gate = _conv(), nn.Conv2d(8, 8, 1)

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.gate = conv, gate

        def forward(self, x: Tensor) -> Tensor:
            x = nn.functional.silu(self.conv(x))
            return x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True)))

    simulation = _simulated(Network(), [PIXELS])
    found = [(each.layer, each.place) for each in simulation.trained_ranges()]
    assert found == [
        ("conv", "input"), ("gate", "input"), ("conv", "output"), ("gate", "output"), ("conv", "function"),
        ("gate", "function"),
    ]  # fmt: skip
    silu = nn.functional.silu(conv(PIXELS))
    of_silu = next(each for each in simulation.trained_ranges() if (each.layer, each.place) == ("conv", "function"))
    assert of_silu.low == pytest.approx(silu.min().item(), abs=0.02)
    assert of_silu.high == pytest.approx(silu.max().item(), abs=0.02)
    assert all(each.low >= -8.05 for each in simulation.trained_ranges() if each.place == "output")


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet"])
def test_a_network_is_left_plain_and_every_layer_is_simulated(name: str) -> None:
    network = build_trunk(name, image_size=64).eval()
    before, pixels = list(network.state_dict()), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        plain = network(pixels)
        simulation = _simulated(network, [pixels])
        rounded = simulation(pixels)
        assert torch.equal(network(pixels), plain) and not torch.equal(rounded, plain)
    assert list(network.state_dict()) == before
    assert not any(module._forward_pre_hooks for module in network.modules())
    assert len(simulation.layers) == sum(isinstance(m, nn.Conv2d | nn.Linear) for m in network.modules())
    again = Int8Simulation(build_trunk(name, image_size=64).eval())
    again.load_state_dict(simulation.state_dict())
    with torch.no_grad():
        assert torch.equal(again(pixels), rounded)


def test_what_is_skipped_stays_in_float() -> None:
    network = nn.ModuleDict({"trunk": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    assert Int8Simulation(network, skip=("head",)).layers == ("trunk",)
