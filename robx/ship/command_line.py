"""A stage's arguments as the equivalent robx command, to be shown and copied."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from robx.options import accepts

# Where an argument of the Python API has another name than the command's parameter.
_NAMES = {
    "distill": {"fresh": "resume"},
    "export": {"student": "run", "format": "fmt", "candidates": "rungs"},
    "eval": {"models": "folders"},
}
# Lists that are one word on the command line.
_JOINED = {"affinity": ",", "size": "x", "crop_size": "x", "local_crop_size": "x"}


def command_line(verb: str, arguments: Mapping[str, Any]) -> str:
    """The command that calls the function of ``robx.api`` behind `verb` with these arguments.

    Args:
        verb: "distill", "export", "eval", "bench" or "report".
        arguments: keyword arguments of that function; those that it has no option for are left out, see `has_option`.
    """
    words = [*_words(verb, arguments)]
    return shlex.join(["robx", verb, *words]).replace(f" {Path.home()}/", " ~/")


def has_option(verb: str, name: str, value: Any) -> bool:
    """Whether the verb's command has an option for this argument of its function, and the option takes the value.

    An argument may take more than its option: "none" for a recipe key, or 0 where the option has to be above it.
    """
    option = {str(one.name): one for one in _command(verb).params}.get(_NAMES.get(verb, {}).get(name, name))
    return option is not None and (
        value is None or option.param_type_name == "argument" or accepts(option, [*_option(option, name, value)])
    )


def option_keys(verb: str) -> dict[str, str]:
    """The argument behind each option of the verb's command: {"--rungs": "candidates", "--data": "data", ...}."""
    theirs = {theirs: ours for ours, theirs in _NAMES.get(verb, {}).items()}
    options = [parameter for parameter in _command(verb).params if parameter.param_type_name == "option"]
    keys = {flag: theirs.get(str(option.name), str(option.name)) for option in options for flag in option.opts}
    return {flag: key for flag, key in keys.items() if flag.startswith("--") and key != "fresh"}


def _words(verb: str, arguments: Mapping[str, Any]) -> Iterator[str]:
    """Positional arguments first, then the options in the order given."""
    known = {str(parameter.name): parameter for parameter in _command(verb).params}
    names = _NAMES.get(verb, {})
    given = [
        (known[names.get(name, name)], name, value)
        for name, value in arguments.items()
        if value is not None and has_option(verb, name, value)
    ]
    for parameter, _, value in given:
        if parameter.param_type_name == "argument":
            yield from map(str, value if isinstance(value, list | tuple) else [value])
    for parameter, name, value in given:
        if parameter.param_type_name == "option":
            yield from _option(parameter, name, value)


def _option(option: Any, name: str, value: Any) -> Iterator[str]:
    if isinstance(value, bool):
        negative = name != option.name  # `fresh` is the negative flag of `resume`
        flags = option.opts if value is not negative else option.secondary_opts
        yield from flags[:1]
        return
    flag = max(option.opts, key=len)
    if not isinstance(value, list | tuple):
        yield from (flag, str(value))
    elif name in _JOINED:
        yield from (flag, _JOINED[name].join(map(str, value)))
    elif option.multiple:
        for one in value:
            yield from (flag, str(one))
    else:
        yield from (flag, *map(str, value))


def _command(verb: str) -> Any:
    """The click command of a stage."""
    from robx.distill.commands import distill
    from robx.eval.commands import evaluate, report
    from robx.export.commands import export
    from robx.runtime.commands import bench

    return {"distill": distill, "export": export, "eval": evaluate, "bench": bench, "report": report}[verb]
