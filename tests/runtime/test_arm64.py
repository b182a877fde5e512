"""An arm64 device, emulated: the aarch64 wheel gives the same answers, and its times are refused.

Skipped without ROBX_ARM64_ROOT; tests/runtime/arm64_device.py makes what it names.
"""

import os
from pathlib import Path

import pytest

from robx.runtime.bench import BenchOptions, bench
from robx.runtime.doctor import examine

ROOT = os.environ.get("ROBX_ARM64_ROOT")
pytestmark = pytest.mark.skipif(not ROOT, reason="ROBX_ARM64_ROOT is not set (tests/runtime/arm64_device.py makes one)")


@pytest.fixture
def python():
    return str(Path(ROOT or "") / "python")


def test_the_doctor_knows_that_it_is_emulated(python):
    facts, findings = examine("local", python=python)
    assert facts["arch"] == "aarch64" and facts["emulated"]
    assert next(f for f in findings if f.name == "onnxruntime").version


def test_its_answers_are_the_hosts_and_its_times_are_refused(python, make_bundle, short_profile):
    folder = make_bundle()
    (record,) = bench([folder], BenchOptions(profile="rapid", python=python))
    assert record.device["arch"] == "aarch64"
    assert record.verdict == "INVALID" and [r.split(":")[0] for r in record.reasons] == ["emulated"]
    assert record.values["output_cosine_min"].value > 0.99999
    assert "p50" not in record.values and record.samples is None
    assert not list(folder.glob("samples-*"))
