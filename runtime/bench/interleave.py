"""Time several models in turns in one process, so that slow phases of the machine affect all of them equally."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from robx.runtime.bench import telemetry, validity
from robx.runtime.device import nvidia, watch
from robx.runtime.session import Session, run_within

_MIN_QUERIES = 5  # in a block


@dataclass(frozen=True)
class Interleaved:
    """What `interleave` measured."""

    blocks: dict[str, list[np.ndarray]]  # name -> its blocks in order, int64 ns per query
    conditions: tuple[str, ...]  # what disturbed the machine meanwhile
    noise: dict[str, tuple[str, ...]]  # name -> what is unsteady about its own latencies

    def reasons(self, *names: str) -> list[str]:
        """Every reason to doubt the ratios of these models (default: of all); `validity.verdict` takes them."""
        own = [f"{reason} ({name})" for name in names or self.noise for reason in self.noise[name]]
        return [*self.conditions, *own]


def interleave(
    sessions: Mapping[str, Session],
    images: np.ndarray | Mapping[str, np.ndarray],
    *,
    blocks: int,
    seconds: float,
    seed: int = 0,
) -> Interleaved:
    """Time every session in `blocks` blocks; the order is random within each round of blocks.

    Args:
        sessions: name -> opened session.
        images: preprocessed, float32 (N, 3, H, W), for all sessions or by name; query i runs image i mod N, alone.
        blocks: blocks of each session (ten or more for a bootstrap interval).
        seconds: minimum duration of a block; a block has at least five queries.
        seed: of the order.
    """
    names = list(sessions)
    inputs = {name: images if isinstance(images, np.ndarray) else images[name] for name in names}
    queries = {name: [own[i : i + 1] for i in range(len(own))] for name, own in inputs.items()}
    for name in names:
        _warm_up(sessions[name], queries[name], seconds)
    random = np.random.default_rng(seed)
    found: dict[str, list[np.ndarray]] = {name: [] for name in names}
    wall, cpu = dict.fromkeys(names, 0), dict.fromkeys(names, 0)
    flags, snapshots = watch.throttle_flags() or (), [_snapshot()]
    for _ in range(blocks):
        for index in random.permutation(len(names)):
            name = names[index]
            start, cpu_start = time.perf_counter_ns(), time.process_time_ns()
            found[name].append(_block(sessions[name], queries[name], seconds))
            wall[name] += time.perf_counter_ns() - start
            cpu[name] += time.process_time_ns() - cpu_start
        snapshots.append(_snapshot())
    facts = {name: session.facts() for name, session in sessions.items()}
    noise = {
        name: tuple(validity.noise([np.concatenate(found[name])], facts[name], cpu[name] / wall[name]))
        for name in names
    }
    digest = telemetry.digest(snapshots, cores=os.cpu_count() or 1)
    throttled = {*(watch.new_flags(flags, watch.throttle_flags()) or ())}
    if any(map(nvidia.runs, facts.values())):
        throttled |= {f"GPU {flag}" for flag in nvidia.reading()["throttled"]}
    return Interleaved(found, (*validity.conditions(digest), *validity.throttling(throttled)), noise)


def _snapshot() -> dict[str, Any]:
    return {**watch.snapshot(), "own": watch.process_jiffies(os.getpid()) or 0}


def _warm_up(session: Session, queries: list[np.ndarray], seconds: float) -> None:
    run_within(session, queries[0])
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        session.run(queries[0])


def _block(session: Session, queries: list[np.ndarray], seconds: float) -> np.ndarray:
    """One block, int64 ns (n,). Its first query, which finds another session's data in the caches, is not counted."""
    session.run(queries[-1])
    samples: list[int] = []
    clock = time.perf_counter_ns
    limit = clock() + int(seconds * 1e9)
    while len(samples) < _MIN_QUERIES or clock() < limit:
        query = queries[len(samples) % len(queries)]
        before = clock()
        session.run(query)
        samples.append(clock() - before)
    return np.array(samples, dtype=np.int64)
