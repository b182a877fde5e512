"""Where the input of an activation function may saturate in int8.

Outside of these bounds the function is constant, or changes by less than half a step of int8. A quantiser that gives a
tensor its whole range spends most steps there: a ReLU6 that follows a convolution of EfficientNet-Lite0 reads values
from -168 to 204, and ExecuTorch's own int8 of that network falls to a centred cosine of 0.81.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import inf

Bounds = tuple[float, float]  # low, high

EVERYTHING: Bounds = (-inf, inf)
INTERESTING: dict[str, Bounds] = {
    "relu": (0.0, inf),
    "relu6": (0.0, 6.0),
    "hardswish": (-3.0, inf),
    "hardsigmoid": (-3.0, 3.0),
    "silu": (-8.0, inf),
    "sigmoid": (-8.0, 8.0),
    "gelu": (-5.0, inf),
}


def union(bounds: Iterable[Bounds]) -> Bounds:
    """The bounds of a tensor that several functions read; all values where none does."""
    found = list(bounds) or [EVERYTHING]
    return min(low for low, _ in found), max(high for _, high in found)
