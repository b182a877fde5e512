"""VALID, UNSTABLE or INVALID, and why. Pure functions.

INVALID: the figure is not what it claims to be (too short a run, another device, wrong outputs). UNSTABLE: correctly
measured, but on a machine that was not quiet. `robx bench`, its --ab and the export gate share `noise` and
`conditions`. Every reason starts with a code and a colon:

    failed, incomplete, min_queries, min_duration, emulated, cpu_fallback, auto_threads, output_mismatch, no_reference,
    clock_changed                                                                                    -> INVALID
    not_steady, drift, high_cov, cpu_wait, process_spread, freq_drop, platform_throttle, cgroup_throttle, steal,
    background_load, not_cooled, no_telemetry                                                        -> UNSTABLE
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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
# Caused by something that may be over in a minute: worth measuring again.
PASSING = frozenset(
    {"not_steady", "drift", "high_cov", "cpu_wait", "process_spread", "freq_drop", "steal", "background_load"}
)
# A robust CoV of 10 % and a drift of 3 % follow common practice on phones and boards; GPUs are steadier.
MAX_COV_CPU, MAX_COV_ACCELERATOR = 0.10, 0.05
MAX_DRIFT, MAX_SPREAD, MIN_FREQUENCY = 1.03, 1.10, 0.95
MAX_STEAL, MAX_BACKGROUND = 0.01, 0.10  # of one core, however many there are: caches, memory and clocks are shared
MIN_CPU_SHARE = 0.95  # CPU time over wall time of a model that computes in one thread


def verdict(reasons: Iterable[str]) -> Validity:
    """The verdict that follows from the reasons."""
    codes = codes_of(reasons)
    if codes & INVALIDATING:
        return "INVALID"
    return "UNSTABLE" if codes else "VALID"


def is_passing(reasons: Iterable[str]) -> bool:
    """Whether there are reasons, and another measurement may have none."""
    codes = codes_of(reasons)
    return bool(codes) and codes <= PASSING


def codes_of(reasons: Iterable[str]) -> set[str]:
    """The codes of the reasons."""
    return {reason.split(":", 1)[0] for reason in reasons}


def is_refused(verdict: str, reasons: Iterable[str]) -> bool:
    """Whether a measurement has to be made again: INVALID, and not only because the processor is emulated."""
    return verdict == "INVALID" and bool(codes_of(reasons) - {"emulated"})


def judge(
    results: Sequence[Mapping[str, Any]],
    samples: Sequence[np.ndarray],
    digests: Sequence[Mapping[str, Any]],
    *,
    profile: Profile,
    processes: int,
    threads: int,
) -> list[str]:
    """Every reason to doubt a benchmark's figures, from the reports of its processes.

    Args:
        results: the runner's result of each process that succeeded.
        samples: int64 ns (n_i,) of each of them.
        digests: telemetry.digest of each of them.
        profile: the requested length.
        processes: the requested number of processes.
        threads: the requested number of threads.
    """
    reasons = _enough(results, samples, profile, processes)
    if not samples:
        return reasons
    reasons += _engine(results, threads)
    unsteady = sum(not r["warm_up"]["steady"] for r in results)
    if unsteady:
        reasons.append(f"not_steady: {unsteady} of {len(results)} warm-ups had no three windows within 2 %")
    shares = [r["cpu_seconds"] / (r["window"][1] - r["window"][0]) for r in results if r.get("cpu_seconds") is not None]
    reasons += noise(samples, results[0]["facts"], min(shares, default=None))
    if (spread := latency.spread(samples)) > MAX_SPREAD:
        reasons.append(f"process_spread: the slowest process took {100 * (spread - 1):.1f} % longer than the fastest")
    if profile.cool_down_seconds and any(not r["cool_down"]["reached"] for r in results):
        reasons.append("not_cooled: the device stayed more than 3 degrees above its temperature at the start")
    for digest in digests:
        reasons += conditions(digest)
    flags = {flag for r in results for flag in r["throttled"] or ()}
    flags |= {
        f"GPU {flag}" for r in results for flag in (r["gpu"] or {"after": {"throttled": ()}})["after"]["throttled"]
    }
    return _first_of_each_code([*reasons, *throttling(flags)])


def noise(samples: Sequence[np.ndarray], facts: Mapping[str, Any], cpu_share: float | None) -> list[str]:
    """Reasons in a model's own latencies.

    Args:
        samples: int64 ns (n_i,) of each process, in the order they were measured.
        facts: `Session.facts` of the model.
        cpu_share: its CPU time divided by its wall time; None where it is unknown.
    """
    reasons = []
    if (drift := latency.drift(samples)) > MAX_DRIFT:
        reasons.append(f"drift: the end was {100 * (drift - 1):.1f} % slower than the beginning")
    limit = MAX_COV_CPU if _on_cpu(facts) else MAX_COV_ACCELERATOR
    if (cov := latency.robust_cov(samples)) > limit:
        reasons.append(f"high_cov: the robust coefficient of variation is {100 * cov:.1f} %")
    one_thread = _on_cpu(facts) and facts.get("threads") == 1
    if one_thread and cpu_share is not None and cpu_share < MIN_CPU_SHARE:
        reasons.append(f"cpu_wait: the model had a CPU core for only {100 * cpu_share:.0f} % of the time")
    return reasons


def conditions(digest: Mapping[str, Any]) -> list[str]:
    """Reasons in what the machine did meanwhile, from `telemetry.digest`."""
    if digest.get("samples", 0) < 2:
        return ["no_telemetry: the device could not be monitored during the run"]
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
        reasons.append(f"cgroup_throttle: the container's CPU limit was reached {digest['cgroup_throttled']} times")
    return reasons


def throttling(flags: Iterable[str]) -> list[str]:
    """The reason in what the platform's firmware or driver reports."""
    names = ", ".join(sorted(flags))
    return [f"platform_throttle: the device reports {names}"] if names else []


def _enough(
    results: Sequence[Mapping[str, Any]], samples: Sequence[np.ndarray], profile: Profile, processes: int
) -> list[str]:
    reasons = []
    if len(samples) < processes:
        reasons.append(f"incomplete: {len(samples)} of {processes} processes succeeded")
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
            used = str(facts.get("threads") or "a number of its own choice")[:40]
            reasons.append(f"auto_threads: {threads} threads were requested and the engine uses {used}")
        monotonic = result["window"][1] - result["window"][0]
        if abs(result["wall_seconds"] - monotonic) > 0.01 * monotonic + 0.05:
            took = f"{result['wall_seconds']:.2f} s by the system clock, {monotonic:.2f} s by the monotonic clock"
            reasons.append(f"clock_changed: {took}")
    return reasons


def _on_cpu(facts: Mapping[str, Any]) -> bool:
    provider = str(facts.get("provider", "")).lower()
    return "cpu" in provider or "xnnpack" in provider


def _first_of_each_code(reasons: Sequence[str]) -> list[str]:
    """The first reason of each code, in order."""
    first: dict[str, str] = {}
    for reason in reasons:
        first.setdefault(reason.split(":", 1)[0], reason)
    return list(first.values())
