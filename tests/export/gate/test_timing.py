"""The gate's timing: the same validity as `robx bench`, and what a disturbed measurement may still decide."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from robx.export.build import ExportSettings, export
from robx.export.commands import _candidate_row
from robx.export.gate.gate import Limits
from robx.export.request import ExportTarget
from robx.records import Bundle
from robx.runtime.bench.interleave import Interleaved

LOAD = ("background_load: other processes took 95 % of a core",)


class Machine:
    """Stands for `interleave`: latencies by name in ms, with a disturbance in the first `disturbed` measurements."""

    def __init__(self, milliseconds: Mapping[str, float], *, disturbed: int) -> None:
        self.milliseconds, self.disturbed, self.calls = milliseconds, disturbed, list[int]()

    def __call__(self, sessions: Mapping[str, Any], _: np.ndarray, *, blocks: int, **__: Any) -> Interleaved:
        self.calls.append(blocks)
        found = {}
        for place, name in enumerate(sessions):
            level = 1e6 * self.milliseconds.get(name, self.milliseconds["candidate"])
            random = np.random.default_rng(place)
            found[name] = [(level * random.lognormal(0, 0.01, 20)).astype(np.int64) for _ in range(blocks)]
        return Interleaved(found, LOAD if len(self.calls) <= self.disturbed else (), dict.fromkeys(sessions, ()))


@pytest.fixture(autouse=True)
def quiet_machine() -> None:
    """Not here: these tests say themselves what the machine does."""


def _export(run: Path, data: Path, out: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    monkeypatch.setattr("robx.runtime.bench.interleave.interleave", machine)
    target = ExportTarget(format="onnx", precision="int8")
    limits = Limits(max_drop=60)
    return export(
        ExportSettings(run=run, target=target, data=data, out=out, limits=limits, candidates=1, calibration_images=32)
    )


FAST, SLOW = {"candidate": 2.0, "fp32": 6.0, "fp16": 5.0}, {"candidate": 7.0, "fp32": 6.0, "fp16": 5.0}


def test_int8_on_a_busy_machine_is_not_a_pass(
    cnn_run: Path, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is accurate and looks fast, so it ships, with the verdict INCONCLUSIVE and the reason."""
    machine = Machine(FAST, disturbed=99)
    bundle = _export(cnn_run, scenes, tmp_path / "b", machine, monkeypatch)
    assert (bundle.precision, bundle.verdict) == ("int8", "INCONCLUSIVE")
    (kept,) = [rung for rung in bundle.rungs if rung.kept]
    assert (kept.accuracy, kept.speed) == ("PASS", "INCONCLUSIVE")
    assert "timing UNSTABLE: background_load: other processes took 95 %" in kept.reason
    assert "x fp32" not in kept.reason  # kept in the record, not quoted
    assert kept.values["speedup_fp32"].value == pytest.approx(3, rel=0.02)
    assert _candidate_row(kept)[5:7] == ("not reliable", "not reliable")
    assert "quiet machine" in bundle.reason
    assert machine.calls == [10, 30]  # measured again, once, before it is called UNSTABLE


def test_a_disturbance_that_ends_is_measured_away(
    cnn_run: Path, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = _export(cnn_run, scenes, tmp_path / "b", Machine(FAST, disturbed=1), monkeypatch)
    (kept,) = [rung for rung in bundle.rungs if rung.kept]
    assert (bundle.precision, bundle.verdict, kept.speed) == ("int8", "PASS", "PASS")
    assert kept.values["speedup_fp32"].n == 30 and "UNSTABLE" not in bundle.reason  # of the quiet measurement alone


def test_int8_that_looks_slow_on_a_busy_machine_does_not_ship(
    cnn_run: Path, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = _export(cnn_run, scenes, tmp_path / "b", Machine(SLOW, disturbed=99), monkeypatch)
    assert bundle.precision != "int8" and bundle.requested == "int8"
    assert bundle.rungs[0].speed == "INCONCLUSIVE" and "UNSTABLE" in bundle.rungs[0].reason
