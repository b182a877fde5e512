"""Run LiteRT (.tflite) models; the interface is described in on_onnxruntime.py."""

from __future__ import annotations

import importlib
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from robx.runtime.device.engine import check_settings, first_line, model_path


def open_model(folder: str, manifest: dict[str, Any], settings: dict[str, Any]) -> LiteRtModel:
    """Open a bundle's .tflite file.

    Args:
        folder: the bundle's folder.
        manifest: its manifest.json, parsed.
        settings: ``threads`` (int >= 1); ``provider`` may be cpu or xnnpack.

    Raises:
        ImportError: neither ai-edge-litert nor tflite-runtime is installed.
        RuntimeError: the file is not a model, or XNNPACK was requested and takes no part of it.
    """
    check_settings("LiteRT", settings, ("cpu", "xnnpack"))
    return LiteRtModel(folder, manifest, settings)


class LiteRtModel:
    """One interpreter with XNNPACK, LiteRT's default; int8 inputs and outputs are converted here."""

    def __init__(self, folder: str, manifest: dict[str, Any], settings: dict[str, Any]) -> None:
        interpreter = _find_package()
        self._threads = int(settings.get("threads") or 1)
        self._version = _version(interpreter)
        path = Path(model_path(folder, manifest))
        try:
            self._interpreter = interpreter.Interpreter(str(path), num_threads=self._threads)
            self._interpreter.allocate_tensors()
        except Exception as error:
            raise RuntimeError(f"LiteRT cannot open {path.name}: {first_line(error)}") from error
        self._delegates = _delegates(self._interpreter)
        if settings.get("provider") == "xnnpack" and not self._delegates:
            raise RuntimeError("XNNPACK takes no part of the model: LiteRT would fall back to its built-in kernels")
        self._input = self._interpreter.get_input_details()[0]
        width = manifest["outputs"][0]["shape"][-1]
        outputs = self._interpreter.get_output_details()
        # Outputs are sorted by name; where there are logits too, the width identifies the embedding.
        self._output = next((o for o in outputs if o["shape"][-1] == width), outputs[0])

    def run(self, images: np.ndarray) -> np.ndarray:
        """Embeddings, float32 (N, D), of preprocessed images, float32 (N, 3, H, W); N is the bundle's batch."""
        self._interpreter.set_tensor(self._input["index"], quantize(images, self._input))
        self._interpreter.invoke()
        return dequantize(self._interpreter.get_tensor(self._output["index"]), self._output)

    def facts(self) -> dict[str, Any]:
        """What is actually in use."""
        return {
            "engine": "litert",
            "version": self._version,
            "provider": "xnnpack" if self._delegates else "cpu",
            "delegated_parts": self._delegates,
            "threads": self._threads,
            "input_dtype": np.dtype(self._input["dtype"]).name,
            "output_dtype": np.dtype(self._output["dtype"]).name,
            "precision": "the file's",
            "fallback": False,
        }

    def close(self) -> None:
        """Free the interpreter."""
        self._interpreter = None


def quantize(values: np.ndarray, details: dict[str, Any]) -> np.ndarray:
    """Quantise real values for a tensor: round(x / scale) + zero point, saturated; floats pass through."""
    dtype = np.dtype(details["dtype"])
    if dtype.kind == "f":
        return np.ascontiguousarray(values, dtype=dtype)
    scale, zero = details["quantization"]
    limits = np.iinfo(dtype)
    integers: np.ndarray = np.clip(np.rint(values / scale) + zero, limits.min, limits.max).astype(dtype)
    return integers


def dequantize(values: np.ndarray, details: dict[str, Any]) -> np.ndarray:
    """Dequantise a tensor to float32: (q - zero point) * scale; floats pass through."""
    if values.dtype.kind == "f":
        return np.array(values, dtype=np.float32)
    scale, zero = details["quantization"]
    real: np.ndarray = ((values.astype(np.float32) - zero) * scale).astype(np.float32)
    return real


def _delegates(interpreter: Any) -> int | None:
    """How many parts of the graph run in XNNPACK; None where this version does not report it."""
    if not hasattr(interpreter, "_get_ops_details"):
        return None
    return [operator["op_name"] for operator in interpreter._get_ops_details()].count("DELEGATE")


def _find_package() -> Any:
    try:
        return importlib.import_module("ai_edge_litert.interpreter")
    except ImportError:
        return importlib.import_module("tflite_runtime.interpreter")  # its name on older Pythons


def _version(interpreter: Any) -> str:
    package = interpreter.__name__.split(".")[0].replace("_", "-")
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"
