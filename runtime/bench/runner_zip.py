"""The one file that a device runs: a zipapp of the runner, its helpers and one engine, the same bytes every time."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

from robx.store.files import sha256_bytes
from robx.records import Bundle
from robx.runtime.session import engine_module

NAME = "robx_runner.pyz"
HELPERS = ("device.py", "nvidia.py", "sysfs.py", "timing.py", "watch.py")
_HERE = Path(__file__).parent
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time that a zip can hold


def pack_runner(bundle: Bundle | None) -> bytes:
    """The runner with the engine of `bundle`; with none it can say what the device is (``--doctor``)."""
    names = list(HELPERS)
    if bundle is not None:
        names.append(Path(str(engine_module(bundle).__file__)).name)
    # Below the names that they have in robx, which is not installed on a device.
    files = {
        "__main__.py": (_HERE / "runner.py").read_bytes(),
        "robx/__init__.py": b"",
        "robx/runtime/__init__.py": b"",
    }
    files |= {f"robx/runtime/{name}": (_HERE / name).read_bytes() for name in names}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in sorted(files.items()):
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, data, zipfile.ZIP_DEFLATED)
    return b"#!/usr/bin/env python3\n" + buffer.getvalue()


def runner_sha256(bundle: Bundle | None) -> str:
    """Hex SHA-256 of that file."""
    return sha256_bytes(pack_runner(bundle))
