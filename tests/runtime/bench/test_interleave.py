"""Timing in turns: one verdict with `robx bench`, also on a machine that is busy with something else."""

import contextlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from robx.runtime.bench import validity
from robx.runtime.bench.bench import BenchSettings, bench
from robx.runtime.bench.interleave import Interleaved, interleave

CPU = {"provider": "CPUExecutionProvider", "threads": 1}
DISTURBED = {"background_load", "cpu_wait"}


@contextlib.contextmanager
def busy_machine():
    """As many processes as there are cores, each of which computes without end."""
    count = os.cpu_count() or 1
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def codes(reasons):
    return {reason.split(":")[0] for reason in reasons}


class Multiply:
    def __init__(self, size):
        self.matrix = np.random.default_rng(0).normal(size=(size, size)).astype(np.float32)

    def run(self, _):
        return self.matrix @ self.matrix

    def facts(self):
        return CPU


def test_a_ratio_from_a_busy_machine_is_unstable(images):
    with busy_machine():
        timed = interleave({"a": Multiply(128), "b": Multiply(160)}, images, blocks=10, seconds=0.05)
    assert codes(timed.conditions) & {"background_load"}
    assert validity.verdict(timed.reasons("a", "b")) == "UNSTABLE"


def test_bench_and_ab_say_the_same_of_a_busy_machine(call, make_bundle, short_profile):
    first, other = make_bundle("onnx-fp32"), make_bundle("openvino-fp32", runtime="openvino")
    with busy_machine():
        told = json.loads(call("bench", first, other, "--ab", "--profile", "rapid", "--json").output)
        (record,) = bench(BenchSettings(bundles=[first], profile="rapid", processes=1))
    assert told["verdict"] == told["claim"] == record.verdict == "UNSTABLE"
    assert codes(told["reasons"]) & DISTURBED and codes(record.reasons) & DISTURBED


@pytest.mark.parametrize(
    ("facts", "share", "found"),
    [
        (CPU, 0.8, {"cpu_wait"}),
        (CPU, 0.99, set()),
        (CPU, None, set()),
        ({**CPU, "threads": 4}, 0.8, set()),
        ({"provider": "CUDAExecutionProvider", "threads": None}, 0.1, set()),
    ],
)
def test_cpu_time_against_wall_time(facts, share, found):
    steady = np.random.default_rng(0).normal(1_000_000, 5_000, size=100).astype(np.int64)
    assert codes(validity.noise([steady], facts, share)) == found


def test_a_ratio_carries_the_reasons_of_its_own_two_models_alone():
    timed = Interleaved({}, ("steal: x",), {"a": ("drift: y",), "b": (), "c": ("high_cov: z",)})
    assert timed.reasons("a", "b") == ["steal: x", "drift: y (a)"]
    assert timed.reasons() == ["steal: x", "drift: y (a)", "high_cov: z (c)"]
