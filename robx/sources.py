"""Where images come from: a folder, tar shards, IDX or CIFAR arrays. All are random access, ordered and fingerprinted.

A source never decodes before it is asked, and a sample that cannot be read raises CorruptImage when it is read, so that
whoever reads can count it against a budget.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import math
import os
import tarfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

import numpy as np
from PIL import Image

from robx.errors import CorruptImage, InputError
from robx.files import read_json
from robx.images import decode, read_image_file
from robx.records import DataInfo

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
_SPLIT_NAMES = {"train": ("train",), "test": ("test", "val", "validation")}
_MAX_ARRAY_BYTES = 4 * 1024**3
_MAX_LABEL_BYTES = 16
_MAX_CLASSES = 10_000_000


class ImageSource(Protocol):
    """Indexed images with optional labels."""

    name: str
    classes: tuple[str, ...] | None
    fingerprint: str  # 16 hex digits; the same images in the same order give the same

    def __len__(self) -> int:
        """How many samples there are, the unreadable ones included."""

    def key(self, index: int) -> str:
        """The sample's readable, unique name."""

    def label(self, index: int) -> int | None:
        """The index into `classes`, or None for an unlabelled sample."""

    def read(self, index: int) -> Image.Image:
        """The decoded RGB image.

        Raises:
            CorruptImage: it cannot be decoded.
        """


def open_source(path: Path, *, split: str | None = None) -> ImageSource:
    """Open whatever images are at `path`.

    `split` ("train" or "test") picks the subfolder, the ``train-*.tar`` shards or the array file of that split; "test"
    also finds ``val``. None takes everything, but "train" where a path has both splits.

    Raises:
        InputError: nothing there, not readable, no images, or no such split; the message says what is expected.
    """
    if split not in (None, *_SPLIT_NAMES):
        raise InputError(f"split {split!r} is neither train nor test")
    if not path.exists():
        raise InputError(f"{path} does not exist: give a folder of images, a .tar shard, or a folder of shards")
    if not os.access(path, os.R_OK | (os.X_OK if path.is_dir() else 0)):
        raise InputError(f"{path} cannot be read: fix its permissions")
    if path.is_file():
        if path.suffix != ".tar":
            raise InputError(f"{path} is a file: give a folder of images, a .tar shard, or a folder of shards")
        return ShardSource([path], name=path.stem)
    return _open_folder(path, split)


def data_info(source: ImageSource, *, licence: str = "unknown") -> DataInfo:
    """The record of which images these are."""
    return DataInfo(name=source.name, images=len(source), fingerprint=source.fingerprint, licence=licence)


def labels_of(source: ImageSource) -> np.ndarray:
    """Every sample's label, int64 (N,); -1 where there is none."""
    found = (source.label(index) for index in range(len(source)))
    return np.fromiter((-1 if label is None else label for label in found), dtype=np.int64, count=len(source))


class FolderSource:
    """Image files below a folder; with ImageFolder's layout (class/.../image) the first level gives the classes."""

    def __init__(self, root: Path) -> None:
        """List the image files below `root`, in the order of their relative paths."""
        self.root, self.name = root, root.name
        self._paths = sorted(_image_files(root))
        if not self._paths:
            raise InputError(f"{root} has no images ({', '.join(sorted(IMAGE_SUFFIXES))}): give another folder")
        tops = [path.split("/", 1)[0] if "/" in path else None for path in self._paths]
        self.classes = None if None in tops else tuple(sorted({top for top in tops if top is not None}))
        numbers = {name: i for i, name in enumerate(self.classes or ())}
        self._labels = [numbers[top] for top in tops if top is not None] if self.classes else None
        self.fingerprint = _fingerprint(f"{p}\0{_size(root / p)}" for p in self._paths)

    def __len__(self) -> int:
        """How many image files there are."""
        return len(self._paths)

    def key(self, index: int) -> str:
        """The path below the root."""
        return self._paths[index]

    def label(self, index: int) -> int | None:
        """The number of the first-level folder."""
        return self._labels[index] if self._labels else None

    def read(self, index: int) -> Image.Image:
        """Read and decode one file."""
        path = self.root / self._paths[index]
        return decode(read_image_file(path), name=str(path))


@dataclass(frozen=True)
class _Member:
    key: str
    shard: int
    offset: int
    size: int
    label: int | None
    fault: str = ""


class ShardSource:
    """Uncompressed tar shards in webdataset's layout: ``key.png`` beside ``key.cls``; classes.json names them."""

    def __init__(self, shards: Sequence[Path], *, name: str) -> None:
        """Index the members of `shards`, in order; nothing is extracted."""
        self.name, self._shards = name, list(shards)
        self._members: list[_Member] = []
        seen: set[str] = set()
        for number, shard in enumerate(self._shards):
            for member in _index_shard(shard, number):
                duplicate = member.key in seen and not member.fault
                fault = f"{shard}: the key {member.key!r} stands twice" if duplicate else member.fault
                self._members.append(_Member(member.key, number, member.offset, member.size, member.label, fault))
                seen.add(member.key)
        if not self._members:
            raise InputError(f"{shards[0].parent} has shards without images: expected members such as key.jpg, key.cls")
        self.classes = _class_names(self._shards[0].parent, self._members)
        self.fingerprint = _fingerprint(f"{m.key}\0{m.size}\0{m.label}" for m in self._members)

    def __len__(self) -> int:
        """How many samples the shards hold."""
        return len(self._members)

    def key(self, index: int) -> str:
        """The member's name without its suffix."""
        return self._members[index].key

    def label(self, index: int) -> int | None:
        """What key.cls says."""
        return self._members[index].label

    def read(self, index: int) -> Image.Image:
        """Read and decode one member."""
        member = self._members[index]
        if member.fault:
            raise CorruptImage(member.fault)
        shard = self._shards[member.shard]
        try:
            with shard.open("rb", buffering=0) as file:
                data = os.pread(file.fileno(), member.size, member.offset)
        except OSError as error:
            raise CorruptImage(f"{shard}: cannot be read ({error.strerror})") from error
        return decode(data, name=f"{shard}:{member.key}")


class ArraySource:
    """Images held in one uint8 array, (N, H, W) or (N, H, W, 3)."""

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
        data = np.fromfile(path, dtype=np.uint8)
        if not data.size or data.size % record:
            raise InputError(f"{path} is not a CIFAR binary batch ({data.size} bytes): fetch it again")
        batches.append(data.reshape(-1, record))
    rows = np.concatenate(batches)
    pixels = rows[:, label_bytes:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(pixels), rows[:, label_bytes - 1].astype(np.int64)


def _open_folder(path: Path, split: str | None) -> ImageSource:
    for opener in (_open_idx, _open_cifar):
        found = opener(path, split or "train")
        if found is not None:
            return found
    if shards := sorted(path.glob("*.tar")):
        return ShardSource(_pick_shards(path, shards, split), name=path.name)
    have = {s: next((path / n for n in names if (path / n).is_dir()), None) for s, names in _SPLIT_NAMES.items()}
    chosen = split or ("train" if all(have.values()) else None)
    if chosen is None:
        return FolderSource(path)
    folder = have[chosen]
    if folder is None:
        expected = " or ".join(f"{name}/" for name in _SPLIT_NAMES[chosen])
        raise InputError(f"{path} has no {chosen} split: expected {expected} or {chosen}-*.tar in it")
    return _open_folder(folder, None)


def _pick_shards(path: Path, shards: list[Path], split: str | None) -> list[Path]:
    by_split = {s: [p for p in shards if p.name.startswith(names)] for s, names in _SPLIT_NAMES.items()}
    if split is None:
        return by_split["train"] if all(by_split.values()) else shards
    if not by_split[split]:
        raise InputError(f"{path} has no {split} split: expected {split}-*.tar in it")
    return by_split[split]


def _open_idx(path: Path, split: str) -> ImageSource | None:
    prefix = {"train": "train", "test": "t10k"}[split]
    images = next(iter(sorted(path.glob(f"{prefix}-images*idx3-ubyte*"))), None)
    if images is None:
        return None
    pixels = read_idx(images)
    labels_path = next(iter(sorted(path.glob(f"{prefix}-labels*idx1-ubyte*"))), None)
    labels = read_idx(labels_path).astype(np.int64) if labels_path else None
    if pixels.ndim != 3 or (labels is not None and labels.shape != pixels.shape[:1]):
        raise InputError(f"{path}: {images.name} has shape {pixels.shape} and its labels do not fit: fetch them again")
    classes = tuple(str(i) for i in range(int(labels.max()) + 1)) if labels is not None else None
    return ArraySource(path.name, pixels, labels, classes)


def _open_cifar(path: Path, split: str) -> ImageSource | None:
    for names, label_bytes, train, test in (
        ("batches.meta.txt", 1, "data_batch_*.bin", "test_batch.bin"),
        ("fine_label_names.txt", 2, "train.bin", "test.bin"),
    ):
        files = sorted(path.glob(train if split == "train" else test))
        if (path / names).is_file() and files:
            pixels, labels = read_cifar_binary(files, label_bytes=label_bytes)
            classes = tuple((path / names).read_text().split())
            return ArraySource(path.name, pixels, labels, classes)
    return None


def _index_shard(shard: Path, number: int) -> Iterable[_Member]:
    """The shard's samples; a cut or damaged tail becomes one sample that cannot be read."""
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    wrong: dict[str, str] = {}
    members: list[_Member] = []
    size = shard.stat().st_size
    try:
        with tarfile.open(shard, "r:") as tar:
            for info in tar:
                key, suffix = _split(info.name)
                if not info.isfile():
                    continue
                if info.size < 0 or info.offset_data + info.size > size:
                    members.append(_Member(key, number, 0, 0, None, f"{shard}: it is cut inside {info.name!r}"))
                    break
                if suffix.lower() in IMAGE_SUFFIXES:
                    if key in images:
                        members.append(_Member(key, number, 0, 0, None, f"{shard}: the key {key!r} stands twice"))
                    images[key] = (info.offset_data, info.size)
                elif suffix == ".cls":
                    file = tar.extractfile(info)
                    label = _label(file.read(_MAX_LABEL_BYTES + 1)) if file else None
                    if label is None:
                        wrong[key] = f"{shard}: {info.name!r} holds no label"
                    else:
                        labels[key] = label
    except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
        members.append(_Member(f"{shard.stem}-damaged", number, 0, 0, None, f"{shard}: it is damaged ({error})"))
    good = [
        _Member(key, number, at, length, labels.get(key), wrong.get(key, "")) for key, (at, length) in images.items()
    ]
    return good + members


def _label(text: bytes) -> int | None:
    """The number that a .cls member holds, or None when it is none that a class could have."""
    digits = text.strip()
    return int(digits) if len(text) <= _MAX_LABEL_BYTES and digits.isdigit() and int(digits) < _MAX_CLASSES else None


def _class_names(folder: Path, members: Sequence[_Member]) -> tuple[str, ...] | None:
    top = max((m.label for m in members if m.label is not None), default=None)
    if top is None:
        return None
    names = read_json(folder / "classes.json") if (folder / "classes.json").is_file() else None
    if isinstance(names, list) and len(names) > top:
        return tuple(str(name) for name in names)
    return tuple(str(i) for i in range(top + 1))


def _size(path: Path) -> int:
    """Bytes of a file, -1 where a link points nowhere: that is a corrupt image when it is read."""
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _image_files(root: Path) -> Iterable[str]:
    for folder, folders, files in os.walk(root, followlinks=True):
        # A link to a folder that is above itself would go on for ever.
        above = {os.path.realpath(p) for p in (Path(folder), *Path(folder).parents) if p.is_relative_to(root)}
        kept = (f for f in folders if not f.startswith("."))
        folders[:] = sorted(f for f in kept if os.path.realpath(os.path.join(folder, f)) not in above)  # noqa: PTH118
        base = Path(folder).relative_to(root).as_posix()
        for file in files:
            if _split(file)[1].lower() in IMAGE_SUFFIXES and not file.startswith("."):
                yield file if base == "." else f"{base}/{file}"


def _fingerprint(lines: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode("utf-8", "surrogateescape") + b"\n")
    return digest.hexdigest()[:16]


def write_shard(path: Path, samples: Iterable[tuple[str, bytes, int | None]]) -> None:
    """Write one tar shard of (key with its image suffix, encoded image, label or None).

    The bytes depend on the samples alone: no time, owner or mode of this machine goes in.
    """
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data, label in samples:
            _add(tar, name, data)
            if label is not None:
                _add(tar, _split(name)[0] + ".cls", str(label).encode())


def _split(name: str) -> tuple[str, str]:
    """`name` without its suffix, and the suffix; folders in the name stay."""
    suffix = PurePosixPath(name).suffix
    return name.removesuffix(suffix), suffix


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))
