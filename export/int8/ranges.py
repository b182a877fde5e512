"""Activation ranges from calibration images: one pass of the model, and every range rule from the same histograms.

min-max keeps the extremes; percentile cuts the tails; MSE and entropy clip where the expected quantisation error, or
the divergence between the distributions, is smallest (Krishnamoorthi 2018; Migacz 2017). 2048 bins, because with as
many bins as levels, a common default, entropy never clips.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import onnx

from robx.activation_bounds import Bounds
from robx.export.int8.candidate import RangeMethod
from robx.export.int8.saturation import EVERYTHING, saturating
from robx.export.onnx_run import open_model

BINS = 2048
_LEVELS = 128
# Entropy may clip no more than this: with a single value left inside, both distributions are one spike and are equal.
_MOST_CLIPPED = 0.01
# Values of one tensor that go into the histogram per batch; the extremes are taken over all values.
_SAMPLE = 100_000

Ranges = dict[str, tuple[float, float]]


@dataclass
class Histogram:
    """The values of one tensor over all calibration images."""

    low: float
    high: float
    counts: np.ndarray  # float64 (BINS,) over [low, high]
    bounds: Bounds = EVERYTHING  # values beyond these do not matter to what reads the tensor

    def edges(self) -> np.ndarray:
        """The BINS + 1 edges of the bins."""
        return np.linspace(self.low, self.high, BINS + 1)


def collect(model: onnx.ModelProto, batches: Iterable[np.ndarray], *, input_name: str) -> dict[str, Histogram]:
    """Run `model` on `batches` and keep a histogram of every float tensor that an operator reads or writes.

    Args:
        model: float32 ONNX.
        batches: the input, float32 (n, 3, H, W) each.
        input_name: the name of the model's input.
    """
    names = [output for node in model.graph.node for output in node.output if output]
    session = open_model(model, literal=True, outputs=names)
    found: dict[str, Histogram] = {}
    for batch in batches:
        values = dict(zip(names, session.run(names, {input_name: batch}), strict=True)) | {input_name: batch}
        for name, value in values.items():
            if value.dtype == np.float32 and value.size:
                _add(found, name, value)
    for name, bounds in saturating(model).items():
        if name in found:
            found[name].bounds = bounds
    return found


def choose(
    histograms: dict[str, Histogram], method: RangeMethod, *, percentile: float = 99.99, symmetric: bool = False
) -> Ranges:
    """The range (low, high) of every tensor by one rule; each contains 0, which has to be exact.

    The input of a smooth activation function is cut off where the function hardly changes (`saturating`).

    Args:
        histograms: from `collect`.
        method: the rule.
        percentile: for the rule of that name; values beyond it are clipped.
        symmetric: the quantiser spreads its 255 steps over [-m, m], whatever the range is.
    """
    return {name: _choose_one(histogram, method, percentile, symmetric) for name, histogram in histograms.items()}


def _choose_one(histogram: Histogram, method: RangeMethod, percentile: float, symmetric: bool) -> tuple[float, float]:
    low, high = _by_rule(histogram, method, percentile, symmetric)
    return max(low, min(histogram.bounds[0], 0.0)), min(high, max(histogram.bounds[1], 0.0))


def _by_rule(histogram: Histogram, method: RangeMethod, percentile: float, symmetric: bool) -> tuple[float, float]:
    low, high = min(histogram.low, 0.0), max(histogram.high, 0.0)
    if high - low <= 0 or method == "minmax":
        return low, high
    if method == "percentile":
        share = np.cumsum(histogram.counts) / histogram.counts.sum()
        tail = (1 - percentile / 100) / 2 if low < 0 < high else 1 - percentile / 100
        edges = histogram.edges()
        lower = edges[int(np.searchsorted(share, tail))] if low < 0 else 0.0
        upper = edges[min(BINS, int(np.searchsorted(share, 1 - tail)) + 1)] if high > 0 else 0.0
        return min(float(lower), 0.0), max(float(upper), 0.0)
    reach = max(-low, high)
    if method == "mse" and not symmetric:
        factor = _least_mse(histogram, low, high)
        return low * factor, high * factor
    reach *= _least_mse(histogram, -reach, reach) if method == "mse" else _least_divergence(histogram)
    return max(low, -reach), min(high, reach)


def _least_mse(histogram: Histogram, low: float, high: float) -> float:
    """The share of the range whose 8-bit quantisation has the smallest squared error."""
    edges = histogram.edges()
    centres = (edges[:-1] + edges[1:]) / 2
    factors = np.linspace(0.3, 1.0, 71)
    clipped = np.clip(centres[None], factors[:, None] * low, factors[:, None] * high)
    step = factors * (high - low) / 255
    error = ((clipped - centres) ** 2 + np.where(clipped == centres, step[:, None] ** 2 / 12, 0.0)) @ histogram.counts
    return float(factors[int(np.argmin(error))])


def _least_divergence(histogram: Histogram) -> float:
    """The share of max |x| at which the clipped, quantised distribution has the smallest KL divergence."""
    edges = histogram.edges()
    reach = max(abs(histogram.low), abs(histogram.high))
    counts, _ = np.histogram(np.abs((edges[:-1] + edges[1:]) / 2), BINS, (0, reach), weights=histogram.counts)
    counts[0] = counts[1]  # a ReLU's zeros are exact in int8; their spike would dominate the divergence
    best, best_width = np.inf, BINS
    inside = np.cumsum(counts) / max(counts.sum(), 1e-30)
    for width in range(_LEVELS, BINS + 1, 16):
        if inside[width - 1] < 1 - _MOST_CLIPPED:
            continue
        reference = counts[:width].copy()
        reference[-1] += counts[width:].sum()
        level = np.arange(width) * _LEVELS // width
        filled = counts[:width] > 0
        mass, members = np.bincount(level, counts[:width], _LEVELS), np.bincount(level, filled, _LEVELS)
        spread = np.where(filled, (mass / np.maximum(members, 1))[level], 0)
        p, q = reference / max(reference.sum(), 1e-30), spread / max(spread.sum(), 1e-30)
        use = p > 0
        divergence = float(np.sum(p[use] * np.log(p[use] / np.maximum(q[use], 1e-12))))
        if divergence < best:
            best, best_width = divergence, width
    return best_width / BINS


def _add(found: dict[str, Histogram], name: str, value: np.ndarray) -> None:
    flat = value.reshape(-1)
    low, high = float(flat.min()), float(flat.max())
    if not np.isfinite(low) or not np.isfinite(high):
        return
    sample = flat[:: _stride(flat.size)]
    old = found.get(name)
    if old is None:
        found[name] = Histogram(low, high, _counted(sample, low, high))
        return
    if low < old.low or high > old.high:  # widen: counts move to the new bins at the old centres
        centres = (old.edges()[:-1] + old.edges()[1:]) / 2
        wide = (min(low, old.low), max(high, old.high))
        old.counts = np.histogram(centres, BINS, wide, weights=old.counts)[0]
        old.low, old.high = wide
    old.counts += _counted(sample, old.low, old.high)


def _counted(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Counts of `values` in the bins over [low, high], float64 (BINS,); the first bin has all of a constant tensor."""
    if high > low:
        return np.histogram(values, BINS, (low, high))[0].astype(np.float64)
    counts = np.zeros(BINS)
    counts[0] = values.size
    return counts


def _stride(size: int) -> int:
    """The sampling step of a tensor; coprime to its size, so that the sample covers every channel."""
    step = max(1, size // _SAMPLE)
    while math.gcd(step, size) > 1:
        step += 1
    return step
