"""A script of its own: unpickle a foreign file within limits of time and memory, without running what it names.

    python -I -S pickle_inspector.py FILE

A pickle of 300 bytes can take hours to read (a dictionary's key of nested tuples is hashed exponentially often), or
gigabytes. Here every class and function is replaced by a stand-in, and the process is limited. It writes one JSON
object: ``names`` of the classes and functions in the pickle, its ``protocol``, and, if it is refused, ``limit``, the
reason. It imports the standard library only.
"""

from __future__ import annotations

import json
import pickle
import resource
import sys
import zipfile
from pathlib import Path
from typing import IO, Any

_CPU_SECONDS = 3
_MEMORY_BYTES = 1024**3
# Objects of a checkpoint without its tensors' data; the largest published teacher has about 300 kB.
_PICKLE_BYTES = 4 * 1024**2
_MEMBERS = 100_000
# torch's format before zip archives: five pickles, the first of this number, the fourth of the objects.
_LEGACY_MAGIC, _LEGACY_PICKLES = 0x1950A86A20F9469CFC6C, 5


class StandIn(dict):  # type: ignore[type-arg]
    """Takes the place of every class, function and object that a pickle names; does nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def __call__(self, *_: Any, **__: Any) -> StandIn:
        """The result of a function."""
        return StandIn()

    def append(self, item: Any) -> None:
        """Ignore an item of a list."""

    def extend(self, items: Any) -> None:
        """Ignore items of a list."""

    def __setstate__(self, state: Any) -> None:
        """Ignore an object's state."""

    __hash__ = object.__hash__  # type: ignore[assignment]
    __eq__ = object.__eq__


class Inspector(pickle.Unpickler):
    """An unpickler that only notes the names."""

    def __init__(self, file: IO[bytes], names: set[str]) -> None:
        super().__init__(file)
        self._names = names

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for any class or function."""
        self._names.add(f"{module}.{name}"[:100])
        return StandIn

    def persistent_load(self, pid: Any) -> Any:
        """The stand-in for a tensor's data."""
        return StandIn()


def inspect(path: str) -> dict[str, Any]:
    """The names and the protocol of the pickles in `path`, or the limit that it exceeds."""
    names: set[str] = set()
    found: dict[str, Any] = {"names": [], "protocol": 0}
    try:
        if zipfile.is_zipfile(path):
            found["protocol"] = _inspect_zip(path, names)
        else:
            found["protocol"] = _inspect_stream(path, names)
    except OverflowError as error:
        found["limit"] = str(error)
    except MemoryError:
        found["limit"] = "needs more than 1 GB of memory without its tensors"
    except Exception as error:  # damaged: torch's own reader says how
        found["error"] = type(error).__name__
    return found | {"names": sorted(names)[:100]}


def _inspect_zip(path: str, names: set[str]) -> int:
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if len(members) > _MEMBERS:
            raise OverflowError(f"has {len(members)} members")
        if packed := next((m for m in members if m.compress_type != zipfile.ZIP_STORED), None):
            raise OverflowError(f"has compressed members ({packed.filename[:40]}), which torch.save never writes")
        pickles = [m for m in members if m.filename.endswith("/data.pkl")]
        if (size := sum(m.file_size for m in pickles)) > _PICKLE_BYTES:
            raise OverflowError(f"has {size / 1e6:.0f} MB of objects besides its tensors")
        protocol = 0
        for member in pickles:
            data = archive.read(member)
            protocol = data[1] if data[:1] == pickle.PROTO else 0
            with archive.open(member) as file:
                Inspector(file, names).load()
        return protocol


def _inspect_stream(path: str, names: set[str]) -> int:
    with Path(path).open("rb") as file:
        start = file.read(2)
        file.seek(0)
        for number in range(_LEGACY_PICKLES):
            before = file.tell()
            loaded = Inspector(file, names).load()
            if (size := file.tell() - before) > _PICKLE_BYTES:
                raise OverflowError(f"has {size / 1e6:.0f} MB of objects besides its tensors")
            if number == 0 and loaded != _LEGACY_MAGIC:
                break
    return start[1] if start[:1] == pickle.PROTO else 0


def main() -> None:
    """Limit this process, then inspect the file that the command line names."""
    resource.setrlimit(resource.RLIMIT_CPU, (_CPU_SECONDS, _CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    sys.stdout.write(json.dumps(inspect(sys.argv[1])))


if __name__ == "__main__":
    main()
