"""Read a TOML file that a user wrote, and write values as TOML."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

from robx.errors import InputError
from robx.store.files import read_user_text

_MAX_BYTES = 1024 * 1024


def read_toml(path: Path, *, what: str) -> dict[str, Any]:
    """The tables of a TOML file.

    Args:
        path: the file.
        what: what it should be, for errors: "a recipe in TOML (see robx recipe)".

    Raises:
        InputError: the file is missing, too large, or not TOML.
    """
    try:
        if path.exists() and (not path.is_file() or path.stat().st_size > _MAX_BYTES):
            raise InputError(f"{path} is not a regular file of at most {_MAX_BYTES} bytes: give {what}")
        return tomllib.loads(read_user_text(path))
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): give {what}") from error
    except RecursionError:
        raise InputError(f"{path} is not valid TOML (it is nested too deeply): give {what}") from None
    except ValueError as error:  # of TOML, of its encoding, or of an integer with thousands of digits
        raise InputError(f"{path} is not valid TOML ({error}): give {what}") from error


def toml_value(value: Any) -> str:
    """A boolean, number, string, path, or a list of these, as TOML."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml_value, value))}]"
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, bool | int):
        return json.dumps(value)
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
