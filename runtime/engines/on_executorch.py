"""Run ExecuTorch programs; the interface is described in on_onnxruntime.py.

Phones run the same program in ExecuTorch's C++, Java or Swift library; this engine uses its Python wheel.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from robx.runtime.device.engine import check_settings, first_line, model_path


def open_model(folder: str, manifest: dict[str, Any], settings: dict[str, Any]) -> ExecuTorchModel:
    """Open a bundle's .pte file.

    Args:
        folder: the bundle's folder.
        manifest: its manifest.json, parsed.
        settings: ``threads`` (int >= 1); ``provider`` may be cpu or xnnpack.

    Raises:
        ImportError: executorch is not installed.
        RuntimeError: the file is not a program, needs kernels that this build lacks, or XNNPACK was requested and the
            program delegates nothing to it.
    """
    check_settings("ExecuTorch", settings, ("cpu", "xnnpack"))
    return ExecuTorchModel(folder, manifest, settings)


class ExecuTorchModel:
    """One loaded method."""

    def __init__(self, folder: str, manifest: dict[str, Any], settings: dict[str, Any]) -> None:
        import torch
        from executorch.runtime import Runtime

        self._torch, self._threads = torch, _set_threads(int(settings.get("threads") or 1))
        path = Path(model_path(folder, manifest))
        # The program names the backend of each delegated part; the rest runs on the portable kernels.
        self._provider = "xnnpack" if b"XnnpackBackend" in path.read_bytes() else "cpu"
        if settings.get("provider") == "xnnpack" and self._provider != "xnnpack":
            raise RuntimeError("no part of the program is for XNNPACK: ExecuTorch would run it on its portable kernels")
        try:
            self._program = Runtime.get().load_program(path)
            self._method = self._program.load_method("forward")
        except Exception as error:
            raise RuntimeError(f"executorch cannot open {path.name}: {first_line(error)}") from error
        self._dtype = np.dtype(manifest["inputs"][0]["dtype"])

    def run(self, images: np.ndarray) -> np.ndarray:
        """Embeddings, float32 (N, D), of preprocessed images, float32 (N, 3, H, W); N is the bundle's batch."""
        pixels = self._torch.from_numpy(np.ascontiguousarray(images, dtype=self._dtype))
        # The output is in the program's memory, which the next call overwrites.
        return np.array(self._method.execute([pixels])[0].numpy(), dtype=np.float32)

    def facts(self) -> dict[str, Any]:
        """What is actually in use."""
        return {
            "engine": "executorch",
            "version": metadata.version("executorch"),
            "provider": self._provider,
            "threads": self._threads,
            "precision": "the file's",
            "fallback": False,
        }

    def close(self) -> None:
        """Free the method, then the program."""
        self._method = self._program = None


def _set_threads(threads: int) -> int | None:
    """Resize the process's thread pool; returns its size, or None where the wheel does not report it."""
    from executorch.extension.pybindings import portable_lib

    if not hasattr(portable_lib, "_unsafe_reset_threadpool"):
        return None
    portable_lib._unsafe_reset_threadpool(threads)  # unsafe while a model runs; none does yet
    return int(portable_lib._threadpool_get_thread_count())
