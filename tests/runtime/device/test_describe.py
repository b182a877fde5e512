"""Device facts, read from file systems like those of real devices; the texts follow the kernel's documentation."""

import os
import platform
from pathlib import Path

import pytest

from robx.runtime.device import describe


def write(root, files):
    for name, text in files.items():
        path = Path(root) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_this_machine():
    facts = describe.describe()
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
def test_emulation_is_detected(tmp_path, files, machine, emulated):
    write(str(tmp_path), files)
    assert bool(describe.emulation(str(tmp_path), machine, "")) is emulated


def test_emulation_is_detected_from_cpuinfo(tmp_path):
    assert describe.emulation(str(tmp_path), "aarch64", "vendor_id : GenuineIntel")
    assert describe.emulation(str(tmp_path), "x86_64", "model name : QEMU TCG CPU version 2.5+")
    assert describe.emulation(str(tmp_path), "x86_64", "model name : AMD EPYC") is None


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
            "etc/os-release": 'PRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\n',
        },
    )
    facts = describe.describe(root)
    assert facts["board"] == "Raspberry Pi 4 Model B Rev 1.4"
    assert facts["cpu"]["governor"] == "ondemand"
    assert facts["cpu"]["max_khz"] == [1_800_000]
    assert facts["cpu"]["flags"] == ["asimd", "asimddp"]
    assert facts["memory_bytes"] == 3884368 * 1024
    assert facts["os"].startswith("Debian")
    told = facts["watched"]
    assert not told["clocks"] and "no energy counter" in told["energy"]
    write(
        root,
        {
            "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "600000\n",
            "sys/class/thermal/thermal_zone0/temp": "48312\n",
            "sys/class/thermal/cooling_device0/cur_state": "0\n",
            "proc/stat": "cpu  1 2 3 4 5 6 7 8 9 10\n",
        },
    )
    told = describe.describe(root)["watched"]
    assert told["clocks"] and told["temperatures"] and told["throttling"] and told["load"]


def test_a_phone(shims, tmp_path):
    (shims / "getprop").write_text(
        '#!/bin/sh\ncase $1 in ro.build.version.release) echo 16;; ro.product.model) echo "Pixel 9";; esac\n'
    )
    (shims / "getprop").chmod(0o755)
    facts = describe.describe(str(tmp_path))
    assert (facts["os"], facts["board"]) == ("Android 16", "Pixel 9")


def test_a_jetson(tmp_path):
    write(str(tmp_path), {"etc/nv_tegra_release": "# R36 (release), REVISION: 4.0\n"})
    assert describe.describe(str(tmp_path))["jetson"]["release"].startswith("# R36")
