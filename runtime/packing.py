"""The one file that a device runs: a zipapp of runner.py, device.py and one engine, the same bytes every time."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

from robx.files import sha256_bytes
from robx.records import Bundle
from robx.runtime.session import engine_module

NAME = "robx_runner.pyz"
_HERE = Path(__file__).parent
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time that a zip can hold


def pack_runner(bundle: Bundle | None) -> bytes:
    """The runner with the engine of `bundle`; with none it can say what the device is (``--doctor``)."""
    files = {"__main__.py": _HERE / "runner.py", "device.py": _HERE / "device.py"}
    if bundle is not None:
        engine = Path(str(engine_module(bundle).__file__))
        files[engine.name] = engine
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, path in sorted(files.items()):
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, path.read_bytes(), zipfile.ZIP_DEFLATED)
    return b"#!/usr/bin/env python3\n" + buffer.getvalue()


def runner_sha256(bundle: Bundle | None) -> str:
    """Hex SHA-256 of that file."""
    return sha256_bytes(pack_runner(bundle))
