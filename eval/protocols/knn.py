"""Exact nearest neighbours and DINO's weighted vote over them.

Protocol (Caron et al. 2021, DINO): L2-normalised features, cosine similarity, k in {10, 20, 100, 200}, each neighbour
votes for its class with weight exp(similarity / 0.07). Exact: every query meets every bank row, block by block.

N bank images   M queries   D width   K neighbours
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from robx.errors import InputError
from robx.progress import Progress
from robx.records import Value
from robx.stats import accuracy_value

KS = (10, 20, 100, 200)
HEADLINE_K = 20
TEMPERATURE = 0.07
TOP = 5
_QUERY_BLOCK = 1024
_BANK_BLOCK = 16_384  # 1024 x 16384 similarities are 64 MB


def unit_rows(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of (N, D) scaled to length 1, float32, and which rows (N,) were finite; the others become zeros."""
    rows = np.array(features, dtype=np.float32)
    finite = np.asarray(np.isfinite(rows).all(axis=1))
    if not finite.all():
        rows[~finite] = 0
    # The scale comes first, so that squares neither overflow nor vanish.
    largest = np.abs(rows).max(axis=1, keepdims=True, initial=0)
    rows /= np.where(largest > 0, largest, 1)
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.float32(1e-12))
    return rows, finite


def nearest(
    bank: np.ndarray, queries: np.ndarray, k: int, *, progress: Progress | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The k most similar bank rows of each query: cosine similarities (M, k), descending, and row numbers (M, k).

    `bank` (N, D) may be a memory map: it is read block by block. A bank row that is not finite is nobody's neighbour
    (similarity -inf); equal similarities are ordered by row number.

    Raises:
        InputError: an empty bank, widths that differ, or k below 1 or above N.
    """
    if bank.ndim != 2 or queries.ndim != 2 or bank.shape[1] != queries.shape[1]:
        raise InputError(f"bank {bank.shape} and queries {queries.shape} do not fit: features of one width are needed")
    if not 1 <= k <= len(bank):
        raise InputError(f"k = {k} neighbours were asked of a bank of {len(bank)} images: give k from 1 to that")
    similarities = np.empty((len(queries), k), np.float32)
    indices = np.empty((len(queries), k), np.int64)
    for start in range(0, len(queries), _QUERY_BLOCK):
        block = slice(start, start + _QUERY_BLOCK)
        similarities[block], indices[block] = _nearest_of_block(bank, unit_rows(queries[block])[0], k)
        if progress:
            progress(min(start + _QUERY_BLOCK, len(queries)), len(queries), "neighbours")
    return similarities, indices


def vote(similarities: np.ndarray, labels: np.ndarray, *, classes: int, temperature: float = TEMPERATURE) -> np.ndarray:
    """The classes (M, 5) that the neighbours vote for, the heaviest first; -1 where fewer classes have a vote.

    Args:
        similarities: cosine similarities (M, K) of the neighbours.
        labels: their classes (M, K), 0 <= label < classes.
        classes: how many classes there are.
        temperature: a neighbour's weight is exp(similarity / temperature).
    """
    out = np.full((len(labels), TOP), -1, np.int64)
    for start in range(0, len(labels), _QUERY_BLOCK):
        block = slice(start, start + _QUERY_BLOCK)
        out[block, : min(TOP, classes)] = _vote_of_block(similarities[block], labels[block], classes, temperature)
    return out


def weighted_knn(
    bank: np.ndarray,
    bank_labels: np.ndarray,
    queries: np.ndarray,
    *,
    k: int,
    temperature: float = TEMPERATURE,
    classes: int | None = None,
) -> np.ndarray:
    """DINO's weighted kNN: the five likeliest classes of each query, int64 (M, 5), the likeliest first.

    `bank` (N, D) with labels (N,) in [0, classes); `queries` (M, D). A query that is not finite is answered by -1.

    Raises:
        InputError: labels that do not fit the bank or the classes, or see `nearest`.
    """
    classes = _check_labels(bank, bank_labels, classes)
    similarities, indices = nearest(bank, queries, k)
    predictions = vote(similarities, bank_labels[indices], classes=classes, temperature=temperature)
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
    temperature: float = TEMPERATURE,
    progress: Progress | None = None,
) -> dict[str, Value]:
    """Top-1 and top-5 in % for every k that the bank can serve: "top1_k10", "top5_k10", "top1_k20", ...

    "top1" and "top5" alone are those of k = 20, fixed beforehand (the best k would be picked on the test images), or of
    the whole bank where it is smaller. One search serves all k. Unlabelled images (label < 0) are left out on both
    sides; so is top-5 with five classes or
    fewer, where it says nothing.
    """
    bank, bank_labels = _labelled(bank, bank_labels)
    queries, query_labels = _labelled(queries, query_labels)
    if not len(bank) or not len(queries):
        raise InputError("no labelled images on one side of the kNN: give data with classes (one folder a class)")
    _check_labels(bank, bank_labels, classes)
    headline = min(HEADLINE_K, len(bank))
    served = sorted({k for k in ks if k <= len(bank)} | {headline})
    similarities, indices = nearest(bank, queries, max(served), progress=progress)
    bad = ~np.isfinite(queries).all(axis=1)
    values: dict[str, Value] = {}
    for k in served:
        found = vote(similarities[:, :k], bank_labels[indices[:, :k]], classes=classes, temperature=temperature)
        found[bad] = -1
        hits = found == query_labels[:, None]
        for name in (f"_k{k}", "") if k == headline else (f"_k{k}",):
            values[f"top1{name}"] = accuracy_value(hits[:, 0])
            if classes > TOP:
                values[f"top5{name}"] = accuracy_value(hits.any(axis=1))
    return values


def _nearest_of_block(bank: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    best = np.empty((len(queries), 0), np.float32)
    rows = np.empty((len(queries), 0), np.int64)
    for start in range(0, len(bank), _BANK_BLOCK):
        block, finite = unit_rows(bank[start : start + _BANK_BLOCK])
        similarities = queries @ block.T
        similarities[:, ~finite] = -np.inf
        columns = _top(similarities, k)
        best = np.concatenate([best, np.take_along_axis(similarities, columns, axis=1)], axis=1)
        rows = np.concatenate([rows, columns + start], axis=1)
        if best.shape[1] > k:
            keep = _top(best, k)
            best, rows = np.take_along_axis(best, keep, axis=1), np.take_along_axis(rows, keep, axis=1)
    order = np.lexsort((rows, -best), axis=1)
    return np.take_along_axis(best, order, axis=1), np.take_along_axis(rows, order, axis=1)


def _top(similarities: np.ndarray, k: int) -> np.ndarray:
    """Column numbers of each row's k largest, in no order; all columns when there are no more."""
    columns = similarities.shape[1]
    if columns <= k:
        return np.broadcast_to(np.arange(columns), similarities.shape)
    return np.argpartition(similarities, columns - k, axis=1)[:, columns - k :]


def _vote_of_block(similarities: np.ndarray, labels: np.ndarray, classes: int, temperature: float) -> np.ndarray:
    shifted = similarities.astype(np.float64)
    shifted -= np.where(np.isfinite(shifted[:, :1]), shifted[:, :1], 0)  # the largest comes first: exp cannot overflow
    weights = np.exp(shifted / temperature)
    cells = np.arange(len(labels))[:, None] * classes + labels
    scores = np.bincount(cells.ravel(), weights.ravel(), minlength=len(labels) * classes).reshape(-1, classes)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :TOP]
    return np.where(np.take_along_axis(scores, order, axis=1) > 0, order, -1)


def _labelled(features: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    keep = labels >= 0
    return (features, labels) if keep.all() else (features[keep], labels[keep])


def _check_labels(bank: np.ndarray, labels: np.ndarray, classes: int | None) -> int:
    if labels.shape != bank.shape[:1]:
        raise InputError(f"{len(bank)} bank features and {labels.shape} labels do not fit: give one label an image")
    top = int(labels.max(initial=-1))
    if len(labels) and (labels.min() < 0 or top >= (top + 1 if classes is None else classes)):
        raise InputError(
            f"labels from {labels.min()} to {top} do not fit {classes} classes: leave out unlabelled images"
        )
    return top + 1 if classes is None else classes
