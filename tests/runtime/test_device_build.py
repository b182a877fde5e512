"""robx device build: which libraries it takes, what it refuses, and how it calls CMake."""

import json
import os
import shutil
import struct
import zipfile
from pathlib import Path

import pytest

from robx.errors import DeviceError, InputError
from robx.runtime import device_build
from robx.runtime.bench.native_runner import device_abi, native_folder
from robx.runtime.device_build import build
from tests.runtime.conftest import script

OWN = device_abi(os.uname().machine)
ROOT = Path(__file__).parents[2]


def elf(machine, *, glibc, version=b""):
    """The parts of a shared library that are looked at."""
    header = b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HH", 3, machine) + bytes(44)
    return header + {True: b"\0libc.so.6\0", False: b"\0libc.so\0", None: b""}[glibc] + version + bytes(64)


LINUX_ARM, ANDROID = elf(183, glibc=True), elf(183, glibc=False)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("ANDROID_NDK_HOME", raising=False)


@pytest.fixture
def compiled(shims, monkeypatch):
    """CMake and the cross-compiler as scripts: the options of a build, and an empty runner."""
    log = shims.parent / "cmake.log"
    runner = 'for last; do :; done; [ "$1" = --build ] && echo runner > "$2/robx_runner" && exit 0'
    script(shims / "cmake", f'echo "$@" >> {log}\n{runner}; mkdir -p "$4"')
    script(shims / "aarch64-linux-gnu-g++", "exit 1")
    return log


def archive(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name, data in files.items():
            file.writestr(name, data)
    return path


def test_a_wheel_gives_library_version_and_licence(compiled, tmp_path):
    about = b"Metadata-Version: 2.4\nName: onnxruntime\nVersion: 1.32.0\nLicense: MIT License\n\nText"
    wheel = archive(
        tmp_path / "onnxruntime-1.32.0-cp311-cp311-manylinux_2_28_aarch64.whl",
        {
            "onnxruntime/capi/libonnxruntime_providers_shared.so": LINUX_ARM,
            "onnxruntime/capi/libonnxruntime.so.1.32.0": LINUX_ARM,
            "onnxruntime-1.32.0.dist-info/METADATA": about,
        },
    )
    record = build("linux-arm64", runtimes=[wheel])
    (library,) = record["libraries"]
    assert (library["version"], library["licence"]) == ("1.32.0", "MIT License")
    folder = native_folder("linux-arm64")
    assert (folder / "lib" / "libonnxruntime.so").read_bytes() == LINUX_ARM
    assert json.loads((folder / "runner.json").read_text()) == record
    assert "-DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++" in compiled.read_text()
    assert sorted(p.name for p in folder.iterdir()) == ["lib", "robx_runner", "runner.json"]


def test_an_android_archive_and_the_ndk(compiled, tmp_path):
    ndk = tmp_path / "ndk"
    (ndk / "build" / "cmake").mkdir(parents=True)
    (ndk / "build" / "cmake" / "android.toolchain.cmake").touch()
    files = {f"jni/{abi}/libonnxruntime.so": elf(40, glibc=False) for abi in ("armeabi-v7a", "x86_64")}
    aar = archive(tmp_path / "onnxruntime-android-1.23.0.aar", files | {"jni/arm64-v8a/libonnxruntime.so": ANDROID})
    litert = archive(tmp_path / "litert-2.3.0.aar", {"jni/arm64-v8a/libLiteRt.so": ANDROID})
    libraries = build("arm64-v8a", runtimes=[aar, litert], ndk=ndk)["libraries"]
    found = [(one["file"], one["version"], one["licence"]) for one in libraries]
    assert found == [("lib/libonnxruntime.so", "1.23.0", "MIT"), ("lib/libLiteRt.so", "2.3.0", "Apache-2.0")]
    configure, compile_ = compiled.read_text().splitlines()
    toolchain = (ndk / "build" / "cmake" / "android.toolchain.cmake").resolve()
    android = "-DANDROID_ABI=arm64-v8a -DANDROID_PLATFORM=android-24 -DANDROID_STL=c++_static"
    options = f" -DCMAKE_BUILD_TYPE=Release -DCMAKE_TOOLCHAIN_FILE={toolchain} {android}"
    assert configure.startswith("-S ") and configure.endswith(options)
    source, build_folder = configure.removesuffix(options).removeprefix("-S ").split(" -B ")
    assert (Path(source) / "CMakeLists.txt").is_file()
    assert compile_ == f"--build {build_folder} --parallel {os.cpu_count()}"
    page = " ".join((ROOT / "docs" / "android.md").read_text().replace("\\\n", " ").split())
    documented = options.replace(str(ndk.resolve()), "NDK").strip()
    assert f"cmake -S SOURCES -B BUILD {documented} cmake --build BUILD --parallel CORES" in page


def test_a_library_says_its_version(compiled, tmp_path):
    path = tmp_path / "libonnxruntime.so"
    path.write_bytes(elf(183, glibc=True, version=b"\0VERS_1.25.1\0"))
    said = []
    assert build("linux-arm64", runtimes=[path], say=said.append)["libraries"][0]["version"] == "1.25.1"
    assert said == ["building the native runner for linux-arm64 with CMake: this takes a minute or more"]


def test_a_second_build_replaces_the_first(compiled, tmp_path):
    for name in ("libonnxruntime.so", "libLiteRt.so"):
        (tmp_path / name).write_bytes(LINUX_ARM)
        build("linux-arm64", runtimes=[tmp_path / name])
    assert [p.name for p in (native_folder("linux-arm64") / "lib").iterdir()] == ["libLiteRt.so"]


@pytest.mark.parametrize(
    ("abi", "name", "data", "line"),
    [
        ("linux-arm64", "libonnxruntime.so", ANDROID, "is for Android on arm64, not for linux-arm64"),
        ("linux-arm64", "libonnxruntime.so", elf(62, glibc=True), "is for Linux on x86-64, not for linux-arm64"),
        ("linux-arm64", "libonnxruntime.so", elf(62, glibc=None), "is for x86-64, not for linux-arm64"),
        ("arm64-v8a", "libonnxruntime.so", LINUX_ARM, "is for Linux on arm64, not for arm64-v8a"),
        ("linux-arm64", "libonnxruntime.so", b"text", "contains no 64-bit Linux or Android library"),
        ("linux-arm64", "libc.so", LINUX_ARM, "give libonnxruntime.so or libLiteRt.so"),
        ("linux-arm64", "some.whl", b"no zip", "cannot be read"),
        ("mips", "libonnxruntime.so", LINUX_ARM, "choose one of arm64-v8a, linux-arm64, linux-x86_64"),
    ],
)
def test_other_libraries_are_refused(compiled, tmp_path, abi, name, data, line):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=line):
        build(abi, runtimes=[tmp_path / name])
    assert not native_folder(abi).exists()


def test_what_is_missing_is_named(compiled, shims, tmp_path, monkeypatch):
    (tmp_path / "libonnxruntime.so").write_bytes(LINUX_ARM)
    android = tmp_path / "android" / "libonnxruntime.so"
    android.parent.mkdir()
    android.write_bytes(ANDROID)
    with pytest.raises(InputError, match="needs the library of a runtime"):
        build("arm64-v8a")
    with pytest.raises(InputError, match="needs the Android NDK: give the folder"):
        build("arm64-v8a", runtimes=[android])
    with pytest.raises(InputError, match="is not the Android NDK"):
        build("arm64-v8a", runtimes=[android], ndk=tmp_path)
    with pytest.raises(InputError, match="--ndk has no effect"):
        build("linux-arm64", ndk=tmp_path)
    with pytest.raises(InputError, match="does not exist: give a"):
        build("linux-arm64", runtimes=[tmp_path / "no" / "libLiteRt.so"])
    with pytest.raises(InputError, match="two libraries of onnxruntime"):
        build("linux-arm64", runtimes=[tmp_path / "libonnxruntime.so"] * 2)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="needs CMake"):
        build("linux-arm64", runtimes=[tmp_path / "libonnxruntime.so"])
    shutil.copy(shims / "cmake", tmp_path / "cmake")
    with pytest.raises(InputError, match=r"apt install g\+\+-aarch64-linux-gnu"):
        build("linux-arm64", runtimes=[tmp_path / "libonnxruntime.so"])


def test_a_failed_build_is_one_line_and_keeps_the_old_runner(compiled, shims, tmp_path):
    (tmp_path / "libonnxruntime.so").write_bytes(LINUX_ARM)
    build("linux-arm64", runtimes=[tmp_path / "libonnxruntime.so"])
    before = (native_folder("linux-arm64") / "runner.json").read_bytes()
    script(shims / "cmake", "echo 'fatal error: no such header'; exit 1")
    with pytest.raises(DeviceError, match=r"could not be built .fatal error: no such header"):
        build("linux-arm64", runtimes=[tmp_path / "libonnxruntime.so"])
    assert (native_folder("linux-arm64") / "runner.json").read_bytes() == before


def test_the_installed_packages_are_the_default(call, compiled, shims, monkeypatch):
    script(shims / "c++", "exit 1")
    done = call("device", "build", "--abi", OWN)
    assert done.exit_code == 0, done.output
    assert "lib/libonnxruntime.so: onnxruntime 1." in done.output and "MIT" in done.output
    assert device_build.LIBRARIES["onnxruntime"].licence == "MIT"
