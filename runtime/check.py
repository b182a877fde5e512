"""Check a port of a bundle: its output for the golden image, written by any program in any language."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from robx.errors import InputError
from robx.golden.compare import Comparison, compare
from robx.golden.sample import load_array, read_sample
from robx.records import load_bundle, require_bundle
from robx.store.files import read_bytes

RAW, TEXT = (".bin", ".raw"), (".txt", ".csv")  # float32, little endian; and decimal numbers


def check(bundle: Path, array: Path) -> Comparison:
    """Compare the array in a file with the golden sample of the bundle in a folder.

    Raises:
        InputError: `bundle` is not a bundle, or the file does not hold an output or an input tensor of its model.
        ArtifactError: the bundle is damaged, or has no golden sample.
    """
    require_bundle(bundle)
    record = load_bundle(bundle)
    sample = read_sample(bundle, record)
    values = read_array(array)
    try:
        return compare(values, sample, record)
    except InputError as error:
        raise InputError(f"{array}: {error}") from error


def read_array(path: Path) -> np.ndarray:
    """The numbers in a file: ``.npy``, raw float32 (``.bin``, ``.raw``), or text (``.txt``, ``.csv``).

    Raises:
        InputError: the file cannot be read as what its name says.
    """
    if path.suffix == ".npy":
        return load_array(path)
    content = read_bytes(path)
    if path.suffix in RAW:
        if not content or len(content) % 4:
            raise InputError(f"{path} has {len(content)} bytes, which are not float32 values: write 4 bytes for each")
        return np.frombuffer(content, dtype="<f4")
    if path.suffix not in TEXT:
        raise InputError(f"{path} is not an array: give .npy, raw float32 as .bin, or numbers as .txt")
    try:
        return np.array(
            [float(word) for word in content.decode("utf-8-sig").replace(",", " ").split()], dtype=np.float64
        )
    except ValueError as error:
        raise InputError(
            f"{path} is not a list of numbers ({error}): separate them by spaces, commas or lines"
        ) from error
