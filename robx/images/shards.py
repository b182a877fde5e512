"""Tar shards of images in webdataset's layout: read in any order, written the same on any machine."""

from __future__ import annotations

import io
import itertools
import os
import tarfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from robx.errors import CorruptImage, InputError, UnreadableImage, counted
from robx.images.decode import MAX_FILE_BYTES, decode, decode_pixels
from robx.images.names import Names
from robx.images.tar_index import NO_LABEL, ShardIndex, TarIndex, index_shards, keep_index, split_name
from robx.store.files import fingerprint, read_json, sampled, sha256_bytes, stamp_of, start_of

_MAX_CLASSES = 10_000_000
# Labels up to here are taken for 0 ... n; beyond, only those that occur are classes.
_MOST_UNNAMED_CLASSES = 65_536


class ShardSource:
    """Uncompressed tar shards in webdataset's layout: ``key.jpg`` beside ``key.cls``.

    As in webdataset, the key ends at the first dot of the file's name. ``classes.json`` beside the shards names the
    classes of numeric labels; labels may also be names themselves.
    """

    licence = "unknown"

    def __init__(self, shards: Sequence[Path], *, name: str, image: str | None = None) -> None:
        """Index the members of `shards`, in order; nothing is extracted. The index of large shards is kept.

        Args:
            shards: the tar files.
            name: of the source.
            image: which image of a sample to read when it has several: what follows the key ("rgb.jpg", or "rgb").

        Raises:
            InputError: no readable image, or samples with several images and no choice among them.
        """
        self.name, self._shards = name, list(shards)
        index = index_shards(self._shards, image)
        if all(len(shard.faults) == len(shard.keys) for shard in index.shards):
            raise InputError(_why_nothing(self._shards, index.shards, image))
        self._keys = Names.joined(shard.keys for shard in index.shards)
        self._offsets = np.concatenate([shard.offsets for shard in index.shards])
        self._sizes = np.concatenate([shard.sizes for shard in index.shards])
        counts = [len(shard.keys) for shard in index.shards]
        self._numbers = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        starts = np.cumsum([0, *counts[:-1]]).tolist()
        self._faults = {
            start + at: fault
            for start, shard in zip(starts, index.shards, strict=True)
            for at, fault in shard.faults.items()
        }
        self._repeated = len(counts) > 1 and index.unique_keys is not True and _any_twice(self._keys)
        self.classes, self._labels, odd = _classes(self._shards[0].parent, index.shards)
        self.note = "; ".join((*odd, *_skipped(index.shards, image)))
        self.fingerprint = self._fingerprint(index)

    def _fingerprint(self, index: ShardIndex) -> str:
        """Of keys, sizes, labels and a sample of the images; taken from a kept index where the sample is the same."""
        sample = list(sampled(len(self), self._start))
        digest = fingerprint([*sample, sha256_bytes(self._labels.tobytes())])
        if index.fingerprint and index.sample == digest:
            return index.fingerprint
        rows = zip(range(len(self)), self._sizes.tolist(), self._labels.tolist(), strict=True)
        lines = (f"{self.key(at)}\0{size}\0{None if label < 0 else label}" for at, size, label in rows)
        found = fingerprint(itertools.chain(lines, sample))
        keep_index(replace(index, fingerprint=found, sample=digest, unique_keys=not self._repeated))
        return found

    @property
    def stamp(self) -> str:
        """Changes when a shard is rewritten, whatever it contains."""
        return stamp_of(len(self._shards), lambda number: self._shards[number])

    @property
    def labels(self) -> np.ndarray:
        """All labels at once, int64 (N,); -1 for none."""
        return self._labels.astype(np.int64)

    def _start(self, index: int, count: int) -> bytes:
        size, offset = int(self._sizes[index]), int(self._offsets[index])
        return start_of(self._shards[self._numbers[index]], min(count, size), offset=offset)

    def __len__(self) -> int:
        """The number of samples in the shards."""
        return len(self._keys)

    def key(self, index: int) -> str:
        """The sample's key; with the shard's name before it when shards repeat keys."""
        key = self._keys[index]
        return f"{self._shards[self._numbers[index]].stem}/{key}" if self._repeated else key

    def label(self, index: int) -> int | None:
        """The class that ``key.cls`` gives."""
        label = int(self._labels[index])
        return label if label >= 0 else None

    def read(self, index: int, *, at_least: int | None = None) -> Image.Image:
        """Read and decode one image; see `decode`."""
        data, name = self._read(index)
        return decode(data, name=name, at_least=at_least)

    def read_pixels(self, index: int, *, at_least: int | None = None) -> NDArray[np.uint8]:
        """Read and decode one image; see `decode_pixels`."""
        data, name = self._read(index)
        return decode_pixels(data, name=name, at_least=at_least)

    def _read(self, index: int) -> tuple[bytes, str]:
        """The encoded image and its name."""
        if fault := self._faults.get(index):
            raise CorruptImage(fault)
        shard, size = self._shards[self._numbers[index]], int(self._sizes[index])
        name = f"{shard}:{self._keys[index]}"
        if size > MAX_FILE_BYTES:
            raise CorruptImage(f"{name}: {size} bytes are too many for an image (at most {MAX_FILE_BYTES})")
        try:
            with shard.open("rb", buffering=0) as file:
                data = os.pread(file.fileno(), size, int(self._offsets[index]))
        except OSError as error:
            raise UnreadableImage(f"{shard}: cannot be read ({error.strerror})") from error
        return data, name


def _classes(folder: Path, shards: Sequence[TarIndex]) -> tuple[tuple[str, ...] | None, np.ndarray, list[str]]:
    """The class names, each sample's label int32 (N,), and what is wrong with labels and names."""
    counts = Counter(label for shard in shards for label in shard.labels if label)
    names = set(counts) - {NO_LABEL}
    numeric = {label for label in names if _is_number(label)}
    odd, notes = {NO_LABEL}, list[str]()
    if numeric == names:
        odd |= {label for label in numeric if int(label) >= _MAX_CLASSES}  # a negative number is the usual "none"
        classes, numbers, notes = _numbered(folder, {label for label in numeric - odd if int(label) >= 0})
    else:
        classes = tuple(sorted(names))
        numbers = {label: number for number, label in enumerate(classes)}
    total = sum(len(shard.keys) for shard in shards)
    written = (label for shard in shards for label in shard.labels)
    labels = np.fromiter((numbers.get(label, -1) for label in written), np.int32, total)
    if unusable := sum(counts[label] for label in odd):
        notes.append(f"{counted(unusable, 'sample')} with an empty or invalid .cls: unlabelled")
    return classes or None, labels, notes


def _any_twice(keys: Names) -> bool:
    return len(set(keys)) < len(keys)


def _numbered(folder: Path, labels: set[str]) -> tuple[tuple[str, ...], dict[str, int], list[str]]:
    """Class names of numeric labels: from classes.json, else the numbers themselves, with a note if it lacks some."""
    if not labels:
        return (), {}, []
    top, path = max(map(int, labels)), folder / "classes.json"
    names = read_json(path) if path.is_file() else None
    if isinstance(names, list) and len(names) > top:
        return tuple(str(name) for name in names), {label: int(label) for label in labels}, []
    notes = [f"{path} is not a list of {top + 1} or more names: classes are numbers"] if path.is_file() else []
    if top < _MOST_UNNAMED_CLASSES:
        return tuple(str(i) for i in range(top + 1)), {label: int(label) for label in labels}, notes
    values = sorted({int(label) for label in labels})
    place = {value: number for number, value in enumerate(values)}
    return tuple(map(str, values)), {label: place[int(label)] for label in labels}, notes


def _is_number(label: str) -> bool:
    digits = label.removeprefix("-")
    return len(digits) <= 20 and digits.isascii() and digits.isdigit()


def _why_nothing(shards: Sequence[Path], found: Sequence[TarIndex], image: str | None) -> str:
    fault = next((index.fault for index in found if index.fault), "")
    if fault:
        return fault
    if image is not None and any(index.without for index in found):
        return f"{shards[0]}: no sample has an image {image!r}: give another --image-member"
    where = shards[0] if len(shards) == 1 else shards[0].parent
    return f"{where} contains no images: expected members such as key.jpg and key.cls"


def _skipped(found: Sequence[TarIndex], image: str | None) -> list[str]:
    notes = []
    skipped: Counter[str] = sum((Counter(index.skipped) for index in found), Counter())
    if skipped:
        notes.append(f"skipped {counted(skipped.total(), 'image')} that robx cannot read ({by_suffix(skipped)})")
    if image is not None and (without := sum(index.without for index in found)):
        notes.append(f"skipped {counted(without, 'sample')} without an image {image!r}")
    return notes


def by_suffix(counts: Mapping[str, int]) -> str:
    """ "20 .heic, 4 .cr2", the most frequent first."""
    return ", ".join(f"{number} {suffix}" for suffix, number in sorted(counts.items(), key=lambda c: (-c[1], c[0])))


def write_shard(path: Path, samples: Iterable[tuple[str, bytes, int | None]]) -> None:
    """Write one tar shard of (key with its image suffix, encoded image, label or None).

    The bytes depend on the samples only: no time, owner or mode of this machine is written.
    """
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data, label in samples:
            _add(tar, name, data)
            if label is not None:
                _add(tar, split_name(name)[0] + ".cls", str(label).encode())


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))
