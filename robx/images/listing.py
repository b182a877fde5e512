"""The image files below a folder: listed by threads, and kept in the cache of a large folder for the next start.

A kept listing is used while the folders' modification times are what they were: a file that is added, removed or
renamed changes its folder's time. A sample of the files' sizes is checked too, because rewriting one in place does not.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from robx.errors import InputError, RobxError
from robx.formats import MANIFEST_START
from robx.images.decode import IMAGE_SUFFIXES
from robx.images.names import Names
from robx.store.files import cache_folder, sha256_bytes
from robx.store.kept_arrays import keep_arrays, kept_arrays
from robx.store.locks import wait_for
from robx.store.written import RECORD

# Fewer images are listed faster than a cache is read.
KEPT_FROM = 20_000
_VERSION = 2
_THREADS = 16  # mostly waiting for a network file system
_CHUNK = 2_000  # stats by one task
_CHECKED_SIZES = 4_096
_START_BYTES = 256  # of a manifest
_SETTLED_SECONDS = 2.0  # a folder changed this shortly before it was listed may change again at the same time stamp
# Files that a folder of images may contain without a word about them.
_NOT_IMAGES = frozenset(
    {".txt", ".json", ".jsonl", ".csv", ".tsv", ".xml", ".yaml", ".yml", ".md", ".rst", ".html", ".log", ".ini", ".db"}
    | {".py", ".sh", ".tar", ".zip", ".gz", ".tgz", ".lock", ".cls", ".pdf", ".bib", ".cfg", ".toml", ".sha256", ".md5"}
)
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Listing:
    """The image files below a folder, in the order of their relative paths."""

    names: Names  # relative paths
    sizes: np.ndarray  # int64 (N,), bytes; -1 for a dangling link
    skipped: Counter[str]  # suffix -> files that are not images robx reads
    folders: Names  # relative paths of all folders, "." first
    times: np.ndarray  # int64, modification times of `folders` in ns
    ours: tuple[str, ...] = ()  # relative paths of folders that robx wrote, which were left out
    fingerprint: str = ""  # as computed by the source, with `sample`; "" when it is not known
    sample: str = ""


def list_images(root: Path) -> tuple[Listing, Path | None]:
    """The images below `root`, and where a large listing is kept.

    Hidden files and folders are left out, and so are folders that robx wrote: a bundle's golden image is not user data.

    Raises:
        InputError: a folder cannot be read.
    """
    kept = _cache_file(root)
    if (found := _load(root, kept)) is not None:
        return found, kept
    started = time.time_ns()
    with ThreadPoolExecutor(_THREADS) as pool:
        files, skipped, times, ours = _walk(os.fspath(root), pool)
        files.sort()
        folders = Names.of(times), np.fromiter(times.values(), np.int64, len(times))
        if len(files) < KEPT_FROM:
            return Listing(Names.of(files), sizes_of(root, files, pool), skipped, *folders, ours=ours), None
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(RobxError):  # no cache: every process lists for itself
                stack.enter_context(wait_for(kept))  # of several processes one asks for the sizes, the others wait
            if (found := _load(root, kept)) is not None:
                return found, kept
            listing = Listing(Names.of(files), sizes_of(root, files, pool), skipped, *folders, ours=ours)
            settled = started - int(listing.times.max()) > _SETTLED_SECONDS * 1e9
            if settled:
                keep(listing, kept)
    return listing, kept if settled else None


def keep(listing: Listing, path: Path) -> None:
    """Write a listing for the next start; a cache that cannot be written costs only time."""
    facts = {"version": _VERSION, "skipped": listing.skipped, "ours": listing.ours, "fingerprint": listing.fingerprint}
    arrays = {
        "names": listing.names.buffer,
        "ends": listing.names.ends,
        "sizes": listing.sizes,
        "folders": listing.folders.buffer,
        "folder_ends": listing.folders.ends,
        "times": listing.times,
    }
    keep_arrays(path, arrays, facts | {"sample": listing.sample})


def sizes_of(root: Path, names: Sequence[str], pool: ThreadPoolExecutor) -> np.ndarray:
    """Bytes of each file, int64 (N,); -1 for a dangling link."""
    top = os.fspath(root)
    return np.fromiter(_in_chunks(pool, lambda name: _size(f"{top}/{name}"), names), np.int64, len(names))


def _in_chunks(pool: ThreadPoolExecutor, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterable[Result]:
    pieces = [items[start : start + _CHUNK] for start in range(0, len(items), _CHUNK)]
    for piece in pool.map(lambda piece: [function(item) for item in piece], pieces):
        yield from piece


def is_ours(folder: str | Path) -> bool:
    """Whether robx wrote this folder: a run, a plan's output, or a bundle."""
    place = Path(folder)
    if os.path.lexists(place / RECORD):
        return True
    try:
        with (place / "manifest.json").open("rb") as file:
            return MANIFEST_START.match(file.read(_START_BYTES).decode(errors="replace")) is not None
    except OSError:
        return False


def _walk(root: str, pool: ThreadPoolExecutor) -> tuple[list[str], Counter[str], dict[str, int], tuple[str, ...]]:
    """(image files, other files by suffix, each folder's time, folders that robx wrote), relative to `root`.

    Links to folders are followed, but for those that lead back up.
    """
    files: list[str] = []
    skipped: Counter[str] = Counter()
    times: dict[str, int] = {}
    left_out = list[str]()
    level: list[tuple[str, tuple[str, ...]]] = [
        ("", (os.path.realpath(root),))
    ]  # a folder, and the real paths of it and those above
    while level:
        deeper = []
        scanned = pool.map(lambda folder: _scan(root, *folder), level)
        for (prefix, _), (changed, own, others, below, is_own) in zip(level, scanned, strict=True):
            if is_own and prefix:
                left_out.append(prefix.rstrip("/"))
                continue
            times[prefix.rstrip("/") or "."] = changed
            files += own
            skipped += others
            deeper += below
        level = deeper
    return files, skipped, times, tuple(sorted(left_out))


def _scan(
    root: str, prefix: str, above: tuple[str, ...]
) -> tuple[int, list[str], Counter[str], list[tuple[str, tuple[str, ...]]], bool]:
    """One folder's time before it was read, its images, other files by suffix, subfolders, and whether it is robx's."""
    changed = _time(Path(root), prefix)
    files, skipped, below, may_be_ours = [], Counter[str](), [], False
    try:
        with os.scandir(f"{root}/{prefix}" if prefix else root) as entries:
            for entry in entries:
                name = entry.name
                may_be_ours |= name in (RECORD, "manifest.json")
                if name.startswith("."):
                    continue
                if entry.is_dir():
                    real = os.path.realpath(entry.path) if entry.is_symlink() else f"{above[-1]}/{name}"
                    if real not in above:  # a link to a folder above itself would never end
                        below.append((f"{prefix}{name}/", (*above, real)))
                    continue
                dot = name.rfind(".")
                suffix = name[dot:].lower() if dot > 0 else ""
                if suffix in IMAGE_SUFFIXES:
                    files.append(prefix + name)
                elif suffix and suffix not in _NOT_IMAGES:
                    skipped[suffix] += 1
    except OSError as error:  # a folder that is silently left out would be a missing class
        where = f"{root}/{prefix}".rstrip("/")
        raise InputError(f"{where} cannot be read ({error.strerror}): fix its permissions, or move it away") from error
    return changed, files, skipped, below, may_be_ours and is_ours(f"{root}/{prefix}")


def _cache_file(root: Path) -> Path:
    return cache_folder() / "listings" / f"{sha256_bytes(os.fsencode(os.path.realpath(root)))[:24]}.npz"


def _load(root: Path, path: Path) -> Listing | None:
    """The kept listing, if it still describes the folder."""
    if (kept := kept_arrays(path, version=_VERSION)) is None:
        return None
    arrays, facts = kept
    try:
        listing = Listing(
            Names(arrays["names"], arrays["ends"]),
            arrays["sizes"],
            Counter(facts["skipped"]),
            Names(arrays["folders"], arrays["folder_ends"]),
            arrays["times"],
            tuple(facts["ours"]),
            facts["fingerprint"],
            facts["sample"],
        )
        folders = zip(listing.folders, listing.times.tolist(), strict=True)
        if any(_time(root, folder) != changed for folder, changed in folders):
            return None
        places = np.unique(np.linspace(0, len(listing.names) - 1, _CHECKED_SIZES).astype(int)).tolist()
        top = os.fspath(root)
        if any(_size(f"{top}/{listing.names[place]}") != listing.sizes[place] for place in places):
            return None
    except (KeyError, TypeError, ValueError, IndexError):  # a damaged file: the folder is listed again
        return None
    return listing


def _time(root: Path, folder: str) -> int:
    try:
        return os.stat(root / folder).st_mtime_ns  # noqa: PTH116
    except OSError:
        return -1


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size  # noqa: PTH116
    except OSError:
        return -1
