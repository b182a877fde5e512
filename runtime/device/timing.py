"""The timed loop and its warm-up. Runs on the device: Python 3.8, the standard library and numpy only."""

from __future__ import annotations

import gc
import time
from typing import Any

_WINDOW_QUERIES = 10  # minimum per warm-up window
_AGREEMENT = 0.02  # steady: the medians of three windows are this close


def warm_up(model: Any, queries: list[Any], least: float, limit: float) -> dict[str, Any]:
    """Run windows of queries until three consecutive medians agree within 2 %, or `limit` seconds have passed."""
    clock = time.perf_counter
    start, number = clock(), 0
    medians: list[float] = []
    while True:
        window = clock()
        times: list[float] = []
        while len(times) < _WINDOW_QUERIES or clock() - window < least / 3:
            before = clock()
            model.run(queries[number % len(queries)])
            times.append(clock() - before)
            number += 1
            if clock() - start > limit:
                break
        medians.append(sorted(times)[len(times) // 2])
        last = medians[-3:]
        if len(last) == 3 and max(last) - min(last) <= _AGREEMENT * min(last):
            return {"steady": True, "queries": number, "seconds": clock() - start}
        if clock() - start > limit:
            return {"steady": False, "queries": number, "seconds": clock() - start}


def time_queries(model: Any, queries: list[Any], job: dict[str, Any], kept: tuple[Any, Any]) -> tuple[Any, bool]:
    """Run one query after the other until both the queries and the seconds of the job are reached.

    Returns int64 (n,) nanoseconds and whether both were reached before ``max_seconds``. Keeping an output is not timed.
    """
    import numpy as np

    clock = time.perf_counter_ns
    batch = len(queries[0])
    samples: list[int] = []
    gc.collect()
    gc.disable()
    start = clock()
    least, most = start + int(job["seconds"] * 1e9), start + int(job["max_seconds"] * 1e9)
    now = start
    while (len(samples) < job["queries"] or now < least) and now < most:
        index = len(samples) % len(queries)
        before = clock()
        output = model.run(queries[index])
        now = clock()
        samples.append(now - before)
        keep_output(output, index * batch, kept)
    gc.enable()
    return np.array(samples, dtype=np.int64), len(samples) >= job["queries"] and now >= least


def keep_output(output: Any, start: int, kept: tuple[Any, Any]) -> None:
    """Copy the output (B, D) for the images from `start` on into outputs (N, D), and mark them in seen (N,)."""
    outputs, seen = kept
    if output.shape[1:] != outputs.shape[1:] or not len(output):
        raise ValueError("the output has shape %s, expected (N, %d)" % (output.shape, outputs.shape[1]))
    outputs[start : start + len(output)] = output
    seen[start : start + len(output)] = True
