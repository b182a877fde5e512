"""The PyTorch network that every exporter and converter starts from: the trunk and its head, rewritten for export.

Pixels (N, 3, H, W) in; embedding (N, D) and, with a head, logits (N, C) out; float32 at both ends. Every rewrite is
compared with the trunk as timm builds it, shape included, before anything is exported.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from timm.utils.model import reparameterize_model
from torch import Tensor, nn

from robx.errors import ArtifactError, InputError, first_line
from robx.export.parity import parity
from robx.export.quiet import quiet
from robx.linear_head import Head
from robx.records import Preprocessing, Student, TensorSpec
from robx.trunk import embed

PIXELS, EMBEDDING, LOGITS = "pixels", "embedding", "logits"
_FUSING = ("fuse", "reparameterize", "switch_to_deploy")  # what timm.utils.reparameterize_model looks for


class ExportModel(nn.Module):
    """The network that is exported."""

    rewrites: tuple[str, ...]  # what differs from the trunk as timm builds it, for the manifest

    def __init__(
        self, trunk: nn.Module, *, head: Head | None, uint8: Preprocessing | None, rewrites: tuple[str, ...] = ()
    ) -> None:
        super().__init__()
        self.trunk, self.rewrites = trunk, rewrites
        self.head: nn.Linear | None = None
        if head is not None:
            self.head = nn.Linear(head.weight.shape[1], head.weight.shape[0])
            self.head.weight = nn.Parameter(torch.from_numpy(head.weight.copy()), requires_grad=False)
            self.head.bias = nn.Parameter(torch.from_numpy(head.bias.copy()), requires_grad=False)
        self.uint8 = uint8 is not None
        self.mean: Tensor
        self.scale: Tensor
        if uint8 is not None:
            self.register_buffer("mean", 255 * torch.tensor(uint8.mean).view(1, 3, 1, 1))
            self.register_buffer("scale", 1 / (255 * torch.tensor(uint8.std)).view(1, 3, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Embedding (N, D), and logits (N, C) with a head, of pixels (N, 3, H, W)."""
        if self.uint8:
            pixels = (pixels.float() - self.mean) * self.scale
        embedding: Tensor = self.trunk(pixels)
        return embedding if self.head is None else (embedding, self.head(embedding))


class _MeanPool(nn.Module):
    """Global average pooling of (N, C, H, W) as a plain mean, which every converter and quantiser understands."""

    def __init__(self, *, keep: bool) -> None:
        super().__init__()
        self.keep = keep

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3), keepdim=self.keep)


def export_model(
    trunk: nn.Module, student: Student, *, head: Head | None = None, uint8_input: bool = False
) -> ExportModel:
    """A copy of `trunk` ready for any exporter: fused, pools as means, position embedding fixed, eval, float32.

    With a dynamic batch the ONNX exporter turns an adaptive pool and its flatten into a chain of Shape, Range and
    Gather, which silently costs an int8 OpenVINO model half of its accuracy; a mean becomes one ReduceMean.

    Raises:
        InputError: the head's width differs from the student's.
        ArtifactError: the rewritten network does not give the trunk's embeddings, or their width is not the student's.
    """
    if head is not None and head.weight.shape[1] != student.width:
        raise InputError(
            f"the head takes {head.weight.shape[1]} features and the student gives {student.width}: give a head that "
            "was trained on this student"
        )
    reference = trunk.float().cpu().eval()
    shape = student.preprocessing.shape
    pixels = torch.randn((2, 3, *shape), generator=torch.Generator().manual_seed(0))
    expected = embed(reference, pixels).numpy()
    if expected.shape != (2, student.width):
        raise ArtifactError(
            f"{student.timm_name} returns {expected.shape[1:]} for an image and its student.json says {student.width}: "
            "distil it again"
        )
    exported = copy.deepcopy(reference).requires_grad_(False)
    exported, rewrites = _reparameterise(exported, pixels, expected)
    _replace_pools(exported)
    _fix_image_size(exported, shape)
    parity(
        expected, embed(exported, pixels).numpy(), precision="fp32", what=f"{student.timm_name} rewritten for export"
    )
    uint8 = student.preprocessing if uint8_input else None
    return ExportModel(exported, head=head, uint8=uint8, rewrites=rewrites).eval()


_SIZES = (32, 64, 96, 112, 128, 160, 192, 224, 256)  # tried for an error message


def trunk_at_size(trunk: nn.Module, student: Student) -> nn.Module:
    """`trunk` for the input size in `student`, by timm's ``set_input_size`` where the network is built for one size.

    Raises:
        InputError: the network cannot take this size; the message names sizes that it can.
    """
    shape = student.preprocessing.shape
    try:
        return _sized(trunk, shape)
    except Exception as error:
        works = [f"{side}" for side in _SIZES if _takes(trunk, (side, side))]
        advice = f"give --size {works[0]}" if len(works) == 1 else f"give --size, one of {', '.join(works)}"
        raise InputError(
            f"{student.timm_name} cannot take {shape[0]} x {shape[1]} pixels ({first_line(error)}): "
            f"{advice if works else 'choose another student'}"
        ) from error


def _sized(trunk: nn.Module, shape: tuple[int, int]) -> nn.Module:
    pixels = torch.zeros((1, 3, *shape))
    try:
        embed(trunk, pixels)
        return trunk
    except Exception:
        if not hasattr(trunk, "set_input_size"):
            raise
    trunk = copy.deepcopy(trunk)
    with quiet():
        trunk.set_input_size(img_size=shape)  # type: ignore[operator]
    embed(trunk, pixels)
    return trunk


def _takes(trunk: nn.Module, shape: tuple[int, int]) -> bool:
    try:
        _sized(trunk, shape)
    except Exception:
        return False
    return True


def tensor_specs(
    student: Student, *, batch: int | None, uint8_input: bool, labels: int | None
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """The inputs and outputs of the exported model."""
    shape = (batch, 3, *student.preprocessing.shape)
    pixels = TensorSpec(name=PIXELS, dtype="uint8" if uint8_input else "float32", shape=shape)
    outputs = [TensorSpec(name=EMBEDDING, dtype="float32", shape=(batch, student.width))]
    if labels is not None:
        outputs.append(TensorSpec(name=LOGITS, dtype="float32", shape=(batch, labels)))
    return (pixels,), tuple(outputs)


def _reparameterise(trunk: nn.Module, pixels: Tensor, expected: np.ndarray) -> tuple[nn.Module, tuple[str, ...]]:
    """The trunk in its inference form (RepVGG, MobileOne, FastViT, RepViT, ...) and what was done, for the manifest.

    The branches of a training-time block become one convolution: the same function, several times as fast.
    """
    blocks = sum(any(hasattr(m, name) for name in _FUSING) for m in trunk.modules())
    if not blocks:
        return trunk, ()
    try:
        with quiet():
            fused = reparameterize_model(trunk).eval().requires_grad_(False)
        parity(expected, embed(fused, pixels).numpy(), precision="fp32", what="the fused network")
    except Exception as error:  # timm's own fusing code, of thirty networks
        return trunk, (f"not re-parameterised, so it may be slow: {first_line(error)}",)
    return fused, (f"re-parameterised for inference: {blocks} blocks fused",)


def _replace_pools(module: nn.Module) -> None:
    """Replace torch's adaptive average pools, in place.

    timm's own FastAdaptiveAvgPool stays: it is a plain mean already, over the axes of its layout (NCHW or NHWC).
    """
    from timm.layers.adaptive_avgmax_pool import SelectAdaptivePool2d

    for name, child in module.named_children():
        if (
            isinstance(child, SelectAdaptivePool2d)
            and _is_average(child.pool)
            and isinstance(child.flatten, nn.Flatten)
        ):
            setattr(module, name, _MeanPool(keep=False))
        elif _is_average(child):
            setattr(module, name, _MeanPool(keep=True))
        else:
            _replace_pools(child)


def _is_average(module: nn.Module) -> bool:
    return isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size in (1, (1, 1))


def _fix_image_size(trunk: nn.Module, shape: tuple[int, int]) -> None:
    """A ViT with a dynamic size resizes its position embedding in every forward pass; do it once, for this size."""
    if not getattr(trunk, "dynamic_img_size", False):
        return
    with quiet():
        trunk.set_input_size(img_size=shape)  # type: ignore[operator]
    trunk.dynamic_img_size = False  # type: ignore[assignment]
    patches: Any = trunk.patch_embed
    patches.dynamic_img_pad, patches.strict_img_size, patches.flatten, patches.output_fmt = False, True, True, None
