"""Complete benchmarks on this machine: real models, real processes."""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest

from robx.errors import ArtifactError, DeviceError, InputError
from robx.images.sources import open_source
from robx.records import Preprocessing, Value, load_bundle, load_measurements, to_json
from robx.runtime.bench import interleave, latency
from robx.runtime.bench.bench import BenchSettings, bench
from robx.runtime.bench.inputs import load_inputs
from robx.runtime.bench.profiles import unused_threads
from robx.runtime.session import SessionSettings, open_session
from robx.store.files import sha256_file

QUIET_CODES = {
    "steal",
    "cpu_wait",
    "background_load",
    "drift",
    "high_cov",
    "process_spread",
    "not_steady",
    "cgroup_throttle",
}


def codes(record):
    return {reason.split(":")[0] for reason in record.reasons}


def test_two_engines_side_by_side(make_bundle, short_profile):
    folders = [make_bundle("onnx-fp32"), make_bundle("openvino-fp32", runtime="openvino")]
    seen = []
    records = bench(BenchSettings(bundles=folders, profile="rapid"), progress=lambda *step: seen.append(step))
    assert seen[0][:2] == (0, 4) and seen[-1][:2] == (4, 4)
    for folder, record in zip(folders, records, strict=True):
        # The machine that tests run on is not quiet; nothing else may be wrong.
        assert codes(record) <= QUIET_CODES, record.reasons
        assert record.values["output_cosine"].value > 0.9999
        assert load_measurements(folder / "measurements.jsonl") == [record]
        assert sha256_file(folder / record.samples) == record.samples_sha256
    assert [r.settings["runtime"]["engine"] for r in records] == ["onnxruntime", "openvino"]
    assert all(r.settings["runtime"]["threads"] == 1 for r in records)
    assert all(r.settings["cores"] == sorted(os.sched_getaffinity(0)) for r in records), "not left unsaid"
    assert records[1].settings["runtime"]["input_shape"] == "[1,3,32,32]", "planned for what is timed"


def test_every_figure_can_be_recomputed_from_the_samples(make_bundle, short_profile):
    folder = make_bundle()
    (record,) = bench(BenchSettings(bundles=[folder], profile="rapid"))
    with np.load(folder / record.samples) as arrays:
        runs = [arrays[f"process_{i}"] for i in range(2)]
        assert len(json.loads(str(arrays["telemetry"]))) == 2
    for name, value in latency.summarise(runs).items():
        assert record.values[name] == value
    assert record.values["p50"].value == pytest.approx(np.median(np.concatenate(runs)) / 1e6)
    assert record.values["p50"].n >= short_profile.queries
    assert record.values["first"].value > record.values["p50"].value
    assert record.values["peak_memory"].value > record.values["model_memory"].value > 0
    assert record.values["end_to_end"].value > record.values["preprocess"].value
    assert "10" in record.missing["energy"]


def test_the_p50_agrees_with_a_bare_session(make_bundle, short_profile):
    folder = make_bundle(runtime="onnxruntime", kernel=np.ones((8, 3, 3, 3), np.float32))
    (record,) = bench(BenchSettings(bundles=[folder], profile="rapid"))
    with open_session(folder) as session:
        images = np.random.default_rng(0).normal(size=(4, 3, 32, 32)).astype(np.float32)
        blocks = interleave.interleave({"x": session}, images, blocks=5, seconds=0.1).blocks["x"]
    bare = float(np.median(np.concatenate(blocks))) / 1e6
    assert 0.4 < record.values["p50"].value / bare < 2.5


@pytest.mark.parametrize("fault", ["nan", "constant", "shuffled"])
def test_a_bench_of_a_broken_model_is_never_valid(make_bundle, short_profile, fault):
    right = np.random.default_rng(0).normal(size=(8, 3, 3, 3)).astype(np.float32)
    make_bundle("onnx-fp32", kernel=right)
    broken = {"nan": np.full_like(right, np.nan), "constant": np.zeros_like(right), "shuffled": right[::-1].copy()}
    folder = make_bundle("onnx-int8", precision="int8", kernel=broken[fault])
    (record,) = bench(BenchSettings(bundles=[folder], profile="rapid", processes=1))
    assert record.verdict == "INVALID"
    assert "output_mismatch" in codes(record)


def test_the_reference_is_the_student_in_torch_if_available(make_student_bundle, short_profile):
    (found,) = bench(BenchSettings(bundles=[make_student_bundle()], profile="rapid", processes=1))
    assert found.settings["reference"] == "the fp32 student in torch"
    assert found.values["output_cosine_min"].value > 0.999
    assert "output_mismatch" not in codes(found)


def test_without_a_student_the_fp32_bundle_is_the_reference(make_bundle, short_profile):
    make_bundle("onnx-fp32")
    (record,) = bench(BenchSettings(bundles=[make_bundle("x-int8", precision="int8")], profile="rapid", processes=1))
    assert record.settings["reference"] == "the fp32 bundle onnx-fp32"
    (record,) = bench(BenchSettings(bundles=[make_bundle("alone-fp32")], profile="rapid", processes=1))
    assert record.settings["reference"] == "the same bundle in a session of its own"


def test_a_run_that_is_too_short_is_invalid_and_recorded(make_bundle, monkeypatch, short_profile):
    from robx.runtime.bench.profiles import PROFILES

    monkeypatch.setitem(PROFILES, "rapid", dataclasses.replace(short_profile, queries=10**9, max_seconds=0.5))
    folder = make_bundle()
    (record,) = bench(BenchSettings(bundles=[folder], profile="rapid"))
    assert record.verdict == "INVALID" and "min_queries" in codes(record)
    assert load_measurements(folder / "measurements.jsonl")[0].values["p50"].value > 0


def test_offline_batches_and_fixed_ones(make_bundle, short_profile):
    (record,) = bench(BenchSettings(bundles=[make_bundle()], profile="rapid", processes=1, batch=4))
    assert record.settings["scenario"] == "offline"
    p50 = record.values["mean"].value
    assert record.values["throughput"].value == pytest.approx(4000 / p50, rel=1e-6)
    assert "output_mismatch" not in codes(record)
    with pytest.raises(InputError, match="fixed batch of 2"):
        bench(BenchSettings(bundles=[make_bundle("fixed", batch=2)], profile="rapid", processes=1, batch=4))
    (record,) = bench(BenchSettings(bundles=[make_bundle("two", batch=2)], profile="rapid", processes=1))
    assert record.settings["batch"] == 2


def test_a_device_declared_to_be_emulated(make_bundle, short_profile):
    (record,) = bench(BenchSettings(bundles=[make_bundle()], profile="rapid", emulated=True))
    assert record.verdict == "INVALID" and codes(record) == {"emulated"}
    assert set(record.values) == {"output_cosine", "output_cosine_min"}, "no time at all"
    assert record.values["output_cosine"].value > 0.9999
    assert record.missing["p50"] and record.samples is None
    assert record.settings["process_p50_ms"] == []


def test_affinity_is_respected_and_recorded(make_bundle, short_profile):
    core = min(os.sched_getaffinity(0))
    (record,) = bench(BenchSettings(bundles=[make_bundle()], profile="rapid", processes=1, affinity=(core,)))
    assert record.settings["affinity"] == record.settings["cores"] == [core]
    with pytest.raises(DeviceError, match="2 threads on the cores"):
        pinned = {"affinity": (core,), "session": SessionSettings(threads=2)}
        bench(BenchSettings(bundles=[make_bundle("a")], profile="rapid", processes=1, **pinned))
    with pytest.raises(DeviceError, match="4000"):
        bench(BenchSettings(bundles=[make_bundle("b")], profile="rapid", processes=1, affinity=(4000,)))


def test_a_failing_bundle_does_not_stop_the_others(make_bundle, make_unopenable_bundle, short_profile):
    good, bad = make_bundle("good"), make_unopenable_bundle("bad")
    first, second = bench(BenchSettings(bundles=[good, bad], profile="rapid"))
    assert "failed" not in codes(first)
    assert second.verdict == "INVALID" and "failed" in codes(second) and second.missing["p50"]
    with pytest.raises(DeviceError, match="bad could not be measured on local"):
        bench(BenchSettings(bundles=[bad], profile="rapid"))


def test_settings_that_cannot_be_measured(tmp_path, make_bundle):
    with pytest.raises(InputError, match="no bundle"):
        bench(BenchSettings(bundles=[]))
    with pytest.raises(ArtifactError, match=r"manifest\.json is missing"):
        bench(BenchSettings(bundles=[tmp_path]))
    for wrong in ({"profile": "fast"}, {"processes": 0}, {"batch": 0}):
        with pytest.raises(InputError):
            BenchSettings(bundles=[tmp_path], **wrong)
    with pytest.raises(InputError, match=r"^--image-member is about the images of --data: give --data too$"):
        BenchSettings(bundles=[tmp_path], image_member="rgb.jpg")
    with pytest.raises(InputError, match=r"^--emulated .* times nothing: leave out --processes, --retries$"):
        BenchSettings(bundles=[tmp_path], emulated=True, processes=3, retries=0)


def test_the_users_images_are_used(make_bundle, short_profile, scenes):
    said = []
    given = {"data": scenes / "test", "image_member": "rgb.jpg"}
    (record,) = bench(BenchSettings(bundles=[make_bundle()], profile="rapid", processes=1, **given), say=said.append)
    assert record.settings["images"] == "test"
    assert said == [f"{scenes / 'test'} has no tar shards, so that --image-member rgb.jpg has no effect on it"]


def test_inputs_are_reproducible_and_skip_corrupt_images(tmp_path, scenes):
    preprocessing = Preprocessing(size=36, crop=32)
    first, second = load_inputs(preprocessing, None), load_inputs(preprocessing, None)
    np.testing.assert_array_equal(first.images, second.images)
    assert len(np.unique(first.images.reshape(64, -1), axis=0)) == 64
    (tmp_path / "a.png").write_bytes(b"broken")
    with pytest.raises(InputError, match="none of the images"):
        load_inputs(preprocessing, open_source(tmp_path))
    (tmp_path / "b.png").write_bytes(next((scenes / "test").rglob("*.png")).read_bytes())
    assert load_inputs(preprocessing, open_source(tmp_path)).images.shape == (64, 3, 32, 32)


def test_interleaving_mixes_the_order_and_gives_pairs(make_bundle, images):
    calls = []

    class Recorder:
        def __init__(self, name):
            self.name = name

        def run(self, _):
            calls.append(self.name)
            return _

        def facts(self):
            return {"provider": "cpu", "threads": 1}

    blocks = interleave.interleave({"a": Recorder("a"), "b": Recorder("b")}, images, blocks=12, seconds=0.002).blocks
    assert [len(blocks[name]) for name in "ab"] == [12, 12]
    assert all(
        len(block) >= 5 and block.dtype == np.int64 and (block > 0).all() for b in blocks.values() for block in b
    )
    changes = [call for i, call in enumerate(calls) if i == 0 or calls[i - 1] != call]
    assert 12 < len(changes) < 25, "neither one after the other nor strictly in turn"


def test_a_record_survives_its_json(make_bundle, short_profile):
    (record,) = bench(BenchSettings(bundles=[make_bundle()], profile="rapid", processes=1))
    assert json.loads(json.dumps(to_json(record), allow_nan=False))["values"]["p50"]["unit"] == "ms"
    assert all(isinstance(value, Value) for value in record.values.values())
    assert not any("/" in str(part) for part in Path(record.samples).parent.parts)


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"threads": 2}, "trt-fp32, which does not compute"),
        ({"threads": 1}, ""),
        ({"threads": 2, "provider": "CUDA:1"}, "onnx-fp32, openvino-fp32, trt-fp32, which do not compute"),
        ({"threads": 2, "provider": "xnnpack"}, "trt-fp32, which does not compute"),
    ],
)
def test_bundles_that_threads_have_no_effect_on_are_named(make_bundle, settings, names):
    runtimes = {"onnx-fp32": "onnxruntime", "openvino-fp32": "openvino", "trt-fp32": "tensorrt"}
    folders = [make_bundle(name, runtime=runtime) for name, runtime in runtimes.items()]
    asked = BenchSettings(bundles=folders, session=SessionSettings(**settings))
    wanted = names and f"warning: --threads 2 has no effect on {names} on the CPU"
    assert unused_threads(asked, [load_bundle(folder) for folder in folders]) == wanted


def test_a_bench_says_that_threads_have_no_effect_on_a_gpu(make_bundle, short_profile):
    folders, said = [make_bundle("onnx-fp32"), make_bundle("trt-fp32", runtime="tensorrt")], []
    settings = BenchSettings(bundles=folders, profile="rapid", processes=1, session=SessionSettings(threads=2))
    bench(settings, say=said.append)
    assert said == ["warning: --threads 2 has no effect on trt-fp32, which does not compute on the CPU"]
