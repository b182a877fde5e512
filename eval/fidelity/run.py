"""Bundles against their fp32 students: every comparison of one run, with the repeat check and Holm's correction."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from robx.eval.datasets.features import Features
from robx.eval.fidelity.fidelity import Bank, Comparison, fidelity, make_bank
from robx.images.reading import read_batches, reader
from robx.images.sources import ImageSource
from robx.records import Precision, Value
from robx.runtime.session import Session
from robx.stats import holm

REPEAT_IMAGES = 8


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A bundle and its fp32 student, with the embeddings of both of the same training and test images."""

    folder: Path
    reference: Path
    precision: Precision
    bank: Features
    test: Features
    reference_bank: Features
    reference_test: Features
    repeat: Value | None  # see `repeat_difference`


def compare(
    pairs: Sequence[Pair], *, classes: int, names: Sequence[str] | None, margin: float
) -> list[tuple[Pair, Comparison]]:
    """The comparison of each pair; p-values are corrected for the number of pairs (Holm 1979).

    Args:
        pairs: what to compare; pairs of one student share one probe.
        classes: the number of classes.
        names: class names, for the reasons.
        margin: the accepted drop of accuracy, in percentage points.
    """
    banks: dict[Path, Bank] = {}
    compared = []
    for pair in pairs:
        known = pair.reference_bank
        if pair.reference not in banks:
            banks[pair.reference] = make_bank(known.features, known.labels, classes=classes)
        comparison = fidelity(
            pair.reference_test.features,
            pair.test.features,
            labels=pair.reference_test.labels,
            bank=banks[pair.reference],
            candidate_bank=pair.bank.features[pair.bank.labels >= 0],
            margin=margin,
            precision=pair.precision,
            class_names=names,
        )
        compared.append((pair, _with_repeat(comparison, pair.repeat)))
    p_values = [c.decisions["probe"].p_value if "probe" in c.decisions else 1.0 for _, c in compared]
    return [
        (pair, _with_holm(comparison, p_value))
        for (pair, comparison), p_value in zip(compared, holm(p_values), strict=True)
    ]


def repeat_difference(session: Session, source: ImageSource) -> Value | None:
    """The largest absolute difference between two runs of the first readable images of `source`, as one batch.

    0 means bit-identical answers, as expected of INT8 on a CPU; a GPU that sums in another order each time differs
    slightly. None when no image can be read.
    """
    read = reader(source, session.bundle.preprocessing)
    with contextlib.closing(read_batches(range(len(source)), read, batch_size=REPEAT_IMAGES)) as batches:
        _, batch = next(batches, (None, None))
    if batch is None:
        return None
    first, second = (np.array(session.run(batch), dtype=np.float64) for _ in range(2))
    same = (first == second) | (np.isnan(first) & np.isnan(second))
    with np.errstate(invalid="ignore"):
        gap = np.where(same, 0.0, np.abs(first - second))
    most = float(np.finfo(np.float32).max)  # records hold no NaN and no infinity
    return Value(value=float(np.nan_to_num(gap, nan=most, posinf=most).max()), n=len(batch))


def _with_repeat(comparison: Comparison, repeat: Value | None) -> Comparison:
    if repeat is None:
        return comparison
    values = comparison.values | {"repeat_max_abs": repeat}
    if repeat.value == 0:
        return replace(comparison, values=values)
    note = f"not deterministic: two runs of the same {repeat.n} images differ by up to {repeat.value:.2g}"
    return replace(comparison, values=values, reasons=(*comparison.reasons, note))


def _with_holm(comparison: Comparison, p_value: float) -> Comparison:
    decision = comparison.decisions.get("probe")
    if decision is None:
        return comparison
    corrected = Value(value=p_value, n=decision.n)
    return replace(comparison, values=comparison.values | {"probe_mcnemar_p_holm": corrected})
