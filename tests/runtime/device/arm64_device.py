"""Make an arm64 device from Debian's arm64 Python under qemu-user, with the aarch64 wheels of an engine.

    python tests/runtime/device/arm64_device.py FOLDER      (as root, once; about 400 MB and five minutes)
    ROBX_ARM64_ROOT=FOLDER pytest tests/runtime/device/test_arm64.py

``make test-arm64`` does both. It needs debootstrap and qemu-user-static. The device's Python is FOLDER/python. It is
emulated: its outputs count, its times do not.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

WHEELS = ("onnxruntime==1.32.0", "numpy==2.2.6", "flatbuffers", "packaging", "protobuf")
MIRROR = "http://deb.debian.org/debian"
# onnxruntime asks these at import and crashes when the emulated system has none.
SYSTEM = {
    "proc/cpuinfo": "processor\t: 0\nFeatures\t: fp asimd evtstrm crc32 cpuid\nCPU implementer\t: 0x41\n"
    "CPU architecture: 8\nCPU variant\t: 0x0\nCPU part\t: 0xd08\nCPU revision\t: 3\n",
    "sys/devices/system/cpu/possible": "0-1\n",
    "sys/devices/system/cpu/present": "0-1\n",
    "sys/devices/system/cpu/kernel_max": "255\n",
}


def make(folder: Path) -> None:
    """Unpack the system and the wheels into `folder`, and write the command of its Python."""
    folder.mkdir(parents=True, exist_ok=True)
    root, wheels, site = folder / "root", folder / "wheels", folder / "site"
    options = ["--arch=arm64", "--variant=minbase", "--foreign", "--include=python3,libgomp1,libstdc++6"]
    subprocess.run(["debootstrap", *options, "bookworm", str(root), MIRROR], check=True)
    for package in sorted((root / "var/cache/apt/archives").glob("*.deb")):
        subprocess.run(["dpkg-deb", "-x", str(package), str(root)], check=True)
    platforms = ["--platform", "manylinux_2_28_aarch64", "--platform", "manylinux2014_aarch64"]
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", *platforms]
    subprocess.run([*pip, "--python-version", "3.11", "-d", str(wheels), *WHEELS], check=True)
    for wheel in wheels.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
    for name, text in SYSTEM.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    python = folder / "python"
    command = f"qemu-aarch64-static -cpu cortex-a72 -L '{root}' -E PYTHONPATH='{site}' '{root}/usr/bin/python3'"
    python.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    python.chmod(0o755)


if __name__ == "__main__":
    make(Path(sys.argv[1]).resolve())
