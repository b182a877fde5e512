"""Run TensorRT and TensorRT-RTX engines, built on the device on first use from the bundle's ONNX file and recipe.

The interface is described in on_onnxruntime.py. An engine is valid for one ONNX file, TensorRT version, GPU and set of
flags: these form its key in the cache (``$ROBX_ENGINE_CACHE``, else ``~/.cache/robx/engines``). Opening an engine runs
native code from it, so only engines built by this process, or with the SHA-256 recorded at build time, are opened.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from robx.runtime.device.engine import check_settings


def open_model(folder: str, manifest: dict[str, Any], settings: dict[str, Any]) -> TensorRtModel:
    """Open a bundle on the first CUDA GPU. The first time on a device this builds the engine, which takes minutes.

    Args:
        folder: the bundle's folder.
        manifest: its manifest.json, parsed; ``runtime`` is tensorrt or tensorrt_rtx.
        settings: ``provider`` may be cuda; ``threads`` is ignored.

    Raises:
        ImportError: TensorRT is not installed, or neither cuda-python nor torch is.
        RuntimeError: there is no GPU, or TensorRT cannot build or open the engine; the message has its reason.
    """
    check_settings("TensorRT", settings, ("cuda",))
    return TensorRtModel(importlib.import_module(manifest["runtime"]), open_cuda(), folder, manifest)


class TensorRtModel:
    """One execution context and its buffers, allocated once for the largest batch."""

    def __init__(self, trt: Any, cuda: Any, folder: str, manifest: dict[str, Any]) -> None:
        recipe = json.loads(Path(folder, "recipe.json").read_text())
        self._cuda, self._logger = cuda, trt.Logger(trt.Logger.ERROR)
        started = time.monotonic()
        plan, source = load_engine(trt, Path(folder), recipe, cuda.gpu, cache_folder())
        self._runtime = trt.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise RuntimeError(
                f"{trt.__name__} {trt.__version__} cannot open the engine ({source}) on {cuda.gpu['name']}"
            )
        self._context = self._engine.create_execution_context()
        self._facts = {
            "engine": trt.__name__,
            "version": trt.__version__,
            "provider": "cuda",
            "fallback": False,
            "threads": None,
            "gpu": cuda.gpu,
            "engine_source": source,
            "engine_seconds": round(time.monotonic() - started, 3),
        }
        self._input, self._output = manifest["inputs"][0]["name"], manifest["outputs"][0]["name"]
        self._dtype = np.dtype(manifest["inputs"][0]["dtype"])
        self._output_dtype = np.dtype(trt.nptype(self._engine.get_tensor_dtype(self._output)))
        self._batch = self._allocate(trt)

    def _allocate(self, trt: Any) -> int:
        """Bind a buffer to every input and output; returns the largest batch that they hold."""
        shape = tuple(self._engine.get_tensor_shape(self._input))
        if shape[0] < 0:
            shape = tuple(self._engine.get_tensor_profile_shape(self._input, 0)[2])
            self._context.set_input_shape(self._input, shape)
        self._pointers = {}
        for index in range(self._engine.num_io_tensors):
            name = self._engine.get_tensor_name(index)
            dtype = np.dtype(trt.nptype(self._engine.get_tensor_dtype(name)))
            size = int(np.prod(tuple(self._context.get_tensor_shape(name)))) * dtype.itemsize
            self._pointers[name] = self._cuda.allocate(size)
            self._context.set_tensor_address(name, int(self._pointers[name]))
        return int(shape[0])

    def run(self, images: np.ndarray) -> np.ndarray:
        """Embeddings, float32 (N, D), of preprocessed images, float32 (N, 3, H, W)."""
        pieces = [self._run(images[i : i + self._batch]) for i in range(0, len(images), self._batch)]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def _run(self, images: np.ndarray) -> np.ndarray:
        images = np.ascontiguousarray(images, dtype=self._dtype)
        if not self._context.set_input_shape(self._input, images.shape):
            raise RuntimeError(f"the engine takes no input of shape {images.shape}")
        output = np.empty(tuple(self._context.get_tensor_shape(self._output)), self._output_dtype)
        self._cuda.upload(self._pointers[self._input], images)
        if not self._context.execute_async_v3(self._cuda.stream):
            raise RuntimeError("TensorRT could not start the inference")
        self._cuda.download(output, self._pointers[self._output])
        return output.astype(np.float32, copy=False)

    def facts(self) -> dict[str, Any]:
        """What is actually in use, and where the engine came from."""
        return dict(self._facts)

    def close(self) -> None:
        """Free the context, the engine and the buffers, in that order."""
        self._context = self._engine = self._runtime = None
        self._cuda.close()


def load_engine(trt: Any, folder: Path, recipe: dict[str, Any], gpu: dict[str, Any], cache: Path) -> tuple[bytes, str]:
    """The serialised engine and its origin: "bundle" (built ahead of time), "cache" or "built"."""
    onnx = folder / recipe["onnx"]["path"]
    if hashlib.sha256(onnx.read_bytes()).hexdigest() != recipe["onnx"]["sha256"]:
        raise RuntimeError(f"{onnx} is not the file that the recipe was written for: export the bundle again")
    for ready in recipe["engines"]:
        fits = ready["runtime"] == trt.__name__ and ready["version"] == trt.__version__
        if fits and "SM" + gpu["capability"].replace(".", "") in ready["capabilities"]:
            plan = _read_checked(folder / Path(ready["path"]).name, ready["sha256"])
            if plan is not None:
                return plan, "bundle"
    path = cache / (engine_key(trt, recipe, gpu) + ".engine")
    recorded = path.with_suffix(".sha256")
    plan = _read_checked(path, recorded.read_text().strip()) if recorded.is_file() else None
    if plan is not None:
        return plan, "cache"
    plan = build_engine(trt, onnx, recipe)
    try:
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        _write(path, plan)
        _write(recorded, hashlib.sha256(plan).hexdigest().encode())
    except OSError:  # on a read-only or full device it runs anyway, and builds the engine again next time
        pass
    return plan, "built"


def engine_key(trt: Any, recipe: dict[str, Any], gpu: dict[str, Any]) -> str:
    """A key that changes with the ONNX file, the TensorRT package and version, the GPU and the builder's settings."""
    parts = [recipe["onnx"]["sha256"], trt.__name__, trt.__version__, gpu, recipe["flags"], recipe["profile"]]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def cache_folder() -> Path:
    """The folder of the engine cache."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("ROBX_ENGINE_CACHE") or home / "robx" / "engines")


def build_engine(trt: Any, onnx: Path, recipe: dict[str, Any]) -> bytes:
    """Build a serialised engine for this machine's GPU: strongly typed, so the ONNX file defines every precision."""
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    # Since TensorRT 11 every network is strongly typed and the flag may be missing.
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, trt.Logger(trt.Logger.ERROR))
    if not parser.parse_from_file(str(onnx)):
        errors = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        raise RuntimeError(f"{trt.__name__} {trt.__version__} cannot parse {onnx}: {'; '.join(errors[:3])}")
    config = builder.create_builder_config()
    (config.set_flag if recipe["flags"]["tf32"] else config.clear_flag)(trt.BuilderFlag.TF32)
    if recipe["profile"]:
        profile = builder.create_optimization_profile()
        for name, (low, best, high) in recipe["profile"].items():
            profile.set_shape(name, low, best, high)
        config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise RuntimeError(f"{trt.__name__} {trt.__version__} cannot build {onnx}: see its log")
    return bytes(plan)


def open_cuda() -> Any:
    """The first GPU, through cuda-python or else torch."""
    failures = []
    for opener in (_CudaPython, _CudaTorch):
        try:
            return opener()
        except ImportError as error:
            failures.append(str(error))
    raise ImportError("TensorRT needs cuda-python or torch for its buffers: " + "; ".join(failures))


class _CudaPython:
    """Buffers through cuda-python (12 and 13)."""

    def __init__(self) -> None:
        try:
            from cuda.bindings import runtime
        except ImportError:
            from cuda import cudart as runtime
        self._api = runtime
        self._call(runtime.cudaSetDevice(0))
        facts = self._call(runtime.cudaGetDeviceProperties(0))
        name = facts.name.decode() if isinstance(facts.name, bytes) else str(facts.name)
        self.gpu = {"name": name.rstrip("\0"), "capability": f"{facts.major}.{facts.minor}"}
        self._stream = self._call(runtime.cudaStreamCreate())
        self.stream = int(self._stream)
        self._buffers: list[int] = []

    def _call(self, result: Any) -> Any:
        error, values = result[0], result[1:]
        if int(error) != 0:
            raise RuntimeError(f"no usable CUDA GPU: {getattr(error, 'name', error)}")
        return values[0] if values else None

    def allocate(self, size: int) -> int:
        self._buffers.append(int(self._call(self._api.cudaMalloc(size))))
        return self._buffers[-1]

    def upload(self, pointer: int, array: np.ndarray) -> None:
        kind = self._api.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call(self._api.cudaMemcpyAsync(pointer, array.ctypes.data, array.nbytes, kind, self._stream))

    def download(self, array: np.ndarray, pointer: int) -> None:
        kind = self._api.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call(self._api.cudaMemcpyAsync(array.ctypes.data, pointer, array.nbytes, kind, self._stream))
        self._call(self._api.cudaStreamSynchronize(self._stream))

    def close(self) -> None:
        for pointer in self._buffers:
            self._api.cudaFree(pointer)
        self._buffers = []


class _CudaTorch:
    """Buffers through torch, for machines without cuda-python."""

    def __init__(self) -> None:
        import torch

        if not torch.cuda.is_available():
            raise RuntimeError("no usable CUDA GPU: torch finds none")
        self._torch = torch
        major, minor = torch.cuda.get_device_capability(0)
        self.gpu = {"name": torch.cuda.get_device_name(0), "capability": f"{major}.{minor}"}
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self.stream = self._stream.cuda_stream
        self._buffers: dict[int, Any] = {}

    def allocate(self, size: int) -> int:
        buffer = self._torch.empty(size, dtype=self._torch.uint8, device="cuda")
        self._buffers[buffer.data_ptr()] = buffer
        return int(buffer.data_ptr())

    def upload(self, pointer: int, array: np.ndarray) -> None:
        with self._torch.cuda.stream(self._stream):
            flat = self._torch.from_numpy(array.reshape(-1).view(np.uint8))
            self._buffers[pointer][: array.nbytes].copy_(flat)

    def download(self, array: np.ndarray, pointer: int) -> None:
        with self._torch.cuda.stream(self._stream):
            flat = self._torch.from_numpy(array.reshape(-1).view(np.uint8))
            flat.copy_(self._buffers[pointer][: array.nbytes])
        self._stream.synchronize()

    def close(self) -> None:
        self._buffers = {}


def _read_checked(path: Path, sha256: str) -> bytes | None:
    """A file's bytes; None if they do not match the recorded SHA-256."""
    if not path.is_file():
        return None
    data = path.read_bytes()
    return data if hashlib.sha256(data).hexdigest() == sha256 else None


def _write(path: Path, data: bytes) -> None:
    """Write atomically: a process that builds the same engine at the same time sees a complete file or none."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(data)
    temporary.replace(path)
