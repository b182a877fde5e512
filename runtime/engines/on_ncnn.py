"""Run ncnn models; the interface is described in on_onnxruntime.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from robx.runtime.device.engine import check_settings


def open_model(folder: str, manifest: dict[str, Any], settings: dict[str, Any]) -> NcnnModel:
    """Open a bundle's .param and .bin files.

    Args:
        folder: the bundle's folder.
        manifest: its manifest.json, parsed.
        settings: ``threads`` (int >= 1), and ``precision_hint`` (f32, f16 or bf16: the type that layers compute in,
            where the processor supports it); ``provider`` may be cpu.

    Raises:
        ImportError: ncnn is not installed.
        RuntimeError: the files are not a model.
    """
    check_settings("ncnn", {"provider": settings.get("provider")}, ("cpu",))
    return NcnnModel(folder, manifest, settings)


class NcnnModel:
    """One network; ncnn takes one image at a time."""

    def __init__(self, folder: str, manifest: dict[str, Any], settings: dict[str, Any]) -> None:
        import ncnn

        self._ncnn, self._threads = ncnn, int(settings.get("threads") or 1)
        self._hint = str(settings.get("precision_hint") or "f32")
        self._net = ncnn.Net()
        options = self._net.opt
        options.num_threads, options.use_vulkan_compute = self._threads, False
        half = self._hint == "f16"
        options.use_fp16_packed = options.use_fp16_storage = options.use_fp16_arithmetic = half
        options.use_bf16_storage = self._hint == "bf16"
        files = {f["role"]: str(Path(folder, f["path"])) for f in manifest["files"]}
        # ncnn reports a broken file by a status only, and an unloaded network by empty outputs.
        if self._net.load_param(files["model"]) or self._net.load_model(files["weights"]):
            raise RuntimeError(f"ncnn cannot open {Path(files['model']).name}")

    def run(self, images: np.ndarray) -> np.ndarray:
        """Embeddings, float32 (N, D), of preprocessed images, float32 (N, 3, H, W)."""
        return np.stack([self._run(np.ascontiguousarray(image, dtype=np.float32)) for image in images])

    def _run(self, image: np.ndarray) -> np.ndarray:
        extractor = self._net.create_extractor()
        # A Mat over numpy's memory has another channel stride than ncnn assumes: without clone() the result is wrong.
        extractor.input("in0", self._ncnn.Mat(image).clone())
        status, output = extractor.extract("out0")
        if status or output.empty():
            raise RuntimeError(f"ncnn failed with status {status}")
        return np.array(output, dtype=np.float32).reshape(-1)

    def facts(self) -> dict[str, Any]:
        """What is actually in use."""
        return {
            "engine": "ncnn",
            "version": str(self._ncnn.__version__),
            "provider": "cpu",
            "threads": self._threads,
            "precision_hint": self._hint,
            "fallback": False,
        }

    def close(self) -> None:
        """Free the network."""
        self._net.clear()
