"""Check a port of a bundle: its output for the golden image, written by any program in any language."""

from __future__ import annotations

import codecs
import dataclasses
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from robx.errors import InputError
from robx.golden.compare import Comparison, compare, widths_of
from robx.golden.mistakes import Mistake
from robx.golden.sample import GoldenSample, check_preprocessing, parse_array, read_sample
from robx.records import Bundle, load_bundle, require_bundle, warn_outdated

RAW, TEXT = (".bin", ".raw"), (".txt", ".csv")  # float32, little endian; and decimal numbers
_MAX_BYTES = 2**30
_BIG_ENDIAN = Mistake(
    name="big-endian",
    said="the values are big-endian",
    remedy="write little-endian float32, as most processors have it",
)


def check(bundle: Path, array: Path, *, say: Callable[[str], None] = lambda _: None) -> Comparison:
    """Compare the array in a file with the golden sample of the bundle in a folder.

    A raw file is read as float32 or, where only that has the right number of values, as float64, float16 or uint8.
    `say` is called with a line about a bundle that should not be used any more.

    Raises:
        InputError: `bundle` is not a bundle, or the file does not hold an output or an input tensor of its model.
        ArtifactError: the bundle is damaged, or has no golden sample.
    """
    if bundle.is_file():
        raise InputError(f"{bundle} is a file: give the folder of the bundle")
    require_bundle(bundle)
    record = load_bundle(bundle)
    warn_outdated(bundle, record, say)
    sample = read_sample(bundle, record)
    check_preprocessing(bundle, record)
    content = _content(array)
    try:
        if array.suffix in RAW:
            return _compare_raw(content, sample, record)
        return compare(_parse(content, array), sample, record)
    except InputError as error:
        raise InputError(f"{array}: {error}") from None


def _compare_raw(content: bytes, sample: GoldenSample, bundle: Bundle) -> Comparison:
    """Compare raw numbers, little-endian float32 unless they can only be others; wrong bytes are named."""
    sizes = widths_of(sample)
    for kind, counts in (("float64", sizes), ("float16", sizes), ("uint8", {sample.inputs.size})):
        dtype = np.dtype(kind).newbyteorder("<")
        if len(content) in {dtype.itemsize * count for count in counts} - {4 * count for count in sizes}:
            found = compare(np.frombuffer(content, dtype=dtype), sample, bundle)
            return dataclasses.replace(found, note="; ".join(filter(None, (f"read as {kind}", found.note))))
    if not content or len(content) % 4:
        raise InputError(f"{len(content)} bytes are not float32 values: write 4 bytes for each")
    found = compare(np.frombuffer(content, dtype="<f4"), sample, bundle)
    if found.passes:
        return found
    turned = compare(np.frombuffer(content, dtype=">f4"), sample, bundle)
    return found.blamed_on(_BIG_ENDIAN, turned.difference) if turned.passes else found


def _content(path: Path) -> bytes:
    """The bytes of the user's file.

    Raises:
        InputError: it does not exist, cannot be read, or cannot be an array.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise InputError(f"{path} is not a regular file: give a file that holds the array")
        if found.st_size > _MAX_BYTES:
            raise InputError(
                f"{path} has {found.st_size / 1e9:.1f} GB: give the output or the input tensor of one image"
            )
        return path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: give the file that your program wrote") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): check its path and its permissions") from error


def _parse(content: bytes, path: Path) -> np.ndarray:
    """The numbers in a file: ``.npy``, or text (``.txt``, ``.csv``).

    Raises:
        InputError: it does not hold what its name says.
    """
    if path.suffix == ".npy":
        return parse_array(content, where=str(path))
    if path.suffix not in TEXT:
        raise InputError("it is not an array: give .npy, raw float32 as .bin, or numbers as .txt")
    try:
        return np.array(list(_numbers(content)), dtype=np.float64)
    except ValueError as error:
        raise InputError(f"it is not a list of numbers ({error}): separate them by spaces, commas or lines") from error


_SEPARATORS = str.maketrans(",;[]()", " " * 6)  # as Python and others print lists


def _numbers(content: bytes) -> Iterator[float]:
    """The numbers in a text; Windows' programs begin one with a byte order mark, and may write UTF-16."""
    wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = content.decode("utf-16" if wide else "utf-8-sig")
    return (float(word) for word in text.translate(_SEPARATORS).split())
