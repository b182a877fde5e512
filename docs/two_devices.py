"""Make docs/two-devices.png, a report of this machine and of an arm64 device in emulation.

    python docs/two_devices.py RUN ONNXRUNTIME_AARCH64.whl      (RUN: such as the student of ``robx demo``)

RUN is a small student with measurements of this machine. Its onnx-fp32 is measured once more, by the native runner,
over the real adb and in qemu-user: those outputs count, those times do not. The device is the adbd of the tests.
Everything happens in a copy of RUN. It needs Debian's adb, chromium, cmake, g++-aarch64-linux-gnu, qemu-user-static.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PICTURE = Path(__file__).with_name("two-devices.png")
LIBRARIES = Path("/usr/aarch64-linux-gnu/lib")  # of the cross-compiler
sys.path.insert(0, str(ROOT))

from robx.runtime.bench.native_runner import INFO, NAME, native_folder  # noqa: E402
from robx.runtime.device_build import build  # noqa: E402
from robx.store.files import sha256_file  # noqa: E402
from tests.runtime.adbd import Adbd  # noqa: E402
from tests.runtime.device.arm64_device import SYSTEM  # noqa: E402


def main(run: Path, wheel: Path) -> None:
    """Build, measure, report and take the picture, in a temporary folder."""
    with tempfile.TemporaryDirectory() as temporary:
        here = Path(temporary)
        os.environ |= {"XDG_CACHE_HOME": str(here / "cache"), "ANDROID_ADB_SERVER_PORT": str(_free_port())}
        copy = here / "runs" / run.name
        shutil.copytree(run, copy)
        _build_emulated(wheel, _system(here / "system"))
        (here / "phone").mkdir()
        with Adbd(here / "phone") as device:
            device.properties = {"ro.product.model": "no phone: arm64 in qemu-user"}
            device.path = f"{_commands(here / 'bin')}:{os.environ['PATH']}"
            bench = ["bench", f"runs/{run.name}/onnx-fp32", "--device", f"adb://{device.serial}", "--runner", "native"]
            try:
                _robx(here, [*bench, "--profile", "rapid"], statuses=(0, 3))
            finally:
                subprocess.run(["adb", "kill-server"], check=False)
        _robx(here, ["report", f"runs/{run.name}", "--budget", "3"])
        _photograph(here / "report.html", here)


def _system(folder: Path) -> Path:
    """The arm64 libraries, and the files in which ONNX Runtime looks for the processor."""
    folder.mkdir()
    (folder / "lib").symlink_to(LIBRARIES)
    for name, text in SYSTEM.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def _build_emulated(wheel: Path, system: Path) -> None:
    """The native runner for arm64, behind a script that starts it in the emulator."""
    build("linux-arm64", runtimes=[wheel])
    folder = native_folder("linux-arm64")
    runner = folder / NAME
    program = runner.rename(folder / f"{NAME}.arm64")
    runner.write_text(f'#!/bin/sh\nexec qemu-aarch64-static -cpu cortex-a72 -L {system} {program} "$@"\n')
    runner.chmod(0o755)
    info = json.loads((folder / INFO).read_text())
    (folder / INFO).write_text(json.dumps(info | {"sha256": sha256_file(runner)}))


def _commands(folder: Path) -> Path:
    """The commands of the device that tell its processor."""
    folder.mkdir()
    (folder / "uname").write_text("#!/bin/sh\necho aarch64\n")
    (folder / "uname").chmod(0o755)
    return folder


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _robx(folder: Path, arguments: list[str], *, statuses: tuple[int, ...] = (0,)) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", "robx.cli", *arguments], cwd=folder, env=environment, check=False)
    if done.returncode not in statuses:
        raise SystemExit(f"robx {arguments[0]} failed")


def _photograph(page: Path, profile: Path) -> None:
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}/browser"]
    size = ["--window-size=1000,1486", "--force-device-scale-factor=1.4"]
    command = ["chromium", *options, *size, f"--screenshot={PICTURE}", page.as_uri()]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
