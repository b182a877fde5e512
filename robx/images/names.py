"""Many strings in one buffer: a million file names in the memory of their bytes, without a Python object for each.

Forked loader workers share it: nothing in it has a reference count that reading would change, and so copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np


class Names:
    """An immutable sequence of strings."""

    def __init__(self, buffer: np.ndarray, ends: np.ndarray) -> None:
        """Wrap the strings' bytes, uint8, and where each ends, int64 (N,)."""
        self.buffer, self.ends = buffer, ends

    @classmethod
    def of(cls, strings: Iterable[str]) -> Names:
        """Pack `strings`; bytes of a file's name that are not UTF-8 survive."""
        encoded = [string.encode("utf-8", "surrogateescape") for string in strings]
        ends = np.cumsum(np.fromiter(map(len, encoded), np.int64, len(encoded)))
        return cls(np.frombuffer(b"".join(encoded), np.uint8), ends)

    @classmethod
    def joined(cls, parts: Iterable[Names]) -> Names:
        """All strings of `parts`, in order."""
        parts = list(parts)
        sizes = np.cumsum([0, *(len(part.buffer) for part in parts)])
        if not parts:
            return cls.of(())
        return cls(
            np.concatenate([part.buffer for part in parts]),
            np.concatenate([part.ends + size for part, size in zip(parts, sizes, strict=False)]),
        )

    def part(self, start: int, stop: int) -> Names:
        """The strings from `start` to before `stop`, in the same memory."""
        first = int(self.ends[start - 1]) if start else 0
        last = int(self.ends[stop - 1]) if stop > start else first
        return Names(self.buffer[first:last], self.ends[start:stop] - first)

    def __len__(self) -> int:
        """The number of strings."""
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        """One string."""
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        start = self.ends[index - 1] if index else 0
        return self.buffer[start : self.ends[index]].tobytes().decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        """All strings, in order."""
        data, start = self.buffer.tobytes(), 0
        for end in self.ends.tolist():
            yield data[start:end].decode("utf-8", "surrogateescape")
            start = end
