"""What a machine can do, and the one line that gives it the rest."""

from __future__ import annotations

import importlib
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robx.errors import DeviceError, first_line
from robx.runtime.bench import result_schema, runner_zip
from robx.runtime.bench.transports import open_transport

_DOCTOR_SECONDS = 120
# What it is for, the distributions that bring it (any of them), the line that installs it here, and on a device.
_PARTS = (
    ("distilling, and the reference", ("torch",), "pip install robx", "not needed on a device"),
    ("students", ("timm",), "pip install robx", "not needed on a device"),
    ("the runner", ("numpy",), "pip install robx", "pip install numpy"),
    (
        "onnx and ort bundles",
        ("onnxruntime", "onnxruntime-gpu"),
        "pip install robx",
        "pip install onnxruntime",
    ),
    ("openvino bundles", ("openvino",), "pip install 'robx[openvino]'", "pip install openvino"),
    (
        "trt bundles",
        ("tensorrt",),
        "pip install 'robx[trt]'",
        "use the board's JetPack, or pip install tensorrt",
    ),
    ("trt bundles for RTX", ("tensorrt_rtx",), "pip install 'robx[trt-rtx]'", "pip install tensorrt_rtx"),
    ("a GPU's memory and energy", ("nvidia-ml-py",), "pip install nvidia-ml-py", "pip install nvidia-ml-py"),
    ("executorch bundles", ("executorch",), "pip install 'robx[executorch]'", "pip install executorch"),
    ("litert bundles", ("ai-edge-litert",), "pip install 'robx[litert]'", "pip install ai-edge-litert"),
    ("ncnn bundles", ("ncnn",), "pip install 'robx[ncnn]'", "pip install ncnn"),
)
_TOOLS = (
    ("devices over SSH", "ssh", "install your system's OpenSSH client"),
    ("copying to them", "scp", "install your system's OpenSSH client"),
    ("Android devices", "adb", "install your system's adb (Android platform tools)"),
)


@dataclass(frozen=True)
class Finding:
    """One thing that a machine has or lacks."""

    purpose: str
    name: str
    version: str | None  # None: it is not there
    remedy: str  # the line that brings it; "" when it is there


def examine(device: str = "local", *, python: str | None = None) -> tuple[dict[str, Any], list[Finding]]:
    """A device's facts, and what it has or lacks. It runs the runner there, so what this reports a bench will find.

    Raises:
        InputError: no such address.
        DeviceError: it cannot be reached, or has no Python 3.8.
    """
    told = _ask(device, python)
    local = device == "local"
    findings = [_finding(part, told["packages"], local) for part in _PARTS]
    findings.append(_governor(told["facts"]["cpu"]))
    if local:
        findings += [_tool(*tool) for tool in _TOOLS]
        findings.append(_cuda())
    return told["facts"], findings


def _ask(device: str, python: str | None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="robx-") as folder, open_transport(device, python=python) as transport:
        path = Path(folder) / runner_zip.NAME
        path.write_bytes(runner_zip.pack_runner(None))
        transport.push({runner_zip.NAME: path}, "doctor")
        status, text = transport.run("doctor", [runner_zip.NAME, "--doctor"], timeout=_DOCTOR_SECONDS)
    last = text.splitlines()[-1].strip() if text else ""
    if status:
        raise DeviceError(f"{device} cannot run the runner: {last[:300] or f'exit status {status}'}")
    try:
        return dict(
            result_schema.check(
                result_schema.parse(last), {"facts": result_schema.DEVICE, "packages": {}}, "its answer"
            )
        )
    except DeviceError as error:
        raise DeviceError(f"{device} answered {last[:80]!r} where the runner's facts were expected") from error


def _finding(part: tuple[str, tuple[str, ...], str, str], packages: Mapping[str, str], local: bool) -> Finding:
    purpose, names, here, there = part
    have = next((name for name in names if name in packages), None)
    if have is None:
        return Finding(purpose, names[0], None, here if local else there)
    return Finding(purpose, have, str(packages[have]), "")


def _governor(cpu: Mapping[str, Any]) -> Finding:
    """A clock that follows the load moves every figure; a machine without one (a virtual one) cannot be told."""
    found, purpose = cpu["governor"], "a clock that stays"
    if found in ("performance", None):
        return Finding(purpose, "governor", found or "none to be set", "")
    remedy = f"{found} follows the load: sudo cpupower frequency-set -g performance"
    return Finding(purpose, "governor", None, remedy)


def _tool(purpose: str, command: str, remedy: str) -> Finding:
    path = shutil.which(command)
    return Finding(purpose, command, path, "" if path else remedy)


def _cuda() -> Finding:
    remedy = "none is visible: install a CUDA build of torch on a machine with an NVIDIA GPU"
    try:
        torch = importlib.import_module("torch")
        found = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    except Exception as error:  # a torch that is broken must not break the doctor
        return Finding("training on a GPU", "CUDA", None, f"torch cannot be imported ({first_line(error)})")
    return Finding("training on a GPU", "CUDA", found, "" if found else remedy)
