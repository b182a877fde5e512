"""The battery and the heat of a device, from file systems and tools like those of real devices."""

import pytest

from robx.runtime.device.describe import describe
from robx.runtime.device.power import parse_dumpsys, parse_thermal, power
from robx.runtime.device.watch import new_flags
from tests.runtime.adbd import BATTERY, THERMAL

SUPPLY = "sys/class/power_supply"


def write(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.mark.parametrize(
    ("status", "online", "source", "charging"),
    [
        ("Discharging", 0, "battery", False),
        ("Charging", 1, "mains", True),
        ("Full", 1, "mains", True),
        ("Not charging", 1, "mains", False),
        ("Unknown", 0, "unknown", None),
    ],
)
def test_a_laptop(tmp_path, status, online, source, charging):
    write(
        tmp_path,
        {
            f"{SUPPLY}/AC/type": "Mains\n",
            f"{SUPPLY}/AC/online": f"{online}\n",
            f"{SUPPLY}/BAT0/type": "Battery\n",
            f"{SUPPLY}/BAT0/status": f"{status}\n",
            f"{SUPPLY}/BAT0/capacity": "57\n",
            f"{SUPPLY}/BAT0/temp": "305\n",
        },
    )
    battery = {"percent": 57, "charging": charging, "celsius": 30.5}
    assert power(str(tmp_path)) == {"power_source": source, "battery": battery}


def test_the_battery_of_a_mouse_is_not_the_devices(tmp_path):
    write(tmp_path, {f"{SUPPLY}/hidpp_0/type": "Battery", f"{SUPPLY}/hidpp_0/scope": "Device"})
    assert power(str(tmp_path)) == {"power_source": "unknown", "battery": None}


def test_a_device_that_reports_nothing(tmp_path):
    assert power(str(tmp_path)) == {"power_source": "unknown", "battery": None}
    write(tmp_path, {f"{SUPPLY}/BAT0/type": "Battery"})
    assert power(str(tmp_path))["battery"] == {"percent": None, "charging": None, "celsius": None}


def test_android():
    battery = {"percent": 83, "charging": True, "celsius": 31.4}
    assert parse_dumpsys(BATTERY) == {"power_source": "mains", "battery": battery}
    unplugged = BATTERY.replace("USB powered: true", "USB powered: false").replace("status: 2", "status: 3")
    assert parse_dumpsys(unplugged) == {"power_source": "battery", "battery": {**battery, "charging": False}}
    television = BATTERY.replace("present: true", "present: false").replace("AC powered: false", "AC powered: true")
    assert parse_dumpsys(television) == {"power_source": "mains", "battery": None}
    assert parse_dumpsys("Can't find service: battery") == {"power_source": "unknown", "battery": None}


@pytest.mark.parametrize(
    ("status", "flags"),
    [("0", []), ("1", ["light thermal throttling"]), ("6", ["shutdown thermal throttling"]), ("x", None)],
)
def test_androids_thermal_status(status, flags):
    assert parse_thermal(THERMAL.replace("Thermal Status: 0", f"Thermal Status: {status}")) == flags
    assert new_flags(flags or (), flags) == flags, "it counts even if it was so before"


def test_the_description_of_this_machine():
    found = describe()
    assert found["power_source"] in ("mains", "battery", "unknown")
    assert found["battery"] is None or 0 <= found["battery"]["percent"] <= 100
