"""Tar shards of images in webdataset's layout: indexed once, read in any order, written the same on any machine."""

from __future__ import annotations

import errno
import io
import itertools
import os
import stat
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from PIL import Image

from robx.errors import CorruptImage, InputError, UnreadableImage
from robx.images.decode import IMAGE_SUFFIXES, MAX_FILE_BYTES, decode
from robx.store.files import fingerprint, read_json, sampled, stamp_of, start_of

_MAX_LABEL_BYTES = 16
_MAX_CLASSES = 10_000_000


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

    licence = "unknown"

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
        lines = (f"{m.key}\0{m.size}\0{m.label}" for m in self._members)
        self.fingerprint = fingerprint(itertools.chain(lines, sampled(len(self._members), self._start)))

    @property
    def stamp(self) -> str:
        """Changes when a shard was written again, whatever it holds."""
        return stamp_of(self._shards)

    def _start(self, index: int, count: int) -> bytes:
        member = self._members[index]
        return start_of(self._shards[member.shard], min(count, member.size), offset=member.offset)

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
        if member.size > MAX_FILE_BYTES:
            raise CorruptImage(f"{member.key}: {member.size} bytes is more than an image should have")
        shard = self._shards[member.shard]
        try:
            with shard.open("rb", buffering=0) as file:
                data = os.pread(file.fileno(), member.size, member.offset)
        except OSError as error:
            raise UnreadableImage(f"{shard}: cannot be read ({error.strerror})") from error
        return decode(data, name=f"{shard}:{member.key}")


def _index_shard(shard: Path, number: int) -> Iterable[_Member]:
    """The shard's samples; a cut or damaged tail becomes one sample that cannot be read."""
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    wrong: dict[str, str] = {}
    members: list[_Member] = []
    try:
        found = shard.stat()
        if not stat.S_ISREG(found.st_mode):  # reading a pipe or a device may never end
            raise OSError(errno.EINVAL, "no regular file")
        size = found.st_size
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
