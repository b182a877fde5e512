"""Monitor a device while a model is timed: memory, energy, clocks, temperature, other load.

Runs on the device: Python 3.8 and the standard library only.
"""

from __future__ import annotations

import glob
import json
import os
import select
import signal
import time
from typing import Any

from robx.runtime.device.power import parse_thermal
from robx.runtime.device.sysfs import ask, numbers, read

_INTERVAL = 0.2  # seconds between two samples of the telemetry
# Throttling flags of the Raspberry Pi's firmware (vcgencmd get_throttled): bits 0-3 now, 16-19 since boot.
_PI_NOW = {0: "under-voltage", 1: "frequency capped", 2: "throttled", 3: "soft temperature limit"}


def memory(reset: bool = False) -> dict[str, int] | None:
    """Resident bytes of this process, current and peak (VmRSS, VmHWM); `reset` first resets the peak.

    None where the kernel does not report them; ``reset_refused`` is 1 where it does not allow the reset.
    """
    refused = False
    if reset:
        try:
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")
        except OSError:
            refused = True
    status = read("/", "proc/self/status") or ""
    found = {}
    for line in status.splitlines():
        name, _, rest = line.partition(":")
        if name in ("VmRSS", "VmHWM"):
            found[name] = int(rest.split()[0]) * 1024
    if len(found) != 2:
        return None
    return {"now": found["VmRSS"], "peak": found["VmHWM"], "reset_refused": int(refused)}


def energy(root: str = "/", since: dict[str, Any] | None = None) -> dict[str, Any]:
    """Joules counted so far by the processor packages (RAPL); `joules` is None, with a reason, where there are none.

    Each package's counter wraps separately: given the reading `since`, a wrap between the two is added back. The zone
    psys, the whole platform, includes the packages and is not added to them.
    """
    folders = sorted(glob.glob(os.path.join(root, "sys/class/powercap/intel-rapl:[0-9]")))
    if not folders:
        return {"source": None, "joules": None, "reason": "the device has no energy counter (RAPL)"}
    total, zones = 0.0, {}
    for folder in folders:
        if read(folder, "name") == "psys" and len(folders) > 1:
            continue
        count = read(folder, "energy_uj")
        if count is None:
            reason = "only root can read the energy counter %s/energy_uj" % folder
            return {"source": None, "joules": None, "reason": reason}
        joules = int(count) / 1e6
        earlier = (since or {}).get("zones", {}).get(folder)
        if earlier is not None and joules < earlier:
            joules += int(read(folder, "max_energy_range_uj") or 0) / 1e6
        zones[folder] = joules
        total += joules
    return {"source": "rapl", "joules": total, "reason": None, "zones": zones}


def snapshot(root: str = "/") -> dict[str, Any]:
    """One sample: time (s), jiffies, clock frequencies (kHz), temperatures (°C), throttling counters, power (mW)."""
    return {
        "t": time.monotonic(),
        "jiffies": _jiffies(root),
        "khz": numbers(root, "sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_cur_freq"),
        "celsius": [n / 1000 for n in numbers(root, "sys/class/thermal/thermal_zone[0-9]*/temp")],
        "cooling": numbers(root, "sys/class/thermal/cooling_device[0-9]*/cur_state"),
        "cgroup_throttled": _cgroup_throttled(root),
        "milliwatt": _milliwatts(root),
    }


def process_jiffies(pid: int) -> int | None:
    """User and system time of a process, in jiffies."""
    text = read("/", "proc/%d/stat" % pid)
    if text is None:
        return None
    # The command, in parentheses, may contain spaces.
    fields = text.rsplit(")", 1)[1].split()
    return int(fields[11]) + int(fields[12])


def parent_of(pid: int) -> int | None:
    """The parent of a process: another one than before, once the parent is dead. None where that is unknown."""
    text = read("/", "proc/%d/stat" % pid)
    return None if text is None else int(text.rsplit(")", 1)[1].split()[1])


def throttle_flags() -> list[str] | None:
    """What limits the clock according to the platform; None where it does not report that (a Pi and Android do)."""
    on_pi = ask(["vcgencmd", "get_throttled"])
    if on_pi is not None:
        return parse_throttled(on_pi)
    return parse_thermal(ask(["dumpsys", "thermalservice"]) or "")


def parse_throttled(text: str) -> list[str] | None:
    """The flags in ``throttled=0x50005``: current ones, and those marked "since boot"."""
    try:
        bits = int(text.strip().split("=")[1], 16)
    except (IndexError, ValueError):
        return None
    now = [name for bit, name in _PI_NOW.items() if bits >> bit & 1]
    return now + [name + " since boot" for bit, name in _PI_NOW.items() if bits >> (bit + 16) & 1]


def new_flags(before: Any, after: list[str] | None) -> list[str] | None:
    """The current throttling flags and new "since boot" ones; None where the platform reports none."""
    return after and [flag for flag in after if not (flag.endswith("since boot") and flag in before)]


def start_telemetry(path: str, cores: list[int] | None = None) -> tuple[int, int] | None:
    """Fork a process that writes a snapshot line to `path` five times a second until its pipe closes.

    It avoids `cores`, those of the measured process, if there are others, and ends the measured process when the host
    that waits for it is gone. Returns its process id and the end of the pipe to close, or None where a process cannot
    be forked. Call it before any thread is started.
    """
    reader, writer = os.pipe()
    measured, host = os.getpid(), os.getppid()
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
        _record(path, reader, (measured, host), cores)
    finally:
        os._exit(0)


def stop_telemetry(handle: tuple[int, int] | None) -> None:
    """End the telemetry process and wait for it."""
    if handle is not None:
        os.close(handle[1])
        os.waitpid(handle[0], 0)


def _record(path: str, reader: int, processes: tuple[int, int], cores: list[int] | None) -> None:
    measured, host = processes
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
            # The pipe becomes readable (end of file) when the measured process closes it or dies.
            if select.select([reader], [], [], _INTERVAL)[0]:
                return
            if _hung_up() or parent_of(measured) not in (host, None):
                os.kill(measured, signal.SIGTERM)
                return


def _hung_up() -> bool:
    """Whether nobody is left to read this process's output: the connection that started it has ended."""
    poll = select.poll()
    poll.register(1, 0)  # a pipe or socket with a closed end is always reported; a file or terminal never is
    return any(event & (select.POLLHUP | select.POLLERR) for _, event in poll.poll(0))


def _jiffies(root: str) -> dict[str, int] | None:
    """Busy, stolen and total time of all cores. User time already includes guest time."""
    for line in (read(root, "proc/stat") or "").splitlines():
        if line.startswith("cpu "):
            n = [int(x) for x in line.split()[1:9]]
            if len(n) == 8:
                return {"busy": n[0] + n[1] + n[2] + n[5] + n[6], "steal": n[7], "total": sum(n)}
    return None


def _cgroup_throttled(root: str) -> int | None:
    for line in (read(root, "sys/fs/cgroup/cpu.stat") or "").splitlines():
        if line.startswith("nr_throttled"):
            return int(line.split()[1])
    return None


def _milliwatts(root: str) -> float | None:
    """Power of a Jetson's input rails (INA3221 monitors): mV x mA."""
    total, seen = 0.0, False
    for current in glob.glob(os.path.join(root, "sys/class/hwmon/hwmon*/curr[1-3]_input")):
        folder, number = os.path.dirname(current), os.path.basename(current)[4]
        label = read(folder, "in%s_label" % number) or ""
        volts, amps = read(folder, "in%s_input" % number), read(folder, os.path.basename(current))
        if label.startswith("VDD_IN") and volts and amps:
            total, seen = total + int(volts) * int(amps) / 1000, True
    return total if seen else None
