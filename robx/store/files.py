"""Write, read and hash files.

A reader sees either the old file or the new one, complete, whatever happens to the writer (even a power cut): write to
a temporary file beside the target, flush, fsync, rename, fsync the folder.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import itertools
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from robx.errors import ArtifactError, InputError, NoSpace, RobxError
from robx.store.dataclass_json import parse_json

# No manifest, record or recipe is larger.
MAX_JSON_BYTES = 64 * 1024 * 1024
# No file of a bundle is larger: protobuf stops at 2 GiB, and a small model is far below.
MAX_FILE_BYTES = 16 * 1024**3
# What a killed writer leaves behind: see `random_name`.
LEFTOVER = re.compile(r"\.(?P<name>.+)\.robx-[0-9a-f]{8}\.(?P<kind>tmp|old)", re.DOTALL)
_STAMPED, _STAMPED_OF_MORE = 20_000, 4_096
_SAMPLED_FILES, _SAMPLED_BYTES = 64, 64 * 1024  # what a fingerprint of a folder reads


def cache_folder() -> Path:
    """Where robx keeps files it can fetch or compute again: ``$ROBX_CACHE``, or ``robx`` in the user's cache folder.

    The user's cache folder is ``$XDG_CACHE_HOME``, or ``~/.cache``.
    """
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "robx"
    return Path(os.environ.get("ROBX_CACHE") or default)


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_bytes(data: bytes) -> str:
    """Hex SHA-256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def size_of(path: Path) -> int:
    """Size of a file in bytes; -1 for a dangling link, which counts as unreadable when it is read."""
    try:
        return path.stat().st_size
    except OSError:
        return -1


def fingerprint(lines: Iterable[str]) -> str:
    """Sixteen hex digits that change with any of `lines` or their order."""
    digest, rest = hashlib.sha256(), iter(lines)
    while batch := list(itertools.islice(rest, 4096)):
        digest.update("\n".join([*batch, ""]).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:16]


def fingerprint_files(root: Path, names: Sequence[str], *, lines: Iterable[str]) -> str:
    """Sixteen hex digits that change with any of `lines` (one per file), any file's size, and a sample of the contents.

    Names and sizes are not enough: uncompressed images all have the same size. The first 64 KiB of 64 files, evenly
    spread, are read, and no more, because there may be millions.
    """

    def start(at: int, count: int) -> bytes:
        return start_of(root / names[at], count)

    sized = (f"{line}\0{size_of(root / name)}" for line, name in zip(lines, names, strict=True))
    return fingerprint(itertools.chain(sized, sampled(len(names), start)))


def start_of(path: Path, count: int, *, offset: int = 0) -> bytes:
    """At most `count` bytes of a regular file, from `offset` on.

    Raises:
        OSError: it cannot be read, or is a pipe or a device, which may block for ever.
    """
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, "not a regular file", str(path))
    with path.open("rb", buffering=0) as file:
        return os.pread(file.fileno(), count, offset)


def sampled(count: int, start: Callable[[int, int], bytes]) -> Iterator[str]:
    """Hashes of the first bytes of 64 of `count` files, evenly spread; `start(index, bytes)` reads them."""
    for at in range(0, count, max(1, count // _SAMPLED_FILES)):
        try:
            yield f"{at}\0{sha256_bytes(start(at, _SAMPLED_BYTES))}"
        except OSError:  # it counts as unreadable when it is read
            yield f"{at}\0"


def stamp_of(count: int, path: Callable[[int], str | Path]) -> str:
    """Sixteen hex digits that change when any of `count` files is rewritten; only for caches on this machine.

    Of more than 20,000 files, where asking for each takes minutes on a network, 4,096 are asked for, evenly spread.
    """

    def written(at: int) -> str:
        try:
            found = os.stat(path(at))  # noqa: PTH116 (thousands of them)
        except OSError:
            return "-"
        return f"{found.st_size} {found.st_mtime_ns}"

    places = range(count) if count <= _STAMPED else (at * count // _STAMPED_OF_MORE for at in range(_STAMPED_OF_MORE))
    return fingerprint(map(written, places))


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file, then rename it to `path`.

    On any failure `path` is what it was before and no temporary file stays. The temporary file is new and its name
    random, so that nobody can put a link in its place.

    Raises:
        RobxError: no space, no permission, or the folder is gone; the message says which.
    """
    temporary, held = path.with_name(random_name(path.name)), -1
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        held = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
        try_lock(held)  # whoever gets this lock has found an abandoned file
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)  # noqa: PTH105 (the one rename; patched by the fault tests)
        fsync_folder(path.parent)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        if held >= 0:
            os.close(held)
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def random_name(name: str, *, kind: str = "tmp") -> str:
    """A hidden, unguessable name for what is to become `name`, or was ("old"); `LEFTOVER` recognises it."""
    return f".{name}.robx-{secrets.token_hex(4)}.{kind}"


def try_lock(descriptor: int) -> bool:
    """Lock an opened file or folder if no other holder has it; the lock ends with the descriptor."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` atomically."""
    write_atomically(path, lambda temporary: _write_all(temporary, data))


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically, as UTF-8; undecodable bytes of file names are written as escapes."""
    write_bytes(path, text.encode(errors="backslashreplace"))


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` atomically as indented JSON; NaN and infinity are refused."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_bytes(path: Path, *, limit: int = MAX_JSON_BYTES) -> bytes:
    """The bytes of a regular file of at most `limit` bytes.

    Raises:
        ArtifactError: missing, unreadable, too large, or not a regular file (a pipe or a device may block for ever).
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise ArtifactError(f"{path} is not a regular file: give one that robx wrote")
        if found.st_size > limit:
            raise ArtifactError(f"{path} is larger than {limit} bytes: it is not a file that robx wrote")
        return path.read_bytes()
    except FileNotFoundError:
        if not path.parent.exists():
            raise ArtifactError(f"{path.parent} does not exist: give a folder that robx wrote") from None
        raise ArtifactError(f"{path} is missing: give a folder that robx wrote, or create it again") from None
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read ({error.strerror}): check its permissions") from error


def read_user_text(path: Path, *, errors: str = "strict") -> str:
    """A text file that a user wrote: UTF-8, with or without the byte order mark that editors on Windows add."""
    return path.read_text(encoding="utf-8-sig", errors=errors)


def read_json(path: Path, *, limit: int = MAX_JSON_BYTES) -> Any:
    """Parse a JSON file of at most `limit` bytes.

    Raises:
        ArtifactError: missing, unreadable, too large, or not JSON.
    """
    try:
        return parse_json(read_bytes(path, limit=limit))
    except ValueError as error:
        raise ArtifactError(f"{path} is not valid JSON ({error}): it is damaged; create it again") from error


def verify_file(folder: Path, name: str, sha256: str, *, size: int | None = None) -> None:
    """Check that the file `name` in `folder` exists, is inside it, is not a link, and has this hash (and size).

    Raises:
        ArtifactError: one of these does not hold; the message names the file.
    """
    path, parts = folder / name, Path(name).parts
    try:
        links = any(folder.joinpath(*parts[:depth]).is_symlink() for depth in range(1, len(parts) + 1))
        if Path(name).is_absolute() or ".." in parts or links:
            raise ArtifactError(f"{folder} refers to {name!r}, which is outside of it: do not use it")
        if not path.is_file():
            raise ArtifactError(f"{path} is missing: the folder is incomplete; create it again")
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ArtifactError(f"{path} is larger than {MAX_FILE_BYTES} bytes: it is not a file of a small model")
        if size is not None and path.stat().st_size != size:
            raise ArtifactError(f"{path} is not the file that was written (its size differs): create it again")
        if sha256_file(path) != sha256:
            raise ArtifactError(f"{path} is not the file that was written (its SHA-256 differs): create it again")
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read ({error.strerror}): create it again") from error


def require_space(folder: Path, needed: int) -> None:
    """Raise NoSpace if the file system of `folder` has fewer than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise NoSpace(f"{folder} has {free / 1e6:.0f} MB free and {needed / 1e6:.0f} MB are needed: free some space")


def unwritable(path: Path, error: OSError) -> RobxError:
    """The RobxError for an OSError raised while writing `path`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return NoSpace(f"no space left to write {path}: free some space and run the same command again")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return InputError(f"{path} cannot be written ({error.strerror}): choose another folder or fix its permissions")
    return InputError(f"{path} cannot be written: {error.strerror or error}")


def fsync_folder(folder: Path) -> None:
    """Flush the names in `folder` to the disk, so that they survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems support it only for files
            raise
    finally:
        os.close(descriptor)


def _write_all(path: Path, data: bytes) -> None:
    path.write_bytes(data)
