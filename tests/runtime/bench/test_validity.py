"""Each way in which a benchmark can go wrong has its own reason, and a quiet one has none."""

import dataclasses

import numpy as np
import pytest

from robx.errors import InputError
from robx.runtime.bench import validity
from robx.runtime.bench.profiles import PROFILES, find_profile

RAPID = PROFILES["rapid"]
QUIET = {"samples": 10, "steal": 0.0, "background": 0.09, "khz_first": 1000, "khz_min": 990, "cooling": False}


def result(**changes):
    base = {
        "window": [0.0, 3.0],
        "wall_seconds": 3.0,
        "warm_up": {"steady": True},
        "cool_down": {"reached": True},
        "facts": {"provider": "CPUExecutionProvider", "fallback": False, "threads": 1},
        "device": {"emulated": None, "cpu": {"cores": 4}},
        "throttled": None,
        "gpu": None,
    }
    return base | changes


def samples(seed=0, n=100):
    return np.random.default_rng(seed).normal(1_000_000, 5_000, size=n).astype(np.int64)


def judge(results=None, runs=None, digests=None, profile=RAPID):
    results = results or [result(), result()]
    runs = runs or [samples(i) for i in range(len(results))]
    digests = digests or [QUIET] * len(results)
    reasons = validity.judge(results, runs, digests, profile=profile, processes=2, threads=1)
    return validity.verdict(reasons), [reason.split(":")[0] for reason in reasons]


def test_a_quiet_run_is_valid():
    assert judge() == ("VALID", [])


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"device": {"emulated": "qemu", "cpu": {"cores": 4}}}, "emulated"),
        ({"facts": {"provider": "CPUExecutionProvider", "fallback": True, "threads": 1}}, "cpu_fallback"),
        ({"facts": {"provider": "CPUExecutionProvider", "fallback": False, "threads": 0}}, "auto_threads"),
        ({"facts": {"provider": "xnnpack", "fallback": False, "threads": None}}, "auto_threads"),
        ({"facts": {"provider": "CPUExecutionProvider", "fallback": False, "threads": 2}}, "auto_threads"),
        ({"wall_seconds": 9.0}, "clock_changed"),
        ({"window": [0.0, 1.0], "wall_seconds": 1.0}, "min_duration"),
    ],
)
def test_what_makes_it_invalid(change, code):
    assert judge([result(), result(**change)]) == ("INVALID", [code])


def test_too_few_queries_or_processes():
    assert judge(runs=[samples(n=20), samples(n=20)])[1] == ["min_queries"]
    assert judge([result(window=[0, 6], wall_seconds=6.0)]) == ("INVALID", ["incomplete"])
    assert validity.judge([], [], [], profile=RAPID, processes=2, threads=1)[0].startswith("incomplete: 0 of 2")


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"steal": 0.02}, "steal"),
        ({"background": 0.12}, "background_load"),
        ({"khz_min": 900}, "freq_drop"),
        ({"cooling": True}, "platform_throttle"),
        ({"cgroup_throttled": 2}, "cgroup_throttle"),
        ({"samples": 1}, "no_telemetry"),
    ],
)
def test_machine_conditions_that_make_it_unstable(change, code):
    assert judge(digests=[QUIET, QUIET | change]) == ("UNSTABLE", [code])


def test_unsteady_latencies():
    rising = (samples() * np.linspace(1, 1.1, 100)).astype(np.int64)
    assert judge(runs=[samples(), rising]) == ("UNSTABLE", ["drift"])
    noisy = np.random.default_rng(0).choice([700_000, 1_000_000, 1_300_000], size=500)
    assert judge(runs=[noisy, noisy])[1] == ["high_cov"]
    assert judge(runs=[samples(), (1.2 * samples()).astype(np.int64)])[1] == ["process_spread"]
    assert judge([result(), result(warm_up={"steady": False})])[1] == ["not_steady"]


def test_a_gpu_is_held_to_less_noise():
    noise = np.random.default_rng(0).normal(1_000_000, 70_000, size=2000).astype(np.int64)
    runs = [noise, noise]
    assert judge(runs=runs)[1] == []
    gpu = result(facts={"provider": "CUDAExecutionProvider", "fallback": False, "threads": None})
    assert judge([gpu, gpu], runs=runs)[1] == ["high_cov"]
    xnnpack = result(facts={"provider": "xnnpack", "fallback": False, "threads": 1})
    assert judge([xnnpack, xnnpack], runs=runs)[1] == [], "XNNPACK is the processor"


def test_throttling_reported_by_the_firmware():
    assert judge([result(), result(throttled=["under-voltage"])])[1] == ["platform_throttle"]
    held = {"before": {"throttled": []}, "after": {"throttled": ["power brake"]}}
    assert judge([result(), result(gpu=held)]) == ("UNSTABLE", ["platform_throttle"])
    assert judge([result(gpu={**held, "after": {"throttled": []}})] * 2)[1] == []


def test_cool_down_counts_only_in_profiles_that_wait():
    hot = result(cool_down={"reached": False})
    assert judge([hot, hot])[1] == []
    waiting = dataclasses.replace(RAPID, cool_down_seconds=60)
    assert judge([hot, hot], profile=waiting)[1] == ["not_cooled"]


def test_profiles_have_the_lengths_of_the_rules():
    assert (PROFILES["rapid"].queries, PROFILES["rapid"].seconds) == (64, 6)
    assert (PROFILES["quick"].queries, PROFILES["quick"].seconds) == (128, 10)
    assert PROFILES["standard"].queries >= 1024 and PROFILES["standard"].seconds >= 60
    assert PROFILES["standard"].processes >= 3
    assert PROFILES["mlperf"].seconds >= 600
    with pytest.raises(InputError, match="rapid, quick, standard, mlperf"):
        find_profile("fast")
