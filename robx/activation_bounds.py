"""The inputs that matter to an activation function: outside of them its output hardly changes."""

from __future__ import annotations

from math import inf

Bounds = tuple[float, float]  # low, high

# Outside, the function is constant or changes by less than half a step of int8.
INTERESTING: dict[str, Bounds] = {
    "relu": (0.0, inf),
    "relu6": (0.0, 6.0),
    "hardswish": (-3.0, inf),
    "hardsigmoid": (-3.0, 3.0),
    "silu": (-8.0, inf),
    "sigmoid": (-8.0, 8.0),
    "gelu": (-5.0, inf),
}
