"""Weighted kNN accuracy as in DINO.

Protocol (Caron et al. 2021): L2-normalised features, cosine similarity, k in {10, 20, 100, 200}, each neighbour votes
for its class with weight exp(similarity / 0.07). The search is exact.

N bank images   M queries   D width   K neighbours
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from robx.embeddings import KNN_K, KNN_TEMPERATURE, TOP, knn_vote
from robx.errors import InputError
from robx.eval.neighbours import nearest
from robx.progress import Progress
from robx.records import Value
from robx.stats import accuracy_value

KS = (10, 20, 100, 200)
Search = Callable[..., tuple[np.ndarray, np.ndarray]]


def weighted_knn(
    bank: np.ndarray,
    bank_labels: np.ndarray,
    queries: np.ndarray,
    *,
    k: int,
    temperature: float = KNN_TEMPERATURE,
    classes: int | None = None,
) -> np.ndarray:
    """The five most likely classes of each query, int64 (M, 5), the most likely first.

    `bank` (N, D) with labels (N,) in [0, classes); `queries` (M, D). A query with NaN or infinity gets -1.

    Raises:
        InputError: labels that do not match the bank or the classes, or see `nearest`.
    """
    _check_labels(bank, bank_labels, classes)
    similarities, indices = nearest(bank, queries, k)
    predictions = knn_vote(similarities, bank_labels[indices], temperature=temperature)
    predictions[~np.isfinite(queries).all(axis=1)] = -1
    return predictions


def knn_accuracy(
    bank: np.ndarray,
    bank_labels: np.ndarray,
    queries: np.ndarray,
    query_labels: np.ndarray,
    *,
    classes: int,
    ks: Sequence[int] = KS,
    search: Search = nearest,
    progress: Progress | None = None,
) -> dict[str, Value]:
    """Top-1 and top-5 in % for every k that the bank is large enough for: "top1_k10", "top5_k10", "top1_k20", ...

    "top1" and "top5" alone are those of k = 20, or of the whole bank where it is smaller: k is fixed in advance,
    because choosing the best k would fit it to the test set. One search serves all k. Unlabelled images (label < 0) are
    left out on both sides. Top-5 is left out with five classes or fewer. `search` is `nearest`, or does the same.

    Raises:
        InputError: no labelled images on one side, labels outside `classes`, or see `nearest`.
    """
    bank, bank_labels = _labelled(bank, bank_labels)
    queries, query_labels = _labelled(queries, query_labels)
    if not len(bank) or not len(queries):
        raise InputError("kNN needs labelled images on both sides: give data with classes (one folder per class)")
    _check_labels(bank, bank_labels, classes)
    headline = min(KNN_K, len(bank))
    served = sorted({k for k in ks if k <= len(bank)} | {headline})
    similarities, indices = search(bank, queries, max(served), progress=progress)
    bad = ~np.isfinite(queries).all(axis=1)
    values: dict[str, Value] = {}
    for k in served:
        found = knn_vote(similarities[:, :k], bank_labels[indices[:, :k]])
        found[bad] = -1
        hits = found == query_labels[:, None]
        for name in (f"_k{k}", "") if k == headline else (f"_k{k}",):
            values[f"top1{name}"] = accuracy_value(hits[:, 0])
            if classes > TOP:
                values[f"top5{name}"] = accuracy_value(hits.any(axis=1))
    return values


def _labelled(features: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    keep = labels >= 0
    return (features, labels) if keep.all() else (features[keep], labels[keep])


def _check_labels(bank: np.ndarray, labels: np.ndarray, classes: int | None) -> None:
    if labels.shape != bank.shape[:1]:
        raise InputError(
            f"{len(bank)} bank features do not match labels of shape {labels.shape}: give one label an image"
        )
    if len(labels) and (labels.min() < 0 or (classes is not None and labels.max() >= classes)):
        fit = "are negative" if classes is None else f"do not fit {classes} classes"
        raise InputError(f"labels from {labels.min()} to {labels.max()} {fit}: leave out unlabelled images")
