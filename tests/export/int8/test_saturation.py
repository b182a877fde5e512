"""Saturating the input of an activation function changes its output by less than half a step of int8."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from robx.export.int8.saturation import EVERYTHING, INTERESTING, union

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
