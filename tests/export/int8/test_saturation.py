"""Saturating the input of an activation function changes its output by less than half a step of int8."""

from __future__ import annotations

import math

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch.nn import functional

from robx.activation_bounds import INTERESTING
from robx.export.int8.candidate import RangeMethod
from robx.export.int8.ranges import choose, collect
from robx.export.int8.saturation import EVERYTHING, saturating, union

FUNCTIONS = {
    "relu": functional.relu,
    "relu6": functional.relu6,
    "hardswish": functional.hardswish,
    "hardsigmoid": functional.hardsigmoid,
    "silu": functional.silu,
    "sigmoid": torch.sigmoid,
    "gelu": functional.gelu,
}


@pytest.mark.parametrize("name", sorted(INTERESTING))
def test_what_is_cut_off_does_not_matter(name: str) -> None:
    x, (low, high) = torch.linspace(-200, 200, 400_001, dtype=torch.float64), INTERESTING[name]
    exact, saturated = FUNCTIONS[name](x), FUNCTIONS[name](x.clamp(low, high))
    # The output's own range where the input reaches no further than 6, as after a well-scaled layer.
    usual = FUNCTIONS[name](x[x.abs() <= 6])
    assert (exact - saturated).abs().max() < 0.5 * (usual.max() - usual.min()) / 255
    assert low > -math.inf or high < math.inf


def test_several_readers_need_all_their_inputs() -> None:
    assert union([INTERESTING["hardsigmoid"], INTERESTING["hardswish"]]) == (-3.0, math.inf)
    assert union([INTERESTING["relu6"], EVERYTHING]) == EVERYTHING
    assert union([]) == EVERYTHING


def _silu_model(*, also_read: bool) -> onnx.ModelProto:
    """y = silu(x + 0), and z = x + 0 too where something else reads the SiLU's input."""
    nodes = [
        helper.make_node("Identity", ["pixels"], ["x"]),
        helper.make_node("Sigmoid", ["x"], ["gate"]),
        helper.make_node("Mul", ["x", "gate"], ["y"]),
        *([helper.make_node("Neg", ["x"], ["z"])] if also_read else []),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 1000]) for name in ("pixels", "y", "z")]
    graph = helper.make_graph(nodes, "silu", values[:1], values[1:] if also_read else values[1:2])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse"])
def test_the_range_of_a_silus_input_ends_where_the_silu_is_flat(method: RangeMethod) -> None:
    values = np.random.default_rng(0).normal(0, 20, (1, 1000)).astype(np.float32)
    exact = values / (1 + np.exp(-values))

    def found(model: onnx.ModelProto) -> tuple[float, float]:
        """The lower end of the range, and the squared error of the SiLU of values that are rounded to 8 bits."""
        low, high = choose(collect(model, [values], input_name="pixels"), method)["x"]
        step = (high - low) / 255
        rounded = np.clip(np.rint((values - low) / step), 0, 255) * step + low
        inside = values < high  # what is clipped above is the rule's choice
        return low, float(np.square(rounded / (1 + np.exp(-rounded)) - exact)[inside].mean())

    (low, error), (_, error_before) = found(_silu_model(also_read=False)), found(_silu_model(also_read=True))
    assert low == -8 and error < 0.6 * error_before


def test_an_input_that_is_also_read_otherwise_keeps_its_range() -> None:
    assert saturating(_silu_model(also_read=False)) == {"x": INTERESTING["silu"]}
    assert saturating(_silu_model(also_read=True)) == {}
