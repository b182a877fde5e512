"""Run OpenVINO IR and ONNX models in OpenVINO; the interface is described in on_onnxruntime.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from robx.runtime.device.engine import input_converter, model_path

_HINTS = ("f32", "f16", "bf16")


def open_model(folder: str, manifest: dict[str, Any], settings: dict[str, Any]) -> OpenVinoModel:
    """Open a bundle's model file.

    Args:
        folder: the bundle's folder.
        manifest: its manifest.json, parsed.
        settings: ``threads`` (int >= 1) and, optionally, ``provider`` (cpu, gpu or npu), ``precision_hint`` (f32, f16
            or bf16: the type that float operations compute in) and ``batch`` (images per call, if it never changes).

    Raises:
        ImportError: openvino is not installed.
        RuntimeError: the file is not a model, or OpenVINO uses another device or precision than the requested one.
    """
    return OpenVinoModel(folder, manifest, settings)


class OpenVinoModel:
    """One compiled model with one stream and one request, optimised for the latency of a single image."""

    def __init__(self, folder: str, manifest: dict[str, Any], settings: dict[str, Any]) -> None:
        import openvino as ov

        device = str(settings.get("provider") or "cpu").upper()
        threads, hint = int(settings.get("threads") or 1), str(settings.get("precision_hint") or "f32")
        if hint not in _HINTS:
            raise RuntimeError(f"unknown precision hint {hint!r}: one of {', '.join(_HINTS)}")
        # By default the CPU plugin chooses bf16 where the processor supports it.
        config = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1", "INFERENCE_PRECISION_HINT": hint}
        if device == "CPU":
            config["INFERENCE_NUM_THREADS"] = str(threads)
            config["ENABLE_CPU_PINNING"] = "NO"  # the runner sets the affinity itself
        path = Path(model_path(folder, manifest))
        try:
            core, self._tensor = ov.Core(), ov.Tensor
            model = core.read_model(str(path))
            batch, *image = manifest["inputs"][0]["shape"]
            if batch is None and settings.get("batch"):
                # A model compiled for one shape is faster than for any batch, most of all if its graph computes shapes.
                model.reshape([int(settings["batch"]), *(-1 if side is None else side for side in image)])
            # The request crashes if its compiled model is garbage-collected first, so both are kept.
            self._compiled = core.compile_model(model, device, config)
            self._request = self._compiled.create_infer_request()
        except Exception as error:  # the bindings raise RuntimeError and others
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            reason = lines[-1] if lines else type(error).__name__
            raise RuntimeError(f"openvino cannot open {path.name} on {device}: {reason}") from error
        self._facts: dict[str, Any] = {"engine": "openvino", "version": str(ov.__version__)}
        self._facts.update(_properties(self._compiled))
        if self._facts["provider"] != [device]:
            raise RuntimeError(f"openvino runs on {self._facts['provider']} and {device} was asked for")
        if self._facts["precision_hint"] not in (hint, None):  # a CPU without f16 silently uses bf16 or f32
            raise RuntimeError(f"openvino computes in {self._facts['precision_hint']} here and {hint} was asked for")
        self._prepare, self._output = (
            input_converter(manifest),
            _output_index(self._compiled, manifest["outputs"][0]["name"]),
        )

    def run(self, images: np.ndarray) -> np.ndarray:
        """Embeddings, float32 (N, D), of preprocessed images, float32 (N, 3, H, W)."""
        array = self._prepare(images)
        # infer([array]) packs and unpacks dictionaries, which costs 60 microseconds more per call.
        self._request.set_input_tensor(self._tensor(array, shared_memory=True))
        self._request.infer()
        return np.array(self._request.get_output_tensor(self._output).data, dtype=np.float32)

    def facts(self) -> dict[str, Any]:
        """What is actually in use."""
        return dict(self._facts)

    def cancel(self) -> None:
        """Stop a run in another thread."""
        self._request.cancel()

    def close(self) -> None:
        """Free the request, then the compiled model."""
        self._request = None
        self._compiled = None


def _output_index(compiled: Any, name: str) -> int:
    """The index of the output called `name`; 0 if there is none, since a converter may have renamed it."""
    return next((i for i, output in enumerate(compiled.outputs) if name in output.get_names()), 0)


def _properties(compiled: Any) -> dict[str, Any]:
    """What the compiled model reports, not what was requested."""

    def read(name: str, form: Any) -> Any:
        try:
            return form(compiled.get_property(name))
        except Exception:  # not every plugin has every property: a GPU has no threads
            return None

    return {
        # Some plugins report an index, "GPU.0".
        "provider": [str(device).split(".")[0] for device in compiled.get_property("EXECUTION_DEVICES")],
        "fallback": False,
        "performance_hint": "LATENCY",
        "precision_hint": read("INFERENCE_PRECISION_HINT", lambda kind: str(kind.get_type_name())),
        "threads": read("INFERENCE_NUM_THREADS", int),
        "streams": read("NUM_STREAMS", int),
        "pinning": read("ENABLE_CPU_PINNING", bool),
        "input_shape": str(compiled.inputs[0].partial_shape),
    }
