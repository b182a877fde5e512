"""Summarise the telemetry of a timed run: pure functions of the snapshots taken by runtime/device/watch.py."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

from robx.errors import DeviceError
from robx.runtime.bench import result_schema


def parse(text: str) -> list[dict[str, Any]]:
    """The snapshots of a telemetry file; a truncated or malformed line is left out."""
    found = []
    for line in text.splitlines():
        with contextlib.suppress(DeviceError):
            found.append(result_schema.check(result_schema.parse(line), result_schema.Snapshot, "snapshot"))
    return found


def within(snapshots: Sequence[dict[str, Any]], window: Sequence[float]) -> list[dict[str, Any]]:
    """The snapshots of the timed window, from the last one before it to the first one after it (monotonic seconds)."""
    before = [s for s in snapshots if s["t"] < window[0]][-1:]
    during = [s for s in snapshots if window[0] <= s["t"] <= window[1]]
    after = [s for s in snapshots if s["t"] > window[1]][:1]
    return before + during + after


def digest(snapshots: Sequence[dict[str, Any]], *, cores: int) -> dict[str, Any]:
    """Shares and extremes over the window; None where the device does not report one.

    ``steal`` and ``background`` are fractions of one core: time taken by the hypervisor and by other processes.
    """
    if len(snapshots) < 2:
        return {"samples": len(snapshots)}
    first, last = snapshots[0], snapshots[-1]
    shares = _shares(first, last, cores)
    # The fastest core: idle ones reduce their clock, as they should.
    speeds = [max(s["khz"]) for s in snapshots if s.get("khz")]
    heat = [max(s["celsius"]) for s in snapshots if s.get("celsius")]
    power = [s["milliwatt"] for s in snapshots if s.get("milliwatt") is not None]
    throttled = [s["cgroup_throttled"] for s in (first, last) if s.get("cgroup_throttled") is not None]
    return {
        "samples": len(snapshots),
        **shares,
        "khz_first": speeds[0] if speeds else None,
        "khz_min": min(speeds) if speeds else None,
        "celsius_first": heat[0] if heat else None,
        "celsius_max": max(heat) if heat else None,
        "cooling": any(max(s["cooling"], default=0) > max(first["cooling"], default=0) for s in snapshots),
        "cgroup_throttled": throttled[1] - throttled[0] if len(throttled) == 2 else None,
        "watts": sum(power) / len(power) / 1000 if power else None,
    }


def joules(energy: Mapping[str, Any]) -> tuple[float | None, str]:
    """Joules between the two readings of a counter, or None and the reason."""
    before, after = energy["before"], energy["after"]
    if before["joules"] is None or after["joules"] is None:
        return None, str(before["reason"] or after["reason"])
    used = after["joules"] - before["joules"]
    if not math.isfinite(used) or used < 0:
        return None, "the energy counter decreased"
    return used, ""


def _shares(first: dict[str, Any], last: dict[str, Any], cores: int) -> dict[str, float | None]:
    old, new = first.get("jiffies"), last.get("jiffies")
    if not old or not new or new["total"] <= old["total"]:
        return {"steal": None, "background": None}
    elapsed = (new["total"] - old["total"]) / cores
    busy = new["busy"] - old["busy"] - (last.get("own", 0) - first.get("own", 0))
    return {"steal": (new["steal"] - old["steal"]) / elapsed, "background": max(0.0, busy / elapsed)}
