"""Describe the device. Runs on the device: Python 3.8 and the standard library only."""

from __future__ import annotations

import json
import os
import platform
import sys
from typing import Any

from robx.runtime.device.power import power
from robx.runtime.device.sysfs import ask, numbers, read
from robx.runtime.device.watch import energy, snapshot, throttle_flags


def describe(root: str = "/") -> dict[str, Any]:
    """This machine as plain values; None where the machine does not report one."""
    cpuinfo = read(root, "proc/cpuinfo") or ""
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
        "cgroup_cpu_max": read(root, "sys/fs/cgroup/cpu.max"),
        **power(root),
        "jetson": _jetson(root),
        "emulated": emulation(root, platform.machine(), cpuinfo),
        "energy_counter": energy(root)["source"],
        "watched": _watched(root),
    }


def emulation(root: str, machine: str, cpuinfo: str) -> str | None:
    """Why this processor counts as emulated, or None. Latency measured on an emulator is meaningless."""
    comm = read(root, "proc/self/comm") or ""
    if comm.startswith("qemu"):
        return "the process is %s" % comm
    kernel_arch = read(root, "proc/sys/kernel/arch")
    if kernel_arch and _family(kernel_arch) != _family(machine):
        return "the kernel is %s but the processor reports %s" % (kernel_arch, machine)
    if _family(machine) == "arm" and ("GenuineIntel" in cpuinfo or "AuthenticAMD" in cpuinfo):
        return "the processor reports %s but /proc/cpuinfo is that of an x86" % machine
    if "QEMU TCG" in cpuinfo or "QEMU Virtual CPU" in cpuinfo:
        return "/proc/cpuinfo names QEMU"
    return None


def packages(names: list[str]) -> dict[str, str]:
    """Versions of the installed ones of these distributions, without importing them."""
    from importlib import metadata

    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


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
    turbo_off = read(root, base + "intel_pstate/no_turbo")
    boost = read(root, base + "cpufreq/boost")
    return {
        "model": fields.get("model name") or fields.get("hardware") or fields.get("cpu part"),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "flags": sorted(flags & wanted),
        "microcode": fields.get("microcode"),
        "governor": read(root, base + "cpu0/cpufreq/scaling_governor"),
        "max_khz": numbers(root, base + "cpu[0-9]*/cpufreq/cpuinfo_max_freq"),
        "capacity": numbers(root, base + "cpu[0-9]*/cpu_capacity"),
        "turbo": turbo_off == "0" if turbo_off is not None else (boost == "1" if boost is not None else None),
        "smt": read(root, base + "smt/control"),
        "hypervisor": "hypervisor" in flags,
    }


def _os_name(root: str) -> str:
    for line in (read(root, "etc/os-release") or "").splitlines():
        if line.startswith("PRETTY_NAME="):
            return line.split("=", 1)[1].strip('"')
    release = ask(["getprop", "ro.build.version.release"])
    return "Android " + release if release else platform.system()


def _board(root: str) -> str | None:
    model = read(root, "proc/device-tree/model")
    if model:
        return model.strip("\0")
    keys = ("ro.product.manufacturer", "ro.product.model", "ro.soc.model")
    phone = " ".join(name for name in (ask(["getprop", key]) for key in keys) if name)
    return phone or read(root, "sys/class/dmi/id/product_name")


def _jetson(root: str) -> dict[str, Any] | None:
    release = read(root, "etc/nv_tegra_release")
    if release is None:
        return None
    return {"release": release.splitlines()[0], "power_mode": ask(["nvpmodel", "-q"])}


def _accelerator() -> str | None:
    return ask(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"])


def _memory(root: str) -> int | None:
    for line in (read(root, "proc/meminfo") or "").splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) * 1024
    return None


def _container(root: str) -> str | None:
    if os.path.exists(os.path.join(root, ".dockerenv")):
        return "docker"
    if os.path.exists(os.path.join(root, "run/.containerenv")):
        return "podman"
    return None


def _watched(root: str) -> dict[str, Any]:
    """What can be monitored while a model is timed; if energy cannot, why."""
    sample = snapshot(root)
    return {
        "clocks": bool(sample["khz"]),
        "temperatures": bool(sample["celsius"]),
        "throttling": bool(sample["cooling"]) or throttle_flags() is not None,
        "load": sample["jiffies"] is not None,
        "energy": "" if sample["milliwatt"] is not None else energy(root)["reason"] or "",
    }


def _family(machine: str) -> str:
    if machine in ("x86_64", "i386", "i686", "AMD64"):
        return "x86"
    return "arm" if machine.startswith(("arm", "aarch64")) else machine


if __name__ == "__main__":
    sys.stdout.write(json.dumps(describe(), indent=2) + "\n")
