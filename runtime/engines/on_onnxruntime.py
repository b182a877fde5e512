"""Run ONNX and .ort models in ONNX Runtime.

An engine file also runs on the device: Python 3.8, the standard library, numpy and its own runtime, which it imports
when a model is opened. Every engine has this interface: ``open_model(folder, manifest, settings)`` returns an object
with ``run``, ``facts`` and ``close``; it raises ImportError if the runtime is missing and RuntimeError, with a one-line
message, for everything else.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from robx.runtime.device.engine import check_settings, first_line, input_converter, model_path

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
        RuntimeError: the file is not a model, or a node would fall back to the CPU.
    """
    return OnnxRuntimeModel(folder, manifest, settings)


class OnnxRuntimeModel:
    """One session on one explicit provider, with explicit threads and every graph optimisation."""

    def __init__(self, folder: str, manifest: dict[str, Any], settings: dict[str, Any]) -> None:
        import onnxruntime as ort

        provider = check_settings("ONNX Runtime", settings, tuple(_PROVIDERS))
        self._provider, self._threads = _PROVIDERS[provider], int(settings.get("threads") or 1)
        if self._provider not in ort.get_available_providers():
            raise RuntimeError(f"this onnxruntime has no {self._provider}: install a build that includes it")
        self._version = ort.__version__
        path = Path(model_path(folder, manifest))
        try:
            self._session = ort.InferenceSession(str(path), _options(ort, self._threads, provider), [self._provider])
        except Exception as error:  # its own exception classes share no base but Exception
            raise RuntimeError(f"onnxruntime cannot open {path.name}: {first_line(error)}") from error
        if self._session.get_providers()[0] != self._provider:
            raise RuntimeError(f"onnxruntime fell back from {self._provider} to {self._session.get_providers()[0]}")
        self._run_options = ort.RunOptions()
        self._run_options.log_severity_level = 4  # errors are raised; the log would print them too
        self._input = manifest["inputs"][0]["name"]
        self._prepare = input_converter(manifest)
        self._outputs = [manifest["outputs"][0]["name"]]

    def run(self, images: np.ndarray) -> np.ndarray:
        """Embeddings, float32 (N, D), of preprocessed images, float32 (N, 3, H, W)."""
        feeds = {self._input: self._prepare(images)}
        output: np.ndarray = self._session.run(self._outputs, feeds, self._run_options)[0]
        return output.astype(np.float32, copy=False)

    def facts(self) -> dict[str, Any]:
        """What is actually in use."""
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

    def cancel(self) -> None:
        """Stop a run in another thread; the model cannot run again."""
        self._run_options.terminate = True

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
        # A node that the accelerator does not support then fails instead of running on the CPU.
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    return options
