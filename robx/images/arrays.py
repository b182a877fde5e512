"""Images stored as one array: IDX files (the format of MNIST) and CIFAR's binary batches."""

from __future__ import annotations

import gzip
import hashlib
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from robx.errors import InputError
from robx.store.files import read_bytes

# A gzipped IDX file is unpacked into memory; an unpacked one is mapped, whatever its size. The largest published one
# (EMNIST) has 640 MB. CIFAR's largest file has 154 MB, and three copies of it exist while it is read.
_MAX_UNPACKED_BYTES = 700_000_000
_MAX_CIFAR_BYTES = 256_000_000
_MAX_NAMES_BYTES = 1024 * 1024
_CHUNK = 16 * 1024**2


class ArraySource:
    """Images in one uint8 array, (N, H, W) or (N, H, W, 3)."""

    licence = "unknown"
    stamp = ""  # the fingerprint covers all contents
    note = ""

    def __init__(
        self, name: str, pixels: np.ndarray, labels: np.ndarray | None, classes: tuple[str, ...] | None
    ) -> None:
        """Wrap existing arrays; `labels` are (N,)."""
        self.name, self.classes, self._pixels, self._labels = name, classes, pixels, labels
        digest = hashlib.sha256(str(pixels.shape).encode())
        digest.update(np.ascontiguousarray(pixels).data)
        if labels is not None:
            digest.update(np.ascontiguousarray(labels, dtype=np.int64).data)
        self.fingerprint = digest.hexdigest()[:16]

    def __len__(self) -> int:
        """The number of images."""
        return len(self._pixels)

    def key(self, index: int) -> str:
        """The row's number."""
        return f"{index:08d}"

    def label(self, index: int) -> int | None:
        """The row's label."""
        return None if self._labels is None else int(self._labels[index])

    def read(self, index: int, *, at_least: int | None = None) -> Image.Image:
        """One row as RGB; it has one size."""
        return Image.fromarray(self._pixels[index]).convert("RGB")

    def read_pixels(self, index: int, *, at_least: int | None = None) -> NDArray[np.uint8]:
        """The same as an array (H, W, 3)."""
        return np.asarray(self.read(index))


def read_idx(path: Path) -> np.ndarray:
    """A uint8 array from an IDX file (LeCun's MNIST format), gzipped or not; a file that is not is mapped into memory.

    Raises:
        InputError: not an IDX file of unsigned bytes, or its size does not match its header.
    """
    _require_file(path)
    try:
        with cast(IO[bytes], gzip.open(path)) if path.suffix == ".gz" else path.open("rb") as file:
            head = file.read(4)
            sizes = file.read(4 * head[3]) if len(head) == 4 else b""
            if not sizes or head[:3] != b"\0\0\x08" or len(sizes) != 4 * head[3]:
                raise InputError(f"{path} is not an IDX file of unsigned bytes: download it again")
            shape = tuple(int(n) for n in np.frombuffer(sizes, dtype=">u4"))
            expected = math.prod(shape)
            if path.suffix == ".gz":
                body = _unpack(file, expected, path)
            elif path.stat().st_size != 4 + len(sizes) + expected:
                body = None
            else:
                body = np.memmap(path, np.uint8, "r", 4 + len(sizes), expected) if expected else np.empty(0, np.uint8)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} cannot be read ({error}): download it again") from error
    if body is None:
        raise InputError(f"{path} does not have the {shape} bytes of its header: download it again")
    return body.reshape(shape)


def _unpack(file: IO[bytes], expected: int, path: Path) -> np.ndarray | None:
    """Exactly `expected` bytes, or None if there are more or fewer: a small gzip file may unpack to anything."""
    if expected > _MAX_UNPACKED_BYTES:
        raise InputError(f"{path} unpacks to {expected} bytes according to its header: unpack it with gunzip first")
    body, at = np.empty(expected, np.uint8), 0
    while at < expected:
        piece = file.read(min(_CHUNK, expected - at))
        if not piece:
            return None
        body[at : at + len(piece)] = np.frombuffer(piece, np.uint8)
        at += len(piece)
    return None if file.read(1) else body


def read_cifar_binary(paths: Sequence[Path], *, label_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """CIFAR's binary batches: uint8 (N, 32, 32, 3), and the last label byte of each record, int64 (N,)."""
    record = label_bytes + 3072
    for path in paths:
        _require_file(path)
    if (total := sum(path.stat().st_size for path in paths)) > _MAX_CIFAR_BYTES:
        raise InputError(f"{paths[0].parent}: {total} bytes are too many for CIFAR's batches: download it again")
    batches = []
    for path in paths:
        try:
            data = np.fromfile(path, dtype=np.uint8)
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error.strerror}): download it again") from error
        if not data.size or data.size % record:
            raise InputError(f"{path} is not a CIFAR binary batch ({data.size} bytes): download it again")
        batches.append(data.reshape(-1, record))
    rows = np.concatenate(batches)
    pixels = rows[:, label_bytes:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(pixels), rows[:, label_bytes - 1].astype(np.int64)


def _require_file(path: Path) -> None:
    """Refuse anything but a regular file: reading a pipe or a device may block for ever."""
    if not path.is_file():
        raise InputError(f"{path} is not a regular file: download it again")


def open_idx(path: Path, split: str) -> ArraySource | None:
    """The MNIST files of a split ("train" or "test") in the folder `path`; None when there are none."""
    prefix = {"train": "train", "test": "t10k"}[split]
    images = next(iter(sorted(path.glob(f"{prefix}-images*idx3-ubyte*"))), None)
    if images is None:
        return None
    pixels = read_idx(images)
    labels_path = next(iter(sorted(path.glob(f"{prefix}-labels*idx1-ubyte*"))), None)
    labels = read_idx(labels_path).astype(np.int64) if labels_path else None
    if pixels.ndim != 3 or not pixels.size or (labels is not None and labels.shape != pixels.shape[:1]):
        shapes = f"images {pixels.shape} and labels {labels.shape if labels is not None else None}"
        raise InputError(f"{path}: {images.name} and its labels do not match ({shapes}): download them again")
    classes = tuple(str(i) for i in range(int(labels.max()) + 1)) if labels is not None else None
    return ArraySource(path.name, pixels, labels, classes)


def open_cifar(path: Path, split: str) -> ArraySource | None:
    """CIFAR-10's or CIFAR-100's binary batches of a split in the folder `path`; None when there are none."""
    for names, label_bytes, train, test in (
        ("batches.meta.txt", 1, "data_batch_*.bin", "test_batch.bin"),
        ("fine_label_names.txt", 2, "train.bin", "test.bin"),
    ):
        files = sorted(path.glob(train if split == "train" else test))
        if (path / names).is_file() and files:
            pixels, labels = read_cifar_binary(files, label_bytes=label_bytes)
            classes = tuple(
                read_bytes(path / names, limit=_MAX_NAMES_BYTES).decode("utf-8-sig", errors="replace").split()
            )
            if (top := int(labels.max())) >= len(classes):
                raise InputError(f"{path}: {names} has no name for label {top} ({len(classes)} names): download it")
            return ArraySource(path.name, pixels, labels, classes)
    return None
