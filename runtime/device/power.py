"""The battery and the heat of a device. Runs on the device: Python 3.8 and the standard library only.

Linux reports a battery in sysfs; on Android, where that is closed to the shell, ``dumpsys`` tells.
"""

from __future__ import annotations

import glob
import os
from typing import Any

from robx.runtime.device.sysfs import ask, numbers, read

# android.os.BatteryManager: 1 unknown, 2 charging, 3 discharging, 4 not charging, 5 full.
_CHARGING = {"2": True, "5": True, "3": False, "4": False}
# android.os.PowerManager.THERMAL_STATUS_*, from 1 on: the device slows down.
_HEAT = ("light", "moderate", "severe", "critical", "emergency", "shutdown")


def power(root: str = "/") -> dict[str, Any]:
    """``power_source`` (mains, battery or unknown) and ``battery`` (None where the device reports none).

    A battery has ``percent`` (int), ``charging`` (bool) and ``celsius`` (float), each None where it is not reported.
    """
    battery = _sysfs_battery(root)
    if battery is None and root == "/":
        dumped = ask(["dumpsys", "battery"])
        if dumped is not None:
            return parse_dumpsys(dumped)
    if any(numbers(root, "sys/class/power_supply/*/online")):
        source = "mains"
    else:
        source = "battery" if battery and battery["charging"] is False else "unknown"
    return {"power_source": source, "battery": battery}


def parse_dumpsys(text: str) -> dict[str, Any]:
    """As `power`, from what ``dumpsys battery`` prints."""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        name, _, value = line.strip().partition(": ")
        fields.setdefault(name, value.strip())
    powered = [value for name, value in fields.items() if name.endswith(" powered")]
    source = "mains" if "true" in powered else "battery" if powered else "unknown"
    if fields.get("present") != "true":
        return {"power_source": source, "battery": None}
    level, scale, tenths = (_number(fields.get(name)) for name in ("level", "scale", "temperature"))
    battery = {
        "percent": None if level is None else round(100 * level / (scale or 100)),
        "charging": _CHARGING.get(fields.get("status", "")),
        "celsius": None if tenths is None else tenths / 10,
    }
    return {"power_source": source, "battery": battery}


def parse_thermal(text: str) -> list[str] | None:
    """How much the device slows down for heat, from what ``dumpsys thermalservice`` prints; None if it does not say."""
    for line in text.splitlines():
        name, _, value = line.strip().partition(":")
        status = _number(value) if name == "Thermal Status" else None
        if status is not None:
            return ["%s thermal throttling" % _HEAT[min(status, len(_HEAT)) - 1]] if status > 0 else []
    return None


def _sysfs_battery(root: str) -> dict[str, Any] | None:
    for folder in sorted(glob.glob(os.path.join(root, "sys/class/power_supply/*"))):
        # The scope of a mouse's or a keyboard's battery is Device.
        if read(folder, "type") != "Battery" or read(folder, "scope") == "Device":
            continue
        status, tenths = read(folder, "status"), _number(read(folder, "temp"))
        return {
            "percent": _number(read(folder, "capacity")),
            "charging": {"Charging": True, "Full": True, "Discharging": False, "Not charging": False}.get(status or ""),
            "celsius": None if tenths is None else tenths / 10,
        }
    return None


def _number(text: str | None) -> int | None:
    try:
        return int(text or "")
    except ValueError:
        return None
