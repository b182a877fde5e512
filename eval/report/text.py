"""How the report writes a figure or a name: numbers, bounds, sizes, intervals, and text that may deceive."""

from __future__ import annotations

import math
import re

from robx.records import Json, Value

DASH = "–"
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


def clean(text: str) -> str:
    """`text` without control characters, direction overrides and lone surrogates: they deceive or break a page."""
    return _UNPRINTABLE.sub("\ufffd", text)


def number(x: float, digits: int = 3) -> str:
    """`x` with `digits` significant digits, and every digit before the point."""
    if x == 0 or not math.isfinite(x):
        return f"{x:g}"
    return f"{x:.{max(0, digits - 1 - math.floor(math.log10(abs(x))))}f}"


def at_most(x: float, digits: int = 3) -> str:
    """As `number`, rounded up: what is said of a bound must hold for it."""
    if x <= 0 or not math.isfinite(x):
        return number(x, digits)
    step = 10.0 ** (math.floor(math.log10(x)) - digits + 1)
    return number(max(x, math.ceil(x / step - 1e-9) * step), digits)


def percent(x: float) -> str:
    """One decimal."""
    return f"{x:.1f}"


def hundredths(x: float) -> str:
    """Two decimals, with a true minus sign; no negative zero."""
    return f"{x + 0.0:.2f}".replace("-0.00", "0.00").replace("-", "−")


def megabytes(size: int) -> str:
    """``11.3 MB``, or ``45 kB`` when it is that small."""
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"


def spell(value: Value) -> str:
    """A figure whose kind is known by its unit alone: ``61.3 %``, ``4.21 ms``, ``0.9991``."""
    match value.unit:
        case "%":
            return f"{hundredths(value.value)} %"
        case "":
            return f"{value.value:.4g}" if abs(value.value) < 1e4 else f"{value.value:,.0f}"
        case unit:
            return f"{number(value.value)} {unit}"


def interval(value: Value, form: object = number) -> str:
    """``low to high``, or nothing."""
    if value.low is None or value.high is None or not callable(form):
        return ""
    return f"{form(value.low)} to {form(value.high)}"


def brief(value: Json, prefix: str = "") -> str:
    """The plain values of a JSON object on one line: ``cpu.model Cortex-A76, cpu.cores 4``; long lists are left out."""
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
