"""The real adb client against a device that speaks ADB's wire protocol (tests/runtime/adbd.py)."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from robx.errors import DeviceError
from robx.runtime.bench.bench import BenchSettings, bench
from robx.runtime.bench.transports import open_transport
from robx.runtime.doctor import examine
from tests.runtime.adbd import THERMAL


def settings(bundles, device, **changes):
    bundles = bundles if isinstance(bundles, list) else [bundles]
    given = {"profile": "rapid", "python": sys.executable} | changes
    return BenchSettings(bundles=bundles, device=f"adb://{device.serial}", **given)


def codes(record):
    return {reason.split(":")[0] for reason in record.reasons}


@pytest.fixture
def phone(start_adbd):
    return start_adbd()


def opened(device):
    return open_transport(f"adb://{device.serial}")


def test_a_bench_over_adb(phone, make_bundle, short_profile):
    (record,) = bench(settings(make_bundle(), phone))
    assert record.device["kind"] == "adb" and record.device["board"] == "Nobody Phone 1 Imagined"
    assert record.device["battery"] == {"percent": 83, "charging": True, "celsius": 31.4}
    assert record.device["power_source"] == "mains" and len(record.settings["battery"]) == 2
    assert record.values["p50"].value > 0 and record.values["output_cosine"].value > 0.9999
    assert not codes(record) & {"failed", "incomplete", "output_mismatch"}
    assert list(phone.folder.iterdir()) == [], "cleaned up"


def test_a_phone_that_slows_down_for_heat_is_unstable(phone, make_bundle, short_profile):
    phone.dumps["thermalservice"] = THERMAL.replace("Thermal Status: 0", "Thermal Status: 3")
    (record,) = bench(settings(make_bundle(), phone, processes=1))
    assert "platform_throttle: the device reports severe thermal throttling" in record.reasons


def test_the_doctor_over_adb(phone):
    facts, findings = examine(f"adb://{phone.serial}", python=sys.executable)
    assert facts["board"] == "Nobody Phone 1 Imagined"
    assert next(f for f in findings if f.name == "onnxruntime").version


def test_the_same_file_is_pushed_once(phone, make_bundle, short_profile):
    first = make_bundle("onnx-fp32", kernel=np.zeros((8, 3, 3, 3), np.float32))
    second = make_bundle("onnx-fp16")
    bench(settings([first, second, first], phone, processes=1))
    files = [name for name in phone.received if name != "place.sh"]
    # Two models, one set of images, one runner, and three jobs, two of which are equal.
    assert len(files) == len(set(files)) == 6
    assert phone.received.count("place.sh") == 3


def test_files_with_hostile_names_and_any_size_arrive(phone, tmp_path):
    names = ["-rf", "a b", "$(touch owned)", "x;y", "quote'\"", "tab\there", "new\nline", "ünï", "empty"]
    (tmp_path / "from").mkdir()
    files = {}
    for i, name in enumerate(names):
        (tmp_path / "from" / name).write_bytes(bytes([i]) * (300_000 * i) if name != "empty" else b"")
        files[f"deep/{name}"] = tmp_path / "from" / name
    code = "import os,json; json.dump({n: len(open('deep/'+n).read()) for n in os.listdir('deep')}, open('o.json','w'))"
    with opened(phone) as transport:
        transport.push(files, "b0")
        assert transport.run("b0", [sys.executable, "-c", code], timeout=30) == (0, "")
        got = json.loads(transport.pull("b0", "o.json", tmp_path).read_text())
        back = transport.pull("b0/deep", "ünï", tmp_path / "from")
    assert got == {name: (0 if name == "empty" else 300_000 * i) for i, name in enumerate(names)}
    assert back.read_bytes() == bytes([7]) * 2_100_000


@pytest.mark.parametrize("features", [None, "cmd"], ids=["shell-v2", "before-android-7"])
def test_exit_statuses_and_both_outputs(start_adbd, features):
    device = start_adbd(**({"features": features} if features else {}))
    with opened(device) as transport:
        run = lambda script: transport.run(".", ["sh", "-c", script], timeout=30)  # noqa: E731
        assert run("exit 0") == (0, "")
        status, text = run("echo out; echo wrong >&2; exit 7")
        assert status == 7 and sorted(text.split()) == ["out", "wrong"]
        assert run("printf 'no end of line'") == (0, "no end of line")
        assert run("kill -KILL $$")[0] == 128 + 9
        assert transport.run("nowhere", ["true"], timeout=30)[0] not in (0, None)
        assert run("echo robx-exit 0; exit 3") == (3, "robx-exit 0")


def test_a_device_without_room(phone, call, make_bundle, short_profile):
    phone.capacity = 20_000
    folder = make_bundle()
    done = call("bench", folder, "--device", f"adb://{phone.serial}", "--python", sys.executable, "--profile", "rapid")
    assert done.exit_code == 2
    said = [line for line in done.stderr.splitlines() if not line.startswith("meas")]
    assert len(said) == 1 and "No space left on device" in said[0] and phone.serial in said[0]
    assert not (folder / "measurements.jsonl").exists() and list(phone.folder.iterdir()) == []


def drop_in_run(device, number):
    """Disconnect the device 0.3 s after its `number`-th run of a job began."""
    runs = []

    def before(service):
        if "job.json" in service:
            runs.append(service)
            if len(runs) == number:
                threading.Timer(0.3, device.drop).start()

    device.before = before


def test_a_disconnection_leaves_an_invalid_record_and_the_device_is_used_again(phone, make_bundle, short_profile):
    drop_in_run(phone, 2)
    folder = make_bundle()
    (record,) = bench(settings(folder, phone, processes=3))
    assert record.verdict == "INVALID" and codes(record) >= {"failed", "incomplete"}
    assert f"the connection to adb://{phone.serial} was lost" in record.reasons[0]
    assert "2 of 3" in next(r for r in record.reasons if r.startswith("incomplete"))
    assert (folder / record.samples).is_file()
    assert list(phone.folder.iterdir()) == [], "cleaned up after reconnecting"


def test_the_runner_on_a_disconnected_device_ends(phone, tmp_path, make_bundle, short_profile):
    pids = []

    def before(service):
        if "job.json" in service:
            threading.Timer(0.3, phone.drop).start()
            threading.Timer(0.25, lambda: pids.extend(runners(phone.folder))).start()

    phone.before = before
    with pytest.raises(DeviceError, match="was lost"):
        bench(settings(make_bundle(), phone, processes=1, profile="standard"))
    assert pids
    for _ in range(100):
        if not runners(phone.folder):
            break
        time.sleep(0.05)
    assert not runners(phone.folder)


def runners(folder):
    """The processes whose working folder is below `folder`."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").readlink().is_relative_to(folder):
                found.append(process.name)
        except OSError:
            continue
    return found


def test_a_server_that_is_killed_midway(phone, make_bundle, short_profile):
    runs = []

    def before(service):
        if "job.json" in service:
            runs.append(service)
            if len(runs) == 1:
                threading.Timer(0.3, lambda: subprocess.run(["adb", "kill-server"], capture_output=True)).start()

    phone.before = before
    (record,) = bench(settings(make_bundle(), phone, processes=2))
    assert record.verdict == "INVALID" and "was lost" in record.reasons[0] and len(runs) == 2
    assert list(phone.folder.iterdir()) == []


def test_a_device_that_vanishes(phone, make_bundle, short_profile):
    def before(service):
        if "job.json" in service:
            phone.vanish()

    phone.before = before
    with pytest.raises(DeviceError, match="was lost") as caught:
        bench(settings(make_bundle(), phone, processes=1))
    assert "\n" not in str(caught.value)


def test_a_device_that_does_not_trust_this_computer(start_adbd):
    device = start_adbd(authorised=False)
    with pytest.raises(DeviceError, match=r"reaching adb://.*accept the dialog") as caught, opened(device):
        pass
    assert "\n" not in str(caught.value)
    # It is now listed as unauthorized, as a device on USB is at once.
    with pytest.raises(DeviceError, match="accept the dialog"), open_transport("adb://"):
        pass


def test_one_of_two_devices(start_adbd):
    first, second = start_adbd(), start_adbd()
    second.properties["ro.product.model"] = "Phone 2"
    for device, model in ((first, "Phone 1"), (second, "Phone 2")):
        with opened(device) as transport:
            assert transport.run(".", ["getprop", "ro.product.model"], timeout=30) == (0, model)
    with pytest.raises(DeviceError, match="several devices are connected"), open_transport("adb://"):
        pass


def test_the_only_device_needs_no_serial_number(phone):
    with opened(phone):
        pass
    with open_transport("adb://") as transport:
        assert transport.run(".", ["echo", "here"], timeout=30) == (0, "here")


def test_no_device(start_adbd):
    for address, said in (
        ("adb://", "no device is connected"),
        ("adb://R58M12ABCDE", "device 'R58M12ABCDE' not found"),
        ("adb://127.0.0.1:9", "Connection refused"),
    ):
        with pytest.raises(DeviceError, match=said) as caught, open_transport(address):
            pass
        assert "\n" not in str(caught.value) and "daemon" not in str(caught.value)


def test_a_server_that_cannot_start(start_adbd, monkeypatch):
    monkeypatch.setenv("ANDROID_ADB_SERVER_PORT", "1")
    monkeypatch.setenv("ADB_SERVER_SOCKET", "tcp:192.0.2.1:1")  # adb starts no server on another machine
    monkeypatch.setattr("robx.runtime.bench.over_adb.CONNECT_SECONDS", 1)
    with pytest.raises(DeviceError) as caught, open_transport("adb://"):
        pass
    assert "\n" not in str(caught.value)


def test_a_device_that_hangs(phone):
    with opened(phone) as transport:
        start = time.monotonic()
        with pytest.raises(DeviceError, match="did not answer within 1 s"):
            transport.run(".", ["sleep", "30"], timeout=1)
        assert time.monotonic() - start < 5
    assert list(phone.folder.iterdir()) == []
