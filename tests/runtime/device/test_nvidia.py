"""NVML readings from a stand-in with the names and units of nvidia-ml-py: no NVIDIA GPU was available."""

import os
import sys
import types

import pytest

from robx.runtime.bench import result_schema
from robx.runtime.device import nvidia


class NVMLError(Exception):
    pass


@pytest.fixture
def nvml(monkeypatch):
    """A pynvml with one GPU: this process uses 300 bytes of it in two contexts, another process 5000."""
    process = types.SimpleNamespace
    fake = types.ModuleType("pynvml")
    fake.open = 0

    def count(step):
        fake.open += step

    fake.NVMLError = NVMLError
    fake.nvmlInit = lambda: count(1)
    fake.nvmlShutdown = lambda: count(-1)
    fake.nvmlDeviceGetHandleByIndex = lambda index: ("index", index)
    fake.nvmlDeviceGetHandleByUUID = lambda name: ("uuid", name)
    fake.asked = []
    own = [process(pid=os.getpid(), usedGpuMemory=n) for n in (100, 200)]
    others = [process(pid=1, usedGpuMemory=5000)]
    fake.nvmlDeviceGetComputeRunningProcesses = lambda handle: fake.asked.append(handle) or others + own
    fake.nvmlDeviceGetTotalEnergyConsumption = lambda handle: 4500
    fake.nvmlDeviceGetCurrentClocksThrottleReasons = lambda handle: 0x1 | 0x4 | 0x40
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return fake


def test_its_units_and_this_process_alone(nvml):
    found = nvidia.reading()
    assert found["memory"] == 300 and found["joules"] == 4.5 and found["reason"] is None
    assert found["throttled"] == ["hardware thermal slow-down"], "neither idleness nor a power cap is a fault"
    assert result_schema.check(found, result_schema.GpuReading, "gpu") is found
    assert nvml.open == 0, "NVML is closed again"


@pytest.mark.parametrize(
    ("visible", "handle"), [("2,0", ("index", 2)), ("GPU-5f3a", ("uuid", "GPU-5f3a")), ("", ("index", 0))]
)
def test_the_gpu_that_cuda_sees_first(nvml, monkeypatch, visible, handle):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    nvidia.reading()
    assert nvml.asked == [handle]


@pytest.mark.parametrize(
    ("provider", "found"),
    [("cuda:0", True), ("CUDAExecutionProvider", True), ("TensorrtExecutionProvider", True), (["CPU"], False)],
)
def test_the_providers_that_run_on_an_nvidia_gpu(provider, found):
    assert nvidia.runs({"provider": provider}) is found


def refuse(*_):
    raise NVMLError("Not Supported")


@pytest.mark.parametrize(
    ("name", "figure"),
    [
        ("nvmlDeviceGetTotalEnergyConsumption", "joules"),
        ("nvmlDeviceGetComputeRunningProcesses", "memory"),
    ],
)
def test_a_missing_counter_does_not_affect_the_others(nvml, monkeypatch, name, figure):
    whole = nvidia.reading()
    monkeypatch.setattr(nvml, name, refuse)
    found = nvidia.reading()
    assert found[figure] is None and "Not Supported" in found["reason"]
    assert {k: v for k, v in found.items() if k not in (figure, "reason")} == {
        k: v for k, v in whole.items() if k not in (figure, "reason")
    }
    assert nvml.open == 0


def test_a_process_that_nvml_does_not_list(nvml, monkeypatch):
    monkeypatch.setattr(nvml, "nvmlDeviceGetComputeRunningProcesses", lambda _: [])
    found = nvidia.reading()
    assert found["memory"] is None and "container" in found["reason"]


def test_without_a_driver_or_the_package(nvml, monkeypatch):
    monkeypatch.setattr(nvml, "nvmlInit", refuse)
    assert nvidia.reading()["reason"] == "NVML cannot be used: Not Supported"
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "pip install nvidia-ml-py" in nvidia.reading()["reason"]
