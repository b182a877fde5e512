"""Hostile answers of a device: garbage, bombs, arbitrary JSON. Always one line and exit status 2."""

from __future__ import annotations

import copy
import io
import json
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from robx.errors import DeviceError
from robx.runtime import doctor
from robx.runtime.bench import subprocesses, transports, validity
from robx.runtime.bench.profiles import PROFILES
from robx.runtime.bench.results import figures, read_result

CPU = {"model": "x", "cores": 4, "usable_cores": 4, "governor": None, "flags": []}
WATCHED = {"clocks": True, "temperatures": True, "throttling": False, "load": True, "energy": "none"}
READING = {"source": None, "joules": None, "range": None, "reason": "none"}
GPU = {**READING, "memory": 7, "throttled": ["x"]}
REPORT: dict[str, Any] = {
    "schema": 1, "timed": True, "load_ns": 5, "first_ns": 6, "facts": {"engine": "x", "threads": 1, "provider": "cpu"},
    "memory": {"now": 2, "peak": 3, "reset_refused": 0}, "memory_before": {"now": 1, "peak": 1, "reset_refused": 0},
    "device": {"host": "h", "arch": "aarch64", "emulated": None, "memory_bytes": 9, "cpu": CPU, "os": "o",
               "python": "3", "board": None, "accelerator": None, "energy_counter": None, "watched": WATCHED},
    "throttled": None, "cool_down": {"reached": True}, "warm_up": {"steady": True, "queries": 9, "seconds": 1.0},
    "cores": [0, 1], "environment": {},
    "window": [1.0, 3.0], "wall_seconds": 2.0, "cpu_seconds": 2.0, "complete": True,
    "energy": {"before": READING, "after": READING},
    "gpu": {"before": GPU, "after": GPU},
}  # fmt: skip
SNAPSHOT = {
    "t": 1.5, "jiffies": {"busy": 1, "steal": 0, "total": 9}, "khz": [9], "celsius": [40.0], "cooling": [0],
    "cgroup_throttled": None, "milliwatt": None, "own": 1,
}  # fmt: skip


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def npz(**parts: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, data in parts.items():
            archive.writestr(f"{name}.npy", data)
    return buffer.getvalue()


OUTPUTS = {"outputs": npy(np.ones((4, 8), np.float32)), "seen": npy(np.ones(4, bool))}


def result(path: Path, **changed: bytes) -> Path:
    parts = {
        "result.json": json.dumps(REPORT).encode(),
        "outputs.npz": npz(**OUTPUTS),
        "samples.npy": npy(np.arange(1, 100)),
        "telemetry.jsonl": json.dumps(SNAPSHOT).encode(),
    } | changed
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    return path


def use(path: Path) -> None:
    """Everything that a benchmark does with a result."""
    found = read_result(path, images=4)
    if found.report["timed"]:
        figures([found], batch=1)
        validity.judge(
            [found.report], [found.samples], [found.digest()], profile=PROFILES["rapid"], processes=1, threads=1
        )
    json.dumps(found.report, allow_nan=False)


def test_a_runners_result_is_accepted(tmp_path: Path) -> None:
    use(result(tmp_path / "r.zip"))


def test_a_result_without_telemetry_is_unstable(tmp_path: Path) -> None:
    path = tmp_path / "r.zip"
    with zipfile.ZipFile(result(tmp_path / "whole.zip")) as whole, zipfile.ZipFile(path, "w") as archive:
        for name in set(whole.namelist()) - {"telemetry.jsonl"}:
            archive.writestr(name, whole.read(name))
    found = read_result(path, images=4)
    reasons = validity.judge(
        [found.report], [found.samples], [found.digest()], profile=PROFILES["rapid"], processes=1, threads=1
    )
    assert any(reason.startswith("no_telemetry") for reason in reasons)


VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
JSON = st.recursive(VALUES, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=5), v, max_size=3))


def paths(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(p for key, item in inner for p in paths(item, (*at, key)))]


def changed(value: Any, at: tuple[Any, ...], new: Any) -> Any:
    if not at:
        return new
    out = copy.deepcopy(value)
    place = out
    for key in at[:-1]:
        place = place[key]
    place[at[-1]] = new
    return out


@given(at=st.sampled_from(paths(REPORT)), new=JSON, line=st.sampled_from(paths(SNAPSHOT)))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_arbitrary_json(tmp_path: Path, at: tuple[Any, ...], new: Any, line: tuple[Any, ...]) -> None:
    report = json.dumps(changed(REPORT, at, new)).encode()
    telemetry = "\n".join(json.dumps(s) for s in (SNAPSHOT, changed(SNAPSHOT, line, new), SNAPSHOT)).encode()
    path = result(tmp_path / "r.zip", **{"result.json": report, "telemetry.jsonl": telemetry})
    try:
        use(path)
    except DeviceError as error:
        assert str(error)


@given(at=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255), cut=st.booleans())
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_zip(tmp_path: Path, at: float, byte: int, cut: bool) -> None:
    data = bytearray(result(tmp_path / "r.zip").read_bytes())
    place = int(at * len(data))
    data[place] = byte
    (tmp_path / "r.zip").write_bytes(bytes(data[:place] if cut else data))
    try:
        use(tmp_path / "r.zip")
    except DeviceError as error:
        assert str(error)


def huge(shape: str) -> bytes:
    """An array that declares a large shape and has no data for it."""
    return npy(np.ones((4, 8), np.float32)).replace(b"(4, 8)", shape.encode()).replace(b" " * (len(shape) - 6), b"", 1)


@pytest.mark.parametrize(
    "parts",
    [
        lambda: {"result.json": b"[" * 100_000},
        lambda: {"result.json": b"9" * 100_000},
        lambda: {"result.json": json.dumps(REPORT).replace('"load_ns": 5', '"load_ns": 1e999').encode()},
        lambda: {"result.json": b" " * 5_000_000 + json.dumps(REPORT).encode()},
        lambda: {"outputs.npz": npz(outputs=bytes(600 * 1024**2), seen=OUTPUTS["seen"])},
        lambda: {"outputs.npz": npz(outputs=huge("(4, 1000000000000)"), seen=OUTPUTS["seen"])},
        lambda: {"outputs.npz": npz(outputs=b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 65535, seen=OUTPUTS["seen"])},
        lambda: {"samples.npy": npy(np.array([{}], dtype=object))},
        lambda: {"samples.npy": b"PK\x05\x06" + bytes(18)},
    ],
    ids=["nesting", "number", "infinity", "spaces", "bomb", "shape", "header", "pickle", "zip"],
)
def test_bombs(tmp_path: Path, parts: Callable[[], dict[str, bytes]]) -> None:
    path = result(tmp_path / "r.zip", **parts())
    with pytest.raises(DeviceError) as caught:
        use(path)
    assert len(str(caught.value)) < 300


def script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def shims(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    script(tmp_path / "bin" / "scp", "exit 0")
    return tmp_path / "bin"


def test_a_device_with_endless_output(shims: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocesses, "_MOST_BYTES", 10_000_000)
    script(shims / "ssh", "exec yes")
    with pytest.raises(DeviceError, match="it was stopped"), transports.open_transport("ssh://box"):
        pass


def test_an_endless_file_is_not_copied_back(shims: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocesses, "_MOST_BYTES", 10_000_000)
    script(shims / "ssh", "echo /tmp/robx-aaaaaaaaaa")
    script(shims / "scp", 'for to; do :; done; exec cat /dev/zero > "$to/result.zip"')
    with transports.open_transport("ssh://box") as transport, pytest.raises(DeviceError, match="it was stopped"):
        transport.pull("b0", "result.zip", tmp_path)
    assert (tmp_path / "result.zip").stat().st_size <= 10_000_000


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("sh: python3: not found >&2; exit 127", "cannot run the runner"),
        ("echo 'cannot execute binary file: Exec format error' >&2; exit 126", "Exec format error"),
        ("echo 'No space left on device' >&2; exit 1", "No space left on device"),
        ("""echo '{"facts": {"cpu": 7}, "packages": {}}'""", "where the runner's facts were expected"),
        ("""echo '{"facts": {"cpu": {}, "memory_bytes": "much"}, "packages": {}}'""", "facts were expected"),
        ("""echo '{"facts": {}, "packages": []}'""", "facts were expected"),
    ],
)
def test_the_doctor_on_a_faulty_device(shims: Path, robx: Callable[..., Any], answer: str, said: str) -> None:
    script(shims / "ssh", f'case "$*" in *mktemp*) echo /tmp/robx-aaaaaaaaaa;; *--doctor*) {answer};; esac')
    found = robx("doctor", "--device", "ssh://box", "--python", sys.executable)
    assert found.exit_code == 2 and said in found.stderr and len(found.stderr.splitlines()) == 1


@given(facts=JSON | st.fixed_dictionaries({"cpu": JSON, "memory_bytes": JSON, "python": JSON}))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_arbitrary_facts(monkeypatch: pytest.MonkeyPatch, facts: Any) -> None:
    class Device:
        kind = "local"  # no probe for a Python

        def __enter__(self) -> Device:
            return self

        def __exit__(self, *_: object) -> None: ...

        def push(self, *_: object) -> None: ...

        def run(self, *_: object, **__: object) -> tuple[int, str]:
            return 0, json.dumps({"facts": facts, "packages": {"numpy": facts}})

    monkeypatch.setattr(doctor, "open_transport", lambda *_, **__: Device())
    try:
        told, _ = doctor.examine("ssh://box")
    except DeviceError:
        return
    assert isinstance(told["cpu"], dict) and isinstance(told.get("memory_bytes") or 0, int)
