"""OpenVINO IR and ONNX models in OpenVINO; the engine form is on_onnxruntime.py's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

_HINTS = {"f32": "f32", "f16": "f16", "bf16": "bf16"}


def open_model(folder: str, manifest: dict[str, Any], settings: dict[str, Any]) -> OpenVinoModel:
    """Open a bundle's model file.

    Args:
        folder: the bundle's folder.
        manifest: its manifest.json, parsed.
        settings: ``threads`` (int >= 1) and, optionally, ``provider`` (cpu, gpu or npu), ``precision_hint`` (f32, f16
            or bf16: what the float operations compute in) and ``batch`` (of every call, where it is always the same).

    Raises:
        ImportError: openvino is not installed.
        RuntimeError: the file is no model, or the device or precision is another than the one asked for.
    """
    return OpenVinoModel(folder, manifest, settings)


class OpenVinoModel:
    """One compiled model with one stream and one request, tuned for the latency of a single image."""

    def __init__(self, folder: str, manifest: dict[str, Any], settings: dict[str, Any]) -> None:
        import openvino as ov

        device = str(settings.get("provider") or "cpu").upper()
        threads, hint = int(settings.get("threads") or 1), str(settings.get("precision_hint") or "f32")
        if hint not in _HINTS:
            raise RuntimeError(f"unknown precision hint {hint!r}: one of {', '.join(_HINTS)}")
        # Left alone, the CPU plugin picks bf16 by itself where the processor has it.
        config = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1", "INFERENCE_PRECISION_HINT": _HINTS[hint]}
        if device == "CPU":
            config["INFERENCE_NUM_THREADS"] = str(threads)
            config["ENABLE_CPU_PINNING"] = "NO"  # the runner's own affinity holds
        path = Path(folder) / next(f["path"] for f in manifest["files"] if f["role"] == "model")
        try:
            core, self._tensor = ov.Core(), ov.Tensor
            model = core.read_model(str(path))
            batch, *image = manifest["inputs"][0]["shape"]
            if batch is None and settings.get("batch"):
                # Planned for one shape it is faster than for any batch, most so where a graph computes with shapes.
                model.reshape([int(settings["batch"]), *image])
            # The request crashes when its compiled model is collected first, so both are kept.
            self._compiled = core.compile_model(model, device, config)
            self._request = self._compiled.create_infer_request()
        except Exception as error:  # its bindings raise RuntimeError and others
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            reason = lines[-1] if lines else type(error).__name__
            raise RuntimeError(f"openvino cannot open {path.name} on {device}: {reason}") from error
        self._facts: dict[str, Any] = {"engine": "openvino", "version": str(ov.__version__)}
        self._facts.update(_properties(self._compiled))
        if self._facts["provider"] != [device]:
            raise RuntimeError(f"openvino runs on {self._facts['provider']} and {device} was asked for")
        if self._facts["precision_hint"] not in (hint, None):  # a CPU without f16 takes bf16 or f32 and says nothing
            raise RuntimeError(f"openvino computes in {self._facts['precision_hint']} here and {hint} was asked for")
        self._prepare, self._output = _as_input(manifest), _place(self._compiled, manifest["outputs"][0]["name"])

    def run(self, images: np.ndarray) -> np.ndarray:
        """Embeddings, float32 (N, D), of preprocessed images, float32 (N, 3, H, W)."""
        array = self._prepare(images)
        # Half the cost of infer([array]), which packs and unpacks dictionaries: 60 microseconds a call.
        self._request.set_input_tensor(self._tensor(array, shared_memory=True))
        self._request.infer()
        return np.array(self._request.get_output_tensor(self._output).data, dtype=np.float32)

    def facts(self) -> dict[str, Any]:
        """What really runs."""
        return dict(self._facts)

    def close(self) -> None:
        """Free the request, then the compiled model."""
        self._request = None
        self._compiled = None


def _place(compiled: Any, name: str) -> int:
    """Which of the outputs has this name; the first where none has, for a converter may have renamed the only one."""
    return next((i for i, output in enumerate(compiled.outputs) if name in output.get_names()), 0)


def _properties(compiled: Any) -> dict[str, Any]:
    """What the compiled model says of itself, not what was asked for."""

    def told(name: str, form: Any) -> Any:
        try:
            return form(compiled.get_property(name))
        except Exception:  # the property is the plugin's own affair: a GPU has no threads
            return None

    return {
        # Some plugins answer with an index, "GPU.0".
        "provider": [str(device).split(".")[0] for device in compiled.get_property("EXECUTION_DEVICES")],
        "fallback": False,
        "performance_hint": "LATENCY",
        "precision_hint": told("INFERENCE_PRECISION_HINT", lambda kind: str(kind.get_type_name())),
        "threads": told("INFERENCE_NUM_THREADS", int),
        "streams": told("NUM_STREAMS", int),
        "pinning": told("ENABLE_CPU_PINNING", bool),
        "input_shape": str(compiled.inputs[0].partial_shape),
    }


def _as_input(manifest: dict[str, Any]) -> Any:
    """A function from normalised images to what the model takes: itself, another float, or the uint8 pixels again."""
    dtype = np.dtype(manifest["inputs"][0]["dtype"])
    if dtype != np.uint8:
        return lambda images: np.ascontiguousarray(images, dtype=dtype)
    mean, std = (np.array(manifest["preprocessing"][k], np.float32).reshape(1, 3, 1, 1) for k in ("mean", "std"))
    return lambda images: np.clip(np.rint((images * std + mean) * 255), 0, 255).astype(np.uint8)
