"""Exact nearest neighbours by cosine similarity, block by block, so that neither side has to fit a similarity matrix.

N bank images   M queries   D width   K neighbours
"""

from __future__ import annotations

import numpy as np

from robx.errors import InputError
from robx.progress import Progress

_QUERY_BLOCK = 1024
_BANK_BLOCK = 16_384  # 1024 x 16384 similarities are 64 MB


def unit_rows(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of (N, D) scaled to length 1, float32, and which rows (N,) were finite; the others become zero."""
    rows = np.array(features, dtype=np.float32)
    finite = np.asarray(np.isfinite(rows).all(axis=1))
    if not finite.all():
        rows[~finite] = 0
    # Scaled by the largest value first, so that squares neither overflow nor underflow.
    largest = np.abs(rows).max(axis=1, keepdims=True, initial=0)
    rows /= np.where(largest > 0, largest, 1)
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.float32(1e-12))
    return rows, finite


def nearest(
    bank: np.ndarray, queries: np.ndarray, k: int, *, progress: Progress | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The k most similar bank rows of each query: cosine similarities (M, k), descending, and row numbers (M, k).

    `bank` (N, D) may be a memory map: it is read block by block. A bank row with NaN or infinity gets
    similarity -inf; equal similarities are ordered by row number.

    Raises:
        InputError: an empty bank, widths that differ, or k below 1 or above N.
    """
    if bank.ndim != 2 or queries.ndim != 2 or bank.shape[1] != queries.shape[1]:
        raise InputError(f"bank {bank.shape} and queries {queries.shape} do not match: give features of one width")
    if not 1 <= k <= len(bank):
        raise InputError(f"k = {k} is out of range for a bank of {len(bank)} images: give k from 1 to {len(bank)}")
    similarities = np.empty((len(queries), k), np.float32)
    indices = np.empty((len(queries), k), np.int64)
    for start in range(0, len(queries), _QUERY_BLOCK):
        block = slice(start, start + _QUERY_BLOCK)
        similarities[block], indices[block] = _nearest_of_block(bank, unit_rows(queries[block])[0], k)
        if progress:
            progress(min(start + _QUERY_BLOCK, len(queries)), len(queries), "neighbours")
    return similarities, indices


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
    """Column numbers of each row's k largest, unordered; all columns when there are no more than k."""
    columns = similarities.shape[1]
    if columns <= k:
        return np.broadcast_to(np.arange(columns), similarities.shape)
    return np.argpartition(similarities, columns - k, axis=1)[:, columns - k :]
