"""What a device is, and what it does meanwhile. It runs on the device too: Python 3.8 and the standard library only.

`root` stands for the file system that is read: the tests lay a Raspberry Pi's or a Jetson's beside this one.
"""

from __future__ import annotations

import glob
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

_INTERVAL = 0.2  # seconds between two samples of the telemetry
_PACKAGES = (
    *("numpy", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "tensorrt_rtx", "executorch"),
    *("ai-edge-litert", "ncnn", "torch", "timm"),
)
# Throttled flags of the Raspberry Pi's firmware: bits 0-3 now, 16-19 since boot (vcgencmd get_throttled).
_PI_NOW = {0: "under-voltage", 1: "frequency capped", 2: "throttled", 3: "soft temperature limit"}


def describe(root: str = "/") -> dict[str, Any]:
    """This machine as plain values; None is what it does not tell."""
    cpuinfo = _read(root, "proc/cpuinfo") or ""
    return {
        "host": platform.node(),
        "arch": platform.machine(),
        "os": _os_name(root),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "board": _board(root),
        "cpu": _cpu(root, cpuinfo),
        "memory_bytes": _memory(root),
        "accelerator": _accelerator(),
        "container": _container(root),
        "cgroup_cpu_max": _read(root, "sys/fs/cgroup/cpu.max"),
        "power_source": _power_source(root),
        "jetson": _jetson(root),
        "emulated": emulation(root, platform.machine(), cpuinfo),
        "energy_counter": energy(root)["source"],
    }


def emulation(root: str, machine: str, cpuinfo: str) -> str | None:
    """Why this is an emulated processor, or None. Times taken on one mean nothing."""
    comm = _read(root, "proc/self/comm") or ""
    if comm.startswith("qemu"):
        return "the process is %s" % comm
    kernel_arch = _read(root, "proc/sys/kernel/arch")
    if kernel_arch and _family(kernel_arch) != _family(machine):
        return "the kernel is %s and the processor says %s" % (kernel_arch, machine)
    if _family(machine) == "arm" and ("GenuineIntel" in cpuinfo or "AuthenticAMD" in cpuinfo):
        return "the processor says %s and /proc/cpuinfo is an x86's" % machine
    if "QEMU TCG" in cpuinfo or "QEMU Virtual CPU" in cpuinfo:
        return "/proc/cpuinfo names QEMU"
    return None


def packages() -> dict[str, str]:
    """The runtimes' installed versions, without importing them."""
    from importlib import metadata

    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def memory(reset: bool = False) -> dict[str, int] | None:
    """Resident bytes now and at their peak (VmRSS, VmHWM) of this process; `reset` first sets the peak to now.

    None where the kernel does not say. ``reset`` is left out of the answer when the kernel refuses it.
    """
    refused = False
    if reset:
        try:
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")
        except OSError:
            refused = True
    status = _read("/", "proc/self/status") or ""
    found = {}
    for line in status.splitlines():
        name, _, rest = line.partition(":")
        if name in ("VmRSS", "VmHWM"):
            found[name] = int(rest.split()[0]) * 1024
    if len(found) != 2:
        return None
    return {"now": found["VmRSS"], "peak": found["VmHWM"], "reset_refused": int(refused)}


def energy(root: str = "/") -> dict[str, Any]:
    """Joules counted so far by the processor packages (RAPL), or `joules` None and the reason.

    The counters wrap at ``range`` joules; the difference of two readings is to be taken modulo that.
    """
    folders = sorted(glob.glob(os.path.join(root, "sys/class/powercap/intel-rapl:[0-9]")))
    if not folders:
        return {"source": None, "joules": None, "range": None, "reason": "the device has no energy counter (RAPL)"}
    total, span = 0.0, 0.0
    for folder in folders:
        count = _read(folder, "energy_uj")
        if count is None:
            reason = "the energy counter %s/energy_uj can be read by root only" % folder
            return {"source": None, "joules": None, "range": None, "reason": reason}
        total += int(count) / 1e6
        span += int(_read(folder, "max_energy_range_uj") or 0) / 1e6
    return {"source": "rapl", "joules": total, "range": span or None, "reason": None}


def snapshot(root: str = "/") -> dict[str, Any]:
    """One sample: seconds, jiffies of each kind, current frequencies (kHz), temperatures (°C), throttling counters."""
    return {
        "t": time.monotonic(),
        "jiffies": _jiffies(root),
        "khz": _numbers(root, "sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_cur_freq"),
        "celsius": [n / 1000 for n in _numbers(root, "sys/class/thermal/thermal_zone[0-9]*/temp")],
        "cooling": _numbers(root, "sys/class/thermal/cooling_device[0-9]*/cur_state"),
        "cgroup_throttled": _cgroup_throttled(root),
        "milliwatt": _milliwatts(root),
    }


def process_jiffies(pid: int) -> int | None:
    """User and system time of a process, in jiffies."""
    text = _read("/", "proc/%d/stat" % pid)
    if text is None:
        return None
    # The command, in parentheses, may have spaces in it.
    fields = text.rsplit(")", 1)[1].split()
    return int(fields[11]) + int(fields[12])


def throttle_flags() -> list[str] | None:
    """What the platform says holds the clock down now; None when it does not say (only a Pi's firmware is asked)."""
    tool = shutil.which("vcgencmd")
    if tool is None:
        return None
    return parse_throttled(_command([tool, "get_throttled"]) or "")


def parse_throttled(text: str) -> list[str] | None:
    """The flags in ``throttled=0x50005``, of this moment and, marked so, since boot."""
    try:
        bits = int(text.strip().split("=")[1], 16)
    except (IndexError, ValueError):
        return None
    now = [name for bit, name in _PI_NOW.items() if bits >> bit & 1]
    return now + [name + " since boot" for bit, name in _PI_NOW.items() if bits >> (bit + 16) & 1]


def start_telemetry(path: str, cores: list[int] | None = None) -> tuple[int, int] | None:
    """Fork a process that writes a snapshot line to `path` five times a second until its pipe closes.

    It runs on the cores that `cores` (those of the measured process) leaves, when there are any. Returns its process id
    and the pipe's end to close, or None where a process cannot be forked. Call it before any thread is started.
    """
    reader, writer = os.pipe()
    measured = os.getpid()
    try:
        child = os.fork()
    except OSError:
        os.close(reader)
        os.close(writer)
        return None
    if child:
        os.close(reader)
        return child, writer
    try:
        os.close(writer)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        _record(path, reader, measured, cores)
    finally:
        os._exit(0)


def stop_telemetry(handle: tuple[int, int] | None) -> None:
    """End the process and wait for it."""
    if handle is not None:
        os.close(handle[1])
        os.waitpid(handle[0], 0)


def _record(path: str, reader: int, measured: int, cores: list[int] | None) -> None:
    import select

    if hasattr(os, "sched_setaffinity") and cores:
        others = os.sched_getaffinity(0) - set(cores)
        if others:
            os.sched_setaffinity(0, others)
    with open(path, "w") as file:
        while True:
            sample = snapshot()
            sample["own"] = (process_jiffies(measured) or 0) + (process_jiffies(os.getpid()) or 0)
            file.write(json.dumps(sample) + "\n")
            file.flush()
            # The pipe becomes readable, at its end, when the measured process closes it or dies.
            if select.select([reader], [], [], _INTERVAL)[0]:
                return


def _cpu(root: str, cpuinfo: str) -> dict[str, Any]:
    wanted = {
        "avx2",
        "avx512f",
        "avx_vnni",
        "avx512_vnni",
        "amx_int8",
        "fma",
        "asimd",
        "asimddp",
        "i8mm",
        "sve",
        "bf16",
    }
    fields: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip().lower(), value.strip())
    flags = set((fields.get("flags") or fields.get("features") or "").split())
    base = "sys/devices/system/cpu/"
    turbo_off = _read(root, base + "intel_pstate/no_turbo")
    boost = _read(root, base + "cpufreq/boost")
    return {
        "model": fields.get("model name") or fields.get("hardware") or fields.get("cpu part"),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "flags": sorted(flags & wanted),
        "microcode": fields.get("microcode"),
        "governor": _read(root, base + "cpu0/cpufreq/scaling_governor"),
        "max_khz": _numbers(root, base + "cpu[0-9]*/cpufreq/cpuinfo_max_freq"),
        "capacity": _numbers(root, base + "cpu[0-9]*/cpu_capacity"),
        "turbo": turbo_off == "0" if turbo_off is not None else (boost == "1" if boost is not None else None),
        "smt": _read(root, base + "smt/control"),
        "hypervisor": "hypervisor" in flags,
    }


def _os_name(root: str) -> str:
    for line in (_read(root, "etc/os-release") or "").splitlines():
        if line.startswith("PRETTY_NAME="):
            return line.split("=", 1)[1].strip('"')
    tool = shutil.which("getprop")
    if tool:
        return "Android " + (_command([tool, "ro.build.version.release"]) or "")
    return platform.system()


def _board(root: str) -> str | None:
    model = _read(root, "proc/device-tree/model")
    if model:
        return model.strip("\0")
    tool = shutil.which("getprop")
    if tool:
        names = [_command([tool, key]) or "" for key in ("ro.product.manufacturer", "ro.product.model", "ro.soc.model")]
        return " ".join(name for name in names if name) or None
    return _read(root, "sys/class/dmi/id/product_name")


def _jetson(root: str) -> dict[str, Any] | None:
    release = _read(root, "etc/nv_tegra_release")
    if release is None:
        return None
    tool = shutil.which("nvpmodel")
    return {"release": release.splitlines()[0], "power_mode": _command([tool, "-q"]) if tool else None}


def _accelerator() -> str | None:
    tool = shutil.which("nvidia-smi")
    return _command([tool, "--query-gpu=name,driver_version", "--format=csv,noheader"]) if tool else None


def _memory(root: str) -> int | None:
    for line in (_read(root, "proc/meminfo") or "").splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) * 1024
    return None


def _container(root: str) -> str | None:
    if os.path.exists(os.path.join(root, ".dockerenv")):
        return "docker"
    if os.path.exists(os.path.join(root, "run/.containerenv")):
        return "podman"
    return None


def _power_source(root: str) -> str:
    online = _numbers(root, "sys/class/power_supply/*/online")
    status = [_read(f, "status") for f in glob.glob(os.path.join(root, "sys/class/power_supply/BAT*"))]
    if any(online):
        return "mains"
    return "battery" if "Discharging" in status else "unknown"


def _jiffies(root: str) -> dict[str, int] | None:
    """Busy, stolen and total time of all cores. Guest time is in user time already."""
    for line in (_read(root, "proc/stat") or "").splitlines():
        if line.startswith("cpu "):
            n = [int(x) for x in line.split()[1:9]]
            if len(n) == 8:
                return {"busy": n[0] + n[1] + n[2] + n[5] + n[6], "steal": n[7], "total": sum(n)}
    return None


def _cgroup_throttled(root: str) -> int | None:
    for line in (_read(root, "sys/fs/cgroup/cpu.stat") or "").splitlines():
        if line.startswith("nr_throttled"):
            return int(line.split()[1])
    return None


def _milliwatts(root: str) -> float | None:
    """Power on all rails of a Jetson's INA3221 monitors: mV x mA."""
    total, seen = 0.0, False
    for current in glob.glob(os.path.join(root, "sys/class/hwmon/hwmon*/curr[1-3]_input")):
        folder, number = os.path.dirname(current), os.path.basename(current)[4]
        label = _read(folder, "in%s_label" % number) or ""
        volts, amps = _read(folder, "in%s_input" % number), _read(folder, os.path.basename(current))
        if label.startswith("VDD_IN") and volts and amps:
            total, seen = total + int(volts) * int(amps) / 1000, True
    return total if seen else None


def _numbers(root: str, pattern: str) -> list[int]:
    found = []
    for path in sorted(glob.glob(os.path.join(root, pattern))):
        text = _read("/", path.lstrip("/")) if path.startswith("/") else _read("", path)
        try:
            found.append(int(text or ""))
        except ValueError:
            continue
    return found


def _read(root: str, path: str) -> str | None:
    try:
        with open(os.path.join(root, path), errors="replace") as file:
            return file.read().strip()
    except OSError:
        return None


def _command(arguments: list[str]) -> str | None:
    try:
        done = subprocess.run(arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="replace").strip() or None


def _family(machine: str) -> str:
    if machine in ("x86_64", "i386", "i686", "AMD64"):
        return "x86"
    return "arm" if machine.startswith(("arm", "aarch64")) else machine


if __name__ == "__main__":
    sys.stdout.write(json.dumps(describe(), indent=2) + "\n")
