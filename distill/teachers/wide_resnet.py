"""Bottleneck ResNets in which every layer is widened, such as SwAV's RN50-w2, -w4 and -w5.

They are not torchvision's or timm's ``wide_resnet50_2``, which widens the inner convolution only. The parameter names
are torchvision's, so a published state dict loads unchanged.

He et al., "Deep Residual Learning", arXiv 1512.03385, with the stride in the 3 x 3 convolution; widths: Caron et al.,
"Unsupervised Learning of Visual Features by Contrasting Cluster Assignments", arXiv 2006.09882, section 4.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

EXPANSION = 4


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3, 1 x 1 convolutions around a shortcut."""

    def __init__(self, channels: int, planes: int, *, stride: int) -> None:
        super().__init__()
        out = planes * EXPANSION
        self.conv1 = nn.Conv2d(channels, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.downsample: nn.Module | None = None
        if stride != 1 or channels != out:
            self.downsample = nn.Sequential(nn.Conv2d(channels, out, 1, stride=stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, 4 planes, H / stride, W / stride)."""
        shortcut = x if self.downsample is None else self.downsample(x)
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + shortcut)


class WideResNet(nn.Module):
    """Four stages of bottlenecks; `stem` is 64 for ResNet-50, 128, 256 and 320 for w2, w4 and w5."""

    def __init__(self, *, stem: int = 64, depths: tuple[int, ...] = (3, 4, 6, 3)) -> None:
        """Random weights; the output is 8 x 4 x `stem` wide for four stages."""
        super().__init__()
        self.conv1 = nn.Conv2d(3, stem, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        channels = stem
        self._stages = [f"layer{number}" for number in range(1, len(depths) + 1)]
        self.feature_info: list[dict[str, int]] = []  # as timm's networks have it
        for number, depth in enumerate(depths):
            planes, blocks = stem * 2**number, []
            for block in range(depth):
                blocks.append(Bottleneck(channels, planes, stride=2 if block == 0 and number else 1))
                channels = planes * EXPANSION
            self.add_module(self._stages[number], nn.Sequential(*blocks))
            self.feature_info.append({"num_chs": channels, "reduction": 4 * 2**number})
        self.num_features = channels

    def forward(self, x: Tensor) -> Tensor:
        """Pooled features (N, D) of pixels (N, 3, H, W)."""
        return self.forward_head(self.forward_intermediates(x)[0])

    def forward_intermediates(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The last stage's feature map and those of all stages, as timm's networks give them."""
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, stride=2, padding=1)
        maps = []
        for stage in self._stages:
            x = getattr(self, stage)(x)
            maps.append(x)
        return x, maps

    def forward_head(self, x: Tensor) -> Tensor:
        """The average over a feature map (N, D, h, w)."""
        return x.mean(dim=(2, 3))
