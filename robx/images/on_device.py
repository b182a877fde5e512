"""Pixels to a model's input on a PyTorch device: bytes travel there, a quarter of what floats would take."""

from __future__ import annotations

import torch
from torch import Tensor

from robx.records import Preprocessing


def normalised(pixels: Tensor, preprocessing: Preprocessing) -> Tensor:
    """uint8 pixels (N, H, W, 3) as float32 (N, 3, H, W) on their device, by `decode.normalise_pixels`' formula."""
    mean, std = (
        torch.tensor(values, dtype=torch.float32, device=pixels.device)[:, None, None]
        for values in (preprocessing.mean, preprocessing.std)
    )
    planes = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    return planes.div_(255).sub_(mean).div_(std)
