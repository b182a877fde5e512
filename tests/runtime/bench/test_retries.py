"""An UNSTABLE figure is measured again, if its reason may pass, within a bounded time; the record lists all tries."""

import json

import numpy as np
import pytest

from robx.records import load_measurements
from robx.runtime.bench import ab, profiles, validity
from robx.runtime.bench.bench import BenchSettings, bench
from robx.runtime.bench.interleave import Interleaved
from robx.runtime.bench.record import Try
from robx.store.files import sha256_file


@pytest.fixture
def script(monkeypatch, short_profile):
    """script([reasons of the first try], [of the second], ...): what every measurement finds, of one bundle."""
    monkeypatch.setattr(profiles, "RETRY_SECONDS", 600.0)

    def use(*found):
        known, left = {}, iter(found)

        def reasons(self, _):
            if not self.results:
                return ["failed: x"]
            if id(self) not in known:
                known[id(self)] = self, list(next(left))
            return known[id(self)][1]

        monkeypatch.setattr(Try, "reasons", reasons)

    return use


def run(folder, **settings):
    (record,) = bench(BenchSettings(bundles=[folder], profile="rapid", processes=1, **settings))
    return record


def test_a_disturbed_measurement_is_repeated_until_it_is_valid(make_bundle, script):
    script(["drift: 4 %"], ["background_load: 30 %", "drift: 5 %"], [])
    folder = make_bundle()
    record = run(folder)
    assert record.verdict == "VALID" and record.reasons == ()
    tries = record.settings["tries"]
    assert [one["verdict"] for one in tries] == ["UNSTABLE", "UNSTABLE", "VALID"]
    assert [one["recorded"] for one in tries] == [False, False, True]
    assert tries[1]["reasons"] == ["background_load: 30 %", "drift: 5 %"]
    assert load_measurements(folder / "measurements.jsonl") == [record]
    with np.load(folder / record.samples) as arrays:
        assert float(np.median(arrays["process_0"])) / 1e6 == tries[2]["process_p50_ms"][0]
    assert sha256_file(folder / record.samples) == record.samples_sha256
    assert record.values["p50"].value == pytest.approx(tries[2]["process_p50_ms"][0])


@pytest.mark.parametrize(
    ("found", "settings", "count", "recorded"),
    [
        ([[]], {}, 1, 0),
        ([["drift: a", "steal: b"], ["drift: a"], ["drift: a", "steal: b"]], {}, 3, 1),
        ([["drift: a"], ["min_queries: b"], []], {}, 2, 0),  # an INVALID try is not repeated, and not taken
        ([["platform_throttle: a"]], {}, 1, 0),
        ([["drift: a", "cgroup_throttle: a"]], {}, 1, 0),
        ([["output_mismatch: a"]], {}, 1, 0),
        ([["drift: a"]], {"retries": 0}, 1, 0),
        ([["drift: a"], ["drift: a"]], {"retries": 1}, 2, 0),
    ],
)
def test_what_is_repeated_and_which_try_counts(make_bundle, script, found, settings, count, recorded):
    script(*found)
    record = run(make_bundle(), **settings)
    assert list(record.reasons) == found[recorded]
    if count == 1:
        assert record.settings["tries"] == []
    else:
        assert [one["recorded"] for one in record.settings["tries"]] == [i == recorded for i in range(count)]


def test_repeating_is_bounded_in_time(make_bundle, script, monkeypatch):
    monkeypatch.setattr(profiles, "RETRY_SECONDS", 0.1)
    script(["drift: a"])
    assert run(make_bundle()).settings["tries"] == []


def test_only_the_disturbed_bundle_is_measured_again(make_bundle, script, call):
    script(["drift: 4 %"], [], [])
    folders = [make_bundle("a"), make_bundle("b")]
    notes = []
    settings = BenchSettings(bundles=folders, profile="rapid", processes=1)
    records = bench(settings, progress=lambda *step: notes.append(step[2]))
    assert sorted(len(record.settings["tries"]) for record in records) == [0, 2]
    assert sum(note.endswith(" again (drift)") for note in notes) == 1


def test_the_command_says_how_often_it_measured(make_bundle, script, call):
    script(["drift: 4 %"], [])
    result = call("bench", make_bundle(), "--profile", "rapid", "--processes", 1)
    assert "onnx-fp32: measured 2 times (UNSTABLE, VALID)" in result.output


def test_an_ab_comparison_is_repeated_too(make_bundle, call, short_profile, monkeypatch):
    monkeypatch.setattr(profiles, "RETRY_SECONDS", 600.0)
    found = iter([("drift: x", "steal: y"), ("drift: x",), ("steal: y", "drift: x")])

    def interleave(sessions, *_, **__):
        blocks = {name: [np.full(5, 1000 + i, np.int64) for i in range(20)] for name in sessions}
        return Interleaved(blocks, next(found), dict.fromkeys(sessions, ()))

    monkeypatch.setattr(ab, "interleave", interleave)
    told = json.loads(call("bench", make_bundle("a"), make_bundle("b"), "--ab", "--json").output)
    assert told["reasons"] == ["drift: x"] and told["verdict"] == told["claim"] == "UNSTABLE"
    assert len(told["tries"]) == 3 and told["ratio"]["value"] == 1
    found = iter([("drift: x",)] * 3)
    shown = " ".join(call("bench", make_bundle("e"), make_bundle("f"), "--ab").output.split())
    assert "is not reliable, UNSTABLE" in shown and "x the latency of" not in shown
    found = iter([()])
    told = json.loads(call("bench", make_bundle("c"), make_bundle("d"), "--ab", "--json").output)
    assert told["tries"] == [] and told["claim"] == "no difference shown"


def test_passing_reasons_are_unstable_ones():
    assert not validity.PASSING & validity.INVALIDATING
    assert not validity.is_passing([]) and validity.is_passing(["drift: x", "steal: y"])
