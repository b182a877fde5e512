"""Tar shards of images in webdataset's layout: indexed once, read in any order, written the same on any machine."""

from __future__ import annotations

import errno
import io
import itertools
import os
import stat
import tarfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import IO

from PIL import Image

from robx.errors import CorruptImage, InputError, UnreadableImage
from robx.images.decode import IMAGE_SUFFIXES, MAX_FILE_BYTES, UNREAD_SUFFIXES, decode
from robx.store.files import fingerprint, read_json, sampled, stamp_of, start_of

_MAX_LABEL_BYTES = 256
_MAX_CLASSES = 10_000_000
# Labels up to here are taken for 0 ... n; beyond, only those that occur are classes.
_MOST_UNNAMED_CLASSES = 65_536
# No header of a tar is larger, but a damaged one may claim gigabytes, which tarfile would read.
_MAX_HEADER_BYTES = 1024 * 1024
_COMPRESSED = {
    b"\x1f\x8b": "gzip-compressed: unpack it with gunzip",
    b"BZh": "bzip2-compressed: unpack it with bunzip2",
    b"\xfd7zXZ": "xz-compressed: unpack it with unxz",
    b"\x28\xb5\x2f\xfd": "zstd-compressed: unpack it with unzstd",
    b"PK\x03\x04": "a zip file: repack it as a tar",
}


@dataclass(frozen=True, slots=True)
class _Member:
    """One sample: where its image lies in which shard, and its label as written."""

    key: str
    shard: int
    offset: int = 0
    size: int = 0
    label: str = ""
    fault: str = ""  # why it cannot be read


@dataclass(slots=True)
class _Shard:
    """The index of one shard."""

    members: list[_Member] = field(default_factory=list)
    fault: str = ""  # why it, or its rest, cannot be read
    skipped: Counter[str] = field(default_factory=Counter)  # suffix -> images that robx cannot read
    without: int = 0  # samples without the chosen image


class ShardSource:
    """Uncompressed tar shards in webdataset's layout: ``key.jpg`` beside ``key.cls``.

    As in webdataset, the key ends at the first dot of the file's name. ``classes.json`` beside the shards names the
    classes of numeric labels; labels may also be names themselves.
    """

    licence = "unknown"

    def __init__(self, shards: Sequence[Path], *, name: str, image: str | None = None) -> None:
        """Index the members of `shards`, in order; nothing is extracted.

        Args:
            shards: the tar files.
            name: of the source.
            image: which image of a sample to read when it has several: what follows the key ("rgb.jpg", or "rgb").

        Raises:
            InputError: no readable image, or samples with several images and no choice among them.
        """
        self.name, self._shards = name, list(shards)
        found = [_index_shard(shard, number, image) for number, shard in enumerate(self._shards)]
        if all(member.fault for index in found for member in index.members):
            raise InputError(_why_nothing(self._shards, found, image))
        self._members = _with_unique_keys(self._shards, found)
        self.classes, numbers, odd = _classes(self._shards[0].parent, self._members)
        self._labels = [numbers.get(member.label) for member in self._members]
        lines = (f"{m.key}\0{m.size}\0{n}" for m, n in zip(self._members, self._labels, strict=True))
        self.fingerprint = fingerprint(itertools.chain(lines, sampled(len(self._members), self._start)))
        self.note = _note(found, odd, image)

    @property
    def stamp(self) -> str:
        """Changes when a shard is rewritten, whatever it contains."""
        return stamp_of(self._shards)

    def _start(self, index: int, count: int) -> bytes:
        member = self._members[index]
        return start_of(self._shards[member.shard], min(count, member.size), offset=member.offset)

    def __len__(self) -> int:
        """The number of samples in the shards."""
        return len(self._members)

    def key(self, index: int) -> str:
        """The sample's key; with the shard's name before it when shards repeat keys."""
        return self._members[index].key

    def label(self, index: int) -> int | None:
        """The class that ``key.cls`` gives."""
        return self._labels[index]

    def read(self, index: int) -> Image.Image:
        """Read and decode one image."""
        member = self._members[index]
        if member.fault:
            raise CorruptImage(member.fault)
        if member.size > MAX_FILE_BYTES:
            raise CorruptImage(
                f"{member.key}: {member.size} bytes are too many for an image (at most {MAX_FILE_BYTES})"
            )
        shard = self._shards[member.shard]
        try:
            with shard.open("rb", buffering=0) as file:
                data = os.pread(file.fileno(), member.size, member.offset)
        except OSError as error:
            raise UnreadableImage(f"{shard}: cannot be read ({error.strerror})") from error
        return decode(data, name=f"{shard}:{member.key}")


class _BoundedReader:
    """A file for tarfile that refuses to read a header of a damaged size into memory."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def read(self, count: int = -1) -> bytes:
        if not 0 <= count <= _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {count} bytes")
        return self._file.read(count)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._file.close()


def _index_shard(shard: Path, number: int, image: str | None) -> _Shard:
    """The samples of one shard; a cut or damaged tail becomes one sample that cannot be read."""
    index = _Shard()
    images: dict[str, dict[str, _Member]] = {}  # key -> what follows it -> the image
    labels: dict[str, str] = {}
    try:
        with _open_regular(shard) as file:
            size = os.fstat(file.fileno()).st_size
            with tarfile.open(fileobj=_BoundedReader(file), mode="r:") as tar:  # type: ignore[call-overload]
                for info in tar:
                    if info.isfile():
                        _add_member(index, images, labels, tar, info, shard, number, size)
    except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
        index.fault = f"{shard}: {_damage(shard, error)}"
    for key, variants in images.items():
        found = _choose(variants, image, key=key, shard=shard)
        if found is None:
            index.without += 1
        else:
            index.members.append(replace(found, label=labels.get(key, "")))
    if index.fault:
        index.members.append(_Member(f"{shard.stem}-damaged", number, fault=index.fault))
    return index


def _add_member(
    index: _Shard,
    images: dict[str, dict[str, _Member]],
    labels: dict[str, str],
    tar: tarfile.TarFile,
    info: tarfile.TarInfo,
    shard: Path,
    number: int,
    size: int,
) -> None:
    """Note one file of a shard: an image, a label, or neither."""
    key, rest = _split(info.name)
    if not rest or not key.rpartition("/")[2]:  # no suffix, or hidden
        return
    suffix = PurePosixPath(info.name).suffix.lower()
    sparse = info.issparse()
    if not sparse and (info.size < 0 or info.offset_data + info.size > size):
        raise tarfile.ReadError(f"cut inside {info.name!r}")
    if suffix in IMAGE_SUFFIXES:
        place = f"{shard}:{info.name}"
        if sparse:
            member = _Member(key, number, fault=f"{place}: is stored as a sparse file: repack it without --sparse")
        else:
            member = _Member(key, number, info.offset_data, info.size)
        if rest in images.setdefault(key, {}):
            index.members.append(_Member(f"{key}.{rest} again", number, fault=f"{place}: is in the shard twice"))
        else:
            images[key][rest] = member
    elif suffix in UNREAD_SUFFIXES:
        index.skipped[suffix] += 1
    elif rest.lower() == "cls" and not sparse:
        file = tar.extractfile(info)
        labels[key] = _label(file.read(_MAX_LABEL_BYTES + 1)) if file else _NO_LABEL


def _open_regular(path: Path) -> IO[bytes]:
    if not stat.S_ISREG(path.stat().st_mode):  # a pipe or a device may block for ever
        raise OSError(errno.EINVAL, "not a regular file")
    return path.open("rb")


def _damage(shard: Path, error: Exception) -> str:
    """Why a shard cannot be read to its end, and what to do."""
    if isinstance(error, OSError):
        return f"cannot be read ({error.strerror or error})"
    with shard.open("rb") as file:
        start = file.read(8)
    if not start:
        return "is empty: download it again"
    kind = next((words for magic, words in _COMPRESSED.items() if start.startswith(magic)), None)
    if kind is not None:
        return f"is {kind}"
    return f"is damaged ({error}): download it again"


def _choose(variants: dict[str, _Member], image: str | None, *, key: str, shard: Path) -> _Member | None:
    """The image of a sample; None when it has not the one that was asked for.

    Raises:
        InputError: several, and none was named.
    """
    if image is not None:
        wanted = image.lower().lstrip(".")
        return next((m for rest, m in variants.items() if wanted in (rest.lower(), _without_suffix(rest))), None)
    if len(variants) > 1:
        names = sorted(variants)
        raise InputError(
            f"{shard}: the sample {key!r} has several images ({', '.join(names[:5])}): name the one to read, such as "
            f"--image-member {names[0]}"
        )
    return next(iter(variants.values()))


def _without_suffix(rest: str) -> str:
    return rest.lower().rpartition(".")[0] or rest.lower()


_NO_LABEL = "\0"  # a .cls member that is empty, binary or too long


def _label(text: bytes) -> str:
    """What a .cls member says: a number or a class name."""
    if len(text) > _MAX_LABEL_BYTES:
        return _NO_LABEL
    try:
        words = text.decode().strip()
    except UnicodeDecodeError:
        return _NO_LABEL
    return words if words and words.isprintable() else _NO_LABEL


def _with_unique_keys(shards: Sequence[Path], found: Sequence[_Shard]) -> list[_Member]:
    """All samples; when shards repeat keys, the shard's name goes before each."""
    members = [member for index in found for member in index.members]
    if len({member.key for member in members}) == len(members):
        return members
    return [replace(member, key=f"{shards[member.shard].stem}/{member.key}") for member in members]


def _classes(folder: Path, members: Sequence[_Member]) -> tuple[tuple[str, ...] | None, dict[str, int], int]:
    """The class names, the number of each label as written, and how many labels are not usable."""
    written = {member.label for member in members if member.label}
    names = {label for label in written if label != _NO_LABEL}
    numeric = {label for label in names if _is_number(label)}
    odd = {_NO_LABEL}
    if numeric == names:
        usable = {label for label in numeric if 0 <= int(label) < _MAX_CLASSES}
        odd |= {label for label in numeric if int(label) >= _MAX_CLASSES}  # a negative number is the usual "none"
        classes, numbers = _numbered(folder, usable)
    else:
        classes = tuple(sorted(names))
        numbers = {label: number for number, label in enumerate(classes)}
    return classes or None, numbers, sum(member.label in odd for member in members)


def _numbered(folder: Path, labels: set[str]) -> tuple[tuple[str, ...], dict[str, int]]:
    """Class names of numeric labels: from classes.json, else the numbers themselves."""
    if not labels:
        return (), {}
    top = max(map(int, labels))
    names = read_json(folder / "classes.json") if (folder / "classes.json").is_file() else None
    if isinstance(names, list) and len(names) > top:
        return tuple(str(name) for name in names), {label: int(label) for label in labels}
    if top < _MOST_UNNAMED_CLASSES:
        return tuple(str(i) for i in range(top + 1)), {label: int(label) for label in labels}
    values = sorted({int(label) for label in labels})
    place = {value: number for number, value in enumerate(values)}
    return tuple(map(str, values)), {label: place[int(label)] for label in labels}


def _is_number(label: str) -> bool:
    digits = label.removeprefix("-")
    return len(digits) <= 20 and digits.isascii() and digits.isdigit()


def _why_nothing(shards: Sequence[Path], found: Sequence[_Shard], image: str | None) -> str:
    fault = next((index.fault for index in found if index.fault), "")
    if fault:
        return fault
    if image is not None and any(index.without for index in found):
        return f"{shards[0]}: no sample has an image {image!r}: give another --image-member"
    where = shards[0] if len(shards) == 1 else shards[0].parent
    return f"{where} contains no images: expected members such as key.jpg and key.cls"


def _note(found: Sequence[_Shard], odd: int, image: str | None) -> str:
    notes = []
    skipped: Counter[str] = sum((index.skipped for index in found), Counter())
    if skipped:
        notes.append(f"skipped {skipped.total()} images that robx cannot read ({by_suffix(skipped)})")
    if odd:
        notes.append(f"{odd} samples have an empty or invalid .cls and count as unlabelled")
    if image is not None and (without := sum(index.without for index in found)):
        notes.append(f"skipped {without} samples without an image {image!r}")
    return "; ".join(notes)


def by_suffix(counts: Counter[str]) -> str:
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
                _add(tar, _split(name)[0] + ".cls", str(label).encode())


def _split(name: str) -> tuple[str, str]:
    """The key of a file in a shard, which ends at the first dot of its name, and what follows; folders stay."""
    folder, slash, base = name.rpartition("/")
    start, _, rest = base.partition(".")
    return f"{folder}{slash}{start}", rest


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))
