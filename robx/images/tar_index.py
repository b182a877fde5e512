"""The index of tar shards: which samples they hold and where. That of large shards is kept for the next start."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
import tarfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np

from robx.errors import InputError, RobxError
from robx.images.decode import IMAGE_SUFFIXES, UNREAD_SUFFIXES
from robx.images.names import Names
from robx.store.files import cache_folder, sha256_bytes
from robx.store.kept_arrays import keep_arrays, kept_arrays
from robx.store.locks import wait_for

# Smaller sets of shards are indexed faster than a cache is worth.
KEPT_FROM_BYTES = 64 * 1024**2
NO_LABEL = "\0"  # a .cls member that is empty, binary or too long
_VERSION = 1
_SETTLED_SECONDS = 2.0  # a shard written shortly before it was indexed may change again at the same time stamp
_MAX_LABEL_BYTES = 256
# No header of a tar is larger, but a damaged one may claim gigabytes, which tarfile would read.
_MAX_HEADER_BYTES = 1024 * 1024
_COMPRESSED = {
    b"\x1f\x8b": "gzip-compressed: unpack it with gunzip",
    b"BZh": "bzip2-compressed: unpack it with bunzip2",
    b"\xfd7zXZ": "xz-compressed: unpack it with unxz",
    b"\x28\xb5\x2f\xfd": "zstd-compressed: unpack it with unzstd",
    b"PK\x03\x04": "a zip file: repack it as a tar",
}


@dataclass(frozen=True)
class TarIndex:
    """One shard: its samples as columns, which forked workers share, and what was left out."""

    keys: Names
    offsets: np.ndarray  # int64 (N,), of the image in the shard
    sizes: np.ndarray  # int64 (N,), bytes of the image
    labels: Names  # as written; "" for none
    faults: dict[int, str]  # sample -> why it cannot be read
    skipped: dict[str, int]  # suffix -> images that robx cannot read
    without: int  # samples without the chosen image
    fault: str  # why the shard, or its rest, cannot be read


@dataclass(frozen=True)
class ShardIndex:
    """Several shards, and what the source computed of them the last time; empty when that is not known."""

    shards: tuple[TarIndex, ...]
    files: tuple[tuple[str, int, int], ...]  # path, bytes and modification time of each
    kept: Path | None  # where it is kept
    fingerprint: str = ""
    sample: str = ""  # of the contents that `fingerprint` belongs to
    unique_keys: bool | None = None


def index_shards(shards: Sequence[Path], image: str | None) -> ShardIndex:
    """Index `shards`, those that were indexed before from the cache.

    Raises:
        InputError: a sample has several images and `image` names none.
    """
    now = time.time_ns()
    files = tuple(_stamp(shard) for shard in shards)
    if sum(size for _, size, _ in files) < KEPT_FROM_BYTES:
        return ShardIndex(tuple(index_shard(shard, image) for shard in shards), files, None)
    name = sha256_bytes(json.dumps([[path for path, _, _ in files], image]).encode())[:24]
    path = cache_folder() / "listings" / f"shards-{name}.npz"
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(RobxError):  # no cache: every process indexes for itself
            stack.enter_context(wait_for(path))  # of several processes one indexes, the others wait
        old = _load(path)
        if old is not None and old.files == files:
            return old
        known = dict(zip(old.files, old.shards, strict=True)) if old is not None else {}
        found = tuple(known.get(file) or index_shard(Path(file[0]), image) for file in files)
        settled = now - max(changed for _, _, changed in files) > _SETTLED_SECONDS * 1e9
        index = ShardIndex(found, files, path if settled else None)
        keep_index(index)
    return index


def keep_index(index: ShardIndex) -> None:
    """Write an index for the next start; a cache that cannot be written costs only time."""
    if index.kept is None:
        return
    columns = [{"faults": s.faults, "skipped": s.skipped, "without": s.without, "fault": s.fault} for s in index.shards]
    facts = {
        "version": _VERSION,
        "files": index.files,
        "shards": columns,
        "fingerprint": index.fingerprint,
        "sample": index.sample,
        "unique_keys": index.unique_keys,
    }
    keys, labels = (Names.joined(getattr(s, name) for s in index.shards) for name in ("keys", "labels"))
    arrays = {
        "counts": np.array([len(s.keys) for s in index.shards], dtype=np.int64),
        "keys": keys.buffer,
        "key_ends": keys.ends,
        "labels": labels.buffer,
        "label_ends": labels.ends,
        "offsets": np.concatenate([s.offsets for s in index.shards]),
        "sizes": np.concatenate([s.sizes for s in index.shards]),
    }
    keep_arrays(index.kept, arrays, facts)


def _load(path: Path) -> ShardIndex | None:
    if (kept := kept_arrays(path, version=_VERSION)) is None:
        return None
    arrays, facts = kept
    try:
        keys, labels = Names(arrays["keys"], arrays["key_ends"]), Names(arrays["labels"], arrays["label_ends"])
        offsets, sizes, ends = arrays["offsets"], arrays["sizes"], np.cumsum(arrays["counts"]).tolist()
        shards = []
        for start, stop, more in zip([0, *ends[:-1]], ends, facts["shards"], strict=True):
            faults = {int(at): fault for at, fault in more.pop("faults").items()}
            columns = keys.part(start, stop), offsets[start:stop], sizes[start:stop], labels.part(start, stop)
            shards.append(TarIndex(*columns, faults=faults, **more))
        files = tuple((str(name), int(size), int(changed)) for name, size, changed in facts["files"])
        of_source = {name: facts[name] for name in ("fingerprint", "sample", "unique_keys")}
        return ShardIndex(tuple(shards), files, path, **of_source)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError):  # damaged: the shards are indexed again
        return None


def _stamp(shard: Path) -> tuple[str, int, int]:
    name = os.path.abspath(shard)  # noqa: PTH100 (a link in the path may change)
    try:
        found = shard.stat()
    except OSError:
        return name, -1, -1
    return name, found.st_size, found.st_mtime_ns


def index_shard(shard: Path, image: str | None) -> TarIndex:
    """The samples of one shard; a cut or damaged tail becomes one sample that cannot be read."""
    indexer = _Indexer(shard)
    try:
        with _open_regular(shard) as file:
            indexer.size = os.fstat(file.fileno()).st_size
            with tarfile.open(fileobj=_BoundedReader(file), mode="r:") as tar:  # type: ignore[call-overload]
                for info in tar:
                    if info.isfile():
                        indexer.add(tar, info)
    except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
        indexer.fault = f"{shard}: {_damage(shard, error)}"
    return indexer.index(image)


@dataclass(frozen=True, slots=True)
class _Sample:
    key: str
    offset: int = 0
    size: int = 0
    fault: str = ""


@dataclass
class _Indexer:
    """Collects the files of one shard into samples."""

    shard: Path
    size: int = 0
    fault: str = ""
    images: dict[str, dict[str, _Sample]] = field(default_factory=dict)  # key -> what follows it -> the image
    labels: dict[str, str] = field(default_factory=dict)
    repeated: list[_Sample] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)

    def add(self, tar: tarfile.TarFile, info: tarfile.TarInfo) -> None:
        """Note one file: an image, a label, or neither."""
        key, rest = split_name(info.name)
        if not rest or not key.rpartition("/")[2]:  # no suffix, or hidden
            return
        suffix = PurePosixPath(info.name).suffix.lower()
        sparse = info.issparse()
        if not sparse and (info.size < 0 or info.offset_data + info.size > self.size):
            raise tarfile.ReadError(f"cut inside {info.name!r}")
        if suffix in IMAGE_SUFFIXES:
            place = f"{self.shard}:{info.name}"
            sample = _Sample(key, info.offset_data, info.size)
            if sparse:
                sample = _Sample(key, fault=f"{place}: is stored as a sparse file: repack it without --sparse")
            if rest in self.images.setdefault(key, {}):
                self.repeated.append(_Sample(f"{key}.{rest} again", fault=f"{place}: is in the shard twice"))
            else:
                self.images[key][rest] = sample
        elif suffix in UNREAD_SUFFIXES:
            self.skipped[suffix] += 1
        elif rest.lower() == "cls" and not sparse:
            file = tar.extractfile(info)
            self.labels[key] = _label(file.read(_MAX_LABEL_BYTES + 1)) if file else NO_LABEL

    def index(self, image: str | None) -> TarIndex:
        """The samples as columns; `image` says which image of a sample to take."""
        samples, without = list(self.repeated), 0
        for key, variants in self.images.items():
            found = _choose(variants, image, key=key, shard=self.shard)
            if found is None:
                without += 1
            else:
                samples.append(found)
        if self.fault:
            samples.append(_Sample(f"{self.shard.stem}-damaged", fault=self.fault))
        return TarIndex(
            keys=Names.of(sample.key for sample in samples),
            offsets=np.array([sample.offset for sample in samples], dtype=np.int64),
            sizes=np.array([sample.size for sample in samples], dtype=np.int64),
            labels=Names.of(self.labels.get(sample.key, "") for sample in samples),
            faults={at: sample.fault for at, sample in enumerate(samples) if sample.fault},
            skipped=dict(self.skipped),
            without=without,
            fault=self.fault,
        )


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


def split_name(name: str) -> tuple[str, str]:
    """The key of a file in a shard, which ends at the first dot of its name, and what follows; folders stay."""
    folder, slash, base = name.rpartition("/")
    start, _, rest = base.partition(".")
    return f"{folder}{slash}{start}", rest


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


def _choose(variants: dict[str, _Sample], image: str | None, *, key: str, shard: Path) -> _Sample | None:
    """The image of a sample; None when it does not have the one that was asked for.

    Raises:
        InputError: there are several, and none was named.
    """
    if image is not None:
        wanted = image.lower().lstrip(".")
        return next((s for rest, s in variants.items() if wanted in (rest.lower(), _without_suffix(rest))), None)
    if len(variants) > 1:
        names = sorted(variants)
        raise InputError(
            f"{shard}: the sample {key!r} has several images ({', '.join(names[:5])}): name the one to read, such as "
            f"--image-member {names[0]}"
        )
    return next(iter(variants.values()))


def _without_suffix(rest: str) -> str:
    return rest.lower().rpartition(".")[0] or rest.lower()


def _label(text: bytes) -> str:
    """What a .cls member says: a number or a class name."""
    if len(text) > _MAX_LABEL_BYTES:
        return NO_LABEL
    try:
        words = text.decode().strip()
    except UnicodeDecodeError:
        return NO_LABEL
    return words if words and words.isprintable() else NO_LABEL
