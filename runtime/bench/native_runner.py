"""The native runner on this machine: what ``robx device build`` wrote, and the files of it that a device needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypedDict

from robx.errors import ArtifactError, InputError
from robx.store.dataclass_json import check_json
from robx.store.files import cache_folder, read_json, sha256_file

NAME = "robx_runner"
INFO = "runner.json"
RUNTIMES = ("onnxruntime", "litert")  # that the native runner can open
ABIS = ("arm64-v8a", "linux-arm64", "linux-x86_64")
_LINUX = {"aarch64": "linux-arm64", "arm64": "linux-arm64", "x86_64": "linux-x86_64", "amd64": "linux-x86_64"}


class Library(TypedDict):
    """A runtime's library beside the runner."""

    file: str  # below the folder: lib/libonnxruntime.so
    runtime: str  # a key of robx.formats.RUNTIMES
    version: str | None
    sha256: str
    bytes: int
    licence: str | None


class NativeBuild(TypedDict):
    """runner.json: what ``robx device build`` wrote."""

    abi: str
    robx_version: str
    sha256: str  # of the runner
    libraries: list[Library]


def native_folder(abi: str) -> Path:
    """Where ``robx device build`` puts the runner for `abi`, one of ABIS."""
    return cache_folder() / "runner" / abi


def device_abi(machine: str, android: str = "") -> str:
    """The ABI of a device.

    Args:
        machine: what ``uname -m`` prints there.
        android: what ``getprop ro.product.cpu.abi`` prints there; empty on other systems.

    Raises:
        InputError: there is no native runner for it.
    """
    abi = android if android else _LINUX.get(machine.lower())
    if abi not in ABIS:
        raise InputError(f"there is no native runner for {android or machine}: it can be built for {', '.join(ABIS)}")
    return abi


def read_build(abi: str) -> NativeBuild:
    """What was built for `abi`.

    Raises:
        InputError: nothing was, or its description is damaged; the message names the command that builds it.
    """
    folder, remedy = native_folder(abi), f"run robx device build --abi {abi}"
    if not (folder / NAME).is_file():
        raise InputError(f"the native runner for {abi} is not built ({folder} has no {NAME}): {remedy}")
    try:
        build: NativeBuild = check_json(NativeBuild, read_json(folder / INFO), where=INFO)
    except ArtifactError as error:
        raise InputError(f"the native runner for {abi} cannot be used ({error}): {remedy}") from None
    return build


def native_files(abi: str, runtime: str | None) -> dict[str, Path]:
    """The runner, and the libraries of `runtime` (a key of RUNTIMES), by their names in the job's folder.

    Raises:
        InputError: they were not built, or changed since; the message names the command that builds them.
    """
    build, folder = read_build(abi), native_folder(abi)
    hashes = {NAME: build["sha256"]} | {lib["file"]: lib["sha256"] for lib in libraries(abi, runtime)}
    for name, digest in hashes.items():
        path = folder / name
        if not path.is_file() or sha256_file(path) != digest:
            why = "changed since it was built" if path.is_file() else "missing"
            raise InputError(f"{path} is {why}: run robx device build --abi {abi} again")
    return {name: folder / name for name in hashes}


def libraries(abi: str, runtime: str | None) -> list[Library]:
    """The libraries of a runtime that lie beside the runner for `abi`; none if `runtime` is None.

    Raises:
        InputError: there is none.
    """
    if runtime is None:
        return []
    found = [lib for lib in read_build(abi)["libraries"] if lib["runtime"] == runtime]
    if not found:
        have = ", ".join(sorted({lib["runtime"] for lib in read_build(abi)["libraries"]})) or "none"
        raise InputError(
            f"the native runner for {abi} has no library of {runtime} (it has: {have}): "
            f"robx device build --abi {abi} --runtime FILE adds it, FILE a .so, .whl or .aar"
        )
    return found


def facts_of(abi: str, runtime: str) -> dict[str, Any]:
    """The record's entries about the runner: its SHA-256, and the runtime's library."""
    return {"runner_sha256": read_build(abi)["sha256"], "runtime_library": dict(libraries(abi, runtime)[0])}
