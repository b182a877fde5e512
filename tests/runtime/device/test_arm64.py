"""An arm64 device behind a real sshd: qemu-user runs Debian's arm64 Python with the aarch64 wheel of ONNX Runtime.

Its answers are this machine's; its times are refused, for an emulated processor has none. ``make test-arm64`` makes the
device (tests/runtime/device/arm64_device.py) and runs this; without ROBX_ARM64_ROOT, qemu or an sshd it is skipped.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from robx.records import load_measurements
from robx.runtime.bench import runner_zip
from robx.runtime.bench.native_runner import native_folder
from robx.runtime.bench.results import read_result
from robx.runtime.device_build import build
from tests.runtime.device.test_native import Job

ROOT = os.environ.get("ROBX_ARM64_ROOT")
pytestmark = [
    pytest.mark.skipif(not ROOT, reason="ROBX_ARM64_ROOT is not set (make test-arm64 makes what it names)"),
    pytest.mark.skipif(not shutil.which("qemu-aarch64-static"), reason="no qemu-aarch64-static (qemu-user-static)"),
    pytest.mark.timeout(600),
]
PYTHON = str(Path(ROOT or "") / "python")


def test_the_doctor_knows_that_it_is_emulated(call, ssh_device):
    done = call("doctor", "--device", ssh_device, "--python", PYTHON, "--json")
    told = json.loads(done.stdout)
    assert told["facts"]["arch"] == "aarch64" and told["facts"]["emulated"]
    assert next(f for f in told["findings"] if f["name"] == "onnxruntime")["version"]


def test_its_outputs_are_the_students_and_it_is_not_timed(call, ssh_device, make_student_bundle, tmp_path):
    folder = make_student_bundle()
    done = call("bench", folder, "--device", ssh_device, "--python", PYTHON, "--profile", "rapid")
    assert done.exit_code == 0, done.stderr
    assert "INVALID, emulated" in done.stdout
    (record,) = load_measurements(folder / "measurements.jsonl")
    assert (record.device["kind"], record.device["arch"]) == ("ssh", "aarch64")
    assert record.settings["reference"] == "the fp32 student in torch"
    assert record.values["output_cosine_min"].value > 0.99999
    assert record.verdict == "INVALID" and [r.split(":")[0] for r in record.reasons] == ["emulated"]
    assert set(record.values) == {"output_cosine", "output_cosine_min"}, "not one time"
    assert record.missing["p50"] and record.samples is None and not list(folder.glob("samples-*"))


def test_a_broken_model_is_detected_on_it(call, ssh_device, make_bundle):
    make_bundle("onnx-fp32")
    folder = make_bundle("onnx-int8", precision="int8", kernel=np.zeros((8, 3, 3, 3), np.float32))
    done = call("bench", folder, "--device", ssh_device, "--python", PYTHON, "--profile", "rapid")
    assert done.exit_code == 3 and "output_mismatch" in done.stdout


@pytest.mark.skipif(
    not shutil.which("aarch64-linux-gnu-g++"), reason="no arm64 compiler (Debian: g++-aarch64-linux-gnu)"
)
def test_the_native_runner_returns_the_python_runners_bits(make_bundle, images, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    library = next((Path(ROOT) / "site" / "onnxruntime" / "capi").glob("libonnxruntime.so.*"))
    assert build("linux-arm64", runtimes=[library])["libraries"][0]["version"]
    (tmp_path / "job").mkdir()
    job = Job(tmp_path / "job", make_bundle(), images, native_folder("linux-arm64"))
    emulator = ["qemu-aarch64-static", "-cpu", "cortex-a72", "-L", str(Path(ROOT) / "root")]
    found = []
    for command in ([PYTHON, runner_zip.NAME, "job.json"], [*emulator, "./robx_runner", "job.json"]):
        job.command("native")
        subprocess.run(command, cwd=job.folder, check=True)
        found.append(read_result(job.folder / "result.zip", images=len(images)))
    python, native = found
    assert native.seen.all() and native.outputs.tobytes() == python.outputs.tobytes()
    assert native.report["facts"] == python.report["facts"]
    assert native.report["device"]["emulated"] and not native.report["timed"], "no time of an emulated processor"
