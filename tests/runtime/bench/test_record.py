"""A record has its processes' worst values, and nothing about itself that the device invented."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from robx.records import load_bundle
from robx.runtime.bench.inputs import load_inputs
from robx.runtime.bench.profiles import BenchSettings
from robx.runtime.bench.record import Origin, Run, Try, make_record, other_cpu
from robx.runtime.bench.reference import Reference, check_outputs
from robx.runtime.bench.results import ProcessResult
from robx.runtime.bench.runners import Runner


@pytest.fixture
def record(make_bundle):
    """record(outputs of each process...) -> the record of an emulated ssh device that claims to be this machine."""
    folder = make_bundle()
    inputs = load_inputs(load_bundle(folder).preprocessing, None, count=4)
    expected = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)

    def make(*noises):
        device = {"emulated": "qemu", "kind": "local", "address": "here", "cpu": {"cores": 1}}
        report = {"timed": False, "device": device, "facts": {}, "cores": [0], "environment": {}}
        nothing = np.empty(0, dtype=np.int64)
        results = [ProcessResult(report, nothing, expected + noise, np.ones(4, bool), []) for noise in noises]
        run = Run(folder, load_bundle(folder), inputs, "b0", 1, "x", [Try(results)])
        runner = Runner(kind="python", command=("python3",))
        return make_record(
            run,
            BenchSettings(bundles=[folder], device="ssh://box"),
            Origin(kind="ssh", started="2026-01-01T00:00:00", runner=runner),
            reference=Reference(expected, "x", False),
        )

    return make


def test_the_cosines_are_those_of_the_worst_process(record):
    noise = np.float32(0.02) * np.arange(32, dtype=np.float32).reshape(4, 8) % 1
    alone = record(noise).values
    for order in ((noise, 0 * noise), (0 * noise, noise), (0 * noise, noise, 0 * noise)):
        assert record(*order).values == alone
    assert alone["output_cosine_min"].value < 0.999 < record(0 * noise).values["output_cosine_min"].value


def test_a_device_cannot_claim_how_it_was_reached(record):
    device = record(np.float32(0)).device
    assert (device["kind"], device["address"]) == ("ssh", "ssh://box")
    assert device["emulated"] == "qemu"


def test_equal_images_may_have_equal_outputs():
    """Correct outputs are equal then, and a wrong one is still detected."""
    bundle, seen = SimpleNamespace(precision="fp32", rungs=()), np.ones(4, bool)
    expected = np.tile(np.random.default_rng(0).normal(size=8).astype(np.float32), (4, 1))
    values, reasons = check_outputs(expected + 1e-6, seen, Reference(expected, "x", False), bundle)
    assert not reasons and values["output_cosine"].value == pytest.approx(1)
    _, reasons = check_outputs(-expected, seen, Reference(expected, "x", False), bundle)
    assert "mean cosine" in reasons[0]


VNNI = {"arch": "x86_64", "model": "Xeon", "flags": ["avx2", "avx512_vnni", "fma"]}


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ({"arch": "x86_64", "cpu": {"flags": ["avx2", "avx512_vnni"]}}, None),  # other flags do not matter to int8
        (
            {"arch": "x86_64", "cpu": {"flags": ["avx2"]}},
            "avx2, avx512_vnni, but measured on x86_64 with avx2:",
        ),
        ({"arch": "aarch64", "cpu": {"flags": ["asimd", "asimddp"]}}, "measured on aarch64 with asimddp:"),
        ({"arch": "aarch64", "cpu": {"flags": []}}, "measured on aarch64 with no int8 instructions:"),
        ({"arch": "x86_64", "cpu": {"cores": 1}}, None),
        ({}, None),
        ({"arch": "x86_64", "cpu": {"flags": "avx2"}}, None),
    ],
)
def test_an_int8_bundle_chosen_on_another_kind_of_cpu_is_reported(device, words):
    told = other_cpu(SimpleNamespace(precision="int8", chosen_on=VNNI), device)
    assert told is None if words is None else words in told
    assert other_cpu(SimpleNamespace(precision="fp32", chosen_on=VNNI), device) is None
    assert other_cpu(SimpleNamespace(precision="int8", chosen_on={}), device) is None
    assert other_cpu(SimpleNamespace(precision="int8", chosen_on={"arch": 3, "flags": {}}), device) is None


def test_bench_reports_the_other_cpu(make_bundle, call):
    folder = make_bundle("onnx-int8", precision="int8")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["chosen_on"] = {"arch": "riscv64", "model": "x", "flags": ["avx2"]}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    done = call("bench", folder, "--profile", "rapid")
    assert "chosen by its speed on riscv64 with avx2, but measured on" in " ".join(done.output.split())
