"""The form of what a device says. All of it is checked here, once, so that nothing behind has to distrust it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from robx.errors import DeviceError

# A form is a mapping of key -> form (other keys may stand beside), a list of one form, a tuple of alternatives, a type,
# or None. float stands for any finite number, int for a whole one.
Form = Any
_LARGEST = 2**63
_NUMBERS = ([float], None)

DEVICE: Form = {
    "host": (str, None),
    "arch": (str, None),
    "os": (str, None),
    "python": (str, None),
    "board": (str, None),
    "memory_bytes": (int, None),
    "accelerator": (str, None),
    "emulated": (str, None),
    "energy_counter": (str, None),
    "cpu": {"model": (str, None), "cores": (int, None), "usable_cores": (int, None), "governor": (str, None)},
    "watched": {"clocks": bool, "temperatures": bool, "throttling": bool, "load": bool, "energy": str},
}
REPORT: Form = {
    "timed": bool,
    "device": DEVICE,
    "facts": {},
    "load_ns": int,
    "first_ns": int,
    "memory": ({"now": int, "peak": int}, None),
    "memory_before": ({"now": int, "peak": int}, None),
    "throttled": ([str], None),
    "cores": ([int], None),
    "environment": {},
    "cool_down": {"reached": bool},
}
_READING: Form = {"joules": (float, None), "reason": (str, None)}
_GPU: Form = {**_READING, "memory": (int, None), "throttled": [str]}
TIMED: Form = {
    "warm_up": {"steady": bool},
    "window": [float],
    "wall_seconds": float,
    "energy": {"before": _READING, "after": _READING},
    "gpu": ({"before": _GPU, "after": _GPU}, None),
}
SNAPSHOT: Form = {
    "t": float,
    "jiffies": ({"busy": int, "steal": int, "total": int}, None),
    "khz": _NUMBERS,
    "celsius": _NUMBERS,
    "cooling": [float],
    "cgroup_throttled": (int, None),
    "milliwatt": (float, None),
    "own": int,
}


def parse(text: str | bytes) -> Any:
    """JSON without NaN, infinity or endless nesting.

    Raises:
        DeviceError: it is not that.
    """
    try:
        return json.loads(text, parse_constant=_refuse, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise DeviceError(f"the device sent what is no JSON ({str(error)[:80]}): run it again") from error


def check(value: Any, form: Form, where: str) -> Any:
    """`value` when it has the form.

    Raises:
        DeviceError: it has not; the message names the key.
    """
    if isinstance(form, tuple):
        return _any_of(value, form, where)
    if isinstance(form, Mapping):
        if not isinstance(value, dict):
            raise _odd(value, where)
        for key, inner in form.items():
            if key not in value:
                raise DeviceError(f"the device sent {where} without {key}, which every runner of this robx has")
            check(value[key], inner, f"{where}.{key}")
    elif isinstance(form, list):
        if not isinstance(value, list):
            raise _odd(value, where)
        for item in value:
            check(item, form[0], where)
    elif form is None or form in (bool, str):
        if (value is not None) if form is None else not isinstance(value, form):
            raise _odd(value, where)
    elif isinstance(value, bool) or not isinstance(value, int if form is int else int | float) or not _bearable(value):
        raise _odd(value, where)
    return value


def _any_of(value: Any, forms: tuple[Form, ...], where: str) -> Any:
    if value is None and None in forms:
        return value
    return check(value, next(form for form in forms if form is not None), where)


def _bearable(value: float) -> bool:
    return math.isfinite(value) and abs(value) < _LARGEST


def _odd(value: Any, where: str) -> DeviceError:
    return DeviceError(f"the device sent {where} = {str(value)[:40]!r}, which no runner of this robx does")


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text[:20]} is too large")
    return value


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no number")
