"""The types of a function's arguments, checked where a user gives them: in Python, and in the tables of a plan.

The annotations of the functions in ``robx.api`` are the only list of what each argument takes.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import numbers
import os
import re
import reprlib
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar, Union

from robx.errors import ArtifactError, InputError, RobxError, counted, did_you_mean
from robx.store.dataclass_json import check_json, to_json

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}
# Option or argument of a command: the argument of its function, where more than the hyphens differs.
_ARGUMENTS = {"rungs": "candidates", "store_k": "stored_k", "run": "student", "fmt": "format", "folders": "models"}
_OPTION = re.compile(
    r"\b(?:robx|torchrun|docker|pip) [a-z][^,;:()]*"  # a command, whose options stay
    r"|(?<![\w-])--(?P<option>[a-z][a-z0-9-]*[a-z0-9])(?: (?P<value>[0-9]+\b|[A-Z]+\b))?"
)
_PLURALS = {"a whole number": "whole numbers", "a number": "numbers", "a string": "strings", "a path": "paths"}


def checked(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """`function`, with its arguments checked against its annotations before it runs; see `check_types`.

    Arguments that it does not take, or lacks, are an InputError too. The errors that it raises name arguments where the
    command line has options; see `naming_arguments`.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        try:
            given = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise InputError(_misfit(function, error, args, kwargs)) from None
        given.arguments |= check_types(types_of(function), given.arguments)
        try:
            return function(*given.args, **given.kwargs)
        except RobxError as error:
            error.args = (naming_arguments(str(error), function),)
            raise

    return call


def _misfit(function: Callable[..., Any], error: TypeError, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """What to say of a call that does not fit the function's signature; `error` is Python's for it."""
    name, signature, kinds = function.__name__, inspect.signature(function).parameters, inspect.Parameter
    parameters = {key: one for key, one in signature.items() if key != "self"}
    known = [one.name for one in parameters.values() if one.kind is not kinds.VAR_KEYWORD]
    positional = [one.name for one in parameters.values() if one.kind is kinds.POSITIONAL_OR_KEYWORD]
    takes_others, count = len(known) < len(parameters), len(args) - ("self" in signature)
    listed = f"its arguments are {', '.join(known)}" if known else "it takes none"
    if unknown := [key for key in kwargs if key not in known and not takes_others]:
        return f"{name}() has no argument {unknown[0]!r}: {argument_hint(unknown[0], known, otherwise=listed)}"
    if count > len(known):
        return f"{name}() has {counted(count, 'argument')}, which is too many: {listed}"
    if count > len(positional):
        takes = f"only {', '.join(positional)} without a name" if positional else "every argument by its name"
        return f"{name}() takes {takes}, got {count} without: write them as in {known[len(positional)]}=..."
    given = {*positional[:count], *kwargs}
    if missing := [one for one in known if parameters[one].default is kinds.empty and one not in given]:
        return f"{name}() needs {', '.join(missing)}: give {missing[0]}=..."
    return f"{name}(): {error}: give each argument once"


def argument_hint(name: str, known: Collection[str], *, otherwise: str) -> str:
    """A hint for an unknown argument: the one that is called `name` on the command line, else as `did_you_mean`."""
    option = name.lstrip("-").replace("-", "_")
    meant = _argument_of(option, known)
    return f"did you mean {meant}?" if meant is not None else did_you_mean(option, known, otherwise=otherwise)


def _argument_of(option: str, known: Collection[str]) -> str | None:
    """The argument behind an option of a command, with underscores for its hyphens; None if there is none."""
    return next((one for one in (option, f"{option}s", _ARGUMENTS.get(option)) if one in known), None)


def naming_arguments(message: str, function: Callable[..., Any]) -> str:
    """A message that names options of robx's commands, with the arguments of `function` instead.

    "--batch-size 8" becomes "batch_size=8". What stands in a command ("robx eval RUN --linear") stays as it is.
    """
    function = inspect.unwrap(function)
    parameters = inspect.signature(function).parameters.values()
    known = {parameter.name for parameter in parameters}
    takes_others = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)

    def renamed(found: re.Match[str]) -> str:
        option, value = found["option"], found["value"]
        if option is None:
            return found[0]
        name = option.replace("-", "_")
        argument = _argument_of(name, known) or (_ARGUMENTS.get(name, name) if takes_others else None)
        return found[0] if argument is None else argument + (f"={value}" if value else "")

    return _OPTION.sub(renamed, message)


def types_of(function: Callable[..., Any]) -> dict[str, Any]:
    """The types of a function's named parameters; those it takes as ``**settings``, and a method's self, have none."""
    function = inspect.unwrap(function)
    kinds = inspect.Parameter
    named = {
        name: parameter.annotation
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind not in (kinds.VAR_KEYWORD, kinds.VAR_POSITIONAL) and name != "self"
    }
    holder = types.SimpleNamespace(__annotations__=named)  # without the result, whose type may not be imported
    return typing.get_type_hints(holder, globalns=getattr(function, "__globals__", {}))


def check_types(kinds: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Check arguments against their types; numpy's numbers are returned as Python's, and paths with "~" expanded.

    Args:
        kinds: type of each argument; arguments that it lacks, or of type Any, are not checked.
        given: the arguments.

    Raises:
        InputError: a value of another type, a number that is not finite, or an empty path.
    """
    kinds = {name: kind for name, kind in kinds.items() if kind is not Any}
    plain = {name: _plain(value) if name in kinds else value for name, value in given.items()}
    for name, kind in kinds.items():
        if name in plain:
            _check(kind, plain[name], name)
            if "PathLike" in repr(kind):
                plain[name] = home_expanded(plain[name])
    return plain


def home_expanded(value: Any) -> Any:
    """A path, or those of a list or table, with the home directory for a leading "~"; anything else as it is."""
    if isinstance(value, str | Path) and str(value).startswith("~"):
        with contextlib.suppress(RuntimeError):  # "~name" of no user is a file's name
            return type(value)(Path(value).expanduser())
    if type(value) in (list, tuple):
        return type(value)(map(home_expanded, value))
    return {key: home_expanded(one) for key, one in value.items()} if isinstance(value, dict) else value


def _check(kind: Any, value: Any, name: str) -> None:
    try:
        check_json(kind, _json(value), where=name)
    except ArtifactError:
        wanted = described(kind)
        if _has_infinity(value):
            wanted = re.sub(r"(?<!whole )number", "finite number", wanted)
        hint = did_you_mean(value, _choices(kind), otherwise="") if isinstance(value, str) else ""
        raise InputError(f"{name} must be {wanted}, got {reprlib.repr(value)}{hint and ': '}{hint}") from None
    parts = value if isinstance(value, list | tuple) else (value,)
    if "PathLike" in repr(kind) and any(isinstance(part, str) and not part for part in parts):
        raise InputError(f"{name} is an empty path: give a path, or . for the current folder")


def _has_infinity(value: Any) -> bool:
    """Whether a number, or one in a list, is NaN, infinite, or too large for a float."""
    if isinstance(value, list | tuple):
        return any(map(_has_infinity, value))
    try:
        return isinstance(value, int | float) and not math.isfinite(value)
    except OverflowError:
        return True


def _choices(kind: Any) -> list[str]:
    """The names that a type allows, those of a list's items included."""
    parts = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return [part for part in parts if isinstance(part, str)]
    return [name for part in parts for name in _choices(part)]


def is_enumerated(kind: Any) -> bool:
    """Whether a type allows a few names and, perhaps, None."""
    kinds = [one for one in typing.get_args(kind) if one is not type(None)] or [kind]
    return typing.get_origin(kind) is Literal or all(typing.get_origin(one) is Literal for one in kinds)


def _json(value: Any) -> Any:
    """As `to_json`, but a path stays one: an `Artifact` is a dataclass too."""
    if isinstance(value, list | tuple):
        return [_json(one) for one in value]
    return value if isinstance(value, os.PathLike) else to_json(value)


def _plain(value: Any) -> Any:
    """Python's number for one of numpy's, also in a list or tuple."""
    if isinstance(value, list | tuple):
        return type(value)(map(_plain, value)) if type(value) in (list, tuple) else value
    if isinstance(value, bool | int | float) or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def described(kind: Any) -> str:
    """A type in words: "a whole number or a list of whole numbers"."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        kinds = [one for one in arguments if one is not type(None)]
        if any(_is_path(one) for one in kinds):
            kinds = [one for one in kinds if one is not str]
        *most, last = dict.fromkeys(map(described, kinds))
        return f"{', '.join(most)} or {last}" if most else last
    if origin is Literal:
        return " or ".join(map(repr, arguments)) if len(arguments) < 3 else f"one of {', '.join(map(repr, arguments))}"
    if origin in (list, Sequence):
        return f"a list of {_plural(arguments[0])}"
    if origin is Callable:
        return "a function"
    if origin is Mapping:
        return "a dictionary"
    if origin is tuple and arguments[-1] is Ellipsis:
        return f"a list of {_plural(arguments[0])}"
    if origin is tuple:
        return f"a list of {len(arguments)} {_plural(arguments[0])}"
    return "a path" if _is_path(kind) else _NAMES.get(kind, getattr(kind, "__name__", str(kind)))


def _plural(kind: Any) -> str:
    words = [_PLURALS.get(one, one) for one in described(kind).split(" or ")]
    return re.sub(r"^a list\b", "lists", " or ".join(words))


def _is_path(kind: Any) -> bool:
    return (typing.get_origin(kind) or kind) is os.PathLike
