"""Run a Student in torch: the reference that every engine is compared with. Host only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from robx.runtime.device.engine import check_settings


def open_model(folder: str, manifest: dict[str, Any], settings: dict[str, Any]) -> TorchModel:
    """Open a Student's folder.

    Args:
        folder: contains student.safetensors and student.json.
        manifest: unused; part of the engine interface.
        settings: ``threads`` (int >= 1) and, optionally, ``provider`` (cpu or cuda).

    Raises:
        ImportError: torch or timm is not installed.
        RuntimeError: CUDA was requested and there is no CUDA device.
    """
    return TorchModel(folder, settings, check_settings("torch", settings, ("cpu", "cuda")))


class TorchModel:
    """The trunk in float32, in eval mode."""

    def __init__(self, folder: str, settings: dict[str, Any], provider: str) -> None:
        import torch

        from robx.trunk import load_trunk

        self._device = provider
        if self._device == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("torch finds no CUDA device")
        self._torch, self._threads = torch, int(settings.get("threads") or 1)
        student, trunk = load_trunk(Path(folder))
        self._preprocessing, self._trunk = student.preprocessing, trunk.to(self._device)
        # A GPU normalises faster than the threads that read images, and bytes take a quarter of the transfer.
        self.takes_pixels = self._device == "cuda"

    def run(self, images: np.ndarray) -> np.ndarray:
        """Embeddings, float32 (N, D), of preprocessed images, float32 (N, 3, H, W), or of uint8 pixels (N, H, W, 3)."""
        from robx.images.on_device import normalised

        before = self._torch.get_num_threads()
        self._torch.set_num_threads(self._threads)
        try:
            with self._torch.inference_mode():
                pixels = self._torch.from_numpy(np.array(images)).to(self._device)
                if images.dtype == np.uint8:
                    pixels = normalised(pixels, self._preprocessing)
                features: np.ndarray = self._trunk(pixels).float().cpu().numpy()
        finally:
            self._torch.set_num_threads(before)
        return features

    def facts(self) -> dict[str, Any]:
        """What is actually in use."""
        return {
            "engine": "torch",
            "version": str(self._torch.__version__),
            "provider": self._device,
            "threads": self._threads,
            "fallback": False,
        }

    def close(self) -> None:
        """Free the trunk."""
        self._trunk = None  # type: ignore[assignment]
