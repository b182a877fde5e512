"""Exact nearest neighbours by cosine similarity, block by block, so that neither side has to fit a similarity matrix.

Every bank row is normalised once. Once a query has its first k neighbours, only similarities above the k-th enter a
selection: few do, so that the search costs little more than its matrix product.

N bank images   M queries   D width   K neighbours   B queries of a block
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
    bank: np.ndarray, queries: np.ndarray, k: int, *, device: str = "cpu", progress: Progress | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The k most similar bank rows of each query: cosine similarities (M, k), descending, and row numbers (M, k).

    Equal similarities are ordered by row number. A bank row with NaN or infinity gets similarity -inf.

    Args:
        bank: (N, D); it may be a memory map, which is read block by block.
        queries: (M, D).
        k: 1 to N.
        device: "cpu" (NumPy), or a PyTorch device such as "cuda".
        progress: called with (bank images done, N, note).

    Raises:
        InputError: an empty bank, widths that differ, or k below 1 or above N.
    """
    if bank.ndim != 2 or queries.ndim != 2 or bank.shape[1] != queries.shape[1]:
        raise InputError(f"bank {bank.shape} and queries {queries.shape} do not match: give features of one width")
    if not 1 <= k <= len(bank):
        raise InputError(f"k = {k} is out of range for a bank of {len(bank)} images: give k from 1 to {len(bank)}")
    unit = unit_rows(queries)[0]
    if device != "cpu":
        return _ordered(*_in_torch(bank, unit, k, device, progress))
    blocks = [slice(at, at + _QUERY_BLOCK) for at in range(0, len(queries), _QUERY_BLOCK)]
    best = [np.empty((len(unit[block]), 0), np.float32) for block in blocks]
    rows = [np.empty((len(unit[block]), 0), np.int64) for block in blocks]
    for start in range(0, len(bank), _BANK_BLOCK):
        keys, finite = unit_rows(bank[start : start + _BANK_BLOCK])
        for i, block in enumerate(blocks):
            similarities = unit[block] @ keys.T
            if not finite.all():
                similarities[:, ~finite] = -np.inf
            best[i], rows[i] = _merge(best[i], rows[i], similarities, start, k)
        if progress:
            progress(start + len(keys), len(bank), "neighbours")
    found = np.concatenate([*best, np.empty((0, k), np.float32)])  # no queries give (0, k)
    numbers = np.concatenate([*rows, np.empty((0, k), np.int64)])
    return _ordered(found, numbers)


def _ordered(similarities: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both (M, k), by falling similarity and then by row number."""
    order = np.lexsort((rows, -similarities), axis=1)
    return np.take_along_axis(similarities, order, axis=1), np.take_along_axis(rows, order, axis=1)


def _in_torch(
    bank: np.ndarray, unit: np.ndarray, k: int, device: str, progress: Progress | None
) -> tuple[np.ndarray, np.ndarray]:
    """The same with PyTorch's topk, unordered, for queries of length 1."""
    import torch

    queries = torch.split(torch.from_numpy(unit).to(device), _QUERY_BLOCK)
    best = [torch.empty((len(block), 0), device=device) for block in queries]
    rows = [torch.empty((len(block), 0), dtype=torch.int64, device=device) for block in queries]
    for start in range(0, len(bank), _BANK_BLOCK):
        found, finite = unit_rows(bank[start : start + _BANK_BLOCK])
        keys, broken = torch.from_numpy(found).to(device), torch.from_numpy(~finite).to(device)
        for i, block in enumerate(queries):
            similarities = (block @ keys.T).masked_fill_(broken, -torch.inf)
            values, columns = similarities.topk(min(k, len(keys)), dim=1)
            both, numbers = torch.cat([best[i], values], dim=1), torch.cat([rows[i], columns + start], dim=1)
            best[i], keep = both.topk(min(k, both.shape[1]), dim=1)
            rows[i] = numbers.gather(1, keep)
        if progress:
            progress(start + len(keys), len(bank), "neighbours")
    if not queries:
        return np.empty((0, k), np.float32), np.empty((0, k), np.int64)
    return torch.cat(best).cpu().numpy(), torch.cat(rows).cpu().numpy()


def _merge(
    best: np.ndarray, rows: np.ndarray, similarities: np.ndarray, start: int, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The best k, unordered, of those known (B, <= k) and of a bank block's similarities (B, n) from row `start` on."""
    if best.shape[1] < k:
        columns = _top(similarities, k)
        return _select(best, rows, np.take_along_axis(similarities, columns, axis=1), columns + start, k)
    row, column = np.divmod(
        np.flatnonzero(similarities > best.min(axis=1, keepdims=True)), similarities.shape[1]
    )  # np.nonzero of two axes takes several times as long
    if not len(row):
        return best, rows
    touched, row = np.unique(row, return_inverse=True)
    counts = np.bincount(row, minlength=len(touched))
    place = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    new = np.full((len(touched), counts.max()), -np.inf, np.float32)
    numbers = np.zeros(new.shape, np.int64)
    new[row, place], numbers[row, place] = similarities[touched[row], column], column + start
    best[touched], rows[touched] = _select(best[touched], rows[touched], new, numbers, k)
    return best, rows


def _select(
    best: np.ndarray, rows: np.ndarray, more: np.ndarray, numbers: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The best k of both sets of (similarities, row numbers), or all of them if there are fewer."""
    both, all_rows = np.concatenate([best, more], axis=1), np.concatenate([rows, numbers], axis=1)
    if both.shape[1] <= k:
        return both, all_rows
    keep = _top(both, k)
    return np.take_along_axis(both, keep, axis=1), np.take_along_axis(all_rows, keep, axis=1)


def _top(similarities: np.ndarray, k: int) -> np.ndarray:
    """Column numbers of each row's k largest, unordered; all columns when there are no more than k."""
    columns = similarities.shape[1]
    if columns <= k:
        return np.broadcast_to(np.arange(columns), similarities.shape)
    return np.argpartition(similarities, columns - k, axis=1)[:, columns - k :]
