"""Forward passes of the releases where timm's differ, so that a teacher gives its release's output at every size.

ViT    DINO, iBOT, MSN and DINOv2 (without registers) resample the position embedding by bicubic interpolation without
       antialiasing, and all but MSN add 0.1 to the target size before dividing by the grid. timm antialiases, which
       changes the features by 0.5 % at 192 pixels to 3 % at 64.
Swin   iBOT pads a map to whole windows before the cyclic shift; timm shifts first.

N images   H W patch grid   D width
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock, window_partition, window_reverse
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from robx.distill.teachers.trunk_specs import POSITION_OFFSET


def follow_release(trunk: nn.Module, *, position_offset: float = POSITION_OFFSET) -> None:
    """Make a ViT (CLS token, no registers) or a Swin of timm follow its release, in place; other trunks stay."""
    # Only the methods change, so the class is replaced: timm's factories build the modules, and the keys stay.
    if isinstance(trunk, VisionTransformer):
        trunk.__class__ = ReleaseVit
        cast(ReleaseVit, trunk).position_offset = position_offset
    elif isinstance(trunk, SwinTransformer):
        for module in trunk.modules():
            if isinstance(module, SwinTransformerBlock):
                module.__class__ = _ReleaseSwinBlock


class ReleaseVit(VisionTransformer):
    """A ViT with its release's position embedding; made by :func:`follow_release`."""

    position_offset: float

    def _pos_embed(self, x: Tensor) -> Tensor:
        """Patches (N, H, W, D) -> tokens (N, 1 + H W, D) with positions."""
        number, height, width, channels = x.shape
        positions = resample_positions(
            cast(Tensor, self.pos_embed),
            grid=self.patch_embed.grid_size,
            size=(height, width),
            offset=self.position_offset,
        )
        tokens = torch.cat(
            [cast(Tensor, self.cls_token).expand(number, -1, -1), x.reshape(number, -1, channels)], dim=1
        )
        embedded: Tensor = self.pos_drop(tokens + positions)
        return embedded


def resample_positions(positions: Tensor, *, grid: tuple[int, int], size: tuple[int, int], offset: float) -> Tensor:
    """Position embedding (1, 1 + gh gw, D), the CLS token's first, of a `grid` (gh, gw) for a `size` (H, W)."""
    if size == grid:
        return positions
    image = positions[:, 1:].reshape(1, *grid, -1).permute(0, 3, 1, 2).float()
    scale = ((size[0] + offset) / grid[0], (size[1] + offset) / grid[1])
    resampled = F.interpolate(image, scale_factor=scale, mode="bicubic")
    if resampled.shape[-2:] != size:  # without an offset, rounding may lose a row
        resampled = F.interpolate(image, size=size, mode="bicubic")
    return torch.cat([positions[:, :1], resampled.flatten(2).transpose(1, 2).to(positions.dtype)], dim=1)


class _ReleaseSwinBlock(SwinTransformerBlock):
    """Attention in windows of a map that is padded first, then shifted."""

    def _attn(self, x: Tensor) -> Tensor:
        """Maps (N, H, W, D) -> the same shape."""
        _, height, width, channels = x.shape
        window, shift = self.window_size, self.shift_size
        padded = F.pad(x, (0, 0, 0, -width % window[1], 0, -height % window[0]))
        rows, columns = padded.shape[1:3]
        if any(shift):
            padded = padded.roll((-shift[0], -shift[1]), dims=(1, 2))
        windows = window_partition(padded, window).view(-1, self.window_area, channels)
        windows = self.attn(windows, mask=self.get_attn_mask(padded)).view(-1, *window, channels)
        merged: Tensor = window_reverse(windows, window, rows, columns)
        if any(shift):
            merged = merged.roll(shift, dims=(1, 2))
        return merged[:, :height, :width].contiguous()
