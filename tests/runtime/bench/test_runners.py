"""Which runner measures on a device, with and without a Python there.

The native runner is stood in for by the Python one, packed as an executable: both speak the same protocol.
"""

import json
import os
import shutil
import sys

import pytest

from robx import __version__
from robx.errors import InputError
from robx.records import load_bundle, load_measurements
from robx.runtime.bench.bench import BenchSettings, bench
from robx.runtime.bench.native_runner import ABIS, device_abi, native_files, native_folder
from robx.runtime.bench.runner_zip import pack_runner
from robx.runtime.bench.runners import choose_runner
from robx.runtime.bench.transports import open_transport
from robx.runtime.doctor import examine
from robx.store.files import sha256_file

HERE = device_abi(os.uname().machine)
TOOLS = ("sh", "cat", "cp", "ln", "mkdir", "mktemp", "mv", "rm", "sleep", "uname")


@pytest.fixture
def build(tmp_path, monkeypatch):
    """build(abi, bundle folder) -> what `robx device build` leaves in this test's cache folder."""
    monkeypatch.setenv("ROBX_CACHE", str(tmp_path / "cache"))

    def write(abi, folder=None):
        room = native_folder(abi)
        (room / "lib").mkdir(parents=True)
        program = pack_runner(load_bundle(folder) if folder else None).split(b"\n", 1)[1]
        runner, library = room / "robx_runner", room / "lib" / "libonnxruntime.so"
        runner.write_bytes(f"#!{sys.executable}\n".encode() + program)
        runner.chmod(0o755)
        library.write_bytes(b"library")
        entry = {"file": "lib/libonnxruntime.so", "runtime": "onnxruntime", "version": "1.99", "bytes": 7}
        entry |= {"sha256": sha256_file(library), "licence": "MIT"}
        told = {"abi": abi, "robx_version": __version__, "sha256": sha256_file(runner), "libraries": [entry]}
        (room / "runner.json").write_text(json.dumps(told))
        return room

    return write


@pytest.fixture
def bare_path(tmp_path):
    """A PATH without a Python."""
    folder = tmp_path / "bare"
    folder.mkdir()
    for tool in TOOLS:
        (folder / tool).symlink_to(shutil.which(tool))
    return str(folder)


@pytest.fixture
def phone(start_adbd, bare_path):
    device = start_adbd()
    device.path = bare_path
    return device


def test_a_phone_without_python_takes_the_native_runner(phone, build, make_bundle, short_profile):
    folder = make_bundle()
    room = build("arm64-v8a", folder)
    (record,) = bench(BenchSettings(bundles=[folder], device=f"adb://{phone.serial}", profile="rapid", processes=1))
    assert record.values["p50"].value > 0 and record.values["output_cosine"].value > 0.9999
    assert record.settings["runner"] == "native"
    assert record.settings["runner_sha256"] == sha256_file(room / "robx_runner")
    assert record.settings["runtime_library"]["version"] == "1.99"
    assert sorted(phone.received)[-1] == "place.sh" and len(set(phone.received)) == 6
    assert list(phone.folder.iterdir()) == []


def test_a_machine_without_python_takes_it_over_ssh(start_sshd, bare_path, build, make_bundle, short_profile):
    folder = make_bundle()
    build(HERE, folder)
    address = start_sshd(path=bare_path)
    (record,) = bench(BenchSettings(bundles=[folder], device=address, profile="rapid", processes=1))
    assert record.settings["runner"] == "native" and record.values["p50"].value > 0


def test_a_machine_with_python_takes_python(ssh_device, build):
    build(HERE)
    with open_transport(ssh_device) as transport:
        assert choose_runner(transport).kind == "python"
        native = choose_runner(transport, wanted="native")
    assert (native.kind, native.command, native.abi) == ("native", ("./robx_runner",), HERE)


def test_the_native_runner_on_this_machine(build, call, make_bundle, short_profile):
    folder = make_bundle()
    build(HERE, folder)
    done = call("bench", folder, "--runner", "native", "--profile", "rapid", "--processes", 1)
    assert "VALID" in done.stdout or "UNSTABLE" in done.stdout, done.output
    (record,) = load_measurements(folder / "measurements.jsonl")
    assert record.settings["runner"] == "native" and record.settings["runtime_library"]["licence"] == "MIT"


def test_a_runner_that_was_not_built_is_one_line_with_the_command(phone, build, call, make_bundle):
    done = call("bench", make_bundle(), "--device", f"adb://{phone.serial}", "--profile", "rapid")
    assert done.exit_code == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "has no python3" in done.stderr and "robx device build --abi arm64-v8a" in done.stderr
    done = call("doctor", "--device", f"adb://{phone.serial}")
    assert done.exit_code == 2 and "robx device build --abi arm64-v8a" in done.stderr
    assert list(phone.folder.iterdir()) == []


def test_the_doctor_says_what_the_native_runner_can_open(phone, build, call):
    build("arm64-v8a")
    facts, findings = examine(f"adb://{phone.serial}")
    assert facts["board"] == "Nobody Phone 1 Imagined"
    states = {f.name: f for f in findings}
    assert states["onnxruntime"].version == "1.99" and not states["onnxruntime"].remedy
    assert states["litert"].version is None and "--abi arm64-v8a" in states["litert"].remedy


def test_a_runtime_that_the_runner_lacks(build, make_bundle):
    build(HERE)
    assert list(native_files(HERE, "onnxruntime")) == ["robx_runner", "lib/libonnxruntime.so"]
    with pytest.raises(InputError, match=r"no library of litert \(it has: onnxruntime\)"):
        native_files(HERE, "litert")


@pytest.mark.parametrize("name", ["robx_runner", "lib/libonnxruntime.so"])
def test_files_that_changed_since_they_were_built(build, name):
    path = build(HERE) / name
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(InputError, match="changed since it was built"):
        native_files(HERE, "onnxruntime")
    path.unlink()
    with pytest.raises(InputError, match=f"robx device build --abi {HERE}"):
        native_files(HERE, "onnxruntime")


@pytest.mark.parametrize("text", ["", "[]", '{"abi": 1}', "{" * 2000])
def test_a_damaged_description(build, text):
    (build(HERE) / "runner.json").write_text(text)
    with pytest.raises(InputError, match="cannot be used") as caught:
        native_files(HERE, None)
    assert "\n" not in str(caught.value)


def test_abis():
    assert device_abi("aarch64") == "linux-arm64" and device_abi("aarch64", "arm64-v8a") == "arm64-v8a"
    assert {device_abi("x86_64"), device_abi("arm64")} | {"arm64-v8a"} == set(ABIS)
    for machine, android in (("armv7l", ""), ("aarch64", "armeabi-v7a"), ("x86_64", "x86_64"), ("", "")):
        with pytest.raises(InputError, match="there is no native runner for"):
            device_abi(machine, android)


def test_contradicting_settings(call, make_bundle):
    done = call("bench", make_bundle(), "--runner", "native", "--python", "python3")
    assert done.exit_code == 2 and "leave out one of them" in done.stderr
    with open_transport("local") as transport, pytest.raises(InputError, match="choose one of python, native"):
        choose_runner(transport, wanted="java")
