"""A report of several devices: side by side, each with its own budgets; emulated ones never decide."""

import json
import re

import pytest
from click.testing import CliRunner

from robx.cli import main
from robx.errors import InputError
from robx.eval.report.collect import collect
from robx.eval.report.devices import device_table
from robx.eval.report.recommend import Budget, advise
from robx.eval.report.render import make_pages, render
from robx.eval.report.rows import build_rows
from robx.records import Value

PHONE = {
    "arch": "aarch64",
    "board": "Nobody Phone 1",
    "os": "Android 15",
    "kind": "adb",
    "cpu": {"model": "X1"},
    "power_source": "battery",
    "battery": {"percent": 91, "charging": False, "celsius": 29.0},
}
QEMU = {"arch": "aarch64", "board": None, "cpu": {"model": "Cortex-A72"}, "emulated": "the process is qemu-aarch64"}
OUTPUTS = {"output_cosine": Value(value=0.99999, n=8), "output_cosine_min": Value(value=0.99998, n=8)}


@pytest.fixture
def write(records, tmp_path):
    """write(device, ms=None, **changes) -> one more Latency of one int8 bundle; without `ms` of an emulated device."""
    student = records.write_run(tmp_path / "r18")
    folder = tmp_path / "r18" / "openvino-int8"
    bundle = records.write_bundle(folder, student, "int8", 11300)
    records.append_measurements(folder / "measurements.jsonl", [records.fidelity(bundle.id, 0.2)])

    def measure(device, ms=None, **changes):
        if ms is None:
            reason = f"emulated: {device.get('emulated') or 'the device was declared to be emulated'}"
            missing = dict.fromkeys(("p50", "p90", "p99"), "emulated")
            none = {"values": OUTPUTS, "verdict": "INVALID", "reasons": (reason,), "missing": missing, "samples": None}
            changes = {**none, "samples_sha256": None, **changes}
        return records.write_latency(folder, bundle.id, ms or 1.0, device=device, **changes)

    measure.root = tmp_path
    return measure


def heated(record):
    """The values of a run of ten minutes, in which the phone got 30 % slower."""
    p90 = record.values["p90"]
    return record.values | {
        "burst": Value(value=9.0, n=900, unit="ms"),
        "sustained": Value(value=11.7, n=5000, unit="ms"),
        "slowdown": Value(value=30.0, n=5000, unit="%"),
        "sustained_p90": Value(value=12.1, high=12.4, n=5000, unit="ms") if p90 else p90,
    }


def table(write):
    data = collect([write.root])
    rows = build_rows(data)
    return device_table(data, rows, advise(rows, protocol=None), None)


def cells(found, device):
    """The texts of the line of a device, by the column's head."""
    line = next(line for line in found.rows if line[0].what.startswith(device))
    return {
        head: f"{c.what.value if isinstance(c.what, Value) else c.what} {c.note}"
        for head, c in zip(found.heads, line, strict=True)
    }


def test_one_device_needs_no_comparison(write, records):
    write(records.PI, 9.7)
    assert table(write) is None


def test_a_pc_a_pi_and_a_phone_side_by_side(write, records):
    write(records.PC, 2.0)
    write({**records.PI, "kind": "ssh"}, 9.7)
    telemetry = [{"celsius_first": 31.0, "celsius_max": 44.5}, {"celsius_first": 40.0, "celsius_max": 47.0}]
    battery = [{"percent": 91, "charging": False, "celsius": 29.0}, {"percent": 88, "charging": False, "celsius": 36.5}]
    settings = {"profile": "mlperf", "threads": 4, "batch": 1, "runner": "native"}
    base = write(PHONE, 9.0, started="2026-11-20T11:59:00Z")
    write(PHONE, 9.0, values=heated(base), settings={**settings, "telemetry": telemetry, "battery": battery})
    found = table(write)
    assert len(found.rows) == 3
    phone = cells(found, "Nobody Phone 1")
    assert "aarch64, Android 15, over adb, native runner" in phone["Device"]
    assert "openvino int8" in phone["Deploy"] and phone["p90 bound"].startswith("12.4")
    assert (phone["Burst p50"], phone["Sustained p50"], phone["Slow-down"]) == ("9.0 ", "11.7 ", "30.0 ")
    assert phone["Heat"].startswith("31.0 to 47.0 °C")
    assert phone["Power"] == "battery battery 91 to 88 %, not charging, 36.5 °C"
    pi = cells(found, "Raspberry Pi 5")
    assert "over SSH" in pi["Device"] and pi["Power"].startswith("–") and "mlperf" in pi["Sustained p50"]
    assert "local" in cells(found, "Some Core i7")["Device"]


def test_heat_that_slowed_the_device_down_is_told(write, records):
    write(records.PC, 2.0)
    settings = {
        "profile": "mlperf",
        "threads": 4,
        "batch": 1,
        "telemetry": [{"celsius_first": 40.0, "celsius_max": 85}],
    }
    reasons = ("platform_throttle: the device reports severe thermal throttling", "drift: slower")
    write(PHONE, 9.0, settings=settings, verdict="UNSTABLE", reasons=reasons)
    phone = cells(table(write), "Nobody Phone 1")
    assert phone["Heat"] == "40.0 to 85.0 °C platform_throttle: the device reports severe thermal throttling"
    assert phone["Deploy"].startswith("no recommendation yet")


@pytest.mark.parametrize("odd", [None, 7, "x", [7, None, {"percent": "x", "celsius_max": None}], {"a": 1}])
def test_odd_records_are_no_failure(write, records, odd):
    write(records.PC, 2.0)
    settings = {"threads": 4, "batch": 1, "telemetry": odd, "battery": odd, "runner": odd}
    write({**PHONE, "battery": odd, "kind": odd, "power_source": odd, "os": odd}, 9.0, settings=settings)
    assert len(table(write).rows) == 2


def test_an_emulated_device_is_never_in_the_headline(write, records):
    write(records.PC, 2.0)
    write(QEMU)
    pages = make_pages(collect([write.root]))
    assert pages.title == "Deploy resnet18 · openvino int8", "as if it had not been measured"
    told = json.loads(pages.json)
    assert [bool(device["emulated"]) for device in told["devices"]] == [False, True]
    assert [one["device"] for one in told["summaries"]] == ["Some Core i7, 4 threads"]
    name = "Cortex-A72, 4 threads, emulated"
    for text in (pages.html, pages.markdown):
        assert text.count(f"On {name}") == 0 and f"Verified on {name}" in text
        assert "its outputs were verified, but no latency was measured" in text
    assert "agree with the reference" in pages.html and "1.0000" in pages.html
    line = next(line for line in pages.markdown.splitlines() if line.startswith(f"| {name}"))
    assert "not timed" in line and not re.search(r"\d ms", line)
    assert not [doubt for doubt in told["doubts"] if doubt[0] == "MISSING" and "p50" in doubt[1]]


def test_only_an_emulated_device(write):
    write(QEMU)
    assert make_pages(collect([write.root])).title == "Nothing to recommend: only emulated devices were measured"


def test_a_declared_emulation_does_not_hide_the_real_device(write, records):
    write(records.PI, 9.7)
    write(records.PI, started="2026-11-21T12:00:00Z")
    pages = make_pages(collect([write.root]))
    assert pages.title == "Deploy resnet18 · openvino int8"
    assert "Verified on Raspberry Pi 5 Model B, 4 threads, emulated" in pages.markdown


def test_wrong_outputs_on_an_emulated_device(write, records):
    write(records.PC, 2.0)
    write(QEMU, reasons=("emulated: qemu", "output_mismatch: cosine 0.1"))
    text = make_pages(collect([write.root])).markdown
    assert "differ (cosine 0.1)" in text


def test_each_device_has_its_own_budgets(write, records, tmp_path):
    write(records.PC, 2.0)
    write(records.PI, 9.7)
    pages = render([write.root], out=tmp_path / "r.html", budgets=["raspberry=12", "CORE I7=1", 100])
    asked = {
        d["device"]: [(a["budget_ms"], bool(a["model_id"])) for a in d["asked"]]
        for d in json.loads(pages.json)["devices"]
    }
    assert asked["Raspberry Pi 5 Model B, 4 threads"] == [(12, True), (100, True)]
    assert asked["Some Core i7, 4 threads"] == [(1, False), (100, True)]
    assert "| 12 ms | resnet18" in pages.markdown and "| 1 ms | no model fits |" in pages.markdown
    with pytest.raises(InputError, match=r"no device has 'pixel' in its name: give a part of one of Raspberry"):
        render([write.root], out=tmp_path / "r.html", budgets=["pixel=12"])
    done = CliRunner().invoke(main, ["report", str(write.root), "-o", str(tmp_path / "x.html"), "--budget", "pi=x"])
    assert done.exit_code == 2 and "budget pi=x is not a latency" in done.stderr


def test_budgets():
    assert Budget.parse("12.5") == Budget.parse(12.5) == Budget(ms=12.5)
    assert Budget.parse("a=b=7") == Budget(ms=7, device="a=b")
    for text in ("", "=", "x", "x=", "0", "-1", "nan", "pi=inf"):
        with pytest.raises(InputError, match="give a number above 0, or DEVICE=MS"):
            Budget.parse(text)
