"""ONNX and .ort models in ONNX Runtime.

An engine file runs on the device too: Python 3.8, the standard library, numpy and its own runtime, which it imports
when a model is opened. Every engine has this form: ``open_model(folder, manifest, settings)`` returns an object with
``run``, ``facts`` and ``close``; ImportError says that the runtime is missing, RuntimeError, in one line, the rest.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

_PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "xnnpack": "XnnpackExecutionProvider",
    "qnn": "QNNExecutionProvider",
}


def open_model(folder: str, manifest: dict[str, Any], settings: dict[str, Any]) -> OnnxRuntimeModel:
    """Open a bundle's model file.

    Args:
        folder: the bundle's folder.
        manifest: its manifest.json, parsed.
        settings: ``threads`` (int >= 1) and, optionally, ``provider`` (cpu, cuda, tensorrt, xnnpack or qnn).

    Raises:
        ImportError: onnxruntime is not installed.
        RuntimeError: the file is no model, or a node would fall back to the CPU.
    """
    return OnnxRuntimeModel(folder, manifest, settings)


class OnnxRuntimeModel:
    """One session on one explicit provider, with explicit threads and every graph optimisation."""

    def __init__(self, folder: str, manifest: dict[str, Any], settings: dict[str, Any]) -> None:
        import onnxruntime as ort

        if (hint := settings.get("precision_hint") or "f32") != "f32":
            raise RuntimeError(f"ONNX Runtime computes in the types of the file, and {hint} was asked for")
        provider = str(settings.get("provider") or "cpu")
        if provider not in _PROVIDERS:
            raise RuntimeError(f"unknown provider {provider!r}: one of {', '.join(_PROVIDERS)}")
        self._provider, self._threads = _PROVIDERS[provider], int(settings.get("threads") or 1)
        if self._provider not in ort.get_available_providers():
            raise RuntimeError(f"this onnxruntime has no {self._provider}: install the build that has it")
        self._version = ort.__version__
        path = Path(folder) / next(f["path"] for f in manifest["files"] if f["role"] == "model")
        try:
            self._session = ort.InferenceSession(str(path), _options(ort, self._threads, provider), [self._provider])
        except Exception as error:  # its own exception classes share no base but Exception
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise RuntimeError(f"onnxruntime cannot open {path.name}: {first}") from error
        if self._session.get_providers()[0] != self._provider:
            raise RuntimeError(f"onnxruntime fell back from {self._provider} to {self._session.get_providers()[0]}")
        self._input = manifest["inputs"][0]["name"]
        self._prepare = _as_input(manifest)
        self._outputs = [manifest["outputs"][0]["name"]]

    def run(self, images: np.ndarray) -> np.ndarray:
        """Embeddings, float32 (N, D), of preprocessed images, float32 (N, 3, H, W)."""
        feeds = {self._input: self._prepare(images)}
        output: np.ndarray = self._session.run(self._outputs, feeds)[0]
        return output.astype(np.float32, copy=False)

    def facts(self) -> dict[str, Any]:
        """What really runs."""
        return {
            "engine": "onnxruntime",
            "version": self._version,
            "provider": self._provider,
            "threads": self._threads,
            "inter_op_threads": 1,
            "graph_optimization": "all",
            "precision": "the file's",
            "allow_spinning": True,
            "fallback": False,
        }

    def close(self) -> None:
        """Free the session."""
        self._session = None


def _options(ort: Any, threads: int, provider: str) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    if provider != "cpu":
        # A node that the accelerator does not take makes the session fail instead of running it on the CPU.
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    return options


def _as_input(manifest: dict[str, Any]) -> Any:
    """A function from normalised images to what the model takes: itself, another float, or the uint8 pixels again."""
    dtype = np.dtype(manifest["inputs"][0]["dtype"])
    if dtype != np.uint8:
        return lambda images: np.ascontiguousarray(images, dtype=dtype)
    mean, std = (np.array(manifest["preprocessing"][k], np.float32).reshape(1, 3, 1, 1) for k in ("mean", "std"))
    return lambda images: np.clip(np.rint((images * std + mean) * 255), 0, 255).astype(np.uint8)
