"""Every error that robx raises for its user.

RobxError                 one line that says what is wrong and what to do; exit status 2
├── InputError            a file, folder, name or option given by the user is wrong
│   ├── NoSplit           the data do not have the requested split
│   ├── NoSpace           the disk or the quota is full; exit status 1
│   └── CorruptImage      an image cannot be decoded; skipped and counted, up to a limit
│       └── UnreadableImage  the disk does not deliver an image; it may later
├── ArtifactError         a student, bundle, checkpoint or record is damaged, altered, or of a newer version
├── MissingExtra          an optional package is not installed; the message names the extra to install
├── DeviceError           a device cannot be reached, or failed during a run
├── Interrupted           a signal stopped a run whose state is saved; the same command resumes it; exit status 75
└── GateFailed            the export is written, but no candidate passed the gate; exit status 3

The command line prints the message and exits with ``exit_status``. Any exception that is not a RobxError is a bug in
robx and keeps its traceback.
"""

from __future__ import annotations

import difflib
import errno
import os
from collections.abc import Iterable


class RobxError(Exception):
    """The base class: a message that names the offending value and says what to do."""

    exit_status = 2


class InputError(RobxError):
    """A file, folder, name or option given by the user is wrong."""


class NoSplit(InputError):
    """The data do not have the requested split, and are otherwise sound."""


class NoSpace(InputError):
    """The disk, the quota or the limit on the size of files leaves no space for the output."""

    exit_status = 1


class CorruptImage(InputError):
    """An image that cannot be decoded."""


class UnreadableImage(CorruptImage):
    """An image that the disk does not deliver now, and may deliver later."""


class ArtifactError(RobxError):
    """A student, bundle, checkpoint or record is damaged, altered, or of a newer version."""


class MissingExtra(RobxError):
    """An optional package is missing; the message names it, the extra that installs it, and the cause."""

    def __init__(self, package: str, extra: str, *, purpose: str, cause: BaseException | None = None) -> None:
        why = f" ({cause})" if cause is not None else ""
        super().__init__(f"{purpose} needs the package {package}{why}: pip install 'robx[{extra}]'")


class DeviceError(RobxError):
    """A device cannot be reached, or failed during a run."""


class Interrupted(RobxError):
    """A signal stopped a run whose state is saved. The exit status is EX_TEMPFAIL of sysexits.h: try again."""

    exit_status = 75


class GateFailed(RobxError):
    """No candidate of the requested precision passed the gate; the fallback is written."""

    exit_status = 3


# What libraries say when the system has no memory or threads left for them.
_EXHAUSTED = (
    "can't start new thread",
    "failed to map segment",
    "bad_alloc",
    "allocate memory",
    "not enough memory",
    "PyObject pointer is null",
)


def is_exhausted(error: BaseException) -> bool:
    """Whether the machine, or a limit such as ``ulimit -v``, has run out of memory or threads."""
    return isinstance(error, MemoryError) or any(text in str(error) for text in _EXHAUSTED)


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_full(error: BaseException) -> bool:
    """Whether an error is, or was caused by, a lack of space; libraries wrap the system's error or quote its words."""
    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    return any(
        isinstance(one, NoSpace)
        or (isinstance(one, OSError) and one.errno in _FULL)
        or (not isinstance(one, RobxError) and os.strerror(errno.ENOSPC) in str(one))
        for one in causes
    )


def one_line(text: str) -> str:
    """`text` as one line that is safe on a terminal: whitespace becomes spaces and control characters are escaped.

    Messages contain file names, and a file name may contain a line break or an escape sequence.
    """
    return visible(" ".join(text.split()))


def visible(text: str) -> str:
    """`text` with every line break, control character and undecodable byte escaped, so that a terminal shows it."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def counted(number: int, noun: str, plural: str = "") -> str:
    """A number and its noun, in the plural unless there is exactly one: "1 epoch", "0 epochs", "2 processes"."""
    return f"{number} {noun if number == 1 else plural or f'{noun}s'}"


def duration(seconds: float) -> str:
    """A time in the unit in which it is easiest to read: "40 seconds", "5 minutes", "2.5 hours"."""
    if seconds < 90:
        return counted(max(1, round(seconds)), "second")
    return counted(round(seconds / 60), "minute") if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def first_line(error: BaseException, *, limit: int | None = None) -> str:
    """The first line of an exception's message, or the name of its type if it has none; see `shortened`."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line if limit is None else shortened(line, limit)


def shortened(text: str, limit: int) -> str:
    """`text` in at most `limit` characters: cut after a whole word, and marked with "..." where it is cut."""
    if len(text) <= limit:
        return text
    room = limit - len(" ...")
    whole = text[: room + 1].rpartition(" ")[0].rstrip()
    return f"{whole or text[:room]} ..."


def did_you_mean(name: str, known: Iterable[str], *, otherwise: str, prefix: str = "") -> str:
    """A hint for an error message: the three known names closest to `name`, each after `prefix`, or `otherwise`.

    Upper and lower case do not count; a name that differs in nothing else is the only one.
    """
    spelt = {other.lower(): other for other in known}
    same = spelt.get(name.lower())
    near = [same] if same else [spelt[one] for one in difflib.get_close_matches(name.lower(), spelt, n=3, cutoff=0.5)]
    return f"did you mean {', '.join(prefix + n for n in near)}?" if near else otherwise
