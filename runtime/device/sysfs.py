"""Read kernel files and the output of tools. Runs on the device: Python 3.8 and the standard library only.

`root` is the file system to read: tests provide those of a Raspberry Pi and a Jetson.
"""

from __future__ import annotations

import glob
import os


def read(root: str, path: str) -> str | None:
    """The stripped text of a file below `root`; None if it cannot be read."""
    try:
        with open(os.path.join(root, path), errors="replace") as file:
            return file.read().strip()
    except OSError:
        return None


def numbers(root: str, pattern: str) -> list[int]:
    """The integers in the files that match, cpu2 before cpu10; files without one are left out."""
    found = []
    for path in sorted(glob.glob(os.path.join(root, pattern)), key=lambda path: (len(path), path)):
        try:
            found.append(int(read("", path) or ""))
        except ValueError:
            continue
    return found


def ask(arguments: list[str]) -> str | None:
    """What a tool prints; None if it is not on PATH, cannot be run, does not end, or prints nothing."""
    folders = os.environ.get("PATH", os.defpath).split(os.pathsep)
    if not any(os.access(os.path.join(folder, arguments[0]), os.X_OK) for folder in folders):
        return None
    import subprocess  # most devices have none of the tools, and the import takes 1 % of a runner's start-up

    try:
        done = subprocess.run(arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="replace").strip() or None
