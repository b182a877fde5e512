"""Facts and counters, read from file systems laid out like the devices'; their texts follow the kernel's documents."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from robx.runtime import device, telemetry


def write(root, files):
    for name, text in files.items():
        path = Path(root) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_this_machine():
    facts = device.describe()
    assert facts["arch"] == platform.machine()
    assert facts["cpu"]["usable_cores"] == len(os.sched_getaffinity(0))
    assert facts["memory_bytes"] == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert facts["emulated"] is None


@pytest.mark.parametrize(
    ("files", "machine", "emulated"),
    [
        ({"proc/self/comm": "qemu-aarch64-st\n"}, "aarch64", True),
        ({"proc/self/comm": "python3\n", "proc/sys/kernel/arch": "x86_64\n"}, "aarch64", True),
        ({"proc/self/comm": "python3\n", "proc/sys/kernel/arch": "aarch64\n"}, "aarch64", False),
        ({"proc/self/comm": "python3\n", "proc/sys/kernel/arch": "x86_64\n"}, "i686", False),
        ({"proc/self/comm": "python3\n"}, "x86_64", False),
    ],
)
def test_emulation_is_seen(tmp_path, files, machine, emulated):
    write(str(tmp_path), files)
    assert bool(device.emulation(str(tmp_path), machine, "")) is emulated


def test_emulation_is_seen_in_cpuinfo(tmp_path):
    assert device.emulation(str(tmp_path), "aarch64", "vendor_id : GenuineIntel")
    assert device.emulation(str(tmp_path), "x86_64", "model name : QEMU TCG CPU version 2.5+")
    assert device.emulation(str(tmp_path), "x86_64", "model name : AMD EPYC") is None


def test_a_raspberry_pi(tmp_path):
    root = str(tmp_path)
    write(
        root,
        {
            "proc/device-tree/model": "Raspberry Pi 4 Model B Rev 1.4\0",
            "proc/cpuinfo": "processor\t: 0\nFeatures\t: fp asimd asimddp\n",
            "proc/meminfo": "MemTotal:        3884368 kB\n",
            "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "ondemand\n",
            "sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq": "1800000\n",
            "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "600000\n",
            "sys/class/thermal/thermal_zone0/temp": "48312\n",
            "etc/os-release": 'PRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\n',
        },
    )
    facts = device.describe(root)
    assert facts["board"] == "Raspberry Pi 4 Model B Rev 1.4"
    assert facts["cpu"]["governor"] == "ondemand"
    assert facts["cpu"]["max_khz"] == [1_800_000]
    assert facts["cpu"]["flags"] == ["asimd", "asimddp"]
    assert facts["memory_bytes"] == 3884368 * 1024
    assert facts["os"].startswith("Debian")
    sample = device.snapshot(root)
    assert sample["celsius"] == [48.312] and sample["khz"] == [600_000]


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        ("throttled=0x0\n", []),
        ("throttled=0x50005\n", ["under-voltage", "throttled", "under-voltage since boot", "throttled since boot"]),
        ("throttled=0x80000\n", ["soft temperature limit since boot"]),
        ("VCHI initialization failed\n", None),
    ],
)
def test_the_pis_firmware_flags(text, flags):
    assert device.parse_throttled(text) == flags


def test_a_jetson(tmp_path):
    root = str(tmp_path)
    write(
        root,
        {
            "etc/nv_tegra_release": "# R36 (release), REVISION: 4.0\n",
            "sys/class/hwmon/hwmon1/in1_label": "VDD_IN\n",
            "sys/class/hwmon/hwmon1/in1_input": "5000\n",
            "sys/class/hwmon/hwmon1/curr1_input": "1200\n",
            "sys/class/hwmon/hwmon1/in2_label": "VDD_CPU_GPU_CV\n",
            "sys/class/hwmon/hwmon1/in2_input": "5000\n",
            "sys/class/hwmon/hwmon1/curr2_input": "400\n",
            "sys/class/thermal/cooling_device0/cur_state": "0\n",
        },
    )
    assert device.describe(root)["jetson"]["release"].startswith("# R36")
    assert device.snapshot(root)["milliwatt"] == 6000, "the input rail, not the sum of what it feeds"


def test_energy_counters_and_their_absence(tmp_path):
    root = str(tmp_path)
    assert "no energy counter" in device.energy(root)["reason"]
    for package in "01":
        write(
            root,
            {
                f"sys/class/powercap/intel-rapl:{package}/energy_uj": "2000000\n",
                f"sys/class/powercap/intel-rapl:{package}/max_energy_range_uj": "10000000\n",
                # A part of the package: counted in it already.
                f"sys/class/powercap/intel-rapl:{package}:0/energy_uj": "900000\n",
            },
        )
    reading = device.energy(root)
    assert reading["joules"] == 4.0 and reading["range"] == 20.0
    (tmp_path / "sys/class/powercap/intel-rapl:1/energy_uj").unlink()
    assert device.energy(root)["joules"] is None
    assert "root" in device.energy(root)["reason"]


def test_an_energy_counter_that_wraps():
    before = {"joules": 19.0, "range": 20.0, "reason": None}
    assert telemetry.joules({"before": before, "after": {**before, "joules": 3.0}}) == (4.0, "")
    none = {"joules": None, "range": None, "reason": "why"}
    assert telemetry.joules({"before": none, "after": none}) == (None, "why")


MEMORY = """
import json, sys
import numpy as np
from robx.runtime import device
first = device.memory(reset=True)
block = np.ones(40_000_000, dtype=np.uint8)
grown = device.memory()
del block
print(json.dumps([first, grown, device.memory(reset=True)]))
"""


def test_peak_memory_is_reset_and_then_follows():
    # In a process of its own: one that has freed memory before hands that out again and does not grow.
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    first, grown, last = json.loads(done.stdout)
    if first["reset_refused"]:
        pytest.skip("the kernel refuses to reset VmHWM")
    assert 35_000_000 < grown["peak"] - first["now"] < 80_000_000
    assert last["peak"] < grown["peak"]


def snapshot(t, *, busy=0, steal=0, total=0, own=0, khz=(), celsius=(), cooling=(0,), throttled=None):
    return {
        "t": t,
        "jiffies": {"busy": busy, "steal": steal, "total": total},
        "own": own,
        "khz": list(khz),
        "celsius": list(celsius),
        "cooling": list(cooling),
        "cgroup_throttled": throttled,
        "milliwatt": None,
    }


def test_digest_counts_what_others_used():
    # Four cores for ten seconds of 100 jiffies: 4000 in all. This process used one core, others half of one.
    first = snapshot(0, khz=(600, 1500), celsius=(40, 45), throttled=3)
    last = snapshot(10, busy=1500, steal=20, total=4000, own=1000, khz=(600, 900), celsius=(50, 61), throttled=5)
    digest = telemetry.digest([first, last], cores=4)
    assert digest["background"] == pytest.approx(0.5)
    assert digest["steal"] == pytest.approx(0.02)
    assert (digest["khz_first"], digest["khz_min"]) == (1500, 900)
    assert digest["celsius_max"] == 61
    assert digest["cgroup_throttled"] == 2
    assert not digest["cooling"]


def test_digest_of_a_device_that_tells_nothing():
    empty = {"t": 0.0, "jiffies": None, "khz": [], "celsius": [], "cooling": [], "cgroup_throttled": None}
    digest = telemetry.digest([empty, {**empty, "t": 1.0}], cores=1)
    assert digest["background"] is None and digest["khz_min"] is None and digest["watts"] is None
    assert telemetry.digest([], cores=1) == {"samples": 0}


def test_only_the_timed_window_counts():
    snapshots = [{"t": float(t)} for t in range(10)]
    assert [s["t"] for s in telemetry.within(snapshots, (2.5, 5.5))] == [2, 3, 4, 5, 6]


def test_a_cut_line_is_left_out():
    whole = snapshot(1.0, own=3)
    line = json.dumps(whole)
    odd = ["[]", '{"t": "x"}', line.replace("1.0", "NaN"), line.replace("[0]", '["hot"]'), line[:-2]]
    assert telemetry.parse("\n".join([line, *odd])) == [whole]
