"""Where images come from: a folder, tar shards, IDX or CIFAR arrays. All are random access, ordered and fingerprinted.

A source never decodes before it is asked, and a sample that cannot be read raises CorruptImage when it is read, so that
whoever reads can count it against a budget.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Protocol

import numpy as np
from PIL import Image

from robx.errors import InputError, NoSplit
from robx.images.arrays import open_cifar, open_idx
from robx.images.decode import IMAGE_SUFFIXES, decode, read_image_file
from robx.images.shards import ShardSource
from robx.records import DataInfo
from robx.store.files import fingerprint, fingerprint_files, read_bytes, stamp_of

# Under which licence the images are, as an SPDX name or in words: it goes into every record that is made from them.
LICENCE_FILE = "licence.txt"
_MAX_LICENCE_BYTES = 64 * 1024
_SPLIT_NAMES = {"train": ("train",), "test": ("test", "val", "validation")}


class ImageSource(Protocol):
    """Indexed images with optional labels."""

    name: str
    classes: tuple[str, ...] | None
    fingerprint: str  # 16 hex digits; the same images in the same order give the same
    licence: str  # as licence.txt beside the images says, else "unknown"

    @property
    def stamp(self) -> str:
        """Changes when a file of them was written again, whatever it holds; empty where the fingerprint tells."""

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
        source: ImageSource = ShardSource([path], name=path.stem)
    else:
        source = _open_folder(path, split)
    source.licence = _read_licence(path if path.is_dir() else path.parent)
    return source


def data_info(source: ImageSource) -> DataInfo:
    """The record of which images these are."""
    return DataInfo(
        name=source.name, images=len(source), fingerprint=source.fingerprint, licence=source.licence or "unknown"
    )


def labels_of(source: ImageSource) -> np.ndarray:
    """Every sample's label, int64 (N,); -1 where there is none."""
    found = (source.label(index) for index in range(len(source)))
    return np.fromiter((-1 if label is None else label for label in found), dtype=np.int64, count=len(source))


class LabelledSource:
    """The labelled samples of a source whose other samples have no label."""

    def __init__(self, source: ImageSource, chosen: np.ndarray) -> None:
        """Keep the samples at the places `chosen`."""
        self.name, self.classes, self._source, self._chosen = source.name, source.classes, source, chosen
        self.fingerprint, self.licence = fingerprint([source.fingerprint, "labelled"]), source.licence

    @property
    def stamp(self) -> str:
        """That of the whole source."""
        return self._source.stamp

    def __len__(self) -> int:
        """How many samples have a label."""
        return len(self._chosen)

    def key(self, index: int) -> str:
        """The sample's name in the whole source."""
        return self._source.key(int(self._chosen[index]))

    def label(self, index: int) -> int | None:
        """The sample's label."""
        return self._source.label(int(self._chosen[index]))

    def read(self, index: int) -> Image.Image:
        """The decoded RGB image."""
        return self._source.read(int(self._chosen[index]))


def labelled(source: ImageSource) -> ImageSource:
    """The source without its unlabelled samples; the source itself when it has none."""
    chosen = np.flatnonzero(labels_of(source) >= 0)
    return source if len(chosen) == len(source) else LabelledSource(source, chosen)


class FolderSource:
    """Image files below a folder; with ImageFolder's layout (class/.../image) the first level gives the classes."""

    licence = "unknown"

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
        self.fingerprint = fingerprint_files(root, self._paths, lines=self._paths)

    @property
    def stamp(self) -> str:
        """Changes when a file was written again, whatever it holds."""
        return stamp_of(self.root / path for path in self._paths)

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


def _read_licence(folder: Path) -> str:
    """The first line of licence.txt."""
    path = folder / LICENCE_FILE
    if not path.is_file():
        return "unknown"
    lines = read_bytes(path, limit=_MAX_LICENCE_BYTES).decode(errors="replace").splitlines()
    return lines[0].strip()[:200] if lines else "unknown"


def open_part(path: Path, split: str) -> ImageSource:
    """That split of the data, or all of them where they have none; damaged ones are refused and not passed over."""
    try:
        return open_source(path, split=split)
    except NoSplit:
        return open_source(path)


def class_numbers(names: Sequence[str], into: Sequence[str]) -> np.ndarray:
    """The place of each of `names` among `into`, int64; -1 for one that is not there."""
    place = {name: number for number, name in enumerate(into)}
    return np.array([place.get(name, -1) for name in names], dtype=np.int64)


def renumbered(labels: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Labels (N,) by `class_numbers`; -1, no label, stays."""
    found: np.ndarray = np.where(labels >= 0, numbers[np.maximum(labels, 0)], -1)
    return found


def _open_folder(path: Path, split: str | None) -> ImageSource:
    for opener in (open_idx, open_cifar):
        found = opener(path, split or "train")
        if found is not None:
            return found
    have = {s: next((path / n for n in names if (path / n).is_dir()), None) for s, names in _SPLIT_NAMES.items()}
    # A tar beside train/ and val/ is what they were unpacked from.
    if not all(have.values()) and (shards := sorted(path.glob("*.tar"))):
        return ShardSource(_pick_shards(path, shards, split), name=path.name)
    chosen = split or ("train" if all(have.values()) else None)
    if chosen is None:
        return FolderSource(path)
    folder = have[chosen]
    if folder is None:
        expected = " or ".join(f"{name}/" for name in _SPLIT_NAMES[chosen])
        raise NoSplit(f"{path} has no {chosen} split: expected {expected} or {chosen}-*.tar in it")
    return _open_folder(folder, None)


def _pick_shards(path: Path, shards: list[Path], split: str | None) -> list[Path]:
    by_split = {s: [p for p in shards if p.name.startswith(names)] for s, names in _SPLIT_NAMES.items()}
    if split is None:
        return by_split["train"] if all(by_split.values()) else shards
    if not by_split[split]:
        raise NoSplit(f"{path} has no {split} split: expected {split}-*.tar in it")
    return by_split[split]


def _refuse_folder(error: OSError) -> None:
    """A folder that is left out silently would be a class that is missing."""
    raise InputError(f"{error.filename} cannot be read ({error.strerror}): fix its permissions, or move it away")


def _image_files(root: Path) -> Iterable[str]:
    for folder, folders, files in os.walk(root, followlinks=True, onerror=_refuse_folder):
        # A link to a folder that is above itself would go on for ever.
        above = {os.path.realpath(p) for p in (Path(folder), *Path(folder).parents) if p.is_relative_to(root)}
        kept = (f for f in folders if not f.startswith("."))
        folders[:] = sorted(f for f in kept if os.path.realpath(os.path.join(folder, f)) not in above)  # noqa: PTH118
        base = Path(folder).relative_to(root).as_posix()
        for file in files:
            if PurePosixPath(file).suffix.lower() in IMAGE_SUFFIXES and not file.startswith("."):
                yield file if base == "." else f"{base}/{file}"
