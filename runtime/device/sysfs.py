"""What the kernel tells in files, and what a tool prints. It runs on the device too: Python 3.8 and its library alone.

`root` stands for the file system that is read: the tests lay a Raspberry Pi's or a Jetson's beside this one.
"""

from __future__ import annotations

import glob
import os


def read(root: str, path: str) -> str | None:
    """The text of a file below `root`, without white space around it; None where there is none to read."""
    try:
        with open(os.path.join(root, path), errors="replace") as file:
            return file.read().strip()
    except OSError:
        return None


def numbers(root: str, pattern: str) -> list[int]:
    """The whole numbers in the files that match, cpu2 before cpu10; what holds none is left out."""
    found = []
    for path in sorted(glob.glob(os.path.join(root, pattern)), key=lambda path: (len(path), path)):
        try:
            found.append(int(read("", path) or ""))
        except ValueError:
            continue
    return found


def ask(arguments: list[str]) -> str | None:
    """What a tool prints, or None when it is not on PATH, cannot be run, fails to end, or prints nothing."""
    folders = os.environ.get("PATH", os.defpath).split(os.pathsep)
    if not any(os.access(os.path.join(folder, arguments[0]), os.X_OK) for folder in folders):
        return None
    import subprocess  # most devices have none of the tools, and to import it takes a hundredth of a runner's start

    try:
        done = subprocess.run(arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="replace").strip() or None
