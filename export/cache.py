"""Files that an export computed and the next one reuses: verified by their hash, and computed again when damaged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from robx.errors import ArtifactError
from robx.store.files import MAX_FILE_BYTES, read_bytes, sha256_bytes, write_bytes


class Cache:
    """A folder of computed files, each with its SHA-256 beside it."""

    def __init__(self, folder: Path, say: Callable[[str], None] = lambda _: None) -> None:
        """`say` is told of every damaged file."""
        self.folder, self.say = folder, say

    def read(self, name: str) -> bytes | None:
        """The bytes of a file as it was written; None if it does not exist or is damaged."""
        path = self.folder / name
        if not path.exists() or not _hash_of(path).exists():
            return None
        try:
            data, expected = read_bytes(path, limit=MAX_FILE_BYTES), read_bytes(_hash_of(path))
        except ArtifactError:
            data, expected = b"", b"unreadable"
        if sha256_bytes(data).encode() == expected:
            return data
        self.say(f"{path} is damaged: it is ignored and computed again")
        return None

    def write(self, name: str, data: bytes) -> None:
        """Keep `data`; the hash is written last, so that an unfinished file is never read."""
        path = self.folder / name
        write_bytes(path, data)
        write_bytes(_hash_of(path), sha256_bytes(data).encode())


def _hash_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")
