"""Reading weights from elsewhere: as data, never as code, and within limits.

A pickle is inspected by a process of its own with limits of time and memory (pickle_inspector.py), then read with
``weights_only``. Beside tensors two kinds of class are allowed: argparse.Namespace, in which DINO and iBOT store their
options, and paths among these options, read as pure paths, which open nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from robx.errors import ArtifactError, InputError, first_line

# The largest published file, iBOT's ViT-L with both branches and the optimiser, has about 5 GB.
MAX_CHECKPOINT_BYTES = 16 * 1024**3
# The description of the tensors of a safetensors file; a teacher's has some 100 kB.
_MAX_HEADER_BYTES = 8 * 1024**2
_INSPECTION_SECONDS = 60
_ALLOWED: list[Any] = [
    argparse.Namespace,
    *((PurePosixPath, f"pathlib.{name}") for name in ("PosixPath", "PurePosixPath")),
    *((PureWindowsPath, f"pathlib.{name}") for name in ("WindowsPath", "PureWindowsPath")),
    *((PurePosixPath, f"pathlib._local.{name}") for name in ("PosixPath", "PurePosixPath")),  # Python 3.13's name
]
_HARMLESS = re.compile(
    r"torch(\._utils\._rebuild_\w+|\.\w+|\.\w+\.\w+)|collections\.OrderedDict|argparse\.Namespace|pathlib\..*"
)
# Integers that accompany weights.
_COUNTERS = ("num_batches_tracked", "relative_position_index")


def read_checkpoint(path: Path) -> Any:
    """The contents of a ``.pth``, ``.pth.tar``, ``.pt`` or ``.safetensors`` file, on the CPU.

    Raises:
        InputError: the file does not exist or is not readable.
        ArtifactError: too large, truncated, damaged, or containing Python objects other than tensors.
    """
    _check_size(path)
    try:
        if path.suffix == ".safetensors":
            _check_header(path)
            return load_file(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}): check its permissions") from error
    except ArtifactError:
        raise
    except Exception as error:
        why = first_line(error, limit=120)
        raise ArtifactError(f"{path} is truncated, damaged or not a safetensors file ({why}): get it again") from error
    found = _inspect(path)
    try:
        with torch.serialization.safe_globals(_ALLOWED), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of another pickle protocol, which may be readable
            # Mapping keeps student and optimiser out of memory; only torch's zip format supports it.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}): check its permissions") from error
    except Exception as error:  # torch raises RuntimeError, EOFError, UnpicklingError, ... for a damaged file
        raise ArtifactError(_refusal(path, error, found)) from error


def require_sound(tensors: Mapping[str, Tensor], *, where: str) -> None:
    """Refuse tensors that cannot be a network's weights.

    Raises:
        ArtifactError: empty, sparse, complex, without data, larger than their data, or with NaN or infinity; the
            message names the first.
    """
    for key, value in tensors.items():
        if why := _unsound(value, counter=key.endswith(_COUNTERS)):
            raise ArtifactError(f"{where}: {str(key)[:80]} {why}: get the published file again")


def _unsound(value: Tensor, *, counter: bool) -> str:
    if value.layout != torch.strided or value.is_nested:
        return "is not a dense tensor"
    if value.device.type != "cpu":
        return "has no data"
    if counter:
        return ""
    if not value.dtype.is_floating_point:
        return f"has values of type {str(value.dtype).removeprefix('torch.')} instead of floating point"
    if not value.numel():
        return f"is empty, {tuple(value.shape)}"
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        return f"claims to be {tuple(value.shape)} and stores fewer numbers"
    return "" if bool(torch.isfinite(value).all()) else "contains NaN or infinity"


def _check_size(path: Path) -> None:
    if not path.is_file():
        raise InputError(
            f"{path} does not exist or is not a regular file: give the teacher's file to --teacher-weights"
        )
    size = path.stat().st_size
    if size > MAX_CHECKPOINT_BYTES:
        raise ArtifactError(f"{path} has {size / 1e9:.0f} GB, more than any teacher checkpoint: give another file")


def _check_header(path: Path) -> None:
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
    if size > _MAX_HEADER_BYTES:
        raise ArtifactError(
            f"{path} is truncated, damaged or not a safetensors file (its header has {size / 1e6:.0f} MB): get it again"
        )


def _inspect(path: Path) -> dict[str, Any]:
    """What pickle_inspector.py says of the file.

    Raises:
        ArtifactError: it exceeds a limit of time, memory or size.
    """
    script = Path(__file__).with_name("pickle_inspector.py")
    command = [sys.executable, "-I", "-S", str(script), os.fspath(path.absolute())]
    try:
        done = subprocess.run(command, capture_output=True, timeout=_INSPECTION_SECONDS, check=False)
        found: dict[str, Any] = json.loads(done.stdout)
    except (subprocess.TimeoutExpired, ValueError) as error:  # no output: the system ended it
        why = "takes too much time or memory to read"
        raise ArtifactError(f"{path} {why}: it is damaged or hostile, get the published file") from error
    if "limit" in found:
        raise ArtifactError(f"{path} {found['limit']}: it is not a teacher checkpoint, get the published file")
    return found


def _refusal(path: Path, error: Exception, found: Mapping[str, Any]) -> str:
    named = re.search(r"(?:GLOBAL|class) (\w+\.[\w.]*\w)", str(error))
    names = [named.group(1)] if named else [name for name in found["names"] if not _HARMLESS.fullmatch(name)]
    if names:
        return (
            f"{path} contains Python objects ({names[0]}), which robx never loads because they can run code: "
            "save only its tensors, or get the published file"
        )
    if found["protocol"] > 2:
        return (
            f"{path} was written with pickle protocol {found['protocol']}, and only protocol 2, torch.save's default, "
            "is read: save it again"
        )
    # A RuntimeError is of the zip reader; what the unpickler stumbles over says nothing to a user.
    why = f" ({first_line(error, limit=120)})" if isinstance(error, RuntimeError) else ""
    return f"{path} is truncated, damaged or not a PyTorch file{why}: get it again"
