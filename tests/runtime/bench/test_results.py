"""Memory and energy of a record, from the runners' counters; expected sums are computed by hand."""

import numpy as np
import pytest

from robx.runtime.bench.results import ProcessResult, figures

NONE = {"joules": None, "reason": "no counter"}


def counter(joules, **more):
    return {"joules": joules, "reason": None, **more}


def gpu(joules, memory, *, reason=None):
    return counter(joules, memory=memory, throttled=[], reason=reason)


def process(*, window=(0.0, 6.0), queries=100, energy=(NONE, NONE), on_gpu=None, memory=(10, 30, 50), watts=None):
    before, now, peak = memory
    report = {
        "timed": True,
        "load_ns": 5_000_000,
        "first_ns": 7_000_000,
        "window": list(window),
        "energy": {"before": energy[0], "after": energy[1]},
        "gpu": {"before": on_gpu[0], "after": on_gpu[1]} if on_gpu else None,
        "memory_before": {"now": before * 10**6, "peak": before * 10**6},
        "memory": {"now": now * 10**6, "peak": peak * 10**6},
        "device": {"cpu": {"cores": 1}},
    }
    snapshot = {"t": 1.0, "jiffies": None, "khz": None, "celsius": None, "cooling": [], "cgroup_throttled": None}
    snapshots = [{**snapshot, "t": t, "milliwatt": watts and 1000 * watts, "own": 0} for t in window]
    samples = np.full(queries, 1_000_000)
    return ProcessResult(report, samples, np.empty((0, 0)), np.empty(0, dtype=bool), snapshots)


def test_memory_is_the_peak_and_the_models_share():
    values, missing = figures([process(), process(memory=(12, 30, 60))], batch=1)
    assert (values["peak_memory"].low, values["peak_memory"].high) == (50, 60)
    assert (values["model_memory"].low, values["model_memory"].high) == (40, 48)
    assert values["load"].value == 5 and values["first"].value == 7
    untold = process()
    untold.report["memory_before"] = None
    values, missing = figures([process(), untold], batch=1)
    assert "peak_memory" not in values and "VmHWM" in missing["peak_memory"]


def test_energy_per_image_from_a_counter_or_from_rails():
    counted = [process(energy=(counter(100.0), counter(130.0))), process(energy=(counter(5.0), counter(15.0)))]
    values, _ = figures(counted, batch=4)
    assert values["energy"].value == pytest.approx(40 / 800) and values["energy"].unit == "J"
    values, _ = figures([process(watts=5.0), process(watts=7.0)], batch=1)
    assert values["energy"].value == pytest.approx((5 * 6 + 7 * 6) / 200)
    values, missing = figures([process(), process()], batch=1)
    assert "energy" not in values and missing["energy"] == "no counter"
    values, missing = figures([process(window=(0, 4), watts=5.0)], batch=1)
    assert "energy" not in values and "4 s" in missing["energy"]


def test_a_gpus_memory_and_energy():
    readings = [(gpu(10.0, None), gpu(16.0, 300_000_000)), (gpu(16.0, None), gpu(20.0, 500_000_000))]
    values, missing = figures([process(on_gpu=pair) for pair in readings], batch=1)
    assert values["gpu_energy"].value == pytest.approx(10 / 200)
    assert (values["gpu_memory"].value, values["gpu_memory"].high) == (400, 500)
    assert not {"gpu_energy", "gpu_memory"} & set(missing)
    silent = (gpu(None, None, reason="Not Supported"), gpu(None, None, reason="Not Supported"))
    values, missing = figures([process(on_gpu=readings[0]), process(on_gpu=silent)], batch=1)
    assert not {"gpu_energy", "gpu_memory"} & set(values)
    assert missing["gpu_energy"] == missing["gpu_memory"] == "Not Supported"
    restarted = (gpu(90.0, 1), gpu(1.0, 1))  # the driver was loaded again
    _, missing = figures([process(on_gpu=restarted)], batch=1)
    assert missing["gpu_energy"] == "the energy counter decreased"


def test_a_cpu_measurement_reports_no_gpu():
    values, missing = figures([process()], batch=1)
    assert not {"gpu_energy", "gpu_memory"} & (set(values) | set(missing))
