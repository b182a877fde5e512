"""Outputs of a Student's trunk that a Bundle does not have: the last four CLS tokens, features before the final norm.

For a Bundle, protocols use the embedding instead, and their records say so.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor, nn

from robx.images.on_device import normalised
from robx.records import Bundle, Student
from robx.trunk import is_vit, load_trunk

Output = Literal["embedding", "last4", "before_norm"]
LAST = 4


class TrunkSession:
    """A Session on a Student's trunk, in eval mode and frozen, with a chosen output."""

    def __init__(self, folder: Path, *, output: Output, threads: int = 1, device: str = "cpu") -> None:
        """Open the Student in `folder` on a device of PyTorch's.

        A CNN has no tokens and returns the embedding, whatever `output` is.
        """
        self.student, self._trunk = load_trunk(folder)
        self.bundle: Bundle | Student = self.student
        self._trunk.requires_grad_(False)
        self.output: Output = output if is_vit(self.student.timm_name) else "embedding"
        self.device = torch.device(device)
        self.takes_pixels = self.device.type == "cuda"  # `run` then normalises uint8 pixels (N, H, W, 3) there
        self._threads = threads
        self._trunk.to(self.device)
        if self.output == "before_norm":
            _remove_norms(self._trunk)

    @property
    def kinds(self) -> dict[str, slice]:
        """The feature kinds within a row of the output: name -> columns; the headline's first."""
        width = self.student.width
        if self.output == "last4":
            return {"last4": slice(0, LAST * width), "last": slice((LAST - 1) * width, LAST * width)}
        return {"embedding" if self.output == "embedding" else "before_norm": slice(0, width)}

    @torch.inference_mode()
    def features(self, images: Tensor) -> Tensor:
        """The output's rows (N, D or 4 D), float32, on the trunk's device, of inputs (N, 3, H, W) or uint8 pixels."""
        before = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        try:
            images = images.to(self.device, non_blocking=True)
            if images.dtype == torch.uint8:
                images = normalised(images, self.student.preprocessing)
            return self._rows(images).float()
        finally:
            torch.set_num_threads(before)

    def _rows(self, pixels: Tensor) -> Tensor:
        if self.output == "last4":
            layers = self._trunk.get_intermediate_layers(  # type: ignore[operator]
                pixels, n=LAST, return_prefix_tokens=True, norm=True
            )
            return torch.cat([prefix[:, 0] for _, prefix in layers], dim=1)
        features: Tensor = self._trunk(pixels)
        return features

    def run(self, images: np.ndarray) -> np.ndarray:
        """The output's rows of preprocessed images, float32 (N, 3, H, W), or of pixels, uint8 (N, H, W, 3)."""
        answer: np.ndarray = self.features(torch.from_numpy(images)).cpu().numpy()
        return answer

    def facts(self) -> dict[str, Any]:
        """The engine, its version and settings, and the output."""
        return {
            "engine": "torch",
            "version": str(torch.__version__),
            "provider": self.device.type,
            "threads": self._threads,
            "fallback": False,
            "output": self.output,
        }

    def close(self) -> None:
        """Free the trunk."""
        self._trunk = nn.Identity()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _remove_norms(trunk: nn.Module) -> None:
    """Replace timm's final norm, under either of its names, by the identity."""
    for name in ("norm", "fc_norm"):
        if isinstance(getattr(trunk, name, None), nn.Module):
            setattr(trunk, name, nn.Identity())
