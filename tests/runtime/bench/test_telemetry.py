"""Summaries of telemetry snapshots, and lines that do not count as one."""

import json

import pytest

from robx.runtime.bench import telemetry


def test_joules_between_two_readings():
    before = {"joules": 19.0, "reason": None}
    assert telemetry.joules({"before": before, "after": {**before, "joules": 23.0}}) == (4.0, "")
    assert telemetry.joules({"before": before, "after": {**before, "joules": 3.0}})[0] is None
    none = {"joules": None, "reason": "why"}
    assert telemetry.joules({"before": none, "after": none}) == (None, "why")


def snapshot(t, *, busy=0, steal=0, total=0, own=0, khz=(), celsius=(), cooling=(0,), throttled=None):
    return {
        "t": t,
        "jiffies": {"busy": busy, "steal": steal, "total": total},
        "own": own,
        "khz": list(khz),
        "celsius": list(celsius),
        "cooling": list(cooling),
        "cgroup_throttled": throttled,
        "milliwatt": None,
    }


def test_the_digest_counts_other_processes():
    # Four cores for ten seconds of 100 jiffies: 4000 in all. This process used one core, others half of one.
    first = snapshot(0, khz=(600, 1500), celsius=(40, 45), throttled=3)
    last = snapshot(10, busy=1500, steal=20, total=4000, own=1000, khz=(600, 900), celsius=(50, 61), throttled=5)
    digest = telemetry.digest([first, last], cores=4)
    assert digest["background"] == pytest.approx(0.5)
    assert digest["steal"] == pytest.approx(0.02)
    assert (digest["khz_first"], digest["khz_min"]) == (1500, 900)
    assert digest["celsius_max"] == 61
    assert digest["cgroup_throttled"] == 2
    assert not digest["cooling"]


def test_the_digest_of_a_device_that_reports_nothing():
    empty = {"t": 0.0, "jiffies": None, "khz": [], "celsius": [], "cooling": [], "cgroup_throttled": None}
    digest = telemetry.digest([empty, {**empty, "t": 1.0}], cores=1)
    assert digest["background"] is None and digest["khz_min"] is None and digest["watts"] is None
    assert telemetry.digest([], cores=1) == {"samples": 0}


def test_only_the_timed_window_counts():
    snapshots = [{"t": float(t)} for t in range(10)]
    assert [s["t"] for s in telemetry.within(snapshots, (2.5, 5.5))] == [2, 3, 4, 5, 6]


def test_a_truncated_line_is_left_out():
    whole = snapshot(1.0, own=3)
    line = json.dumps(whole)
    odd = ["[]", '{"t": "x"}', line.replace("1.0", "NaN"), line.replace("[0]", '["hot"]'), line[:-2]]
    assert telemetry.parse("\n".join([line, *odd])) == [whole]
