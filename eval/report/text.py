"""How the report writes figures and names: number formats, intervals, verdicts, and text that may deceive."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from robx.records import Json, Value

DASH = "–"
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


def clean(text: str) -> str:
    """`text` without control characters, direction overrides and lone surrogates, which deceive or break a page."""
    return _UNPRINTABLE.sub("\ufffd", text)


def number(x: float, digits: int = 3) -> str:
    """`x` with `digits` significant digits, and all digits before the decimal point."""
    if x == 0 or not math.isfinite(x):
        return f"{x:g}"
    return f"{x:.{max(0, digits - 1 - math.floor(math.log10(abs(x))))}f}"


def at_most(x: float, digits: int = 3) -> str:
    """As `number`, but rounded up: a bound that is written must still be a bound."""
    if x <= 0 or not math.isfinite(x):
        return number(x, digits)
    step = 10.0 ** (math.floor(math.log10(x)) - digits + 1)
    return number(max(x, math.ceil(x / step - 1e-9) * step), digits)


def percent(x: float) -> str:
    """With one decimal."""
    return f"{x:.1f}"


def hundredths(x: float) -> str:
    """With two decimals and a true minus sign; no negative zero."""
    return f"{x + 0.0:.2f}".replace("-0.00", "0.00").replace("-", "−")


def megabytes(size: float) -> str:
    """``11.3 MB``, or ``45 kB`` when it is that small."""
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"


@dataclass(frozen=True)
class Form:
    """How one kind of figure is written: the number, and the unit that follows it unless the column's head has it."""

    write: Callable[[float], str]
    unit: str = ""
    bounded: bool = False  # an upper end without a lower one is an upper bound: "at most"


PERCENT = Form(percent, " %")
POINTS = Form(hundredths, " pt")
SIGNED_PERCENT = Form(lambda x: f"{x + 0.0:+.1f}".replace("-0.0", "+0.0").replace("-", "−"), " %")
MS = Form(number, " ms", bounded=True)
MS_AT_MOST = Form(at_most, " ms")
IN_THE_HEAD = Form(number, bounded=True)
TIMES = Form("{:.2f}".format, " ×")
FOUR_DECIMALS = Form("{:.4f}".format)
TWO_DIGITS = Form("{:.2g}".format)
FOUR_DIGITS = Form("{:.4g}".format)
SIZE = Form(megabytes)


def figure(value: Value | str, form: Form | None = None) -> str:
    """A figure in its form, or by its unit alone where it has none: ``61.30 %``, ``4.21 ms``; text stays as it is."""
    if isinstance(value, str):
        return value
    if form is not None:
        return form.write(value.value) + form.unit
    match value.unit:
        case "%":
            return f"{hundredths(value.value)} %"
        case "":
            return f"{value.value:.4g}" if abs(value.value) < 1e4 else f"{value.value:,.0f}"
        case unit:
            return f"{number(value.value)} {unit}"


def interval(value: Value, form: Form) -> str:
    """``low to high``, ``at most high`` for an upper bound, or nothing."""
    if value.high is not None and value.low is not None:
        return f"{form.write(value.low)} to {form.write(value.high)}"
    return f"at most {at_most(value.high)}" if value.high is not None and form.bounded else ""


def verdict_text(verdict: str, margin: float | None) -> str:
    """``PASS, margin 1 pt``: a verdict on accuracy says nothing without the drop that it accepts."""
    return f"{verdict}, margin {'not recorded' if margin is None else f'{margin:g} pt'}"


def brief(value: Json, prefix: str = "") -> str:
    """The values of a JSON object on one line, without long lists: ``cpu.model Cortex-A76, cpu.cores 4``."""
    found = []
    for key, item in sorted(value.items()):
        if isinstance(item, dict):
            found.append(brief(item, f"{prefix}{key}."))
        elif isinstance(item, list):
            plain = len(item) <= 16 and not any(isinstance(x, dict | list) for x in item)
            found.append(f"{prefix}{key} {' '.join(map(str, item))}" if plain and item else "")
        elif item is not None and item != "":
            found.append(f"{prefix}{key} {item}")
    return ", ".join(filter(None, found))
