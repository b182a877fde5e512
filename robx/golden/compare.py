"""Compare a port's output, or its input tensor, with the golden sample, and name the mistake that explains it."""

from __future__ import annotations

import dataclasses
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
_CLOSEST = 0.5  # a mistake is worth naming when it leaves at most this part of a difference
_CLEAR = 2  # the next best answer is at least so many times as far away as the mistake that explains a difference
_EQUAL = 1e-3  # mistakes explain a difference equally well when what they leave differs by at most this part of it
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
    difference: float  # from the golden sample, relative to its length; infinite for NaN and infinity
    tolerance: float
    fits: tuple[Fit, ...]
    note: str = ""  # what was done to the array before the comparison
    not_finite: int = 0  # how many values are NaN or infinity

    @property
    def explained_by(self) -> Mistake | None:
        """The mistake that explains the difference; None for a correct array, and where none does."""
        return next(iter(self.explanations), None)

    @property
    def explanations(self) -> tuple[Mistake, ...]:
        """All mistakes that explain the whole difference: int8 saturates, and several may give one output.

        The array is within the tolerance of theirs, and clearly further from every other answer.
        """
        best, found = self.fits[0], self.closest
        clear = all(fit.distance >= _CLEAR * best.distance for fit in self.fits[len(found) :])
        return found if best.distance <= self.tolerance and clear else ()

    @property
    def closest(self) -> tuple[Mistake, ...]:
        """The closest mistakes, equally close, if they explain at least half of the difference."""
        best = self.fits[0]
        if best.mistake is None or best.distance > _CLOSEST * min(self.difference, 1):
            return ()
        most = best.distance + _EQUAL * min(self.difference, 1)
        return tuple(fit.mistake for fit in self.fits if fit.mistake is not None and fit.distance <= most)

    @property
    def unexplained(self) -> float:
        """The part of the difference that the closest answer leaves, 0 to 1."""
        return self.fits[0].distance / self.difference if math.isfinite(self.difference) and self.difference else 0.0

    @property
    def passes(self) -> bool:
        """Whether the array is the golden one, up to what other hardware or a harmless difference explains."""
        if (mistake := self.explained_by) is not None:
            return mistake.harmless
        return self.difference <= self.tolerance

    @property
    def is_exact(self) -> bool:
        """Whether the difference is one that a float runtime has when it repeats a computation."""
        return self.difference <= _TOLERANCE["fp32"]

    def blamed_on(self, mistake: Mistake, distance: float) -> Comparison:
        """The same with one more mistake, whose answer is `distance` away."""
        fits = sorted((*self.fits, Fit(mistake=mistake, distance=distance)), key=lambda fit: fit.distance)
        return dataclasses.replace(self, fits=tuple(fits), not_finite=0)


def compare(array: np.ndarray, sample: GoldenSample, bundle: Bundle) -> Comparison:
    """Compare an array with the golden output that has its number of values, else with the golden input.

    Args:
        array: the port's embedding or logits of the golden image, (width,) or (N, width), of which the row that
            differs most counts; or its input tensor, in any shape.
        sample: the bundle's golden sample.
        bundle: the bundle.

    Raises:
        InputError: as many values as neither an output nor the input has.
    """
    given = array.astype(np.float64)
    outputs = {name: rows for name, rows in sample.outputs.items() if _has_rows(array, rows.shape[1])}
    answers = [] if outputs else _input_answers(sample, bundle, size=array.size)
    if not outputs and not answers:
        raise InputError(_wrong_size(array, sample))
    if count := int((~np.isfinite(given)).sum()):
        return Comparison(
            what=next(iter(outputs), "input"),
            difference=math.inf,
            tolerance=_TOLERANCE[bundle.precision] if outputs else _INPUT_TOLERANCE,
            fits=(Fit(mistake=None, distance=math.inf),),
            not_finite=count,
        )
    if outputs:
        found = [_compare_output(given, name, rows, sample, bundle) for name, rows in outputs.items()]
        return min(found, key=lambda one: one.difference)
    return _closest("input", given.ravel(), answers, tolerance=_INPUT_TOLERANCE)


def widths_of(sample: GoldenSample) -> set[int]:
    """The numbers of values that an array to compare may have: those of an output and of the input."""
    return {rows.shape[1] for rows in sample.outputs.values()} | {sample.inputs.size}


def _has_rows(array: np.ndarray, width: int) -> bool:
    return bool(array.size) and (array.size == width or (array.ndim == 2 and array.shape[1] == width))


def _compare_output(
    given: np.ndarray, name: str, rows: np.ndarray, sample: GoldenSample, bundle: Bundle
) -> Comparison:  # fmt: skip
    """Compare the row of a batch that differs most: every image of it is meant to be the golden one."""
    batch, answers, notes = given.reshape(-1, rows.shape[1]), rows.astype(np.float64), []
    if math.isclose(_length(batch[0]), 1, abs_tol=1e-3) and not math.isclose(_length(answers[0]), 1, abs_tol=1e-2):
        answers = answers / np.maximum(np.linalg.norm(answers, axis=1, keepdims=True), 1e-12)
        notes.append("the output is L2-normalised and was compared with the normalised golden output")
    worst = int(np.linalg.norm(batch - answers[0], axis=1).argmax())
    if len(batch) > 1:
        notes.append(f"row {worst} of {len(batch)} differs most and is shown: each must be of the golden image")
    named: _Answers = list(zip((None, *sample.record.mistakes), answers, strict=True))
    return _closest(name, batch[worst], named, tolerance=_TOLERANCE[bundle.precision], note="; ".join(notes))


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
