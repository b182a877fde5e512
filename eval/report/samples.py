"""Raw latency samples beside a measurement, read with bounded memory whatever the file claims to be."""

from __future__ import annotations

import zipfile
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np
from numpy.lib import format as npy

from robx.errors import ArtifactError, first_line
from robx.store.files import sha256_file

MAX_FILE_BYTES = 32 * 1024**2
MAX_SAMPLES = 8 * 1024**2  # of all processes together: 64 MB as nanoseconds
_MAX_HEADER = 1024
_DEFLATE_OR_NONE = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


def read_samples(folder: Path, name: str, sha256: str) -> tuple[np.ndarray, ...]:
    """The latencies in ms, float64, one array per process, of the .npz file `name` in `folder`.

    Raises:
        ArtifactError: no such file in the folder, another SHA-256, or anything but positive integer nanoseconds.
    """
    path = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts or path.is_symlink():
        raise ArtifactError("the path leaves the folder of the measurement: not read")
    if not path.is_file():
        raise ArtifactError("the file is missing: measure again")
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ArtifactError(f"larger than {MAX_FILE_BYTES} bytes: not read")
        if sha256_file(path) != sha256:
            raise ArtifactError("not the file that was measured (its SHA-256 differs): measure again")
        return _read(path)
    except ArtifactError:
        raise
    except Exception as error:  # zipfile and numpy raise whatever their parsers meet in a damaged file
        raise ArtifactError(f"cannot be read ({first_line(error)}): measure again") from error


def _read(path: Path) -> tuple[np.ndarray, ...]:
    found, left = [], MAX_SAMPLES
    with zipfile.ZipFile(path) as members:
        for info in sorted(members.infolist(), key=lambda info: info.filename):
            if "warm" in info.filename or PurePosixPath(info.filename).suffix != ".npy":
                continue
            if info.flag_bits & 1 or info.compress_type not in _DEFLATE_OR_NONE:
                raise ArtifactError(f"{info.filename} is encrypted or compressed in an unknown way: measure again")
            with members.open(info) as member:
                samples = _read_array(member, info.filename, most=left)
            if samples is not None:
                left -= len(samples)
                found.append(samples.astype(np.float64) / 1e6)
    if not found:
        raise ArtifactError("holds no integer nanoseconds: measure again")
    return tuple(found)


def _read_array(member: IO[bytes], name: str, *, most: int) -> np.ndarray | None:
    """One array of a .npz, read by its true length, never allocated by its header; None if it holds no samples."""
    if npy.read_magic(member) != (1, 0):
        raise ArtifactError(f"{name} is not in the version of .npy that robx writes: measure again")
    shape, _, dtype = npy.read_array_header_1_0(member, max_header_size=_MAX_HEADER)
    if len(shape) != 1 or not shape[0] or dtype.kind not in "iu":
        return None  # telemetry
    if shape[0] > most:
        raise ArtifactError(f"holds more than {MAX_SAMPLES} samples: not read")
    data = member.read(shape[0] * dtype.itemsize + 1)
    if len(data) != shape[0] * dtype.itemsize:
        raise ArtifactError(f"{name} does not hold the {shape[0]} samples that it claims: measure again")
    samples = np.frombuffer(data, dtype)
    if samples.min() <= 0:
        raise ArtifactError(f"{name} holds a latency of {samples.min()} ns: measure again")
    return samples
