"""What the commands take: paths, numbers, and options that are given once."""

from __future__ import annotations

import itertools
import math
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

_shown = reprlib.Repr()
_shown.maxstring = 60


class Command(click.Command):
    """A command that refuses a repeated option, of which click would silently keep the last value.

    Flags may be repeated, and so may options that are declared `multiple`.
    """

    def __init__(self, *args: Any, repeated: Mapping[str, str] | None = None, **how: Any) -> None:
        """As click's; `repeated` has, for some options, what to do instead of repeating them."""
        super().__init__(*args, **how)
        self._repeated = repeated or {}

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Like click's; a usage error for an option that is given twice."""
        given = list(args)
        self._check_negative(ctx, given)
        rest = super().parse_args(ctx, args)
        if not ctx.resilient_parsing:
            self._refuse_repeated(ctx, given)
        return rest

    def _check_negative(self, ctx: click.Context, args: list[str]) -> None:
        """Let the type refuse `--heal -1`: where the value may be left out, click takes -1 for another option."""
        options = [one for one in self.params if isinstance(one, click.Option) and isinstance(one.flag_value, float)]
        optional = {name: one for one in options for name in one.opts}
        words = [part for word in args for part in word.split("=", 1)]
        for name, word in itertools.pairwise(words):
            if name in optional and _is_negative(word):
                optional[name].type.convert(word, optional[name], ctx)

    def _refuse_repeated(self, ctx: click.Context, args: list[str]) -> None:
        _, _, given = self.make_parser(ctx).parse_args(args=args)
        options = [one for one in given if isinstance(one, click.Option) and not (one.is_flag or one.count)]
        if twice := [one for one in options if not one.multiple and options.count(one) > 1]:
            name = twice[0].opts[-1]
            raise click.UsageError(f"{name} is given twice: {self._repeated.get(name, 'give it once')}", ctx)


def accepts(option: click.Parameter, words: Sequence[str]) -> bool:
    """Whether an option can be given by these words of a command line, such as ["--lr", "0.1"]."""
    command = click.Command(None, params=[option])
    context = click.Context(command)
    try:
        found, _, _ = command.make_parser(context).parse_args(args=list(words))
        for name in found:  # none where a flag is off
            option.type_cast_value(context, found[name])
    except click.UsageError:
        return False
    return True


def _is_negative(word: str) -> bool:
    try:
        return word.startswith("-") and not math.isnan(float(word))
    except ValueError:
        return False


class PathType(click.Path):
    """A path on the command line; an empty one is refused, which pathlib would take for the current folder."""

    def __init__(self, **how: Any) -> None:
        """As click's, but a `pathlib.Path` always."""
        super().__init__(path_type=Path, **how)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path; click reports a usage error for an empty one."""
        if not str(value):
            self.fail("the path is empty: give a path, or . for the current folder", param, ctx)
        return super().convert(value, param, ctx)


class WholeNumber(click.IntRange):
    """A whole number of a range; every other value is refused in the same words."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number, or click's usage error."""
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter:
            self.fail(f"must be a whole number{_bounds(self)}, got {_shown.repr(value)}", param, ctx)


class Number(click.FloatRange):
    """A finite number of a range; every other value is refused in the same words."""

    def __init__(self, low: float, high: float | None = None, *, unit: str = "", hint: str = "", **how: bool) -> None:
        """As click's.

        Args:
            low: the least value.
            high: the largest value.
            unit: what is counted, for errors: "minutes".
            hint: what to do where a word is given that is not a number.
            how: `min_open` and `max_open`, as click's.
        """
        super().__init__(low, high, **how)
        self._noun, self._hint = f"a number of {unit}" if unit else "a number", hint and f": {hint}"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number, or click's usage error."""
        try:
            number = super().convert(value, param, ctx)
        except click.BadParameter:
            number = math.nan
        if not math.isfinite(number):
            hint = "" if _is_number(value) else self._hint
            self.fail(f"must be {self._noun}{_bounds(self)}, got {_shown.repr(value)}{hint}", param, ctx)
        return number


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True


def _bounds(kind: click.IntRange | click.FloatRange) -> str:
    """A range in words, such as " above 0" or " from 0 to 1"."""
    low, high = kind.min, kind.max
    if high is None:
        return f" above {low:g}" if kind.min_open else f" of at least {low:g}"
    if kind.min_open and kind.max_open:
        return f" above {low:g} and below {high:g}"
    return f" between {low:g} and {high:g}" if kind.min_open or kind.max_open else f" from {low:g} to {high:g}"
