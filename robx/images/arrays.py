"""Images that come as one array: IDX files (MNIST's format) and CIFAR's binary batches."""

from __future__ import annotations

import gzip
import hashlib
import math
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from robx.errors import InputError
from robx.store.files import read_bytes

_MAX_ARRAY_BYTES = 4 * 1024**3
_MAX_NAMES_BYTES = 1024 * 1024


class ArraySource:
    """Images held in one uint8 array, (N, H, W) or (N, H, W, 3)."""

    licence = "unknown"
    stamp = ""  # the fingerprint is of all that it holds

    def __init__(
        self, name: str, pixels: np.ndarray, labels: np.ndarray | None, classes: tuple[str, ...] | None
    ) -> None:
        """Wrap arrays that are in memory already."""
        self.name, self.classes, self._pixels, self._labels = name, classes, pixels, labels
        digest = hashlib.sha256(str(pixels.shape).encode())
        digest.update(np.ascontiguousarray(pixels).data)
        if labels is not None:
            digest.update(np.ascontiguousarray(labels, dtype=np.int64).data)
        self.fingerprint = digest.hexdigest()[:16]

    def __len__(self) -> int:
        """How many images there are."""
        return len(self._pixels)

    def key(self, index: int) -> str:
        """The row's number."""
        return f"{index:08d}"

    def label(self, index: int) -> int | None:
        """The row's label."""
        return None if self._labels is None else int(self._labels[index])

    def read(self, index: int) -> Image.Image:
        """One row as RGB."""
        return Image.fromarray(self._pixels[index]).convert("RGB")


def read_idx(path: Path) -> np.ndarray:
    """A uint8 array from an IDX file (LeCun's MNIST format), gzipped or not.

    Raises:
        InputError: not an IDX file of unsigned bytes, or its size is not what its header says.
    """
    _require_file(path)
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            head = file.read(4)
            sizes = file.read(4 * head[3]) if len(head) == 4 else b""
            if not sizes or head[:3] != b"\0\0\x08" or len(sizes) != 4 * head[3]:
                raise InputError(f"{path} is not an IDX file of unsigned bytes: fetch it again")
            shape = tuple(int(n) for n in np.frombuffer(sizes, dtype=">u4"))
            expected = math.prod(shape)
            # No more than the header says is read: a small gzip may unpack to anything.
            body = file.read(expected + 1) if expected <= _MAX_ARRAY_BYTES else b""
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} cannot be read ({error}): fetch it again") from error
    if len(body) != expected:
        raise InputError(f"{path} does not hold the {shape} bytes that its header says: fetch it again")
    return np.frombuffer(body, dtype=np.uint8).reshape(shape)


def read_cifar_binary(paths: Sequence[Path], *, label_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """CIFAR's binary batches: uint8 (N, 32, 32, 3) and the last label byte of each record, int64 (N,)."""
    record = label_bytes + 3072
    batches = []
    for path in paths:
        _require_file(path)
        try:
            data = np.fromfile(path, dtype=np.uint8)
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error.strerror}): fetch it again") from error
        if not data.size or data.size % record:
            raise InputError(f"{path} is not a CIFAR binary batch ({data.size} bytes): fetch it again")
        batches.append(data.reshape(-1, record))
    rows = np.concatenate(batches)
    pixels = rows[:, label_bytes:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(pixels), rows[:, label_bytes - 1].astype(np.int64)


def _require_file(path: Path) -> None:
    """Refuse what is no regular file, for reading it may never end, and what would fill the memory."""
    if not path.is_file():
        raise InputError(f"{path} is no file: fetch it again")
    if path.stat().st_size > _MAX_ARRAY_BYTES:
        raise InputError(f"{path} is larger than {_MAX_ARRAY_BYTES} bytes: give its images as files or shards")


def open_idx(path: Path, split: str) -> ArraySource | None:
    """MNIST's files in `path`, of "train" or "test"; None when there are none."""
    prefix = {"train": "train", "test": "t10k"}[split]
    images = next(iter(sorted(path.glob(f"{prefix}-images*idx3-ubyte*"))), None)
    if images is None:
        return None
    pixels = read_idx(images)
    labels_path = next(iter(sorted(path.glob(f"{prefix}-labels*idx1-ubyte*"))), None)
    labels = read_idx(labels_path).astype(np.int64) if labels_path else None
    if pixels.ndim != 3 or not pixels.size or (labels is not None and labels.shape != pixels.shape[:1]):
        raise InputError(f"{path}: {images.name} has shape {pixels.shape} and its labels do not fit: fetch them again")
    classes = tuple(str(i) for i in range(int(labels.max()) + 1)) if labels is not None else None
    return ArraySource(path.name, pixels, labels, classes)


def open_cifar(path: Path, split: str) -> ArraySource | None:
    """CIFAR-10's or CIFAR-100's binary batches in `path`, of "train" or "test"; None when there are none."""
    for names, label_bytes, train, test in (
        ("batches.meta.txt", 1, "data_batch_*.bin", "test_batch.bin"),
        ("fine_label_names.txt", 2, "train.bin", "test.bin"),
    ):
        files = sorted(path.glob(train if split == "train" else test))
        if (path / names).is_file() and files:
            pixels, labels = read_cifar_binary(files, label_bytes=label_bytes)
            classes = tuple(read_bytes(path / names, limit=_MAX_NAMES_BYTES).decode(errors="replace").split())
            if (top := int(labels.max())) >= len(classes):
                raise InputError(f"{path} has the label {top} and {names} names {len(classes)} classes: fetch it again")
            return ArraySource(path.name, pixels, labels, classes)
    return None
