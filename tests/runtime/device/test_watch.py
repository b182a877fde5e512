"""Counters, read from file systems like those of real devices; the texts follow the kernel's documentation."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from robx.runtime.device import sysfs, watch


def write(root, files):
    for name, text in files.items():
        path = Path(root) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_clocks_and_temperatures_are_in_core_order(tmp_path):
    clocks = {f"sys/devices/system/cpu/cpu{i}/cpufreq/scaling_cur_freq": f"{600_000 + i}\n" for i in (0, 2, 10)}
    write(str(tmp_path), {**clocks, "sys/class/thermal/thermal_zone0/temp": "48312\n"})
    sample = watch.snapshot(str(tmp_path))
    assert sample["celsius"] == [48.312] and sample["khz"] == [600_000, 600_002, 600_010]


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        ("throttled=0x0\n", []),
        ("throttled=0x50005\n", ["under-voltage", "throttled", "under-voltage since boot", "throttled since boot"]),
        ("throttled=0x80000\n", ["soft temperature limit since boot"]),
        ("VCHI initialization failed\n", None),
    ],
)
def test_the_raspberry_pis_throttling_flags(text, flags):
    assert watch.parse_throttled(text) == flags


def test_a_tool_is_run_only_if_it_is_installed(shims):
    assert watch.throttle_flags() is None and sysfs.ask(["no-such-tool"]) is None
    (shims / "vcgencmd").write_text('#!/bin/sh\n[ "$1" = get_throttled ] && echo throttled=0x4\n')
    assert watch.throttle_flags() is None, "it cannot be executed"
    (shims / "vcgencmd").chmod(0o755)
    assert watch.throttle_flags() == ["throttled"]


def test_the_power_of_a_jetson(tmp_path):
    root = str(tmp_path)
    write(
        root,
        {
            "sys/class/hwmon/hwmon1/in1_label": "VDD_IN\n",
            "sys/class/hwmon/hwmon1/in1_input": "5000\n",
            "sys/class/hwmon/hwmon1/curr1_input": "1200\n",
            "sys/class/hwmon/hwmon1/in2_label": "VDD_CPU_GPU_CV\n",
            "sys/class/hwmon/hwmon1/in2_input": "5000\n",
            "sys/class/hwmon/hwmon1/curr2_input": "400\n",
            "sys/class/thermal/cooling_device0/cur_state": "0\n",
        },
    )
    assert watch.snapshot(root)["milliwatt"] == 6000, "the input rail, not the sum of what it feeds"


def test_energy_counters_and_their_absence(tmp_path):
    root = str(tmp_path)
    assert "no energy counter" in watch.energy(root)["reason"]
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
    reading = watch.energy(root)
    assert reading["joules"] == 4.0
    (tmp_path / "sys/class/powercap/intel-rapl:1/energy_uj").unlink()
    assert watch.energy(root)["joules"] is None
    assert "root" in watch.energy(root)["reason"]


def test_each_package_wraps_for_itself_and_the_platform_is_not_added(tmp_path):
    root = str(tmp_path)

    def zones(**microjoules):
        for number, (name, count) in enumerate(microjoules.items()):
            zone = f"sys/class/powercap/intel-rapl:{number}"
            write(
                root,
                {f"{zone}/name": name, f"{zone}/energy_uj": f"{count}\n", f"{zone}/max_energy_range_uj": "10000000\n"},
            )

    zones(package0=9_000_000, package1=1_000_000, psys=3_000_000)
    before = watch.energy(root)
    assert before["joules"] == 10.0
    zones(package0=2_000_000, package1=4_000_000, psys=9_000_000)  # the first one wrapped at 10 J
    assert watch.energy(root, since=before)["joules"] - before["joules"] == pytest.approx(3.0 + 3.0)


MEMORY = """
import json, sys
import numpy as np
from robx.runtime.device import watch
first = watch.memory(reset=True)
block = np.ones(40_000_000, dtype=np.uint8)
grown = watch.memory()
del block
print(json.dumps([first, grown, watch.memory(reset=True)]))
"""


def test_peak_memory_is_reset_and_then_follows():
    # In a process of its own: one that has freed memory before hands that out again and does not grow.
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    first, grown, last = json.loads(done.stdout)
    if first["reset_refused"]:
        pytest.skip("the kernel refuses to reset VmHWM")
    assert 35_000_000 < grown["peak"] - first["now"] < 80_000_000
    assert last["peak"] < grown["peak"]
