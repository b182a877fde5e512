"""What the report calls a student, a model and a device."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import PurePath

from robx.eval.report.collect import ReportData
from robx.records import Json

# What names a device; the rest of a description (load, temperature, clocks) changes by the minute.
_DEVICE_NAMES = ("name", "board", "cpu", "model", "soc", "host", "id")


def student_names(data: ReportData) -> dict[str, str]:
    """A name for each student, by SHA-256: timm's; with the run's folder, or the hash, when another has it too."""
    students = data.students
    folders = {run.student.sha256: PurePath(run.folder).name for run in reversed(data.runs)}
    plain = {sha256: student.timm_name for sha256, student in students.items()}
    placed = {sha256: f"{name} ({folders.get(sha256, sha256[:8])})" for sha256, name in plain.items()}
    hashed = {sha256: f"{name} ({sha256[:8]})" for sha256, name in plain.items()}
    once, twice = Counter(plain.values()), Counter(placed.values())
    return {
        sha256: plain[sha256] if once[plain[sha256]] == 1
        else placed[sha256] if twice[placed[sha256]] == 1
        else hashed[sha256]
        for sha256 in students
    }  # fmt: skip


def device_label(device: Mapping[str, Json], settings: Mapping[str, Json]) -> str:
    """What a reader calls the device and the way it was used, e.g. ``Raspberry Pi 5, 4 threads``."""
    # A PC's board is an order number, or a cloud's name: its processor says more.
    pc = str(device.get("arch", "")).lower() in ("x86_64", "amd64", "i686")
    names = ("name", "cpu", "board") if pc else _DEVICE_NAMES
    parts = [next((text for key in names if (text := text_of(device.get(key)))), "unnamed device")]
    facts = settings.get("runtime")
    provider = text_of(facts.get("provider")) if isinstance(facts, dict) else ""
    if provider and "cpu" not in provider.lower():
        parts.append(" ".join(filter(None, (provider, text_of(device.get("accelerator"))))))
    if isinstance(threads := settings.get("threads"), int):
        parts.append("1 thread" if threads == 1 else f"{threads} threads")
    if (batch := settings.get("batch", 1)) != 1:
        parts.append(f"batch {text_of(batch)}")
    if isinstance(cores := settings.get("affinity"), list):
        parts.append(f"cores {' '.join(map(str, cores))}")
    if (hint := settings.get("precision_hint", "f32")) != "f32":
        parts.append(f"computing in {text_of(hint)}")
    if device.get("emulated"):
        parts.append("emulated")
    return ", ".join(parts)


def text_of(value: Json) -> str:
    """A short text for a JSON value of a device's description."""
    if isinstance(value, dict):
        return next((text for key in ("name", "model") if (text := text_of(value.get(key)))), "")
    return value if isinstance(value, str) else "" if value is None else json.dumps(value)
