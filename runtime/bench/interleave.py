"""Comparing models in one process, one after the other in random order, so that the machine's moods meet all alike."""

from __future__ import annotations

import time
from collections.abc import Mapping

import numpy as np

from robx.runtime.session import Session


def interleave(
    sessions: Mapping[str, Session], images: np.ndarray, *, blocks: int, seconds: float, seed: int = 0
) -> dict[str, list[np.ndarray]]:
    """Time every session in `blocks` blocks; within each round of blocks the order is random.

    Args:
        sessions: name -> opened session; all take the same input.
        images: preprocessed, float32 (N, 3, H, W); query i runs image i mod N, alone.
        blocks: how many blocks each session gets (ten or more for a bootstrap interval).
        seconds: the least duration of a block; a block has at least five queries.
        seed: of the order.

    Returns:
        name -> its blocks in order, each int64 ns per query; ready for `latency.paired_ratio`.
    """
    queries = [images[i : i + 1] for i in range(len(images))]
    names = list(sessions)
    for name in names:
        _warm(sessions[name], queries, seconds)
    random = np.random.default_rng(seed)
    found: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for _ in range(blocks):
        for index in random.permutation(len(names)):
            found[names[index]].append(_block(sessions[names[index]], queries, seconds))
    return found


def _warm(session: Session, queries: list[np.ndarray], seconds: float) -> None:
    end = time.perf_counter() + seconds
    session.run(queries[0])
    while time.perf_counter() < end:
        session.run(queries[0])


def _block(session: Session, queries: list[np.ndarray], seconds: float) -> np.ndarray:
    """One block; its first query, that finds the other session's data in the caches, is not counted."""
    session.run(queries[-1])
    samples: list[int] = []
    clock = time.perf_counter_ns
    start = clock()
    limit = start + int(seconds * 1e9)
    while len(samples) < 5 or clock() < limit:
        query = queries[len(samples) % len(queries)]
        before = clock()
        session.run(query)
        samples.append(clock() - before)
    return np.array(samples, dtype=np.int64)
