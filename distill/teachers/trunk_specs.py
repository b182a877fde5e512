"""The architectures of published trunks, as plain values: the zoo lists them without loading torch.

``trunks.py`` infers them from a state dict and builds their networks.
"""

from __future__ import annotations

from dataclasses import dataclass

# What DINO's, iBOT's and DINOv2's releases add to the number of patches a side before they divide by the grid.
POSITION_OFFSET = 0.1


@dataclass(frozen=True)
class VitTrunk:
    """A plain vision transformer with its CLS token as the output; LayerNorm eps 1e-6, head dimension 64."""

    width: int
    depth: int
    patch: int
    grid: int = 14  # patches a side of the position embedding; 14 at 224 px and patch 16
    hidden: int = 0  # of the MLP; 0 means 4 x width
    position_offset: float = POSITION_OFFSET  # when the position embedding is resampled; 0 in MSN

    def __str__(self) -> str:
        """The description in error messages."""
        return f"a ViT {self.width} wide, {self.depth} deep, patch {self.patch}"


@dataclass(frozen=True)
class ResNetTrunk:
    """A ResNet of bottlenecks; a `stem` of 64 is the ordinary width."""

    stem: int = 64
    depths: tuple[int, ...] = (3, 4, 6, 3)

    def __str__(self) -> str:
        """The description in error messages."""
        return f"a ResNet of {sum(self.depths)} bottlenecks with a stem of {self.stem} channels"


@dataclass(frozen=True)
class SwinTrunk:
    """A Swin transformer with the mean of its last stage's tokens as the output."""

    width: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    heads: tuple[int, ...] = (3, 6, 12, 24)
    window: int = 7
    patch: int = 4
    always_partition: bool = False  # the last stage keeps the full window although its feature map is smaller

    def __str__(self) -> str:
        """The description in error messages."""
        return f"a Swin {self.width} wide, {sum(self.depths)} deep, window {self.window}"


@dataclass(frozen=True)
class XcitTrunk:
    """An XCiT with its CLS token as the output."""

    width: int
    depth: int
    patch: int
    heads: int = 8
    hidden: int = 0  # of the MLP; 0 means 4 x width

    def __str__(self) -> str:
        """The description in error messages."""
        return f"an XCiT {self.width} wide, {self.depth} deep, patch {self.patch}"


@dataclass(frozen=True)
class TimmTrunk:
    """The model that timm builds under this name."""

    name: str

    def __str__(self) -> str:
        """The description in error messages."""
        return f"timm's {self.name}"


TrunkSpec = VitTrunk | ResNetTrunk | SwinTrunk | XcitTrunk | TimmTrunk
