"""The transfer data sets in their published layouts, with the official splits.

| name | layout | classes | test split |
| --- | --- | --- | --- |
| folder | train/ and val/ (or test/), one folder per class | folders | val or test |
| cifar10, cifar100 | the binary or the Python batches | 10, 100 (fine) | test batch |
| fashion_mnist | IDX files, gzipped or not | 10 | t10k |
| inat18 | {train,val}2018.json beside train_val2018/ | 8142 | val2018 |
| places205 | {train,val}_places205.csv, images in images256/ | 205 | val |
| clevr_count, clevr_dist | CLEVR_v1.0: images/{train,val}, scenes/ | 8, 6 | val |
"""

from __future__ import annotations

import io
import itertools
import json
import pickle
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from robx.errors import ArtifactError, InputError, did_you_mean
from robx.images.arrays import ArraySource, open_cifar, open_idx
from robx.images.decode import decode, decode_pixels, read_image_file
from robx.images.derived import DerivedSource
from robx.images.sources import ImageSource, open_source
from robx.store.files import fingerprint_files, read_user_text, sha256_bytes, stamp_of

# Upper edges of the distance bins, each included in its bin: (.., 8], (8, 8.5], ... (VTAB's closest-object-distance).
CLEVR_EDGES = (8.0, 8.5, 9.0, 9.5, 10.0, 100.0)
CLEVR_LEAST_OBJECTS = 3
INAT18_CLASSES, PLACES205_CLASSES = 8142, 205
_MAX_LIST_BYTES = 1024**3
_SPLITS = {"train": "train", "test": "val"}


class ListSource:
    """Image files named in a list, with the list's labels."""

    licence = "unknown"
    note = ""

    def __init__(self, root: Path, samples: Sequence[tuple[str, int]], *, name: str, classes: Sequence[str]) -> None:
        """Take (path below `root`, label) pairs; no image is opened yet.

        Raises:
            InputError: an empty list, a path outside `root`, or a label outside the classes.
        """
        if not samples:
            raise InputError(f"the list of {name} in {root} is empty: download it again")
        for path, label in samples:
            parts = PurePosixPath(path)
            if parts.is_absolute() or ".." in parts.parts:
                raise InputError(f"{name} lists {path!r}, which is outside {root}: do not use this list")
            if not 0 <= label < len(classes):
                raise InputError(
                    f"{name} gives {path!r} the label {label} but has {len(classes)} classes: download the list again"
                )
        self.root, self.name = root, name
        self.classes: tuple[str, ...] | None = tuple(classes)
        self._samples = list(samples)
        lines = (f"{path}\0{label}" for path, label in self._samples)
        self.fingerprint = fingerprint_files(root, [path for path, _ in self._samples], lines=lines)

    @property
    def stamp(self) -> str:
        """Changes when a file is rewritten, whatever it contains; see `stamp_of`."""
        return stamp_of(len(self), lambda index: self.root / self._samples[index][0])

    def __len__(self) -> int:
        """The number of images in the list."""
        return len(self._samples)

    def key(self, index: int) -> str:
        """The path below the root."""
        return self._samples[index][0]

    def label(self, index: int) -> int | None:
        """The list's label."""
        return self._samples[index][1]

    def read(self, index: int, *, at_least: int | None = None) -> Image.Image:
        """Read and decode one file; see `decode`."""
        path = self.root / self._samples[index][0]
        return decode(read_image_file(path), name=str(path), at_least=at_least)

    def read_pixels(self, index: int, *, at_least: int | None = None) -> NDArray[np.uint8]:
        """Read and decode one file; see `decode_pixels`."""
        path = self.root / self._samples[index][0]
        return decode_pixels(read_image_file(path), name=str(path), at_least=at_least)


def whole_images(source: ImageSource, shape: tuple[int, int]) -> ImageSource:
    """The source with whole images resized to `shape`, height and width, where a crop would change the answer."""
    height, width = shape
    size = str(height) if height == width else f"{height}x{width}"
    return DerivedSource(
        source,
        fingerprint=sha256_bytes(f"{source.fingerprint} squeezed {size}".encode())[:16],
        change=lambda image: image.resize((width, height), Image.Resampling.BILINEAR),
    )


def open_dataset(name: str, root: Path) -> tuple[ImageSource, ImageSource]:
    """(training source, test source) of a data set in its official layout.

    Raises:
        InputError: an unknown name, or a layout that differs from the published one; the message says how.
    """
    match name:
        case "folder":
            return open_source(root, split="train"), open_source(root, split="test")
        case "fashion_mnist":
            return _array(root, name, "train"), _array(root, name, "test")
        case "cifar10" | "cifar100":
            return _cifar(root, name, "train"), _cifar(root, name, "test")
        case "inat18":
            return _inat18(root, "train"), _inat18(root, "test")
        case "places205":
            return _places205(root, "train"), _places205(root, "test")
        case "clevr_count":
            return _clevr(root, "train", name, clevr_count), _clevr(root, "test", name, clevr_count)
        case "clevr_dist":
            return _clevr(root, "train", name, clevr_dist), _clevr(root, "test", name, clevr_dist)
    raise InputError(f"unknown data set {name!r}: {_nearest(name)}")


def _nearest(name: str) -> str:
    return did_you_mean(name, DATASETS, otherwise=f"give one of {', '.join(DATASETS)}")


def parse_transfers(names: Sequence[str], data: Path | None) -> tuple[tuple[str, Path], ...]:
    """(("cifar10", Path("/data/cifar")), ...) of "cifar10=/data/cifar"; a bare name is looked for in `data`.

    Raises:
        InputError: an unknown data set, or one without a folder.
    """
    found = []
    for text in names:
        name, _, root = text.partition("=")
        if name not in DATASETS:
            raise InputError(f"unknown transfer {name!r}: {_nearest(name)}")
        if not root and data is None:
            raise InputError(f"--transfer {name} has no folder: give --transfer {name}=DIR")
        found.append((name, Path(root).expanduser() if root or data is None else data))
    return tuple(found)


DATASETS = ("folder", "cifar10", "cifar100", "fashion_mnist", "inat18", "places205", "clevr_count", "clevr_dist")


def clevr_count(scene: dict[str, Any]) -> int:
    """Clevr/Count: the number of objects, from 3 to 10, minus 3."""
    return len(scene["objects"]) - CLEVR_LEAST_OBJECTS


def clevr_dist(scene: dict[str, Any]) -> int:
    """Clevr/Dist: the bin of the nearest object's distance from the camera (pixel_coords[2])."""
    nearest = min(float(item["pixel_coords"][2]) for item in scene["objects"])
    return int(np.searchsorted(CLEVR_EDGES, nearest, side="left"))


def _clevr(root: Path, split: str, name: str, label: Callable[[dict[str, Any]], int]) -> ImageSource:
    root = root / "CLEVR_v1.0" if (root / "CLEVR_v1.0").is_dir() else root
    part = _SPLITS[split]  # the official test set has no scenes, so val is the test set
    listed = _read_list(root / "scenes" / f"CLEVR_{part}_scenes.json")
    classes = [str(n + CLEVR_LEAST_OBJECTS) for n in range(8)] if name == "clevr_count" else _distance_names()
    try:
        samples = [(f"images/{part}/{scene['image_filename']}", label(scene)) for scene in listed["scenes"]]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise InputError(
            f"{root}: CLEVR_{part}_scenes.json is not as published ({error!r}): download it again"
        ) from error
    return ListSource(root, samples, name=f"{name} {split}", classes=classes)


def _distance_names() -> list[str]:
    return [f"<= {CLEVR_EDGES[0]:g}"] + [f"{a:g} to {b:g}" for a, b in itertools.pairwise(CLEVR_EDGES)]


def _inat18(root: Path, split: str) -> ImageSource:
    file = _first(root, (f"{_SPLITS[split]}2018.json", f"annotations/{_SPLITS[split]}2018.json"))
    listed = _read_list(file)
    try:
        # train_val2018/<super category>/<category number>/<image>.jpg
        samples = [(item["file_name"], int(PurePosixPath(item["file_name"]).parts[2])) for item in listed["images"]]
        given = {item["image_id"]: int(item["category_id"]) for item in listed.get("annotations", ())}
        for item, (path, label) in zip(listed["images"], samples, strict=True):
            if given.get(item["id"], label) != label:
                raise InputError(
                    f"{file}: {path!r} is annotated {given[item['id']]} but its folder says {label}: download it again"
                )
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise InputError(f"{file} is not iNaturalist 2018's list ({error!r}): download it again") from error
    classes = [str(n) for n in range(INAT18_CLASSES)]
    return ListSource(root, samples, name=f"inat18 {split}", classes=classes)


def _places205(root: Path, split: str) -> ImageSource:
    name = f"{_SPLITS[split]}_places205.csv"
    file = _first(root, (name, f"trainvalsplit_places205/{name}"))
    images = "data/vision/torralba/deeplearning/images256"
    below = next((p for p in (images, "images256", ".") if (root / p).is_dir()), ".")
    samples, names = [], {}
    for number, line in enumerate(_lines(file), start=1):
        path, _, label = line.replace(",", " ").rpartition(" ")
        if not path or not label.isdigit():
            raise InputError(f"{file}, line {number}: {line!r} is not 'path label': download the list again")
        samples.append((path.strip() if below == "." else f"{below}/{path.strip()}", int(label)))
        names[int(label)] = PurePosixPath(path.strip().lstrip("/")).parent.as_posix()
    classes = [names.get(n, str(n)) for n in range(PLACES205_CLASSES)]
    return ListSource(root, samples, name=f"places205 {split}", classes=classes)


def _array(root: Path, name: str, split: str) -> ImageSource:
    """A data set in its own array files, not a folder of other images in their place."""
    found = open_idx(root, split) if name == "fashion_mnist" else open_cifar(root, split)
    if found is None or len(found.classes or ()) > (100 if name == "cifar100" else 10):
        raise InputError(f"{root} does not hold {name}'s files: give their folder with --transfer {name}=DIR")
    return found


def _cifar(root: Path, name: str, split: str) -> ImageSource:
    if name == "cifar10":
        folder, meta, labels, names = "cifar-10-batches-py", "batches.meta", "labels", "label_names"
        batches = [f"data_batch_{n}" for n in range(1, 6)] if split == "train" else ["test_batch"]
    else:
        folder, meta, labels, names = "cifar-100-python", "meta", "fine_labels", "fine_label_names"
        batches = [split]
    here = next((p for p in (root / folder, root) if (p / meta).is_file()), None)
    if here is None:
        binary = {"cifar10": "cifar-10-batches-bin", "cifar100": "cifar-100-binary"}[name]
        return _array(root / binary if (root / binary).is_dir() else root, name, split)
    read = [_unpickle(here / batch) for batch in batches]
    try:
        classes = tuple(_text(label) for label in _get(_unpickle(here / meta), names))
        pixels = np.concatenate([np.asarray(_get(batch, "data"), np.uint8).reshape(-1, 3, 32, 32) for batch in read])
        wanted = np.concatenate([np.asarray(_get(batch, labels), np.int64) for batch in read])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{here} does not hold {name}'s batches ({error!r}): download them again") from error
    if len(wanted) != len(pixels):
        raise InputError(f"{here} holds {len(pixels)} images and {len(wanted)} labels: download it again")
    return ArraySource(f"{name} {split}", np.ascontiguousarray(pixels.transpose(0, 2, 3, 1)), wanted, classes)


class _ArrayUnpickler(pickle.Unpickler):
    """Reads arrays, lists and strings, all that a CIFAR batch holds; any other class is refused."""

    _ALLOWED = frozenset(
        {
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("_codecs", "encode"),
        }
    )

    def find_class(self, module_name: str, global_name: str) -> Any:
        """Find a class only if it is on the list."""
        if (module_name, global_name) not in self._ALLOWED:
            raise ArtifactError(
                f"the batch refers to {module_name}.{global_name}, which no CIFAR batch does: delete it"
            )
        return super().find_class(module_name.replace("numpy.core", "numpy._core"), global_name)


def _unpickle(path: Path) -> dict[Any, Any]:
    if not path.is_file():
        raise InputError(f"{path} does not exist: download the Python batches again")
    if path.stat().st_size > _MAX_LIST_BYTES:
        raise InputError(f"{path} is larger than {_MAX_LIST_BYTES} bytes: not a CIFAR batch")
    try:
        found = _ArrayUnpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
    except ArtifactError:
        raise
    except Exception as error:  # a truncated pickle raises many types
        raise InputError(f"{path} is not a CIFAR batch ({error}): download it again") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} is not a CIFAR batch (a {type(found).__name__}): download it again")
    return found


def _get(batch: dict[Any, Any], key: str) -> Any:
    """A value of a batch; the batches were pickled by Python 2, so keys may be bytes."""
    return batch[key.encode()] if key.encode() in batch else batch[key]


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _first(root: Path, names: Sequence[str]) -> Path:
    found = next((root / name for name in names if (root / name).is_file()), None)
    if found is None:
        raise InputError(f"{root} has no {names[0]}: give the folder that contains it")
    return found


def _read_list(path: Path) -> Any:
    if not path.is_file():
        raise InputError(f"{path} does not exist: give the data set's own folder")
    try:
        if path.stat().st_size > _MAX_LIST_BYTES:
            raise InputError(f"{path} is larger than {_MAX_LIST_BYTES} bytes: not the published list")
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON ({error}): download it again") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} is not the published list (a {type(found).__name__}): download it again")
    return found


def _lines(path: Path) -> Iterable[str]:
    if path.stat().st_size > _MAX_LIST_BYTES:
        raise InputError(f"{path} is larger than {_MAX_LIST_BYTES} bytes: not the published list")
    return (line.strip() for line in read_user_text(path, errors="surrogateescape").splitlines() if line.strip())
