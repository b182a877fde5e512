"""The teacher: a frozen network, always in eval mode and outside of every graph.

A Teacher takes pixels that are normalised with ImageNet's mean and standard deviation, as the crops are; if it was
trained with another normalisation, the change is folded in, and it may see small images enlarged. Its scores are BEFORE
any temperature. In bf16 and fp16 the weights of its matrix products are kept in that precision; head, prototypes and
scores stay in float32.

N images   D width of the trunk   K prototypes (or head outputs, or classes)   P patches
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robx.distill.teachers.checkpoints import Channels
from robx.distill.teachers.frozen_heads import PrototypeHead
from robx.distill.teachers.trunks import has_tokens, patch_size_of, tokens, trunk_width
from robx.distill.teachers.zoo import Method, ZooEntry
from robx.errors import InputError
from robx.image_size import ImageSize, Shape, usual_preprocessing
from robx.images.decode import IMAGENET_MEAN, IMAGENET_STD
from robx.records import Preprocessing, TeacherInfo
from robx.trunk import map_stages, map_strides


@dataclass(frozen=True)
class TeacherScores:
    """A teacher's scores of N images, in float32, before the temperature."""

    crops: Tensor  # (N, K): dino, ibot: head logits; msn, headless: cosines; swav: prototype scores; classifier: logits
    patches: Tensor | None  # (N, P, Kp), the patch tokens' head logits, or (M, Kp) of the selected ones; iBOT only
    features: Tensor  # (N, D), the output of the trunk
    maps: Mapping[int, Tensor] | None = None  # {stride: (N, C, h, w)} of the stages; large ones are averaged


class Teacher(nn.Module):
    """A frozen network with its head: no gradients, and always in eval mode, even after ``.train()``."""

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        trunk: nn.Module,
        head: PrototypeHead | None,
        *,
        name: str,
        method: Method,
        info: TeacherInfo,
        preprocessing: Preprocessing,
        width: int,
        num_prototypes: int,
        mean: Channels = IMAGENET_MEAN,
        std: Channels = IMAGENET_STD,
    ) -> None:
        """Freeze `trunk` and `head`; `mean` and `std` are the normalisation that the trunk was trained with."""
        super().__init__()
        self.trunk, self.head = trunk, head
        self.name, self.method, self.info, self.preprocessing = name, method, info, preprocessing
        self.width, self.num_prototypes, self.patch_size = width, num_prototypes, patch_size_of(trunk)
        self.patch_prototypes: int | None = None
        if method == "ibot" and head is not None and has_tokens(trunk):
            shared = head.patch_prototypes is None
            self.patch_prototypes = len(head.prototypes if shared else cast(Tensor, head.patch_prototypes))
        self.mean, self.std = mean, std
        self.precision: torch.dtype | None = None  # of autocast; None: float32
        self.least_shape: Shape = (1, 1)  # smaller pixels are enlarged to it
        scale, shift = fold_normalisation(mean, std)
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", shift, persistent=False)
        self.requires_grad_(False)
        self.eval()

    @classmethod
    def of(
        cls, entry: ZooEntry, trunk: nn.Module, head: PrototypeHead | None, *, sha256: str, image_size: ImageSize
    ) -> Self:
        """The teacher of `entry` on crops of `image_size` pixels; `head` is None for timm's models.

        `sha256` is that of the weights, empty for random ones.
        """
        classes = cast(int, trunk.num_classes) if entry.method == "classifier" else 0
        how = {"classifier": {"prototypes": "none: class logits"}, "headless": {"prototypes": "not fitted"}}
        return cls(
            trunk,
            head,
            name=entry.name,
            method=entry.method,
            info=TeacherInfo(name=entry.name, sha256=sha256, licence=entry.licence, **how.get(entry.method, {})),
            # Resize to 256 and crop 224 is the protocol of all these releases; other sizes keep the ratio.
            preprocessing=usual_preprocessing(image_size),
            width=trunk_width(trunk),
            num_prototypes=classes if head is None else len(head.prototypes),
            mean=entry.mean,
            std=entry.std,
        )

    def set_head(self, head: PrototypeHead) -> None:
        """Give a teacher that was published without a head its fitted one, frozen and on the teacher's device."""
        self.head = head.to(self.scale.device).requires_grad_(False).eval()
        self.num_prototypes = len(head.prototypes)

    def enlarge_to(self, shape: Shape) -> None:
        """See pixels that are smaller than `shape` (height, width) enlarged to it from now on.

        A network that was trained on objects of 224-pixel images recognises more in a small image that is enlarged.
        """
        self.least_shape = shape

    def keep_in(self, precision: torch.dtype) -> None:
        """Compute in `precision` from now on, with the trunk's linear and convolution weights stored in it.

        Autocast would round these very weights in each forward pass, so the scores are the same, bit for bit. All other
        weights stay in float32, and so do those of layers that transform their weights before they use them.
        """
        self.precision = precision
        for module in self.trunk.modules():
            if type(module) in (nn.Linear, nn.Conv2d):
                module.to(precision)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.precision is None:
            return contextlib.nullcontext()
        return torch.autocast(self.scale.device.type, dtype=self.precision)

    def train(self, mode: bool = True) -> Teacher:
        """Stay in eval mode: BatchNorm keeps its running statistics, dropout and drop path stay off."""
        super().train(False)
        return self

    @torch.no_grad()
    def forward(
        self, pixels: Tensor, *, patches: bool | Tensor = True, maps: bool = False, scores: bool = True
    ) -> TeacherScores:
        """Score pixels (N, 3, H, W) that are normalised with ImageNet's mean and standard deviation.

        `patches` False skips an iBOT teacher's patch logits, for a student without patch tokens; places (M,) among all
        N * P patches select those of M patches. `maps` adds the feature maps of the stages, in place of patch logits.
        Without `scores` no head is run: the scores are (N, 0).
        """
        with self._autocast():
            pixels = self._input(pixels)
            if maps:
                return self._mapped(pixels, scores=scores)
            return self._scores(pixels, patches) if scores else _unscored(self._features(pixels))

    @property
    def map_strides(self) -> Mapping[int, int]:
        """The feature maps that the trunk has, {stride: channels}; empty if timm cannot give them."""
        return map_strides(self.trunk)

    def _mapped(self, pixels: Tensor, *, scores: bool) -> TeacherScores:
        last, found = map_stages(self.trunk, pixels)
        maps = {stride: each.float() for stride, each in found.items()}
        trunk, classifies = cast(Any, self.trunk), self.method == "classifier"
        if not scores:
            return _unscored(self._pooled(last) if classifies else trunk.forward_head(last).float(), maps)
        if classifies:
            return TeacherScores(trunk.forward_head(last).float(), None, self._pooled(last), maps)
        features = trunk.forward_head(last)
        return TeacherScores(self._require_head()(features).float(), None, features.float(), maps)

    def _scores(self, pixels: Tensor, patches: bool | Tensor) -> TeacherScores:
        if self.method == "classifier":
            maps = cast(Any, self.trunk).forward_features(pixels)
            logits = cast(Any, self.trunk).forward_head(maps)
            return TeacherScores(logits.float(), None, self._pooled(maps))
        head = self._require_head()
        if self.patch_prototypes is not None and patches is not False:
            features, places = tokens(self.trunk, pixels)
            selected = places.flatten(0, 1)[patches][None] if isinstance(patches, Tensor) else places
            logits = head.patches(selected).float()
            logits = logits[0] if isinstance(patches, Tensor) else logits
            return TeacherScores(head(features).float(), logits, features.float())
        features = self.trunk(pixels)
        return TeacherScores(head(features).float(), None, features.float())

    @torch.no_grad()
    def features(self, pixels: Tensor) -> Tensor:
        """The trunk's features (N, D), float32, of ImageNet-normalised pixels (N, 3, H, W); the head is not run."""
        with self._autocast():
            return self._features(self._input(pixels))

    def _features(self, pixels: Tensor) -> Tensor:
        if self.method == "classifier":
            return self._pooled(cast(Any, self.trunk).forward_features(pixels))
        return cast(Tensor, self.trunk(pixels).float())

    def _input(self, pixels: Tensor) -> Tensor:
        """The trunk's input: in its own normalisation, and enlarged if it is smaller than it should be."""
        pixels = pixels * self.scale + self.shift
        (height, width), (least_height, least_width) = pixels.shape[-2:], self.least_shape
        if height >= least_height and width >= least_width:
            return pixels
        return F.interpolate(pixels, size=self.least_shape, mode="bilinear", align_corners=False)

    def _require_head(self) -> PrototypeHead:
        if self.head is None:
            raise InputError(f"teacher {self.name} has no prototypes: give images (--data) to fit them to")
        return self.head

    def _pooled(self, maps: Tensor) -> Tensor:
        return cast(Tensor, cast(Any, self.trunk).forward_head(maps, pre_logits=True).float())


def _unscored(features: Tensor, maps: Mapping[int, Tensor] | None = None) -> TeacherScores:
    return TeacherScores(features.new_zeros(len(features), 0), None, features, maps)


def fold_normalisation(mean: Channels, std: Channels) -> tuple[Tensor, Tensor]:
    """Scale and shift, (3, 1, 1) each, from pixels normalised as ImageNet's to pixels normalised by `mean` and `std`.

    x = p std_i + mean_i, so (x - mean) / std = p (std_i / std) + (mean_i - mean) / std.
    """
    have_mean, have_std, want_mean, want_std = (
        torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD, mean, std)
    )
    return (have_std / want_std).float(), ((have_mean - want_mean) / want_std).float()
