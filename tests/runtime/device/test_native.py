"""The native runner, built by CMake, on the library in ONNX Runtime's wheel, against runner.py.

It is skipped without CMake and a C++ compiler. A second build has the address and undefined-behaviour sanitizers.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from robx.records import Normalisation, TensorSpec, load_bundle
from robx.runtime import device
from robx.runtime.bench import native_runner, runner_zip
from robx.runtime.bench.bench import BenchSettings, bench
from robx.runtime.bench.results import read_result
from robx.runtime.device import describe
from robx.runtime.device_build import build
from robx.runtime.doctor import examine
from tests.runtime.conftest import script, seal, weights

pytestmark = pytest.mark.skipif(
    not shutil.which("cmake") or not shutil.which("c++"), reason="no cmake and C++ compiler (Debian: cmake, g++)"
)
SOURCES = Path(device.__file__).parent / "native"


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """The folder of the runner and the libraries for this machine, as robx device build makes it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        abi = native_runner.device_abi(os.uname().machine)
        build(abi)
        return native_runner.native_folder(abi)


@pytest.fixture(scope="session")
def sanitized(tmp_path_factory, built):
    """The runner built with sanitizers, beside the same libraries."""
    folder = tmp_path_factory.mktemp("sanitized")
    configure = ["cmake", "-S", SOURCES, "-B", folder, "-DROBX_SANITIZE=ON", "-DCMAKE_BUILD_TYPE=Debug"]
    for command in (configure, ["cmake", "--build", folder, "--parallel", "2"]):
        done = subprocess.run(command, capture_output=True, text=True)
        if "libasan" in done.stderr + done.stdout:
            pytest.skip("the compiler has no sanitizer library")
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    (folder / "lib").symlink_to(built / "lib")
    return folder / "robx_runner"


class Job:
    """A job's folder as on a device, with both runners in it."""

    def __init__(self, folder, bundle, images, built):
        self.folder, self.images = folder, images
        bundle.rename(folder / "bundle")
        (folder / runner_zip.NAME).write_bytes(runner_zip.pack_runner(load_bundle(folder / "bundle")))
        shutil.copy(built / native_runner.NAME, folder)
        (folder / "lib").symlink_to(built / "lib")
        np.save(folder / "images.npy", images)
        manifest = json.loads((folder / "bundle" / "manifest.json").read_text())
        self.content = {
            "engine": f"on_{manifest['runtime']}",
            "folder": "bundle",
            "manifest": manifest,
            "settings": {"threads": 1, "provider": None, "precision_hint": "f32", "batch": 1},
            "files": {f"bundle/{file['path']}": file["sha256"] for file in manifest["files"]},
            "affinity": None,
            "batch": 1,
            "latency": True,
            "cool_down_seconds": 0,
            "queries": 20,
            "seconds": 0.1,
            "max_seconds": 10,
            "warm_up_seconds": 0.02,
            "warm_up_limit": 0.2,
            "time_limit": 60,
        }

    def command(self, kind, **changes):
        (self.folder / "job.json").write_text(json.dumps({**self.content, **changes}))
        return [sys.executable, runner_zip.NAME, "job.json"] if kind == "python" else ["./robx_runner", "job.json"]

    def run(self, kind="native", **changes):
        """The exit status and result.json."""
        done = subprocess.run(self.command(kind, **changes), cwd=self.folder, capture_output=True, text=True)
        assert not [line for line in done.stderr.splitlines() if not line.startswith("INFO: ")], done.stderr
        with zipfile.ZipFile(self.folder / "result.zip") as archive:
            assert archive.testzip() is None
            return done.returncode, json.loads(archive.read("result.json"))

    def measured(self, kind="native", **changes):
        """What the host reads."""
        status, result = self.run(kind, **changes)
        assert status == 0, result
        return read_result(self.folder / "result.zip", images=len(self.images))


@pytest.fixture
def make_job(tmp_path, make_bundle, built):
    """make_job(batch=None, uint8=False, front=None, count=6) -> a Job; `front`: what a uint8 model does itself."""

    def make(*, batch=None, uint8=False, front=None, count=6):
        bundle = make_bundle(batch=batch)
        if uint8 or front:
            inside = Normalisation(mean=(0.5,) * 3, std=(0.2,) * 3, **(front or {}))
            sides = (None, None) if inside.resize else (32, 32)
            axes = (*sides, 3) if inside.layout == "NHWC" else (3, *sides)
            shutil.rmtree(bundle)
            spec = TensorSpec(name="pixels", dtype="uint8", shape=(batch, *axes))
            bundle = make_bundle(batch=batch, inputs=(spec,), in_model=inside if front else None)
            onnx.save(_uint8_model(spec.shape, inside), str(bundle / "model.onnx"))
            seal(bundle)
        folder = tmp_path / "job"
        folder.mkdir()
        images = np.random.default_rng(3).normal(size=(count, 3, 32, 32)).astype(np.float32)
        return Job(folder, bundle, images, built)

    return make


@pytest.fixture
def job(make_job):
    return make_job()


def _uint8_model(shape, inside):
    """A model of uint8 pixels (N, 3, H, W), or as `inside` (a Normalisation) says: any size, other axes, BGR."""
    constants = {
        "w": weights(),
        "axes": np.array([2, 3], dtype=np.int64),
        "reverse": np.array([2, 1, 0], dtype=np.int64),
        "scales": np.array([1, 1, 0.75, 0.5], dtype=np.float32),
    }
    nodes = [helper.make_node("Cast", ["pixels"], ["cast"], to=TensorProto.FLOAT)]

    def then(kind, *inputs, **attributes):
        before = nodes[-1].output[0]
        nodes.append(helper.make_node(kind, [before, *inputs], [kind.lower()], **attributes))

    if inside.layout == "NHWC":
        then("Transpose", perm=[0, 3, 1, 2])
    if inside.channels == "BGR":
        then("Gather", "reverse", axis=1)
    if inside.resize:
        then("Resize", "", "scales", mode="linear")
    then("Conv", "w", pads=[1] * 4)
    then("ReduceMean", "axes", keepdims=0)
    nodes[-1].output[0] = "embedding"
    sizes = [f"axis {place}" if size is None else size for place, size in enumerate(shape)]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("pixels", TensorProto.UINT8, sizes)],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, [sizes[0], 8])],
        [numpy_helper.from_array(values, name) for name, values in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    model.ir_version = 10
    return model


@pytest.mark.parametrize("latency", [False, True])
@pytest.mark.parametrize(
    ("batch", "uint8"), [(None, False), (3, False), (None, True)], ids=["float32", "batch of 3", "uint8"]
)
def test_its_outputs_are_the_python_runners_bit_for_bit(make_job, batch, uint8, latency):
    job = make_job(batch=batch, uint8=uint8, count=7)
    changes = {"latency": latency, "batch": batch or 1}
    native, python = job.measured(**changes), job.measured("python", **changes)
    assert native.seen.tolist() == python.seen.tolist() and native.seen.sum() == (6 if batch else 7)
    assert native.outputs.tobytes() == python.outputs.tobytes()
    assert len(native.samples) >= 20 if latency else not len(native.samples)


@pytest.mark.parametrize(
    "front",
    [
        {"resize": True},
        {"layout": "NHWC"},
        {"channels": "BGR"},
        {"resize": True, "layout": "NHWC", "channels": "BGR"},
    ],
    ids=lambda front: " ".join(map(str, front.values())),
)
def test_a_model_that_prepares_its_images_itself_gets_the_python_runners_pixels(make_job, sanitized, front):
    job = make_job(front=front, batch=2 if len(front) > 1 else None, count=4)
    changes = {"latency": False, "batch": 2}
    native, python = job.measured(**changes), job.measured("python", **changes)
    assert native.seen.all() and native.outputs.tobytes() == python.outputs.tobytes()
    assert len(np.unique(native.outputs)) == native.outputs.size
    assert run_sanitized(sanitized, job.folder) is None


def test_an_unknown_order_of_pixels_is_refused(make_job):
    job = make_job(front={"channels": "BGR"})
    job.content["manifest"]["in_model"]["channels"] = "GRB"
    status, result = job.run()
    assert status == 1 and "takes GRB pixels, and this runner gives RGB or BGR" in result["error"]


def test_it_reports_what_the_python_runner_reports(make_job):
    job = make_job()
    native, python = job.measured().report, job.measured("python").report
    assert set(native) == set(python) and set(native["device"]) == set(python["device"])
    assert native["facts"] == python["facts"]
    own = {"python", "accelerator"}
    assert {k: v for k, v in native["device"].items() if k not in own} == {
        k: v for k, v in python["device"].items() if k not in own
    }
    for key in ("cores", "cool_down", "throttled", "gpu", "energy", "timed", "telemetry_process", "complete"):
        assert native[key] == python[key], key
    assert set(native["warm_up"]) == set(python["warm_up"]) and native["environment"] == python["environment"]
    assert set(native["memory"]) == set(python["memory"]) == set(native["memory_before"])
    assert 0 < native["load_ns"] < 60e9 and 0 < native["first_ns"] < native["load_ns"]
    assert native["memory"]["peak"] >= native["memory"]["now"] > native["memory_before"]["now"] > 1e6


def test_its_samples_are_the_timed_window(make_job):
    job = make_job()
    found = job.measured(seconds=0.7)
    window = found.report["window"]
    assert 0.7 <= window[1] - window[0] < 5 and found.report["answered"] < window[0]
    assert found.samples.sum() <= 1e9 * (window[1] - window[0])
    assert abs(found.report["wall_seconds"] - (window[1] - window[0])) < 0.05
    assert 0 < found.report["cpu_seconds"] <= 1.05 * (window[1] - window[0])
    assert len(found.snapshots) >= 4
    assert found.snapshots[-1]["jiffies"]["total"] > found.snapshots[0]["jiffies"]["total"]


def test_it_answers_before_the_python_runner(make_job):
    job = make_job()
    took = {"native": [], "python": []}
    for _ in range(2):
        for kind in took:
            start = time.monotonic()
            took[kind].append(job.measured(kind, latency=False).report["answered"] - start)
    assert min(took["native"]) < min(took["python"])


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"files": {"bundle/model.onnx": "0" * 64}}, "arrived damaged"),
        ({"files": {"../job/images.npy": "0" * 64}}, "outside the job's folder"),
        ({"surprise": 1}, "surprise"),
        ({"affinity": [0, 4000]}, "are not available"),
        ({"settings": {"threads": 1, "provider": "cuda"}}, "cuda was asked for"),
        ({"settings": {"threads": 1, "provider": "xnnpack"}}, "no XnnpackExecutionProvider"),
        ({"settings": {"threads": 4000}}, "4000 threads on the cores"),
        ({"settings": {"threads": 0}}, "threads must be from 1 to 4096, got 0"),
        ({"settings": {"threads": 1, "precision_hint": "bf16"}}, "bf16 was asked for"),
        ({"engine": "on_openvino"}, "no engine on_openvino"),
        ({"engine": "on_litert"}, "libLiteRt.so is missing: build the runner with robx device build"),
        ({"batch": 9}, "fewer images than one batch"),
        ({"batch": "1"}, "batch is not an integer"),
        ({"manifest": []}, "is not an object"),
    ],
)
def test_errors_come_back_as_one_line(make_job, changes, line):
    status, result = make_job().run(**changes)
    assert status == 1 and line in result["error"] and "\n" not in result["error"]
    assert result["missing"] is ("missing" in line)


def test_a_model_that_cannot_be_opened_and_an_old_result(make_job):
    job = make_job()
    assert job.run()[0] == 0
    (job.folder / "bundle" / "model.onnx").write_bytes(b"no model")
    status, result = job.run(files={})
    assert status == 1 and "onnxruntime cannot open model.onnx" in result["error"]
    with zipfile.ZipFile(job.folder / "result.zip") as archive:
        assert "samples.npy" not in archive.namelist()


def test_an_output_of_another_width_is_refused(make_job):
    job = make_job()
    manifest = job.content["manifest"]
    manifest["outputs"][0]["shape"] = [None, 9]
    status, result = job.run()
    assert status == 1 and "the output has shape (1, 8), expected (1, 9)" in result["error"]


def test_every_sha256_is_computed(make_job):
    job, data = make_job(), np.random.default_rng(0).bytes(2**21 + 7)
    files = {}
    for size in (0, 1, 55, 56, 63, 64, 65, 119, 120, 128, 2**20 - 1, 2**20, 2**20 + 1, len(data)):
        (job.folder / f"{size}.bin").write_bytes(data[:size])
        files[f"{size}.bin"] = hashlib.sha256(data[:size]).hexdigest()
    status, result = job.run(files=files, latency=False)
    assert status == 0, result


@pytest.fixture
def hung(make_job):
    """A job whose runtime never answers: a library that only sleeps."""
    job = make_job()
    code = job.folder / "hung.cpp"
    code.write_text(
        "#include <unistd.h>\n#include <fcntl.h>\n"
        'extern "C" void* OrtGetApiBase() { close(open("opened", O_CREAT | O_WRONLY, 0600)); sleep(60); return 0; }'
    )
    (job.folder / "lib").unlink()
    (job.folder / "lib").mkdir()
    subprocess.run(["c++", "-shared", "-fPIC", "-o", job.folder / "lib" / "libonnxruntime.so", code], check=True)
    return job


def start(job, **streams):
    runner = subprocess.Popen(job.command("native"), cwd=job.folder, **streams)
    for _ in range(200):
        if (job.folder / "opened").exists():
            return runner
        time.sleep(0.05)
    raise AssertionError("the runtime was never opened")


def test_a_hung_engine_is_ended(hung):
    done = subprocess.run(hung.command("native", time_limit=1), cwd=hung.folder, timeout=20)
    assert done.returncode == -signal.SIGALRM and not (hung.folder / "result.zip").exists()


def test_it_ends_when_its_host_is_gone(hung):
    with start(hung, stdout=subprocess.PIPE) as runner:
        time.sleep(0.3)
        assert runner.poll() is None, "somebody still waits for it"
        runner.stdout.close()
        assert runner.wait(timeout=10) == -signal.SIGTERM


def test_two_runners_never_work_in_one_folder(hung):
    with start(hung) as first:
        try:
            (hung.folder / "result.json").write_text("the first one's")
            second = subprocess.run(["./robx_runner", "job.json"], cwd=hung.folder, capture_output=True, text=True)
            assert second.returncode == 1 and "another runner is still working" in second.stderr
            assert (hung.folder / "result.json").read_text() == "the first one's"
        finally:
            first.kill()


def test_the_doctor_names_the_runtimes_that_load(built):
    done = subprocess.run([built / "robx_runner", "--doctor", "onnxruntime", "numpy"], capture_output=True, text=True)
    answer = json.loads(done.stdout)
    assert list(answer["packages"]) == ["onnxruntime"] and answer["facts"]["arch"] == os.uname().machine


ROOTS = {
    "raspberry pi": {
        "proc/device-tree/model": "Raspberry Pi 4 Model B Rev 1.4\0",
        "proc/cpuinfo": "processor\t: 0\nFeatures\t: fp asimd asimddp\nCPU part\t: 0xd08\n\nHardware\t: BCM2835\n",
        "proc/meminfo": "MemTotal:        3884368 kB\n",
        "proc/stat": "cpu  1 2 3 4 5 6 7 8 9 10\n",
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "ondemand\n",
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "600000\n",
        "sys/devices/system/cpu/cpu10/cpufreq/cpuinfo_max_freq": "1500000\n",
        "sys/devices/system/cpu/cpu2/cpufreq/cpuinfo_max_freq": "1800000\n",
        "sys/class/thermal/thermal_zone0/temp": "48312\n",
        "sys/class/thermal/cooling_device0/cur_state": "0\n",
        "etc/os-release": 'NAME=x\nPRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\n',
        "run/.containerenv": "",
    },
    "jetson": {
        "etc/nv_tegra_release": "# R36 (release), REVISION: 4.0\nmore\n",
        "sys/class/hwmon/hwmon1/in1_label": "VDD_IN\n",
        "sys/class/hwmon/hwmon1/in1_input": "5000\n",
        "sys/class/hwmon/hwmon1/curr1_input": "900\n",
        "sys/fs/cgroup/cpu.max": "100000 100000\n",
        "sys/fs/cgroup/cpu.stat": "usage_usec 1\nnr_throttled 3\n",
    },
    "notebook": {
        "proc/cpuinfo": "model name\t: QEMU Virtual CPU\nflags\t\t: avx2 fma hypervisor\nmicrocode\t: 0x1\n",
        "sys/class/powercap/intel-rapl:0/name": "package-0\n",
        "sys/class/powercap/intel-rapl:0/energy_uj": "1000000\n",
        "sys/devices/system/cpu/intel_pstate/no_turbo": "1\n",
        "sys/devices/system/cpu/smt/control": "on\n",
        "sys/class/power_supply/BAT0/type": "Battery\n",
        "sys/class/power_supply/BAT0/status": "Discharging\n",
        "sys/class/power_supply/BAT0/capacity": "71\n",
        "sys/class/power_supply/BAT0/temp": "305\n",
        "sys/class/power_supply/AB_mouse/type": "Battery\n",
        "sys/class/power_supply/AB_mouse/scope": "Device\n",
        "sys/class/power_supply/AC/online": "0\n",
        "sys/class/dmi/id/product_name": "ThinkPad\n",
    },
    "odd": {
        "proc/meminfo": "MemTotal: none\n",
        "sys/class/thermal/thermal_zone0/temp": "hot\n",
        "proc/cpuinfo": "Hardware\t: caf\u00e9 \x07\n",
        "etc/os-release": 'PRETTY_NAME="\n',
    },
    "empty": {},
}


@pytest.mark.parametrize("root", ROOTS)
def test_it_describes_devices_as_the_python_runner(built, tmp_path, root):
    for name, text in ROOTS[root].items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    if root == "odd":  # Python's int() does not accept it either
        (tmp_path / "proc/meminfo").unlink()
    done = subprocess.run([built / "robx_runner", "--describe", tmp_path], capture_output=True, text=True, check=True)
    native, python = json.loads(done.stdout), describe.describe(str(tmp_path))
    for facts in (native, python):
        del facts["python"], facts["accelerator"]
    assert native == python


def test_getprop_names_the_phone(built, shims, tmp_path):
    script(shims / "getprop", 'case $1 in ro.build.version.release) echo 16;; ro.product.model) echo "Pixel 9";; esac')
    done = subprocess.run([built / "robx_runner", "--describe", tmp_path], capture_output=True, text=True, check=True)
    facts = json.loads(done.stdout)
    assert (facts["os"], facts["board"]) == ("Android 16", "Pixel 9")


DUMPSYS = """case $1 in
battery) printf 'Current Battery Service:\n  AC powered: false\n  USB powered: %s\n  status: %s\n  present: true\n'
  printf '  level: 43\n  scale: 50\n  temperature: 287\n';;
thermalservice) printf 'IsStatusOverride: false\nThermal Status: %s\n';;
esac
"""


@pytest.mark.parametrize(("powered", "status", "heat"), [("true", 2, 0), ("false", 3, 2), ("false", 1, 9)])
def test_android_tells_the_battery_and_the_heat(job, shims, powered, status, heat):
    script(shims / "dumpsys", DUMPSYS % (powered, status, heat))
    native, python = job.run()[1], job.run("python")[1]
    for key in ("battery", "power_source"):
        assert native["device"][key] == python["device"][key], key
    assert native["device"]["battery"]["percent"] == 86 and native["throttled"] == python["throttled"]
    assert bool(native["throttled"]) is (heat > 0)


def test_a_bench_by_it_has_the_library_and_its_licence_in_the_record(
    built, call, make_bundle, short_profile, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(built.parents[2]))
    done = call("bench", make_bundle(), "--runner", "native", "--profile", "rapid", "--json")
    record = json.loads(done.stdout)
    library = record["settings"]["runtime_library"]
    assert record["settings"]["runner"] == "native" and record["values"]["p50"]["value"] > 0
    assert library["version"] == record["settings"]["runtime"]["version"] and "MIT" in library["licence"]
    assert record["values"]["output_cosine"]["value"] > 0.999


def run_sanitized(runner, folder):
    """Run it on a hostile job: whatever the files are, it ends with one line."""
    shutil.rmtree(folder / "__pycache__", ignore_errors=True)
    (folder / "result.zip").unlink(missing_ok=True)
    done = subprocess.run([runner, "job.json"], cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode in (0, 1), done.stderr[-3000:]
    if done.stderr:
        assert done.stderr.count("\n") == 1 and "Sanitizer" not in done.stderr, done.stderr[-3000:]
        return done.stderr
    with zipfile.ZipFile(folder / "result.zip") as archive:
        result = json.loads(archive.read("result.json"))
    assert ("error" in result) is (done.returncode == 1)
    return result.get("error")


def fuzzed(examples):
    """Settings for tests that start a process for each example."""
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(deadline=None, suppress_health_check=checks, database=None, max_examples=examples)


@st.composite
def damage(draw, data):
    """`data` with a few bytes replaced, a part removed or repeated."""
    at, length = draw(st.integers(0, len(data) - 1)), draw(st.integers(0, 40))
    middle = draw(st.one_of(st.binary(max_size=12), st.just(data[at : at + length] * 2), st.just(b"")))
    return data[:at] + middle + data[at + length :]


def test_the_sanitizers_find_nothing_in_a_run(sanitized, make_job):
    job = make_job()
    job.command("native", seconds=0.05)
    assert run_sanitized(sanitized, job.folder) is None
    # The portable SHA-256: this build does not use the processor's instructions.
    data = np.random.default_rng(0).bytes(2**20 + 119)
    (job.folder / "data").write_bytes(data)
    job.command("native", seconds=0.05, files={"data": hashlib.sha256(data).hexdigest()})
    assert run_sanitized(sanitized, job.folder) is None


@fuzzed(40)
@given(data=st.data())
def test_a_damaged_job_ends_in_one_line(sanitized, job, data):
    text = json.dumps({**job.content, "seconds": 0.001, "queries": 1, "latency": False}).encode()
    (job.folder / "job.json").write_bytes(data.draw(damage(text)))
    run_sanitized(sanitized, job.folder)


@fuzzed(20)
@given(
    key=st.sampled_from(["batch", "queries", "seconds", "time_limit", "affinity", "settings", "files", "manifest"]),
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=5,
    ),
)
def test_any_value_of_a_key_is_accepted_or_named(sanitized, job, key, value):
    (job.folder / "job.json").write_text(json.dumps({**job.content, "latency": False, key: value}))
    run_sanitized(sanitized, job.folder)


@fuzzed(20)
@given(data=st.data())
def test_damaged_images_are_refused_or_read(sanitized, job, data):
    whole = (job.folder / "images.npy").read_bytes()
    (job.folder / "damaged.npy").write_bytes(data.draw(damage(whole[:300])) + whole[300:])
    job.command("native", latency=False)
    (job.folder / "images.npy").rename(job.folder / "whole.npy")
    (job.folder / "damaged.npy").rename(job.folder / "images.npy")
    try:
        run_sanitized(sanitized, job.folder)
    finally:
        (job.folder / "whole.npy").replace(job.folder / "images.npy")


@fuzzed(15)
@given(name=st.text(max_size=30))
def test_text_survives_its_json(sanitized, job, name):
    job.command("native", engine=name)
    error = run_sanitized(sanitized, job.folder)
    first = name.encode()[:40].decode(errors="ignore")
    assert "no engine" in error and (first in error or not first.isprintable())


@pytest.mark.parametrize(
    ("array", "what"),
    [
        (np.zeros((6, 3, 32, 32), np.float64), "another type"),
        (np.zeros((6, 3, 32, 32), ">f4"), "another type"),
        (np.asfortranarray(np.zeros((6, 3, 32, 32), np.float32)), "not in C order"),
        (np.zeros((6, 3, 32), np.float32), "another shape"),
        (np.zeros((0, 3, 32, 32), np.float32), "another shape"),
        (np.zeros((6, 3, 31, 32), np.float32), "the shape of the model's input"),
        (np.zeros((6, 1, 32, 32), np.float32), "the shape of the model's input"),
    ],
)
def test_other_arrays_are_refused(sanitized, job, array, what):
    np.save(job.folder / "images.npy", array)
    job.command("native")
    assert what in run_sanitized(sanitized, job.folder)


@pytest.fixture
def phone(start_adbd, tmp_path):
    """A device without Python."""
    device, tools = start_adbd(), tmp_path / "tools"
    tools.mkdir()
    for tool in ("sh", "cp", "ln", "mkdir", "rm", "sleep", "uname"):
        (tools / tool).symlink_to(shutil.which(tool))
    device.path = str(tools)
    return device


def test_a_phone_by_the_real_adb(phone, built, make_bundle, short_profile, tmp_path, monkeypatch):
    monkeypatch.setenv("ROBX_CACHE", str(tmp_path / "cache"))
    shutil.copytree(built, native_runner.native_folder("arm64-v8a"))
    address = f"adb://{phone.serial}"
    (record,) = bench(BenchSettings(bundles=[make_bundle()], device=address, profile="rapid", processes=1))
    assert record.values["p50"].value > 0 and record.values["output_cosine_min"].value > 0.9999
    assert not {reason.split(":")[0] for reason in record.reasons} & {"failed", "incomplete", "output_mismatch"}
    assert record.settings["runner"] == "native" and record.settings["runtime_library"]["runtime"] == "onnxruntime"
    assert record.device["python"] is None and record.device["board"] == "Nobody Phone 1 Imagined"
    assert record.device["battery"] == {"percent": 83, "charging": True, "celsius": 31.4}
    facts, findings = examine(address)
    assert facts["board"] == "Nobody Phone 1 Imagined" and next(f for f in findings if f.name == "onnxruntime").version
    assert list(phone.folder.iterdir()) == []
