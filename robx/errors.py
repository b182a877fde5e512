"""Every error that robx raises for its user.

RobxError                 one clear line that says what to do; exit status 2
├── InputError            a file, folder, name or option that the user gave is wrong
│   └── CorruptImage      one image that cannot be decoded; skipped and counted, up to a budget
├── ArtifactError         a Student, Bundle or checkpoint is damaged, tampered with, or too new
├── MissingExtra          an optional package is not installed; names the extra
├── DeviceError           the device cannot be reached, or failed midway
├── Interrupted           a signal asked for the end and the state is saved; the same command goes on; exit status 75
└── GateFailed            the export is written, but no rung of what was asked for passed; exit status 3

The command line prints the message and exits with ``exit_status``. Anything that is not a RobxError is a defect of robx
and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RobxError(Exception):
    """The root: a message that names the offending value and what to do."""

    exit_status = 2


class InputError(RobxError):
    """A file, folder, name or option that the user gave is wrong."""


class NoSplit(InputError):
    """Data without the split that was asked for; they are whole otherwise."""


class CorruptImage(InputError):
    """One image that cannot be decoded."""


class UnreadableImage(CorruptImage):
    """One image that the disk does not give; it may another time."""


class ArtifactError(RobxError):
    """A Student, Bundle, checkpoint or record is damaged, tampered with, or of a newer schema."""


class MissingExtra(RobxError):
    """An optional package is missing; the message names it, the extra that brings it, and the cause."""

    def __init__(self, package: str, extra: str, *, purpose: str, cause: BaseException | None = None) -> None:
        why = f" ({cause})" if cause is not None else ""
        super().__init__(f"{purpose} needs the package {package}{why}: pip install 'robx[{extra}]'")


class DeviceError(RobxError):
    """The device cannot be reached, or failed midway."""


class Interrupted(RobxError):
    """A signal asked a run to end; its state is saved. The status is that of sysexits' EX_TEMPFAIL: try again."""

    exit_status = 75


class GateFailed(RobxError):
    """No rung of the precision that was asked for passed; the fallback was written."""

    exit_status = 3


def one_line(text: str) -> str:
    """`text` as one line that a terminal shows and does not obey: white space becomes spaces, control codes escapes.

    Messages have names of files in them, and a name may hold a line break or an escape sequence.
    """
    return visible(" ".join(text.split()))


def visible(text: str) -> str:
    """`text` with every line break, control code and undecodable byte as an escape: a terminal shows it as it is."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or the name of its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def did_you_mean(name: str, known: Iterable[str], *, otherwise: str, prefix: str = "") -> str:
    """A hint for an error message: the three known names closest to `name`, each after `prefix`, or `otherwise`."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"did you mean {', '.join(prefix + n for n in near)}?" if near else otherwise
