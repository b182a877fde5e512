"""VALID, UNSTABLE or INVALID, and why. Pure.

INVALID: the figure is not what it claims to be (too short, another device, wrong answers). UNSTABLE: it was measured
right on a machine that was not quiet. Every reason starts with a code, a colon, and says what was found:

    failed, incomplete, min_queries, min_duration, emulated, cpu_fallback, auto_threads, output_mismatch, no_reference,
    clock_changed                                                                                    -> INVALID
    not_steady, drift, high_cov, process_spread, freq_drop, platform_throttle, cgroup_throttle, steal, background_load,
    not_cooled, no_telemetry                                                                         -> UNSTABLE
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from robx.records import Validity
from robx.runtime.bench import latency
from robx.runtime.bench.profiles import Profile

INVALIDATING = frozenset(
    {
        *("failed", "incomplete", "min_queries", "min_duration", "emulated", "cpu_fallback", "auto_threads"),
        *("output_mismatch", "no_reference", "clock_changed"),
    }
)
# Limits: a robust CoV above 10 % and a drift of 3 % follow common practice on phones and boards; a GPU is held to more.
MAX_COV_CPU, MAX_COV_ACCELERATOR = 0.10, 0.05
MAX_DRIFT, MAX_SPREAD, MIN_FREQUENCY = 1.03, 1.10, 0.95
MAX_STEAL, MAX_BACKGROUND = 0.01, 0.10  # of one core, however many there are: caches, memory and clocks are shared


def verdict(reasons: Sequence[str]) -> Validity:
    """The verdict that follows from the reasons."""
    codes = {reason.split(":", 1)[0] for reason in reasons}
    if codes & INVALIDATING:
        return "INVALID"
    return "UNSTABLE" if codes else "VALID"


def judge(
    results: Sequence[Mapping[str, Any]],
    samples: Sequence[np.ndarray],
    digests: Sequence[Mapping[str, Any]],
    *,
    profile: Profile,
    processes: int,
    threads: int,
) -> list[str]:
    """Every reason against a bench's figures, from what each of its processes reported.

    Args:
        results: the runner's result of each process that ended well.
        samples: int64 ns (n_i,) of each of them.
        digests: telemetry.digest of each of them.
        profile: what was asked for.
        processes: how many were to run.
        threads: how many the engine was to use.
    """
    reasons = _enough(results, samples, profile, processes)
    if not samples:
        return reasons
    reasons += _engine(results, threads)
    reasons += _steadiness(results, samples)
    if profile.cool_down_seconds and any(not r["cool_down"]["reached"] for r in results):
        reasons.append("not_cooled: the device stayed more than 3 degrees above where it started")
    for digest in digests:
        reasons += _machine(digest)
    flags = {flag for r in results for flag in r["throttled"] or ()}
    flags |= {
        f"GPU {flag}" for r in results for flag in (r["gpu"] or {"after": {"throttled": ()}})["after"]["throttled"]
    }
    if flags:
        reasons.append(f"platform_throttle: the device says {', '.join(sorted(flags))}")
    return _once(reasons)


def _enough(
    results: Sequence[Mapping[str, Any]], samples: Sequence[np.ndarray], profile: Profile, processes: int
) -> list[str]:
    reasons = []
    if len(samples) < processes:
        reasons.append(f"incomplete: {len(samples)} of {processes} processes ended well")
    queries = sum(len(s) for s in samples)
    seconds = sum(r["window"][1] - r["window"][0] for r in results)
    if queries < profile.queries:
        reasons.append(f"min_queries: {queries} of {profile.queries}")
    if seconds < 0.999 * profile.seconds:
        reasons.append(f"min_duration: {seconds:.1f} of {profile.seconds:g} s")
    return reasons


def _engine(results: Sequence[Mapping[str, Any]], threads: int) -> list[str]:
    reasons = []
    for result in results:
        facts = result["facts"]
        if result["device"].get("emulated"):
            reasons.append(f"emulated: {result['device']['emulated']}")
        if facts.get("fallback"):
            reasons.append(f"cpu_fallback: {facts['fallback']}")
        if facts.get("threads") not in (threads, None) or (facts.get("threads") is None and _on_cpu(facts)):
            told = str(facts.get("threads") or "a number of its own")[:40]
            reasons.append(f"auto_threads: the engine was to use {threads} and uses {told}")
        monotonic = result["window"][1] - result["window"][0]
        if abs(result["wall_seconds"] - monotonic) > 0.01 * monotonic + 0.05:
            reasons.append(f"clock_changed: {result['wall_seconds']:.2f} s by the calendar, {monotonic:.2f} s in truth")
    return reasons


def _steadiness(results: Sequence[Mapping[str, Any]], samples: Sequence[np.ndarray]) -> list[str]:
    reasons = []
    restless = sum(not r["warm_up"]["steady"] for r in results)
    if restless:
        reasons.append(f"not_steady: {restless} of {len(results)} warm-ups found no three windows within 2 %")
    if (drift := latency.drift(samples)) > MAX_DRIFT:
        reasons.append(f"drift: a process ended {100 * (drift - 1):.1f} % slower than it began")
    limit = MAX_COV_CPU if _on_cpu(results[0]["facts"]) else MAX_COV_ACCELERATOR
    if (cov := latency.robust_cov(samples)) > limit:
        reasons.append(f"high_cov: the robust coefficient of variation is {100 * cov:.1f} %")
    if (spread := latency.spread(samples)) > MAX_SPREAD:
        reasons.append(f"process_spread: the slowest process took {100 * (spread - 1):.1f} % longer than the fastest")
    return reasons


def _on_cpu(facts: Mapping[str, Any]) -> bool:
    provider = str(facts.get("provider", "")).lower()
    return "cpu" in provider or "xnnpack" in provider


def _machine(digest: Mapping[str, Any]) -> list[str]:
    if digest.get("samples", 0) < 2:
        return ["no_telemetry: the device could not be watched during the run"]
    reasons = []
    if (steal := digest.get("steal")) is not None and steal > MAX_STEAL:
        reasons.append(f"steal: the hypervisor took {100 * steal:.1f} % of a core")
    if (load := digest.get("background")) is not None and load > MAX_BACKGROUND:
        reasons.append(f"background_load: other processes took {100 * load:.0f} % of a core")
    if digest.get("khz_first") and digest["khz_min"] < MIN_FREQUENCY * digest["khz_first"]:
        reasons.append(f"freq_drop: from {digest['khz_first'] / 1e6:.2f} to {digest['khz_min'] / 1e6:.2f} GHz")
    if digest.get("cooling"):
        reasons.append("platform_throttle: a cooling device was switched on")
    if digest.get("cgroup_throttled"):
        reasons.append(f"cgroup_throttle: the container was held back {digest['cgroup_throttled']} times")
    return reasons


def _once(reasons: Sequence[str]) -> list[str]:
    """The first reason of each code, in order."""
    first: dict[str, str] = {}
    for reason in reasons:
        first.setdefault(reason.split(":", 1)[0], reason)
    return list(first.values())
