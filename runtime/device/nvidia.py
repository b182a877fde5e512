"""Memory, energy and throttling of an NVIDIA GPU, through NVML (nvidia-ml-py). Runs on the device: Python 3.8.

Without that package, the driver or a counter, the value is None and `reason` says why.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

# Clock event reasons of nvml.h that mean heat or power, not idling or a limit set by the user.
_THROTTLING = {
    0x08: "hardware slow-down",
    0x20: "software thermal slow-down",
    0x40: "hardware thermal slow-down",
    0x80: "power brake",
}


def runs(facts: Mapping[str, Any]) -> bool:
    """Whether a session with these facts runs on an NVIDIA GPU."""
    provider = str(facts.get("provider")).lower()
    return "cuda" in provider or "tensorrt" in provider


def reading() -> dict[str, Any]:
    """Bytes that this process uses on its first GPU, joules that the GPU has used so far, and throttling reasons."""
    try:
        import pynvml
    except ImportError:
        return _nothing("nvidia-ml-py is not installed on the device: pip install nvidia-ml-py")
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return _nothing("NVML cannot be used: %s" % error)
    try:
        return _read(pynvml)
    finally:
        pynvml.nvmlShutdown()


def _read(nvml: Any) -> dict[str, Any]:
    found, reasons = _nothing(""), []
    first = (os.environ.get("CUDA_VISIBLE_DEVICES") or "0").split(",")[0]
    try:
        if first.isdigit():
            handle = nvml.nvmlDeviceGetHandleByIndex(int(first))
        else:
            handle = nvml.nvmlDeviceGetHandleByUUID(first)
    except nvml.NVMLError as error:
        return _nothing("NVML does not know the GPU %s: %s" % (first, error))
    try:
        used = [p.usedGpuMemory for p in nvml.nvmlDeviceGetComputeRunningProcesses(handle) if p.pid == os.getpid()]
        found["memory"] = sum(used) if used and None not in used else None
        if found["memory"] is None:
            reasons.append("NVML does not report the memory of this process (in a container its id differs)")
    except nvml.NVMLError as error:
        reasons.append("memory: %s" % error)
    try:
        found["joules"] = nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000.0  # it counts millijoules
    except nvml.NVMLError as error:
        reasons.append("energy: %s" % error)
    try:
        bits = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
        found["throttled"] = [name for bit, name in _THROTTLING.items() if bits & bit]
    except nvml.NVMLError as error:
        reasons.append("throttling: %s" % error)
    found["reason"] = "; ".join(reasons) or None
    return found


def _nothing(reason: str) -> dict[str, Any]:
    return {"memory": None, "joules": None, "throttled": [], "reason": reason}
