"""Build the native runner for devices without Python, and put the runtimes' libraries beside it.

The C++ sources are in runtime/device/native/. The libraries come from the user: a shared library, a Python wheel or an
Android archive (.aar), none of which robx downloads or contains. The result is the folder that
`robx.runtime.bench.native_runner` reads.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from email.parser import HeaderParser
from importlib import metadata
from pathlib import Path
from typing import Any

from robx import __version__
from robx.errors import DeviceError, InputError, first_line
from robx.runtime import device
from robx.runtime.bench.native_runner import (
    ABIS,
    INFO,
    NAME,
    Library,
    NativeBuild,
    device_abi,
    native_folder,
)
from robx.runtime.bench.subprocesses import call
from robx.store.files import sha256_bytes, sha256_file, write_bytes, write_json
from robx.store.folders import new_folder

_BUILD_SECONDS = 600
_MAX_BYTES = 2**30  # of one library; ONNX Runtime's has 35 MB
_ANDROID_API = 24  # Android 7, the oldest of the runtimes' Android archives
_MACHINES = {"arm64-v8a": 183, "linux-arm64": 183, "linux-x86_64": 62}  # e_machine in the ELF header
_COMPILERS = {"linux-arm64": "aarch64-linux-gnu-g++", "linux-x86_64": "x86_64-linux-gnu-g++"}


@dataclass(frozen=True, kw_only=True)
class RuntimeLibrary:
    """What is known about the library of a runtime."""

    file: str  # beside the runner
    pattern: re.Pattern[str]  # its name in wheels and archives
    packages: tuple[str, ...]  # distributions whose wheels contain it
    licence: str  # SPDX identifier of the project's licence, where the file comes without one
    version: re.Pattern[bytes] | None  # in the library itself


LIBRARIES = {
    "onnxruntime": RuntimeLibrary(
        file="lib/libonnxruntime.so",
        pattern=re.compile(r"(?:.*/)?libonnxruntime\.so(?:\.[0-9.]+)?\Z"),
        packages=("onnxruntime",),
        licence="MIT",
        version=re.compile(rb"\0VERS_([0-9]+\.[0-9]+\.[0-9]+)\0"),
    ),
    "litert": RuntimeLibrary(
        file="lib/libLiteRt.so",
        pattern=re.compile(r"(?:.*/)?libLiteRt\.so\Z"),
        packages=("ai-edge-litert",),
        licence="Apache-2.0",
        version=None,
    ),
}


@dataclass(frozen=True)
class Found:
    """One library to put beside the runner."""

    runtime: str  # a key of LIBRARIES
    data: bytes
    version: str | None
    licence: str
    source: str  # for messages


def build(
    abi: str,
    *,
    runtimes: Sequence[str | Path] = (),
    ndk: str | Path | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> NativeBuild:
    """Build the runner for `abi` and replace what was built for it before.

    Args:
        abi: one of native_runner.ABIS.
        runtimes: files (.so, .whl, .aar) with the runtimes' libraries for `abi`; none: those of the packages installed
            here, if `abi` is this machine's.
        ndk: the folder of the Android NDK, for an Android ABI; None: the environment variable ANDROID_NDK_HOME.
        say: called with a line before the compiler starts.

    Raises:
        InputError: an argument is not valid, or a compiler is missing; the message says how to install it.
        DeviceError: the build failed.
    """
    if abi not in ABIS:
        raise InputError(f"unknown ABI {abi!r}: choose one of {', '.join(ABIS)}")
    if ndk is not None and abi != "arm64-v8a":
        raise InputError(f"--ndk has no effect with --abi {abi}: leave it out")
    found = _libraries(abi, [Path(path) for path in runtimes])
    options = _toolchain(abi, Path(ndk) if ndk is not None else None)
    place = native_folder(abi)
    place.parent.mkdir(parents=True, exist_ok=True)
    say(f"building the native runner for {abi} with CMake: this takes a minute or more")
    with new_folder(place, ours=(NAME, INFO, *(library.file for library in LIBRARIES.values()))) as folder:
        _compile(options, folder / NAME)
        record = _record(abi, folder, found)
        write_json(folder / INFO, record)
    return record


def _record(abi: str, folder: Path, found: Sequence[Found]) -> NativeBuild:
    """Write the libraries into `folder` and describe it."""
    (folder / "lib").mkdir()
    described = []
    for one in found:
        name = LIBRARIES[one.runtime].file
        write_bytes(folder / name, one.data)
        digest, size = sha256_bytes(one.data), len(one.data)
        library = Library(
            file=name, runtime=one.runtime, version=one.version, sha256=digest, bytes=size, licence=one.licence
        )
        described.append(library)
    return NativeBuild(abi=abi, robx_version=__version__, sha256=sha256_file(folder / NAME), libraries=described)


def _toolchain(abi: str, ndk: Path | None) -> list[str]:
    """CMake's options for the compiler of `abi`."""
    if shutil.which("cmake") is None:
        raise InputError("building the runner needs CMake: apt install cmake, or pip install cmake")
    if abi == "arm64-v8a":
        given = ndk or Path(os.environ.get("ANDROID_NDK_HOME", ""))
        toolchain = given / "build" / "cmake" / "android.toolchain.cmake"
        if not toolchain.is_file():
            where = (
                f"{given} is not the Android NDK" if str(given) != "." else "an Android runner needs the Android NDK"
            )
            raise InputError(f"{where}: give the folder of an unpacked NDK with --ndk DIR (docs/native-runner.md)")
        android = {"ABI": abi, "PLATFORM": f"android-{_ANDROID_API}", "STL": "c++_static"}
        return [f"-DCMAKE_TOOLCHAIN_FILE={toolchain.resolve()}", *(f"-DANDROID_{k}={v}" for k, v in android.items())]
    if abi == _own_abi():
        if shutil.which(os.environ.get("CXX", "c++")) is None:
            raise InputError("building the runner needs a C++17 compiler: apt install g++, or set CXX")
        return []
    compiler = _COMPILERS[abi]
    if shutil.which(compiler) is None:
        package = "g++-" + compiler.removesuffix("-g++").replace("_", "-")
        raise InputError(f"building for {abi} needs the compiler {compiler}: apt install {package}")
    processor = compiler.partition("-")[0]
    return ["-DCMAKE_SYSTEM_NAME=Linux", f"-DCMAKE_SYSTEM_PROCESSOR={processor}", f"-DCMAKE_CXX_COMPILER={compiler}"]


def _compile(options: Sequence[str], target: Path) -> None:
    """Run CMake in a folder beside `target`, and keep only the runner."""
    source, scratch = Path(str(device.__file__)).parent / "native", target.parent / "build"
    steps = (
        ["cmake", "-S", str(source), "-B", str(scratch), "-DCMAKE_BUILD_TYPE=Release", *options],
        ["cmake", "--build", str(scratch), "--parallel", str(os.cpu_count() or 1)],
    )
    for command in steps:
        status, text = call(command, timeout=_BUILD_SECONDS, what="the build")
        if status:
            lines = [line.strip() for line in text.splitlines()]
            why = next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "no message")
            raise DeviceError(f"the runner could not be built ({why[:300]}): check the compiler")
    shutil.move(scratch / NAME, target)
    shutil.rmtree(scratch)


def _own_abi() -> str | None:
    """The ABI of this machine; None if there is no runner for it."""
    try:
        return device_abi(platform.machine()) if platform.system() == "Linux" else None
    except InputError:
        return None


def _libraries(abi: str, paths: Sequence[Path]) -> list[Found]:
    """The libraries in the user's files, or of the packages installed here; at most one of each runtime."""
    if not paths and abi != _own_abi():
        raise InputError(
            f"the runner for {abi} needs the library of a runtime: give a file with one with --runtime "
            "(.so, .whl or .aar; docs/native-runner.md names the downloads)"
        )
    found = [_read_library(path, abi) for path in paths] if paths else list(_installed())
    for one in found:
        _check_binary(one, abi)
    names = [one.runtime for one in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"--runtime was given two libraries of {twice[0]}: give one of each runtime")
    return found


def _installed() -> Iterator[Found]:
    """The libraries of the runtimes' packages in this environment."""
    for runtime, library in LIBRARIES.items():
        for name in library.packages:
            try:
                package = metadata.distribution(name)
            except metadata.PackageNotFoundError:
                continue
            for file in package.files or ():
                path = Path(str(package.locate_file(file)))
                if library.pattern.match(str(file)) and path.is_file():
                    licence = _licence(package.metadata) or library.licence
                    yield Found(runtime, _read(path), package.version, licence, f"the package {name}")
                    break


def _read_library(path: Path, abi: str) -> Found:
    """The library in a .so, .whl or .aar file."""
    if not path.exists():
        raise InputError(f"{path} does not exist: give a .so, .whl or .aar file")
    if path.suffix in (".whl", ".aar"):
        try:
            with zipfile.ZipFile(path) as archive:
                return _from_archive(path, archive, abi)
        except (OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
            raise InputError(f"{path} cannot be read ({first_line(error)}): download it again") from error
    runtime = next((name for name, library in LIBRARIES.items() if library.pattern.match(path.name)), None)
    if runtime is None:
        raise InputError(
            f"{path} is not a library that the runner uses: give libonnxruntime.so or libLiteRt.so, "
            "or a .whl or .aar file that contains one"
        )
    data = _read(path)
    return Found(runtime, data, _version(runtime, data), LIBRARIES[runtime].licence, str(path))


def _from_archive(path: Path, archive: zipfile.ZipFile, abi: str) -> Found:
    """The library in a wheel, or for `abi` in an Android archive; version and licence as the wheel states them."""
    folder = f"jni/{abi}/" if path.suffix == ".aar" else ""
    for runtime, library in LIBRARIES.items():
        entry = next(
            (e for e in archive.infolist() if e.filename.startswith(folder) and library.pattern.match(e.filename)), None
        )
        if entry is None:
            continue
        if entry.file_size > _MAX_BYTES:
            raise InputError(f"{path} contains a library of {entry.file_size} bytes: download the runtime again")
        data = archive.read(entry)
        about = next((e for e in archive.infolist() if e.filename.endswith(".dist-info/METADATA")), None)
        headers: Any = HeaderParser().parsestr(archive.read(about).decode(errors="replace")) if about else {}
        named = re.search(r"-([0-9]+(?:\.[0-9]+)+)[-.]", path.name)
        version = headers.get("Version") or _version(runtime, data) or (named.group(1) if named else None)
        return Found(runtime, data, version, _licence(headers) or library.licence, str(path))
    raise InputError(
        f"{path} contains no library of {' or '.join(LIBRARIES)} for {abi}: download the runtime for {abi}"
    )


def _licence(headers: Any) -> str | None:
    """The licence that a package states, on one line."""
    stated = str(headers.get("License-Expression") or headers.get("License") or "").strip()
    return stated.splitlines()[0][:100] if stated else None


def _version(runtime: str, data: bytes) -> str | None:
    """The version in the library's symbol table."""
    pattern = LIBRARIES[runtime].version
    match = pattern.search(data) if pattern is not None else None
    return match.group(1).decode() if match else None


def _check_binary(one: Found, abi: str) -> None:
    """Refuse a library for another processor or system."""
    data = one.data
    if len(data) < 64 or data[:6] != b"\x7fELF\x02\x01":
        raise InputError(f"{one.source} contains no 64-bit Linux or Android library: download the runtime for {abi}")
    (machine,) = struct.unpack_from("<H", data, 18)
    linux, android = b"\0libc.so.6\0" in data, b"\0libc.so\0" in data  # the names of glibc and of Android's bionic
    other = linux if abi == "arm64-v8a" else android and not linux
    if machine != _MACHINES[abi] or other:
        system = {62: "x86-64", 183: "arm64"}.get(machine, f"processor {machine}")
        kind = "Linux on " if linux else "Android on " if android else ""
        raise InputError(f"{one.source} is for {kind}{system}, not for {abi}: download the runtime for {abi}")


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise InputError(f"{path} has more than {_MAX_BYTES} bytes: give the runtime's library")
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): check the path") from error
