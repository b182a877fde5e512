"""The file that a device runs: a zipapp of `runtime/device/` and one engine, reproducible byte for byte."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

from robx.records import Bundle
from robx.runtime import device, engines
from robx.runtime.session import engine_module
from robx.store.files import sha256_bytes

NAME = "robx_runner.pyz"
_MAIN = "runner.py"  # becomes __main__.py
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time that a zip can store


def pack_runner(bundle: Bundle | None) -> bytes:
    """All of `runtime/device/` and the engine of `bundle`; without one it can only run ``--doctor``."""
    room = Path(str(device.__file__)).parent
    # Packages keep their names in robx, which is not installed on a device; their __init__ files are empty.
    files = {
        "__main__.py": (room / _MAIN).read_bytes(),
        "robx/__init__.py": b"",
        "robx/runtime/__init__.py": b"",
    }
    files |= {f"robx/runtime/device/{path.name}": path.read_bytes() for path in room.glob("*.py") if path.name != _MAIN}
    if bundle is not None:
        for module in (engines, engine_module(bundle)):
            path = Path(str(module.__file__))
            files[f"robx/runtime/engines/{path.name}"] = path.read_bytes()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in sorted(files.items()):
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, data, zipfile.ZIP_DEFLATED)
    return b"#!/usr/bin/env python3\n" + buffer.getvalue()


def engine_name(bundle: Bundle) -> str:
    """The engine's module in `robx.runtime.engines`, as the job names it."""
    return engine_module(bundle).__name__.rpartition(".")[2]


def runner_sha256(bundle: Bundle | None) -> str:
    """Hex SHA-256 of the runner zip."""
    return sha256_bytes(pack_runner(bundle))
