"""The file that a device runs: what it may import, that it is reproducible, and that it trusts nothing."""

import ast
import itertools
import json
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

from robx.records import load_bundle
from robx.runtime.bench import runner_zip
from robx.runtime.device import runner, timing, watch

RUNTIME = Path(runner.__file__).resolve().parent
ENGINE_FILES = RUNTIME.parent / "engines"
HELPERS = [path for path in sorted(RUNTIME.glob("*.py")) if path.name != "runner.py"]
ON_DEVICE = [RUNTIME / "runner.py", *HELPERS, *sorted(ENGINE_FILES.glob("*.py"))]
ENGINES = {
    *("onnxruntime", "openvino", "tensorrt", "tensorrt_rtx", "executorch", "ai_edge_litert", "tflite_runtime"),
    *("ncnn", "torch", "cuda", "pynvml"),
}


@pytest.mark.parametrize("path", ON_DEVICE, ids=lambda p: p.name)
def test_it_is_python_3_8(path):
    ast.parse(path.read_text(), feature_version=(3, 8))
    checked = subprocess.run(
        [
            sys.executable,
            "-m",
            "ruff",
            "check",
            "--isolated",
            "--target-version",
            "py38",
            "--select",
            "F,E9",
            str(path),
        ],
        capture_output=True,
        text=True,
    )
    assert checked.returncode == 0, checked.stdout
    if path.name != "__init__.py":
        assert path.read_text().count("from __future__ import annotations") == 1


@pytest.mark.parametrize("path", [p for p in ON_DEVICE if p.name != "on_torch.py"], ids=lambda p: p.name)
def test_it_imports_the_standard_library_numpy_and_its_engine(path):
    tree = ast.parse(path.read_text())
    packed = {f"robx.runtime.device.{helper.stem}" for helper in HELPERS}
    top = {name if name.startswith("robx") else name.split(".")[0] for node in tree.body for name in _imported(node)}
    assert top <= set(sys.stdlib_module_names) | {"numpy"} | packed, "an engine is imported when a model is opened"
    anywhere = {name.split(".")[0] for node in ast.walk(tree) for name in _imported(node)}
    assert anywhere <= set(sys.stdlib_module_names) | {"numpy", "robx"} | ENGINES


def test_the_doctor_needs_neither_numpy_nor_robx(tmp_path):
    (tmp_path / runner_zip.NAME).write_bytes(runner_zip.pack_runner(None))
    # -S: none of this environment's packages is to be found, as on a fresh device.
    command = [sys.executable, "-S", runner_zip.NAME, "--doctor"]
    told = json.loads(subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout)
    assert told["facts"]["arch"] and told["packages"] == {}


def test_packing_is_deterministic_and_holds_one_engine(make_bundle):
    bundle = load_bundle(make_bundle())
    data = runner_zip.pack_runner(bundle)
    assert data == runner_zip.pack_runner(bundle)
    assert data.startswith(b"#!")
    path = make_bundle("x").parent / "r.pyz"
    path.write_bytes(data)
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        assert names[:3] == ["__main__.py", "robx/__init__.py", "robx/runtime/__init__.py"]
        device = {name for name in names if name.startswith("robx/runtime/device/")}
        assert device == {f"robx/runtime/device/{helper.name}" for helper in HELPERS}
        engines = {"robx/runtime/engines/__init__.py", "robx/runtime/engines/on_onnxruntime.py"}
        assert set(names[3:]) == device | engines
        assert archive.read("__main__.py") == (RUNTIME / "runner.py").read_bytes()


@pytest.fixture
def job(make_bundle, images):
    """A job's folder as on a device: of robx it contains only the packed runner."""
    bundle = make_bundle()
    folder = bundle.parent / "job"
    folder.mkdir()
    bundle.rename(folder / "bundle")
    manifest = json.loads((folder / "bundle" / "manifest.json").read_text())
    np.save(folder / "images.npy", images)
    (folder / runner_zip.NAME).write_bytes(runner_zip.pack_runner(load_bundle(folder / "bundle")))
    content = {
        "engine": "on_onnxruntime",
        "folder": "bundle",
        "manifest": manifest,
        "settings": {"threads": 1},
        "files": {"bundle/model.onnx": manifest["files"][0]["sha256"]},
        "affinity": None,
        "batch": 1,
        "latency": True,
        "cool_down_seconds": 0,
        "queries": 40,
        "seconds": 0.3,
        "max_seconds": 10,
        "warm_up_seconds": 0.02,
        "warm_up_limit": 0.2,
        "time_limit": 60,
    }

    def run(**changes):
        (folder / "job.json").write_text(json.dumps({**content, **changes}))
        done = subprocess.run([sys.executable, runner_zip.NAME, "job.json"], cwd=folder, capture_output=True, text=True)
        with zipfile.ZipFile(folder / "result.zip") as archive:
            return done.returncode, json.loads(archive.read("result.json")), folder

    return run


def test_it_keeps_the_outputs_of_the_timed_queries(job, images):
    status, result, folder = job()
    assert status == 0, result
    samples = np.load(folder / "samples.npy")
    assert samples.dtype == np.int64 and len(samples) >= 40 and samples.min() > 0
    assert samples.sum() <= 1e9 * (result["window"][1] - result["window"][0])
    assert result["window"][1] - result["window"][0] >= 0.3
    assert result["complete"] and result["timed"]
    assert result["load_ns"] > result["first_ns"] > 0
    assert result["memory"]["peak"] >= result["memory"]["now"] >= 10_000_000
    with np.load(folder / "outputs.npz") as arrays:
        assert arrays["seen"].all()
        np.testing.assert_allclose(arrays["outputs"], _plain(images), rtol=1e-4, atol=1e-5)


def test_it_is_monitored_by_another_process(job):
    _, result, folder = job()
    assert result["telemetry_process"]
    lines = [json.loads(line) for line in (folder / "telemetry.jsonl").read_text().splitlines()]
    assert len(lines) >= 2
    assert lines[-1]["own"] >= lines[0]["own"]
    assert lines[-1]["jiffies"]["total"] > lines[0]["jiffies"]["total"]


def test_outputs_without_times(job, images):
    status, result, folder = job(latency=False)
    assert status == 0 and not result["timed"] and "window" not in result
    assert not (folder / "samples.npy").exists()
    with np.load(folder / "outputs.npz") as arrays:
        np.testing.assert_allclose(arrays["outputs"], _plain(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"files": {"bundle/model.onnx": "0" * 64}}, "arrived damaged"),
        ({"surprise": 1}, "surprise"),
        ({"affinity": [0, 4000]}, "are not available"),
        ({"settings": {"threads": 1, "provider": "cuda"}}, "CUDAExecutionProvider"),
        ({"settings": {"threads": 4000}}, "4000 threads on the cores"),
        ({"settings": {"threads": 1, "precision_hint": "bf16"}}, "bf16 was asked for"),
    ],
)
def test_errors_come_back_as_one_line(job, changes, line):
    status, result, _ = job(**changes)
    assert status == 1
    assert line in result["error"] and "\n" not in result["error"]


def test_an_old_result_is_never_taken_for_a_new_one(job):
    assert job()[0] == 0
    status, _, folder = job(files={"bundle/model.onnx": "0" * 64})
    assert status == 1 and not (folder / "samples.npy").exists()


def repack(folder, changes):
    """Replace files in the packed runner."""
    with zipfile.ZipFile(folder / runner_zip.NAME) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(folder / runner_zip.NAME, "w") as archive:
        for name, data in (files | {name: text.encode() for name, text in changes.items()}).items():
            archive.writestr(name, data)


ENGINE = "robx/runtime/engines/on_onnxruntime.py"
GPU_ENGINE = """
import numpy as np
class Model:
    run = lambda self, images: np.ones((len(images), 8), np.float32)
    facts = lambda self: {"provider": "CUDAExecutionProvider"}
    close = lambda self: None
open_model = lambda *_: Model()
"""
NVML = """
import os, types
class NVMLError(Exception): pass
nvmlInit = nvmlShutdown = lambda: None
nvmlDeviceGetHandleByIndex = lambda index: index
nvmlDeviceGetComputeRunningProcesses = lambda _: [types.SimpleNamespace(pid=os.getpid(), usedGpuMemory=7)]
energy = iter((1000, 5000))
nvmlDeviceGetTotalEnergyConsumption = lambda _: next(energy)
nvmlDeviceGetCurrentClocksThrottleReasons = lambda _: 0x20
"""


def test_a_gpu_is_read_before_and_after_the_timed_queries(job):
    """With a stand-in for both the engine and NVML: no NVIDIA GPU was available."""
    _, plain, folder = job()
    assert plain["gpu"] is None
    repack(folder, {ENGINE: GPU_ENGINE, "pynvml.py": NVML})
    status, result, _ = job()
    assert status == 0, result
    assert (result["gpu"]["before"]["joules"], result["gpu"]["after"]["joules"]) == (1.0, 5.0)
    assert result["gpu"]["after"]["memory"] == 7
    assert result["gpu"]["after"]["throttled"] == ["software thermal slow-down"]


@pytest.fixture
def hung(job):
    """The folder of a job whose engine never returns, to be started by the test."""
    _, _, folder = job()
    (folder / "result.zip").unlink()
    repack(folder, {ENGINE: "import time\ndef open_model(*_):\n    open('opened', 'w').close()\n    time.sleep(60)\n"})
    return folder


def start(folder, **streams):
    runner = subprocess.Popen([sys.executable, runner_zip.NAME, "job.json"], cwd=folder, **streams)
    for _ in range(200):
        if (folder / "opened").exists():
            return runner
        time.sleep(0.05)
    raise AssertionError("the engine was never opened")


def test_a_hung_engine_is_ended(hung):
    content = json.loads((hung / "job.json").read_text())
    (hung / "job.json").write_text(json.dumps({**content, "time_limit": 1}))
    done = subprocess.run([sys.executable, runner_zip.NAME, "job.json"], cwd=hung, timeout=20)
    assert done.returncode == -signal.SIGALRM
    assert not (hung / "result.zip").exists()


def test_it_ends_when_its_host_is_gone(hung):
    with start(hung, stdout=subprocess.PIPE) as runner:
        time.sleep(0.5)
        assert runner.poll() is None, "somebody still waits for it"
        runner.stdout.close()
        assert runner.wait(timeout=10) == -signal.SIGTERM


def test_the_first_inference_waits_for_no_later_import(job):
    """Imports for writing the result, or for running tools that are not installed, do not delay the start."""
    _, _, folder = job()
    future = "from __future__ import annotations\n"
    engine = (ENGINE_FILES / "on_onnxruntime.py").read_text().replace(future, "")
    repack(folder, {ENGINE: f"{future}import sys\nopen('early', 'w').write(' '.join(sys.modules))\n{engine}"})
    status, result, _ = job()
    assert status == 0, result
    assert not {"zipfile", "subprocess", "shutil"} & set((folder / "early").read_text().split())
    assert result["answered"] < result["window"][0]


def test_two_runners_never_work_in_one_folder(hung):
    with start(hung) as first:
        try:
            (hung / "samples.npy").write_text("the first one's")
            command = [sys.executable, runner_zip.NAME, "job.json"]
            second = subprocess.run(command, cwd=hung, capture_output=True, text=True, timeout=20)
            assert second.returncode == 1 and "another runner is still working" in second.stderr
            assert (hung / "samples.npy").read_text() == "the first one's"
        finally:
            first.kill()


def test_throttling_since_boot_counts_only_if_it_is_new():
    old = ["under-voltage since boot"]
    assert watch.new_flags(old, ["throttled", *old]) == ["throttled"]
    assert watch.new_flags([], old) == old
    assert watch.new_flags((), None) is None


def test_warm_up_stops_when_steady_and_gives_up_at_its_limit():
    class Model:
        def __init__(self, durations):
            self.durations = durations

        def run(self, _):
            time.sleep(next(self.durations))

    steady = timing.warm_up(Model(itertools.repeat(0.004)), [None], 0.05, 5)
    assert steady["steady"] and steady["queries"] >= 30
    slowing = timing.warm_up(Model(0.001 * 1.03**i for i in itertools.count()), [None], 0.05, 0.6)
    assert not slowing["steady"] and 0.6 <= slowing["seconds"] < 1.5


def _plain(images):
    kernel = np.random.default_rng(0).normal(size=(8, 3, 3, 3)).astype(np.float32)
    padded = np.pad(images.astype(np.float64), ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    return np.maximum(np.einsum("nchwij,dcij->ndhw", windows, kernel), 0).mean(axis=(2, 3))


def _imported(node):
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module == "robx.runtime.device":
        return [f"robx.runtime.device.{alias.name}" for alias in node.names]
    return [node.module or ""] if isinstance(node, ast.ImportFrom) else []
