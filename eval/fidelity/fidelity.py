"""A candidate's embeddings against its fp32 reference's, on the same images: how close, and what it costs a user.

The headline is what happens in production: a linear probe trained on the reference's features, frozen, then applied to
the candidate's. Besides it: the centred cosine (the set's mean is subtracted first, because embeddings share a large
common component that inflates the plain cosine), the other figures of similarity.py, and weighted kNN with the
reference's bank.

M test images   N bank images   D width
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np

from robx.embeddings import KNN_K, knn_vote
from robx.errors import InputError
from robx.eval.fidelity.probe import Probe, fit_probe
from robx.eval.fidelity.similarity import broken, closeness, neighbour_overlap, overlap
from robx.eval.neighbours import nearest
from robx.eval.protocols.knn import weighted_knn
from robx.records import Precision, Value, Verdict
from robx.stats import (
    LEVEL,
    Decision,
    accuracy_value,
    discordant,
    drop_value,
    non_inferiority,
)

LEAST_UNLABELLED = 100  # images: fewer do not determine the 1 % quantile
# Least mean and least 1 % quantile of the centred cosine; they decide only where there are no labels.
COSINE_LIMITS: dict[Precision, tuple[float, float]] = {
    "fp32": (0.99999, 0.9999),
    "fp16": (0.9999, 0.999),
    "int8": (0.99, 0.95),
}


@dataclass(frozen=True, kw_only=True)
class Bank:
    """The reference's features of labelled training images, and the probe trained on them; made once per student."""

    features: np.ndarray  # float32 (N, D), the reference's
    labels: np.ndarray  # int64 (N,), 0 <= label < classes
    classes: int
    probe: Probe  # trained on `features`, then frozen


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The result of `fidelity`: all figures, the paired decisions behind the verdict, and the reasons in words."""

    values: dict[str, Value]
    decisions: dict[Literal["probe", "knn"], Decision]
    verdict: Verdict
    reasons: tuple[str, ...]


def make_bank(features: np.ndarray, labels: np.ndarray, *, classes: int) -> Bank:
    """Keep the labelled rows of `features` (N, D) and train the probe on them."""
    keep = labels >= 0
    features, labels = features[keep], labels[keep]
    return Bank(features=features, labels=labels, classes=classes, probe=fit_probe(features, labels, classes=classes))


def fidelity(
    reference: np.ndarray,
    candidate: np.ndarray,
    *,
    labels: np.ndarray | None = None,
    bank: Bank | None = None,
    candidate_bank: np.ndarray | None = None,
    margin: float = 1.0,
    level: float = LEVEL,
    precision: Precision = "int8",
    class_names: Sequence[str] | None = None,
) -> Comparison:
    """Compare the candidate's embeddings (M, D) with the reference's of the same images.

    Args:
        reference: fp32 embeddings (M, D).
        candidate: the same images' embeddings by the candidate.
        labels: int64 (M,), negative where unlabelled; the task figures need them and a `bank`.
        bank: the reference's labelled training features (`make_bank`).
        candidate_bank: the candidate's features (N, D) of the bank's images, for the drops that remain when the probe
            is retrained and when the bank is embedded again; None leaves these two out.
        margin: the accepted drop of accuracy, in percentage points.
        level: significance level of the accuracy tests; smaller where the candidate is one of several.
        precision: selects the cosine limits, which decide where there are no labels and are only noted otherwise.
        class_names: names for the reasons.

    Raises:
        InputError: shapes that do not pair.
    """
    faults = broken(reference, candidate)
    values = closeness(reference, candidate)
    notes = _cosine_shortfalls(values, precision)
    decisions: dict[Literal["probe", "knn"], Decision] = {}
    if bank is not None:
        decide = partial(non_inferiority, margin=margin, level=level)
        task, decisions, remarks = _task(reference, candidate, labels, bank, decide, class_names)
        values |= task
        notes += remarks
        if candidate_bank is not None and labels is not None and np.isfinite(candidate_bank).all():
            values |= _adapted(reference, candidate, labels, bank, candidate_bank)
    else:
        values["neighbour_overlap"] = neighbour_overlap(reference, candidate)
    if faults:
        return Comparison(values=values, decisions=decisions, verdict="FAIL", reasons=(*faults, *notes))
    if "probe" in decisions:
        decided = decisions["probe"]
        reasons = tuple(f"frozen probe: {reason}" for reason in decided.reasons)
        return Comparison(values=values, decisions=decisions, verdict=decided.verdict, reasons=(*reasons, *notes))
    verdict: Verdict = "FAIL" if notes else "PASS" if len(reference) >= LEAST_UNLABELLED else "INCONCLUSIVE"
    notes.append(f"no labels: the centred cosine of {len(reference)} images decides, not the accuracy")
    return Comparison(values=values, decisions=decisions, verdict=verdict, reasons=tuple(notes))


def _task(
    reference: np.ndarray,
    candidate: np.ndarray,
    labels: np.ndarray | None,
    bank: Bank,
    decide: Callable[[np.ndarray, np.ndarray], Decision],
    class_names: Sequence[str] | None,
) -> tuple[dict[str, Value], dict[Literal["probe", "knn"], Decision], list[str]]:
    """The figures of the user's task; those that need labels only where there are labels."""
    k = min(KNN_K, len(bank.labels))
    answers: dict[Literal["probe", "knn"], list[np.ndarray]] = {"probe": [], "knn": []}
    neighbours = []
    for features in (reference, candidate):
        finite = np.isfinite(features).all(axis=1)
        similarities, rows = nearest(bank.features, features, k)
        votes = knn_vote(similarities, bank.labels[rows])[:, 0]
        answers["knn"].append(np.where(finite, votes, -1))
        answers["probe"].append(bank.probe.predict(features))
        neighbours.append(np.where(finite[:, None], rows, -1))
    values = {"neighbour_overlap": overlap(*neighbours)}
    decisions: dict[Literal["probe", "knn"], Decision] = {}
    notes: list[str] = []
    keep = np.zeros(len(reference), bool) if labels is None else labels >= 0
    for name, (first, second) in answers.items():
        values[f"{name}_agreement"] = accuracy_value(first == second)
        if labels is None or not keep.any():
            continue
        right = (first == labels)[keep], (second == labels)[keep]
        decisions[name] = decide(*right)
        values |= _paired_values(name, *right, decisions[name])
        if name == "probe":
            value, note = worst_class(*right, labels[keep], class_names=class_names)
            values["worst_class_drop"] = value
            notes += [note] if note else []
    return values, decisions, notes


def _adapted(
    reference: np.ndarray, candidate: np.ndarray, labels: np.ndarray, bank: Bank, candidate_bank: np.ndarray
) -> dict[str, Value]:
    """The drop that remains when the user adapts: the probe retrained, and the bank embedded again."""
    if candidate_bank.shape != bank.features.shape:
        raise InputError(
            f"the banks {bank.features.shape} and {candidate_bank.shape} do not match: embed the same images"
        )
    keep = labels >= 0
    if not keep.any():
        return {}
    wanted, k = labels[keep], min(KNN_K, len(bank.labels))
    again = fit_probe(candidate_bank, bank.labels, classes=bank.classes)
    right = {
        "retrained_probe": (bank.probe.predict(reference[keep]) == wanted, again.predict(candidate[keep]) == wanted),
        "own_bank_knn": tuple(
            weighted_knn(rows, bank.labels, queries[keep], k=k)[:, 0] == wanted
            for rows, queries in ((bank.features, reference), (candidate_bank, candidate))
        ),
    }
    return {f"{name}_drop": drop_value(*discordant(*pair), len(wanted)) for name, pair in right.items()}


def worst_class(
    right_reference: np.ndarray,
    right_candidate: np.ndarray,
    labels: np.ndarray,
    *,
    class_names: Sequence[str] | None = None,
) -> tuple[Value, str]:
    """The largest drop of any class in points, and a line that names it; an empty line where no class drops.

    Its interval is Bonferroni-corrected for the number of classes, because the worst one is selected by its result.
    """
    classes = np.unique(labels)
    drops = []
    for label in classes:
        here = labels == label
        b, c = discordant(right_reference[here], right_candidate[here])
        drops.append(((b - c) / np.count_nonzero(here), b, c, int(np.count_nonzero(here)), int(label)))
    _, b, c, n, label = max(drops)
    value = drop_value(b, c, n, confidence=1 - 0.05 / len(classes))
    name = class_names[label] if class_names and label < len(class_names) else str(label)
    return value, f"worst class {name}: drop {value.value:.1f} points on {n} images" if b > c else ""


def _paired_values(
    name: str, right_reference: np.ndarray, right_candidate: np.ndarray, decision: Decision
) -> dict[str, Value]:
    return {
        f"{name}_top1_reference": accuracy_value(right_reference),
        f"{name}_top1": accuracy_value(right_candidate),
        f"{name}_drop": decision.drop,
        f"{name}_mcnemar_p": Value(value=decision.p_value, n=decision.n),
    }


def _cosine_shortfalls(values: dict[str, Value], precision: Precision) -> list[str]:
    limits = dict(zip(("cosine_mean", "cosine_p1"), COSINE_LIMITS[precision], strict=True))
    return [
        f"centred {name.replace('_', ' ')} {values[name].value:.5f} is below {limit} for {precision}"
        for name, limit in limits.items()
        if values[name].value < limit
    ]
