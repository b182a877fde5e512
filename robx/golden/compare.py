"""Compare a port's output, or its input tensor, with the golden sample, and name the mistake that explains it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from robx.errors import InputError
from robx.golden.mistakes import Mistake, variants
from robx.golden.sample import GoldenSample, encoded
from robx.records import Bundle

# Largest distance from the golden output, relative to its length, that other hardware and versions explain.
_TOLERANCE = {"fp32": 1e-3, "fp16": 1e-2, "int8": 1e-1}
_INPUT_TOLERANCE = 2e-2  # about one of 255 levels in every pixel
_FITS = 0.5  # a mistake explains a difference when it leaves at most this part of it
_Answers = list[tuple[Mistake | None, np.ndarray]]  # None: the correct one


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How far an array is from one answer, relative to the length of the golden one; no mistake: the correct answer."""

    mistake: Mistake | None
    distance: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What was compared and which answers it is close to, the closest first."""

    what: str  # "embedding", "logits" or "input"
    difference: float  # from the golden sample, relative to its length
    tolerance: float
    fits: tuple[Fit, ...]
    note: str = ""  # what was done to the array before the comparison

    @property
    def explained_by(self) -> Mistake | None:
        """The mistake that explains the difference; None for a correct array, and where none does."""
        best = self.fits[0]
        return best.mistake if best.mistake is not None and best.distance <= _FITS * min(self.difference, 1) else None

    @property
    def passes(self) -> bool:
        """Whether the array is the golden one, up to what other hardware or a harmless difference explains."""
        if (mistake := self.explained_by) is not None:
            return mistake.harmless
        return self.difference <= self.tolerance


def compare(array: np.ndarray, sample: GoldenSample, bundle: Bundle) -> Comparison:
    """Compare an array with the golden output that has its number of values, else with the golden input.

    Args:
        array: the port's embedding or logits of the golden image, (width,) or (N, width), of which the first row is
            taken; or its input tensor, in any shape.
        sample: the bundle's golden sample.
        bundle: the bundle.

    Raises:
        InputError: NaN or infinity, or as many values as neither an output nor the input has.
    """
    if not np.isfinite(array).all():
        count = int((~np.isfinite(array)).sum())
        raise InputError(f"{count} of {array.size} values are NaN or infinity: check the input, and try fp32")
    given = array.astype(np.float64)
    found = [
        _compare_output(given, name, rows, sample, bundle)
        for name, rows in sample.outputs.items()
        if _has_rows(array, rows.shape[1])
    ]
    if found:
        return min(found, key=lambda one: one.difference)
    answers = _input_answers(sample, bundle, size=array.size)
    if not answers:
        raise InputError(_wrong_size(array, sample))
    return _closest("input", given.ravel(), answers, tolerance=_INPUT_TOLERANCE)


def _has_rows(array: np.ndarray, width: int) -> bool:
    return bool(array.size) and (array.size == width or (array.ndim == 2 and array.shape[1] == width))


def _compare_output(
    given: np.ndarray, name: str, rows: np.ndarray, sample: GoldenSample, bundle: Bundle
) -> Comparison:  # fmt: skip
    mine, answers, note = given.ravel()[: rows.shape[1]], rows.astype(np.float64), ""
    if math.isclose(_length(mine), 1, abs_tol=1e-3) and not math.isclose(_length(answers[0]), 1, abs_tol=1e-2):
        answers = answers / np.maximum(np.linalg.norm(answers, axis=1, keepdims=True), 1e-12)
        note = "the output is L2-normalised and was compared with the normalised golden output"
    named: _Answers = list(zip((None, *sample.record.mistakes), answers, strict=True))
    return _closest(name, mine, named, tolerance=_TOLERANCE[bundle.precision], note=note)


def _closest(what: str, mine: np.ndarray, answers: _Answers, *, tolerance: float, note: str = "") -> Comparison:
    scale = max(_length(answers[0][1]), 1e-12)
    fits = [Fit(mistake=mistake, distance=_length(mine - answer) / scale) for mistake, answer in answers]
    difference = next((fit.distance for fit in fits if fit.mistake is None), math.inf)
    ordered = tuple(sorted(fits, key=lambda fit: fit.distance))
    return Comparison(what=what, difference=difference, tolerance=tolerance, fits=ordered, note=note)


def _input_answers(sample: GoldenSample, bundle: Bundle, *, size: int) -> _Answers:
    """The correct input and the input after each mistake, as the model takes them: those with `size` values."""
    found: _Answers = [(None, sample.inputs)]
    for mistake, values in variants(sample.image, bundle):
        if bundle.in_model is not None:
            # The host preprocessing of a uint8 bundle has mean 0 and std 1 / 255: these values are pixels.
            pixels = np.clip(np.rint(values), 0, 255).astype(np.uint8).transpose(1, 2, 0)
            values = encoded(pixels, bundle.in_model)
        found.append((mistake, values))
    return [(mistake, array.astype(np.float64).ravel()) for mistake, array in found if array.size == size]


def _wrong_size(array: np.ndarray, sample: GoldenSample) -> str:
    outputs = " or ".join(f"{rows.shape[1]} ({name})" for name, rows in sample.outputs.items())
    return (
        f"it has the shape {array.shape}, and the model returns {outputs} values for an image: give its output for "
        f"golden/image.png, or its input tensor of shape {sample.inputs.shape}"
    )


def _length(vector: np.ndarray) -> float:
    return float(np.linalg.norm(vector))
