"""Where images come from: a folder, tar shards, IDX or CIFAR arrays. All are ordered, fingerprinted, random access.

A source decodes nothing before it is asked to, and a sample that cannot be read raises CorruptImage when it is read, so
that the reader can count it against a limit.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from robx.errors import InputError, NoSplit, counted
from robx.images.arrays import open_cifar, open_idx
from robx.images.decode import decode, decode_pixels, read_image_file
from robx.images.derived import DerivedSource
from robx.images.labels import unmatched_note, with_labels
from robx.images.listing import Listing, is_ours, keep, list_images
from robx.images.protocol import ImageSource as ImageSource
from robx.images.shards import ShardSource, by_suffix
from robx.images.splits import Split, choose_folder, choose_shards, split_folders
from robx.records import DataInfo
from robx.store.files import fingerprint, read_bytes, sampled, stamp_of, start_of

# The images' licence, as an SPDX name or in words; it goes into every record that is made from them.
LICENCE_FILE = "licence.txt"
_MAX_LICENCE_BYTES = 64 * 1024
_MOST_STRAYS = 0.1  # of all images, beside class folders


def open_source(
    path: Path, *, split: str | None = None, labels: Path | None = None, image_member: str | None = None
) -> ImageSource:
    """Open the images at `path`.

    Args:
        path: a folder of images (one folder per class, or flat), of tar shards, of IDX or CIFAR files, or one shard.
        split: "train" or "test" picks the subfolder, shards or array file of that split, by its usual names in any
            case. None takes everything, or the training split where there are several.
        labels: a CSV file with a path and a label in each line, instead of the labels of folders or shards.
        image_member: which image of a shard's sample to read when it has several ("rgb.jpg").

    Raises:
        InputError: nothing there, not readable, no images, or no such split; the message says what is expected.
    """
    if split not in (None, "train", "test"):
        raise InputError(f"split {split!r} is neither train nor test")
    if not path.exists():
        raise InputError(f"{path} does not exist: give a folder of images, a .tar shard, or a folder of shards")
    if not os.access(path, os.R_OK | (os.X_OK if path.is_dir() else 0)):
        raise InputError(f"{path} cannot be read: fix its permissions")
    if path.is_dir():
        source = _open_folder(path, split, image_member, classes=labels is None)
    elif path.suffix.lower() != ".tar":
        raise InputError(f"{path} is a file: give a folder of images, a .tar shard, or a folder of shards")
    else:
        source = ShardSource([path], name=path.stem, image=image_member)
    if image_member is not None and not isinstance(source, ShardSource):
        source = _noted(source, f"{path} has no tar shards, so that --image-member {image_member} has no effect on it")
    source.licence = _read_licence(path if path.is_dir() else path.parent)
    if labels is None:
        return source
    found = with_labels(source, labels)
    if split is None:  # a file of all splits has lines for the others, too: see open_split
        found.note = "; ".join(filter(None, (found.note, unmatched_note(found))))
    return found


def data_info(source: ImageSource) -> DataInfo:
    """The record of these images."""
    return DataInfo(
        name=source.name, images=len(source), fingerprint=source.fingerprint, licence=source.licence or "unknown"
    )


def labels_of(source: ImageSource) -> np.ndarray:
    """Every sample's label, int64 (N,); -1 for none."""
    if (known := getattr(source, "labels", None)) is not None:  # of a million images, without a call for each
        return np.asarray(known, dtype=np.int64)
    found = (source.label(index) for index in range(len(source)))
    return np.fromiter((-1 if label is None else label for label in found), dtype=np.int64, count=len(source))


def labelled(source: ImageSource) -> ImageSource:
    """The source without its unlabelled samples; the source itself if it has none."""
    chosen = np.flatnonzero(labels_of(source) >= 0)
    if len(chosen) == len(source):
        return source
    return DerivedSource(source, fingerprint=fingerprint([source.fingerprint, "labelled"]), chosen=chosen)


class FolderSource:
    """Image files below a folder; in ImageFolder's layout (class/.../image) the first level gives the classes.

    A few images beside the class folders are unlabelled; among many, there are no classes.
    """

    licence = "unknown"

    def __init__(self, root: Path, *, classes: bool = True) -> None:
        """List the image files below `root`, in the order of their relative paths; without `classes`, unlabelled.

        Raises:
            InputError: no images, or a folder that cannot be read.
        """
        self.root, self.name = root, root.name
        listing, kept = list_images(root)
        self._paths = listing.names
        if not len(self._paths):
            there = f", but {by_suffix(listing.skipped)}" if listing.skipped else ""
            raise InputError(f"{root} has no images (.jpg, .png, .webp, .tif, .avif, ...){there}: give another folder")
        strays = self._set_labels(classes=classes)
        self.note = self._notes(strays if classes else (), listing)
        self.fingerprint = self._fingerprint(listing, kept)

    def _set_labels(self, *, classes: bool) -> list[str]:
        """Number the first-level folders; returns the images that are beside them."""
        numbers: dict[str, int] = {}
        labels, strays = np.full(len(self._paths), -1, np.int32), []
        for index, path in enumerate(self._paths):
            top, slash, _ = path.partition("/")
            if slash:
                labels[index] = numbers.setdefault(top, len(numbers))  # sorted, as the paths are
            else:
                strays.append(path)
        few = len(numbers) > 1 and len(strays) <= _MOST_STRAYS * len(labels)
        labelled = classes and bool(numbers) and (not strays or few)
        names = tuple(sorted(numbers))
        self.classes = names if labelled else None
        order = np.array([names.index(name) for name in numbers], dtype=np.int32)
        self._labels = np.where(labels >= 0, order[labels], -1).astype(np.int32) if labelled else None
        return strays

    def _notes(self, strays: Sequence[str], listing: Listing) -> str:
        notes, skipped = [], listing.skipped
        if listing.ours:
            first = ", ".join(listing.ours[:3]) + (" ..." if len(listing.ours) > 3 else "")
            notes.append(f"{self.root}: left out {counted(len(listing.ours), 'folder')} that robx wrote ({first})")
        if skipped:
            notes.append(
                f"{self.root}: skipped {counted(skipped.total(), 'file')} that robx cannot read ({by_suffix(skipped)})"
            )
        if strays and len(strays) < len(self._paths):
            shown = ", ".join(strays[:3]) + (" ..." if len(strays) > 3 else "")
            outcome = "without a label" if self.classes else "so that there are no labels"
            notes.append(f"{counted(len(strays), 'image')} in {self.root} beside its folders, {outcome} ({shown})")
        return "; ".join(notes)

    def _fingerprint(self, listing: Listing, kept: Path | None) -> str:
        """As `fingerprint_files` computes it; taken from a kept listing whose sample of contents is the same."""

        def start(at: int, count: int) -> bytes:
            return start_of(self.root / self._paths[at], count)

        sample = list(sampled(len(self._paths), start))
        digest = fingerprint(sample)
        if listing.fingerprint and listing.sample == digest:
            return listing.fingerprint
        sized = (f"{path}\0{size}" for path, size in zip(self._paths, listing.sizes.tolist(), strict=True))
        found = fingerprint(itertools.chain(sized, sample))
        if kept is not None:
            keep(replace(listing, fingerprint=found, sample=digest), kept)
        return found

    @property
    def stamp(self) -> str:
        """Changes when a file is rewritten, whatever it contains; see `stamp_of`."""
        return stamp_of(len(self), lambda index: f"{self.root}/{self._paths[index]}")

    @property
    def labels(self) -> np.ndarray:
        """All labels at once, int64 (N,); -1 for none."""
        return np.full(len(self), -1, np.int64) if self._labels is None else self._labels.astype(np.int64)

    def __len__(self) -> int:
        """The number of image files."""
        return len(self._paths)

    def key(self, index: int) -> str:
        """The path relative to the root."""
        return self._paths[index]

    def label(self, index: int) -> int | None:
        """The index of the first-level folder among `classes`."""
        label = -1 if self._labels is None else int(self._labels[index])
        return label if label >= 0 else None

    def read(self, index: int, *, at_least: int | None = None) -> Image.Image:
        """Read and decode one file; see `decode`."""
        path = self.root / self._paths[index]
        return decode(read_image_file(path), name=str(path), at_least=at_least)

    def read_pixels(self, index: int, *, at_least: int | None = None) -> NDArray[np.uint8]:
        """Read and decode one file; see `decode_pixels`."""
        path = self.root / self._paths[index]
        return decode_pixels(read_image_file(path), name=str(path), at_least=at_least)


def _read_licence(folder: Path) -> str:
    """The first line of licence.txt."""
    path = folder / LICENCE_FILE
    if path.is_symlink():  # its first line goes into every record: it must not be some other file's
        raise InputError(f"{path} is a link: replace it with the file itself")
    if not path.is_file():
        return "unknown"
    lines = read_bytes(path, limit=_MAX_LICENCE_BYTES).decode("utf-8-sig", errors="replace").splitlines()
    return lines[0].strip()[:200] if lines else "unknown"


def open_part(path: Path, split: str, *, labels: Path | None = None, image_member: str | None = None) -> ImageSource:
    """A split of the data, or all of them if they have no splits; see `open_source`."""
    try:
        return open_source(path, split=split, labels=labels, image_member=image_member)
    except NoSplit:
        return open_source(path, labels=labels, image_member=image_member)


def class_numbers(names: Sequence[str], into: Sequence[str]) -> np.ndarray:
    """The index of each of `names` in `into`, int64; -1 for a missing one."""
    place = {name: number for number, name in enumerate(into)}
    return np.array([place.get(name, -1) for name in names], dtype=np.int64)


def renumbered(labels: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Labels (N,) mapped by `class_numbers`; -1 (no label) stays."""
    found: np.ndarray = np.where(labels >= 0, numbers[np.maximum(labels, 0)], -1)
    return found


def _open_folder(path: Path, split: str | None, image_member: str | None, *, classes: bool) -> ImageSource:
    """`classes`: whether folders give the labels; else a file will."""
    for opener in (open_idx, open_cifar):
        found = opener(path, split or "train")
        if found is not None:
            return found
    wanted: Split | None = "train" if split == "train" else "test" if split == "test" else None
    folders, shards = _folders_and_shards(path)
    splits = split_folders(folders)
    # A tar beside train/ and val/ is what they were unpacked from.
    if shards and not (splits["train"] and splits["test"]):
        chosen, note = choose_shards(path, shards, wanted)
        return _noted(ShardSource(chosen, name=path.name, image=image_member), note)
    names, note = choose_folder(path, folders, wanted)
    if not names:
        return FolderSource(path, classes=classes)
    source = _open_folder(path / names[0], None, image_member, classes=classes)
    for name in names[1:]:  # a test split without labels, beside a validation split with them
        if source.classes is not None or not classes:
            break
        other = _open_folder(path / name, None, image_member, classes=True)
        if other.classes is not None:
            source, note = other, f"reading {path / name}, because {path / names[0]} has no labels"
    if len(names) > 1 and not note:
        note = f"reading {path / names[0]}, without {', '.join(f'{name}/' for name in names[1:])}"
    return _noted(source, note)


def _noted(source: ImageSource, note: str) -> ImageSource:
    source.note = "; ".join(filter(None, (note, source.note)))
    return source


def _folders_and_shards(path: Path) -> tuple[list[str], list[Path]]:
    """The names of the subfolders, without those that robx wrote, and the tar files, in `path`."""
    folders, shards = [], []
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.name.lower().endswith(".tar") and not entry.is_dir():
                shards.append(path / entry.name)
            elif entry.is_dir() and not is_ours(entry.path):
                folders.append(entry.name)
    return sorted(folders), sorted(shards)
