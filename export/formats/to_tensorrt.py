"""TensorRT and TensorRT-RTX: the checked ONNX file, the recipe that turns it into an engine, and RTX engines.

A TensorRT engine runs only on the GPU model and TensorRT version that built it. The bundle therefore holds the ONNX
file, whose types and explicit Q/DQ fix every precision (the only way since TensorRT 11), and ``recipe.json``; the
device builds the engine on first use and caches it. TensorRT-RTX can also compile ahead of time, without a GPU, for
given compute capabilities: ``--target rtx:sm86+sm89`` puts such an engine beside the ONNX file.

One code path serves tensorrt 10, tensorrt 11 and tensorrt_rtx, although their engines are not interchangeable.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robx.errors import InputError, MissingExtra, first_line
from robx.export.formats.builder import BuiltFile, BuiltModel, Source
from robx.export.int8.tensorrt_qdq import check_trt_qdq
from robx.export.request import ExportRequest
from robx.records import Json, TensorSpec
from robx.store.files import sha256_bytes, sha256_file, write_bytes, write_json
from robx.store.onnx_safety import load_checked

JETSONS = {"jetson-orin": "SM87"}
MAX_BATCH = 32  # largest batch of an engine with a dynamic batch


@dataclass(frozen=True, kw_only=True)
class TensorRtTarget:
    """A parsed --target."""

    runtime: str | None  # tensorrt, tensorrt_rtx, or None: whichever is installed
    capabilities: tuple[str, ...] = ()  # to compile for, ahead of time: SM86, ...


def build(source: Source, request: ExportRequest, folder: Path) -> BuiltModel:
    """Write model.onnx, recipe.json and, for an ``rtx:`` target, the engine.

    Raises:
        InputError: an unknown target, or an ONNX file that TensorRT rejects or would silently misread.
        MissingExtra: an ``rtx:`` target, and tensorrt_rtx is not installed.
    """
    target = parse_target(request.target.device)
    trt = _find_package(target)
    if request.precision == "int8":
        check_trt_qdq(load_checked(source.onnx))
    shipped = folder / "model.onnx"
    write_bytes(shipped, source.onnx.read_bytes())
    files = [BuiltFile(path="model.onnx", role="model"), BuiltFile(path="recipe.json", role="recipe")]
    runtime = target.runtime or (trt.__name__ if trt is not None else "tensorrt")
    recipe = make_recipe(request, runtime=runtime, onnx_sha256=sha256_file(shipped))
    versions: dict[str, str] = {}
    if trt is None:
        note = "not parsed: TensorRT is not installed on this machine"
    elif target.capabilities:
        plan = build_engine(trt, shipped, recipe, target.capabilities)
        name = f"model.{'-'.join(target.capabilities).lower()}.engine"
        write_bytes(folder / name, plan)
        files.append(BuiltFile(path=name, role="engine"))
        recipe["engines"].append(_describe_engine(trt, name, plan, target.capabilities))
        note = f"the engine for {' and '.join(target.capabilities)} was built but not run, as that needs such a GPU"
    else:
        note = _parse_only(trt, shipped)
    if trt is not None:
        versions[trt.__name__] = recipe["checked_by"][trt.__name__] = trt.__version__
    write_json(folder / "recipe.json", recipe)
    return BuiltModel(
        files=tuple(files),
        runtime=runtime,
        inputs=request.inputs,
        outputs=request.outputs,
        versions=versions,
        opset=request.target.opset,
        notes=(note, "a device without a matching engine builds it on first use, from model.onnx and recipe.json"),
    )


def parse_target(device: str) -> TensorRtTarget:
    """Parse ``local``, ``jetson-orin``, ``rtx:sm89`` or ``rtx:sm86+sm89`` (or ``rtx:sm86,sm89``).

    Raises:
        InputError: anything else.
    """
    if device == "local":
        return TensorRtTarget(runtime=None)
    if device in JETSONS:
        return TensorRtTarget(runtime="tensorrt")
    family, _, listed = device.partition(":")
    capabilities = tuple(part.strip().upper() for part in listed.replace(",", "+").split("+"))
    if family != "rtx" or not all(c.startswith("SM") and c[2:].isdigit() for c in capabilities):
        known = ", ".join(("local", *JETSONS, "rtx:sm89", "rtx:sm86+sm89"))
        raise InputError(f"unknown TensorRT target {device!r}: give one such as {known}")
    return TensorRtTarget(runtime="tensorrt_rtx", capabilities=tuple(dict.fromkeys(capabilities)))


def make_recipe(request: ExportRequest, *, runtime: str, onnx_sha256: str) -> dict[str, Json]:
    """Everything that determines the engine, except the TensorRT version and the GPU that build it."""
    profile = make_profile(request.inputs)
    return {
        "schema": 1,
        "runtime": runtime,
        "target": request.target.device,
        "precision": request.precision,
        "onnx": {"path": "model.onnx", "sha256": onnx_sha256},
        "profile": profile,  # input -> [min, opt, max] shape; empty when every shape is fixed
        "flags": {"strongly_typed": True, "tf32": True},
        "trtexec": trtexec_line(profile) if runtime == "tensorrt" else None,
        "engines": [],  # built ahead of time, beside this file
        "checked_by": {},  # parser -> version
    }


def make_profile(inputs: tuple[TensorSpec, ...]) -> dict[str, list[list[int]]]:
    """The optimisation profile of inputs with a dynamic batch: min 1, opt 1, max MAX_BATCH images."""
    return {
        spec.name: [[batch, *(side or 1 for side in spec.shape[1:])] for batch in (1, 1, MAX_BATCH)]
        for spec in inputs
        if spec.shape[0] is None
    }


def trtexec_line(profile: dict[str, list[list[int]]]) -> str:
    """The trtexec command (TensorRT 10 and 11) that builds the same engine; run it in the bundle's folder."""
    words = ["trtexec", "--onnx=model.onnx", "--stronglyTyped", "--saveEngine=model.engine", "--skipInference"]
    for index, option in enumerate(("minShapes", "optShapes", "maxShapes")):
        shapes = [f"{name}:{'x'.join(map(str, three[index]))}" for name, three in profile.items()]
        words += [f"--{option}={','.join(shapes)}"] if shapes else []
    return " ".join(words)


def build_engine(trt: Any, onnx_path: Path, recipe: dict[str, Json], capabilities: tuple[str, ...] = ()) -> bytes:
    """A serialised engine, compiled for `capabilities` where the package supports that.

    Raises:
        InputError: an unknown capability, or the parser or builder fails; the message has its own error.
    """
    logger = _logger(trt)
    builder = trt.Builder(logger)
    network, parser = _parse(trt, builder, onnx_path)  # the parser owns memory that the network uses
    config = builder.create_builder_config()
    _set_flag(config, trt.BuilderFlag.TF32, on=recipe["flags"]["tf32"])
    if recipe["profile"]:
        profile = builder.create_optimization_profile()
        for name, (low, best, high) in recipe["profile"].items():
            profile.set_shape(name, low, best, high)
        config.add_optimization_profile(profile)
    _set_capabilities(trt, config, capabilities)
    logger.lines.clear()
    plan = builder.build_serialized_network(network, config)
    del parser
    if plan is None:
        where = f" for {'+'.join(capabilities)}" if capabilities else ""
        raise InputError(f"{trt.__name__} cannot build {onnx_path.name}{where}: {_complaint(logger)}")
    return bytes(plan)


def _find_package(target: TensorRtTarget) -> Any | None:
    """The TensorRT package that parses or builds here; None where neither is installed and the device has to do it."""
    if target.capabilities:
        try:
            return importlib.import_module("tensorrt_rtx")
        except (ImportError, OSError) as error:
            purpose = "building for " + "+".join(target.capabilities)
            raise MissingExtra("tensorrt_rtx", "trt-rtx", purpose=purpose, cause=error) from error
    for name in ("tensorrt", "tensorrt_rtx"):
        try:
            return importlib.import_module(name)
        except (ImportError, OSError):  # not installed, or its shared libraries are missing
            continue
    return None


def _parse_only(trt: Any, onnx_path: Path) -> str:
    """Parse the file and say with what; without a GPU tensorrt cannot create the builder that its parser needs."""
    try:
        builder = trt.Builder(_logger(trt))
    except Exception as error:
        return f"not parsed: {trt.__name__} {trt.__version__} does not start on this machine ({first_line(error)})"
    _parse(trt, builder, onnx_path)
    return f"parsed by {trt.__name__} {trt.__version__}"


def _parse(trt: Any, builder: Any, onnx_path: Path) -> tuple[Any, Any]:
    """The strongly typed network, and the parser that owns its weights."""
    # Since TensorRT 11 every network is strongly typed, and the flag may disappear.
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    logger = _logger(trt)
    logger.lines.clear()
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx_path)):
        errors = [_describe_error(parser.get_error(i)) for i in range(parser.num_errors)]
        raise InputError(f"{trt.__name__} {trt.__version__} cannot parse {onnx_path.name}: {'; '.join(errors[:3])}")
    # TensorRT only warns, but the outputs are wrong: an EfficientNet-Lite0 fell to a cosine of 0.24.
    if any("UINT8" in line and "QuantizeLinear" in line for _, line in logger.lines):
        raise InputError(
            f"{trt.__name__} would read the uint8 Q/DQ of {onnx_path.name} as int8: quantise to symmetric int8"
        )
    return network, parser


def _set_capabilities(trt: Any, config: Any, capabilities: tuple[str, ...]) -> None:
    if not capabilities:
        return
    known = sorted(name for name in dir(trt.ComputeCapability) if name.startswith("SM"))
    if unknown := [name for name in capabilities if name not in known]:
        offered = ", ".join(known).lower()
        raise InputError(f"{trt.__name__} {trt.__version__} does not build for {unknown[0].lower()}: one of {offered}")
    config.num_compute_capabilities = len(capabilities)
    for index, name in enumerate(capabilities):
        config.set_compute_capability(getattr(trt.ComputeCapability, name), index)


def _set_flag(config: Any, flag: Any, *, on: bool) -> None:
    if on:
        config.set_flag(flag)
    else:
        config.clear_flag(flag)


def _describe_engine(trt: Any, name: str, plan: bytes, capabilities: tuple[str, ...]) -> dict[str, Json]:
    return {
        "path": name,
        "sha256": sha256_bytes(plan),
        "runtime": trt.__name__,
        "version": trt.__version__,
        "capabilities": list(capabilities),
    }


def _describe_error(error: Any) -> str:
    node = f"{error.node_operator()} {error.node_name()}: " if error.node_operator() else ""
    return f"{node}{' '.join(str(error.desc()).split())}"


@functools.cache
def _logger(trt: Any) -> Any:
    """The process's one logger: TensorRT keeps the first that it is given and ignores later ones."""

    class Listener(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: list[tuple[Any, str]] = []

        def log(self, severity: Any, line: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR, trt.ILogger.WARNING):
                self.lines.append((severity, line))

    return Listener()


def _complaint(logger: Any) -> str:
    errors = [line for severity, line in logger.lines if "WARNING" not in str(severity)]
    return " ".join((errors or ["no error message"])[0].split())
