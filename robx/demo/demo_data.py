"""The demo's images: Debian's clip art, or CIFAR-10, or rendered scenes; prepared once as tar shards in the cache.

The shards are read by the same code as a user's data. The clip art is noisy (near-duplicates, blank images, "image not
found" pictures, up to 600 megapixels): it is cleaned, deduplicated, resized and split identically on every machine.
"""

from __future__ import annotations

import collections
import io
import os
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from robx.errors import RobxError, one_line, shortened
from robx.images.decode import MAX_PIXELS, open_image, to_rgb
from robx.images.scenes import write_scenes
from robx.images.shards import write_shard
from robx.images.sources import LICENCE_FILE
from robx.progress import Progress
from robx.store.files import require_space, sha256_bytes, write_json, write_text
from robx.store.folders import new_folder
from robx.store.locks import lock_folder

CLIP_ART_PACKAGE = "openclipart-png"
# The folders whose names describe what their pictures show; the others serve for distillation, not for evaluation.
CLIP_ART_CLASSES = (
    "animals", "buildings", "computer", "food", "geography", "office",
    "people", "plants", "recreation", "signs_and_symbols", "tools", "transportation",
)  # fmt: skip
SIDE = 128  # pixels; every picture is fitted into a white square of this side
_CLASS_CAP = 400  # labelled pictures per class, so that no class dominates
_TEST_SHARE = 0.3
_BLANK_STD = 3.0  # of 255; a picture with less contrast is blank
_PNGS_PER_SHARD = 2048


@dataclass(frozen=True)
class DemoData:
    """A prepared folder of shards, and the caveat to print beside every figure that comes from it."""

    folder: Path
    name: str
    licence: str
    caveat: str


def prepare_demo_data(cache: Path, *, say: Callable[[str], None], progress: Progress) -> DemoData:
    """Prepare the best images that this machine can get under `cache`, or reuse them.

    Falls back from clip art to CIFAR-10 to rendered scenes, and reports through `say` what failed and why.
    """
    clip_art = DemoData(
        cache / "demo" / "clip-art-1", "clip art", "public domain",
        "Clip art with noisy folder names for labels: neither ImageNet nor natural photographs.",
    )  # fmt: skip
    cifar = DemoData(
        cache / "demo" / "cifar-10-1", "CIFAR-10", "as published by the University of Toronto",
        "CIFAR-10, 32 x 32 pixels enlarged: not ImageNet.",
    )  # fmt: skip
    scenes = DemoData(
        cache / "demo" / "scenes-1", "rendered scenes", "made by robx",
        "Scenes rendered by robx, labelled by the number of objects: neither ImageNet nor natural photographs.",
    )  # fmt: skip
    makers = ((clip_art, _make_clip_art), (cifar, _make_cifar), (scenes, _make_scenes))
    with lock_folder(cache / "demo"):
        for data, _ in makers[:2]:
            if (data.folder / "classes.json").is_file():
                return _with_licence(data)
        if not (scenes.folder / "classes.json").is_file():
            require_space(cache, 1_500_000_000)
        for data, make in makers:
            if (data.folder / "classes.json").is_file():
                return _with_licence(data)
            try:
                make(data.folder, progress)
                return _with_licence(data)
            except (OSError, RobxError, RuntimeError, subprocess.SubprocessError) as error:
                why = shortened(one_line(str(error)), 160)
                say(f"{data.name}: not available on this machine ({why}); trying the next")
    raise RobxError("no images could be prepared for the demo: give labelled images with --data")


def _with_licence(data: DemoData) -> DemoData:
    """Write the licence beside the shards, also for shards of an earlier version; the images are not touched."""
    path = data.folder / LICENCE_FILE
    if not path.is_file():
        write_text(path, f"{data.licence}\n")
    return data


def _make_clip_art(folder: Path, progress: Progress) -> None:
    with tempfile.TemporaryDirectory(prefix="robx-clip-art-") as scratch:
        progress(0, 1, "downloading clip art (131 MB)")
        unpacked = unpack_debian(CLIP_ART_PACKAGE, Path(scratch))
        root = next(unpacked.rglob("openclipart/png"), None)
        if root is None:
            raise RobxError(f"Debian's {CLIP_ART_PACKAGE} has no openclipart/png folder")
        pack_pictures(root, folder, classes=CLIP_ART_CLASSES, progress=progress)


def unpack_debian(package: str, scratch: Path) -> Path:
    """Download a Debian package with apt, without root, and unpack it."""
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        raise RobxError("this is not Debian or Ubuntu: apt-get and dpkg-deb are missing")
    if os.geteuid() == 0 and not _apt(["apt-cache", "show", package], scratch):
        _apt(["apt-get", "update"], scratch)
    # As root, apt would switch to its own user for the download, and that user may not write here.
    if not _apt(["apt-get", "-o", "APT::Sandbox::User=root", "download", package], scratch):
        raise RobxError(f"apt-get download {package} failed")
    archive = next(scratch.glob(f"{package}_*.deb"))
    subprocess.run(["dpkg-deb", "-x", archive, scratch / "tree"], check=True, capture_output=True, timeout=300)
    return scratch / "tree"


def _apt(command: Sequence[str], folder: Path) -> bool:
    return subprocess.run(command, cwd=folder, capture_output=True, timeout=600).returncode == 0


@dataclass(frozen=True)
class _Picture:
    path: str
    png: bytes
    exact: str  # hash of the pixels
    near: bytes  # difference hash, 16 x 16 bits


def pack_pictures(root: Path, folder: Path, *, classes: Sequence[str], progress: Progress) -> None:
    """Clean, deduplicate, resize and split the PNG pictures below `root` into train and test shards in `folder`.

    The first-level folder is the label if `classes` contains it; all other pictures become unlabelled training images.
    The result depends on nothing but the pictures.
    """
    paths = sorted(root.rglob("*.png"))
    pictures: list[_Picture] = []
    with ProcessPoolExecutor(max_workers=os.cpu_count()) as pool:
        jobs = pool.map(_shrink, [str(p) for p in paths], [str(root)] * len(paths), chunksize=16)
        for done, picture in enumerate(jobs, start=1):
            progress(done, len(paths), "cleaning and resizing pictures")
            if picture is not None:
                pictures.append(picture)
    train, test = split_pictures(_without_duplicates(pictures), classes)
    with new_folder(folder, ours=[path.name for path in folder.glob("*")]) as temporary:
        for start in range(0, len(train), _PNGS_PER_SHARD):
            name = f"train-{start // _PNGS_PER_SHARD:05d}.tar"
            write_shard(temporary / name, _samples(train[start : start + _PNGS_PER_SHARD]))
        write_shard(temporary / "test-00000.tar", _samples(test))
        write_json(temporary / "classes.json", list(classes))


def _shrink(path: str, root: str) -> _Picture | None:
    """One picture fitted into the square, or None if it is damaged, huge or blank."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = open_image(Path(path))
            if image.width * image.height > MAX_PIXELS / 2:
                return None
            # Shrink before blending with white: ten times fewer pixels to blend.
            image.thumbnail((SIDE, SIDE), Image.Resampling.BICUBIC, reducing_gap=3.0)
            image = ImageOps.contain(to_rgb(image), (SIDE, SIDE), Image.Resampling.BICUBIC)
            image.load()
    except Exception:  # Pillow's decoders raise anything on a damaged picture, which is left out
        return None
    square = Image.new("RGB", (SIDE, SIDE), "white")
    square.paste(image, ((SIDE - image.width) // 2, (SIDE - image.height) // 2))
    pixels = np.asarray(square)
    if pixels.std() < _BLANK_STD:
        return None
    grey = np.asarray(square.convert("L").resize((17, 16), Image.Resampling.BOX), dtype=np.int16)
    buffer = io.BytesIO()
    square.save(buffer, format="PNG")
    return _Picture(
        path=Path(path).relative_to(root).as_posix(),
        png=buffer.getvalue(),
        exact=sha256_bytes(pixels.tobytes()),
        near=np.packbits(grey[:, 1:] > grey[:, :-1]).tobytes(),
    )


def _without_duplicates(pictures: Sequence[_Picture]) -> list[_Picture]:
    """Keep the first of each set of near-duplicates, and none that occurs in many folders ("image not found")."""
    folders = collections.defaultdict(set)
    for picture in pictures:
        folders[picture.near].add(picture.path.split("/", 1)[0])
    kept: dict[bytes, _Picture] = {}
    for picture in pictures:
        if len(folders[picture.near]) <= 3:
            kept.setdefault(picture.near, picture)
    return list(kept.values())


Labelled = tuple[_Picture, int | None]


def split_pictures(pictures: Sequence[_Picture], classes: Sequence[str]) -> tuple[list[Labelled], list[Labelled]]:
    """Train and test pictures: each class is capped, in the order of the hash; the rest is unlabelled training data."""
    train: list[Labelled] = []
    test: list[Labelled] = []
    taken: collections.Counter[int] = collections.Counter()
    numbers = {name: i for i, name in enumerate(classes)}
    for picture in sorted(pictures, key=lambda p: p.exact):
        label = numbers.get(picture.path.split("/", 1)[0])
        if label is None or taken[label] >= _CLASS_CAP:
            train.append((picture, None))
            continue
        taken[label] += 1
        # The order uses the first digits of the hash, so the split uses the last ones.
        in_test = int(picture.exact[-8:], 16) / 2**32 < _TEST_SHARE
        (test if in_test else train).append((picture, label))
    return train, test


def _samples(labelled: Sequence[Labelled]) -> Iterator[tuple[str, bytes, int | None]]:
    for picture, label in labelled:
        yield f"{picture.exact[:20]}.png", picture.png, label


def _make_cifar(folder: Path, progress: Progress) -> None:
    progress(0, 1, "downloading CIFAR-10 (170 MB)")
    from torchvision.datasets import CIFAR10

    with tempfile.TemporaryDirectory(prefix="robx-cifar-") as scratch:
        splits = {split: CIFAR10(scratch, train=split == "train", download=True) for split in ("train", "test")}
        with new_folder(folder, ours=[path.name for path in folder.glob("*")]) as temporary:
            for split, number in (("train", 6000), ("test", 1000)):
                rows = zip(splits[split].data[:number], splits[split].targets[:number], strict=True)
                write_shard(temporary / f"{split}-00000.tar", _encode_rows(rows))
            write_json(temporary / "classes.json", list(splits["train"].classes))


def _encode_rows(rows: Iterator[tuple[np.ndarray, int]]) -> Iterator[tuple[str, bytes, int | None]]:
    for index, (pixels, label) in enumerate(rows):
        buffer = io.BytesIO()
        Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(buffer, format="PNG")
        yield f"{index:06d}.png", buffer.getvalue(), int(label)


def _make_scenes(folder: Path, progress: Progress) -> None:
    write_scenes(folder, train=4000, test=1000, size=SIDE, progress=progress)
