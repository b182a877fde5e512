"""What a machine can run, and the command that installs what is missing."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from robx.errors import DeviceError, first_line
from robx.formats import FORMATS, RUNTIMES, RuntimeRow
from robx.runtime.bench import native_runner, result_schema
from robx.runtime.bench.runners import choose_runner, python_command
from robx.runtime.bench.transports import open_transport
from robx.runtime.bench.workspace import workspace

_DOCTOR_SECONDS = 120
_NOT_NEEDED = "not needed on a device"
_NVML = "pip install nvidia-ml-py"
# Purpose, the distributions that provide it (any of them), how to install it on this machine, and on a device.
Part = tuple[str, tuple[str, ...], str, str]
_PARTS: tuple[Part, ...] = (
    ("training and reference outputs", ("torch",), "pip install robx", _NOT_NEEDED),
    ("student networks", ("timm",), "pip install robx", _NOT_NEEDED),
    ("the benchmark runner", ("numpy",), "pip install robx", "pip install numpy"),
    ("GPU memory and energy", ("nvidia-ml-py",), _NVML, _NVML),
)
_TOOLS = (
    ("devices over SSH", "ssh", "install your system's OpenSSH client"),
    ("copying files over SSH", "scp", "install your system's OpenSSH client"),
    ("Android devices", "adb", "install your system's adb (Android platform tools)"),
)


@dataclass(frozen=True)
class Finding:
    """One package, tool or setting of a machine, present or missing."""

    purpose: str
    name: str
    version: str | None  # None: missing
    remedy: str  # the command that installs it; "" if present


def examine(
    device: str = "local", *, runner: str | None = None, python: str | None = None
) -> tuple[dict[str, Any], list[Finding]]:
    """A device's facts, and what is present or missing. Runs the benchmark's own runner there, so both see the same.

    Args:
        device: local, ssh://[user@]host[:port] or adb://[serial].
        runner: "python" or "native"; None: Python where the device has one, else native.
        python: the Python command on the device.

    Raises:
        InputError: the address is not valid, or the native runner is needed and was not built.
        DeviceError: the device cannot be reached, or its Python is older than 3.8.
    """
    parts = (*_PARTS, *_engines())
    answer, abi = _ask(device, runner, python, [name for _, names, _, _ in parts for name in names])
    local = device == "local"
    findings = _native(abi) if abi else [_finding(part, answer["packages"], local) for part in parts]
    findings.append(_governor(answer["facts"]["cpu"]))
    if local:
        findings += [_tool(*tool) for tool in _TOOLS]
        findings.append(_cuda())
    return answer["facts"], findings


def _engines() -> Iterator[Part]:
    """Every engine that robx can run, with the formats that need it."""
    for row in RUNTIMES.values():
        if row.engine is not None:
            formats = [name for name, form in FORMATS.items() if row.name in form.runtimes]
            purpose = f"{' and '.join(formats)} bundles" + (f" in {row.title}" if row.title else "")
            yield purpose, row.packages, _install(row), row.device_install


def _install(row: RuntimeRow) -> str:
    return f"pip install 'robx[{row.extra}]'" if row.extra else "pip install robx"


def _ask(device: str, runner: str | None, python: str | None, packages: list[str]) -> tuple[dict[str, Any], str]:
    """What the runner says about the device, and the ABI of a native runner ("" for Python)."""
    python_command(python)  # raises before anything is reached
    with workspace() as folder, open_transport(device) as transport:
        chosen = choose_runner(transport, wanted=runner, python=python)
        transport.push(chosen.files(None, folder), "doctor")
        status, text = transport.run("doctor", [*chosen.command, "--doctor", *packages], timeout=_DOCTOR_SECONDS)
    last = text.splitlines()[-1].strip() if text else ""
    if status:
        raise DeviceError(f"{device} cannot run the runner: {last[:300] or f'exit status {status}'}")
    try:
        answer = result_schema.check(result_schema.parse(last), result_schema.DoctorAnswer, "answer")
    except DeviceError as error:
        raise DeviceError(
            f"{device} answered {last[:80]!r} where the runner's facts were expected: check --python"
        ) from error
    return dict(answer), chosen.abi


def _native(abi: str) -> list[Finding]:
    """What the native runner for `abi` can run: the libraries that were built into its folder."""
    build = native_runner.read_build(abi)
    have = {lib["runtime"]: lib["version"] or "version unknown" for lib in build["libraries"]}
    remedy = f"robx device build --abi {abi} --runtime FILE adds it, FILE a .so, .whl or .aar"
    findings = [Finding("the benchmark runner", f"native, {abi}", build["robx_version"], "")]
    return findings + [
        Finding(f"bundles in {name}", name, have.get(name), "" if name in have else remedy)
        for name in dict.fromkeys((*native_runner.RUNTIMES, *have))
    ]


def _finding(part: tuple[str, tuple[str, ...], str, str], packages: Mapping[str, str], local: bool) -> Finding:
    purpose, names, here, there = part
    have = next((name for name in names if name in packages), None)
    if have is None:
        return Finding(purpose, names[0], None, here if local else there)
    return Finding(purpose, have, str(packages[have]), "")


def _governor(cpu: Mapping[str, Any]) -> Finding:
    """A clock frequency that follows the load changes every result. A virtual machine does not show its governor."""
    found, purpose = cpu["governor"], "stable clock frequency"
    if found in ("performance", None):
        return Finding(purpose, "CPU frequency governor", found or "not readable on this machine", "")
    remedy = f"governor {found} follows the load: sudo cpupower frequency-set -g performance"
    return Finding(purpose, "CPU frequency governor", None, remedy)


def _tool(purpose: str, command: str, remedy: str) -> Finding:
    path = shutil.which(command)
    return Finding(purpose, command, path, "" if path else remedy)


def _cuda() -> Finding:
    remedy = "no CUDA GPU is visible: install a CUDA build of torch on a machine with an NVIDIA GPU"
    try:
        torch = importlib.import_module("torch")
        found = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    except Exception as error:  # a broken torch must not break the doctor
        return Finding("training on a GPU", "CUDA", None, f"torch cannot be imported ({first_line(error)})")
    return Finding("training on a GPU", "CUDA", found, "" if found else remedy)
